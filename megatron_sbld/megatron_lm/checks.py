"""What is refused before a model is built, under Megatron-LM's own names of arguments."""

from __future__ import annotations

from argparse import Namespace

import torch

from megatron_sbld.mcore.skip.refusals import REASONS, is_on
from megatron_sbld.megatron_lm.arguments import argument_name, named_as_arguments
from megatron_sbld.method.build import updates_sensitivity, validate_drop
from megatron_sbld.method.config import DropConfig
from megatron_sbld.method.decisions import replicas_run_alike
from megatron_sbld.residual.choice import library_for

_REASONS = {
    **REASONS,
    "use_torch_fsdp2": "it gathers and frees a layer's parameters around a forward that a skip does not run",
    "use_megatron_fsdp": "it gathers and frees a layer's parameters around a forward that a skip does not run",
    "use_legacy_models": "its layers are not megatron-core's",
    "perform_rl_step": "it runs the model outside of the training step",
    "inprocess_restart": "it calls pretrain again in a process whose first model is still attached",
    "moe_use_upcycling": "it builds a second model of other layers",
}


def check_arguments(args: Namespace, train_iters: int, config: DropConfig) -> None:
    """Refuse what cannot work together.

    args: Megatron-LM's, validated by Megatron-LM.
    train_iters: iterations of the run, also where it is counted in samples.
    Raises ValueError naming the argument, its value and what is allowed.
    """
    even = args.pipeline_model_parallel_size if _stages_are_even(args) else None
    with named_as_arguments():
        validate_drop(config, args.num_layers, train_iters, even)
    if config.policy != "none":
        for name, reason in _REASONS.items():
            if is_on(args, name):
                raise ValueError(
                    f"{_argument(name)} = {getattr(args, name)!r} does not work with {argument_name('policy')} "
                    f"{config.policy}: {reason}; switch it off"
                )
        _check_together(args, config)
    if config.residual == "fused":
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            library_for(device, args.params_dtype)
        except RuntimeError as error:
            raise ValueError(f"{argument_name('residual')} = 'fused': {error}") from error


def _stages_are_even(args: Namespace) -> bool:
    uneven = ("pipeline_model_parallel_layout", "decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers")
    account = ("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split")
    return all(getattr(args, name, None) is None for name in uneven) and not any(
        getattr(args, name, False) for name in account
    )


def _check_together(args: Namespace, config: DropConfig) -> None:
    if args.overlap_grad_reduce and not replicas_run_alike(config.replicas, config.granularity):
        raise ValueError(
            f"--overlap-grad-reduce does not work with {argument_name('replicas')} distinct, because replicas would "
            "start their reductions in different orders; use shared or switch the overlap off"
        )
    if (config.granularity, config.replicas, args.micro_batch_size) == ("sample", "distinct", 1):
        raise ValueError(
            f"--micro-batch-size = 1 does not work with {argument_name('granularity')} sample and "
            f"{argument_name('replicas')} distinct: with one sample there is nothing that replicas could choose "
            "differently; use at least 2"
        )
    if updates_sensitivity(config) and config.decision_scope == "microbatch":
        raise ValueError(
            f"{argument_name('sensitivity_update')} dynamic does not work with {argument_name('decision_scope')} "
            "microbatch in Megatron-LM, which reports one loss an iteration; use scope iteration"
        )


def _argument(name: str) -> str:
    return f"--{name.replace('_', '-')}"
