"""The files of a prepared data set: names, metadata, writing them so that only whole sets appear, and checking them.

`OUT_train.bin/.idx` and `OUT_valid.bin/.idx` are Megatron's indexed data sets; `OUT.json` says what they hold and which
tokenizer wrote them. Data sets written by Megatron-LM's preprocess_data.py have no such metadata and are read as well.
"""

from __future__ import annotations

import codecs
import contextlib
import fcntl
import json
import os
import shutil
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

from megatron_sbld.data.tokenizer import Tokenizer
from megatron_sbld.files.disk import sync

SPLITS = ("train", "valid")
METADATA_FORMAT = "megatron-sbld data set 1"

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, document boundaries
_CHECKED_AT_ONCE = 1 << 20
_SHOWN_BYTES = 4096  # of a file, to see what it is
_INTEGER_CODES = tuple(dtype.value for dtype in DType if not dtype.name.startswith("float"))


def split_prefix(output: str, split: str) -> str:
    """Prefix of one split's .bin and .idx, which is what `train_data_path` takes."""
    return f"{output}_{split}"


def set_files(output: str) -> list[str]:
    """All files of a set, in the order in which they appear: a set without its last file is not whole."""
    prefixes = [split_prefix(output, split) for split in SPLITS]
    return [f"{prefix}.bin" for prefix in prefixes] + [f"{prefix}.idx" for prefix in prefixes] + [f"{output}.json"]


def partial_folder(output: str) -> Path:
    """The hidden folder that a set is written in."""
    folder, name = os.path.split(output)
    return Path(folder or ".") / f".{name}.partial"


def written_files(output: str) -> list[str]:
    """All files that writing a set replaces or removes."""
    names = set_files(output)
    return names + [str(partial_folder(output) / os.path.basename(name)) for name in names]


def is_of_a_set(path: str) -> bool:
    """Whether an existing file, called as one of a set, is one: metadata, an index, or no text beside an index."""
    with open(path, "rb") as stream:
        head = stream.read(_SHOWN_BYTES)
    if path.endswith(".json"):
        return METADATA_FORMAT.encode() in head[: len(METADATA_FORMAT) + 32]
    if path.endswith(".idx"):
        return not head or head.startswith(_MAGIC)
    index = f"{path.removesuffix('.bin')}.idx"
    if not head or b"\0" in head or (os.path.isfile(index) and is_of_a_set(index)):
        return True
    try:  # a process that was killed leaves tokens without an index
        codecs.getincrementaldecoder("utf-8")().decode(head, final=len(head) < _SHOWN_BYTES)
    except UnicodeDecodeError:
        return True
    return False


@dataclass(frozen=True)
class DatasetFacts:
    """What the index of a data set says about it."""

    prefix: str
    dtype: type[np.integer]
    sequences: int
    tokens: int
    lengths_crc32: int
    """Of the sequence lengths: all that sample indices are computed from."""


def verify_dataset(prefix: str) -> DatasetFacts:
    """Check that `prefix`.bin and `prefix`.idx belong together and are whole, without reading the tokens.

    Found: other files under these names, and files cut short or overwritten. Not found: changed tokens.

    Raises:
        ValueError: naming the file, what was expected and what was found.
    """
    idx_path, bin_path = f"{prefix}.idx", f"{prefix}.bin"
    for path in (idx_path, bin_path):
        if not os.path.isfile(path):
            hint = "; give the prefix without .bin or .idx" if prefix.endswith((".bin", ".idx")) else ""
            raise ValueError(f"data set {prefix!r}: {path} does not exist{hint}")
    dtype, sequences, boundaries = _read_header(idx_path)
    header = _HEADER.size
    _expect(idx_path, "bytes", header + 12 * sequences + 8 * boundaries, os.path.getsize(idx_path))
    lengths = np.fromfile(idx_path, np.int32, sequences, offset=header)
    tokens = int(lengths.sum(dtype=np.int64))
    if sequences == 0 or tokens == 0:
        raise ValueError(f"data set {prefix!r} holds no tokens")
    _expect(bin_path, "bytes", tokens * DType.size(dtype), os.path.getsize(bin_path))
    pointers = np.memmap(idx_path, np.int64, "r", header + 4 * sequences, (sequences,))
    documents = np.memmap(idx_path, np.int64, "r", header + 12 * sequences, (boundaries,))
    if lengths.min() < 0 or not _are_positions(pointers, lengths, DType.size(dtype)):
        raise ValueError(f"{idx_path}: damaged: lengths and positions of its sequences contradict each other")
    if boundaries == 0 or documents[0] != 0 or documents[-1] != sequences or (np.diff(documents) < 0).any():
        raise ValueError(f"{idx_path}: damaged: its documents do not cover its {sequences} sequences")
    return DatasetFacts(prefix, dtype, sequences, tokens, zlib.crc32(lengths.tobytes()))


