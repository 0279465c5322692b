"""Progress of a sensitivity measurement on the console: runs done, the layer's gap so far, time left."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from megatron_sbld.config.sections import LoggingConfig
from megatron_sbld.training.metrics import clock, progress_mode


class MeasurementProgress:
    """A bar on a terminal, lines elsewhere, as logging.progress says. Only the first rank has one that shows anything.

    Args:
        config: the logging section.
        runs: runs of the whole measurement.
        runs_done: of them, those that are on disk already.
        steps: iterations (or evaluated batches) that are still to come, if no run ends early.
        shown: whether this rank shows anything.
    """

    def __init__(self, config: LoggingConfig, *, runs: int, runs_done: int, steps: int, shown: bool) -> None:
        self._interval = config.log_interval
        self._runs, self._runs_done, self._steps, self._steps_done = runs, runs_done, steps, 0
        self._began = time.monotonic()
        self._console = Console(stderr=True)
        mode = progress_mode(config) if shown else "none"
        self._lines = mode == "lines"
        self._bar: Progress | None = None
        if mode == "bar":
            self._bar = Progress(
                TextColumn("{task.fields[status]}"),
                BarColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(elapsed_when_finished=False),
                console=self._console,
            )
            self._task = self._bar.add_task("measure", total=steps, status="")
            self._bar.start()

    def step(self, what: str, number: int, of: int, value: str = "") -> None:
        """Show an iteration or batch of a run: `what` is measured, `value` what it comes to so far."""
        self._steps_done += 1
        done = f"run {min(self._runs_done + 1, self._runs)}/{self._runs}  {what} {number}/{of}  {value}"
        if self._bar is not None:
            self._bar.update(self._task, completed=self._steps_done, status=done)
        elif self._lines and (number % self._interval == 0 or number == of):
            elapsed = time.monotonic() - self._began
            left = elapsed / self._steps_done * max(self._steps - self._steps_done, 0)
            print(f"{done}  left {clock(left)}", file=sys.stderr, flush=True)

    def run_done(self, text: str, steps_saved: int = 0) -> None:
        """Show what a finished run came to; `steps_saved` of its steps will not come."""
        self._runs_done += 1
        self._steps -= steps_saved
        if self._bar is not None:
            self._bar.update(self._task, total=self._steps)
        self.note(f"run {self._runs_done}/{self._runs} done: {text}")

    def note(self, text: str) -> None:
        """Show a line of text without disturbing the bar."""
        if self._bar is not None:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)
        elif self._lines:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """End the bar."""
        if self._bar is not None:
            self._bar.stop()
