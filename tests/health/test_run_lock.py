"""Two runs in one folder: the second is refused by name, and a run that was killed leaves nothing that hinders."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_sbld.health import run_lock
from megatron_sbld.health.run_lock import LOCK_FILE, RunLock

HOLDER = """
import errno, fcntl, multiprocessing, sys, time
from pathlib import Path
from megatron_sbld.health import run_lock

def no_locks(*args):
    raise OSError(errno.ENOLCK, "No locks available")

if sys.argv[2] == "renewing":
    fcntl.lockf = no_locks
    run_lock.BEAT_S = 0.1
lock = run_lock.RunLock(Path(sys.argv[1]), "logging.run_dir", 0.0)
lock.take()
worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(10,), daemon=True)
worker.start()
print("holds", flush=True)
sys.stdin.readline()
lock.release()
"""


class Holder:
    """Another process, with a child of its own, that holds a folder's lock."""

    def __init__(self, folder: Path, kind: str) -> None:
        command = [sys.executable, "-c", HOLDER, str(folder), kind]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "SLURM_JOB_ID": "4711"},
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "holds\n"

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def release(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()


@pytest.fixture(params=["locking", "renewing"])
def holder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Holder]:
    """On a file system with locks, and on one without."""
    if request.param == "renewing":
        monkeypatch.setattr(fcntl, "lockf", no_locks)
        monkeypatch.setattr(run_lock, "BEAT_S", 0.1)
    holder = Holder(tmp_path / "run", request.param)
    yield holder
    holder.kill()


def no_locks(*args: Any) -> None:
    raise OSError(errno.ENOLCK, "No locks available")


def lock_of(folder: Path, wait_s: float = 0.0) -> RunLock:
    return RunLock(folder, "logging.run_dir", wait_s)


def test_a_second_run_is_refused_and_told_of_the_first(holder: Holder, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"logging.run_dir = .*: another run uses this folder") as refusal:
        lock_of(tmp_path / "run").take()
    for part in (f"process {holder.process.pid} on {os.uname().nodename}, Slurm job 4711, since 20", LOCK_FILE):
        assert part in str(refusal.value)


def test_a_killed_run_hinders_nobody_although_its_data_workers_live(holder: Holder, tmp_path: Path) -> None:
    holder.process.kill()
    holder.process.wait()
    lock = lock_of(tmp_path / "run")
    lock.take()
    lock.release()


def test_a_start_waits_for_a_run_that_is_about_to_end(holder: Holder, tmp_path: Path) -> None:
    threading.Timer(0.5, holder.release).start()
    lock = lock_of(tmp_path / "run", wait_s=20.0)
    began = time.monotonic()
    lock.take()
    assert time.monotonic() - began < 10
    lock.release()


def test_a_run_that_was_stopped_and_lost_its_folder_meanwhile_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "lockf", no_locks)
    monkeypatch.setattr(run_lock, "BEAT_S", 0.1)
    holder = Holder(tmp_path / "run", "renewing")
    holder.process.send_signal(signal.SIGSTOP)
    lock = lock_of(tmp_path / "run")
    lock.take()
    holder.process.send_signal(signal.SIGCONT)
    assert holder.process.wait(20) == 76
    lock.release()


def test_a_lock_file_that_was_deleted_is_no_lock(tmp_path: Path) -> None:
    holder = Holder(tmp_path / "run", "locking")
    (tmp_path / "run" / LOCK_FILE).unlink()  # as the refusal advises when a machine has crashed
    lock = lock_of(tmp_path / "run")
    lock.take()
    lock.release()
    holder.kill()


def test_a_run_that_is_refused_leaves_no_folder_and_one_that_trained_does(tmp_path: Path) -> None:
    for name, writes in (("refused", False), ("trained", True)):
        lock = lock_of(tmp_path / name)
        lock.take()
        if writes:
            (tmp_path / name / "metrics.jsonl").touch()
        lock.release()
        assert (tmp_path / name).exists() == writes
