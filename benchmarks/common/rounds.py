"""Rounds of a measurement: when the last one is, and how far it has come."""

from __future__ import annotations

import time

import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Deadline:
    """`--minutes`, counted from when this is made. Collective: rank 0's clock decides for all ranks.

    rounds: done so far.
    """

    def __init__(self, minutes: float) -> None:
        self.rounds = 0
        self._end = time.monotonic() + 60 * minutes

    def round_done(self) -> bool:
        """Whether that was the last one; two are always made, of which a bootstrap can be drawn."""
        self.rounds += 1
        passed = [self.rounds >= 2 and time.monotonic() >= self._end]
        dist.broadcast_object_list(passed)
        return passed[0]


def progress_bar() -> Progress:
    """On rank 0's stderr."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), disable=dist.get_rank() != 0)
