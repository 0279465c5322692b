"""The process groups of a run, in a process of its own: this one's groups are the tests'."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

PROGRAM = """
import json
import torch
from megatron.core import parallel_state
from megatron_sbld.config.sections import Config, ParallelConfig
from megatron_sbld.training.processes import distributed_run

with distributed_run(Config(parallel=ParallelConfig(distributed_backend="gloo"))):
    groups = [torch.distributed.group.WORLD, parallel_state.get_data_parallel_group()]
    options = [group._get_backend(torch.device("cpu")).options for group in groups]
    print(json.dumps([[each._threads, len(each._devices), each._timeout.total_seconds()] for each in options]))
"""


def test_gloo_groups_of_a_run_have_one_thread_each_and_the_run_s_timeout() -> None:
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}
    printed = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=False
    )
    assert printed.returncode == 0, printed.stderr
    assert json.loads(printed.stdout) == [[1, 1, 600.0], [1, 1, 600.0]]
