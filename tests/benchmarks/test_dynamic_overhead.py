"""benchmarks/dynamic_overhead.py runs and writes what it measured with."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


def test_the_benchmark_writes_a_row_for_each_scope_with_its_share_of_an_iteration(tmp_path: Path) -> None:
    out = tmp_path / "results" / "overhead.md"
    program = [sys.executable, "-W", "ignore", str(ROOT / "benchmarks" / "dynamic_overhead.py")]
    options = ["--iterations", "100", "--num-microbatches", "2", "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([*program, *options], env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    text = out.read_text()
    assert text in result.stdout
    for expected in ("- Date: 20", "- Hardware: ", "- Commit: ", "989 TFLOP/s"):
        assert expected in text
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith(("| iteration", "| microbatch"))]
    assert len(rows) == 2
    for row in rows:
        parts = [float(cell.split()[0]) for cell in row[2:6]]
        assert sum(parts[:3]) > 0
        assert abs(sum(parts[:3]) - parts[3]) < 0.3
        # 2 x 4 samples of 2,048 tokens at 6 x 350M FLOPs and more, less what is dropped.
        iteration_ms = float(row[6].split()[0])
        assert 20 < iteration_ms < 50
        share = float(row[7].split("%")[0]) / 100
        assert share * iteration_ms * 1e3 == pytest.approx(parts[3], rel=0.02)
