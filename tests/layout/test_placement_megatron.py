"""Layout strings mean to this package what they mean to megatron-core."""

from __future__ import annotations

import contextlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_sbld.layout.placement import Placement, read_layout
from megatron_sbld.mcore.local.layer_specs import uneven_layout

NUM_LAYERS = 6
REPETITIONS = st.integers(0, 4).map(str)
PIECES = st.one_of(
    st.sampled_from(["t", "tt", "t,t", "|", "t|t", ",", "m"]),
    REPETITIONS.map("t*{}".format),
    st.tuples(st.sampled_from(["t", "tt", "t|", "|t", "t*2|", "tt|t"]), REPETITIONS).map(lambda x: f"({x[0]})*{x[1]}"),
)
LAYOUTS = st.lists(PIECES, max_size=6).map(lambda pieces: f"E{''.join(pieces)}L")
ANY_TEXT = st.text("EtmL|,()*12 x", max_size=14)


def megatrons(layout: str, ranks: int) -> list[list[list[LayerType]]] | None:
    """Megatron's own reading, [ranks][chunks][modules]; None where it refuses."""
    try:
        parsed = PipelineParallelLayerLayout(layout, ranks)
        parsed.validate_layer_layout(NUM_LAYERS, 0)
    except (AssertionError, IndexError):  # the latter for a layout of nothing
        return None
    return parsed.layout


@settings(max_examples=500, deadline=None)
@given(layout=LAYOUTS | ANY_TEXT, ranks=st.sampled_from([1, 2, 3]), chunks=st.sampled_from([1, 2]))
def test_a_layout_is_accepted_and_read_as_megatron_reads_it(layout: str, ranks: int, chunks: int) -> None:
    theirs = megatrons(layout, ranks)
    ours = None
    with contextlib.suppress(ValueError):
        ours = read_layout(layout, NUM_LAYERS, ranks, chunks)
    if theirs is None or len(theirs[0]) != chunks:
        assert ours is None
        return
    misplaced = theirs[0][0][:1] != [LayerType.embedding] or theirs[-1][-1][-1:] != [LayerType.loss]
    idle = any(not any(rank) for rank in theirs)
    assert (ours is None) == (misplaced or idle)
    if ours is not None:
        for rank in range(ranks):
            held = [chunk.count(LayerType.decoder) for chunk in theirs[rank]]
            assert held == list(ours.layers_per_chunk[rank::ranks])


@pytest.mark.parametrize(("layout", "ranks"), [("Ett|t*4L", 2), ("E|t*6L", 2), ("Et|t*2||t*3L", 2), ("Et*3|t|t*2L", 3)])
def test_a_built_models_uneven_layout_is_told(layout: str, ranks: int) -> None:
    chunks = len(layout.split("|")) // ranks
    config = transformer_config(layout, ranks)
    assert uneven_layout(config) == read_layout(layout, NUM_LAYERS, ranks, chunks).layout


def test_an_even_model_has_none_whether_it_says_so_or_not() -> None:
    assert uneven_layout(transformer_config("Ettt|tttL", 2)) is None
    assert uneven_layout(transformer_config(None, 2)) is None


def test_a_proposal_is_a_layout_to_megatron() -> None:
    for counts in [(1, 5), (5, 1), (3, 3), (1, 1, 4)]:
        assert megatrons(Placement(counts, len(counts)).layout, len(counts)) is not None


def transformer_config(layout: str | None, ranks: int) -> TransformerConfig:
    return TransformerConfig(
        num_layers=NUM_LAYERS,
        hidden_size=8,
        num_attention_heads=2,
        pipeline_model_parallel_size=ranks,
        pipeline_model_parallel_layout=layout,
        pipeline_dtype=torch.float32,
    )
