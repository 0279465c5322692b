"""What of the `drop` section is refused, and what is tolerated, before anything is read or built.

Shared by the trainer and by whatever attaches layer dropping to another training program.

What is refused, what is tolerated: a value out of range is refused always. Beyond that, with policy none nothing is
looked at, so that `--drop.policy none` switches any config off, unless granularity is token. Otherwise a setting that
contradicts another or that nothing could use is refused. The settings of other policies (SBLD's fields, and PWEGD's and
PLD's parameters as long as `schedule` is left to the policy) are tolerated with a warning, so that one file can hold
several policies for `--drop.policy` to choose from.
"""

from __future__ import annotations

import warnings
from typing import get_args

from megatron_sbld.checks import check_integer, check_layers
from megatron_sbld.fields import check_fields
from megatron_sbld.method.build_schedule import build_schedule
from megatron_sbld.method.build_tokens import check_tokens
from megatron_sbld.method.choices import ScheduleName
from megatron_sbld.method.combinations import refuse_combinations
from megatron_sbld.method.config import DropConfig, fields_of
from megatron_sbld.method.in_force import (
    POLICY_SCHEDULES,
    changed_fields,
    drop_settings,
    drops,
    drops_tokens,
    named_as_fields,
    schedule_fields,
    schedule_name,
    stages_by_sensitivity,
    unused_fields,
    updates_sensitivity,
)
from megatron_sbld.method.policy import FullDepthPolicy, SBLDPolicy
from megatron_sbld.method.schedule import Constant
from megatron_sbld.method.stages import Stages
from megatron_sbld.sensitivity.lists import layers_of_fraction

_EXCLUSIVE_FIELDS = (
    ("b", "peak_iteration"),
    ("eta", "peak_theta"),
    ("block_layers", "block_fraction"),
    ("allow_layers", "allow_fraction"),
)


def validate_drop(config: DropConfig, num_layers: int, train_iters: int, num_stages: int | None = 1) -> None:
    """Refuse what cannot work, without reading any file; warn of settings that the policy does not use.

    num_layers: L of the whole model.  train_iters: T.
    num_stages: equal pipeline stages, which the balanced sampler balances unless balance_stages is given; None for
        stages that a layout made unequal.
    Raises ValueError naming the field, its value and what is allowed.
    """
    check_integer("num_layers", num_layers, 1)
    check_integer("train_iters", train_iters, 1)
    check_fields(config, "drop.")
    if not drops(config):
        return
    refuse_combinations(drop_settings(config), "drop.{}".format)
    changed = changed_fields(config)
    if drops_tokens(config):
        check_tokens(config, num_layers)
    if config.policy != "none":
        _check_policy(config, changed, num_layers, train_iters, num_stages)
    unused = sorted(changed & unused_fields(config))
    if unused:
        names = ", ".join(f"drop.{name}" for name in unused)
        warnings.warn(f"no effect with {_chosen(config, unused)}: {names}", stacklevel=2)


def _chosen(config: DropConfig, unused: list[str]) -> str:
    """The settings that leave fields without effect."""
    chosen = f"drop.policy {config.policy}"
    if config.policy == "sbld" and not updates_sensitivity(config):
        chosen += f" and drop.sensitivity_update {config.sensitivity_update}"
    if fields_of("token").intersection(unused):
        chosen += f" and drop.granularity {config.granularity}"
    return chosen


def _check_policy(
    config: DropConfig, changed: set[str], num_layers: int, train_iters: int, num_stages: int | None
) -> None:
    """Refuse settings of a policy that do not fit each other."""
    _check_balanced(config, num_layers, num_stages)
    _check_schedule_fields(config, changed)
    for first, second in _EXCLUSIVE_FIELDS:
        if {first, second} <= changed:
            raise ValueError(
                f"drop.{first} = {getattr(config, first)} and drop.{second} = {getattr(config, second)} exclude each "
                "other: set one of them"
            )
    build_schedule(config, train_iters)
    _check_growth(config, num_layers, train_iters)
    with named_as_fields():
        check_layers("keep_layers", config.keep_layers or (), num_layers)
    if config.policy == "sbld":
        _check_sbld(config, num_layers)


