"""The drop section as Megatron-LM arguments: `--sbld-<field>` for each field of DropConfig, and the way back.

Beside them `--sbld-lr-schedule-by`, of the optimizer section.

Names, types, choices, defaults and help are DropConfig's own. Megatron-LM's parser is argparse; ranges and what fields
mean together are checked by the same code as for a config file, and errors name the arguments.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import re
import types
import typing
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from typing import Any, Literal

import docstring_parser

from megatron_sbld.config.sections import OptimizerConfig
from megatron_sbld.fields import ranges
from megatron_sbld.files.paths import CONFIG_PATHS, expand_option
from megatron_sbld.layout.units import num_units
from megatron_sbld.mcore.compat import hybrid_pattern
from megatron_sbld.method.config import DropConfig
from megatron_sbld.method.in_force import drops
from megatron_sbld.method.recipes import with_recipe

RATE_FIELD = "lr_schedule_by"
"""Of the optimizer section, and the one argument that is not of the drop section."""
_PREFIX = "sbld_"
_EXPLICIT = "sbld_explicit"  # fields that were set
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
    described = {
        param.arg_name: param.description for param in docstring_parser.parse_from_object(OptimizerConfig).params
    }
    rate = OptimizerConfig.__dataclass_fields__[RATE_FIELD]
    group.add_argument(
        argument_name(RATE_FIELD),
        default=rate.default,
        choices=typing.get_args(typing.get_type_hints(OptimizerConfig)[RATE_FIELD]),
        help=f"{' '.join((described[RATE_FIELD] or '').split())} Needs a policy. (default: %(default)s)",
    )
    parser.set_defaults(**{_EXPLICIT: []})
    return parser


class _Note(argparse.Action):
    """Stores a value, and notes that the field was set, which a recipe leaves alone then."""

    def __call__(
        self, parser: ArgumentParser, namespace: Namespace, values: Any, option_string: str | None = None
    ) -> None:
        setattr(namespace, self.dest, True if self.nargs == 0 else values)
        noted = [*getattr(namespace, _EXPLICIT, []), self.dest.removeprefix(_PREFIX)]
        setattr(namespace, _EXPLICIT, noted)


def extra_args_provider(other: ArgsProvider | None) -> ArgsProvider:
    """`add_arguments` after another provider, if there is one."""

    def provide(parser: ArgumentParser) -> ArgumentParser:
        return add_arguments(parser if other is None else other(parser))

    return provide


def argument_name(field: str) -> str:
    """What the user types for a field of the drop section."""
    return f"--{(_PREFIX + field).replace('_', '-')}"


def drop_config(args: Namespace) -> DropConfig:
    """The drop section that the parsed arguments stand for, with its recipe filled in and ~ and variables in its path.

    Not validated.
    """
    names = [field.name for field in dataclasses.fields(DropConfig)]
    given = {name: getattr(args, _PREFIX + name) for name in names if hasattr(args, _PREFIX + name)}
    config = DropConfig(
        **{
            name: expand_option(argument_name(name), value) if f"drop.{name}" in CONFIG_PATHS else value
            for name, value in given.items()
        }
    )
    if config.recipe is None:
        return config
    return with_recipe(config, policy_layers(args, config), getattr(args, _EXPLICIT, []))


def policy_layers(args: Any, config: DropConfig) -> int:
    """The L of the policy: the model's layers, or with `unit` block a HybridModel's blocks."""
    pattern = hybrid_pattern(args)
    if pattern is None:
        return int(args.num_layers)
    return num_units(pattern, config.unit)


def lr_schedule_by(args: Namespace) -> str:
    """What drives the learning rate: iterations or layer_tokens."""
    word: str = getattr(args, _PREFIX + RATE_FIELD, OptimizerConfig.lr_schedule_by)
    return word


def ignored_arguments(config: DropConfig, schedule_by: str = OptimizerConfig.lr_schedule_by) -> tuple[str, ...]:
    """What was given although there is no policy that it could be of: --sbld-policy may have been forgotten."""
    if drops(config):
        return ()
    needs_no_policy = DropConfig(residual=config.residual)
    names = [field.name for field in dataclasses.fields(DropConfig)]
    ignored = [name for name in names if getattr(config, name) != getattr(needs_no_policy, name)]
    ignored += [RATE_FIELD] * (schedule_by != OptimizerConfig.lr_schedule_by)
    return tuple(argument_name(name) for name in ignored)


@contextlib.contextmanager
def named_as_arguments() -> Iterator[None]:
    """Let errors about `drop.<field>` name the argument."""
    try:
        yield
    except ValueError as error:
        raise ValueError(_FIELD.sub(lambda match: argument_name(match[1]), str(error))) from error


def _kind(hint: Any) -> dict[str, Any]:
    """argparse's options for a type: a Literal, a number, text, a list or a switch, each maybe None."""
    parts = [part for part in _alternatives(hint) if part is not type(None)]
    if len(parts) > 1:
        return {"type": _word_or_list, "action": _Note, "metavar": "RULE|JSON"}
    (hint,) = parts
    if typing.get_origin(hint) is Literal:
        return {"choices": typing.get_args(hint), "action": _Note}
    if hint == list[int]:
        return {"type": int, "nargs": "*", "metavar": "LAYER", "action": _Note}
    if hint == list[list[float]]:
        return {"type": json.loads, "metavar": "JSON", "action": _Note}
    if hint is bool:
        return {"nargs": 0, "action": _Note}
    assert hint in (int, float, str), f"no argparse type for {hint}"
    return {"type": hint, "action": _Note}


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _word_or_list(text: str) -> Any:
    return json.loads(text) if text.startswith("[") else text
