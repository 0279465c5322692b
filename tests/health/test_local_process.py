"""A process is ended by its name, stopped or not, and no other in its place."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from megatron_sbld.health.local_process import end_if_local, own_process

SLEEPER = """
import time

from megatron_sbld.health.local_process import own_process

print(own_process(), flush=True)
time.sleep(600)
"""


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen([sys.executable, "-c", SLEEPER], stdout=subprocess.PIPE, text=True)
    yield process
    process.kill()
    process.communicate()


def name_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_a_stopped_process_is_ended(sleeper: subprocess.Popen[str]) -> None:
    name = name_of(sleeper)
    sleeper.send_signal(signal.SIGSTOP)
    assert end_if_local(name)
    assert sleeper.wait(10) == -signal.SIGKILL
    assert not end_if_local(name), "it is gone"


@pytest.mark.parametrize("field", range(3), ids=["boot", "namespace", "start"])
def test_a_process_of_another_machine_container_or_time_is_left_alone(
    sleeper: subprocess.Popen[str], field: int
) -> None:
    fields = name_of(sleeper).split()
    fields[field] += "1"
    assert not end_if_local(" ".join(fields))
    assert sleeper.poll() is None


@pytest.mark.parametrize("name", ["", "no process", pytest.param(f"{os.getpid()}", id="its number alone")])
def test_what_is_no_name_ends_nothing(name: str) -> None:
    assert not end_if_local(name)


def test_a_process_has_one_name() -> None:
    assert own_process() == own_process() != ""
    assert own_process().endswith(f" {os.getpid()}")
