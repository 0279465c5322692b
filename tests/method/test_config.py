"""The drop section: defaults, what is refused by name, what is tolerated, and the policy that is built from it."""

import dataclasses
import warnings

import numpy as np
import pytest

from megatron_sbld.method.build import build_policy
from megatron_sbld.method.build_schedule import build_schedule
from megatron_sbld.method.config import DropConfig, drop_field_names
from megatron_sbld.method.policy import FullDepthPolicy, LayerDropPolicy, PLDPolicy, SBLDPolicy, StochasticDepthPolicy
from megatron_sbld.method.schedule import PWEGD, Constant, Exponential, Linear, Polynomial
from megatron_sbld.method.validate import validate_drop
from megatron_sbld.sensitivity.file import SensitivityFile

NUM_LAYERS = 12
TRAIN_ITERS = 1000
GAP = [0.9, 0.1, -0.2, 0.3, 0.25, 0.2, -0.1, 0.0, 0.35, 0.4, 0.5, 0.8]


@pytest.fixture
def sensitivity(tmp_path):
    path = tmp_path / "sensitivity.json"
    SensitivityFile.from_gaps(GAP, [0.01] * NUM_LAYERS, {"command": "test"}).save(path)
    return str(path)


def build(**fields):
    return build_policy(DropConfig(**fields), NUM_LAYERS, TRAIN_ITERS)


def test_the_default_section_drops_nothing():
    assert isinstance(build(), FullDepthPolicy)
    assert build().keep_probs(1).tolist() == [1.0] * NUM_LAYERS


def test_every_policy_takes_its_own_schedule_and_scaling(sensitivity):
    expected = {
        "sbld": (SBLDPolicy, PWEGD, "none"),
        "pld": (PLDPolicy, Exponential, "inverse_keep_prob"),
        "layerdrop": (LayerDropPolicy, Constant, "none"),
        "stochastic_depth": (StochasticDepthPolicy, Constant, "none"),
    }
    for name, (policy_class, schedule_class, residual_scale) in expected.items():
        policy = build(policy=name, sensitivity=sensitivity if name == "sbld" else None)
        assert type(policy) is policy_class
        assert type(policy.schedule) is schedule_class
        assert policy.residual_scale == residual_scale
        assert policy.num_layers == NUM_LAYERS


def test_schedules_default_to_the_rules_of_the_equations():
    pwegd = build_schedule(DropConfig(policy="sbld", theta=0.7), TRAIN_ITERS)
    assert pwegd.peak_iteration == pytest.approx(100, rel=1e-12)
    assert pwegd(100) == pytest.approx(0.85, rel=1e-12)
    assert pwegd.shape == 3.0
    assert build_schedule(DropConfig(policy="pld", theta=0.5), TRAIN_ITERS) == Exponential(theta=0.5, gamma=0.1)
    linear = DropConfig(policy="pld", schedule="linear", theta=0.5)
    assert build_schedule(linear, TRAIN_ITERS) == Linear(1.0, 0.5, TRAIN_ITERS)
    polynomial = DropConfig(policy="pld", schedule="polynomial", theta=0.5)
    assert build_schedule(polynomial, TRAIN_ITERS) == Polynomial(1.0, 0.5, TRAIN_ITERS, 3.0)
    assert build_schedule(DropConfig(policy="layerdrop", theta=0.5), TRAIN_ITERS) == Constant(0.5)


@pytest.mark.parametrize(
    ("fields", "schedule"),
    [
        (
            {"schedule": "pwegd", "a": 1.0, "b": 50.0, "c": 2.0, "epsilon": 5.0, "eta": 3.0},
            PWEGD(theta=0.9, a=1.0, b=50.0, c=2.0, epsilon=5.0, eta=3.0),
        ),
        ({"schedule": "exponential", "gamma": 0.02}, Exponential(0.9, 0.02)),
        ({"schedule": "linear", "start_theta": 0.5, "duration": 40.0}, Linear(0.5, 0.9, 40.0)),
        (
            {"schedule": "polynomial", "start_theta": 0.5, "duration": 40.0, "power": 2.0},
            Polynomial(0.5, 0.9, 40.0, 2.0),
        ),
    ],
)
def test_a_schedules_parameters_reach_it(fields, schedule):
    assert build(policy="layerdrop", **fields).schedule == schedule


