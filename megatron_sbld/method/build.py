"""The `drop` section of a config as a whole: what its fields mean together, and the policy that they stand for.

Shared by the trainer and by whatever attaches layer dropping to another training program. Formulas are in policy.py and
schedule.py; this module only chooses and checks them.

What is refused, what is tolerated: a value out of range is refused always. Beyond that, with policy none nothing is
looked at, so that `--drop.policy none` switches any config off. With another policy, a setting that contradicts another
or that nothing could use is refused. The settings of other policies (SBLD's fields, and PWEGD's and PLD's parameters as
long as `schedule` is left to the policy) are tolerated with a warning, so that one file can hold several policies for
`--drop.policy` to choose from.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_sbld.checks import check_integer, check_layers
from megatron_sbld.method.config import DropConfig, ScheduleName, check_ranges, default_of, drop_field_names
from megatron_sbld.method.decisions import replicas_run_alike
from megatron_sbld.method.policy import (
    FullDepthPolicy,
    LayerDropPolicy,
    PLDPolicy,
    Policy,
    SBLDPolicy,
    StochasticDepthPolicy,
)
from megatron_sbld.method.schedule import (
    PWEGD,
    Constant,
    Exponential,
    Linear,
    Polynomial,
    Schedule,
    amplitude_for_peak,
    scale_for_peak,
)
from megatron_sbld.sensitivity.file import SensitivityFile
from megatron_sbld.sensitivity.lists import choose_lists, layers_of_fraction

_POLICY_SCHEDULES: dict[str, ScheduleName] = {
    "sbld": "pwegd",
    "pld": "exponential",
    "layerdrop": "constant",
    "stochastic_depth": "constant",
}
_SCHEDULE_FIELDS: dict[str, set[str]] = {
    "pwegd": {"a", "b", "c", "epsilon", "eta", "peak_iteration", "peak_theta"},
    "exponential": {"gamma"},
    "linear": {"start_theta", "duration"},
    "polynomial": {"start_theta", "duration", "power"},
    "constant": set(),
}
_LIST_FIELDS = {"block_layers", "block_fraction", "allow_layers", "allow_fraction"}
_SBLD_FIELDS = {
    *("alpha", "beta", "theta_min", "theta_max", "allow_keep_prob"),
    *("sensitivity", "interpolate", "sensitivity_update"),
    *_LIST_FIELDS,
}
_DYNAMIC_FIELDS = {"update_interval", "update_memory", "exploration", "release_block"}
_EXCLUSIVE_FIELDS = (
    ("b", "peak_iteration"),
    ("eta", "peak_theta"),
    ("block_layers", "block_fraction"),
    ("allow_layers", "allow_fraction"),
)
# Settings that change what leaving a layer out costs, so that gaps measured with another one may rank differently.
_MEASURED_FIELDS = ("decision_scope", "granularity", "residual_scale", "dropped_update")
_DEFAULT_PEAK_FRACTION = 0.1
_PLD_DECAYS = 100.0


def validate_drop(config: DropConfig, num_layers: int, train_iters: int, num_stages: int | None = 1) -> None:
    """Refuse what cannot work, without reading any file; warn of settings that the policy does not use.

    num_layers: L of the whole model.  train_iters: T.
    num_stages: equal pipeline stages, which the balanced sampler balances unless balance_stages is given; None for
        stages that a layout made unequal.
    Raises ValueError naming the field, its value and what is allowed.
    """
    check_integer("num_layers", num_layers, 1)
    check_integer("train_iters", train_iters, 1)
    check_ranges(config)
    if config.policy == "none":
        return
    changed = _changed_fields(config)
    _check_sampler(config, num_layers, num_stages)
    _check_schedule_fields(config, changed)
    for first, second in _EXCLUSIVE_FIELDS:
        if {first, second} <= changed:
            raise ValueError(
                f"drop.{first} = {getattr(config, first)} and drop.{second} = {getattr(config, second)} exclude each "
                "other: set one of them"
            )
    build_schedule(config, train_iters)
    if config.policy == "sbld":
        _check_sbld(config, num_layers)
    if updates_sensitivity(config) and config.granularity == "sample":
        raise ValueError(
            "drop.granularity = 'sample' does not work with drop.sensitivity_update dynamic: a layer runs nearly the "
            "same share of every microbatch, so that losses say nothing about it; use layer"
        )
    if updates_sensitivity(config) and config.replicas == "distinct":
        raise ValueError(
            "drop.replicas = 'distinct' does not work with drop.sensitivity_update dynamic: the loss is a mean over "
            "replicas, which took different decisions; use shared"
        )
    if config.dropped_update == "freeze" and not replicas_run_alike(config.replicas, config.granularity):
        raise ValueError(
            "drop.replicas = 'distinct' does not work with drop.dropped_update freeze: whether every replica dropped a "
            "layer is known to none of them; use shared or apply"
        )
    unused = sorted(changed & _unused_fields(config))
    if unused:
        names = ", ".join(f"drop.{name}" for name in unused)
        chosen = f"drop.policy {config.policy}"
        if config.policy == "sbld" and not updates_sensitivity(config):
            chosen += f" and drop.sensitivity_update {config.sensitivity_update}"
        warnings.warn(f"no effect with {chosen}: {names}", stacklevel=2)


def updates_sensitivity(config: DropConfig) -> bool:
    """Whether the section asks for an estimate of the sensitivity while the model trains."""
    return config.policy == "sbld" and config.sensitivity_update == "dynamic"


def build_schedule(config: DropConfig, train_iters: int) -> Schedule:
    """theta(t) of the section for a run of T iterations; what is None takes the defaults of docs/method.md 1 and 4.

    Raises ValueError naming the field.
    """
    name = _schedule_name(config)
    duration = train_iters if config.duration is None else config.duration
    with _named_as_fields():
        if name == "pwegd":
            return _build_pwegd(config, train_iters)
        if name == "exponential":
            return Exponential(config.theta, _PLD_DECAYS / train_iters if config.gamma is None else config.gamma)
        if name == "linear":
            return Linear(config.start_theta, config.theta, duration)
        if name == "polynomial":
            return Polynomial(config.start_theta, config.theta, duration, config.power)
        return Constant(config.theta)


_SCHEDULED: dict[str, type[PLDPolicy | LayerDropPolicy | StochasticDepthPolicy]] = {
    "pld": PLDPolicy,
    "layerdrop": LayerDropPolicy,
    "stochastic_depth": StochasticDepthPolicy,
}  # a schedule is all that they need


def scales_residual(config: DropConfig) -> bool:
    """Whether kept layers' branches are scaled, by what the section says or by the policy's own rule."""
    if config.policy == "none":
        return False
    own_rule = _SCHEDULED.get(config.policy, SBLDPolicy).default_residual_scale
    return (config.residual_scale or own_rule) != "none"


def build_policy(
    config: DropConfig, num_layers: int, train_iters: int, base_dir: str | os.PathLike[str] | None = None
) -> Policy:
    """The policy of the section for a model of L layers and a run of T iterations.

    base_dir: folder that a relative path of the sensitivity file starts from; None is the working directory.
    Raises ValueError naming the field, also for a sensitivity file that cannot be used.
    """
    validate_drop(config, num_layers, train_iters)
    if config.policy == "none":
        return FullDepthPolicy(num_layers)
    schedule = build_schedule(config, train_iters)
    common: dict[str, Any] = {
        "residual_scale": config.residual_scale,
        "recovery_fraction": config.recovery_fraction,
        "train_iters": train_iters,
    }
    if config.policy in _SCHEDULED:
        return _SCHEDULED[config.policy](schedule, num_layers, **common)
    measured = _load_sensitivity(config, num_layers, base_dir)
    dynamic = updates_sensitivity(config)
    with _named_as_fields():
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


def _check_sampler(config: DropConfig, num_layers: int, num_stages: int | None) -> None:
    if config.sampler == "balanced":
        name = "pipeline stages" if config.balance_stages is None else "drop.balance_stages"
        stages = num_stages if config.balance_stages is None else config.balance_stages
        if stages is not None and num_layers % stages:
            raise ValueError(f"{name} = {stages} is not allowed: it must divide the {num_layers} layers")
        return
    if config.balance_stages is not None:
        raise ValueError(f"drop.balance_stages = {config.balance_stages} needs drop.sampler balanced")
    if not replicas_run_alike(config.replicas, config.granularity):
        raise ValueError(
            "drop.replicas = 'distinct' needs drop.sampler balanced, or replicas would wait for each other"
        )


def _check_schedule_fields(config: DropConfig, changed: set[str]) -> None:
    """Refuse parameters of another schedule, unless they may belong to another policy that takes its own schedule."""
    name = _schedule_name(config)
    useful = set(_SCHEDULE_FIELDS[name])
    if config.schedule is None:
        useful = useful.union(*(_SCHEDULE_FIELDS[own] for own in _POLICY_SCHEDULES.values()))
    for field in sorted(changed & set().union(*_SCHEDULE_FIELDS.values()) - useful):
        owners = " or ".join(owner for owner, fields in _SCHEDULE_FIELDS.items() if field in fields)
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
    with _named_as_fields():
        block = check_layers("block_layers", () if config.block_layers is None else config.block_layers, num_layers)
        allow = check_layers("allow_layers", () if config.allow_layers is None else config.allow_layers, num_layers)
        # The policy's own check of the lists, before any file is read.
        SBLDPolicy(Constant(1.0), [0.0] * num_layers, block_layers=block, allow_layers=allow)
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
    if sizes["block"] + sizes["allow"] > num_layers and _changed_fields(config) & {"block_fraction", "allow_fraction"}:
        raise ValueError(
            f"{names['block']} and {names['allow']} ask for {sizes['block']} and {sizes['allow']} of {num_layers} "
            "layers: together they may have each layer once"
        )


def _build_pwegd(config: DropConfig, train_iters: int) -> PWEGD:
    shape = config.a + config.c
    if shape < 1.0:
        raise ValueError(f"a + drop.c = {shape} is not allowed: below 1 the schedule is infinite at epsilon")
    if config.b is not None:
        b = config.b
    elif shape == 1.0:
        raise ValueError("b = None is not allowed with a + c = 1: such a schedule peaks at epsilon whatever b is")
    else:
        peak = _DEFAULT_PEAK_FRACTION * train_iters if config.peak_iteration is None else config.peak_iteration
        b = scale_for_peak(peak, shape, config.epsilon)
    if config.eta is not None:
        eta = config.eta
    else:
        peak_theta = config.theta + (1.0 - config.theta) / 2.0 if config.peak_theta is None else config.peak_theta
        eta = amplitude_for_peak(peak_theta, config.theta, shape, b)
    return PWEGD(theta=config.theta, a=config.a, b=b, c=config.c, epsilon=config.epsilon, eta=eta)


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
    ours = {name: getattr(config, name) for name in _MEASURED_FIELDS}
    # None stands for the policy's own.
    ours["residual_scale"] = ours["residual_scale"] or SBLDPolicy.default_residual_scale
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
    lists_are_default = not _changed_fields(config) & _LIST_FIELDS
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
        allow -= block
    if config.block_layers is None:
        block -= allow
    return block, allow


def _schedule_name(config: DropConfig) -> ScheduleName:
    return config.schedule or _POLICY_SCHEDULES.get(config.policy, "constant")


def _changed_fields(config: DropConfig) -> set[str]:
    """Fields that differ from their defaults."""
    return {name for name in drop_field_names() if getattr(config, name) != default_of(name)}


def _unused_fields(config: DropConfig) -> set[str]:
    """Fields of other policies and schedules than the section's."""
    unused = set().union(*_SCHEDULE_FIELDS.values()) - _SCHEDULE_FIELDS[_schedule_name(config)]
    if not updates_sensitivity(config):
        unused |= _DYNAMIC_FIELDS
    return unused if config.policy == "sbld" else unused | _SBLD_FIELDS


@contextlib.contextmanager
def _named_as_fields() -> Iterator[None]:
    """Errors of schedules and policies begin with the argument's name, which is the field's: name the section too."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"drop.{error}") from error
