"""The policy that the `drop` section stands for. Formulas are in policy.py and schedule.py; this chooses them.

Shared by the trainer and by whatever attaches layer dropping to another training program.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_sbld.method.build_schedule import build_schedule
from megatron_sbld.method.config import DropConfig
from megatron_sbld.method.in_force import (
    SCHEDULED_POLICIES,
    changed_fields,
    drop_settings,
    drops,
    named_as_fields,
    stages_by_sensitivity,
    updates_sensitivity,
)
from megatron_sbld.method.policy import FullDepthPolicy, Policy, SBLDPolicy, StagedPolicy
from megatron_sbld.method.stages import Stages
from megatron_sbld.method.validate import validate_drop
from megatron_sbld.sensitivity.file import SensitivityFile
from megatron_sbld.sensitivity.lists import choose_lists

_LIST_FIELDS = {"block_layers", "block_fraction", "allow_layers", "allow_fraction"}
# Settings that change what leaving a layer out costs, so that gaps measured with another one may rank differently.
_MEASURED_FIELDS = ("decision_scope", "granularity", "residual_scale", "dropped_update")


def build_policy(
    config: DropConfig,
    num_layers: int,
    train_iters: int,
    base_dir: str | os.PathLike[str] | None = None,
    ranks: Sequence[Sequence[int]] | None = None,
) -> Policy:
    """The policy of the section for a model of L layers and a run of T iterations.

    base_dir: folder that a relative path of the sensitivity file starts from; None is the working directory.
    ranks: layers (1-based) of each pipeline rank, which share out those of drop.stages unless balance_stages is given;
        None is one rank.
    Raises ValueError naming the field, also for a sensitivity file that cannot be used.
    """
    validate_drop(config, num_layers, train_iters)
    if not drops(config):
        return FullDepthPolicy(num_layers)
    if config.policy == "none":
        return FullDepthPolicy(num_layers, recovery_fraction=config.recovery_fraction, train_iters=train_iters)
    schedule = build_schedule(config, train_iters)
    common: dict[str, Any] = {
        "residual_scale": config.residual_scale,
        "recovery_fraction": config.recovery_fraction,
        "train_iters": train_iters,
        "keep_layers": config.keep_layers or (),
    }
    measured = None
    if config.policy == "sbld" or stages_by_sensitivity(config):
        measured = _load_sensitivity(config, num_layers, base_dir)
    if config.stages is not None:
        common["stages"] = _resolve_stages(config, num_layers, train_iters, ranks, measured)
    if config.policy == "staged":
        return StagedPolicy(common.pop("stages"), num_layers, **common)
    if config.policy == "layerdrop":
        common["depth"] = config.depth
    if config.policy in SCHEDULED_POLICIES:
        with named_as_fields():
            return SCHEDULED_POLICIES[config.policy](schedule, num_layers, **common)
    assert measured is not None, "SBLD has read its file"
    dynamic = updates_sensitivity(config)
    with named_as_fields():
        block, allow = _choose_layers(config, measured)
        return SBLDPolicy(
            schedule,
            measured.sensitivity,
            alpha=config.alpha,
            beta=config.beta,
            theta_min=config.theta_min,
            theta_max=config.theta_max,
            block_layers=block,
            allow_layers=allow,
            allow_keep_prob=config.allow_keep_prob,
            exploration=config.exploration if dynamic else 0.0,
            explore_block=dynamic and config.release_block,
            **common,
        )


def _resolve_stages(
    config: DropConfig,
    num_layers: int,
    train_iters: int,
    ranks: Sequence[Sequence[int]] | None,
    measured: SensitivityFile | None,
) -> Stages:
    assert config.stages is not None, "asked for with stages alone"
    if config.balance_stages is not None:
        size = num_layers // config.balance_stages
        ranks = [range(first, first + size) for first in range(1, num_layers + 1, size)]
    sensitivity = None if measured is None else measured.sensitivity
    with named_as_fields():
        return Stages.resolve(
            config.stages, num_layers, train_iters, config.stage_layers, ranks=ranks, sensitivity=sensitivity
        )


def _load_sensitivity(config: DropConfig, num_layers: int, base_dir: str | os.PathLike[str] | None) -> SensitivityFile:
    assert config.sensitivity is not None, "validate_drop refuses sbld without a sensitivity file"
    path = Path(base_dir or ".") / config.sensitivity
    try:
        measured = SensitivityFile.load(path)
    except ValueError as error:
        raise ValueError(f"drop.sensitivity = {config.sensitivity!r} is not allowed: {error}") from error
    _warn_of_other_settings(config, measured)
    if measured.num_layers == num_layers:
        return measured
    if not config.interpolate:
        raise ValueError(
            f"drop.sensitivity = {config.sensitivity!r} is for {measured.num_layers} layers, but the model has "
            f"{num_layers}: measure one for this depth (`megatron-sbld sensitivity measure`), or set drop.interpolate "
            "true"
        )
    try:
        fitting = measured.interpolated(num_layers)
    except ValueError as error:
        raise ValueError(f"drop.interpolate = True is not allowed for {num_layers} layers: {error}") from error
    warnings.warn(
        f"the gaps in {config.sensitivity} are interpolated from {measured.num_layers} to {num_layers} layers "
        "(drop.interpolate): a guess, until they are measured at this depth",
        stacklevel=3,
    )
    return fitting


def _warn_of_other_settings(config: DropConfig, measured: SensitivityFile) -> None:
    in_force = drop_settings(config)
    ours = {name: in_force[name] for name in _MEASURED_FIELDS}
    for name, value in measured.measured_otherwise(ours).items():
        warnings.warn(
            f"{config.sensitivity} was measured with {name} {value}, but drop.{name} is {ours[name]}: its gaps may "
            "rank the layers differently",
            stacklevel=4,
        )


def _choose_layers(config: DropConfig, measured: SensitivityFile) -> tuple[set[int], set[int]]:
    """Block and Allow: the user's lists, else the rule, which leaves out what the user put into the other list."""
    by_rule = choose_lists(
        measured.gap,
        measured.gap_stderr,
        0.0 if config.block_layers is not None else config.block_fraction,
        0.0 if config.allow_layers is not None else config.allow_fraction,
    )
    lists_are_default = not changed_fields(config) & _LIST_FIELDS
    if lists_are_default and by_rule != (measured.block, measured.allow):
        warnings.warn(
            f"the lists in {config.sensitivity} (block {list(measured.block)}, allow {list(measured.allow)}) are not "
            f"used: drop.block_fraction and drop.allow_fraction give {list(by_rule[0])} and {list(by_rule[1])}; "
            "for others, set drop.block_layers and drop.allow_layers",
            stacklevel=3,
        )
    block = set(by_rule[0] if config.block_layers is None else config.block_layers)
    allow = set(by_rule[1] if config.allow_layers is None else config.allow_layers)
    if config.allow_layers is None:
        allow -= block | set(config.keep_layers or ())
    if config.block_layers is None:
        block -= allow
    return block, allow
