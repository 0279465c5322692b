"""The arithmetic of benchmarks/realised_gain.py: what a drop saves, ideal gain, ratio and its interval."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.common.gain import (
    Pairs,
    PassTimes,
    even_ratio_difference,
    evenly_saved_time,
    measure_gain,
    saved_time,
)
from megatron_sbld.layout.pipeline import schedule_time

ROUNDS, ITERATIONS, LAYERS = 8, 3, 4
LAYER_FORWARD, LAYER_BACKWARD = np.array([1.0, 2.0, 3.0, 4.0]), np.array([2.0, 4.0, 6.0, 8.0])
HEAD_FORWARD, HEAD_BACKWARD = 0.5, 1.0  # what a stage does besides its layers
UNDROPPED = 100.0  # an iteration


def pass_times(num_stages: int) -> PassTimes:
    return PassTimes(
        layer_forward=LAYER_FORWARD,
        layer_backward=LAYER_BACKWARD,
        stage_forward=LAYER_FORWARD.reshape(num_stages, -1).sum(axis=1) + HEAD_FORWARD,
        stage_backward=LAYER_BACKWARD.reshape(num_stages, -1).sum(axis=1) + HEAD_BACKWARD,
        iteration=np.array([UNDROPPED]),
    )


def in_every_round(times: PassTimes) -> PassTimes:
    return PassTimes(*(np.tile(value, (ROUNDS, 1)) for value in vars(times).values()))


def simulated_pairs(realised_share: float, noise: float = 0.0) -> Pairs:
    """Blocks on one stage with two microbatches, in which drops save `realised_share` of the dropped layers' time."""
    rng = np.random.default_rng(0)
    kept = rng.random((ROUNDS, ITERATIONS, LAYERS)) < 0.5
    undropped = np.full(ROUNDS, ITERATIONS * UNDROPPED)
    saved = 2 * np.where(kept, 0.0, LAYER_FORWARD + LAYER_BACKWARD).sum(axis=(1, 2))
    factors = 1 + noise * rng.standard_normal((2, ROUNDS))
    return Pairs(undropped * factors[0], (undropped - realised_share * saved) * factors[1], kept)


def test_in_one_stage_a_drop_saves_its_layers_passes_in_every_microbatch():
    kept = np.array([True, False, True, False])
    assert saved_time(pass_times(1), kept, 5) == pytest.approx(5 * (2 + 4 + 4 + 8))


def test_a_drop_on_the_idle_stage_saves_less_than_its_layers_time_and_on_the_busy_stage_all_of_it():
    on_idle_stage, on_busy_stage = np.array([False, True, True, True]), np.array([True, True, False, True])
    # The first stage waits for the second but for its first forward and last backward pass.
    assert saved_time(pass_times(2), on_idle_stage, 4) == pytest.approx(1 + 2)
    assert saved_time(pass_times(2), (1 + on_idle_stage) / 2, 4) == pytest.approx((1 + 2) / 2), "half of its tokens"
    assert saved_time(pass_times(2), on_busy_stage, 4) == pytest.approx(4 * (3 + 6))


def test_keeping_every_layer_saves_nothing_whatever_the_leading_dimensions():
    saved = saved_time(pass_times(2), np.ones((5, 3, LAYERS), dtype=bool), 4)
    assert saved.shape == (5, 3)
    assert np.all(saved == 0)


def test_dropping_every_layer_leaves_the_time_of_the_rest():
    times = pass_times(2)
    left = schedule_time(times.stage_forward, times.stage_backward, 4) - saved_time(times, np.zeros(4, bool), 4)
    assert left == pytest.approx((HEAD_FORWARD + HEAD_BACKWARD) * (4 + 1))


def test_the_ratio_is_1_when_drops_save_exactly_their_layers_time():
    gain = measure_gain(simulated_pairs(1.0), in_every_round(pass_times(1)), 2)
    assert gain.ratio is not None
    assert [gain.ratio.value, gain.ratio.low, gain.ratio.high] == pytest.approx([1.0, 1.0, 1.0])
    assert gain.realised.value == pytest.approx(gain.ideal)


def test_ideal_gain_is_t_over_t_less_the_dropped_layers_time():
    pairs = simulated_pairs(1.0)
    dropped_time = 2 * np.where(pairs.kept, 0.0, LAYER_FORWARD + LAYER_BACKWARD).sum()
    total = pairs.undropped.sum()
    gain = measure_gain(pairs, in_every_round(pass_times(1)), 2)
    assert gain.ideal == pytest.approx(total / (total - dropped_time))
    assert gain.kept_fraction == pytest.approx(pairs.kept.mean())


def test_a_machine_that_was_slower_while_layers_were_timed_changes_no_gain():
    times = in_every_round(pass_times(1))
    slower = PassTimes(*(1.3 * value for value in vars(times).values()))
    as_measured, slowed = (measure_gain(simulated_pairs(0.9), measured, 2) for measured in (times, slower))
    assert slowed.ideal == pytest.approx(as_measured.ideal)
    assert slowed.realised == as_measured.realised


