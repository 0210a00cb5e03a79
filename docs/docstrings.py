"""Reads the package's docstrings for the API pages: doctests as code, Sphinx roles as links.

The docstrings are written for readers of the source and for doctest: an ``Example:`` section, and roles such as
``:class:`~qsm_rl.NoiseSchedule```. mkdocstrings knows the section as ``Examples:`` and links as Markdown.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):`(~?)([\w.]+)`")


class Docstrings(griffe.Extension):
    """Rewrites each docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called once for each module, class, function and attribute."""
        if obj.docstring is None:
            return

        def link(match: re.Match[str]) -> str:
            short, name = match.groups()
            try:
                path = obj.resolve(name)
            except griffe.NameResolutionError:
                path = name
            title = name.rpartition(".")[2] if short else name
            # Optional: names of other libraries have no entry where their inventories are not loaded.
            return f'<autoref identifier="{path}" optional><code>{title}</code></autoref>'

        text = ROLE.sub(link, obj.docstring.value)
        obj.docstring.value = re.sub(r"^(\s*)Example:$", r"\1Examples:", text, flags=re.M)
