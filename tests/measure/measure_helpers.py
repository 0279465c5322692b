"""Tiny measurements of `megatron_sbld.measure.measure`, and the state of a run to compare before and after."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import tensor_parallel
from megatron.core.optimizer import ChainedOptimizer

from megatron_sbld.config.sections import Config
from megatron_sbld.measure.measure import measure as measure_sensitivity
from megatron_sbld.measure.options import MeasureOptions
from megatron_sbld.measure.state import RunSnapshot
from megatron_sbld.sensitivity.measurement import MeasurementFolder
from megatron_sbld.training.processes import distributed_run
from megatron_sbld.training.run import Run, microbatch_calculator
from megatron_sbld.training.stop import stop_flag
from tests.training.trainer_helpers import full_depth_run


def measure(config: Config, out: Path | str, load: Path | str | None = None, **options: Any) -> int | str:
    """Call `measure` in this process: its exit status, or the error as text."""
    chosen = MeasureOptions(out=str(out), **options)
    try:
        return measure_sensitivity(config, chosen, load=None if load is None else str(load), command="test").status
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def measure_on_rank(case: tuple[Config, str, str | None, dict[str, Any]]) -> int | str:
    """`measure` with its arguments in one, for `call_on_ranks`."""
    config, out, load, options = case
    return measure(config, out, load, **options)


def call(case: tuple[Callable[[Any], Any], Any]) -> Any:
    """A function of this module with its argument, for `call_on_ranks`."""
    function, argument = case
    return function(argument)


def values(out: Path | str, seed: int = 1234) -> dict[str, list[float]]:
    """What each finished run of a measurement measured, by the name of its file."""
    folder = MeasurementFolder.read(Path(out))
    found = {layer: folder.run(seed, layer) for layer in (None, *range(1, folder.request.num_layers + 1))}
    return {"baseline" if n is None else f"layer {n}": run.values for n, run in found.items() if run is not None}


def state_is_restored(case: tuple[Config, int]) -> str:
    """Train, take a snapshot, train on, restore, compare, and train on again; empty if all is equal bit for bit.

    case: the config, and the iterations before the snapshot; 0 is before the optimizer has any state.
    """
    config, before = case
    with stop_flag() as stop, distributed_run(config), microbatch_calculator(config):
        stop.listen()
        run = full_depth_run(config)
        for chunk in run.chunks:
            chunk.train()
        for _ in range(before):
            run.iterate(stop)
        snapshot = RunSnapshot(run)
        expected = state_of(run)
        losses = [_loss(run, stop) for _ in range(3)]
        trained = state_of(run)
        snapshot.restore(run)
        restored = state_of(run)
        again = [_loss(run, stop) for _ in range(3)]
    unequal = [name for name in expected.keys() | restored.keys() if not same(expected.get(name), restored.get(name))]
    unmoved = [name for name in ("parameters", "scheduler", "batch") if same(expected[name], trained[name])]
    problems = [f"not restored: {sorted(unequal)}"] if unequal else []
    problems += [f"training did not move {unmoved}, so the test proves nothing"] if unmoved else []
    problems += [f"losses {losses}, then {again}"] if losses != again else []
    return "; ".join(problems)


def _loss(run: Run, stop: Any) -> float:
    run.iterate(stop)
    return run.last_loss


def state_of(run: Run) -> dict[str, Any]:
    """A copy of everything that the next iteration depends on, the next microbatch included."""
    optimizer = run.optimizer
    parts = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    batch = next(run.data.train_batches(1))
    run.data.go_to(run.consumed_samples)
    state = {
        "parameters": [param.data for chunk in run.chunks for param in chunk.parameters()],
        "main parameters": [p.data for part in parts for group in part.optimizer.param_groups for p in group["params"]],
        "groups": [
            {key: value for key, value in group.items() if key != "params"}
            for part in parts
            for group in part.optimizer.param_groups
        ],
        "moments": [
            dict(part.optimizer.state.get(p, {}))
            for part in parts
            for group in part.optimizer.param_groups
            for p in group["params"]
        ],
        "scheduler": run.scheduler.state_dict(),
        "loss scale": [part.grad_scaler.state_dict() for part in parts if getattr(part, "grad_scaler", None)],
        "random": [
            random.getstate(),
            np.random.get_state(),  # noqa: NPY002
            torch.get_rng_state(),
            tensor_parallel.get_cuda_rng_tracker().get_states(),
        ],
        "position": [run.iteration, run.consumed_samples],
        "batch": batch,
    }
    return copied(state)


def copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [copied(item) for item in value]
    return value.copy() if isinstance(value, np.ndarray) else value


def same(first: Any, second: Any) -> bool:
    """Equal bit for bit, structure and types included."""
    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list):
        return len(first) == len(second) and all(map(same, first, second))
    if isinstance(first, np.ndarray):
        return np.array_equal(first, second)
    return first == second
