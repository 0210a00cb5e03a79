// pymdownx.arithmatex marks the formulas of a page, KaTeX draws them. It lies beside this file, so that they are drawn
// without a network too: katex.min.js, katex.min.css, the .woff2 fonts and the licence of the npm package katex 0.19.1,
// unchanged. A newer release replaces all of them; where there is Node.js, the tests ask it to draw every formula.
document.addEventListener("DOMContentLoaded", () => {
  for (const element of document.querySelectorAll(".arithmatex")) {
    const [, display, inline] = element.textContent.trim().match(/^\\\[([^]*)\\\]$|^\\\(([^]*)\\\)$/);
    katex.render(display ?? inline, element, { displayMode: display !== undefined, throwOnError: false });
  }

  // A name or flag goes to the next line in one piece, not broken behind its hyphens; a whole command may still break.
  for (const code of document.querySelectorAll(".md-typeset :is(p, li) > code")) {
    if (code.textContent.length < 40) code.style.whiteSpace = "nowrap";
  }
});
