"""`pretrain` with training.torch_compile: the graph is Megatron's layer, and dropping is outside of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_sbld.config.sections import Config
from tests.training.trainer_helpers import (
    FULL_DEPTH,
    NO_DROPOUT,
    change,
    decisions,
    losses,
    run_here,
    sbld,
    stop_and_resume,
    tiny_run,
    train_rows,
    trained,
)

pytestmark = pytest.mark.slow

FULL_RECOMPUTATION = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
WITH_DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "fp32": {},
    "bf16": {"training": {"precision": "bf16"}},
    "fused residual": {"drop": {"residual": "fused"}},
    "scope microbatch": {"drop": {"decision_scope": "microbatch"}},
    "samples": {
        "drop": {"granularity": "sample", "decision_scope": "microbatch"},
        "training": {"micro_batch_size": 4, "global_batch_size": 16},
    },
    "full recomputation": {"training": FULL_RECOMPUTATION},
    "samples, full recomputation": {
        "drop": {"granularity": "sample"},
        "training": {**FULL_RECOMPUTATION, "micro_batch_size": 4, "global_batch_size": 16},
    },
    "scaled branches": {"drop": {"residual_scale": "inverse_keep_prob"}},
    "freeze": {"drop": {"dropped_update": "freeze"}},
}
QUICK = {"bf16", "scaled branches"}  # each compiles for seconds
TOLERANCE = {"bf16": 5e-3}
MOST_GRAPHS = {"scaled branches": 3, "samples": 4, "full recomputation": 4, "samples, full recomputation": 7}


@pytest.fixture
def config(tmp_path: Path, corpus: Path) -> Iterator[Config]:
    """A compiled run with SBLD and without dropout."""
    torch._dynamo.reset()  # graphs of other configs count towards torch's limit
    torch._dynamo.utils.counters.clear()
    yield tiny_run(tmp_path / "run", corpus, drop=sbld(tmp_path), model=NO_DROPOUT, training={"torch_compile": True})
    torch._dynamo.reset()


def graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in VARIANTS]
)
def test_a_compiled_run_has_the_decisions_and_losses_of_an_eager_one(config: Config, tmp_path: Path, name: str) -> None:
    config = change(config, **VARIANTS[name])
    eager = trained(change(config, training={"torch_compile": False}), tmp_path / "eager")
    assert graphs() == 0
    compiled = trained(config, tmp_path / "compiled")
    assert 0 < graphs() <= MOST_GRAPHS.get(name, 2)
    assert decisions(tmp_path / "compiled") == decisions(tmp_path / "eager")
    np.testing.assert_allclose(compiled, eager, rtol=TOLERANCE.get(name, 1e-4))
    norms = [[row["grad_norm"] for row in train_rows(tmp_path / run)] for run in ("compiled", "eager")]
    np.testing.assert_allclose(*norms, rtol=10 * TOLERANCE.get(name, 1e-4))
    assert any(min(row) < 1 for row in decisions(tmp_path / "compiled"))


def test_nothing_dropped_is_the_compiled_stock_layer_bit_for_bit(config: Config, tmp_path: Path) -> None:
    config = change(config, training={"micro_batch_size": 2})  # of one sample the embedding has other strides
    stock = change(config, drop={**FULL_DEPTH, "sensitivity": None})
    expected = trained(stock, tmp_path / "stock")
    assert graphs() == 1, "one for all layers"
    assert trained(change(stock, drop={"policy": "layerdrop", "theta": 1.0}), tmp_path / "kept") == expected
    assert graphs() == 2, "and one for all switchable layers"
    assert trained(config, tmp_path / "dropped") != expected
    assert graphs() == 2, "decisions are no part of it"


def test_dropout_is_repeated_by_recomputation_and_by_a_resumed_run_bit_for_bit(config: Config, tmp_path: Path) -> None:
    config = change(config, model=WITH_DROPOUT)
    expected = trained(config, tmp_path / "whole")
    assert trained(change(config, model=NO_DROPOUT), tmp_path / "without") != expected
    assert trained(change(config, training=FULL_RECOMPUTATION), tmp_path / "recomputed") == expected, "the same masks"
    first, second = stop_and_resume(config, 3)
    assert run_here(first) == 75
    assert run_here(second) == 0
    assert losses(config.logging.run_dir) == expected


def test_a_missing_compiler_is_named_before_the_run_starts(config: Config) -> None:
    with torch._inductor.config.patch("cpp.cxx", (None, "no-such-compiler")):
        outcome = run_here(config)
    assert outcome.startswith("ValueError: training.torch_compile = True: No working C++ compiler found")
    assert not Path(config.logging.run_dir).exists()


def test_many_models_in_one_process_have_graphs_of_their_own(config: Config, tmp_path: Path) -> None:
    for width in range(17, 26):  # torch's own limit is 8
        trained(change(config, model={"ffn_hidden_size": width}, training={"train_iters": 3}), tmp_path / str(width))
    assert graphs() > 8
