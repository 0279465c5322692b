"""Jobs on both nodes of the cluster: training that is long enough to be interrupted, the chain, and what they write."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from tests.launch.cluster import ENDED, NODES, REPOSITORY, Cluster
from tests.training.trainer_helpers import LAYERS, losses, rows, sbld, tiny_sections

JOBS = REPOSITORY / "scripts" / "slurm"
ITERATIONS = 300
LONG = {"train_iters": ITERATIONS, "global_batch_size": 16}
"""Long enough that Slurm, which looks every few seconds, finds the run under way."""


def write_long_run(folder: Path, corpus: Path) -> Path:
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


def start_training(cluster: Cluster, config: Path, name: str, **environment: str) -> tuple[str, Path]:
    """A job on both nodes that trains in a folder of its own."""
    run_dir = cluster.folder / name
    job = cluster.submit(
        "--nodes=2", str(JOBS / "pretrain.sbatch"), str(config), "--logging.run_dir", str(run_dir),
        SBLD_HOME=str(REPOSITORY), **environment,
    )  # fmt: skip
    return job, run_dir


def preempt_then_ask_to_stop(cluster: Cluster, job: str, run_dir: Path) -> None:
    """Interrupt a training job twice; each time it must save, come back and go on where it was, until complete."""
    wait_for_iteration(cluster, job, run_dir, 20)
    first = cluster.attempt(job)
    cluster.call("sbatch", "--partition=high", "--nodes=2", "--exclusive", "--wrap=sleep 1")
    cluster.wait_for_requeue(job, first)
    stopped_at = written(run_dir)
    assert 20 <= stopped_at < ITERATIONS
    assert f"stopped on request after iteration {stopped_at} of {ITERATIONS}" in node_logs(cluster, job, first)
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


def run_chain(cluster: Cluster, corpus: Path, name: str, **environment: str) -> dict[str, str]:
    """Submit the chain, see it measure, train on both nodes and evaluate, and return its jobs."""
    folder = cluster.folder
    sections = tiny_sections(
        folder / "unused",
        corpus,
        training={"train_iters": 20},
        checkpoint={"save_at_end": True},
        logging={"progress": "lines", "tensorboard": False},
    )
    (folder / "chain.yaml").write_text(yaml.safe_dump(sections))
    (folder / "passages.txt").write_text("the first word and the last\nimport this and import that\n")
    run_dir = folder / name
    printed = cluster.call(
        str(JOBS / "submit_chain.sh"),
        "--parts", "2", "--measure", "--iterations 10",
        "--measure-job", "--gpus-per-node=0 --nodes=1",
        "--pretrain-job", "--gpus-per-node=0 --nodes=2",
        "--evaluate-job", "--gpus-per-node=0",
        str(folder / "chain.yaml"), str(run_dir), str(folder / "passages.txt"),
        "--drop.theta", "0.5", "--drop.beta", "0.1",
        **environment,
    )  # fmt: skip
    jobs = dict(line.split(": job ") for line in printed.splitlines() if ": job " in line)
    assert list(jobs) == ["sensitivity", "pretrain", "lambada"]
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
    return jobs


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
