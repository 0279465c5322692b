"""A tiny GPT on megatron-core, and its training, for tests in one process and in several.

Parameters and data depend on names and global numbers alone, never on the layout or a random state, so runs on
different layouts can be compared number by number:

    with model_parallel(tp=2):                              # tests/harness.py
        config = tiny_config(num_layers=4)
        losses = train(tiny_gpt(config))

`tiny_gpt` returns unwrapped chunks: make them switchable before `train`, or pass `wrap_ddp`'s result to do it after.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_mtp_block_spec
from megatron.core.models.gpt.heterogeneous.heterogeneous_layer_specs import get_gpt_heterogeneous_layer_spec
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.heterogeneous.heterogeneous_config import HeterogeneousTransformerConfig
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_sbld.mcore.compat import batch_on_this_cp_rank
from megatron_sbld.mcore.local.layer_specs import gpt_block_spec
from megatron_sbld.method.policy import Policy
from megatron_sbld.method.schedule import Constant

VOCAB, SEQUENCE, MICRO_BATCH, GLOBAL_MICROBATCHES = 64, 16, 2, 8


@dataclass(frozen=True)
class Step:
    """What one training iteration gave: mean loss per token, and the gradients' norm, both over all ranks."""

    loss: float
    grad_norm: float


class Listed(Policy):
    """Keep probabilities as listed, the same at every iteration."""

    def __init__(self, *keep_probs: float, residual_scale: Any = "none") -> None:
        super().__init__(Constant(1.0), len(keep_probs), residual_scale=residual_scale)
        self._listed = np.array(keep_probs)

    def _keep_probs(self, theta: float) -> np.ndarray:
        return self._listed


def moe_loss_sums() -> dict[str, torch.Tensor]:
    """Megatron's own sums [layers] of each auxiliary loss since they were last logged."""
    return {name: entry["values"] for name, entry in moe_utils.get_moe_layer_wise_logging_tracker().items()}


def forget_moe_losses() -> None:
    """Drop these sums: they are the process's, and another model may have other layers."""
    if hasattr(moe_utils, "get_moe_metrics_tracker"):  # from megatron-core 0.18 on
        moe_utils.get_moe_metrics_tracker().metrics.clear()
    else:
        moe_utils.get_moe_layer_wise_logging_tracker().clear()


def saved_bytes(chunk: torch.nn.Module, layer: Callable[..., Any], hidden: torch.Tensor) -> int:
    """Bytes that a layer's forward pass keeps for backward, the model's parameters left out."""
    parameters = {param.data_ptr() for param in chunk.parameters()}
    saved: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in parameters:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        _output = layer(hidden_states=hidden, attention_mask=None)
        return sum(saved.values())


def tiny_config(**overrides: Any) -> TransformerConfig:
    """4 layers of width 32 with 4 heads, fp32 and no dropout, laid out as Megatron's parallel state says."""
    values: dict[str, Any] = {
        "num_layers": 4,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline_model_parallel_size": parallel_state.get_pipeline_model_parallel_world_size(),
        "virtual_pipeline_model_parallel_size": parallel_state.get_virtual_pipeline_model_parallel_world_size(),
        "context_parallel_size": parallel_state.get_context_parallel_world_size(),
        "expert_model_parallel_size": parallel_state.get_expert_model_parallel_world_size(),
        "expert_tensor_parallel_size": parallel_state.get_expert_tensor_parallel_world_size(),
        "pipeline_dtype": overrides.get("params_dtype", torch.float32),
        "deallocate_pipeline_outputs": True,
        # With deallocation, overlapping is silently wrong on gloo.
        "overlap_p2p_comm": False,
        "batch_p2p_comm": False,
    }
    values.update(overrides)
    if "heterogeneous_layers_config_encoded_json" in values:
        return HeterogeneousTransformerConfig(**values)
    return TransformerConfig(**values)


def chunk_options(vp_stage: int | None, tied: bool, position_embedding_type: str) -> dict[str, Any]:
    """What a chunk of a tiny model is built with, GPT or hybrid."""
    return {
        "vocab_size": VOCAB,
        "max_sequence_length": SEQUENCE,
        "pre_process": parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        "post_process": parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
        "share_embeddings_and_output_weights": tied,
        "position_embedding_type": position_embedding_type,
    }


def tiny_gpt(
    config: TransformerConfig,
    spec: Callable[..., Any] | None = None,
    tied: bool = True,
    position_embedding_type: str = "learned_absolute",
) -> list[GPTModel]:
    """The model chunks of this rank, with parameters that depend on their names and global layer numbers only.

    `spec(config, vp_stage=...)` gives the transformer block's spec; None takes this package's, with experts where the
    config has them and with multi-token prediction layers where it has those.
    """
    spec = spec or (moe_block_spec if config.num_moe_experts else gpt_block_spec)
    chunks = []
    num_chunks = config.virtual_pipeline_model_parallel_size
    for vp_stage in [None] if num_chunks is None else range(num_chunks):
        block_spec = spec(config, vp_stage=vp_stage)
        mtp_spec = None
        if config.mtp_num_layers:
            mtp_spec = get_gpt_mtp_block_spec(config, block_spec, use_transformer_engine=False, vp_stage=vp_stage)
        chunk = GPTModel(
            config=config,
            transformer_layer_spec=block_spec,
            mtp_block_spec=mtp_spec,
            **chunk_options(vp_stage, tied, position_embedding_type),
            vp_stage=vp_stage,
        )
        chunk.to(torch.cuda.current_device())  # the norms are built on the CPU
        fill_parameters(chunk)
        chunks.append(chunk)
    return chunks


