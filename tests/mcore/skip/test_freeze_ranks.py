"""`freeze` on several ranks: as in one process, bit for bit frozen in every shard, and resumed as if never stopped.

All cases of two processes share one start of them; what one process has to do comes before.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_sbld.config.sections import Config
from megatron_sbld.controller import DropController
from megatron_sbld.mcore import freeze_dropped_layers, make_switchable
from tests.harness import model_parallel, single_process
from tests.mcore.helpers import (
    build_optimizer,
    tiny_config,
    tiny_gpt,
    wrap_ddp,
)
from tests.mcore.skip.freeze_helpers import (
    Patterns,
    State,
    assert_frozen,
    finish_gathers,
    iterate,
    layer_of,
    states,
    steps,
)
from tests.training.trainer_helpers import (
    BOTH_OVERLAPS,
    HALF,
    NO_DROPOUT,
    call_on_ranks,
    change,
    decisions,
    in_folder,
    losses,
    prepare_corpus,
    run_here,
    stop_and_resume,
    tiny_run,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
LAYERS = 4
# Layer 4 never runs, so that it must end as it began.
PATTERNS = Patterns("1010", "1100", "0000", "0110", "1110", "1000")
ITERATIONS = 9
LOSS_TOLERANCE = 1e-4
OVERLAP = {"overlap_grad_reduce": True}
SHARDED = {"use_distributed_optimizer": True}
BF16 = {"params_dtype": torch.bfloat16, "bf16": True}


@dataclass(frozen=True)
class Case:
    """One run of megatron-core's own loop: layout, DDP options, Megatron config options."""

    freeze: bool = True
    tp: int = 1
    pp: int = 1
    vpp: int | None = None
    ddp: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)


TWO_PROCESSES = {
    "DP 2": Case(),
    "DP 2, overlapped reduction": Case(ddp=OVERLAP),
    "DP 2, distributed optimizer": Case(ddp=SHARDED),
    "DP 2, both overlaps": Case(ddp={**OVERLAP, **SHARDED, "overlap_param_gather": True}),
    "DP 2, both overlaps, one bucket": Case(
        ddp={**OVERLAP, **SHARDED, "overlap_param_gather": True, "bucket_size": 10**9}
    ),
    "DP 2, both overlaps, bf16": Case(ddp={**OVERLAP, **SHARDED, "overlap_param_gather": True}, config=BF16),
    "TP 2": Case(tp=2),
    "PP 2": Case(pp=2),
    "PP 2 interleaved, distributed optimizer": Case(pp=2, vpp=2, ddp=SHARDED),
}


def run_case(case: Case) -> tuple[list[float], list[float]]:
    """Losses and gradient norms by iteration; each step's frozen state is checked on the way."""
    with model_parallel(tp=case.tp, pp=case.pp, vpp=case.vpp):
        controller = DropController(PATTERNS)
        models = wrap_ddp(tiny_gpt(tiny_config(num_layers=LAYERS, **case.config)), **case.ddp)
        make_switchable(models, controller)
        optimizer = build_optimizer(models, weight_decay=0.1, lr=1e-2)
        if case.freeze:
            freeze_dropped_layers(models, optimizer)
        found: tuple[list[float], list[float]] = ([], [])
        first, before = states(models, optimizer), states(models, optimizer)
        for iteration in range(1, ITERATIONS + 1):
            loss, grad_norm = iterate(models, optimizer, controller, iteration)
            found[0].append(loss)
            found[1].append(grad_norm)
            after = states(models, optimizer)
            if case.freeze:
                check_step(before, after, controller, gathers_later=case.ddp.get("overlap_param_gather", False))
                assert steps(after) == {iteration}
            before = after
        finish_gathers(models)
        if case.freeze:
            last = states(models, optimizer)
            assert_frozen(only(first, {4}), only(last, {4}), {4})
        return found


