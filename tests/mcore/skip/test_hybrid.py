"""HybridModel: attention, MLP, experts and Mamba are layers of their own, dropped by themselves or by blocks.

`*-*-` is a GPT of the same weights in twice as many layers, so with unit `block` it is held against that GPT. The
mixers of Mamba and of the gated delta net need a GPU: here a linear map stands in for them (tests/mcore/hybrid.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_sbld.controller import DropController
from megatron_sbld.layout.units import num_units
from megatron_sbld.mcore import freeze_dropped_layers, grow_in_stages, make_switchable
from megatron_sbld.mcore.compat import core_version
from megatron_sbld.mcore.skip.probes import layer_left_out
from megatron_sbld.method.policy import FullDepthPolicy, LayerDropPolicy, StagedPolicy
from megatron_sbld.method.schedule import Constant
from tests.harness import model_parallel, run_distributed, single_process, slow_but
from tests.mcore.helpers import Listed, build_optimizer, global_name, tiny_config, tiny_gpt, train, wrap_ddp
from tests.mcore.hybrid import tiny_hybrid
from tests.mcore.skip.freeze_helpers import Patterns, states, step
from tests.mcore.skip.runs import (
    BOTH_OVERLAPS,
    FULL_RECOMPUTE,
    Case,
    Result,
    assert_equal_decisions,
    assert_equal_runs,
    run_cases,
)

# All cases of a module run in one set of processes, inside the first test's fixture.
pytestmark = pytest.mark.timeout(1200)

AskedFor = Callable[..., frozenset[str]]

EXPERTS: dict[str, Any] = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_aux_loss_coeff": 0.1,
    "add_bias_linear": False,
}
EVERY_KIND = "M*-EGE*-" if core_version() >= (0, 17) else "M*-EME*-"  # older ones have no gated delta net


def blocks(pattern: str = "*-*-*-*-", **given: Any) -> Case:
    """Four blocks: a GPT of four layers."""
    return Case(**{"pattern": pattern, "unit": "block", "layers": 4, "iterations": 4, **given})


def layers(pattern: str = "*-*-*-*-", **given: Any) -> Case:
    """Eight layers, each dropped by itself."""
    return Case(**{"pattern": pattern, "layers": 8, "iterations": 8, **given})


ONE_PROCESS = {
    "blocks": blocks(),
    "blocks, microbatch": blocks(scope="microbatch", policy="pld"),
    "blocks, extreme": blocks(policy="extreme", iterations=8),
    "blocks of experts": blocks("*E*E*E*E", model=EXPERTS),
    "blocks, samples": blocks(granularity="sample"),
    "blocks, full recomputation, microbatch": blocks(scope="microbatch", config=FULL_RECOMPUTE),
    "blocks, fused residual": blocks(residual="fused", policy="pld"),
    "layers, full recomputation, microbatch": layers(
        EVERY_KIND, scope="microbatch", config=FULL_RECOMPUTE, model=EXPERTS
    ),
}
TWO_PROCESSES = {
    "blocks, TP 2 with sequence parallelism": blocks(tp=2, config={"sequence_parallel": True}),
    "blocks, PP 2, extreme": blocks("*-*-|*-*-", pp=2, policy="extreme", iterations=8),
    "blocks, PP 2 interleaved, microbatch": blocks("*-|*-|*-|*-", pp=2, vpp=2, scope="microbatch"),
    "blocks, DP 2, both overlaps, extreme": blocks(ddp=BOTH_OVERLAPS, policy="extreme", iterations=8),
    "layers, TP 2, microbatch": layers(tp=2, scope="microbatch", iterations=4),
    "layers, PP 2, extreme": layers("*-*|-*-*-", pp=2, policy="extreme"),
    "layers, PP 2, full recomputation, microbatch": layers(
        "*-*-|*-*-", pp=2, scope="microbatch", config=FULL_RECOMPUTE, iterations=4
    ),
    "layers, DP 2, both overlaps, extreme, bucket of a parameter": layers(
        ddp={**BOTH_OVERLAPS, "bucket_size": 1}, policy="extreme"
    ),
    "every kind, PP 2, extreme": layers(f"{EVERY_KIND[:4]}|{EVERY_KIND[4:]}", pp=2, policy="extreme", model=EXPERTS),
    "every kind, DP 2, both overlaps, PLD": layers(
        EVERY_KIND, ddp=BOTH_OVERLAPS, policy="pld", model=EXPERTS, iterations=4
    ),
}
QUICK = (
    "blocks",
    "blocks, extreme",
    "blocks, DP 2, both overlaps, extreme",
    "layers, PP 2, extreme",
)
if core_version() < (0, 17):  # stages are given without '|', which cannot be uneven or interleaved
    TWO_PROCESSES = {
        name: replace(case, pattern=case.pattern.replace("|", ""))
        for name, case in TWO_PROCESSES.items()
        if "interleaved" not in name
    }


@pytest.fixture(scope="module")
def one_process(asked_for: AskedFor) -> dict[str, Result]:
    mine = {name: ONE_PROCESS[name] for name in asked_for(test_one_process)}
    others = [TWO_PROCESSES[name] for name in asked_for(test_two_processes_equal_one)]
    references = {repr(case.reference): case.reference for case in [*mine.values(), *others]}
    with single_process():
        return run_cases({**mine, **references})


@pytest.fixture(scope="module")
def two_processes(asked_for: AskedFor) -> list[dict[str, Result]]:
    cases = {name: TWO_PROCESSES[name] for name in asked_for(test_two_processes_equal_one)}
    return run_distributed(run_cases, 2, cases, timeout=900)


@pytest.fixture
def alone() -> Iterator[None]:
    with single_process(), model_parallel():
        yield


@pytest.mark.parametrize("name", slow_but(QUICK, ONE_PROCESS))
def test_one_process(one_process: dict[str, Result], name: str) -> None:
    """Blocks are the GPT's layers, and recomputation changes nothing."""
    found, reference = one_process[name], one_process[repr(ONE_PROCESS[name].reference)]
    assert found.decisions == reference.decisions
    assert_equal_runs(found, reference, relative=1e-6)


