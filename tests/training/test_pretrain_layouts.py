"""`pretrain` on two uneven pipeline stages: the losses of one process, and checkpoints that go from layout to layout.

One start of the processes runs all cases; what one process has to do comes before.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_sbld.checkpoint.files import Layout
from megatron_sbld.config.sections import Config
from tests.training.trainer_helpers import (
    FULL_DEPTH,
    decisions,
    in_folder,
    losses,
    prepare_corpus,
    run_here,
    run_trainers,
    sbld,
    stop_and_resume,
    tiny_run,
    train_rows,
    without_dropout,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

EVEN = {"pipeline_model_parallel_size": 2}
UNEVEN = {**EVEN, "pipeline_model_parallel_layout": "Et|tttL"}
INTERLEAVED = {
    **EVEN,
    "num_virtual_stages_per_pipeline_rank": 2,
    "pipeline_model_parallel_layout": "Ett|t||tL",
}
SHARDED = {"use_distributed_optimizer": True}
LAYOUTS = {
    "uneven": UNEVEN,
    "uneven, distributed optimizer": {**UNEVEN, **SHARDED},
    "interleaved": INTERLEAVED,
}
COMPILED = {
    "uneven": UNEVEN,
    "replicas that overlap reductions": {**SHARDED, "overlap_grad_reduce": True, "ddp_bucket_size": 20_000},
}
# Each run is stopped after 2 iterations and continued on the next layout.
CHAINS: dict[str, list[dict[str, Any]]] = {
    "plain optimizer": [EVEN, UNEVEN, INTERLEAVED, EVEN],
    "distributed optimizer": [{**layout, **SHARDED} for layout in (EVEN, UNEVEN, INTERLEAVED)],
}
CHAIN_STOPS, CHAIN_LENGTH = 2, 8
BALANCED = {"sampler": "balanced"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("layouts")


@pytest.fixture(scope="module")
def corpus(folder: Path) -> Path:
    return prepare_corpus(folder)


def from_common_weights(folder: Path, corpus: Path, name: str, parallel: dict[str, Any], **sections: Any) -> Config:
    """From the weights that one process saved: initial weights are another draw on each layout."""
    return without_dropout(
        folder, corpus, name, parallel=parallel, checkpoint={"load": str(folder / "base")}, **sections
    )


def chain(folder: Path, corpus: Path, name: str) -> list[Config]:
    """One run on several layouts, with decisions that balance the stages of the first."""
    layouts = CHAINS[name]
    training = [{"train_iters": CHAIN_LENGTH, "exit_after_iterations": CHAIN_STOPS}] * (len(layouts) - 1)
    return [
        without_dropout(folder, corpus, name, parallel=layout, training=length, drop={**sbld(folder), **BALANCED})
        for layout, length in zip(layouts, [*training, {"train_iters": CHAIN_LENGTH}], strict=True)
    ]


@contextmanager
def stderr_into(file: Path) -> Iterator[None]:
    """What this process and those that it starts write to stderr goes into a file."""
    sys.stderr.flush()
    kept = os.dup(2)
    with file.open("wb") as sink:
        os.dup2(sink.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


@pytest.fixture(scope="module")
def outcomes(folder: Path, corpus: Path) -> dict[str, list[int | str]]:
    """Run all cases; by name, the outcome of each rank."""
    here = {
        "base": without_dropout(
            folder, corpus, "base", drop=FULL_DEPTH, training={"train_iters": 3}, checkpoint={"save_at_end": True}
        ),
        "one process": from_common_weights(folder, corpus, "one process", {}),
    }
    there = {
        f"on {name}": from_common_weights(folder, corpus, f"on {name}", layout) for name, layout in LAYOUTS.items()
    }
    there |= {
        f"compiled on {name}": from_common_weights(
            folder, corpus, f"compiled on {name}", layout, training={"torch_compile": True}
        )
        for name, layout in COMPILED.items()
    }
    whole = tiny_run(folder / "whole", corpus, parallel=UNEVEN, drop={**sbld(folder), **BALANCED})
    there["whole"] = whole
    there["stopped"], there["resumed"] = stop_and_resume(in_folder(whole, folder / "resumed"), 3)
    for name in CHAINS:
        there |= {f"{name} {i}": config for i, config in enumerate(chain(folder, corpus, name))}
        there[f"{name}, whole"] = without_dropout(
            folder,
            corpus,
            f"{name}, whole",
            parallel=CHAINS[name][0],
            training={"train_iters": CHAIN_LENGTH},
            drop={**sbld(folder), **BALANCED},
        )
    told = {"progress": "lines", "run_dir": str(folder / "told")}
    lopsided = {**sbld(folder), **BALANCED, "block_layers": [3, 4], "allow_layers": [1, 2]}
    there["told"] = tiny_run(
        folder / "told", corpus, parallel=EVEN, drop=lopsided, logging=told, training={"train_iters": 3}
    )
    results = {name: [run_here(config)] for name, config in here.items()}
    with stderr_into(folder / "stderr"):
        return results | dict(zip(there, run_trainers(2, list(there.values()), timeout=400), strict=True))


@pytest.mark.parametrize("name", LAYOUTS)
def test_uneven_stages_loaded_from_one_process_have_its_decisions_and_losses(
    outcomes: dict[str, list[int | str]], folder: Path, name: str
) -> None:
    assert outcomes["one process"] == [0]
    assert outcomes[f"on {name}"] == [0, 0]
    assert decisions(folder / f"on {name}") == decisions(folder / "one process")
    np.testing.assert_allclose(losses(folder / f"on {name}"), losses(folder / "one process"), rtol=1e-4)


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_layers_have_the_decisions_and_losses_of_one_eager_process(
    outcomes: dict[str, list[int | str]], folder: Path, name: str
) -> None:
    assert outcomes[f"compiled on {name}"] == [0, 0]
    assert decisions(folder / f"compiled on {name}") == decisions(folder / "one process")
    np.testing.assert_allclose(losses(folder / f"compiled on {name}"), losses(folder / "one process"), rtol=1e-4)
    if name in LAYOUTS:
        assert losses(folder / f"compiled on {name}") != losses(folder / f"on {name}"), "its sums have another order"


def test_a_run_on_uneven_stages_resumes_bit_for_bit(outcomes: dict[str, list[int | str]], folder: Path) -> None:
    assert [outcomes[name] for name in ("whole", "stopped", "resumed")] == [[0, 0], [75, 75], [0, 0]]
    assert losses(folder / "resumed") == losses(folder / "whole")
    assert decisions(folder / "resumed") == decisions(folder / "whole")


def test_the_balanced_sampler_evens_the_stages_of_the_layout(
    outcomes: dict[str, list[int | str]], folder: Path
) -> None:
    assert outcomes["stopped"] == [75, 75]
    saved = json.loads((folder / "resumed" / "checkpoints" / "iter_0000003" / "checkpoint.json").read_text())
    assert saved["train_state"]["drop"]["stages"] == [[1], [2, 3, 4]]
    assert saved["layout"]["pipeline_model_parallel_layout"] == "Et|t*3L"
    for row in train_rows(folder / "whole"):
        for stage in ([0], [1, 2, 3]):
            kept, expected = (sum(row[field][layer] for layer in stage) for field in ("kept", "keep_probs"))
            assert abs(kept - expected) < 1


@pytest.mark.parametrize("name", CHAINS)
def test_a_run_goes_from_even_to_uneven_stages_and_back_with_its_decisions_and_losses(
    outcomes: dict[str, list[int | str]], folder: Path, name: str
) -> None:
    last = len(CHAINS[name]) - 1
    assert [outcomes[f"{name} {i}"] for i in range(last + 1)] == [[75, 75]] * last + [[0, 0]]
    assert outcomes[f"{name}, whole"] == [0, 0]
    assert decisions(folder / name) == decisions(folder / f"{name}, whole")
    np.testing.assert_allclose(losses(folder / name), losses(folder / f"{name}, whole"), rtol=1e-4)


def test_pretrain_tells_the_stages_and_a_better_placement_before_the_first_iteration(
    outcomes: dict[str, list[int | str]], folder: Path
) -> None:
    assert outcomes["told"] == [0, 0]
    told = (folder / "stderr").read_text()
    assert told.count('parallel.pipeline_model_parallel_layout: "Et*3|tL"') == 1
    assert told.index("stage 2") < told.index("would save") < told.index("iteration 1/")


def test_optimizer_state_of_a_format_that_keeps_its_layout_is_refused_on_other_stages() -> None:
    from megatron_sbld.checkpoint.state import check_layout

    even = Layout(
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=2,
        num_virtual_stages_per_pipeline_rank=1,
        context_parallel_size=1,
        data_parallel_size=1,
        optimizer_format="dp_reshardable",
        optimizer_buckets=[[100]],
        precision="bf16",
    )
    uneven = dataclasses.replace(even, pipeline_model_parallel_layout="Et|t*3L")
    check_layout(Path("saved"), saved=uneven, present=uneven)
    message = r"parallel.pipeline_model_parallel_layout is Et\|t\*3L, but the checkpoint was saved with None"
    with pytest.raises(ValueError, match=message):
        check_layout(Path("saved"), saved=even, present=uneven)
    reshardable = dataclasses.replace(uneven, optimizer_format="fully_reshardable")
    check_layout(
        Path("saved"), saved=dataclasses.replace(even, optimizer_format="fully_reshardable"), present=reshardable
    )
