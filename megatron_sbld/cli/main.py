"""The `megatron-sbld` command: parses and dispatches."""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from jsonargparse import Namespace

from megatron_sbld import __version__
from megatron_sbld.cli.parser import CommandParser
from megatron_sbld.cli.path_errors import describe
from megatron_sbld.exit_status import EXIT_BROKEN_PIPE, EXIT_INTERRUPTED, EXIT_MISTAKE, EXIT_RANK_LOST
from megatron_sbld.files.outputs import refuse_inputs
from megatron_sbld.health.liveness import RankLostError

if TYPE_CHECKING:
    from megatron_sbld.config.sections import Config


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Run the command; a user's mistake ends in one message and EXIT_MISTAKE."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s", stream=sys.stderr)
    logging.getLogger("megatron.core").setLevel(logging.ERROR)
    # Several lines a process on what is not installed and what torch will rename; which layers are used is logged once.
    warnings.filterwarnings("ignore", module=r"(megatron\.core|torch\.distributed)\.")
    given = list(sys.argv[1:] if args is None else args)
    commands = {
        "prepare": _prepare,
        "pretrain": _pretrain,
        "profile": _profile,
        "schedule": _schedule,
        "evaluate": _evaluate,
        "generate": _generate,
        "compare": _compare,
        "predict": _predict,
        "export": _export,
        "import": _import,
        "doctor": _doctor,
    }
    if not given or given[0] in ("-h", "--help"):
        print(_USAGE)
        sys.exit(0)
    if given[0] == "--version":
        print(f"megatron-sbld {__version__}")
        sys.exit(0)
    try:
        _check_encoding(given)
        if given[0] not in commands:
            raise ValueError(f"unknown command {given[0]!r}; allowed are {', '.join(commands)}")
        status = commands[given[0]](given[1:])
        sys.stdout.flush()  # here a full disk or a closed pipe still gets its message
        sys.exit(status)
    except BrokenPipeError:
        # What read the output, such as head, has ended. Nothing more may be written, not even at Python's exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(EXIT_BROKEN_PIPE)
    except (ValueError, argparse.ArgumentError, OSError, ModuleNotFoundError, RankLostError) as error:
        if isinstance(error, ModuleNotFoundError) and (error.name or "megatron_sbld").startswith("megatron_sbld"):
            raise  # a fault of ours
        rank = f" (rank {os.environ['RANK']})" if "RANK" in os.environ else ""
        print(f"megatron-sbld: error{rank}: {_message(error, given[1:])}", file=sys.stderr, flush=True)
        sys.exit(EXIT_RANK_LOST if isinstance(error, RankLostError) else EXIT_MISTAKE)
    except KeyboardInterrupt:
        print("megatron-sbld: interrupted", file=sys.stderr, flush=True)
        sys.exit(EXIT_INTERRUPTED)


def _check_encoding(args: Sequence[str]) -> None:
    """Refuse bytes that are no UTF-8: they cannot be written into config.yaml, results and messages."""
    for arg in args:
        if args[0] == "prepare" and os.path.lexists(arg):  # it reads files of any name
            continue
        try:
            arg.encode("utf-8")
        except UnicodeEncodeError:
            shown = arg.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
            raise ValueError(
                f"the argument {shown} is not UTF-8; give the file another name, or write the text so"
            ) from None


def _message(error: Exception, args: list[str]) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"needs the package {error.name}, which is not installed; `megatron-sbld doctor` says what mends it"
    return describe(error, args) if isinstance(error, OSError) else str(error)


_USAGE = """usage: megatron-sbld COMMAND [options]

Layer dropping for GPT pretraining on Megatron.

commands:
  prepare    turn text into data sets
  pretrain   train a GPT; under torchrun with many processes
  profile    measure how much each layer matters: the sensitivity file of drop.policy sbld
  schedule   show a config's keep probabilities before training; fit PWEGD to two runs
  evaluate   LAMBADA and perplexity of trained models
  generate   continue prompts with a trained model
  compare    compare runs: loss, speed, ideal and realised gain; table and plots
  predict    what a config will take on a cluster, and what dropping layers gains there; nothing is trained
  export     write a checkpoint as a folder that Hugging Face's transformers loads
  import     make a checkpoint of a GPT-2, Llama or GPT-NeoX folder of Hugging Face's
  doctor     what is installed here, what will be used, what is missing and what mends it

`megatron-sbld COMMAND --help` says what each takes; `megatron-sbld --version` prints the version."""