def test_what_drops_fail_to_save_lowers_the_ratio_and_leaves_the_ideal_gain():
    perfect, wasteful = (measure_gain(simulated_pairs(share), in_every_round(pass_times(1)), 2) for share in (1.0, 0.8))
    assert wasteful.ideal == perfect.ideal
    assert wasteful.ratio is not None
    assert wasteful.ratio.high < 0.85


def test_the_interval_covers_the_truth_under_noise_and_widens_with_it():
    # Drops that save all of their layers' time: whatever is drawn the ratio is 1, so its interval is noise alone.
    quiet, loud = (
        measure_gain(simulated_pairs(1.0, noise), in_every_round(pass_times(1)), 2).ratio for noise in (0.002, 0.02)
    )
    assert quiet is not None
    assert loud is not None
    assert quiet.low < 1 < quiet.high
    assert loud.high - loud.low > 5 * (quiet.high - quiet.low)


def test_without_a_drop_there_is_no_ratio_but_a_realised_gain():
    pairs = Pairs(np.full(ROUNDS, 10.0), np.full(ROUNDS, 10.1), np.ones((ROUNDS, ITERATIONS, LAYERS), dtype=bool))
    gain = measure_gain(pairs, in_every_round(pass_times(1)), 2)
    assert gain.ratio is None
    assert gain.ideal == 1.0
    assert gain.realised.value == pytest.approx(10.0 / 10.1)


def equal_stages(num_stages: int) -> PassTimes:
    """Layers of 1 s forward and 2 s backward, and nothing else on a stage."""
    layers = np.ones(LAYERS)
    return PassTimes(
        layer_forward=layers,
        layer_backward=2 * layers,
        stage_forward=layers.reshape(num_stages, -1).sum(axis=1),
        stage_backward=2 * layers.reshape(num_stages, -1).sum(axis=1),
        iteration=np.array([UNDROPPED]),
    )


def test_on_one_stage_an_even_spread_saves_what_the_decisions_save():
    kept = np.random.default_rng(0).random((20, LAYERS)) < 0.5
    assert evenly_saved_time(pass_times(1), kept, 3) == pytest.approx(saved_time(pass_times(1), kept, 3))


def test_a_balanced_drop_saves_as_much_as_an_even_spread_and_a_lopsided_one_less():
    balanced, lopsided = np.array([False, True, True, False]), np.array([False, False, True, True])
    times = equal_stages(2)
    even = evenly_saved_time(times, balanced, 4)
    assert even == pytest.approx(3.0 * (4 + 1))  # a layer less on each stage, in each of M + p - 1 slots
    assert evenly_saved_time(times, lopsided, 4) == pytest.approx(even)
    assert saved_time(times, balanced, 4) == pytest.approx(even)
    assert saved_time(times, lopsided, 4) == pytest.approx(3.0 * 2)  # the other stage sets the pace


def pairs_on_the_critical_path(kept: np.ndarray, noise: np.ndarray) -> Pairs:
    """Dropped iterations whose gain is that of the critical path; a round slows both of its blocks by its noise."""
    saved = saved_time(equal_stages(2), kept, 4)
    all_kept = np.tile(kept, (ROUNDS, ITERATIONS, 1))
    return Pairs(ITERATIONS * UNDROPPED * noise, ITERATIONS * (UNDROPPED - saved) * np.ones(ROUNDS), all_kept)


BALANCED, LOPSIDED = np.array([False, True, True, False]), np.array([False, False, True, True])


def test_only_the_ratio_to_an_even_spread_tells_a_balanced_sampler_from_a_lopsided_one():
    balanced, lopsided = (
        measure_gain(pairs_on_the_critical_path(kept, np.ones(ROUNDS)), in_every_round(equal_stages(2)), 4)
        for kept in (BALANCED, LOPSIDED)
    )
    for gain in (balanced, lopsided):
        assert gain.ratio is not None
        assert gain.ratio.value == pytest.approx(1.0)
    assert balanced.even_share is not None
    assert lopsided.even_share is not None
    assert lopsided.even_ratio is not None
    assert balanced.even_share.value == pytest.approx(1.0)
    assert lopsided.even_share.value == pytest.approx(lopsided.even_ratio.value)
    assert lopsided.even_share.value < 0.5


def test_what_slows_a_round_of_both_samplers_does_not_widen_their_difference():
    noise = 1 + 0.02 * np.random.default_rng(0).standard_normal(ROUNDS)
    times = in_every_round(equal_stages(2))
    measured = [pairs_on_the_critical_path(kept, noise) for kept in (BALANCED, LOPSIDED)]
    realised, path = even_ratio_difference(*measured, times, 4)
    alone = measure_gain(measured[0], times, 4).even_ratio
    assert alone is not None
    assert realised.low > 0.4
    assert realised.high - realised.low < 0.3 * (alone.high - alone.low)
    assert path.low == pytest.approx(path.high)
    assert path.value == pytest.approx(1 - measure_gain(measured[1], times, 4).even_share.value)


def test_without_a_drop_no_ratio_is_defined():
    pairs = Pairs(np.full(ROUNDS, 10.0), np.full(ROUNDS, 10.0), np.ones((ROUNDS, ITERATIONS, LAYERS), dtype=bool))
    gain = measure_gain(pairs, in_every_round(pass_times(2)), 2)
    assert (gain.even_ratio, gain.even_share, gain.even_ideal) == (None, None, 1.0)
