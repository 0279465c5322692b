"""Reads a run folder: config.yaml, metrics.jsonl and, where they are there, evaluations.jsonl and changes.jsonl, as a
trainer that may have been killed at any moment left them.

Only these files are read, not checkpoints nor TensorBoard's. What is computed from them is elsewhere.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml

from megatron_sbld.config.sections import Config
from megatron_sbld.evaluation.results import EVALUATIONS_FILE, Evaluation, read_evaluations
from megatron_sbld.method.in_force import drops_tokens
from megatron_sbld.training.changes import CHANGES_FILE, SettingChange, read_changes

Row = dict[str, Any]
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class RunData:
    """What a run folder says about a run: its resolved config and its rows, one an iteration, in order.

    The config is that of the last start; `changes` are what it had otherwise before.
    """

    path: Path
    label: str
    """Name of the run in tables and plots: as much of the path's end as tells it from the others."""
    config: Config
    train: list[Row]
    """Training rows by iteration; never empty. Lists in a row are float32 arrays."""
    valid: list[Row]
    """Validation rows by iteration; may be empty."""
    evaluations: list[Evaluation] = field(default_factory=list)
    """Of checkpoints up to the iteration at which the run stands; may be empty."""
    changes: list[SettingChange] = field(default_factory=list)
    """In the order of iterations; most runs have none."""

    @property
    def policy(self) -> str:
        """Name of the drop policy, with "tokens" where tokens are dropped; none where nothing is."""
        policy = self.config.drop.policy
        if not drops_tokens(self.config.drop):
            return policy
        return "tokens" if policy == "none" else f"{policy}, tokens"

    @property
    def seed(self) -> int:
        """Seed of weights, data order and dropout: what makes runs of different policies a pair."""
        return self.config.training.seed

    @property
    def last_iteration(self) -> int:
        """Iteration at which the run stands."""
        return int(self.train[-1]["iteration"])

    def column(self, name: str) -> FloatArray:
        """One value of every training row, [T]. Raises ValueError naming the first row that lacks it."""
        return self._column(self.train, name)

    def valid_column(self, name: str) -> FloatArray:
        """One value of every validation row. Raises ValueError naming the first row that lacks it."""
        return self._column(self.valid, name)

    def elapsed_s(self, iterations: FloatArray) -> FloatArray:
        """Training time from the start to the end of each of `iterations`, without validation and saving."""
        times = np.concatenate([[0.0], np.cumsum(self.column("step_time_s"))])
        return times[np.searchsorted(self.column("iteration"), iterations, side="right")]

    def layers_column(self, name: str) -> FloatArray:
        """A list over layers from every training row, [T, L]. Raises ValueError naming a row with another length."""
        num_layers = self.config.model.num_layers
        for row in self.train:
            if len(row.get(name, ())) != num_layers:
                raise ValueError(
                    f"{self.path / 'metrics.jsonl'}: iteration {row['iteration']} has {len(row.get(name, ()))} {name}; "
                    f"a run of {num_layers} layers must have as many"
                )
        return np.array([row[name] for row in self.train], dtype=np.float64)

    def _column(self, rows: list[Row], name: str) -> FloatArray:
        for row in rows:
            if not isinstance(row.get(name), int | float):
                raise ValueError(f"{self.path / 'metrics.jsonl'}: iteration {row['iteration']} has no number {name}")
        return np.array([row[name] for row in rows], dtype=np.float64)


def read_runs(paths: Sequence[str]) -> list[RunData]:
    """Reads run folders and labels them apart. Raises ValueError naming one that is no run, empty, or given twice."""
    resolved = [Path(path).resolve() for path in paths]
    for path in resolved:
        if resolved.count(path) > 1:
            raise ValueError(f"run folder {path} is given twice; give each once")
    labels = shortest_ends([path.parts for path in resolved])
    return [read_run(path, label) for path, label in zip(resolved, labels, strict=True)]


def run_files(runs: Iterable[RunData]) -> list[Path]:
    """All files that `read_runs` reads."""
    names = ("config.yaml", "metrics.jsonl", EVALUATIONS_FILE, CHANGES_FILE)
    return [run.path / name for run in runs for name in names]


def read_run(path: Path, label: str) -> RunData:
    """Reads one run folder. Raises ValueError naming what is missing or malformed."""
    if not path.is_dir():
        raise ValueError(f"run folder {path} does not exist")
    for name in ("config.yaml", "metrics.jsonl"):
        if not (path / name).is_file():
            raise ValueError(f"{path} is not a run folder: it has no {name}")
    train, valid = _read_rows(path / "metrics.jsonl")
    if not train:
        raise ValueError(f"{path / 'metrics.jsonl'} has no training row: the run did not finish an iteration")
    last = int(train[-1]["iteration"])
    return RunData(
        path=path,
        label=label,
        config=_read_config(path / "config.yaml"),
        train=train,
        valid=valid,
        evaluations=[row for row in _read_evaluations(path / EVALUATIONS_FILE) if row.iteration <= last],
        changes=[change for change in read_changes(path) if change.iteration <= last],
    )


def _read_evaluations(file: Path) -> list[Evaluation]:
    """A run that was resumed from further back does not count what it had been beyond."""
    return read_evaluations(file) if file.exists() else []


def _read_config(file: Path) -> Config:
    try:
        sections = yaml.safe_load(file.read_text(errors="replace"))
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is not YAML: {error}") from error
    try:
        defaults = Config()
        return Config(**{name: type(getattr(defaults, name))(**values) for name, values in sections.items()})
    except (TypeError, AttributeError) as error:
        raise ValueError(f"{file} is not the config of a run: {error}") from error


def _read_rows(file: Path) -> tuple[list[Row], list[Row]]:
    """Training and validation rows by iteration.

    A run that was resumed repeats iterations: where the iteration goes back, what was written from there on is void.
    """
    train: dict[int, Row] = {}
    valid: dict[int, Row] = {}
    last = 0
    for row in _parsed_lines(file):
        iteration = row["iteration"]
        if "valid_loss" in row:
            valid[iteration] = row
            continue
        if "gap" in row:  # an update of the sensitivity; it follows its iteration
            continue
        if iteration <= last:
            train = {key: kept for key, kept in train.items() if key < iteration}
            valid = {key: kept for key, kept in valid.items() if key < iteration}
        train[iteration] = row
        last = iteration
    return [train[key] for key in sorted(train)], [valid[key] for key in sorted(valid)]


def _parsed_lines(file: Path) -> Iterator[Row]:
    """Rows of the file as written. A last line without its end was torn by a kill and is left out."""
    with file.open(errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                if not line.endswith("\n"):
                    return
                raise ValueError(f"{file}, line {number} is not JSON: {error}") from error
            if not isinstance(row, dict) or not isinstance(row.get("iteration"), int):
                raise ValueError(f"{file}, line {number} has no iteration; every row must have one")
            yield {
                key: np.asarray(value, np.float32) if isinstance(value, list) else value for key, value in row.items()
            }


def shortest_ends(paths: Sequence[Sequence[str]]) -> list[str]:
    """The shortest ends of the paths, given by their parts, that tell them apart; no two paths may be equal."""
    for depth in range(1, max(map(len, paths), default=0) + 1):
        labels = ["/".join(path[-depth:]) for path in paths]
        if len(set(labels)) == len(labels):
            return labels
    assert not paths, f"paths {paths} are not different"
    return []
