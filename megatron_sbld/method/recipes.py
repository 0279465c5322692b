"""Recipes: the settings of published ways to drop layers, each with its source, for `drop.recipe`.

A recipe fills the fields of the drop section that the user did not set. Sources are those of docs/method.md.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, get_args

from megatron_sbld.checks import check_choice, check_integer
from megatron_sbld.method.choices import RecipeName
from megatron_sbld.method.config import DropConfig


@dataclass(frozen=True)
class Setting:
    """A value that a recipe gives a field, and where it is from."""

    value: Any
    source: str


def recipe_settings(name: RecipeName, num_layers: int) -> dict[str, Setting]:
    """What a recipe sets for a model of L layers, by field of the drop section.

    Raises ValueError for an unknown name, or fewer layers than the recipe needs.
    """
    check_choice("drop.recipe", name, get_args(RecipeName))
    return _RECIPES[name](check_integer("num_layers", num_layers, 1))


def with_recipe(config: DropConfig, num_layers: int, explicit: Collection[str]) -> DropConfig:
    """The section with what its recipe says of the fields that are not `explicit`; the section itself without a recipe.

    explicit: names of the fields that the user set, also to their defaults.
    Raises ValueError as recipe_settings does.
    """
    if config.recipe is None:
        return config
    settings = recipe_settings(config.recipe, num_layers)
    others = [field for field, setting in settings.items() if getattr(config, field) != setting.value]
    if settings.keys() <= set(explicit) and 2 * len(others) >= len(settings):
        warnings.warn(
            f"drop.recipe = {config.recipe!r} has no effect: all of its fields are set explicitly, and most of them "
            "otherwise, as in the config.yaml of another run; leave out "
            + ", ".join(f"drop.{field}" for field in others),
            stacklevel=2,
        )
    return dataclasses.replace(
        config, **{field: setting.value for field, setting in settings.items() if field not in explicit}
    )


def _sbld_paper(num_layers: int) -> dict[str, Setting]:
    return {
        "policy": Setting("sbld", "SBLD"),
        "schedule": Setting("pwegd", "SBLD, Eq. 3"),
        "theta": Setting(0.9, "SBLD, Table 4: its best LAMBADA accuracy; Tables 1 and 2 have 0.7 and 0.5 too"),
        "allow_keep_prob": Setting(0.4, "SBLD, Algorithm 1"),
        "residual_scale": Setting("none", "SBLD, Algorithm 2"),
        "decision_scope": Setting("iteration", "SBLD, Algorithm 2"),
    }


def _pld_paper(num_layers: int) -> dict[str, Setting]:
    return {
        "policy": Setting("pld", "PLD"),
        "schedule": Setting("exponential", "PLD, section 4: gamma is 100 / T, the default here"),
        "theta": Setting(0.5, "PLD: keep ratio of its BERT runs"),
        "residual_scale": Setting("inverse_keep_prob", "PLD"),
        "decision_scope": Setting("iteration", "PLD"),
    }


def _raptr(num_layers: int) -> dict[str, Setting]:
    if num_layers < 3:
        raise ValueError(
            f"drop.recipe = 'raptr' needs 3 layers: the first and the last always run, and the model has {num_layers}"
        )
    others = num_layers - 2
    kept = [max(round(num_layers * share) - 2, 0) for share in (1 / 2, 2 / 3, 5 / 6)]
    steps = [[0.25 * (stage + 1), max(count, 1) / others] for stage, count in enumerate(kept)]
    return {
        "policy": Setting("layerdrop", "RaPTr: all others are chosen alike"),
        "schedule": Setting("steps", "RaPTr"),
        "steps": Setting(
            [*steps, [1.0, 1.0]], "RaPTr: 12, 16, 20, 24 of 24 layers, here by share; stages of equal length are ours"
        ),
        "keep_layers": Setting([1, num_layers], "RaPTr: the first and the last layer always run"),
        "sampler": Setting("balanced", "RaPTr: exactly as many layers as the stage says"),
        "balance_stages": Setting(1, "RaPTr: over the whole depth"),
        "residual_scale": Setting("none", "RaPTr"),
    }


def _ddd(num_layers: int) -> dict[str, Setting]:
    return {
        "policy": Setting("layerdrop", "DDD"),
        "depth": Setting("linear", "DDD: a distribution over depth; linear is ours"),
        "schedule": Setting("plateau", "DDD: a decreasing rate, then full depth"),
        "theta": Setting(0.8, "DDD's public port: a rate of 0.2"),
        "hold_until": Setting(0.31, "DDD's public port: 400 of 1,300 iterations"),
        "decay_until": Setting(0.385, "DDD's public port: 500 of 1,300 iterations"),
        "residual_scale": Setting("inverse_keep_prob", "DDD"),
    }


def _staged(num_layers: int) -> dict[str, Setting]:
    return {
        "policy": Setting("staged", "arXiv 2511.04981"),
        "stages": Setting(
            [[0.8, 1], [1.0, num_layers]], "arXiv 2511.04981: one layer until 80 % of the iterations, then all at once"
        ),
        "stage_layers": Setting("first", "arXiv 2511.04981"),
        "stage_init": Setting("random", "arXiv 2511.04981: random or copied"),
    }


def _random_ltd(num_layers: int) -> dict[str, Setting]:
    if num_layers < 3:
        raise ValueError(
            f"drop.recipe = 'random-ltd' needs 3 layers: the first and the last run all tokens, and the model has "
            f"{num_layers}"
        )
    return {
        "policy": Setting("none", "random-LTD: no layer is dropped"),
        "granularity": Setting("token", "random-LTD"),
        "token_layers": Setting(None, "random-LTD: all but the first and the last layer, which null stands for"),
        "token_schedule": Setting("linear", "random-LTD, section 5: linear, until no token is dropped"),
        "min_tokens": Setting(None, "random-LTD: 128 of GPT-3's 2,048 tokens, 1/16, which null stands for"),
        "token_step": Setting(16, "DeepSpeed's configuration of GPT-3 1.3B: 16"),
        "token_iterations": Setting(None, "random-LTD: about 70 % of the iterations, which null stands for"),
    }


_RECIPES: dict[RecipeName, Callable[[int], dict[str, Setting]]] = {
    "sbld-paper": _sbld_paper,
    "pld-paper": _pld_paper,
    "raptr": _raptr,
    "ddd": _ddd,
    "staged": _staged,
    "random-ltd": _random_ltd,
}