def moe_block_spec(config: TransformerConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """`gpt_block_spec`, with the MLP of each layer that `moe_layer_freq` names replaced by experts."""
    block = gpt_block_spec(config, vp_stage=vp_stage)
    moe_layer = get_gpt_layer_local_spec(num_experts=config.num_moe_experts, moe_grouped_gemm=False)
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    frequency = config.moe_layer_freq
    for index, dense_layer in enumerate(block.layer_specs):
        number = first + index
        if frequency[number] if isinstance(frequency, list) else number % frequency == 0:
            layer = copy.deepcopy(dense_layer)
            layer.submodules.mlp = moe_layer.submodules.mlp
            block.layer_specs[index] = layer
    return block


def heterogeneous_block_spec(config: TransformerConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """Layers that differ, as the config lists them: without attention, without an MLP, with a linear map for one."""
    return get_gpt_heterogeneous_layer_spec(config, use_te=False, vp_stage=vp_stage)


def fill_parameters(chunk: GPTModel) -> None:
    """Give each parameter values drawn from its global name; tensor-parallel ranks take their slices of the whole."""
    for name, parameter in chunk.named_parameters():
        name = global_name(chunk, name)
        shape, own_slice, _ = full_and_own_slice(name, parameter)
        values = 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
        if "norm" in name and name.endswith("weight"):
            values += 1.0
        parameter.data.copy_(own_slice(values))


def full_and_own_slice(
    name: str, parameter: torch.nn.Parameter
) -> tuple[list[int], Callable[[torch.Tensor], torch.Tensor], dist.ProcessGroup | None]:
    """A parameter's shape on one tensor-parallel rank, what cuts this rank's part out of it, and its ranks' group."""
    shape = list(parameter.shape)
    if not getattr(parameter, "tensor_model_parallel", False):
        return shape, lambda whole: whole, None
    if ".local_experts." in name:
        group = parallel_state.get_expert_tensor_parallel_group()
    else:
        group = parallel_state.get_tensor_model_parallel_group()
    dim, stride = parameter.partition_dim, parameter.partition_stride
    shape[dim] *= group.size()

    def own_slice(whole: torch.Tensor) -> torch.Tensor:
        return torch.cat(whole.chunk(group.size() * stride, dim=dim)[group.rank() :: group.size()], dim=dim)

    return shape, own_slice, group


def global_name(chunk: GPTModel, name: str) -> str:
    """A parameter's name in a model that is not split into stages or over ranks of experts."""
    if name == "output_layer.weight" and chunk.share_embeddings_and_output_weights:
        return "embedding.word_embeddings.weight"
    name = name.replace("decoder.final_norm.", "decoder.final_layernorm.")  # of a hybrid model
    prefix, experts, rest = name.partition(".local_experts.")
    if experts:
        local_index, _, rest = rest.partition(".")
        local_experts = chunk.config.num_moe_experts // parallel_state.get_expert_model_parallel_world_size()
        first = parallel_state.get_expert_model_parallel_rank() * local_experts
        name = f"{prefix}{experts}{first + int(local_index)}.{rest}"
    prefix, layers, rest = name.partition("decoder.layers.")
    if not layers:
        return name
    local_index, _, rest = rest.partition(".")
    number = chunk.decoder.layers[int(local_index)].layer_number
    if hasattr(chunk, "gpt_layers"):  # tests/mcore/hybrid.py
        number = chunk.gpt_layers[number - 1]
    return f"{prefix}{layers}{number - 1}.{rest}"


def wrap_ddp(chunks: Sequence[GPTModel], **ddp_options: Any) -> list[DistributedDataParallel]:
    """Megatron's data parallelism around each chunk, and the hooks that its pipeline schedules call.

    With `align`, as by default, the schedules start reductions and gathers too (Megatron-LM's align_grad_reduce and
    align_param_gather); without it only a parameter's own hooks do.
    """
    config = chunks[0].config
    align = ddp_options.pop("align", True)
    options = {"grad_reduce_in_fp32": True, "bucket_size": 2000, **ddp_options}  # several buckets a chunk
    wrapped = []
    for index, chunk in enumerate(chunks):
        module = Float16Module(config, chunk) if config.bf16 or config.fp16 else chunk
        wrapped.append(
            DistributedDataParallel(
                config, DistributedDataParallelConfig(**options), module, disable_bucketing=index > 0
            )
        )
    if options.get("overlap_grad_reduce"):
        config.no_sync_func = _one_or_list([model.no_sync for model in wrapped])
    if options.get("overlap_grad_reduce") and align:
        config.grad_sync_func = _one_or_list([model.start_grad_sync for model in wrapped])
    if options.get("overlap_param_gather") and align:
        config.param_sync_func = _one_or_list([model.start_param_sync for model in wrapped])
    config.finalize_model_grads_func = finalize_model_grads
    return wrapped


def _one_or_list(functions: list[Callable[..., Any]]) -> Any:
    return functions[0] if len(functions) == 1 else functions


def build_optimizer(models: Sequence[DistributedDataParallel], **options: Any) -> MegatronOptimizer:
    """Adam through Megatron, with gradient clipping; distributed when the models' DDP is."""
    config, ddp_config = models[0].config, models[0].ddp_config
    settings = {
        "lr": 1e-3,
        "clip_grad": 1.0,
        "bf16": config.bf16,
        "fp16": config.fp16,
        "params_dtype": config.params_dtype,
        "initial_loss_scale": 1024.0,  # fp16: low enough that no iteration is skipped
        "use_distributed_optimizer": ddp_config.use_distributed_optimizer,
        "overlap_param_gather": ddp_config.overlap_param_gather,
        **options,
    }
    optimizer = get_megatron_optimizer(OptimizerConfig(**settings), list(models))
    config.grad_scale_func = optimizer.scale_loss
    return optimizer


def train(
    models: Sequence[GPTModel | DistributedDataParallel],
    iterations: int = 3,
    before_iteration: Callable[[int, int], None] | None = None,
    ddp: dict[str, Any] | None = None,
    optimizer: MegatronOptimizer | None = None,
) -> list[Step]:
    """Train on GLOBAL_MICROBATCHES microbatches an iteration, shared out over the data-parallel ranks.

    Args:
        models: `tiny_gpt`'s chunks, wrapped here with the options `ddp`, or `wrap_ddp`'s result.
        before_iteration: called with iteration (from 1) and this rank's number of microbatches.
        optimizer: None builds Adam.
    """
    if not isinstance(models[0], DistributedDataParallel):
        models = wrap_ddp(models, **(ddp or {}))
    optimizer = optimizer or build_optimizer(models)
    return [train_step(models, optimizer, iteration, before_iteration) for iteration in range(1, iterations + 1)]


def train_step(
    models: Sequence[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    iteration: int,
    before_iteration: Callable[[int, int], None] | None = None,
) -> Step:
    """One iteration (numbered from 1): forward and backward over the microbatches, then the optimizer's step."""
    num_microbatches = GLOBAL_MICROBATCHES // parallel_state.get_data_parallel_world_size()
    for model in models:
        model.train()
        model.zero_grad_buffer()
    optimizer.zero_grad()
    if before_iteration is not None:
        before_iteration(iteration, num_microbatches)
    reports = forward_backward(models, iteration, num_microbatches)
    _, grad_norm, _ = optimizer.step()
    return Step(loss=mean_loss(reports), grad_norm=float(grad_norm))


def forward_backward(
    models: Sequence[DistributedDataParallel], iteration: int, num_microbatches: int, forward_only: bool = False
) -> list[torch.Tensor]:
    """The pipeline schedule over this iteration's microbatches; on the last stage a (loss sum, tokens) for each."""
    return get_forward_backward_func()(
        forward_step_func=_forward_step,
        data_iterator=[batches(iteration) for _ in models] if len(models) > 1 else batches(iteration),
        model=list(models) if len(models) > 1 else models[0],
        num_microbatches=num_microbatches,
        seq_length=SEQUENCE,
        micro_batch_size=MICRO_BATCH,
        forward_only=forward_only,
    )


def batches(iteration: int) -> Iterator[dict[str, torch.Tensor]]:
    """This rank's microbatches: of the global ones, every dp-th, and of each sequence its context-parallel chunks."""
    dp_rank, dp_size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    for microbatch in range(dp_rank, GLOBAL_MICROBATCHES, dp_size):
        generator = torch.Generator().manual_seed(1000 * iteration + microbatch)
        text = torch.randint(VOCAB, (MICRO_BATCH, SEQUENCE + 1), generator=generator)
        batch = {
            "tokens": text[:, :-1].contiguous(),
            "labels": text[:, 1:].contiguous(),
            "position_ids": torch.arange(SEQUENCE).expand(MICRO_BATCH, -1).contiguous(),
        }
        on_device = {name: value.to(torch.cuda.current_device()) for name, value in batch.items()}
        yield batch_on_this_cp_rank(on_device)


def _forward_step(data: Iterator[dict[str, torch.Tensor]], model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
    batch = next(data)
    output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])

    def sum_loss(losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        total = losses.float().sum()
        tokens = losses.numel()
        return total, torch.tensor(tokens, dtype=torch.int), torch.tensor([total.item(), tokens])

    return output, sum_loss


def mean_loss(reports: list[torch.Tensor]) -> float:
    """Mean loss per token over microbatches, data- and context-parallel ranks, on every rank."""
    total = sum(reports, torch.zeros(2))
    if parallel_state.get_tensor_model_parallel_rank() > 0:
        total = torch.zeros(2)  # its loss is rank 0's
    dist.all_reduce(total)
    return float(total[0] / total[1])
