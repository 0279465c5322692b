"""theta(t) against its formulas, other implementations, and its limits (docs/method.md 1 and 4)."""

import doctest
import math
import warnings
from decimal import Decimal, localcontext

import numpy as np
import pytest
import scipy.stats

import megatron_sbld.method.schedule
from megatron_sbld.method.schedule import PWEGD, Constant, Exponential, Linear, Polynomial, pwegd_density


def test_examples_in_the_docstrings_hold():
    results = doctest.testmod(megatron_sbld.method.schedule)
    assert results.attempted > 5
    assert results.failed == 0


@pytest.mark.parametrize("b", [1.0, 2000.0, 1e5, 1e7])
@pytest.mark.parametrize("shape", [1.0, 1.5, 3.0, 20.0, 400.0])
@pytest.mark.parametrize("epsilon", [0.0, 250.0])
def test_pwegd_density_is_scipys_gamma_density(shape, b, epsilon):
    peak = epsilon + (shape - 1) * b / 2
    t = np.concatenate([[0.0, epsilon, epsilon + 1e-3 * b, peak], np.linspace(epsilon, peak + 20 * b, 200)])
    expected = scipy.stats.gamma.pdf(t, shape, loc=epsilon, scale=b / 2)
    np.testing.assert_allclose(pwegd_density(t, shape, b, epsilon), expected, rtol=1e-12, atol=1e-300)


@pytest.mark.parametrize(("shape", "b", "t"), [(3, 10**7, 1234567), (40, 10**6, 2 * 10**7), (150, 10**5, 7 * 10**6)])
def test_pwegd_follows_the_papers_formula_where_its_direct_form_overflows(shape, b, t):
    theta, eta = 0.7, 1e4
    with localcontext() as context:
        context.prec = 60
        direct = Decimal(2) ** shape / (math.factorial(shape - 1) * Decimal(b) ** shape)
        direct *= Decimal(t) ** (shape - 1) * (Decimal(-2) * t / b).exp()
        expected = float(direct * Decimal(eta) / Decimal(theta) ** 2 + Decimal(theta))
    assert PWEGD(theta=theta, a=shape - 1, b=b, c=1, epsilon=0, eta=eta)(t) == pytest.approx(expected, rel=1e-12)


def test_pwegd_is_theta_before_epsilon_and_follows_scipy_at_it():
    exponential_like = PWEGD(theta=0.5, a=0.5, b=100.0, c=0.5, epsilon=10.0, eta=1.0)
    assert exponential_like(9.999) == 0.5
    assert exponential_like(10.0) == pytest.approx(0.5 + 1.0 / 0.25 * 2 / 100.0, rel=1e-15)
    assert PWEGD(theta=0.5, a=2, b=100.0, c=1, epsilon=10.0, eta=1.0)(10.0) == 0.5


@pytest.mark.parametrize("gamma", [1e-6, 0.001, 0.1])
@pytest.mark.parametrize("theta", [0.4, 0.5, 0.9, 1.0])
def test_pwegd_of_shape_one_is_plds_exponential(theta, gamma):
    t = np.arange(0, 5000, 7)
    pwegd = PWEGD(theta=theta, a=0.25, b=2 / gamma, c=0.75, epsilon=0, eta=theta**2 * (1 - theta) / gamma)
    np.testing.assert_allclose(pwegd(t), Exponential(theta=theta, gamma=gamma)(t), rtol=1e-12)


@pytest.mark.filterwarnings("ignore:theta = ")
@pytest.mark.parametrize("theta", [0, 0.1, 0.9, 1.0])
def test_exponential_gives_deepspeeds_progressive_layer_drop_values(theta):
    schedule = Exponential(theta=theta, gamma=0.001)
    for step in range(10):
        assert schedule(step) == (1.0 - theta) * np.exp(-0.001 * step) + theta


@pytest.mark.parametrize("shape", [1.2, 3.0, 12.0])
@pytest.mark.parametrize(("peak_iteration", "epsilon"), [(1000, 0), (30_000, 500), (10**6, -50)])
def test_from_peak_puts_the_peak_where_it_was_asked_for(peak_iteration, epsilon, shape):
    schedule = PWEGD.from_peak(theta=0.7, peak_iteration=peak_iteration, peak_theta=0.85, shape=shape, epsilon=epsilon)
    assert schedule.peak_iteration == pytest.approx(peak_iteration, rel=1e-12)
    assert schedule(peak_iteration) == pytest.approx(0.85, rel=1e-12)
    around = np.linspace(peak_iteration / 2, peak_iteration * 2, 401)
    assert schedule(around).max() <= 0.85 + 1e-12
    assert schedule(1000 * peak_iteration) == pytest.approx(0.7, abs=1e-6)


def test_pwegd_rises_to_one_peak_and_falls_like_the_papers_figure_5():
    values = PWEGD.from_peak(theta=0.5, peak_iteration=1000, peak_theta=0.75)(np.arange(1, 10_001))
    assert np.all(np.diff(values[:1000]) > 0)
    assert np.all(np.diff(values[1000:]) < 0)
    assert values[0] == pytest.approx(0.5, abs=1e-4)
    assert values[-1] == pytest.approx(0.5, abs=1e-4)


