"""Standard errors of gaps: what share of 2-standard-error intervals holds the true mean, and how seeds combine."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megatron_sbld.sensitivity.stats import (
    Estimate,
    combine_seeds,
    mean_of_batches,
    mean_of_series,
    rank_correlations,
    window_length,
)


def ar1(rho: float, size: int, series: int, seed: int = 1) -> np.ndarray:
    """Stationary AR(1) series of mean 0 and variance 1, [series, size]."""
    noise = np.random.default_rng(seed).standard_normal((series, size))
    values = np.empty_like(noise)
    values[:, 0] = noise[:, 0]
    for t in range(1, size):
        values[:, t] = rho * values[:, t - 1] + math.sqrt(1 - rho**2) * noise[:, t]
    return values


def coverage(estimates: list[Estimate]) -> float:
    return float(np.mean([abs(found.mean) <= 2 * found.stderr for found in estimates]))


# An exact standard error would cover 0.954. Short and strongly correlated series cover less, as the docstring says.
@pytest.mark.parametrize(
    ("rho", "size", "least"),
    [(0.0, 20, 0.92), (0.0, 100, 0.94), (0.5, 30, 0.90), (0.5, 100, 0.93), (0.8, 100, 0.90), (0.8, 400, 0.93)],
)
def test_two_standard_errors_cover_the_mean_of_an_autocorrelated_series(rho: float, size: int, least: float) -> None:
    found = coverage([mean_of_series(series) for series in ar1(rho, size, 2000)])
    assert least <= found <= 0.985


def test_the_standard_error_of_independent_values_would_cover_far_less() -> None:
    """What the tests above would miss, if the autocorrelation were not taken into account."""
    assert coverage([mean_of_batches(series) for series in ar1(0.8, 100, 2000)]) < 0.6


def test_the_standard_error_shrinks_with_the_root_of_the_length() -> None:
    short, long = (np.mean([mean_of_series(s).stderr for s in ar1(0.5, size, 300)]) for size in (200, 800))
    assert short / long == pytest.approx(2.0, rel=0.1)


def test_an_alternating_series_is_not_taken_for_more_exact_than_independent_values() -> None:
    values = np.resize([1.0, -1.0], 100)
    assert mean_of_series(values).stderr >= mean_of_batches(values).stderr


def test_a_layer_that_changes_nothing_has_gap_and_error_zero() -> None:
    assert mean_of_series(np.zeros(10)) == (0.0, 0.0)


@pytest.mark.parametrize("values", [[1.0], [], [[1.0, 2.0]], [1.0, math.nan]])
def test_a_series_without_a_standard_error_is_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match="standard error"):
        mean_of_series(values)


def test_batches_have_the_textbook_standard_error() -> None:
    assert mean_of_batches([1.0, 2.0, 3.0]) == (2.0, pytest.approx(1 / math.sqrt(3)))


def test_seeds_take_the_larger_of_their_own_errors_and_their_spread() -> None:
    assert combine_seeds([Estimate(1.0, 0.2)]) == (1.0, 0.2)
    alike = combine_seeds([Estimate(1.0, 0.3), Estimate(1.001, 0.4)])
    assert alike == (pytest.approx(1.0005), pytest.approx(0.25))
    apart = combine_seeds([Estimate(0.0, 0.01), Estimate(2.0, 0.01)])
    assert apart == (1.0, pytest.approx(math.sqrt(2) / math.sqrt(2)))


def test_the_window_is_the_last_fifth_at_least_ten_or_what_was_asked_for() -> None:
    assert [window_length(n) for n in (2, 10, 11, 50, 51, 500)] == [2, 10, 10, 10, 11, 100]
    assert window_length(40, 25) == 25
    for iterations, window in ((40, 41), (40, 1), (1, None)):
        with pytest.raises(ValueError, match="not allowed"):
            window_length(iterations, window)


def test_rank_correlations_see_order_alone() -> None:
    assert rank_correlations([1.0, 2.0, 3.0], [10.0, 20.0, 900.0]) == (1.0, 1.0)
    assert rank_correlations([1.0, 2.0, 3.0], [3.0, 2.0, 1.0]) == (-1.0, -1.0)
    assert all(map(math.isnan, rank_correlations([1.0, 2.0], [1.0, 1.0])))
    with pytest.raises(ValueError, match="cannot be ranked"):
        rank_correlations([1.0, 2.0], [1.0, 2.0, 3.0])
