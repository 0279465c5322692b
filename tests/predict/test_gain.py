"""Calibration, gains, samplers, placements and targets of the predictor."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest

from megatron_sbld.config.flops import attention_share, model_flops_per_token
from megatron_sbld.method.config import DropConfig
from megatron_sbld.predict.calibration import calibrate, mfu_tokens_per_s
from megatron_sbld.predict.gain import Predictor, compared_sections
from megatron_sbld.predict.iteration import IterationModel
from megatron_sbld.predict.target import find_target
from megatron_sbld.sensitivity.file import SensitivityFile
from tests.predict.predict_helpers import HARDWARE, make_predictor, make_setup

LAYERDROP = DropConfig(policy="layerdrop", theta=0.7)
PIPELINE = {"gpus": 4, "pipeline_model_parallel_size": 4}


@pytest.fixture
def sensitivity(tmp_path):
    """The path of a sensitivity file of 8 layers."""
    gaps = np.array([0.03, 0.01, -0.02, 0.05, 0.02, 0.04, -0.01, 0.0])
    file = SensitivityFile.from_gaps(gaps, np.full(8, 0.001), {"method": "test"})
    file.save(tmp_path / "sensitivity.json")
    return str(tmp_path / "sensitivity.json")


@pytest.mark.parametrize("efficiency", [0.9, 0.3, 0.01])
def test_calibration_finds_the_efficiency_that_a_throughput_came_from(efficiency):
    setup = make_setup(4, tensor_model_parallel_size=2, overlap_grad_reduce=True)
    seconds = float(IterationModel(setup, efficiency).undropped.total[0])
    assert calibrate(setup, setup.tokens / seconds) == pytest.approx(efficiency, rel=1e-6)
    assert Predictor(setup, setup.tokens / seconds).baseline_s == pytest.approx(seconds, rel=1e-8)


def test_a_throughput_beyond_the_peak_is_refused_with_the_most_that_is_possible():
    setup = make_setup(1)
    most = setup.tokens / float(IterationModel(setup, 1.0).undropped.total[0])
    with pytest.raises(ValueError, match=f"allows {most:,.0f} at most"):
        calibrate(setup, 1.01 * most)
    with pytest.raises(ValueError, match="below a millionth"):
        calibrate(setup, 1e-6)


def test_an_mfu_is_a_throughput_by_megatrons_count_of_flops():
    setup = make_setup(2)
    expected = 0.4 * 100e12 * 2 / model_flops_per_token(setup.config.model, 1024)
    assert mfu_tokens_per_s(setup, 0.4) == pytest.approx(expected)
    with pytest.raises(ValueError, match=r"mfu = 1\.2"):
        mfu_tokens_per_s(setup, 1.2)


@pytest.mark.parametrize("sampler", ["bernoulli", "balanced"])
@pytest.mark.parametrize(
    "fields",
    [
        {"gpus": 2, "overlap_grad_reduce": True, "overlap_param_gather": True, "use_distributed_optimizer": True},
        {**PIPELINE, "num_virtual_stages_per_pipeline_rank": 2},
        PIPELINE,
    ],
)
def test_nothing_dropped_is_the_baseline_exactly(fields, sampler):
    predictor = make_predictor(**fields)
    prediction = predictor.predict(DropConfig(policy="layerdrop", theta=1.0, sampler=sampler))
    assert prediction.gain == 0.0
    assert prediction.gain_stderr == 0.0
    assert prediction.iteration_s == predictor.baseline_s
    assert prediction.kept_fraction == 1.0


def test_on_one_gpu_the_gain_is_the_dropped_layers_time():
    predictor = make_predictor()
    prediction = predictor.predict(LAYERDROP)
    model = predictor.model
    layers = 16 * float((model.layer_forward + model.layer_backward).sum())
    expected = predictor.baseline_s / (predictor.baseline_s - 0.3 * layers) - 1.0
    assert prediction.gain == pytest.approx(expected, rel=1e-9)  # the control variate takes all noise away
    assert prediction.lost_to_imbalance == pytest.approx(0.0, abs=1e-12)
    assert 0 < prediction.gain < prediction.ideal_gain
    assert prediction.hours == pytest.approx(200 * prediction.iteration_s / 3600)


@pytest.mark.parametrize("fields", [{}, {"gpus": 2, "use_distributed_optimizer": True, "ddp_bucket_size": 1000}])
def test_frozen_layers_are_those_of_the_section_that_is_asked_for(fields):
    """Whatever the config's own section says."""
    freeze = dataclasses.replace(LAYERDROP, theta=0.5, dropped_update="freeze")
    apply = dataclasses.replace(freeze, dropped_update="apply")
    predictors = [make_predictor(**fields, dropped_update=update) for update in ("apply", "freeze")]
    assert predictors[0].predict(freeze) == predictors[1].predict(freeze)
    assert predictors[0].predict(apply) == predictors[1].predict(apply)
    placement = predictors[0].setup.placement
    seconds = [predictors[0].iteration_s(drop, placement, [1, 2, 3]) for drop in (apply, freeze)]
    assert seconds[1] < seconds[0]
    assert predictors[0].predict(freeze).gain > predictors[0].predict(apply).gain


