"""Runs that are stopped from outside: SIGKILL to a rank under torchrun, SIGTERM; each goes on as if never stopped."""

from __future__ import annotations

import os
import random
import re
import resource
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_sbld.checkpoint.files import latest_complete
from megatron_sbld.exit_status import EXIT_RANK_LOST, EXIT_TO_BE_CONTINUED
from megatron_sbld.training.stop import STOP_SIGNALS, stop_flag
from tests.training.process_helpers import (
    TORCHRUN,
    ended_with_the_test,
    log_of,
    rank_of,
    start,
    wait_for_checkpoint,
    wait_for_iteration,
)
from tests.training.trainer_helpers import (
    BOTH_OVERLAPS,
    change,
    in_folder,
    losses,
    prepare_corpus,
    rows,
    run_here,
    run_trainers,
    sbld,
    tiny_run,
)

pytestmark = [pytest.mark.slow, pytest.mark.alone]

KILLED_ITERATIONS = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("killed")


@pytest.fixture(scope="module")
def corpus(folder: Path) -> Path:
    return prepare_corpus(folder)


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[bytes]]]:
    """What a test starts, ended with it."""
    with ended_with_the_test() as started:
        yield started


@pytest.mark.parametrize(
    "parallel",
    [
        pytest.param({}, marks=pytest.mark.slow, id="plain optimizer"),
        pytest.param(BOTH_OVERLAPS, id="distributed optimizer"),
    ],
)
def test_a_run_whose_rank_is_killed_goes_on_as_if_it_had_not_been(
    folder: Path, corpus: Path, parallel: dict[str, Any], processes: list[subprocess.Popen[bytes]]
) -> None:
    name = "distributed" if parallel else "plain"
    config = tiny_run(
        folder / name,
        corpus,
        drop=sbld(folder),
        parallel=parallel,
        training={"train_iters": KILLED_ITERATIONS},
        checkpoint={"save_interval": 2, "async_save": bool(parallel)},
        logging={"progress": "lines"},
    )
    whole = change(in_folder(config, folder / f"whole {name}"), checkpoint={"save_interval": 0})
    assert run_trainers(2, [whole]) == [[0, 0]]

    # Far from the end, which a loaded machine may reach before it lets this process look again.
    victim, iteration = random.randrange(2), random.randrange(3, KILLED_ITERATIONS // 2)
    processes.append(killed := start(config, TORCHRUN))
    wait_for_iteration(config, killed, iteration)
    wait_for_checkpoint(config, killed)  # one that is written in the background may lag behind
    os.kill(rank_of(killed, victim), signal.SIGKILL)
    assert killed.wait(120) != 0
    written = len(rows(folder / name))
    assert iteration <= written < KILLED_ITERATIONS, f"rank {victim} was killed too late"
    named = re.search(rf"rank {victim} \(.*\) died or was stopped in iteration (\d+)", log_of(config))
    assert named is not None, log_of(config)
    assert int(named[1]) in range(written, written + 3), "a row may be unwritten, and the other rank a step ahead"
    assert f"exitcode  : {EXIT_RANK_LOST}" in log_of(config)
    saved = latest_complete(folder / name / "checkpoints")
    assert saved is not None

    processes.append(resumed := start(config, TORCHRUN))
    assert resumed.wait(240) == 0, log_of(config)
    assert f"iterations {saved.iteration + 1} to {KILLED_ITERATIONS}" in log_of(config)
    assert losses(folder / name) == losses(folder / f"whole {name}"), (victim, iteration)


def test_sigterm_saves_after_the_iteration_and_says_that_the_run_goes_on(
    folder: Path, corpus: Path, processes: list[subprocess.Popen[bytes]]
) -> None:
    """A single process, as Slurm's preemption would stop it."""
    iterations = 400  # far more than run before the signal
    config = tiny_run(
        folder / "terminated",
        corpus,
        drop=sbld(folder),
        training={"train_iters": iterations, "global_batch_size": 2},
        data={"num_workers": 1},  # which must not keep the process from ending
        logging={"progress": "lines", "log_interval": 100},
    )
    processes.append(process := start(config, []))
    wait_for_iteration(config, process, 3)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == EXIT_TO_BE_CONTINUED, log_of(config)
    stopped_at = len(rows(folder / "terminated"))
    assert 3 <= stopped_at < iterations
    saved = latest_complete(folder / "terminated" / "checkpoints")
    assert saved is not None
    assert saved.iteration == stopped_at
    assert f"stopped on request after iteration {stopped_at} of {iterations}; start again to continue" in log_of(config)

    # Here the rest of the run is as good as in a process of its own, and a few iterations say as much as all.
    stop = {"exit_after_iterations": 3}
    assert run_here(change(config, training=stop)) == EXIT_TO_BE_CONTINUED
    whole = change(in_folder(config, folder / "whole"), training={"exit_after_iterations": stopped_at + 3})
    assert run_here(whole) == EXIT_TO_BE_CONTINUED
    assert losses(folder / "terminated") == losses(folder / "whole")


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_both_of_slurms_signals_are_a_request_to_stop(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with stop_flag() as flag:
        flag.listen()
        assert not flag.requested
        os.kill(os.getpid(), number)
        assert flag.requested
    assert signal.getsignal(number) == before


def test_sigterm_to_one_rank_stops_all_of_them_at_the_same_iteration(
    folder: Path, corpus: Path, processes: list[subprocess.Popen[bytes]]
) -> None:
    config = tiny_run(folder / "one rank", corpus, drop=sbld(folder), training={"train_iters": 400})
    processes.append(process := start(config, TORCHRUN))
    wait_for_iteration(config, process, 3)
    os.kill(rank_of(process, 1), signal.SIGTERM)
    assert process.wait(120) != 0
    assert log_of(config).count(f"exitcode  : {EXIT_TO_BE_CONTINUED}") >= 1
    saved = latest_complete(folder / "one rank" / "checkpoints")
    assert saved is not None
    assert saved.iteration == len(rows(folder / "one rank"))


def test_a_disk_that_is_full_on_the_way_is_no_mistake_in_the_config(folder: Path, corpus: Path) -> None:
    sections: dict[str, Any] = {
        "training": {"train_iters": 100},
        "data": {"train_data_path": [f"{corpus}_train"], "data_cache_path": str(folder / "cache")},
        "logging": {"tensorboard": False, "progress": "none"},
    }
    assert run_here(tiny_run(folder / "room", corpus, **sections)) == 0, "data caches are made"
    needed = (folder / "room" / "metrics.jsonl").stat().st_size
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (needed // 2, hard))
    try:
        error = run_here(tiny_run(folder / "full", corpus, **sections))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    found = re.fullmatch(r"RuntimeError: after iteration (\d+): \[Errno 27\] File too large", str(error))
    assert found is not None
    assert 10 < int(found[1]) < 90
