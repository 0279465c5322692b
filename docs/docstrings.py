"""Docstrings for autodoc2: Markdown with the sections of Google's style, or plain `name: text` entries.

`to_myst` turns both into field lists, so that the API pages have one style.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from docutils import nodes
from myst_parser.parsers.sphinx_ import MystParser

SECTION = re.compile(r"(Args|Arguments|Returns|Raises|Yields):$")
FIELDS = {"Args": "param", "Arguments": "param", "Raises": "raises", "Returns": "return", "Yields": "return"}
ENTRY = re.compile(r"([a-z_]\w*(?:, [a-z_]\w*)*): (.+)$")


class Parser(MystParser):
    """Parses a docstring as MyST, once its sections are field lists. autodoc2 looks for a class of this name."""

    def parse(self, inputstring: str, document: nodes.document) -> None:
        super().parse(to_myst(inputstring), document)


def to_myst(docstring: str) -> str:
    """The docstring with sections and entries as field lists, and doctests as code."""
    return "\n".join(line for block in blocks(docstring) for line in [*convert(block), ""])


def blocks(docstring: str) -> Iterator[list[str]]:
    """Paragraphs; a section and what is indented below it are one."""
    block: list[str] = []
    for line in docstring.strip().splitlines():
        if line.strip():
            block.append(line)
        elif block:
            yield block
            block = []
    if block:
        yield block


def convert(block: list[str]) -> list[str]:
    first = block[0]
    if header := SECTION.match(first):
        kind = FIELDS[header[1]]
        entries = joined(block[1:])
        if kind == "return":
            return [":return: " + " ".join(entries)]
        return [f":{kind} {name}: {text}" for name, _, text in (entry.partition(": ") for entry in entries)]
    if first.startswith(">>>"):
        return ["```python", *block, "```"]
    if ENTRY.match(first):
        return [f":param {name}: {text}" for name, _, text in (entry.partition(": ") for entry in joined(block))]
    return block


def joined(lines: list[str]) -> list[str]:
    """One text for each entry; lines that are indented further belong to the entry before."""
    indent = len(lines[0]) - len(lines[0].lstrip())
    entries: list[str] = []
    for line in lines:
        if entries and len(line) - len(line.lstrip()) > indent:
            entries[-1] += " " + line.strip()
        else:
            entries.append(line.strip())
    return entries
