"""`pretrain` on two processes: every layout like one process, resumed bit for bit, and continued on another layout.

One start of the processes runs all cases; what one process has to do comes before.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_sbld.config.sections import Config
from tests.harness import slow_but
from tests.training.trainer_helpers import (
    BOTH_OVERLAPS,
    FULL_DEPTH,
    HALF,
    LAYERS_THAT_MATTER,
    change,
    decisions,
    dynamic,
    in_folder,
    losses,
    prepare_corpus,
    rates,
    run_here,
    run_trainers,
    sbld,
    stop_and_resume,
    tiny_run,
    updates,
    valid_losses,
    without_dropout,
)

BY_LAYER_TOKENS = {"lr_schedule_by": "layer_tokens"}
TENSOR = {"tensor_model_parallel_size": 2}
PIPELINE = {"pipeline_model_parallel_size": 2}
INTERLEAVED = {**PIPELINE, "num_virtual_stages_per_pipeline_rank": 2}
LAYOUTS: dict[str, dict[str, Any]] = {
    "TP 2": TENSOR,
    "TP 2 with sequence parallelism": {**TENSOR, "sequence_parallel": True},
    "CP 2": {"context_parallel_size": 2},
    "PP 2": PIPELINE,
    "PP 2 interleaved": INTERLEAVED,
    "DP 2": {},
    "DP 2, both overlaps": BOTH_OVERLAPS,
}
# Between two updates, with estimates that rest on more than their prior.
DYNAMIC_STOP = 24
DYNAMIC_LAYOUTS = ("TP 2", "CP 2", "PP 2 interleaved", "DP 2, both overlaps")
RESUMED: dict[str, dict[str, dict[str, Any]]] = {
    "DP 2": {},
    "DP 2, both overlaps": {"parallel": BOTH_OVERLAPS},
    "DP 2, both overlaps, bf16, per microbatch": {
        "parallel": BOTH_OVERLAPS,
        "training": {"precision": "bf16"},
        "drop": {"decision_scope": "microbatch"},
    },
    "DP 2, distinct replicas": {
        "drop": {"sampler": "balanced", "replicas": "distinct"},
        "optimizer": BY_LAYER_TOKENS,
    },
    "DP 2, both overlaps, samples of distinct replicas, frozen": {
        "parallel": BOTH_OVERLAPS,
        "training": {"micro_batch_size": 2},
        "drop": {"granularity": "sample", "replicas": "distinct", "dropped_update": "freeze"},
        "optimizer": BY_LAYER_TOKENS,
    },
    "PP 2 interleaved": {"parallel": INTERLEAVED},
    "TP 2": {"parallel": TENSOR},
    "DP 2, both overlaps, dynamic": {"parallel": BOTH_OVERLAPS, **LAYERS_THAT_MATTER},
    "PP 2 interleaved, dynamic": {"parallel": INTERLEAVED, **LAYERS_THAT_MATTER},
}
# Each run is stopped after 3 iterations and continued on the next layout.
CHAINS: dict[str, list[dict[str, Any]]] = {
    "plain optimizer": [{}, {}, TENSOR, INTERLEAVED],
    "distributed optimizer": [
        {"use_distributed_optimizer": True, **layout} for layout in ({}, BOTH_OVERLAPS, TENSOR, INTERLEAVED)
    ],
}
CHAIN_STOPS = 3
# One of each kind of parallelism, for `make test`.
QUICK = ("TP 2 with sequence parallelism", "PP 2 interleaved", "DP 2, both overlaps")
QUICK_RESUMED = ("DP 2, both overlaps, bf16, per microbatch", "PP 2 interleaved")
QUICK_CHAINS: tuple[str, ...] = ()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything of this module: the corpus, and a folder for each run."""
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def corpus(folder: Path) -> Path:
    return prepare_corpus(folder)


def from_common_weights(folder: Path, corpus: Path, name: str, **parallel: Any) -> Config:
    """20 iterations from the weights of the run `base`: initial weights are another draw on each layout."""
    return without_dropout(
        folder,
        corpus,
        name,
        parallel=parallel,
        training={"train_iters": 20, "eval_interval": 7},
        checkpoint={"load": str(folder / "base")},
        data={"valid_data_path": [f"{corpus}_valid"]},
        optimizer=BY_LAYER_TOKENS,
    )


def with_updates(folder: Path, corpus: Path, name: str, **sections: Any) -> Config:
    """40 iterations from common weights, with an update of the sensitivity every 10."""
    config = change(without_dropout(folder, corpus, name, drop=dynamic(folder)), **LAYERS_THAT_MATTER)
    return change(config, checkpoint={"load": str(folder / "layers that matter")}, **sections)


def chain(folder: Path, corpus: Path, name: str) -> list[Config]:
    """One run of 12 iterations on four layouts."""
    iterations = CHAIN_STOPS * len(CHAINS[name])
    stop = {"train_iters": iterations, "exit_after_iterations": CHAIN_STOPS}
    return [
        without_dropout(folder, corpus, f"chain, {name}", parallel=layout, training=stop, optimizer=BY_LAYER_TOKENS)
        for layout in CHAINS[name]
    ]


