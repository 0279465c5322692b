"""`megatron-sbld pretrain`."""

from __future__ import annotations

from megatron_sbld.cli.command import Command
from megatron_sbld.cli.parser import CommandParser, config_parser, parse_config


def _pretrain(args: list[str]) -> int:
    config, _ = parse_config(pretrain_parser(), args)

    from megatron_sbld.evaluation.in_training import TasksInTraining
    from megatron_sbld.training.loop import pretrain

    return pretrain(config, TasksInTraining)


def pretrain_parser() -> CommandParser:
    return config_parser(
        "pretrain --config FILE [--section.field VALUE ...]",
        "Train a GPT from a config file; the command line overrides the file. Run it under torchrun for many "
        "processes. Exit status: 0 complete, 75 stopped on request (start again to continue), 76 another rank died or "
        "stalled (start again to continue), 2 a mistake in the config.",
    )


COMMAND = Command("pretrain", "train a GPT; under torchrun with many processes", _pretrain)
