"""Paths as users write them: ~, ~user, $NAME and ${NAME} stand for what a shell would put there.

A config file and a quoted option do not pass through a shell, and a folder named ~ or $HOME is never meant. Applied
once to what was read, so that everything else, and the config.yaml of a run, has plain paths. Standard library only.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

CONFIG_PATHS = (
    "data.train_data_path",
    "data.valid_data_path",
    "data.tokenizer",
    "data.data_cache_path",
    "data.lambada_path",
    "data.perplexity_path",
    "drop.sensitivity",
    "checkpoint.load",
    "logging.run_dir",
)
"""Fields of the config that are paths, or lists of paths (and weights)."""

OPTION_PATHS = (
    "baseline",
    "baseline_run",
    "checkpoint",
    "config",
    "data",
    "dropped_run",
    "from",
    "hardware",
    "inputs",
    "out",
    "output",
    "paths",
    "plot",
    "prompts",
    "runs",
    "source",
    "tokenizer",
)
"""Options and arguments of the commands that are paths, or lists of paths, whichever command has them."""

_DOLLAR = re.compile(r"\$(?:(\w+)|\{(\w+)\}|[{(])")


def expand(name: str, path: str) -> str:
    """The path with variables and the home folder put in; a path that has neither as it is.

    Raises:
        ValueError: there is none, a variable is not set or empty, or a user is not known; naming the field or option.
    """
    if not path:  # pathlib would take it for the present folder
        raise ValueError(f"{name} = '': is empty; give a path (. is the present folder), or leave it out")
    names = [match[1] or match[2] or "" for match in _DOLLAR.finditer(path)]
    if names and os.path.lexists(path) and not any(map(os.environ.get, names)):
        return path  # a file that has a dollar sign in its name
    expanded = _DOLLAR.sub(lambda match: _variable(name, path, match), path)
    if not expanded.startswith("~"):
        return expanded
    at_home = os.path.expanduser(expanded)
    if at_home.startswith("~"):
        user = expanded.partition("/")[0]
        raise ValueError(
            f"{name} = {path!r}: there is no user {user[1:]!r}; write ./{expanded} for a file of that name"
        )
    return at_home


def expand_option(name: str, value: Any) -> Any:
    """The same for an option that may be left out, or given several times."""
    if isinstance(value, str):
        return expand(name, value)
    if isinstance(value, list):
        return [expand_option(name, entry) for entry in value]
    return value


def expand_options(values: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a command by their names, with those of OPTION_PATHS expanded."""
    return {name: expand_option(name, value) if name in OPTION_PATHS else value for name, value in values.items()}


def _variable(name: str, path: str, match: re.Match[str]) -> str:
    variable = match[1] or match[2]
    if variable is None:
        raise ValueError(f"{name} = {path!r}: {match[0]} is not allowed in a path; only $NAME and ${{NAME}} are put in")
    value = os.environ.get(variable)
    if not value:
        raise ValueError(
            f"{name} = {path!r}: the environment variable {variable} is {'empty' if value == '' else 'not set'}"
        )
    return value
