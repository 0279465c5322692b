"""A real Slurm cluster on the loopback interface: slurmctld and two slurmd with a configuration of their own.

Its two nodes are this machine; partition `high` preempts `low`, whose jobs have GRACE_S after their SIGTERM.
"""

from __future__ import annotations

import getpass
import os
import random
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
NODES = ("sbld1", "sbld2")
GRACE_S = 90
ENDED = ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "OUT_OF_MEMORY", "TIMEOUT")
"""States of a job that does not come back; the others pass, some in a moment (SIGNALING)."""
_SECONDS = 300.0  # for anything that takes a few on an idle machine


def missing_programs() -> list[str]:
    """What of Slurm is not installed here (Debian: package slurm-wlm)."""
    return [name for name in PROGRAMS if which(name) is None]


def which(name: str) -> str | None:
    """Debian has the daemons in a folder that is not on every user's path."""
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")


class Cluster:
    """The running daemons, and Slurm's commands with the environment that reaches them.

    With `pyxis`, the plugin's file, srun runs enroot's containers.
    """

    def __init__(self, folder: Path, pyxis: Path | None = None) -> None:
        self.folder = folder
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._conf = folder / "slurm.conf"
        self._conf.write_text(_configuration(folder))
        if pyxis is not None:
            (folder / "plugstack.conf").write_text(f"required {pyxis} runtime_path={folder}/pyxis\n")
            for node in NODES:
                _give_its_own_containers(folder / node)
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))},
            "SLURM_CONF": str(self._conf),
            "SBATCH_PARTITION": "low",
            "SBLD_PYTHON": sys.executable,
            "SBLD_DEVICE": "cpu",
            "SBLD_RDZV_HOST": "127.0.0.1",  # no name server knows the nodes
            "SBLD_LOG_DIR": str(folder / "logs"),
            "PYTHONPATH": str(REPOSITORY),
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
        }

    @contextmanager
    def running(self) -> Iterator[None]:
        """The cluster from its daemons' start to their end."""
        try:
            self._start("slurmctld", ["-c"])
            for node in NODES:
                self.start_node(node)
            self.wait_until(self._is_idle, "both nodes are idle", seconds=60)
            yield
        finally:
            if "slurmctld" in self._daemons:
                subprocess.run(["scancel", "--user", getpass.getuser()], env=self.environment, check=False)
                time.sleep(2)
            for daemon in self._daemons.values():
                daemon.terminate()
            for daemon in self._daemons.values():
                daemon.wait(60)

    def _is_idle(self) -> bool:
        states = self.call("sinfo", "--noheader", "--Node", "--partition=low", "--format=%N %T").splitlines()
        return states == [f"{node} idle" for node in NODES]

    def start_node(self, node: str) -> None:
        own_programs = self.folder / node / "bin"
        own_programs.mkdir(parents=True, exist_ok=True)
        self._start(node, ["-N", node], "slurmd", {"PATH": f"{own_programs}:{os.environ['PATH']}"})

    @contextmanager
    def lost_node(self, node: str, job: str) -> Iterator[None]:
        """Cut a node off from a job: its daemon is gone, and the job's ranks there stand still until Slurm has noticed.

        Slurm takes 6 s to 30 s; a run that went on meanwhile might be complete.
        """
        ranks = [process for process in processes_of(job) if _environment(process).get("SLURMD_NODENAME") == node]
        assert ranks, f"job {job} has no process on {node}\n{self.logs()}"
        self._daemons[node].kill()
        self._daemons.pop(node).wait(60)
        try:
            _send(signal.SIGSTOP, ranks)
            try:
                self.wait_until(lambda: self.field(job, "JobState") != "RUNNING", f"Slurm notices that {node} is lost")
            finally:
                _send(signal.SIGCONT, ranks)
            yield
        finally:
            self.start_node(node)

    def _start(
        self, name: str, options: list[str], program: str | None = None, environment: Mapping[str, str] | None = None
    ) -> None:
        command = [which(program or name) or name, "-D", "-f", str(self._conf), *options]
        with (self.folder / f"{name}.out").open("ab") as log:
            self._daemons[name] = subprocess.Popen(
                command, stdout=log, stderr=log, cwd=self.folder, env={**os.environ, **(environment or {})}
            )

    def call(self, *command: str, **environment: str) -> str:
        """What a command prints; it must succeed."""
        result = subprocess.run(
            command,
            env={**self.environment, **environment},
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert result.returncode == 0, f"{shlex.join(command)}: {result.stdout}{result.stderr}\n{self.logs()}"
        return result.stdout.strip()

    def submit(self, *arguments: str, **environment: str) -> str:
        """The id of a job without GPUs that one of the repository's scripts, given with its arguments, is."""
        return self.call("sbatch", "--parsable", "--gpus-per-node=0", *arguments, **environment)

    def field(self, job: str, name: str) -> str:
        """A field of `scontrol show job`."""
        shown = self.call("scontrol", "--oneliner", "show", "job", job)
        return next(word for word in shown.split() if word.startswith(f"{name}=")).partition("=")[2]

    def wait_for_state(self, job: str, *states: str, seconds: float = _SECONDS) -> None:
        """Wait until a job is in one of these states; it may not end in another."""

        def reached() -> bool:
            state = self.field(job, "JobState")
            assert state in states or state not in (*ENDED, "NODE_FAIL"), (
                f"job {job} is {state}, not {states}\n{self.logs()}"
            )
            return state in states

        self.wait_until(reached, f"job {job} is {' or '.join(states)}", seconds)

    def attempt(self, job: str) -> int:
        """Which attempt a job is at, from 0. A busy machine may lose ranks: not always the one a test has led to."""
        return int(self.field(job, "Restarts"))

    def wait_for_requeue(self, job: str, attempt: int) -> None:
        """Wait until a job is back in the queue after an attempt, and nothing of it is left on this machine."""

        def back() -> bool:
            state = self.field(job, "JobState")
            assert state not in ENDED, f"job {job} is {state}\n{self.logs()}"
            return state == "PENDING" and self.attempt(job) > attempt

        self.wait_until(back, f"job {job} is requeued")
        self.wait_until(lambda: not processes_of(job), f"nothing of job {job} is left")

    def release(self, job: str) -> None:
        """Let a requeued job start without the two minutes that Slurm waits first, once both nodes can take it.

        In the second in which a node comes back Slurm 22.05 forgets that it takes it, or refuses the job's credential.
        """
        self.wait_until(self._is_idle, "both nodes are idle")
        time.sleep(3)
        self.call("scontrol", "update", f"JobId={job}", "StartTime=now")

    def wait_until(self, condition: Callable[[], bool], what: str, seconds: float = _SECONDS) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"{what}: not within {seconds:.0f} s\n{self.logs()}"
            time.sleep(0.3)

    def logs(self) -> str:
        """The ends of all logs, for messages."""
        files = [*self.folder.glob("*.log"), *self.folder.glob("logs/*/*/*.log"), *self.folder.glob("*.out")]
        return "\n".join(f"== {file}\n{file.read_text(errors='replace')[-3000:]}" for file in sorted(files))


def processes_of(job: str) -> list[int]:
    """Processes on this machine that belong to a job."""
    processes = [int(folder.name) for folder in Path("/proc").glob("[0-9]*")]
    return [process for process in processes if _environment(process).get("SLURM_JOB_ID") == job]


def _environment(process: int) -> dict[str, str]:
    try:
        variables = Path(f"/proc/{process}/environ").read_text(errors="replace").split("\0")
    except OSError:  # ended, or another user's
        return {}
    return dict(variable.partition("=")[::2] for variable in variables)


def _send(number: signal.Signals, processes: list[int]) -> None:
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process, number)


