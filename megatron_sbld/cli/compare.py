"""`megatron-sbld compare`."""

from __future__ import annotations

from megatron_sbld.cli.command import Command
from megatron_sbld.cli.parser import CommandParser


def _compare(args: list[str]) -> int:
    parser = CommandParser(
        "compare RUN [RUN ...] [--baseline RUN] [--out DIR] [--group BOOL] [--realised BOOL]",
        "Compare runs: table and plots.",
    )
    parser.add_argument("runs", nargs="+", help="run folders")
    parser.add_argument("--baseline", help="run folder that the others are compared with; default: the undropped one")
    parser.add_argument(
        "--out", help="folder for the table, the plots, and comparison.html, one page with both to send to others"
    )
    parser.add_argument(
        "--group",
        type=bool,
        default=True,
        help="one row for runs that differ only in their seeds; false: one row for each run",
    )
    parser.add_argument(
        "--realised",
        type=bool,
        default=True,
        help="show realised gain and time to the baseline's loss; false for runs of minutes on a shared machine",
    )
    given = parser.parse_args(args)

    from megatron_sbld.report.compare import compare

    compare(given.runs, given.baseline, given.out, given.group, given.realised)
    return 0


COMMAND = Command("compare", "compare runs: loss, speed, ideal and realised gain; table and plots", _compare)
