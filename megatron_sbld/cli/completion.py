"""Tab completion by argcomplete: of commands here, of a command's options by jsonargparse, whose parsers know them.

The shell runs `megatron-sbld` with the line in COMP_LINE. argcomplete takes the first words of the line, as many as
_ARGCOMPLETE says, for the program's name; here those are the command as well.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, NoReturn, get_args, get_origin

from megatron_sbld.cli.command import Command


def is_asked_for() -> bool:
    """Whether a shell runs the program for its completions. It then may do nothing else."""
    return "_ARGCOMPLETE" in os.environ and "COMP_LINE" in os.environ


def complete(commands: Sequence[Command]) -> NoReturn:
    """Give the shell what may stand where the cursor is, and end the process."""
    try:
        import argcomplete
    except ModuleNotFoundError:
        sys.exit("megatron-sbld: tab completion needs the package argcomplete, which is not installed")
    line, point = os.environ["COMP_LINE"], int(os.environ["COMP_POINT"])
    *_, words, _ = argcomplete.split_line(line, point)
    _complete(commands, words[int(os.environ["_ARGCOMPLETE"]) :])
    sys.exit(1)  # what is above ends the process where there is something to complete


def _complete(commands: Sequence[Command], words: Sequence[str]) -> None:
    """words: those of the line that come after the program, or after the command whose parts `commands` are."""
    import argcomplete

    found = next((command for command in commands if list(words[:1]) == [command.name]), None)
    if found is None:
        argcomplete.autocomplete(_parser_of_names(commands))
        return
    os.environ["_ARGCOMPLETE"] = str(int(os.environ["_ARGCOMPLETE"]) + 1)
    if found.parts:
        _complete(found.parts, words[1:])
    elif found.parser is not None:
        argcomplete.autocomplete(found.parser())
    else:
        found.run([])  # jsonargparse completes, and ends the process, when the command parses its arguments


def complete_values(parser: argparse.ArgumentParser) -> None:
    """Let argcomplete offer the words that each option may hold, and files where it has none.

    jsonargparse's own completer knows bool and Enum alone; of any other type it gives None, which argcomplete refuses.
    """
    from argcomplete.completers import ChoicesCompleter, FilesCompleter

    for action in parser._actions:
        if hasattr(action, "_typehint"):
            leaves = list(_leaves(action._typehint))
            words = [word for leaf in leaves for word in _words(leaf)]
            is_text = str in leaves and not words
            action.completer = FilesCompleter() if is_text else ChoicesCompleter(words)  # type: ignore[attr-defined]


def _leaves(typehint: Any) -> Iterator[Any]:
    """The types that a type is made of; a Literal is one."""
    parts = get_args(typehint)
    if get_origin(typehint) is Annotated:
        yield from _leaves(parts[0])
    elif get_origin(typehint) is Literal or not parts:
        yield typehint
    else:
        for part in parts:
            yield from _leaves(part)


def _words(typehint: Any) -> list[str]:
    if typehint is bool:
        return ["true", "false"]
    return [str(word) for word in get_args(typehint)]


def _parser_of_names(commands: Sequence[Command]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    parser.add_argument("command", choices=[command.name for command in commands])
    return parser
