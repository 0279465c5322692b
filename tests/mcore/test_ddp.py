"""What a skipped layer tells Megatron's DistributedDataParallel, and what it leaves alone."""

from __future__ import annotations

from collections.abc import Iterator
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
from tests.distributed.harness import model_parallel, single_process
from tests.dropped_update_helpers import Patterns
from tests.helpers import forward_backward, tiny_config, tiny_gpt, wrap_ddp

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
