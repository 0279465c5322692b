"""Runs of `megatron-sbld pretrain` in processes of their own, for tests that stop, kill or signal them."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import yaml

from megatron_sbld.checkpoint.files import latest_complete
from megatron_sbld.config.sections import Config
from tests.training.trainer_helpers import REPOSITORY

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]


def start(
    config: Config,
    launcher: Sequence[str],
    module: str = "megatron_sbld",
    environment: Mapping[str, str] | None = None,
) -> subprocess.Popen[bytes]:
    """Start `pretrain` in processes of its own, with the config as a file; what it prints goes beside that.

    Args:
        config: the run.
        launcher: what comes before the trainer's own command: TORCHRUN, or nothing.
        module: stands in for the command of the package.
        environment: variables in addition.
    """
    path = Path(f"{config.logging.run_dir}.yaml")
    path.write_text(yaml.safe_dump(dataclasses.asdict(config)))
    command = [*launcher, sys.executable, "-m", module, "pretrain", "--config", str(path)]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **(environment or {})}
    with path.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(
            [*command, "--checkpoint.resume", "auto"], stdout=log, stderr=log, env=variables, cwd=REPOSITORY
        )


def wait_for_iteration(config: Config, process: subprocess.Popen[bytes], iteration: int, seconds: float = 240) -> None:
    """Wait until a run has written the row of an iteration."""
    path, deadline = Path(config.logging.run_dir) / "metrics.jsonl", time.monotonic() + seconds
    while not (path.exists() and path.read_text().count('"loss"') >= iteration):
        assert process.poll() is None, log_of(config)
        assert time.monotonic() < deadline, f"iteration {iteration} was not reached in {seconds} s\n{log_of(config)}"
        time.sleep(0.01)


def wait_for_checkpoint(config: Config, process: subprocess.Popen[bytes], seconds: float = 120) -> None:
    """Wait until a run has a complete checkpoint."""
    deadline = time.monotonic() + seconds
    while latest_complete(Path(config.logging.run_dir) / "checkpoints") is None:
        assert process.poll() is None, log_of(config)
        assert time.monotonic() < deadline, f"no checkpoint in {seconds} s\n{log_of(config)}"
        time.sleep(0.01)


def log_of(config: Config) -> str:
    return Path(f"{config.logging.run_dir}.log").read_text()


def rank_of(process: subprocess.Popen[bytes], rank: int) -> int:
    """Process id of a rank that a launcher started."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for child in map(int, children):
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return child
    raise AssertionError(f"no child of {process.pid} is rank {rank}")


@contextmanager
def ended_with_the_test() -> Iterator[list[subprocess.Popen[bytes]]]:
    """A list for the processes that a test starts."""
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for process in started:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
