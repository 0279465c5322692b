"""LAMBADA's passages out of a file: plain text, one passage a line with spaces between its tokens, or JSON lines.

The target is what follows the last space of the passage as it is scored, and the context is what stands before it:
the convention of EleutherAI's lm-evaluation-harness. A file with anything wrong in it is refused, because accuracy over
the passages that happen to be whole would not compare.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from megatron_sbld.checks import check_choice
from megatron_sbld.data.documents import InputFormat
from megatron_sbld.data.text_files import (
    NotTextError,
    bare_ending,
    json_line,
    read_content,
    refuse_one_value,
)
from megatron_sbld.evaluation.detokenise import detokenise as detokenise_tokens

_JSON_LINES = (".jsonl", ".ndjson", ".json")
_JSON_OBJECT = re.compile(rb'\s*\{\s*"')
_SHOWN_PROBLEMS = 5


@dataclass(frozen=True)
class Passage:
    """A passage without its last word, and that word."""

    line: int
    """Of the file, from 1."""
    context: str
    """Not empty, and without white space at its end."""
    target: str
    """The last word, with the white space before it."""
    is_glued: bool = False
    """Whether detokenising put something to the word: an opening quote that the model has to predict as well."""


def read_passages(
    path: str, passage_format: InputFormat = "auto", *, detokenise: bool | None = None
) -> tuple[list[Passage], Literal["text", "jsonl"]]:
    """All passages of a file in order, and its format.

    Args:
        path: of the file, which may be compressed with gzip or xz.
        passage_format: auto takes .jsonl, .ndjson and .json, and what begins with a JSON object, for JSON lines
            ({"text": passage}), and all else for plain text.
        detokenise: whether the spaces between tokens are undone (detokenise.py). None: in plain text, which is
            distributed in tokens, and not in JSON lines, which hold text as it is written.

    Raises:
        ValueError: the file is missing or empty, or has lines that are no passages; how many and which.
    """
    check_choice("format", passage_format, get_args(InputFormat))
    if Path(path).exists() and not Path(path).is_file():
        raise ValueError(f"{path}: a folder, a pipe or a device; the passages are read twice, so save them as a file")
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file; give LAMBADA as plain text or JSON lines")
    try:
        content = read_content(path).removeprefix(b"\xef\xbb\xbf")
        found = _format_of(path, content, passage_format)
    except NotTextError as error:
        raise ValueError(f"{path}: {error}") from error
    if not content.strip():
        raise ValueError(f"{path}: the file is empty")
    detokenises = found == "text" if detokenise is None else detokenise
    passages, problems = [], []
    for number, line in _lines(content):
        try:
            text = _text(line, found)
            passages.append(_detokenised(number, text) if detokenises else _split(number, text))
        except _ProblemError as problem:
            problems.append(f"{path}:{number}: {problem}")
    if problems:
        raise ValueError(_listed(path, problems))
    return passages, found


def _format_of(path: str, content: bytes, passage_format: InputFormat) -> Literal["text", "jsonl"]:
    """Raises NotTextError for JSON that is not one object a line."""
    if passage_format != "auto":
        return passage_format
    if bare_ending(path) == ".json":
        first, _, _ = content.lstrip().partition(b"\n")
        refuse_one_value(json_line(first.decode("utf-8", errors="replace"))[0])
    return "jsonl" if bare_ending(path) in _JSON_LINES or _JSON_OBJECT.match(content) else "text"


class _ProblemError(Exception):
    """What is wrong with a line."""


def _lines(content: bytes) -> Iterator[tuple[int, bytes]]:
    lines = content.split(b"\n")
    if not lines[-1]:  # the end of the last line
        lines.pop()
    for number, line in enumerate(lines, start=1):
        yield number, line.removesuffix(b"\r")


def _text(line: bytes, passage_format: str) -> str:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _ProblemError(
            f"not UTF-8: byte {line[error.start]:#04x} at byte {error.start + 1} of the line"
        ) from error
    if "\0" in text:
        raise _ProblemError("a NUL character; the file may be UTF-16, and UTF-8 is needed")
    if passage_format == "text" or not text.strip():
        return text
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _ProblemError(f"not JSON: {error}") from error
    if not isinstance(record, dict):
        raise _ProblemError(f'needs an object {{"text": passage}}; it is {type(record).__name__}')
    if "text" not in record:
        raise _ProblemError(f'no key "text"; it has {", ".join(map(repr, record)) or "none"}')
    value = record["text"]
    if not isinstance(value, str):
        raise _ProblemError(f'"text" must be a string; it is {type(value).__name__}')
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise _ProblemError('"text" has half of a surrogate pair, which is not text')
    return value


def _split(number: int, text: str) -> Passage:
    if not text or text.isspace():
        raise _ProblemError("an empty passage")
    if text[-1].isspace():
        raise _ProblemError("white space at the end, so that no word follows the last space")
    before, _, word = text.rpartition(" ")
    context = before.rstrip()
    if not context:
        raise _ProblemError(f"a passage of one word, {word!r}; the last word needs words before it")
    return Passage(number, context, f"{before[len(context) :]} {word}")


def _detokenised(number: int, text: str) -> Passage:
    _split(number, text)
    tokens = text.split()
    passage = _split(number, detokenise_tokens(tokens))
    return Passage(number, passage.context, passage.target, is_glued=passage.target.strip() != tokens[-1])


def _listed(path: str, problems: list[str]) -> str:
    if len(problems) == 1:
        return problems[0]
    shown = problems[:_SHOWN_PROBLEMS]
    if len(problems) > len(shown):
        shown.append(f"and {len(problems) - len(shown)} more")
    return f"{path}: {len(problems)} lines are not passages:\n  " + "\n  ".join(shown)
