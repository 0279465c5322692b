"""The examples run as they are written."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"


@pytest.mark.slow
def test_the_loop_of_ones_own_trains_and_drops(tmp_path: Path) -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(EXAMPLES / "own_loop.py")]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    rows = re.findall(r"^ *(\d+) loss ([\d.]+) theta ([\d.]+) layers (\d+) of 8$", result.stdout, re.M)
    losses, thetas, layers = ([float(row[column]) for row in rows] for column in (1, 2, 3))
    assert len(rows) == 20
    assert losses[-1] < losses[0] - 0.5
    assert thetas == sorted(thetas, reverse=True)
    assert min(layers) < 8


def test_the_drawing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "drawing.png"
    sensitivity = ROOT / "configs" / "quickstart_sensitivity.json"
    monkeypatch.setattr(sys, "argv", ["draw.py", str(sensitivity), str(out)])
    runpy.run_path(str(EXAMPLES / "draw.py"))
    assert out.read_bytes().startswith(b"\x89PNG")


def test_the_script_for_megatron_lm_shows_its_usage() -> None:
    asked, alone = (
        subprocess.run([str(EXAMPLES / "megatron_lm.sh"), *args], capture_output=True, text=True, check=False)
        for args in (["--help"], [])
    )
    assert (asked.returncode, alone.returncode) == (0, 2)
    assert "CHECKOUT DATA_PREFIX TOKENIZER_FOLDER" in asked.stdout


def test_every_example_is_listed() -> None:
    page = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    files = {str(path.relative_to(EXAMPLES)) for pattern in ("**/*.py", "**/*.sh") for path in EXAMPLES.glob(pattern)}
    assert files <= set(re.findall(r"\]\(([^)]+)\)", page))
