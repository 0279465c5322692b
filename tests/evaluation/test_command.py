"""`megatron-sbld evaluate` as it is called, on a run of a few iterations."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_sbld.cli import main as cli
from megatron_sbld.evaluation.results import read_evaluations
from megatron_sbld.report import record
from tests.training.trainer_helpers import prepare_corpus, run_here, tiny_run

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of iterations 4 and 8."""
    folder = tmp_path_factory.mktemp("evaluate")
    config = tiny_run(folder / "run", prepare_corpus(folder), checkpoint={"save_interval": 4, "save_at_end": True})
    assert run_here(config) == 0
    return folder / "run"


def call(capsys: pytest.CaptureFixture[str], *args: Any) -> tuple[int, str, str]:
    """Exit status, standard output and standard error."""
    with pytest.raises(SystemExit) as exit_:
        cli.main(["evaluate", *map(str, args)])
    captured = capsys.readouterr()
    assert isinstance(exit_.value.code, int)
    return exit_.value.code, captured.out, captured.err


@pytest.mark.slow
def test_lambada_of_every_checkpoint(
    run_dir: Path, passages: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--checkpoint", run_dir, "--every_checkpoint", "--data", passages]
    status, out, err = call(capsys, "lambada", *options)
    assert status == 0, err
    for shown in ("7 passages", "1,024", "2,048"):
        assert shown in out
    assert "lambada, iteration 8: 100 %" in err
    found = read_evaluations(run_dir / "evaluations.jsonl")
    assert [(row.task, row.iteration, row.consumed_tokens) for row in found] == [
        ("lambada", 4, 1024),
        ("lambada", 8, 2048),
    ]
    assert (run_dir / "evaluations" / "lambada.png").stat().st_size > 10_000
    assert found[1].examples is not None
    examples = (run_dir / found[1].examples).read_text().splitlines()
    assert [json.loads(line)["target"] for line in examples][:2] == [" them.", " said"]
    assert call(capsys, "lambada", *options, "--raw")[0] == 0
    assert len(read_evaluations(run_dir / "evaluations.jsonl")) == 4, "the raw form is a series of its own"
    assert call(capsys, "lambada", *options, "--limit", 3, "--out", tmp_path)[0] == 0
    assert [row.metrics["passages"] for row in read_evaluations(tmp_path / "evaluations.jsonl")] == [3, 3]
    for row in read_evaluations(run_dir / "evaluations.jsonl"):
        assert len((run_dir / str(row.examples)).read_text().splitlines()) == 7, "each row has its own examples"
    assert call(capsys, "lambada", *options)[0] == 0
    assert len(read_evaluations(run_dir / "evaluations.jsonl")) == 4, "the same again replaces"


def test_perplexity_elsewhere(
    run_dir: Path, passages_jsonl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = run_dir / "checkpoints" / "iter_0000004"
    status, out, err = call(
        capsys, "perplexity", "--checkpoint", checkpoint, "--data", passages_jsonl, "--stride", 8, "--out", tmp_path
    )
    assert status == 0, err
    (row,) = read_evaluations(tmp_path / "evaluations.jsonl")
    assert (row.iteration, row.options["stride"], row.options["context"]) == (4, 8, 32)
    assert row.metrics["documents"] == 7
    loss = row.metrics["loss"]
    assert loss is not None
    assert row.metrics["bits_per_byte"] == pytest.approx(loss / math.log(2)), "a token is a byte"
    assert "1 files taken for JSON lines (.jsonl)" in out
    assert ("bits per byte" in out, "by word" in out) == (True, False)
    assert f"kept in {tmp_path / 'evaluations.jsonl'}" in out, "in one line, however narrow the console is"
    assert "7 documents" in out


def test_rows_and_examples_of_runs_that_share_a_folder_are_kept_apart(
    run_dir: Path, passages: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other, out = tmp_path / "other", tmp_path / "out"
    shutil.copytree(run_dir, other)
    data = ["--data", passages, "--out", out]
    both = ["--checkpoint", run_dir, "--checkpoint", other]  # as good as --checkpoint with both
    assert call(capsys, "lambada", *both, *data)[0] == 0
    assert call(capsys, "lambada", "--checkpoint", other, "--every_checkpoint", *data)[0] == 0
    assert call(capsys, "lambada", "--checkpoint", run_dir, *data, "--limit", 3)[0] == 0
    rows = read_evaluations(out / "evaluations.jsonl")
    whose = [(Path(str(row.checkpoint)).parents[1], row.iteration, row.options["limit"]) for row in rows]
    assert whose == [(run_dir, 8, None), (other, 8, None), (other, 4, None), (run_dir, 8, 3)]
    assert len({row.examples for row in rows}) == 4
    for row in rows:
        assert len((out / str(row.examples)).read_text().splitlines()) == row.metrics["passages"]
    assert call(capsys, "lambada", "--checkpoint", other, "--data", passages, "--out", other)[0] == 0
    assert {row.checkpoint for row in read_evaluations(other / "evaluations.jsonl")} == {None}, "its own folder"


def test_a_curve_is_of_one_run(
    run_dir: Path, passages: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    shutil.copytree(run_dir, other)
    curves: list[Any] = []
    monkeypatch.setattr(record, "plot_evaluations", lambda given, file: curves.extend(given))
    options = ["--checkpoint", run_dir, other, "--every_checkpoint", "--data", passages, "--out", tmp_path / "out"]
    assert call(capsys, "lambada", *options)[0] == 0
    assert [(curve.label, len(curve.runs[0])) for curve in curves] == [(str(run_dir), 2), (str(other), 2)]


def test_where_results_cannot_be_kept_is_found_before_scoring(
    run_dir: Path, passages: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def scored(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the work would be lost")

    monkeypatch.setattr("megatron_sbld.evaluation.run.score", scored)
    file, damaged, closed = tmp_path / "file", tmp_path / "damaged", tmp_path / "closed"
    file.write_text("")
    damaged.mkdir()
    (damaged / "evaluations.jsonl").write_text("{")
    closed.mkdir()
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != closed and access(path, mode))  # also for root
    for out, message in ((file, "File exists"), (damaged, "is cut off"), (closed, "Permission denied")):
        status, _, err = call(capsys, "lambada", "--checkpoint", run_dir, "--data", passages, "--out", out)
        assert (status, message in err, str(out) in err) == (cli.EXIT_MISTAKE, True, True), err


def test_the_data_are_not_overwritten(
    run_dir: Path, passages_jsonl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "evaluations.jsonl"
    data.write_bytes(passages_jsonl.read_bytes())
    for given in (data, tmp_path):
        status, _, err = call(capsys, "perplexity", "--checkpoint", run_dir, "--data", given, "--out", tmp_path)
        assert (status, "is an input, and would be overwritten" in err) == (cli.EXIT_MISTAKE, True)
    assert data.read_bytes() == passages_jsonl.read_bytes()


def test_mistakes_are_named(run_dir: Path, passages: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outside = tmp_path / "iter_0000008"
    outside.symlink_to(run_dir / "checkpoints" / "iter_0000008")
    cut = tmp_path / "cut" / "iter_0000008"
    cut.mkdir(parents=True)
    for file in (run_dir / "checkpoints" / "iter_0000008").iterdir():
        content = file.read_bytes()
        (cut / file.name).write_bytes(content[:-1] if file.suffix == ".distcp" else content)
    empty_line = tmp_path / "empty_line.txt"
    empty_line.write_text("one two three\n\nfour five\n")
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text("{}")
    data = ["--data", passages]
    cases: list[tuple[list[Any], str]] = [
        (["lambada", "--checkpoint", tmp_path / "none", *data], "none"),
        (["lambada", "--checkpoint", run_dir, "--data", tmp_path / "no.txt"], "no such file"),
        (["lambada", "--checkpoint", run_dir, "--data", empty_line], "empty_line.txt:2: an empty passage"),
        (["lambada", "--checkpoint", cut, *data], "bytes"),
        (["lambada", "--checkpoint", outside, *data], "--out"),
        (["lambada", "--checkpoint", run_dir, run_dir / "checkpoints", *data], "more than once"),
        (["lambada", "--checkpoint", run_dir, *data, "--tokenizer", tokenizer], "tokenizer"),
        (["lambada", "--checkpoint", run_dir, *data, "--tensor_model_parallel_size", "2"], "1 processes"),
        (["lambada", "--checkpoint", run_dir, *data, "--batch_tokens", "0"], "batch_tokens = 0"),
        (["lambada", "--checkpoint", run_dir, *data, "--precision", "int8"], "precision"),
        (["perplexity", "--checkpoint", run_dir, *data, "--stride", "33"], "stride = 33"),
        (["lambada", "--checkpoint", run_dir, *data, "--limit", "0"], "limit = 0"),
        (["lambda"], "unknown command 'evaluate lambda'"),
    ]
    for args, message in cases:
        status, _, err = call(capsys, *args)
        assert status == cli.EXIT_MISTAKE, args
        assert message in err, args


def test_help_suffices(capsys: pytest.CaptureFixture[str]) -> None:
    for task in ("lambada", "perplexity"):
        status, out, _ = call(capsys, task, "--help")
        assert status == 0
        for option in ("--checkpoint", "--data", "--tensor_model_parallel_size", "--every_checkpoint", "--tokenizer"):
            assert option in out
