"""Says of which option or field a path is that could not be read or written; for the command line's messages."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import yaml


def describe(error: OSError, args: Sequence[str]) -> str:
    """The error with the option, or the config's field, that names its path or the folder that it is in.

    Args:
        error: what was raised.
        args: the command's arguments.
    """
    if error.filename is None or not isinstance(error.filename, str | bytes):
        return str(error)
    path = os.path.abspath(os.fsdecode(error.filename))
    found = [(name, value) for name, value in _named_values(args) if _lie_in_one_line(path, os.path.abspath(value))]
    if not found:
        return str(error)
    name, value = max(found, key=lambda item: (len(os.path.abspath(item[1])), item[0] != "--config"))
    shown = f"{name} = {value!r}" if name else repr(value)
    return f"{shown}: {error.strerror}" if os.path.abspath(value) == path else f"{shown}: {error.strerror}: {path!r}"


def _lie_in_one_line(path: str, value: str) -> bool:
    """Whether one is the other, or a folder around it that is not the root."""
    common = os.path.commonpath([path, value])
    return common in (path, value) and common != os.path.sep


def _named_values(args: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Values of the options, of the config files' fields that those do not replace, and what stands by itself."""
    name, named, configs = "", set(), []
    for arg in args:
        if arg.startswith("--"):
            name, equals, value = arg.partition("=")
            if not equals:
                continue
        else:
            value = arg
        if name == "--config":
            configs.append(value)
        shown = name.removeprefix("--") if "." in name else name
        named.add(shown)
        if value:
            yield shown, value
        name = ""
    for config in configs:
        yield from ((name, value) for name, value in _fields(config) if name not in named)


def _fields(file: str) -> Iterator[tuple[str, str]]:
    """The texts in a config file, by section.field."""
    try:
        with open(file, encoding="utf-8") as stream:
            sections: Any = yaml.safe_load(stream)
    except (OSError, ValueError, yaml.YAMLError):
        return
    for section, fields in sections.items() if isinstance(sections, dict) else ():
        for name, value in fields.items() if isinstance(fields, dict) else ():
            for text in value if isinstance(value, list) else [value]:
                if isinstance(text, str) and text:
                    yield f"{section}.{name}", text
