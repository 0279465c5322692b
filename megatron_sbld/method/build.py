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
from typing import Any, get_args

from megatron_sbld.checks import check_integer, check_layers
from megatron_sbld.fields import check_fields
from megatron_sbld.method.choices import PolicyName, ResidualScale, ScheduleName
from megatron_sbld.method.combinations import refuse_combinations
from megatron_sbld.method.config import DropConfig, default_of, drop_field_names, fields_of
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

_POLICY_SCHEDULES: dict[PolicyName, ScheduleName] = {
    "sbld": "pwegd",
    "pld": "exponential",
    "layerdrop": "constant",
    "stochastic_depth": "constant",
}
"""What schedule: null stands for."""
_LIST_FIELDS = {"block_layers", "block_fraction", "allow_layers", "allow_fraction"}
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
    check_fields(config, "drop.")
    if config.policy == "none":
        return
    refuse_combinations(drop_settings(config), "drop.{}".format)
    changed = _changed_fields(config)
    _check_stages(config, num_layers, num_stages)
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
    unused = sorted(changed & _unused_fields(config))
    if unused:
        names = ", ".join(f"drop.{name}" for name in unused)
        chosen = f"drop.policy {config.policy}"
        if config.policy == "sbld" and not updates_sensitivity(config):
            chosen += f" and drop.sensitivity_update {config.sensitivity_update}"
        warnings.warn(f"no effect with {chosen}: {names}", stacklevel=2)


def drop_settings(config: DropConfig) -> dict[str, Any]:
    """What is in force of the section, as combinations.py asks for it: nothing with policy none, and no field of
    another policy or schedule; residual_scale is the policy's own where the section has none.
    """
    if config.policy == "none":
        return {}
    unused = _unused_fields(config)
    used = {name: getattr(config, name) for name in drop_field_names() if name not in unused}
    return {**used, "residual_scale": residual_scale(config)}


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


_SCHEDULED: dict[PolicyName, type[PLDPolicy | LayerDropPolicy | StochasticDepthPolicy]] = {
    "pld": PLDPolicy,
    "layerdrop": LayerDropPolicy,
    "stochastic_depth": StochasticDepthPolicy,
}  # a schedule is all that they need


def residual_scale(config: DropConfig) -> ResidualScale:
    """How kept layers' branches are scaled, by what the section says or by the policy's own rule."""
    if config.policy == "none":
        return "none"
    return config.residual_scale or _SCHEDULED.get(config.policy, SBLDPolicy).default_residual_scale


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


def _check_stages(config: DropConfig, num_layers: int, num_stages: int | None) -> None:
    if config.sampler == "balanced":
        name = "pipeline stages" if config.balance_stages is None else "drop.balance_stages"
        stages = num_stages if config.balance_stages is None else config.balance_stages
        if stages is not None and num_layers % stages:
            raise ValueError(f"{name} = {stages} is not allowed: it must divide the {num_layers} layers")


def _check_schedule_fields(config: DropConfig, changed: set[str]) -> None:
    """Refuse parameters of another schedule, unless they may belong to another policy that takes its own schedule."""
    name = _schedule_name(config)
    useful = fields_of(name)
    if config.schedule is None:
        useful = useful.union(*(fields_of(own) for own in _POLICY_SCHEDULES.values()))
    for field in sorted(changed & _schedule_fields() - useful):
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
    unused = _schedule_fields() - fields_of(_schedule_name(config))
    if not updates_sensitivity(config):
        unused |= fields_of("dynamic")
    return unused.union(*(fields_of(policy) for policy in get_args(PolicyName) if policy != config.policy))


def _schedule_fields() -> set[str]:
    return set().union(*(fields_of(schedule) for schedule in get_args(ScheduleName)))


@contextlib.contextmanager
def _named_as_fields() -> Iterator[None]:
    """Errors of schedules and policies begin with the argument's name, which is the field's: name the section too."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"drop.{error}") from error
