"""`megatron-sbld predict`."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_sbld.cli.command import Command
from megatron_sbld.cli.parser import config_files, config_parser, parse_config


def _predict(args: list[str]) -> int:
    from megatron_sbld.config.files import field_names
    from megatron_sbld.predict.command import PredictOptions, predict

    parser = config_parser(
        "predict --config FILE --gpus N [options] [--section.field VALUE ...]",
        "Predict what a run takes on a cluster: iteration time, memory, hours, the gain of its drop section with "
        "either sampler, what pipeline imbalance costs, and a placement of the layers that evens it. A model of matrix "
        "products, memory traffic, communication and the pipeline's schedule, calibrated on the undropped run's "
        "throughput alone. Nothing is trained and no data is read; neither GPUs nor Megatron are needed.",
        lambda parser: parser.add_class_arguments(PredictOptions),
    )
    own = field_names(PredictOptions)
    config, options = parse_config(parser, _with_underscores(args, own), own)
    predict(config, PredictOptions(**options), config_files(args)[0])
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


COMMAND = Command(
    "predict",
    "what a config will take on a cluster, and what dropping layers gains there; nothing is trained",
    _predict,
)
