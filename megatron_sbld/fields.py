"""What a field of a section may hold is written beside it, in its type: `num_layers: Count = 24`.

A Literal allows its words, `Annotated[float, In("(0, 1]")]` a range, `| None` null. Checks, error messages and --help
read it from there. A list's entries are looked at where their type is a Literal; where they depend on more than the
field, they are checked where they are used.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from megatron_sbld.checks import check_choice, check_flag, check_integer, check_number


@dataclass(frozen=True)
class Whole:
    """Integers from low on, up to high where there is one."""

    low: int
    high: int | None = None

    def check(self, name: str, value: Any) -> None:
        """Raise ValueError for anything else."""
        check_integer(name, value, self.low, self.high)

    def __str__(self) -> str:
        return f"at least {self.low}" if self.high is None else f"in [{self.low}, {self.high}]"


@dataclass(frozen=True)
class In:
    """Finite numbers in an interval, such as "(0, 1]"."""

    interval: str

    def check(self, name: str, value: Any) -> None:
        """Raise ValueError for anything else."""
        check_number(name, value, self.interval)

    def __str__(self) -> str:
        low, high = self.interval[1:-1].split(", ")
        if high == "inf":
            return f"{'at least' if self.interval[0] == '[' else 'above'} {low}"
        return f"in {self.interval}"


_ANY_NUMBER = In("(-inf, inf)")
Count = Annotated[int, Whole(1)]
CountOrZero = Annotated[int, Whole(0)]
Finite = Annotated[float, _ANY_NUMBER]
NotNegative = Annotated[float, In("[0, inf)")]
Positive = Annotated[float, In("(0, inf)")]
Share = Annotated[float, In("[0, 1]")]
PositiveShare = Annotated[float, In("(0, 1]")]
BelowOne = Annotated[float, In("[0, 1)")]


def problems(section: Any, prefix: str = "") -> list[str]:
    """What is wrong with each field of a dataclass by itself: name, value and what is allowed; empty if all is well."""
    found = []
    for name, check in _checks(section.__class__).items():
        try:
            check(f"{prefix}{name}", getattr(section, name))
        except ValueError as error:
            found.append(str(error))
    return found


def check_fields(section: Any, prefix: str = "") -> None:
    """Raise ValueError, one line a problem, unless each field of a dataclass holds what it may."""
    found = problems(section, prefix)
    if found:
        raise ValueError("\n".join(found))


def notes(section: type, kind: type) -> dict[str, Any]:
    """Fields of a dataclass whose type is annotated with an object of `kind`, which may be a base of it."""
    by_name = {
        name: [note for note in _type_of(hint).notes if isinstance(note, kind)] for name, hint in _hints(section)
    }
    return {name: found[0] for name, found in by_name.items() if found}


def ranges(section: type) -> dict[str, str]:
    """A sentence on the range of each field that has one, for --help; fields of sections within as `section.field`."""
    found = {}
    for name, hint in _hints(section):
        kind = _type_of(hint)
        if isinstance(kind.base, type) and dataclasses.is_dataclass(kind.base):
            found.update({f"{name}.{inner}": text for inner, text in ranges(kind.base).items()})
        limits = [str(note) for note in kind.notes if isinstance(note, Whole | In) and note != _ANY_NUMBER]
        if limits:
            found[name] = f"{limits[0][0].upper()}{limits[0][1:]}."
    return found


@dataclass(frozen=True)
class _Type:
    """A type taken apart: `Annotated[base, *notes]`, or None."""

    base: Any
    notes: tuple[Any, ...]
    optional: bool


def _type_of(hint: Any) -> _Type:
    if typing.get_origin(hint) is Annotated:
        inner = _type_of(hint.__origin__)
        return _Type(inner.base, (*hint.__metadata__, *inner.notes), inner.optional)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        parts = [part for part in typing.get_args(hint) if part is not type(None)]
        optional = len(parts) < len(typing.get_args(hint))
        if len(parts) == 1:
            inner = _type_of(parts[0])
            return _Type(inner.base, inner.notes, optional)
        return _Type(hint, (), optional)
    return _Type(hint, (), False)


def _hints(section: type) -> list[tuple[str, Any]]:
    return list(typing.get_type_hints(section, include_extras=True).items())


@functools.cache
def _checks(section: Any) -> dict[str, Callable[[str, Any], None]]:
    return {name: functools.partial(_check, _type_of(hint)) for name, hint in _hints(section)}


def _check(kind: _Type, name: str, value: Any) -> None:
    if value is None:
        if not kind.optional:
            raise ValueError(f"{name} = null: must have a value")
        return
    if typing.get_origin(kind.base) is Literal:
        check_choice(name, value, typing.get_args(kind.base))
    elif typing.get_origin(kind.base) is list:
        _check_entries(kind.base, name, value)
    elif kind.base is bool:
        check_flag(name, value)
    elif kind.base is str and not isinstance(value, str):
        raise ValueError(f"{name} = {value!r} is not allowed: it must be text")
    for note in kind.notes:
        if isinstance(note, Whole | In):
            note.check(name, value)


def _check_entries(hint: Any, name: str, value: Any) -> None:
    kinds = [_type_of(part) for part in typing.get_args(hint)]
    if any(typing.get_origin(kind.base) is Literal for kind in kinds):
        for kind, entry in itertools.product(kinds, value):
            _check(kind, f"{name} entry", entry)
