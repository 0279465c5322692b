"""~ and variables in paths: put in for every path of a config and of a command, or refused by name."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path
from typing import Any

import pytest

from megatron_sbld.cli import main as cli
from megatron_sbld.cli.parser import CommandParser
from megatron_sbld.config.files import read_config
from megatron_sbld.config.sections import Config
from megatron_sbld.files.paths import CONFIG_PATHS, OPTION_PATHS, expand
from megatron_sbld.megatron_lm.arguments import drop_config

NO_PATHS = {
    *("attention", "dtype", "max_shard_size", "separator", "document_separator", "text_key", "prompt"),
    *("layers", "seeds", "include", "pipeline_model_parallel_layout"),
}
"""Options of the commands that take text which is no path."""
COMMANDS = [
    *(["prepare"], ["pretrain"], ["schedule", "show"], ["schedule", "fit"], ["evaluate", "lambada"]),
    *(["evaluate", "perplexity"], ["generate"], ["compare"], ["predict"], ["export", "hf"], ["import", "hf"]),
    *(["sensitivity", part] for part in ("measure", "merge", "show", "lists", "rank")),
]


class Captured(Exception):
    """Carries a command's parser out of it."""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.delenv("UNSET", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("~", "{home}"),
        ("~/runs/a", "{home}/runs/a"),
        ("$SCRATCH/a", "{scratch}/a"),
        ("${SCRATCH}_2/$SCRATCH", "{scratch}_2/{scratch}"),
        ("runs/a~b", "runs/a~b"),
        ("byte", "byte"),
        ("costs 5$", "costs 5$"),
    ],
)
def test_a_path_is_what_a_shell_would_make_of_it(home: Path, written: str, meant: str) -> None:
    assert expand("x", written) == meant.format(home=home, scratch=os.environ["SCRATCH"])


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("$UNSET/a", r"x = '\$UNSET/a': the environment variable UNSET is not set"),
        ("${EMPTY}/a", r"x = .*: the environment variable EMPTY is empty"),
        ("~nobody-of-that-name/a", "x = .*: there is no user 'nobody-of-that-name'"),
        ("${UNSET:-b}", "only .NAME and ..NAME. are put in"),
        ("$(date)", "only .NAME and ..NAME. are put in"),
        ("", "x = '': is empty; give a path"),
    ],
)
def test_what_nothing_can_be_put_in_for_is_refused_by_name(
    home: Path, monkeypatch: pytest.MonkeyPatch, written: str, message: str
) -> None:
    monkeypatch.setenv("EMPTY", "")
    with pytest.raises(ValueError, match=message):
        expand("x", written)


def test_a_file_with_a_dollar_sign_in_its_name_is_found(home: Path) -> None:
    Path("a$UNSET").touch()
    assert expand("x", "a$UNSET") == "a$UNSET"


def test_every_path_of_a_config_is_expanded(home: Path) -> None:
    fields: dict[str, dict[str, Any]] = {}
    for path in CONFIG_PATHS:
        section, field = path.split(".")
        is_list = isinstance(getattr(getattr(Config(), section), field), list)
        fields.setdefault(section, {})[field] = ["~/a", "$SCRATCH/b"] if is_list else "~/a"
    lines = [f"{section}: {values}" for section, values in fields.items()]
    Path("config.yaml").write_text("\n".join(lines))
    config = read_config("config.yaml")
    for section, values in fields.items():
        for field, value in values.items():
            found = getattr(getattr(config, section), field)
            meant = f"{home}/a" if isinstance(value, str) else [f"{home}/a", f"{os.environ['SCRATCH']}/b"]
            assert found == meant, field


def test_every_text_of_a_config_is_known_as_a_path_or_not() -> None:
    texts = {
        f"{section.name}.{field.name}"
        for section in dataclasses.fields(Config)
        for field in dataclasses.fields(section.default_factory())  # type: ignore[misc]
        if "str" in str(field.type) and "Literal" not in str(field.type)
    }
    others = {
        *("data.train_data_path", "logging.wandb_project", "logging.wandb_name"),
        "parallel.pipeline_model_parallel_layout",
    }
    assert texts - set(CONFIG_PATHS) == others - set(CONFIG_PATHS)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_text_option_of_a_command_is_known_as_a_path_or_not(
    command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def capture(parser: CommandParser, *_: Any, **__: Any) -> None:
        raise Captured(parser)

    monkeypatch.setattr(CommandParser, "parse_args", capture)
    with pytest.raises(Captured) as captured:
        cli.main(command)
    parser = captured.value.args[0]
    texts = {
        action.dest
        for action in parser._actions
        if "." not in action.dest
        and type(action).__name__
        in ("_StoreAction", "_AppendAction", "_ExtendAction", "ActionTypeHint", "ActionConfigFile")
        and re.search(r"\bstr\b|None$", str(getattr(action, "_typehint", None)))
        and not re.search(r"\b(int|float|Literal)\b", str(getattr(action, "_typehint", None)))
    }
    assert texts <= {*OPTION_PATHS, *NO_PATHS}, f"{texts - {*OPTION_PATHS, *NO_PATHS}} are not known"


def test_options_of_commands_are_expanded(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home.mkdir()
    (home / "text.txt").write_text("some text\n<|endoftext|>\n" * 50)
    with pytest.raises(SystemExit) as ended:
        cli.main(["prepare", "~/text.txt", "--output", "$SCRATCH/web", "--workers", "1"])
    assert ended.value.code == 0, capsys.readouterr().err
    assert list(Path(os.environ["SCRATCH"]).glob("web_train.bin"))
    assert sorted(path.name for path in Path.cwd().iterdir()) == ["home", "scratch"], "no folder of the name ~"


def test_the_sensitivity_of_the_patches_arguments_is_expanded(home: Path) -> None:
    from argparse import Namespace

    assert drop_config(Namespace(sbld_sensitivity="~/gaps.json")).sensitivity == f"{home}/gaps.json"
    with pytest.raises(ValueError, match=r"--sbld-sensitivity = .*UNSET is not set"):
        drop_config(Namespace(sbld_sensitivity="$UNSET/gaps.json"))


@pytest.mark.parametrize("command", [*COMMANDS, ["doctor"]], ids=" ".join)
def test_an_argument_that_is_no_utf_8_is_one_message(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([*command, os.fsdecode(b"/nowhere/\xff")])
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        r"megatron-sbld: error: the argument /nowhere/\xff is not UTF-8; give the file another name, or write the text "
        "so\n"
    )


def test_prepare_reads_a_file_whose_name_is_no_utf_8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = os.fsencode(tmp_path) + b"/\xff.txt"
    Path(os.fsdecode(name)).write_text("one\n<|endoftext|>\ntwo\n")
    with pytest.raises(SystemExit) as ended:
        cli.main(["prepare", os.fsdecode(name), "--output", str(tmp_path / "out"), "--workers", "1"])
    assert ended.value.code == 0, capsys.readouterr().err
