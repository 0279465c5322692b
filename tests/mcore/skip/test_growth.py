"""Layers that begin during a run: before the growth a shallower model, then Adam's own first step of what was asked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from megatron_sbld.controller import DropController
from megatron_sbld.mcore import freeze_dropped_layers, grow_in_stages, make_switchable
from megatron_sbld.method.policy import FullDepthPolicy, LayerDropPolicy, Policy, StagedPolicy
from megatron_sbld.method.schedule import Constant
from tests.harness import model_parallel, single_process
from tests.mcore.helpers import build_optimizer, forward_backward, mean_loss, tiny_config, tiny_gpt, wrap_ddp
from tests.mcore.skip.freeze_helpers import State, layer_of, states, step

SHARDED = {"use_distributed_optimizer": True}
KINDS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "fp32, distributed optimizer": {"ddp": SHARDED},
    "bf16": {"params_dtype": torch.bfloat16, "bf16": True},
    "bf16, distributed optimizer": {"params_dtype": torch.bfloat16, "bf16": True, "ddp": SHARDED},
    "fp16": {"params_dtype": torch.float16, "fp16": True},
}
"""Precision and optimizer; all but two are slow."""
QUICK = ("fp32", "bf16, distributed optimizer")
every_kind = pytest.mark.parametrize(
    "kind", [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
)
T = 10
LR = 1e-2


@pytest.fixture(scope="module", autouse=True)
def _one_process() -> Iterator[None]:
    with single_process():
        yield


class Training:
    """A tiny GPT whose layers begin in stages."""

    def __init__(
        self,
        policy: Policy,
        init: Any = "random",
        *,
        copy_moments: bool = False,
        freeze: bool = False,
        ddp: dict[str, Any] | None = None,
        optimizer: dict[str, Any] | None = None,
        **config: Any,
    ) -> None:
        chunks = tiny_gpt(tiny_config(num_layers=policy.num_layers, **config))
        self.controller = DropController(policy)
        make_switchable(chunks, self.controller)
        self.models = wrap_ddp(chunks, **(ddp or {}))
        self.optimizer = build_optimizer(
            self.models, **{"weight_decay": 0.1, "lr": LR, "clip_grad": 0.0, **(optimizer or {})}
        )
        if freeze:
            freeze_dropped_layers(self.models, self.optimizer)
        if policy.stages is not None:
            grow_in_stages(self.models, self.optimizer, self.controller, init, copy_moments=copy_moments)

    def step(self, iteration: int) -> tuple[bool, float, int]:
        return step(self.models, self.optimizer, iteration, self.controller)

    def states(self) -> dict[str, State]:
        return states(self.models, self.optimizer)

    @torch.no_grad()
    def loss(self, iteration: int) -> float:
        """Of an iteration's data, in evaluation mode."""
        for model in self.models:
            model.eval()
        return mean_loss(forward_backward(self.models, iteration, 8, forward_only=True))


def staged(num_layers: int, *counts: int, rule: Any = "spread") -> StagedPolicy:
    """As many layers as `counts` says until iterations 4, 6, ..., then all."""
    stages = [[(4 + 2 * index) / T, count] for index, count in enumerate(counts)]
    return StagedPolicy([*stages, [1.0, num_layers]], num_layers, train_iters=T, stage_layers=rule)


def shallow_copy_of(deep: Training, layers: list[int], **options: Any) -> Training:
    """A stock model of these layers alone, with the weights of the deep one."""
    shallow = Training(FullDepthPolicy(len(layers)), **options)
    weights = {name: state["weight"] for name, state in deep.states().items()}
    for model in shallow.models:
        for name, param in model.module.named_parameters():
            name = name.removeprefix("module.")
            place = layer_of(name)
            if place is not None:
                name = name.replace(f"layers.{place - 1}.", f"layers.{layers[place - 1] - 1}.")
            param.data.copy_(weights[name])
    shallow.optimizer.reload_model_params()
    return shallow


