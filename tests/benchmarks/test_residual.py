"""benchmarks/residual.py from end to end, and its arithmetic: bytes, shares of a clone's bandwidth, the verdict."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from benchmarks import peers, profile_trace
from benchmarks import residual as benchmark
from benchmarks.common.residual_cases import ByteCounter, Case, Operands, implementations, needed
from benchmarks.common.residual_timing import Measurement, Timer, using
from megatron_sbld.residual.choice import VARIABLE

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
CASE = Case(s=32, b=4, hidden=64, rows="all", wide=False, dropout_prob=0.0)
ALL = {one.name: one for one in implementations()[0]}


@pytest.mark.slow
def test_the_benchmark_writes_all_tables_and_says_what_they_are_worth(tmp_path: Path) -> None:
    out = tmp_path / "results" / "residual.md"
    options = ["--hidden-sizes", "64", "--seq-length", "16", "--rows", "all", "none", "tokens-50", "--rounds", "2"]
    options += ["--without", "Megatron compiled", "--num-layers", "2", "--hidden-size", "32", "--vocab-size", "64"]
    options += ["--global-batch-size", "4", "--micro-batch-size", "4", "--block-iterations", "1", "--warmup", "1"]
    result = subprocess.run(
        [sys.executable, "-W", "ignore", str(ROOT / "benchmarks" / "residual.py"), *options, "--out", str(out)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    text = out.read_text()
    assert text in result.stdout
    assert ("These are not GPU figures" in text) != torch.cuda.is_available()
    for expected in ("- Commit: ", "- Hardware: ", '- Measured as "fused": residual add on ', "## [16, 4, 64]"):
        assert expected in text
    table = text.partition("## [16, 4, 64]")[2].partition("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")][2:]
    cases = {tuple(row[:3]) for row in rows}
    assert len(cases) == (2 + 1 + 1) * 2, "all rows have a residual of either dtype"
    for row in rows:
        assert all(float(row[at].replace(",", "")) > 0 for at in (6, 10)), "measured times"
    fused = [row for row in rows if row[3] == "fused"]
    assert len(fused) == len(cases)
    assert [row[4] for row in fused if row[:3] == ["all", "bf16", "0"]] == ["6.0"]
    steps = text.partition("## Step time")[2].partition("\n## ")[0]
    assert [line.split(" | ")[0] for line in steps.splitlines() if line.startswith("| 0")] == ["| 0", "| 0.1"]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--rounds", "1"], "--rounds 1 is not allowed: at least 2"),
        (["--dropout-probs", "1.0"], "each must be in [0, 1)"),
        (["--without", "fused"], "can leave out fused, in place, eager specification"),
        (["--rows", "all", "all"], "--rows ['all', 'all']: each may be named once"),
        (["--vocab-size", "1"], "--vocab-size 1 is not allowed: at least 2"),
        (["--hidden-sizes", "64", "0"], "--hidden-sizes [64, 0]: each must be at least 1"),
    ],
)
def test_wrong_options_are_refused(
    option: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["residual.py", *option])
    with pytest.raises(SystemExit):
        benchmark.parse_args()
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("program", [benchmark, peers, profile_trace])
def test_several_processes_are_refused(
    program: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["program.py"])
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(SystemExit):
        program.parse_args()
    assert "leave out torchrun" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "forward", "backward"),
    [
        ({}, 2 + 2 + 2, 2),  # d_x is d_y
        ({"wide": True}, 2 + 4 + 4, 4 + 2),
        ({"rows": "samples-50"}, (6 + 4) / 2, 2),
        ({"rows": "none"}, 4, 0),
        ({"dropout_prob": 0.1}, 6, 2 + 2),  # no mask is stored
        ({"rows": "tokens-100"}, 6, 2 + 2),  # an index could be in any order
    ],
)
def test_needed_bytes_are_those_of_the_operands(changes: dict[str, object], forward: float, backward: float) -> None:
    case = replace(CASE, **changes)  # type: ignore[arg-type]
    assert (needed(case).forward, needed(case).backward) == (forward, backward)
    assert ALL["fused"].traffic(case) == needed(case)
    in_place = ALL["fused, in place"].traffic(case)
    assert in_place.forward == forward - (1 - case.share) * 2 * case.residual_bytes


def test_the_specifications_bytes_are_those_of_each_operation_in_turn() -> None:
    # x in fp32, + bias, * multiplier, the residual in fp32, their sum, y in bf16; the bias itself weighs nothing
    forward = (2 + 4) + (4 + 4) + (4 + 4) + (2 + 4) + (4 + 4 + 4) + (4 + 2)
    found = ALL["eager specification"].traffic(replace(CASE, s=512))
    assert found.forward == pytest.approx(forward, rel=0.01)
    dropped = ALL["eager specification"].traffic(replace(CASE, s=512, dropout_prob=0.1))
    assert dropped.forward > 2 * found.forward, "the mask is made of 64-bit numbers"


def test_the_modelled_bytes_of_megatrons_add_are_those_that_torch_runs() -> None:
    one, case = ALL["Megatron not compiled"], replace(CASE, s=512)
    operands = Operands(case, CPU, seed=1)
    with ByteCounter() as forward:
        outputs = one.call(operands, operands.residual, 0.0)
    gradients = [operands.gradient(output) for output in outputs]
    with ByteCounter() as backward:
        torch.autograd.grad(outputs, [operands.x, operands.residual, operands.bias], gradients)
    assert forward.bytes / case.elements == pytest.approx(one.traffic(case).forward, rel=0.01)
    assert backward.bytes / case.elements == pytest.approx(one.traffic(case).backward, rel=0.01)


def measured(forward: float, backward: float, peer: float, case: Case = CASE) -> Measurement:
    """Three rounds in which a clone takes a second."""
    seconds = {"fused": (forward, backward), "Megatron not compiled": (peer, peer)}
    found = Measurement(case, [ALL[name] for name in seconds], Timer(CPU), seed=1)
    found.clone = [1.0] * 3
    for name, times in found.times.items():
        times.forward, times.backward = [seconds[name][0]] * 3, [seconds[name][1]] * 3
    return found


def test_the_share_is_of_needed_bytes_at_the_clones_bandwidth() -> None:
    share = measured(forward=3.0, backward=0.5, peer=9).share_of_clone(ALL["fused"], "forward", seed=0)
    assert share is not None
    assert [share.value, share.low, share.high] == pytest.approx([0.5] * 3)  # 6 bytes for the clone's 4
    backward = measured(forward=3.0, backward=0.5, peer=9).share_of_clone(ALL["fused"], "backward", seed=0)
    assert backward is not None
    assert backward.value == pytest.approx(1.0)  # 2 bytes in half the time
    nothing = measured(1.0, 1.0, 1.0, replace(CASE, rows="none")).share_of_clone(ALL["fused"], "backward", seed=0)
    assert nothing is None


def test_the_verdict_names_what_misses_the_aim_and_who_is_ahead() -> None:
    choice = "residual add on cuda: the library (built for cuda 13.0)"
    assert benchmark.verdict(choice, [measured(1.5, 0.5, 1.6)]) == ["**The aim is met in all 1 cases.**"]
    slow = "\n".join(benchmark.verdict(choice, [measured(1.602, 0.5, 1.7), measured(1.5, 0.5, 1.2)]))
    assert "not met everywhere" in slow
    assert "forward of all, bf16 residual, dropout 0, hidden 64: 93.6% of clone's bandwidth" in slow
    assert slow.count("behind Megatron not compiled") == 1
    assert "backward" not in slow
    fallback = benchmark.verdict("residual add on cuda: eager torch (not built)", [measured(1.5, 0.5, 1.6)])
    assert fallback == ["**The kernel was not measured**: residual add on cuda: eager torch (not built)."]


def test_an_implementation_that_computes_something_else_is_not_timed() -> None:
    wrong = replace(ALL["fused"], call=lambda operands, residual, prob: (residual + 2 * operands.x + operands.bias,))
    with pytest.raises(AssertionError, match="fused differs"):
        Measurement(CASE, [wrong], Timer(CPU), seed=1).run(rounds=2)


def test_the_variable_is_as_it_was_after_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    with using("eager"):
        assert os.environ[VARIABLE] == "eager"
    assert VARIABLE not in os.environ
    monkeypatch.setenv(VARIABLE, "cpu")
    with pytest.raises(KeyError), using("eager"):
        raise KeyError
    assert os.environ[VARIABLE] == "cpu"
