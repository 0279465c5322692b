"""Layer dropping puts nothing on the hot path: operators counted from torch.profiler's traces."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from benchmarks.common.operations import SYNCHRONISATIONS, difference, host_operations, record, synchronisations
from megatron_sbld.controller import DropController
from megatron_sbld.mcore import make_switchable
from megatron_sbld.mcore.skip.switchable import _SkippedLayer
from megatron_sbld.method.decisions import Granularity
from megatron_sbld.method.tokens import TokenDrop
from tests.harness import model_parallel, single_process
from tests.mcore.helpers import (
    GLOBAL_MICROBATCHES,
    MICRO_BATCH,
    SEQUENCE,
    Listed,
    build_optimizer,
    tiny_config,
    tiny_gpt,
    train_step,
    wrap_ddp,
)

OVERLAPPED = {"overlap_grad_reduce": True, "use_distributed_optimizer": True, "overlap_param_gather": True}


@pytest.fixture(scope="module", autouse=True)
def _one_process() -> Iterator[None]:
    with single_process():
        yield


def training_operations(
    keep_probs: Sequence[float] | None,
    ddp: dict[str, Any],
    granularity: Granularity = "layer",
    tokens_until: int = 1,
) -> Counter[str]:
    """What the third of an optimizer's iterations runs; None leaves the layers stock.

    tokens_until: with granularity token, the iteration from which on layers run all tokens.
    """
    with model_parallel():
        chunks = tiny_gpt(tiny_config(num_layers=4))
        begin = None
        if keep_probs is not None:
            num_samples = MICRO_BATCH if granularity == "sample" else None
            drop = TokenDrop(seq_length=SEQUENCE, layers=(2, 3), min_tokens=4, step=4, iterations=tokens_until)
            controller = DropController(
                Listed(*keep_probs),
                granularity=granularity,
                num_samples=num_samples,
                tokens=drop if granularity == "token" else None,
            )
            make_switchable(chunks, controller)
            begin = controller.begin_iteration
        models = wrap_ddp(chunks, **ddp)
        optimizer = build_optimizer(models)
        for iteration in (1, 2):
            train_step(models, optimizer, iteration, begin)
        return host_operations(record(lambda: train_step(models, optimizer, 3, begin)))


def pass_operations(num_layers: int, kept: Sequence[int]) -> Counter[str]:
    """What one forward and backward pass of switchable layers runs when these (1-based) are kept."""
    with model_parallel():
        (chunk,) = tiny_gpt(tiny_config(num_layers=num_layers))
        controller = DropController(Listed(*(float(layer in kept) for layer in range(1, num_layers + 1))))
        make_switchable(chunk, controller)
        tokens = torch.zeros(2, SEQUENCE, dtype=torch.long)
        positions = torch.arange(SEQUENCE).expand(2, -1)
        chunk.train()

        def run() -> None:
            chunk(tokens, positions, None).sum().backward()

        controller.begin_iteration(1, num_microbatches=1)
        run()  # gradients are made by the first pass and added to by the others
        return host_operations(record(run))


WRAPPERS = [pytest.param({}, id="plain", marks=pytest.mark.slow), pytest.param(OVERLAPPED, id="overlapped")]


@pytest.mark.parametrize("granularity", ["layer", "sample", "token"])
@pytest.mark.parametrize("ddp", WRAPPERS)
def test_an_iteration_that_drops_nothing_runs_what_stock_layers_run(
    ddp: dict[str, Any], granularity: Granularity
) -> None:
    stock, switchable = training_operations(None, ddp), training_operations((1, 1, 1, 1), ddp, granularity)
    assert stock["aten::addmm"] + stock["aten::linear"] + stock["aten::matmul"] > 0
    assert difference(switchable, stock) == {}


@pytest.mark.parametrize("ddp", WRAPPERS)
def test_dropping_layers_waits_no_oftener_for_the_device(ddp: dict[str, Any]) -> None:
    stock, dropped = training_operations(None, ddp), training_operations((1, 0, 0, 1), ddp)
    assert synchronisations(stock) > 0
    for name in SYNCHRONISATIONS:
        assert dropped[name] <= stock[name], name


def identity_operations() -> Counter[str]:
    """What the switchable layer's identity runs, forward and backward."""
    hidden = torch.ones(2, 2, requires_grad=True)
    with_identity = host_operations(record(lambda: _SkippedLayer.apply(hidden, None).sum().backward()))
    hidden.grad = None
    without = host_operations(record(lambda: hidden.sum().backward()))
    return Counter(difference(with_identity, without))


