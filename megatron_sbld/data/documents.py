"""Documents out of files: plain text or JSON lines, as they are or compressed with gzip or xz.

A text file is one document, or several where lines equal a separator; each JSON line is one. A file that is not UTF-8
text is an error where it is named, and is skipped and reported in a folder; one that is damaged (a broken archive, a
JSON line without text) is always an error, because half of it would go missing. Nothing here tokenizes or writes.
"""

from __future__ import annotations

import fnmatch
import io
import json
import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Literal, NamedTuple

from megatron_sbld.data.text_files import (
    NotTextError,
    bare_ending,
    ending,
    is_compressed,
    json_beginning,
    open_text,
    refuse_one_value,
    wrong_byte,
)
from megatron_sbld.files.outputs import file_identity

InputFormat = Literal["auto", "text", "jsonl"]
FileKind = Literal["text", "JSON lines", "text that begins with JSON"]

_JSON_LINES = (".jsonl", ".ndjson")
_LISTED_ENDINGS = 5
_HINTS: dict[FileKind, str] = {
    "text that begins with JSON": ", braces and keys included; input_format = jsonl reads text_key of each line alone"
}
_LINE_CHARACTERS = 1 << 20  # read of a line at once, where documents are cut


@dataclass(frozen=True, kw_only=True)
class DocumentRules:
    """How files are cut into documents."""

    input_format: InputFormat = "auto"
    """auto takes .jsonl, .ndjson and .json (also compressed), and what begins with a JSON object that has a text under
    text_key, for JSON lines and all else for text."""
    text_key: str = "text"
    """JSON lines: the key of the text."""
    separator: str | None = None
    """Text: a line equal to this ends a document and belongs to none; None leaves every file whole."""
    max_bytes: int | None = None
    """Documents longer than this are cut at line ends, lines longer than this at white space, words longer than this
    between characters; None cuts none."""

    def __post_init__(self) -> None:
        if self.separator is not None and ("\n" in self.separator or "\r" in self.separator):
            raise ValueError(f"separator = {self.separator!r}: no line equals it; give one line without its end")


@dataclass(frozen=True)
class SkippedFile:
    """A file that was not read, and why."""

    path: str
    reason: str


@dataclass(frozen=True)
class Survey:
    """What the files hold, counted before any work is done."""

    files: dict[str, int]
    """Path of each readable file -> its documents, empty ones left out."""
    skipped: list[SkippedFile]
    empty_documents: int
    text_bytes: int
    """UTF-8 bytes of all documents."""
    kinds: dict[str, FileKind]
    """Path of each readable file -> what it was taken for."""

    @property
    def documents(self) -> int:
        return sum(self.files.values())


class FoundFiles(NamedTuple):
    """What inputs stand for."""

    files: list[str]
    """In an order that depends on their names alone."""
    repeated: list[SkippedFile]
    """Those that the inputs name a second time."""
    named: frozenset[str]
    """Those of `files` that are inputs themselves; the others lie in folders."""


def find_files(inputs: Sequence[str], include: Sequence[str], exclude: Collection[str] = ()) -> FoundFiles:
    """Files to read.

    Args:
        inputs: files, and folders that are searched recursively without hidden files and folders.
        include: patterns of file names in folders; `.gz` and `.xz` may be left out of them.
        exclude: files that are passed over in folders.

    Raises:
        ValueError: an input does not exist or can be read only once, or there is no file at all.
    """
    found: list[str] = []
    named = set()
    excluded = {identity for path in exclude if (identity := file_identity(path)) is not None}
    for name in inputs:
        if os.path.isdir(name):
            found += [path for path in _walk(name, include) if file_identity(path) not in excluded]
        elif os.path.isfile(name):
            found.append(name)
            named.add(os.path.realpath(name))
        elif os.path.exists(name):
            raise ValueError(
                f"inputs: {name!r} is a pipe or a device; files are read twice, so save it as a file first"
            )
        else:
            raise ValueError(f"inputs: {name!r} does not exist")
    if not found:
        raise ValueError(f"inputs: no file matches {list(include)} in {list(inputs)}")
    first_name: dict[str, str] = {}
    skipped = []
    for path in found:
        first = first_name.setdefault(os.path.realpath(path), path)
        if first is not path:
            skipped.append(SkippedFile(path, f"the same file as {first}"))
    by_name = frozenset(path for real, path in first_name.items() if real in named)
    return FoundFiles(list(first_name.values()), skipped, by_name)


