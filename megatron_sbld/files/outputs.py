"""An output never overwrites an input. Standard library only."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator

StrPath = str | os.PathLike[str]
Identity = tuple[int, int]


def refuse_inputs(field: str, outputs: Iterable[StrPath], inputs: Iterable[StrPath | None]) -> None:
    """Refuse to write files that are read.

    Files are compared by device and inode, so that neither links nor spellings nor file systems that ignore case hide
    an input.

    Args:
        field: what the outputs' names follow from, for the error.
        outputs: files that are going to be written.
        inputs: files, and folders of which every file counts; None and names of nothing are passed over.

    Raises:
        ValueError: naming the output and the input.
    """
    existing = {found: path for path in outputs if (found := file_identity(path)) is not None}
    if not existing:
        return
    for name in inputs:
        for file in () if name is None else _files(name):
            found = file_identity(file)
            if found in existing:
                output, file = os.fspath(existing[found]), os.fspath(file)
                same = "" if output == file else f", the same file as {file}"
                raise ValueError(f"{field}: {output}{same} is an input, and would be overwritten; name another output")


def file_identity(path: StrPath) -> Identity | None:
    """Device and inode of a regular file, behind links; None where there is none."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):  # ValueError: a NUL character in a name
        return None
    return (found.st_dev, found.st_ino) if stat.S_ISREG(found.st_mode) else None


def _files(path: StrPath) -> Iterator[StrPath]:
    if not os.path.isdir(path):
        yield path
    for parent, _, names in os.walk(path):
        for name in names:
            yield os.path.join(parent, name)
