"""The job scripts in real containers, on a real Slurm: pyxis with enroot, and Apptainer.

Where the variables in `IMAGES` name an image each, and `PLUGIN` pyxis's plugin; CONTRIBUTING.md says how to make them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.cluster import NODES, Cluster, missing_programs, which
from tests.launch.jobs import log_of, node_logs, preempt_then_ask_to_stop, run_chain, start_training
from tests.training.trainer_helpers import losses

IMAGES = {"pyxis": "MEGATRON_SBLD_TEST_SQSH", "apptainer": "MEGATRON_SBLD_TEST_SIF"}
PROGRAM = {"pyxis": "enroot", "apptainer": "apptainer"}
PLUGIN = "MEGATRON_SBLD_TEST_PYXIS"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.alone,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(bool(missing_programs()), reason=f"Slurm is not installed: {', '.join(missing_programs())}"),
]


def missing(runtime: str) -> str | None:
    """What keeps a runtime from being tested here."""
    wanted = [IMAGES[runtime], *([PLUGIN] if runtime == "pyxis" else [])]
    for name in wanted:
        if name not in os.environ or not Path(os.environ[name]).exists():
            return f"{name} names nothing that is there, so no container runs"
    return None if which(PROGRAM[runtime]) else f"{PROGRAM[runtime]} is not installed"


def param(runtime: str) -> object:
    reason = missing(runtime)
    return pytest.param(runtime, marks=pytest.mark.skipif(reason is not None, reason=str(reason)))


on_each_runtime = pytest.mark.parametrize("runtime", [param(runtime) for runtime in IMAGES])


@pytest.fixture(scope="module")
def cluster(folder: Path) -> Iterator[Cluster]:
    with_pyxis = missing("pyxis") is None
    started = Cluster(folder, Path(os.environ[PLUGIN]) if with_pyxis else None)
    with started.running():
        yield started


@pytest.fixture(scope="module")
def outside(cluster: Cluster, folder: Path, config: Path) -> list[float]:
    """The losses of an undisturbed run without a container."""
    job, run_dir = start_training(cluster, config, "outside", **telling_roots(folder))
    cluster.wait_for_state(job, "COMPLETED")
    assert set(roots(node_logs(cluster, job, 0))) == {root_of_this_machine()}
    return losses(run_dir)


def telling_roots(folder: Path) -> dict[str, str]:
    """The environment of a job whose nodes say what they see as their root directory."""
    (folder / "setup").mkdir(exist_ok=True)
    setup = folder / "setup" / "setup.sh"
    setup.write_text('echo "root directory $(stat -c %d:%i /)"\n')
    return {"SBLD_SETUP": str(setup)}


def container(runtime: str, folder: Path) -> dict[str, str]:
    """The environment of a job in a container."""
    return {
        "SBLD_CONTAINER": os.environ[IMAGES[runtime]],
        "SBLD_PYTHON": os.environ.get("MEGATRON_SBLD_TEST_PYTHON", "python3"),
        **telling_roots(folder),
    }


def root_of_this_machine() -> str:
    found = os.stat("/")
    return f"{found.st_dev}:{found.st_ino}"


def roots(log: str) -> list[str]:
    return re.findall("root directory (.*)", log)


def assert_in_containers(log: str, nodes: int) -> None:
    found = roots(log)
    assert len(found) == nodes
    assert root_of_this_machine() not in found


@on_each_runtime
def test_a_run_in_containers_that_is_preempted_and_asked_to_stop_equals_one_outside(
    runtime: str, cluster: Cluster, folder: Path, config: Path, outside: list[float]
) -> None:
    job, run_dir = start_training(cluster, config, runtime, **container(runtime, folder))
    preempt_then_ask_to_stop(cluster, job, run_dir)
    for attempt in range(cluster.attempt(job) + 1):
        assert_in_containers(node_logs(cluster, job, attempt), len(NODES))
    statuses = re.findall("srun: error: .*task .*: (.*)", log_of(cluster, job))
    assert set(statuses) == {"Exited with exit code 75"}, "nothing but the run was ended by the signals"
    assert losses(run_dir) == outside


@on_each_runtime
def test_the_chain_measures_trains_and_evaluates_in_containers(
    runtime: str, cluster: Cluster, folder: Path, corpus: Path
) -> None:
    jobs = run_chain(cluster, corpus, f"chain {runtime}", **container(runtime, folder))
    for name, number in jobs.items():
        logs = list(folder.glob(f"logs/*-{number}*/attempt_*/node_*.log"))
        assert len(logs) == (1 if name == "lambada" else 2), "of two tasks, of two nodes, of one"
        for log in logs:
            assert_in_containers(log.read_text(), 1)
