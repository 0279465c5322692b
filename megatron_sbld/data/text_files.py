"""Text files that a user gives: how they are opened, what their beginning says they are, and where a byte is wrong.

Text is UTF-8. A byte order mark at the beginning of a file is no part of the text, wherever a file is read. Files whose
names end in .gz or .xz are unpacked.
"""

from __future__ import annotations

import codecs
import gzip
import json
import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any, Literal

_OPENERS: dict[str, Callable[..., IO[Any]]] = {".gz": gzip.open, ".xz": lzma.open}
_HEAD_BYTES = 1 << 16
_CHUNK = 1 << 20  # of a line that is read in parts

_ENCODINGS = (  # by byte order mark; UTF-32's little-endian one begins like UTF-16's
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
_ZSTANDARD = "it is compressed with Zstandard; unpack it (zstd -d), or compress it with gzip or xz"
_OTHER_FILES = (
    (b"\x28\xb5\x2f\xfd", _ZSTANDARD),
    (b"\x1f\x8b", "it is compressed with gzip, which its name does not say; unpack it (gunzip)"),
    (b"\xfd7zXZ\0", "it is compressed with xz, which its name does not say; unpack it (unxz)"),
    (b"BZh", "it is compressed with bzip2; unpack it (bunzip2), or compress it with gzip or xz"),
    (b"\x04\x22\x4d\x18", "it is compressed with LZ4; unpack it (lz4 -d), or compress it with gzip or xz"),
    (b"PK\x03\x04", "it is a zip archive; unpack it"),
    (b"MMIDIDX\0\0", "it is the index of a data set; give the prefix, without .idx"),
    (b"PAR1", "it is a Parquet file; write its texts as JSON lines"),
)
_TAR_MAGIC = slice(257, 262)

JsonShape = Literal["object", "array", "begun"]
"""What a file's first line is: a JSON object, a JSON array, or the beginning of either that is not whole."""


class NotTextError(Exception):
    """A file is not UTF-8 text, or is of a kind that is not read; the message begins with `it` or with a place."""


def ending(path: str) -> str:
    """What a file's name ends in, in lower case, with what it is compressed with: .txt, .json.gz; empty without one."""
    stem, last = os.path.splitext(os.path.basename(path).lower())
    return os.path.splitext(stem)[1] + last if last in _OPENERS else last


def bare_ending(path: str) -> str:
    """What a file's name ends in without .gz and .xz, in lower case."""
    stem, last = os.path.splitext(path.lower())
    return os.path.splitext(stem)[1] if last in _OPENERS else last


def is_compressed(path: str) -> bool:
    """Whether a file's name says that it is to be unpacked."""
    return os.path.splitext(path.lower())[1] in _OPENERS


@contextmanager
def open_text(path: str) -> Iterator[IO[str]]:
    """A file's text, with its line ends as they are.

    Raises:
        NotTextError: it is no UTF-8 text; also in the middle of reading, and then with the place.
        ValueError: it is damaged.
    """
    _check_beginning(path)
    try:
        with _opener(path)(path, "rt", encoding="utf-8-sig", newline="") as lines:
            yield lines
    except UnicodeDecodeError as error:
        raise NotTextError(wrong_byte(path) or f"it is not UTF-8: {error.reason}") from error
    except (EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error) as error:
        raise _damaged(path, error) from error


def read_content(path: str) -> bytes:
    """All bytes of a file, unpacked, which may be a pipe.

    Raises as `open_text`, but not for bytes that are not UTF-8.
    """
    try:
        with _opener(path)(path, "rb") as stream:
            content: bytes = stream.read()
    except (EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error) as error:
        raise _damaged(path, error) from error
    _check_data_set(path)
    check_head(content[:_HEAD_BYTES])
    return content


def read_text(path: str) -> str:
    """The whole text of a file, which may be a pipe. Raises as `open_text` does."""
    content = read_content(path)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise NotTextError(
            f"line {line}, byte offset {error.start}: {content[error.start]:#04x} is not UTF-8"
        ) from error
    return text


def wrong_byte(path: str) -> str | None:
    """Where a file has its first byte that is no UTF-8 text: line, offset and byte. None where there is none."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    line, offset = 1, 0
    unpacked = " of the unpacked text" if is_compressed(path) else ""
    with _opener(path)(path, "rb") as stream:
        while True:
            piece = stream.readline(_CHUNK)
            held = len(decoder.getstate()[0])
            try:
                decoder.decode(piece, final=not piece)
            except UnicodeDecodeError as error:
                at, byte = offset - held + error.start, error.object[error.start]
                return f"line {line}, byte offset {at}{unpacked}: {byte:#04x} is not UTF-8"
            if b"\0" in piece:
                return f"line {line}, byte offset {offset + piece.index(0)}{unpacked}: a NUL character, not text"
            if not piece:
                return None
            offset += len(piece)
            line += piece.endswith(b"\n")


def json_beginning(path: str) -> tuple[JsonShape | None, Any]:
    """What the first line with anything in it is, and its value where it is a whole object or array; None for text.

    Raises as `open_text`.
    """
    with open_text(path) as lines:
        line = lines.readline(_HEAD_BYTES)
        while line and not line.strip():
            line = lines.readline(_HEAD_BYTES)
        if line.lstrip()[:1] not in ("{", "["):
            return None, None
        if not line.endswith(("\n", "\r")):
            line += lines.readline()
    return json_line(line)


def json_line(line: str) -> tuple[JsonShape | None, Any]:
    """`json_beginning` of a line."""
    if line.lstrip()[:1] not in ("{", "["):
        return None, None
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return "begun", None
    return ("object" if isinstance(value, dict) else "array"), value


def refuse_one_value(shape: JsonShape | None) -> None:
    """Refuse a file of JSON that is not one object a line. Raises NotTextError."""
    if shape == "array":
        raise NotTextError("it is one JSON array; JSON lines are needed, an object a line (jq -c '.[]')")
    if shape == "begun":
        raise NotTextError("it is one JSON value over several lines; JSON lines are needed, an object a line (jq -c)")


def check_head(head: bytes) -> None:
    """Refuse a file whose first bytes say that it is no UTF-8 text. Raises NotTextError."""
    for mark, name in _ENCODINGS:
        if head.startswith(mark):
            raise NotTextError(f"it is {name}; UTF-8 is needed (iconv -f {name} -t UTF-8)")
    for magic, reason in _OTHER_FILES:
        if head.startswith(magic):
            raise NotTextError(reason)
    if head[_TAR_MAGIC] == b"ustar":
        raise NotTextError("it is a tar archive; unpack it")
    # Letters of the Latin alphabet have one NUL byte each in UTF-16 and three in UTF-32.
    nul = tuple(len(part := head[at::4]) > 0 and part.count(0) > 0.75 * len(part) for at in range(4))
    for name, patterns in (
        ("UTF-16", ((False, True, False, True), (True, False, True, False))),
        ("UTF-32", ((False, True, True, True), (True, True, True, False))),
    ):
        if nul in patterns:
            raise NotTextError(f"it looks like {name} (NUL characters); UTF-8 is needed (iconv -f {name} -t UTF-8)")


def _opener(path: str) -> Callable[..., IO[Any]]:
    return _OPENERS.get(os.path.splitext(path.lower())[1], open)


def _check_beginning(path: str) -> None:
    if path.lower().endswith((".zst", ".zstd")):
        raise NotTextError(_ZSTANDARD)
    try:
        with _opener(path)(path, "rb") as stream:
            head = stream.read(_HEAD_BYTES)
    except (EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error) as error:
        raise _damaged(path, error) from error
    _check_data_set(path)
    check_head(head)
    if b"\0" in head:
        raise NotTextError(wrong_byte(path) or "it changed while it was read")


def _check_data_set(path: str) -> None:
    """Refuse the tokens of a data set, which may look like text in another encoding."""
    if path.endswith(".bin") and os.path.isfile(f"{path.removesuffix('.bin')}.idx"):
        raise NotTextError("it holds the tokens of a data set; give the prefix, without .bin")


def _damaged(path: str, error: Exception) -> ValueError:
    return ValueError(f"{path}: damaged {os.path.splitext(path)[1]} file: {error}")
