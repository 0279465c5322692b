"""Where megatron-core 0.16 to 0.19 differ in what this package calls: the one place that tells versions apart.

What a signature or a name shows is asked for there; what behaves differently under the same name goes by the version.
Also here: which versions are supported, and whether Transformer Engine and NVIDIA's Apex can be used beside them.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from megatron.core import num_microbatches_calculator, package_info, parallel_state, utils
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import DistributedOptimizer
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.distributed.checkpoint.planner import ReadItem

from megatron_sbld.files.pickled_paths import read_paths_of_python_3_13

read_paths_of_python_3_13()


class Support(NamedTuple):
    """What of this package works with a version of megatron-core, and how that is known."""

    trainer: bool
    """Whether the commands of megatron-sbld do; else only the layers, in a Megatron-LM checkout."""
    why: str


SUPPORT = {
    (0, 16): Support(True, "supported: all tests run on 0.16.1"),
    (0, 17): Support(True, "supported: tests of layers and trainer were run once on 0.17.1"),
    (0, 18): Support(True, "supported: tests of layers and trainer were run once on 0.18.2"),
    (0, 19): Support(True, "supported: `make test-newest` runs on 0.19.2"),
    (0, 20): Support(False, "layers in a patched Megatron-LM checkout only: no release that the trainer was tested on"),
}
"""By the first two numbers of the version."""
INSTALL = "pip install 'megatron-core>=0.16.1,<0.20'"


def core_version() -> tuple[int, int]:
    """The first two numbers of the installed megatron-core's version."""
    major, minor = package_info.__version__.split(".")[:2]
    return int(major), int(minor)


def check_megatron_core(*, trainer: bool = False) -> None:
    """Refuse a megatron-core that this package was not tested with.

    Args:
        trainer: whether a command of megatron-sbld is to run; Megatron-LM checkouts may have newer versions.

    Raises:
        ValueError: names the version and what to install.
    """
    found = SUPPORT.get(core_version())
    if found is None or (trainer and not found.trainer):
        elsewhere = "" if trainer else " (or use a Megatron-LM checkout that patches/README.md names)"
        raise ValueError(
            f"megatron-core {package_info.__version__} is installed, but this version of megatron-sbld was tested with "
            f"0.16.1 to 0.19 only: {INSTALL}{elsewhere}"
        )


@functools.cache
def transformer_engine_available() -> bool:
    """Whether Transformer Engine for PyTorch can be imported (a package that is there but broken cannot be used)."""
    return _importable("transformer_engine.pytorch")


@functools.cache
def nvidia_apex_available() -> bool:
    """Whether the apex that is installed is NVIDIA's; the package of that name on PyPI is a web toolkit.

    NVIDIA's provides fused layer norms and, built with its extensions, the `amp_C` that Megatron's optimizer uses.
    """
    return all(_importable(name) for name in ("apex.normalization.fused_layer_norm", "amp_C"))


def _importable(name: str) -> bool:
    try:
        importlib.import_module(name)
    except (ImportError, OSError, RuntimeError):  # absent, or built for another torch or CUDA
        return False
    return True


@functools.cache
def _takes(function: Any, name: str) -> bool:
    return name in inspect.signature(function).parameters


def batch_on_this_cp_rank(batch: dict[str, Any], cp_group: dist.ProcessGroup | None = None) -> dict[str, Any]:
    """This context-parallel rank's part of a batch [b, s] of whole sequences; changes `batch`.

    Args:
        batch: by name; an attention mask is [b, 1, s, s].
        cp_group: None is the one of Megatron's parallel state. megatron-core 0.18 and later take None for the world,
            and split among data-parallel ranks, too.
    """
    group = parallel_state.get_context_parallel_group() if cp_group is None else cp_group
    hybrid = {"is_hybrid_cp": False} if _takes(utils.get_batch_on_this_cp_rank, "is_hybrid_cp") else {}
    split: dict[str, Any] = utils.get_batch_on_this_cp_rank(batch, cp_group=group, **hybrid)
    return split


def submodules_of(spec: Any) -> Any:
    """The submodules that a spec builds its module from: a ModuleSpec's, or from 0.18 on a functools.partial's."""
    return spec.keywords["submodules"] if isinstance(spec, functools.partial) else spec.submodules


