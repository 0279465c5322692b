"""The drop controller: draws the decisions of an iteration, and answers "kept?".

A decision is about a layer in a microbatch, or with granularity `sample` about each of the microbatch's samples. With
granularity `token` a kept layer may run some tokens of each sample, which are drawn where they are (mcore/skip/).

Every rank draws from (seed, iteration, keep probabilities) alone (method/decisions.py), so a decision needs no
communication; once a window of iterations the ranks compare what they drew (agreement.py). Knows nothing about models
(mcore/) and nothing about the formulas (method/policy.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray

from megatron_sbld.agreement import AgreedWindow, Settings, record_of_window
from megatron_sbld.checks import check_choice, check_integer, check_keys, check_layer_number
from megatron_sbld.growth import Growth
from megatron_sbld.method.choices import DroppedUpdate, Granularity, Replicas, ResidualScale, Sampler, Scope
from megatron_sbld.method.combinations import refuse_combinations
from megatron_sbld.method.decisions import (
    MAX_REPLICA,
    MAX_SEED,
    draw_sample_counts,
    draw_samples,
    plain_stages,
    replicas_run_alike,
)
from megatron_sbld.method.in_force import named_as_fields
from megatron_sbld.method.policy import Policy
from megatron_sbld.method.stages import Stages
from megatron_sbld.method.tokens import TokenDrop, check_granularity
from megatron_sbld.method.work import Work

CHECKPOINT_KEY = "sbld"
"""Of the drop state in the state dict of Megatron's parameter scheduler, which passes over unknown keys."""


