"""How estimates move the base sensitivity: by what is significant, on the base list's scale, and not otherwise."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_sbld.sensitivity.dynamic import GapEstimate
from megatron_sbld.sensitivity.mixing import mixed_sensitivity, released_layers

LAYERS = 24
BASE = np.linspace(0.0, 1.0, LAYERS)


def estimate(gap: np.ndarray, stderr: float | np.ndarray, observed: np.ndarray | None = None) -> GapEstimate:
    covariance = np.diag(np.broadcast_to(np.asarray(stderr, dtype=float) ** 2, gap.shape))
    return GapEstimate(gap, covariance, np.ones(len(gap), dtype=bool) if observed is None else observed)


def test_exact_estimates_take_the_base_lists_mean_and_spread_and_their_own_order() -> None:
    gap = 0.003 + 0.02 * BASE[::-1]
    mixed = mixed_sensitivity(BASE, estimate(gap, 1e-9))
    np.testing.assert_allclose(mixed, BASE[::-1], atol=0.03)  # the spread is the sample's, with L - 1
    shuffled = np.random.default_rng(1).permutation(BASE)
    mixed = mixed_sensitivity(BASE, estimate(5.0 * shuffled, 1e-9))
    assert np.argsort(mixed).tolist() == np.argsort(shuffled).tolist()
    assert mixed.mean() == pytest.approx(0.5, abs=0.01)


def test_estimates_that_agree_with_the_base_list_move_nothing_but_by_chance() -> None:
    rng = np.random.default_rng(2)
    moved = []
    for _ in range(200):
        gap = 0.02 + 0.05 * BASE + 0.005 * rng.normal(size=LAYERS)
        moved.append(np.abs(mixed_sensitivity(BASE, estimate(gap, 0.005)) - BASE))
    assert np.mean(np.array(moved) > 0) < 0.08
    assert np.max(moved) < 0.25


def test_estimates_that_do_not_differ_from_one_another_move_nothing() -> None:
    rng = np.random.default_rng(3)
    unmoved = sum(
        np.array_equal(mixed_sensitivity(BASE, estimate(0.03 + 0.01 * rng.normal(size=LAYERS), 0.01)), BASE)
        for _ in range(200)
    )
    assert unmoved >= 196


def test_one_layer_that_differs_moves_by_the_part_beyond_its_noise() -> None:
    gap = 0.1 * BASE
    gap[3] = 0.09
    moves = {}
    for stderr in (1e-6, 0.005, 0.01, 0.05):
        moves[stderr] = mixed_sensitivity(BASE, estimate(gap, stderr)) - BASE
        assert np.abs(np.delete(moves[stderr], 3)).max() < 0.1
    assert moves[1e-6][3] == pytest.approx(0.9 - BASE[3], abs=0.06)
    scale = BASE.std() / gap.std()
    assert moves[0.01][3] == pytest.approx(moves[1e-6][3] - 2 * scale * 0.01, abs=0.05)
    assert moves[1e-6][3] > moves[0.005][3] > moves[0.01][3] > 0
    assert moves[0.05][3] == 0.0


def test_more_standard_errors_can_be_asked_for() -> None:
    gap = np.random.default_rng(4).permutation(0.1 * BASE)
    near, far = (mixed_sensitivity(BASE, estimate(gap, 0.01), stderrs) for stderrs in (2.0, 4.0))
    assert np.all(np.abs(far - BASE) <= np.abs(near - BASE))
    assert np.abs(far - BASE).sum() < np.abs(near - BASE).sum()


def test_layers_that_were_not_observed_keep_their_base_and_do_not_count() -> None:
    observed = np.ones(LAYERS, dtype=bool)
    observed[[0, 23]] = False
    gap = 0.1 * BASE[::-1]
    gap[~observed] = 0.0
    stderr = np.where(observed, 1e-6, 1.0)
    mixed = mixed_sensitivity(BASE, estimate(gap, stderr, observed))
    assert mixed[[0, 23]].tolist() == [0.0, 1.0]
    np.testing.assert_allclose(mixed[observed], BASE[::-1][observed], atol=0.03)


def test_what_all_gaps_have_in_common_moves_nothing() -> None:
    """As with the balanced sampler, which hardly observes it: its error is common to all layers."""
    gap = np.random.default_rng(5).permutation(0.1 * BASE)
    alone = estimate(gap, 0.004)
    common = GapEstimate(gap + 0.3, alone.covariance + 0.5**2, alone.observed)
    np.testing.assert_allclose(mixed_sensitivity(BASE, common), mixed_sensitivity(BASE, alone), atol=1e-9)


def test_sensitivities_stay_in_range() -> None:
    gap = np.zeros(LAYERS)
    gap[5], gap[20] = 9.0, -9.0
    mixed = mixed_sensitivity(BASE, estimate(gap, 1e-6))
    assert mixed[5] == 1.0
    assert mixed[20] == 0.0


@pytest.mark.parametrize("observed_layers", [0, 1, 2])
def test_fewer_than_three_observed_layers_move_nothing(observed_layers: int) -> None:
    observed = np.arange(LAYERS) < observed_layers
    assert np.array_equal(mixed_sensitivity(BASE, estimate(BASE[::-1], 1e-6, observed)), BASE)


def test_a_base_list_without_spread_is_not_spread() -> None:
    base = np.full(LAYERS, 0.3)
    np.testing.assert_allclose(mixed_sensitivity(base, estimate(BASE, 1e-6)), base, atol=1e-12)


def test_a_block_layer_is_released_only_when_it_moved_below_a_layer_outside() -> None:
    base = np.array([1.0, 0.5, 0.2, 0.9])
    assert released_layers(base, base, {1, 4}) == ()
    assert released_layers(base, [0.6, 0.5, 0.2, 0.9], {1, 4}) == ()  # still above the others
    assert released_layers(base, [0.4, 0.5, 0.2, 0.9], {1, 4}) == (1,)
    assert released_layers(base, [0.4, 0.5, 0.2, 0.3], {1, 4}) == (1, 4)
    # A user may block a layer that was never sensitive: without evidence it stays blocked.
    assert released_layers(base, base, {3}) == ()
