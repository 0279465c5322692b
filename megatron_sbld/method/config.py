"""The `drop` section of a config: what the user types, its defaults, and what each field by itself may hold.

What the fields mean together, and the policy that they stand for, is build.py's; which of them do not work together
stands in combinations.py.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Annotated, Any

from megatron_sbld.fields import (
    BelowOne,
    Count,
    Finite,
    In,
    NotNegative,
    Positive,
    PositiveShare,
    Share,
    Whole,
    notes,
)
from megatron_sbld.method.choices import (
    Depth,
    DroppedUpdate,
    Granularity,
    PolicyName,
    RecipeName,
    Replicas,
    ResidualAdd,
    ResidualScale,
    Sampler,
    ScheduleName,
    Scope,
    SensitivityUpdate,
    StageInit,
    StageRule,
    TokenSchedule,
    Unit,
)
from megatron_sbld.method.decisions import MAX_SEED


class Of:
    """What alone uses a field: policies, schedules, "dynamic" (sensitivity), "stages", "token" (granularity)."""

    def __init__(self, *owners: str) -> None:
        self.owners = owners


@dataclass(frozen=True, kw_only=True)
class DropConfig:
    """Which layers are dropped, how often, and how a drop is carried out. Layer numbers are 1-based, as in Megatron."""

    recipe: RecipeName | None = None
    """Fills this section with the settings of a published method; a field that you set wins, even if
    it is set to its default.
    `megatron-sbld schedule show` prints where each value came from."""
    policy: PolicyName = "none"
    """Where the keep probability of each layer comes from; none drops no layer, staged runs every layer that has
    begun. With policy none the section is in force for granularity token alone."""
    schedule: ScheduleName | None = None
    """theta over training; None takes the policy's own: sbld pwegd, pld exponential, the others constant."""
    theta: PositiveShare = 0.9
    """The schedule's keep probability: exponential, linear and polynomial end at it, pwegd starts and ends at it,
    plateau starts at it, constant stays at it; below 0.4 warns (SBLD)."""
    keep_layers: list[int] | None = None
    """Layers that are always kept, with any policy."""
    depth: Depth = "uniform"
    """LayerDrop: how the drop rate grows with depth. uniform: it does not; linear: from 0 at the first layer to
    1 - theta(t) at the last; exponential: likewise, doubling as LayerSkip's."""
    stages: list[list[float]] | None = None
    """[share of the iterations, number of layers], ...: until when how many layers have begun; ends with [1.0,
    num_layers]. Layers that have not begun do not run, not even in evaluation, and stay as they are. Any policy drops
    layers among those that have begun."""
    stage_layers: Annotated[StageRule | list[int], Of("stages")] = "spread"
    """Which layers begin first: the first ones, the last ones, spread evenly, the sensitivity file's most sensitive
    ones, or a list in the order in which they begin. Every pipeline stage (or each of balance_stages) runs its share,
    at least one layer."""
    stage_init: Annotated[StageInit, Of("stages")] = "random"
    """What a layer begins as. random: as initialised, or as loaded; zero: its attention's and MLP's output projections
    are zero, so that it adds nothing at first; copy: the nearest running layer below it, else above."""
    stage_copy_moments: Annotated[bool, Of("stages")] = False
    """With stage_init copy: take over the optimizer's moments of that layer too."""
    stage_warmup: Annotated[BelowOne, Of("stages")] = 0.0
    """Share of the iterations over which the learning rate rises again, linearly from 0, each time layers begin."""
    a: Annotated[Finite, Of("pwegd")] = 2.0
    """PWEGD: shape."""
    b: Annotated[Positive | None, Of("pwegd")] = None
    """PWEGD: scale in iterations. None places the peak at peak_iteration."""
    c: Annotated[Finite, Of("pwegd")] = 1.0
    """PWEGD: polynomial of the weighting function."""
    epsilon: Annotated[Finite, Of("pwegd")] = 0.0
    """PWEGD: threshold in iterations, before which theta(t) = theta."""
    eta: Annotated[NotNegative | None, Of("pwegd")] = None
    """PWEGD: amplitude. None places the peak's height at peak_theta."""
    peak_iteration: Annotated[Positive | None, Of("pwegd")] = None
    """PWEGD: where theta(t) peaks; None is 10 % of the iterations. Excludes b."""
    peak_theta: Annotated[PositiveShare | None, Of("pwegd")] = None
    """PWEGD: theta(t) at its peak; None is theta + (1 - theta) / 2. Excludes eta."""
    gamma: Annotated[Positive | None, Of("exponential")] = None
    """Exponential: decay per iteration; None is 100 / iterations, as PLD."""
    start_theta: Annotated[PositiveShare, Of("linear", "polynomial")] = 1.0
    """Linear and polynomial: theta(0); they end at theta."""
    duration: Annotated[Positive | None, Of("linear", "polynomial")] = None
    """Linear and polynomial: iterations from start_theta to theta; None is all of them."""
    power: Annotated[Positive, Of("polynomial")] = 3.0
    """Polynomial: exponent of the elapsed fraction."""
    steps: Annotated[list[list[float]] | None, Of("steps")] = None
    """Steps: [share of the iterations, theta], ...: until when theta(t) has which value; ends with [1.0, theta]."""
    hold_until: Annotated[Share, Of("plateau")] = 0.31
    """Plateau: share of the iterations until which theta(t) is theta; the default is that of DDD's public port."""
    decay_until: Annotated[Share, Of("plateau")] = 0.385
    """Plateau: share of the iterations at which theta(t), linear in between, has come to 1; it stays there."""
    alpha: Annotated[NotNegative, Of("sbld")] = 1.0
    """SBLD: weight of theta(t)."""
    beta: Annotated[NotNegative, Of("sbld")] = 0.5
    """SBLD: weight of the normalised sensitivity."""
    theta_min: Annotated[Share, Of("sbld")] = 0.4
    """SBLD: lowest keep probability outside the lists."""
    theta_max: Annotated[Share, Of("sbld")] = 1.0
    """SBLD: highest keep probability outside the lists."""
    sensitivity: Annotated[str | None, Of("sbld")] = None
    """SBLD, and any policy with stage_layers sensitivity: path of a sensitivity file for this number of layers."""
    interpolate: Annotated[bool, Of("sbld")] = False
    """SBLD: take a sensitivity file of another number of layers, interpolated by relative depth."""
    sensitivity_update: Annotated[SensitivityUpdate, Of("sbld")] = "none"
    """SBLD: whether training re-estimates the sensitivity. dynamic: from the run's own losses and decisions; the file's
    sensitivity is the prior, which only significant differences move."""
    update_interval: Annotated[Count, Of("dynamic")] = 100
    """Dynamic: iterations from one update of the sensitivity to the next. An update takes half a millisecond, so a
    hundred iterations hide it, and it is a tenth of update_memory, so nothing is seen late."""
    update_memory: Annotated[int, Whole(10), Of("dynamic")] = 1000
    """Dynamic: iterations after which an observation's weight has fallen to 1/e. At 1,000 a layer that is
    dropped in 1 of 5 iterations is known to about 1/18 of the noise between batches; longer is more exact, slower."""
    exploration: Annotated[float, In("[0, 0.5)"), Of("dynamic")] = 0.02
    """Dynamic: least probability with which each layer outside of the Block list is kept, and dropped: a layer that
    always runs cannot be observed. At 0.02 such a layer is dropped 20 times in 1,000 iterations."""
    release_block: Annotated[bool, Of("dynamic")] = False
    """Dynamic: drop Block layers with probability `exploration` too, and take one off the list while its sensitivity is
    significantly lower than measured and below that of a layer outside of the list."""
    block_layers: Annotated[list[int] | None, Of("sbld")] = None
    """SBLD: layers that are never dropped; None takes block_fraction of the layers by sensitivity."""
    block_fraction: Annotated[Share, Of("sbld")] = 0.15
    """SBLD: share of layers in the Block list."""
    allow_layers: Annotated[list[int] | None, Of("sbld")] = None
    """SBLD: layers kept with allow_keep_prob throughout; None takes allow_fraction by sensitivity."""
    allow_fraction: Annotated[Share, Of("sbld")] = 0.15
    """SBLD: share of layers in the Allow list."""
    allow_keep_prob: Annotated[Share, Of("sbld")] = 0.4
    """SBLD: keep probability of the Allow list's layers."""
    residual_scale: ResidualScale | None = None
    """Scale of a kept layer's branches; None takes the policy's own: pld inverse_keep_prob, the others none."""
    residual: ResidualAdd = "stock"
    """Who adds a branch to the residual stream in training, with any policy: Megatron, or one kernel that computes
    residual + scale * dropout(branch + bias) with random numbers of its own (MEGATRON_SBLD_RESIDUAL says on what)."""
    recovery_fraction: Share = 0.0
    """Last share of the iterations in which nothing is dropped."""
    decision_scope: Scope = "iteration"
    """One draw for an iteration, or one for each microbatch."""
    granularity: Granularity = "layer"
    """What a decision is about: a layer in a whole microbatch, or in each of its samples. sample: a layer runs
    keep_prob * micro_batch_size samples of a microbatch in expectation, rounded down or up, as many on every rank; the
    others pass it by. With micro_batch_size 1 it takes the very decisions of layer. Take layer where whole dropped
    layers should cost nothing, their communication included; take sample where iterations should be equally long, or
    each gradient come from most layers. token: random-LTD; the decisions of layer, and of each sample the layers of
    token_layers run some tokens alone, drawn anew for each layer and sample; the others pass them by. Policy none with
    token drops tokens and no layers."""
    token_layers: Annotated[list[int] | None, Of("token")] = None
    """Token: layers that run some tokens of a sample; None is all but the first and the last."""
    token_schedule: Annotated[TokenSchedule, Of("token")] = "linear"
    """Token: how many tokens a layer runs at iteration t. linear: from min_tokens at t = 0 to all of them at
    token_iterations, as random-LTD; steps: token_steps."""
    min_tokens: Annotated[Count | None, Of("token")] = None
    """Token, linear: tokens of a sample that a layer runs at first, a multiple of token_step; None is 1/16 of
    seq_length, as random-LTD's 128 of 2,048, rounded down to one, at least token_step."""
    token_step: Annotated[Count, Of("token")] = 16
    """Token: the number of tokens is rounded down to a multiple of it, as GPUs like."""
    token_iterations: Annotated[Count | None, Of("token")] = None
    """Token, linear: iteration from which on all tokens are kept; None is 70 % of the iterations, as random-LTD."""
    token_steps: Annotated[list[list[float]] | None, Of("token")] = None
    """Token, steps: [share of the iterations, tokens], ...: until when a layer runs how many tokens of a sample, each a
    multiple of token_step or all; ends with [1.0, tokens]."""
    token_strata: Annotated[Count | None, Of("token")] = None
    """Token: equal parts of the sequence, of each of which as many tokens are drawn, so that ranks which hold parts of
    a sequence run as many; divides token_step. None is what the layout needs: 1, with sequence parallelism
    tensor_model_parallel_size, with context parallelism more. Set it to draw the same on another layout."""
    unit: Unit = "layer"
    """What counts as one layer of a HybridModel (`*-*-`, in Megatron-LM and in your own code). layer: each attention,
    MLP, MoE or Mamba layer has a keep probability of its own; block: attention and the MLP or experts behind it have
    one, as a layer of a GPT. In a GPT every layer is such a block, so that both are the same."""
    sampler: Sampler = "bernoulli"
    """Independent draws, or as many kept layers on each stage as expected, give or take one; with granularity sample as
    many samples, summed over the stage's layers."""
    balance_stages: Count | None = None
    """Stages that the balanced sampler balances, and among which `stages` shares layers out; None is the pipeline's
    (virtual stages of a rank counted as one)."""
    replicas: Replicas = "shared"
    """Whether data-parallel replicas take the same decisions; distinct needs the balanced sampler, or granularity
    sample: then they run the same layers on as many samples, but on different ones."""
    dropped_update: DroppedUpdate | None = None
    """What the optimizer does to a layer that every microbatch of an iteration dropped; None is freeze with stages,
    unless replicas are distinct, else apply. A layer that has not begun is frozen in any case. apply: Megatron's own
    step, with a zero gradient, so momentum and weight decay still move its weights, and its moments shrink. freeze:
    weights and moments stay as they are, bit for bit, until an iteration runs it. Take apply to stay with Megatron's
    optimizer; take freeze where layers are dropped so often that decay and old momentum would move them more than
    their gradients do, or where a dropped layer must not move at all. freeze does not work with replicas distinct,
    unless granularity is sample."""
    seed: Annotated[int, Whole(0, MAX_SEED)] = 1234
    """Seed of the decisions, independent of the seed of the weights and the data."""


def drop_field_names() -> list[str]:
    """Names of the drop section's fields, in order."""
    return [field.name for field in dataclasses.fields(DropConfig)]


@functools.cache
def fields_of(owner: str) -> frozenset[str]:
    """The fields that a policy, a schedule or "dynamic" has for itself, maybe with others."""
    return frozenset(name for name, note in notes(DropConfig, Of).items() if owner in note.owners)


def default_of(name: str) -> Any:
    """The default of a field."""
    return DropConfig.__dataclass_fields__[name].default
