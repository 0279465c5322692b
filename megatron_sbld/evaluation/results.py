"""What is kept of evaluations: evaluations.jsonl in a run folder, or a file that the caller names.

A row for every task, data, options, iteration and precision, in a folder that runs share for every checkpoint too;
evaluating the same again replaces it. Writing is atomic, and a lock on the folder keeps processes that evaluate at the
same time from losing each other's rows.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from megatron_sbld import __version__
from megatron_sbld.evaluation.files import file_hash, write_atomically

TASKS = ("lambada", "perplexity")
EVALUATIONS_FILE = "evaluations.jsonl"
"""Its name in a run folder."""


@dataclass(frozen=True)
class Data:
    """What was evaluated on: equal where the files' content is, wherever they are."""

    name: str
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One evaluation of one checkpoint: a row of the file."""

    task: str
    """One of TASKS."""
    iteration: int
    """Of the checkpoint."""
    consumed_tokens: int | None
    """Trained on until then; None where the checkpoint does not say, as train_time_s."""
    train_time_s: float | None
    """Training time until then, without validation and saving."""
    precision: str
    """In which the model was run: fp32, bf16 or fp16."""
    data: Data
    options: dict[str, Any]
    """What else decides the figures: format, detokenise, stride, max_length; values as JSON has them."""
    metrics: dict[str, float | int | None]
    """Fields of LambadaResult or PerplexityResult."""
    date: str
    """When it ended, ISO 8601 in UTC."""
    version: str
    """Of this package."""
    checkpoint: str | None = None
    """Path of the checkpoint, in a folder that runs may share; None in the folder of the run."""
    examples: str | None = None
    """File with the score of each passage, seen from the folder that the row is in; None without one."""

    @property
    def key(self) -> str:
        """Equal for evaluations of the same, of which the later one counts."""
        return json.dumps([self.checkpoint, self.iteration, self.series], sort_keys=True)

    @property
    def series(self) -> str:
        """Equal for evaluations that compare over checkpoints and runs."""
        return json.dumps([self.task, self.data.name, self.data.sha256, self.options, self.precision], sort_keys=True)


def identify(inputs: Sequence[str], files: Sequence[str]) -> Data:
    """The data that `inputs` name, as the user gave them, and that `files` hold."""
    return Data(", ".join(os.path.basename(os.path.normpath(name)) for name in inputs), file_hash(files))


def evaluation(
    *,
    task: str,
    iteration: int,
    consumed_tokens: int | None,
    train_time_s: float | None,
    precision: str,
    data: Data,
    options: dict[str, Any],
    result: Any,
) -> Evaluation:
    """A row of a LambadaResult or a PerplexityResult, dated now."""
    return Evaluation(
        task=task,
        iteration=iteration,
        consumed_tokens=consumed_tokens,
        train_time_s=train_time_s,
        precision=precision,
        data=data,
        options=options,
        metrics=dataclasses.asdict(result),
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        version=__version__,
    )


def save_evaluations(rows: Sequence[Evaluation], file: Path) -> None:
    """Adds rows to a file, in the place of those of the same key.

    Raises:
        ValueError: the file is there and damaged; it is left as it is.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with _locked(file.parent):
        kept = {row.key: row for row in (read_evaluations(file) if file.exists() else [])}
        kept |= {row.key: row for row in rows}
        _write(kept.values(), file)


def drop_evaluations_after(file: Path, iteration: int) -> None:
    """Removes the rows of later iterations.

    Raises:
        ValueError: the file is damaged; it is left as it is.
    """
    with _locked(file.parent):
        rows = read_evaluations(file)
        kept = [row for row in rows if row.iteration <= iteration]
        if len(kept) < len(rows):
            _write(kept, file)


def _write(rows: Iterable[Evaluation], file: Path) -> None:
    write_atomically(file, "".join(json.dumps(dataclasses.asdict(row)) + "\n" for row in rows))


def read_evaluations(file: Path) -> list[Evaluation]:
    """All rows of a file, in the order in which they were first written.

    Raises:
        ValueError: naming the line that is cut off, is no JSON, or lacks a field or has a wrong one.
    """
    content = file.read_text(encoding="utf-8", errors="replace")
    rows = []
    for number, line in enumerate(content.splitlines(keepends=True), start=1):
        where = f"{file}, line {number}"
        if not line.endswith("\n"):
            raise ValueError(f"{where} is cut off; delete it or evaluate anew")
        try:
            values = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{where} is not JSON: {error}") from error
        rows.append(_row(values, where))
    return rows


_TYPES: dict[str, tuple[type, ...]] = {
    "task": (str,),
    "iteration": (int,),
    "consumed_tokens": (int, type(None)),
    "train_time_s": (int, float, type(None)),
    "precision": (str,),
    "data": (dict,),
    "options": (dict,),
    "metrics": (dict,),
    "date": (str,),
    "version": (str,),
    "checkpoint": (str, type(None)),
    "examples": (str, type(None)),
}
_OPTIONAL = ("checkpoint", "examples")  # rows of earlier versions lack them


def _row(values: Any, where: str) -> Evaluation:
    if not isinstance(values, dict):
        raise ValueError(f"{where} is not an evaluation: it is {type(values).__name__}")
    values = dict.fromkeys(_OPTIONAL) | values
    for name, types in _TYPES.items():
        if name not in values:
            raise ValueError(f"{where} is not an evaluation: it has no {name}")
        if not isinstance(values[name], types) or isinstance(values[name], bool):
            allowed = " or ".join("null" if kind is type(None) else kind.__name__ for kind in types)
            raise ValueError(f"{where}: {name} = {values[name]!r} must be {allowed}")
    if values["task"] not in TASKS:
        raise ValueError(f"{where}: task = {values['task']!r}; allowed: {', '.join(TASKS)}")
    data, metrics = values["data"], values["metrics"]
    if not isinstance(data.get("name"), str) or not isinstance(data.get("sha256"), str):
        raise ValueError(f"{where}: data = {data!r} must have a name and a sha256")
    for name, value in metrics.items():
        if isinstance(value, bool) or not isinstance(value, int | float | None):
            raise ValueError(f"{where}: metrics.{name} = {value!r} must be a number or null")
    fields = {name: values[name] for name in _TYPES}
    return Evaluation(**(fields | {"data": Data(data["name"], data["sha256"])}))


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks: one process at a time is the common case
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
