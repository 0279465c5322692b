"""What the benchmarks' reports have in common: command, commit, hardware and versions, and texts of figures."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common.gain import Interval

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def publish(lines: Sequence[str], out: Path | None) -> None:
    """Show a report, and write it into a file if one is given."""
    text = "\n".join(lines) + "\n"
    print(text, end="")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")
        print(f"written to {out}", file=sys.stderr)


def command_line() -> str:
    """How this program was started, from the repository's root."""
    launcher = ["torchrun", "--nproc-per-node", os.environ["WORLD_SIZE"]] if "RANK" in os.environ else ["python"]
    return shlex.join([*launcher, f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])


def run_lines(seed: int, packages: Sequence[str] = ("torch", "megatron-core")) -> list[str]:
    """Everything needed to repeat a run but what it measures: command, environment and seed."""
    return [
        f"- Command: `{command_line()}`",
        *(f"- {line}" for line in environment_lines(packages)),
        f"- Seed: {seed}; load average over the last minute: {os.getloadavg()[0]:.1f}, this program included",
    ]


def environment_lines(packages: Sequence[str] = ("torch", "megatron-core")) -> list[str]:
    """Commit, date, hardware and versions."""
    versions = {name: importlib.metadata.version(name) for name in packages}
    return [
        f"Commit: {commit()}",
        f"Date: {time.strftime('%Y-%m-%d')}",
        f"Hardware: {_hardware()}",
        f"Software: Python {platform.python_version()}, "
        + ", ".join(f"{name} {version}" for name, version in versions.items()),
    ]


def commit(*paths: str) -> str:
    """The checked-out commit, and whether tracked files (below the paths, if any are given) are not as in it."""

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    found = git("rev-parse", "--short", "HEAD") or "unknown"
    changed = git("status", "--porcelain", "--untracked-files=no", "--", *paths)
    return f"{found} with uncommitted changes" if changed else found


def _hardware() -> str:
    import torch  # not at the top: bucket_model.py and predict_check.py need none

    cores = f"{_cpu_model()}, {os.cpu_count()} cores, {torch.get_num_threads()} thread(s) a process"
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}; host {cores}"
    return cores


def _cpu_model() -> str:
    """The processor's name as Linux tells it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def model_text(args: argparse.Namespace) -> str:
    """The model that add_model_options describes."""
    return (
        f"GPT, {args.num_layers} layers, hidden {args.hidden_size}, {args.num_attention_heads} heads, sequence "
        f"{args.seq_length}, vocabulary {args.vocab_size}, {args.precision}"
    )


def recomputation_text(args: argparse.Namespace) -> str:
    return f"{args.recompute_granularity or 'no'} recomputation"


def gain_text(gain: Interval) -> str:
    """A gain and its interval as percentages above 1."""
    return f"{gain.value - 1:+.2%} [{gain.low - 1:+.2%}, {gain.high - 1:+.2%}]"


def number_text(ratio: Interval, form: str = ".3f") -> str:
    """A ratio and its interval."""
    return f"{ratio.value:{form}} [{ratio.low:{form}}, {ratio.high:{form}}]"