@pytest.mark.parametrize("name", slow_but(QUICK, TWO_PROCESSES))
def test_two_processes_equal_one(
    one_process: dict[str, Result], two_processes: list[dict[str, Result]], name: str
) -> None:
    reference = one_process[repr(TWO_PROCESSES[name].reference)]
    for rank in two_processes:
        assert_equal_decisions(rank[name], reference)
        assert_equal_runs(rank[name], reference)


@pytest.mark.parametrize("unit", ["layer", "block"])
def test_nothing_dropped_is_stock_bit_for_bit(alone: None, unit: Any) -> None:
    config = {"num_layers": 8, "hidden_dropout": 0.1, **EXPERTS}
    runs = []
    for switchable in (False, True):
        with torch.random.fork_rng():
            chunks = tiny_hybrid(tiny_config(**config), EVERY_KIND)
            keys = list(chunks[0].state_dict())
            if switchable:
                controller = DropController(FullDepthPolicy(8 if unit == "layer" else num_units(EVERY_KIND, unit)))
                make_switchable(chunks, controller, unit=unit)
            models = wrap_ddp(chunks)
            losses = train(models, before_iteration=controller.begin_iteration if switchable else None)
            weights = [param.tolist() for param in chunks[0].parameters()]
            runs.append((losses, weights, keys, list(chunks[0].state_dict())))
    assert runs[0] == runs[1]


@pytest.mark.parametrize(
    ("pattern", "kept", "shorter"),
    [
        ("*-*-*-*-", "10011111", "*-*-*-"),
        ("*-*-*-*-", "01010101", "----"),
        (EVERY_KIND, "01111110", EVERY_KIND[1:7]),
        (EVERY_KIND, "11100111", "M*-E*-"),
    ],
)
def test_dropped_layers_equal_the_model_without_them(alone: None, pattern: str, kept: str, shorter: str) -> None:
    names = list(range(1, 9))  # a name of its own for each layer
    experts = {"add_bias_linear": False, **(EXPERTS if "E" in pattern else {})}
    (whole,) = tiny_hybrid(tiny_config(num_layers=8, **experts), pattern, blocks=names)
    remaining = [number for number in names if kept[number - 1] == "1"]
    (short,) = tiny_hybrid(tiny_config(num_layers=len(shorter), **experts), shorter, blocks=remaining)
    controller = DropController(Listed(*map(float, kept)))
    assert make_switchable(whole, controller) == names
    controller.begin_iteration(1, 1)
    gradients = []
    for chunk in (whole, short):
        tokens = torch.arange(32).view(2, 16)
        loss = chunk(tokens, torch.arange(16).expand(2, -1), None, labels=tokens + 1)
        loss.sum().backward()
        gradients.append({global_name(chunk, name): param.grad for name, param in chunk.named_parameters()})
        gradients[-1]["loss"] = loss
    for name, gradient in gradients[0].items():
        if name in gradients[1]:
            assert torch.equal(gradient, gradients[1][name]), name
        else:
            assert gradient is None, name
    assert gradients[1].keys() <= gradients[0].keys()