@pytest.mark.parametrize("scale", [{"b": 100.0}, {"peak_iteration": 105.0}])
@pytest.mark.parametrize("height", [{"eta": 3.0}, {"peak_theta": 0.97}])
def test_pwegds_scale_and_height_are_set_by_symbol_or_by_peak_in_any_combination(scale, height):
    schedule = build_schedule(DropConfig(policy="sbld", a=1.1, epsilon=5.0, **scale, **height), TRAIN_ITERS)
    peak = 5.0 + 1.1 * 100.0 / 2 if "b" in scale else 105.0
    assert schedule.peak_iteration == pytest.approx(peak, rel=1e-12)
    if "eta" in height:
        assert schedule.eta == 3.0
    else:
        assert schedule(peak) == pytest.approx(0.97, rel=1e-12)


def test_the_settings_of_every_policy_reach_it(sensitivity):
    fields = {
        **{"alpha": 0.7, "beta": 0.2, "theta_min": 0.5, "theta_max": 0.9, "allow_keep_prob": 0.45},
        **{"block_layers": [4], "allow_layers": [1, 2], "residual_scale": "inverse_keep_prob"},
    }
    policy = build(policy="sbld", sensitivity=sensitivity, recovery_fraction=0.1, **fields)
    assert {name: getattr(policy, name) for name in fields} == {**fields, "block_layers": (4,), "allow_layers": (1, 2)}
    np.testing.assert_allclose(policy.sensitivity, (np.array(GAP) + 0.2) / 1.1, atol=1e-12)
    assert policy.first_recovery_iteration == 901
    for name in ("pld", "layerdrop", "stochastic_depth"):
        other = build(policy=name, recovery_fraction=0.1, residual_scale="none")
        assert other.first_recovery_iteration == 901
        assert other.residual_scale == "none"


def test_a_relative_sensitivity_path_starts_from_the_base_folder(sensitivity, tmp_path):
    config = DropConfig(policy="sbld", sensitivity="sensitivity.json")
    assert build_policy(config, NUM_LAYERS, TRAIN_ITERS, base_dir=tmp_path).num_layers == NUM_LAYERS
    with pytest.raises(ValueError, match=r"drop\.sensitivity = 'sensitivity\.json' .*No such file"):
        build_policy(config, NUM_LAYERS, TRAIN_ITERS, base_dir=tmp_path / "elsewhere")


def test_lists_come_from_the_rule_unless_the_user_gives_them(sensitivity):
    def lists(**fields):
        policy = build(policy="sbld", sensitivity=sensitivity, **fields)
        return policy.block_layers, policy.allow_layers

    assert lists() == ((1,), (3,))
    assert lists(block_fraction=0.25, allow_fraction=0.25) == ((1, 11, 12), (3, 7, 8))
    assert lists(block_layers=[], allow_layers=[]) == ((), ())
    assert lists(block_layers=[2, 5]) == ((2, 5), (3,))
    assert lists(allow_layers=[2, 5]) == ((1,), (2, 5))
    # What the user puts into one list, the rule does not put into the other.
    assert lists(block_layers=[3], allow_fraction=0.25) == ((3,), (7, 8))
    assert lists(allow_layers=[1], block_fraction=0.25) == ((11, 12), (1,))


def test_a_list_may_leave_the_other_ones_default_fraction_nothing(sensitivity):
    policy = build(policy="sbld", sensitivity=sensitivity, allow_layers=list(range(1, 13)))
    assert (policy.block_layers, policy.allow_layers) == ((), tuple(range(1, 13)))
    policy = build(policy="sbld", sensitivity=sensitivity, block_layers=[layer for layer in range(1, 13) if layer != 4])
    assert policy.allow_layers == ()


def test_lists_that_contradict_each_other_are_refused_before_the_file_is_read():
    with pytest.raises(ValueError, match=r"drop\.block_fraction = 0\.6 and drop\.allow_fraction"):
        build(policy="sbld", sensitivity="absent.json", block_fraction=0.6, allow_fraction=0.6)


