"""When a layer's run ends early, and what its gap is taken for."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_sbld.sensitivity.early_stop import interpolated_gap, is_look, settled_neighbours, spread_order

N, WINDOW = 100, 20
GENERATOR = np.random.default_rng(1)
BASELINE = 3.0 + GENERATOR.normal(0, 0.05, N)  # what batches have in common


def losses(gap: float, noise: float = 0.01) -> np.ndarray:
    """Of a run whose gap grows ever more slowly to its final value."""
    return BASELINE + gap * (1 - np.exp(-np.arange(1, N + 1) / 15)) + GENERATOR.normal(0, noise, N)


FINISHED = {1: losses(0.8), 2: losses(0.0), 3: losses(0.4)}


def settled(run: np.ndarray, num_allow: int = 1, num_block: int = 1) -> tuple[int, int] | None:
    return settled_neighbours(run, FINISHED, WINDOW, num_allow=num_allow, num_block=num_block)


def test_a_layer_between_two_others_is_settled_with_them_as_neighbours() -> None:
    assert settled(losses(0.6)[:50]) == (3, 1)
    assert settled(losses(0.2)[:50]) == (2, 3)


@pytest.mark.parametrize("gap", [1.2, -0.4])
def test_the_largest_and_the_smallest_are_never_settled(gap: float) -> None:
    assert settled(losses(gap)[:50]) is None


def test_a_layer_that_a_list_may_still_take_is_not_settled() -> None:
    assert settled(losses(0.6)[:50], num_block=2) is None
    assert settled(losses(0.6)[:50], num_allow=2) == (3, 1)
    assert settled(losses(0.2)[:50], num_allow=2) is None


def test_a_layer_that_cannot_be_told_from_another_is_not_settled() -> None:
    assert settled(losses(0.402)[:50]) is None


@pytest.mark.parametrize("window", [4, WINDOW])
def test_noise_settles_nothing(window: int) -> None:
    """Looked at often, with a layer that equals a finished one; a short window guesses its standard error."""
    generator = np.random.default_rng(2)
    finished = {1: BASELINE + 10, 2: BASELINE - 10, 3: BASELINE + generator.normal(0, 0.1, N)}
    mistakes = 0
    for _ in range(200):
        run = BASELINE + generator.normal(0, 0.1, N)
        looks = [t for t in range(1, N) if is_look(t, N, window)]
        found = [settled_neighbours(run[:t], finished, window, num_allow=1, num_block=1) for t in looks]
        mistakes += any(neighbours is not None for neighbours in found)
    assert mistakes <= 16  # 8 % of runs, over all 15 looks


def test_looks_begin_after_a_quarter_and_a_window_and_never_at_the_end() -> None:
    looks = [t for t in range(1, N + 1) if is_look(t, N, WINDOW)]
    assert looks[0] == 25
    assert looks[-1] == 95
    assert [t for t in range(1, 13) if is_look(t, 12, 10)] == [10, 11]


def test_the_interpolated_gap_is_the_final_one_if_the_order_stays() -> None:
    run = losses(0.6)
    found = interpolated_gap(run[:50], BASELINE, FINISHED[3], FINISHED[1], WINDOW)
    final = float(np.mean(run[-WINDOW:] - BASELINE[-WINDOW:]))
    assert found.mean == pytest.approx(final, abs=4 * found.stderr)
    assert found.mean == pytest.approx(final, abs=0.05)
    gaps = [float(np.mean(FINISHED[layer][-WINDOW:] - BASELINE[-WINDOW:])) for layer in (3, 1)]
    assert gaps[0] < found.mean < gaps[1]


def test_the_order_of_runs_has_every_layer_once_and_the_ends_first() -> None:
    for count in range(1, 33):
        order = spread_order(list(range(1, count + 1)))
        assert sorted(order) == list(range(1, count + 1))
        assert set(order[:2]) == {1, count}
    assert spread_order([3, 7]) == [3, 7]
