"""The `--sbld-*` arguments: every field of the drop section, with its type, choices, default and limits."""

from __future__ import annotations

import dataclasses
import json
from argparse import ArgumentParser, Namespace
from typing import Any

import pytest

from megatron_sbld.megatron_lm.arguments import add_arguments, argument_name, drop_config, extra_args_provider
from megatron_sbld.megatron_lm.checks import check_arguments
from megatron_sbld.method.config import DropConfig

FIELDS = [field.name for field in dataclasses.fields(DropConfig) if field.name != "recipe"]
OTHER_VALUES = {
    **{"policy": "sbld", "schedule": "linear", "sensitivity": "file.json", "sensitivity_update": "dynamic"},
    **{"block_layers": [13, 14], "allow_layers": [1], "residual_scale": "inverse_keep_prob", "residual": "fused"},
    **{
        "decision_scope": "microbatch",
        "granularity": "sample",
        "unit": "block",
        "sampler": "balanced",
        "replicas": "distinct",
    },
    **{"dropped_update": "freeze", "interpolate": True, "release_block": True, "balance_stages": 2, "seed": 7},
    **{"update_interval": 50, "update_memory": 500},
    **{"min_tokens": 32, "token_step": 8, "token_iterations": 50, "token_strata": 2, "token_schedule": "steps"},
    **{"token_layers": [2, 3], "token_steps": [[0.5, 32], [1.0, 64]]},
    **{"stages": [[0.5, 1], [1.0, 8]], "steps": [[0.5, 0.7], [1.0, 1.0]], "stage_layers": "first"},
    **{"stage_init": "copy", "stage_copy_moments": True, "keep_layers": [1, 8], "depth": "linear"},
}
"""A value other than the default, for each field that is not a float."""


def parse(*arguments: str) -> Namespace:
    return add_arguments(ArgumentParser(allow_abbrev=False)).parse_args(arguments)


def megatron(**changed: Any) -> Namespace:
    """Megatron-LM's arguments, as far as the checks read them, with --sbld-* left at their defaults."""
    known = {
        **{"num_layers": 8, "train_iters": 100, "micro_batch_size": 2, "pipeline_model_parallel_size": 1},
        **{"overlap_grad_reduce": False, "fp8": None, "fp8_recipe": "delayed", "cuda_graph_impl": "none"},
    }
    return Namespace(**{**known, **vars(parse()), **changed})


def test_without_arguments_the_section_is_the_default_one() -> None:
    assert drop_config(parse()) == DropConfig()


def test_arguments_that_are_not_there_leave_the_default_section() -> None:
    assert drop_config(Namespace()) == DropConfig()  # as with Megatron-LM's --yaml-cfg


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_has_an_argument_that_sets_it_alone(name: str) -> None:
    value = OTHER_VALUES.get(name, 0.25)
    words = [str(item) for item in value] if isinstance(value, list) else [] if value is True else [str(value)]
    if name in ("stages", "steps", "token_steps"):
        words = [json.dumps(value)]
    assert drop_config(parse(argument_name(name), *words)) == dataclasses.replace(DropConfig(), **{name: value})


def test_a_recipe_fills_what_was_not_set_also_to_its_default() -> None:
    assert drop_config(Namespace(num_layers=8, **vars(parse("--sbld-recipe", "pld-paper")))).theta == 0.5
    explicit = parse("--sbld-recipe", "pld-paper", "--sbld-theta", "0.9", "--sbld-recovery-fraction", "0.1")
    config = drop_config(Namespace(num_layers=8, **vars(explicit)))
    assert (config.policy, config.theta, config.recovery_fraction) == ("pld", 0.9, 0.1)


def test_layers_in_the_order_in_which_they_begin_are_json() -> None:
    assert drop_config(parse("--sbld-stage-layers", "[3, 1]")).stage_layers == [3, 1]


@pytest.mark.parametrize("words", [("--sbld-policy", "half"), ("--sbld-theta", "much"), ("--sbld-thet", "0.9")])
def test_a_wrong_choice_type_or_name_is_refused_by_the_parser(words: tuple[str, str]) -> None:
    with pytest.raises(SystemExit):
        parse(*words)


