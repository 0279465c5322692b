"""Predictions for runs whose layers begin in stages: each stage's time and memory, and what theta has no part in."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from megatron_sbld.layout.placement import Placement
from megatron_sbld.method.config import DropConfig
from megatron_sbld.predict.gain import compared_sections
from megatron_sbld.predict.memory import rank_memory
from megatron_sbld.predict.target import find_target
from tests.predict.predict_helpers import HARDWARE, make_predictor

STAGES = [[0.6, 1], [0.8, 4], [1.0, 8]]  # of 8 layers and 200 iterations
STAGED = DropConfig(policy="staged", stages=STAGES)
OVERLAPS = {"overlap_grad_reduce": True, "use_distributed_optimizer": True, "overlap_param_gather": True}


def test_a_stage_takes_as_long_as_its_layers_and_the_run_as_its_stages():
    predictor = make_predictor()
    prediction = predictor.predict(STAGED)
    assert [(stage.first, stage.last, stage.begun_layers) for stage in prediction.stages] == [
        (1, 120, 1),
        (121, 160, 4),
        (161, 200, 8),
    ]
    model = predictor.model
    layer = 16 * float(model.layer_forward[0] + model.layer_backward[0])
    stepped = float(model.state_sizes[0, 0, 1]) * model.step_costs.second_per_stepped
    for stage in prediction.stages:
        absent = 8 - stage.begun_layers
        assert stage.iteration_s == pytest.approx(predictor.baseline_s - absent * (layer + stepped))
    lengths = [120, 40, 40]
    expected = np.average([stage.iteration_s for stage in prediction.stages], weights=lengths)
    assert prediction.iteration_s == pytest.approx(expected)
    assert prediction.hours == pytest.approx(sum(stage.hours for stage in prediction.stages))
    assert prediction.gain_stderr == 0.0
    assert prediction.stages[-1].gain == pytest.approx(0.0, abs=1e-12)
    assert prediction.mean_keep_prob == pytest.approx((120 + 40 * 4 + 40 * 8) / 1600)
    assert (prediction.theta, prediction.sampler) == (None, None)


@pytest.mark.parametrize("fields", [{}, {"gpus": 2, **OVERLAPS, "ddp_bucket_size": 100_000}])
def test_what_waits_is_frozen_whatever_the_section_says_of_dropped_layers(fields):
    predictor = make_predictor(**fields)
    apply, freeze = (dataclasses.replace(STAGED, dropped_update=update) for update in ("apply", "freeze"))
    assert predictor.predict(apply) == dataclasses.replace(predictor.predict(freeze))


def test_what_waits_is_neither_reduced_nor_gathered_where_buckets_allow_it():
    slow = dataclasses.replace(HARDWARE, intra_bandwidth=0.05)
    seconds = {}
    for size in (100_000, 10**9):
        predictor = make_predictor(2, hardware=slow, ddp_bucket_size=size, **OVERLAPS)
        seconds[size] = [stage.iteration_s for stage in predictor.predict(STAGED).stages]
    # With one bucket for all layers everything is communicated in each stage.
    assert seconds[100_000][0] < 0.5 * seconds[10**9][0]
    predictor = make_predictor(2, hardware=slow, ddp_bucket_size=100_000, **OVERLAPS)
    shares = np.zeros((1, 1, 8))
    shares[..., 0] = 1.0
    waiting = shares[:, 0] == 0
    gathered = predictor.model.times([shares]).schedule[0]
    assert predictor.model.times([shares], waiting=waiting).schedule[0] < 0.5 * gathered


def test_memory_is_that_of_the_whole_model_but_for_activations():
    predictor = make_predictor(2, pipeline_model_parallel_size=2)
    stages = predictor.predict(STAGED).stages
    whole = rank_memory(predictor.model)
    for index, rank in enumerate(whole):
        held = [stage.memory_gb[index] for stage in stages]
        assert rank.weights + rank.gradients + rank.optimizer < held[0] < held[1] < held[2]
        assert held[-1] == pytest.approx(rank.total)


def test_on_a_pipeline_the_first_stage_waits_most_and_a_placement_shares_out_its_own_layers():
    predictor = make_predictor(2, pipeline_model_parallel_size=2, vocab_size=4096)
    first, second, last = predictor.predict(STAGED).stages
    assert first.begun_layers == 2  # one on each rank
    assert first.waiting > second.waiting > last.waiting
    assert first.lost_to_imbalance > second.lost_to_imbalance > last.lost_to_imbalance
    placement = Placement((6, 2), 2)
    assert predictor.policy(STAGED).begun_layers(1) == {1, 5}
    assert predictor.policy(STAGED, placement).begun_layers(1) == {1, 7}
    assert predictor.predict(STAGED, placement).layout == placement.layout


@pytest.mark.parametrize("replicas", ["shared", "distinct"])
def test_a_policy_inside_the_stages_is_sampled_in_each(replicas):
    predictor = make_predictor(3, global_batch_size=12)
    section = DropConfig(policy="layerdrop", theta=0.5, stages=STAGES, sampler="balanced", replicas=replicas)
    prediction = predictor.predict(section)
    assert [stage.mean_keep_prob for stage in prediction.stages] == pytest.approx([1 / 16, 4 / 16, 8 / 16])
    assert [stage.gain_stderr >= 0 for stage in prediction.stages] == [True] * 3
    assert prediction.gain > predictor.predict(STAGED).gain
    assert prediction.theta == 0.5


def test_stages_are_compared_once_and_stay_with_the_configs_own_section():
    sections = compared_sections(dataclasses.replace(STAGED, balance_stages=2))
    assert [section.policy for section in sections] == ["staged"] + 3 * ["pld"] + 3 * ["layerdrop"] + 3 * [
        "stochastic_depth"
    ]
    assert [section.stages for section in sections] == [STAGES] + 9 * [None]
    predictor = make_predictor()
    assert all(predictor.predict(section).iteration_s > 0 for section in sections)
    inside = compared_sections(DropConfig(policy="pld", stages=STAGES))
    assert [(section.theta, section.stages) for section in inside[:4]] == [
        *((theta, STAGES) for theta in (0.9, 0.7, 0.5)),
        (0.9, None),
    ]


def test_a_theta_without_effect_is_neither_told_nor_proposed():
    steps = DropConfig(policy="layerdrop", schedule="steps", steps=[[0.5, 0.5], [1.0, 1.0]], theta=0.9)
    predictor = make_predictor()
    assert predictor.predict(steps).theta is None
    assert [section for section in compared_sections(steps) if section.policy == "layerdrop"] == [steps]
    with pytest.raises(ValueError, match=r"drop\.schedule steps does not use"):
        find_target(predictor, steps, 0.2)
    with pytest.raises(ValueError, match=r"the gain of staged is set by drop\.stages"):
        find_target(predictor, STAGED, 0.2)
