"""Reading a config file by hand where the parser's own message would not say what is allowed."""

from __future__ import annotations

import dataclasses
import difflib
from argparse import ArgumentError
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from jsonargparse import ArgumentParser

from megatron_sbld.training.config import Config

_LARGEST_INTEGER = 2**63 - 1  # beyond, conversions to float or to an array of integers fail without naming the field


def read_config(path: str) -> Config:
    """The config that a file stands for, without a command line over it. Raises ValueError as `check_keys` does."""
    check_keys(path)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Config)
    try:
        return Config(**parser.instantiate(parser.parse_path(path)).as_dict())
    except ArgumentError as error:
        raise ValueError(f"config file {path}: {error}") from error


def check_keys(path: str) -> None:
    """Refuse a config file with unknown sections or fields, or one that is no mapping of sections of usable values.

    Raises:
        ValueError: naming the file, the key and what is allowed.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"config file {path}: cannot be read: {error}") from error
    try:
        sections = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: as for the date 2024-13-01
        raise ValueError(f"config file {path}: is not valid YAML: {error}") from error
    if not isinstance(sections, dict):
        raise ValueError(f"config file {path}: must be a mapping of sections, {', '.join(field_names(Config))}")
    _check(path, "section", sections, field_names(Config))
    for section, values in sections.items():
        if not isinstance(values, dict):
            raise ValueError(f"config file {path}: section {section} must be a mapping of fields, not {values!r}")
        _check(path, f"field {section}.", values, field_names(get_type_hints(Config)[section]))
        for field, value in values.items():
            if isinstance(value, int) and abs(value) > _LARGEST_INTEGER:
                raise ValueError(f"config file {path}: {section}.{field} = {value}: must have at most 64 bits")


def check_options(args: Iterable[str], others: Iterable[str] = ()) -> None:
    """Refuse a `--section.field` on the command line that does not exist.

    others: options of the command besides those of the config, without dashes.

    Raises:
        ValueError: naming the option and what is allowed.
    """
    sections, others = field_names(Config), list(others)
    known = {"--config", "--help", "--print_config", *(f"--{name}" for name in others)}
    for arg in args:
        option = arg.partition("=")[0]
        section, dot, field = option.removeprefix("--").partition(".")
        if not option.startswith("--") or option in known:
            continue
        if section not in sections:
            raise ValueError(f"unknown option {option}; {_suggestion(section, [*sections, *others])}")
        allowed = field_names(get_type_hints(Config)[section])
        if dot and field not in allowed:
            raise ValueError(f"unknown option {option}; {_suggestion(field, allowed)}")


def field_names(cls: type) -> list[str]:
    """Names of a dataclass's fields."""
    return [field.name for field in dataclasses.fields(cls)]


def _check(path: str, what: str, found: dict[Any, Any], allowed: Iterable[str]) -> None:
    allowed = list(allowed)
    for key in found:
        if key not in allowed:
            separator = "" if what.endswith(".") else " "
            raise ValueError(f"config file {path}: unknown {what}{separator}{key}; {_suggestion(str(key), allowed)}")


def _suggestion(name: str, allowed: list[str]) -> str:
    near = difflib.get_close_matches(name, allowed, n=3)
    return f"did you mean {' or '.join(near)}?" if near else f"allowed are {', '.join(allowed)}"
