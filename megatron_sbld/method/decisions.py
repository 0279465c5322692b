"""Decisions: which layers run in which microbatch, drawn from keep probabilities without any state (docs/method.md 6).

Random numbers come from Philox4x32-10, a counter-based generator (Salmon et al., "Parallel Random Numbers: As Easy as
1, 2, 3", 2011): its output is a fixed function of a key and a counter, written out here in integer arithmetic, so a
decision is the same on every machine, rank, NumPy version and resume. The key is the seed; the counter is (iteration,
microbatch, layer, stream). Microbatches count from 0, as in Megatron's schedules; layers count from 1.

With `granularity: sample` a decision is about a sample of a microbatch: how many of the b samples run a layer
(`draw_sample_counts`, the same on every rank), and which (`draw_samples`). With one sample that is `draw_plan`: a layer
that runs a microbatch or not has one sample of it.

The arguments mean the same in all three; each raises ValueError for one out of range.

    keep_probs  keep probability of each layer, [L], in [0, 1]; 1 is always kept, 0 never
    seed        0 to 2^63 - 1
    iteration   0 to 2^32 - 1
    scope       `microbatch` draws each microbatch; `iteration` draws the first, whose decisions are those of all
    sampler     `bernoulli` draws each layer by itself. `balanced` keeps as many layers on each stage as its keep
                probabilities sum to, give or take less than one; the marginals are the same
    stages      for `balanced`: a number of equal stages of consecutive layers, or one list of 1-based layer numbers for
                each stage, in pipeline order; None is one stage
    replica     of the data-parallel replicas: those of other numbers run as many layers on each stage (`balanced`), or
                as many samples of each layer (`draw_samples`), but different ones
    num_samples of a microbatch, 1 to MAX_SAMPLES

A microbatch's decisions depend on nothing else: with more microbatches the first ones' stay the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_sbld.checks import check_choice, check_integer, check_layers
from megatron_sbld.method.choices import Granularity, Replicas, Sampler, Scope
from megatron_sbld.method.layer_values import check_layer_values

MAX_SEED = 2**63 - 1
"""The largest seed: what fits the signed 64 bits of checkpoints and messages."""

MAX_SAMPLES = 2**16
"""The most samples of a microbatch whose decisions can be told apart."""

# Streams: what a number is drawn for. Those of permutations are shared with the replica's number, in the upper bits.
_KEPT, _OFFSET, _PERMUTATION, _SAMPLES = 0, 1, 2, 3
_REPLICA_SHIFT = 8
_SAMPLE_SHIFT = 16  # of the sample's number, in the layer's word
MAX_REPLICA = 2 ** (32 - _REPLICA_SHIFT) - 1

_ONE = 2**48
"""Fixed-point 1 of the balanced sampler; sums over up to 2^15 layers stay exact in 64 bits."""


def replicas_run_alike(replicas: Replicas, granularity: Granularity) -> bool:
    """Whether all data-parallel replicas run the same layers, each on as many samples.

    Then they can wait for each other inside of a layer. Distinct ones do where only the samples are their own.
    """
    check_choice("replicas", replicas, get_args(Replicas))
    check_choice("granularity", granularity, get_args(Granularity))
    return replicas == "shared" or granularity == "sample"


def draw_plan(
    keep_probs: ArrayLike,
    seed: int,
    iteration: int,
    num_microbatches: int,
    scope: Scope = "iteration",
    sampler: Sampler = "bernoulli",
    stages: int | Sequence[Sequence[int]] | None = None,
    replica: int = 0,
) -> NDArray[np.bool_]:
    """Draw the decisions of an iteration: bool [num_microbatches, L], True where the layer runs.

    Refuses stages and a replica that the sampler would ignore.
    """
    probs = check_layer_values("keep_probs", keep_probs, "keep_prob")
    num_microbatches = check_integer("num_microbatches", num_microbatches, 1, 2**32 - 1)
    check_choice("sampler", sampler, get_args(Sampler))
    seed, iteration, replica = _checked_draw(seed, iteration, replica, scope)

    microbatches = np.arange(num_microbatches if scope == "microbatch" else 1)
    if sampler == "balanced":
        stage_of_layer = _stage_of_layer(stages, len(probs))
        rows = _draw_balanced(probs, seed, iteration, microbatches, stage_of_layer, replica)
    elif stages is not None or replica != 0:
        raise ValueError(
            f"sampler 'bernoulli' does not use stages = {stages!r} or replica = {replica}: 'balanced' does"
        )
    else:
        rows = _uniforms(seed, iteration, microbatches, np.arange(1, len(probs) + 1), _KEPT) < probs
    return np.repeat(rows, num_microbatches, axis=0) if scope == "iteration" else rows


def draw_sample_counts(
    keep_probs: ArrayLike,
    num_samples: int,
    seed: int,
    iteration: int,
    num_microbatches: int,
    scope: Scope = "iteration",
    sampler: Sampler = "bernoulli",
    stages: int | Sequence[Sequence[int]] | None = None,
    replica: int = 0,
) -> NDArray[np.int64]:
    """Draw how many samples of each microbatch run each layer: int64 [num_microbatches, L], from 0 to num_samples.

    floor(keep_prob * num_samples), and one more with the probability of the rest, which is `draw_plan`'s decision: the
    expectation is keep_prob * num_samples exactly. So `balanced` keeps as many samples on each stage as it expects,
    give or take less than one, summed over the stage's layers; and one sample is `draw_plan` itself, bit for bit.
    """
    probs = check_layer_values("keep_probs", keep_probs, "keep_prob")
    num_samples = _checked_samples(num_samples, len(probs))
    expected = probs * num_samples
    whole = np.floor(expected)  # keep_prob 1 leaves no rest: all samples, always
    one_more = draw_plan(expected - whole, seed, iteration, num_microbatches, scope, sampler, stages, replica)
    return whole.astype(np.int64) + one_more


def draw_samples(
    counts: NDArray[np.int64], num_samples: int, seed: int, iteration: int, scope: Scope = "iteration", replica: int = 0
) -> NDArray[np.bool_]:
    """Draw which samples run each layer: bool [num_microbatches, L, num_samples], True where one does.

    Each subset of its size is equally likely. A sample that runs a layer still does so with a larger count.

    counts: of `draw_sample_counts`, [num_microbatches, L].
    """
    num_microbatches, num_layers = counts.shape
    num_samples = _checked_samples(num_samples, num_layers)
    seed, iteration, replica = _checked_draw(seed, iteration, replica, scope)
    microbatches = np.arange(num_microbatches if scope == "microbatch" else 1)
    layers, samples = np.arange(1, num_layers + 1), np.arange(num_samples)
    words = (layers[:, None] | samples << _SAMPLE_SHIFT).reshape(-1)
    bits = _random_bits(seed, iteration, microbatches, words, _SAMPLES | replica << _REPLICA_SHIFT)
    ranks = bits.reshape(len(microbatches), num_layers, num_samples).argsort(axis=-1, kind="stable").argsort(axis=-1)
    return ranks < counts[:, :, None]


def philox4x32(counter: NDArray[np.uint64], key: tuple[int, int]) -> NDArray[np.uint64]:
    """Philox4x32-10: four random 32-bit words for each counter of four 32-bit words, uint64 [..., 4] to the same."""
    low_word, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    x0, x1, x2, x3 = (counter[..., word] for word in range(4))
    key0, key1 = key
    for _ in range(10):
        product0 = x0 * np.uint64(0xD2511F53)
        product1 = x2 * np.uint64(0xCD9E8D57)
        x0, x1, x2, x3 = (
            (product1 >> shift) ^ x1 ^ np.uint64(key0),
            product1 & low_word,
            (product0 >> shift) ^ x3 ^ np.uint64(key1),
            product0 & low_word,
        )
        key0 = (key0 + 0x9E3779B9) & 0xFFFFFFFF
        key1 = (key1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([x0, x1, x2, x3], axis=-1)


def _random_bits(
    seed: int, iteration: int, microbatches: NDArray[np.int64], layers: NDArray[np.int64], stream: int
) -> NDArray[np.uint64]:
    """64 random bits for each microbatch and layer, [M, L]: Philox's first two words, the first one on top."""
    counter = np.empty((len(microbatches), len(layers), 4), dtype=np.uint64)
    counter[..., 0] = iteration
    counter[..., 1] = microbatches[:, None]
    counter[..., 2] = layers[None, :]
    counter[..., 3] = stream
    words = philox4x32(counter, key=(seed & 0xFFFFFFFF, seed >> 32))
    return words[..., 0] << np.uint64(32) | words[..., 1]


