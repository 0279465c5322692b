"""The sensitivity of a width's model, for SBLD: measured once with `sensitivity measure`, then committed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from benchmarks.study import data
from benchmarks.study.plan import SECOND
from benchmarks.study.settings import Spec, settings

ITERATIONS = 150
SEEDS = (101, 102)
LR = 4e-3
_FOLDER = Path(__file__).resolve().parent


def known() -> dict[int, Path]:
    """Files by width."""
    return {int(path.stem.rpartition("_w")[2]): path for path in _FOLDER.glob("sensitivity_w*.json")}


def measure(width: int, work: Path) -> None:
    """Measure it; interrupted, it goes on where it was. Raises CalledProcessError."""
    out = work / f"profile_w{width}"
    out.mkdir(parents=True, exist_ok=True)
    config = out.with_suffix(".yaml")
    config.write_text(yaml.safe_dump(_config(width, work), sort_keys=False), encoding="utf-8")
    subprocess.run(command(config, out), cwd=data.ROOT, check=True)
    shutil.copyfile(out / "sensitivity.json", _FOLDER / f"sensitivity_w{width}.json")


def command(config: Path, out: Path) -> list[str]:
    """What measures it."""
    measure = [sys.executable, "-m", "megatron_sbld", "sensitivity", "measure"]
    options = {"config": config, "out": out, "iterations": ITERATIONS, "seeds": ",".join(map(str, SEEDS))}
    return [*measure, *(word for name, value in options.items() for word in (f"--{name}", str(value)))]


def _config(width: int, work: Path) -> dict[str, Any]:
    undropped = Spec(width=width, method="undropped", budget=SECOND, lr=LR, seed=1, drop={"policy": "none"})
    sections = settings(undropped)
    del sections["drop"]
    section = data.data_section(work, "once", width)
    del section["perplexity_path"], section["perplexity_format"]
    return {**sections, "data": section}
