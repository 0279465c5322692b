"""Fits to the loss gap of two runs (docs/method.md 3): known shapes come back, and what has no peak is refused."""

import numpy as np
import pytest

from megatron_sbld.method.schedule import PWEGD, pwegd_density
from megatron_sbld.method.schedule_fit import build_trace, fit_trace, is_exponential, schedule_fields

ITERATIONS = 1500
# k, b, epsilon and height of the gap, and the noise of a single iteration's gap.
SHAPES = {
    "the default k": (3.0, 150.0, 0.0, 0.3, 0.05),
    "noise of half the height": (3.0, 150.0, 0.0, 0.3, 0.15),
    "a fast rise": (1.5, 400.0, 0.0, 0.4, 0.05),
    "a slow rise": (6.0, 100.0, 0.0, 0.3, 0.05),
    "a threshold": (2.5, 200.0, 200.0, 0.3, 0.05),
}


def losses(seed, gap, noise, correlation=0.0):
    """Losses of a baseline and of a run `gap` above it: noise of batches that both see, and noise of their own."""
    random = np.random.default_rng(seed)
    t = np.arange(1, len(gap) + 1)
    baseline = 3.0 + 6.0 * t**-0.4 + 0.2 * random.normal(size=len(t))
    own = random.normal(size=len(t))
    for i in range(1, len(t)):
        own[i] = correlation * own[i - 1] + np.sqrt(1.0 - correlation**2) * own[i]
    return t, baseline, baseline + gap + noise * own


def pwegd_gap(k, b, epsilon, height, length=ITERATIONS):
    t = np.arange(1, length + 1)
    return height * pwegd_density(t, k, b, epsilon) / pwegd_density((k - 1.0) * b / 2.0, k, b)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", SHAPES)
def test_a_noisy_pwegd_is_recovered(name, seed):
    k, b, epsilon, height, noise = SHAPES[name]
    gap = pwegd_gap(k, b, epsilon, height)
    fit = fit_trace(build_trace(*losses(seed, gap, noise)))[0]
    assert fit.name == "pwegd"
    # The curve is well determined; k, b and epsilon trade off against each other, the more the noisier or slower it is.
    assert np.sqrt(np.mean((fit.values(np.arange(1, ITERATIONS + 1)) - gap) ** 2)) < 0.1 * noise + 0.002
    found = PWEGD(theta=0.5, **schedule_fields(fit, 0.5, 0.9))
    true_peak = epsilon + (k - 1.0) * b / 2.0
    assert found.peak_iteration == pytest.approx(true_peak, abs=0.3 * noise / height * b + 0.03 * true_peak)
    assert fit.parameters["height"] == pytest.approx(height, rel=0.5 * noise / height)
    if noise < 0.1 and k < 4.0:
        assert fit.parameters["k"] == pytest.approx(k, rel=0.2)
        assert fit.parameters["b"] == pytest.approx(b, rel=0.2)
        assert fit.parameters["epsilon"] == pytest.approx(epsilon, abs=0.1 * true_peak + 5.0)


def test_a_clean_trace_gives_its_parameters_back():
    fit = fit_trace(build_trace(*losses(0, pwegd_gap(3.0, 150.0, 40.0, 0.3), 1e-6)))[0]
    assert fit.parameters["k"] == pytest.approx(3.0, rel=1e-2)
    assert fit.parameters["b"] == pytest.approx(150.0, rel=1e-2)
    assert fit.parameters["epsilon"] == pytest.approx(40.0, abs=0.5)
    assert fit.rmse < 1e-4
    assert fit.r_squared > 0.9999


def test_a_fast_rise_is_not_flattened_by_the_running_mean():
    """The window of 51 iterations is longer than the whole rise."""
    gap = pwegd_gap(2.0, 60.0, 0.0, 0.3)
    trace = build_trace(*losses(1, gap, 0.01), window=51)
    assert trace.smoothed.max() < 0.28
    assert fit_trace(trace)[0].parameters["height"] == pytest.approx(0.3, rel=0.05)


@pytest.mark.parametrize(
    ("name", "gap"),
    [
        ("weibull", lambda t: 0.3 * (t / 300) * np.exp(-((t / 300) ** 2.0))),
        ("lognormal", lambda t: 0.3 * np.exp(-(np.log(t / 100) ** 2) / 2)),
        ("pwegd", lambda t: pwegd_gap(3.0, 150.0, 0.0, 0.3)),
    ],
)
def test_the_shape_that_made_the_trace_has_the_lowest_aic(name, gap):
    fits = fit_trace(build_trace(*losses(3, gap(np.arange(1.0, ITERATIONS + 1)), 0.02)))
    assert {fit.name for fit in fits} == {"pwegd", "exponential", "weibull", "lognormal"}
    best = min(fits, key=lambda fit: fit.aic)
    assert best.name == name
    assert best.r_squared > 0.95
    assert best.rmse < min(fit.rmse for fit in fits if fit.name == "exponential") / 3


def test_smoothing_does_not_make_the_aic_surer():
    """Computed from running means of 31 iterations, differences of AIC would be about 31 times as large."""
    runs = losses(5, pwegd_gap(3.0, 150.0, 0.0, 0.3), 0.05)
    differences = []
    for window in (5, 31):
        pwegd, *others = fit_trace(build_trace(*runs, window=window))
        differences.append(next(fit.aic for fit in others if fit.name == "lognormal") - pwegd.aic)
    assert differences[1] == pytest.approx(differences[0], rel=0.5)


