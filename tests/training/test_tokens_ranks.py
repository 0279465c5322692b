"""random-LTD in the trainer on two ranks: a run of one process goes on, on other layouts, as if it had not stopped."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_sbld.config.sections import Config
from tests.training.test_tokens import TOKENS
from tests.training.trainer_helpers import (
    HALF,
    ITERATIONS,
    NO_DROPOUT,
    change,
    decisions,
    in_folder,
    losses,
    prepare_corpus,
    run_here,
    run_trainers,
    stop_and_resume,
    tiny_run,
    train_rows,
    trained,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

LAYOUTS: dict[str, dict[str, Any]] = {
    "TP 2 with sequence parallelism": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "CP 2": {"context_parallel_size": 2},
    "PP 2": {"pipeline_model_parallel_size": 2},
    "DP 2": {},
}
RESUMED = ("CP 2", "PP 2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def outcomes(folder: Path) -> dict[str, Any]:
    corpus = prepare_corpus(folder)
    model = {**NO_DROPOUT, "position_embedding_type": "rope"}
    drop = {**TOKENS, **HALF, "token_strata": 4}
    config = tiny_run(folder / "run", corpus, model=model, drop=drop)
    trained(config, folder / "one process")
    stopped, _ = stop_and_resume(config, 3)
    assert run_here(stopped) == 75
    there: dict[str, Config] = {}
    for name, layout in LAYOUTS.items():
        shutil.copytree(folder / "run", folder / name)
        # The checkpoint's strata hold, whatever the layout needs.
        there[name] = change(in_folder(config, folder / name), drop={"token_strata": None}, parallel=layout)
    for name in RESUMED:
        whole = change(in_folder(config, folder / f"whole {name}"), parallel=LAYOUTS[name])
        there[f"whole {name}"] = whole
        there[f"stopped {name}"], there[f"resumed {name}"] = stop_and_resume(
            in_folder(whole, folder / f"resumed {name}"), 4
        )
    return dict(zip(there, run_trainers(2, list(there.values()), timeout=500), strict=True))


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_run_of_one_process_goes_on_with_the_same_tokens_on_another_layout(
    outcomes: dict[str, Any], folder: Path, name: str
) -> None:
    assert outcomes[name] == [0, 0]
    assert len(losses(folder / name)) == ITERATIONS
    assert decisions(folder / name) == decisions(folder / "one process")
    tokens = [[row["kept_tokens"] for row in train_rows(folder / run)] for run in (name, "one process")]
    assert tokens[0] == tokens[1]
    np.testing.assert_allclose(losses(folder / name), losses(folder / "one process"), rtol=1e-4)


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_has_the_losses_of_the_uninterrupted_one(
    outcomes: dict[str, Any], folder: Path, name: str
) -> None:
    assert [outcomes[f"{part} {name}"] for part in ("whole", "stopped", "resumed")] == [[0, 0], [75, 75], [0, 0]]
    assert losses(folder / f"resumed {name}") == losses(folder / f"whole {name}")
