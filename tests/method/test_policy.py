"""Keep probabilities of every policy against docs/method.md 2 and 4, and what the paper's tables imply (7)."""

import doctest
import math

import numpy as np
import pytest

import megatron_sbld.method.policy
from megatron_sbld.method.policy import (
    FullDepthPolicy,
    LayerDropPolicy,
    PLDPolicy,
    SBLDPolicy,
    StochasticDepthPolicy,
    mean_keep_prob,
)
from megatron_sbld.method.schedule import PWEGD, Constant, Exponential, Linear

BY_DEPTH = [PLDPolicy, LayerDropPolicy, StochasticDepthPolicy]


def test_examples_in_the_docstrings_hold():
    results = doctest.testmod(megatron_sbld.method.policy)
    assert results.attempted >= 4
    assert results.failed == 0


def test_sbld_is_algorithm_1_with_the_lists_of_algorithm_2():
    rng = np.random.default_rng(0)
    sensitivity = rng.uniform(size=24)
    schedule = PWEGD.from_peak(theta=0.7, peak_iteration=100, peak_theta=0.9)
    policy = SBLDPolicy(
        schedule,
        sensitivity.tolist(),
        alpha=0.8,
        beta=0.3,
        theta_min=0.6,
        theta_max=0.95,
        block_layers=(24, 14),
        allow_layers=[1, 5],
        allow_keep_prob=0.45,
    )
    for t in (1, 50, 100, 1000):
        expected = []
        for layer in range(1, 25):
            keep_prob = min(max(0.8 * schedule(t) + 0.3 * sensitivity[layer - 1], 0.6), 0.95)
            expected.append(1.0 if layer in (14, 24) else 0.45 if layer in (1, 5) else keep_prob)
        keep_probs = policy.keep_probs(t)
        assert keep_probs.dtype == np.float64
        np.testing.assert_allclose(keep_probs, expected, rtol=1e-15)
    assert policy.num_layers == 24
    assert policy.residual_scale == "none"


def test_sbld_defaults_are_those_of_the_equations():
    policy = SBLDPolicy(Constant(0.5), [0.0, 0.2, 0.9, 1.0])
    np.testing.assert_allclose(policy.keep_probs(1), [0.5, 0.6, 0.95, 1.0], rtol=1e-15)
    with pytest.warns(UserWarning, match="theta"):
        low = Constant(0.1)
    assert SBLDPolicy(low, [0.0, 1.0]).keep_probs(1).tolist() == [0.4, 0.6]
    assert SBLDPolicy(Constant(0.5), [0.0, 1.0], allow_layers=[2]).keep_probs(1).tolist() == [0.5, 0.4]


def test_sbld_keeps_a_theta_above_one_for_its_weighting():
    schedule = PWEGD(theta=0.9, a=2, b=2000, c=1, epsilon=0, eta=5000.0)
    policy = SBLDPolicy(schedule, [0.0, 1.0], alpha=0.2, beta=0.0, theta_min=0.1)
    assert schedule(2000) > 2.0
    assert policy.theta(2000) == schedule(2000)
    assert policy.keep_probs(2000)[0] == pytest.approx(0.2 * schedule(2000), rel=1e-15)
    assert LayerDropPolicy(schedule, 3).theta(2000) == 1.0
    assert LayerDropPolicy(schedule, 3).keep_probs(2000).tolist() == [1.0, 1.0, 1.0]


def test_layers_of_figure_6_follow_one_trend_in_the_order_of_their_sensitivity():
    policy = SBLDPolicy(PWEGD.from_peak(theta=0.5, peak_iteration=200, peak_theta=0.6), [0.3, 0.5, 0.8, 0.0, 0.6])
    curves = np.stack([policy.keep_probs(t) for t in range(1, 1000)])
    assert np.all(np.argsort(curves, axis=1) == [3, 0, 1, 4, 2])
    assert np.all(np.argmax(curves, axis=0) == 199)


