"""What a command is: a name, a line that says what it is for, and what runs it. A command may have parts, likewise."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """A command of `megatron-sbld`, or a part of one."""

    name: str
    summary: str
    run: Callable[[list[str]], int]
    """Given the arguments after the name; its value is the exit status."""
    parts: Sequence[Command] = ()
    parser: Callable[[], ArgumentParser] | None = None
    """Of a command that does not parse with CommandParser: its parser, for tab completion."""


def listing(commands: Sequence[Command]) -> str:
    """A line for each command."""
    width = max(len(command.name) for command in commands)
    return "\n".join(f"  {command.name:{width}}   {command.summary}" for command in commands)


def find(commands: Sequence[Command], name: str, prefix: str = "") -> Command:
    """The command of that name. Raises ValueError with those that there are."""
    for command in commands:
        if command.name == name:
            return command
    allowed = ", ".join(command.name for command in commands)
    raise ValueError(f"unknown command {prefix + name!r}; allowed are {allowed}")


def run_part(name: str, parts: Sequence[Command], args: list[str], operands: str = "[options]") -> int:
    """Run the part of a command that its first argument names; --help, or nothing, lists the parts.

    operands: what they take, for the usage.
    """
    if args and args[0] not in ("-h", "--help"):
        return find(parts, args[0], f"{name} ").run(args[1:])
    usage = f"megatron-sbld {name} {'|'.join(part.name for part in parts)}"
    print(f"usage: {usage} {operands}\n\n{listing(parts)}\n\n`{usage} --help` lists its options.")
    return 0
