"""The commands in the documentation exist and take the options that are shown. What they do is tested elsewhere."""

from __future__ import annotations

import contextlib
import functools
import io
import re
import shlex
from pathlib import Path

import pytest

from megatron_sbld.cli.main import main
from megatron_sbld.cli.parser import config_parser, parse_config

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "patches/README.md", "scripts/README.md")),
    *(ROOT / "examples").rglob("*.md"),
    *(ROOT / "docs").glob("*.md"),
]
PAIRS = ("sensitivity", "schedule", "evaluate", "export", "import")
"""Commands whose first argument is a command."""


def code(page: Path) -> list[str]:
    """Lines of blocks of code, continued ones as one, and code within sentences."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)
    text = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    blocks += re.findall(r"^    .*(?:\n    .*)*", text, re.M)
    lines = [line.strip() for block in blocks for line in re.sub(r" *\\\n *", " ", block).splitlines()]
    return lines + re.findall(r"`([^`\n]+)`", re.sub(r"^    .*", "", text, flags=re.M))


LINES = sorted({line for page in PAGES for line in code(page)})
COMMANDS = [
    line for line in LINES if re.search(r"\bmegatron[-_]sbld [a-z]", line) and not re.match("from |.*COMMAND", line)
]


@functools.cache
def help_of(command: tuple[str, ...]) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as ended:
        main([*command, "--help"])
    assert ended.value.code in (None, 0), command
    return printed.getvalue()


@pytest.mark.parametrize("line", COMMANDS)
def test_the_command_takes_these_options(line: str) -> None:
    words = shlex.split(re.split(r"\bmegatron[-_]sbld ", line)[-1], comments=True)
    command = tuple(words[:2]) if words[0] in PAIRS and len(words) > 1 else (words[0],)
    shown = help_of(command)
    for option in (word.partition("=")[0] for word in words if re.match(r"--\w", word)):
        assert re.search(rf"{re.escape(option)}\b", shown), option


def test_there_are_commands() -> None:
    assert len(COMMANDS) > 20


def test_make_has_the_targets() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    assert {match[1] for line in LINES if (match := re.match(r"make ([a-z-]+)", line))} <= targets


def test_the_programs_are_there() -> None:
    path = re.compile(r"(?<![\w/])(?:scripts|benchmarks|examples|configs)/[\w./]+\w")
    named = {name for line in LINES for name in path.findall(line)}
    assert len(named) > 10
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_config_in_the_documentation_is_one(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"^```yaml\n(.*?)^```", page, re.M | re.S)
    file = tmp_path / "gpt.yaml"
    file.write_text(text)
    config, _ = parse_config(config_parser("pretrain", "help"), ["--config", str(file)])
    assert config.drop.policy == "sbld"
