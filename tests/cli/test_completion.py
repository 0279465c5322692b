"""Tab completion: what a shell is told, asked as argcomplete's shell function asks, by variables of the environment."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_sbld.cli.main import COMMANDS

argcomplete = pytest.importorskip("argcomplete", reason="needs the extra completion")


def offered(line: str, folder: Path) -> list[str]:
    """What may stand at the end of the line, in a shell in `folder`."""
    out = folder / ".offered"
    asked = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "COMP_TYPE": "9"}
    asked |= {"_ARGCOMPLETE_IFS": "\n", "_ARGCOMPLETE_SHELL": "bash", "_ARGCOMPLETE_STDOUT_FILENAME": str(out)}
    command = [sys.executable, "-m", "megatron_sbld"]
    ended = subprocess.run(
        command, env={**os.environ, **asked}, cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
    return out.read_text().split("\n")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("completion")
    (folder / "gpt.yaml").touch()
    return folder


def test_commands_are_offered(folder: Path) -> None:
    assert offered("megatron-sbld ", folder) == ["-h", "--help", *(command.name for command in COMMANDS)]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("megatron-sbld s", ["sensitivity", "schedule"]),
        ("megatron-sbld sensitivity m", ["measure", "merge"]),
        ("megatron-sbld pretrain --drop.theta", ["--drop.theta", "--drop.theta_min", "--drop.theta_max"]),
        ("megatron-sbld pretrain --config g", ["gpt.yaml "]),
        ("megatron-sbld pretrain --config gpt.yaml --drop.recipe s", ["sbld-paper", "staged"]),
        ("megatron-sbld sensitivity measure --ea", ["--early_stop "]),
        ("megatron-sbld compare runs/a --real", ["--realised "]),
        ("megatron-sbld compare runs/a --group ", ["true", "false"]),
        ("megatron-sbld export hf --d", ["--dtype "]),
        ("megatron-sbld doctor --j", ["--json "]),
        ("megatron-sbld pretrain --optimizer.lr ", [""]),
    ],
)
def test_what_may_stand_there_is_offered(folder: Path, line: str, expected: list[str]) -> None:
    assert offered(line, folder) == expected


def test_a_command_is_not_carried_out_where_completion_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "argcomplete", None)
    monkeypatch.setenv("_ARGCOMPLETE", "1")
    monkeypatch.setenv("COMP_LINE", "megatron-sbld doctor ")
    from megatron_sbld.cli.main import main

    with pytest.raises(SystemExit, match="needs the package argcomplete"):
        main(["doctor"])
