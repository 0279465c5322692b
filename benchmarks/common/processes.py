"""Starting what is measured: processes as torchrun starts them, Megatron in each, a config that can run."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist
from megatron.core.num_microbatches_calculator import (
    destroy_num_microbatches_calculator,
    init_num_microbatches_calculator,
)
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from megatron_sbld.config.sections import Config
from megatron_sbld.config.validate import data_parallel_size, validate
from megatron_sbld.training.processes import distributed_run


def start_processes(function: Callable[..., Any], processes: int, *args: Any) -> dict[int, Any]:
    """Call an importable function on each of new processes, started as torchrun starts them; its results by rank."""
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id="benchmark",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        start_method="spawn",
    )
    return elastic_launch(config, function)(*args)


@contextmanager
def megatron_run(config: Config) -> Iterator[None]:
    """The trainer's process groups and seeds, and Megatron's number of microbatches."""
    with distributed_run(config):
        training, replicas = config.training, data_parallel_size(config, dist.get_world_size())
        init_num_microbatches_calculator(
            dist.get_rank(), None, training.global_batch_size, training.micro_batch_size, replicas
        )
        try:
            yield
        finally:
            destroy_num_microbatches_calculator()


def check_config(config: Config, processes: int = 1) -> None:
    """The trainer's own checks; ends the program with what they refuse."""
    try:
        validate(config, processes)
    except ValueError as error:
        stop(error)


def stop(error: object) -> NoReturn:
    """End the program because of what it was asked for."""
    sys.exit(f"{Path(sys.argv[0]).name}: error: {error}")


def warn_of_load() -> None:
    load = os.getloadavg()[0]
    if load > 0.5:
        print(f"warning: load average {load:.1f}: other programs are running, times will be noisy", file=sys.stderr)
