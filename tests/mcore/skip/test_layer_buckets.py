"""What a skipped layer tells Megatron's DistributedDataParallel, and what it leaves alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.distributed import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_sbld.controller import DropController
from megatron_sbld.mcore import make_switchable
from megatron_sbld.method.policy import Policy
from megatron_sbld.method.schedule import Constant
from tests.harness import model_parallel, single_process
from tests.mcore.helpers import SEQUENCE, VOCAB, forward_backward, tiny_config, tiny_gpt, wrap_ddp
from tests.mcore.skip.freeze_helpers import Patterns

LAYERS, MICROBATCHES = 4, 2


class Kept(Policy):
    """The listed layers (1-based) always run, the others never."""

    def __init__(self, *layers: int) -> None:
        super().__init__(Constant(1.0), LAYERS)
        self._probs = np.array([float(number in layers) for number in range(1, LAYERS + 1)])

    def _keep_probs(self, theta: float) -> np.ndarray:
        return self._probs


@pytest.fixture(scope="module", autouse=True)
def _one_process() -> Iterator[None]:
    with single_process(), model_parallel():
        yield


def wrapped_gpt(*kept: int, **ddp: Any) -> list[DistributedDataParallel]:
    """A wrapped switchable model whose first iteration has begun."""
    models = wrap_ddp(tiny_gpt(tiny_config()), overlap_grad_reduce=True, **ddp)
    controller = DropController(Kept(*kept))
    make_switchable(models, controller)
    models[0].train().zero_grad_buffer()
    controller.begin_iteration(1, MICROBATCHES)
    return models


def ready_order(*kept: int) -> list[tuple[int, str]]:
    """(layer from 1, parameter) of each gradient that Megatron counted as ready, in the order of the reports."""
    models = wrapped_gpt(*kept)
    names = {param: name for name, param in models[0].module.named_parameters()}
    order: list[tuple[int, str]] = []
    for group in models[0].bucket_groups:
        stock = group.register_grad_ready

        def observed(param: torch.nn.Parameter, *args: Any, group: Any = group, stock: Any = stock) -> None:
            _, layer, name = names[param].rpartition("decoder.layers.")
            if layer and group.is_last_microbatch:
                number, _, name = name.partition(".")
                order.append((int(number) + 1, name))
            stock(param, *args)

        group.register_grad_ready = observed
    forward_backward(models, 1, MICROBATCHES)
    return order


@pytest.mark.parametrize("kept", [(1, 3), (2, 3, 4), (1, 2, 3), ()])
def test_dropped_layers_report_each_gradient_once_and_in_backward_order(kept: tuple[int, ...]) -> None:
    full, found = ready_order(1, 2, 3, 4), ready_order(*kept)
    assert sorted(found) == sorted(full)
    assert [layer for layer, _ in found] == [layer for layer, _ in full]
    assert [layer for layer, _ in found] == sorted((layer for layer, _ in found), reverse=True)


def test_nothing_is_written_or_added_to_a_dropped_layers_gradients() -> None:
    """Adding a zero would make the negative zeros positive."""
    models = wrapped_gpt(1, 3)
    for param in models[0].parameters():
        param.main_grad.fill_(-0.0)
    forward_backward(models, 1, MICROBATCHES)
    for layer in models[0].module.decoder.layers:
        for name, param in layer.named_parameters():
            assert param.grad is None
            untouched = bool((param.main_grad.signbit() & (param.main_grad == 0)).all())
            assert untouched == (layer.layer_number in (2, 4)), name


class Shapes(TorchDispatchMode):
    """The shapes of all tensors that operations return."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.seen.add(tuple(tensor.shape))
        return result


@pytest.mark.parametrize(("kept", "expected"), [((), set()), ((2,), {(96, 32), (128, 32), (32, 128)})])
def test_no_gradient_tensor_is_made_for_a_dropped_layer(kept: tuple[int, ...], expected: set) -> None:
    """By the shapes of the weights of attention and MLP, which no other tensor of the model has."""
    models = wrapped_gpt(*kept)
    with Shapes() as shapes:
        forward_backward(models, 1, MICROBATCHES)
    assert shapes.seen & {(96, 32), (128, 32), (32, 128)} == expected


def test_the_gradient_of_a_layer_is_zero_if_it_was_skipped_and_did_not_run() -> None:
    """Not if the plan says so: a layer that was made stock again runs although it is dropped."""
    models = wrap_ddp(tiny_gpt(tiny_config()), overlap_grad_reduce=True, bucket_size=2000)
    layers = models[0].module.decoder.layers
    stock_classes = [type(layer) for layer in layers]
    controller = DropController(Patterns("0011", "0011", "1011", "0011"))
    make_switchable(models, controller)
    found: list[list[bool]] = []
    for iteration in range(1, 5):
        if iteration == 4:
            for layer, cls in zip(layers, stock_classes, strict=True):
                layer.__class__ = cls
        models[0].train().zero_grad_buffer()
        controller.begin_iteration(iteration, MICROBATCHES)
        forward_backward(models, iteration, MICROBATCHES)
        found.append([layer._drop_record.has_zero_gradient for layer in layers])
    # In the first iteration it is not known what ran before.
    assert found == [[False] * 4, [True, True, False, False], [False, True, False, False], [False] * 4]


