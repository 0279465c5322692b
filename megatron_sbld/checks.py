"""Checks of single values, whose errors name the field, its value and what is allowed. Standard library only."""

from __future__ import annotations

import math
import numbers
from collections.abc import Collection, Iterable
from typing import Any


def check_number(name: str, value: Any, allowed: str) -> float:
    """Return value as a float, or raise ValueError unless it is a finite number in `allowed`, such as "(0, 1]"."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not _contains(allowed, value):
        finite = ", and finite" if isinstance(value, float) and not math.isfinite(value) else ""
        raise ValueError(f"{name} = {value!r} is not allowed: it must be a number in {allowed}{finite}")
    return float(value)


def check_integer(name: str, value: Any, low: int, high: int | None = None) -> int:
    """Return value as an int, or raise ValueError unless it is an integer in [low, high]."""
    is_integer = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not is_integer or value < low or (high is not None and value > high):
        limits = f"of at least {low}" if high is None else f"in [{low}, {high}]"
        raise ValueError(f"{name} = {value!r} is not allowed: it must be an integer {limits}")
    return int(value)


def check_choice(name: str, value: Any, choices: Collection[Any]) -> None:
    """Raise ValueError unless value is one of the choices."""
    if not any(value is choice or value == choice for choice in choices):
        raise ValueError(f"{name} = {value!r} is not allowed: it must be one of {', '.join(map(str, choices))}")


def check_flag(name: str, value: Any) -> bool:
    """Return value as a bool, or raise ValueError unless it is True or False: a text such as "false" counts as true."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} = {value!r} is not allowed: it must be True or False")
    return value


def check_layers(name: str, layers: Iterable[Any], num_layers: int) -> tuple[int, ...]:
    """Return 1-based layer numbers in ascending order, or raise ValueError if one is repeated or out of [1, L]."""
    if isinstance(layers, str) or not isinstance(layers, Iterable):
        raise ValueError(f"{name} = {layers!r} is not allowed: it must be a list of layer numbers")
    numbers_given = [check_integer(f"{name} entry", layer, 1, num_layers) for layer in layers]
    if len(set(numbers_given)) != len(numbers_given):
        raise ValueError(f"{name} = {numbers_given} is not allowed: every layer may be listed only once")
    return tuple(sorted(numbers_given))


def check_layer_number(layer_number: int) -> None:
    """Raise IndexError for a number below 1, which an index would count from the end; one above L is in no list."""
    if layer_number < 1:
        raise IndexError(f"layer {layer_number}: layers are numbered from 1")


def check_keys(name: str, state: Any, needed: Collection[str]) -> None:
    """Raise ValueError unless state is a dict that has these keys."""
    missing = [key for key in needed if not isinstance(state, dict) or key not in state]
    if missing:
        raise ValueError(f"{name} has no {', '.join(missing)}: it must be what state_dict returned")


def _contains(interval: str, value: Any) -> bool:
    try:
        value = float(value)
    except OverflowError:  # an integer of more than 308 digits
        return False
    low, high = (float(bound) for bound in interval[1:-1].split(","))
    above = value >= low if interval[0] == "[" else value > low
    below = value <= high if interval[-1] == "]" else value < high
    return math.isfinite(value) and above and below
