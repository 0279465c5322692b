"""Ends a run on all of its ranks when one of them dies, stalls or hangs, and says which and in which iteration.

Each rank's thread writes a heartbeat into the run's store every few seconds. Rank 0 reads all of them (one request),
decides (liveness.py), and tells its verdict in its own heartbeat, the only one that the others read; they judge rank 0
themselves. That is one write and one read a rank and interval at any number of ranks. The main thread does nothing but
note where it is in `POSITION`.

What the main thread waits for is seen from its innermost Python frame: collectives block in code of torch or
megatron-core, on a GPU anywhere in it, because kernels queue up behind the one that waits.

A stopped process does not see a launcher's SIGTERM, and torchrun would wait 30 s for it: a rank on the same machine
ends it with SIGKILL.
"""

from __future__ import annotations

import datetime
import logging
import os
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Literal

import torch.distributed as dist

from megatron_sbld.exit_status import EXIT_RANK_LOST
from megatron_sbld.health.liveness import (
    Heartbeat,
    Limits,
    RankLostError,
    Sighting,
    find_hanging,
    find_lost,
    remarks,
    silent_ranks,
)
from megatron_sbld.health.local_process import end_if_local, own_process

logger = logging.getLogger(__name__)

_WAITS = (
    "/torch/",
    "/megatron/core/",
    "/megatron_sbld/controller.py",
    "/megatron_sbld/training/step.py",
    "/megatron_sbld/checkpoint/manager.py",
    "/megatron_sbld/evaluation/scoring.py",
    "/megatron_sbld/evaluation/generate.py",
)
"""Parts of paths of code that blocks for other ranks, in collectives or for what they put on the GPU's queue."""
_DOES_NOT_WAIT = ("/torch/utils/", "/megatron/core/datasets/")
"""Those that read data and write logs."""
_ERROR_LENGTH = 200
_UNWIND_S = 10.0
"""For a main thread that raises to leave by itself."""


class Position:
    """Where the main thread of this process is in its run; plain attributes, read by the watchdog's thread."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Before a run."""
        self.iteration = 0
        self.activity = "starting"
        self.microbatches = 0  # forward passes so far: progress within an iteration or a validation

    def enter(self, activity: str, iteration: int | None = None) -> None:
        """Note what the main thread now does."""
        self.activity = activity
        if iteration is not None:
            self.iteration = iteration


POSITION = Position()
"""One to a process, as the main thread and Megatron's own parallel state are."""


@contextmanager
def watched(timeout_s: float) -> Iterator[None]:
    """Watch over the other ranks, and let them watch over this one, from the first collective to the last.

    When a rank is lost, each of the others logs which one and in which iteration, and ends with EXIT_RANK_LOST,
    although its main thread waits in a collective. One whose collective fails at once raises instead.

    Args:
        timeout_s: seconds within which the run has ended on all ranks.

    Raises:
        RankLostError: a collective failed; the message names the rank because of which it did.
    """
    POSITION.reset()
    if dist.get_world_size() == 1:
        yield
        return
    watchdog = Watchdog(dist.get_rank(), dist.get_world_size(), timeout_s, _own_connection(timeout_s))
    watchdog.start()
    try:
        yield
    except BaseException as error:
        watchdog.explain(error)
        raise
    finally:
        watchdog.stop()