def test_lists_of_the_file_that_the_rule_does_not_give_are_reported(sensitivity):
    measured = dataclasses.replace(SensitivityFile.load(sensitivity), block=(2,))
    measured.save(sensitivity)
    with pytest.warns(UserWarning, match=r"lists in .*block \[2\].* are not used"):
        assert build(policy="sbld", sensitivity=sensitivity).block_layers == (1,)


def test_a_sensitivity_file_of_another_depth_is_refused(sensitivity):
    with pytest.raises(ValueError, match=r"is for 12 layers, but the model has 24: .*set drop\.interpolate true"):
        build_policy(DropConfig(policy="sbld", sensitivity=sensitivity), 24, TRAIN_ITERS)


def test_a_sensitivity_file_of_another_depth_is_interpolated_when_asked_for(sensitivity):
    config = DropConfig(policy="sbld", sensitivity=sensitivity, interpolate=True)
    with pytest.warns(UserWarning, match="interpolated from 12 to 24 layers") as warned:
        policy = build_policy(config, 24, TRAIN_ITERS)
    assert len(warned) == 1
    expected = SensitivityFile.load(sensitivity).interpolated(24)
    assert policy.sensitivity.tolist() == list(expected.sensitivity)
    assert (policy.block_layers, policy.allow_layers) == (expected.block, expected.allow)
    with pytest.raises(ValueError, match=r"drop\.interpolate = True is not allowed for 1 layers: gap is .* equal gaps"):
        build_policy(config, 1, TRAIN_ITERS)


def test_a_file_of_the_models_own_depth_is_used_as_it_is_with_interpolate(sensitivity):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        policy = build(policy="sbld", sensitivity=sensitivity, interpolate=True)
    assert policy.sensitivity.tolist() == list(SensitivityFile.load(sensitivity).sensitivity)


@pytest.mark.parametrize(
    ("measured", "fields", "message"),
    [
        ({"decision_scope": "microbatch"}, {}, "decision_scope microbatch, but drop.decision_scope is iteration"),
        ({"decision_scope": "iteration"}, {"decision_scope": "microbatch"}, "drop.decision_scope is microbatch"),
        (
            {"residual_scale": "inverse_keep_prob"},
            {},
            "residual_scale inverse_keep_prob, but drop.residual_scale is none",
        ),
        (
            {"residual_scale": "none"},
            {"residual_scale": "inverse_keep_prob"},
            "drop.residual_scale is inverse_keep_prob",
        ),
        ({"dropped_update": "freeze"}, {}, "dropped_update freeze, but drop.dropped_update is apply"),
        ({"dropped_update": "apply"}, {"dropped_update": "freeze"}, "drop.dropped_update is freeze"),
        ({"granularity": "sample"}, {}, "granularity sample, but drop.granularity is layer"),
        ({"granularity": "layer"}, {"granularity": "sample"}, "drop.granularity is sample"),
        ({"decision_scope": "iteration", "residual_scale": "none", "theta": 0.1, "seed": 7}, {}, None),
        ({"residual_scale": "none"}, {"residual_scale": None}, None),
        ({"residual_scale": None}, {"residual_scale": "none"}, None),
        ("layer by layer", {}, None),
        ({}, {"residual_scale": "inverse_keep_prob"}, None),
    ],
)
def test_settings_that_the_gaps_were_measured_without_are_reported(tmp_path, measured, fields, message):
    path = tmp_path / "measured.json"
    model = {"hidden_size": 99}  # of another width, which is the reuse that the paper makes
    SensitivityFile.from_gaps(GAP, [0.01] * NUM_LAYERS, {"drop": measured, "model": model}).save(path)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        build(policy="sbld", sensitivity=str(path), **fields)
    messages = [str(warning.message) for warning in warned]
    assert len(messages) == (message is not None)
    assert all(message in text for text in messages)


