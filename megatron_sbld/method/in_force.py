"""What the `drop` section stands for, field by field: what None means, which fields its policy and schedule use."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, get_args

from megatron_sbld.method import policy
from megatron_sbld.method.choices import DroppedUpdate, PolicyName, ResidualScale, ScheduleName
from megatron_sbld.method.config import DropConfig, default_of, drop_field_names, fields_of
from megatron_sbld.method.decisions import replicas_run_alike

POLICY_SCHEDULES: dict[PolicyName, ScheduleName] = {
    "sbld": "pwegd",
    "pld": "exponential",
    "layerdrop": "constant",
    "stochastic_depth": "constant",
}
"""What schedule: null stands for."""
SCHEDULED_POLICIES: dict[PolicyName, type[policy.PLDPolicy | policy.LayerDropPolicy | policy.StochasticDepthPolicy]] = {
    "pld": policy.PLDPolicy,
    "layerdrop": policy.LayerDropPolicy,
    "stochastic_depth": policy.StochasticDepthPolicy,
}
"""Those that need a schedule alone."""
_CLASSES: dict[PolicyName, type[policy.Policy]] = {
    **SCHEDULED_POLICIES,
    "sbld": policy.SBLDPolicy,
    "staged": policy.StagedPolicy,
}


_OF_POLICIES = {
    *("schedule", "theta", "keep_layers", "depth", "stages", "residual_scale", "decision_scope", "sampler"),
    *("balance_stages", "replicas", "dropped_update"),
}
"""Fields of every policy, which say nothing where no layer is dropped."""


def drops(config: DropConfig) -> bool:
    """Whether the section is in force: it has a policy, or drops tokens."""
    return config.policy != "none" or drops_tokens(config)


def drops_tokens(config: DropConfig) -> bool:
    """Whether layers run some of a sample's tokens."""
    return config.granularity == "token"


def drop_settings(config: DropConfig) -> dict[str, Any]:
    """What is in force of the section, as combinations.py asks for it: nothing if it drops nothing, and no field of
    another policy or schedule; residual_scale is the policy's own where the section has none.
    """
    if not drops(config):
        return {}
    unused = unused_fields(config)
    used = {name: getattr(config, name) for name in drop_field_names() if name not in unused}
    if config.stages is not None and config.sampler == "bernoulli":
        used.pop("balance_stages", None)  # it shares out the stages' layers, and the sampler has none
    if config.policy == "none":  # no layer is ever dropped
        return used
    return {**used, "residual_scale": residual_scale(config), "dropped_update": dropped_update(config)}


def updates_sensitivity(config: DropConfig) -> bool:
    """Whether the section asks for an estimate of the sensitivity while the model trains."""
    return config.policy == "sbld" and config.sensitivity_update == "dynamic"


def dropped_update(config: DropConfig) -> DroppedUpdate:
    """What the optimizer does to a dropped layer that has begun, by what the section says or by its own rule."""
    if config.dropped_update is not None:
        return config.dropped_update
    freezes = config.stages is not None and replicas_run_alike(config.replicas, config.granularity)
    return "freeze" if freezes else "apply"


def residual_scale(config: DropConfig) -> ResidualScale:
    """How kept layers' branches are scaled, by what the section says or by the policy's own rule."""
    if config.policy == "none":
        return "none"
    return config.residual_scale or _CLASSES[config.policy].default_residual_scale


def stages_by_sensitivity(config: DropConfig) -> bool:
    return config.stages is not None and config.stage_layers == "sensitivity"


def uses_theta(config: DropConfig) -> bool:
    """Whether the field theta has an effect."""
    return config.policy not in ("none", "staged") and schedule_name(config) != "steps"


def schedule_name(config: DropConfig) -> ScheduleName:
    return config.schedule or POLICY_SCHEDULES.get(config.policy, "constant")


def changed_fields(config: DropConfig) -> set[str]:
    """Fields that differ from their defaults."""
    return {name for name in drop_field_names() if getattr(config, name) != default_of(name)}


def stage_warmup_iters(config: DropConfig, train_iters: int) -> int:
    """Over how many iterations the learning rate rises again once layers have begun; at least one."""
    return max(1, round(config.stage_warmup * train_iters))


def unused_fields(config: DropConfig) -> set[str]:
    """Fields of other policies and schedules than the section's."""
    unused = schedule_fields() - fields_of(schedule_name(config))
    if not updates_sensitivity(config):
        unused |= fields_of("dynamic")
    unused |= frozenset().union(*(fields_of(name) for name in get_args(PolicyName) if name != config.policy))
    if config.stages is None:
        unused |= fields_of("stages")
    if not drops_tokens(config):
        unused |= fields_of("token")
    if config.policy == "staged":
        unused |= {"schedule", "theta", "residual_scale"}
    if config.policy == "none":
        return unused | fields_of("stages") | _OF_POLICIES
    return unused - {"sensitivity", "interpolate"} if stages_by_sensitivity(config) else unused


def schedule_fields() -> set[str]:
    return set().union(*(fields_of(schedule) for schedule in get_args(ScheduleName)))


@contextlib.contextmanager
def named_as_fields() -> Iterator[None]:
    """Errors of schedules and policies begin with the argument's name, which is the field's: name the section too."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"drop.{error}") from error
