"""What is refused before a model is built, under Megatron-LM's own names of arguments."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import torch

from megatron_sbld.mcore.compat import hybrid_pattern
from megatron_sbld.mcore.skip.refusals import REASONS, is_on
from megatron_sbld.megatron_lm.arguments import argument_name, named_as_arguments, policy_layers
from megatron_sbld.method.combinations import refuse_combinations
from megatron_sbld.method.config import DropConfig, drop_field_names
from megatron_sbld.method.in_force import drop_settings, drops
from megatron_sbld.method.validate import validate_drop
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
        validate_drop(config, policy_layers(args, config), train_iters, even)
    if drops(config):
        for name, reason in _REASONS.items():
            if is_on(args, name):
                field = "granularity" if config.policy == "none" else "policy"
                raise ValueError(
                    f"{_argument(name)} = {getattr(args, name)!r} does not work with {argument_name(field)} "
                    f"{getattr(config, field)}: {reason}; switch it off"
                )
        refuse_combinations(_settings(args, config), _name, program="Megatron-LM")
    if config.residual == "fused":
        check_fused_residual(args.params_dtype, argument_name("residual"))


def check_fused_residual(dtype: torch.dtype, name: str) -> None:
    """Refuse `residual: fused`, which the user calls `name`, where its library is missing."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        library_for(device, dtype)
    except RuntimeError as error:
        raise ValueError(f"{name} = 'fused': {error}") from error


def _stages_are_even(args: Namespace) -> bool:
    if hybrid_pattern(args) is not None:  # its stages are as long as it says
        return False
    uneven = ("pipeline_model_parallel_layout", "decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers")
    account = ("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split")
    return all(getattr(args, name, None) is None for name in uneven) and not any(
        getattr(args, name, False) for name in account
    )


def _settings(args: Namespace, config: DropConfig) -> dict[str, Any]:
    """As method/combinations.py names them: where megatron-core's name is another than Megatron-LM's, it is core's."""
    return {**vars(args), "num_moe_experts": getattr(args, "num_experts", None), **drop_settings(config)}


def _name(setting: str) -> str:
    if setting in drop_field_names():
        return argument_name(setting)
    return _argument({"num_moe_experts": "num_experts"}.get(setting, setting))


def _argument(name: str) -> str:
    return f"--{name.replace('_', '-')}"
