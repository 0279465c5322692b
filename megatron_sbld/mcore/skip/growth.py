"""Layers that begin during a run (method/stages.py): frozen until then, and what they begin as.

`random`: as they were initialised. `zero`: both output projections are zero, so the layer adds nothing at first.
`copy`: the weights of the nearest running layer below, else above, also from another pipeline rank.

What begins is what the controller counts as a layer: with unit `block` all layers of a HybridModel's block at once.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Sequence
from typing import Any, get_args

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer import MegatronOptimizer

from megatron_sbld.checks import check_choice
from megatron_sbld.controller import DropController
from megatron_sbld.growth import OnGrowth
from megatron_sbld.mcore.optimizer.params import (
    gather_params,
    held_tensors,
    optimizer_parts,
    read_layer,
    write_layer,
)
from megatron_sbld.mcore.optimizer.state import initialise
from megatron_sbld.mcore.skip.decoder import chunk_list
from megatron_sbld.mcore.skip.freeze import freeze_waiting_layers
from megatron_sbld.mcore.skip.switchable import SwitchableLayer
from megatron_sbld.method.choices import StageInit
from megatron_sbld.method.stages import Stages, nearest_running

_OUTPUT_PROJECTIONS = ("linear_proj", "linear_fc2", "out_proj")  # the last one of Mamba and GDN


def grow_in_stages(
    model: torch.nn.Module | Iterable[torch.nn.Module],
    optimizer: MegatronOptimizer,
    controller: DropController,
    init: StageInit = "random",
    *,
    copy_moments: bool = False,
) -> None:
    """Attend to the layers that wait to begin under the controller's stages.

    They keep their weights and optimizer state, bit for bit, and are neither reduced nor gathered where Megatron's
    buckets allow it. When one begins, in begin_iteration, it is given what `init` says, and its first step is Adam's
    own first one. Call it on every rank once the optimizer is built, after `make_switchable`, and before a checkpoint
    is loaded.

    Args:
        model: the model, or the list of its chunks on this rank, wrapped or not.
        optimizer: what get_megatron_optimizer built for it, as in freeze_dropped_layers.
        controller: that make_switchable was given.
        init: `random`, `zero` or `copy`.
        copy_moments: with `copy`, take over the optimizer's moments too.

    Raises:
        ValueError: the controller's policy has no stages, an argument out of range, or an optimizer or layers in which
            a layer cannot be frozen or initialised so.
    """
    check_choice("stage_init", init, get_args(StageInit))
    if copy_moments and init != "copy":
        raise ValueError(f"stage_copy_moments = True needs stage_init 'copy', got {init!r}")
    if controller.policy.stages is None:
        raise ValueError("the controller's policy has no stages: no layer would begin late")
    if copy_moments and any(isinstance(part.optimizer, torch.optim.SGD) for part in optimizer_parts(optimizer)):
        raise ValueError("stage_copy_moments = True does not work with SGD: it has no moments as Adam's; leave it out")
    chunks = chunk_list(model)
    layers = freeze_waiting_layers(chunks, optimizer, controller)
    if any(layer._drop_controller is not controller for layer in layers):
        raise ValueError("the layers have another controller: give the one that make_switchable was given")
    if parallel_state.is_initialized():
        controller.num_replicas = parallel_state.get_data_parallel_world_size()
    # When a layer begins and not before: a run that goes on may have another `init` than when it was saved.
    on_growth: OnGrowth = _keep_weights
    if init == "zero":
        on_growth = _Zeroer(chunks, layers, optimizer)
    elif init == "copy":
        _refuse_unlike(controller.policy.stages, layers)
        on_growth = _Copier(chunks, layers, optimizer, copy_moments)
    controller.growth.callbacks[:] = [on_growth]
    controller.growth.begins_as = f"{init} with moments" if copy_moments else init


def _keep_weights(entering: Sequence[int], running: Collection[int]) -> None:
    """Random weights are there from the start."""


class _Zeroer:
    """Makes the output projections of layers that begin zero."""

    def __init__(
        self, chunks: Sequence[torch.nn.Module], layers: Sequence[SwitchableLayer], optimizer: MegatronOptimizer
    ) -> None:
        self._chunks = chunks
        self._optimizer = optimizer
        self._outputs = {number: [*map(_output_params, held)] for number, held in _by_number(layers).items()}

    @torch.no_grad()
    def __call__(self, entering: Sequence[int], running: Collection[int]) -> None:
        """Collective over the replicas."""
        gather_params(self._chunks)  # a gather that is under way would put the former weights back
        held = [held_tensors(part) for part in optimizer_parts(self._optimizer)]
        outputs = [params for number in entering for params in self._outputs.get(number, [])]
        for param in itertools.chain.from_iterable(outputs):
            param.zero_()
            for tensors in held:
                if param in tensors:
                    tensors[param].zero_()


def _output_params(layer: SwitchableLayer) -> list[torch.nn.Parameter]:
    params = [param for name, param in layer.named_parameters() if _is_output(name)]
    if not params:
        raise ValueError(
            f"stage_init = 'zero' does not work with layer {layer.layer_number}: it has none of the output projections "
            f"{', '.join(_OUTPUT_PROJECTIONS)}; use random or copy"
        )
    return params


def _is_output(name: str) -> bool:
    *modules, param = name.split(".")
    return bool(set(modules) & set(_OUTPUT_PROJECTIONS)) or (modules[-1:] == ["experts"] and param == "weight2")


class _Copier:
    """Copies running layers to those that begin, between the pipeline ranks that hold them."""

    def __init__(
        self,
        chunks: Sequence[torch.nn.Module],
        layers: Sequence[SwitchableLayer],
        optimizer: MegatronOptimizer,
        moments: bool,
    ) -> None:
        self._chunks = chunks
        self._layers = _by_number(layers)
        self._optimizer = optimizer
        self._moments = moments

    def __call__(self, entering: Sequence[int], running: Collection[int]) -> None:
        """Collective over all ranks of the model."""
        gather_params(self._chunks)
        if self._moments:
            for part in optimizer_parts(self._optimizer):
                initialise(part)
        owners = _owners(self._layers)
        for layer_number in entering:
            source = nearest_running(layer_number, running)
            self._copy(source, layer_number, owners[source], owners[layer_number])

    def _copy(self, source: int, target: int, owner: int, receiver: int) -> None:
        """owner, receiver: global ranks that hold the source and the target."""
        rank = dist.get_rank() if dist.is_initialized() else 0
        if rank not in (owner, receiver):
            return
        for index, held in enumerate(self._layers[source if rank == owner else target]):
            values = read_layer(held, self._optimizer, moments=self._moments)
            if owner != receiver:
                for value in values:
                    if rank == owner:
                        dist.send(value.view(torch.uint8), receiver)
                    else:
                        dist.recv(value.view(torch.uint8), owner)
            if rank == receiver:
                write_layer(self._layers[target][index], self._optimizer, values, moments=self._moments)


def _by_number(layers: Iterable[SwitchableLayer]) -> dict[int, list[SwitchableLayer]]:
    """The layers that the controller knows by each number, in order."""
    found: dict[int, list[SwitchableLayer]] = {}
    for layer in layers:
        found.setdefault(layer._drop_number, []).append(layer)
    return found


def _refuse_unlike(stages: Stages, layers: Iterable[SwitchableLayer]) -> None:
    """Refuse copies between layers of other parameters, as where some have experts, before training. Collective."""
    kinds: dict[int, Any] = {}
    own = {
        number: [[(name, *param.shape) for name, param in layer.named_parameters()] for layer in held]
        for number, held in _by_number(layers).items()
    }
    for found in _gathered(own).values():
        kinds |= found
    for running, following in itertools.pairwise(stages.sets):
        for layer_number in set(following) - set(running):
            source = nearest_running(layer_number, running)
            if kinds.get(layer_number) != kinds.get(source):
                raise ValueError(
                    f"stage_init = 'copy' does not work with layer {layer_number}: it would be a copy of layer "
                    f"{source}, whose parameters are others; use random or zero, or another stage_layers"
                )


def _owners(layers: Collection[int]) -> dict[int, int]:
    """Global rank of each layer of the model among the ranks of this one's pipeline."""
    return {layer: rank for rank, held in _gathered(list(layers)).items() for layer in held}


def _gathered(own: Any) -> dict[int, Any]:
    """What each rank of this one's pipeline gives, by its global number."""
    if not parallel_state.is_initialized():
        return {0: own}
    group = parallel_state.get_pipeline_model_parallel_group()
    ranks = dist.get_process_group_ranks(group)
    found: list[Any] = [None] * len(ranks)
    dist.all_gather_object(found, own, group=group)
    return dict(zip(ranks, found, strict=True))
