"""Paths that cannot be read or written end in one message that names the option or field, for every command."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_sbld import doctor
from megatron_sbld.cli.path_errors import describe
from megatron_sbld.exit_status import EXIT_BROKEN_PIPE, EXIT_MISTAKE
from tests.cli.test_pretrain import Sections, command, sections, shared, write  # noqa: F401  (fixtures)


def message(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """What a command that ends with status 2 says."""
    assert command(*args) == EXIT_MISTAKE
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    assert printed.count("megatron-sbld: error: ") == 1
    return printed[printed.index("megatron-sbld: error: ") :]


@pytest.fixture(params=["in no folder", "below a file", "a file"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where nothing can be written, not even by root."""
    (tmp_path / "file").write_text("taken")
    return {"in no folder": "/proc/nowhere", "below a file": f"{tmp_path}/file/x", "a file": f"{tmp_path}/file"}[
        request.param
    ]


@pytest.mark.parametrize("field", ["data.data_cache_path", "logging.run_dir"])
@pytest.mark.parametrize("where", ["on the command line", "in the file"])
def test_pretrain_names_the_field_of_a_folder_that_cannot_be_written(
    sections: Sections,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    place: str,
    field: str,
    where: str,
) -> None:
    section, name = field.split(".")
    if where == "in the file":
        sections[section][name] = place
    options = [f"--{field}", place] if where == "on the command line" else []
    said = message(capsys, "pretrain", "--config", write(tmp_path, sections), *options)
    assert f"{field} = {place!r}" in said, said


def test_every_commands_output_is_named(
    sections: Sections,  # noqa: F811
    shared: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    place: str,
) -> None:
    config, run = write(tmp_path, sections), str(shared / "done")
    (tmp_path / "text").write_text("the end of it all.\nall of it and more.\n")
    text = str(tmp_path / "text")
    commands: list[list[str]] = [
        ["schedule", "show", "--config", config, "--drop.policy", "pld", "--drop.theta", "0.5", "--out"],
        ["sensitivity", "measure", "--config", config, "--iterations", "2", "--out"],
        ["compare", run, "--out"],
        ["evaluate", "perplexity", "--checkpoint", run, "--data", text, "--out"],
        ["export", "hf", "--checkpoint", run],
    ]
    for args in commands:
        assert place in message(capsys, *args, place), args


def test_the_longest_path_decides_which_option_is_named(tmp_path: Path) -> None:
    args = ["--config", "gpt.yaml", "--logging.run_dir=runs/a", "--data.data_cache_path", "runs/a/cache", "--out", "b"]
    for path, said in {
        "runs/a/cache/x.npy": f"data.data_cache_path = 'runs/a/cache': full: {os.path.abspath('runs/a/cache/x.npy')!r}",
        "runs/a/run.lock": f"logging.run_dir = 'runs/a': full: {os.path.abspath('runs/a/run.lock')!r}",
        "b": "--out = 'b': full",
        "gpt.yaml": "--config = 'gpt.yaml': full",
        "elsewhere": "[Errno 28] full: 'elsewhere'",
    }.items():
        assert describe(OSError(28, "full", path), args) == said
    assert describe(OSError("no path"), args) == "no path"


def test_a_cache_that_fills_the_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_sbld.data import batches as data

    def full(*args: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(data.tempfile, "TemporaryFile", lambda **kwargs: full())
    with pytest.raises(OSError, match=r"data.data_cache_path = '.*' .*: No space left on device"):
        data.check_cache(tmp_path / "cache")


def test_a_package_that_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def examine(args: list[str]) -> int:
        import a_package_that_is_not_there  # type: ignore[import-not-found]  # noqa: F401

        return 0

    monkeypatch.setattr(doctor, "main", examine)
    assert "needs the package a_package_that_is_not_there, which is not installed" in message(capsys, "doctor")


OUTPUT = """
import sys
from megatron_sbld import doctor
from megatron_sbld.cli.main import main
doctor.main = lambda args: print("\\n" * 100_000) or 0
main(["doctor"])
"""


def test_a_reader_that_ends_and_a_full_disk_end_the_command_without_a_traceback() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", OUTPUT], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as piped:
        assert piped.stdout is not None
        assert piped.stderr is not None
        piped.stdout.close()
        assert piped.stderr.read() == ""
    assert piped.returncode == EXIT_BROKEN_PIPE
    with open("/dev/full", "w") as full:
        found = subprocess.run(
            [sys.executable, "-c", OUTPUT], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert found.stderr.startswith("megatron-sbld: error: [Errno 28] No space left on device\n")
    assert found.returncode == EXIT_MISTAKE
