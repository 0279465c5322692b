"""MoE's auxiliary losses, counted over the layers that ran.

Megatron keeps, for each kind of auxiliary loss, a sum by layer over an iteration's microbatches, and logs its mean over
all MoE layers and microbatches (transformer/moe/moe_utils.py, `track_moe_metrics`). A dropped layer adds nothing to the
sum, so that mean is too small by the share of dropped layers. Here it is divided by what ran:

    track_moe_metrics(loss_scale=moe_loss_scale(controller, config), ...)     # instead of 1 / num_microbatches
    get_moe_metrics_tracker().report(loss_scale=..., ...)                     # from megatron-core 0.18 on, likewise

The gradients need no correction: a kept layer's router gets those of its own auxiliary loss, as at full depth, and a
dropped one gets none, so a layer sees its auxiliary loss as often as its part of the language-model loss. With
granularity `sample` or `token` SampledRouter corrects their weights; in the logged means a layer that ran some samples
or tokens of a microbatch ran.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_sbld.controller import DropController
from megatron_sbld.layout.units import units_with_experts
from megatron_sbld.mcore.compat import record_moe_loss, sequence_loss_counts_all_tokens
from megatron_sbld.method.choices import Unit


def moe_layers(config: TransformerConfig, hybrid_layer_pattern: str | None = None, unit: Unit = "layer") -> list[int]:
    """The controller's number of each layer of the decoder that has experts.

    Of a GPT as Megatron reads `moe_layer_freq`, of a HybridModel by its pattern and what make_switchable was told.
    """
    frequency = config.moe_layer_freq
    if config.num_moe_experts is None:
        return []
    if hybrid_layer_pattern is not None:
        return units_with_experts(hybrid_layer_pattern, unit)
    if isinstance(frequency, int):
        return [index + 1 for index in range(config.num_layers) if index % frequency == 0]
    return [index + 1 for index, has_experts in enumerate(frequency) if has_experts]


def moe_loss_scale(
    controller: DropController,
    config: TransformerConfig,
    hybrid_layer_pattern: str | None = None,
    unit: Unit = "layer",
) -> float:
    """Factor for `track_moe_metrics` that makes its means those over the (microbatch, MoE layer) pairs that ran.

    Take it after the iteration's forward-backward pass. Multi-token prediction layers count as run. NaN where nothing
    ran. With `per_layer_logging` a layer's value is its sum times this factor: compare layers, not iterations, by it.
    With `distinct` replicas that run different layers it is a collective over the data-parallel group.

    hybrid_layer_pattern, unit: of a HybridModel, as it was built and made switchable.

    Raises:
        ValueError: the model has no experts.
    """
    layers = moe_layers(config, hybrid_layer_pattern, unit)
    if not layers:
        raise ValueError("moe_loss_scale needs a model with experts, num_moe_experts = None has none")
    mtp_layers = config.mtp_num_layers or 0
    ran = float(controller.plan[:, [layer - 1 for layer in layers]].sum())
    ran = _mean_over_replicas(ran, controller) + mtp_layers * controller.num_microbatches
    return (len(layers) + mtp_layers) / ran if ran else float("nan")


def _mean_over_replicas(ran: float, controller: DropController) -> float:
    if controller.replicas_run_alike:
        return ran
    count = torch.tensor([ran], device=torch.cuda.current_device())
    dist.all_reduce(count, op=dist.ReduceOp.AVG, group=parallel_state.get_data_parallel_group())
    return float(count)


def announce_moe_losses(layers: Iterable[torch.nn.Module]) -> None:
    """Add the auxiliary losses of these layers' routers to Megatron's sums, as zeros, before any layer has run.

    Megatron adds a kind of loss when a layer first has one, and then reduces the kinds that it knows over the pipeline
    and data-parallel ranks: a rank whose MoE layers were all dropped so far would know none and leave others waiting.
    """
    routers = [module for layer in layers for module in layer.modules() if isinstance(module, TopKRouter)]
    for router in routers:
        config = router.config
        num_layers = config.num_layers + (config.mtp_num_layers or 0)
        zero = torch.zeros((), device=torch.cuda.current_device())
        if config.moe_z_loss_coeff is not None:
            record_moe_loss("z_loss", zero, router.layer_number, num_layers)
        for kind, name, group, has_dp in (
            ("aux_loss", "load_balancing_loss", router.tp_cp_group, False),
            ("seq_aux_loss", "seq_load_balancing_loss", router.tp_cp_group, False),
            ("global_aux_loss", "global_load_balancing_loss", router.tp_dp_cp_group, True),
        ):
            if router.get_aux_loss_coeff(kind) > 0:
                record_moe_loss(
                    name, zero, router.layer_number, num_layers, reduce_group=group, reduce_group_has_dp=has_dp
                )


class SampledRouter(TopKRouter):
    """Goes in front of a built router's own class: auxiliary losses of n of b samples count n / b, of tokens likewise.

    Megatron takes them as means over what a router sees, however much that is. Full weight for a part of the samples
    would set them b / n too high against the language-model loss.
    """

    config: TransformerConfig
    _drop_whole: tuple[int, int] | None
    """The dimension of [s, b, h] of which it may see a part, and its whole size."""

    def routing(self, logits: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """logits [s, n, experts] -> the stock routing."""
        whole = self._drop_whole
        if whole is None or logits.size(whole[0]) == whole[1] or not self.training:
            return super().routing(logits, *args, **kwargs)
        stock = self.config
        self.config = _with_scaled_losses(stock, logits.size(whole[0]) / whole[1], of_tokens=whole[0] == 0)
        try:
            return super().routing(logits, *args, **kwargs)
        finally:
            self.config = stock


def _with_scaled_losses(config: TransformerConfig, share: float, of_tokens: bool) -> TransformerConfig:
    """The config with the coefficients of its auxiliary losses multiplied; what is logged is divided by them again.

    With calculate_per_token_loss Megatron multiplies the losses by the number of tokens, which does the same, but that
    of sequences (seq_aux_loss) in some versions by the tokens of one sequence, as many as are kept of it.
    """
    by_tokens = config.calculate_per_token_loss
    sequences_by_tokens = by_tokens and (of_tokens or sequence_loss_counts_all_tokens())
    scaled = copy.copy(config)
    kinds, coefficients = config.moe_router_load_balancing_type, config.moe_aux_loss_coeff
    if isinstance(kinds, list) and isinstance(coefficients, list):
        scaled.moe_aux_loss_coeff = [
            coefficient * (1.0 if (sequences_by_tokens if kind == "seq_aux_loss" else by_tokens) else share)
            for kind, coefficient in zip(kinds, coefficients, strict=True)
        ]
    elif isinstance(coefficients, float | int):
        by_kind = sequences_by_tokens if kinds == "seq_aux_loss" else by_tokens
        scaled.moe_aux_loss_coeff = coefficients * (1.0 if by_kind else share)
    if config.moe_z_loss_coeff is not None and not by_tokens:
        scaled.moe_z_loss_coeff = config.moe_z_loss_coeff * share
    return scaled


_classes: dict[type, type] = {}


def weigh_router_losses(layer: torch.nn.Module, whole: tuple[int, int] | None) -> None:
    """Let a layer's routers weigh their auxiliary losses by the share of samples or tokens that they see.

    whole: the dimension of [s, b, h] of which they may see a part, and its size. None, of granularity `layer`, leaves
    them stock.
    """
    for router in [module for module in layer.modules() if isinstance(module, TopKRouter)]:
        if whole is not None and not isinstance(router, SampledRouter):
            cls = type(router)
            if cls not in _classes:
                _classes[cls] = type(f"Sampled{cls.__name__}", (SampledRouter, cls), {"__module__": cls.__module__})
            router.__class__ = _classes[cls]
        if isinstance(router, SampledRouter):
            router._drop_whole = whole
