"""Which tokens the layers of a chunk run, computed on the device: method/tokens.py's draw in torch's int64.

One draw serves all layers of a chunk in a microbatch, since on a GPU the launches of its kernels cost more than what
they compute. The host waits for nothing. Integers alone, so that every device draws the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from megatron_sbld.method.tokens import LAYER_SHIFT, TOKEN_BITS, TOKENS_STREAM, strata_of_layout

_WORD = 0xFFFFFFFF


class Split(NamedTuple):
    """Which part of a sequence this rank holds."""

    context_ranks: int = 1
    context_rank: int = 0
    """Holds one chunk of the first half and its mirror image of the second, of 2 * ranks in all."""
    sequence_ranks: int = 1
    """Over which sequence parallelism splits what a context-parallel rank holds, in order."""
    sequence_rank: int = 0

    @property
    def strata(self) -> int:
        """The number of strata that it needs, or a multiple of it."""
        return strata_of_layout(self.sequence_ranks, self.context_ranks)

    def chunks(self, seq_length: int) -> list[range]:
        """The tokens of the context-parallel rank, in the order in which it holds them."""
        if self.context_ranks == 1:
            return [range(seq_length)]
        size = seq_length // (2 * self.context_ranks)
        mirrored = 2 * self.context_ranks - 1 - self.context_rank
        return [range(chunk * size, (chunk + 1) * size) for chunk in (self.context_rank, mirrored)]


def draw_tokens(
    seq_length: int,
    num_tokens: int,
    strata: int,
    split: Split,
    *,
    seed: int,
    iteration: int,
    samples: Sequence[int],
    layers: torch.Tensor,
) -> torch.Tensor:
    """Tokens of a context-parallel rank that run, ascending places in what it holds: int64 [layers, samples, n].

    n is num_tokens / context_ranks. The other arguments are method/tokens.py's, but the layers' numbers are on the
    device: from a list they would be copied there, and the host would wait.
    """
    device = layers.device
    chunks = split.chunks(seq_length)
    size = seq_length // strata  # of a stratum; a chunk holds whole ones
    blocks = torch.cat([torch.arange(chunk.start // 4, -(-chunk.stop // 4), device=device) for chunk in chunks])
    last = layers << LAYER_SHIFT | TOKENS_STREAM
    numbers = torch.arange(samples[0], samples[-1] + 1, device=device)
    assert len(numbers) == len(samples), "the samples of a microbatch are consecutive"
    words = _philox(iteration, numbers[None, :, None], blocks, last[:, None, None], seed)
    words = words.reshape(len(layers), len(samples), -1)
    keys, first = [], 0
    for chunk in chunks:
        start = first + chunk.start % 4
        mine = words[..., start : start + len(chunk)]
        keys.append(mine << TOKEN_BITS | torch.arange(chunk.start, chunk.stop, device=device))
        first += 4 * (-(-chunk.stop // 4) - chunk.start // 4)
    by_stratum = torch.cat(keys, dim=-1).unflatten(-1, (-1, size))  # [layers, samples, own strata, size]
    _, places = by_stratum.topk(num_tokens // strata, dim=-1, largest=False, sorted=False)
    starts = torch.arange(0, by_stratum.size(2) * size, size, device=device)
    return (places.sort(dim=-1).values + starts[:, None]).flatten(2)


def _philox(word0: int, word1: torch.Tensor, word2: torch.Tensor, word3: torch.Tensor, seed: int) -> torch.Tensor:
    """Philox4x32-10 of counters that are broadcast: int64 [..., 4], 32 bits in each.

    A product of two words has 64 bits and wraps into the sign, which the mask takes off again.
    """
    shape = torch.broadcast_shapes(word1.shape, word2.shape, word3.shape)
    x0 = torch.full(shape, word0, dtype=torch.int64, device=word2.device)
    x1, x2, x3 = (word.expand(shape) for word in (word1, word2, word3))
    key0, key1 = seed & _WORD, seed >> 32
    for _ in range(10):
        product0, product1 = x0 * 0xD2511F53, x2 * 0xCD9E8D57
        x0 = ((product1 >> 32) & _WORD) ^ x1 ^ key0
        x1 = product1 & _WORD
        x2 = ((product0 >> 32) & _WORD) ^ x3 ^ key1
        x3 = product0 & _WORD
        key0, key1 = (key0 + 0x9E3779B9) & _WORD, (key1 + 0xBB67AE85) & _WORD
    return torch.stack([x0, x1, x2, x3], dim=-1)
