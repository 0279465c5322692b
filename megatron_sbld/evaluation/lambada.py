"""LAMBADA: the last word of a passage, given the passage (Paperno et al. 2016, arXiv:1606.06031; Table 3 of the paper).

A word is right when every one of its tokens is the most likely one; perplexity is that of the whole word. Tokens are
those of lm-evaluation-harness (`_encode_pair`), so that its figures for the same model are equal to these.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_sbld.data.tokenizer import Tokenizer
from megatron_sbld.evaluation.files import write_atomically
from megatron_sbld.evaluation.passages import Passage
from megatron_sbld.evaluation.requests import Request, Score
from megatron_sbld.evaluation.statistics import exp_with_stderr

_CONTEXT_TAIL = 120  # characters of an example's context that are kept for inspection


@dataclass(frozen=True)
class Lambada:
    """Passages and what is to be scored of each."""

    passages: list[Passage]
    requests: list[Request]
    truncated: list[bool]
    """Whether the passage is longer than the model's context, so that its beginning is left out."""


@dataclass(frozen=True)
class LambadaResult:
    """Figures over all passages; standard errors are over passages, None for a single one."""

    accuracy: float
    accuracy_stderr: float | None
    perplexity: float
    """exp of the mean negative log-likelihood of a whole last word, whatever its number of tokens."""
    perplexity_stderr: float | None
    passages: int
    truncated: int
    glued: int
    """Passages whose target begins with a quote or bracket that detokenising put to the last word."""


def encode_passages(passages: Sequence[Passage], tokenizer: Tokenizer, max_length: int) -> Lambada:
    """Tokens of every passage; what exceeds the context is cut from its beginning.

    The targets are what follows, in the tokens of the whole passage, as many as the context has alone.

    Args:
        max_length: input positions of the model. The last target needs none, so that max_length + 1 tokens fit.

    Raises:
        ValueError: there is no passage, or one whose target has no token or more than fit.
    """
    if not passages:
        raise ValueError("there are no passages to score")
    wholes = tokenizer.encode_batch([passage.context + passage.target for passage in passages])
    contexts = tokenizer.encode_batch([passage.context for passage in passages])
    requests, truncated = [], []
    for passage, whole, context in zip(passages, wholes, contexts, strict=True):
        num_targets = len(whole) - len(context)
        if not context or not 0 < num_targets <= max_length:
            raise ValueError(
                f"line {passage.line}: the last word {passage.target.strip()!r} has {num_targets} tokens after "
                f"{len(context)} of context with the tokenizer {tokenizer.name!r}; allowed: 1 to max_length = "
                f"{max_length}, after at least one"
            )
        requests.append(Request(tuple(whole[-(max_length + 1) :]), num_targets))
        truncated.append(len(whole) > max_length + 1)
    return Lambada(list(passages), requests, truncated)


def summarise(lambada: Lambada, scores: Sequence[Score]) -> LambadaResult:
    """Figures from the scores of `lambada.requests`, in their order."""
    if len(scores) != len(lambada.requests):
        raise ValueError(f"{len(scores)} scores for {len(lambada.requests)} requests; each needs one")
    n = len(scores)
    accuracy = sum(score.is_greedy for score in scores) / n
    losses = np.array([-score.log_likelihood for score in scores])
    loss_stderr = float(losses.std(ddof=1)) / math.sqrt(n) if n > 1 else None
    perplexity, perplexity_stderr = exp_with_stderr(float(losses.mean()), loss_stderr)
    return LambadaResult(
        accuracy=accuracy,
        accuracy_stderr=math.sqrt(accuracy * (1 - accuracy) / (n - 1)) if n > 1 else None,
        perplexity=perplexity,
        perplexity_stderr=perplexity_stderr,
        passages=n,
        truncated=sum(lambada.truncated),
        glued=sum(passage.is_glued for passage in lambada.passages),
    )


def write_examples(lambada: Lambada, scores: Sequence[Score], file: Path) -> None:
    """Writes a JSON line for each passage, to look at what a model gets right."""
    lines = []
    for passage, request, truncated, score in zip(
        lambada.passages, lambada.requests, lambada.truncated, scores, strict=True
    ):
        row = {
            "line": passage.line,
            "context_tail": passage.context[-_CONTEXT_TAIL:],
            "target": passage.target,
            "log_likelihood": score.log_likelihood,
            "is_greedy": score.is_greedy,
            "num_target_tokens": request.num_targets,
            "truncated": truncated,
        }
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    write_atomically(file, "".join(lines))
