"""Requests to stop: signals set a flag that is read between iterations and between the parts of a validation."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""What Slurm sends before it takes nodes away: the one by itself, the other where sbatch's --signal asks for it."""


@dataclass
class StopFlag:
    """Set by STOP_SIGNALS; read at the end of each iteration, and between the parts of validation and tasks."""

    requested: bool = False

    def listen(self) -> None:
        """From now on a signal sets the flag; before, it ends the process, which may be waiting for ranks to come."""
        for number in STOP_SIGNALS:
            signal.signal(number, self.request)

    def request(self, signum: int, frame: FrameType | None) -> None:
        self.requested = True


@contextmanager
def stop_flag() -> Iterator[StopFlag]:
    """A flag that can listen, and the handlers of before at the end.

    It is the outermost part of a run: where a rank is lost, a launcher's SIGTERM must not end the others before they
    have named it.
    """
    previous = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        yield StopFlag()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
