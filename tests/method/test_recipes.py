"""Recipes: what a published method sets, and that what the user sets wins, also where it is the default."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from megatron_sbld.cli.parser import config_parser, parse_config
from megatron_sbld.method.build import build_policy
from megatron_sbld.method.choices import RecipeName
from megatron_sbld.method.config import DropConfig, default_of, drop_field_names
from megatron_sbld.method.decisions import draw_plan
from megatron_sbld.method.recipes import recipe_settings, with_recipe


def parsed(tmp_path: Path, yaml: str, *args: str) -> DropConfig:
    file = tmp_path / "config.yaml"
    file.write_text(f"model:\n  num_layers: 12\n{yaml}")
    config, _ = parse_config(config_parser("pretrain", ""), ["--config", str(file), *args])
    return config.drop


@pytest.mark.parametrize("name", get_args(RecipeName))
def test_each_recipe_builds_a_policy_and_names_its_sources(name: RecipeName) -> None:
    settings = recipe_settings(name, 12)
    assert set(settings) <= set(drop_field_names())
    assert all(setting.source for setting in settings.values())
    drop = with_recipe(DropConfig(recipe=name), 12, ())
    if drop.policy == "sbld":
        with pytest.raises(ValueError, match="sensitivity"):
            build_policy(drop, 12, 100)
    else:
        assert build_policy(drop, 12, 100).keep_probs(100).min() > 0


def test_what_is_set_explicitly_wins_also_with_its_default(tmp_path: Path) -> None:
    assert parsed(tmp_path, "drop: {recipe: pld-paper}").theta == 0.5
    assert parsed(tmp_path, f"drop: {{recipe: pld-paper, theta: {default_of('theta')}}}").theta == 0.9
    assert parsed(tmp_path, "drop: {recipe: pld-paper}", "--drop.theta", "0.9").theta == 0.9
    assert parsed(tmp_path, "drop: {recipe: pld-paper}", "--drop.theta=0.9").theta == 0.9
    assert parsed(tmp_path, "drop: {theta: 0.9}", "--drop.recipe", "pld-paper").theta == 0.9
    assert parsed(tmp_path, "drop: {recipe: staged}", "--drop.policy", "none").policy == "none"
    assert parsed(tmp_path, "drop: {recipe: staged}").stages == [[0.8, 1], [1.0, 12]]


def test_a_resolved_config_is_read_as_it_was_written(tmp_path: Path) -> None:
    import dataclasses

    from megatron_sbld.files.strict_yaml import dump_yaml

    drop = parsed(tmp_path, "drop: {recipe: raptr}")
    resolved = dump_yaml({"drop": dataclasses.asdict(drop)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert parsed(tmp_path, resolved) == drop
        parsed(tmp_path, resolved, "--drop.policy", "none")
    with pytest.warns(UserWarning, match=r"'ddd' has no effect: .*leave out drop.depth, drop.schedule, drop.theta"):
        assert parsed(tmp_path, resolved, "--drop.recipe", "ddd").schedule == "steps"


def test_raptr_runs_exactly_as_many_layers_as_its_stage_says() -> None:
    drop = with_recipe(DropConfig(recipe="raptr"), 12, ())
    policy = build_policy(drop, 12, 400)
    for iteration, expected in ((1, 6), (100, 6), (101, 8), (201, 10), (301, 12), (400, 12)):
        plan = draw_plan(
            policy.keep_probs(iteration), 1234, iteration, 64, scope="microbatch", sampler="balanced", stages=1
        )
        assert plan[:, [0, 11]].all()
        assert set(plan.sum(axis=1)) == {expected}
        assert expected == 12 or len(np.unique(plan, axis=0)) > 10
    with pytest.raises(ValueError, match="needs 3 layers"):
        recipe_settings("raptr", 2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"policy": "pld", "depth": "linear"}, "drop.depth = 'linear' does not work with drop.policy = 'pld'"),
        ({"policy": "staged"}, "drop.stages = None is not allowed with drop.policy staged"),
        ({"policy": "pld", "stages": [[0.5, 1], [1.0, 4]], "stage_layers": "sensitivity"}, "stage_layers sensitivity"),
        ({"policy": "pld", "stages": [[0.9, 1], [1.0, 4]], "recovery_fraction": 0.2}, "drop.stages leave layers"),
        (
            {"policy": "staged", "stages": [[0.5, 1], [1.0, 4]], "stage_copy_moments": True},
            "no layer to copy moments from",
        ),
        ({"policy": "layerdrop", "schedule": "steps"}, "drop.steps = None is not allowed"),
        ({"policy": "layerdrop", "schedule": "constant", "steps": [[1.0, 0.5]]}, "drop.steps .* is not used by"),
        ({"policy": "layerdrop", "keep_layers": [5]}, "drop.keep_layers entry = 5"),
        ({"policy": "staged", "stages": [[0.5, 1], [1.0, 4]], "balance_stages": 3}, "it must divide the 4 layers"),
    ],
)
def test_what_does_not_go_together_is_refused_by_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_policy(DropConfig(**fields), 4, 100)


def test_balance_stages_share_out_the_layers_of_stages() -> None:
    drop = DropConfig(policy="staged", stages=[[0.5, 2], [1.0, 4]], stage_layers="first", balance_stages=2)
    assert build_policy(drop, 4, 100).begun_layers(1) == {1, 3}
    assert build_policy(drop, 4, 100, ranks=[[1, 2, 3, 4]]).begun_layers(1) == {1, 3}
