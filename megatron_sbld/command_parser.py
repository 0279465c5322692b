"""The parser of every command: values are read as in config files, paths may have ~ and variables."""

from __future__ import annotations

from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace, set_loader, set_parsing_settings

from megatron_sbld.paths import expand_options
from megatron_sbld.strict_yaml import load_yaml

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

    def parse_args(self, *args: Any, **kwargs: Any) -> Namespace:  # type: ignore[override]
        """As jsonargparse's, with the paths among the options expanded; ValueError where that cannot be."""
        given = super().parse_args(*args, **kwargs)
        own = {name: given[name] for name in vars(given) if isinstance(given[name], str | list)}
        given.update(Namespace(**expand_options(own)))
        return given