@pytest.mark.parametrize("seed", range(3))
def test_an_exponential_decay_after_a_jump_is_recognised_as_k_1(seed):
    fit = fit_trace(build_trace(*losses(seed, pwegd_gap(1.0, 500.0, 100.0, 0.3), 0.03)))[0]
    assert is_exponential(fit)
    fields = schedule_fields(fit, 0.5, 0.9)
    assert (fields["a"], fields["c"]) == (0.0, 1.0)
    assert fields["epsilon"] == pytest.approx(100.0, abs=5.0)
    assert fields["b"] == pytest.approx(500.0, rel=0.1)
    assert not is_exponential(fit_trace(build_trace(*losses(seed, pwegd_gap(2.0, 500.0, 0.0, 0.3), 0.03)))[0])


def test_the_schedule_peaks_where_the_gap_does_at_the_height_that_was_asked_for():
    fit = fit_trace(build_trace(*losses(0, pwegd_gap(3.0, 150.0, 0.0, 0.3), 0.02)))[0]
    schedule = PWEGD(theta=0.5, **schedule_fields(fit, 0.5, 0.8))
    assert schedule(schedule.peak_iteration) == pytest.approx(0.8, abs=1e-4)
    assert schedule.peak_iteration == pytest.approx(150.0, rel=0.1)
    assert schedule.c == 1.0
    with pytest.raises(ValueError, match=r"peak_theta = 0\.4 .*\[0\.5, 1\]"):
        schedule_fields(fit, 0.5, 0.4)


def test_a_long_trace_is_fitted_as_a_short_one():
    """Beyond 4,000 iterations equal blocks are averaged; the parameters stay in iterations."""
    fit = fit_trace(build_trace(*losses(0, pwegd_gap(3.0, 2000.0, 500.0, 0.3, length=21_017), 0.1)))[0]
    assert fit.parameters["b"] == pytest.approx(2000.0, rel=0.1)
    assert fit.parameters["epsilon"] == pytest.approx(500.0, abs=150.0)


def test_the_running_mean_is_centred_and_shrinks_at_the_ends():
    iterations = np.arange(1, 61)
    gap = np.where(iterations == 30, 5.0, 0.0) - np.where(iterations == 1, 1.0, 0.0)
    trace = build_trace(iterations, np.zeros(60), gap, window=5)
    assert trace.window == 5
    assert trace.smoothed[26:33].tolist() == [0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0]
    assert trace.smoothed[0] == 0.0  # the floor: the gap there is -1
    assert build_trace(iterations, np.zeros(60), gap).window == 5
    assert build_trace(np.arange(2000), np.zeros(2000), np.zeros(2000)).window == 41


T = np.arange(1.0, ITERATIONS + 1)
WITHOUT_A_PEAK = {
    "still rising": (0.3 * T / ITERATIONS, "no peak: it is still 0.2"),
    "level at its end": (
        0.3 * (1.0 - np.exp(-T / 100)),
        r"no peak: it is still 0\.(29|30).*train both runs for longer",
    ),
    "peak at the very end": (pwegd_gap(3.0, 1450.0, 0.0, 0.3), "no peak: it is still"),
    "falling from its start": (0.3 * np.exp(-T / 200), "no peak: it falls from its start, .*schedule exponential"),
    "falling in a line": (0.3 * (1.0 - T / ITERATIONS), "no peak: it falls from its start"),
    "nothing": (0.0 * T, "never significantly above 0"),
    "below 0": (-pwegd_gap(3.0, 150.0, 0.0, 0.3), "never significantly above 0"),
    "lost in noise": (pwegd_gap(3.0, 150.0, 0.0, 0.005), "never significantly above 0: .*longer window"),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", WITHOUT_A_PEAK)
def test_a_trace_without_a_peak_is_refused_with_the_reason(name, seed):
    gap, message = WITHOUT_A_PEAK[name]
    with pytest.raises(ValueError, match=message):
        fit_trace(build_trace(*losses(seed, gap, 0.05)))


def test_equal_losses_are_never_above_0():
    with pytest.raises(ValueError, match="never significantly above 0"):
        fit_trace(build_trace(np.arange(1, 101), np.ones(100), np.ones(100)))


def test_a_peak_in_noise_whose_neighbours_are_alike_is_still_found():
    k, b, epsilon, height = 3.0, 150.0, 0.0, 0.3
    gap = pwegd_gap(k, b, epsilon, height)
    fit = fit_trace(build_trace(*losses(0, gap, 0.05, correlation=0.8)))[0]
    assert np.sqrt(np.mean((fit.values(T) - gap) ** 2)) < 0.02


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"length": 49}, "too short: 49 iterations, a fit needs at least 50"),
        ({"length": 0}, "too short: 0 iterations"),
        ({"nan": 17}, "gap at iteration 17 is not finite"),
        ({"window": 0}, r"window = 0 .*\[1, 33\]"),
        ({"window": 34}, r"window = 34 .*\[1, 33\]"),
    ],
)
def test_what_is_no_trace_is_refused(change, message):
    length = change.get("length", 100)
    dropped = np.ones(length)
    if "nan" in change:
        dropped[change["nan"] - 1] = np.nan
    with pytest.raises(ValueError, match=message):
        build_trace(np.arange(1, length + 1), np.ones(length), dropped, change.get("window"))
