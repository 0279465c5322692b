"""MoE's auxiliary losses, counted over the layers that ran.

Megatron keeps, for each kind of auxiliary loss, a sum by layer over an iteration's microbatches, and logs its mean over
all MoE layers and microbatches (transformer/moe/moe_utils.py, `track_moe_metrics`). A dropped layer adds nothing to the
sum, so that mean is too small by the share of dropped layers. Here it is divided by what ran:

    track_moe_metrics(loss_scale=moe_loss_scale(controller, config), ...)     # instead of 1 / num_microbatches

The gradients need no correction: a kept layer's router gets those of its own auxiliary loss, as at full depth, and a
dropped one gets none, so a layer sees its auxiliary loss as often as its part of the language-model loss. With
granularity `sample` their weights are corrected in samples.py; here a layer that ran some samples of a microbatch ran.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_utils import save_to_aux_losses_tracker
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_sbld.controller import DropController


def moe_layers(config: TransformerConfig) -> list[int]:
    """The 1-based numbers of the decoder's layers that have experts, as Megatron reads `moe_layer_freq`."""
    frequency = config.moe_layer_freq
    if config.num_moe_experts is None:
        return []
    if isinstance(frequency, int):
        return [index + 1 for index in range(config.num_layers) if index % frequency == 0]
    return [index + 1 for index, has_experts in enumerate(frequency) if has_experts]


def moe_loss_scale(controller: DropController, config: TransformerConfig) -> float:
    """Factor for `track_moe_metrics` that makes its means those over the (microbatch, MoE layer) pairs that ran.

    Take it after the iteration's forward-backward pass. Multi-token prediction layers count as run. NaN where nothing
    ran. With `per_layer_logging` a layer's value is its sum times this factor: compare layers, not iterations, by it.
    With `distinct` replicas that run different layers it is a collective over the data-parallel group.

    Raises:
        ValueError: the model has no experts.
    """
    layers = moe_layers(config)
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
            save_to_aux_losses_tracker("z_loss", zero, router.layer_number, num_layers)
        for kind, name, group, has_dp in (
            ("aux_loss", "load_balancing_loss", router.tp_cp_group, False),
            ("seq_aux_loss", "seq_load_balancing_loss", router.tp_cp_group, False),
            ("global_aux_loss", "global_load_balancing_loss", router.tp_dp_cp_group, True),
        ):
            if router.get_aux_loss_coeff(kind) > 0:
                save_to_aux_losses_tracker(
                    name, zero, router.layer_number, num_layers, reduce_group=group, reduce_group_has_dp=has_dp
                )
