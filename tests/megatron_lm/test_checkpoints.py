"""What `megatron-sbld pretrain` saves, continued by layer dropping as it is attached to Megatron-LM."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from megatron.core import dist_checkpointing
from megatron.core.num_microbatches_calculator import (
    destroy_num_microbatches_calculator,
    init_num_microbatches_calculator,
)

from megatron_sbld.megatron_lm.arguments import argument_name
from tests.harness import model_parallel, single_process
from tests.megatron_lm.test_run import attached, step
from tests.training.trainer_helpers import decisions, in_folder, prepare_corpus, run_here, stop_and_resume, tiny_run

STOP = 3
DROP: dict[str, Any] = {"policy": "layerdrop", "theta": 0.5, "sampler": "balanced", "balance_stages": 2}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[list[float]], Path]:
    """Decisions of a whole run, and the checkpoint of the same one after STOP iterations."""
    folder = tmp_path_factory.mktemp("runs")
    config = tiny_run(folder / "whole", prepare_corpus(folder), drop=DROP)
    stopped = stop_and_resume(in_folder(config, folder / "stopped"), STOP)[0]
    assert [run_here(config), run_here(stopped)] == [0, 75]
    return decisions(folder / "whole"), folder / "stopped" / "checkpoints" / f"iter_{STOP:07d}"


def test_the_trainers_checkpoint_gives_megatron_lm_the_state_and_the_same_decisions(
    runs: tuple[list[list[float]], Path],
) -> None:
    whole, checkpoint = runs
    scheduler_state = dist_checkpointing.load_common_state_dict(str(checkpoint))["opt_param_scheduler"]
    # Without --sbld-balance-stages: one pipeline stage would be balanced, had the checkpoint not said two.
    words = [
        word
        for name, value in dataclasses.asdict(tiny_run(checkpoint, checkpoint, drop=DROP).drop).items()
        if name in DROP and name != "balance_stages"
        for word in (argument_name(name), str(value))
    ]
    with single_process(), model_parallel():
        init_num_microbatches_calculator(0, None, 8, 1, 1, False)
        try:
            run, scheduler, _ = attached(*words)
            assert run.controller.stages == [[1, 2, 3, 4]]
            scheduler.load_state_dict({**scheduler.state_dict(), "sbld": scheduler_state["sbld"]})
            assert run.controller.stages == 2
            for iteration in range(STOP + 1, len(whole) + 1):
                step(run, iteration)
                assert run.controller.kept_shares.mean(axis=0).tolist() == whole[iteration - 1]
        finally:
            destroy_num_microbatches_calculator()