def _give_its_own_containers(node: Path) -> None:
    """Put a program enroot into a node's path that has folders of its own: a step's container has one name on all."""
    (node / "bin").mkdir(parents=True)
    lines = [
        "#!/bin/sh",
        *(f"export ENROOT_{kind}_PATH={shlex.quote(f'{node}/enroot/{kind}')}" for kind in ("DATA", "RUNTIME", "CACHE")),
        f'exec {which("enroot")} "$@"',
    ]
    program = node / "bin" / "enroot"
    program.write_text("\n".join(lines) + "\n")
    program.chmod(0o755)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _configuration(folder: Path) -> str:
    """slurm.conf. No munge and no cgroups, which containers lack; nodes claim cores that the machine need not have."""
    host, user = socket.gethostname(), getpass.getuser()
    controller, *nodes = _free_ports(1 + len(NODES))
    lines = [
        "ClusterName=sbld",
        f"SlurmctldHost={host}(127.0.0.1)",
        f"SlurmUser={user}",
        f"SlurmdUser={user}",
        "AuthType=auth/none",
        "CredType=cred/none",
        "MpiDefault=none",
        f"SlurmctldPort={controller}",
        f"SlurmctldPidFile={folder}/slurmctld.pid",
        f"SlurmdPidFile={folder}/%n/slurmd.pid",
        f"SlurmdSpoolDir={folder}/%n",
        f"StateSaveLocation={folder}/state",
        "SwitchType=switch/none",
        "ProctrackType=proctrack/linuxproc",
        "TaskPlugin=task/none",
        "JobAcctGatherType=jobacct_gather/none",
        "AccountingStorageType=accounting_storage/none",
        "SlurmdParameters=config_overrides",
        "ReturnToService=2",
        "SlurmdTimeout=6",  # a node that does not answer for so long is down
        "KillWait=60",
        "MinJobAge=3600",
        f"FirstJobId={random.randrange(1, 60_000)}",  # the rendezvous' port follows from it: others may test here too
        "SchedulerType=sched/backfill",
        "SchedulerParameters=sched_interval=1,bf_interval=1",
        "SelectType=select/cons_tres",
        "SelectTypeParameters=CR_Core",
        "PreemptType=preempt/partition_prio",
        "PreemptMode=REQUEUE",
        *(
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2 RealMemory=1000 State=UNKNOWN"
            for node, port in zip(NODES, nodes, strict=True)
        ),
        f"PartitionName=low Nodes={','.join(NODES)} Default=YES PriorityTier=1 GraceTime={GRACE_S} State=UP",
        f"PartitionName=high Nodes={','.join(NODES)} PriorityTier=10 PreemptMode=OFF State=UP",
    ]
    (folder / "state").mkdir()
    return "\n".join(lines) + "\n"