def _walk(folder: str, include: Sequence[str]) -> Iterator[str]:
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            candidates = [name, os.path.splitext(name)[0]] if is_compressed(name) else [name]
            wanted = any(fnmatch.fnmatch(candidate, pattern) for candidate in candidates for pattern in include)
            path = os.path.join(parent, name)
            if wanted and not name.startswith(".") and os.path.isfile(path):
                yield path


def survey(files: Iterable[str], rules: DocumentRules, named: Collection[str] = ()) -> Survey:
    """Count the documents of all files, and find out which files are not text.

    Raises:
        ValueError: a file is damaged, or one of those that are `named` is no text; with the place where there is one.
    """
    counts: dict[str, int] = {}
    kinds: dict[str, FileKind] = {}
    skipped, empty, text_bytes = [], 0, 0
    for path in files:
        documents, file_bytes, file_empty = 0, 0, 0
        try:
            kind = file_kind(path, rules)
            for text in _documents(path, rules, kind):
                file_bytes += len(text.encode("utf-8"))
                documents += not is_empty(text)
                file_empty += is_empty(text)
        except NotTextError as error:
            if path in named:
                raise ValueError(f"{path}: {error}") from error
            skipped.append(SkippedFile(path, str(error)))
            continue
        counts[path] = documents
        kinds[path] = kind
        empty += file_empty
        text_bytes += file_bytes
    return Survey(counts, skipped, empty, text_bytes, kinds)


def kind_lines(kinds: Mapping[str, FileKind]) -> list[str]:
    """For the console: a line for each kind, how many files were taken for it and how their names end."""
    by_kind: dict[FileKind, Counter[str]] = {}
    for path, kind in kinds.items():
        by_kind.setdefault(kind, Counter())[ending(path) or "no ending"] += 1
    lines = []
    for kind, endings in by_kind.items():
        shown = [name for name, _ in endings.most_common(_LISTED_ENDINGS)]
        more = ["..."] if len(endings) > len(shown) else []
        lines.append(f"{endings.total():,} files taken for {kind} ({', '.join(shown + more)}){_HINTS.get(kind, '')}")
    return lines


def is_empty(text: str) -> bool:
    """Whether a document holds nothing but white space."""
    return not text or text.isspace()


def surveyed_documents(found: Survey, rules: DocumentRules) -> Iterator[str]:
    """The documents that `survey` counted, in order.

    Raises:
        ValueError: a file no longer holds what was counted.
    """
    for path, expected in found.files.items():
        documents = 0
        try:
            for text in _documents(path, rules, found.kinds[path]):
                if not is_empty(text):
                    documents += 1
                    yield text
        except NotTextError as error:
            raise ValueError(f"{path} changed while it was read: {error}") from error
        if documents != expected:
            raise ValueError(f"{path} changed while it was read: {documents} documents instead of {expected}")


def read_documents(path: str, rules: DocumentRules) -> Iterator[str]:
    """The documents of one file, empty ones included.

    Raises:
        NotTextError: the file is not UTF-8 text; documents may have been yielded before.
        ValueError: the file is damaged.
    """
    yield from _documents(path, rules, file_kind(path, rules))


