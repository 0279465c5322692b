"""LAMBADA and perplexity while a run trains, as data.lambada_path, data.perplexity_path and task_interval ask."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_sbld.evaluation.results import EVALUATIONS_FILE, drop_evaluations_after, save_evaluations
from megatron_sbld.evaluation.scoring import score
from megatron_sbld.evaluation.tasks import Asked, LambadaTask, PerplexityTask, Task
from megatron_sbld.training.checkpoint import on_rank_0
from megatron_sbld.training.config import Config
from megatron_sbld.training.metrics import set_aside
from megatron_sbld.training.tokenizer import Tokenizer


class TasksInTraining:
    """The tasks that a config asks for, read and encoded before anything starts.

    Raises:
        ValueError: data are missing or broken, or cannot be asked of this model; naming the field.
    """

    def __init__(self, config: Config, tokenizer: Tokenizer) -> None:
        self._config, self._tokenizer = config, tokenizer
        self._asked: list[tuple[Task, Asked]] = []
        for field in ("lambada_path", "perplexity_path"):
            path = getattr(config.data, field)
            if path is None:
                continue
            try:
                task = (
                    LambadaTask(path)
                    if field == "lambada_path"
                    else PerplexityTask(path, config.data.perplexity_format)
                )
                self._asked.append((task, task.ask(tokenizer, config.model.context)))
            except ValueError as error:
                raise ValueError(f"data.{field} = {path!r}: {error}") from error

    def __bool__(self) -> bool:
        return bool(self._asked)

    def open_file(self, iteration: int, *, goes_on: bool) -> None:
        """Drop figures of later iterations than the run starts at, whose weights it may not come to. Collective.

        goes_on: whether it starts from a checkpoint of its own; else all figures are set aside.

        Raises:
            ValueError: the file is damaged, and there are tasks whose figures belong into it.
        """
        on_rank_0(lambda: self._clear(Path(self._config.logging.run_dir) / EVALUATIONS_FILE, iteration, goes_on))

    def _clear(self, file: Path, iteration: int, goes_on: bool) -> None:
        if not goes_on:
            set_aside(file)
        elif file.exists():
            with nullcontext() if self._asked else suppress(ValueError):
                drop_evaluations_after(file, iteration)

    def evaluate(
        self,
        chunks: Sequence[torch.nn.Module],
        iteration: int,
        consumed_tokens: int,
        train_time_s: float,
        interrupt: Callable[[], None] | None = None,
    ) -> dict[str, Any]:
        """Score everything with the model as it is, and keep it in the run folder once all is there. Collective.

        Args:
            chunks: this rank's, in evaluation mode.
            iteration: iterations done.
            consumed_tokens: tokens trained on.
            train_time_s: seconds trained.
            interrupt: see `score`.

        Returns:
            The metrics for metrics.jsonl, each under the task's name and its own.
        """
        training, rows = self._config.training, []
        metrics: dict[str, Any] = {}
        began = time.monotonic()
        for task, asked in self._asked:
            scores = score(
                self._config.parallel,
                chunks,
                asked.requests,
                vocab_size=self._tokenizer.vocab_size,
                batch_tokens=training.micro_batch_size * self._config.model.seq_length,
                interrupt=interrupt,
            )
            result = asked.result(scores)
            metrics |= {f"{task.name}_{name}": value for name, value in dataclasses.asdict(result).items()}
            if dist.get_rank() == 0:
                rows.append(
                    asked.evaluation(
                        task,
                        result,
                        iteration=iteration,
                        consumed_tokens=consumed_tokens,
                        train_time_s=train_time_s,
                        precision=training.precision,
                    )
                )
        if rows:
            save_evaluations(rows, Path(self._config.logging.run_dir) / EVALUATIONS_FILE)
        return {**metrics, "tasks_time_s": time.monotonic() - began}
