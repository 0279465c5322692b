"""Freezing the layers that an iteration dropped: `drop.dropped_update: freeze`.

A dropped layer's gradient is zero, and Megatron's optimizer makes a step with it: momentum and weight decay still move
the layer's weights, and its moments decay (`apply`). Here its gradients are taken away instead, just before the step of
the torch optimizer inside Megatron's, which leaves out a parameter without a gradient. The gradient norm, clipping, the
count of zeros and the check for overflow come before that and are those of `apply`.

Adam's `step` counts every iteration for every layer, frozen or not, because Megatron saves one for all parameters. So
its bias correction is that of `apply`, which counts them as well.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from megatron.core.fp8_utils import is_float8tensor
from megatron.core.optimizer import Adam as MegatronAdam  # Transformer Engine's or Apex's FusedAdam, or torch's AdamW
from megatron.core.optimizer import ChainedOptimizer, DistributedOptimizer, MegatronOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer
from torch.utils.hooks import RemovableHandle

from megatron_sbld.mcore.bucket_groups import LayerRecord, SkippableBucketGroup, bucket_groups, make_recorded
from megatron_sbld.mcore.ddp import note_wrappers, wrapper_of
from megatron_sbld.mcore.optimizer_state import initialise, is_torch_adam
from megatron_sbld.mcore.switchable import SwitchableLayer, chunk_list, decoder_layers

_PARTS = (FP32Optimizer, Float16OptimizerWithFloat16Params, DistributedOptimizer)
_INNER = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, MegatronAdam)

LayerParams = list[tuple[SwitchableLayer, list[torch.Tensor]]]

_handles: weakref.WeakKeyDictionary[torch.optim.Optimizer, list[RemovableHandle]] = weakref.WeakKeyDictionary()


def freeze_dropped_layers(model: torch.nn.Module | Iterable[torch.nn.Module], optimizer: MegatronOptimizer) -> None:
    """Let a layer that no microbatch of an iteration ran keep its weights and its optimizer moments, bit for bit.

    The iteration is all that was added to the gradients since the wrapper's zero_grad_buffer, also where a loop begins
    several iterations before a step. Call it on every rank once the optimizer is built, after `make_switchable`. The
    layers' controllers are asked at each step, so a later `make_switchable` needs no other call. Calling it again
    changes nothing.

    Args:
        model: the model, or the list of its chunks on this rank, wrapped or not.
        optimizer: what get_megatron_optimizer built for it, distributed or not, in any precision: Adam or SGD.

    Raises:
        ValueError: the layers are not switchable, the optimizer is of another model or of a kind in which a layer
            cannot be frozen, or data-parallel replicas drop distinct layers.
    """
    chunks = chunk_list(model)
    for chunk in chunks:
        note_wrappers(chunk.modules())
    layers = [layer for chunk in chunks for layer in decoder_layers(chunk)]
    parts = [part for part in _parts(optimizer) if not getattr(part, "is_stub_optimizer", False)]
    for part in parts:
        _check_optimizer(part)
    held = {param for part in parts for param in _held_params(part)}
    for layer in layers:
        _check_layer(layer, held)
    for part in parts:
        inner_params = _inner_params(part)
        layer_params = [
            (layer, [inner_params[param] for param in layer.parameters() if param in inner_params]) for layer in layers
        ]
        _attach(_Freezer(part, layer_params))
    _record_zeroing(layers)


class _Freezer:
    """Hooks around the step of one torch optimizer; neither reads a tensor's value, so the device is never waited for.

    part: Megatron's optimizer around it.
    layer_params: for each layer on this rank, what the torch optimizer holds of its parameters: the parameters, their
        fp32 copies, or this rank's shards of one of these.
    """

    def __init__(self, part: MegatronOptimizer, layer_params: LayerParams) -> None:
        self.part = part
        self._layer_params = layer_params
        self._frozen_layers: set[SwitchableLayer] = set()
        self._frozen: list[torch.Tensor] = []

    def before_step(self, inner: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Take the gradients of dropped layers away."""
        self._frozen_layers = {layer for layer, _ in self._layer_params if _is_dropped(layer)}
        self._frozen = [
            param for layer, params in self._layer_params if layer in self._frozen_layers for param in params
        ]
        # Without state, a first step in a later iteration would begin to count at 1, and a checkpoint could not be
        # saved before. (Not inner.state[param]: that would create an empty one.)
        if any(not inner.state.get(param) for param in self._frozen):
            initialise(self.part)
        for param in self._frozen:
            param.grad = None

    def after_step(self, inner: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Count the iteration for frozen parameters too, where each parameter has a count of its own."""
        if self._frozen and is_torch_adam(self.part):
            torch._foreach_add_([inner.state[param]["step"] for param in self._frozen], 1.0)
        if isinstance(self.part, DistributedOptimizer):  # others gather nothing
            records = {layer._drop_record for layer in self._frozen_layers}
            for group in self._skippable_groups():
                group.note_step(records)
        self._frozen = []

    def _skippable_groups(self) -> list[SkippableBucketGroup]:
        """Those whose parameters need not be gathered when all of their layers were frozen."""
        buckets = [layer._drop_buckets for layer, _ in self._layer_params]
        wrappers = dict.fromkeys(found.wrapper for found in buckets if found is not None and found.wrapper is not None)
        groups = [group for wrapper in wrappers for group in bucket_groups(wrapper)]
        return [group for group in groups if isinstance(group, SkippableBucketGroup)]


def _is_dropped(layer: SwitchableLayer) -> bool:
    """Whether the layer has run in none of the iterations whose gradients this step is made of.

    Those are several where a loop calls begin_iteration more than once before a step.
    """
    # In evaluation mode no layer is skipped, whatever was drawn.
    dropped = layer.training and layer._drop_controller.dropped_throughout(layer.layer_number)
    record = layer._drop_record
    return dropped and not (record.is_cleared and record.ran)


def _record_zeroing(layers: Iterable[SwitchableLayer]) -> None:
    records: dict[torch.nn.Parameter, LayerRecord] = {}
    for layer in layers:
        records |= dict.fromkeys(layer.parameters(), layer._drop_record)
    wrappers = {wrapper_of(layer.parameters()) for layer in layers}
    for wrapper in wrappers - {None}:
        make_recorded(wrapper, records)


def _attach(freezer: _Freezer) -> None:
    inner = freezer.part.optimizer
    for handle in _handles.get(inner, []):
        handle.remove()
    _handles[inner] = [
        inner.register_step_pre_hook(freezer.before_step),
        inner.register_step_post_hook(freezer.after_step),
    ]


def _parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """Dense parameters, experts, and with overlap_param_gather_with_optimizer_step the first chunk, have one each."""
    # Not isinstance: a subclass (LayerWiseDistributedOptimizer) gives parameters to ranks in its own way.
    return optimizer.chained_optimizers if type(optimizer) is ChainedOptimizer else [optimizer]


def _inner_params(part: MegatronOptimizer) -> dict[torch.Tensor, torch.Tensor]:
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


def _held_params(part: MegatronOptimizer) -> Iterable[torch.Tensor]:
    """Parameters of the model that the optimizer steps, on this rank or, sharded, on another."""
    if isinstance(part, DistributedOptimizer):
        return [param for buffer in part.buffers for param in buffer.param_index_map]
    return _inner_params(part)


def _check_optimizer(part: MegatronOptimizer) -> None:
    advice = "use dropped_update 'apply'"
    if type(part) not in _PARTS:
        allowed = ", ".join(kind.__name__ for kind in _PARTS)
        raise ValueError(
            f"dropped_update 'freeze' does not work with {type(part).__name__}: allowed are {allowed}; {advice}"
        )
    if isinstance(part, DistributedOptimizer) and part.ddp_config.use_megatron_fsdp:
        raise ValueError(f"dropped_update 'freeze' does not work with use_megatron_fsdp = True; {advice}")
    for name in ("optimizer_cpu_offload", "use_precision_aware_optimizer"):
        if getattr(part.config, name):
            raise ValueError(
                f"dropped_update 'freeze' does not work with {name} = True: its step reads gradients elsewhere, so "
                f"that taking one away would freeze nothing; {advice}"
            )
    if type(part.optimizer) not in _INNER:
        raise ValueError(
            f"dropped_update 'freeze' does not work with {type(part.optimizer).__name__}: allowed are torch's Adam, "
            f"AdamW and SGD and the FusedAdam of Apex or Transformer Engine; {advice}"
        )


def _check_layer(layer: torch.nn.Module, held: set[torch.Tensor]) -> None:
    if not isinstance(layer, SwitchableLayer):
        raise ValueError(f"a decoder layer is a {type(layer).__name__}: call make_switchable(model, controller) before")
    layer._drop_controller.dropped_throughout(
        layer.layer_number
    )  # refuses distinct replicas now, not at the first step
    for name, param in layer.named_parameters():
        if is_float8tensor(param):
            raise ValueError(
                f"dropped_update 'freeze' does not work with parameters in fp8 (layer {layer.layer_number}, {name}): "
                "they are quantised anew at each step; use dropped_update 'apply'"
            )
        if param.requires_grad and param not in held:
            raise ValueError(
                f"the optimizer does not hold {name} of layer {layer.layer_number}: it must be built from this model"
            )