class Watchdog:
    """The threads of one rank. Built and started by its main thread, once the process group is there."""

    def __init__(self, rank: int, world_size: int, timeout_s: float, store: dist.Store) -> None:
        self.rank = rank
        self.limits = Limits.of(timeout_s)
        self._store = store
        self._main_thread = threading.get_ident()
        self._state: Literal["running", "lost", "failed", "ended"] = "running"
        self._error = ""
        self._verdict = ""
        self._process = own_process()
        self._silent_processes: tuple[str, ...] = ()
        self._found = threading.Event()
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._beat = 0
        self._mark: tuple[object, ...] = ()
        self._place, self._waits = _place(None)
        self._unchanged_s = 0.0
        self._watches = range(1, world_size) if rank == 0 else (0,)
        self._came: set[int] = set()
        self._seen = {other: Sighting(None, 0.0) for other in self._watches}
        self._warned: set[int] = set()
        self._exchanges = 0
        # Daemons: a request to a store whose process is stopped never returns.
        self._threads = [
            threading.Thread(target=target, name=f"watchdog {target.__name__}", daemon=True)
            for target in (self._exchange_heartbeats, self._watch_store)
        ]

    def start(self) -> None:
        """Begin; does not wait for the other ranks."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Tell the others that this rank ends, and end the threads."""
        if self._state == "running":
            self._state = "ended"
        self._stop.set()
        for thread in self._threads:
            thread.join(2 * self.limits.interval)

    def explain(self, error: BaseException) -> None:
        """Called by the main thread with what it raises: tell the others, and find out whether a rank was lost.

        Raises:
            RankLostError: it was; the message names it.
        """
        self._error = f"{type(error).__name__}: {error}".splitlines()[0][:_ERROR_LENGTH]
        if not is_lost_connection(error):
            self._state = "failed"
            return
        self._state = "lost"
        logger.error("rank %d: iteration %d (%s): %s", self.rank, POSITION.iteration, POSITION.activity, self._error)
        with _sigterm_ignored():  # a launcher sends it as soon as it has seen the other rank's end
            found = self._found.wait(3 * self.limits.brief)
        if found:
            raise RankLostError(self._verdict) from error
        logger.error("rank %d: no rank is known to have died; the connection between them broke", self.rank)

    def _exchange_heartbeats(self) -> None:
        before = time.monotonic()
        while not self._stop.is_set():
            now = time.monotonic()
            # A rank that was itself stopped has seen nothing of the others meanwhile, and must not blame them.
            elapsed, before = min(now - before, 2 * self.limits.interval), now
            self._look_at_main_thread(elapsed)
            try:
                self._publish()
                self._read(elapsed)
                self._exchanges += 1
            except Exception as error:  # the store is gone, which is _watch_store's matter
                logger.debug("rank %d: the run's store fails: %s", self.rank, error)
            self._warn()
            verdict, silent_processes = self._judge()
            if verdict:
                self._verdict, self._silent_processes = verdict, silent_processes
                self._publish_quietly()
                self._end(verdict, silent_processes)
            self._stop.wait(self.limits.interval)
        self._publish_quietly()

    def _watch_store(self) -> None:
        """End the run when the store does not answer, as when it is kept by a rank that is stopped."""
        exchanges, silent_s, before = 0, 0.0, time.monotonic()
        while not self._stop.wait(self.limits.interval):
            now = time.monotonic()
            silent_s += min(now - before, 2 * self.limits.interval)
            before = now
            if self._exchanges != exchanges:
                exchanges, silent_s = self._exchanges, 0.0
            if silent_s >= (self.limits.brief if self._state == "lost" else self.limits.patience):
                self._end(
                    f"{_store_keeper()} died or was stopped in iteration {POSITION.iteration}: the run's store, which "
                    f"it keeps, has not answered for {silent_s:.0f} s; rank {self.rank} is in {POSITION.activity}",
                    () if _store_is_the_launchers() else self._processes([0]),
                )

    def _look_at_main_thread(self, elapsed: float) -> None:
        self._place, self._waits = _place(sys._current_frames().get(self._main_thread))
        mark = (self._state, POSITION.iteration, POSITION.activity, POSITION.microbatches, self._place)
        self._unchanged_s = self._unchanged_s + elapsed if mark == self._mark else 0.0
        self._mark = mark

    def _publish(self) -> None:
        self._beat += 1
        heartbeat = Heartbeat(
            beat=self._beat,
            host=socket.gethostname(),
            iteration=POSITION.iteration,
            activity=POSITION.activity,
            place=self._place,
            waits=self._waits,
            unchanged_s=self._unchanged_s,
            state=self._state,
            error=self._error,
            process=self._process,
            verdict=self._verdict,
            silent_processes=self._silent_processes,
        )
        self._seen[self.rank] = Sighting(heartbeat, 0.0)
        self._store.set(str(self.rank), heartbeat.encode())

    def _publish_quietly(self) -> None:
        with suppress(Exception):  # the rank that keeps the store may be gone
            self._publish()

    def _read(self, elapsed: float) -> None:
        """Take in the heartbeats of the ranks that this one watches."""
        for rank in self._watches:
            # Asked for singly, because a store waits for keys that are not there.
            if rank not in self._came and self._store.check([str(rank)]):
                self._came.add(rank)
        present = sorted(self._came)
        texts = self._store.multi_get([str(rank) for rank in present]) if present else []
        found = dict(zip(present, map(Heartbeat.decode, texts), strict=True))
        for rank in self._watches:
            last, new = self._seen[rank], found.get(rank)
            is_new = new is not None and (last.heartbeat is None or last.heartbeat.beat != new.beat)
            self._seen[rank] = Sighting(new, 0.0) if is_new else Sighting(last.heartbeat, last.silent_s + elapsed)

    def _judge(self) -> tuple[str | None, tuple[str, ...]]:
        """Why the run must end, if it must, and the processes that give no sign of life."""
        deciding = self._seen[0].heartbeat
        if self.rank != 0 and deciding is not None and deciding.verdict:
            return deciding.verdict, deciding.silent_processes
        verdict = find_lost(self._seen, self.limits)
        if verdict is None and self.rank == 0:
            verdict = find_hanging(self._seen, self.limits)
        return verdict, self._processes(silent_ranks(self._seen, self.limits))

    def _processes(self, ranks: Iterable[int]) -> tuple[str, ...]:
        beats = (self._seen[rank].heartbeat for rank in ranks)
        return tuple(beat.process for beat in beats if beat is not None)

    def _warn(self) -> None:
        """Once for each silence, and on one rank: with NCCL a launcher may kill all before a collective has failed."""
        if self.rank > 1:
            return
        found = remarks(self._seen, self.limits)
        for rank in found.keys() - self._warned:
            logger.warning("%s", found[rank])
        self._warned = set(found)

    def _end(self, verdict: str, silent_processes: Iterable[str]) -> None:
        """End this process, or let a main thread that is about to end it do so; returns only if that has come far."""
        with self._lock:  # both threads may come here
            self._verdict = verdict
            self._found.set()
            running = self._state == "running"
            if running:
                logger.error("rank %d ends: %s", self.rank, verdict)
                self._stop.wait(3 * self.limits.interval if self.rank == 0 else 0.0)  # the others read the verdict
            for process in silent_processes:  # not before: a launcher that sees one end sends SIGTERM to all
                end_if_local(process)
            if not self._stop.wait(0.0 if running else _UNWIND_S):
                logging.shutdown()
                sys.stderr.flush()
                os._exit(EXIT_RANK_LOST)