OUT_OF_RANGE = {
    "recipe": "best",
    "depth": "cubic",
    "stage_init": "ones",
    "stage_copy_moments": "yes",
    "stage_warmup": 1.0,
    "hold_until": 1.1,
    "decay_until": -0.1,
    "policy": "random",
    "schedule": "cosine",
    "theta": 0.0,
    "a": float("nan"),
    "b": 0.0,
    "c": float("inf"),
    "epsilon": float("nan"),
    "eta": -1.0,
    "peak_iteration": 0.0,
    "peak_theta": 1.1,
    "gamma": 0.0,
    "start_theta": 0.0,
    "duration": 0.0,
    "power": -1.0,
    "alpha": -0.1,
    "beta": -0.1,
    "theta_min": -0.1,
    "theta_max": 1.1,
    "sensitivity": 3,
    "interpolate": 1,
    "sensitivity_update": "always",
    "update_interval": 0,
    "update_memory": 9,
    "exploration": 0.5,
    "release_block": "yes",
    "block_fraction": 1.1,
    "allow_fraction": -0.1,
    "allow_keep_prob": 1.1,
    "residual_scale": "keep_prob",
    "residual": "own",
    "recovery_fraction": 1.1,
    "decision_scope": "step",
    "granularity": "tokens",
    "token_schedule": "cosine",
    "min_tokens": 0,
    "token_step": 0,
    "token_iterations": 0,
    "token_strata": 0,
    "unit": "blocks",
    "sampler": "uniform",
    "balance_stages": 0,
    "replicas": "own",
    "dropped_update": "zero",
    "seed": -1,
}


def test_the_table_of_values_out_of_range_has_every_field():
    assert set(drop_field_names()) - set(OUT_OF_RANGE) == {
        *("block_layers", "allow_layers", "keep_layers"),
        *("stages", "stage_layers", "steps"),  # test_stages.py
        *("token_layers", "token_steps"),  # test_tokens.py
    }