def inference_wrapper(model: torch.nn.Module, vocab_rows: int, max_requests: int, max_length: int) -> Any:
    """megatron-core's wrapper for generation with an empty static cache.

    Args:
        model: a GPTModel, maybe in a Float16Module.
        vocab_rows: rows of its word embeddings.
        max_requests: sequences that the cache holds.
        max_length: tokens of each.
    """
    from megatron.core.inference.contexts import StaticInferenceContext
    from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import GPTInferenceWrapper

    if not hasattr(StaticInferenceContext, "from_config"):  # from 0.17 on
        return GPTInferenceWrapper(model, StaticInferenceContext(max_requests, max_length))
    from megatron.core.inference.model_inference_wrappers.inference_wrapper_config import InferenceWrapperConfig

    config = utils.get_model_config(model)
    wrapper_config = InferenceWrapperConfig(
        hidden_size=config.hidden_size,
        params_dtype=config.params_dtype,
        inference_batch_times_seqlen_threshold=-1,  # never in several microbatches
        padded_vocab_size=vocab_rows,
        inference_max_requests=max_requests,
        inference_max_seq_length=max_length,
    )
    return GPTInferenceWrapper(model, wrapper_config, StaticInferenceContext.from_config(wrapper_config))


def init_microbatches(
    *,
    rank: int,
    rampup_batch_size: list[int] | None,
    global_batch_size: int,
    micro_batch_size: int,
    data_parallel_size: int,
) -> None:
    """Set up Megatron's global calculator of microbatches, with the ramp of the batch size where there is one.

    From 0.18 on megatron-core takes `rampup_batch_size`, warns and ignores it; there the same ramp is given as its
    `step_batch_size_schedule`.

    Args:
        rank: of this process; rank 0 logs.
        rampup_batch_size: (start, increment, samples), checked by config/validate.py.
        global_batch_size: after the ramp.
        micro_batch_size: samples of a microbatch.
        data_parallel_size: replicas.
    """
    init = num_microbatches_calculator.init_num_microbatches_calculator
    ramp: dict[str, Any] = {"rampup_batch_size": rampup_batch_size}
    if rampup_batch_size is not None and _takes(init, "step_batch_size_schedule"):
        steps = ramp_steps(rampup_batch_size, global_batch_size)
        ramp = {"step_batch_size_schedule": " ".join(f"{samples}:{size}" for samples, size in steps.items())}
    init(
        rank=rank,
        global_batch_size=global_batch_size,
        micro_batch_size=micro_batch_size,
        data_parallel_size=data_parallel_size,
        decrease_batch_size_if_needed=False,
        **ramp,
    )


def ramp_steps(rampup_batch_size: list[int], global_batch_size: int) -> dict[int, int]:
    """From how many consumed samples on which global batch size is in force; the first from 0 on.

    The same as RampupBatchsizeNumMicroBatchesCalculator of megatron-core 0.16, whose step is
    int(samples / (ramp samples / steps)), rounding included.
    """
    start, increment, samples = rampup_batch_size
    num_steps = (global_batch_size - start) // increment
    a_step = samples / num_steps
    found = {0: start}
    for step in range(1, num_steps + 1):
        first = math.ceil(step * a_step)
        while int(first / a_step) < step:
            first += 1
        while first > 0 and int((first - 1) / a_step) >= step:
            first -= 1
        found[min(first, samples + 1)] = start + step * increment  # of steps that begin together the last
    return found


def wrap_in_ddp(
    config: TransformerConfig,
    ddp_config: DistributedDataParallelConfig,
    chunk: torch.nn.Module,
    *,
    disable_bucketing: bool,
) -> DistributedDataParallel:
    """A model chunk in Megatron's DistributedDataParallel.

    From 0.18 on the caller is to lay out the buffers of the distributed optimizer; without a layout DDP warns, and
    computes the same one.
    """
    layout: dict[str, Any] = {}
    if ddp_config.use_distributed_optimizer and _takes(DistributedDataParallel.__init__, "full_param_layout"):
        layout["full_param_layout"] = _param_layout(ddp_config, chunk, disable_bucketing)
    return DistributedDataParallel(config, ddp_config, chunk, disable_bucketing=disable_bucketing, **layout)


def _param_layout(ddp_config: DistributedDataParallelConfig, chunk: torch.nn.Module, disable_bucketing: bool) -> Any:
    """As Megatron-LM lays them out before it wraps a chunk; DDP itself sets bucket_size so, but later."""
    replicas = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
    bucket_size = None
    first_stage = parallel_state.get_pipeline_model_parallel_rank() == 0
    if ddp_config.overlap_grad_reduce and first_stage and not disable_bucketing:
        bucket_size = ddp_config.bucket_size or max(40_000_000, 1_000_000 * replicas)
    return DistributedOptimizer.compute_full_param_layout(
        [param for param in chunk.parameters() if param.requires_grad],
        bucket_size,
        parallel_state.get_data_parallel_world_size(with_context_parallel=True, partial_data_parallel=True),
        ddp_config,
        expert_data_parallel_world_size=parallel_state.get_expert_data_parallel_world_size(
            partial_expert_data_parallel=True
        ),
    )


def hybrid_pattern_field(described: Any) -> str | None:
    """The name by which a HybridModel, before 0.18 a MambaModel, or what describes one has its pattern; None: none.

    described: the model, Megatron-LM's arguments, or another program's config of a model.
    """
    names = ("hybrid_layer_pattern", "hybrid_override_pattern")
    return next((name for name in names if getattr(described, name, None)), None)


