"""The `drop` section of a config: what the user types, its defaults, and the limits of each field by itself.

What the fields mean together, and the policy that they stand for, is drop.py's.
"""

from __future__ import annotations

import dataclasses
import functools
import typing
from dataclasses import dataclass
from typing import Any, Literal

from megatron_sbld.checks import check_choice, check_integer, check_number
from megatron_sbld.method.decisions import MAX_SEED

PolicyName = Literal["none", "sbld", "pld", "layerdrop", "stochastic_depth"]
ScheduleName = Literal["pwegd", "exponential", "linear", "polynomial", "constant"]


@dataclass(frozen=True, kw_only=True)
class DropConfig:
    """Which layers are dropped, how often, and how a drop is carried out. Layer numbers are 1-based, as in Megatron."""

    policy: PolicyName = "none"
    """Where the keep probability of each layer comes from; none drops nothing."""
    schedule: ScheduleName | None = None
    """theta over training; None takes the policy's own: sbld pwegd, pld exponential, the others constant."""
    theta: float = 0.9
    """The schedule's limit: the keep probability it starts or ends at, in (0, 1]; below 0.4 warns (SBLD)."""
    a: float = 2.0
    """PWEGD: shape."""
    b: float | None = None
    """PWEGD: scale in iterations. None places the peak at peak_iteration."""
    c: float = 1.0
    """PWEGD: polynomial of the weighting function."""
    epsilon: float = 0.0
    """PWEGD: threshold in iterations, before which theta(t) = theta."""
    eta: float | None = None
    """PWEGD: amplitude. None places the peak's height at peak_theta."""
    peak_iteration: float | None = None
    """PWEGD: where theta(t) peaks; None is 10 % of the iterations. Excludes b."""
    peak_theta: float | None = None
    """PWEGD: theta(t) at its peak; None is theta + (1 - theta) / 2. Excludes eta."""
    gamma: float | None = None
    """Exponential: decay per iteration; None is 100 / iterations, as PLD."""
    start_theta: float = 1.0
    """Linear and polynomial: theta(0); they end at theta."""
    duration: float | None = None
    """Linear and polynomial: iterations from start_theta to theta; None is all of them."""
    power: float = 3.0
    """Polynomial: exponent of the elapsed fraction."""
    alpha: float = 1.0
    """SBLD: weight of theta(t)."""
    beta: float = 0.5
    """SBLD: weight of the normalised sensitivity."""
    theta_min: float = 0.4
    """SBLD: lowest keep probability outside the lists."""
    theta_max: float = 1.0
    """SBLD: highest keep probability outside the lists."""
    sensitivity: str | None = None
    """SBLD: path of a sensitivity file for this number of layers."""
    interpolate: bool = False
    """SBLD: take a sensitivity file of another number of layers, interpolated by relative depth."""
    sensitivity_update: Literal["none", "dynamic"] = "none"
    """SBLD: whether training re-estimates the sensitivity. dynamic: from the run's own losses and decisions; the file's
    sensitivity is the prior, which only significant differences move."""
    update_interval: int = 100
    """Dynamic: iterations from one update of the sensitivity to the next. An update takes half a millisecond, so a
    hundred iterations hide it, and it is a tenth of update_memory, so nothing is seen late."""
    update_memory: int = 1000
    """Dynamic: iterations after which an observation's weight has fallen to 1/e, at least 10. At 1,000 a layer that is
    dropped in 1 of 5 iterations is known to about 1/18 of the noise between batches; longer is more exact, slower."""
    exploration: float = 0.02
    """Dynamic: least probability with which each layer outside of the Block list is kept, and dropped, in [0, 0.5): a
    layer that always runs cannot be observed. At 0.02 such a layer is dropped 20 times in 1,000 iterations."""
    release_block: bool = False
    """Dynamic: drop Block layers with probability `exploration` too, and take one off the list while its sensitivity is
    significantly lower than measured and below that of a layer outside of the list."""
    block_layers: list[int] | None = None
    """SBLD: layers that are never dropped; None takes block_fraction of the layers by sensitivity."""
    block_fraction: float = 0.15
    """SBLD: share of layers in the Block list, in [0, 1]."""
    allow_layers: list[int] | None = None
    """SBLD: layers kept with allow_keep_prob throughout; None takes allow_fraction by sensitivity."""
    allow_fraction: float = 0.15
    """SBLD: share of layers in the Allow list, in [0, 1]."""
    allow_keep_prob: float = 0.4
    """SBLD: keep probability of the Allow list's layers."""
    residual_scale: Literal["none", "inverse_keep_prob"] | None = None
    """Scale of a kept layer's branches; None takes the policy's own: pld inverse_keep_prob, the others none."""
    residual: Literal["stock", "fused"] = "stock"
    """Who adds a branch to the residual stream in training, with any policy: Megatron, or one kernel that computes
    residual + scale * dropout(branch + bias) with random numbers of its own (MEGATRON_SBLD_RESIDUAL says on what)."""
    recovery_fraction: float = 0.0
    """Last share of the iterations in which nothing is dropped, in [0, 1]."""
    decision_scope: Literal["iteration", "microbatch"] = "iteration"
    """One draw for an iteration, or one for each microbatch."""
    granularity: Literal["layer", "sample"] = "layer"
    """What a decision is about: a layer in a whole microbatch, or in each of its samples. sample: a layer runs
    keep_prob * micro_batch_size samples of a microbatch in expectation, rounded down or up, as many on every rank; the
    others pass it by. With micro_batch_size 1 it takes the very decisions of layer. Take layer where whole dropped
    layers should cost nothing, their communication included; take sample where iterations should be equally long, or
    each gradient come from most layers."""
    sampler: Literal["bernoulli", "balanced"] = "bernoulli"
    """Independent draws, or as many kept layers on each stage as expected, give or take one; with granularity sample as
    many samples, summed over the stage's layers."""
    balance_stages: int | None = None
    """Stages that the balanced sampler balances; None is the pipeline's (virtual stages of a rank counted as one)."""
    replicas: Literal["shared", "distinct"] = "shared"
    """Whether data-parallel replicas take the same decisions; distinct needs the balanced sampler, or granularity
    sample: then they run the same layers on as many samples, but on different ones."""
    dropped_update: Literal["apply", "freeze"] = "apply"
    """What the optimizer does to a layer that every microbatch of an iteration dropped. apply: Megatron's own step,
    with a zero gradient, so momentum and weight decay still move its weights, and its moments shrink. freeze: weights
    and moments stay as they are, bit for bit, until an iteration runs it. Take apply to stay with Megatron's
    optimizer; take freeze where layers are dropped so often that decay and old momentum would move them more than
    their gradients do, or where a dropped layer must not move at all. freeze does not work with replicas distinct,
    unless granularity is sample."""
    seed: int = 1234
    """Seed of the decisions, independent of the seed of the weights and the data."""