@pytest.mark.parametrize(("name", "value"), OUT_OF_RANGE.items())
def test_a_value_out_of_range_is_refused_by_name_even_when_nothing_is_dropped(name, value):
    with pytest.raises(ValueError, match=rf"^drop\.{name} = .* is not allowed: it must be "):
        validate_drop(DropConfig(**{name: value}), NUM_LAYERS, TRAIN_ITERS)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"b": 5.0, "peak_iteration": 7.0}, r"drop\.b = 5\.0 and drop\.peak_iteration = 7\.0 exclude"),
        ({"eta": 5.0, "peak_theta": 0.95}, r"drop\.eta = 5\.0 and drop\.peak_theta = 0\.95 exclude"),
        ({"block_layers": [1], "block_fraction": 0.2}, r"drop\.block_layers .* and drop\.block_fraction .* exclude"),
        ({"allow_layers": [1], "allow_fraction": 0.2}, r"drop\.allow_layers .* and drop\.allow_fraction .* exclude"),
        ({"theta_min": 0.8, "theta_max": 0.7}, r"drop\.theta_min = 0\.8 .*above drop\.theta_max"),
        ({"peak_theta": 0.8}, r"drop\.peak_theta = 0\.8 .*\[0\.9, 1\]"),
        ({"peak_iteration": 10.0, "epsilon": 10.0}, r"drop\.peak_iteration = 10\.0 .*above epsilon"),
        ({"a": 0.2, "c": 0.3}, r"drop\.a \+ drop\.c = 0\.5"),
        ({"a": 0.5, "c": 0.5}, r"drop\.b = None .*a \+ c = 1"),
        ({"block_layers": [13]}, r"drop\.block_layers entry = 13 .*\[1, 12\]"),
        ({"allow_layers": [0]}, r"drop\.allow_layers entry = 0"),
        ({"block_layers": [1, 1]}, r"drop\.block_layers = .*only once"),
        ({"block_layers": [1, 2], "allow_layers": [2]}, r"drop\.block_layers and allow_layers both have \[2\]"),
        ({"block_layers": list(range(1, 13))}, r"drop\.block_layers has all 12 layers"),
        ({"allow_layers": [13]}, r"drop\.allow_layers entry = 13 .*\[1, 12\]"),
        ({"block_layers": [0]}, r"drop\.block_layers entry = 0 .*\[1, 12\]"),
        ({"block_layers": [-1]}, r"drop\.block_layers entry = -1"),
        ({"block_layers": [1.5]}, r"drop\.block_layers entry = 1\.5 .*an integer"),
        ({"allow_layers": ["2"]}, r"drop\.allow_layers entry = '2' .*an integer"),
        ({"allow_layers": [True]}, r"drop\.allow_layers entry = True .*an integer"),
        ({"block_layers": 3}, r"drop\.block_layers = 3 .*a list of layer numbers"),
        ({"allow_layers": "12"}, r"drop\.allow_layers = '12' .*a list of layer numbers"),
        ({"block_layers": [1, 2, 5], "allow_layers": [5, 2]}, r"both have \[2, 5\]"),
        ({"block_fraction": 1.0, "allow_fraction": 0.0}, r"drop\.block_fraction = 1\.0 .*blocks all 12 layers"),
        ({"block_fraction": 1.0, "allow_layers": [1]}, r"drop\.block_fraction = 1\.0 .*blocks all 12 layers"),
        ({"block_fraction": 1.0}, r"drop\.block_fraction = 1\.0 .*blocks all 12 layers"),
        ({"block_fraction": 0.6, "allow_fraction": 0.6}, r"drop\.block_fraction = 0\.6 and drop\.allow_fraction"),
        ({"allow_fraction": 1.0}, r"drop\.block_fraction = 0\.15 and drop\.allow_fraction = 1\.0 .* 1 and 12 of 12"),
        (
            {"block_layers": [1, 2, 3, 4, 5, 6, 7], "allow_fraction": 0.5},
            r"drop\.block_layers = \[1, .*, 7\] and drop\.allow_fraction = 0\.5 ask for 7 and 6 of 12",
        ),
        (
            {"allow_layers": [1, 2, 3, 4, 5, 6, 7], "block_fraction": 0.5},
            r"drop\.block_fraction = 0\.5 and drop\.allow_layers = \[1, .*, 7\] ask for 6 and 7 of 12",
        ),
        (
            {"replicas": "distinct", "sampler": "balanced", "sensitivity_update": "dynamic"},
            r"drop\.replicas = 'distinct' does not work with drop\.sensitivity_update = 'dynamic'",
        ),
        (
            {"replicas": "distinct", "sampler": "balanced", "dropped_update": "freeze"},
            r"drop\.replicas = 'distinct' does not work with drop\.dropped_update = 'freeze'",
        ),
        ({"replicas": "distinct"}, r"drop\.replicas = 'distinct' does not work with drop\.sampler = 'bernoulli'"),
        (
            {"granularity": "sample", "sensitivity_update": "dynamic"},
            r"drop\.granularity = 'sample' does not work with drop\.sensitivity_update = 'dynamic'",
        ),
        ({"balance_stages": 2}, r"drop\.balance_stages = 2 does not work with drop\.sampler = 'bernoulli'"),
        ({"sampler": "balanced", "balance_stages": 5}, r"drop\.balance_stages = 5 .*divide the 12 layers"),
        ({"sampler": "balanced", "balance_stages": 24}, r"drop\.balance_stages = 24 .*divide the 12 layers"),
        ({"duration": 10.0}, r"drop\.duration = 10\.0 is not used by drop\.schedule pwegd.*linear or polynomial"),
        ({"schedule": "pwegd", "gamma": 0.1}, r"drop\.gamma = 0\.1 is not used by drop\.schedule pwegd.*exponential"),
        ({"schedule": "constant", "eta": 1.0}, r"drop\.eta = 1\.0 is not used by drop\.schedule constant"),
        ({"schedule": "linear", "power": 2.0}, r"drop\.power = 2\.0 is not used by drop\.schedule linear"),
    ],
)
def test_contradictions_and_settings_that_nothing_would_use_are_refused(fields, message, sensitivity):
    build(policy="sbld", sensitivity=sensitivity)
    with pytest.raises(ValueError, match=message):
        build(policy="sbld", sensitivity=sensitivity, **fields)
    assert isinstance(build(policy="none", sensitivity=sensitivity, **fields), FullDepthPolicy)


def test_sbld_without_a_sensitivity_file_says_how_to_get_one():
    with pytest.raises(ValueError, match=r"drop\.sensitivity = None .*12 layers .*megatron-sbld sensitivity measure"):
        validate_drop(DropConfig(policy="sbld"), NUM_LAYERS, TRAIN_ITERS)