def test_pld_never_drops_the_first_layer_and_the_last_least_often_kept():
    policy = PLDPolicy(Exponential(theta=0.5, gamma=0.01), num_layers=12)
    for t in (0, 1, 100, 10_000):
        theta = 0.5 * math.exp(-0.01 * t) + 0.5
        assert policy.theta(t) == pytest.approx(theta, rel=1e-14)
        np.testing.assert_allclose(policy.keep_probs(t), [1 - i / 12 * (1 - theta) for i in range(12)], rtol=1e-14)
    assert policy.keep_probs(0).tolist() == [1.0] * 12
    assert policy.residual_scale == "inverse_keep_prob"


def test_stochastic_depth_keeps_the_last_layer_with_theta():
    policy = StochasticDepthPolicy(Constant(0.6), num_layers=10)
    np.testing.assert_allclose(policy.keep_probs(1), [1 - layer / 10 * 0.4 for layer in range(1, 11)], rtol=1e-14)
    assert policy.residual_scale == "none"


def test_layerdrop_is_uniform_and_full_depth_keeps_everything():
    assert LayerDropPolicy(Constant(0.6), num_layers=3).keep_probs(1).tolist() == [0.6] * 3
    full = FullDepthPolicy(num_layers=3)
    assert full.keep_probs(1).tolist() == [1.0] * 3
    assert full.theta(1) == 1.0
    assert full.residual_scale == "none"


@pytest.mark.parametrize("policy_class", BY_DEPTH)
def test_a_model_of_one_layer_has_a_finite_keep_probability(policy_class):
    assert 0.5 <= policy_class(Constant(0.5), num_layers=1).keep_probs(1)[0] <= 1.0


@pytest.mark.parametrize(
    ("num_layers", "theta", "implied"),
    [(24, 0.9, 0.958), (24, 0.7, 0.868), (24, 0.5, 0.777), (30, 0.9, 0.966), (30, 0.7, 0.886), (30, 0.5, 0.815)],
)
def test_plds_final_mean_is_the_one_of_the_paper_and_below_what_its_measured_gain_implies(num_layers, theta, implied):
    policy = PLDPolicy(Exponential(theta=theta, gamma=100 / 10_000), num_layers)
    final = mean_keep_prob(policy, [10_000])
    assert final == pytest.approx(1 - (1 - theta) * (num_layers - 1) / (2 * num_layers), rel=1e-12)
    # The tables' gains are about 90 % (1.7B, 24 layers) and 70 % (3.6B, 30 layers) of what the drops allow.
    assert (1 - implied) / (1 - final) == pytest.approx(0.9 if num_layers == 24 else 0.7, abs=0.1)


@pytest.mark.parametrize(("theta", "implied"), [(0.7, 0.820), (0.5, 0.730)])
def test_sblds_default_weights_come_out_near_the_papers_table_1(theta, implied):
    schedule = PWEGD.from_peak(theta=theta, peak_iteration=1000, peak_theta=theta + (1 - theta) / 2)
    policy = SBLDPolicy(schedule, np.linspace(0, 1, 24), block_layers=(22, 23, 24), allow_layers=(1, 2, 3))
    assert mean_keep_prob(policy, range(1, 10_001, 50)) == pytest.approx(implied, abs=0.07)


def test_mean_keep_prob_averages_over_layers_and_iterations():
    policy = LayerDropPolicy(Linear(1.0, 0.5, 4), num_layers=3)
    assert mean_keep_prob(policy, range(1, 5)) == pytest.approx((0.875 + 0.75 + 0.625 + 0.5) / 4, rel=1e-14)
    with pytest.raises(ValueError, match="iterations is empty"):
        mean_keep_prob(policy, [])


