"""The parser of every command: values are read as in config files, paths may have ~ and variables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import yaml
from jsonargparse import ArgumentParser, Namespace, set_loader, set_parsing_settings

from megatron_sbld.cli import completion
from megatron_sbld.fields import ranges
from megatron_sbld.files.paths import expand_options
from megatron_sbld.files.strict_yaml import load_yaml

if TYPE_CHECKING:
    from megatron_sbld.config.sections import Config

_NULL = ("null", "Null", "NULL")


def _load_value(text: str) -> Any:
    value = load_yaml(text)
    # What YAML takes for a comment or the mark of a document is text here, and ~ is a folder.
    if value is None and text.strip() not in _NULL:
        return text
    # As jsonargparse's own loader: a word before a colon or within braces is text.
    is_text = isinstance(value, dict) and value and all(entry is None for entry in value.values())
    return text if is_text else value


set_parsing_settings(docstring_parse_attribute_docstrings=True)
set_loader("yaml", _load_value, (yaml.YAMLError, ValueError, RecursionError))


class CommandParser(ArgumentParser):
    """jsonargparse's parser, raising instead of exiting."""

    def __init__(self, usage: str, description: str) -> None:
        super().__init__(
            prog="megatron-sbld", usage=f"megatron-sbld {usage}", description=description, exit_on_error=False
        )

    def add_class_arguments(self, theclass: type, *args: Any, **kwargs: Any) -> list[str]:  # type: ignore[override]
        """As jsonargparse's; --help says each number's range as well."""
        added = super().add_class_arguments(theclass, *args, **kwargs)
        allowed = ranges(theclass)
        for action in self._actions:
            if action.dest in allowed:
                action.help = f"{action.help or ''} {allowed[action.dest]}".strip()
        return added

    def parse_args(self, *args: Any, **kwargs: Any) -> Namespace:  # type: ignore[override]
        """As jsonargparse's, with the paths among the options expanded; ValueError where that cannot be."""
        if completion.is_asked_for():
            completion.complete_values(self)
        given = super().parse_args(*args, **kwargs)
        own = {name: given[name] for name in vars(given) if isinstance(given[name], str | list)}
        given.update(Namespace(**expand_options(own)))
        return given


def config_parser(
    usage: str, description: str, add_options: Callable[[CommandParser], object] | None = None
) -> CommandParser:
    """A parser of a config file and of its fields as options.

    add_options: adds the command's own options, which --help shows before the many fields.
    """
    from megatron_sbld.config.sections import Config

    parser = CommandParser(usage, description)
    parser.add_argument("--config", action="config", help="YAML file of sections, that of the training run")
    if add_options is not None:
        add_options(parser)
    parser.add_class_arguments(Config)
    return parser


def parse_config(parser: CommandParser, args: list[str], others: Sequence[str] = ()) -> tuple[Config, dict[str, Any]]:
    """The config that the arguments stand for, and the values of the command's `others`, options without dashes."""
    from megatron_sbld.config.files import (
        check_options,
        explicit_drop_fields,
        parse_files,
        resolved,
        with_text_blends,
    )
    from megatron_sbld.config.sections import Config

    files, args = config_files(args)
    check_options(args, others)
    try:
        given = parse_files(files)
        explicit = explicit_drop_fields(given, args)
        found = parser.parse_args(with_text_blends(args), namespace=given)
        values = parser.instantiate(found).as_dict()
    except OverflowError as error:
        raise ValueError(f"a number on the command line is too large: {error}") from error
    values.pop("config", None)
    options = {name: values.pop(name) for name in others}
    return resolved(Config(**values), explicit), options


def config_files(args: list[str]) -> tuple[list[str], list[str]]:
    """The values of `--config`, and the other arguments, which win wherever they stand."""
    files, others = [], []
    rest = iter(args)
    for arg in rest:
        value = next(rest, None) if arg == "--config" else None
        if value is not None:
            files.append(value)
        elif arg.startswith("--config="):
            files.append(arg.removeprefix("--config="))
        else:
            others.append(arg)  # also a --config without a value, which the parser refuses
    return files, others
