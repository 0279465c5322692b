"""random-LTD: how many tokens of a sample a layer runs, and which (docs/method.md section 5).

`TokenDrop` is r(t) with what goes with it; `draw_tokens` says which r of the s tokens, and is the specification of what
mcore/skip/token_draws.py computes on the device. Tokens count from 0, in the order of the sequence; layers from 1.

The counter of the random numbers (method/decisions.py) is (iteration, sample, token // 4, layer << 8 | stream), whose
four words are those of four tokens. The sample is the one's number in the global batch, so that neither the layout nor
the size of a microbatch changes a draw. A token's key is its word, with its number below, so that no two are equal: the
r smallest keys are kept.

The strata are equal parts of the sequence, of each of which as many tokens are drawn. So a rank that holds some of them
(sequence or context parallelism) knows without asking how many tokens it keeps, always as many as the others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from megatron_sbld.checks import check_choice, check_integer, check_layers
from megatron_sbld.method.choices import Granularity
from megatron_sbld.method.decisions import MAX_SAMPLES, MAX_SEED, philox4x32

TOKENS_STREAM = 4
"""In the counter's last word, beside the streams of decisions.py."""
LAYER_SHIFT = 8
TOKEN_BITS = 31
"""Bits of a key that hold the token's number; with the random word above them it stays a positive int64."""


@dataclass(frozen=True, kw_only=True)
class TokenDrop:
    """r(t) = floor(r_min + t / T_r * (s - r_min)), rounded down to a multiple of step, then min(r, s).

    GPT-3 1.3B in DeepSpeed:

    >>> ltd = TokenDrop(seq_length=2048, layers=(2, 3), min_tokens=128, step=16, iterations=200_000)
    >>> [ltd.tokens(t) for t in (0, 1667, 50_000, 100_000, 199_999, 200_000)]
    [128, 144, 608, 1088, 2032, 2048]

    Raises ValueError for numbers that do not fit each other.
    """

    seq_length: int
    """s."""
    layers: tuple[int, ...]
    """Layers (1-based) that drop tokens; the others run all."""
    min_tokens: int
    """r_min."""
    step: int
    iterations: int
    """T_r, from which on all tokens are kept."""
    table: tuple[tuple[int, int], ...] = ()
    """In place of r(t): (last iteration, tokens), ...; after the last one all tokens are kept."""
    strata: int = 1

    def __post_init__(self) -> None:
        s, step = self.seq_length, self.step
        check_integer("seq_length", s, 1, 2**TOKEN_BITS - 1)
        check_integer("token_step", step, 1)
        check_integer("token_iterations", self.iterations, 1)
        check_integer("token_strata", self.strata, 1)
        for name, tokens in (("min_tokens", self.min_tokens), *(("token_steps entry", r) for _, r in self.table)):
            check_integer(name, tokens, 1, s)
            if tokens % step and tokens != s:
                raise ValueError(f"{name} = {tokens} is not allowed: it must be a multiple of token_step {step}")
        if step % self.strata or s % self.strata:
            raise ValueError(
                f"token_strata = {self.strata} is not allowed: it must divide token_step {step} and the {s} tokens of "
                "a sample"
            )

    def tokens(self, iteration: int) -> int:
        """r(t): how many tokens of a sample each of `layers` runs."""
        if self.table:
            return next((tokens for last, tokens in self.table if iteration <= last), self.seq_length)
        grown = self.min_tokens + iteration * (self.seq_length - self.min_tokens) // self.iterations
        return min(grown - grown % self.step, self.seq_length)

    def shares(self, iteration: int, num_layers: int) -> NDArray[np.float64]:
        """r(t) / s of `layers`, 1 of the others, [L]."""
        shares = np.ones(num_layers)
        shares[np.array(self.layers, dtype=int) - 1] = self.tokens(iteration) / self.seq_length
        return shares