@pytest.mark.parametrize(
    ("fraction", "train_iters", "first_full"),
    [(0.1, 100, 91), (0.1, 30, 28), (0.15, 20, 18), (0.101, 100, 90), (1e-9, 100, 100), (0.25, 10, 8), (1.0, 10, 1)],
)
def test_recovery_ends_the_run_at_full_depth_from_its_stated_iteration_on(fraction, train_iters, first_full):
    policy = LayerDropPolicy(Constant(0.5), 4, recovery_fraction=fraction, train_iters=train_iters)
    for t in range(1, train_iters + 10):
        assert policy.keep_probs(t).tolist() == ([1.0] * 4 if t >= first_full else [0.5] * 4), t
    assert policy.theta(train_iters) == 0.5


def test_recovery_lifts_sblds_allow_list_too():
    policy = SBLDPolicy(Constant(0.5), [0.0, 1.0], allow_layers=[1], recovery_fraction=0.5, train_iters=10)
    assert policy.keep_probs(5).tolist() == [0.4, 1.0]
    assert policy.keep_probs(6).tolist() == [1.0, 1.0]


def test_without_recovery_no_iteration_is_lifted():
    assert PLDPolicy(Constant(0.5), 2, train_iters=10).keep_probs(10**9).tolist() == [1.0, 0.75]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"recovery_fraction": 0.1}, "recovery_fraction = 0.1 needs train_iters"),
        ({"recovery_fraction": 1.1, "train_iters": 10}, "^recovery_fraction = 1.1"),
        ({"recovery_fraction": 0.1, "train_iters": 0}, "^train_iters = 0"),
        ({"residual_scale": "keep_prob"}, "^residual_scale = 'keep_prob' .*inverse_keep_prob"),
    ],
)
def test_arguments_that_all_policies_share_are_checked(arguments, message):
    for policy_class in BY_DEPTH:
        with pytest.raises(ValueError, match=message):
            policy_class(Constant(0.5), 4, **arguments)
    with pytest.raises(ValueError, match=message):
        SBLDPolicy(Constant(0.5), [0.0, 1.0], **arguments)


def test_residual_scale_can_be_chosen_against_the_policys_own():
    assert PLDPolicy(Constant(0.5), 4, residual_scale="none").residual_scale == "none"
    scaled = SBLDPolicy(Constant(0.5), [0.0, 1.0], residual_scale="inverse_keep_prob")
    assert scaled.residual_scale == "inverse_keep_prob"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sensitivity": []}, "shape"),
        ({"sensitivity": [[0.0, 1.0]]}, "shape"),
        ({"sensitivity": [0.0, 1.5, 1.0]}, "sensitivity of layer 2"),
        ({"sensitivity": [0.0, 1.0, math.nan]}, "sensitivity of layer 3"),
        ({"alpha": -1.0}, "^alpha = -1.0"),
        ({"beta": math.inf}, "^beta = inf"),
        ({"theta_min": 0.8, "theta_max": 0.7}, r"^theta_min = 0.8 .*\[0, 0.7\]"),
        ({"theta_max": 1.1}, "^theta_max = 1.1"),
        ({"allow_keep_prob": -0.1}, "^allow_keep_prob = -0.1"),
        ({"block_layers": [0]}, r"block_layers entry = 0 .*\[1, 3\]"),
        ({"block_layers": [4]}, "block_layers entry = 4"),
        ({"block_layers": [2, 2]}, "block_layers = .* only once"),
        ({"allow_layers": [1.5]}, "allow_layers entry = 1.5"),
        ({"allow_layers": "12"}, "allow_layers = '12'"),
        ({"block_layers": [1, 2], "allow_layers": [2]}, r"both have \[2\]"),
        ({"block_layers": [3, 1, 2]}, "all 3 layers"),
    ],
)
def test_sbld_refuses_what_makes_no_keep_probability(arguments, message):
    with pytest.raises(ValueError, match=message):
        SBLDPolicy(**{"schedule": Constant(0.5), "sensitivity": [0.0, 0.5, 1.0], **arguments})


def test_iterations_that_are_none_are_refused():
    for iteration in (-1, 1.5, None):
        with pytest.raises(ValueError, match=r"^iteration = "):
            PLDPolicy(Constant(0.5), 4).keep_probs(iteration)


