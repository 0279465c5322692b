"""A parameter of the model and what the optimizer holds of it: fp32 copies, shards, moments; whole where asked."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import ChainedOptimizer, DistributedOptimizer, MegatronOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params

_MOMENTS = ("exp_avg", "exp_avg_sq")


def optimizer_parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """Dense parameters, experts, and with overlap_param_gather_with_optimizer_step the first chunk, have one each."""
    # Not isinstance: a subclass (LayerWiseDistributedOptimizer) gives parameters to ranks in its own way.
    parts = optimizer.chained_optimizers if type(optimizer) is ChainedOptimizer else [optimizer]
    return [part for part in parts if not getattr(part, "is_stub_optimizer", False)]


def held_tensors(part: MegatronOptimizer) -> dict[torch.Tensor, torch.Tensor]:
    """Each parameter of the model that the optimizer has a part of on this rank -> the tensor that torch steps."""
    if isinstance(part, DistributedOptimizer):
        pairs = [
            (part.model_float16_groups, part.shard_fp32_from_float16_groups),
            (part.model_fp32_groups, part.shard_fp32_groups),
        ]
    elif isinstance(part, Float16OptimizerWithFloat16Params):
        pairs = [
            (part.float16_groups, part.fp32_from_float16_groups),
            (part.fp32_from_fp32_groups, part.fp32_from_fp32_groups),
        ]
    else:
        own = [group["params"] for group in part.optimizer.param_groups]
        pairs = [(own, own)]
    return {
        param: inner
        for model_groups, inner_groups in pairs
        for model_group, inner_group in zip(model_groups, inner_groups, strict=True)
        for param, inner in zip(model_group, inner_group, strict=True)
    }


def held_params(part: MegatronOptimizer) -> Iterable[torch.Tensor]:
    """Parameters of the model that the optimizer steps, on this rank or, sharded, on another."""
    if isinstance(part, DistributedOptimizer):
        return [param for buffer in part.buffers for param in buffer.param_index_map]
    return held_tensors(part)


def gather_params(model_chunks: Iterable[torch.nn.Module]) -> None:
    """With overlap_param_gather, fetch now what the next forward pass would have fetched. Collective."""
    for chunk in model_chunks:
        if isinstance(chunk, DistributedDataParallel) and chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)


def read_layer(layer: torch.nn.Module, optimizer: MegatronOptimizer, *, moments: bool) -> list[torch.Tensor]:
    """What a layer is made of, flat: each parameter, the optimizer's copy of it, its moments if asked; then buffers.

    Collective over the replicas that share the optimizer's state; parameters must have been gathered.
    """
    values = []
    for param, shares in _shares_of(layer, optimizer, moments):
        values.append(param.detach().reshape(-1).clone())
        values += [_whole(part, param, share) for part, share in shares]
    return values + [buffer.detach().reshape(-1).clone() for buffer in layer.buffers()]


@torch.no_grad()
def write_layer(
    layer: torch.nn.Module, optimizer: MegatronOptimizer, values: Sequence[torch.Tensor], *, moments: bool
) -> None:
    """Give a layer what `read_layer` read of another one of its shapes."""
    remaining = iter(values)
    for param, shares in _shares_of(layer, optimizer, moments):
        param.copy_(next(remaining).view(param.shape))
        for part, share in shares:
            value = next(remaining)
            if share is not None:
                share.copy_(value[_range(part, param)].view(share.shape))
    for buffer in layer.buffers():
        buffer.copy_(next(remaining).view(buffer.shape))


def _shares_of(
    layer: torch.nn.Module, optimizer: MegatronOptimizer, moments: bool
) -> Iterator[tuple[torch.nn.Parameter, list[tuple[MegatronOptimizer, torch.Tensor | None]]]]:
    """Each parameter with this rank's share of the optimizer's copy, and of the moments; None where it has none."""
    parts = [(part, set(held_params(part)), held_tensors(part)) for part in optimizer_parts(optimizer)]
    names = _MOMENTS if moments else ()
    for param in layer.parameters():
        shares: list[tuple[MegatronOptimizer, torch.Tensor | None]] = []
        for part, stepped, held in parts:
            if param not in stepped:
                continue
            inner = held.get(param)
            if inner is None:
                shares += [(part, None)] * (1 + len(names))
            else:
                shares += [(part, inner.detach()), *((part, part.optimizer.state[inner][name]) for name in names)]
        yield param, shares


def _whole(part: MegatronOptimizer, param: torch.Tensor, share: torch.Tensor | None) -> torch.Tensor:
    if not isinstance(part, DistributedOptimizer):
        assert share is not None, "only shards may be absent"
        return share.reshape(-1).clone()
    whole = torch.zeros(param.numel(), dtype=torch.float32, device=param.device)
    if share is not None:
        whole[_range(part, param)] = share.reshape(-1).float()
    dist.all_reduce(whole, group=part.data_parallel_group)  # each element is one rank's, the others add zero
    return whole


def _range(part: MegatronOptimizer, param: torch.Tensor) -> slice:
    """Which elements of a parameter this rank's optimizer holds."""
    if not isinstance(part, DistributedOptimizer):
        return slice(None)
    place = part._get_model_param_range_map(param)["param"]
    return slice(place.start, place.end)
