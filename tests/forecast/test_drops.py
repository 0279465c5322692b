"""The forecast of a run's layer dropping: phases, means over long runs, and the table."""

import time

import numpy as np
import pytest

from megatron_sbld.config.flops import ideal_speedup
from megatron_sbld.forecast.drops import forecast, forecast_text, spread_iterations
from megatron_sbld.method.policy import LayerDropPolicy, PLDPolicy, SBLDPolicy, StagedPolicy, mean_keep_prob
from megatron_sbld.method.schedule import PWEGD, Constant, Exponential, Linear
from megatron_sbld.method.stages import Stages

PHI = 0.95
SENSITIVITY = np.linspace(0.0, 1.0, 24)


def sbld(train_iters, **changes):
    schedule = PWEGD.from_peak(theta=0.5, peak_iteration=0.1 * train_iters, peak_theta=0.8)
    lists = {"block_layers": (23, 24), "allow_layers": (1, 2, 3)}
    return SBLDPolicy(schedule, SENSITIVITY, **lists, train_iters=train_iters, **changes)


def test_phases_are_fifths_before_the_recovery_and_the_recovery():
    outlook = forecast(sbld(1000, recovery_fraction=0.1), 1000, PHI)
    spans = [(phase.name, phase.first, phase.last) for phase in outlook.phases]
    fifths = [(f"{i}/5", 180 * i - 179, 180 * i) for i in range(1, 6)]
    assert spans == [*fifths, ("recovery", 901, 1000)]
    recovery = outlook.phases[-1]
    assert (recovery.theta_low, recovery.mean_keep_prob, recovery.ideal_gain) == (None, 1.0, 0.0)


@pytest.mark.parametrize("train_iters", [1, 2, 4, 5, 7, 999])
@pytest.mark.parametrize("recovery_fraction", [0.0, 0.3, 1.0])
def test_phases_make_up_the_whole_run(train_iters, recovery_fraction):
    policy = sbld(train_iters, recovery_fraction=recovery_fraction)
    outlook = forecast(policy, train_iters, PHI)
    covered = [i for phase in outlook.phases for i in range(phase.first, phase.last + 1)]
    assert covered == list(range(1, train_iters + 1))
    expected = mean_keep_prob(policy, range(1, train_iters + 1))
    assert outlook.total.mean_keep_prob == pytest.approx(expected, abs=1e-12)
    forecast_text(outlook)


def test_each_phase_has_its_own_mean_and_range_of_theta():
    policy = sbld(1000)
    outlook = forecast(policy, 1000, PHI)
    for phase in [*outlook.phases, outlook.peak, outlook.total]:
        iterations = range(phase.first, phase.last + 1)
        thetas = [policy.theta(iteration) for iteration in iterations]
        mean = mean_keep_prob(policy, iterations)
        assert (phase.theta_low, phase.theta_high) == (min(thetas), max(thetas))
        assert phase.mean_keep_prob == pytest.approx(mean, abs=1e-12)
        assert phase.ideal_gain == pytest.approx(ideal_speedup(PHI, mean) - 1.0)


@pytest.mark.filterwarnings("ignore:end = 0.2")
def test_the_gain_of_the_whole_run_is_that_of_its_time_and_not_a_mean_of_gains():
    policy = LayerDropPolicy(Linear(start=1.0, end=0.2, duration=1000), 4)
    outlook = forecast(policy, 1000, PHI)
    times = [1.0 - PHI * (1.0 - policy.theta(iteration)) for iteration in range(1, 1001)]
    assert outlook.time_saved == pytest.approx(1.0 - np.mean(times))
    assert outlook.total.ideal_gain == pytest.approx(1.0 / np.mean(times) - 1.0)
    assert outlook.total.ideal_gain < np.mean([phase.ideal_gain for phase in outlook.phases]) - 0.1


