"""`freeze`: a layer that an iteration dropped keeps weights and moments bit for bit; all else is as with `apply`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer

from megatron_sbld.controller import DropController
from megatron_sbld.mcore import freeze_dropped_layers, make_switchable
from megatron_sbld.mcore.skip import freeze as dropped_update
from megatron_sbld.method.policy import FullDepthPolicy, LayerDropPolicy, Policy
from megatron_sbld.method.schedule import Constant
from tests.harness import model_parallel, single_process
from tests.mcore.helpers import GLOBAL_MICROBATCHES, build_optimizer, forward_backward, tiny_config, tiny_gpt, wrap_ddp
from tests.mcore.skip.freeze_helpers import Patterns, State, assert_frozen, layer_of, states, step, steps

LAYERS = 4
PATTERNS = Patterns("1011", "1101", "0000", "0110", "1111", "1011")
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"params_dtype": torch.bfloat16, "bf16": True},
    "fp16": {"params_dtype": torch.float16, "fp16": True},
}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "distributed": {"use_distributed_optimizer": True},
}


@pytest.fixture(scope="module", autouse=True)
def _one_process() -> Iterator[None]:
    with single_process():
        yield


class Training:
    """A tiny GPT, its optimizer with weight decay, and what it has done."""

    def __init__(
        self,
        policy: Policy | None,
        *,
        freeze: bool,
        ddp: dict[str, Any] | None = None,
        optimizer: dict[str, Any] | None = None,
        scope: Any = "iteration",
        **config: Any,
    ) -> None:
        chunks = tiny_gpt(tiny_config(num_layers=LAYERS, **config))
        self.controller = None
        if policy is not None:
            self.controller = DropController(policy, scope=scope)
            make_switchable(chunks, self.controller)
        self.models = wrap_ddp(chunks, **(ddp or {}))
        options = {"weight_decay": 0.1, "log_num_zeros_in_grad": True, **(optimizer or {})}
        self.optimizer = build_optimizer(self.models, **options)
        if freeze:
            freeze_dropped_layers(self.models, self.optimizer)

    def step(self, iteration: int) -> tuple[bool, float, int]:
        return step(self.models, self.optimizer, iteration, self.controller)

    def states(self) -> dict[str, State]:
        return states(self.models, self.optimizer)

    def dropped(self) -> set[int]:
        assert self.controller is not None
        return {layer for layer in range(1, LAYERS + 1) if self.controller.dropped_throughout(layer)}


def assert_equal_states(
    found: dict[str, State], expected: dict[str, State], *, but_for: set[int] = frozenset()
) -> None:
    for name, state in expected.items():
        if but_for is None or layer_of(name) != but_for:
            assert found[name].keys() == state.keys()
            for key, tensor in state.items():
                assert torch.equal(found[name][key], tensor), (name, key)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_dropped_layer_keeps_weights_and_moments_bit_for_bit(precision: str, kind: str) -> None:
    with model_parallel():
        training = Training(PATTERNS, freeze=True, ddp=OPTIMIZERS[kind], **PRECISIONS[precision])
        dropped = []
        for iteration in range(1, 7):
            before = training.states()
            assert training.step(iteration)[0]
            after = training.states()
            dropped.append(training.dropped())
            assert_frozen(before, after, dropped[-1])
            assert all({"weight", "main", "exp_avg", "exp_avg_sq", "step"} == state.keys() for state in after.values())
            assert steps(after) == {iteration}
        assert dropped == [{2}, {3}, {1, 2, 3, 4}, {1, 4}, set(), {2}]


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_all_but_the_dropped_layers_is_as_with_apply(precision: str, kind: str) -> None:
    """Gradient norm, clipping and the count of zeros too; the dropped layer itself is where they differ."""
    with model_parallel():
        results, found = [], []
        for freeze in (False, True):
            training = Training(PATTERNS, freeze=freeze, ddp=OPTIMIZERS[kind], **PRECISIONS[precision])
            results.append(training.step(1))
            found.append(training.states())
        assert results[0] == results[1]
        assert results[0][1] > 1.0  # so gradients were clipped
        applied, frozen = found
        assert_equal_states(frozen, applied, but_for=2)
        differ = [name for name in applied if not torch.equal(applied[name]["main"], frozen[name]["main"])]
        assert {layer_of(name) for name in differ} == {2}  # weight decay moves it with apply
        assert steps(applied) == steps(frozen) == {1}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_nothing_dropped_is_stock_bit_for_bit(kind: str) -> None:
    with model_parallel():
        stock = Training(None, freeze=False, ddp=OPTIMIZERS[kind], hidden_dropout=0.1)
        expected = [stock.step(iteration) for iteration in range(1, 4)]
    with model_parallel():
        training = Training(FullDepthPolicy(LAYERS), freeze=True, ddp=OPTIMIZERS[kind], hidden_dropout=0.1)
        assert [training.step(iteration) for iteration in range(1, 4)] == expected
        assert_equal_states(training.states(), stock.states())


def test_a_layer_that_some_microbatch_ran_is_not_frozen() -> None:
    with model_parallel():
        training = Training(LayerDropPolicy(Constant(0.15), LAYERS), freeze=True, scope="microbatch")
        partly = 0
        for iteration in range(1, 9):
            before = training.states()
            training.step(iteration)
            plan = training.controller.plan
            assert training.dropped() == {layer + 1 for layer in range(LAYERS) if not plan[:, layer].any()}
            assert_frozen(before, training.states(), training.dropped())
            partly += sum(0 < plan[:, layer].sum() < len(plan) for layer in range(LAYERS))
        assert partly > 0


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_step_that_fp16_skips_for_overflow_changes_nothing_and_counts_nothing(kind: str) -> None:
    with model_parallel():
        scale = {"initial_loss_scale": 2.0**60}
        training = Training(PATTERNS, freeze=True, ddp=OPTIMIZERS[kind], optimizer=scale, **PRECISIONS["fp16"])
        before = training.states()
        assert training.step(1)[0] is False
        assert_equal_states(training.states(), before)
        training.optimizer.chained_optimizers[0].grad_scaler._scale.fill_(1024.0)
        for iteration, applied in ((2, 1), (3, 2), (4, 3)):
            before = training.states()
            assert training.step(iteration)[0]
            assert_frozen(before, training.states(), training.dropped())
            assert steps(training.states()) == {applied}


def test_sgd_freezes_weights_and_momentum() -> None:
    with model_parallel():
        training = Training(PATTERNS, freeze=True, optimizer={"optimizer": "sgd"})
        for iteration in range(1, 7):
            before = training.states()
            training.step(iteration)
            assert_frozen(before, training.states(), training.dropped())


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_parameters_of_experts_which_have_an_optimizer_of_their_own_are_frozen_too(kind: str) -> None:
    with model_parallel():
        chunks = tiny_gpt(tiny_config(num_layers=LAYERS))
        for name, param in chunks[0].named_parameters():
            if ".mlp." in name:
                param.allreduce = False  # Megatron's mark of an expert's parameter
        controller = DropController(PATTERNS)
        make_switchable(chunks, controller)
        models = wrap_ddp(chunks, **OPTIMIZERS[kind])
        optimizer = build_optimizer(models, weight_decay=0.1)
        assert len(optimizer.chained_optimizers) == 2
        freeze_dropped_layers(models, optimizer)
        for iteration in range(1, 7):
            before = states(models, optimizer)
            step(models, optimizer, iteration, controller)
            after = states(models, optimizer)
            dropped = {layer for layer in range(1, LAYERS + 1) if controller.dropped_throughout(layer)}
            assert_frozen(before, after, dropped)
            assert steps(after) == {iteration}


def test_calling_it_again_changes_nothing_and_another_controller_is_asked() -> None:
    with model_parallel():
        training = Training(PATTERNS, freeze=True)
        freeze_dropped_layers(training.models, training.optimizer)
        training.controller = DropController(Patterns("0111"))
        make_switchable(training.models, training.controller)
        before = training.states()
        training.step(1)
        assert_frozen(before, training.states(), {1})
        assert steps(training.states()) == {1}


def test_layers_that_ran_in_evaluation_mode_are_updated() -> None:
    """Nothing is dropped there, so their gradients are real."""
    with model_parallel():
        training = Training(Patterns("0000"), freeze=True)
        before = training.states()
        step(training.models, training.optimizer, 1, training.controller, training=False)
        assert_frozen(before, training.states(), set())


def test_a_step_before_the_first_iteration_freezes_nothing() -> None:
    assert not any(DropController(PATTERNS).dropped_throughout(layer) for layer in range(1, LAYERS + 1))


def test_distinct_replicas_are_refused_by_name() -> None:
    with model_parallel():
        chunks = tiny_gpt(tiny_config(num_layers=LAYERS))
        make_switchable(chunks, DropController(PATTERNS, sampler="balanced", replicas="distinct"))
        models = wrap_ddp(chunks)
        with pytest.raises(ValueError, match="replicas = 'distinct' does not work with dropped_update = 'freeze'"):
            freeze_dropped_layers(models, build_optimizer(models))


def test_a_model_that_is_not_switchable_and_an_optimizer_of_another_model_are_refused() -> None:
    with model_parallel():
        models = wrap_ddp(tiny_gpt(tiny_config(num_layers=LAYERS)))
        with pytest.raises(ValueError, match=r"a decoder layer is a TransformerLayer: call make_switchable"):
            freeze_dropped_layers(models, build_optimizer(models))
        for ddp in OPTIMIZERS.values():
            training = Training(PATTERNS, freeze=False, ddp=ddp)
            with pytest.raises(ValueError, match=r"does not hold .* of layer 1: it must be built from this model"):
                freeze_dropped_layers(training.models, Training(PATTERNS, freeze=False, ddp=ddp).optimizer)


@pytest.mark.parametrize("name", ["optimizer_cpu_offload", "use_precision_aware_optimizer", "optimizer_cuda_graph"])
def test_switches_under_which_nothing_would_be_frozen_are_refused_by_name(name: str) -> None:
    with model_parallel():
        training = Training(PATTERNS, freeze=False)
        setattr(training.optimizer.config, name, True)
        with pytest.raises(ValueError, match=f"dropped_update 'freeze' does not work with {name} = True"):
            freeze_dropped_layers(training.models, training.optimizer)


def test_megatron_fsdp_is_refused_by_name() -> None:
    with model_parallel():
        training = Training(PATTERNS, freeze=False, ddp=OPTIMIZERS["distributed"])
        training.optimizer.chained_optimizers[0].ddp_config.use_megatron_fsdp = True
        with pytest.raises(ValueError, match="does not work with use_megatron_fsdp = True"):
            freeze_dropped_layers(training.models, training.optimizer)


def test_parameters_in_fp8_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """They need Transformer Engine and a GPU: here only the refusal is shown."""
    with model_parallel():
        training = Training(PATTERNS, freeze=False)
        monkeypatch.setattr(dropped_update, "is_float8tensor", lambda param: param.ndim == 2)
        with pytest.raises(ValueError, match=r"parameters in fp8 \(layer 1, self_attention.linear_proj.weight\)"):
            freeze_dropped_layers(training.models, training.optimizer)


def test_kinds_of_optimizers_that_are_not_known_to_leave_out_a_parameter_are_refused_by_name() -> None:
    with model_parallel():
        training = Training(PATTERNS, freeze=False)
        (part,) = training.optimizer.chained_optimizers
        layer_wise = ChainedOptimizer.__new__(LayerWiseDistributedOptimizer)
        layer_wise.is_stub_optimizer = False
        with pytest.raises(ValueError, match="does not work with LayerWiseDistributedOptimizer"):
            freeze_dropped_layers(training.models, layer_wise)
        part.optimizer = torch.optim.RMSprop(part.optimizer.param_groups)
        with pytest.raises(ValueError, match="does not work with RMSprop: allowed are torch's Adam"):
            freeze_dropped_layers(training.models, training.optimizer)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_an_orthogonalised_momentum_moves_a_dropped_layer_by_a_whole_step() -> None:
    """Why Muon is refused by name: its step has one size, whatever is left of the momentum."""
    torch.manual_seed(1)
    weight = torch.nn.Parameter(torch.randn(16, 16))
    muon = torch.optim.Muon([weight], lr=0.1, weight_decay=0.0)
    weight.grad = torch.randn(16, 16)
    moved = []
    for _ in range(20):
        before = weight.detach().clone()
        muon.step()
        moved.append(float((weight - before).detach().norm()))
        weight.grad = torch.zeros(16, 16)  # as of a dropped layer
    assert min(moved) > 0.8 * moved[0]


def test_the_hooks_cost_little_beside_a_step() -> None:
    """Two of four layers dropped; measured without the step that they surround."""
    with model_parallel():
        training = Training(Patterns("0101"), freeze=True)
        training.step(1)
        inner = training.optimizer.chained_optimizers[0].optimizer
        (before,) = inner._optimizer_step_pre_hooks.values()
        (after,) = inner._optimizer_step_post_hooks.values()
        began = time.perf_counter()
        for _ in range(100):
            before(inner, (), {})
            after(inner, (), {})
        assert (time.perf_counter() - began) / 100 < 1e-3


def test_an_optimizer_that_is_not_megatrons_is_refused_by_name() -> None:
    with model_parallel():
        training = Training(PATTERNS, freeze=False)
        with pytest.raises(ValueError, match="dropped_update 'freeze' does not work with AdamW: allowed are FP32Opt"):
            freeze_dropped_layers(training.models, torch.optim.AdamW(training.models[0].parameters()))


@pytest.mark.parametrize("bucket_size", [2000, None], ids=["small buckets", "one bucket"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_layer_is_frozen_when_none_of_the_iterations_before_the_step_ran_it(
    kind: str, bucket_size: int | None
) -> None:
    """A loop of its own that begins an iteration for each part of a batch, and then makes one step."""
    ddp = {**OPTIMIZERS[kind], "bucket_size": bucket_size}
    with model_parallel():
        frozen, applied = (Training(Patterns("1101", "1011", "0001", "0101"), freeze=f, ddp=ddp) for f in (True, False))
        for training in (frozen, applied):
            step_of_two_iterations(training, 1)
        assert_equal_states(frozen.states(), applied.states())  # each layer ran in one of the two
        before = frozen.states()
        step_of_two_iterations(frozen, 3)
        assert_frozen(before, frozen.states(), {1, 3})


def step_of_two_iterations(training: Training, first: int) -> None:
    training.models[0].zero_grad_buffer()
    training.optimizer.zero_grad()
    for iteration in (first, first + 1):
        training.controller.begin_iteration(iteration, GLOBAL_MICROBATCHES)
        forward_backward(training.models, iteration, GLOBAL_MICROBATCHES)
    training.optimizer.step()


def test_an_iteration_that_was_given_up_does_not_keep_a_layer_from_being_frozen() -> None:
    with model_parallel():
        training = Training(Patterns("1111", "1011"), freeze=True, ddp={"bucket_size": None})
        training.controller.begin_iteration(1, GLOBAL_MICROBATCHES)
        forward_backward(training.models, 1, GLOBAL_MICROBATCHES)  # its loss was not finite, say
        before = training.states()
        training.step(2)
        assert_frozen(before, training.states(), {2})
