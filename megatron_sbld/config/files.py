"""Reading config files and their fields on the command line: what is refused by name, and what is put in for paths."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import json
from argparse import ArgumentError
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from jsonargparse import ArgumentParser, Namespace

from megatron_sbld.config.sections import Config
from megatron_sbld.files.paths import CONFIG_PATHS, expand, expand_option
from megatron_sbld.files.strict_yaml import check_notation, load_yaml
from megatron_sbld.method.recipes import with_recipe

_LARGEST_INTEGER = 2**63 - 1  # beyond, conversions to float or to an array of integers fail without naming the field
_BLENDS = ("data.train_data_path", "data.valid_data_path")  # whose weights may be written as numbers


def read_config(path: str) -> Config:
    """The config that a file stands for, without a command line over it. Raises ValueError as `parse_files` does."""
    parser, given = _parser(), parse_files([path])
    found = parser.parse_object(given.as_dict())
    return resolved(Config(**parser.instantiate(found).as_dict()), explicit_drop_fields(given))


def parse_files(paths: Iterable[str]) -> Namespace:
    """The fields that config files give, those of later files over those of earlier ones.

    Raises:
        ValueError: naming the file, the key or field and what is allowed.
    """
    parser, found = _parser(), Namespace()
    for path in paths:
        file = expand("--config", path)
        sections = _read_sections(file)
        try:
            found = parser.parse_object(sections, found, defaults=False)
        except ArgumentError as error:
            raise ValueError(f"config file {file}: {error}") from error
        except OverflowError as error:
            raise ValueError(f"config file {file}: a number is too large: {error}") from error
    return found


def explicit_drop_fields(given: Namespace, args: Iterable[str] = ()) -> set[str]:
    """Names of the drop section's fields that files or the command line give, also with their defaults.

    given: what `parse_files` returned.  args: of the command line.
    """
    names = set(given.as_dict().get("drop") or {})
    for arg, following in itertools.pairwise([*args, ""]):
        option, equals, value = arg.partition("=")
        section, dot, field = option.partition(".")
        if section == "--drop" and dot:
            names.add(field.removesuffix("+"))
        elif section == "--drop":
            names |= set(load_yaml(value if equals else following))
    return names


def resolved(config: Config, explicit: Collection[str]) -> Config:
    """The config with its recipe filled in and ~ and variables in its paths. Raises ValueError naming the field.

    explicit: fields of the drop section that were set.
    """
    drop = with_recipe(config.drop, config.model.num_layers, explicit)
    return with_expanded_paths(dataclasses.replace(config, drop=drop))


def with_expanded_paths(config: Config) -> Config:
    """The config with ~ and variables in its paths put in. Raises ValueError naming the field."""
    changed: dict[str, dict[str, Any]] = {}
    for path in CONFIG_PATHS:
        section, field = path.split(".")
        changed.setdefault(section, {})[field] = expand_option(path, getattr(getattr(config, section), field))
    sections = {name: dataclasses.replace(getattr(config, name), **fields) for name, fields in changed.items()}
    return dataclasses.replace(config, **sections)


def with_text_blends(args: Iterable[str]) -> list[str]:
    """The arguments, with the weights in a list for one of the blends as text, which the parser asks for."""
    changed, before = [], ""
    for arg in args:
        option, equals, value = arg.partition("=")
        if before in _BLEND_OPTIONS:
            arg = _text_blend(arg)
        elif option in _BLEND_OPTIONS and equals:
            arg = f"{option}={_text_blend(value)}"
        before = arg
        changed.append(arg)
    return changed


_BLEND_OPTIONS = [f"--{name}{ending}" for name in _BLENDS for ending in ("", "+")]


def _text_blend(text: str) -> str:
    try:
        value = load_yaml(text)
    except yaml.YAMLError:  # the parser says so
        return text
    return json.dumps(_with_text_weights(value)) if isinstance(value, list) else text


def _with_text_weights(entries: list[Any]) -> list[Any]:
    is_number = [isinstance(entry, int | float) and not isinstance(entry, bool) for entry in entries]
    return [str(entry) if number else entry for entry, number in zip(entries, is_number, strict=True)]


def _parser() -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Config)
    return parser


def _read_sections(path: str) -> dict[str, dict[str, Any]]:
    """What a config file says; refuses unknown sections or fields, and what is no mapping of sections of usable values.

    Raises:
        ValueError: naming the file, the key and what is allowed.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"config file {path}: cannot be read: {error}") from error
    try:
        sections = load_yaml(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"config file {path}: is not valid YAML: {error}") from error
    except ValueError as error:
        raise ValueError(f"config file {path}: {error}") from error
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
            if f"{section}.{field}" in _BLENDS and isinstance(value, list):
                values[field] = _with_text_weights(value)
    return sections


def check_options(args: Iterable[str], others: Iterable[str] = ()) -> None:
    """Refuse a `--section.field` on the command line that does not exist, or a number that a config file may not have.

    others: options of the command besides those of the config, without dashes.

    Raises:
        ValueError: naming the option and what is allowed.
    """
    sections, others = field_names(Config), list(others)
    known = {"--config", "--help", "--print_config", *(f"--{name}" for name in others)}
    for arg, following in itertools.pairwise([*args, ""]):
        option, equals, value = arg.partition("=")
        section, dot, field = option.removeprefix("--").partition(".")
        if not option.startswith("--") or option in known:
            continue
        if section not in sections:
            raise ValueError(f"unknown option {option}; {_suggestion(section, [*sections, *others])}")
        hints = get_type_hints(get_type_hints(Config)[section])
        if "list" in str(hints.get(field.removesuffix("+"))):
            field = field.removesuffix("+")  # adds to the list of the config file
        if dot and field not in hints:
            raise ValueError(f"unknown option {option}; {_suggestion(field, list(hints))}")
        if dot and "str" not in str(hints[field]):
            check_notation(option, value if equals else following)


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
