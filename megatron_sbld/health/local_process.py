"""Naming a process so that another one on the same machine, and no other, can end it."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path


def own_process() -> str:
    """This process, for `end_if_local`; empty where the system has no /proc."""
    return _identify(os.getpid())


def end_if_local(process: str) -> bool:
    """Send SIGKILL, which a stopped process obeys too, if `own_process` gave this name on this machine.

    Args:
        process: what `own_process` gave in that process.

    Returns:
        Whether it was sent: not to a process of another machine or container, and not to one that has ended, even if
        its number was given to another since.
    """
    pid = process.rpartition(" ")[2]
    if not pid.isdecimal() or _identify(int(pid)) != process:
        return False
    with suppress(ProcessLookupError, PermissionError):
        os.kill(int(pid), signal.SIGKILL)
        return True
    return False


def _identify(pid: int) -> str:
    """Boot, namespace in which the number counts, start in clock ticks since the boot, number."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink("/proc/self/ns/pid")
        # The second field, the program's name, may hold spaces and parentheses; the start is the 22nd.
        start = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""
    return f"{boot} {namespace} {start} {pid}"