def hybrid_pattern(described: Any) -> str | None:
    """The pattern of its layers; None where it has none, or was built from ratios."""
    field = hybrid_pattern_field(described)
    return None if field is None else getattr(described, field)


_METRICS = getattr(moe_utils, "get_moe_metrics_tracker", None)
"""From 0.18 on Megatron's sums of MoE's auxiliary losses are an object's, which this returns."""


def record_moe_loss(
    name: str,
    loss: torch.Tensor,
    layer_number: int,
    num_layers: int,
    *,
    reduce_group: dist.ProcessGroup | None = None,
    reduce_group_has_dp: bool = False,
) -> None:
    """Add an auxiliary loss of a layer (from 1) to Megatron's sums, which it reduces over `reduce_group` and logs."""
    if _METRICS is None:
        moe_utils.save_to_aux_losses_tracker(
            name, loss, layer_number, num_layers, reduce_group=reduce_group, reduce_group_has_dp=reduce_group_has_dp
        )
        return
    _METRICS().record(
        name, loss, layer_number, num_layers, reduce_group=reduce_group, needs_dp_avg=not reduce_group_has_dp
    )


def sequence_loss_counts_all_tokens() -> bool:
    """Whether, with calculate_per_token_loss, seq_aux_loss is multiplied by the tokens of all sequences (0.19).

    Before it was by those of one sequence, under the same names.
    """
    return core_version() >= (0, 19)


COMMON_FILE = "common.pt"
"""What ranks share, in checkpoints of megatron-core before 0.19 and in those of this package."""
_COMMON_KEY = "common_state"
"""Its key in the shards, where 0.19 puts it instead."""


def load_sharded(
    path: Path, state: dict[str, Any], *, validate_access_integrity: bool
) -> tuple[dict[str, Any], set[str], set[str]]:
    """`dist_checkpointing.load` of a checkpoint of any version. Collective.

    Args:
        path: the checkpoint.
        state: the sharded state dict to be filled.
        validate_access_integrity: whether each part of a tensor must be asked for by one rank.

    Returns:
        What was loaded, all that ranks share included; keys that no rank asked for; keys that the checkpoint lacks.

    Raises:
        ValueError: it has nothing that ranks share.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.validation import StrictHandling

    with _common_state_found(path):
        loaded, unused, absent = dist_checkpointing.load(
            state,
            str(path),
            strict=StrictHandling.RETURN_ALL,
            validate_access_integrity=validate_access_integrity,
        )
    return loaded, unused - {_COMMON_KEY}, absent


def common_state(path: Path) -> dict[str, Any]:
    """What ranks share in a checkpoint of any version. Raises ValueError where there is nothing.

    Megatron-LM's arguments are among it, and may be of classes that this version or this Python names otherwise or
    lacks: nothing but plain data, tensors and what megatron-core registers is loaded, _Unknown stands for the rest.
    """
    file = path / COMMON_FILE
    content = file.read_bytes() if file.is_file() else _common_bytes_in_shards(path)
    unknown = torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(content))
    with torch.serialization.safe_globals([(_Unknown, name) for name in unknown]):
        found = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    state: dict[str, Any] = found[0] if isinstance(found, list) else found
    return state


def _common_bytes_in_shards(path: Path) -> bytes:
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    planner, reader = _BytesPlanner(), dcp.FileSystemReader(path)
    key = ShardedObject(_COMMON_KEY, None, (1,), (0,)).unique_key
    if key not in reader.read_metadata().state_dict_metadata:
        raise ValueError(f"it has neither {COMMON_FILE} nor {_COMMON_KEY} in its shards")
    dcp.load({key: io.BytesIO()}, storage_reader=reader, planner=planner, no_dist=True)
    return planner.content


@contextmanager
def _common_state_found(path: Path) -> Iterator[None]:
    """Have megatron-core take `common_state`: before 0.19 it looks for common.pt alone."""
    from megatron.core.dist_checkpointing import serialization
    from megatron.core.dist_checkpointing.strategies import common

    owner, name = serialization, "load_common_state_dict"
    if core_version() < (0, 19):  # a method in 0.16, then a function
        owner, name = getattr(common, "TorchCommonLoadStrategy", serialization), "load_common"
    stock, state = getattr(owner, name), common_state(path)
    setattr(owner, name, lambda *_: state)
    try:
        yield
    finally:
        setattr(owner, name, stock)


class _BytesPlanner(dcp.DefaultLoadPlanner):
    """Keeps an object of a checkpoint as the bytes that were saved."""

    content = b""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.content = value.getvalue()


class _Unknown:
    """Stands for a value of a class that is not loaded."""

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state
