# PYTHON_ARGCOMPLETE_OK
"""The `megatron-sbld` command: finds the command that was asked for, and says how it ended."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from typing import NoReturn

from megatron_sbld import __version__
from megatron_sbld.cli import (
    compare,
    completion,
    doctor,
    evaluate,
    generate,
    hf,
    predict,
    prepare,
    pretrain,
    schedule,
    sensitivity,
)
from megatron_sbld.cli.command import find, listing
from megatron_sbld.cli.path_errors import describe
from megatron_sbld.exit_status import EXIT_BROKEN_PIPE, EXIT_INTERRUPTED, EXIT_MISTAKE, EXIT_RANK_LOST
from megatron_sbld.health.liveness import RankLostError

COMMANDS = [
    prepare.COMMAND,
    pretrain.COMMAND,
    sensitivity.COMMAND,
    schedule.COMMAND,
    evaluate.COMMAND,
    generate.COMMAND,
    compare.COMMAND,
    predict.COMMAND,
    hf.EXPORT,
    hf.IMPORT,
    doctor.COMMAND,
]
_USAGE = f"""usage: megatron-sbld COMMAND [options]

Layer dropping for GPT pretraining on Megatron.

commands:
{listing(COMMANDS)}

`megatron-sbld COMMAND --help` lists its options; `megatron-sbld --version` prints the version."""


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Run the command; a user's mistake ends in one message and EXIT_MISTAKE."""
    if completion.is_asked_for():
        completion.complete(COMMANDS)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s", stream=sys.stderr)
    logging.getLogger("megatron.core").setLevel(logging.ERROR)
    # Several lines a process on what is not installed and what torch will rename; which layers are used is logged once.
    warnings.filterwarnings("ignore", module=r"(megatron\.core|torch\.distributed)\.")
    given = list(sys.argv[1:] if args is None else args)
    try:
        status = _run(given)
        sys.stdout.flush()  # here a full disk or a closed pipe still gets its message
        sys.exit(status)
    except BrokenPipeError:
        # What read the output, such as head, has ended. Nothing more may be written, not even at Python's exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(EXIT_BROKEN_PIPE)
    except (ValueError, argparse.ArgumentError, OSError, ModuleNotFoundError, RankLostError) as error:
        if isinstance(error, ModuleNotFoundError) and (error.name or "megatron_sbld").startswith("megatron_sbld"):
            raise  # a fault of ours
        rank = f" (rank {os.environ['RANK']})" if "RANK" in os.environ else ""
        print(f"megatron-sbld: error{rank}: {_message(error, given[1:])}", file=sys.stderr, flush=True)
        sys.exit(EXIT_RANK_LOST if isinstance(error, RankLostError) else EXIT_MISTAKE)
    except KeyboardInterrupt:
        print("megatron-sbld: interrupted", file=sys.stderr, flush=True)
        sys.exit(EXIT_INTERRUPTED)


def _run(args: list[str]) -> int:
    """Dispatch; the exit status."""
    if not args or args[0] in ("-h", "--help"):
        print(_USAGE)
        return 0
    if args[0] == "--version":
        print(f"megatron-sbld {__version__}")
        return 0
    if args[0] == "profile":
        part = args[1] if args[1:] and args[1] in ("merge", "show", "lists", "rank") else "measure"
        raise ValueError(f"`profile` is now `megatron-sbld sensitivity {part}`, with the same options")
    _check_encoding(args)
    return find(COMMANDS, args[0]).run(args[1:])


def _check_encoding(args: Sequence[str]) -> None:
    """Refuse bytes that are no UTF-8: they cannot be written into config.yaml, results and messages."""
    for arg in args:
        if args[0] == "prepare" and os.path.lexists(arg):  # it reads files of any name
            continue
        try:
            arg.encode("utf-8")
        except UnicodeEncodeError:
            shown = arg.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
            raise ValueError(
                f"the argument {shown} is not UTF-8; give the file another name, or write the text so"
            ) from None


def _message(error: Exception, args: list[str]) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"needs the package {error.name}, which is not installed; `megatron-sbld doctor` shows how to install it"
    return describe(error, args) if isinstance(error, OSError) else str(error)


if __name__ == "__main__":
    main()
