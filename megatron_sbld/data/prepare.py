"""`megatron-sbld prepare`: text to tokenized data sets in Megatron's .bin/.idx format, split into train and valid.

Files are read twice: first to count documents and find what is not text, so that mistakes show before any work is
done, then to tokenize them in several processes. The result depends on the inputs and the config, not on the number
of processes; memory depends on the longest document, not on the size of the corpus.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
from megatron.core.datasets.indexed_dataset import DType
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from megatron_sbld.data.dataset_files import (
    SPLITS,
    DatasetWriter,
    set_files,
    split_prefix,
    verify_dataset,
    written_files,
)
from megatron_sbld.data.documents import (
    DocumentRules,
    SkippedFile,
    Survey,
    find_files,
    kind_lines,
    survey,
    surveyed_documents,
)
from megatron_sbld.data.encode import encode_documents
from megatron_sbld.data.prepare_config import LONGEST_CHARACTER, PrepareConfig
from megatron_sbld.data.tokenizer import Tokenizer, load_tokenizer
from megatron_sbld.fields import check_fields
from megatron_sbld.files.outputs import refuse_inputs

__all__ = ["PrepareConfig", "PrepareResult", "SplitCounts", "prepare", "verify_dataset"]

_PROGRESS_SECONDS = 0.2
_LISTED_SKIPS = 5  # skipped files named in the summary; all are in the metadata
_EXAMPLE_BYTES = 65536


@dataclass(frozen=True)
class SplitCounts:
    """Size of one split. Tokens count one end-of-document token for each document, which has no bytes of text."""

    prefix: str
    documents: int
    tokens: int
    text_bytes: int


@dataclass(frozen=True)
class PrepareResult:
    """What was written, and what was left out."""

    splits: dict[str, SplitCounts]
    """By name: train, and valid unless valid_fraction is 0."""
    files: int
    kinds: list[str]
    """A line for each kind of file: what was taken for what."""
    skipped: list[SkippedFile]
    empty_documents: int
    seconds: float

    def summary(self) -> str:
        """A few lines for the console."""
        lines = [
            f"{counts.prefix}: {counts.documents:,} documents, {counts.tokens:,} tokens, {counts.text_bytes:,} bytes"
            for counts in self.splits.values()
        ]
        tokens = sum(counts.tokens for counts in self.splits.values())
        lines += self.kinds
        lines.append(f"{self.files:,} files in {self.seconds:.1f} s, {tokens / self.seconds:,.0f} tokens/s")
        if self.empty_documents:
            lines.append(f"{self.empty_documents:,} empty documents left out")
        lines += _skip_lines(self.skipped, "all listed in the .json file")
        return _printable("\n".join(lines))


def prepare(config: PrepareConfig) -> PrepareResult:
    """Write the data sets that `config` asks for. An interrupted or failed run leaves nothing that looks like a set.

    Raises:
        ValueError: a mistake in the config or the inputs; nothing was written.
        OSError: a file cannot be read, or the disk is full.
        ChildProcessError: a worker process was killed.
    """
    started = time.monotonic()
    _check(config)
    tokenizer = load_tokenizer(config.tokenizer)
    dtype = DType.optimal_dtype(tokenizer.vocab_size)
    splits = SPLITS if config.valid_fraction > 0 else SPLITS[:1]
    writer = DatasetWriter(config.output, splits, dtype, config.overwrite)
    rules = DocumentRules(
        input_format=config.input_format,
        text_key=config.text_key,
        separator=config.document_separator,
        max_bytes=config.max_document_bytes,
    )
    files, repeated, named = find_files(config.inputs, config.include, exclude=set_files(config.output))
    refuse_inputs("output", written_files(config.output), [*files, config.tokenizer])
    with _spinner(f"reading {len(files):,} files", config.quiet):
        found = survey(files, rules, named)
    found = dataclasses.replace(found, skipped=repeated + found.skipped)
    _check_documents(config, found)
    is_valid = split_documents(found.documents, config.valid_fraction, config.seed)
    workers = config.workers or len(os.sched_getaffinity(0))
    counts = {split: SplitCounts(split_prefix(config.output, split), 0, 0, 0) for split in splits}
    encoding = closing(encode_documents(surveyed_documents(found, rules), tokenizer, dtype, workers))
    with writer, encoding as encoded, _progress(found, config.quiet) as report:
        for document, goes_to_valid in zip(encoded, is_valid.tolist(), strict=True):
            split = SPLITS[goes_to_valid]
            writer.add(split, document.ids)
            counts[split] = _count(counts[split], len(document.ids), document.text_bytes)
            report(len(document.ids), document.text_bytes)
        writer.commit(_metadata(config, tokenizer, dtype, found, counts))
    seconds = time.monotonic() - started
    return PrepareResult(
        counts, len(found.files), kind_lines(found.kinds), found.skipped, found.empty_documents, seconds
    )


def split_documents(documents: int, valid_fraction: float, seed: int) -> np.ndarray:
    """Which documents go to the validation set, bool [documents]; both sets get at least one.

    A document's number is drawn from (seed, its index) alone, so documents added at the end move no other.
    """
    if valid_fraction == 0:
        return np.zeros(documents, dtype=bool)
    assert documents > 1, "a single document is refused before"
    # Only the raw stream of a bit generator is promised to stay the same in later versions of NumPy.
    draws = (np.random.Philox(key=seed).random_raw(documents) >> np.uint64(11)) * 2.0**-53
    is_valid = draws < valid_fraction
    if not is_valid.any():
        is_valid[draws.argmin()] = True
    if is_valid.all():
        is_valid[draws.argmax()] = False
    return is_valid


def _check(config: PrepareConfig) -> None:
    if not config.inputs:
        raise ValueError("inputs: at least one file or folder is needed")
    check_fields(config)
    if config.input_format == "text" and config.text_key != "text":
        raise ValueError(f"text_key = {config.text_key!r} has no effect with input_format = text")


def _check_documents(config: PrepareConfig, found: Survey) -> None:
    """Refuse inputs without a document, or with a single one where two sets are asked for."""
    if not found.documents:
        reasons = [f"{found.empty_documents:,} empty documents"] if found.empty_documents else []
        reasons += _skip_lines(found.skipped, "")
        raise ValueError(_printable("\n".join(["inputs: no document with text in them", *reasons])))
    if found.documents > 1 or config.valid_fraction == 0:
        return
    advice = ["write no validation set (valid_fraction = 0)", "add documents"]
    if "text" in found.kinds.values():
        advice.insert(0, "name the line that separates documents (document_separator)")
    smaller = min(_EXAMPLE_BYTES, found.text_bytes // 2)
    if smaller >= LONGEST_CHARACTER:
        advice.insert(0, f"cut it into pieces (max_document_bytes, for instance {smaller})")
    raise ValueError(
        f"inputs: a single document of {found.text_bytes:,} bytes cannot be split into train and valid "
        f"(valid_fraction = {config.valid_fraction}): {', '.join(advice[:-1])}, or {advice[-1]}"
    )


def _skip_lines(skipped: list[SkippedFile], rest: str) -> list[str]:
    """How many files were skipped and why, for the console; `rest` says where those that are not shown are named."""
    if not skipped:
        return []
    lines = [f"{len(skipped):,} files skipped:"]
    lines += [f"  {skip.path}: {skip.reason}" for skip in skipped[:_LISTED_SKIPS]]
    if len(skipped) > _LISTED_SKIPS:
        lines.append(f"  ... and {len(skipped) - _LISTED_SKIPS:,} more" + (f", {rest}" if rest else ""))
    return lines


def _printable(text: str) -> str:
    """Names of files may be no UTF-8."""
    return text.encode("utf-8", errors="replace").decode("utf-8")


def _count(counts: SplitCounts, tokens: int, text_bytes: int) -> SplitCounts:
    return SplitCounts(counts.prefix, counts.documents + 1, counts.tokens + tokens, counts.text_bytes + text_bytes)


def _metadata(
    config: PrepareConfig,
    tokenizer: Tokenizer,
    dtype: type[np.integer],
    found: Survey,
    counts: dict[str, SplitCounts],
) -> dict[str, object]:
    sizes = {split: dataclasses.asdict(split_counts) for split, split_counts in counts.items()}
    for size in sizes.values():
        del size["prefix"]  # the set may be moved
    return {
        "tokenizer": {
            "spec": config.tokenizer,
            "fingerprint": tokenizer.fingerprint(),
            "vocab_size": tokenizer.vocab_size,
            "eod": tokenizer.eod,
        },
        "dtype": dtype.__name__,
        "splits": sizes,
        "inputs": config.inputs,
        "include": config.include,
        "files": len(found.files),
        "kinds": kind_lines(found.kinds),
        "skipped": [dataclasses.asdict(skip) for skip in found.skipped],
        "empty_documents": found.empty_documents,
        "document_separator": config.document_separator,
        "max_document_bytes": config.max_document_bytes,
        "valid_fraction": config.valid_fraction,
        "seed": config.seed,
    }


class _Report:
    """Adds up tokens and bytes, and shows them a few times a second: drawing costs more than a short document."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task = progress, task
        self._documents = self._tokens = self._bytes = 0
        self._started = self._shown = time.monotonic()

    def __call__(self, tokens: int, text_bytes: int) -> None:
        self._documents += 1
        self._tokens += tokens
        self._bytes += text_bytes
        now = time.monotonic()
        if now - self._shown >= _PROGRESS_SECONDS:
            self._shown = now
            speed = f"{self._documents:,} documents, {self._tokens / (now - self._started):,.0f} tokens/s"
            self._progress.update(self._task, completed=self._bytes, speed=speed)


def _spinner(text: str, quiet: bool) -> AbstractContextManager[object]:
    console = Console(stderr=True)
    return console.status(text) if console.is_terminal and not quiet else nullcontext()


@contextmanager
def _progress(found: Survey, quiet: bool) -> Iterator[_Report]:
    console = Console(stderr=True)
    columns = (
        TextColumn("tokenizing"),
        BarColumn(),
        DownloadColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal) as progress:
        yield _Report(progress, progress.add_task("", total=found.text_bytes, speed=""))