@every_kind
@pytest.mark.parametrize(
    ("num_layers", "counts"), [(4, (1,)), (4, (2,)), (2, (1,))], ids=["1 of 4", "2 of 4", "1 of 2"]
)
def test_before_the_growth_it_is_the_shallower_model_bit_for_bit(
    num_layers: int, counts: tuple[int, ...], kind: str
) -> None:
    options = KINDS[kind]
    with model_parallel():
        deep = Training(staged(num_layers, *counts), **options)
        layers = sorted(deep.controller.growth.begun)
        shallow = shallow_copy_of(deep, layers, **options)
        for iteration in range(1, 5):
            assert deep.step(iteration)[0] == shallow.step(iteration)[0]  # the norms' sums have another order
            assert deep.loss(iteration + 1) == shallow.loss(iteration + 1)
        expected = shallow.states()
        for name, state in deep.states().items():
            place = layer_of(name)
            if place is not None and place in layers:
                name = name.replace(f"layers.{place - 1}.", f"layers.{layers.index(place)}.")
            if place is None or place in layers:
                assert all(torch.equal(state[key], expected[name][key]) for key in state), name


def test_a_waiting_layer_keeps_weights_and_moments_whatever_dropped_update_says() -> None:
    with model_parallel():
        for policy in (staged(4, 1), LayerDropPolicy(Constant(0.7), 4, stages=staged(4, 2).stages)):
            training = Training(policy)
            before = training.states()
            for iteration in range(1, 5):
                training.step(iteration)
            waiting = set(range(1, 5)) - training.controller.growth.begun
            assert waiting
            for name, state in training.states().items():
                if layer_of(name) in waiting:
                    assert torch.equal(state["weight"], before[name]["weight"])
                    assert not state["exp_avg"].any()
                    assert not state["exp_avg_sq"].any()
                    assert state["step"] == 4


@every_kind
def test_the_first_step_of_a_layer_is_adams_own_first_one(kind: str) -> None:
    with model_parallel():
        training = Training(staged(4, 1), optimizer={"weight_decay": 0.0}, **KINDS[kind])
        for iteration in range(1, 5):
            training.step(iteration)
        before = training.states()
        training.step(5)
        for name, state in training.states().items():
            if layer_of(name) in (2, 3, 4):
                corrected = state["exp_avg"] / (1 - 0.9**5), state["exp_avg_sq"] / (1 - 0.999**5)
                torch.testing.assert_close(corrected[0].square(), corrected[1], rtol=1e-3, atol=1e-30)
                gradient = corrected[0]
                moved = (before[name]["main"] - state["main"]).float()
                expected = LR * gradient / (gradient.abs() + 1e-8)
                torch.testing.assert_close(moved.view(-1), expected.view(-1).float(), rtol=1e-2, atol=1e-6)
        training.step(6)  # and the second one is no larger than Adam's: lr times (0.9 g + 0.1 g') / (0.9 + 0.1)
        assert training.controller.state_dict()["growth"]["first_steps"] == []


def test_a_layer_that_its_policy_drops_at_first_waits_for_its_first_gradient() -> None:
    """Inside the gate another policy may leave a new layer out: its first step is the first with a gradient."""
    with model_parallel():
        stages = staged(4, 1).stages
        training = Training(LayerDropPolicy(Constant(0.4), 4, stages=stages), optimizer={"weight_decay": 0.0})
        awaited, seen = {2, 3, 4}, 0
        for iteration in range(1, T + 1):
            before = training.states()
            training.step(iteration)
            ran = {layer for layer in awaited if iteration > 4 and training.controller.kept(layer, 0)}
            for name, state in training.states().items():
                if layer_of(name) in ran:
                    moved = (before[name]["main"] - state["main"]).abs()
                    assert 0.9 * LR < moved.max() < 1.01 * LR
                    seen += 1
            awaited -= ran
            assert training.controller.state_dict()["growth"]["first_steps"] == (
                sorted(awaited) if iteration > 4 else []
            )
        assert seen


@every_kind
def test_zero_projections_leave_the_loss_as_it_was(kind: str) -> None:
    with model_parallel():
        training = Training(staged(4, 1), "zero", **KINDS[kind])
        for iteration in range(1, 5):
            training.step(iteration)
        before = training.loss(5)
        training.controller.begin_iteration(5, 8)
        assert training.controller.growth.begun == {1, 2, 3, 4}
        assert training.loss(5) == pytest.approx(before, rel=1e-6)
        for iteration in range(5, 8):
            training.step(iteration)
        assert training.states()["decoder.layers.2.mlp.linear_fc2.weight"]["main"].any()


