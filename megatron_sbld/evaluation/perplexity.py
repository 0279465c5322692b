"""Perplexity of text in sliding windows: each token once, given what fits before it.

A document is scored apart from the others, its first token given the end-of-document token. Where a document does not
fit, windows overlap: a stride of max_length gives the disjoint windows of lm-evaluation-harness, whose tokens have one
token of context at least; a smaller one gives more context and takes max_length / stride times the computation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_sbld.evaluation.requests import Request, Score
from megatron_sbld.evaluation.statistics import exp_with_stderr, ratio_with_stderr
from megatron_sbld.evaluation.texts import Document


@dataclass(frozen=True)
class PerplexityResult:
    """Figures over all tokens. Standard errors are None for a single window.

    Their clusters are the windows: losses of tokens close to each other go together, and a document alone would have no
    error. Windows of one document are taken for independent, so that the errors say how far the figure depends on the
    passages at hand, not on the choice of books. Words and bytes per token are taken as known.
    """

    loss: float
    """Nats per token."""
    loss_stderr: float | None
    token_perplexity: float
    token_perplexity_stderr: float | None
    word_perplexity: float | None
    """exp of the nats per word; None where the text is not known, as bits_per_byte."""
    word_perplexity_stderr: float | None
    bits_per_byte: float | None
    bits_per_byte_stderr: float | None
    tokens: int
    words: int | None
    bytes: int | None
    documents: int
    windows: int


def resolve_stride(stride: int | None, max_length: int, text_format: str) -> int:
    """The stride to use; None takes max_length for WikiText, by convention, and half of it for all else.

    Half costs twice the computation of disjoint windows, and no token but a document's first ones has less than half of
    the context; further halving gains little more.

    Raises:
        ValueError: the stride is not from 1 to max_length.
    """
    if stride is None:
        return max_length if text_format == "wikitext" else max(1, max_length // 2)
    if not 1 <= stride <= max_length:
        raise ValueError(f"stride = {stride}; allowed: 1 to max_length = {max_length}")
    return stride


def make_windows(documents: Sequence[Document], eod: int, max_length: int, stride: int) -> list[Request]:
    """Requests whose targets are all tokens of all documents, once each and in order.

    The first window of a document scores its first max_length tokens; each of the others scores the `stride` tokens
    that follow (the last one what is left), given as many as fit before them: max_length - stride + 1 or more.

    Args:
        eod: the end-of-document token, which is before each document and never a target.
        max_length: input positions of the model; a window has one token more, the last target.
        stride: 1 to max_length.
    """
    return [window for document in documents for window in _windows(document.tokens, eod, max_length, stride)]


def _windows(tokens: tuple[int, ...], eod: int, max_length: int, stride: int) -> Iterator[Request]:
    sequence = (eod, *tokens)
    scored = 1  # of the sequence, whose first token is no target
    end = min(len(sequence), max_length + 1)
    while scored < len(sequence):
        yield Request(sequence[max(0, end - max_length - 1) : end], end - scored)
        scored, end = end, min(len(sequence), end + stride)


def summarise(documents: Sequence[Document], windows: Sequence[Request], scores: Sequence[Score]) -> PerplexityResult:
    """Figures from the scores of the windows of `documents`, in their order."""
    if len(scores) != len(windows):
        raise ValueError(f"{len(scores)} scores for {len(windows)} windows; each needs one")
    losses = np.array([-score.log_likelihood for score in scores])
    sizes = np.array([window.num_targets for window in windows], dtype=np.float64)
    tokens = int(sizes.sum())
    loss, stderr = ratio_with_stderr(losses, sizes)
    token_perplexity, token_stderr = exp_with_stderr(loss, stderr)
    words = _sum_if_all([document.words for document in documents])
    num_bytes = _sum_if_all([document.num_bytes for document in documents])
    word_perplexity, word_stderr = None, None
    if words:
        word_perplexity, word_stderr = exp_with_stderr(loss * tokens / words, _scaled(stderr, tokens / words))
    bits = tokens / num_bytes / math.log(2) if num_bytes else None
    return PerplexityResult(
        loss=loss,
        loss_stderr=stderr,
        token_perplexity=token_perplexity,
        token_perplexity_stderr=token_stderr,
        word_perplexity=word_perplexity,
        word_perplexity_stderr=word_stderr,
        bits_per_byte=_scaled(loss, bits) if bits else None,
        bits_per_byte_stderr=_scaled(stderr, bits) if bits else None,
        tokens=tokens,
        words=words,
        bytes=num_bytes,
        documents=len(documents),
        windows=len(windows),
    )


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _sum_if_all(values: Sequence[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None
