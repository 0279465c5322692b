"""The arithmetic of benchmarks/activation_memory.py: peaks, the line through them, and the depth of a run."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.common.memory import depth_of_run, fit_line, peak_of_allocations, spread
from megatron_sbld.method.decisions import draw_plan


def test_the_peak_is_the_most_that_is_alive_and_not_the_sum_or_the_end():
    assert peak_of_allocations([100, 50, -100, 30, -30, -50, 60, -60]) == 150


def test_releasing_what_was_there_before_is_no_peak():
    assert peak_of_allocations([-100, 20, -20]) == 0
    assert peak_of_allocations([]) == 0


@pytest.mark.parametrize("num_kept", range(25))
def test_kept_layers_are_as_many_as_asked_for_and_evenly_spread(num_kept):
    kept = spread(num_kept, 24)
    assert kept.shape == (24,)
    assert kept.sum() == num_kept
    halves = kept[:12].sum(), kept[12:].sum()
    assert abs(halves[0] - halves[1]) <= 1


def test_the_line_through_peaks_has_their_fixed_share_and_that_of_a_layer():
    fixed, layer, deviation = fit_line([0, 6, 12, 24], [1000, 1600, 2200, 3400])
    assert (fixed, layer) == pytest.approx((1000, 100))
    assert deviation == pytest.approx(0, abs=1e-6)


def test_a_peak_off_the_line_shows_as_its_deviation():
    *_, deviation = fit_line([0, 1, 2], [0, 130, 200])
    assert deviation == pytest.approx(20)


def test_full_depth_is_as_likely_as_all_layers_together():
    full, any_full, deepest = depth_of_run(0.7, 24, 100_000)
    assert full == pytest.approx(0.7**24)
    assert any_full == pytest.approx(1 - (1 - 0.7**24) ** 100_000)
    assert deepest == 24
    assert depth_of_run(0.5, 24, 1)[2] == 12


def test_the_deepest_iteration_of_drawn_runs_has_the_predicted_median():
    iterations, runs = 40, 51
    *_, predicted = depth_of_run(0.5, 12, iterations)
    depths = [
        max(draw_plan([0.5] * 12, seed=run, iteration=t, num_microbatches=1).sum() for t in range(iterations))
        for run in range(runs)
    ]
    assert abs(np.median(depths) - predicted) <= 1
