"""Texts for perplexity: documents out of text files, JSON lines, WikiText and prepared data sets, as tokens.

Words and bytes are those of the text as it is in the file. Everything is read before scoring starts; a file that cannot
be read whole is refused.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from megatron_sbld.checks import check_choice
from megatron_sbld.config.sections import TextFormat
from megatron_sbld.data.documents import (
    DocumentRules,
    FileKind,
    file_kind,
    find_files,
    is_empty,
    kind_lines,
    read_documents,
)
from megatron_sbld.data.text_files import NotTextError
from megatron_sbld.data.tokenizer import Tokenizer
from megatron_sbld.evaluation import wikitext


@dataclass(frozen=True)
class Document:
    """A text to score."""

    tokens: tuple[int, ...]
    """Without an end-of-document token; never empty."""
    words: int | None
    """Separated by white space; None where the text is not known, as num_bytes."""
    num_bytes: int | None
    """Of the text as UTF-8."""


@dataclass(frozen=True)
class Texts:
    """Documents to score, and where they are from."""

    documents: list[Document]
    text_format: Literal["text", "wikitext", "dataset"]
    """text stands for files of text and of JSON lines alike, which one folder may hold."""
    files: list[str]
    """All files that were read, in order."""
    kinds: list[str] = field(default_factory=list)
    """For the console: what was taken for what, where there was a choice."""


def read_texts(
    inputs: Sequence[str],
    tokenizer: Tokenizer,
    text_format: TextFormat = "auto",
    *,
    text_key: str = "text",
    separator: str | None = None,
) -> Texts:
    """All documents of files, folders or data sets, encoded.

    Args:
        inputs: files and folders, or prefixes of data sets (what stands before .bin and .idx).
        tokenizer: of the model.
        text_format: auto takes an input with an .idx for a data set, and files for JSON lines or text as
            `documents.file_kind` finds them; WikiText has to be asked for.
        text_key: JSON lines: the key of the text.
        separator: text: a line equal to this ends a document; None makes every file one.

    Raises:
        ValueError: an input does not exist, is damaged or no text, holds nothing, or was prepared with another
            tokenizer.
    """
    check_choice("format", text_format, get_args(TextFormat))
    if not inputs:
        raise ValueError("data: at least one file, folder or data set is needed")
    if text_format == "auto" and _all_datasets(inputs):
        text_format = "dataset"
    _refuse_ignored(text_format, text_key, separator)
    if text_format == "dataset":
        texts = _read_datasets(inputs, tokenizer)
    elif text_format == "wikitext":
        texts = _read_wikitext(inputs, tokenizer)
    else:
        rules = DocumentRules(input_format=text_format, text_key=text_key, separator=separator)
        files = find_files(inputs, ["*"]).files
        kinds = {file: _kind(file, rules) for file in files}
        raw = [text for file in files for text in _read(file, rules) if not is_empty(text)]
        counted = [(text, len(text.split()), text) for text in raw]
        texts = Texts(_encode(counted, tokenizer), "text", files, kind_lines(kinds))
    if not texts.documents:
        raise ValueError(f"data: {', '.join(inputs)}: there is no text in it")
    return texts


def _refuse_ignored(text_format: str, text_key: str, separator: str | None) -> None:
    """Raises ValueError for a rule that the format has no use for."""
    if separator is not None and text_format in ("dataset", "wikitext", "jsonl"):
        raise ValueError(f"separator = {separator!r} has no effect with format = {text_format}")
    if text_key != "text" and text_format in ("dataset", "wikitext", "text"):
        raise ValueError(f"text_key = {text_key!r} has no effect with format = {text_format}")


def _kind(file: str, rules: DocumentRules) -> FileKind:
    try:
        return file_kind(file, rules)
    except NotTextError as error:
        raise ValueError(f"{file}: {error}") from error


def _read(file: str, rules: DocumentRules) -> Iterator[str]:
    try:
        yield from read_documents(file, rules)
    except NotTextError as error:
        raise ValueError(f"{file}: {error}") from error


def _encode(counted: Sequence[tuple[str, int, str]], tokenizer: Tokenizer) -> list[Document]:
    """Documents of (text to score, words, text as it is in the file)."""
    documents = []
    ids = tokenizer.encode_batch([text for text, _, _ in counted])
    for tokens, (_, words, original) in zip(ids, counted, strict=True):
        if tokens:
            documents.append(Document(tuple(tokens), words, len(original.encode("utf-8"))))
    return documents


def _read_wikitext(inputs: Sequence[str], tokenizer: Tokenizer) -> Texts:
    files = find_files(inputs, ["*"]).files
    counted = []
    for file in files:
        for text in _read(file, DocumentRules(input_format="text")):
            for article in wikitext.articles(text):
                counted.append((wikitext.detokenise(article), wikitext.count_words(article), article))
    return Texts(_encode(counted, tokenizer), "wikitext", files)


def _all_datasets(inputs: Sequence[str]) -> bool:
    for name in inputs:
        if not Path(name).exists() and Path(f"{name}_train.idx").is_file():
            raise ValueError(f"data: {name} is a whole set; give one of its splits, {name}_valid or {name}_train")
    found = [Path(f"{name}.idx").is_file() for name in inputs]
    if any(found) and not all(found):
        raise ValueError(
            f"data: {', '.join(inputs)}: some are prefixes of data sets and some are not; give one kind at a time"
        )
    return all(found)


def _read_datasets(inputs: Sequence[str], tokenizer: Tokenizer) -> Texts:
    documents = []
    for prefix in inputs:
        documents += [_document(ids, tokenizer) for ids in _dataset_documents(prefix, tokenizer) if len(ids)]
    return Texts(documents, "dataset", [f"{prefix}{end}" for prefix in inputs for end in (".bin", ".idx")])


def _dataset_documents(prefix: str, tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """Ids of each document without the end-of-document token that closes it."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset  # imports torch, which texts do not need

    from megatron_sbld.data.dataset_files import check_written_with, read_metadata, verify_dataset

    verify_dataset(prefix)
    metadata = read_metadata(prefix)
    if metadata is not None:  # Megatron-LM's sets have none; their ids alone are looked at
        check_written_with(metadata, prefix, tokenizer, field="data", whose="the model's,")
    dataset = IndexedDataset(prefix)
    boundaries = dataset.document_indices
    for first, last in itertools.pairwise(boundaries):
        ids = np.concatenate([dataset[number] for number in range(first, last)]) if last > first else np.empty(0, int)
        if len(ids) and not 0 <= ids.min() <= ids.max() < tokenizer.vocab_size:
            raise ValueError(
                f"data: {prefix} has the id {int(ids.max())}; the model's tokenizer {tokenizer.name!r} has ids 0 to "
                f"{tokenizer.vocab_size - 1}"
            )
        yield ids[:-1] if len(ids) and ids[-1] == tokenizer.eod else ids


def _document(ids: np.ndarray, tokenizer: Tokenizer) -> Document:
    """Words and bytes are known where the ids are those of a text, which Megatron's data sets need not be."""
    tokens = ids.tolist()
    text = tokenizer.decode(tokens)
    is_text = tokenizer.encode(text) == tokens
    return Document(tuple(tokens), len(text.split()) if is_text else None, len(text.encode()) if is_text else None)