def check_step(
    before: dict[str, State], after: dict[str, State], controller: DropController, gathers_later: bool
) -> None:
    """What this rank holds of each layer is frozen or has moved."""
    if gathers_later:  # weights are gathered in the next forward pass
        for found in (before, after):
            for state in found.values():
                state.pop("weight", None)
    assert_frozen(before, after, {layer for layer in range(1, LAYERS + 1) if controller.dropped_throughout(layer)})


def only(found: dict[str, State], layers: set[int]) -> dict[str, State]:
    """The states of parameters of these layers."""
    return {name: dict(state) for name, state in found.items() if layer_of(name) in layers}


TENSOR = {"tensor_model_parallel_size": 2}
INTERLEAVED = {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2}
DISTRIBUTED = {"use_distributed_optimizer": True}
FREEZE = {**HALF, "dropped_update": "freeze"}
RESUMED: dict[str, dict[str, dict[str, Any]]] = {
    "DP 2": {},
    "DP 2, both overlaps, bf16": {"parallel": BOTH_OVERLAPS, "training": {"precision": "bf16"}},
    "PP 2 interleaved": {"parallel": INTERLEAVED},
}
RESUMED_ALONE: dict[str, dict[str, dict[str, Any]]] = {
    "one process": {},
    "one process, distributed optimizer, per microbatch": {
        "parallel": DISTRIBUTED,
        "training": {"micro_batch_size": 4},  # two microbatches: now and then both drop a layer
        "drop": {"decision_scope": "microbatch"},
    },
    "one process, fp16 that skips steps": {"training": {"precision": "fp16", "initial_loss_scale": 2.0**20}},
}
# Each run is stopped after 3 iterations and continued on the next layout; the first is one process.
CHAINS: dict[str, list[dict[str, Any]]] = {
    "plain optimizer": [{}, {}, TENSOR, INTERLEAVED],
    "distributed optimizer": [{**DISTRIBUTED, **layout} for layout in ({}, BOTH_OVERLAPS, TENSOR, INTERLEAVED)],
}
CHAIN_STOPS = 3


@dataclass(frozen=True)
class Outcomes:
    """By name: losses and norms of each rank, and the exit statuses of runs of the trainer."""

    cases: dict[str, list[Any]]
    trainer: dict[str, list[int | str]]


def run_cases(cases: dict[str, Case]) -> dict[str, Any]:
    return {name: run_case(case) for name, case in cases.items()}


def on_rank(argument: Config | dict[str, Case]) -> Any:
    """A run of the trainer, or cases of megatron-core's own loop."""
    if isinstance(argument, Config):
        return run_here(argument)
    dist.init_process_group("gloo")
    try:
        return run_cases(argument)
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("freeze")


def chain(folder: Path, corpus: Path, name: str) -> list[Config]:
    """One run of 12 iterations on four layouts."""
    training = {"train_iters": CHAIN_STOPS * len(CHAINS[name]), "exit_after_iterations": CHAIN_STOPS}
    optimizer = {"adam_beta2": 0.5}  # steps so large that those of a dropped layer show, whatever the text is
    sections = {"model": NO_DROPOUT, "optimizer": optimizer, "drop": FREEZE, "training": training}
    return [tiny_run(folder / f"chain, {name}", corpus, **sections, parallel=layout) for layout in CHAINS[name]]


def whole_stopped_resumed(folder: Path, corpus: Path, name: str, sections: dict[str, Any]) -> dict[str, Config]:
    """An uninterrupted run, and the same one stopped after 3 iterations and continued."""
    config = tiny_run(folder / f"whole {name}", corpus, **{**sections, "drop": {**FREEZE, **sections.get("drop", {})}})
    stopped, resumed = stop_and_resume(in_folder(config, folder / name), 3)
    return {f"whole {name}": config, f"stopped {name}": stopped, f"resumed {name}": resumed}


