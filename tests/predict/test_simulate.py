"""The simulated schedules: closed forms, pipeline.py's critical path, Megatron's interleaved order, conservation."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from megatron_sbld.layout.pipeline import critical_path
from megatron_sbld.predict.simulate import Pass, most_in_flight, pass_order, run_schedule


@pytest.mark.parametrize(("ranks", "microbatches"), [(1, 4), (2, 1), (2, 4), (4, 8), (8, 24), (4, 2)])
def test_equal_stages_have_a_bubble_of_one_microbatch_for_each_stage_but_one(ranks: int, microbatches: int) -> None:
    run = run_schedule(np.full((1, microbatches, ranks), 1.0), np.full((1, microbatches, ranks), 2.0), ranks)
    assert run.end == pytest.approx(3.0 * (microbatches + ranks - 1))


@pytest.mark.parametrize(("ranks", "microbatches", "chunks"), [(2, 4, 2), (4, 8, 2), (4, 8, 3), (8, 16, 4), (2, 2, 3)])
def test_interleaving_divides_the_bubble_by_the_chunks_of_a_rank(ranks: int, microbatches: int, chunks: int) -> None:
    shape = (1, microbatches, ranks * chunks)
    run = run_schedule(np.full(shape, 1.0 / chunks), np.full(shape, 2.0 / chunks), ranks)
    assert run.end == pytest.approx(3.0 * microbatches + 3.0 * (ranks - 1) / chunks)


@pytest.mark.parametrize(("ranks", "microbatches"), [(1, 3), (2, 1), (3, 5), (4, 2), (5, 9)])
def test_with_free_transfers_it_is_the_critical_path(ranks: int, microbatches: int) -> None:
    forward, backward = np.random.default_rng(0).uniform(size=(2, 6, microbatches, ranks))
    np.testing.assert_allclose(run_schedule(forward, backward, ranks).end, critical_path(forward, backward))


def test_busy_time_is_the_sum_of_the_passes_and_events_on_a_rank_do_not_overlap() -> None:
    forward, backward = np.random.default_rng(1).uniform(size=(2, 3, 8, 8))
    run = run_schedule(forward, backward, 4, record=True)
    work = (forward + backward).sum(axis=1)  # [n, chunks]
    np.testing.assert_allclose(run.busy, work[:, :4] + work[:, 4:])
    assert len(run.events) == 2 * 8 * 8
    for rank in range(4):
        own = [event for event in run.events if event.rank == rank]
        for before, after in itertools.pairwise(own):
            assert (before.end <= after.start + 1e-12).all()
    assert (run.end >= run.busy.max(axis=-1) - 1e-12).all()


def test_no_pass_begins_before_the_one_that_it_waits_for_has_arrived() -> None:
    forward, backward = np.random.default_rng(2).uniform(size=(2, 1, 8, 8))
    run = run_schedule(forward, backward, 4, transfer=0.25, holds=False, record=True)
    events = {event.what: event for event in run.events}
    for what, event in events.items():
        before = what.chunk - 1 if what.is_forward else what.chunk + 1
        if 0 <= before < 8:
            assert event.start[0] >= events[Pass(what.is_forward, what.microbatch, before)].end[0] + 0.25 - 1e-12
        elif not what.is_forward:
            assert event.start[0] >= events[Pass(True, what.microbatch, what.chunk)].end[0] - 1e-12


def test_a_transfer_delays_a_pipeline_by_hand() -> None:
    # Two stages, one microbatch: f, send, f, b, send, b.
    ones = np.ones((1, 1, 2))
    assert run_schedule(ones, 2 * ones, 2, transfer=0.5).end == pytest.approx(1 + 0.5 + 1 + 2 + 0.5 + 2)
    # A sender that is held loses both transfers of each microbatch, one that is not loses fewer.
    many = np.ones((1, 8, 2))
    held, free = (run_schedule(many, 2 * many, 2, transfer=0.5, holds=holds) for holds in (True, False))
    assert held.end > free.end > run_schedule(many, 2 * many, 2).end
    assert held.sent == pytest.approx([8 * 0.5, 8 * 0.5])


def test_megatrons_interleaved_order_by_hand() -> None:
    # 2 ranks, 2 chunks each, 2 microbatches: rank 0 warms up with 2 * 1 + 1 * 2 = 4 passes, which are all.
    names = [("f" if what.is_forward else "b") + f"{what.microbatch}.{what.chunk}" for what in pass_order(0, 2, 2, 2)]
    assert names == ["f0.0", "f1.0", "f0.2", "f1.2", "b0.2", "b1.2", "b0.0", "b1.0"]
    names = [("f" if what.is_forward else "b") + f"{what.microbatch}.{what.chunk}" for what in pass_order(1, 2, 2, 2)]
    assert names == ["f0.1", "f1.1", "f0.3", "b0.3", "f1.3", "b1.3", "b0.1", "b1.1"]


@pytest.mark.parametrize(("ranks", "microbatches", "chunks"), [(2, 4, 2), (4, 8, 3), (4, 4, 2), (1, 5, 1), (3, 7, 1)])
def test_every_rank_runs_each_pass_once_and_backward_after_forward(ranks: int, microbatches: int, chunks: int) -> None:
    for rank in range(ranks):
        order = pass_order(rank, ranks, microbatches, chunks)
        assert len(set(order)) == len(order) == 2 * microbatches * chunks
        for index, what in enumerate(order):
            if not what.is_forward:
                assert order.index(Pass(True, what.microbatch, what.chunk)) < index


def test_the_interleaved_order_is_megatrons_own() -> None:
    schedules = pytest.importorskip("megatron.core.pipeline_parallel.schedules")
    table = schedules.get_schedule_table(12, 3, 4)
    forwards = [(what.microbatch, what.chunk // 4) for what in pass_order(2, 4, 12, 3) if what.is_forward]
    assert forwards == table
    backwards = [(what.microbatch, 2 - what.chunk // 4) for what in pass_order(2, 4, 12, 3) if not what.is_forward]
    assert backwards == table


def test_the_first_stage_holds_as_many_microbatches_as_there_are_stages() -> None:
    ones = np.ones((1, 1, 4))
    assert [most_in_flight(ones, rank, 4, 8)[0][0] for rank in range(4)] == [4, 3, 2, 1]
    assert [most_in_flight(ones, rank, 4, 2)[1] for rank in range(4)] == [2, 2, 2, 1]
    # Interleaved (arXiv 2205.05198, section 4.2.3): L / p layers times p (1 + (p - 1) / (p v)) on the first stage.
    most, passes = most_in_flight(np.full((1, 1, 8), 0.5), 0, 4, 8)
    assert passes == 2 * 3 + 4 + 1
    assert most[0] == pytest.approx(4 * (1 + 3 / 8))


def test_what_is_held_follows_the_amounts_of_each_microbatch() -> None:
    amounts = np.zeros((1, 3, 2))
    amounts[0, :, 0] = [1.0, 5.0, 2.0]
    assert most_in_flight(amounts, 0, 2, 3)[0][0] == 7.0  # microbatches 1 and 2 together
