"""The launch scripts without Slurm: what they print and refuse, and the launcher that they start."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.launch.cluster import REPOSITORY
from tests.training.trainer_helpers import prepare_corpus, tiny_sections

SCRIPTS = REPOSITORY / "scripts"
COMMANDS = [SCRIPTS / f"{name}.sh" for name in ("pretrain", "measure_sensitivity", "eval_lambada")]
JOBS = [SCRIPTS / "slurm" / f"{name}.sbatch" for name in ("pretrain", "measure_sensitivity", "eval_lambada")]
CHAIN = SCRIPTS / "slurm" / "submit_chain.sh"
CONFIG = str(REPOSITORY / "configs" / "gpt3_350m.yaml")
ARRAY = {
    **{"SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "1"},
    **{"SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_MAX": "3", "SLURM_SUBMIT_DIR": str(REPOSITORY)},
}
"""What Slurm tells a task of `sbatch --array=1,3`, as far as it matters."""


def run(folder: Path, *command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a script in a folder, with no variables of Slurm or of the scripts but these."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_", "SBLD_"))}
    return subprocess.run(
        list(map(str, command)),
        cwd=folder,
        env={**kept, "SBLD_PYTHON": sys.executable, "PYTHONPATH": str(REPOSITORY), **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_has_nothing_to_say() -> None:
    examples = (REPOSITORY / "examples").glob("*.sh")
    scripts = [*SCRIPTS.glob("*.sh"), *SCRIPTS.glob("slurm/*"), REPOSITORY / ".ci" / "run", *examples]
    assert len(scripts) >= 11
    result = run(REPOSITORY, "shellcheck", "--external-sources", *scripts)
    assert result.returncode == 0, result.stdout


def test_every_variable_is_documented_and_used() -> None:
    internal = {"SBLD_STATUS_FILE"}  # between job.sh and the launcher
    text = "".join(path.read_text() for path in [*SCRIPTS.glob("*.sh"), *SCRIPTS.glob("slurm/*")])
    used = set(re.findall(r"(?<![A-Z_])SBLD_[A-Z_]+", text)) - internal
    documented = set(re.findall(r"`(SBLD_[A-Z_]+)`", (REPOSITORY / "docs" / "cluster.md").read_text()))
    assert used == documented


@pytest.mark.parametrize("script", [*COMMANDS, *JOBS, CHAIN], ids=lambda script: f"{script.parent.name}/{script.name}")
def test_help_is_the_usage_and_no_arguments_are_a_mistake(script: Path, tmp_path: Path) -> None:
    asked, alone = run(tmp_path, script, "--help"), run(tmp_path, script)
    assert (asked.returncode, alone.returncode) == (0, 2)
    assert f"{script.parent.name}/{script.name} " in asked.stdout
    assert "#" not in asked.stdout
    assert alone.stderr == asked.stdout


@pytest.mark.parametrize(
    ("command", "environment", "message"),
    [
        ([COMMANDS[0], "no.yaml"], {}, "config no.yaml is not there"),
        ([COMMANDS[1], CONFIG], {}, "give a config and a folder"),
        ([COMMANDS[2], "runs/none", "no.txt"], {}, "checkpoint runs/none is not there"),
        ([COMMANDS[2], REPOSITORY, "no.txt"], {}, "file of passages no.txt is not there"),
        ([COMMANDS[0], CONFIG], {"SBLD_PYTHON": "/no/python"}, "SBLD_PYTHON=/no/python is not there"),
        ([COMMANDS[0], CONFIG], {"SBLD_PYTHON": "/usr/bin/python3", "PYTHONPATH": ""}, "lacks megatron_sbld, torch, "),
        ([COMMANDS[0], CONFIG], {"SBLD_PYTHON": "/bin/false"}, "SBLD_PYTHON=/bin/false does not run on"),
        ([COMMANDS[0], CONFIG], {"SBLD_DEVICE": "tpu"}, "SBLD_DEVICE=tpu is not allowed: gpu or cpu"),
        ([JOBS[0], CONFIG], {}, "submit it with sbatch"),
        ([JOBS[0], CONFIG], {"SLURM_SUBMIT_DIR": "/tmp"}, "submit from the repository's folder, or set SBLD_HOME"),
        ([JOBS[1], CONFIG, "out"], {**ARRAY, "SLURM_ARRAY_TASK_MIN": "3"}, "an array must be --array=1-N"),
        ([JOBS[1], CONFIG, "out"], {**ARRAY, "SBLD_PARTS": "2"}, "task 3 is not in 1 to SBLD_PARTS=2"),
        ([CHAIN, CONFIG, "run"], {}, "give a config, a run folder and a file of passages"),
        ([CHAIN, "--part", "2", CONFIG, "run", CONFIG], {}, "--part is not an option"),
        ([CHAIN, "--parts", "x", CONFIG, "run", CONFIG], {}, "--parts x is not allowed"),
        ([CHAIN, "--sensitivity", "no.json", CONFIG, "run", CONFIG], {}, "sensitivity file no.json is not there"),
    ],
)
def test_what_is_missing_is_named_before_anything_starts(
    command: list[str | Path], environment: dict[str, str], message: str, tmp_path: Path
) -> None:
    if environment.get("SBLD_PYTHON") == "/usr/bin/python3" and not Path("/usr/bin/python3").exists():
        pytest.skip("no second Python here")
    result = run(tmp_path, *command, **environment)
    assert result.returncode == 2
    assert message in result.stderr
    assert result.stderr.count("error:") == 1


def test_one_missing_dependency_is_named(tmp_path: Path) -> None:
    program = tmp_path / "python"
    hide = "import sys; sys.modules['rich'] = None; sys.argv = sys.argv[1:]; exec(sys.stdin.read())"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{hide}" "$@"\n')
    program.chmod(0o755)
    result = run(tmp_path, COMMANDS[0], CONFIG, SBLD_PYTHON=str(program))
    assert result.returncode == 2
    assert re.search(r"/python on \S+ lacks rich: install what is missing", result.stderr)


def test_every_dependency_is_looked_for() -> None:
    """By the name that is imported, where that is another one."""
    required = importlib.metadata.requires("megatron-sbld") or []
    names = {re.split(r"[\[<>=]", each)[0] for each in required if "extra ==" not in each}
    modules = {"PyYAML": "yaml", "megatron-core": "megatron.core"}
    expected = {modules.get(name, name.replace("-", "_")) for name in names}
    text = (SCRIPTS / "common.sh").read_text()
    looked_for = re.search(r"modules=\(([^)]+)\)", text)
    assert looked_for
    assert set(looked_for[1].split()) == {"megatron_sbld", *expected}


def fake_gpus(folder: Path, count: int) -> dict[str, str]:
    """An nvidia-smi that lists so many, before all others on the path."""
    program = folder / "nvidia-smi"
    program.write_text(f'#!/bin/sh\nfor i in $(seq {count}); do echo "GPU $i: some (UUID: x)"; done\n')
    program.chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}"}


def test_a_machine_without_enough_gpus_is_refused(tmp_path: Path) -> None:
    none = run(tmp_path, COMMANDS[0], CONFIG, **fake_gpus(tmp_path, 0))
    assert none.returncode == 2
    assert "no GPU on" in none.stderr
    few = run(tmp_path, COMMANDS[0], CONFIG, SBLD_NPROC_PER_NODE="4", **fake_gpus(tmp_path, 2))
    assert few.returncode == 2
    assert "SBLD_NPROC_PER_NODE=4, but" in few.stderr
    hidden = run(
        tmp_path, COMMANDS[0], CONFIG, SBLD_NPROC_PER_NODE="2", CUDA_VISIBLE_DEVICES="1", **fake_gpus(tmp_path, 2)
    )
    assert hidden.returncode == 2
    assert "has 1 GPU(s) to use" in hidden.stderr


@pytest.mark.slow
def test_one_machine_starts_a_process_a_gpu_prints_the_command_and_keeps_a_log(tmp_path: Path) -> None:
    """The config has no data here: the trainer's own message and status come through."""
    result = run(tmp_path, COMMANDS[0], CONFIG, "--drop.theta", "2.0", SBLD_DEVICE="cpu", SBLD_NPROC_PER_NODE="2")
    assert result.returncode == 2, result.stdout
    assert "--standalone --nproc-per-node 2 -m megatron_sbld pretrain --config" in result.stdout
    assert "drop.theta = 2.0" in result.stdout
    logs = list((tmp_path / "logs").glob("pretrain-*.log"))
    assert len(logs) == 1
    assert "drop.theta = 2.0" in logs[0].read_text()