def test_the_help_is_the_fields_own_documentation(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--help")
    shown = " ".join(capsys.readouterr().out.split())
    assert "None is 10 % of the iterations" in shown
    assert "SBLD: weight of theta(t). At least 0. (default: 1.0)" in shown


def test_another_provider_of_arguments_is_kept() -> None:
    def other(parser: ArgumentParser) -> ArgumentParser:
        parser.add_argument("--other", type=int)
        return parser

    args = extra_args_provider(other)(ArgumentParser()).parse_args(["--other", "3", "--sbld-policy", "pld"])
    assert (args.other, args.sbld_policy) == (3, "pld")


def check(**changed: Any) -> None:
    args = megatron(**changed)
    check_arguments(args, args.train_iters, drop_config(args))


def test_nothing_is_looked_at_without_a_policy() -> None:
    check(cuda_graph_impl="local", use_megatron_fsdp=True, sbld_sensitivity="nowhere.json")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sbld_theta": 1.5}, r"--sbld-theta = 1.5 .*\(0, 1\]"),
        ({"sbld_policy": "sbld"}, "--sbld-sensitivity = None is not allowed with --sbld-policy sbld"),
        ({"sbld_sampler": "balanced", "pipeline_model_parallel_size": 3}, "pipeline stages = 3"),
        ({"sbld_replicas": "distinct"}, "--sbld-replicas = 'distinct' does not work with --sbld-sampler = 'bernoulli'"),
        (
            {"sbld_replicas": "distinct", "sbld_sampler": "balanced", "overlap_grad_reduce": True},
            "--sbld-replicas = 'distinct' does not work with --overlap-grad-reduce = True",
        ),
        (
            {"sbld_replicas": "distinct", "sbld_granularity": "sample", "micro_batch_size": 1},
            "--sbld-replicas = 'distinct' does not work with --micro-batch-size = 1",
        ),
        ({"cuda_graph_impl": "transformer_engine"}, "--cuda-graph-impl = 'transformer_engine' does not work"),
        ({"use_megatron_fsdp": True}, "--use-megatron-fsdp = True does not work"),
        ({"use_torch_fsdp2": True}, "--use-torch-fsdp2 = True does not work"),
        ({"qk_clip": True}, "--qk-clip = True does not work"),
        ({"fp8": "hybrid"}, "--fp8-recipe = 'delayed' does not work"),
        ({"gtp_weight_remat_size": 2}, "--gtp-weight-remat-size = 2 does not work"),
        ({"moe_paged_stash": True}, "--moe-paged-stash = True does not work"),
        (
            {"optimizer": "muon"},
            "--sbld-policy = 'layerdrop' does not work with --optimizer = 'muon': .*; set --optimizer adam or sgd",
        ),
        (
            {"optimizer": "muon", "sbld_dropped_update": "freeze"},
            "--sbld-policy = 'layerdrop' does not work with --optimizer = 'muon'",
        ),
        (
            {"use_layer_wise_distributed_optimizer": True},
            "--sbld-policy = 'layerdrop' does not work with --use-layer-wise-distributed-optimizer = True",
        ),
        (
            {"optimizer_cuda_graph": True, "sbld_dropped_update": "freeze"},
            "--sbld-dropped-update = 'freeze' does not work with --optimizer-cuda-graph = True",
        ),
        ({"inprocess_restart": True}, "--inprocess-restart = True does not work"),
        ({"perform_rl_step": True}, "--perform-rl-step = True does not work"),
    ],
)
def test_a_mistake_is_refused_by_the_arguments_name(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(**{"sbld_policy": "layerdrop", **changed})


def test_a_dynamic_sensitivity_by_microbatches_is_refused() -> None:
    message = (
        "--sbld-sensitivity-update = 'dynamic' does not work with --sbld-decision-scope = 'microbatch' in Megatron-LM"
    )
    with pytest.raises(ValueError, match=message):
        check(
            sbld_policy="sbld",
            sbld_sensitivity="file.json",
            sbld_sensitivity_update="dynamic",
            sbld_decision_scope="microbatch",
        )


def test_the_balanced_sampler_takes_uneven_stages_as_they_are_built() -> None:
    layout = "Et*3|t*5L"
    check(
        sbld_policy="layerdrop",
        sbld_sampler="balanced",
        pipeline_model_parallel_size=3,
        pipeline_model_parallel_layout=layout,
    )
