"""Checkpoints as files: names, completeness, and what a checkpoint says of itself. Knows nothing of torch or Megatron.

    checkpoints/
        latest_checkpointed_iteration.txt     where Megatron-LM looks; written last, never trusted here
        iter_0000100/                         a checkpoint in Megatron's torch_dist format, and checkpoint.json
        iter_0000200.incomplete/              one that is being written or removed

A checkpoint is written into its `.incomplete` folder and renamed when every rank's files are on disk. `checkpoint.json`
(the manifest) is written before the renaming and lists every file with its size, so that a file that is lost or cut
short afterwards is noticed as well. The small files have checksums too: unpickling a damaged one can take all memory
before it fails. The shards, which hold the tensors, have none.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_sbld.files.disk import sync

logger = logging.getLogger(__name__)

MANIFEST = "checkpoint.json"
TRACKER = "latest_checkpointed_iteration.txt"
FORMAT = "megatron-sbld checkpoint"
FORMAT_VERSION = 1
_INCOMPLETE = ".incomplete"
_SHARD = ".distcp"
_NAME = re.compile(r"iter_(\d{7,})")


@dataclass(frozen=True)
class CheckpointInfo:
    """A complete checkpoint: its folder, and the iterations that were done when it was saved."""

    path: Path
    iteration: int


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How the saving processes divided model and optimizer state; decides who can load it."""

    tensor_model_parallel_size: int
    pipeline_model_parallel_size: int
    num_virtual_stages_per_pipeline_rank: int
    """1 is the plain schedule."""
    context_parallel_size: int
    data_parallel_size: int
    optimizer_format: str
    """not_distributed, dp_reshardable or fully_reshardable."""
    optimizer_buckets: list[list[int]]
    """dp_reshardable: elements of the first rank's gradient buckets, by buffer, without padding; else empty."""
    precision: str
    """fp32, bf16 or fp16."""
    pipeline_model_parallel_layout: str | None = None
    """Which layers each stage holds (placement.py); None where each has as many, as in checkpoints that lack it."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of checkpoint.json."""

    iteration: int
    layout: Layout
    train_state: dict[str, Any]
    files: dict[str, int]
    """Sizes in bytes by name."""
    sha256: dict[str, str]
    """Checksums by name of the files that are not shards; older checkpoints have none."""


def checkpoint_path(directory: Path, iteration: int) -> Path:
    """Folder of the checkpoint of an iteration, named as Megatron-LM names it."""
    return directory / f"iter_{iteration:07d}"


def incomplete_path(directory: Path, iteration: int) -> Path:
    """Folder in which the checkpoint of an iteration is written."""
    return directory / f"iter_{iteration:07d}{_INCOMPLETE}"


def encode_train_state(train_state: dict[str, Any]) -> dict[str, Any]:
    """The train state as reading it back will give it: tuples become lists, keys strings.

    Raises:
        ValueError: it holds something that JSON has no notation for.
    """
    try:
        return json.loads(json.dumps(train_state))
    except TypeError as error:
        raise ValueError(f"train_state must be JSON-able (numbers, strings, lists, dicts): {error}") from error


def publish(directory: Path, iteration: int, layout: Layout, train_state: dict[str, Any]) -> CheckpointInfo:
    """Make a fully written `.incomplete` folder a checkpoint: manifest, then renaming, then Megatron-LM's tracker.

    With the renaming the checkpoint is complete. What fails after it is warned about, because nothing is lost.
    """
    folder, final = incomplete_path(directory, iteration), checkpoint_path(directory, iteration)
    present = sorted(folder.iterdir())
    content = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "iteration": iteration,
        "layout": asdict(layout),
        "files": {file.name: file.stat().st_size for file in present},
        "sha256": {file.name: _sha256(file) for file in present if file.suffix != _SHARD},
        "train_state": train_state,
    }
    (folder / MANIFEST).write_text(json.dumps(content, indent=1))
    for file in folder.iterdir():
        sync(file)
    sync(folder)
    remove(final)  # a damaged one of the same iteration; a complete one is never written again
    folder.rename(final)
    try:
        sync(directory)
    except OSError as error:
        logger.warning("checkpoint %s is complete, but may be lost with a loss of power: %s", final, error)
    try:
        _write_tracker(directory, iteration)
    except OSError as error:
        logger.warning(
            "checkpoint %s is complete, but %s could not be written: Megatron-LM does not find this checkpoint by "
            "itself, megatron-sbld does (%s)",
            final,
            TRACKER,
            error,
        )
    return CheckpointInfo(final, iteration)


def _write_tracker(directory: Path, iteration: int) -> None:
    tracker = directory / f"{TRACKER}.tmp"
    tracker.write_text(str(iteration))
    tracker.replace(directory / TRACKER)


def verify(path: Path) -> Manifest:
    """The manifest of a complete checkpoint.

    Raises:
        ValueError: it is none, or a file is missing or is not what it was when it was saved.
    """
    manifest = _read_manifest(path)
    for name, expected in manifest.files.items():
        try:
            found = (path / name).stat().st_size
        except FileNotFoundError:
            raise ValueError(f"checkpoint {path}: {name} is missing ({expected} bytes when it was saved)") from None
        except OSError as error:
            raise ValueError(f"checkpoint {path}: {name} cannot be read: {error}") from error
        if found != expected:
            raise ValueError(f"checkpoint {path}: {name} has {found} bytes, but had {expected} when it was saved")
    for name, digest in manifest.sha256.items():
        try:
            changed = _sha256(path / name) != digest
        except OSError as error:
            raise ValueError(f"checkpoint {path}: {name} cannot be read: {error}") from error
        if changed:
            raise ValueError(f"checkpoint {path}: {name} is damaged: its content is not what was saved")
    return manifest