def test_a_large_eta_takes_theta_above_one_without_clamping():
    assert PWEGD(theta=0.9, a=2, b=2000, c=1, epsilon=0, eta=5000.0)(2000) > 1.0


def test_linear_and_polynomial_hit_their_ends_exactly_and_stay_there():
    t = np.array([0, 1, 250, 999, 1000, 1001, 10**7])
    fraction = np.minimum(t / 1000, 1)
    linear, polynomial = Linear(1.0, 0.7, 1000), Polynomial(1.0, 0.7, 1000, 3.0)
    np.testing.assert_allclose(linear(t), 1.0 - 0.3 * fraction, rtol=1e-14)
    np.testing.assert_allclose(polynomial(t), 1.0 - 0.3 * fraction**3, rtol=1e-14)
    assert linear(0) == polynomial(0) == 1.0
    assert linear(1000) == polynomial(10**7) == 0.7
    np.testing.assert_array_equal(Polynomial(0.5, 1.0, 1000, 1.0)(t), Linear(0.5, 1.0, 1000)(t))


@pytest.mark.parametrize(
    "schedule",
    [
        PWEGD(theta=0.9, a=2, b=2000, c=1, epsilon=0, eta=50.0),
        Exponential(0.5, 0.001),
        Linear(1.0, 0.5, 100),
        Polynomial(1.0, 0.5, 100, 2.0),
        Constant(0.8),
    ],
)
def test_a_number_gives_a_float_and_an_array_gives_float64_of_its_shape(schedule):
    assert type(schedule(3)) is float
    assert type(schedule(np.int64(3))) is float
    values = schedule(np.arange(6, dtype=np.int32).reshape(2, 3))
    assert values.dtype == np.float64
    assert values.shape == (2, 3)
    assert values[1, 0] == schedule(3)


@pytest.mark.parametrize("theta", [0.0, -0.1, 1.0001, math.nan, math.inf, "0.9", True, None])
def test_theta_outside_of_its_range_is_refused_by_name(theta):
    for build in (
        lambda: PWEGD(theta=theta, a=2, b=2000, c=1, epsilon=0, eta=50.0),
        lambda: PWEGD.from_peak(theta=theta, peak_iteration=10, peak_theta=1.0),
        lambda: Constant(theta),
    ):
        with pytest.raises(ValueError, match=r"^theta = .* must be a number in \(0, 1\]"):
            build()
    with pytest.raises(ValueError, match=r"^end = "):
        Linear(1.0, theta, 10)
    with pytest.raises(ValueError, match=r"^start = "):
        Polynomial(theta, 1.0, 10, 2.0)


def test_exponential_refuses_theta_outside_of_its_range():
    for theta in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"^theta = .* must be a number in \[0, 1\]"):
            Exponential(theta=theta, gamma=0.001)


@pytest.mark.parametrize(
    "build",
    [
        lambda: Constant(0.39),
        lambda: Exponential(0.39, 0.1),
        lambda: Linear(1.0, 0.39, 10),
        lambda: PWEGD(theta=0.39, a=2, b=10, c=1, epsilon=0, eta=0),
    ],
)
def test_theta_below_the_papers_range_warns_and_names_the_callers_line(build):
    with pytest.warns(UserWarning, match=r"0\.39 is below 0\.4") as caught:
        build()
    assert caught[0].filename == __file__


def test_theta_of_the_papers_range_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for theta in (0.4, 0.7, 1.0):
            Constant(theta)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": 0.5, "c": 0.4}, "a \\+ c = 0.9 .*infinite at epsilon"),
        ({"a": 2e6}, "lost to rounding"),
        ({"b": 0.0}, "^b = 0.0"),
        ({"b": math.inf}, "^b = inf"),
        ({"epsilon": math.nan}, "^epsilon = nan"),
        ({"eta": -1.0}, "^eta = -1.0"),
        ({"eta": 1e308, "b": 1e-9}, "overflows at its peak"),
    ],
)
def test_pwegd_refuses_what_it_cannot_evaluate(change, message):
    with pytest.raises(ValueError, match=message):
        PWEGD(**{"theta": 0.9, "a": 2, "b": 2000, "c": 1, "epsilon": 0, "eta": 50.0, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": 1.0}, "^shape = 1 has its peak at epsilon"),
        ({"shape": 0.5}, "^shape = 0.5"),
        ({"peak_iteration": 5.0, "epsilon": 5.0}, "^peak_iteration = 5.0 .* above epsilon"),
        ({"peak_theta": 0.8}, r"^peak_theta = 0.8 .*\[0.9, 1\]"),
        ({"peak_theta": 1.1}, "^peak_theta = 1.1"),
    ],
)
def test_from_peak_refuses_a_peak_that_no_schedule_has(change, message):
    with pytest.raises(ValueError, match=message):
        PWEGD.from_peak(**{"theta": 0.9, "peak_iteration": 100, "peak_theta": 0.95, **change})


def test_rates_and_lengths_that_are_not_positive_are_refused():
    for build in (
        lambda: Exponential(0.5, 0.0),
        lambda: Linear(1.0, 0.5, 0),
        lambda: Polynomial(1.0, 0.5, 10, 0.0),
    ):
        with pytest.raises(ValueError, match=r"^(gamma|duration|power) = "):
            build()
