"""Every Python block of the documentation runs, docstring examples give what they say, and no page is forgotten."""

from __future__ import annotations

import ast
import doctest
import importlib
import json
import pkgutil
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import gymnasium
import pytest
import torch
from torchrl.objectives import common as torchrl_loss

import qsm_rl
from qsm_rl import training

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
# A block that cannot run here stands behind the line `<!-- not run: reason -->`.
BLOCK = re.compile(r"(?:<!-- not run: (\S.*) -->\n)?```python\n(.*?)```", flags=re.S)
MODULES = ["qsm_rl", *(module.name for module in pkgutil.walk_packages(qsm_rl.__path__, "qsm_rl."))]
PUBLIC_NAMES = [
    f"{module.__name__}.{name}" for module in (qsm_rl, qsm_rl.functional, training) for name in module.__all__
]


def blocks(page: Path) -> list[str]:
    return [code for reason, code in BLOCK.findall(page.read_text(encoding="utf-8")) if not reason]


@pytest.fixture
def environments_taken_back():
    """A page may register an environment, whose name other tests must not meet."""
    before = set(gymnasium.registry)
    yield
    for name in set(gymnasium.registry) - before:
        del gymnasium.registry[name]


@pytest.mark.usefixtures("environments_taken_back")
@pytest.mark.filterwarnings("ignore:No target network updater:UserWarning", "ignore:.*InitTracker:FutureWarning")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: str(page.relative_to(ROOT)))
def test_python_blocks_of_a_page_run_in_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    scope: dict = {"__name__": "page"}
    for block in blocks(page):
        exec(compile(block, str(page), "exec"), scope)


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").rglob("*.py")), ids=lambda path: path.stem)
def test_help_of_a_recipe_keeps_its_commands_on_lines_of_their_own(path):
    text = path.read_text(encoding="utf-8")
    assert "`python " not in (ast.get_docstring(ast.parse(text)) or "")
    # By default argparse runs all lines of a description together; the settings of a configuration have their own way.
    assert text.count("argparse.ArgumentParser(") == text.count("formatter_class=argparse.RawDescriptionHelpFormatter")


def test_twenty_lines_are_twenty():
    (program,) = blocks(DOCS / "index.md")
    assert len([line for line in program.splitlines() if line.strip()]) == 20


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


def test_every_public_name_has_a_docstring():
    undocumented = [name for name in qsm_rl.__all__ if not (getattr(qsm_rl, name).__doc__ or "").strip()]
    assert not undocumented


def test_every_public_name_has_one_api_entry():
    text = "\n".join(page.read_text(encoding="utf-8") for page in (DOCS / "api").glob("*.md"))
    entries = Counter(re.findall(r"^::: ([\w.]+)$", text, flags=re.M))
    missing = [name for name in PUBLIC_NAMES if entries[name] == 0]
    assert not missing, f"give each an entry `::: NAME` on a page under docs/api: {missing}"
    assert max(entries.values()) == 1, f"more than one entry: {[name for name in entries if entries[name] > 1]}"


def test_every_api_entry_exists():
    text = "\n".join(page.read_text(encoding="utf-8") for page in (DOCS / "api").glob("*.md"))
    for path in re.findall(r"^::: ([\w.]+)$", text, flags=re.M):
        module, _, name = path.rpartition(".")
        assert path in MODULES or hasattr(importlib.import_module(module), name), f"{path} does not exist"


def test_every_formula_is_where_the_description_says():
    page = (DOCS / "explanation" / "how-the-kit-is-built.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| .* \| (`.+\.py`) \| (.+) \|$", page.partition("## Where each formula is")[2], flags=re.M)
    assert len(rows) > 10
    for files, functions in rows:
        text = "".join((ROOT / "qsm_rl" / file).read_text(encoding="utf-8") for file in re.findall(r"`(.+?)`", files))
        for name in re.findall(r"`([\w.]+)`", functions):
            for part in name.split("."):
                assert re.search(rf"(def|class) {part}\b", text), f"{files}: {name}"


def test_every_page_stands_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    listed = Counter(re.findall(r"([\w/.-]+\.md)$", navigation, flags=re.M))
    there = {str(page.relative_to(DOCS)) for page in PAGES if page.name != "table.md"}  # a part of other pages
    assert there == set(listed), f"only in one of docs/ and mkdocs.yml's nav: {sorted(there ^ set(listed))}"
    assert max(listed.values()) == 1


def test_every_figure_comes_from_the_script():
    script = (DOCS / "figures" / "make_figures.py").read_text(encoding="utf-8")
    pictures = sorted((DOCS / "figures").glob("*.png"))
    assert pictures
    for picture in pictures:
        assert f'FOLDER / "{picture.name}"' in script, f"{picture.name} is made by no script"
        assert picture.stat().st_size < 120_000, f"{picture.name} has {picture.stat().st_size:,} bytes"
        assert any(picture.name in page.read_text(encoding="utf-8") for page in PAGES), f"{picture.name} is on no page"