def chains(folder: Path, corpus: Path, names: Collection[str]) -> tuple[dict[str, Config], dict[str, Config]]:
    """Runs of one process and of two that change their layout."""
    if not names:
        return {}, {}
    whole = in_folder(chain(folder, corpus, "plain optimizer")[0], folder / "chain in one process")
    here = {"chain in one process": change(whole, training={"exit_after_iterations": None})}
    there = {}
    for name in names:
        here[f"chain, {name}, 0"], *others = chain(folder, corpus, name)
        there |= {f"chain, {name}, {i}": config for i, config in enumerate(others, start=1)}
    return here, there


def with_sensitivity_updates(folder: Path, corpus: Path) -> tuple[dict[str, Config], dict[str, Config]]:
    """The same runs for those whose sensitivity is renewed."""
    base = without_dropout(folder, corpus, "layers that matter", drop=FULL_DEPTH, checkpoint={"save_at_end": True})
    # As many microbatches as each of two replicas has: each has its own decisions.
    half = {"micro_batch_size": 2 * LAYERS_THAT_MATTER["training"]["micro_batch_size"]}
    stop = {"exit_after_iterations": DYNAMIC_STOP}
    halved = "dynamic in one process, half as many microbatches"
    here = {
        "layers that matter": change(base, **{**LAYERS_THAT_MATTER, "training": {"train_iters": 3}}),
        "dynamic in one process": with_updates(folder, corpus, "dynamic in one process"),
        halved: with_updates(folder, corpus, halved, training=half),
        "dynamic, stopped": change(with_updates(folder, corpus, "dynamic, continued"), training=stop),
    }
    there = {
        f"dynamic on {name}": with_updates(folder, corpus, f"dynamic on {name}", parallel=LAYOUTS[name])
        for name in DYNAMIC_LAYOUTS
    }
    there["dynamic, continued"] = with_updates(folder, corpus, "dynamic, continued", parallel=TENSOR)
    return here, there


def resumed(folder: Path, corpus: Path, names: Collection[str]) -> dict[str, Config]:
    """Uninterrupted runs, and the same ones stopped and continued."""
    there = {}
    for name in names:
        sections = RESUMED[name]
        drop = dynamic(folder) if "dynamic" in name else {**sbld(folder), **sections.get("drop", {})}
        config = tiny_run(folder / f"whole {name}", corpus, **{**sections, "drop": drop})
        there[f"whole {name}"] = config
        there[f"stopped {name}"], there[f"resumed {name}"] = stop_and_resume(
            in_folder(config, folder / name), DYNAMIC_STOP if "dynamic" in name else 3
        )
    return there


@pytest.fixture(scope="module")
def outcomes(folder: Path, corpus: Path, asked_for: Callable[..., frozenset[str]]) -> dict[str, list[int | str]]:
    """Run all cases that are asked for; by name, the outcome of each rank."""
    layouts = asked_for(test_every_layout_takes_the_decisions_and_has_the_losses_of_one_process)
    here = {
        "base": without_dropout(
            folder, corpus, "base", drop=FULL_DEPTH, training={"train_iters": 3}, checkpoint={"save_at_end": True}
        ),
        "one process": from_common_weights(folder, corpus, "one process"),
    }
    there: dict[str, Any] = {
        f"on {name}": from_common_weights(folder, corpus, f"on {name}", **LAYOUTS[name]) for name in sorted(layouts)
    }
    parts = [
        chains(folder, corpus, sorted(asked_for(test_a_run_that_changes_its_layout_keeps_its_decisions_and_losses)))
    ]
    if asked_for(test_every_layout_estimates_the_sensitivity_as_one_process_does):
        parts.append(with_sensitivity_updates(folder, corpus))
    for alone, together in parts:
        here |= alone
        there |= together
    there |= resumed(folder, corpus, sorted(asked_for(test_a_resumed_run_has_the_losses_of_the_uninterrupted_one)))
    refused = tiny_run(folder / "refused", corpus, drop=HALF)
    there["another config"] = [refused, change(refused, drop={"theta": 0.6}, optimizer={"lr": 0.5})]
    there["after a refusal"] = refused
    results = {name: [run_here(config)] for name, config in here.items()}
    return results | dict(zip(there, run_trainers(2, list(there.values()), timeout=500), strict=True))