def test_the_chain_shows_its_commands_without_slurm(tmp_path: Path) -> None:
    passages = tmp_path / "passages.txt"
    passages.write_text("a b\n")
    whole = run(tmp_path, CHAIN, "--dry-run", "--parts", "4", CONFIG, "runs/x", passages, "--drop.theta", "0.7")
    assert whole.returncode == 0, whole.stderr
    measure, pretrain, evaluate = [line for line in whole.stdout.splitlines() if line.startswith("+ sbatch")]
    assert "--array=1-4" in measure
    assert f"measure_sensitivity.sbatch {CONFIG} runs/x/sensitivity --drop.theta 0.7" in measure
    assert "--dependency=afterok:" in pretrain
    assert "--drop.sensitivity runs/x/sensitivity/sensitivity.json --drop.theta 0.7" in pretrain
    assert f"eval_lambada.sbatch runs/x {passages}" in evaluate

    reused = run(tmp_path, CHAIN, "--dry-run", "--sensitivity", CONFIG, CONFIG, "runs/x", passages)
    assert reused.stdout.count("+ sbatch") == 2
    assert "measure_sensitivity.sbatch" not in reused.stdout


def container_of(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Of job.sh: the options for srun, the command before a node's own, and whether Apptainer unpacks images.

    Only what the script needs is there beside srun, whose help is `srun_help`.
    """
    path = folder / "path"
    path.mkdir(exist_ok=True)
    for name in ("bash", "dirname", "realpath", "grep"):
        if not (path / name).exists():
            (path / name).symlink_to(str(shutil.which(name)))
    fake_program(path / "srun", f'echo "{environment.pop("srun_help", "")}"')
    script = f"""set -euo pipefail
        source {SCRIPTS}/common.sh; source {SCRIPTS}/slurm/job.sh; job_logs=/logs/job
        in_container; printf '%s\\n' "${{container_options[*]}}" "${{container[*]}}" "${{APPTAINER_UNSQUASH-}}\""""
    return run(folder, "bash", "-c", script, SBLD_HOME="/repository", PATH=str(path), **environment)


def fake_program(path: Path, command: str) -> None:
    path.write_text(f"#!/bin/sh\n{command}\n")
    path.chmod(0o755)


def test_a_container_is_pyxis_or_apptainers(tmp_path: Path) -> None:
    for image in ("image.sif", "image.sqsh"):
        (tmp_path / image).touch()
    mounts = f"/repository:/repository,{tmp_path}:{tmp_path},/logs/job:/logs/job"
    assert container_of(tmp_path).stdout.split("\n") == ["", "", "", ""]

    for given, image in (("nvcr.io#nvidia/pytorch",) * 2, ("image.sqsh", f"{tmp_path}/image.sqsh")):
        pyxis = container_of(tmp_path, SBLD_CONTAINER=given, srun_help="--container-image")
        options = f"--container-image={image} --container-mounts={mounts} --container-workdir={tmp_path}"
        assert pyxis.stdout.split("\n") == [options, "", "", ""]

    for refused, message in (
        (container_of(tmp_path, SBLD_CONTAINER="nvcr.io#nvidia/pytorch"), "needs pyxis"),
        (container_of(tmp_path, SBLD_CONTAINER="image.sif"), "image.sif needs apptainer, which is not on the path of"),
        (container_of(tmp_path, SBLD_CONTAINER="other.sif"), "SBLD_CONTAINER other.sif is not there"),
        (container_of(tmp_path, SBLD_CONTAINER="image.sif", SBLD_CONTAINER_RUNTIME="docker"), "pyxis or apptainer"),
    ):
        assert refused.returncode == 2
        assert message in refused.stderr

    fake_program(tmp_path / "path" / "apptainer", "false")
    setup = {"SBLD_SETUP": "/usr/../etc/profile"}
    with_more = container_of(tmp_path, SBLD_CONTAINER="image.sif", SBLD_CONTAINER_MOUNTS="/data:/data", **setup)
    command = f"apptainer exec --nv --bind {mounts},/etc:/etc,/data:/data --pwd {tmp_path} {tmp_path}/image.sif"
    assert with_more.stdout.split("\n") == ["", command, "true", ""]
    of_folder = container_of(tmp_path, SBLD_CONTAINER=str(tmp_path), APPTAINER_UNSQUASH="false")
    command = f"apptainer exec --nv --bind {mounts} --pwd {tmp_path} {tmp_path}"
    assert of_folder.stdout.split("\n") == ["", command, "false", ""]


# The launcher


def start_launcher(
    folder: Path,
    script: str,
    processes: int = 2,
    hang_up: Any = signal.SIG_DFL,
    restarts: int = 0,
    options: Sequence[str] = ("--standalone",),
) -> subprocess.Popen[bytes]:
    """`megatron_sbld.launch` with bash as its workers, and a torchrun that would kill them a second after SIGTERM.

    hang_up: what it inherits for SIGHUP.
    options: of torchrun.
    restarts: how often torchrun starts workers again that ended with another status than 0.
    """
    return subprocess.Popen(
        [sys.executable, "-m", "megatron_sbld.launch", "--nproc-per-node", str(processes), *options,
         "--max-restarts", str(restarts), "--no-python", "bash", "-c", script],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "1",
             "SBLD_STATUS_FILE": str(folder / "status")},
        preexec_fn=lambda: signal.signal(signal.SIGHUP, hang_up),
    )  # fmt: skip


