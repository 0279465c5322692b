"""Which layers each pipeline stage holds: Megatron's layout strings, and the placement that evens the stages' work.

Layers that are kept with different probabilities make some stages busier than others, and a pipeline is as fast as its
slowest stage. megatron-core takes any contiguous placement (`pipeline_model_parallel_layout`). This module reads and
writes its notation, so that a config can be checked where Megatron is not installed, and finds the best placement for
the plain schedule. For the interleaved one, whose ranks hold several pieces of the model, it finds none.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from megatron_sbld.checks import check_integer
from megatron_sbld.layout.pipeline import Floats, critical_path

_REPEATED_GROUP = re.compile(r"\(([^)]+)\)\*(\d+)")
_REPEATED_CHARACTER = re.compile(r"(.)\*(\d+)")
_MAX_REPETITIONS = 10_000
_FORWARD_SHARE = 1 / 3
"""Of a layer's time: the backward pass computes two gradients (config/flops.py)."""


@dataclass(frozen=True)
class Placement:
    """The layers of each chunk of the model, in order; the chunks go to the pipeline ranks in turn.

    Chunks are pipeline stages in the plain schedule. With v chunks a rank (the interleaved schedule), rank r of p holds
    the chunks r, r + p, r + 2 p, ...
    """

    layers_per_chunk: tuple[int, ...]
    num_ranks: int

    @property
    def layout(self) -> str:
        """In Megatron's notation: E the embedding, t a layer, L the loss, | between chunks, t*3 for ttt."""
        chunks = ["t" * count if count < 2 else f"t*{count}" for count in self.layers_per_chunk]
        return f"E{'|'.join(chunks)}L"

    @property
    def stages(self) -> list[list[int]]:
        """1-based numbers of the layers that each pipeline rank holds."""
        ends = np.cumsum(self.layers_per_chunk).tolist()
        chunks = [list(range(end - count + 1, end + 1)) for end, count in zip(ends, self.layers_per_chunk, strict=True)]
        return [list(itertools.chain(*chunks[rank :: self.num_ranks])) for rank in range(self.num_ranks)]

    @property
    def is_even(self) -> bool:
        """Whether every chunk has as many layers as the others, as Megatron has it without a layout."""
        return len(set(self.layers_per_chunk)) == 1

    @property
    def is_interleaved(self) -> bool:
        """Whether ranks hold several chunks."""
        return len(self.layers_per_chunk) > self.num_ranks