def test_distinct_replicas_reduce_all_because_another_may_have_run_the_layer() -> None:
    models = wrap_ddp(tiny_gpt(tiny_config()))
    controller = DropController(Kept(1, 3), replicas="distinct", sampler="balanced")
    make_switchable(models, controller)
    for iteration in (1, 2):
        models[0].train().zero_grad_buffer()
        controller.begin_iteration(iteration, MICROBATCHES)
        forward_backward(models, iteration, MICROBATCHES)
        assert not any(layer._drop_record.has_zero_gradient for layer in models[0].module.decoder.layers)


def two_losses(models: list[DistributedDataParallel]) -> torch.Tensor:
    """Of two forward passes, as of a discriminator on real and made data."""
    return sum(loss_of(models[0], seed) for seed in (1, 2))


def loss_of(model: torch.nn.Module, seed: int = 1) -> torch.Tensor:
    text = torch.randint(VOCAB, (2, SEQUENCE), generator=torch.Generator().manual_seed(seed))
    return model(text, torch.arange(SEQUENCE).expand(2, -1), None, labels=text.roll(-1, dims=1)).mean()


def gradients_by_iteration(
    patterns: tuple[str, ...],
    loss: Callable[[list[DistributedDataParallel]], torch.Tensor],
    frozen: tuple[str, ...] = (),
    **ddp: Any,
) -> list[dict[str, torch.Tensor]]:
    """What a loop of its own has in main_grad after each iteration, with the parameters of these names frozen."""
    chunks = tiny_gpt(tiny_config(), tied=False)
    for name, param in chunks[0].named_parameters():
        param.requires_grad_(not name.startswith(frozen or "none"))
    models = wrap_ddp(chunks, bucket_size=2000, **ddp)
    controller = DropController(Patterns(*patterns))
    make_switchable(models, controller)
    found = []
    for iteration in range(1, len(patterns) + 1):
        models[0].train().zero_grad_buffer()
        controller.begin_iteration(iteration, 1)
        loss(models).backward()
        models[0].finish_grad_sync()
        trained = {name: param for name, param in chunks[0].named_parameters() if param.requires_grad}
        found.append({name: param.main_grad.clone() for name, param in trained.items()})
    return found


@pytest.mark.parametrize("frozen", [(), ("embedding",)], ids=["all trained", "frozen embedding"])
@pytest.mark.parametrize("patterns", [("1111", "0011", "0000", "0111"), ("0101", "1111", "0101")])
def test_overlapped_reductions_are_those_of_stock_hooks_in_any_loop(
    patterns: tuple[str, ...], frozen: tuple[str, ...]
) -> None:
    """Two forward passes before one backward pass, and layers that nothing before them trains: Megatron counts the
    reports of its first batch and reduces a bucket when they have come again."""
    expected = gradients_by_iteration(patterns, two_losses, frozen)
    found = gradients_by_iteration(patterns, two_losses, frozen, overlap_grad_reduce=True)
    for iteration, gradients in enumerate(found):
        assert gradients.keys() == expected[iteration].keys()
        for name, gradient in gradients.items():
            assert torch.equal(gradient, expected[iteration][name]), (iteration, name)


def test_a_loss_has_a_gradient_when_all_layers_that_are_trained_were_dropped() -> None:
    (chunk,) = tiny_gpt(tiny_config())
    chunk.requires_grad_(False)
    chunk.decoder.layers[2].requires_grad_(True)
    controller = DropController(Kept(1, 2, 4))
    make_switchable(chunk, controller)
    controller.begin_iteration(1, 1)
    loss_of(chunk.train()).backward()
    assert all(param.grad is None for param in chunk.parameters())
    chunk.requires_grad_(False)
    assert not loss_of(chunk).requires_grad  # as the stock model's


def test_a_model_that_is_frozen_for_a_while_reports_nothing_meanwhile() -> None:
    """As a discriminator in the generator's step: its layers pass a gradient on and get none."""
    models = wrapped_gpt(1, 3)
    layers, group_of = models[0].module.decoder.layers, models[0].param_to_bucket_group
    embedded = torch.randn(SEQUENCE, 2, 32, requires_grad=True)
    for trained in (False, True, False, True):
        models[0].requires_grad_(trained)
        for group in models[0].bucket_groups:
            group.per_param_grad_ready_counts = {}
        models[0].module.decoder(embedded, None).sum().backward()
        reported = {param in group_of[param].per_param_grad_ready_counts for param in layers.parameters()}
        assert reported == {trained}
    assert embedded.grad is not None


@pytest.mark.parametrize("kept", [(1, 2, 3, 4), (1, 3, 4)])
def test_parameters_that_the_wrapper_does_not_know_are_nothing_to_it(kept: tuple[int, ...]) -> None:
    """An adapter that was added, or a norm that was trainable again, after the model was wrapped."""
    (chunk,) = tiny_gpt(tiny_config())
    layer = chunk.decoder.layers[1]
    layer.input_layernorm.requires_grad_(False)
    models = wrap_ddp([chunk], overlap_grad_reduce=True)
    layer.input_layernorm.requires_grad_(True)
    layer.register_module("adapter", torch.nn.Linear(2, 2))
    controller = DropController(Kept(*kept))
    make_switchable(models, controller)
    for iteration in (1, 2):
        models[0].train().zero_grad_buffer()
        controller.begin_iteration(iteration, 1)
        loss_of(models[0]).backward()
        models[0].finish_grad_sync()
    assert 2 in kept or layer._drop_buckets.wrapper is models[0]