def wait_until_ready(folder: Path, processes: int = 2) -> None:
    wait_until(lambda: len(list(folder.glob("ready_*"))) == processes)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "status"),
    [
        ("exit 0", 0),
        ("exit 75", 75),
        ("[ $RANK = 1 ] || sleep 60; exit 2", 2),
        ("[ $RANK = 0 ] || sleep 60; kill -KILL $BASHPID", 76),
    ],
    ids=["complete", "to be continued", "a mistake", "killed"],
)
def test_the_launcher_ends_with_its_workers_status(script: str, status: int, tmp_path: Path) -> None:
    launcher = start_launcher(tmp_path, script)
    assert launcher.wait(120) == status
    assert (tmp_path / "status").read_text() == f"{status}\n"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signals_reach_the_workers_which_may_take_their_time(number: signal.Signals, tmp_path: Path) -> None:
    save = (
        "trap : TERM; sleep 5; touch saved_$RANK; exit 75"  # the first to end lets torchrun send SIGTERM to the others
    )
    script = f"trap '{save}' {number.name}; touch ready_$RANK; while :; do sleep 0.1; done"
    launcher = start_launcher(tmp_path, script)
    wait_until_ready(tmp_path)
    launcher.send_signal(number)
    assert launcher.wait(120) == 75
    assert len(list(tmp_path.glob("saved_*"))) == 2


