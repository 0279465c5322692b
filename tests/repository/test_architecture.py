"""Imports go one way: the list of rooms in docs/architecture.md, held against the code."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "megatron_sbld"
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
BLOCK = PAGE.split("```")[1]
ROOMS = [line.split()[0] for line in BLOCK.strip().splitlines()]
PUBLIC = ("__init__", "__main__")
"""The package's own names are loaded lazily, and `python -m` runs the command line."""


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def imported(path: Path) -> set[str]:
    """Rooms of this package that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {room_of(alias.name) for alias in node.names if alias.name.startswith("megatron_sbld")}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("megatron_sbld"):
            if node.module == "megatron_sbld":
                found |= {alias.name for alias in node.names if (PACKAGE / alias.name).exists() or alias.name in ROOMS}
            else:
                found.add(room_of(str(node.module)))
    return found


def wrong_imports(rooms: list[str]) -> list[str]:
    place = {room: index for index, room in enumerate(rooms)}
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        relative = path.relative_to(PACKAGE)
        room = relative.parts[0].removesuffix(".py")
        if room in PUBLIC:
            continue
        others = imported(path) - set(PUBLIC)  # the version
        wrong += [f"{relative} imports {other}" for other in others if place[other] > place[room]]
    return wrong


def test_every_room_is_in_the_list() -> None:
    rooms = {path.stem if path.is_file() else path.name for path in PACKAGE.iterdir() if path.suffix in ("", ".py")}
    assert sorted(rooms - set(PUBLIC) - {"__pycache__"}) == sorted(ROOMS)


def test_imports_go_up_the_list_only() -> None:
    assert wrong_imports(ROOMS) == []


@pytest.mark.parametrize(
    ("lower", "higher"), [("controller", "method"), ("training", "data"), ("report", "evaluation")]
)
def test_an_import_that_is_turned_round_is_found(lower: str, higher: str) -> None:
    turned = [{lower: higher, higher: lower}.get(room, room) for room in ROOMS]
    assert any(f"imports {higher}" in line for line in wrong_imports(turned))


def test_the_files_and_names_of_the_tour_exist() -> None:
    named = re.findall(r"`([a-z_/]+\.(?:py|md|h|cu))(?:::([\w.]+))?`", PAGE)
    assert len(named) > 20
    for name, symbol in named:
        path = next((root / name for root in (PACKAGE, ROOT, ROOT / "csrc") if (root / name).is_file()), None)
        assert path is not None, name
        if symbol:
            last = symbol.rpartition(".")[2]
            assert re.search(rf"^\s*(?:def|class) {last}\b", path.read_text(encoding="utf-8"), re.M), (
                f"{name}::{symbol}"
            )