def _prepare(args: list[str]) -> int:
    from megatron_sbld.data.prepare import PrepareConfig, prepare

    parser = CommandParser(
        "prepare TEXT [TEXT ...] --output PREFIX [options]",
        "Turn text into data sets (.bin/.idx) for training and validation.",
    )
    parser.add_argument("inputs", nargs="+", help="text files, JSON lines or folders of them; .gz and .xz are unpacked")
    parser.add_class_arguments(PrepareConfig, skip={"inputs"})
    print(prepare(PrepareConfig(**parser.parse_args(args).as_dict())).summary())
    return 0


def _pretrain(args: list[str]) -> int:
    config, _ = _parse_config(_pretrain_parser(), args)

    from megatron_sbld.evaluation.in_training import TasksInTraining
    from megatron_sbld.training.loop import pretrain

    return pretrain(config, TasksInTraining)


def _pretrain_parser() -> CommandParser:
    return _config_parser(
        "pretrain --config FILE [--section.field VALUE ...]",
        "Train a GPT as a config file and the command line say; the command line wins. Run it under torchrun for many "
        "processes. Exit status: 0 complete, 75 stopped as asked (start again to go on), 76 another rank died or "
        "stalled (start again to go on), 2 a mistake in the config.",
    )


def _config_parser(usage: str, description: str) -> CommandParser:
    """A parser of a config file and of its fields as options."""
    from megatron_sbld.config.sections import Config

    parser = CommandParser(usage, description)
    parser.add_argument("--config", action="config", help="YAML file of sections")
    parser.add_class_arguments(Config)
    return parser


def _parse_config(parser: CommandParser, args: list[str], others: Sequence[str] = ()) -> tuple[Config, dict[str, Any]]:
    """The config that the arguments stand for, and the values of the command's `others`, options without dashes."""
    from megatron_sbld.config.files import (
        check_options,
        explicit_drop_fields,
        parse_files,
        resolved,
        with_text_blends,
    )
    from megatron_sbld.config.sections import Config

    files, args = _config_files(args)
    check_options(args, others)
    try:
        given = parse_files(files)
        explicit = explicit_drop_fields(given, args)
        found = parser.parse_args(with_text_blends(args), namespace=given)
        values = parser.instantiate(found).as_dict()
    except OverflowError as error:
        raise ValueError(f"a number on the command line is too large: {error}") from error
    values.pop("config", None)
    options = {name: values.pop(name) for name in others}
    return resolved(Config(**values), explicit), options


def _config_files(args: list[str]) -> tuple[list[str], list[str]]:
    """The values of `--config`, and the other arguments, which win wherever they stand."""
    files, others = [], []
    rest = iter(args)
    for arg in rest:
        value = next(rest, None) if arg == "--config" else None
        if value is not None:
            files.append(value)
        elif arg.startswith("--config="):
            files.append(arg.removeprefix("--config="))
        else:
            others.append(arg)  # also a --config without a value, which the parser refuses
    return files, others


def _profile(args: list[str]) -> int:
    from megatron_sbld.report import sensitivity as report

    parts: dict[str, tuple[str, Callable[[Namespace], object]]] = {
        "merge": ("merge DIR [DIR ...] --output FILE", lambda given: report.merge(given.paths, given.output)),
        "show": ("show FILE [--plot PNG]", lambda given: report.show(given.paths[0], given.plot)),
        "lists": (
            "lists FILE [--block FRACTION] [--allow FRACTION] [--output FILE]",
            lambda given: report.lists(given.paths[0], given.block, given.allow, given.output),
        ),
        "rank": ("rank REFERENCE FILE [FILE ...]", lambda given: report.rank(given.paths[0], given.paths[1:])),
    }
    if args and args[0] in parts:
        usage, run = parts[args[0]]
        run(_profile_part_parser(args[0], usage).parse_args(args[1:]))
        return 0
    return _measure(args)