def _uniforms(
    seed: int, iteration: int, microbatches: NDArray[np.int64], layers: NDArray[np.int64], stream: int
) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1) with 53 bits, [M, L]."""
    bits = _random_bits(seed, iteration, microbatches, layers, stream) >> np.uint64(11)
    return bits.astype(np.float64) * 2.0**-53


def _draw_balanced(
    probs: NDArray[np.float64],
    seed: int,
    iteration: int,
    microbatches: NDArray[np.int64],
    stage_of_layer: NDArray[np.int64],
    replica: int,
) -> NDArray[np.bool_]:
    """Layers in the order of their stages, at random within each, sampled systematically: bool [M, L]."""
    layers = np.arange(1, len(probs) + 1)
    shuffle = _random_bits(seed, iteration, microbatches, layers, _PERMUTATION | replica << _REPLICA_SHIFT)
    order = np.lexsort((shuffle, np.broadcast_to(stage_of_layer, shuffle.shape)), axis=-1)  # [M, L]
    lengths = np.rint(probs * _ONE).astype(np.int64)[order]
    offset = _random_bits(seed, iteration, microbatches, np.zeros(1, np.int64), _OFFSET)  # [M, 1]
    kept = np.empty(order.shape, dtype=bool)
    np.put_along_axis(kept, order, _sample_systematically(lengths, (offset >> np.uint64(16)).astype(np.int64)), axis=-1)
    return kept


def _sample_systematically(lengths: NDArray[np.int64], offset: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Lay intervals end to end and keep those that hold one of the points offset, offset + 1, offset + 2, ...

    lengths: keep probabilities in the order of the layers, [M, L]; offset: in [0, 1), [M, 1]; both in units of 2^-48.
    A stage's borders are the same for every order within the stages, and between borders that are s apart lie floor(s)
    or ceil(s) points. In integers, so that this holds without rounding error and a keep_prob of 1 holds one point.
    """
    ends = np.cumsum(lengths, axis=-1)
    points_before_end = (ends - offset + _ONE - 1) // _ONE
    points_before_start = (ends - lengths - offset + _ONE - 1) // _ONE
    return points_before_end > points_before_start


