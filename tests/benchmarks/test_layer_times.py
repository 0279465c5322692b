"""What the hooks of benchmarks/realised_gain.py attribute to a layer, with counted operations in place of a clock."""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.common import layer_times
from benchmarks.common.layer_times import ModuleTimer
from tests.mcore.helpers import GLOBAL_MICROBATCHES, Step, build_optimizer, tiny_config, tiny_gpt, train_step, wrap_ddp

RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


class OperationCount(TorchDispatchMode):
    """Counts what is run, so that the same work always takes the same time."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        return func(*args, **(kwargs or {}))


class Pass:
    """Times of one pass."""

    def __init__(self, forward: float, backward: float) -> None:
        self._times = (forward, backward)

    def times(self) -> tuple[float, float]:
        return self._times


def times_of_an_iteration(monkeypatch: pytest.MonkeyPatch, **config: Any) -> tuple[list[tuple[float, float]], float]:
    """(forward, backward) of each layer and at the end of the whole model, and the iteration, a microbatch each."""
    models = wrap_ddp(tiny_gpt(tiny_config(**config)))
    optimizer = build_optimizer(models)
    timers = [ModuleTimer(layer, is_layer=True) for layer in models[0].module.decoder.layers]
    timers.append(ModuleTimer(models[0], is_layer=False))
    with OperationCount() as count:
        monkeypatch.setattr(layer_times, "_now", lambda: count.operations)
        with ExitStack() as stack:
            for timer in timers:
                stack.enter_context(timer)
            train_step(models, optimizer, 1)
        train_step(models, optimizer, 2)  # no longer timed
    per_microbatch = [tuple(part / GLOBAL_MICROBATCHES for part in timer.times()) for timer in timers]
    return per_microbatch, count.operations / 2 / GLOBAL_MICROBATCHES


@pytest.mark.usefixtures("one_rank")
def test_equal_layers_have_equal_times_that_fit_into_the_models_and_those_into_the_iteration(monkeypatch):
    (*layers, model), iteration = times_of_an_iteration(monkeypatch)
    assert len(set(layers)) == 1
    forward, backward = layers[0]
    assert 0 < forward < backward
    assert 4 * forward < model[0]
    assert 4 * backward < model[1]
    assert sum(model) < iteration


@pytest.mark.usefixtures("one_rank")
def test_a_recomputed_forward_pass_counts_as_backward(monkeypatch):
    plain, _ = times_of_an_iteration(monkeypatch)
    recomputed, _ = times_of_an_iteration(monkeypatch, **RECOMPUTE)
    for (forward, backward), (forward_again, backward_again) in zip(plain[:-1], recomputed[:-1], strict=True):
        assert forward_again == pytest.approx(forward, rel=0.1)  # autograd adds a few operations of its own
        assert backward_again == pytest.approx(forward + backward, rel=0.1)


@pytest.mark.usefixtures("one_rank")
def test_timing_changes_no_result_and_leaves_no_hook_behind():
    def steps(timed: bool) -> list[Step]:
        models = wrap_ddp(tiny_gpt(tiny_config()))
        optimizer = build_optimizer(models)
        layer = models[0].module.decoder.layers[0]
        with ModuleTimer(layer, is_layer=True) if timed else nullcontext():
            first = train_step(models, optimizer, 1)
        assert not layer._forward_hooks
        assert not layer._forward_pre_hooks
        return [first, train_step(models, optimizer, 2)]

    assert steps(timed=True) == steps(timed=False)


def test_a_pass_that_overlaps_with_communication_is_replaced_by_the_mean_of_the_others() -> None:
    timer = ModuleTimer(torch.nn.Identity(), is_layer=True)
    timer._passes = [Pass(9.0, 4.0), Pass(1.0, 6.0), Pass(3.0, 20.0)]
    assert timer.times() == (13.0, 30.0)
    assert timer.times(gathers=True) == (2.0 + 1.0 + 3.0, 30.0)
    assert timer.times(reduces=True) == (13.0, 4.0 + 6.0 + 5.0)
    timer._passes = [Pass(9.0, 0.0), Pass(0.0, 4.0), Pass(1.0, 0.0), Pass(0.0, 20.0)]  # recomputed
    assert timer.times(gathers=True, reduces=True) == (1.0 + 1.0, 4.0 + 4.0)
    timer._passes = [Pass(9.0, 4.0)]
    assert timer.times(gathers=True, reduces=True) == (9.0, 4.0), "there is no other"
