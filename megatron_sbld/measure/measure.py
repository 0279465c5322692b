"""`sensitivity measure`: base sensitivity (docs/method.md 3; SBLD, "Layer-Wise Sensitivity") and cheaper estimates.

A baseline of N iterations, then for every layer N iterations from the same weights on the same data in the same order,
in which that layer alone is dropped with probability 0.9. All runs follow each other in one process group on one model,
whose state is put back before each (state.py). Each finished run is stored (sensitivity/measurement.py), so an
interrupted measurement goes on with the first run that is missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_sbld.config.sections import Config
from megatron_sbld.exit_status import EXIT_TO_BE_CONTINUED
from megatron_sbld.measure.evaluation import EvaluatedRuns
from megatron_sbld.measure.options import MeasureOptions
from megatron_sbld.measure.plan import build_request, plan_measurement
from megatron_sbld.measure.runs import Measurement, TrainedRuns
from megatron_sbld.ranks import on_rank_0
from megatron_sbld.sensitivity.measurement import MeasurementFolder, Request, sensitivity_of
from megatron_sbld.training.processes import distributed_run, world_size_from_environment
from megatron_sbld.training.run import microbatch_calculator, run_folder_lock
from megatron_sbld.training.stop import stop_flag

SENSITIVITY = "sensitivity.json"


@dataclass(frozen=True)
class Outcome:
    """How a measurement ended."""

    status: int
    """0 when all that was asked for is measured, EXIT_TO_BE_CONTINUED when it was asked to stop."""
    file: Path | None
    """The sensitivity file, once every layer is measured; on rank 0."""


def measure(config: Config, options: MeasureOptions, load: str | None = None, command: str = "") -> Outcome:
    """Measure the sensitivity of the layers of the model that the config describes.

    Args:
        config: of the training run that the sensitivity is for; its drop.policy is replaced.
        options: what is measured.
        load: the checkpoint of `--from`, to start from.
        command: what the user typed, for the file.

    Raises:
        ValueError: a mistake in the config, the options, the data or the checkpoint, or a folder that holds runs of
            other settings; before the first iteration. Or gaps that are all equal.
        FloatingPointError: a loss is no longer finite.
    """
    world_size = world_size_from_environment()
    plan = plan_measurement(config, options, load, world_size)
    fractions = config.drop.block_fraction, config.drop.allow_fraction
    request = build_request(plan, world_size, command, fractions)
    first = plan.config_of(plan.seeds[0])
    with (
        stop_flag() as stop,
        distributed_run(first),
        microbatch_calculator(first),
        run_folder_lock(options.out, "--out"),
    ):
        stop.listen()
        _require_equal_requests(request, plan.layers)
        folder = on_rank_0(lambda: MeasurementFolder.open(Path(options.out), request))
        runs = TrainedRuns if plan.method == "train" else EvaluatedRuns
        measurement: Measurement = runs(plan, folder, stop)
        try:
            complete = measurement.run()
            file = on_rank_0(lambda: _save(folder)) if complete else None
            if complete and file is None:
                measurement.progress.note(f"{folder.path}: layers {folder.layers()} of {plan.num_layers} are measured")
        finally:
            measurement.progress.close()
        return Outcome(0 if complete else EXIT_TO_BE_CONTINUED, file if dist.get_rank() == 0 else None)


def _require_equal_requests(request: Request, layers: Sequence[int]) -> None:
    """Refuse options that differ between ranks, on all of them; configs are compared elsewhere."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (request.settings, request.seeds, request.window, list(layers)))
    different = [rank for rank, theirs in enumerate(everyone) if theirs != everyone[0]]
    if different:
        raise ValueError(f"ranks {different} were given other options than rank 0")


def _save(folder: MeasurementFolder) -> Path | None:
    """Write the sensitivity file if every layer is measured."""
    if len(folder.layers()) < folder.request.num_layers:
        return None
    sensitivity_of([folder]).save(folder.path / SENSITIVITY)
    return folder.path / SENSITIVITY