_RANGES = {
    **dict.fromkeys(("theta", "peak_theta", "start_theta"), "(0, 1]"),
    **dict.fromkeys(("a", "c", "epsilon"), "(-inf, inf)"),
    **dict.fromkeys(("b", "peak_iteration", "gamma", "duration", "power"), "(0, inf)"),
    **dict.fromkeys(("eta", "alpha", "beta"), "[0, inf)"),
    **dict.fromkeys(("theta_min", "theta_max", "block_fraction", "allow_fraction"), "[0, 1]"),
    **dict.fromkeys(("allow_keep_prob", "recovery_fraction"), "[0, 1]"),
    "exploration": "[0, 0.5)",
}


def drop_field_names() -> list[str]:
    """Names of the drop section's fields, in order."""
    return [field.name for field in dataclasses.fields(DropConfig)]


def check_ranges(config: DropConfig) -> None:
    """Refuse a value out of range, whatever the policy. Raises ValueError naming the field and what is allowed."""
    for name, choices in _field_choices().items():
        check_choice(f"drop.{name}", getattr(config, name), choices)
    for name, allowed in _RANGES.items():
        value = getattr(config, name)
        if value is not None or default_of(name) is not None:
            check_number(f"drop.{name}", value, allowed)
    check_integer("drop.seed", config.seed, 0, MAX_SEED)
    check_integer("drop.update_interval", config.update_interval, 1)
    check_integer("drop.update_memory", config.update_memory, 10)
    check_choice("drop.release_block", config.release_block, (True, False))
    if config.balance_stages is not None:
        check_integer("drop.balance_stages", config.balance_stages, 1)
    if not isinstance(config.interpolate, bool):
        raise ValueError(f"drop.interpolate = {config.interpolate!r} is not allowed: it must be true or false")
    if config.sensitivity is not None and not isinstance(config.sensitivity, str):
        raise ValueError(f"drop.sensitivity = {config.sensitivity!r} is not allowed: it must be the path of a file")


@functools.cache
def _field_choices() -> dict[str, tuple[Any, ...]]:
    """What the fields that are a Literal, or a Literal or None, allow."""
    choices = {name: _choices(hint) for name, hint in typing.get_type_hints(DropConfig).items()}
    return {name: allowed for name, allowed in choices.items() if allowed}


def _choices(hint: Any) -> tuple[Any, ...]:
    """Values that a Literal, or a Literal or None, allows; empty for other types."""
    if typing.get_origin(hint) is Literal:
        return typing.get_args(hint)
    literals = [choice for part in typing.get_args(hint) for choice in _choices(part)]
    return (*literals, None) if literals else ()


def default_of(name: str) -> Any:
    """The default of a field."""
    return DropConfig.__dataclass_fields__[name].default
