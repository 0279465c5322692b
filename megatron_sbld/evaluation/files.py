"""Writing files whole, and telling files apart by what they hold."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

_CHUNK_BYTES = 1 << 20


def write_atomically(file: Path, text: str) -> None:
    """Writes a file so that a reader, or a kill, meets the old content or the new one and nothing in between."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file = Path(os.path.realpath(file))  # a link stays one
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", newline="") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, file)
    finally:
        with contextlib.suppress(FileNotFoundError):  # it was moved, or could not be made
            temporary.unlink()


def file_hash(paths: Sequence[str]) -> str:
    """SHA-256 of a file's content; of several files the SHA-256 of their hashes, in order, whatever they are called."""
    hashes = [_hash(path) for path in paths]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def _hash(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
