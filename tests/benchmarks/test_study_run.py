"""benchmarks/study trains: what a run counts is what was planned, a stopped run goes on, a finished one is done."""

from __future__ import annotations

import dataclasses
import shutil
from argparse import Namespace
from pathlib import Path

import pytest

from benchmarks.study import data, run, runner
from benchmarks.study.plan import Plan
from benchmarks.study.rows import Results, append_row, read_metrics
from benchmarks.study.settings import Spec

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
BALANCED = {"policy": "layerdrop", "theta": 0.75, "sampler": "balanced"}  # 9 of 12 layers in each iteration
SPEC = Spec(width=32, method="layerdrop", budget=0.1, lr=2e-3, seed=1, drop=BALANCED)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work folder with this package's own sources as novels, for the smaller model."""
    text, folder = tmp_path_factory.mktemp("text"), tmp_path_factory.mktemp("work")
    sources = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "megatron_sbld").rglob("*.py"))]
    for name, documents in (("books_train.txt", sources[:-10]), ("books_valid.txt", sources[-10:])):
        (text / name).write_text("".join(f"{one}\n{data.SEPARATOR}\n" for one in documents), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "VOCABULARY", {32: 1024})
        patch.setattr(data, "FINAL_CHARACTERS", 3000)
        data.prepare(text, folder)
    return folder


def place_in(work: Path, **more: object) -> runner.Place:
    return runner.Place(**{"work": work, "pause_file": None, "stop": lambda: False, **more})


def test_a_run_counts_what_was_planned_and_goes_on_when_it_was_paused(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "_POLL_SECONDS", 0.02)
    said: list[str] = []
    pause = tmp_path / "pause"
    run_dir = runner.run_folder(SPEC, work)

    def stop() -> bool:
        """Asked often: lays the pause file once the run has begun, and takes it away while it waits."""
        if said:
            pause.unlink(missing_ok=True)
        elif (run_dir / "metrics.jsonl").exists() and read_metrics(run_dir):
            pause.touch()
        return False

    row = runner.run(SPEC, place_in(work, pause_file=pause, stop=stop, say=said.append))
    assert said == [f"paused while {pause} exists"]
    assert len((run_dir / "cpu_s").read_text().split()) == 2, "two processes"
    assert row["flops"] == pytest.approx(row["expected_flops"], rel=1e-6)
    assert row["flops"] == pytest.approx(sum(one.get("executed_flops", 0.0) for one in read_metrics(run_dir)))
    assert row["iterations"] == SPEC.iterations
    assert abs(row["flops"] - row["budget_flops"]) <= row["flops"] / SPEC.iterations / 2
    assert row["curve"][-1][0] == pytest.approx(row["flops"], rel=1e-4)
    assert 0 < row["loss_stderr"] < row["loss"] < 8
    assert row["text"] == data.text_id(work)
    shutil.rmtree(run_dir)
    assert runner.run(SPEC, place_in(work))["loss"] == row["loss"]


def test_a_run_that_is_stopped_has_no_row_and_can_go_on(work: Path) -> None:
    spec = dataclasses.replace(SPEC, seed=2)
    with pytest.raises(runner.StoppedError):
        runner.run(spec, place_in(work, stop=lambda: True))


def test_what_the_trainer_refuses_is_told(work: Path) -> None:
    spec = dataclasses.replace(SPEC, decay="sometimes")
    with pytest.raises(runner.StudyError, match=r"(?s)exit status 2.*lr_decay_style"):
        runner.run(spec, place_in(work))


def test_a_text_is_not_read_twice(work: Path) -> None:
    with pytest.raises(runner.StudyError, match="read twice"):
        runner.run(dataclasses.replace(SPEC, budget=20.0), place_in(work))


def test_a_finished_run_is_not_run_again(work: Path, tmp_path: Path) -> None:
    args = Namespace(rows=tmp_path / "rows.jsonl", work=work, only="once/w32/undropped/1.3*")
    place = place_in(work)
    first, second = run.next_runs(args, set(), 2, place)
    facts = {"regime": "once", "decay": "WSD", "width": 32, "method": "undropped", "budget": 1.3, "lr": 2e-3, "seed": 1}
    done = {**facts, "key": first.key, "name": first.name, "loss": 5.0, "flops": 1.0, "text": data.text_id(work)}
    append_row(args.rows, done)
    assert run.next_runs(args, set(), 1, place) == [second]
    append_row(args.rows, {**done, "key": second.key, "name": second.name, "lr": 4e-3, "text": "another"})
    assert run.next_runs(args, set(), 1, place) == [second], "another text is another run"
    assert run.next_runs(args, {second.key}, 1, place)[0].lr == 8e-3
    assert isinstance(Plan(Results([done]), {}).all()[0], Spec)