def _profile_part_parser(name: str, usage: str) -> CommandParser:
    descriptions = {
        "merge": "Join folders that `profile --layers` measured in parts, each against its own baseline.",
        "show": "Print a sensitivity file as a table.",
        "lists": "Choose the Block and Allow lists anew from the gaps of a sensitivity file.",
        "rank": "Say how well files order the layers as a reference does (Spearman, Kendall), and what each cost.",
    }
    parser = CommandParser(f"profile {usage}", descriptions[name])
    many = name in ("merge", "rank")
    parser.add_argument("paths", nargs="+" if many else 1, help="folders" if name == "merge" else "sensitivity files")
    if name == "merge":
        parser.add_argument("--output", required=True, help="sensitivity file to write")
    elif name == "show":
        parser.add_argument("--plot", help="PNG file to write: a bar for each layer")
    elif name == "lists":
        parser.add_argument("--block", type=float, default=0.15, help="share of layers in the Block list, in [0, 1]")
        parser.add_argument("--allow", type=float, default=0.15, help="share of layers in the Allow list, in [0, 1]")
        parser.add_argument("--output", help="sensitivity file to write; default: only print")
    return parser


def _measure(args: list[str]) -> int:
    from megatron_sbld.config.files import field_names
    from megatron_sbld.config.sections import Config
    from megatron_sbld.measure.plan import ProfileOptions

    parser = CommandParser(
        "profile --config FILE --out DIR [options] [--section.field VALUE ...]\n"
        "       megatron-sbld profile merge | show | lists | rank ...   (each with --help)",
        "Measure the sensitivity of the layers of the model that a config describes, and write DIR/sensitivity.json. "
        "Run it like pretrain, under torchrun for many processes. Exit status: 0 complete, 75 stopped as asked or 76 "
        "another rank died or stalled (start again to go on), 2 a mistake.",
    )
    parser.add_argument("--config", action="config", help="YAML file of sections, that of the training run")
    parser.add_argument(
        "--from",
        help="checkpoint to start from: its weights and, where it has it, all of its state and its iteration; default: "
        "as checkpoint.load says, or new weights",
    )
    parser.add_class_arguments(ProfileOptions, skip={"early_stop"})
    parser.add_argument("--early_stop", action="store_true", help=_EARLY_STOP)
    parser.add_class_arguments(Config)
    own = field_names(ProfileOptions)
    config, options = _parse_config(parser, args, ["from", *own])
    written = [os.path.join(options["out"], name) for name in ("profile.json", "sensitivity.json", "sensitivity.png")]
    refuse_inputs("--out", written, _config_files(args)[0])

    from megatron_sbld.measure.measure import profile
    from megatron_sbld.report.sensitivity import present

    chosen = ProfileOptions(**{name: options[name] for name in own})
    outcome = profile(config, chosen, load=options["from"], command=shlex.join(["megatron-sbld", "profile", *args]))
    if outcome.file is not None:
        present(outcome.file)
    return outcome.status


_EARLY_STOP = (
    "train: end a layer's run once its rank is settled and no list depends on it; its gap is then interpolated between "
    "its neighbours'"
)


def _schedule(args: list[str]) -> int:
    commands = {"show": _schedule_show, "fit": _schedule_fit}
    if not args or args[0] in ("-h", "--help"):
        print(_SCHEDULE_USAGE)
        return 0
    if args[0] not in commands:
        raise ValueError(f"unknown command 'schedule {args[0]}'; allowed are {', '.join(commands)}")
    return commands[args[0]](args[1:])


_SCHEDULE_USAGE = """usage: megatron-sbld schedule show|fit [options]

  show   the keep probabilities that a config stands for, over the run and by layer; nothing is trained
  fit    PWEGD's parameters from the loss gap between a run that drops layers and its baseline

`megatron-sbld schedule show --help` and `fit --help` say what each takes."""