def even_placement(num_layers: int, num_ranks: int, chunks_per_rank: int = 1) -> Placement:
    """Every chunk with the same number of layers. Raises ValueError where the layers cannot be divided so."""
    chunks = num_ranks * chunks_per_rank
    if num_layers % chunks:
        raise ValueError(f"{num_layers} layers cannot be divided evenly among {chunks} pipeline stages")
    return Placement((num_layers // chunks,) * chunks, num_ranks)


def read_layout(layout: str, num_layers: int, num_ranks: int, chunks_per_rank: int = 1) -> Placement:
    """The placement that a layout string stands for (megatron/core/transformer/pipeline_parallel_layer_layout.py).

    Stricter than megatron-core 0.16.1 in two points: the embedding must open the first chunk and the loss close the
    last, since that is where it builds them whatever the string says; and no rank may have no parameters at all.

    Raises ValueError with the reason why the string is no layout of the model.
    """
    chunks = _unrolled(layout).split("|")
    whole = "".join(chunks)
    unknown = sorted(set(whole) - set("EtmL"))
    if unknown:
        raise ValueError(
            f"{', '.join(map(repr, unknown))} is not known: E is the embedding, t a layer, L the loss, | goes between "
            "stages, t*3 is ttt and (tt|)*2 is tt|tt|"
        )
    expected = num_ranks * chunks_per_rank
    if len(chunks) != expected:
        raise ValueError(f"has {len(chunks)} stages: must have {expected}, with | between them")
    if "m" in whole:
        raise ValueError("m is not allowed: there are no multi-token prediction layers")
    if not chunks[0].startswith("E") or whole.count("E") != 1:
        raise ValueError("the embedding E must open the first stage, and be nowhere else")
    if not chunks[-1].endswith("L") or whole.count("L") != 1:
        raise ValueError("the loss L must close the last stage, and be nowhere else")
    if whole.count("t") != num_layers:
        raise ValueError(f"has {whole.count('t')} layers t: must have the {num_layers} of the model")
    placement = Placement(tuple(chunk.count("t") for chunk in chunks), num_ranks)
    idle = [rank for rank, layers in enumerate(placement.stages) if not layers and 0 < rank < num_ranks - 1]
    if idle:
        raise ValueError(
            f"leaves pipeline stage {idle[0] + 1} without a layer: only the first and the last can have none"
        )
    return placement


def _unrolled(layout: str) -> str:
    """Without the commas, which mean nothing, and with every repetition written out, groups first."""
    layout = layout.replace(",", "")
    for pattern in (_REPEATED_GROUP, _REPEATED_CHARACTER):
        most = max((int(count) for _, count in pattern.findall(layout)), default=0)
        if most > _MAX_REPETITIONS:
            raise ValueError(f"*{most} is not allowed: at most {_MAX_REPETITIONS} repetitions")
        layout = pattern.sub(lambda match: match[1] * int(match[2]), layout)
    return layout


def stage_loads(keep_probs: ArrayLike, stages: Sequence[Sequence[int]], output_layers: float = 0.0) -> Floats:
    """What each stage has to do, in layers: [..., L] kept layers or their probabilities -> [..., p].

    stages: 1-based layers of each stage.
    output_layers: the last stage's work besides its layers (logits and loss), in layers' worth of time.
    """
    values = np.asarray(keep_probs)
    columns = [np.array(stage, dtype=int) - 1 for stage in stages]
    loads = np.stack([values[..., column].sum(axis=-1, dtype=np.float64) for column in columns], axis=-1)
    loads[..., -1] += output_layers
    return loads


def imbalance(loads: Floats) -> float:
    """By how much the busiest stage exceeds the mean, relative to it: what a long pipeline loses to an even spread.

    loads: of each stage, [p]. 0 where there is nothing to do.
    """
    return float(loads.max() / loads.mean() - 1.0) if loads.any() else 0.0


def iteration_times(kept: ArrayLike, stages: Sequence[Sequence[int]], output_layers: float = 0.0) -> Floats:
    """How long iterations take in the 1F1B schedule, in layers' worth of time: [..., m, L] -> [...].

    kept: whether each layer runs each microbatch, or the share of its samples that it runs.
    stages, output_layers: as in `stage_loads`. Dropped layers, transfers and the optimizer cost nothing here.
    """
    loads = stage_loads(kept, stages, output_layers)
    return critical_path(_FORWARD_SHARE * loads, (1.0 - _FORWARD_SHARE) * loads)


def layer_ranges(layers: Iterable[int]) -> str:
    """Layers as a reader writes them.

    >>> layer_ranges([1, 2, 3, 7])
    '1-3, 7'
    """
    held = set(layers)
    begins = sorted(layer for layer in held if layer - 1 not in held)
    ends = sorted(layer for layer in held if layer + 1 not in held)
    return ", ".join(f"{begin}-{end}" if begin < end else f"{begin}" for begin, end in zip(begins, ends, strict=True))


def best_placement(keep_probs: ArrayLike, num_stages: int, output_layers: float = 0.0) -> Placement:
    """The placement in the plain schedule whose busiest stage has the least to do, each stage with a layer at least.

    Exact, by dynamic programming over the cuts. Of all such placements it is one with the least sum of squared loads,
    so that the other stages are even as well.

    keep_probs: expected number of times that each layer runs, [L].  output_layers: as in `stage_loads`.
    Raises ValueError for more stages than layers.
    """
    weights = np.asarray(keep_probs, dtype=np.float64)
    num_layers = len(weights)
    check_integer("num_stages", num_stages, 1, num_layers)
    before = np.concatenate([[0.0], np.cumsum(weights)])
    # Load of a stage that begins after layer i and ends with layer j, [L + 1, L + 1]; infinite without a layer.
    load = np.where(np.triu(np.ones((num_layers + 1,) * 2, dtype=bool), k=1), before[None, :] - before[:, None], np.inf)
    loads = [load + (output_layers if stage == num_stages - 1 else 0.0) for stage in range(num_stages)]

    busiest = loads[0][0]  # of the stages so far, by the layer that they end with
    for stage in loads[1:]:
        busiest = np.maximum(busiest[:, None], stage).min(axis=0)
    limit = busiest[-1] * (1.0 + 1e-12)  # rounding differs between orders of adding

    squares = np.where(loads[0][0] <= limit, loads[0][0] ** 2, np.inf)
    begins = []
    for stage in loads[1:]:
        sums = squares[:, None] + np.where(stage <= limit, stage**2, np.inf)
        begins.append(sums.argmin(axis=0))
        squares = sums.min(axis=0)
    cuts = [num_layers]
    for begin in reversed(begins):
        cuts.append(int(begin[cuts[-1]]))
    cuts.append(0)
    return Placement(tuple(end - begin for begin, end in zip(cuts[1:], cuts[:-1], strict=True))[::-1], num_stages)
