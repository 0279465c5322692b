"""Starting and ending the processes of a run: torch.distributed, Megatron's groups, seeds, agreement on the config."""

from __future__ import annotations

import dataclasses
import datetime
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from megatron_sbld.config.sections import Config
from megatron_sbld.health.watchdog import watched
from megatron_sbld.mcore.cpu.gloo import use_one_gloo_thread


def world_size_from_environment() -> int:
    """Processes of this run as torchrun tells them; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def distributed_run(config: Config) -> Iterator[None]:
    """Everything between the first and the last collective of a run: groups, devices, seeds.

    Raises:
        ValueError: nccl without a GPU; or ranks were given different configs, with the ranks and the fields.
        RankLostError: another rank died; or the process ends with EXIT_RANK_LOST, see `watched`.
    """
    if not torch.cuda.is_available():
        from megatron_sbld.mcore.cpu.standins import install_cpu_standins  # never loaded where there is a GPU

        install_cpu_standins()
    _init_process_group(config)
    try:
        parallel = config.parallel
        with watched(60 * parallel.distributed_timeout_minutes):
            parallel_state.initialize_model_parallel(
                tensor_model_parallel_size=parallel.tensor_model_parallel_size,
                pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
                virtual_pipeline_model_parallel_size=parallel.num_virtual_stages_per_pipeline_rank,
                context_parallel_size=parallel.context_parallel_size,
                distributed_timeout_minutes=parallel.distributed_timeout_minutes,
            )
            require_equal_configs(config)
            seed_everything(config.training.seed)
            yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def _init_process_group(config: Config) -> None:
    backend = config.parallel.distributed_backend
    if backend == "auto":
        backend = "nccl" if torch.cuda.is_available() else "gloo"
    if backend == "nccl" and not torch.cuda.is_available():
        raise ValueError("parallel.distributed_backend = 'nccl': needs a CUDA device; use auto or gloo")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if backend == "gloo":
        use_one_gloo_thread()
    timeout = datetime.timedelta(minutes=config.parallel.distributed_timeout_minutes)
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        store = dist.HashStore()
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)


def require_equal_configs(config: Config) -> None:
    """Compare every rank's config with rank 0's, on every rank.

    Raises:
        ValueError: naming the ranks that differ, each with its fields and values.
    """
    everyone: list[dict[str, Any]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, dataclasses.asdict(config))
    findings = [
        f"rank {rank}: "
        + ", ".join(
            f"{section}.{name} = {value!r} instead of {everyone[0][section][name]!r}"
            for section, fields in theirs.items()
            for name, value in fields.items()
            if value != everyone[0][section][name]
        )
        for rank, theirs in enumerate(everyone)
        if theirs != everyone[0]
    ]
    if findings:
        raise ValueError("these ranks were given a different config than rank 0:\n  " + "\n  ".join(findings))


def seed_everything(seed: int) -> None:
    """Seed weights and dropout as Megatron-LM does: pipeline stages differ, tensor ranks through the RNG tracker."""
    seed += 100 * parallel_state.get_pipeline_model_parallel_rank()
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  (Megatron's own parts draw from the global generator)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