@pytest.mark.slow
def test_a_request_that_comes_before_the_workers_reaches_them(tmp_path: Path) -> None:
    launcher = start_launcher(tmp_path, "sleep 100")
    wait_until(lambda: launcher.poll() is not None or catches(launcher.pid, signal.SIGUSR1))
    assert launcher.poll() is None
    launcher.send_signal(signal.SIGUSR1)
    assert launcher.wait(60) == 75


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_request_ends_a_launcher_that_waits_for_other_machines(number: int, status: int, tmp_path: Path) -> None:
    launcher = start_launcher(tmp_path, "true", options=["--nnodes", "2"])
    wait_until(lambda: launcher.poll() is not None or catches(launcher.pid, signal.SIGUSR1))
    launcher.send_signal(number)
    assert launcher.wait(60) == status
    assert (tmp_path / "status").read_text() == f"{status}\n"


@pytest.mark.slow
@pytest.mark.parametrize("options", [["--nproc-per-node", "two"], ["--nnodes", "x"], ["--rdzv-backend", "none"]])
def test_a_mistake_in_torchruns_options_is_one(options: list[str], tmp_path: Path) -> None:
    launcher = start_launcher(tmp_path, "true", options=options)
    assert launcher.wait(60) == 2


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_request_holds_for_workers_that_are_started_again(number: signal.Signals, tmp_path: Path) -> None:
    script = "trap 'exit 75' TERM USR1; touch ready_$RANK; for i in $(seq 600); do sleep 0.1; done"
    launcher = start_launcher(tmp_path, script, restarts=2)
    wait_until_ready(tmp_path)
    launcher.send_signal(number)
    assert launcher.wait(50) == 75