def test_a_model_without_other_costs_gains_the_ideal():
    free = dataclasses.replace(HARDWARE, hbm_bandwidth=1e12)
    predictor = make_predictor(hardware=free, attention="unfused")  # phi counts the whole matrix
    prediction = predictor.predict(LAYERDROP)
    assert prediction.gain == pytest.approx(prediction.ideal_gain, rel=1e-4)


@pytest.mark.parametrize("fields", [{}, PIPELINE, {"gpus": 2, "overlap_grad_reduce": True}])
@pytest.mark.parametrize("policy", ["layerdrop", "pld", "stochastic_depth"])
def test_a_lower_theta_gains_more(fields, policy):
    predictor = make_predictor(**fields)
    gains = [predictor.predict(DropConfig(policy=policy, theta=theta)).gain for theta in (1.0, 0.9, 0.7, 0.5, 0.4)]
    assert gains[0] == 0.0
    assert all(before < after for before, after in itertools.pairwise(gains))


def test_two_seeds_agree_within_the_standard_error():
    predictor = make_predictor(**PIPELINE)
    one, other = (predictor.predict(dataclasses.replace(LAYERDROP, seed=seed)) for seed in (1, 2))
    assert one.gain != other.gain
    assert abs(one.gain - other.gain) < 4 * (one.gain_stderr + other.gain_stderr)


def test_the_balanced_sampler_loses_less_to_imbalance():
    predictor = make_predictor(**PIPELINE)
    bernoulli = predictor.predict(dataclasses.replace(LAYERDROP, theta=0.5))
    balanced = predictor.predict(dataclasses.replace(LAYERDROP, theta=0.5, sampler="balanced"))
    assert predictor.baseline_imbalance < balanced.lost_to_imbalance < bernoulli.lost_to_imbalance - 0.05
    assert balanced.gain > bernoulli.gain + 0.05


def test_imbalance_is_measured_against_the_same_work_spread_evenly():
    # Two stages of four layers: one keeps all and the other none, or each keeps two; the same work, spread evenly.
    predictor = make_predictor(gpus=2, pipeline_model_parallel_size=2)
    model = predictor.model
    shares = np.array([[[1, 1, 1, 1, 0, 0, 0, 0.0]]])
    halves = np.array([[[1, 1, 0, 0, 1, 1, 0, 0.0]]])
    even = model.run(shares, evenly=True).end
    assert even == pytest.approx(model.run(halves, evenly=True).end)
    assert model.run(shares).end > model.run(halves).end > even  # the output layer is on the last stage
    assert model.run(shares, evenly=True).busy.sum() == pytest.approx(model.run(shares).busy.sum())