def file_kind(path: str, rules: DocumentRules) -> FileKind:
    """What a file is taken for: as the rules say, else by its name and its first line.

    Raises:
        NotTextError: it is no text, or JSON that is not one object a line.
        ValueError: it is damaged.
    """
    if rules.input_format == "text":
        return "text"
    shape, value = json_beginning(path)
    is_lines = rules.input_format == "jsonl" or bare_ending(path) in _JSON_LINES
    if is_lines or (bare_ending(path) == ".json" and shape is not None):
        if shape == "array" or not is_lines:  # a broken first line of JSON lines is told with its line
            refuse_one_value(shape)
        if not is_lines and not isinstance(value.get(rules.text_key), str):
            raise NotTextError(_no_text(value, rules.text_key))
        return "JSON lines"
    if shape == "object" and isinstance(value.get(rules.text_key), str):
        return "JSON lines"
    is_json = shape == "object" or (shape == "array" and any(isinstance(entry, dict) for entry in value))
    return "text that begins with JSON" if is_json else "text"


def _documents(path: str, rules: DocumentRules, kind: FileKind) -> Iterator[str]:
    with open_text(path) as stream:
        if kind == "JSON lines":
            for text in _json_texts(path, stream, rules.text_key):
                yield from _group_lines(io.StringIO(text, newline=""), None, rules.max_bytes)
            return
        for text in _group_lines(stream, rules.separator, rules.max_bytes):
            if "\0" in text:
                raise NotTextError(wrong_byte(path) or "it changed while it was read")
            yield text


def _group_lines(stream: IO[str], separator: str | None, max_bytes: int | None) -> Iterator[str]:
    """Documents of a stream of lines: cut at separators, and before max_bytes would be exceeded."""
    document: list[str] = []
    size = 0
    whole = True
    for line in _lines(stream, max_bytes):
        goes_on = max_bytes is not None and bool(document) and _goes_on(document[-1], line)
        if separator is not None and not goes_on and line.rstrip("\r\n") == separator:
            yield "".join(document)
            document, size, whole = [], 0, False
            continue
        if max_bytes is not None:
            if goes_on:
                size -= len(document[-1].encode("utf-8"))
                line = document.pop() + line
            pieces: list[str] = []
            line_size = len(line.encode("utf-8"))
            if line_size > max_bytes:
                *pieces, line = _cut(line, max_bytes)
                line_size = len(line.encode("utf-8"))
            if document and (pieces or size + line_size > max_bytes):
                yield "".join(document)
                document, size, whole = [], 0, False
            yield from pieces
            size += line_size
        document.append(line)
    if document or whole:  # nothing after a last separator is no document, an empty file is an empty one
        yield "".join(document)


def _lines(stream: IO[str], max_bytes: int | None) -> Iterable[str]:
    """Lines with their ends; where documents are cut, a long line comes in parts, so that memory stays bounded."""
    if max_bytes is None:
        return stream
    return iter(lambda: stream.readline(max(max_bytes + 1, _LINE_CHARACTERS)), "")


def _goes_on(before: str, part: str) -> bool:
    """Whether a part belongs to the line before it; a part may also end between the two characters of a line end."""
    return not before.endswith(("\n", "\r")) or (before.endswith("\r") and part == "\n")


def _cut(line: str, max_bytes: int) -> list[str]:
    """Pieces of at most max_bytes, at least one: cut behind white space, or between characters where there is none."""
    text, pieces, start = line.encode("utf-8"), [], 0
    while len(text) - start > max_bytes:
        end = start + max_bytes
        while text[end] & 0xC0 == 0x80:  # within a character
            end -= 1
        space = max(text.rfind(b" ", start, end), text.rfind(b"\t", start, end))
        if space >= 0 and not text[start:space].isspace() and space > start:
            end = space + 1
        pieces.append(text[start:end].decode("utf-8"))
        start = end
    return [*pieces, text[start:].decode("utf-8")]


def _json_texts(path: str, lines: Iterable[str], key: str) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        if line.isspace():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: not JSON: {error}") from error
        if not isinstance(record, dict) or not isinstance(record.get(key), str):
            raise ValueError(f"{where}: {_no_text(record, key)}")
        text: str = record[key]
        if "\\u" in line and any("\ud800" <= character <= "\udfff" for character in text):
            raise ValueError(f"{where}: half of a surrogate pair, which is not text")
        yield text


def _no_text(record: object, key: str) -> str:
    keys = sorted(record) if isinstance(record, dict) else type(record).__name__
    return f"no text under the key {key!r} (text_key); the line has {keys}"