def verify_weights(path: Path) -> None:
    """Check what can be checked of a checkpoint in the torch_dist format: ours in full, another by the files it needs.

    Raises:
        ValueError: it is none, or a file is missing or has another size than when it was saved.
    """
    if (path / MANIFEST).exists():
        verify(path)
        return
    missing = [name for name in ("metadata.json", ".metadata") if not (path / name).is_file()]
    if missing:
        raise ValueError(
            f"checkpoint {path}: not a checkpoint in Megatron's torch_dist format (no {', '.join(missing)})"
        )


def read_train_state(path: Path) -> dict[str, Any]:
    """The train state that was saved with a complete checkpoint. Raises ValueError as `verify` does."""
    return verify(path).train_state


def latest_complete(directory: Path) -> CheckpointInfo | None:
    """The complete checkpoint of the highest iteration, or None; a damaged one is skipped with a warning."""
    for candidate in _candidates(directory):
        if is_complete(candidate.path):
            return candidate
    return None


def all_complete(directory: Path) -> list[CheckpointInfo]:
    """The complete checkpoints of a folder by iteration; damaged ones are skipped with a warning."""
    return [found for found in reversed(_candidates(directory)) if is_complete(found.path)]


def is_complete(path: Path) -> bool:
    """Whether a folder is a complete checkpoint; a damaged one is warned about."""
    if not path.exists():
        return False
    try:
        verify(path)
    except ValueError as error:
        logger.warning("skipping a checkpoint that is not complete: %s", error)
        return False
    return True


def find_checkpoint(path: Path) -> CheckpointInfo:
    """The checkpoint that a user means by a path: itself, or the latest in a folder of checkpoints or a run folder.

    Raises:
        ValueError: there is none, or it is not complete.
    """
    if (path / MANIFEST).exists():
        return CheckpointInfo(path, verify(path).iteration)
    for directory in (path, path / "checkpoints"):
        latest = latest_complete(directory)
        if latest is not None:
            return latest
    raise ValueError(
        f"checkpoint {path}: not a checkpoint of megatron-sbld (no {MANIFEST}), nor a folder that holds a complete one"
    )


def remove_incomplete(directory: Path) -> None:
    """Remove what an interrupted save or removal left behind."""
    for folder in directory.glob(f"iter_*{_INCOMPLETE}"):
        logger.info("removing %s, left by an interrupted save", folder)
        try:
            remove(folder)
        except OSError as error:  # no reason not to train; it matters when that iteration is saved again
            logger.warning("cannot remove %s: %s", folder, error)


def remove(path: Path) -> None:
    """Remove a folder or file, if there is one. Of a symbolic link the link goes, and what it points to stays."""
    if path.is_symlink():
        logger.info("%s is a symbolic link: it is removed, %s stays", path, os.path.realpath(path))
        path.unlink()
    elif path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def prune(directory: Path, keep_last: int, newest: CheckpointInfo) -> None:
    """Remove complete checkpoints beyond `keep_last`: `newest` stays, then those of the highest iterations.

    Damaged ones do not count and are left for the user to look at.
    """
    others = [found for found in _candidates(directory) if found.path != newest.path and is_complete(found.path)]
    for old in others[keep_last - 1 :]:
        # Renamed first, so that a removal that is interrupted does not leave a damaged checkpoint.
        leaving = incomplete_path(directory, old.iteration)
        try:
            if old.path.is_symlink():  # renamed, it would point to a complete checkpoint by the name of a broken one
                remove(old.path)
                continue
            old.path.rename(leaving)
            remove(leaving)
        except OSError as error:
            logger.warning("cannot remove an old checkpoint: %s", error)


def _candidates(directory: Path) -> list[CheckpointInfo]:
    """Folders named as checkpoints, highest iteration first."""
    if not directory.is_dir():
        return []
    found = []
    for folder in directory.iterdir():
        match = _NAME.fullmatch(folder.name)
        if match and folder.is_dir():
            found.append(CheckpointInfo(folder, int(match[1])))
        elif match and folder.is_symlink():
            logger.warning("skipping checkpoint %s: it points to %s, where no folder is", folder, os.readlink(folder))
    return sorted(found, key=lambda info: info.iteration, reverse=True)


def _read_manifest(path: Path) -> Manifest:
    if not path.is_dir():
        raise ValueError(f"checkpoint {path}: no such folder")
    try:
        content = json.loads((path / MANIFEST).read_text())
    except FileNotFoundError:
        raise ValueError(f"checkpoint {path}: not a checkpoint of megatron-sbld (no {MANIFEST})") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"checkpoint {path}: {MANIFEST} cannot be read: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"checkpoint {path}: {MANIFEST} does not begin with format {FORMAT!r}")
    version = content.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(f"checkpoint {path}: format_version is {version!r}; only {FORMAT_VERSION} can be read")
    try:
        return Manifest(
            iteration=int(content["iteration"]),
            layout=Layout(**content["layout"]),
            train_state=dict(content["train_state"]),
            files={str(name): int(size) for name, size in content["files"].items()},
            sha256={str(name): str(digest) for name, digest in content.get("sha256", {}).items()},
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"checkpoint {path}: {MANIFEST} is malformed: {error!r}") from error


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