@pytest.mark.skipif(shutil.which("node") is None, reason="draws formulas with Node.js, which is not installed")
def test_every_formula_can_be_drawn():
    formulas = {}
    for page in PAGES:
        text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.S)
        for display, inline in re.findall(r"\\\[(.*?)\\\]|\\\((.*?)\\\)", text, flags=re.S):
            formulas[display or inline] = page.name
    assert len(formulas) > 80
    program = """
        const katex = require(process.argv[1]);
        for (const formula of JSON.parse(require("fs").readFileSync(0))) {
            try { katex.renderToString(formula); } catch (error) { console.log(formula + ": " + error.message); }
        }
    """
    katex = DOCS / "javascripts" / "katex" / "katex.min.js"
    drawn = subprocess.run(
        ["node", "-e", program, str(katex)],
        input=json.dumps(list(formulas)),
        capture_output=True,
        text=True,
        check=True,
    )
    assert drawn.stdout == ""


TEXTS = [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"]


def test_every_recipe_has_a_page_in_the_same_form():
    form = ["Overview", "Command", "What it writes and what it means", "How it differs from the paper", "Results"]
    for recipe in (ROOT / "recipes").glob("*.py"):
        page = DOCS / "recipes" / f"{recipe.stem}.md"
        headings = re.findall(r"^## (.*)$", page.read_text(encoding="utf-8"), flags=re.M)
        assert len(headings) == len(form), f"{page.name} has the headings {headings}, expected {form}"
        assert all(map(str.startswith, headings, form)), f"{page.name} has the headings {headings}, expected {form}"


def test_flags_on_the_pages_exist():
    known = {"help", "logdir", "strict", "all-files", "benchmark-autosave", "benchmark-compare"}  # of other programs
    known |= {"head", "port", "address", "num-cpus"}  # of `ray start`
    known |= {
        "kills",
        "full_disks",
        "stops",
        "training_kills",
        "nans",
        "worker_kills",
    }  # of tests/faults/campaign.py, made from a table
    for path in [*(ROOT / "qsm_rl" / "training").rglob("*.py"), *(ROOT / "recipes").rglob("*.py")]:
        source = path.read_text(encoding="utf-8")
        known |= set(re.findall(r'"--([a-z]\w*)"', source))
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ClassDef) and node.name.endswith("Configuration"):
                known |= {field.target.id for field in node.body if isinstance(field, ast.AnnAssign)}
    unknown = {
        (flag, text.name)
        for text in TEXTS
        for flag in re.findall(r"(?<![\w-])--([a-z][\w-]*)", text.read_text(encoding="utf-8"))
        if flag not in known
    }
    assert not unknown


def test_files_of_the_repository_that_the_pages_name_exist():
    missing = {
        (path, text.name)
        for text in TEXTS
        for path in re.findall(
            r"(?<![\w/])((?:recipes|qsm_rl|tests|docs)/[\w/.-]+\.(?:py|yaml|csv|json))",
            text.read_text(encoding="utf-8"),
        )
        if not (ROOT / path).exists()
    }
    assert not missing


def messages(source: str) -> list[str]:
    """The texts in a program, with ``...`` for what is filled in."""

    def text(node: ast.expr) -> str:
        return node.value if isinstance(node, ast.Constant) else "..."

    nodes = list(ast.walk(ast.parse(source)))
    filled_in = ["".join(map(text, node.values)) for node in nodes if isinstance(node, ast.JoinedStr)]
    return filled_in + [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]


def test_messages_in_the_headings_of_the_faq_are_in_the_code():
    paths = [*(ROOT / "qsm_rl").rglob("*.py"), Path(torchrl_loss.__file__)]
    known = [message for path in paths for message in messages(path.read_text(encoding="utf-8"))]
    headings = re.findall(r"^### (.*`.*)$", (DOCS / "faq.md").read_text(encoding="utf-8"), flags=re.M)
    quoted = [quote for heading in headings for quote in re.findall(r"`([^`]*\s[^`]*)`", heading)]
    assert len(quoted) > 20

    def stands_in_the_code(quote: str) -> bool:
        # Values that the heading spells out, such as 'action', are filled in by the code.
        parts = re.split(r"'\w+'|\bnan\b|\.\.\.", quote)
        return any(in_order(parts, message) for message in known)

    def in_order(parts: list[str], message: str) -> bool:
        position = 0
        for part in parts:
            position = message.find(part, position)
            if position < 0:
                return False
        return True

    assert not [quote for quote in quoted if not stands_in_the_code(quote)]