def test_the_identity_copies_and_computes_nothing() -> None:
    operators = {name for name in identity_operations() if name.startswith("aten::")}
    # An empty tensor that takes over the input's storage; torch asks whether it may.
    assert operators <= {"aten::empty", "aten::_has_compatible_shallow_copy_type", "aten::detach"}


@pytest.mark.parametrize("kept", [(1, 3, 4), (1, 4)], ids=["one dropped", "two dropped"])
def test_a_dropped_layer_runs_an_identity_and_nothing_else(kept: tuple[int, ...]) -> None:
    with_dropped = pass_operations(4, kept)
    without = pass_operations(len(kept), range(1, len(kept) + 1))
    dropped = 4 - len(kept)
    assert difference(with_dropped, without) == {
        name: dropped * count for name, count in sorted(identity_operations().items())
    }


@pytest.mark.parametrize("ddp", WRAPPERS)
def test_an_iteration_with_dropped_layers_runs_nothing_new_but_identities(ddp: dict[str, Any]) -> None:
    stock, dropped = training_operations(None, ddp), training_operations((1, 0, 0, 1), ddp)
    identities = 2 * GLOBAL_MICROBATCHES
    expected = {name: identities * count for name, count in identity_operations().items() if name not in stock}
    new = {name: count for name, count in dropped.items() if name not in stock}
    assert new == expected
    more = {name for name, count in difference(dropped, stock).items() if count > 0}
    assert more <= identity_operations().keys()


@pytest.mark.parametrize("ddp", WRAPPERS)
def test_leaving_tokens_out_never_waits_for_the_device(ddp: dict[str, Any]) -> None:
    """Half of the tokens in two layers, in every microbatch; nothing of a size that the device alone knows."""
    stock, some = training_operations(None, ddp), training_operations((1, 1, 1, 1), ddp, "token", tokens_until=6)
    for name in SYNCHRONISATIONS:
        assert some[name] <= stock[name], name
    more = difference(some, stock)
    passes = 2 * GLOBAL_MICROBATCHES
    assert more["aten::topk"] == GLOBAL_MICROBATCHES, "one draw serves all layers"
    assert more["aten::index_copy_"] == 2 * passes
    assert more["aten::index_select"] == 2 * passes
    assert not {"aten::nonzero", "aten::masked_select"} & more.keys()


@pytest.mark.parametrize("ddp", WRAPPERS)
def test_leaving_samples_out_adds_a_gather_and_a_scatter_and_never_waits_for_the_device(ddp: dict[str, Any]) -> None:
    """One of the two samples in two layers, in every microbatch."""
    stock, some = training_operations(None, ddp), training_operations((1, 0.5, 0.5, 1), ddp, "sample")
    for name in SYNCHRONISATIONS:
        assert some[name] <= stock[name], name
    more = difference(some, stock)
    passes = 2 * GLOBAL_MICROBATCHES
    # Forward: the samples of the input, the output back into them. Backward: the gradients of both.
    expected = {"aten::index_select": 2, "aten::index_copy": 1, "IndexSelectBackward0": 1, "IndexCopyBackward0": 1}
    assert {name: more[name] / passes for name in expected} == expected
    assert more["aten::lift_fresh"] == 1  # the indices of all layers and microbatches become a tensor at once
    for name in ("aten::nonzero", "aten::_to_copy", "aten::index"):
        assert more.get(name, 0) <= 0, name
