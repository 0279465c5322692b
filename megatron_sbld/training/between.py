"""What a run does between iterations, validation and tasks (LAMBADA, perplexity), and how a request to stop ends it.

Ranks agree on a request to stop between the parts of a validation or task: a microbatch each, on a pipeline as many as
fill it. What was interrupted writes no row, stands in the checkpoint, and is done when the run goes on, before its next
iteration: the metrics are those of a run that nothing disturbed.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from megatron_sbld.config.sections import Config
from megatron_sbld.data.tokenizer import Tokenizer
from megatron_sbld.health.watchdog import POSITION
from megatron_sbld.ranks import any_rank, on_rank_0
from megatron_sbld.training.step import StopRequestedError, evaluating, validation_loss

if TYPE_CHECKING:
    from megatron_sbld.training.run import Run
    from megatron_sbld.training.stop import StopFlag

_ROW_FIELDS = {"validation": "valid_loss", "tasks": "tasks_time_s"}
"""What there is, and a field that its row in metrics.jsonl has."""


class Tasks(Protocol):
    """What is evaluated while a run trains; false where nothing is asked for."""

    def __bool__(self) -> bool: ...

    def open_file(self, iteration: int, *, goes_on: bool) -> None:
        """Make sure that results can be kept, and drop those of a path that the run has left. Collective."""

    def evaluate(
        self,
        chunks: Sequence[torch.nn.Module],
        iteration: int,
        consumed_tokens: int,
        train_time_s: float,
        interrupt: Callable[[], None],
    ) -> dict[str, Any]:
        """Metrics of the model as it is; `interrupt` is called between parts and may raise. Collective."""


class NoTasks:
    """Nothing is asked for."""

    def __bool__(self) -> bool:
        return False

    def open_file(self, iteration: int, *, goes_on: bool) -> None:
        """There are no results."""

    def evaluate(self, *args: Any) -> dict[str, Any]:
        """Never called."""
        raise AssertionError("nothing is asked for")


def no_tasks(config: Config, tokenizer: Tokenizer) -> Tasks:
    """The tasks of a caller that evaluates none. Raises ValueError where the config asks for some, by name."""
    for name in ("lambada_path", "perplexity_path"):
        if getattr(config.data, name) is not None:
            raise ValueError(f"data.{name} = {getattr(config.data, name)!r}: this caller of pretrain cannot evaluate")
    return NoTasks()


class BetweenIterations:
    """Does what is due; the same on all ranks."""

    def __init__(self, run: Run, tasks: Tasks, stop: StopFlag) -> None:
        self._run, self._tasks, self._stop = run, tasks, stop

    def due(self, done: bool) -> list[str]:
        """What follows the iteration that the run is at; `done`: it was the last."""
        training, iteration = self._run.config.training, self._run.iteration
        intervals = {"validation": training.eval_interval, "tasks": training.task_interval}
        return [name for name in self._asked_for() if done or is_due(iteration, intervals[name])]

    def missed(self, interrupted: list[str]) -> list[str]:
        """Of what was interrupted when the run was saved, what it still wants and has not made up for. Collective."""
        if not interrupted:
            return []
        run = self._run
        written = on_rank_0(lambda: sorted(_fields_of(run.run_dir / "metrics.jsonl", run.iteration)))
        left = [name for name in interrupted if name in self._asked_for() and _ROW_FIELDS[name] not in written]
        if left:
            run.note(f"iteration {run.iteration}: {' and '.join(left)}, interrupted when the run was stopped, run now")
        return left

    def do(self, due: list[str]) -> list[str]:
        """Do it; returns what is left because a rank was asked to stop. Collective."""
        steps = {"validation": self._validate, "tasks": self._evaluate_tasks}
        for at, name in enumerate(due):
            try:
                steps[name]()
            except StopRequestedError:
                return due[at:]
        return []

    def is_stopping(self) -> bool:
        """Whether any rank was asked to stop. Collective."""
        return any_rank(self._stop.requested)

    def _interrupt(self) -> None:
        if self.is_stopping():
            raise StopRequestedError

    def _asked_for(self) -> list[str]:
        wanted = {"validation": bool(self._run.config.data.valid_data_path), "tasks": bool(self._tasks)}
        return [name for name in _ROW_FIELDS if wanted[name]]

    def _validate(self) -> None:
        run = self._run
        training = run.config.training
        num_microbatches = (
            training.eval_iters * training.global_batch_size // (training.micro_batch_size * run.replicas)
        )
        batches = itertools.tee(run.data.valid_batches(num_microbatches), len(run.chunks))
        loss = validation_loss(run.config, run.chunks, batches, num_microbatches, self._interrupt)
        if run.writer is not None:
            run.writer.valid_row(
                {
                    "iteration": run.iteration,
                    "valid_loss": loss,
                    "train_time_s": run.train_time_s,
                    "consumed_tokens": run.consumed_tokens,
                }
            )

    def _evaluate_tasks(self) -> None:
        run = self._run
        POSITION.enter("evaluating tasks")
        with evaluating(run.config, run.chunks):
            metrics = self._tasks.evaluate(
                run.chunks, run.iteration, run.consumed_tokens, run.train_time_s, self._interrupt
            )
        if run.writer is not None:
            run.writer.tasks_row({"iteration": run.iteration, **metrics})


def is_due(iteration: int, interval: int) -> bool:
    """Whether something that happens every `interval` iterations, never with 0, follows this one."""
    return interval > 0 and iteration % interval == 0


def _fields_of(path: Path, iteration: int) -> set[str]:
    """Fields of the rows of an iteration."""
    found: set[str] = set()
    for line in path.read_bytes().splitlines() if path.exists() else ():
        with suppress(ValueError, TypeError, KeyError):  # a torn line
            row = json.loads(line)
            if row["iteration"] == iteration:
                found |= row.keys()
    return found
