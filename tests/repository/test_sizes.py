"""No module of the package has over 400 lines and no function over 60; docstrings, comments, nested functions count."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "megatron_sbld"
FILES = {path: path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py"))}


def long_functions(source: str, limit: int = 60) -> list[str]:
    """Functions over the limit, counted from the first decorator to the last line."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            lines = (node.end_lineno or first) - first + 1
            if lines > limit:
                found.append(f"{node.name}: {lines}")
    return found


def test_no_module_has_over_400_lines() -> None:
    lengths = {str(path.relative_to(PACKAGE)): len(text.splitlines()) for path, text in FILES.items()}
    assert {name: lines for name, lines in lengths.items() if lines > 400} == {}


def test_no_function_has_over_60_lines() -> None:
    found = {str(path.relative_to(PACKAGE)): long_functions(text) for path, text in FILES.items()}
    assert {name: functions for name, functions in found.items() if functions} == {}


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("def f():\n    '''Docstring.'''\n    pass\n", []),
        ("def f():\n    '''Doc\n    string.'''\n    pass\n", ["f: 4"]),
        ("@decorated\ndef f():\n    # comment\n    pass\n", ["f: 4"]),
        ("class C:\n    def f(self):\n        def g():\n            pass\n        return g\n", ["f: 4"]),
    ],
)
def test_all_lines_are_counted(source: str, found: list[str]) -> None:
    assert long_functions(source, limit=3) == found
