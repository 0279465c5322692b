"""Documents out of files: plain text or JSON lines, as they are or compressed with gzip or xz.

A text file is one document, or several where lines equal a separator; each JSON line is one. A file that is not UTF-8
text is skipped and reported; one that is damaged (a broken archive, a JSON line without text) is an error, because
half of it would go missing. Nothing here tokenizes or writes.
"""

from __future__ import annotations

import fnmatch
import gzip
import json
import lzma
import os
import zlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any, Literal

InputFormat = Literal["auto", "text", "jsonl"]

_OPENERS = {".gz": gzip.open, ".xz": lzma.open}
_JSON_LINES = (".jsonl", ".ndjson")


@dataclass(frozen=True, kw_only=True)
class DocumentRules:
    """How files are cut into documents."""

    input_format: InputFormat = "auto"
    """auto takes .jsonl and .ndjson (also compressed) for JSON lines and all else for text."""
    text_key: str = "text"
    """JSON lines: the key of the text."""
    separator: str | None = None
    """Text: a line equal to this ends a document and belongs to none; None leaves every file whole."""
    max_bytes: int | None = None
    """Documents longer than this are cut at line ends; None cuts none."""


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

    @property
    def documents(self) -> int:
        return sum(self.files.values())


class NotTextError(Exception):
    """A file does not hold UTF-8 text."""


def find_files(
    inputs: Sequence[str], include: Sequence[str], exclude: Collection[str] = ()
) -> tuple[list[str], list[SkippedFile]]:
    """Files to read, in an order that depends on their names alone, and those that `inputs` name a second time.

    Args:
        inputs: files, and folders that are searched recursively without hidden files and folders.
        include: patterns of file names in folders; `.gz` and `.xz` may be left out of them.
        exclude: absolute paths that are passed over in folders.

    Raises:
        ValueError: an input does not exist, or there is no file at all.
    """
    found: list[str] = []
    for name in inputs:
        if os.path.isdir(name):
            found += [path for path in _walk(name, include) if os.path.abspath(path) not in exclude]
        elif os.path.exists(name):
            found.append(name)
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
    return list(first_name.values()), skipped


def _walk(folder: str, include: Sequence[str]) -> Iterator[str]:
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            stem, suffix = os.path.splitext(name)
            candidates = [name, stem] if suffix in _OPENERS else [name]
            wanted = any(fnmatch.fnmatch(candidate, pattern) for candidate in candidates for pattern in include)
            path = os.path.join(parent, name)
            if wanted and not name.startswith(".") and os.path.isfile(path):
                yield path


def survey(files: Iterable[str], rules: DocumentRules) -> Survey:
    """Count the documents of all files, and find out which files are not text.

    Raises:
        ValueError: a file is damaged; named with its line where there is one.
    """
    counts: dict[str, int] = {}
    skipped, empty, text_bytes = [], 0, 0
    for path in files:
        documents, file_bytes, file_empty = 0, 0, 0
        try:
            for text in read_documents(path, rules):
                file_bytes += len(text.encode("utf-8"))
                documents += not is_empty(text)
                file_empty += is_empty(text)
        except NotTextError as error:
            skipped.append(SkippedFile(path, str(error)))
            continue
        counts[path] = documents
        empty += file_empty
        text_bytes += file_bytes
    return Survey(counts, skipped, empty, text_bytes)


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
            for text in read_documents(path, rules):
                if not is_empty(text):
                    documents += 1
                    yield text
        except NotTextError as error:
            raise ValueError(f"{path} changed while it was read: it is {error}") from error
        if documents != expected:
            raise ValueError(f"{path} changed while it was read: {documents} documents instead of {expected}")


def read_documents(path: str, rules: DocumentRules) -> Iterator[str]:
    """The documents of one file, empty ones included.

    Raises:
        NotTextError: the file is not UTF-8 text; documents may have been yielded before.
        ValueError: the file is damaged.
    """
    stem, suffix = os.path.splitext(path)
    bare = stem if suffix in _OPENERS else path
    is_json = rules.input_format == "jsonl" or (rules.input_format == "auto" and bare.endswith(_JSON_LINES))
    try:
        with _open_text(path, suffix) as lines:
            if is_json:
                for text in _json_texts(path, lines, rules.text_key):
                    yield from _group_lines(text.splitlines(keepends=True), None, rules.max_bytes)
            else:
                for text in _group_lines(lines, rules.separator, rules.max_bytes):
                    if "\0" in text:
                        raise NotTextError("not text: it holds NUL characters")
                    yield text
    except UnicodeDecodeError as error:
        raise NotTextError(f"not UTF-8 text ({error.reason})") from error
    except (EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: damaged {suffix} file: {error}") from error


def _open_text(path: str, suffix: str) -> IO[str]:
    opener: Any = _OPENERS.get(suffix, open)
    # newline="" keeps line ends as they are; utf-8-sig drops a byte order mark.
    return opener(path, "rt", encoding="utf-8-sig", newline="")


def _group_lines(lines: Iterable[str], separator: str | None, max_bytes: int | None) -> Iterator[str]:
    """Documents of a stream of lines (with their ends): cut at separators, and before max_bytes would be exceeded."""
    document: list[str] = []
    size = 0
    whole = True
    for line in lines:
        if separator is not None and line.rstrip("\r\n") == separator:
            yield "".join(document)
            document, size, whole = [], 0, False
            continue
        if max_bytes is not None:
            line_size = len(line.encode("utf-8"))
            if document and size + line_size > max_bytes:
                yield "".join(document)
                document, size, whole = [], 0, False
            size += line_size
        document.append(line)
    if document or whole:  # nothing after a last separator is no document, an empty file is an empty one
        yield "".join(document)


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
            keys = sorted(record) if isinstance(record, dict) else type(record).__name__
            raise ValueError(f"{where}: no text under the key {key!r} (text_key); the line has {keys}")
        text: str = record[key]
        if "\\u" in line and any("\ud800" <= character <= "\udfff" for character in text):
            raise ValueError(f"{where}: half of a surrogate pair, which is no text")
        yield text