def _stage_of_layer(stages: int | Sequence[Sequence[int]] | None, num_layers: int) -> NDArray[np.int64]:
    """Index of each layer's stage, [L]."""
    if stages is None:
        return np.zeros(num_layers, dtype=np.int64)
    if not isinstance(stages, Sequence):
        check_integer("stages", stages, 1, num_layers)
        if num_layers % stages:
            raise ValueError(f"stages = {stages} is not allowed: {num_layers} layers are not divisible by it")
        return np.arange(num_layers) // (num_layers // stages)
    if not all(isinstance(stage, Sequence) for stage in stages):
        raise ValueError(f"stages = {stages!r} is not allowed: it must be a number, or a list of layers for each stage")
    layers = [layer for stage in stages for layer in stage]
    if check_layers("stages", layers, num_layers) != tuple(range(1, num_layers + 1)):
        missing = sorted(set(range(1, num_layers + 1)) - set(layers))
        raise ValueError(f"stages leave out layers {missing}: they must hold each of the {num_layers} layers once")
    stage_of_layer = np.empty(num_layers, dtype=np.int64)
    for index, stage in enumerate(stages):
        stage_of_layer[np.array(stage, dtype=int) - 1] = index
    return stage_of_layer


def plain_stages(stages: int | Sequence[Sequence[int]] | None) -> int | list[list[int]] | None:
    """Stages without NumPy's numbers, which torch.load does not take by default."""
    if stages is None or not isinstance(stages, Sequence):
        return None if stages is None else int(stages)
    return [[int(layer) for layer in stage] for stage in stages]


def _checked_draw(seed: int, iteration: int, replica: int, scope: Scope) -> tuple[int, int, int]:
    """Seed, iteration and replica as Python's integers: NumPy's of 8 or 32 bits overflow in what is made of them."""
    check_choice("scope", scope, get_args(Scope))
    return (
        check_integer("seed", seed, 0, MAX_SEED),
        check_integer("iteration", iteration, 0, 2**32 - 1),
        check_integer("replica", replica, 0, MAX_REPLICA),
    )


def _checked_samples(num_samples: int, num_layers: int) -> int:
    num_samples = check_integer("num_samples", num_samples, 1, MAX_SAMPLES)
    if num_layers >= 2**_SAMPLE_SHIFT:
        raise ValueError(
            f"{num_layers} layers are not allowed with decisions about samples: at most {2**_SAMPLE_SHIFT - 1}"
        )
    return num_samples
