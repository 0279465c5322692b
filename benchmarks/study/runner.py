"""Does a run: through the trainer's own command, paused and continued from its checkpoints, into a row.

Everything has the lowest priority and one thread. A pause file, or a request to stop this program, ends the trainer as
Slurm would: it saves, and the run goes on from there later.
"""

from __future__ import annotations

import datetime
import itertools
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.study import data
from benchmarks.study.plan import seconds
from benchmarks.study.rows import curve, executed_flops, read_metrics
from benchmarks.study.settings import LAYERS, TOKENS, Spec, iteration_flops, parameters, settings
from megatron_sbld.exit_status import EXIT_TO_BE_CONTINUED

_POLL_SECONDS = 2.0
_SAVE_SECONDS = 300.0
_DIVERGED = "FloatingPointError"
_LOG_TAIL = 3000


class StoppedError(Exception):
    """This program was asked to stop; the run has saved."""


class StudyError(RuntimeError):
    """A run failed in a way that is no result."""


@dataclass
class Place:
    """Where runs are, and what interrupts them. stop: whether this program was asked to stop."""

    work: Path
    pause_file: Path | None
    stop: Callable[[], bool]
    say: Callable[[str], None] = print

    def paused(self) -> bool:
        return self.pause_file is not None and self.pause_file.exists()

    def wait(self) -> None:
        """Return once the pause file is gone. Raises StoppedError."""
        if self.paused():
            self.say(f"paused while {self.pause_file} exists")
        while self.paused() and not self.stop():
            time.sleep(_POLL_SECONDS)
        if self.stop():
            raise StoppedError


def run(spec: Spec, place: Place) -> dict[str, Any]:
    """Train a run to its end, from its checkpoint where there is one; its row.

    Raises:
        StoppedError: asked to stop; the run can go on later.
        StudyError: the trainer failed.
    """
    _check_text(spec, place.work)
    run_dir = run_folder(spec, place.work)
    run_dir.mkdir(parents=True, exist_ok=True)
    config = run_dir / "study.yaml"
    config.write_text(yaml.safe_dump(_config(spec, place.work, run_dir), sort_keys=False), encoding="utf-8")
    diverged = False
    while True:
        place.wait()
        status = _train(spec, config, run_dir, place)
        if status == 0:
            break
        diverged = status == 1 and _DIVERGED in _tail(run_dir)
        if diverged:
            break
        if status != EXIT_TO_BE_CONTINUED:
            raise StudyError(f"{spec.name}: exit status {status}; {run_dir / 'log.txt'} ends with\n{_tail(run_dir)}")
    return make_row(spec, run_dir, data.text_id(place.work), diverged=diverged)


def run_folder(spec: Spec, work: Path) -> Path:
    return work / "runs" / spec.key.replace("/", "_")


def make_row(spec: Spec, run_dir: Path, text: str | None, *, diverged: bool = False) -> dict[str, Any]:
    """The row of a run that has ended."""
    metrics = read_metrics(run_dir)
    if spec.regime == "tokens":  # the trainer counts what grows with the square of the tokens by itself
        flops = list(itertools.accumulate(row["executed_flops"] for row in metrics if "kept" in row))
    else:
        fixed, full = iteration_flops(spec.width, 0), iteration_flops(spec.width, LAYERS)
        flops = executed_flops(metrics, fixed, (full - fixed) / LAYERS)
    tokens = len(flops) * TOKENS
    return {
        **{name: value for name, value in asdict(spec).items() if name != "drop"},
        "key": spec.key,
        "name": spec.name,
        "settings": settings(spec),
        "iterations": len(flops),
        "tokens": tokens,
        "parameters": parameters(spec.width, spec.seq_length),
        "tokens_a_parameter": round(tokens / parameters(spec.width, spec.seq_length), 3),
        "budget_flops": spec.budget_flops,
        "expected_flops": round(spec.expected_flops),
        **_losses(spec, metrics, flops, diverged),
        "curve": curve(metrics, flops),
        "wall_s": round(sum(row["step_time_s"] for row in metrics if "step_time_s" in row), 1),
        "cpu_s": round(sum(map(float, (run_dir / "cpu_s").read_text().split())), 1),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="minutes"),
        "commit": _commit(),
        "hardware": f"{_processor()}, {spec.processes} thread{'s' * (spec.processes > 1)}",
        "text": text,
    }


