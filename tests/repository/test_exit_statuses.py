"""The list of exit statuses in docs/troubleshooting.md, held against what the package and the scripts end with."""

from __future__ import annotations

import ast
import itertools
import re
import subprocess
import sys
from pathlib import Path

from megatron_sbld import exit_status
from megatron_sbld.launch import combined_status

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
LISTED = {int(status) for status in re.findall(r"^\| (\d+) \| \S", PAGE.split("## Exit statuses")[1], re.M)}
OWN = {name: value for name, value in vars(exit_status).items() if name.startswith("EXIT_")}
SOURCES = [ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "megatron_sbld").rglob("*.py")]


def assigned(tree: ast.Module) -> dict[str, int]:
    """The constants of a module that are called EXIT_..."""
    return {
        target.id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for target in node.targets
        if isinstance(target, ast.Name) and target.id.startswith("EXIT_") and isinstance(node.value.value, int)
    }


def literal_exits(tree: ast.Module) -> list[int]:
    """Numbers that exit(), os._exit() or SystemExit() are called with."""
    names = ("exit", "_exit", "SystemExit")
    return [
        argument.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and (getattr(node.func, "attr", None) or getattr(node.func, "id", None)) in names
        for argument in node.args
        if isinstance(argument, ast.Constant) and isinstance(argument.value, int)
    ]


def test_the_list_has_every_status_and_no_other() -> None:
    constants = {value for tree in SOURCES for value in assigned(tree).values()}
    assert set(OWN.values()) < constants, "doctor has one of its own"
    assert constants | {0, 1} == LISTED


def test_numbers_without_a_name_are_success_and_exceptions_alone() -> None:
    assert {status for tree in SOURCES for status in literal_exits(tree)} <= {0, 1}


def test_the_launcher_ends_with_nothing_else() -> None:
    codes = [*LISTED, -9, -15]
    found = {
        combined_status(chosen, asked)
        for chosen in itertools.chain.from_iterable(itertools.combinations(codes, size) for size in range(4))
        for asked in (False, True)
    }
    assert found <= LISTED


def test_the_scripts_end_with_nothing_else() -> None:
    scripts = [path for path in (ROOT / "scripts").rglob("*") if path.suffix in (".sh", ".sbatch")]
    found = {int(status) for path in scripts for status in re.findall(r"\bexit (\d+)", path.read_text())}
    assert {0, 2} <= found <= LISTED


def test_a_closed_pipe_ends_help_and_commands_alike() -> None:
    for args in (["--help"], ["--version"], ["schedule"]):
        command = [sys.executable, "-m", "megatron_sbld", *args]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            process.stdout.close()
            assert process.stderr.read() == b""
        assert process.returncode == exit_status.EXIT_BROKEN_PIPE, args
