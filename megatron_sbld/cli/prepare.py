"""`megatron-sbld prepare`."""

from __future__ import annotations

from megatron_sbld.cli.command import Command
from megatron_sbld.cli.parser import CommandParser


def _prepare(args: list[str]) -> int:
    from megatron_sbld.data.prepare_config import PrepareConfig

    parser = CommandParser(
        "prepare TEXT [TEXT ...] --output PREFIX [options]",
        "Turn text into data sets (.bin/.idx) for training and validation.",
    )
    parser.add_argument("inputs", nargs="+", help="text files, JSON lines or folders of them; .gz and .xz are unpacked")
    parser.add_class_arguments(PrepareConfig, skip={"inputs"})
    config = PrepareConfig(**parser.parse_args(args).as_dict())

    from megatron_sbld.data.prepare import prepare

    print(prepare(config).summary())
    return 0


COMMAND = Command("prepare", "turn text into data sets", _prepare)
