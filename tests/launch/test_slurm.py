"""The job scripts on a real Slurm of two nodes: the chain; runs that are preempted, asked to stop, or lose a node."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from megatron_sbld.exit_status import EXIT_MISTAKE
from tests.launch.cluster import ENDED, NODES, REPOSITORY, Cluster, missing_programs, processes_of
from tests.training.trainer_helpers import (
    LAYERS,
    losses,
    prepare_corpus,
    rows,
    sbld,
    tiny_sections,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(bool(missing_programs()), reason=f"Slurm is not installed: {', '.join(missing_programs())}"),
]

JOBS = REPOSITORY / "scripts" / "slurm"
ITERATIONS = 300
LONG = {"train_iters": ITERATIONS, "global_batch_size": 16}
"""Long enough that Slurm, which looks every few seconds, finds the run under way."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("slurm")


@pytest.fixture(scope="module")
def corpus(folder: Path) -> Path:
    return prepare_corpus(folder)


@pytest.fixture(scope="module")
def cluster(folder: Path) -> Iterator[Cluster]:
    started = Cluster(folder)
    with started.running():
        yield started


@pytest.fixture(scope="module")
def config(folder: Path, corpus: Path) -> Path:
    """A run that drops layers, reads through worker processes and saves in the background."""
    sections = tiny_sections(
        folder / "run",
        corpus,
        drop=sbld(folder),
        training=LONG,
        data={"train_data_path": [f"{corpus}_train"], "num_workers": 1},
        checkpoint={"save_interval": 10, "keep_last": 2, "async_save": True},
        logging={"run_dir": str(folder / "run"), "progress": "lines", "tensorboard": False, "log_interval": 50},
    )
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(sections))
    return path


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, config: Path) -> list[float]:
    """The losses of a run that nothing has interrupted."""
    job, run_dir = start_training(cluster, config, "undisturbed")
    cluster.wait_for_state(job, "COMPLETED")
    assert cluster.attempt(job) == 0
    return losses(run_dir)


def start_training(cluster: Cluster, config: Path, name: str) -> tuple[str, Path]:
    """A job on both nodes that trains in a folder of its own."""
    run_dir = cluster.folder / name
    job = cluster.submit(
        "--nodes=2", str(JOBS / "pretrain.sbatch"), str(config), "--logging.run_dir", str(run_dir),
        SBLD_HOME=str(REPOSITORY),
    )  # fmt: skip
    return job, run_dir


def wait_for_iteration(cluster: Cluster, job: str, run_dir: Path, iteration: int) -> None:
    def reached() -> bool:
        state = cluster.field(job, "JobState")
        assert state not in (*ENDED, "NODE_FAIL"), f"job {job} is {state}\n{cluster.logs()}"
        return written(run_dir) >= iteration

    cluster.wait_until(reached, f"iteration {iteration} in {run_dir}")


def written(run_dir: Path) -> int:
    """Iterations that a run has written a row of."""
    path = run_dir / "metrics.jsonl"
    return path.read_text().count('"loss"') if path.exists() else 0


def log_of(cluster: Cluster, job: str) -> str:
    return next(cluster.folder.glob(f"*-{job}.log")).read_text()


def node_logs(cluster: Cluster, job: str, attempt: int) -> str:
    logs = sorted(cluster.folder.glob(f"logs/*-{job}/attempt_{attempt}/node_*.log"))
    assert len(logs) == len(NODES), "one log a node"
    return "\n".join(log.read_text() for log in logs)


