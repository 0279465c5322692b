"""What `megatron-sbld schedule show` does: the keep probabilities that a config stands for, as tables and as a plot."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_sbld.config.flops import attention_share
from megatron_sbld.config.sections import Config
from megatron_sbld.config.stages import placement_of
from megatron_sbld.config.tokens import tokens_of
from megatron_sbld.config.validate import train_iterations, validate
from megatron_sbld.files.outputs import refuse_inputs
from megatron_sbld.forecast.drops import Forecast, forecast, forecast_text
from megatron_sbld.forecast.stages import StageForecast, stage_forecast, stage_forecast_text
from megatron_sbld.layout.placement import layer_ranges
from megatron_sbld.method.build import build_policy
from megatron_sbld.method.config import DropConfig
from megatron_sbld.method.in_force import drops
from megatron_sbld.method.policy import Policy, SBLDPolicy
from megatron_sbld.method.recipes import recipe_settings
from megatron_sbld.method.stages import Stages
from megatron_sbld.method.work import Work
from megatron_sbld.report.schedule_plots import plot_schedule
from megatron_sbld.report.summary import layers_share


@dataclass(frozen=True)
class LayerTable:
    """keep_prob of every layer at a few iterations."""

    iterations: list[int]
    theta: list[float | None]
    """theta(t), None where the recovery or the policy ignores it."""
    keep_probs: NDArray[np.float64]
    """[iterations, L]"""
    tokens: list[int] | None
    """How many tokens of a sample the layers that drop tokens run; None unless some do."""
    token_layers: tuple[int, ...]
    listed: list[str]
    """Block, Allow, Keep (drop.keep_layers) or nothing, by layer."""
    begins: list[int] | None
    """First iteration of each layer; None without stages."""


def show_schedule(
    config: Config, out: str | None = None, config_files: Sequence[str] = (), explicit: Collection[str] = ()
) -> Forecast:
    """Prints the forecast and the layers' keep probabilities of a config; nothing is trained and no data is read.

    Args:
        config: as for `pretrain`; data may be missing, and any number of processes is assumed that fits.
        out: folder for schedule.png and schedule.json. None writes nothing.
        config_files: what the config was read from, which is not overwritten.
        explicit: fields of the drop section that were set, and win over its recipe.

    Raises:
        ValueError: a mistake in the config or the sensitivity file, or policy none, which has no schedule.
    """
    validate(config, None, trains=False)
    if out is not None:
        files = [Path(out) / name for name in ("schedule.png", "schedule.json")]
        refuse_inputs("--out", files, [*config_files, config.drop.sensitivity, config.data.tokenizer])
    if not drops(config.drop):
        raise ValueError(
            "drop.policy = 'none' is not allowed: it drops nothing and has no schedule; "
            "choose sbld, pld, layerdrop, stochastic_depth or staged, or set drop.granularity to token"
        )
    train_iters = train_iterations(config)
    policy = build_policy(config.drop, config.model.num_layers, train_iters, ranks=placement_of(config).stages)
    phi = layers_share(config)
    work = Work(policy, tokens_of(config, train_iters), attention_share(config.model))
    outlook = forecast(policy, train_iters, phi, work)
    stages = stage_forecast(config, policy, outlook, phi, work=work)
    table = layer_table(policy, outlook, work)
    print(f"policy {config.drop.policy}, {policy.num_layers} layers, {train_iters} iterations\n")
    if config.drop.recipe is not None:
        print(recipe_text(config.drop, policy.num_layers, explicit), end="\n\n")
    print(forecast_text(outlook), _share_text(phi, config.data.tokenizer), sep="\n", end="\n\n")
    if stages is not None:
        print(stage_forecast_text(stages), end="\n\n")
    print(layer_table_text(table))
    if out is not None:
        folder = Path(out)
        folder.mkdir(parents=True, exist_ok=True)
        plot_schedule(policy, train_iters, f"{config.drop.policy}: {_mean_text(outlook)}", folder / "schedule.png")
        _write_json(config, phi, outlook, stages, table, folder / "schedule.json")
        print(f"\nsaved {folder / 'schedule.png'}\nsaved {folder / 'schedule.json'}")
    return outlook


def recipe_text(drop: DropConfig, num_layers: int, explicit: Collection[str]) -> str:
    """What the recipe says of each field, what is in force, and where that came from."""
    assert drop.recipe is not None, "asked for with a recipe alone"
    lines = [f"recipe {drop.recipe}:"]
    for field, setting in recipe_settings(drop.recipe, num_layers).items():
        source = setting.source
        if field in explicit:
            source = f"set explicitly (the recipe has {setting.value})"
        lines.append(f"  {field + ':':<18}{getattr(drop, field)!s:<33} {source}")
    return "\n".join(lines)


def layer_table(policy: Policy, outlook: Forecast, work: Work | None = None) -> LayerTable:
    """The layers at the first iteration, the peak, and the end of each phase."""
    work = work or Work(policy)
    ends = [phase.last for phase in outlook.phases]
    peak = [] if outlook.peak is None else [outlook.peak.first]
    iterations = sorted({1, *peak, *ends})
    recovers = [iteration >= policy.first_recovery_iteration for iteration in iterations]
    listed = ["Keep" if layer in policy.keep_layers else "" for layer in range(1, policy.num_layers + 1)]
    if isinstance(policy, SBLDPolicy):
        for name, layers in (("Block", policy.block_layers), ("Allow", policy.allow_layers)):
            for layer in layers:
                listed[layer - 1] = name
    return LayerTable(
        iterations=iterations,
        theta=[
            None if full or not policy.uses_theta else policy.theta(i)
            for i, full in zip(iterations, recovers, strict=True)
        ],
        keep_probs=np.array([policy.keep_probs(iteration) for iteration in iterations]),
        tokens=None if work.tokens is None else [int(work.num_tokens(iteration) or 0) for iteration in iterations],
        token_layers=() if work.tokens is None else work.tokens.layers,
        listed=listed,
        begins=None if policy.stages is None else _first_iterations(policy.stages),
    )


def _first_iterations(stages: Stages) -> list[int]:
    starts = [1, *(end + 1 for end in stages.ends[:-1])]
    begun = [stages.begun(start) for start in starts]
    return [
        next(start for start, layers in zip(starts, begun, strict=True) if layer in layers)
        for layer in range(1, stages.num_layers + 1)
    ]


def layer_table_text(table: LayerTable) -> str:
    """The table of layers as plain text: a line for each layer, a column for each iteration.

    Of layers that begin in stages the first iteration is told too.
    """
    wide = 0 if table.begins is None else 9
    begins = [""] * len(table.listed) if table.begins is None else [f"{first:>{wide}}" for first in table.begins]
    header = "" if table.begins is None else f"{'begins':>{wide}}"
    lines = [f"{'iteration':<17}{header}" + "".join(f"{iteration:>9}" for iteration in table.iterations)]
    if any(theta is not None for theta in table.theta):
        thetas = "".join("        -" if theta is None else f"{theta:9.3f}" for theta in table.theta)
        lines.append(f"{'theta':<17}" + " " * wide + thetas)
    if table.tokens is not None:
        lines.append(f"{'tokens':<17}" + " " * wide + "".join(f"{tokens:>9}" for tokens in table.tokens))
        lines.append(f"{'':<17}" + " " * wide + f"of layers {layer_ranges(table.token_layers)}; the others run all")
    means = "".join(f"{mean:9.3f}" for mean in table.keep_probs.mean(axis=1))
    lines.append(f"{'mean keep_prob':<17}" + " " * wide + means)
    for layer, (listed, begin, keep_probs) in enumerate(
        zip(table.listed, begins, table.keep_probs.T, strict=True), start=1
    ):
        values = "".join(f"{keep_prob:9.3f}" for keep_prob in keep_probs)
        lines.append(f"{f'layer {layer}':<11}{listed:<6}{begin}{values}")
    return "\n".join(lines)


def _mean_text(outlook: Forecast) -> str:
    return f"mean keep_prob {outlook.total.mean_keep_prob:.3f} over {outlook.total.last} iterations"


def _share_text(phi: float | None, tokenizer: str) -> str:
    if phi is None:
        return f"gains are not known, since data.tokenizer = {tokenizer!r} is not found here"
    return f"the layers are {phi:.1%} of an iteration's FLOPs"


def _write_json(
    config: Config,
    phi: float | None,
    outlook: Forecast,
    stages: StageForecast | None,
    table: LayerTable,
    file: Path,
) -> None:
    content: dict[str, Any] = {
        "model": {"num_layers": config.model.num_layers},
        "drop": dataclasses.asdict(config.drop),
        "layers_share": phi,
        "forecast": dataclasses.asdict(outlook),
        "stages": None if stages is None else dataclasses.asdict(stages),
        "layers": {**dataclasses.asdict(table), "keep_probs": table.keep_probs.tolist()},
    }
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
