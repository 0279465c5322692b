"""Draws of tokens on the device: bit-equal to the specification in NumPy, whatever part of a sequence a rank holds."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_sbld.mcore.skip.token_draws import Split, draw_tokens
from megatron_sbld.method import tokens
from megatron_sbld.method.decisions import MAX_SEED

DRAW = {"seed": 1234, "iteration": 7, "samples": range(6, 9), "layers": [2, 3, 7]}


def on_the_device(seq_length: int, num_tokens: int, strata: int, split: Split, drawn: dict) -> torch.Tensor:
    return draw_tokens(seq_length, num_tokens, strata, split, **{**drawn, "layers": torch.tensor(drawn["layers"])})


@pytest.mark.parametrize(
    ("seq_length", "num_tokens", "strata", "changed"),
    [
        (64, 16, 1, {}),
        (64, 64, 1, {}),
        (2048, 144, 4, {"seed": MAX_SEED, "iteration": 2**32 - 1}),
        (48, 24, 8, {"samples": [2**31], "layers": [2**16]}),
        (37, 5, 1, {}),
        (30, 12, 6, {"seed": 2**40 + 3}),
    ],
)
def test_the_device_draws_what_the_specification_draws(
    seq_length: int, num_tokens: int, strata: int, changed: dict
) -> None:
    drawn = {**DRAW, **changed}
    found = on_the_device(seq_length, num_tokens, strata, Split(), drawn)
    assert np.array_equal(found.numpy(), tokens.draw_tokens(seq_length, num_tokens, strata, **drawn))


@pytest.mark.parametrize("context_ranks", [2, 3])
@pytest.mark.parametrize("sequence_ranks", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 5, 8])  # of a stratum: also such as share a counter with their neighbour
def test_ranks_together_draw_what_one_process_draws(context_ranks: int, sequence_ranks: int, size: int) -> None:
    strata = Split(context_ranks, 0, sequence_ranks).strata
    seq_length, num_tokens = strata * 2 * size, strata * (size + 1)
    expected = tokens.draw_tokens(seq_length, num_tokens, strata, **DRAW)
    held = []
    for rank in range(context_ranks):
        split = Split(context_ranks, rank, sequence_ranks)
        order = np.concatenate([np.arange(chunk.start, chunk.stop) for chunk in split.chunks(seq_length)])
        places = on_the_device(seq_length, num_tokens, strata, split, DRAW).numpy()
        assert places.shape[-1] == num_tokens // context_ranks
        pieces = places.reshape(*places.shape[:2], sequence_ranks, -1)
        piece = len(order) // sequence_ranks
        assert np.array_equal(pieces // piece, np.broadcast_to(np.arange(sequence_ranks)[:, None], pieces.shape))
        held.append(order[places])
    assert np.array_equal(np.sort(np.concatenate(held, axis=-1)), expected)
