"""One process group at a time in a run folder, across nodes: rank 0 holds a lock on FOLDER/run.lock while it may write.

It is a POSIX record lock. The system takes it back when the process ends, however it ends; child processes do not
inherit it; NFS holds it for all nodes, and so does Lustre where it is mounted with `flock`. Where a file system has no
locks, the holder renews the file every few seconds instead, and a file that nobody renews is free to take.

Reading a run folder needs no lock.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from megatron_sbld.exit_status import EXIT_RANK_LOST

logger = logging.getLogger(__name__)

LOCK_FILE = "run.lock"
WAIT_S = 30.0
"""For a former process to end: torchrun's restarts and Slurm start anew while it may still do so."""
_LOOK_S = 0.25
BEAT_S = 2.0
_BEATS_TO_DIE = 5
_HELD = (errno.EACCES, errno.EAGAIN)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class RunLock:
    """The lock of one folder, for rank 0.

    Args:
        folder: the run folder.
        field: where the user named it; for the refusal.
        wait_s: seconds that a former holder has to end.
    """

    def __init__(self, folder: Path, field: str, wait_s: float = WAIT_S) -> None:
        self._folder, self._field, self._wait_s = folder, field, wait_s
        self._path = folder / LOCK_FILE
        self._file: int | None = None
        self._made_folder = False
        self._owner: dict[str, Any] = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "slurm_job": os.environ.get("SLURM_JOB_ID"),
            "since": datetime.now().astimezone().isoformat(timespec="seconds"),
            "token": uuid.uuid4().hex,
            "beat": 0,
        }
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def take(self) -> None:
        """Make the folder and lock it.

        Raises:
            ValueError: another run holds it.
            OSError: the folder cannot be made or written to.
        """
        self._made_folder = not self._folder.exists()
        deadline, told = time.monotonic() + self._wait_s, False
        while True:
            try:
                if self._try_to_lock():
                    return
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                logger.warning("%s: its file system has no locks; the file is renewed instead", self._path)
                self._take_by_renewing()
                return
            if time.monotonic() > deadline:
                raise ValueError(self._refusal())
            if not told:
                logger.warning("%s; waiting %.0f s for it to end", self._in_use(), self._wait_s)
                told = True
            time.sleep(_LOOK_S)

    def release(self) -> None:
        """Give it back, if it was taken. A folder that was made for it, and in which nothing else is, goes again."""
        if self._file is None:
            return
        if self._thread is not None:
            self._stop.set()
            self._thread.join()
        with suppress(OSError):
            if self._made_folder and os.listdir(self._folder) == [LOCK_FILE]:
                self._path.unlink()  # before it looks free: the next run's file would be removed
                self._folder.rmdir()
            else:
                os.ftruncate(self._file, 0)
        os.close(self._file)
        self._file = None

    def _try_to_lock(self) -> bool:
        file = self._open()
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not _is_file(file, self._path):  # it was deleted before it was locked
                os.close(file)
                return False
        except OSError as error:
            os.close(file)
            if error.errno in _HELD:
                return False
            raise
        self._file = file
        self._write()
        return True

    def _take_by_renewing(self) -> None:
        """Take the file if nobody renews it, which takes a while to see. Of two at once the later one wins."""
        first = self._text()
        wait_s = max(self._wait_s, _BEATS_TO_DIE * BEAT_S)
        if first:
            logger.warning("%s; waiting %.0f s to see whether it is alive", self._in_use(), wait_s)
        deadline = time.monotonic() + wait_s
        while self._text() and time.monotonic() < deadline:
            time.sleep(_LOOK_S)
        if self._text() not in ("", first):
            raise ValueError(self._refusal())
        self._file = self._open()
        self._write()
        time.sleep(BEAT_S)
        if self._read().get("token") != self._owner["token"]:
            os.close(self._file)
            self._file = None
            raise ValueError(self._refusal())
        self._thread = threading.Thread(target=self._renew, name="run lock", daemon=True)
        self._thread.start()

    def _renew(self) -> None:
        while not self._stop.wait(BEAT_S):
            if self._read().get("token") not in (None, self._owner["token"]):
                logger.error("%s, which took the folder because this process had been stopped; it ends", self._in_use())
                os._exit(EXIT_RANK_LOST)
            self._owner["beat"] += 1
            try:
                self._write()
            except OSError as error:  # a full disk; the run itself meets it too
                logger.warning("%s cannot be renewed: %s", self._path, error)

    def _open(self) -> int:
        while True:
            self._folder.mkdir(parents=True, exist_ok=True)
            try:
                return os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
            except FileNotFoundError:  # another one's release has removed the folder meanwhile
                if self._path.is_symlink():  # to where nothing is
                    raise

    def _text(self) -> str:
        try:
            return self._path.read_text()
        except FileNotFoundError:
            return ""

    def _write(self) -> None:
        assert self._file is not None, "only the holder writes"
        text = json.dumps(self._owner).encode()
        os.pwrite(self._file, text, 0)
        os.ftruncate(self._file, len(text))
        os.fsync(self._file)

    def _read(self) -> dict[str, Any]:
        """The holder, as far as the file tells."""
        try:
            content = json.loads(self._text())
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def _in_use(self) -> str:
        owner = self._read()
        if not owner:
            return f"{self._field} = {str(self._folder)!r}: another run uses this folder"
        job = f", Slurm job {owner['slurm_job']}" if owner.get("slurm_job") else ""
        return (
            f"{self._field} = {str(self._folder)!r}: another run uses this folder, process {owner.get('pid')} on "
            f"{owner.get('host')}{job}, since {owner.get('since')}"
        )

    def _refusal(self) -> str:
        return (
            f"{self._in_use()}; name another folder, or end that run first (if its machine has crashed and the lock "
            f"stays, delete {self._path})"
        )


def _is_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