def test_a_policy_does_not_follow_later_changes_of_the_callers_list():
    sensitivity = np.array([0.0, 1.0])
    policy = SBLDPolicy(Constant(0.5), sensitivity)
    sensitivity[0] = 1.0
    policy.keep_probs(1)[0] = 0.0
    assert policy.keep_probs(1).tolist() == [0.5, 1.0]


def test_exploration_keeps_every_layer_outside_of_the_block_list_observable():
    options = {"block_layers": (6,), "allow_layers": (1,), "beta": 1.0, "theta_min": 0.0}
    sensitivity = [0.0, 0.2, 0.5, 0.9, 1.0, 1.0]
    plain = SBLDPolicy(Constant(0.4), sensitivity, allow_keep_prob=0.0, **options)
    explored = SBLDPolicy(Constant(0.4), sensitivity, allow_keep_prob=0.0, exploration=0.02, **options)
    assert plain.keep_probs(1) == pytest.approx([0.0, 0.6, 0.9, 1.0, 1.0, 1.0])
    assert explored.keep_probs(1) == pytest.approx([0.02, 0.6, 0.9, 0.98, 0.98, 1.0])
    released = SBLDPolicy(Constant(0.4), sensitivity, exploration=0.02, explore_block=True, **options)
    assert released.keep_probs(1)[5] == 0.98
    with pytest.raises(ValueError, match=r"exploration = 0\.5 .*\[0, 0\.5\)"):
        SBLDPolicy(Constant(0.4), sensitivity, exploration=0.5)


def test_the_recovery_explores_nothing():
    policy = SBLDPolicy(Constant(0.5), [0.0, 1.0], exploration=0.1, recovery_fraction=0.5, train_iters=10)
    assert policy.keep_probs(5).tolist() == [0.5, 0.9]
    assert policy.keep_probs(6).tolist() == [1.0, 1.0]


def test_another_sensitivity_makes_another_policy_and_leaves_the_first_as_it_was():
    first = SBLDPolicy(
        Constant(0.5), [0.0, 0.4, 1.0], block_layers=(2, 3), allow_layers=(1,), recovery_fraction=0.5, train_iters=10
    )
    second = first.with_sensitivity([0.0, 0.2, 0.6], block_layers=(3,))
    assert first.keep_probs(1).tolist() == [0.4, 1.0, 1.0]
    assert second.keep_probs(1).tolist() == [0.4, 0.6, 1.0]
    assert second.keep_probs(6).tolist() == [1.0] * 3
    for sensitivity, block in (([0.0, 1.0], (3,)), ([0.0, 0.2, 0.6], (1, 3))):
        with pytest.raises(ValueError, match="do not fit 3 layers with block_layers"):
            first.with_sensitivity(sensitivity, block)
    with pytest.raises(ValueError, match=r"sensitivity of layer 3 = .*1\.5"):
        first.with_sensitivity([0.0, 0.2, 1.5], (3,))


@pytest.mark.parametrize("found", [[0.5] * 3, [0.5] * 5, 0.5, [[0.5] * 4]])
def test_a_policy_of_a_users_own_gives_one_value_for_each_layer(found):
    class Own(LayerDropPolicy):
        def _keep_probs(self, theta):
            return found

    with pytest.raises(ValueError, match=r"Own gives keep probabilities of shape \(.*each of num_layers = 4 layers"):
        Own(Constant(0.5), 4).keep_probs(1)


def test_a_policy_of_a_users_own_may_give_a_list():
    class Own(LayerDropPolicy):
        def _keep_probs(self, theta):
            return [theta, 1]

    assert Own(Constant(0.5), 2).keep_probs(1).mean() == 0.75


@pytest.mark.parametrize("schedule", [0.5, None])
def test_a_number_in_the_place_of_a_schedule_is_refused_by_name(schedule):
    with pytest.raises(ValueError, match=r"^schedule = .*must be a function of t, as Constant\(0.5\) is"):
        LayerDropPolicy(schedule, 4)
