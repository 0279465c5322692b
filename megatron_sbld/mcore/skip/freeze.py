"""Freezing layers: those that an iteration dropped (`drop.dropped_update: freeze`), and those that have not begun.

A dropped layer's gradient is zero, and Megatron's optimizer makes a step with it: momentum and weight decay still move
the layer's weights, and its moments decay (`apply`). Here its gradients are taken away instead, just before the step of
the torch optimizer inside Megatron's, which leaves out a parameter without a gradient. The gradient norm, clipping, the
count of zeros and the check for overflow come before that and are those of `apply`.

Adam's `step` counts every iteration for every layer, frozen or not, because Megatron saves one for all parameters. So
its bias correction is that of `apply`, which counts them as well. A layer that has waited to begin is the exception: at
its first step the moments are set so that the update is Adam's own first one (first_step.py).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from megatron.core.fp8_utils import is_float8tensor
from megatron.core.optimizer import Adam as MegatronAdam  # Transformer Engine's or Apex's FusedAdam, or torch's AdamW
from megatron.core.optimizer import DistributedOptimizer, MegatronOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer
from torch.utils.hooks import RemovableHandle

from megatron_sbld.controller import DropController
from megatron_sbld.mcore.optimizer.params import held_params, held_tensors, optimizer_parts
from megatron_sbld.mcore.optimizer.state import initialise, is_torch_adam
from megatron_sbld.mcore.skip.bucket_groups import LayerRecord, SkippableBucketGroup, bucket_groups, make_recorded
from megatron_sbld.mcore.skip.decoder import chunk_list, decoder_layers
from megatron_sbld.mcore.skip.first_step import prepare_first_step
from megatron_sbld.mcore.skip.layer_buckets import note_wrappers, wrapper_of
from megatron_sbld.mcore.skip.switchable import SwitchableLayer

_PARTS = (FP32Optimizer, Float16OptimizerWithFloat16Params, DistributedOptimizer)
_INNER = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, MegatronAdam)

_ADVICE = {"dropped_update 'freeze'": "use dropped_update 'apply'", "stages": "leave stages out"}

LayerParams = list[tuple[SwitchableLayer, list[torch.Tensor]]]


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
    _freeze(model, optimizer, "dropped_update 'freeze'")


def freeze_waiting_layers(
    model: torch.nn.Module | Iterable[torch.nn.Module], optimizer: MegatronOptimizer, controller: DropController
) -> list[SwitchableLayer]:
    """Let a layer keep its weights and moments until it begins, and begin with Adam's own first step.

    As freeze_dropped_layers, in any order with it, but layers that have begun are stepped as they are otherwise.

    Args:
        model, optimizer: as in freeze_dropped_layers.
        controller: of the model's layers; a rank may have none.

    Returns:
        The layers on this rank.
    """
    return _freeze(model, optimizer, "stages", controller)


def _freeze(
    model: torch.nn.Module | Iterable[torch.nn.Module],
    optimizer: MegatronOptimizer,
    setting: str,
    controller: DropController | None = None,
) -> list[SwitchableLayer]:
    chunks = chunk_list(model)
    for chunk in chunks:
        note_wrappers(chunk.modules())
    layers = [layer for chunk in chunks for layer in decoder_layers(chunk)]
    parts = optimizer_parts(optimizer)
    for part in parts:
        _check_optimizer(part, setting)
    held = {param for part in parts for param in held_params(part)}
    for layer in layers:
        _check_layer(layer, held, setting)
        if controller is None:  # refuses distinct replicas now, not at the first step
            layer._drop_controller.dropped_throughout(layer._drop_number)
    for part in parts:
        inner_params = held_tensors(part)
        layer_params = [
            (layer, [inner_params[param] for param in layer.parameters() if param in inner_params]) for layer in layers
        ]
        _attach(_Freezer(part, layer_params, controller))
    _record_zeroing(layers)
    return layers


class _Freezer:
    """Hooks around the step of one torch optimizer; neither reads a tensor's value, so the device is never waited for.

    part: Megatron's optimizer around it.
    layer_params: for each layer on this rank, what the torch optimizer holds of its parameters: the parameters, their
        fp32 copies, or this rank's shards of one of these.
    controller: whose stages it attends to; without one, it freezes layers in the iterations that drop them.
    """

    def __init__(self, part: MegatronOptimizer, layer_params: LayerParams, controller: DropController | None) -> None:
        self.part = part
        self.freezes_dropped = controller is None
        self.controller = controller
        self.handles: list[RemovableHandle] = []
        self.layers = {layer for layer, _ in layer_params}
        self._layer_params = layer_params
        self._frozen_layers: set[SwitchableLayer] = set()
        self._frozen: list[torch.Tensor] = []

    def before_step(self, inner: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Take the gradients of dropped layers away, and prepare the first steps of those that have begun."""
        self._frozen_layers = {layer for layer, _ in self._layer_params if self._is_frozen(layer)}
        self._frozen = [
            param for layer, params in self._layer_params if layer in self._frozen_layers for param in params
        ]
        # Without state, a first step in a later iteration would begin to count at 1, and a checkpoint could not be
        # saved before. (Not inner.state[param]: that would create an empty one.)
        if any(not inner.state.get(param) for param in self._frozen):
            initialise(self.part)
        for param in self._frozen:
            param.grad = None
        for layer, params in self._layer_params:
            if layer not in self._frozen_layers and layer._drop_controller.makes_first_step(layer._drop_number):
                prepare_first_step(inner, params)

    def after_step(self, inner: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Count the iteration for frozen parameters too, where each parameter has a count of its own."""
        if self.controller is not None:
            self.controller.note_step()
        if self._frozen and is_torch_adam(self.part):
            torch._foreach_add_([inner.state[param]["step"] for param in self._frozen], 1.0)
        if isinstance(self.part, DistributedOptimizer):  # others gather nothing
            records = {layer._drop_record for layer in self._frozen_layers}
            for group in self._skippable_groups():
                group.note_step(records)
        self._frozen = []

    def _is_frozen(self, layer: SwitchableLayer) -> bool:
        if layer.training and not layer._drop_controller.has_begun(layer._drop_number):
            return True
        return self.freezes_dropped and _is_dropped(layer)

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
    dropped = layer.training and layer._drop_controller.dropped_throughout(layer._drop_number)
    record = layer._drop_record
    return dropped and not (record.is_cleared and record.ran)


def _record_zeroing(layers: Iterable[SwitchableLayer]) -> None:
    records: dict[torch.nn.Parameter, LayerRecord] = {}
    for layer in layers:
        records |= dict.fromkeys(layer.parameters(), layer._drop_record)
    wrappers = {wrapper_of(layer.parameters()) for layer in layers}
    for wrapper in wrappers - {None}:
        make_recorded(wrapper, records)


_freezers: weakref.WeakKeyDictionary[torch.optim.Optimizer, _Freezer] = weakref.WeakKeyDictionary()


def _attach(freezer: _Freezer) -> None:
    inner = freezer.part.optimizer
    before = _freezers.get(inner)
    if before is not None:  # it may have been attached for the other purpose
        if before.layers - freezer.layers:
            raise ValueError(
                "model has fewer layers than in a former call with this optimizer: give the chunks on this rank as one "
                "list"
            )
        freezer.freezes_dropped |= before.freezes_dropped
        freezer.controller = freezer.controller or before.controller
        for handle in before.handles:
            handle.remove()
    _freezers[inner] = freezer
    freezer.handles = [
        inner.register_step_pre_hook(freezer.before_step),
        inner.register_step_post_hook(freezer.after_step),
    ]


def _check_optimizer(part: MegatronOptimizer, setting: str) -> None:
    advice = _ADVICE[setting]
    if type(part) not in _PARTS:
        allowed = ", ".join(kind.__name__ for kind in _PARTS)
        raise ValueError(f"{setting} does not work with {type(part).__name__}: allowed are {allowed}; {advice}")
    if isinstance(part, DistributedOptimizer) and part.ddp_config.use_megatron_fsdp:
        raise ValueError(f"{setting} does not work with use_megatron_fsdp = True; {advice}")
    for name in ("optimizer_cpu_offload", "use_precision_aware_optimizer"):
        if getattr(part.config, name):
            raise ValueError(
                f"{setting} does not work with {name} = True: its step reads gradients elsewhere, so "
                f"that taking one away would freeze nothing; {advice}"
            )
    if getattr(part.config, "optimizer_cuda_graph", False):
        raise ValueError(
            f"{setting} does not work with optimizer_cuda_graph = True: a captured step would freeze the layers that "
            f"it was captured with; {advice}"
        )
    if type(part.optimizer) not in _INNER:
        raise ValueError(
            f"{setting} does not work with {type(part.optimizer).__name__}: allowed are torch's Adam, "
            f"AdamW and SGD and the FusedAdam of Apex or Transformer Engine; {advice}"
        )


def _check_layer(layer: torch.nn.Module, held: set[torch.Tensor], setting: str) -> None:
    if not isinstance(layer, SwitchableLayer):
        raise ValueError(f"a decoder layer is a {type(layer).__name__}: call make_switchable(model, controller) before")
    for name, param in layer.named_parameters():
        if is_float8tensor(param):
            raise ValueError(
                f"{setting} does not work with parameters in fp8 (layer {layer.layer_number}, {name}): "
                f"they are quantised anew at each step; {_ADVICE[setting]}"
            )
        if param.requires_grad and param not in held:
            raise ValueError(
                f"the optimizer does not hold {name} of layer {layer.layer_number}: it must be built from this model"
            )