def test_the_peak_has_a_row_where_pwegd_peaks_while_layers_are_dropped():
    outlook = forecast(sbld(1000), 1000, PHI)
    assert (outlook.peak.first, outlook.peak.last) == (100, 100)
    assert outlook.peak.theta_high == pytest.approx(0.8)
    lines = forecast_text(outlook).splitlines()
    assert [line.split()[0] for line in lines] == ["phase", "1/5", "peak", "2/5", "3/5", "4/5", "5/5", "whole", "time"]
    assert forecast(sbld(1000, recovery_fraction=0.95), 1000, PHI).peak is None
    assert forecast(PLDPolicy(Exponential(0.5, 0.1), 24), 1000, PHI).peak is None
    flat = PWEGD(theta=0.5, b=100.0, eta=0.0)
    assert forecast(LayerDropPolicy(flat, 24), 1000, PHI).peak is None
    late = PWEGD.from_peak(theta=0.5, peak_iteration=2000, peak_theta=0.8)
    assert forecast(LayerDropPolicy(late, 24), 1000, PHI).peak is None


def test_half_a_million_iterations_are_sampled_fast_and_closely():
    train_iters = 500_000
    policy = sbld(train_iters, recovery_fraction=0.1)
    began = time.process_time()
    outlook = forecast(policy, train_iters, PHI)
    assert time.process_time() - began < 10.0
    dropping = 450_000
    theta = policy.schedule(np.arange(1, dropping + 1))[:, None]
    keep_probs = np.clip(theta + 0.5 * SENSITIVITY[3:22], 0.4, 1.0)
    sums = keep_probs.sum() + dropping * (2 * 1.0 + 3 * 0.4)
    expected = (sums / 24 + train_iters - dropping) / train_iters
    assert outlook.total.mean_keep_prob == pytest.approx(expected, abs=1e-6)
    # A jump within a thousandth of a phase is the worst case.
    steep = LayerDropPolicy(Exponential(0.5, 1.0), 4)
    assert forecast(steep, train_iters, PHI).total.mean_keep_prob == pytest.approx(0.5, abs=2e-4)


def test_iterations_are_spread_evenly_over_all_of_a_stretch():
    assert spread_iterations(3, 7, 5).tolist() == [3, 4, 5, 6, 7]
    assert spread_iterations(1, 10, 5).tolist() == [2, 4, 6, 8, 10]
    spread = spread_iterations(1, 500_000, 1000)
    assert set(np.diff(spread)) == {500}
    assert (spread[0], spread[-1]) == (251, 499_751)


def test_the_table_tells_theta_mean_keep_prob_and_gain_apart():
    policy = LayerDropPolicy(Constant(0.5), 4, recovery_fraction=0.5, train_iters=10)
    lines = forecast_text(forecast(policy, 10, 0.8)).splitlines()
    assert lines[0].split() == ["phase", "iterations", "theta", "mean", "keep_prob", "ideal", "gain"]
    assert lines[1].split() == ["1/5", "1", "0.500", "0.500", "+66.7%"]
    assert lines[-3].split() == ["recovery", "6", "-", "10", "-", "1.000", "+0.0%"]
    assert lines[-2].split() == ["whole", "run", "1", "-", "10", "0.500", "0.750", "+25.0%"]
    assert lines[-1].startswith("time saved: 20.0% ")
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("policy", ["staged", "layerdrop"])
def test_stages_are_phases_with_their_layers_and_theta_where_it_has_a_meaning(policy):
    stages = Stages.resolve([[0.0, 1], [0.5, 2], [1.0, 4]], 4, 10)
    staged = StagedPolicy(stages, 4, train_iters=10)
    outlook = forecast(staged if policy == "staged" else LayerDropPolicy(Constant(0.5), 4, stages=stages), 10, 0.8)
    lines = forecast_text(outlook).splitlines()
    theta = [] if policy == "staged" else ["theta"]
    assert lines[0].split() == ["phase", "iterations", "layers", *theta, "mean", "keep_prob", "ideal", "gain"]
    first, last = (["0.500"], ["1.000"]) if policy == "staged" else (["0.500", "0.250"], ["0.500", "0.500"])
    assert lines[1].split()[:-1] == ["stage", "2", "1", "-", "5", "2", *first]
    assert lines[2].split()[:-1] == ["stage", "3", "6", "-", "10", "4", *last]
    assert (outlook.total.theta_low is None) is (policy == "staged")
    assert max(map(len, lines)) <= 80


def test_without_the_layers_share_there_is_no_gain():
    outlook = forecast(sbld(100), 100, None)
    assert (outlook.total.ideal_gain, outlook.time_saved) == (None, None)
    lines = forecast_text(outlook).splitlines()
    assert lines[-1].split()[-1] == "-"
    assert not any("time saved" in line for line in lines)
