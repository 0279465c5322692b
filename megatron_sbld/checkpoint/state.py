"""What a checkpoint holds, and its way to and from the disk in megatron-core's torch_dist format.

Saved under the names of Megatron-LM's `generate_state_dict` (training/checkpointing.py): `model` (or `model0`,
`model1`, ... for virtual stages, which share one set of names on disk), `optimizer`, `opt_param_scheduler`,
`rng_state`, `iteration`, `checkpoint_version`. Megatron-LM's `args` are not written: it then keeps its own, and takes
the saved layout for that of one process.

Files are written by torch.distributed.checkpoint's own writer rather than by megatron-core's asynchronous one, which
forks processes, needs psutil, and lets the other ranks wait for ever when the disk of one is full. The format is the
same.

When to save, which folder, and what else a run needs are manager.py's.
"""

from __future__ import annotations

import contextlib
import io
import pickle
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedObject, ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.torch import MCoreSavePlanner, mcore_to_pyt_state_dict
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.utils import get_model_config, unwrap_model
from torch.distributed.checkpoint import CheckpointException

from megatron_sbld.checkpoint.files import Layout, remove
from megatron_sbld.checkpoint.layers import LayerMap, place_layers
from megatron_sbld.checkpoint.shards import ShardWriter
from megatron_sbld.mcore.compat import COMMON_FILE, load_sharded
from megatron_sbld.mcore.local.layer_specs import uneven_layout
from megatron_sbld.mcore.optimizer.state import bucket_sizes

NOT_DISTRIBUTED = "not_distributed"
DP_RESHARDABLE = "dp_reshardable"
FULLY_RESHARDABLE = "fully_reshardable"


@dataclass(frozen=True)
class Snapshot:
    """What this rank has to write; with `copy`, detached from the model and the optimizer."""

    common: bytes
    """What all ranks share, for rank 0 to write."""
    shards: dict[str, Any]
    """This rank's own tensors and objects."""


def current_layout(
    model_chunks: Sequence[torch.nn.Module], optimizer: MegatronOptimizer, distributed_format: str
) -> Layout:
    """The layout of this run, as this rank sees it; `distributed_format` counts where the optimizer is distributed."""
    config = optimizer.config
    optimizer_format = distributed_format if config.use_distributed_optimizer else NOT_DISTRIBUTED
    return Layout(
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline_model_parallel_size=parallel_state.get_pipeline_model_parallel_world_size(),
        num_virtual_stages_per_pipeline_rank=len(model_chunks),
        context_parallel_size=parallel_state.get_context_parallel_world_size(),
        data_parallel_size=parallel_state.get_data_parallel_world_size(),
        optimizer_format=optimizer_format,
        optimizer_buckets=bucket_sizes(optimizer) if optimizer_format == DP_RESHARDABLE else [],
        precision="fp16" if config.fp16 else "bf16" if config.bf16 else "fp32",
        pipeline_model_parallel_layout=uneven_layout(get_model_config(model_chunks[0])),
    )


def check_layout(path: Path, *, saved: Layout, present: Layout) -> None:
    """Refuse optimizer state that this run's optimizer cannot take over.

    Raises:
        ValueError: names the field, its value and the saved one.
    """
    distributed = present.optimizer_format != NOT_DISTRIBUTED
    if distributed != (saved.optimizer_format != NOT_DISTRIBUTED):
        raise ValueError(
            f"checkpoint {path}: parallel.use_distributed_optimizer is {distributed}, but the checkpoint was saved "
            f"with {not distributed}; set it to the same value, or load only the weights"
        )
    if present.precision != saved.precision:
        raise ValueError(
            f"checkpoint {path}: training.precision is {present.precision}, but the checkpoint was saved with "
            f"{saved.precision}; set it to the same value, or load only the weights"
        )
    if saved.optimizer_format != DP_RESHARDABLE:
        return
    advice = (
        f"its optimizer format {DP_RESHARDABLE} allows only the data-parallel size to change; set it alike, load the "
        f"weights alone, or save in the format {FULLY_RESHARDABLE}"
    )
    for name in (
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "num_virtual_stages_per_pipeline_rank",
        "pipeline_model_parallel_layout",
    ):
        here, there = getattr(present, name), getattr(saved, name)
        if here != there:
            raise ValueError(
                f"checkpoint {path}: parallel.{name} is {here}, but the checkpoint was saved with {there}, and {advice}"
            )
    if present.optimizer_buckets != saved.optimizer_buckets:
        raise ValueError(
            f"checkpoint {path}: parallel.overlap_grad_reduce and parallel.ddp_bucket_size give other gradient buckets "
            f"than when the checkpoint was saved, and {advice}"
        )


def content_metadata(optimizer_format: str) -> dict[str, Any]:
    """Megatron's `content_metadata`: which of its state-dict variants a checkpoint holds."""
    metadata: dict[str, Any] = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
    if optimizer_format != NOT_DISTRIBUTED:
        metadata["distrib_optim_sharding_type"] = optimizer_format
    if optimizer_format == FULLY_RESHARDABLE:
        # Gather on the first data-parallel rank, the one that writes, instead of on all of them.
        metadata["distrib_optim_fully_reshardable_mem_efficient"] = True
    return metadata