def _are_positions(pointers: np.ndarray, lengths: np.ndarray, token_bytes: int) -> bool:
    """Whether sequences of these lengths lie one after the other at these positions, in bytes."""
    end = 0
    for start in range(0, len(lengths), _CHECKED_AT_ONCE):
        part = slice(start, start + _CHECKED_AT_ONCE)
        ends = end + np.cumsum(lengths[part], dtype=np.int64) * token_bytes
        if not np.array_equal(pointers[part], np.concatenate([[end], ends[:-1]])):
            return False
        end = int(ends[-1])
    return True


def _read_header(idx_path: str) -> tuple[type[np.integer], int, int]:
    with open(idx_path, "rb") as stream:
        header = stream.read(_HEADER.size)
    if len(header) < _HEADER.size or not header.startswith(_MAGIC):
        raise ValueError(f"{idx_path}: not an index of a Megatron data set: it starts with {header[:9]!r}")
    _, version, code, sequences, boundaries = _HEADER.unpack(header)
    _expect(idx_path, "as its version", 1, version)
    if code not in _INTEGER_CODES:
        raise ValueError(f"{idx_path}: unknown type of token ids: expected a code of {_INTEGER_CODES}, found {code}")
    return DType.dtype_from_code(code), sequences, boundaries


def _expect(path: str, what: str, expected: int, found: int) -> None:
    if expected != found:
        raise ValueError(f"{path}: cut short or damaged: expected {expected} {what}, found {found}")


def read_metadata(prefix: str) -> dict[str, Any] | None:
    """What `OUT.json` says about the set that `prefix` = `OUT_train` or `OUT_valid` is a split of; None without one.

    Raises:
        ValueError: the file is ours but damaged.
    """
    output, _, split = prefix.rpartition("_")
    path = Path(f"{output}.json")
    if split not in SPLITS or not path.is_file():
        return None
    with path.open("rb") as stream:
        # Others keep sources of any size under this name: only a file that starts like ours is read.
        if METADATA_FORMAT.encode() not in stream.read(len(METADATA_FORMAT) + 32):
            return None
    try:
        metadata: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: damaged metadata of a data set: {error}") from error
    return metadata


