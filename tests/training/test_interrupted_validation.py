"""A request to stop in the middle of a validation or of tasks: the run saves at once, and makes up for them later."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from megatron_sbld.checkpoint.files import latest_complete
from megatron_sbld.config.sections import Config
from megatron_sbld.health.watchdog import POSITION, Position
from tests.training.trainer_helpers import (
    BOTH_OVERLAPS,
    call_on_ranks,
    change,
    in_folder,
    prepare_corpus,
    rows,
    run_here,
    sbld,
    tiny_run,
)

pytestmark = pytest.mark.timeout(600)

STOPPED_AT, EVAL_ITERS = 2, 6
LAYOUTS: dict[str, dict[str, Any]] = {
    "DP 2, both overlaps": BOTH_OVERLAPS,
    "PP 2 interleaved": {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2},
}
TIMES = ("step_time_s", "tokens_per_s", "train_time_s", "tasks_time_s")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("interrupted")


@pytest.fixture(scope="module")
def corpus(folder: Path) -> Path:
    return prepare_corpus(folder)


def run_with_validation(folder: Path, corpus: Path, name: str, **parallel: Any) -> Config:
    """It validates and is asked tasks after every second iteration, without ever saving by itself."""
    text = folder / "text.txt"
    text.write_text(Path(__file__).read_text()[:500])
    return tiny_run(
        folder / name,
        corpus,
        drop=sbld(folder),
        parallel=parallel,
        data={"valid_data_path": [f"{corpus}_valid"], "perplexity_path": str(text)},
        optimizer={"lr_warmup_iters": 0},
        training={
            "global_batch_size": 2,
            "train_iters": 4,
            "eval_interval": 2,
            "eval_iters": EVAL_ITERS,
            "task_interval": 2,
        },
    )


@contextmanager
def stopped_in(activity: str, iteration: int, microbatch: int) -> Iterator[list[int]]:
    """SIGTERM to this process in a microbatch of an activity; the list has an entry for each one that follows."""
    following: list[int] = []

    class Interrupting(Position):
        def __setattr__(self, name: str, value: Any) -> None:
            if name == "activity":
                super().__setattr__("seen", 0)
            if name == "microbatches" and self.activity == activity and self.iteration == iteration:
                super().__setattr__("seen", self.seen + 1)
                if self.seen == microbatch:
                    os.kill(os.getpid(), signal.SIGTERM)
                if self.seen > microbatch:
                    following.append(value)
            super().__setattr__(name, value)

    POSITION.__class__ = Interrupting
    try:
        yield following
    finally:
        POSITION.__class__ = Position


def figures(run_dir: Path | str) -> list[dict[str, Any]]:
    """All rows of a run, in their order and without the times."""
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows(run_dir)]


@pytest.mark.parametrize("activity", ["validation", "evaluating tasks"])
def test_a_run_stopped_in_mid_validation_saves_at_once_and_goes_on_as_if_it_had_not_been(
    folder: Path, corpus: Path, activity: str
) -> None:
    config = run_with_validation(folder, corpus, activity)
    assert run_here(in_folder(config, folder / "whole")) == 0
    with stopped_in(activity, STOPPED_AT, 3) as following:
        assert run_here(config) == 75
    assert following == []
    assert_stopped(config, activity)
    assert run_here(config) == 0
    assert figures(folder / activity) == figures(folder / "whole")
    assert run_here(config) == 0, "nothing is left"
    assert figures(folder / activity) == figures(folder / "whole")


def assert_stopped(config: Config, activity: str) -> None:
    """Saved after the iteration, with no row of what was interrupted."""
    saved = latest_complete(Path(config.logging.run_dir) / "checkpoints")
    assert saved is not None
    assert saved.iteration == STOPPED_AT
    written = [sorted({"loss", "valid_loss", "tasks_time_s"} & row.keys()) for row in rows(config.logging.run_dir)]
    assert written == [["loss"]] * STOPPED_AT + [["valid_loss"]] * (activity != "validation")


def test_a_validation_at_the_end_of_a_run_is_made_up_for_too(folder: Path, corpus: Path) -> None:
    config = change(run_with_validation(folder, corpus, "end"), training={"train_iters": STOPPED_AT})
    assert run_here(in_folder(config, folder / "whole end")) == 0
    with stopped_in("validation", STOPPED_AT, 3):
        assert run_here(config) == 75
    for _ in range(2):  # the second time nothing is left
        assert run_here(config) == 0
        assert figures(folder / "end") == figures(folder / "whole end")


def test_a_request_that_comes_in_an_iteration_does_not_wait_for_the_validation_that_follows(
    folder: Path, corpus: Path
) -> None:
    config = run_with_validation(folder, corpus, "iteration")
    with stopped_in("training", STOPPED_AT, 2):
        assert run_here(config) == 75
    assert_stopped(config, "validation")


def _run_and_stop_rank_1(config: Config) -> tuple[int | str, int]:
    if os.environ["RANK"] != "1" or "whole" in config.logging.run_dir or Path(config.logging.run_dir).exists():
        return run_here(config), 0
    with stopped_in("validation", STOPPED_AT, 2) as following:
        return run_here(config), len(following)


@pytest.mark.slow
def test_ranks_agree_when_one_of_them_is_asked(folder: Path, corpus: Path) -> None:
    runs = [run_with_validation(folder, corpus, name, **parallel) for name, parallel in LAYOUTS.items()]
    calls = [call for run in runs for call in (in_folder(run, f"{run.logging.run_dir} whole"), run, run)]
    outcomes = call_on_ranks(2, _run_and_stop_rank_1, calls)
    for at, run in enumerate(runs):
        whole, stopped, resumed = outcomes[3 * at : 3 * at + 3]
        assert [status for status, _ in (*whole, *stopped, *resumed)] == [0, 0, 75, 75, 0, 0]
        # On the pipeline the rest of as many microbatches as an iteration has, in each of two chunks.
        chunks = 2 if run.parallel.pipeline_model_parallel_size > 1 else 1
        assert stopped[1][1] == (0 if chunks == 1 else chunks * run.training.global_batch_size - 2)
        assert figures(run.logging.run_dir) == figures(f"{run.logging.run_dir} whole")