def token_layers(layers: Sequence[int] | None, num_layers: int) -> tuple[int, ...]:
    """The layers that drop tokens: those given, or all but the first and the last. Raises ValueError for none."""
    chosen = check_layers("token_layers", range(2, num_layers) if layers is None else layers, num_layers)
    if not chosen:
        raise ValueError(
            f"token_layers = {layers} is not allowed: none of the {num_layers} layers would drop tokens"
            + (", since the first and the last do not by default" if layers is None else "")
        )
    return chosen


def check_granularity(granularity: str, num_samples: int | None, tokens: TokenDrop | None, num_layers: int) -> None:
    """Refuse what a granularity does not use, or the lack of what it needs. Raises ValueError."""
    check_choice("granularity", granularity, get_args(Granularity))
    for name, value, owner in (("num_samples", num_samples, "sample"), ("tokens", tokens, "token")):
        if value is not None and granularity != owner:
            raise ValueError(f"{name} = {value} is used by granularity {owner!r} only, got granularity {granularity!r}")
    if granularity == "sample":
        check_integer("num_samples", num_samples, 1, MAX_SAMPLES)
    if granularity == "token":
        if not isinstance(tokens, TokenDrop):
            raise ValueError(f"tokens = {tokens!r} is not allowed with granularity 'token': it must be a TokenDrop")
        token_layers(tokens.layers, num_layers)


def strata_of_layout(sequence_ranks: int, context_ranks: int) -> int:
    """The number of strata of which each rank holds some whole ones, as many as every other rank.

    sequence_ranks: over which sequence parallelism splits what a context-parallel rank holds (1 without it).
    context_ranks: of which each holds one chunk of the first half and its mirror image in the second, of 2 * ranks.
    """
    if context_ranks == 1:
        return sequence_ranks
    return context_ranks * math.lcm(2, sequence_ranks)


def strata_needed(layout: Any) -> int:
    """The number of strata that a layout needs, or a multiple of it.

    layout: has Megatron's tensor_model_parallel_size, sequence_parallel and context_parallel_size, as a config's
    parallel section, Megatron-LM's arguments and a TransformerConfig do.
    """
    sequence_ranks = layout.tensor_model_parallel_size if layout.sequence_parallel else 1
    return strata_of_layout(sequence_ranks, layout.context_parallel_size)


def draw_tokens(
    seq_length: int,
    num_tokens: int,
    strata: int,
    *,
    seed: int,
    iteration: int,
    samples: Sequence[int],
    layers: Sequence[int],
) -> NDArray[np.int64]:
    """Draw which tokens run: int64 [layers, samples, num_tokens], ascending.

    Each subset that has num_tokens / strata tokens of each stratum is equally likely. A token that runs still does with
    a larger number of tokens.

    samples: numbers in the global batch, from 0.
    """
    seed, iteration = check_integer("seed", seed, 0, MAX_SEED), check_integer("iteration", iteration, 0, 2**32 - 1)
    if num_tokens % strata or seq_length % strata:
        raise ValueError(f"{num_tokens} of {seq_length} tokens are not allowed: both must be multiples of {strata}")
    blocks = -(-seq_length // 4)
    counter = np.empty((len(layers), len(samples), blocks, 4), dtype=np.uint64)
    counter[..., 0] = iteration
    counter[..., 1] = np.asarray(samples)[None, :, None]
    counter[..., 2] = np.arange(blocks)
    counter[..., 3] = (np.asarray(layers) << LAYER_SHIFT | TOKENS_STREAM)[:, None, None]
    words = philox4x32(counter, key=(seed & 0xFFFFFFFF, seed >> 32)).reshape(*counter.shape[:2], 4 * blocks)
    keys = words[..., :seq_length] << np.uint64(TOKEN_BITS) | np.arange(seq_length, dtype=np.uint64)
    kept = np.sort(keys.reshape(*keys.shape[:2], strata, -1), axis=-1)[..., : num_tokens // strata]
    tokens = (kept & np.uint64(2**TOKEN_BITS - 1)).astype(np.int64)
    return np.sort(tokens.reshape(*keys.shape[:2], num_tokens), axis=-1)
