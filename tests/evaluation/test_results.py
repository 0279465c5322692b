"""evaluations.jsonl: one row for what was evaluated how, whole at any moment, refused by line where it is damaged."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import multiprocessing

import pytest

from megatron_sbld import __version__
from megatron_sbld.evaluation.lambada import LambadaResult
from megatron_sbld.evaluation.results import (
    Data,
    evaluation,
    identify,
    read_evaluations,
    save_evaluations,
)

RESULT = LambadaResult(0.5, 0.01, 12.0, 0.2, 4869, 0, 38)


def lambada_row(iteration=100, accuracy=0.5, **fields):
    values = {
        "task": "lambada",
        "consumed_tokens": 2048 * iteration,
        "train_time_s": 0.5 * iteration,
        "precision": "bf16",
        "data": Data("lambada.txt", "ab" * 32),
        "options": {"format": "text", "detokenise": True},
    }
    return evaluation(iteration=iteration, result=dataclasses.replace(RESULT, accuracy=accuracy), **(values | fields))


def test_rows_come_back_as_they_were_written(tmp_path):
    file = tmp_path / "run" / "evaluations.jsonl"
    rows = [lambada_row(), lambada_row(200, consumed_tokens=None, train_time_s=None)]
    save_evaluations(rows, file)
    assert read_evaluations(file) == rows
    assert rows[0].metrics["glued"] == 38
    assert rows[0].version == __version__
    assert rows[0].date.endswith("+00:00")


def test_evaluating_the_same_again_replaces_the_row_in_its_place(tmp_path):
    file = tmp_path / "evaluations.jsonl"
    save_evaluations([lambada_row(100, 0.1), lambada_row(200, 0.2)], file)
    save_evaluations([lambada_row(100, 0.3, consumed_tokens=5)], file)
    assert [(row.iteration, row.metrics["accuracy"]) for row in read_evaluations(file)] == [(100, 0.3), (200, 0.2)]


@pytest.mark.parametrize(
    "fields",
    [
        {"precision": "fp32"},
        {"data": Data("lambada.txt", "cd" * 32)},
        {"data": Data("other.txt", "ab" * 32)},
        {"options": {"format": "text", "detokenise": False}},
        {"iteration": 101},
        {"task": "perplexity"},
    ],
)
def test_what_differs_in_any_part_of_the_key_is_another_row(tmp_path, fields):
    file = tmp_path / "evaluations.jsonl"
    save_evaluations([lambada_row()], file)
    save_evaluations([lambada_row(**fields)], file)
    assert len(read_evaluations(file)) == 2


def test_the_order_of_options_does_not_matter(tmp_path):
    file = tmp_path / "evaluations.jsonl"
    save_evaluations([lambada_row()], file)
    save_evaluations([lambada_row(options={"detokenise": True, "format": "text"})], file)
    assert len(read_evaluations(file)) == 1


def test_what_is_not_finite_or_unknown_survives(tmp_path):
    file = tmp_path / "evaluations.jsonl"
    result = dataclasses.replace(RESULT, perplexity=math.inf, perplexity_stderr=math.nan, accuracy_stderr=None)
    row = dataclasses.replace(lambada_row(), metrics=dataclasses.asdict(result))
    save_evaluations([row], file)
    metrics = read_evaluations(file)[0].metrics
    assert metrics["perplexity"] == math.inf
    assert math.isnan(metrics["perplexity_stderr"])
    assert metrics["accuracy_stderr"] is None


def changed(**fields):
    return json.dumps(dataclasses.asdict(lambada_row()) | fields) + "\n"


@pytest.mark.parametrize(
    ("tail", "problem"),
    [
        (changed()[:40], r"evaluations\.jsonl, line 2 is cut off"),
        (changed()[:40] + "\n", r"line 2 is not JSON"),
        ("[1]\n", r"line 2 is not an evaluation: it is list"),
        ("\n", r"line 2 is not JSON"),
        ('{"task": "lambada"}\n', r"line 2 is not an evaluation: it has no iteration"),
        (changed(iteration="3"), r"line 2: iteration = '3' must be int"),
        (changed(iteration=True), r"line 2: iteration = True must be int"),
        (changed(train_time_s="1 h"), r"train_time_s = '1 h' must be int or float or null"),
        (changed(task="squad"), r"task = 'squad'; allowed: lambada, perplexity"),
        (changed(data={"name": "a"}), r"data = .* must have a name and a sha256"),
        (changed(metrics={"accuracy": "high"}), r"metrics\.accuracy = 'high' must be a number or null"),
    ],
    ids=itertools.count(),  # the rows have dates
)
def test_a_damaged_file_is_refused_by_line_and_left_as_it_is(tmp_path, tail, problem):
    file = tmp_path / "evaluations.jsonl"
    save_evaluations([lambada_row()], file)
    content = file.read_text() + tail
    file.write_text(content)
    with pytest.raises(ValueError, match=problem):
        read_evaluations(file)
    with pytest.raises(ValueError, match=problem):
        save_evaluations([lambada_row(200)], file)
    assert file.read_text() == content


def test_nothing_but_the_file_is_left_in_the_folder(tmp_path):
    save_evaluations([lambada_row()], tmp_path / "evaluations.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["evaluations.jsonl"]


def test_a_file_on_other_storage_stays_there(tmp_path):
    (tmp_path / "storage").mkdir()
    there, file = tmp_path / "storage" / "rows", tmp_path / "evaluations.jsonl"
    file.symlink_to(there)
    row = lambada_row()
    save_evaluations([row], file)
    assert file.is_symlink()
    assert read_evaluations(there) == [row]


def _save_some(file, first):
    for iteration in range(first, first + 10):
        save_evaluations([lambada_row(iteration)], file)


def test_processes_that_save_at_the_same_time_lose_no_row(tmp_path):
    file = tmp_path / "evaluations.jsonl"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_save_some, args=(file, first)) for first in (0, 10, 20)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert sorted(row.iteration for row in read_evaluations(file)) == list(range(30))


def test_data_are_the_same_wherever_they_are_and_another_where_they_differ(tmp_path):
    for folder, content in (("a", "one"), ("b", "one"), ("c", "two")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "data.txt").write_text(content)
    a, b, c = (identify([str(tmp_path / name / "data.txt")], [str(tmp_path / name / "data.txt")]) for name in "abc")
    assert a == b != c
    assert a == Data("data.txt", "7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed")
    both = [str(tmp_path / name / "data.txt") for name in "ac"]
    assert identify([f"{tmp_path}/a/", f"{tmp_path}/c"], both).name == "a, c"
    assert identify(both, both) != identify(both[::-1], both[::-1])
