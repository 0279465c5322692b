"""The command line as a whole: its listing, its parts, the former name of a command, and what is imported when."""

from __future__ import annotations

import subprocess
import sys

import pytest

from megatron_sbld import __version__
from megatron_sbld.cli import main as cli

HEAVY = ("torch", "megatron", "matplotlib")
BLOCKED = f"""
import sys
for name in {HEAVY}:
    sys.modules[name] = None  # importing it raises ImportError
from megatron_sbld.cli.main import main
main(sys.argv[1:])
"""


def end(*args: str) -> int | str | None:
    """The exit status."""
    with pytest.raises(SystemExit) as ended:
        cli.main(args)
    return ended.value.code


def without_heavy_packages(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", BLOCKED, *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("args", [[], ["-h"], ["--help"]])
def test_the_listing_has_every_command(capsys: pytest.CaptureFixture[str], args: list[str]) -> None:
    assert end(*args) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert listed == [command.name for command in cli.COMMANDS]
    assert len(set(listed)) == len(listed) == 11


@pytest.mark.parametrize("args", [[], ["-h"], ["--help"]])
@pytest.mark.parametrize(
    ("command", "parts"),
    [
        ("sensitivity", ["measure", "merge", "show", "lists", "rank"]),
        ("schedule", ["show", "fit"]),
        ("evaluate", ["lambada", "perplexity"]),
    ],
)
def test_a_command_of_parts_lists_them(
    capsys: pytest.CaptureFixture[str], command: str, parts: list[str], args: list[str]
) -> None:
    assert end(command, *args) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: megatron-sbld {command} {'|'.join(parts)} ")
    assert [line.split()[0] for line in printed.splitlines() if line.startswith("  ")] == parts


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (
            ["sensitivity", "--config", "gpt.yaml"],
            "'sensitivity --config'; allowed are measure, merge, show, lists, rank",
        ),
        (["schedule", "plot"], "'schedule plot'; allowed are show, fit"),
        (["evaluate", "glue"], "'evaluate glue'; allowed are lambada, perplexity"),
    ],
)
def test_an_unknown_part_is_refused(capsys: pytest.CaptureFixture[str], args: list[str], named: str) -> None:
    assert end(*args) == cli.EXIT_MISTAKE
    assert capsys.readouterr().err == f"megatron-sbld: error: unknown command {named}\n"


@pytest.mark.parametrize(
    ("args", "part"),
    [
        ([], "measure"),
        (["--help"], "measure"),
        (["--config", "gpt.yaml", "--out", "x"], "measure"),
        (["merge", "a", "--output", "b"], "merge"),
        (["show", "--help"], "show"),
        (["lists"], "lists"),
        (["rank", "a", "b"], "rank"),
        (["\udcff"], "measure"),
    ],
)
def test_profile_names_the_command_that_it_is_now(
    capsys: pytest.CaptureFixture[str], args: list[str], part: str
) -> None:
    assert end("profile", *args) == cli.EXIT_MISTAKE
    printed = capsys.readouterr()
    expected = f"megatron-sbld: error: `profile` is now `megatron-sbld sensitivity {part}`, with the same options\n"
    assert (printed.out, printed.err) == ("", expected)


def test_the_version_and_the_listing_need_nothing_heavy() -> None:
    for args, printed in (
        (["--version"], f"megatron-sbld {__version__}\n"),
        (["--help"], "usage: megatron-sbld COMMAND"),
    ):
        found = without_heavy_packages(*args)
        assert (found.returncode, found.stderr) == (0, "")
        assert found.stdout.startswith(printed)


@pytest.mark.parametrize(
    "command",
    [
        *(["prepare"], ["evaluate", "lambada"], ["evaluate", "perplexity"], ["generate"]),
        *(["pretrain"], ["schedule", "show"], ["schedule", "fit"], ["compare"], ["predict"], ["doctor"]),
        *(["sensitivity", part] for part in ("measure", "merge", "show", "lists", "rank")),
        *(["export", "hf"], ["import", "hf"]),
    ],
    ids=" ".join,
)
def test_help_needs_nothing_heavy(command: list[str]) -> None:
    found = without_heavy_packages(*command, "--help")
    assert (found.returncode, found.stderr) == (0, "")
    assert f"usage: megatron-sbld {' '.join(command)}" in found.stdout


def test_a_mistake_on_the_command_line_of_measure_is_found_before_torch_is_loaded() -> None:
    found = without_heavy_packages("sensitivity", "measure", "--iteration", "3")
    assert found.returncode == cli.EXIT_MISTAKE
    assert "unknown option --iteration; did you mean iterations" in found.stderr
