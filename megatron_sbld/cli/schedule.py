"""`megatron-sbld schedule`: the schedule of a config, and one fitted to two runs."""

from __future__ import annotations

from megatron_sbld.cli.command import Command, run_part
from megatron_sbld.cli.parser import CommandParser, config_files, config_parser, parse_config


def _show(args: list[str]) -> int:
    parser = config_parser(
        "schedule show --config FILE [--section.field VALUE ...] [--out DIR]",
        "Show theta and keep_prob of every layer over a run, and the gain to expect. Takes the config of `pretrain`; "
        "nothing is trained, data is not read, one process is enough.",
        lambda parser: parser.add_argument("--out", type=str | None, help="folder for schedule.png and schedule.json"),
    )
    config, options = parse_config(parser, args, ["out"])

    from megatron_sbld.config.files import explicit_drop_fields, parse_files
    from megatron_sbld.report.schedule import show_schedule

    files, others = config_files(args)
    show_schedule(config, options["out"], files, explicit_drop_fields(parse_files(files), others))
    return 0


def _fit(args: list[str]) -> int:
    parser = CommandParser(
        "schedule fit BASELINE_RUN DROPPED_RUN --peak-theta X [--theta Y] [--window N] [--out DIR]",
        "Fit PWEGD to the loss gap between two runs that differ in dropping alone. The gap gives the shape (a, b, c, "
        "epsilon), --peak-theta the height (eta). Prints them as YAML for a config, with the errors of other shapes.",
    )
    parser.add_argument("baseline_run", help="run folder with drop.policy none")
    parser.add_argument("dropped_run", help="run folder of the same model and data that drops layers")
    parser.add_argument("--peak-theta", type=float, required=True, help="highest theta of the schedule, in [theta, 1]")
    parser.add_argument("--theta", type=float, help="limit of the schedule; default: the dropped run's drop.theta")
    parser.add_argument("--window", type=int, help="iterations of the running mean; default: 2 %% of the trace")
    parser.add_argument("--out", help="folder for schedule.yaml, fit.json and fit.png")
    given = parser.parse_args(args)

    from megatron_sbld.report.fit import fit_schedule

    fit_schedule(given.baseline_run, given.dropped_run, given.peak_theta, given.theta, given.window, given.out)
    return 0


_PARTS = [
    Command(
        "show", "print and plot a config's keep probabilities, over the run and by layer; nothing is trained", _show
    ),
    Command("fit", "find PWEGD's parameters from the loss gap between a run that drops layers and its baseline", _fit),
]
COMMAND = Command(
    "schedule",
    "show a config's keep probabilities before training; fit PWEGD to two runs",
    lambda args: run_part("schedule", _PARTS, args),
    _PARTS,
)