class DropController:
    """Decides, for each iteration and microbatch, which layers run, or on which of its samples.

    Args:
        policy: gives the keep probability of each layer at each iteration.
        seed: seed of the decisions (not of the weights or the data).
        scope: one draw an `iteration`, or one for each `microbatch`.
        sampler: `bernoulli` or `balanced` (docs/method.md, section 6).
        stages: what the balanced sampler balances: a number of equal stages, or lists of 1-based layer numbers.
        granularity: `layer`: a layer runs a microbatch or not; `sample`: it runs some of the microbatch's samples, as
            many on every rank; `token`: a layer that runs a microbatch runs some tokens of each of its samples.
        num_samples: samples of a microbatch (Megatron's micro_batch_size), the same in the whole run; of granularity
            `sample`, and None otherwise.
        tokens: which layers run how many tokens; of granularity `token`, and None otherwise.
        replicas: `shared`, or `distinct`: data-parallel replicas drop different layers, as many on each stage; with
            granularity `sample` the same layers on different samples.
        replica: this process's data-parallel rank; used with `distinct` only.
        residual_scale: `none` or `inverse_keep_prob`; None takes the policy's.
        window: iterations that one check covers.
        group: process group whose ranks must agree; None is the default group.

    Raises:
        ValueError: `distinct` without the balanced sampler and without samples to tell apart, num_samples or tokens
            with another granularity than theirs, or an argument out of range.
    """

    def __init__(
        self,
        policy: Policy,
        seed: int = 1234,
        *,
        scope: Scope = "iteration",
        sampler: Sampler = "bernoulli",
        stages: int | Sequence[Sequence[int]] | None = None,
        granularity: Granularity = "layer",
        num_samples: int | None = None,
        tokens: TokenDrop | None = None,
        replicas: Replicas = "shared",
        replica: int = 0,
        residual_scale: ResidualScale | None = None,
        window: int = 64,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        if not isinstance(policy, Policy):
            raise ValueError(f"policy = {policy!r} is not allowed: it must be a Policy of megatron_sbld.method.policy")
        check_choice("scope", scope, get_args(Scope))
        check_choice("sampler", sampler, get_args(Sampler))
        check_choice("replicas", replicas, get_args(Replicas))
        check_choice("residual_scale", residual_scale, (*get_args(ResidualScale), None))
        check_granularity(granularity, num_samples, tokens, policy.num_layers)
        self.replicas_run_alike = replicas_run_alike(replicas, granularity)
        """Whether all data-parallel replicas run the same layers, each on as many samples."""
        self.policy = policy
        self.seed = check_integer("seed", seed, 0, MAX_SEED)
        self.scope: Scope = scope
        self.sampler: Sampler = sampler
        self.stages = stages
        self.granularity: Granularity = granularity
        self.num_samples = None if num_samples is None else int(num_samples)
        self.tokens = tokens
        self.replicas: Replicas = replicas
        self.refuse({})
        self.replica = check_integer("replica", replica, 0, MAX_REPLICA)
        self.scales_residual = (residual_scale or policy.residual_scale) == "inverse_keep_prob"
        self._agreed = AgreedWindow(check_integer("window", window, 1), group)
        self.begun = 0
        """How many times begin_iteration was called: tells the passes of a repeated iteration from the first ones."""
        self.iteration = 0
        self.num_microbatches = 0
        self.keep_probs = np.ones(policy.num_layers)
        self.plan: NDArray[np.bool_] = np.ones((0, policy.num_layers), dtype=bool)
        """Whether each layer runs in each microbatch, on one sample at least: [num_microbatches, L]."""
        self.sample_plan: NDArray[np.bool_] | None = None
        """With granularity `sample`: whether each sample runs each layer, [num_microbatches, L, num_samples]."""
        self.num_tokens = 0
        """With granularity `token`: how many tokens of a sample its layers run in the present iteration."""
        self._rows: list[list[int]] = []  # how many samples, or 1 and 0
        self._scales = [1.0] * policy.num_layers
        self._checks: list[Callable[[], None]] = []
        self.num_replicas = 1
        """Data-parallel replicas of the run; told by what attaches the controller, needed with `distinct` alone."""
        self.growth = Growth(policy)
        self._draw(0, 1, self.keep_probs, replica)  # refuses stages and replicas that cannot be

    @property
    def num_layers(self) -> int:
        """Layers of the whole model."""
        return self.policy.num_layers

    @property
    def work(self) -> Work:
        """What the policy and the tokens leave each layer to do."""
        return Work(self.policy, self.tokens)

    @property
    def theta(self) -> float:
        """The schedule's value at the present iteration."""
        return self.policy.theta(self.iteration)

    @property
    def kept_shares(self) -> NDArray[np.float64]:
        """Share of each microbatch's tokens that each layer runs, [num_microbatches, L]."""
        if self.sample_plan is None:
            return self.plan * self.work.token_shares(self.iteration)
        return self.sample_plan.mean(axis=-1)

    @property
    def attended_shares(self) -> NDArray[np.float64]:
        """The same of the pairs of tokens in each layer's attention, whose scores grow as the square."""
        return self.kept_shares**2 if self.sample_plan is None else self.kept_shares

    @property
    def kept_fraction(self) -> float:
        """Share of (token, layer) pairs that this iteration runs: of all pairs of a microbatch and a layer, or less."""
        return float(self.kept_shares.mean())

    def layer_tokens(self, tokens: int) -> float:
        """Layer-tokens that this iteration runs of `tokens` tokens, summed over all layers; the same on every rank."""
        return float(self.kept_shares.mean(axis=0).sum()) * tokens

    def expected_shares(self, iteration: int) -> NDArray[np.float64]:
        """Share of its tokens that each layer is expected to run in an iteration (1..T) of the run, [L]."""
        return self.work.kept(iteration)

    def refuse(self, settings: Mapping[str, Any]) -> None:
        """Raise ValueError where this controller does not work with others' settings (method/combinations.py)."""
        own = {
            "decision_scope": self.scope,
            "sampler": self.sampler,
            "balance_stages": self.stages,
            "granularity": self.granularity,
            "micro_batch_size": self.num_samples,
            "replicas": self.replicas,
        }
        names = {"decision_scope": "scope", "balance_stages": "stages", "micro_batch_size": "num_samples"}
        refuse_combinations({**settings, **own}, lambda name: names.get(name, name))

    def begin_iteration(self, iteration: int, num_microbatches: int) -> None:
        """Draw the decisions of `iteration` (1..T); call on every rank before each forward-backward pass.

        Raises:
            ValueError: an iteration below 1 or fewer than one microbatch.
            DropDisagreementError: a rank was given another configuration; once for each window of iterations.
        """
        iteration = check_integer("iteration", iteration, 1)
        num_microbatches = check_integer("num_microbatches", num_microbatches, 1)
        for check in self._checks:
            check()
        self._checks.clear()
        self._agreed.check(iteration, num_microbatches, self._record)
        keep_probs = self.policy.keep_probs(iteration)
        counts = self._draw(iteration, num_microbatches, keep_probs, self.replica)
        sample_plan = None
        if self.num_samples is not None:
            replica = self.replica if self.replicas == "distinct" else 0
            sample_plan = draw_samples(counts, self.num_samples, self.seed, iteration, self.scope, replica)
        self.growth.end_iteration(self._ran)
        if self.policy.stages is not None:
            self.growth.let_begin(self.policy.begun_layers(iteration), iteration)
        # Nothing may fail from here on: a loop that goes on after an error has the decisions of one iteration.
        self.begun += 1
        self.iteration = iteration
        self.num_microbatches = num_microbatches
        self.keep_probs = keep_probs
        self._rows = counts.tolist()
        self.plan = counts > 0
        self.sample_plan = sample_plan
        self.num_tokens = self.work.num_tokens(iteration) or 0
        if self.scales_residual:
            self._scales = [1.0 / keep_prob if keep_prob > 0 else 1.0 for keep_prob in keep_probs.tolist()]

    def check_once(self, check: Callable[[], None]) -> None:
        """Call `check` at the beginning of the next iteration; what it raises, begin_iteration raises."""
        self._checks.append(check)

    def note_step(self) -> None:
        """The optimizer makes a step with the gradients of this iteration. Call it on every rank, whatever it steps."""
        self.growth.note_step()

    def makes_first_step(self, layer_number: int) -> bool:
        """Whether the optimizer steps the layer (1-based) for the first time since it began, with a gradient."""
        return self.growth.awaits_first_step(layer_number) and layer_number in self._ran()

    def has_begun(self, layer_number: int) -> bool:
        """Whether the layer (1-based) has begun; the others run in evaluation neither. Without stages all have."""
        return layer_number in self.growth.begun

    def _ran(self) -> frozenset[int]:
        """Layers that some microbatch of the present iteration runs on some replica."""
        ran = self.plan.any(axis=0)
        if not self.replicas_run_alike:
            for replica in range(self.num_replicas):
                counts = self._draw(self.iteration, self.num_microbatches, self.keep_probs, replica)
                ran |= (counts > 0).any(axis=0)
        return frozenset((np.flatnonzero(ran) + 1).tolist())

    def replace_policy(self, policy: Policy) -> None:
        """Use another policy of this model from the next iteration on, whose decisions ranks compare anew.

        Raises:
            ValueError: it has another number of layers, or another residual_scale than was attached to the layers.
        """
        if (policy.num_layers, policy.residual_scale) != (self.policy.num_layers, self.policy.residual_scale):
            raise ValueError(
                f"the policy has {policy.num_layers} layers and residual_scale {policy.residual_scale!r}; it replaces "
                f"one of {self.policy.num_layers} and {self.policy.residual_scale!r}"
            )
        self.policy = policy
        self._agreed.forget()

    def set_stages(self, stages: Stages) -> None:
        """Use other stages of as many layers, before anything is loaded or begun: those of the pipeline as it is built.

        Raises:
            ValueError: as the policy's constructor.
        """
        self.policy = self.policy.with_stages(stages)
        self.growth.start(self.policy)
        self._agreed.forget()

    def kept(self, layer_number: int, microbatch: int) -> bool:
        """Whether the layer (1-based) runs in the microbatch (0-based) of the present iteration, on any sample."""
        return self._rows[self._row(layer_number, microbatch)][layer_number - 1] > 0

    def runs_some_samples(self, layer_number: int, microbatch: int) -> bool:
        """Whether a layer that is kept leaves samples of the microbatch out."""
        kept = self._rows[self._row(layer_number, microbatch)][layer_number - 1]
        return self.num_samples is not None and 0 < kept < self.num_samples

    def runs_some_tokens(self, layer_number: int) -> bool:
        """Whether the layer (1-based), where it is kept, leaves tokens of the present iteration's samples out."""
        return (
            self.tokens is not None and layer_number in self.tokens.layers and self.num_tokens < self.tokens.seq_length
        )

    def kept_samples(self, layer_number: int, microbatch: int) -> NDArray[np.int64] | None:
        """Which samples (0-based, sorted) of the microbatch run the layer; None is all of them."""
        row = self._row(layer_number, microbatch)
        if not self.runs_some_samples(layer_number, microbatch):
            return None if self._rows[row][layer_number - 1] else np.zeros(0, dtype=np.int64)
        assert self.sample_plan is not None, "granularity layer runs all samples or none"
        return np.flatnonzero(self.sample_plan[row, layer_number - 1])

    def _row(self, layer_number: int, microbatch: int) -> int:
        """The row of the plan that holds for a microbatch."""
        if not self._rows:
            raise RuntimeError(
                "DropController.begin_iteration(iteration, num_microbatches) must be called before each "
                "forward-backward pass in training mode"
            )
        check_layer_number(layer_number)
        if self.scope == "iteration" and self.tokens is None:
            return 0
        if not 0 <= microbatch < self.num_microbatches:
            raise RuntimeError(
                f"microbatch {microbatch} of layer {layer_number} is outside of the {self.num_microbatches} "
                "that begin_iteration was given; Megatron's schedules must number them"
            )
        return 0 if self.scope == "iteration" else microbatch

    def dropped_throughout(self, layer_number: int) -> bool:
        """Whether no microbatch of the present iteration runs the layer (1-based), on any replica.

        False before the first iteration.

        Raises:
            ValueError: distinct replicas drop different layers, and none knows the others' decisions.
        """
        if not self.replicas_run_alike:
            freeze: DroppedUpdate = "freeze"
            self.refuse({"dropped_update": freeze})
        check_layer_number(layer_number)
        return len(self.plan) > 0 and not bool(self.plan[:, layer_number - 1].any())

    def branch_scale(self, layer_number: int) -> float:
        """Factor of a kept layer's attention and MLP branches: 1, or 1 / keep_prob (docs/method.md, section 4)."""
        check_layer_number(layer_number)
        return self._scales[layer_number - 1]

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to take the same decisions, also on another parallel layout."""
        self.growth.end_iteration(self._ran)
        return {
            "seed": self.seed,
            "scope": self.scope,
            "sampler": self.sampler,
            "stages": plain_stages(self.stages),
            "granularity": self.granularity,
            "num_samples": self.num_samples,
            **({} if self.tokens is None else {"token_strata": self.tokens.strata}),
            "replicas": self.replicas,
            "num_layers": self.num_layers,
            "iteration": self.iteration,
            "growth": self.growth.state_dict(self.policy),
        }

    def load_state_dict(self, state: dict[str, Any]) -> list[str]:
        """Take over a saved run's stages and token strata; return a line for each setting that now differs from it.

        Settings that a user changed on purpose (another seed, sampler or scope) stay as configured now.

        Raises:
            ValueError: the state is of a model with another number of layers, or not what state_dict made.
        """
        check_keys(
            "the drop state", state, ("seed", "scope", "sampler", "stages", "replicas", "num_layers", "iteration")
        )
        if state["num_layers"] != self.num_layers:
            raise ValueError(
                f"the drop state is of a model with {state['num_layers']} layers, this one has {self.num_layers}: it "
                "must have as many; a HybridModel counts as the GPT that it was with unit 'block'"
            )
        if self.sampler == "balanced" and state["sampler"] == "balanced":
            self.stages = state["stages"]
        if self.tokens is not None and "token_strata" in state:
            with named_as_fields():
                self.tokens = replace(self.tokens, strata=state["token_strata"])
        self._agreed.forget()
        self.policy, line = self.growth.load_state_dict(state.get("growth"), self.policy, state["iteration"] + 1)
        state = {"granularity": "layer", "num_samples": None, **state}  # older states have neither
        present = self.state_dict()
        return [line] * bool(line) + [
            f"drop {name}: {state[name]!r} when saved, {present[name]!r} now"
            for name in ("seed", "scope", "sampler", "granularity", "num_samples", "replicas")
            if state[name] != present[name]
        ]

    def _draw(self, iteration: int, num_microbatches: int, keep_probs: np.ndarray, replica: int) -> NDArray[np.int64]:
        """How many samples of each microbatch run each layer, or 1 and 0 of another granularity, [microbatches, L]."""
        return draw_sample_counts(
            keep_probs,
            num_samples=self.num_samples or 1,
            seed=self.seed,
            iteration=iteration,
            num_microbatches=num_microbatches,
            scope=self.scope,
            sampler=self.sampler,
            stages=self.stages,
            replica=0 if self.replicas_run_alike else replica,
        )

    def _record(self, iteration: int, num_microbatches: int) -> np.ndarray:
        """This rank's view of the window (agreement.py); for `distinct` replicas it is of replica 0's decisions."""
        window = range(iteration, iteration + self._agreed.length)
        keep_probs = [self.policy.keep_probs(t) for t in window]
        return record_of_window(
            Settings(iteration, num_microbatches, self.num_samples or 0, self.num_layers, self.seed),
            repr(
                (
                    *(self.scope, self.sampler, self.granularity, self.replicas, self.scales_residual),
                    *(() if self.tokens is None else (self.tokens,)),
                    *(self.growth.begins_as, sorted(self.growth.begun)),
                )
            ),
            keep_probs,
            (self._draw(t, num_microbatches, probs, replica=0) for t, probs in zip(window, keep_probs, strict=True)),
        )
