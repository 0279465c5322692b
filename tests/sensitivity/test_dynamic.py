"""The dynamic gap estimate on simulated runs: right, honest about its error, quick to follow, exact when resumed."""

from __future__ import annotations

import json

import numpy as np
import pytest

from megatron_sbld.method.decisions import draw_plan
from megatron_sbld.sensitivity.dynamic import GapEstimator

LAYERS = 12
NOISE = 0.05
GAP = np.linspace(0.0, 0.11, LAYERS)[::-1]


def loss_curve(t: np.ndarray | int) -> np.ndarray | float:
    """From 11 nats at the start: 5 of them lost in a hundred iterations, then a slow decline as of a power law."""
    return 3.0 + 6.0 * np.exp(-np.asarray(t) / 40) + 2.0 / (1 + np.asarray(t) / 300)


class Simulation:
    """Losses of a run whose gaps are known, with unequal keep probabilities."""

    def __init__(self, seed: int, gap: np.ndarray = GAP, microbatches: int = 1) -> None:
        self.rng = np.random.default_rng(seed)
        self.gap = gap
        self.microbatches = microbatches
        self.keep_probs = self.rng.uniform(0.4, 0.95, len(gap))
        self.interactions = np.zeros((len(gap), len(gap)))
        self.batch_spread = 0.0
        self.t = 0

    def observations(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        self.t += 1
        kept = self.rng.random((self.microbatches, len(self.gap))) < self.keep_probs
        gaps = self.gap * (1 + self.batch_spread * self.rng.normal(size=kept.shape))
        x = self.keep_probs - kept
        pairs = np.einsum("mi,ij,mj->m", x, self.interactions, x)
        loss = loss_curve(self.t) + (gaps * ~kept).sum(axis=1) + pairs + NOISE * self.rng.normal(size=len(kept))
        return loss, kept, self.keep_probs

    def run(self, iterations: int, estimator: GapEstimator) -> GapEstimator:
        for _ in range(iterations):
            estimator.observe(*self.observations())
        return estimator


def coverage(simulations: list[Simulation], iterations: int, memory: float = 400) -> tuple[float, float]:
    """(share of the true gaps within two standard errors, standard deviation of errors in standard errors)."""
    errors = []
    for simulation in simulations:
        estimate = simulation.run(iterations, GapEstimator(len(simulation.gap), memory)).estimate()
        errors.append((estimate.gap - simulation.gap) / estimate.stderr)
    return float(np.mean(np.abs(errors) < 2)), float(np.std(errors))


def test_the_gaps_are_found_and_the_error_shrinks_with_the_observations() -> None:
    simulation, estimator = Simulation(seed=1), GapEstimator(LAYERS, memory=2000)
    errors = []
    for iterations in (300, 700, 5000):
        estimate = simulation.run(iterations, estimator).estimate()
        errors.append(float(np.sqrt(np.mean((estimate.gap - GAP) ** 2))))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.004
    variance = simulation.keep_probs * (1 - simulation.keep_probs)
    best = NOISE / np.sqrt(4000 * variance)  # sum of w squared over sum of w^2 tends to twice the memory
    assert np.all(estimate.stderr < 1.4 * best)
    assert np.all(estimate.stderr > 0.9 * best)


@pytest.mark.parametrize("microbatches", [1, 4])
@pytest.mark.parametrize("iterations", [60, 150, 800])
def test_two_standard_errors_cover_the_true_gaps_also_while_the_loss_falls_steeply(
    iterations: int, microbatches: int
) -> None:
    covered, spread = coverage([Simulation(seed, microbatches=microbatches) for seed in range(15)], iterations)
    assert covered >= 0.93
    assert spread > 0.35  # not so wide that they would say nothing


@pytest.mark.parametrize("kind", ["layers that act on one another", "gaps that differ between batches", "rare drops"])
def test_two_standard_errors_cover_the_true_gaps_where_the_noise_depends_on_the_decisions(kind: str) -> None:
    simulations = [Simulation(seed) for seed in range(15)]
    for simulation in simulations:
        if kind == "layers that act on one another":
            simulation.interactions = np.triu(simulation.rng.normal(0, 0.06, (LAYERS, LAYERS)), 1)
        elif kind == "gaps that differ between batches":
            simulation.batch_spread = 1.5
        else:
            simulation.keep_probs = np.full(LAYERS, 0.98)
    covered, spread = coverage(simulations, 1500)
    assert covered >= 0.93
    assert spread > 0.35


def test_the_steep_start_is_forgotten() -> None:
    simulation, estimator = Simulation(seed=3), GapEstimator(LAYERS, memory=200)
    at_the_start = simulation.run(60, estimator).estimate().stderr
    later = simulation.run(1500, estimator).estimate().stderr
    flat = Simulation(seed=3)
    flat.t = 10**6
    expected = flat.run(1500, GapEstimator(LAYERS, memory=200)).estimate().stderr
    assert np.all(at_the_start > 2 * expected)
    np.testing.assert_allclose(later, expected, rtol=0.25)


def test_a_change_of_a_gap_halfway_is_followed_within_the_memory() -> None:
    simulation, estimator = Simulation(seed=4), GapEstimator(LAYERS, memory=150)
    simulation.run(800, estimator)
    simulation.gap = GAP.copy()
    simulation.gap[[0, -1]] = GAP[[-1, 0]]
    moved = []
    for _ in range(4):
        estimate = simulation.run(150, estimator).estimate()
        moved.append((estimate.gap[-1] - GAP[-1]) / (GAP[0] - GAP[-1]))
    assert moved[0] == pytest.approx(1 - np.exp(-1), abs=0.2)
    assert moved[-1] == pytest.approx(1, abs=0.2)
    assert np.all(np.abs(estimate.gap - simulation.gap) < 3 * estimate.stderr)


@pytest.mark.parametrize("keep_prob", [0.0, 1.0])
def test_a_layer_that_is_never_or_always_dropped_keeps_its_prior(keep_prob: float) -> None:
    simulation = Simulation(seed=5)
    simulation.keep_probs[2] = keep_prob
    estimate = simulation.run(500, GapEstimator(LAYERS, memory=200, prior_std=0.7)).estimate()
    assert estimate.gap[2] == 0.0
    assert estimate.stderr[2] == pytest.approx(0.7, rel=1e-9)
    assert estimate.observed.tolist() == [layer != 2 for layer in range(LAYERS)]
    others = np.delete(np.arange(LAYERS), 2)
    assert np.all(np.abs(estimate.gap - GAP)[others] < 3 * estimate.stderr[others])
    assert np.all(estimate.stderr[others] < 0.03)


def test_a_single_drop_is_no_evidence() -> None:
    """Its residual may be small by chance, but it is one observation of that noise."""
    simulation, estimator = Simulation(seed=6), GapEstimator(LAYERS, memory=500)
    simulation.keep_probs[0] = 1.0
    simulation.run(300, estimator)
    losses, kept, keep_probs = simulation.observations()
    kept[0, 0], keep_probs[0] = False, 0.98
    estimator.observe(losses, kept, keep_probs)
    assert estimator.estimate().stderr[0] > 0.8 * NOISE


def test_what_all_layers_have_in_common_stays_unknown_when_as_many_are_kept_every_time() -> None:
    estimator, rng = GapEstimator(LAYERS, memory=400, prior_std=0.5), np.random.default_rng(7)
    for t in range(1, 801):
        kept = draw_plan(np.full(LAYERS, 0.5), seed=1, iteration=t, num_microbatches=1, sampler="balanced")
        assert kept.sum() == LAYERS // 2
        loss = 4.0 + (GAP * ~kept).sum(axis=1) + NOISE * rng.normal(size=1)
        estimator.observe(loss, kept, np.full(LAYERS, 0.5))
    estimate = estimator.estimate()
    common = np.ones(LAYERS) / LAYERS
    assert np.sqrt(common @ estimate.covariance @ common) == pytest.approx(0.5 / np.sqrt(LAYERS), rel=0.01)
    about_the_mean = estimate.gap - estimate.gap.mean() - (GAP - GAP.mean())
    assert np.all(np.abs(about_the_mean) < 0.02)


def test_before_there_are_enough_observations_the_prior_is_all_there_is() -> None:
    estimate = Simulation(seed=8).run(20, GapEstimator(LAYERS, prior_std=0.3)).estimate()
    assert estimate.gap.tolist() == [0.0] * LAYERS
    assert estimate.stderr == pytest.approx([0.3] * LAYERS)
    assert not estimate.observed.any()


def test_losses_that_are_not_finite_are_left_out() -> None:
    with_gaps, without = Simulation(seed=9, microbatches=3), Simulation(seed=9, microbatches=3)
    damaged, clean = GapEstimator(LAYERS, memory=100), GapEstimator(LAYERS, memory=100)
    for t in range(200):
        losses, kept, keep_probs = with_gaps.observations()
        clean.observe(losses[1:], kept[1:], keep_probs)
        losses[0] = [np.nan, np.inf, -np.inf][t % 3]
        damaged.observe(losses, kept, keep_probs)
    assert damaged.state_dict() == clean.state_dict()
    for estimator in (damaged, clean):
        without.run(50, estimator)
        estimator.observe([np.nan], np.ones((1, LAYERS), dtype=bool), np.ones(LAYERS))
    assert np.isfinite(damaged.estimate().gap).all()


def test_a_saved_and_restored_estimate_goes_on_bit_for_bit() -> None:
    whole, first = GapEstimator(LAYERS, memory=100), GapEstimator(LAYERS, memory=100)
    Simulation(seed=10, microbatches=2).run(333, whole)
    simulation = Simulation(seed=10, microbatches=2)
    simulation.run(137, first)
    second = GapEstimator(LAYERS, memory=100)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    simulation.run(196, second)
    assert second.state_dict() == whole.state_dict()
    assert second.estimate().gap.tolist() == whole.estimate().gap.tolist()
    assert second.estimate().covariance.tolist() == whole.estimate().covariance.tolist()


def test_a_state_that_does_not_fit_is_refused() -> None:
    state = Simulation(seed=11).run(50, GapEstimator(LAYERS)).state_dict()
    with pytest.raises(ValueError, match="of 12 layers, the model has 6"):
        GapEstimator(6).load_state_dict(state)
    for name, value in (("moment", [0.0]), ("products", None), ("noise", float("nan"))):
        with pytest.raises(ValueError, match=f"{name} is damaged"):
            GapEstimator(LAYERS).load_state_dict({**state, name: value})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"num_layers": 0}, "num_layers = 0"), ({"memory": 1.0}, "memory = 1"), ({"prior_std": 0.0}, "prior_std = 0")],
)
def test_arguments_out_of_range_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GapEstimator(**{"num_layers": 3, **arguments})


def test_observations_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must be \[n\] and \[n, 12\]"):
        GapEstimator(LAYERS).observe([1.0, 2.0], np.ones((1, LAYERS), dtype=bool), np.ones(LAYERS))
