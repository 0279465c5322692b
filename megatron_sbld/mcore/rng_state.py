"""The states of all random number generators that training draws from, in the form in which Megatron-LM saves them.

Python, NumPy, torch, CUDA and Megatron's tracker (dropout), of every rank. A saved state belongs to a rank of one
parallel layout: on another, `reseed` starts new streams. Layer drops depend on none of these (they are counter-based).
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject


def sharded_rng_state(*, is_loading: bool = False) -> ShardedObject:
    """The states of this pipeline and tensor rank, a list with one entry for each data- and context-parallel rank.

    Collective over the data- and context-parallel group unless `is_loading`, when it only says which object to read.
    """
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    states: list[Any] | None = None
    if not is_loading:
        states = [None] * dist.get_world_size(group)
        dist.all_gather_object(states, own_state(), group=group)
    return ShardedObject(
        "rng_state",
        states,
        (
            parallel_state.get_pipeline_model_parallel_world_size(),
            parallel_state.get_tensor_model_parallel_world_size(),
        ),
        (parallel_state.get_pipeline_model_parallel_rank(), parallel_state.get_tensor_model_parallel_rank()),
        replica_id=dist.get_rank(group),
    )


def restore_rng_state(states: list[dict[str, Any]]) -> None:
    """Continue every generator of this rank where it was; `states` is what `sharded_rng_state` saved on this layout."""
    set_own_state(states[dist.get_rank(parallel_state.get_data_parallel_group(with_context_parallel=True))])


def set_own_state(state: dict[str, Any]) -> None:
    """Continue every generator of this rank where it was when `own_state` was asked."""
    random.setstate(state["random_rng_state"])
    np.random.set_state(state["np_rng_state"])  # noqa: NPY002 (the global generator is what others may draw from)
    torch.set_rng_state(state["torch_rng_state"])
    torch.cuda.set_rng_state(state["cuda_rng_state"])
    tensor_parallel.get_cuda_rng_tracker().set_states(state["rng_tracker_states"])


def reseed(seed: int, iteration: int) -> None:
    """New streams, a pure function of the run's seed, the iteration and the pipeline and tensor rank."""
    mixed = int(np.random.SeedSequence([seed, iteration]).generate_state(1)[0] >> 1)
    # Megatron-LM's offset between pipeline stages; the tracker itself adds one for each tensor rank.
    mixed += 100 * parallel_state.get_pipeline_model_parallel_rank()
    random.seed(mixed)
    np.random.seed(mixed)  # noqa: NPY002
    torch.manual_seed(mixed)
    tensor_parallel.model_parallel_cuda_manual_seed(mixed)


def own_state() -> dict[str, Any]:
    """The states of every generator of this rank."""
    return {
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),  # noqa: NPY002
        "torch_rng_state": torch.get_rng_state(),
        "cuda_rng_state": torch.cuda.get_rng_state(),
        "rng_tracker_states": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }
