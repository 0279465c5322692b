"""Who has died, stalled, failed or hangs, from what ranks told last; and what code a rank waits in."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from megatron_sbld.health.liveness import (
    SAVING,
    Heartbeat,
    Limits,
    Sighting,
    find_hanging,
    find_lost,
    remarks,
    silent_ranks,
)

LIMITS = Limits.of(100.0)


def seen(silent_s: float = 0.0, **fields: Any) -> Sighting:
    """A rank that computes in iteration 17, with some fields replaced."""
    healthy = {
        "beat": 5,
        "host": "node1",
        "iteration": 17,
        "activity": "training",
        "place": "layer.py:3 forward",
        "waits": False,
        "unchanged_s": 0.0,
    }
    return Sighting(Heartbeat(**{**healthy, **fields}), silent_s)


def waiting(**fields: Any) -> Sighting:
    """A rank that has been in a collective for too long."""
    return seen(**{"waits": True, "unchanged_s": 95.0, "place": "distributed_c10d.py:9 all_reduce", **fields})


def test_the_run_is_told_to_end_before_the_timeout_is_over() -> None:
    for timeout_s in (6.0, 100.0, 600.0, 7200.0):
        limits = Limits.of(timeout_s)
        assert limits.patience + 5 * limits.interval < timeout_s, "two to see it, three until all have read it"
        assert 0 < limits.brief < limits.patience


def test_a_heartbeat_survives_the_store() -> None:
    heartbeat = waiting(state="failed", error='quoted "text"', verdict="ende: ü").heartbeat
    assert heartbeat is not None
    assert Heartbeat.decode(heartbeat.encode().encode()) == heartbeat


def test_healthy_ranks_are_left_alone() -> None:
    ranks = {0: waiting(unchanged_s=LIMITS.patience - 1), 1: seen(LIMITS.patience - 1), 2: seen(unchanged_s=1e4)}
    assert find_lost(ranks, LIMITS) is None
    assert find_hanging(ranks, LIMITS) is None


def test_a_silent_rank_is_named_with_its_iteration_and_what_the_others_do() -> None:
    verdict = find_lost(
        {0: waiting(), 1: seen(LIMITS.patience, host="node7", iteration=16), 2: waiting(), 3: waiting()}, LIMITS
    )
    assert verdict is not None
    assert verdict.startswith(
        "rank 1 (node7) died or was stopped in iteration 17: no sign of life for 88 s, last seen in iteration 16 ("
    )
    assert "ranks 0, 2-3 in iteration 17 (training, distributed_c10d.py:9 all_reduce)" in verdict


def test_a_rank_that_never_came_up_is_named() -> None:
    verdict = find_lost({0: seen(), 1: Sighting(None, LIMITS.patience)}, LIMITS)
    assert verdict is not None
    assert verdict.startswith("rank 1 (host not known)")
    assert "never seen" in verdict


def test_once_a_connection_is_lost_a_short_silence_tells_who_died() -> None:
    silent = seen(LIMITS.brief)
    assert find_lost({0: waiting(), 1: silent}, LIMITS) is None
    lost = seen(state="lost", error="RuntimeError: Connection closed by peer")
    verdict = find_lost({0: lost, 1: silent}, LIMITS)
    assert verdict is not None
    assert verdict.startswith("rank 1 ")
    assert "rank 0 in iteration 17, where it failed with RuntimeError: Connection closed by peer" in verdict


def test_ranks_that_ended_or_failed_are_not_silent() -> None:
    gone = LIMITS.patience + 1
    assert find_lost({0: seen(), 1: seen(gone, state="ended")}, LIMITS) is None
    assert find_lost({0: seen(state="failed"), 1: seen(gone, state="failed")}, LIMITS) is None


def test_a_rank_that_failed_alone_ends_those_that_wait_for_it() -> None:
    failed = seen(LIMITS.brief, state="failed", error="OutOfMemoryError: CUDA out of memory")
    verdict = find_lost({0: waiting(unchanged_s=1.0), 1: failed}, LIMITS)
    assert verdict is not None
    assert verdict.startswith("rank 1 (node1) failed in iteration 17: OutOfMemoryError: CUDA out of memory; rank 0 in")
    soon = seen(LIMITS.brief / 2, state="failed", error="FloatingPointError: the loss is nan")
    assert find_lost({0: seen(), 1: soon}, LIMITS) is None, "the others may be about to raise the same"


def test_the_rank_that_does_not_wait_is_what_the_others_wait_for() -> None:
    verdict = find_hanging({0: waiting(), 1: seen(unchanged_s=95.0, place="data.py:120 train_batches")}, LIMITS)
    assert verdict is not None
    assert verdict.startswith("rank 1 (node1) hangs in iteration 17, and other ranks are waiting")
    assert "rank 1 in iteration 17 (training, data.py:120 train_batches)" in verdict


def test_a_rank_that_hangs_is_named_also_when_a_collective_fails_first() -> None:
    lost = seen(state="lost", error="RuntimeError: Timed out waiting 100000ms for recv operation to complete")
    verdict = find_hanging({0: lost, 1: seen(unchanged_s=60.0)}, LIMITS)
    assert verdict is not None
    assert verdict.startswith("rank 1 (node1) hangs in iteration 17")
    assert find_hanging({0: lost, 1: seen(unchanged_s=30.0)}, LIMITS) is None, "it may be at work"


def test_a_silence_is_warned_of_long_before_it_ends_the_run() -> None:
    ranks = {0: seen(), 1: seen(LIMITS.remark, host="node7"), 2: seen(LIMITS.remark - 1)}
    found = remarks(ranks, LIMITS)
    assert list(found) == [1]
    assert found[1].startswith("rank 1 (node7) has given no sign of life for 10 s, last seen in iteration 17 (training")
    assert find_lost(ranks, LIMITS) is None
    assert remarks({1: seen(LIMITS.patience, state="ended")}, LIMITS) == {}


def test_of_ranks_that_all_wait_those_behind_are_named() -> None:
    verdict = find_hanging({0: waiting(), 1: waiting(iteration=16), 2: waiting()}, LIMITS)
    assert verdict is not None
    assert verdict.startswith("rank 1 (node1) hangs in iteration 16")
    verdict = find_hanging({0: waiting(), 1: waiting(place="p2p_communication.py:7 recv")}, LIMITS)
    assert verdict is not None
    assert verdict.startswith("all ranks wait for one another in iteration 17")
    assert "rank 1 in iteration 17 (training, p2p_communication.py:7 recv)" in verdict


def test_a_rank_that_was_stopped_while_it_waited_is_named_by_its_silence() -> None:
    """Its last heartbeat says that it waits as the others do."""
    ranks = {0: waiting(), 1: dataclasses.replace(waiting(), silent_s=LIMITS.brief)}
    assert find_hanging(ranks, LIMITS) is None
    ranks[1] = dataclasses.replace(ranks[1], silent_s=LIMITS.patience)
    assert str(find_lost(ranks, LIMITS)).startswith("rank 1 (node1) died or was stopped in iteration 17")
    ranks[1] = dataclasses.replace(ranks[1], silent_s=LIMITS.brief - 1)
    assert str(find_hanging(ranks, LIMITS)).startswith("all ranks wait for one another")


def test_waiting_for_a_rank_that_saves_is_left_to_the_process_group() -> None:
    assert find_hanging({0: seen(activity=SAVING, unchanged_s=1e4), 1: waiting(activity=SAVING)}, LIMITS) is None


def test_thousands_of_ranks_make_a_short_message() -> None:
    ranks = {rank: waiting(host=f"node{rank // 8}", place=f"layer.py:{rank} forward") for rank in range(4096)}
    ranks[1000] = seen(LIMITS.patience, host="node125")
    verdict = find_lost(ranks, LIMITS)
    assert verdict is not None
    assert verdict.startswith("rank 1000 (node125)")
    assert len(verdict) < 1500


@pytest.mark.parametrize(
    ("path", "waits"),
    [
        ("/venv/lib/python3.11/site-packages/torch/distributed/distributed_c10d.py", True),
        ("/venv/lib/python3.11/site-packages/megatron/core/pipeline_parallel/p2p_communication.py", True),
        ("/repository/megatron_sbld/training/step.py", True),
        ("/venv/lib/python3.11/site-packages/torch/utils/data/dataloader.py", False),
        ("/venv/lib/python3.11/site-packages/megatron/core/datasets/indexed_dataset.py", False),
        ("/repository/megatron_sbld/data/batches.py", False),
        ("/repository/megatron_sbld/training/metrics.py", False),
        ("/usr/lib/python3.11/threading.py", False),
    ],
)
def test_code_that_waits_for_ranks_is_told_from_code_that_reads_or_writes(path: str, waits: bool) -> None:
    from megatron_sbld.health.watchdog import waits_for_ranks

    assert waits_for_ranks(path) is waits


def test_silent_ranks_are_those_that_end_the_run() -> None:
    ended = seen(LIMITS.patience, state="ended")
    assert silent_ranks({0: waiting(), 1: seen(LIMITS.patience), 2: seen(LIMITS.brief), 3: ended}, LIMITS) == [1]
    lost = seen(state="lost", error="RuntimeError: Connection closed by peer")
    assert silent_ranks({0: lost, 1: seen(LIMITS.patience), 2: seen(LIMITS.brief), 3: ended}, LIMITS) == [1, 2]