@every_kind
@pytest.mark.parametrize("copy_moments", [False, True])
def test_copies_are_those_of_the_nearest_running_layer(copy_moments: bool, kind: str) -> None:
    with model_parallel():
        policy = staged(4, 2, rule=[2, 4])
        training = Training(policy, "copy", copy_moments=copy_moments, **KINDS[kind])
        for iteration in range(1, 5):
            training.step(iteration)
        before = training.states()
        training.controller.begin_iteration(5, 8)
        found = training.states()
        for name, state in found.items():
            place = layer_of(name)
            if place is None:
                assert all(torch.equal(state[key], before[name][key]) for key in state)
                continue
            source = before[name.replace(f"layers.{place - 1}.", f"layers.{ {1: 2, 2: 2, 3: 2, 4: 4}[place] - 1 }.")]
            copied = ["weight", "main"] + ["exp_avg", "exp_avg_sq"] * (copy_moments or place in (2, 4))
            assert all(torch.equal(state[key], source[key]) for key in copied), name
            assert copy_moments or place in (2, 4) or not state["exp_avg"].any()


def test_sgd_begins_layers_too_but_has_no_moments_to_copy() -> None:
    sgd = {"optimizer": "sgd", "sgd_momentum": 0.9}
    with model_parallel():
        training = Training(staged(4, 1), "copy", optimizer=sgd)
        before = training.states()
        for iteration in range(1, 7):
            assert training.step(iteration)[0]
        moved = training.states()["decoder.layers.2.mlp.linear_fc2.weight"]["main"]
        assert not torch.equal(moved, before["decoder.layers.2.mlp.linear_fc2.weight"]["main"])
        with pytest.raises(ValueError, match="stage_copy_moments = True does not work with SGD"):
            Training(staged(4, 1), "copy", copy_moments=True, optimizer=sgd)


def test_copies_of_layers_of_another_kind_are_refused_before_training() -> None:
    experts = {"num_moe_experts": 2, "moe_layer_freq": [0, 1, 1, 1], "add_bias_linear": False}
    with model_parallel():
        with pytest.raises(ValueError, match="layer 2: it would be a copy of layer 1, whose parameters are others"):
            Training(staged(4, 1, rule="first"), "copy", **experts)
        training = Training(staged(4, 2, rule="first"), "copy", **experts)  # 3 and 4 are copies of 2
        assert all(training.step(iteration)[0] for iteration in range(1, 7))


def test_chunks_that_are_given_one_by_one_are_refused() -> None:
    """The second call would take the place of the first one, whose layers would then move while they wait."""
    with model_parallel():
        chunks = [chunk for _ in range(2) for chunk in tiny_gpt(tiny_config(num_layers=4))]
        controller = DropController(staged(4, 1))
        make_switchable(chunks, controller)
        models = wrap_ddp(chunks)
        optimizer = build_optimizer(models)
        grow_in_stages(models[:1], optimizer, controller)
        with pytest.raises(ValueError, match="give the chunks on this rank as one list"):
            grow_in_stages(models[1:], optimizer, controller)


def test_stages_that_nobody_attends_to_are_refused() -> None:
    with model_parallel():
        chunks = tiny_gpt(tiny_config(num_layers=4))
        controller = DropController(staged(4, 1))
        make_switchable(chunks, controller)
        with pytest.raises(ValueError, match="call grow_in_stages"):
            controller.begin_iteration(1, 8)


def test_one_layer_and_growth_at_once() -> None:
    with model_parallel():
        training = Training(StagedPolicy([[1.0, 1]], 1, train_iters=T))
        assert training.step(1)[0]
        at_once = Training(StagedPolicy([[0.0, 1], [1.0, 4]], 4, train_iters=T), "copy")
        assert at_once.controller.growth.begun == {1}
        assert at_once.step(1)[0]
        assert at_once.controller.growth.begun == {1, 2, 3, 4}


@pytest.mark.parametrize("order", ["freeze first", "growth first"])
def test_freezing_dropped_layers_goes_with_stages(order: str) -> None:
    with model_parallel():
        policy = LayerDropPolicy(Constant(0.5), 4, stages=staged(4, 2).stages)
        training = Training(policy, freeze=order == "freeze first")
        if order == "growth first":
            freeze_dropped_layers(training.models, training.optimizer)
        frozen = 0
        for iteration in range(1, T + 1):
            before = training.states()
            training.step(iteration)
            for name, state in training.states().items():
                place = layer_of(name)
                if place is not None and training.controller.dropped_throughout(place):
                    frozen += 1
                    assert torch.equal(state["main"], before[name]["main"])
        assert frozen
