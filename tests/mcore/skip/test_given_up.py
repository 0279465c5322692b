"""A forward pass whose backward pass never comes leaves nothing behind: in own loops that give a batch up and go on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel.random import _unset_checkpointing
from torch.utils.checkpoint import checkpoint

from megatron_sbld.controller import DropController
from megatron_sbld.mcore import make_switchable
from megatron_sbld.method.policy import Policy
from tests.harness import model_parallel, single_process
from tests.mcore.helpers import MICRO_BATCH, SEQUENCE, VOCAB, Listed, forget_moe_losses, tiny_config, tiny_gpt
from tests.mcore.skip.runs import BLOCK_RECOMPUTE, FULL_RECOMPUTE

LAYERS, MICROBATCHES = 4, 4
MOE = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_aux_loss_coeff": 0.5,
    "moe_token_dispatcher_type": "alltoall",
    "add_bias_linear": False,
}
BRANCHES_SCALED = Listed(0.6, 0.5, 0.5, 0.4, residual_scale="inverse_keep_prob")
SETTINGS: dict[str, dict[str, Any]] = {
    "full recomputation": {"config": FULL_RECOMPUTE},
    "block recomputation": {"config": BLOCK_RECOMPUTE},
    "no recomputation": {},
    "samples": {"config": FULL_RECOMPUTE, "granularity": "sample"},
    "scaled branches": {"config": FULL_RECOMPUTE, "policy": BRANCHES_SCALED},
    "dropout": {"config": {**FULL_RECOMPUTE, "hidden_dropout": 0.1}},
    "experts": {"config": {**FULL_RECOMPUTE, **MOE}},
    "experts, samples": {"config": {**FULL_RECOMPUTE, **MOE}, "granularity": "sample"},
    "one decision an iteration": {"config": FULL_RECOMPUTE, "scope": "iteration"},
}

RECOMPUTED = ["full recomputation", "samples", "scaled branches", "dropout"]


@pytest.fixture(scope="module", autouse=True)
def _one_process() -> Iterator[None]:
    forget_moe_losses()
    with single_process(), model_parallel():
        yield
    _unset_checkpointing()  # an error in a recomputed layer leaves Megatron's flag set, for all tests to come


class Loop:
    """A loop without Megatron's schedules: microbatch after microbatch, forward and backward."""

    def __init__(
        self,
        config: dict[str, Any] | None = None,
        policy: Policy | None = None,
        granularity: Any = "layer",
        scope: Any = "microbatch",
    ) -> None:
        (self.model,) = tiny_gpt(tiny_config(num_layers=LAYERS, **(config or {})))
        self.controller = DropController(
            policy or Listed(0.5, 0.5, 0.5, 0.5),
            seed=3,
            scope=scope,
            granularity=granularity,
            num_samples=MICRO_BATCH if granularity == "sample" else None,
        )
        make_switchable(self.model, self.controller)
        self.model.train()
        self.begin(1)

    def begin(self, iteration: int, num_microbatches: int = MICROBATCHES) -> None:
        """The iteration's decisions, and its random numbers for dropout."""
        self.model.zero_grad(set_to_none=True)
        self.controller.begin_iteration(iteration, num_microbatches)

    def loss(self, microbatch: int) -> torch.Tensor:
        """The forward pass; dropout's numbers are the microbatch's, whatever was drawn before."""
        torch.manual_seed(microbatch)
        for layer in self.model.decoder.layers:
            layer.current_microbatch = microbatch
        text = torch.randint(VOCAB, (MICRO_BATCH, SEQUENCE), generator=torch.Generator().manual_seed(microbatch))
        positions = torch.arange(SEQUENCE).expand(MICRO_BATCH, -1)
        return self.model(text, positions, None, labels=text.roll(-1, dims=1)).mean()

    def run(self, microbatches: range | list[int] = range(MICROBATCHES)) -> dict[str, torch.Tensor]:
        """Forward and backward of the microbatches; the gradients."""
        for microbatch in microbatches:
            self.loss(microbatch).backward()
        return {name: param.grad for name, param in self.model.named_parameters() if param.grad is not None}


def all_forward_passes(loop: Loop) -> None:
    """A validation of the loop's own that forgets model.eval(), or losses that were not finite."""
    for microbatch in range(MICROBATCHES):
        loop.loss(microbatch)


def forward_passes_without_gradients(loop: Loop) -> None:
    with torch.no_grad():
        all_forward_passes(loop)


def forward_passes_of_another_iteration(loop: Loop) -> None:
    loop.begin(2)
    all_forward_passes(loop)
    loop.begin(2, 2 * MICROBATCHES)


def an_error_in_forward(loop: Loop) -> None:
    with fails_at(loop.model.decoder.layers[2]):
        loop.loss(0)


def an_error_in_the_first_layer(loop: Loop) -> None:
    with fails_at(loop.model.decoder.layers[0]):
        loop.loss(0)


def an_error_in_recomputation(loop: Loop) -> None:
    loop.loss(0).backward()
    loss = loop.loss(1)
    with fails_at(loop.model.decoder.layers[1]):
        loss.backward()


@contextmanager
def fails_at(layer: torch.nn.Module) -> Iterator[None]:
    """The next pass of the layer ends with torch's error for too little memory."""

    def hook(*_: Any) -> None:
        raise torch.OutOfMemoryError

    handle = layer.register_forward_pre_hook(hook)
    with pytest.raises(torch.OutOfMemoryError):
        yield
    handle.remove()


