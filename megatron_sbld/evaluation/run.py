"""Runs an evaluation on checkpoints, one after the other, in the processes of one run."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_sbld.config.sections import ParallelConfig
from megatron_sbld.evaluation.model import TrainedModel, evaluation_config, load_chunks
from megatron_sbld.evaluation.requests import Score
from megatron_sbld.evaluation.scoring import score
from megatron_sbld.evaluation.tasks import Asked, Result, Task
from megatron_sbld.health.watchdog import POSITION
from megatron_sbld.training.metrics import clock
from megatron_sbld.training.processes import distributed_run, world_size_from_environment


@dataclass(frozen=True)
class Evaluated:
    """A task's result for a model, and what it cost."""

    trained: TrainedModel
    asked: Asked
    scores: list[Score]
    result: Result
    seconds: float
    """Of scoring alone."""
    precision: str

    @property
    def tokens_per_s(self) -> float:
        """Input tokens a second, without padding."""
        return sum(len(request.tokens) - 1 for request in self.asked.requests) / self.seconds


def evaluate_checkpoints(
    task: Task,
    models: Sequence[TrainedModel],
    parallel: ParallelConfig,
    *,
    precision: str | None = None,
    batch_tokens: int = 16384,
    on_result: Callable[[Evaluated], None] = lambda evaluated: None,
) -> list[Evaluated]:
    """Run a task on each model; on one process or, under torchrun, on many.

    Args:
        task: what to ask.
        models: all checked before the first is loaded.
        parallel: the layout.
        precision: see `evaluation_config`.
        batch_tokens: most tokens of a microbatch.
        on_result: called on rank 0 as soon as a model is through, so that nothing is lost if a later one fails.

    Raises:
        ValueError: a model cannot be spread like that, something cannot be asked of it, or a checkpoint is damaged.
    """
    if batch_tokens < 1:
        raise ValueError(f"batch_tokens = {batch_tokens}: must be at least 1")
    world_size = world_size_from_environment()
    configs = [evaluation_config(trained, parallel, world_size, precision) for trained in models]
    asked_of: dict[tuple[str, int], Asked] = {}  # one for all checkpoints of a run
    keys = [(trained.tokenizer.fingerprint(), trained.model.context) for trained in models]
    for trained, key in zip(models, keys, strict=True):
        if key not in asked_of:
            asked_of[key] = task.ask(trained.tokenizer, trained.model.context)
    evaluated = []
    with distributed_run(configs[0]):
        for trained, config, key in zip(models, configs, keys, strict=True):
            asked, iteration = asked_of[key], trained.checkpoint.iteration
            POSITION.enter(f"evaluating {trained.checkpoint.path}", iteration)
            chunks = load_chunks(trained, config)
            with progress_shown(f"{task.name}, iteration {iteration:,}") as show:
                began = time.monotonic()
                scores = score(
                    parallel,
                    chunks,
                    asked.requests,
                    vocab_size=trained.tokenizer.vocab_size,
                    batch_tokens=batch_tokens,
                    on_progress=show,
                )
                seconds = time.monotonic() - began
            result = asked.result(scores)
            evaluated.append(Evaluated(trained, asked, scores, result, seconds, config.training.precision))
            if dist.get_rank() == 0:
                on_result(evaluated[-1])
    return evaluated


@contextmanager
def progress_shown(what: str) -> Iterator[Callable[[float], None]]:
    """A function that shows the share done: as a bar on rank 0's terminal, as lines at each tenth elsewhere."""
    if dist.get_rank() != 0:
        yield lambda share: None
    elif sys.stderr.isatty():
        columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f} %")
        with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
            bar = progress.add_task(what, total=1.0)
            yield lambda share: progress.update(bar, completed=share)
    else:
        yield _TenthsShown(what)


class _TenthsShown:
    """A line for each tenth that is done, with the time left."""

    def __init__(self, what: str) -> None:
        self._what, self._shown, self._began = what, 0, time.monotonic()

    def __call__(self, share: float) -> None:
        tenths = int(10 * share + 1e-9)
        if tenths > self._shown:
            self._shown = tenths
            left = (time.monotonic() - self._began) * (1 / share - 1)
            print(f"{self._what}: {10 * tenths} %, left {clock(left)}", file=sys.stderr, flush=True)