def test_one_file_serves_several_policies_and_what_has_no_effect_is_reported():
    shared = {"sensitivity": "absent.json", "beta": 0.4, "peak_theta": 0.95}
    with pytest.warns(UserWarning, match=r"policy pld: drop\.beta, drop\.peak_theta, drop\.sensitivity$"):
        assert isinstance(build(policy="pld", gamma=0.01, **shared), PLDPolicy)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert isinstance(build(policy="none", gamma=0.01, **shared), FullDepthPolicy)
        build(policy="pld", gamma=0.01, seed=3, decision_scope="microbatch", recovery_fraction=0.1)


def test_the_balanced_sampler_balances_the_pipelines_stages_unless_told_otherwise():
    balanced = DropConfig(policy="pld", sampler="balanced", replicas="distinct")
    validate_drop(balanced, NUM_LAYERS, TRAIN_ITERS, num_stages=4)
    with pytest.raises(ValueError, match=r"pipeline stages = 5 .*12 layers"):
        validate_drop(balanced, NUM_LAYERS, TRAIN_ITERS, num_stages=5)
    validate_drop(dataclasses.replace(balanced, balance_stages=3), NUM_LAYERS, TRAIN_ITERS, num_stages=5)
    validate_drop(balanced, NUM_LAYERS, TRAIN_ITERS, num_stages=None)
    with pytest.raises(ValueError, match=r"drop\.balance_stages = 5 .*12 layers"):
        validate_drop(dataclasses.replace(balanced, balance_stages=5), NUM_LAYERS, TRAIN_ITERS, num_stages=None)


def test_distinct_replicas_that_run_the_same_layers_need_no_balance_and_can_freeze():
    fields = {"policy": "pld", "granularity": "sample", "replicas": "distinct", "dropped_update": "freeze"}
    validate_drop(DropConfig(**fields), NUM_LAYERS, TRAIN_ITERS)
    validate_drop(DropConfig(**fields, sampler="balanced", balance_stages=3), NUM_LAYERS, TRAIN_ITERS)


def test_a_run_or_model_of_no_length_is_refused():
    with pytest.raises(ValueError, match=r"^train_iters = 0"):
        validate_drop(DropConfig(), NUM_LAYERS, 0)
    with pytest.raises(ValueError, match=r"^num_layers = 0"):
        validate_drop(DropConfig(), 0, TRAIN_ITERS)


def test_theta_below_the_papers_range_warns():
    with pytest.warns(UserWarning, match=r"theta = 0\.3 is below 0\.4"):
        build(policy="pld", theta=0.3)


def test_dynamic_sensitivity_explores_and_without_it_nothing_does(sensitivity):
    dynamic = build(policy="sbld", sensitivity=sensitivity, sensitivity_update="dynamic", theta=1.0)
    assert dynamic.keep_probs(1)[0] == 1.0
    assert np.delete(dynamic.keep_probs(1), [0, 2]) == pytest.approx([0.98] * 10)
    fields = {"sensitivity_update": "dynamic", "exploration": 0.1, "release_block": True}
    explored = build(policy="sbld", sensitivity=sensitivity, theta=1.0, **fields)
    assert np.delete(explored.keep_probs(1), 2) == pytest.approx([0.9] * 11)
    assert build(policy="sbld", sensitivity=sensitivity, theta=1.0).keep_probs(1)[1] == 1.0


def test_fields_of_dynamic_sensitivity_that_have_no_effect_are_reported(sensitivity):
    fields = {"update_interval": 5, "update_memory": 50, "exploration": 0.1, "release_block": True}
    names = r"drop\.exploration, drop\.release_block, drop\.update_interval, drop\.update_memory"
    with pytest.warns(UserWarning, match=rf"policy sbld and drop\.sensitivity_update none: {names}$"):
        assert build(policy="sbld", sensitivity=sensitivity, theta=1.0, **fields).keep_probs(1)[1] == 1.0
    with pytest.warns(UserWarning, match=r"policy pld: .*drop\.exploration.*drop\.sensitivity_update"):
        build(policy="pld", sensitivity_update="dynamic", **fields)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build(policy="sbld", sensitivity=sensitivity, sensitivity_update="dynamic", **fields)