def test_one_stage_loses_nothing_to_imbalance():
    fields = {"overlap_grad_reduce": True, "overlap_param_gather": True, "use_distributed_optimizer": True}
    predictor = make_predictor(gpus=2, **fields)
    assert predictor.baseline_imbalance == 0
    assert predictor.predict(LAYERDROP).lost_to_imbalance == 0


def test_samples_of_a_microbatch_take_their_share_of_a_layer():
    predictor = make_predictor(micro_batch_size=4)
    by_layer = predictor.predict(LAYERDROP)
    by_sample = predictor.predict(dataclasses.replace(LAYERDROP, granularity="sample"))
    assert by_sample.gain == pytest.approx(by_layer.gain, rel=1e-6)


def test_tokens_take_their_share_of_a_layers_flops_and_of_its_memory():
    predictor = make_predictor()
    s = predictor.setup.config.model.seq_length
    drop = DropConfig(granularity="token", token_schedule="steps", token_steps=[[1.0, s // 2]])
    found = predictor.predict(drop)
    layers = predictor.setup.config.model.num_layers
    attention = attention_share(predictor.setup.config.model)
    expected = (2 + (layers - 2) * (0.5 * (1 - attention) + 0.25 * attention)) / layers
    assert found.policy == "tokens"
    assert found.mean_keep_prob == 1.0
    assert found.kept_fraction == pytest.approx(expected)
    assert found.ideal_gain == pytest.approx(1 / (1 - predictor.phi * (1 - expected)) - 1)
    assert 0.6 < found.gain / found.ideal_gain < 1.0
    held = predictor.shares(drop, predictor.policy(drop), [1], predictor.setup.placement, held=True)[0]
    assert held.tolist() == [[[1.0, *[0.5] * (layers - 2), 1.0]]]
    both = dataclasses.replace(drop, policy="layerdrop", theta=0.7)
    assert predictor.predict(both).gain > max(found.gain, predictor.predict(LAYERDROP).gain)


def test_distinct_replicas_wait_for_the_slowest_where_their_chunks_differ():
    fields = {"gpus": 8, "pipeline_model_parallel_size": 4, "num_virtual_stages_per_pipeline_rank": 2}
    predictor = make_predictor(**fields)
    shared = dataclasses.replace(LAYERDROP, sampler="balanced")
    distinct = dataclasses.replace(shared, replicas="distinct")
    assert len(predictor.shares(distinct, predictor.policy(distinct), [1], predictor.setup.placement)) == 2
    assert predictor.predict(distinct).gain < predictor.predict(shared).gain


def test_all_distinct_replicas_are_simulated_in_fewer_iterations():
    fields = {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 4, "global_batch_size": 128}
    predictor = make_predictor(gpus=2 * 64, train_iters=1000, num_layers=32, **fields)
    shared = dataclasses.replace(LAYERDROP, sampler="balanced")
    distinct = dataclasses.replace(shared, replicas="distinct")
    iterations = predictor.sampled(distinct)
    assert (len(iterations), len(predictor.sampled(shared))) == (62, 500)
    replicas = predictor.shares(distinct, predictor.policy(distinct), iterations, predictor.setup.placement)
    assert len(replicas) == 64
    eight, all_of_them = (predictor.model.times(some) for some in (replicas[:8], replicas))
    assert all_of_them.schedule.mean() > 1.02 * eight.schedule.mean()  # the slowest decides
    assert predictor.predict(distinct).iteration_s == pytest.approx(all_of_them.total.mean(), rel=0.005)


def test_decisions_for_each_microbatch_are_simulated_as_such():
    predictor = make_predictor(**PIPELINE)
    section = dataclasses.replace(LAYERDROP, decision_scope="microbatch")
    shares = predictor.shares(section, predictor.policy(section), [1, 2], predictor.setup.placement)
    assert shares[0].shape == (2, 16, 8)
    assert 0 < predictor.predict(section).gain < predictor.predict(section).ideal_gain


def test_a_bucket_of_dropped_layers_is_not_reduced():
    slow = dataclasses.replace(HARDWARE, intra_bandwidth=0.05)
    fields = {"gpus": 2, "hardware": slow, "overlap_grad_reduce": True}
    many = make_predictor(**fields, ddp_bucket_size=500_000).predict(dataclasses.replace(LAYERDROP, theta=0.4))
    one = make_predictor(**fields, ddp_bucket_size=10**9).predict(dataclasses.replace(LAYERDROP, theta=0.4))
    assert many.gain > one.gain + 0.1


@pytest.mark.parametrize("policy", ["layerdrop", "pld"])
@pytest.mark.parametrize("fields", [{}, PIPELINE])
def test_a_target_is_the_inverse_of_a_prediction(policy, fields):
    predictor = make_predictor(**fields)
    section = DropConfig(policy=policy)
    wanted = predictor.predict(dataclasses.replace(section, theta=0.62)).gain
    target = find_target(predictor, section, wanted)
    assert target.reached
    assert target.drop.theta == pytest.approx(0.62, abs=1e-3)
    assert target.prediction.gain >= wanted
    assert target.prediction.gain == pytest.approx(wanted, abs=2e-3)


def test_a_target_out_of_reach_is_said_to_be():
    target = find_target(make_predictor(), DropConfig(policy="pld"), 0.9)
    assert not target.reached
    assert target.drop.theta == 0.4
    assert "cannot be reached" in target.note


def test_sblds_target_comes_with_its_lists_and_widens_them_where_theta_does_not_suffice(sensitivity):
    predictor = make_predictor(num_layers=8)
    section = DropConfig(policy="sbld", sensitivity=sensitivity, block_fraction=0.15, allow_fraction=0.13)
    easy = find_target(predictor, section, 0.2)
    assert easy.reached
    assert easy.block_layers == [4]
    assert easy.allow_layers == [3]
    assert easy.prediction.gain >= 0.2
    lowest = predictor.predict(dataclasses.replace(section, theta=0.4)).gain
    assert find_target(predictor, section, lowest + 0.01).drop.allow_fraction == 0.20


def test_a_target_below_what_the_allow_list_gains_shrinks_it(sensitivity):
    predictor = make_predictor(num_layers=8)
    section = DropConfig(policy="sbld", sensitivity=sensitivity, allow_fraction=0.3)
    alone = predictor.predict(dataclasses.replace(section, theta=1.0)).gain
    target = find_target(predictor, section, alone / 3)
    assert target.drop.allow_fraction < 0.3
    assert target.prediction.gain == pytest.approx(alone / 3, abs=0.01)


def test_a_target_is_checked():
    with pytest.raises(ValueError, match=r"needs drop\.policy"):
        find_target(make_predictor(), DropConfig(), 0.2)
    with pytest.raises(ValueError, match=r"target_gain = -0\.1"):
        find_target(make_predictor(), DropConfig(policy="pld"), -0.1)


def test_every_policy_is_compared_and_the_configs_own_as_it_is(sensitivity):
    own = DropConfig(policy="pld", gamma=0.5, seed=7, recovery_fraction=0.1, dropped_update="freeze")
    sections = compared_sections(own)
    assert [(section.policy, section.theta) for section in sections[:3]] == [("pld", 0.9), ("pld", 0.7), ("pld", 0.5)]
    assert {section.policy for section in sections} == {"pld", "layerdrop", "stochastic_depth"}
    assert all(section.seed == 7 and section.recovery_fraction == 0.1 for section in sections)
    assert {section.dropped_update for section in sections} == {"freeze"}
    assert [section.gamma for section in sections[:4]] == [0.5, 0.5, 0.5, None]
    assert "sbld" in {
        section.policy for section in compared_sections(dataclasses.replace(own, sensitivity=sensitivity))
    }