def model_state(
    model_chunks: Sequence[torch.nn.Module], metadata: dict[str, Any], layers: LayerMap | None = None
) -> dict[str, Any]:
    """The sharded state of this rank's chunks, by Megatron-LM's keys; `layers`: of these layers of a checkpoint."""
    states = {}
    for key, chunk in _named_chunks(model_chunks).items():
        states[key] = chunk.sharded_state_dict(metadata=with_group(metadata))
        if layers is not None:
            place_layers(chunk, states[key], layers, with_group(metadata))
    return states


def with_group(metadata: dict[str, Any]) -> dict[str, Any]:
    """The metadata as sharded_state_dict methods want it; the group itself is not saved."""
    return {**metadata, "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}


def take_snapshot(state: dict[str, Any], *, copy: bool) -> Snapshot:
    """Divide a sharded state dict into what ranks share and this rank's shards. Collective; consumes `state`.

    Args:
        state: of all that is saved.
        copy: copy tensors to host memory, so that training may go on before they are written.
    """
    sharded, common = save_preprocess(state)
    by_key: dict[str, list[ShardedBase]] = defaultdict(list)
    for item in nested_values(sharded):
        if not is_main_replica(item.replica_id):
            continue
        if copy and isinstance(item, ShardedTensor):
            item.data = item.data.detach().to("cpu", copy=True)
        by_key[item.unique_key if isinstance(item, ShardedObject) else item.key].append(item)
    common_file = io.BytesIO()
    torch.save(common, common_file)
    return Snapshot(common_file.getvalue(), mcore_to_pyt_state_dict(by_key))


def write_common(folder: Path, snapshot: Snapshot) -> None:
    """Write what ranks share into a new folder. For one rank, before the others write."""
    remove(folder)
    folder.mkdir(parents=True)
    (folder / COMMON_FILE).write_bytes(snapshot.common)
    save_config(CheckpointingConfig("torch_dist", 1), str(folder))


def write_shards(folder: Path, snapshot: Snapshot, group: dist.ProcessGroup) -> None:
    """Write every rank's shards, and the table of where each is. Collective; a failure is raised on all ranks."""
    planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
    dcp.save(snapshot.shards, storage_writer=ShardWriter(folder), planner=planner, process_group=group)


def read(path: Path, state: dict[str, Any], *, ignored: tuple[str, ...], partly: bool = False) -> dict[str, Any]:
    """Load a sharded state dict, and all that ranks share. Collective.

    Args:
        path: the checkpoint.
        state: the sharded state dict to be filled.
        ignored: beginnings of keys that may be in the checkpoint without being asked for.
        partly: whether parts of its tensors may be left unread.

    Raises:
        ValueError: the checkpoint lacks something, or holds something that no rank asked for.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # megatron-core calls torch by names that torch deprecates
        loaded, unused, absent = load_sharded(path, state, validate_access_integrity=not partly)
    absent_on_ranks: list[set[str]] = [set()] * dist.get_world_size()
    dist.all_gather_object(absent_on_ranks, absent)
    problems = {
        "it lacks": set().union(*absent_on_ranks),
        "it holds entries that this run does not have:": {key for key in unused if not key.startswith(ignored)},
    }
    for problem, keys in problems.items():
        # Extra states are Transformer Engine's bookkeeping for fp8, absent without it.
        names = sorted(key for key in keys if "_extra_state" not in key)
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise ValueError(f"{problem} {', '.join(names[:5])}{more}")
    return loaded


def load_model(model_chunks: Sequence[torch.nn.Module], loaded: dict[str, Any]) -> None:
    """Give each chunk its weights. Not strict: what is missing has been refused by `read`, but for extra states."""
    for key, chunk in _named_chunks(model_chunks).items():
        # A chunk without layers, embedding and loss has no weights, and reading leaves out what is empty.
        chunk.load_state_dict(loaded.get(key, {}), strict=False)


@contextlib.contextmanager
def failures_name(path: Path) -> Iterator[None]:
    """Turn whatever goes wrong on reading a checkpoint into a ValueError that names it."""
    try:
        yield
    except (Exception, CheckpointException) as error:
        raise ValueError(f"checkpoint {path} cannot be loaded: {reason(error)}") from error


def reason(error: BaseException) -> str:
    """One line that says what went wrong."""
    if isinstance(error, CheckpointException):
        return by_rank({rank: reason(cause) for rank, (cause, _) in error.failures.items()})
    if isinstance(error, pickle.UnpicklingError):  # its own text advises to load without weights_only
        return "the content of a file is damaged (UnpicklingError)"
    first_line = str(error).split("\n", maxsplit=1)[0]
    return first_line if type(error) is ValueError else f"{type(error).__name__}: {first_line}"


def by_rank(reasons: dict[int, str]) -> str:
    """The reasons of all ranks that failed, each once, with the first rank that gave it."""
    ranks: dict[str, list[int]] = defaultdict(list)
    for rank, text in sorted(reasons.items()):
        ranks[text].append(rank)
    return "; ".join(
        f"rank {same[0]}{f' and {len(same) - 1} more' if len(same) > 1 else ''}: {text}" for text, same in ranks.items()
    )


def _named_chunks(model_chunks: Sequence[torch.nn.Module]) -> dict[str, GPTModel]:
    chunks: list[GPTModel] = unwrap_model(list(model_chunks))
    if len(chunks) == 1:
        return {"model": chunks[0]}
    return {f"model{index}": chunk for index, chunk in enumerate(chunks)}
