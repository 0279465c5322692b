"""The options of `megatron-sbld prepare`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from megatron_sbld.data.documents import InputFormat
from megatron_sbld.fields import BelowOne, Count, CountOrZero, Whole

LONGEST_CHARACTER = 4
"""Bytes of a single character in UTF-8, at most."""


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Which text becomes which data set."""

    inputs: list[str]
    """Text files, JSON lines or folders of them (read recursively, without hidden files); .gz and .xz are unpacked.
    What is not UTF-8 text is an error for a file that is named here, and is skipped and reported in folders."""
    output: str
    """What the files' names start with: OUT_train.bin, OUT_train.idx, OUT_valid.bin, OUT_valid.idx and OUT.json."""
    tokenizer: str = "byte"
    """byte, a tokenizer.json, or a folder with vocab.json and merges.txt (or tokenizer.json)."""
    include: list[str] = field(default_factory=lambda: ["*"])
    """Patterns of file names that are read in folders, as '["*.txt", "*.md"]'."""
    input_format: InputFormat = "auto"
    """auto takes .jsonl, .ndjson and .json, and what begins with a JSON object that has text_key, for JSON lines and
    all else for text."""
    text_key: str = "text"
    """JSON lines: the key of the text; every line is a document."""
    document_separator: str | None = "<|endoftext|>"
    """Text files: a line equal to this separates documents; a file without one is one document, and null leaves every
    file whole."""
    max_document_bytes: Annotated[int, Whole(LONGEST_CHARACTER)] | None = None
    """Cut longer documents into documents of at most this size: at line ends, a longer line at white space,
    a longer word between characters; None cuts none."""
    valid_fraction: BelowOne = 0.05
    """Share of the documents that goes to the validation set; 0 writes no validation set."""
    seed: CountOrZero = 1234
    """Seed of the split into train and valid."""
    workers: Count | None = None
    """Processes that tokenize; None is one for each processor that this process may use."""
    overwrite: bool = False
    """Replace an existing set of this name."""
    quiet: bool = False
    """No progress bar (there is none either where the output is no terminal)."""
