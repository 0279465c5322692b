"""Ranks that are stopped, hang or are killed in the middle of an iteration: all of the run ends, and names them."""

from __future__ import annotations

import os
import random
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from megatron_sbld.checkpoint.files import latest_complete
from megatron_sbld.config.sections import Config
from megatron_sbld.exit_status import EXIT_RANK_LOST
from megatron_sbld.health.watchdog import is_lost_connection, watched
from megatron_sbld.training.processes import distributed_run
from tests.harness import single_process
from tests.health.hanging_trainer import HANGS_IN
from tests.training.process_helpers import (
    TORCHRUN,
    ended_with_the_test,
    log_of,
    rank_of,
    start,
    wait_for_iteration,
)
from tests.training.trainer_helpers import (
    BOTH_OVERLAPS,
    call_on_ranks,
    change,
    in_folder,
    prepare_corpus,
    run_trainers,
    sbld,
    tiny_run,
    train_rows,
)

pytestmark = [pytest.mark.slow, pytest.mark.alone]

TIMEOUT_S = 20.0
SLACK_S = 5.0
"""What the launcher needs to end once its processes have."""
NEVER_EQUAL = ("step_time_s", "tokens_per_s")
DISTURBANCES = {"DP 2": 7, "TP 2": 7, "PP 2": 6}
LAYOUTS: dict[str, dict[str, Any]] = {
    "DP 2": BOTH_OVERLAPS,
    "TP 2": {"tensor_model_parallel_size": 2},
    "PP 2": {"pipeline_model_parallel_size": 2},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("watchdog")


@pytest.fixture(scope="module")
def corpus(folder: Path) -> Path:
    return prepare_corpus(folder)


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[bytes]]]:
    """What a test starts, ended with it."""
    with ended_with_the_test() as started:
        yield started


def run_of(folder: Path, corpus: Path, name: str, **sections: Any) -> Config:
    """A run that would go on for minutes, and whose ranks wait for each other for TIMEOUT_S."""
    config = tiny_run(
        folder / name,
        corpus,
        drop=sbld(folder),
        logging={"progress": "lines"},
        **{"training": {"train_iters": 10_000}, "parallel": {"tensor_model_parallel_size": 2}, **sections},
    )
    return change(config, parallel={"distributed_timeout_minutes": TIMEOUT_S / 60})


def written(config: Config) -> int:
    """The iteration of the last row."""
    return max((row["iteration"] for row in train_rows(config.logging.run_dir)), default=0)


def possible_iterations(config: Config) -> range:
    """Where a run can have ended: rank 0 may not have come to write a row, with the other an iteration ahead."""
    return range(written(config), written(config) + 3)


def watchdog_threads() -> list[str]:
    return sorted(thread.name for thread in threading.enumerate() if thread.name.startswith("watchdog"))


def threads_of_a_run(config: Config) -> tuple[list[str], list[str]]:
    """Names of the watchdog's threads within a run and after it; ranks leave it one second after each other."""
    with distributed_run(config):
        time.sleep(dist.get_rank())
        within = watchdog_threads()
    return within, watchdog_threads()


def test_the_watchdog_ends_with_the_run(folder: Path, corpus: Path) -> None:
    config = change(tiny_run(folder / "threads", corpus), parallel={"distributed_timeout_minutes": TIMEOUT_S / 60})
    both = ["watchdog _exchange_heartbeats", "watchdog _watch_store"]
    assert call_on_ranks(2, threads_of_a_run, [config]) == [[(both, []), (both, [])]]