GIVEN_UP: list[Callable[[Loop], None]] = [
    all_forward_passes,
    forward_passes_without_gradients,
    forward_passes_of_another_iteration,
    an_error_in_forward,
    an_error_in_the_first_layer,
]


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_repeated_iteration_has_the_gradients_of_an_undisturbed_one(setting: str) -> None:
    expected = Loop(**SETTINGS[setting]).run()
    loop = Loop(**SETTINGS[setting])
    recomputes_all = SETTINGS[setting].get("config", {}).get("recompute_method") == "uniform"
    for give_up in (*GIVEN_UP, *([an_error_in_recomputation] if recomputes_all else [])):
        give_up(loop)
        loop.begin(1)
        assert_equal(loop.run(), expected)


@pytest.mark.parametrize("setting", RECOMPUTED)
def test_a_microbatch_that_is_left_out_changes_nothing_for_the_next_ones(setting: str) -> None:
    """As a loop does with a loss that is not finite, without another begin_iteration."""
    expected = Loop(**SETTINGS[setting]).run([0, 2, 3])
    loop = Loop(**SETTINGS[setting])
    loop.loss(0).backward()
    given_up = loop.loss(1)
    assert_equal(loop.run([2, 3]), expected)
    assert given_up.isfinite()


@pytest.mark.parametrize("setting", RECOMPUTED)
def test_backward_passes_may_come_in_another_order_than_forward_passes(setting: str) -> None:
    loop, expected = Loop(**SETTINGS[setting]), Loop(**SETTINGS[setting]).run([1, 0])
    first, second = loop.loss(0), loop.loss(1)
    second.backward()
    first.backward()
    assert_equal(loop.run([]), expected)


def test_evaluation_between_forward_and_backward_changes_nothing() -> None:
    expected = Loop(FULL_RECOMPUTE).run([0])
    loop = Loop(FULL_RECOMPUTE)
    loss = loop.loss(0)
    loop.model.eval()
    loop.loss(3)
    loop.model.train()
    loss.backward()
    assert_equal(loop.run([]), expected)


def test_recomputing_in_evaluation_mode_is_refused() -> None:
    loop = Loop(FULL_RECOMPUTE)
    loss = loop.loss(0)
    loop.model.eval()
    with pytest.raises(RuntimeError, match=r"layer \d recomputes a forward pass of training in evaluation mode"):
        loss.backward()


@pytest.mark.parametrize("scope", ["iteration", "microbatch"])
@pytest.mark.parametrize("next_iteration", [1, 2])
def test_recomputing_a_pass_from_before_begin_iteration_is_refused(scope: str, next_iteration: int) -> None:
    loop = Loop(FULL_RECOMPUTE, scope=scope)
    loss = loop.loss(0)
    loop.begin(next_iteration)
    message = rf"whose decisions are gone: begin_iteration\({next_iteration}, 4\) was called between that forward pass"
    with pytest.raises(RuntimeError, match=message):
        loss.backward()


def test_recomputing_a_pass_that_another_controller_decided_is_refused() -> None:
    loop = Loop(FULL_RECOMPUTE)
    loss = loop.loss(0)
    make_switchable(loop.model, DropController(Listed(1, 1, 1, 1)))
    with pytest.raises(RuntimeError, match="ran before make_switchable gave it this controller"):
        loss.backward()


def recompute_with_torch(loop: Loop, reentrant: bool) -> None:
    """Let torch.utils.checkpoint recompute each layer, which Megatron knows nothing of."""
    for layer in loop.model.decoder.layers:
        stock = layer.forward

        def forward(*, hidden_states: torch.Tensor, stock: Any = stock, **inputs: Any) -> Any:
            return checkpoint(lambda hidden: stock(hidden, **inputs), hidden_states, use_reentrant=reentrant)

        layer.forward = forward


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("granularity", ["layer", "sample"])
def test_torchs_recomputation_takes_the_iterations_decisions_and_none_of_a_microbatchs(
    granularity: str, reentrant: bool
) -> None:
    """It says nothing of which pass comes back, so that another microbatch's decisions would be taken in silence."""
    expected = Loop(scope="iteration", granularity=granularity).run([0, 1])
    loop = Loop(scope="iteration", granularity=granularity)
    recompute_with_torch(loop, reentrant)
    first, second = loop.loss(0), loop.loss(1)
    first.backward()
    second.backward()
    assert_equal(loop.run([]), expected)
    loss = loop.loss(0)
    loop.begin(2)
    with pytest.raises(RuntimeError, match=r"whose decisions are gone: begin_iteration\(2, 4\)"):
        loss.backward()
    loop = Loop(scope="microbatch", granularity=granularity)
    recompute_with_torch(loop, reentrant)
    loss = loop.loss(0)
    with pytest.raises(RuntimeError, match="recomputed by something else than Megatron's recompute_granularity"):
        loss.backward()
    loop.begin(2, 1)
    loop.loss(0).backward()


class FailsAtThree(Listed):
    """A policy of a user's own with a mistake in it."""

    def keep_probs(self, iteration: int) -> Any:
        if iteration == 3:
            raise ZeroDivisionError
        return super().keep_probs(iteration)


def test_an_iteration_that_could_not_begin_leaves_the_present_one_whole() -> None:
    controller = DropController(FailsAtThree(0.5, 0.5, 0.5, 0.5), scope="microbatch", window=1)
    controller.begin_iteration(2, 4)
    plan = controller.plan
    with pytest.raises(ZeroDivisionError):
        controller.begin_iteration(3, 2)
    assert (controller.iteration, controller.num_microbatches, controller.begun) == (2, 4, 1)
    assert controller.plan is plan
