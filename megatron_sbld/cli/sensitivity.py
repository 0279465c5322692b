"""`megatron-sbld sensitivity`: measures how much each layer matters, and shows and joins what was measured."""

from __future__ import annotations

import os
import shlex

from megatron_sbld.cli.command import Command, run_part
from megatron_sbld.cli.parser import CommandParser, config_files, config_parser, parse_config


def _measure(args: list[str]) -> int:
    from megatron_sbld.config.files import field_names
    from megatron_sbld.files.outputs import refuse_inputs
    from megatron_sbld.measure.options import MeasureOptions

    own = field_names(MeasureOptions)
    config, options = parse_config(_measure_parser(), args, ["from", *own])
    written = [os.path.join(options["out"], name) for name in ("profile.json", "sensitivity.json", "sensitivity.png")]
    refuse_inputs("--out", written, config_files(args)[0])

    from megatron_sbld.measure.measure import measure
    from megatron_sbld.report.sensitivity import present

    chosen = MeasureOptions(**{name: options[name] for name in own})
    command = shlex.join(["megatron-sbld", "sensitivity", "measure", *args])
    outcome = measure(config, chosen, load=options["from"], command=command)
    if outcome.file is not None:
        present(outcome.file)
    return outcome.status


def _measure_parser() -> CommandParser:
    return config_parser(
        "sensitivity measure --config FILE --out DIR [options] [--section.field VALUE ...]",
        "Measure the sensitivity of the layers of the model that a config describes, and write DIR/sensitivity.json. "
        "Run it like pretrain, under torchrun for many processes. Exit status: 0 complete, 75 stopped on request or 76 "
        "another rank died or stalled (start again to continue), 2 a mistake.",
        _add_measure_options,
    )


def _add_measure_options(parser: CommandParser) -> None:
    from megatron_sbld.measure.options import MeasureOptions

    parser.add_argument(
        "--from",
        help="checkpoint to start from: its weights and, where it has it, all of its state and its iteration; default: "
        "as checkpoint.load says, or new weights",
    )
    parser.add_class_arguments(MeasureOptions, skip={"early_stop"})
    parser.add_argument(
        "--early_stop",
        action="store_true",
        help="train: end a layer's run once its rank is settled and no list depends on it; its gap is then "
        "interpolated between its neighbours'",
    )


def _merge(args: list[str]) -> int:
    parser = CommandParser("sensitivity merge DIR [DIR ...] --output FILE", _sentence("merge"))
    parser.add_argument("paths", nargs="+", help="folders")
    parser.add_argument("--output", required=True, help="sensitivity file to write")
    given = parser.parse_args(args)

    from megatron_sbld.report.sensitivity import merge

    merge(given.paths, given.output)
    return 0


def _show(args: list[str]) -> int:
    parser = CommandParser("sensitivity show FILE [--plot PNG]", _sentence("show"))
    parser.add_argument("paths", nargs=1, help="sensitivity file")
    parser.add_argument("--plot", help="PNG file to write: a bar for each layer")
    given = parser.parse_args(args)

    from megatron_sbld.report.sensitivity import show

    show(given.paths[0], given.plot)
    return 0


def _lists(args: list[str]) -> int:
    from megatron_sbld.method.config import default_of

    usage = "sensitivity lists FILE [--block FRACTION] [--allow FRACTION] [--output FILE]"
    parser = CommandParser(usage, _sentence("lists"))
    parser.add_argument("paths", nargs=1, help="sensitivity file")
    parser.add_argument(
        "--block", type=float, default=default_of("block_fraction"), help="share of layers in the Block list, in [0, 1]"
    )
    parser.add_argument(
        "--allow", type=float, default=default_of("allow_fraction"), help="share of layers in the Allow list, in [0, 1]"
    )
    parser.add_argument("--output", help="sensitivity file to write; default: only print")
    given = parser.parse_args(args)

    from megatron_sbld.report.sensitivity import lists

    lists(given.paths[0], given.block, given.allow, given.output)
    return 0


def _rank(args: list[str]) -> int:
    parser = CommandParser("sensitivity rank REFERENCE FILE [FILE ...]", _sentence("rank"))
    parser.add_argument("paths", nargs="+", help="sensitivity files")
    given = parser.parse_args(args)

    from megatron_sbld.report.sensitivity import rank

    rank(given.paths[0], given.paths[1:])
    return 0


def _sentence(name: str) -> str:
    """What a part is for, as its --help says it."""
    summary = next(part.summary for part in _PARTS if part.name == name)
    return f"{summary[0].upper()}{summary[1:]}."


_PARTS = [
    Command("measure", "measure the layers of a config's model; writes DIR/sensitivity.json", _measure),
    Command("merge", "join folders that `measure --layers` measured in parts, each against its own baseline", _merge),
    Command("show", "print a sensitivity file as a table", _show),
    Command("lists", "choose the Block and Allow lists anew from the gaps of a sensitivity file", _lists),
    Command(
        "rank", "say how well files order the layers as a reference does (Spearman, Kendall), and what each cost", _rank
    ),
]
COMMAND = Command(
    "sensitivity",
    "measure how much each layer matters: the sensitivity file of drop.policy sbld",
    lambda args: run_part("sensitivity", _PARTS, args),
    _PARTS,
)