def test_errors_of_collectives_are_told_from_a_ranks_own() -> None:
    def caught(function: Callable[[], object]) -> BaseException:
        with pytest.raises(Exception) as raised:
            function()
        return raised.value

    def wrapped() -> None:
        try:
            lost()
        except RuntimeError as error:
            raise ValueError("checkpoint 3 cannot be loaded") from error

    def lost() -> None:
        raise dist.DistBackendError("NCCL communicator was aborted")

    assert is_lost_connection(caught(lost))
    assert is_lost_connection(caught(wrapped))
    assert not is_lost_connection(caught(lambda: torch.ones(2) @ torch.ones(3)))
    assert not is_lost_connection(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_lost_connection(FloatingPointError("the loss is nan"))


def test_one_process_has_no_watchdog() -> None:
    with single_process(), watched(600.0):
        assert watchdog_threads() == []


def test_a_stopped_rank_0_ends_the_other_although_it_keeps_the_store(
    folder: Path, corpus: Path, processes: list[subprocess.Popen[bytes]]
) -> None:
    """Without torchrun, as under srun: nothing but the watchdog ends the other rank."""
    config = run_of(folder, corpus, "stopped")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    processes += [start(config, [], environment={**address, "RANK": str(rank)}) for rank in range(2)]
    wait_for_iteration(config, processes[0], 3)
    processes[0].send_signal(signal.SIGSTOP)
    began = time.monotonic()
    try:
        assert processes[1].wait(10 * TIMEOUT_S) == EXIT_RANK_LOST, log_of(config)
    finally:
        processes[0].kill()
    assert time.monotonic() - began <= TIMEOUT_S + 3
    named = re.search(r"rank 0 \(.*\) died or was stopped in iteration (\d+)", log_of(config))
    assert named is not None, log_of(config)
    assert int(named[1]) in possible_iterations(config)


def test_a_rank_that_hangs_in_python_ends_all_and_is_named_with_the_place(
    folder: Path, corpus: Path, processes: list[subprocess.Popen[bytes]]
) -> None:
    config = run_of(folder, corpus, "hangs", parallel={})
    processes.append(hanging := start(config, TORCHRUN, "tests.health.hanging_trainer"))
    wait_for_iteration(config, hanging, HANGS_IN - 1)
    began = time.monotonic()
    assert hanging.wait(10 * TIMEOUT_S) != 0
    assert time.monotonic() - began <= TIMEOUT_S + 5, "a second or two are torchrun's"
    log = log_of(config)
    assert re.search(rf"rank 1 \(.*\) hangs in iteration {HANGS_IN}, and other ranks are waiting", log), log
    assert re.search(rf"rank 1 in iteration {HANGS_IN} \(training, tests/health/hanging_trainer.py:\d+ hanging\)", log)
    assert f"exitcode  : {EXIT_RANK_LOST}" in log


@pytest.mark.timeout(1500)
@pytest.mark.parametrize("layout", DISTURBANCES)
def test_a_run_disturbed_again_and_again_ends_each_time_and_equals_an_undisturbed_one(
    folder: Path, corpus: Path, layout: str, processes: list[subprocess.Popen[bytes]]
) -> None:
    """SIGKILL and SIGSTOP in turn, to a random rank at a random moment; 20 times over all layouts."""
    count, iterations = DISTURBANCES[layout], 200
    config = run_of(
        folder,
        corpus,
        f"chaos {layout}",
        parallel=LAYOUTS[layout],
        training={"train_iters": iterations, "global_batch_size": 16},
        checkpoint={"save_interval": 3, "keep_last": 2, "save_at_end": True, "async_save": layout == "DP 2"},
    )
    whole = change(in_folder(config, folder / f"whole {layout}"), checkpoint={"save_interval": 0})
    assert run_trainers(2, [whole]) == [[0, 0]]

    draw = random.Random(f"chaos {layout}")
    for number in range(count):
        sent = (signal.SIGKILL, signal.SIGSTOP)[number % 2]
        victim, further, delay = draw.randrange(2), draw.randrange(4, 12), draw.uniform(0.0, 0.5)
        what = f"disturbance {number + 1}, {sent.name} to rank {victim}"
        before = len(log_of(config)) if number else 0
        at = written(config) if number else 0
        processes.append(run := start(config, TORCHRUN))
        wait_for_iteration(config, run, at + further)  # rows of iterations that are run again are replaced
        time.sleep(delay)
        os.kill(rank_of(run, victim), sent)
        began = time.monotonic()
        assert run.wait(10 * TIMEOUT_S) != 0, what
        took = time.monotonic() - began
        log, reached = log_of(config)[before:], written(config)
        print(f"{layout}: {what} in iteration {reached + 1}: ended after {took:.1f} s")
        assert reached < iterations, f"{what} came too late"
        assert took <= TIMEOUT_S + SLACK_S, f"{what}: {took:.1f} s\n{log}"
        named = re.search(rf"rank {victim} \(.*\) died or was stopped in iteration (\d+)", log)
        assert named is not None, f"{what}\n{log}"
        assert int(named[1]) in possible_iterations(config), f"{what}\n{log}"

    processes.append(last := start(config, TORCHRUN))
    assert last.wait(240) == 0, log_of(config)
    assert rows_to_compare(config) == rows_to_compare(whole)
    disturbed, undisturbed = final_tensors(config, folder / "a.pt"), final_tensors(whole, folder / "b.pt")
    assert disturbed.keys() == undisturbed.keys()
    assert [key for key, tensor in disturbed.items() if not torch.equal(tensor, undisturbed[key])] == []


def rows_to_compare(config: Config) -> list[dict[str, Any]]:
    """All that a training row says but times."""
    return [
        {name: value for name, value in row.items() if name not in NEVER_EQUAL}
        for row in train_rows(config.logging.run_dir)
    ]


def final_tensors(config: Config, file: Path) -> dict[str, torch.Tensor]:
    """Weights and optimizer state of the last checkpoint."""
    saved = latest_complete(Path(config.logging.run_dir) / "checkpoints")
    assert saved is not None
    assert saved.iteration == config.training.train_iters
    dcp_to_torch_save(saved.path, file)
    state = torch.load(file, weights_only=False)
    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    assert any("optimizer" in name for name in tensors), sorted(state)
    return tensors