def _schedule_show(args: list[str]) -> int:
    parser = _config_parser(
        "schedule show --config FILE [--section.field VALUE ...] [--out DIR]",
        "Show theta and keep_prob of every layer over a run, and the gain to expect. Takes the config of `pretrain`; "
        "nothing is trained, data is not read, one process is enough.",
    )
    parser.add_argument("--out", type=str | None, help="folder for schedule.png and schedule.json")
    config, options = _parse_config(parser, args, ["out"])

    from megatron_sbld.report.schedule import show_schedule

    show_schedule(config, options["out"], _config_files(args)[0])
    return 0


def _schedule_fit(args: list[str]) -> int:
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


def _evaluate(args: list[str]) -> int:
    from megatron_sbld.cli import evaluation as commands

    return commands.evaluate(args)


def _generate(args: list[str]) -> int:
    from megatron_sbld.cli import evaluation as commands

    return commands.generate(args)


def _compare(args: list[str]) -> int:
    from megatron_sbld.report.compare import compare

    parser = CommandParser(
        "compare RUN [RUN ...] [--baseline RUN] [--out DIR] [--group BOOL] [--realised BOOL]",
        "Compare runs: table and plots.",
    )
    parser.add_argument("runs", nargs="+", help="run folders")
    parser.add_argument("--baseline", help="run folder that the others are compared with; default: the undropped one")
    parser.add_argument("--out", help="folder for the table and the plots")
    parser.add_argument(
        "--group", type=bool, default=True, help="one row for runs that differ in seeds alone; false: a row a run"
    )
    parser.add_argument(
        "--realised",
        type=bool,
        default=True,
        help="show realised gain and time to the baseline's loss; false for runs of minutes on a shared machine",
    )
    given: Namespace = parser.parse_args(args)
    compare(given.runs, given.baseline, given.out, given.group, given.realised)
    return 0


def _predict(args: list[str]) -> int:
    from megatron_sbld.config.files import field_names
    from megatron_sbld.config.sections import Config
    from megatron_sbld.predict.command import PredictOptions, predict

    parser = CommandParser(
        "predict --config FILE --gpus N [options] [--section.field VALUE ...]",
        "Predict what a run takes on a cluster: iteration time, memory, hours, the gain of its drop section with "
        "either sampler, what pipeline imbalance costs, and a placement of the layers that evens it. A model of matrix "
        "products, memory traffic, communication and the pipeline's schedule, calibrated on the undropped run's "
        "throughput alone. Nothing is trained and no data is read; neither GPUs nor Megatron are needed.",
    )
    parser.add_argument("--config", action="config", help="YAML file of sections, that of the training run")
    parser.add_class_arguments(PredictOptions)
    parser.add_class_arguments(Config)
    own = field_names(PredictOptions)
    config, options = _parse_config(parser, _with_underscores(args, own), own)
    predict(config, PredictOptions(**options), _config_files(args)[0])
    return 0


def _with_underscores(args: list[str], names: Sequence[str]) -> list[str]:
    """Options by the names with dashes as well, and --compare_policies without a value."""
    changed = []
    for at, arg in enumerate(args):
        option, equals, value = arg.partition("=")
        name = option.removeprefix("--").replace("-", "_")
        if not option.startswith("--") or name not in names:
            changed.append(arg)
            continue
        bare = name == "compare_policies" and not equals
        if bare and (at + 1 == len(args) or args[at + 1].lower() not in ("true", "false")):
            equals, value = "=", "true"
        changed.append(f"--{name}{equals}{value}")
    return changed


def _export(args: list[str]) -> int:
    from megatron_sbld.cli import evaluation as commands

    return commands.export(args)


def _import(args: list[str]) -> int:
    from megatron_sbld.cli import evaluation as commands

    return commands.import_(args)


def _doctor(args: list[str]) -> int:
    from megatron_sbld import doctor

    return doctor.main(args)


if __name__ == "__main__":
    main()