def _check_growth(config: DropConfig, num_layers: int, train_iters: int) -> None:
    """Refuse stages that cannot be, without reading any file."""
    if config.stages is None:
        if config.policy == "staged":
            raise ValueError(
                "drop.stages = None is not allowed with drop.policy staged: it must be a list of [share of the "
                f"iterations, number of layers], ending with [1.0, {num_layers}]"
            )
        return
    if stages_by_sensitivity(config) and config.sensitivity is None:
        raise ValueError(
            "drop.sensitivity = None is not allowed with drop.stage_layers sensitivity: it must be the path of a "
            f"sensitivity file for {num_layers} layers (`megatron-sbld sensitivity measure` makes one)"
        )
    any_sensitivity = [0.0] * num_layers
    with named_as_fields():
        stages = Stages.resolve(
            config.stages, num_layers, train_iters, config.stage_layers, sensitivity=any_sensitivity
        )
        FullDepthPolicy(num_layers, recovery_fraction=config.recovery_fraction, train_iters=train_iters, stages=stages)


def _check_balanced(config: DropConfig, num_layers: int, num_stages: int | None) -> None:
    name, stages = "drop.balance_stages", config.balance_stages
    if stages is None and config.sampler == "balanced":
        name, stages = "pipeline stages", num_stages
    if stages is not None and num_layers % stages:
        raise ValueError(f"{name} = {stages} is not allowed: it must divide the {num_layers} layers")


def _check_schedule_fields(config: DropConfig, changed: set[str]) -> None:
    """Refuse parameters of another schedule, unless they may belong to another policy that takes its own schedule."""
    name = schedule_name(config)
    useful = fields_of(name)
    if config.schedule is None:
        useful = useful.union(*(fields_of(own) for own in POLICY_SCHEDULES.values()))
    for field in sorted(changed & schedule_fields() - useful):
        owners = " or ".join(owner for owner in get_args(ScheduleName) if field in fields_of(owner))
        raise ValueError(
            f"drop.{field} = {getattr(config, field)} is not used by drop.schedule {name}: leave it out, or set "
            f"drop.schedule to {owners}"
        )


def _check_sbld(config: DropConfig, num_layers: int) -> None:
    if config.sensitivity is None:
        raise ValueError(
            "drop.sensitivity = None is not allowed with drop.policy sbld: it must be the path of a sensitivity file "
            f"for {num_layers} layers (`megatron-sbld sensitivity measure` measures one)"
        )
    if config.theta_min > config.theta_max:
        raise ValueError(f"drop.theta_min = {config.theta_min} is not allowed: above drop.theta_max {config.theta_max}")
    with named_as_fields():
        block = check_layers("block_layers", () if config.block_layers is None else config.block_layers, num_layers)
        allow = check_layers("allow_layers", () if config.allow_layers is None else config.allow_layers, num_layers)
        # The policy's own check of the lists, before any file is read.
        keep = config.keep_layers or ()
        SBLDPolicy(Constant(1.0), [0.0] * num_layers, block_layers=block, allow_layers=allow, keep_layers=keep)
    _check_list_sizes(config, num_layers)


def _check_list_sizes(config: DropConfig, num_layers: int) -> None:
    """Refuse lists or fractions that ask for more layers than there are, or leave none to drop.

    The default fraction beside a list that the user gave asks for nothing: it takes what the list leaves.
    """
    sizes, names = {}, {}
    for kind in ("block", "allow"):
        layers, fraction = getattr(config, f"{kind}_layers"), getattr(config, f"{kind}_fraction")
        names[kind] = f"drop.{kind}_fraction = {fraction}" if layers is None else f"drop.{kind}_layers = {layers}"
        sizes[kind] = layers_of_fraction(fraction, num_layers) if layers is None else len(layers)
    if sizes["block"] == num_layers:
        raise ValueError(
            f"{names['block']} is not allowed: it blocks all {num_layers} layers, and nothing would be dropped; "
            "use policy none"
        )
    if sizes["block"] + sizes["allow"] > num_layers and changed_fields(config) & {"block_fraction", "allow_fraction"}:
        raise ValueError(
            f"{names['block']} and {names['allow']} ask for {sizes['block']} and {sizes['allow']} of {num_layers} "
            "layers: together they may have each layer once"
        )
