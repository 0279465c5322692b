"""`sensitivity measure` on two processes: every layout like one process, restored and continued bit for bit.

One start of the processes runs all cases; what one process has to do comes before.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_sbld.config.sections import Config
from megatron_sbld.sensitivity.file import SensitivityFile
from tests.measure.measure_helpers import call, measure, measure_on_rank, state_is_restored, values
from tests.training.trainer_helpers import (
    BOTH_OVERLAPS,
    NO_DROPOUT,
    call_on_ranks,
    change,
    prepare_corpus,
    run_here,
    tiny_run,
)

pytestmark = pytest.mark.slow

TENSOR = {"tensor_model_parallel_size": 2}
PIPELINE = {"pipeline_model_parallel_size": 2}
INTERLEAVED = {**PIPELINE, "num_virtual_stages_per_pipeline_rank": 2}
LAYOUTS: dict[str, dict[str, Any]] = {
    "TP 2 with sequence parallelism": {**TENSOR, "sequence_parallel": True},
    "PP 2 interleaved": INTERLEAVED,
    "DP 2, both overlaps": BOTH_OVERLAPS,
}
SLOW_LAYOUTS: dict[str, dict[str, Any]] = {
    "TP 2": TENSOR,
    "CP 2": {"context_parallel_size": 2},
    "PP 2": PIPELINE,
    "DP 2": {},
}
METHODS: dict[str, dict[str, Any]] = {
    "train": {"method": "train", "iterations": 3},
    "leave_one_out": {"method": "leave_one_out", "iterations": 2, "batches": 3},
    "block_influence": {"method": "block_influence", "iterations": 2, "batches": 3},
}
SNAPSHOTS: dict[str, dict[str, dict[str, Any]]] = {
    "DP 2, both overlaps": {"parallel": BOTH_OVERLAPS},
    "DP 2, both overlaps, bf16": {"parallel": BOTH_OVERLAPS, "training": {"precision": "bf16"}},
    "TP 2": {"parallel": TENSOR},
    "PP 2 interleaved": {"parallel": INTERLEAVED},
}
SLOW_SNAPSHOTS: dict[str, dict[str, dict[str, Any]]] = {
    "DP 2": {},
    "DP 2, distributed optimizer": {"parallel": {"use_distributed_optimizer": True}},
    "PP 2": {"parallel": PIPELINE},
    "CP 2": {"parallel": {"context_parallel_size": 2}},
}
RUN = {"train_iters": 400, "micro_batch_size": 2}
CONTINUED: dict[str, dict[str, dict[str, Any]]] = {
    "both overlaps": {"parallel": BOTH_OVERLAPS},
    "per microbatch, interleaved": {"parallel": INTERLEAVED, "drop": {"decision_scope": "microbatch"}},
}
N = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("measure_ranks")


@pytest.fixture(scope="module")
def corpus(folder: Path) -> Path:
    return prepare_corpus(folder)


def without_dropout(folder: Path, corpus: Path, **parallel: Any) -> Config:
    """Runs in which equal weights and decisions must give equal losses."""
    return tiny_run(folder / "run", corpus, model=NO_DROPOUT, training=RUN, parallel=parallel)


def with_dropout(folder: Path, corpus: Path, sections: dict[str, dict[str, Any]]) -> Config:
    return change(tiny_run(folder / "run", corpus, training=RUN), **sections)


@pytest.fixture(scope="module")
def weights(folder: Path, corpus: Path) -> Path:
    """A checkpoint to start from, and what one process measures there."""
    base = tiny_run(folder / "base", corpus, model=NO_DROPOUT, training={"train_iters": 3})
    assert run_here(change(base, checkpoint={"save_at_end": True})) == 0
    path = folder / "base" / "checkpoints" / "iter_0000003"
    # Without our manifest the weights alone are taken: layouts have optimizers of other kinds.
    (path / "checkpoint.json").unlink()
    for method, options in METHODS.items():
        assert measure(without_dropout(folder, corpus), folder / f"one, {method}", path, **options) == 0
    return path


Cases = dict[str, tuple[Callable[[Any], Any], Any]]


def cases_of(folder: Path, corpus: Path, weights: Path, layouts: dict[str, Any], snapshots: dict[str, Any]) -> Cases:
    cases: Cases = {}
    for layout, parallel in layouts.items():
        for method, options in METHODS.items():
            name = f"{layout}, {method}"
            config = without_dropout(folder, corpus, **parallel)
            cases[name] = (measure_on_rank, (config, str(folder / name), str(weights), options))
    for name, sections in snapshots.items():
        for before in (0, 2):
            cases[f"snapshot {name}, {before}"] = (state_is_restored, (with_dropout(folder, corpus, sections), before))
    return cases


def run_cases(cases: Cases) -> dict[str, list[Any]]:
    """By name, what each rank returned."""
    return dict(zip(cases, call_on_ranks(2, call, list(cases.values())), strict=True))


@pytest.fixture(scope="module")
def outcomes(folder: Path, corpus: Path, weights: Path) -> dict[str, list[Any]]:
    cases = cases_of(folder, corpus, weights, LAYOUTS, SNAPSHOTS)
    for name, sections in CONTINUED.items():
        config = with_dropout(folder, corpus, sections)
        stopping = change(config, training={"exit_after_iterations": 2 * N + 1})
        options = {"iterations": N}
        cases[f"whole, {name}"] = (measure_on_rank, (config, str(folder / f"whole, {name}"), None, options))
        for part in range(3):
            case = (stopping, str(folder / f"parts, {name}"), None, options)
            cases[f"part {part}, {name}"] = (measure_on_rank, case)
    return run_cases(cases)


@pytest.fixture(scope="module")
def slow_outcomes(folder: Path, corpus: Path, weights: Path) -> dict[str, list[Any]]:
    return run_cases(cases_of(folder, corpus, weights, SLOW_LAYOUTS, SLOW_SNAPSHOTS))


@pytest.mark.parametrize("before", [0, 2])
@pytest.mark.parametrize("name", SNAPSHOTS)
def test_a_snapshot_restores_the_run_bit_for_bit(outcomes: dict[str, list[Any]], name: str, before: int) -> None:
    assert outcomes[f"snapshot {name}, {before}"] == ["", ""]


@pytest.mark.parametrize("before", [0, 2])
@pytest.mark.parametrize("name", SLOW_SNAPSHOTS)
def test_a_snapshot_restores_the_run_of_further_layouts(
    slow_outcomes: dict[str, list[Any]], name: str, before: int
) -> None:
    assert slow_outcomes[f"snapshot {name}, {before}"] == ["", ""]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_measures_what_one_process_does(
    outcomes: dict[str, list[Any]], folder: Path, layout: str, method: str
) -> None:
    check_measurement(outcomes, folder, layout, method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layout", SLOW_LAYOUTS)
def test_further_layouts_measure_what_one_process_does(
    slow_outcomes: dict[str, list[Any]], folder: Path, layout: str, method: str
) -> None:
    check_measurement(slow_outcomes, folder, layout, method)


def check_measurement(outcomes: dict[str, list[Any]], folder: Path, layout: str, method: str) -> None:
    assert outcomes[f"{layout}, {method}"] == [0, 0]
    found, expected = values(folder / f"{layout}, {method}"), values(folder / f"one, {method}")
    assert list(found) == list(expected)
    for name, run in expected.items():
        np.testing.assert_allclose(found[name], run, rtol=2e-4, err_msg=name)
    gaps = [
        SensitivityFile.load(folder / name / "sensitivity.json").gap
        for name in (f"{layout}, {method}", f"one, {method}")
    ]
    np.testing.assert_allclose(gaps[0], gaps[1], rtol=0.05, atol=1e-4)


@pytest.mark.parametrize("name", CONTINUED)
def test_an_interrupted_measurement_equals_the_uninterrupted_one(
    outcomes: dict[str, list[Any]], folder: Path, name: str
) -> None:
    assert outcomes[f"whole, {name}"] == [0, 0]
    assert [outcomes[f"part {part}, {name}"] for part in range(3)] == [[75, 75], [75, 75], [0, 0]]
    assert values(folder / f"parts, {name}") == values(folder / f"whole, {name}")