def _losses(
    spec: Spec, metrics: list[dict[str, Any]], flops: list[float], diverged: bool
) -> dict[str, float | int | None]:
    """Final loss with its standard error over held-out windows, and FLOPs up to there.

    Of many epochs: where the other held-out set's loss was lowest (early stopping).
    """
    finals = {row["iteration"]: row for row in metrics if "perplexity_loss" in row}
    if diverged or not finals:
        return {"flops": flops[-1] if flops else 0.0, "loss": None, "loss_stderr": None, "stopped_at": None}
    at = max(finals)
    if spec.regime == "epochs":
        watched = {row["iteration"]: row["valid_loss"] for row in metrics if "valid_loss" in row}
        at = min(finals, key=lambda iteration: watched[iteration])
    row = finals[at]
    loss, stderr = round(row["perplexity_loss"], 6), round(row["perplexity_loss_stderr"], 6)
    return {"flops": flops[at - 1], "loss": loss, "loss_stderr": stderr, "stopped_at": at}


def _config(spec: Spec, work: Path, run_dir: Path) -> dict[str, Any]:
    sections = settings(spec)
    if "sensitivity" in spec.drop:
        sections["drop"]["sensitivity"] = spec.drop["sensitivity"]
    if spec.regime == "epochs":
        sections["training"]["task_interval"] = sections["training"]["eval_interval"]
    a_second = spec.iterations / seconds(spec)
    sections["data"] = data.data_section(work, spec.regime, spec.width)
    sections["checkpoint"] = {"save_interval": max(20, round(_SAVE_SECONDS * a_second)), "keep_last": 1}
    sections["logging"] = {"run_dir": str(run_dir), "log_interval": 100, "progress": "lines", "tensorboard": False}
    return sections


def _train(spec: Spec, config: Path, run_dir: Path, place: Place) -> int:
    """One process of the trainer (or one of each replica); its exit status."""
    launcher = []
    if spec.processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(spec.processes)]
    command = [sys.executable, *launcher, "-m", "megatron_sbld", "pretrain", "--config", str(config)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    with (run_dir / "log.txt").open("a", encoding="utf-8") as log:
        process = subprocess.Popen(  # in a session of its own, so that Ctrl-C reaches this program alone
            command, cwd=data.ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    asked = False
    while True:
        ended, status, usage = os.wait4(process.pid, os.WNOHANG)
        if ended:
            break
        if not asked and (place.paused() or place.stop()):
            os.kill(process.pid, signal.SIGTERM)
            asked = True
        time.sleep(_POLL_SECONDS if not asked else _POLL_SECONDS / 10)
    process.returncode = os.waitstatus_to_exitcode(status)
    with (run_dir / "cpu_s").open("a", encoding="utf-8") as stream:
        stream.write(f"{usage.ru_utime + usage.ru_stime:.1f}\n")
    # Before the trainer knows the signal, it ends by it, and nothing is lost.
    return EXIT_TO_BE_CONTINUED if asked and process.returncode == -signal.SIGTERM else process.returncode


def _check_text(spec: Spec, work: Path) -> None:
    needed, there = spec.iterations * TOKENS, data.tokens_of(work, "train", spec.width)
    if spec.regime != "epochs" and needed > there:
        raise StudyError(f"{spec.name} reads {needed:,} tokens, but the text has {there:,}: it would be read twice")


def _tail(run_dir: Path) -> str:
    return (run_dir / "log.txt").read_text(encoding="utf-8", errors="replace")[-_LOG_TAIL:]


def _commit() -> str:
    """Of the checkout, and whether the package in it was changed since."""

    def git(*command: str) -> str:
        return subprocess.run(["git", *command], cwd=data.ROOT, capture_output=True, text=True, check=False).stdout

    changed = git("status", "--porcelain", "--", "megatron_sbld").strip()
    return git("rev-parse", "--short", "HEAD").strip() + ("-dirty" if changed else "")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(": ")[2] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()
