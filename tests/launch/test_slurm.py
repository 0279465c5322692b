"""The job scripts on a real Slurm of two nodes: the chain; runs that are preempted, asked to stop, or lose a node."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_sbld.exit_status import EXIT_MISTAKE
from tests.launch.cluster import NODES, REPOSITORY, Cluster, missing_programs, processes_of
from tests.launch.jobs import (
    ITERATIONS,
    JOBS,
    log_of,
    preempt_then_ask_to_stop,
    run_chain,
    start_training,
    wait_for_iteration,
    written,
)
from tests.training.trainer_helpers import LAYERS, losses

pytestmark = [
    pytest.mark.slow,
    pytest.mark.alone,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(bool(missing_programs()), reason=f"Slurm is not installed: {', '.join(missing_programs())}"),
]


@pytest.fixture(scope="module")
def cluster(folder: Path) -> Iterator[Cluster]:
    started = Cluster(folder)
    with started.running():
        yield started


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, config: Path) -> list[float]:
    """The losses of a run that nothing has interrupted."""
    job, run_dir = start_training(cluster, config, "undisturbed")
    cluster.wait_for_state(job, "COMPLETED")
    assert cluster.attempt(job) == 0
    return losses(run_dir)


def test_a_run_that_is_preempted_and_then_asked_to_stop_continues_bit_for_bit(
    cluster: Cluster, config: Path, undisturbed: list[float]
) -> None:
    job, run_dir = start_training(cluster, config, "preempted")
    preempt_then_ask_to_stop(cluster, job, run_dir)
    assert losses(run_dir) == undisturbed


def test_a_run_that_loses_a_node_is_requeued_and_continues_bit_for_bit(
    cluster: Cluster, config: Path, undisturbed: list[float]
) -> None:
    job, run_dir = start_training(cluster, config, "node lost")
    wait_for_iteration(cluster, job, run_dir, 20)  # past its first checkpoint
    attempt = cluster.attempt(job)
    with cluster.lost_node(NODES[1], job):
        cluster.wait_for_requeue(job, attempt)
        assert 20 <= written(run_dir) < ITERATIONS
    cluster.release(job)
    cluster.wait_for_state(job, "COMPLETED")
    assert losses(run_dir) == undisturbed


def test_a_job_that_is_cancelled_comes_back_only_when_submitted_again_and_a_mistaken_one_never(
    cluster: Cluster, config: Path, undisturbed: list[float]
) -> None:
    cancelled, run_dir = start_training(cluster, config, "cancelled")
    wait_for_iteration(cluster, cancelled, run_dir, 3)
    attempt = cluster.attempt(cancelled)
    cluster.call("scancel", cancelled)
    cluster.wait_until(lambda: cluster.field(cancelled, "JobState") == "CANCELLED", "the job has ended")
    assert cluster.attempt(cancelled) == attempt
    cluster.wait_until(lambda: not processes_of(cancelled), f"nothing of job {cancelled} is left")
    again, _ = start_training(cluster, config, "cancelled")
    cluster.wait_for_state(again, "COMPLETED")
    assert losses(run_dir) == undisturbed

    mistaken = cluster.submit(
        "--nodes=1", str(JOBS / "pretrain.sbatch"), str(config), "--optimizer.lr", "-1", SBLD_HOME=str(REPOSITORY)
    )
    cluster.wait_for_state(mistaken, "FAILED")
    assert cluster.field(mistaken, "ExitCode") == f"{EXIT_MISTAKE}:0"
    assert cluster.attempt(mistaken) == 0
    assert "optimizer.lr = -1.0 is not allowed: it must be a number in (0, inf)" in log_of(cluster, mistaken)


def test_a_task_of_an_array_that_is_asked_to_stop_is_requeued_alone(
    cluster: Cluster, folder: Path, config: Path
) -> None:
    """To Slurm the number of one of the tasks means all of them."""
    out = folder / "array"
    array = cluster.submit(
        "--array=1-2", "--nodes=1",
        str(JOBS / "measure_sensitivity.sbatch"), str(config), str(out), "--iterations", "40",
        SBLD_HOME=str(REPOSITORY),
    )  # fmt: skip
    tasks = [f"{array}_1", f"{array}_2"]
    for number in (1, 2):
        runs = out / f"part_{number}_of_2"
        cluster.wait_until(lambda runs=runs: any(runs.glob("*")), f"task {number} measures")
    (asked,) = [task for task in tasks if cluster.field(task, "JobId") == array]
    (other,) = set(tasks) - {asked}
    cluster.call("scancel", "--signal=USR1", "--batch", asked)
    cluster.wait_for_requeue(asked, 0)
    cluster.wait_for_state(other, "COMPLETED")
    cluster.release(asked)
    cluster.wait_for_state(asked, "COMPLETED")
    assert (cluster.attempt(other), cluster.attempt(asked)) == (0, 1)
    assert len(json.loads((out / "sensitivity.json").read_text())["gap"]) == LAYERS


def test_the_chain_measures_trains_and_evaluates(cluster: Cluster, corpus: Path) -> None:
    run_chain(cluster, corpus, "chain")
