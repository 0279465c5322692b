"""The drop controller with granularity sample: what it answers about samples, and what replicas have in common."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from megatron_sbld.controller import DropController
from megatron_sbld.method.decisions import draw_sample_counts, draw_samples
from megatron_sbld.method.policy import LayerDropPolicy, StochasticDepthPolicy
from megatron_sbld.method.schedule import Constant

LAYERS, SAMPLES = 6, 4
POLICY = StochasticDepthPolicy(Constant(0.1), LAYERS)


def by_sample(**settings: Any) -> DropController:
    return DropController(POLICY, seed=5, granularity="sample", num_samples=SAMPLES, **settings)


@pytest.mark.parametrize("scope", ["iteration", "microbatch"])
def test_it_answers_what_the_plan_says(scope: Any) -> None:
    controller = by_sample(scope=scope)
    seen = set()
    for iteration in range(1, 30):
        controller.begin_iteration(iteration, num_microbatches=3)
        counts = draw_sample_counts(POLICY.keep_probs(iteration), SAMPLES, 5, iteration, 3, scope)
        plan = draw_samples(counts, SAMPLES, 5, iteration, scope)
        for microbatch in range(3):
            for layer in range(1, LAYERS + 1):
                expected = np.flatnonzero(plan[microbatch, layer - 1])
                found = controller.kept_samples(layer, microbatch)
                assert (list(range(SAMPLES)) if found is None else found.tolist()) == expected.tolist()
                assert (found is None) == (len(expected) == SAMPLES)
                assert controller.kept(layer, microbatch) == (len(expected) > 0)
                assert controller.runs_some_samples(layer, microbatch) == (0 < len(expected) < SAMPLES)
                seen.add(len(expected))
        assert controller.kept_fraction == pytest.approx(plan.mean())
        np.testing.assert_allclose(controller.kept_shares, counts / SAMPLES)
        np.testing.assert_array_equal(controller.plan, counts > 0)
    assert seen == set(range(SAMPLES + 1))


def test_decisions_about_layers_know_all_samples_and_none() -> None:
    controller = DropController(POLICY, seed=5)
    controller.begin_iteration(3, 1)
    for layer in range(1, LAYERS + 1):
        samples = controller.kept_samples(layer, 0)
        assert (samples is None) == controller.kept(layer, 0)
        assert samples is None or samples.size == 0
        assert not controller.runs_some_samples(layer, 0)
    np.testing.assert_array_equal(controller.kept_shares, controller.plan)
    assert 0 < controller.kept_fraction < 1


def test_the_mean_share_of_samples_is_the_mean_keep_probability() -> None:
    controller = by_sample(scope="microbatch")
    shares = []
    for iteration in range(1, 301):
        controller.begin_iteration(iteration, 8)
        shares.append(controller.kept_shares.mean(axis=0))
    # A share is within 1/4 of its expectation, so that its standard deviation is 1/8 at most.
    assert np.abs(np.mean(shares, axis=0) - POLICY.keep_probs(1)).max() < 4 * 0.125 / np.sqrt(300 * 8)


def test_a_layer_is_dropped_throughout_only_when_no_sample_ran_it() -> None:
    controller = by_sample(scope="microbatch")
    throughout = partly = 0
    for iteration in range(1, 60):
        controller.begin_iteration(iteration, num_microbatches=2)
        for layer in range(1, LAYERS + 1):
            dropped = [controller.kept_samples(layer, microbatch) for microbatch in range(2)]
            none_ran = all(samples is not None and samples.size == 0 for samples in dropped)
            assert controller.dropped_throughout(layer) == none_ran
            throughout += none_ran
            partly += not none_ran
    assert throughout > 0
    assert partly > 0


@pytest.mark.parametrize("sampler", ["bernoulli", "balanced"])
def test_distinct_replicas_run_the_same_layers_on_different_samples(sampler: Any) -> None:
    replicas = [by_sample(sampler=sampler, replicas="distinct", replica=rank) for rank in range(3)]
    differ = 0
    for iteration in range(1, 30):
        for controller in replicas:
            controller.begin_iteration(iteration, 2)
        for other in replicas[1:]:
            np.testing.assert_array_equal(other.kept_shares, replicas[0].kept_shares)
            differ += not np.array_equal(other.sample_plan, replicas[0].sample_plan)
            assert [other.dropped_throughout(layer) for layer in range(1, LAYERS + 1)] == [
                replicas[0].dropped_throughout(layer) for layer in range(1, LAYERS + 1)
            ]
    assert differ > 50


def test_branches_are_scaled_by_the_keep_probability_as_with_layers() -> None:
    policy = LayerDropPolicy(Constant(0.3), LAYERS, residual_scale="inverse_keep_prob")
    controller = DropController(policy, granularity="sample", num_samples=SAMPLES)
    controller.begin_iteration(1, 1)
    assert controller.branch_scale(2) == pytest.approx(1 / 0.3)