def test_a_run_that_is_preempted_and_then_asked_to_stop_continues_bit_for_bit(
    cluster: Cluster, config: Path, undisturbed: list[float]
) -> None:
    job, run_dir = start_training(cluster, config, "preempted")
    wait_for_iteration(cluster, job, run_dir, 20)
    first = cluster.attempt(job)
    cluster.call("sbatch", "--partition=high", "--nodes=2", "--exclusive", "--wrap=sleep 1")
    cluster.wait_for_requeue(job, first)
    stopped_at = written(run_dir)
    assert 20 <= stopped_at < ITERATIONS
    assert f"stopped as asked after iteration {stopped_at} of {ITERATIONS}" in node_logs(cluster, job, first)
    assert "status 75" in log_of(cluster, job)

    cluster.release(job)
    wait_for_iteration(cluster, job, run_dir, stopped_at + 20)
    second = cluster.attempt(job)
    assert f"iterations {stopped_at + 1} to {ITERATIONS}" in node_logs(cluster, job, second), "nothing was done twice"
    cluster.call("scancel", "--signal=USR1", "--batch", job)  # as --signal=B:USR1@600 does near the time limit
    cluster.wait_for_requeue(job, second)
    stopped_again_at = written(run_dir)
    assert stopped_at + 20 <= stopped_again_at < ITERATIONS

    cluster.release(job)
    cluster.wait_for_state(job, "COMPLETED")
    assert f"iterations {stopped_again_at + 1} to {ITERATIONS}" in node_logs(cluster, job, cluster.attempt(job))
    assert losses(run_dir) == undisturbed


def test_a_run_that_loses_a_node_is_requeued_and_continues_bit_for_bit(
    cluster: Cluster, config: Path, undisturbed: list[float]
) -> None:
    job, run_dir = start_training(cluster, config, "node lost")
    wait_for_iteration(cluster, job, run_dir, 20)  # past its first checkpoint
    attempt = cluster.attempt(job)
    cluster.kill_node(NODES[1])
    cluster.wait_for_requeue(job, attempt)
    assert 20 <= written(run_dir) < ITERATIONS
    cluster.start_node(NODES[1])
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
    assert "optimizer.lr = -1.0: must be above 0" in log_of(cluster, mistaken)


def test_a_task_of_an_array_that_is_asked_to_stop_is_requeued_alone(
    cluster: Cluster, folder: Path, config: Path
) -> None:
    """To Slurm the number of one of the tasks means all of them."""
    out = folder / "array"
    array = cluster.submit(
        "--array=1-2", "--nodes=1", str(JOBS / "profile.sbatch"), str(config), str(out), "--iterations", "40",
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


def test_the_chain_measures_trains_and_evaluates(cluster: Cluster, folder: Path, corpus: Path) -> None:
    sections = tiny_sections(
        folder / "unused",
        corpus,
        training={"train_iters": 20},
        checkpoint={"save_at_end": True},
        logging={"progress": "lines", "tensorboard": False},
    )
    (folder / "chain.yaml").write_text(yaml.safe_dump(sections))
    (folder / "passages.txt").write_text("the first word and the last\nimport this and import that\n")
    run_dir = folder / "chain"
    printed = cluster.call(
        str(JOBS / "submit_chain.sh"),
        "--parts", "2", "--profile", "--iterations 10",
        "--profile-job", "--gpus-per-node=0 --nodes=1",
        "--pretrain-job", "--gpus-per-node=0 --nodes=2",
        "--evaluate-job", "--gpus-per-node=0",
        str(folder / "chain.yaml"), str(run_dir), str(folder / "passages.txt"),
        "--drop.theta", "0.5", "--drop.beta", "0.1",
    )  # fmt: skip
    jobs = dict(line.split(": job ") for line in printed.splitlines() if ": job " in line)
    assert list(jobs) == ["profile", "pretrain", "lambada"]
    cluster.wait_for_state(jobs["lambada"], "COMPLETED", seconds=600)

    measured = json.loads((run_dir / "sensitivity" / "sensitivity.json").read_text())
    assert measured["num_layers"] == LAYERS == len(measured["gap"])
    trained = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert trained["drop"]["sensitivity"] == str(run_dir / "sensitivity" / "sensitivity.json")
    assert len(losses(run_dir)) == 20
    assert any(row["kept_fraction"] < 1 for row in rows(run_dir)), "it drops layers"
    assert "data 2;" in node_logs(cluster, jobs["pretrain"], 0), "both nodes train one model"
    results = [json.loads(line) for line in (run_dir / "evaluations.jsonl").read_text().splitlines()]
    assert [result["iteration"] for result in results] == [20]
