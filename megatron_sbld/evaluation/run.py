"""Runs an evaluation on checkpoints, one after the other, in the processes of one run."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_sbld.evaluation.model import TrainedModel, evaluation_config, load_chunks
from megatron_sbld.evaluation.requests import Request, Score
from megatron_sbld.evaluation.scoring import score
from megatron_sbld.training.config import ParallelConfig
from megatron_sbld.training.metrics import clock
from megatron_sbld.training.processes import distributed_run, world_size_from_environment
from megatron_sbld.training.tokenizer import Tokenizer
from megatron_sbld.training.watchdog import POSITION


class Task(Protocol):
    """What is asked of a model, and what its answers come to."""

    name: str

    def requests(self, tokenizer: Tokenizer, context: int) -> Sequence[Request]:
        """What to score, in this tokenizer's tokens.

        Args:
            tokenizer: the model's.
            context: most tokens that it takes at once.
        """

    def result(self, scores: Sequence[Score]) -> Any:
        """What the scores of the last `requests` come to."""


@dataclass(frozen=True)
class Evaluated:
    """The result of a task on a checkpoint, and what it cost."""

    trained: TrainedModel
    result: Any
    seconds: float
    tokens: int
    """Input tokens of all requests, without padding."""


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
        ValueError: a model cannot be spread like that, a request cannot be made, or a checkpoint is damaged.
    """
    world_size = world_size_from_environment()
    configs = [evaluation_config(trained, parallel, world_size, precision) for trained in models]
    asked = [task.requests(trained.tokenizer, trained.context) for trained in models[:1]]
    evaluated = []
    with distributed_run(configs[0]):
        for trained, config in zip(models, configs, strict=True):
            POSITION.enter(f"evaluating {trained.checkpoint.path}", trained.checkpoint.iteration)
            requests = asked.pop() if asked else task.requests(trained.tokenizer, trained.context)
            chunks = load_chunks(trained, config)
            with progress_shown(f"{task.name}, iteration {trained.checkpoint.iteration:,}") as show:
                began = time.monotonic()
                scores = score(
                    parallel,
                    chunks,
                    requests,
                    vocab_size=trained.tokenizer.vocab_size,
                    batch_tokens=batch_tokens,
                    on_progress=show,
                )
                seconds = time.monotonic() - began
            tokens = sum(len(request.tokens) - 1 for request in requests)
            evaluated.append(Evaluated(trained, task.result(scores), seconds, tokens))
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