def check_written_with(metadata: dict[str, Any], prefix: str, tokenizer: Tokenizer, *, field: str, whose: str) -> None:
    """Refuse a set that another tokenizer wrote. whose: what the message calls `tokenizer`, as "data.tokenizer =".

    Raises:
        ValueError: it did, or the metadata do not say.
    """
    try:
        written_by, fingerprint = metadata["tokenizer"]["spec"], metadata["tokenizer"]["fingerprint"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{field}: the metadata (.json) of {prefix} lack {error}; prepare it again") from error
    if fingerprint != tokenizer.fingerprint():
        raise ValueError(
            f"{field}: {prefix} was prepared with tokenizer {written_by!r}, which encodes differently from {whose} "
            f"{tokenizer.name!r}"
        )


class DatasetWriter:
    """Writes a set in a hidden folder beside it and moves it into place when it is whole (a context manager).

    Args:
        output: what the files' names start with.
        splits: which of SPLITS to write.
        dtype: of the ids.
        overwrite: whether an existing set may be replaced; it is removed first, its metadata and indices before its
            tokens, so that an old index never stands beside new tokens.

    Raises:
        ValueError: the set exists, or another process is writing it.
        OSError: the disk is full or the folder cannot be written; what was written is removed.
    """

    def __init__(self, output: str, splits: tuple[str, ...], dtype: type[np.integer], overwrite: bool) -> None:
        folder, name = os.path.split(output)
        if not name or os.path.isdir(output):
            raise ValueError(f"output {output!r} is a folder; give a path that the files' names will start with")
        self._output = output
        self._folder = Path(folder or ".")
        self._partial = partial_folder(output)
        existing = [path for path in set_files(output) if os.path.exists(path)]
        for path in existing:
            if not os.path.isfile(path) or not is_of_a_set(path):
                raise ValueError(f"output: {path} exists and is no file of a data set; choose another output")
        if existing and not overwrite:
            raise ValueError(f"output: {existing[0]} exists; choose another output, or overwrite it with overwrite")
        self._splits = splits
        self._dtype = dtype
        self._builders: dict[str, IndexedDatasetBuilder] = {}

    def __enter__(self) -> DatasetWriter:
        with self._disk_errors():
            self._folder.mkdir(parents=True, exist_ok=True)
            leftovers = self._leftovers()
            self._lock = self._lock_partial_folder()
        try:
            with self._disk_errors():
                for leftover in leftovers:
                    leftover.unlink(missing_ok=True)
                for split in self._splits:
                    path = self._partial_path(f"{split_prefix(self._output, split)}.bin")
                    self._builders[split] = IndexedDatasetBuilder(str(path), dtype=self._dtype)
        except OSError as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def _leftovers(self) -> list[Path]:
        """What a killed process left in the folder. Raises ValueError if it is not of a set, and thus another's."""
        if self._partial.is_symlink():
            raise ValueError(f"output: {self._partial} is a link; what is written there is removed, so delete the link")
        found = list(self._partial.iterdir()) if self._partial.is_dir() else []
        names = {os.path.basename(name) for name in set_files(self._output)}
        for path in found:
            if path.name not in names:
                raise ValueError(f"output: {path} would be removed and is no file of a data set; move it elsewhere")
        return found

    def _lock_partial_folder(self) -> int:
        """Lock the folder; what a killed process left in it is free to take, because its lock went with it."""
        existed = self._partial.is_dir()
        self._partial.mkdir(exist_ok=True)
        lock = os.open(self._partial, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if isinstance(error, BlockingIOError) or existed:  # other errors: a file system without locks
                os.close(lock)
                raise ValueError(
                    f"output {self._output!r}: another process is writing it (if none is, delete {self._partial})"
                ) from error
        return lock

    def add(self, split: str, ids: np.ndarray) -> None:
        """Append a document, shape [tokens]."""
        with self._disk_errors():
            self._builders[split].add_document(ids, [len(ids)])

    def commit(self, metadata: dict[str, Any]) -> None:
        """Finish the files and move them into place, the metadata last."""
        with self._disk_errors():
            for split, builder in self._builders.items():
                builder.finalize(str(self._partial_path(f"{split_prefix(self._output, split)}.idx")))
            text = json.dumps({"format": METADATA_FORMAT, **metadata}, indent=2)
            self._partial_path(f"{self._output}.json").write_text(text + "\n", encoding="utf-8")
            for path in self._partial.iterdir():
                sync(path)
            for name in reversed(set_files(self._output)):
                Path(name).unlink(missing_ok=True)
            for name in set_files(self._output):
                if self._partial_path(name).exists():
                    os.replace(self._partial_path(name), name)
            sync(self._folder)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for builder in self._builders.values():
            with contextlib.suppress(OSError):  # a full disk also refuses what the buffer still holds
                builder.data_file.close()
        shutil.rmtree(self._partial, ignore_errors=True)
        os.close(self._lock)

    def _partial_path(self, name: str) -> Path:
        return self._partial / os.path.basename(name)

    @contextlib.contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            message = f"cannot write {self._output}: {error.strerror}; what was written of it is removed"
            raise OSError(error.errno, message) from error