@pytest.fixture(scope="module")
def outcomes(folder: Path) -> Outcomes:
    corpus = prepare_corpus(folder)
    with single_process():
        alone = run_cases({"freeze": Case(), "apply": Case(freeze=False), "bf16": Case(config=BF16)})
    whole_chain = change(chain(folder, corpus, "plain optimizer")[0], training={"exit_after_iterations": None})
    here: dict[str, Config] = {
        "whole chain": in_folder(whole_chain, folder / "whole chain"),
        "apply": change(in_folder(whole_chain, folder / "apply"), drop={"dropped_update": "apply"}),
    }
    there: dict[str, Config] = {}
    for name, sections in RESUMED_ALONE.items():
        here |= whole_stopped_resumed(folder, corpus, name, sections)
    for name, sections in RESUMED.items():
        there |= whole_stopped_resumed(folder, corpus, name, sections)
    for name in CHAINS:
        first, *others = chain(folder, corpus, name)
        here[f"chain, {name}, 0"] = first
        there |= {f"chain, {name}, {i}": config for i, config in enumerate(others, start=1)}
    trainer: dict[str, list[int | str]] = {name: [run_here(config)] for name, config in here.items()}
    cases, *results = call_on_ranks(2, on_rank, [TWO_PROCESSES, *there.values()], timeout=400)
    by_case = {name: [ranks[name] for ranks in cases] for name in TWO_PROCESSES}
    return Outcomes(
        {name: [found] for name, found in alone.items()} | by_case, trainer | dict(zip(there, results, strict=True))
    )


@pytest.mark.parametrize("name", TWO_PROCESSES)
def test_two_processes_freeze_as_one_does(outcomes: Outcomes, name: str) -> None:
    bf16 = TWO_PROCESSES[name].config == BF16
    ((expected_losses, expected_norms),) = outcomes.cases["bf16" if bf16 else "freeze"]
    for found_losses, found_norms in outcomes.cases[name]:
        np.testing.assert_allclose(found_losses, expected_losses, rtol=1e-2 if bf16 else LOSS_TOLERANCE)
        np.testing.assert_allclose(found_norms, expected_norms, rtol=1e-1 if bf16 else 1e-2)


def test_freeze_is_not_apply(outcomes: Outcomes) -> None:
    """By more than what the comparison of layouts tolerates."""
    ((frozen, _),), ((applied, _),) = outcomes.cases["freeze"], outcomes.cases["apply"]
    assert frozen[0] == applied[0]
    assert np.abs(np.array(frozen) / np.array(applied) - 1).max() > 5 * LOSS_TOLERANCE


@pytest.mark.parametrize("name", [*RESUMED, *RESUMED_ALONE])
def test_a_resumed_run_has_the_losses_of_the_uninterrupted_one(outcomes: Outcomes, folder: Path, name: str) -> None:
    ranks = 2 if name in RESUMED else 1
    found = [outcomes.trainer[f"{part} {name}"] for part in ("whole", "stopped", "resumed")]
    assert found == [[0] * ranks, [75] * ranks, [0] * ranks]
    assert losses(folder / name) == losses(folder / f"whole {name}")
    assert decisions(folder / name) == decisions(folder / f"whole {name}")


@pytest.mark.parametrize("name", CHAINS)
def test_a_run_that_changes_its_layout_keeps_its_losses(outcomes: Outcomes, folder: Path, name: str) -> None:
    assert [outcomes.trainer[f"chain, {name}, {i}"] for i in range(4)] == [[75], [75, 75], [75, 75], [0, 0]]
    assert outcomes.trainer["whole chain"] == [0]
    np.testing.assert_allclose(losses(folder / f"chain, {name}"), losses(folder / "whole chain"), rtol=LOSS_TOLERANCE)


def test_the_trainer_freezes_when_it_is_asked_to(outcomes: Outcomes, folder: Path) -> None:
    assert outcomes.trainer["apply"] == [0]
    frozen, applied = losses(folder / "whole chain"), losses(folder / "apply")
    assert decisions(folder / "whole chain") == decisions(folder / "apply")
    assert frozen[0] == applied[0]
    assert np.abs(np.array(frozen) / np.array(applied) - 1).max() > 5 * LOSS_TOLERANCE
