"""The drop section as Megatron-LM arguments: `--sbld-<field>` for each field of DropConfig, and the way back.

Names, types, choices, defaults and help are DropConfig's own. Megatron-LM's parser is argparse; ranges and what fields
mean together are checked by the same code as for a config file, and errors name the arguments.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import types
import typing
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from typing import Any, Literal

import docstring_parser

from megatron_sbld.fields import ranges
from megatron_sbld.files.paths import CONFIG_PATHS, expand_option
from megatron_sbld.method.config import DropConfig

_PREFIX = "sbld_"
_FIELD = re.compile(r"\bdrop\.(\w+)")

ArgsProvider = Callable[[ArgumentParser], ArgumentParser]


def add_arguments(parser: ArgumentParser) -> ArgumentParser:
    """Add the arguments in a group of their own; an `extra_args_provider` of Megatron-LM. Returns the parser."""
    group = parser.add_argument_group("layer dropping (megatron-sbld)")
    hints = typing.get_type_hints(DropConfig)
    described = {param.arg_name: param.description for param in docstring_parser.parse_from_object(DropConfig).params}
    allowed = ranges(DropConfig)
    for field in dataclasses.fields(DropConfig):
        text = f"{described[field.name] or ''} {allowed.get(field.name, '')}"
        description = " ".join(text.split()).replace("%", "%%")
        group.add_argument(
            argument_name(field.name),
            dest=_PREFIX + field.name,
            default=field.default,
            help=f"{description} (default: %(default)s)",
            **_kind(hints[field.name]),
        )
    return parser


def extra_args_provider(other: ArgsProvider | None) -> ArgsProvider:
    """`add_arguments` after another provider, if there is one."""

    def provide(parser: ArgumentParser) -> ArgumentParser:
        return add_arguments(parser if other is None else other(parser))

    return provide


def argument_name(field: str) -> str:
    """What the user types for a field of the drop section."""
    return f"--{(_PREFIX + field).replace('_', '-')}"


def drop_config(args: Namespace) -> DropConfig:
    """The drop section that the parsed arguments stand for, with ~ and variables in its path put in. Not validated."""
    names = [field.name for field in dataclasses.fields(DropConfig)]
    given = {name: getattr(args, _PREFIX + name) for name in names if hasattr(args, _PREFIX + name)}
    return DropConfig(
        **{
            name: expand_option(argument_name(name), value) if f"drop.{name}" in CONFIG_PATHS else value
            for name, value in given.items()
        }
    )


def ignored_arguments(config: DropConfig) -> tuple[str, ...]:
    """What was given although there is no policy that it could be of: --sbld-policy may have been forgotten."""
    if config.policy != "none":
        return ()
    needs_no_policy = DropConfig(residual=config.residual)
    names = [field.name for field in dataclasses.fields(DropConfig)]
    return tuple(argument_name(name) for name in names if getattr(config, name) != getattr(needs_no_policy, name))


@contextlib.contextmanager
def named_as_arguments() -> Iterator[None]:
    """Let errors about `drop.<field>` name the argument."""
    try:
        yield
    except ValueError as error:
        raise ValueError(_FIELD.sub(lambda match: argument_name(match[1]), str(error))) from error


def _kind(hint: Any) -> dict[str, Any]:
    """argparse's options for a type: a Literal, a number, text, a list of integers or a switch, each maybe None."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        (hint,) = (part for part in typing.get_args(hint) if part is not type(None))
    if typing.get_origin(hint) is Literal:
        return {"choices": typing.get_args(hint)}
    if hint == list[int]:
        return {"type": int, "nargs": "*", "metavar": "LAYER"}
    if hint is bool:
        return {"action": "store_true"}
    assert hint in (int, float, str), f"no argparse type for {hint}"
    return {"type": hint}
