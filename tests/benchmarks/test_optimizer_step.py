"""benchmarks/optimizer_step.py runs, and measures what the trainer does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


def test_the_benchmark_writes_a_row_for_each_program(tmp_path: Path) -> None:
    out = tmp_path / "step.md"
    program = [sys.executable, "-W", "ignore", str(ROOT / "benchmarks" / "optimizer_step.py")]
    options = ["--num-layers", "2", "--rounds", "4", "--precisions", "bf16", "fp32", "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run([*program, *options], env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    text = out.read_text()
    for expected in ("- Date: 20", "- Hardware: ", "- Commit: ", "2 layers, hidden 32"):
        assert expected in text
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if "megatron-core |" in line]
    assert [row[:2] for row in rows] == [
        ["bf16", "plain"], ["bf16", "distributed"], ["fp32", "plain"], ["fp32", "distributed"],
    ]  # fmt: skip
    assert text.count("plain PyTorch") == 4
    for row in rows:
        assert 0 < float(row[4]) <= float(row[3])


def test_a_width_of_no_whole_heads_is_refused() -> None:
    program = [sys.executable, "-W", "ignore", str(ROOT / "benchmarks" / "optimizer_step.py"), "--hidden-size", "40"]
    result = subprocess.run(
        program, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 2
    assert "--hidden-size 40 is not allowed: a multiple of 16" in result.stderr
