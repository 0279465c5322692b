"""Settings that a run was given otherwise when it was resumed, kept in its folder: config.yaml has the last alone."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_sbld.training.metrics import drop_rows_from

if TYPE_CHECKING:
    from megatron_sbld.checkpoint.resume import Change

CHANGES_FILE = "changes.jsonl"


@dataclass(frozen=True)
class SettingChange:
    """A field of the config that had another value before an iteration."""

    iteration: int
    """The first with the new value."""
    field: str
    before: Any
    after: Any

    @property
    def text(self) -> str:
        return f"{self.field} was {self.before} up to iteration {self.iteration - 1}, then {self.after}"


def record_changes(run_dir: Path, first_iteration: int, changes: Sequence[Change]) -> None:
    """Add what has changed from first_iteration on, as far as it has an effect.

    What stands there for iterations that will run again is void, as in metrics.jsonl.
    """
    file = run_dir / CHANGES_FILE
    drop_rows_from(file, first_iteration)
    rows = [
        SettingChange(first_iteration, change.field, change.saved, change.present)
        for change in changes
        if change.without_effect is None
    ]
    if rows:
        with file.open("a", encoding="utf-8") as stream:
            stream.writelines(json.dumps(dataclasses.asdict(row)) + "\n" for row in rows)


def read_changes(run_dir: Path) -> list[SettingChange]:
    """What `record_changes` has written, in this order; empty for a run that never changed. Raises ValueError."""
    file = run_dir / CHANGES_FILE
    if not file.exists():
        return []
    try:
        # A last line without its end was torn by a kill.
        lines = [line for line in file.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
        return [SettingChange(**json.loads(line)) for line in lines]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} is damaged: {error}") from error
