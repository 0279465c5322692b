"""Settings that do not work together: one table, asked by the names of each program's users."""

from __future__ import annotations

import dataclasses
import string
from typing import Any

import pytest

from megatron_sbld.config.combinations import CONFIG_COMBINATIONS, combination_problems
from megatron_sbld.config.sections import Config
from megatron_sbld.method.combinations import COMBINATIONS, Combination, find_refusals, refuse_combinations
from megatron_sbld.method.config import DropConfig
from megatron_sbld.method.in_force import drop_settings

DISTINCT = {"replicas": "distinct", "granularity": "layer"}
MEGATRON = {
    *("overlap_grad_reduce", "micro_batch_size", "num_moe_experts", "expert_model_parallel_size", "tp_comm_overlap"),
    *("moe_router_load_balancing_type", "recompute_granularity", "fp8", "fp4", "torch_compile"),
    *("apply_rope_fusion", "multi_latent_attention", "window_size"),
    *("optimizer", "use_layer_wise_distributed_optimizer", "optimizer_cuda_graph"),
}
"""Settings beside those of the drop section."""


def test_a_row_applies_when_all_of_its_settings_are_known_and_are_what_it_says() -> None:
    assert find_refusals(DISTINCT) == []
    assert find_refusals({**DISTINCT, "overlap_grad_reduce": False}) == []
    assert find_refusals({**DISTINCT, "granularity": "sample", "overlap_grad_reduce": True}) == []
    (line,) = find_refusals({**DISTINCT, "overlap_grad_reduce": True})
    assert line == (
        "replicas = 'distinct' does not work with overlap_grad_reduce = True and granularity = 'layer': a replica that "
        "skips a layer would start its reductions in another order than one that runs it; set replicas shared, or "
        "switch overlap_grad_reduce off"
    )


def test_settings_are_named_as_the_user_knows_them() -> None:
    with pytest.raises(ValueError, match=r"^--replicas = 'distinct' .* set --replicas shared, or --dropped_update ap"):
        refuse_combinations({**DISTINCT, "dropped_update": "freeze"}, "--{}".format)


def test_what_does_not_work_in_one_program_is_refused_there_alone() -> None:
    settings = {"sensitivity_update": "dynamic", "decision_scope": "microbatch"}
    assert find_refusals(settings) == []
    for program in ("Megatron-LM", "Megatron-Bridge"):
        (line,) = find_refusals(settings, program=program)
        assert f"decision_scope = 'microbatch' in {program}: it reports one loss" in line


def test_rows_name_settings_that_there_are() -> None:
    drop = {field.name for field in dataclasses.fields(DropConfig)}
    for row in COMBINATIONS:
        assert set(row.when) <= drop | MEGATRON
        assert set(row.when) & drop, "what has no part in dropping stands in config/combinations.py"
    trainer = {field.name for section in vars(Config()).values() for field in dataclasses.fields(section)}
    for row in CONFIG_COMBINATIONS:
        assert set(row.when) <= trainer - drop


@pytest.mark.parametrize("row", [*COMBINATIONS, *CONFIG_COMBINATIONS], ids=lambda row: " ".join(row.when))
def test_a_way_out_names_settings_of_its_row(row: Combination) -> None:
    named = {name for _, name, _, _ in string.Formatter().parse(row.instead) if name is not None}
    siblings = {"use_distributed_optimizer", "overlap_grad_reduce", "recompute_method", "recompute_num_layers"}
    assert named <= {*row.when, *siblings, "start_weight_decay", "end_weight_decay"}
    assert len(row.when) > 1


@pytest.mark.parametrize(
    ("fields", "in_force", "not_in_force"),
    [
        ({"policy": "none", "replicas": "distinct"}, {}, {"replicas"}),
        ({"policy": "pld", "sensitivity_update": "dynamic"}, {"residual_scale": "inverse_keep_prob"}, {"alpha"}),
        ({"policy": "pld", "schedule": "linear"}, {"start_theta": 1.0}, {"gamma", "power", "sensitivity_update"}),
        ({"policy": "sbld"}, {"a": 2.0, "residual_scale": "none"}, {"gamma", "exploration"}),
        ({"policy": "sbld", "sensitivity_update": "dynamic"}, {"exploration": 0.02}, {"gamma"}),
    ],
)
def test_settings_of_other_policies_are_not_in_force(
    fields: dict[str, Any], in_force: dict[str, Any], not_in_force: set[str]
) -> None:
    settings = drop_settings(DropConfig(**fields))
    assert settings.items() >= in_force.items()
    assert not settings.keys() & not_in_force


def test_with_policy_none_nothing_of_the_drop_section_is_refused() -> None:
    drop = DropConfig(policy="none", replicas="distinct", dropped_update="freeze")
    config = dataclasses.replace(Config(), drop=drop, training=dataclasses.replace(Config().training, train_iters=5))
    assert combination_problems(config) == []
