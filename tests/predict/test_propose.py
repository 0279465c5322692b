"""Placements that the predictor proposes: they gain, training takes them, and their memory is checked."""

from __future__ import annotations

import dataclasses

import pytest

from megatron_sbld.config.validate import validate
from megatron_sbld.method.config import DropConfig
from megatron_sbld.predict.propose import propose_placement, worst_stage
from tests.predict.predict_helpers import HARDWARE, make_predictor

PLD = DropConfig(policy="pld", theta=0.4, sampler="balanced")
NOTHING = DropConfig()
TWO = {"gpus": 2, "pipeline_model_parallel_size": 2, "num_layers": 16}
FOUR = {"gpus": 4, "pipeline_model_parallel_size": 4, "num_layers": 16}
UNIFORM = {"recompute_granularity": "full", "recompute_method": "uniform"}


def test_a_placement_is_proposed_for_policies_that_drop_deep_layers():
    predictor = make_predictor(**TWO)
    proposal = propose_placement(predictor, PLD)
    assert proposal is not None
    assert proposal.placement.layers_per_chunk[0] < proposal.placement.layers_per_chunk[1]
    before = predictor.predict(PLD)
    assert proposal.prediction == predictor.predict(PLD, proposal.placement)
    assert proposal.prediction.gain > before.gain + 0.02
    assert proposal.prediction.lost_to_imbalance < before.lost_to_imbalance


@pytest.mark.parametrize("sampler", ["bernoulli", "balanced"])
@pytest.mark.parametrize(("layout", "theta"), [(None, 0.95), (None, 0.4), ("Et*3|t*3|t*4|t*6L", 0.4)])
def test_a_proposal_gains_more_by_the_drawn_decisions_of_its_sampler(layout, theta, sampler):
    predictor = make_predictor(**FOUR, pipeline_model_parallel_layout=layout)
    section = dataclasses.replace(PLD, theta=theta, sampler=sampler)
    proposal = propose_placement(predictor, section)
    if proposal is not None:
        assert proposal.prediction.gain > predictor.predict(section).gain
        again = make_predictor(**FOUR, pipeline_model_parallel_layout=proposal.placement.layout)
        assert propose_placement(again, section) is None  # nothing near it gains more


def test_nothing_is_proposed_where_stages_are_even_already_or_there_are_none():
    assert propose_placement(make_predictor(**FOUR, vocab_size=128), NOTHING) is None
    assert propose_placement(make_predictor(), PLD) is None
    assert propose_placement(make_predictor(**FOUR, num_virtual_stages_per_pipeline_rank=2), PLD) is None


def test_a_busy_output_layer_moves_layers_away_from_it():
    proposal = propose_placement(make_predictor(**FOUR, vocab_size=32_768), NOTHING)
    assert proposal is not None
    assert proposal.placement.layers_per_chunk[-1] < 4
    assert proposal.prediction.gain > 0


@pytest.mark.parametrize("number", [1, 2, 4])
def test_whole_pieces_of_uniform_recomputation_are_moved(number):
    predictor = make_predictor(**TWO, **UNIFORM, recompute_num_layers=number)
    proposal = propose_placement(predictor, PLD)
    if number == 4:
        assert proposal is None  # 4 and 12 layers are no better than 8 and 8
        return
    assert proposal is not None
    assert all(count % number == 0 for count in proposal.placement.layers_per_chunk)
    config = predictor.setup.config
    layout = {"pipeline_model_parallel_layout": proposal.placement.layout}
    validate(dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, **layout)), 2, trains=False)


def test_a_stage_keeps_the_layers_that_block_recomputation_wants():
    fields = {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 13}
    predictor = make_predictor(**TWO, **fields, pipeline_model_parallel_layout="Et*13|t*3L")
    proposal = propose_placement(predictor, PLD)
    assert proposal is None or max(proposal.placement.layers_per_chunk) >= 13


def test_more_stages_than_layers_get_no_proposal():
    fields = {"num_layers": 2, "pipeline_model_parallel_layout": "E|t|t|L"}
    predictor = make_predictor(gpus=4, pipeline_model_parallel_size=4, **fields)
    assert propose_placement(predictor, PLD) is None
    assert propose_placement(predictor, NOTHING) is None


def test_a_placement_that_does_not_fit_where_the_configs_does_is_marked():
    own = worst_stage(make_predictor(**TWO).model).total
    proposal = propose_placement(make_predictor(**TWO), PLD)
    assert proposal is not None
    assert proposal.fits
    assert proposal.worst.total > own
    for memory, fits in (((own + proposal.worst.total) / 2, False), (own / 2, True)):
        narrow = dataclasses.replace(HARDWARE, memory_gb=memory)
        found = propose_placement(make_predictor(**TWO, hardware=narrow), PLD)
        assert found is not None
        assert found.fits is fits
