"""torchrun that leaves signals to its workers and ends with their exit status: what scripts/ start on each machine.

    python -m megatron_sbld.launch [torchrun's options] -m megatron_sbld pretrain --config FILE

torchrun answers SIGTERM, which Slurm sends to every process of a step, by killing its workers 30 s later: too short for
a large checkpoint, and not to be changed before torch 2.12. It also ends with 1 whatever its workers ended with. Here
signals are passed on to the workers, as soon as there are any, how long they may take is left to who sent them, and the
exit status says how the workers ended. A hang-up asks them to save as SIGTERM does, unless it is ignored (nohup).
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from types import FrameType

from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from megatron_sbld.exit_status import EXIT_INTERRUPTED, EXIT_MISTAKE, EXIT_RANK_LOST, EXIT_TO_BE_CONTINUED

STATUS_FILE = "SBLD_STATUS_FILE"
"""Environment variable: a file that the exit status is written to as well, because of many srun reports the largest."""

_PASSED_ON = {
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGUSR1: signal.SIGUSR1,
    signal.SIGINT: signal.SIGINT,
    signal.SIGHUP: signal.SIGTERM,
}
"""What comes, and what the workers get."""

_WAIT_S = 10.0
"""For workers, once there is a request to stop: before they start, torchrun may wait long for other machines."""


def main(args: Sequence[str]) -> int:
    """Run torchrun with these arguments; see `combined_status` for the status."""
    wanted: set[signal.Signals] = set()
    # What each worker was sent, once: Slurm signals them as well. Those that --max-restarts starts are sent it anew.
    asked: set[tuple[int, signal.Signals]] = set()
    inherited = _children()  # of the shell that became this process: what writes its log

    def pass_on() -> None:
        workers = _children() - inherited
        for child, number in itertools.product(workers, tuple(wanted)):
            if (child, number) not in asked:
                asked.add((child, number))
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, number)

    def take(number: int, frame: FrameType | None) -> None:
        wanted.add(_PASSED_ON[signal.Signals(number)])
        pass_on()

    for number in _PASSED_ON:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, take)
    outcome: list[int] = []
    # Outside of the main thread torchrun installs no signal handlers, and warns of what is meant here.
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").addFilter(_is_no_warning_of_the_thread)
    thread = threading.Thread(target=lambda: outcome.append(_torchrun(args, asked)), daemon=True)
    thread.start()
    deadline = None
    while thread.is_alive():
        thread.join(1.0)
        pass_on()  # what came before there were workers
        if wanted and not asked:
            deadline = deadline or time.monotonic() + _WAIT_S
            if time.monotonic() > deadline:
                outcome.append(EXIT_INTERRUPTED if wanted == {signal.SIGINT} else EXIT_TO_BE_CONTINUED)
                break
    status = outcome[0] if outcome else 1
    if os.environ.get(STATUS_FILE):
        try:
            Path(os.environ[STATUS_FILE]).write_text(f"{status}\n")
        except OSError as error:
            print(f"the exit status {status} cannot be written for the job: {error}", file=sys.stderr, flush=True)
    return status


def combined_status(exit_codes: Iterable[int], asked: bool) -> int:
    """The status of a machine's workers, of those that ended first.

    Args:
        exit_codes: as subprocess has them, -N for signal N.
        asked: whether they had been asked to stop.

    Returns:
        EXIT_MISTAKE or another failure of a worker's own; else EXIT_INTERRUPTED after Ctrl-C; else EXIT_TO_BE_CONTINUED
        if one has saved, or was asked to before it could; else EXIT_RANK_LOST, also for workers that were killed.

    >>> combined_status([76, 2], asked=False), combined_status([-9, 76], asked=False), combined_status([-15], True)
    (2, 76, 75)
    """
    codes = set(exit_codes)
    for status in (EXIT_MISTAKE, *sorted(code for code in codes if 0 < code < EXIT_TO_BE_CONTINUED), EXIT_INTERRUPTED):
        if status in codes:
            return status
    return EXIT_TO_BE_CONTINUED if asked or EXIT_TO_BE_CONTINUED in codes else EXIT_RANK_LOST


def _torchrun(args: Sequence[str], asked: Collection[object]) -> int:
    try:
        torchrun.main(list(args))
    except ChildFailedError as error:
        print(error, file=sys.stderr, flush=True)
        return combined_status((failure.exitcode for failure in error.failures.values()), bool(asked))
    except SystemExit as error:  # its own command line
        return error.code if isinstance(error.code, int) else EXIT_MISTAKE
    except ValueError as error:  # one of its options
        print(f"megatron_sbld.launch: error: {error}", file=sys.stderr, flush=True)
        return EXIT_MISTAKE
    except Exception:  # the rendezvous: the machine that holds its store has ended, perhaps only a moment earlier
        traceback.print_exc()
        return combined_status([], bool(asked))
    return 0


def _is_no_warning_of_the_thread(record: logging.LogRecord) -> bool:
    return "running on a child thread" not in record.getMessage()


def _children() -> set[int]:
    """Processes that this one has started, from any of its threads."""
    pids: set[int] = set()
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # a thread that has just ended
            pids.update(map(int, (task / "children").read_text().split()))
    return pids


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
