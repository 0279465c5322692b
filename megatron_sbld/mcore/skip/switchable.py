"""The switchable layer: a built Megatron layer that can be skipped in training.

A layer becomes switchable by changing its class to a subclass of its own class that overrides `forward` alone, so
parameter names, state dicts and every other method stay Megatron's. A kept layer runs the stock forward; a dropped one
hands its input on; one that only some samples of a microbatch run is samples.py's, one that runs some tokens of each
sample tokens.py's. Evaluation never asks and never drops, but for layers that have not begun. What a skip must take
care of is listed at `_SkippedLayer` and in layer_buckets.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any, get_args

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.ssm.mamba_layer import MambaLayer
from megatron.core.tensor_parallel.random import is_checkpointing
from megatron.core.transformer.identity_op import IdentityOp

from megatron_sbld.checks import check_choice
from megatron_sbld.controller import DropController
from megatron_sbld.mcore.compat import check_megatron_core
from megatron_sbld.mcore.skip.branches import are_fused, fuse_branches, scale_branches
from megatron_sbld.mcore.skip.bucket_groups import LayerRecord, make_skippable
from megatron_sbld.mcore.skip.decoder import DecoderUnits, check_kind, chunk_list, decoder_layers, decoder_units
from megatron_sbld.mcore.skip.layer_buckets import LayerBuckets, note_wrappers, refuse_wrappers_around
from megatron_sbld.mcore.skip.moe import announce_moe_losses, weigh_router_losses
from megatron_sbld.mcore.skip.recompute import Checkpoint, ForwardPass, in_backward_pass, running_checkpoint
from megatron_sbld.mcore.skip.refusals import refuse_unsupported_switches, refuse_wrapped_layers
from megatron_sbld.mcore.skip.samples import SampleIndices
from megatron_sbld.mcore.skip.tokens import TokenIndices, check_layer_of_tokens, check_strata
from megatron_sbld.method.choices import Unit
from megatron_sbld.method.combinations import refuse_combinations


class _SkippedLayer(torch.autograd.Function):
    """Identity that neither copies nor aliases in autograd's sense.

    Returning the input itself would make the output of an all-dropped pipeline stage its input, which
    `deallocate_pipeline_outputs` frees; a view is refused there. A new tensor on the same storage is neither: freeing
    it swaps its own `data` only (as in megatron.core.utils.MakeViewlessTensor).

    `stand_in` is a leaf in the place of the layer's parameters (`LayerBuckets.stand_in`), and gets no gradient either.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, hidden_states: torch.Tensor, stand_in: torch.Tensor | None
    ) -> torch.Tensor:
        output = torch.empty((1,), dtype=hidden_states.dtype, device=hidden_states.device)
        output.data = hidden_states.data
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return grad_output, None


