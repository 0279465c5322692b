"""Settings of a config that do not work together, beside those of layer dropping (method/combinations.py): a row each.

Rules that compare or divide numbers are in validate.py.
"""

from __future__ import annotations

import dataclasses
from typing import get_type_hints

from megatron_sbld.config.sections import Config
from megatron_sbld.method.combinations import (
    COMBINATIONS,
    Combination,
    above_one,
    find_refusals,
    given,
    other_than,
    switched_on,
)
from megatron_sbld.method.in_force import drop_settings

_SECTION_OF = {
    field.name: section
    for section in ("model", "parallel", "optimizer", "training", "data", "drop")  # a name in two is in no row
    for field in dataclasses.fields(get_type_hints(Config)[section])
}
_LENGTH_ONCE = ("a run has one length", "give exactly one of them")
_NEEDED_BY_WSD = ("it is the last part of that schedule", "it is needed by, and only by, {lr_decay_style} WSD")
_TWO_WEIGHT_DECAYS = (
    "the weight decay goes from one value to the other",
    "give both {start_weight_decay} and {end_weight_decay}",
)
_FULL_ALONE = ("it says which layers are recomputed in full", "set {recompute_granularity} full, or leave it out")
_WHICH_LAYERS = (
    "the layers to recompute must be given",
    "give both {recompute_method} (uniform or block) and {recompute_num_layers}",
)
_ONE_RANK = ("a layer communicates", "must be 1")

CONFIG_COMBINATIONS = (
    # Model and layout.
    Combination(
        {"activation_func": other_than("gelu"), "swiglu": True},
        "SwiGLU's activation is SiLU, so that it has no effect",
        "leave it out",
    ),
    Combination(
        {"reset_position_ids": True, "position_embedding_type": "rope"},
        "it has no effect there, because RoPE turns by the distance of two tokens alone",
        "leave it out",
    ),
    Combination(
        {"reset_attention_mask": True, "context_parallel_size": above_one},
        "ranks that hold a part of the sequence have no mask of their own",
        "set {context_parallel_size} 1, or leave it out",
    ),
    Combination(
        {"num_virtual_stages_per_pipeline_rank": given, "pipeline_model_parallel_size": 1},
        "there is one stage",
        "it needs {pipeline_model_parallel_size} > 1",
    ),
    Combination(
        {"sequence_parallel": True, "tensor_model_parallel_size": 1},
        "there are no ranks to split the sequence over",
        "it needs {tensor_model_parallel_size} > 1",
    ),
    *(
        Combination(
            {"overlap_param_gather": True, needed: False},
            "Megatron only gathers the parameters that a sharded optimizer has stepped, with both overlaps on",
            "it needs {use_distributed_optimizer} and {overlap_grad_reduce} as well",
        )
        for needed in ("use_distributed_optimizer", "overlap_grad_reduce")
    ),
    # Training.
    Combination({"train_iters": None, "train_samples": None}, *_LENGTH_ONCE),
    Combination({"train_iters": given, "train_samples": given}, *_LENGTH_ONCE),
    Combination({"recompute_granularity": "full", "recompute_method": None}, *_WHICH_LAYERS),
    Combination({"recompute_granularity": "full", "recompute_num_layers": None}, *_WHICH_LAYERS),
    Combination({"recompute_method": given, "recompute_granularity": other_than("full")}, *_FULL_ALONE),
    Combination({"recompute_num_layers": given, "recompute_granularity": other_than("full")}, *_FULL_ALONE),
    Combination(
        {"recompute_modules": given, "recompute_granularity": other_than("selective")},
        "it says which parts of a layer are recomputed",
        "set {recompute_granularity} selective, or leave it out",
    ),
    Combination(
        {"recompute_modules": [], "recompute_granularity": "selective"},
        "nothing would be recomputed",
        "name some, or leave it out",
    ),
    Combination(
        {"cross_entropy_loss_fusion": True, "precision": other_than("bf16")},
        "Megatron's fused loss gives its gradient in bf16",
        "must be false or null there",
    ),
    Combination({"torch_compile": True, "tensor_model_parallel_size": above_one}, *_ONE_RANK),
    Combination({"torch_compile": True, "context_parallel_size": above_one}, *_ONE_RANK),
    Combination(
        {"torch_compile": True, "overlap_param_gather": True},
        "modules inside a layer wait for their parameters",
        "must be false",
    ),
    Combination(
        {"torch_compile": True, "recompute_granularity": "selective"},
        "the compiled graph decides what to recompute",
        "must be full or null",
    ),
    Combination(
        {"task_interval": switched_on, "lambada_path": None, "perplexity_path": None},
        "there is nothing to evaluate",
        "give {lambada_path} or {perplexity_path}",
    ),
    # Optimizer.
    Combination({"lr_decay_style": "WSD", "lr_wsd_decay_iters": None}, *_NEEDED_BY_WSD),
    Combination({"lr_wsd_decay_iters": given, "lr_decay_style": other_than("WSD")}, *_NEEDED_BY_WSD),
    Combination({"weight_decay_incr_style": other_than("constant"), "start_weight_decay": None}, *_TWO_WEIGHT_DECAYS),
    Combination({"weight_decay_incr_style": other_than("constant"), "end_weight_decay": None}, *_TWO_WEIGHT_DECAYS),
)


def combination_problems(config: Config, *, trains: bool = True) -> list[str]:
    """A line for each row of either table that applies. trains: whether the data section is looked at."""
    settings = {
        name: getattr(getattr(config, section), name)
        for name, section in _SECTION_OF.items()
        if section != "drop" and (trains or section != "data")
    }
    rows = (*COMBINATIONS, *CONFIG_COMBINATIONS)
    return find_refusals({**settings, **drop_settings(config.drop)}, _path, rows=rows)


def _path(name: str) -> str:
    return f"{_SECTION_OF[name]}.{name}"
