"""The `drop` section of a config: what the user types, its defaults and limits, and the policy it stands for.

Shared by the trainer and by whatever attaches layer dropping to another training program. Formulas are in policy.py and
schedule.py; this module only chooses and checks them.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

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
    """The schedule's limit: the keep probability it starts or ends at, in (0, 1]; below 0.4 warns (paper 000)."""
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
    sensitivity_update: Literal["none"] = "none"
    """SBLD: whether training re-estimates the sensitivity; this version offers none."""
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
    residual: Literal["stock"] = "stock"
    """Who adds a branch to the residual stream; this version offers Megatron's own."""
    recovery_fraction: float = 0.0
    """Last share of the iterations in which nothing is dropped, in [0, 1]."""
    decision_scope: Literal["iteration", "microbatch"] = "iteration"
    """One draw for an iteration, or one for each microbatch."""
    granularity: Literal["layer"] = "layer"
    """What a decision is about; this version offers whole layers."""
    sampler: Literal["bernoulli", "balanced"] = "bernoulli"
    """Independent draws, or as many kept layers on each stage as expected, give or take one."""
    balance_stages: int | None = None
    """Stages that the balanced sampler balances; None is the pipeline's (virtual stages of a rank counted as one)."""
    replicas: Literal["shared", "distinct"] = "shared"
    """Whether data-parallel replicas take the same decisions; distinct needs the balanced sampler."""
    dropped_update: Literal["apply"] = "apply"
    """What the optimizer does to a dropped layer; this version offers Megatron's own: a step with a zero gradient."""
    seed: int = 1234
    """Seed of the decisions, independent of the seed of the weights and the data."""


def drop_field_names() -> list[str]:
    """Names of the drop section's fields, in order."""
    return [field.name for field in dataclasses.fields(DropConfig)]