class SwitchableLayer(torch.nn.Module):
    """Goes in front of a built layer's own class; `make_switchable` puts it there."""

    layer_number: int  # Megatron's
    _drop_controller: DropController
    _drop_number: int  # the controller's: of the layer, or with unit `block` of its block
    _drop_buckets: LayerBuckets | None
    _drop_record: LayerRecord
    _drop_part: SampleIndices | TokenIndices | None  # None: granularity layer, or a layer that runs all tokens
    _drop_last_begun: int  # the controller's at the last pass that was no recomputation; 0: there was none
    _branch_scale: float

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The stock layer's forward, or its identity."""
        if not self.training:
            if is_checkpointing():
                self._refuse_recomputation_in_evaluation()
            if self._drop_controller.has_begun(self._drop_number):
                return super().forward(*args, **kwargs)
            return self._returned(self._hand_on(args[0] if args else kwargs["hidden_states"]), kwargs)
        controller = self._drop_controller
        hidden_states = args[0] if args else kwargs["hidden_states"]
        microbatch = self._microbatch()
        if not controller.kept(self._drop_number, microbatch):
            return self._returned(self._skip(hidden_states), kwargs)
        self._drop_record.ran = True
        run: Any = super().forward
        if self._drop_part is not None:
            run = self._drop_part.narrowed(run, self._drop_number, microbatch, hidden_states)
        if not controller.scales_residual:
            return run(*args, **kwargs)
        self._branch_scale = controller.branch_scale(self._drop_number)
        try:
            return run(*args, **kwargs)
        finally:
            self._branch_scale = 1.0

    def _returned(self, hidden_states: torch.Tensor, kwargs: dict[str, Any]) -> Any:
        """What the stock layer returns: (hidden_states [s, b, h], context)."""
        return hidden_states, kwargs.get("context")

    def _skip(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """hidden_states [s, b, h] -> the same values, with the wrapper told what it needs to know."""
        controller = self._drop_controller
        # Other replicas may run what this one skips, but for a layer that has not begun.
        self._drop_record.skipped = controller.replicas_run_alike or not controller.has_begun(self._drop_number)
        return self._hand_on(hidden_states)

    def _hand_on(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self._drop_buckets is None:
            # Looked up here, once: a layer may have been made switchable before its model was wrapped.
            self._drop_buckets = LayerBuckets(self)
            self._drop_controller.refuse({"overlap_grad_reduce": self._drop_buckets.reports_gradients})
            _let_buckets_be_skipped(self._drop_buckets.wrapper)
        buckets = self._drop_buckets
        buckets.wait_for_params()
        return _SkippedLayer.apply(hidden_states, buckets.stand_in(hidden_states))

    def _microbatch(self) -> int:
        """The microbatch that this pass belongs to, also when it recomputes an earlier microbatch's activations.

        Raises:
            RuntimeError: it recomputes a pass whose decisions the controller no longer has.
        """
        controller = self._drop_controller
        # Set by Megatron's schedules; a loop without them has to have one microbatch an iteration.
        microbatch = 0
        if controller.scope != "iteration" or controller.tokens is not None:
            microbatch = getattr(self, "current_microbatch", 0 if controller.num_microbatches == 1 else -1)
        checkpoint = running_checkpoint() if is_checkpointing() else None
        if checkpoint is not None and checkpoint.recomputes:
            return self._recomputed_microbatch(checkpoint)
        if in_backward_pass():
            self._check_unknown_recomputation()
            return microbatch
        if self._drop_last_begun != controller.begun:  # setting a module's attribute takes longer than asking
            self._drop_last_begun = controller.begun
        if checkpoint is not None:
            checkpoint.remember(self, ForwardPass(controller, controller.begun, microbatch))
        return microbatch

    def _refuse_recomputation_in_evaluation(self) -> None:
        checkpoint = running_checkpoint()
        if checkpoint is not None and checkpoint.recomputes and checkpoint.recall(self) is not None:
            raise RuntimeError(
                f"layer {self.layer_number} recomputes a forward pass of training in evaluation mode, in which nothing "
                "is dropped: call model.train() before backward"
            )

    def _check_unknown_recomputation(self) -> None:
        """Refuse a recomputation that is not Megatron's where the present decision may not be the forward pass's."""
        controller, begun = self._drop_controller, self._drop_last_begun
        self._check_pass(ForwardPass(controller, begun, 0) if begun else None)
        by_microbatch = controller.scope == "microbatch" or controller.runs_some_tokens(self._drop_number)
        if by_microbatch and controller.num_microbatches > 1:
            raise RuntimeError(
                f"layer {self.layer_number} is recomputed by something else than Megatron's recompute_granularity, "
                "which does not tell of which microbatch (torch.utils.checkpoint, for one): use recompute_granularity, "
                "or scope 'iteration' with granularity 'layer' or 'sample'"
            )

    def _recomputed_microbatch(self, checkpoint: Checkpoint) -> int:
        """The microbatch of the forward pass that the checkpoint recomputes."""
        return self._check_pass(checkpoint.recall(self)).microbatch

    def _check_pass(self, forward_pass: ForwardPass | None) -> ForwardPass:
        """Refuse to recompute a forward pass that the controller did not decide, or whose decisions it has no more."""
        controller = self._drop_controller
        if forward_pass is None or forward_pass.controller is not controller:
            raise RuntimeError(
                f"layer {self.layer_number} recomputes a forward pass that ran before make_switchable gave it this "
                "controller: call make_switchable before the forward pass"
            )
        if forward_pass.begun != controller.begun:
            raise RuntimeError(
                f"layer {self.layer_number} recomputes a forward pass whose decisions are gone: begin_iteration("
                f"{controller.iteration}, {controller.num_microbatches}) was called between that forward pass and its "
                "backward pass. Call begin_iteration once an iteration, before its first forward pass; to give an "
                "iteration up, drop its losses, zero the gradients and call begin_iteration again"
            )
        return forward_pass


class SwitchableMambaLayer(SwitchableLayer):
    """The same for MambaLayer, which returns hidden_states [s, b, h] alone."""

    def _returned(self, hidden_states: torch.Tensor, kwargs: dict[str, Any]) -> Any:
        return hidden_states


_classes: dict[type, type] = {}


def _switchable_class(cls: type) -> type:
    if cls not in _classes:
        own = SwitchableMambaLayer if issubclass(cls, MambaLayer) else SwitchableLayer
        _classes[cls] = type(f"Switchable{cls.__name__}", (own, cls), {"__module__": cls.__module__})
    return _classes[cls]


def make_switchable(
    model: torch.nn.Module | Iterable[torch.nn.Module], controller: DropController, *, unit: Unit = "layer"
) -> list[int]:
    """Let `controller` decide which layers of a built model, a GPTModel or a HybridModel, run in training.

    Call it on every rank, before or after DistributedDataParallel wraps the model. Multi-token prediction layers are
    never dropped. Calling it again gives the layers to another controller.

    Args:
        model: a model, or the list of its chunks on this rank, wrapped or not.
        controller: decides; its policy must be of the whole model's number of units.
        unit: what counts as one layer of a HybridModel: each of its layers, or with `block` attention and the MLP or
            experts behind it together. In a GPT every layer is such a block.

    Returns:
        The 1-based numbers of the units on this rank.

    Raises:
        ValueError: no decoder layers, a layer that is of no known kind or has cross-attention, another number of
            units than the policy's, a block on two pipeline stages, a switch of the model's config or a wrapper under
            which a drop would be wrong or ignored, or compiled layers with fused branches that the controller scales;
            at the next begin_iteration distinct replicas of the same number. A wrapper that comes later is refused
            when it is put around the model, at the next begin_iteration, or before the first skip.
    """
    check_megatron_core()
    if not isinstance(controller, DropController):
        raise ValueError(f"controller is a {type(controller).__name__}: it must be a DropController")
    check_choice("unit", unit, get_args(Unit))
    chunks = chunk_list(model)
    for chunk in chunks:
        note_wrappers(chunk.modules())
    found = [decoder_units(chunk, unit) for chunk in chunks]
    numbers = {layer: number for units in found for layer, number in units.numbers.items()}
    _refuse_wrapped(chunks, numbers)
    for units in found:
        _check_units(units, controller)
    samples = SampleIndices(controller) if controller.granularity == "sample" else None
    for units in found:
        part = samples if controller.tokens is None else _token_indices(units, controller)
        for layer, number in units.numbers.items():
            _attach(layer, number, controller, part)
    announce_moe_losses(numbers)
    controller.check_once(
        partial(_refuse_wrapped, chunks, list(numbers))
    )  # fully_shard() and compile() change a model in place
    controller.check_once(partial(_refuse_equal_replicas, controller))
    controller.check_once(partial(_refuse_unattended_growth, controller))
    return list(dict.fromkeys(numbers.values()))


def _token_indices(units: DecoderUnits, controller: DropController) -> TokenIndices:
    layers: list[Any] = list(units.numbers)
    sequence_parallel = any(layer.config.sequence_parallel for layer in layers)
    indices = TokenIndices(controller, list(units.numbers.values()), sequence_parallel=sequence_parallel)
    check = partial(check_strata, controller, indices.split)
    check()
    controller.check_once(check)  # a checkpoint may bring other ones
    return indices


def fuse_residual(model: torch.nn.Module | Iterable[torch.nn.Module]) -> None:
    """Let the decoder layers of a built model add to the residual stream by `residual_skip_add` in training.

    Before or after `make_switchable`, or without it. Calling it again changes nothing.

    Args:
        model: a model, or the list of its chunks on this rank, wrapped or not.

    Raises:
        ValueError: no decoder layers, one of no known kind, or compiled ones whose branches are scaled.
    """
    layers = [layer for chunk in chunk_list(model) for layer in decoder_layers(chunk)]
    for layer in layers:
        check_kind(layer)
        if isinstance(layer, SwitchableLayer) and layer._drop_controller.scales_residual:
            _refuse_compiled_scales(layer)
    for layer in layers:
        fuse_branches(layer)


def _check_units(units: DecoderUnits, controller: DropController) -> None:
    if units.total != controller.num_layers:
        raise ValueError(f"the policy is for {controller.num_layers} layers, the model has {units.name}")
    for layer, number in units.numbers.items():
        _check_layer(layer, number, controller)


def _check_layer(layer: Any, number: int, controller: DropController) -> None:
    if not isinstance(getattr(layer, "cross_attention", None), IdentityOp | None):
        raise ValueError(
            f"layer {layer.layer_number} has cross-attention, and only decoder-only models can be made switchable"
        )
    refuse_unsupported_switches(layer.config, controller)
    if controller.scales_residual and are_fused(layer):
        _refuse_compiled_scales(layer)
    if controller.tokens is not None and number in controller.tokens.layers:
        check_layer_of_tokens(layer, number, controller.tokens)


def _refuse_wrapped(chunks: Iterable[torch.nn.Module], layers: Iterable[torch.nn.Module]) -> None:
    for chunk in chunks:
        refuse_wrapped_layers(chunk, layers)
    refuse_wrappers_around(layers)


def _refuse_unattended_growth(controller: DropController) -> None:
    if len(controller.growth.begun) < controller.num_layers and not controller.growth.callbacks:
        raise ValueError(
            "the policy has stages, whose waiting layers the optimizer would move: call grow_in_stages(model, "
            "optimizer) once the optimizer is built"
        )


def _refuse_compiled_scales(layer: Any) -> None:
    if hasattr(layer, "_compiled_forward"):
        scaled: dict[str, Any] = {"torch_compile": True, "residual": "fused", "residual_scale": "inverse_keep_prob"}
        names = {"torch_compile": f"layer {layer.layer_number}: torch_compile"}
        refuse_combinations(scaled, lambda name: names.get(name, name))


def _refuse_equal_replicas(controller: DropController) -> None:
    """Refuse distinct replicas with the same number, as where the default was left. Collective."""
    if controller.replicas != "distinct" or not parallel_state.is_initialized():
        return
    group = parallel_state.get_data_parallel_group()
    found: list[Any] = [None] * group.size()
    dist.all_gather_object(found, controller.replica, group=group)
    if len(set(found)) < len(found):
        raise ValueError(
            f"replica = {controller.replica} is not allowed: the data-parallel replicas have the numbers {found}, and "
            "distinct ones need one each; give DropController its parallel_state.get_data_parallel_rank()"
        )


def _let_buckets_be_skipped(wrapper: DistributedDataParallel | None) -> None:
    if wrapper is not None:
        layers = [layer for layer in decoder_layers(wrapper) if isinstance(layer, SwitchableLayer)]
        make_skippable(wrapper, {param: layer._drop_record for layer in layers for param in layer.parameters()})


def _attach(layer: Any, number: int, controller: DropController, part: SampleIndices | TokenIndices | None) -> None:
    if not isinstance(layer, SwitchableLayer):
        layer.__class__ = _switchable_class(type(layer))
    if "_drop_record" not in layer.__dict__:  # bucket groups hold it
        layer._drop_record = LayerRecord()
    layer._drop_controller = controller
    layer._drop_number = number
    layer._drop_part = part
    weigh_router_losses(layer, None if part is None else part.whole)
    layer._drop_buckets = None
    layer._drop_last_begun = 0
    layer._branch_scale = 1.0
    scale_branches(layer, controller.scales_residual)
