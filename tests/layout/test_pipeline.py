"""The 1F1B schedule's critical path, against hand-made cases and a pass-by-pass simulation."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_sbld.layout.pipeline import critical_path, one_f_one_b, schedule_time


def test_one_f_one_b_alternates_after_the_warm_up_and_ends_with_the_backward_passes():
    first, last = one_f_one_b(0, 2, 3), one_f_one_b(1, 2, 3)
    assert [name[0] + str(microbatch) for name, microbatch in first] == ["f0", "f1", "b0", "f2", "b1", "b2"]
    assert [name[0] + str(microbatch) for name, microbatch in last] == ["f0", "b0", "f1", "b1", "f2", "b2"]


@pytest.mark.parametrize(("num_stages", "num_microbatches"), [(1, 4), (2, 1), (2, 4), (4, 8), (4, 2)])
def test_equal_stages_take_one_slot_for_each_microbatch_and_one_for_each_stage_of_bubble(num_stages, num_microbatches):
    time = schedule_time(np.full(num_stages, 1.0), np.full(num_stages, 2.0), num_microbatches)
    assert time == pytest.approx(3.0 * (num_microbatches + num_stages - 1))


def test_the_slowest_stage_sets_the_pace_of_a_pipeline():
    # f on both stages, 4 microbatches of the slow second one, and the last backward pass of the first
    assert schedule_time(np.array([1.0, 3.0]), np.array([2.0, 6.0]), 4) == pytest.approx(1 + 4 * 9 + 2)


def test_a_microbatch_that_is_slow_on_every_stage_delays_those_behind_it_once() -> None:
    forward, backward = np.ones((4, 2)), np.ones((4, 2))
    forward[1] = 3.0
    # Stage 1: f0, f1 (3); stage 2 waits for f1 until 4, then b0 has long been done: f1 to 7, b1, f2, b2, f3, b3; b3.
    assert critical_path(forward, backward) == pytest.approx(7 + 5 + 1)


def simulated(forward: np.ndarray, backward: np.ndarray) -> float:
    """Repeat what each pass waits for until no time changes any more: the longest path by relaxation."""
    num_microbatches, num_stages = forward.shape
    ends: dict[tuple[str, int, int], float] = {}
    changed = True
    while changed:
        changed = False
        for stage in range(num_stages):
            clock = 0.0
            for name, microbatch in one_f_one_b(stage, num_stages, num_microbatches):
                source = (name, microbatch, stage - 1 if name == "forward" else stage + 1)
                clock = max(clock, ends.get(source, 0.0))
                clock += (forward if name == "forward" else backward)[microbatch, stage]
                if ends.get((name, microbatch, stage)) != clock:
                    ends[name, microbatch, stage] = clock
                    changed = True
    return max(ends.values())


@pytest.mark.parametrize(("num_stages", "num_microbatches"), [(1, 3), (2, 1), (3, 5), (4, 2), (5, 9)])
def test_the_critical_path_is_the_longest_chain_of_passes(num_stages: int, num_microbatches: int) -> None:
    forward, backward = np.random.default_rng(0).uniform(size=(2, 6, num_microbatches, num_stages))
    found = critical_path(forward, backward)
    assert found.shape == (6,)
    for i in range(6):
        assert found[i] == pytest.approx(simulated(forward[i], backward[i]))


def test_equal_microbatches_are_the_special_case() -> None:
    forward, backward = np.random.default_rng(1).uniform(size=(2, 5, 4))
    expected = critical_path(*(np.repeat(times[:, None, :], 7, axis=1) for times in (forward, backward)))
    np.testing.assert_allclose(schedule_time(forward, backward, 7), expected)