def test_dropped_layers_are_frozen_beside_the_other_part_of_their_block(alone: None) -> None:
    patterns = ("10101111", "01011111", "11111111", "10011101")
    chunks = tiny_hybrid(tiny_config(num_layers=8), EVERY_KIND.replace("E", "-"), blocks=range(1, 9))
    controller = DropController(Patterns(*patterns))
    make_switchable(chunks, controller)
    models = wrap_ddp(chunks)
    optimizer = build_optimizer(models, weight_decay=0.1)
    freeze_dropped_layers(models, optimizer)
    for iteration in range(1, 7):
        before = states(models, optimizer)
        step(models, optimizer, iteration, controller)
        after = states(models, optimizer)
        for name, state in after.items():
            layer = name.partition("decoder.layers.")[2].partition(".")[0]
            runs = not layer or patterns[(iteration - 1) % 4][int(layer)] == "1"
            assert torch.equal(state["weight"], before[name]["weight"]) != runs, (iteration, name)


@pytest.mark.parametrize("init", ["random", "zero", "copy"])
def test_blocks_begin_in_stages_as_a_gpts_layers(alone: None, init: Any) -> None:
    losses = []
    for pattern in ("", "*-*-*-*-"):
        policy = StagedPolicy([[0.25, 1], [0.5, 2], [1.0, 4]], 4, train_iters=8)
        config = tiny_config(num_layers=len(pattern) or 4)
        chunks = tiny_hybrid(config, pattern) if pattern else tiny_gpt(config)
        controller = DropController(policy)
        make_switchable(chunks, controller, unit="block")
        models = wrap_ddp(chunks)
        optimizer = build_optimizer(models, lr=1e-2)
        grow_in_stages(models, optimizer, controller, init)
        losses.append(train(models, 8, controller.begin_iteration, optimizer=optimizer))
    assert losses[0] == losses[1]


def test_a_block_is_left_out_of_evaluation_as_one(alone: None) -> None:
    found = []
    for pattern in ("", "*-*-*-*-"):
        config = tiny_config(num_layers=len(pattern) or 4)
        chunks = tiny_hybrid(config, pattern) if pattern else tiny_gpt(config)
        make_switchable(chunks, DropController(LayerDropPolicy(Constant(0.5), 4)), unit="block")
        chunks[0].eval()
        tokens = torch.arange(32).view(2, 16)
        with torch.no_grad(), layer_left_out(chunks, 2):
            found.append(chunks[0](tokens, torch.arange(16).expand(2, -1), None, labels=tokens + 1))
    assert torch.equal(*found)


def half(num_layers: int) -> DropController:
    return DropController(LayerDropPolicy(Constant(0.5), num_layers))


def test_a_policy_of_another_number_of_layers_is_refused_with_both_numbers(alone: None) -> None:
    chunks = tiny_hybrid(tiny_config(num_layers=8), "*-*-*-*-")
    with pytest.raises(ValueError, match=r"for 4 layers, the model has num_layers = 8 \(with unit 'block' 4\)"):
        make_switchable(chunks, half(4))
    with pytest.raises(ValueError, match=r"for 8 layers, the model has 4 blocks \(8 layers\)"):
        make_switchable(chunks, half(8), unit="block")
    with pytest.raises(ValueError, match="unit = 'blocks' is not allowed"):
        make_switchable(chunks, half(4), unit="blocks")  # type: ignore[arg-type]


def test_kinds_and_models_that_are_not_known_are_refused_by_name(alone: None) -> None:
    (chunk,) = tiny_hybrid(tiny_config(num_layers=8), "*-*-*-*-")
    for name in ("hybrid_layer_pattern", "hybrid_override_pattern"):
        if hasattr(chunk, name):
            setattr(chunk, name, None)
    make_switchable(chunk, half(8))
    with pytest.raises(ValueError, match="whose hybrid_layer_pattern is not known: build it with one, or use unit"):
        make_switchable(chunk, half(4), unit="block")
    chunk.decoder.layer_type_list[0] = "D"
    with pytest.raises(ValueError, match="hybrid layers of kind 'D' do not work with layer dropping"):
        make_switchable(chunk, half(8))
