"""benchmarks/study: what is planned, counted and concluded. (test_study_run.py trains.)"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import warnings
from pathlib import Path
from typing import Any

import pytest

from benchmarks.study import report, sensitivity
from benchmarks.study.methods import METHODS, SENSITIVITY
from benchmarks.study.plan import GRID, Measure, Plan, seconds
from benchmarks.study.rows import Point, Results, append_row, curve, executed_flops, read_rows
from benchmarks.study.saving import flops_at, saving, seed_deviation, share_needed
from benchmarks.study.settings import (
    LAYERS,
    VOCABULARY,
    Spec,
    iteration_flops,
    model_settings,
    parameters,
    settings,
)
from megatron_sbld.config.flops import layer_flops_per_token
from megatron_sbld.config.sections import ModelConfig
from megatron_sbld.method.build import build_policy
from megatron_sbld.method.config import DropConfig
from megatron_sbld.sensitivity.file import SensitivityFile

UNDROPPED = Spec(width=32, method="undropped", budget=5.0, lr=2e-3, seed=1, drop={"policy": "none"})
LAYERDROP = dataclasses.replace(UNDROPPED, method="layerdrop", drop={"policy": "layerdrop", "theta": 0.75})


def undropped_loss(flops: float) -> float:
    return 3.0 + 2.0 * (flops / 1e12) ** -0.3


def points(method: str, factor: float, seeds: tuple[float, ...] = (0.0,)) -> list[Point]:
    """Runs of five lengths of a method that needs `factor` of the undropped FLOPs for each loss."""
    flops = [1e12 * 2**power for power in range(5)]
    losses = [undropped_loss(one / factor) for one in flops]
    return [
        Point(method, float(budget), 2e-3, one, tuple(loss + seed for seed in seeds))
        for budget, one, loss in zip((1, 2, 4, 8, 16), flops, losses, strict=True)
    ]


def row_of(spec: Spec, loss: float | None, **more: Any) -> dict[str, Any]:
    fields = {name: value for name, value in dataclasses.asdict(spec).items() if name != "drop"}
    facts = {"date": "2026-01-01", "commit": "abc", "cpu_s": 60.0, "hardware": "a processor", "text": "t"}
    return {**fields, **facts, "key": spec.key, "name": spec.name, "flops": spec.expected_flops, "loss": loss, **more}


@pytest.mark.parametrize("width", VOCABULARY)
def test_the_layers_are_about_85_percent_of_the_flops(width: int) -> None:
    assert 1 - iteration_flops(width, 0) / iteration_flops(width, LAYERS) == pytest.approx(0.85, abs=0.015)


@pytest.mark.parametrize("width", VOCABULARY)
def test_all_parameters_are_counted(width: int, one_rank: None) -> None:
    from megatron_sbld.config.sections import Config, ModelConfig, TrainingConfig
    from megatron_sbld.training.model import build_model

    config = Config(
        model=ModelConfig(**settings(dataclasses.replace(UNDROPPED, width=width))["model"]),
        training=TrainingConfig(train_iters=1, global_batch_size=16, precision="fp32"),
    )
    (chunk,) = build_model(config, VOCABULARY[width])
    assert sum(parameter.numel() for parameter in chunk.parameters()) == parameters(width)


@pytest.mark.parametrize("width", VOCABULARY)
def test_a_budget_is_tokens_a_parameter_of_the_undropped_run(width: int) -> None:
    undropped = dataclasses.replace(UNDROPPED, width=width)
    assert undropped.iterations * 2048 / parameters(width) == pytest.approx(5.0, rel=2e-3)


def test_a_dropped_run_is_as_much_longer_as_its_budget_allows() -> None:
    assert LAYERDROP.iterations > UNDROPPED.iterations
    one = iteration_flops(32, 0.75 * LAYERS)
    assert abs(LAYERDROP.iterations * one - LAYERDROP.budget_flops) <= one / 2
    assert LAYERDROP.expected_flops == pytest.approx(LAYERDROP.iterations * one)


def test_a_schedule_that_depends_on_the_length_meets_its_budget_too() -> None:
    pld = dataclasses.replace(UNDROPPED, method="pld", drop=METHODS["pld"].drop)
    assert pld.expected_flops == pytest.approx(pld.budget_flops, rel=3e-3)


def test_keys_are_stable_and_change_with_what_matters(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert UNDROPPED.key == "once/w32/undropped/5/lr0.002/s1#22baaa2c", "a changed key repeats all runs"
    others = [
        LAYERDROP,
        dataclasses.replace(LAYERDROP, drop={"policy": "layerdrop", "theta": 0.8}),
        *(dataclasses.replace(UNDROPPED, **change) for change in ({"seed": 2}, {"lr": 4e-3}, {"decay": "cosine"})),
        dataclasses.replace(UNDROPPED, regime="epochs"),
    ]
    assert len({spec.key for spec in [UNDROPPED, *others]}) == len(others) + 1


def test_a_sensitivity_file_counts_by_its_content(tmp_path: Path) -> None:
    drop = {"policy": "layerdrop", "theta": 0.75}
    keys = []
    for name, content in (("a", "1"), ("b", "1"), ("c", "2")):
        (tmp_path / name).write_text(content)
        spec = dataclasses.replace(LAYERDROP, drop=drop)
        object.__setattr__(spec, "drop", {**drop, "sensitivity": str(tmp_path / name)})
        keys.append(settings(spec)["drop"]["sensitivity"])
    assert keys[0] == keys[1] != keys[2]


def test_flops_are_those_of_the_layers_that_ran() -> None:
    metrics = [{"kept": [1.0, 0.5]}, {"iteration": 1, "valid_loss": 5.0}, {"kept": [0.0, 0.0]}]
    assert executed_flops(metrics, fixed=10.0, per_layer=2.0) == [13.0, 23.0]


def test_a_curve_is_thinned_and_keeps_its_end() -> None:
    metrics = [{"iteration": number, "valid_loss": float(number)} for number in range(1, 101)]
    thinned = curve(metrics, [10.0 * number for number in range(1, 101)])
    assert len(thinned) <= 24
    assert thinned[-1] == [1000.0, 100.0]


@pytest.mark.parametrize("factor", [0.3, 0.65, 0.9])
def test_a_saving_is_the_distance_to_the_undropped_frontier(factor: float) -> None:
    frontier = points("undropped", 1.0)
    found = [saving(point, frontier, None) for point in points("staged-1", factor)[:3]]
    assert [one.value for one in found if one] == pytest.approx([1 - factor] * 3, abs=0.01)
    share = share_needed(points("staged-1", factor), frontier[3], None)
    assert share is not None
    assert share.value == pytest.approx(factor, abs=0.01)


def test_beyond_the_frontier_there_is_a_bound_or_nothing() -> None:
    frontier = points("undropped", 1.0)
    better = saving(points("staged-1", 0.5)[4], frontier, None)
    assert better is not None
    assert better.is_bound
    assert better.value == pytest.approx(0.0)
    assert saving(Point("pld", 1.0, 2e-3, 1e12, (9.0,)), frontier, None) is None
    assert share_needed(points("pld", 8.0)[:2], frontier[3], None) is None


def test_a_point_that_is_no_better_than_a_cheaper_one_is_no_part_of_the_frontier() -> None:
    assert flops_at([1.0, 2.0, 4.0], [5.0, 5.1, 4.0], 5.05) == 0.0
    assert flops_at([1.0, 2.0, 4.0], [5.0, 5.1, 4.0], 4.5) == pytest.approx(flops_at([1.0, 4.0], [5.0, 4.0], 4.5))


def test_an_interval_is_as_wide_as_the_noise_between_seeds_makes_it() -> None:
    noise = (-0.02, 0.0, 0.02)
    frontier = points("undropped", 1.0, noise)
    deviation = seed_deviation(frontier)
    assert deviation == pytest.approx(0.02)
    point = points("staged-1", 0.65, noise)[2]
    found = saving(point, frontier, deviation)
    assert found is not None
    assert found.low is not None
    assert found.low < 0.35 < (found.high or 0)
    single = dataclasses.replace(point, losses=(point.loss,))
    wider = saving(single, frontier, deviation)
    assert wider is not None
    assert (wider.high or 0) - (wider.low or 0) > (found.high or 0) - found.low


def test_the_learning_rate_is_chosen_by_successive_halving() -> None:
    def rates(rows: list[dict[str, Any]], budget: float) -> list[float]:
        planned = Plan(Results(rows), {}).all()
        wanted = [spec for spec in planned if isinstance(spec, Spec) and spec.method == "undropped"]
        wanted = [spec for spec in wanted if spec.regime == "once"]
        return [spec.lr for spec in wanted if (spec.width, spec.budget, spec.seed) == (32, budget, 1)]

    def rows_at(budget: float, losses: dict[float, float | None]) -> list[dict[str, Any]]:
        return [row_of(dataclasses.replace(UNDROPPED, budget=budget, lr=lr), loss) for lr, loss in losses.items()]

    assert rates([], 1.3) == list(GRID)
    assert rates([], 5.0) == []
    first = rows_at(1.3, {2e-3: 5.2, 4e-3: 5.0, 8e-3: None})  # the last diverged
    assert rates(first[:2], 5.0) == []
    assert rates(first, 5.0) == [4e-3, 2e-3]
    rising = rows_at(1.3, {2e-3: 5.2, 4e-3: 5.1, 8e-3: 5.0})
    assert rates(rising, 1.3) == [*GRID, 1.6e-2], "the best is the highest: one more"
    assert rates(rising, 5.0) == []
    rising += rows_at(1.3, {1.6e-2: 5.1})
    assert rates(rising, 1.3) == [*GRID, 1.6e-2]
    assert rates(rising, 5.0) == [8e-3, 4e-3]
    second = rows_at(5.0, {2e-3: 4.4, 4e-3: 4.5})
    assert rates(first + second, 10.0) == [2e-3]
    assert rates(first + second, 20.0) == [2e-3, 4e-3]


def test_the_plan_names_each_run_once_and_none_takes_over_70_minutes() -> None:
    rows = []
    for _ in range(12):  # as if each run had ended, with a loss that its FLOPs give
        done = {row["key"] for row in rows}
        specs = [one for one in Plan(Results(rows), {}).all() if isinstance(one, Spec)]
        new = [spec for spec in specs if spec.key not in done]
        if not new:
            break
        rows += [row_of(spec, 3 + undropped_loss(spec.budget_flops * (1 + spec.lr))) for spec in new]
    names = [spec.name for spec in specs]
    assert len(names) == len(set(names))
    assert max(seconds(spec) for spec in specs) < 70 * 60
    assert {"once", "epochs", "tokens"} == {spec.regime for spec in specs}


def test_token_dropping_is_held_against_equal_flops_and_equal_iterations_in_12_short_runs(tmp_path: Path) -> None:
    file = tmp_path / "sensitivity_w32.json"
    SensitivityFile.from_gaps([0.1 * layer for layer in range(LAYERS)], [0.01] * LAYERS, {"command": "made up"}).save(
        file
    )
    specs = [one for one in Plan(Results([]), {32: file}).all() if isinstance(one, Spec) and one.regime == "tokens"]
    assert len(specs) == len({spec.key for spec in specs}) == 12
    undropped = specs[0]
    assert [spec.method for spec in specs[:3]] == ["undropped"] * 3
    for spec in specs:
        sections = settings(spec)
        assert (spec.samples, sections["model"]["seq_length"]) == (4, 512)
        assert sections["optimizer"].get("lr_schedule_by", "iterations") == spec.lr_by
        if spec.equal == "flops":
            assert spec.expected_flops == pytest.approx(undropped.expected_flops, rel=1e-3)
        else:
            assert spec.iterations == undropped.iterations
        assert seconds(spec) < 8 * 60
    assert sum(spec.lr_by == "layer_tokens" for spec in specs) == 6


def test_expected_flops_of_tokens_are_those_of_shorter_samples() -> None:
    """Layers on r of s tokens do what they do on a sample of r tokens."""
    drop = {"policy": "none", "granularity": "token", "token_schedule": "steps", "token_steps": [[1.0, 128]]}
    spec = dataclasses.replace(UNDROPPED, method="random-ltd", regime="tokens", drop=drop, equal="iterations")
    short, long = (layer_flops_per_token(ModelConfig(**model_settings(32, length))) for length in (128, 512))
    fixed = iteration_flops(32, 0, seq_length=512)
    layer = (iteration_flops(32, LAYERS, seq_length=512) - fixed) / LAYERS
    expected = fixed + 2 * layer + 10 * layer * 128 / 512 * short / long
    assert spec.expected_flops == pytest.approx(spec.iterations * expected)


def test_the_command_that_measures_a_sensitivity_is_one_that_there_is(tmp_path: Path) -> None:
    command = sensitivity.command(tmp_path / "no.yaml", tmp_path)
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    # It is the config alone that is refused.
    assert result.returncode == 2
    assert "no.yaml" in result.stderr
    assert "cannot be read" in result.stderr


def test_a_method_without_its_sensitivity_has_it_measured_first() -> None:
    assert Measure(32) in Plan(Results([]), {}).all()


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_a_drop_section_without_waste(name: str, tmp_path: Path) -> None:
    method, drop = METHODS[name], dict(METHODS[name].drop)
    assert method.needs_sensitivity == (drop.get("sensitivity") == SENSITIVITY)
    drop.pop("sensitivity", None)
    if not method.needs_sensitivity:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # what the policy does not use is warned of
            build_policy(DropConfig(**drop), LAYERS, 1000)
    assert method.head is None or METHODS[method.head].head is None


def test_a_damaged_line_of_the_rows_is_named(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    append_row(file, {"key": "a"})
    assert read_rows(file) == [{"key": "a"}]
    file.write_text(file.read_text() + "{\n")
    with pytest.raises(ValueError, match=r"rows.jsonl:2"):
        read_rows(file)


@pytest.mark.slow
def test_the_page_has_tables_plot_and_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.study.saving.DRAWS", 100)
    rows = []
    for method, factor in (("undropped", 1.0), ("staged-1", 0.6), ("pld", 1.5)):
        for budget in (1.3, 2.5, 5.0, 10.0, 20.0, 30.0):
            for seed in (1, 2, 3):
                spec = dataclasses.replace(UNDROPPED, method=method, budget=budget, seed=seed)
                loss = undropped_loss(spec.expected_flops / factor) + 0.001 * seed
                rows.append(row_of(spec, loss))
    for lr_by in ("iterations", "layer_tokens"):
        spec = dataclasses.replace(UNDROPPED, method="random-ltd", regime="tokens", lr_by=lr_by)
        spec = dataclasses.replace(spec, method="undropped") if lr_by == "iterations" else spec
        rows.append(row_of(spec, 4.0, iterations=9, curve=[[1e11, 5.0], [2e11, 4.0]]))
    page = report.write(rows, tmp_path / "study.md", tmp_path / "header.md").read_text()
    assert "| random-ltd | flops | layer-tokens | 1 | 9 |" in page
    assert (tmp_path / "study_tokens.svg").stat().st_size < 100_000
    assert "staged-1 needs 60%" in page
    assert "- pld (" in page.partition("## Negative")[2]
    assert (tmp_path / "study_loss.svg").stat().st_size < 100_000
    (tmp_path / "header.md").write_text("By hand.\n")
    assert "By hand." in report.write(rows, tmp_path / "study.md", tmp_path / "header.md").read_text()
    with pytest.raises(ValueError, match="no rows"):
        report.write([], tmp_path / "study.md")


def test_settings_hold_no_path() -> None:
    assert str(Path.home()) not in json.dumps(settings(UNDROPPED))