@pytest.mark.parametrize("name", slow_but(QUICK, LAYOUTS))
def test_every_layout_takes_the_decisions_and_has_the_losses_of_one_process(
    outcomes: dict[str, list[int | str]], folder: Path, name: str
) -> None:
    assert outcomes["one process"] == [0]
    assert outcomes[f"on {name}"] == [0, 0]
    assert decisions(folder / f"on {name}") == decisions(folder / "one process")
    assert rates(folder / f"on {name}") == rates(folder / "one process")
    np.testing.assert_allclose(losses(folder / f"on {name}"), losses(folder / "one process"), rtol=1e-4)
    expected = valid_losses(folder / "one process")
    assert list(expected) == [7, 14, 20]
    assert valid_losses(folder / f"on {name}") == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", DYNAMIC_LAYOUTS)
def test_every_layout_estimates_the_sensitivity_as_one_process_does(
    outcomes: dict[str, list[int | str]], folder: Path, name: str
) -> None:
    reference = "dynamic in one process" + (", half as many microbatches" if name.startswith("DP") else "")
    assert outcomes[reference] == [0]
    assert outcomes[f"dynamic on {name}"] == [0, 0]
    expected, found = updates(folder / reference), updates(folder / f"dynamic on {name}")
    assert [row["iteration"] for row in found] == [10, 20, 30, 40]
    for field in ("gap", "gap_stderr", "sensitivity"):
        for here, there in zip(expected, found, strict=True):
            np.testing.assert_allclose(there[field], here[field], rtol=0, atol=2e-3)
    assert found[-1]["sensitivity"] != found[0]["sensitivity"]
    assert decisions(folder / f"dynamic on {name}") == decisions(folder / reference)


@pytest.mark.slow
def test_a_run_with_updates_that_changes_its_layout_keeps_its_sensitivity_and_decisions(
    outcomes: dict[str, list[int | str]], folder: Path
) -> None:
    assert (outcomes["dynamic, stopped"], outcomes["dynamic, continued"]) == ([75], [0, 0])
    expected, found = updates(folder / "dynamic in one process"), updates(folder / "dynamic, continued")
    assert found[:2] == expected[:2]
    for here, there in zip(expected[2:], found[2:], strict=True):
        np.testing.assert_allclose(there["sensitivity"], here["sensitivity"], rtol=0, atol=2e-3)
    assert decisions(folder / "dynamic, continued") == decisions(folder / "dynamic in one process")


@pytest.mark.slow
def test_four_processes_take_the_decisions_and_have_the_losses_of_one(
    outcomes: dict[str, list[int | str]], folder: Path, corpus: Path
) -> None:
    layouts = {
        "TP 2 x PP 2": {**TENSOR, **PIPELINE},
        "TP 2 x PP 2 interleaved, sequence parallelism": {**TENSOR, **INTERLEAVED, "sequence_parallel": True},
        "PP 2 x DP 2, both overlaps": {**PIPELINE, **BOTH_OVERLAPS},
    }
    configs = [from_common_weights(folder, corpus, name, **layout) for name, layout in layouts.items()]
    assert run_trainers(4, configs) == [[0] * 4] * len(configs)
    for name in layouts:
        assert decisions(folder / name) == decisions(folder / "one process")
        np.testing.assert_allclose(losses(folder / name), losses(folder / "one process"), rtol=1e-4)


@pytest.mark.parametrize("name", slow_but(QUICK_RESUMED, RESUMED))
def test_a_resumed_run_has_the_losses_of_the_uninterrupted_one(
    outcomes: dict[str, list[int | str]], folder: Path, name: str
) -> None:
    assert outcomes[f"whole {name}"] == [0, 0]
    assert outcomes[f"stopped {name}"] == [75, 75]
    assert outcomes[f"resumed {name}"] == [0, 0]
    assert losses(folder / name) == losses(folder / f"whole {name}")
    assert decisions(folder / name) == decisions(folder / f"whole {name}")
    assert rates(folder / name) == rates(folder / f"whole {name}")
    assert updates(folder / name) == updates(folder / f"whole {name}")
    changed = {tuple(row["sensitivity"]) for row in updates(folder / name)}
    assert (len(changed) > 1) == ("dynamic" in name)


@pytest.mark.parametrize("name", slow_but(QUICK_CHAINS, CHAINS))
def test_a_run_that_changes_its_layout_keeps_its_decisions_and_losses(
    outcomes: dict[str, list[int | str]], folder: Path, name: str
) -> None:
    assert [outcomes[f"chain, {name}, {i}"] for i in range(4)] == [[75], [75, 75], [75, 75], [0, 0]]
    assert decisions(folder / f"chain, {name}") == decisions(folder / "chain in one process")
    assert rates(folder / f"chain, {name}") == rates(folder / "chain in one process")
    np.testing.assert_allclose(losses(folder / f"chain, {name}"), losses(folder / "chain in one process"), rtol=1e-4)


def test_a_rank_with_another_config_is_named_on_every_rank(outcomes: dict[str, list[int | str]]) -> None:
    for outcome in outcomes["another config"]:
        assert isinstance(outcome, str)
        assert "rank 1: optimizer.lr = 0.5 instead of 0.01, drop.theta = 0.6 instead of 0.5" in outcome
    assert outcomes["after a refusal"] == [0, 0]