@contextmanager
def _sigterm_ignored() -> Iterator[None]:
    """Afterwards SIGTERM ends the process at once: all that it has left to do is to end, which may hang."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _own_connection(timeout_s: float) -> dist.Store:
    """A connection to the run's store that no other thread uses, because a request blocks all that share one.

    Collective: the ranks agree on a name for their keys, because torchrun's store outlives its workers, and those that
    it starts next must not read the heartbeats of the last.
    """
    name = [uuid.uuid4().hex]
    dist.broadcast_object_list(name, src=0)
    timeout = datetime.timedelta(seconds=timeout_s)
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        wait_for_workers=False,
        timeout=timeout,
    )
    return dist.PrefixStore(f"megatron_sbld/watchdog/{name[0]}", store)


def _store_keeper() -> str:
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    return f"the launcher ({address})" if _store_is_the_launchers() else f"rank 0 ({address})"


def _store_is_the_launchers() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _place(frame: FrameType | None) -> tuple[str, bool]:
    """File, line and function of a frame, and whether code there waits for other ranks."""
    if frame is None:
        return "unknown place", False
    path = frame.f_code.co_filename
    return f"{Path(*Path(path).parts[-3:])}:{frame.f_lineno} {frame.f_code.co_name}", waits_for_ranks(path)


def waits_for_ranks(path: str) -> bool:
    """Whether code in a file blocks for other ranks."""
    return any(part in path for part in _WAITS) and not any(part in path for part in _DOES_NOT_WAIT)


def is_lost_connection(error: BaseException) -> bool:
    """Whether an error, or one that it came from, is that of a collective: torch's own type, or gloo's RuntimeError."""
    chain: BaseException | None = error
    while chain is not None:
        if isinstance(chain, dist.DistError):
            return True
        if type(chain) is RuntimeError and _raised_in_collective(chain.__traceback__):
            return True
        chain = chain.__cause__ or chain.__context__
    return False


def _raised_in_collective(trace: TracebackType | None) -> bool:
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and waits_for_ranks(trace.tb_frame.f_code.co_filename)