def catches(pid: int, number: signal.Signals) -> bool:
    """Whether a process has a handler of its own for a signal."""
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return bool(int(status["SigCgt"], 16) >> (number - 1) & 1)


@pytest.mark.slow
def test_a_hang_up_is_a_request_to_save_unless_it_is_ignored(tmp_path: Path) -> None:
    for ignored in (False, True):
        folder = tmp_path / str(ignored)
        folder.mkdir()
        script = "trap 'exit 75' TERM; touch ready_$RANK; while [ ! -e go ]; do sleep 0.1; done; exit 0"
        launcher = start_launcher(folder, script, hang_up=signal.SIG_IGN if ignored else signal.SIG_DFL)
        wait_until_ready(folder)
        launcher.send_signal(signal.SIGHUP)
        if ignored:
            time.sleep(1)
            (folder / "go").touch()
        assert launcher.wait(120) == (0 if ignored else 75)


@pytest.mark.slow
def test_a_run_of_the_script_is_asked_to_stop_and_says_so_in_its_log(tmp_path: Path) -> None:
    """What writes the log is a child of the launcher, as the workers are."""
    sections = tiny_sections(
        tmp_path / "run",
        prepare_corpus(tmp_path),
        training={"train_iters": 100_000},
        logging={"run_dir": str(tmp_path / "run"), "progress": "lines", "log_interval": 1, "tensorboard": False},
    )
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(sections))
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SBLD_")}
    script = subprocess.Popen(
        [str(COMMANDS[0]), str(tmp_path / "run.yaml")],
        cwd=tmp_path,
        env={**kept, "SBLD_PYTHON": sys.executable, "SBLD_DEVICE": "cpu", "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.DEVNULL,
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    wait_until(lambda: script.poll() is not None or (metrics.exists() and bool(metrics.read_text())))
    assert script.poll() is None
    script.send_signal(signal.SIGUSR1)
    assert script.wait(120) == 75
    (log,) = (tmp_path / "logs").glob("pretrain-*.log")
    assert "stopped on request after iteration" in log.read_text()
    assert list((tmp_path / "run" / "checkpoints").glob("iter_*"))


@pytest.mark.slow
def test_workers_that_end_before_they_can_save_are_to_be_continued(tmp_path: Path) -> None:
    launcher = start_launcher(tmp_path, "touch ready_$RANK; exec sleep 100")
    wait_until_ready(tmp_path)
    launcher.send_signal(signal.SIGUSR1)
    assert launcher.wait(120) == 75
