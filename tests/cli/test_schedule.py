"""`megatron-sbld schedule show | fit`, from the command line to the files, and what they refuse."""

from __future__ import annotations

import dataclasses
import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from megatron_sbld.cli import main as cli
from megatron_sbld.config.sections import Config, DataConfig, ModelConfig, OptimizerConfig, TrainingConfig
from megatron_sbld.method.build import build_policy
from megatron_sbld.method.build_schedule import build_schedule
from megatron_sbld.method.config import DropConfig
from megatron_sbld.method.schedule import pwegd_density
from megatron_sbld.sensitivity.file import SensitivityFile

LAYERS, ITERATIONS = 12, 400
MODEL = ModelConfig(num_layers=LAYERS, hidden_size=64, num_attention_heads=4, seq_length=128)
GAP = [0.9, 0.1, -0.2, 0.3, 0.25, 0.2, -0.1, 0.0, 0.35, 0.4, 0.5, 0.8]


def command(*args: str) -> int | str | None:
    """The exit status of `megatron-sbld schedule` with these arguments."""
    with pytest.raises(SystemExit) as ended:
        cli.main(["schedule", *args])
    return ended.value.code


def refused(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """The message of a mistake on one line."""
    assert command(*args) == cli.EXIT_MISTAKE
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    assert printed.count("megatron-sbld: error") == 1
    return " ".join(printed.split())


def png_size(file: Path) -> tuple[int, int]:
    header = file.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", header[16:24])


# show


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a config of SBLD whose sensitivity file is given relative to it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lists").mkdir()
    SensitivityFile.from_gaps(GAP, [0.01] * LAYERS, {"command": "made up"}).save(tmp_path / "lists" / "gaps.json")
    config = {
        "model": {"num_layers": LAYERS, "hidden_size": 64, "num_attention_heads": 4, "seq_length": 128},
        "training": {"train_iters": ITERATIONS},
        "drop": {"policy": "sbld", "theta": 0.6, "sensitivity": "lists/gaps.json", "recovery_fraction": 0.25},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


def layer_lines(printed: str) -> dict[int, list[str]]:
    lines = [line.split() for line in printed.splitlines() if line.startswith("layer ")]
    return {int(line[1]): line[2:] for line in lines}


def test_show_prints_the_forecast_and_every_layer_with_its_list(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("show", "--config", "config.yaml") == 0
    printed = capsys.readouterr().out
    policy = build_policy(DropConfig(policy="sbld", theta=0.6, sensitivity="lists/gaps.json"), LAYERS, ITERATIONS)
    header = next(line.split() for line in printed.splitlines() if line.startswith("iteration "))
    iterations = [int(iteration) for iteration in header[1:]]
    assert iterations == [1, 40, 60, 120, 180, 240, 300, 400]
    lines = layer_lines(printed)
    assert list(lines) == list(range(1, LAYERS + 1))
    assert (lines[1][0], lines[3][0]) == ("Block", "Allow")
    for number in (2, 12):
        expected = [policy.keep_probs(iteration)[number - 1] for iteration in iterations[:-1]]
        assert lines[number] == [f"{keep_prob:.3f}" for keep_prob in [*expected, 1.0]]
    assert "recovery" in printed
    assert "time saved:" in printed
    assert sorted(path.name for path in folder.iterdir()) == ["config.yaml", "lists"]


def test_show_takes_options_over_the_file_and_saves_plots_and_figures(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--drop.theta", "0.7", "--drop.allow_layers=[2]", "--drop.keep_layers=[3]", "--out", "out/schedule")
    assert command("show", *options, "--config", "config.yaml") == 0
    out = folder / "out" / "schedule"
    assert sorted(path.name for path in out.iterdir()) == ["schedule.json", "schedule.png"]
    assert png_size(out / "schedule.png") == (1500, 1200)
    content = json.loads((out / "schedule.json").read_text())
    assert content["drop"]["theta"] == 0.7
    assert content["layers"]["listed"][:4] == ["Block", "Allow", "Keep", ""]
    assert np.array(content["layers"]["keep_probs"]).shape == (8, LAYERS)
    assert content["forecast"]["total"]["last"] == ITERATIONS
    assert 0.5 < content["layers_share"] < 1.0
    assert layer_lines(capsys.readouterr().out)[2][0] == "Allow"


def test_show_does_not_overwrite_its_config_or_the_sensitivity_file(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "schedule.json").hardlink_to(folder / "lists" / "gaps.json")
    assert "is an input" in refused(capsys, "show", "--config", "config.yaml", "--out", ".")
    (folder / "schedule.json").unlink()
    (folder / "config.yaml").rename(folder / "schedule.json")
    before = (folder / "schedule.json").read_bytes()
    assert "is an input" in refused(capsys, "show", "--config=schedule.json", "--out", str(folder))
    assert (folder / "schedule.json").read_bytes() == before


def test_show_is_for_any_number_of_processes_and_needs_no_torch(folder: Path) -> None:
    parallel = ["--parallel.tensor_model_parallel_size=2", "--parallel.pipeline_model_parallel_size=4"]
    program = f"""
import sys
sys.modules["torch"] = sys.modules["megatron"] = None  # importing them raises ImportError
from megatron_sbld.cli import main as cli
cli.main(["schedule", "show", "--config", "config.yaml", *{parallel}])
"""
    root = Path(cli.__file__).resolve().parents[2]
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, env={"PYTHONPATH": str(root)}
    )
    assert result.returncode == 0, result.stderr
    assert "layer 12" in result.stdout


def test_show_tells_the_stages_and_a_placement_that_can_be_pasted(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--config", "config.yaml", "--parallel.pipeline_model_parallel_size=3", "--drop.sampler=balanced"]
    options += ["--drop.block_layers=[1,2,3,4,5,6]", "--drop.allow_layers=[9,10,11,12]", "--drop.recovery_fraction=0"]
    assert command("show", *options, "--out", "out") == 0
    printed = capsys.readouterr().out
    assert [line.split()[2] for line in printed.splitlines() if line.startswith("stage ")] == ["1-4", "5-8", "9-12"]
    line = next(line for line in printed.splitlines() if "pipeline_model_parallel_layout" in line)
    stages = json.loads((folder / "out" / "schedule.json").read_text())["stages"]
    assert yaml.safe_load(line) == {"parallel.pipeline_model_parallel_layout": stages["proposal"]}

    assert command("show", *options, f"--parallel.pipeline_model_parallel_layout={stages['proposal']}") == 0
    printed = capsys.readouterr().out
    assert "pipeline_model_parallel_layout" not in printed
    assert [line.split()[2] for line in printed.splitlines() if line.startswith("stage ")] != ["1-4", "5-8", "9-12"]


def test_show_tells_when_layers_begin_and_hides_theta_where_it_means_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    staged = ["--drop.policy=staged", "--drop.recovery_fraction=0", "--drop.stages=[[0.5,2],[0.75,6],[1.0,12]]"]
    options = [*staged, "--parallel.pipeline_model_parallel_size=2", "--config", "config.yaml", "--out", "out"]
    assert command("show", *options) == 0
    printed = capsys.readouterr().out
    assert not [line for line in printed.splitlines() if "theta" in line.split()]
    header = next(line.split() for line in printed.splitlines() if line.startswith("iteration "))
    assert header == ["iteration", "begins", "1", "200", "300", "400"]
    lines = layer_lines(printed)
    assert lines[1] == ["1", *["1.000"] * 4]
    assert lines[2] == ["301", *["0.000"] * 3, "1.000"]
    assert lines[3] == ["201", *["0.000"] * 2, "1.000", "1.000"]
    assert next(line for line in printed.splitlines() if line.startswith("rank 2")).split() == [
        *["rank", "2", "7-12", "1.00", "3.00", "6.00", "2.75"]
    ]
    content = json.loads((folder / "out" / "schedule.json").read_text())
    assert content["layers"]["begins"][:3] == [1, 301, 201]
    assert set(content["layers"]["theta"]) == {None}
    assert content["stages"]["begun"][1] == [[1, 3, 5], [7, 9, 11]]
    assert [phase["begun_layers"] for phase in content["forecast"]["phases"]] == [2, 6, 12]
    assert png_size(folder / "out" / "schedule.png") == (1500, 1200)


def test_show_has_no_stages_where_there_is_one(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("show", "--config", "config.yaml", "--out", "out") == 0
    assert "stage 1" not in capsys.readouterr().out
    assert json.loads((folder / "out" / "schedule.json").read_text())["stages"] is None


@pytest.mark.parametrize("policy", ["pld", "layerdrop", "stochastic_depth"])
@pytest.mark.parametrize("train_iters", [1, 3, 500_000])
def test_show_shows_every_policy_and_length(
    folder: Path, capsys: pytest.CaptureFixture[str], policy: str, train_iters: int
) -> None:
    args = ["--model.num_layers=12", f"--training.train_iters={train_iters}", f"--drop.policy={policy}"]
    assert command("show", *args, "--out", "out") == 0
    assert len(layer_lines(capsys.readouterr().out)) == LAYERS
    assert png_size(folder / "out" / "schedule.png") == (1500, 1200)


def test_show_without_the_tokenizer_knows_no_gain(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("show", "--config", "config.yaml", "--data.tokenizer", "gone.json") == 0
    printed = capsys.readouterr().out
    assert "gains are not known, since data.tokenizer = 'gone.json' is not found here" in printed
    assert "time saved" not in printed


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "training.train_iters = None does not work with training.train_samples = None"),
        (["--training.train_iters", "10"], "drop.policy = 'none' is not allowed: it drops nothing and has no schedule"),
        (["--config", "config.yaml", "--drop.tehta", "0.5"], "unknown option --drop.tehta; did you mean theta"),
        (["--config", "config.yaml", "--otu", "x"], "unknown option --otu"),
        (["--config", "config.yaml", "--drop.theta", "1.5"], "drop.theta = 1.5 is not allowed"),
        (["--config", "config.yaml", "--model.num_layers", "24"], "is for 12 layers, but the model has 24"),
        (["--config", "config.yaml", "--drop.sensitivity", "gaps.json"], "gaps.json cannot be read: No such file"),
        (
            ["--config", "config.yaml", "--model.num_layers", "0"],
            "model.num_layers = 0 is not allowed: it must be an integer of at least 1",
        ),
        (["--config", "config.yaml", "--parallel.tensor_model_parallel_size", "0"], "must be an integer of at least 1"),
        (["--config", "config.yaml", "--parallel.tensor_model_parallel_size", "3"], "must be divisible by"),
        (["--config", "config.yaml", "--drop.block_layers", "[1.5]"], "drop.block_layers"),
        (["--config", "config.yaml", "--drop.allow_layers", "[true]"], "drop.allow_layers"),
        (["--config", "config.yaml", "--drop.block_layers", "3"], "drop.block_layers"),
        (["--config", "config.yaml", "--drop.block_layers", "[13]"], "drop.block_layers entry = 13"),
    ],
)
def test_show_refuses_what_pretrain_would(
    folder: Path, capsys: pytest.CaptureFixture[str], args: list[str], message: str
) -> None:
    assert message in refused(capsys, "show", *args)


def test_help_says_how_to_use_each(capsys: pytest.CaptureFixture[str]) -> None:
    for args, expected in (
        (["--help"], "show   print and plot a config's keep probabilities"),
        ([], "fit    find PWEGD's parameters"),
        (["show", "--help"], "--drop.recovery_fraction"),
        (["fit", "--help"], "--peak-theta"),
    ):
        assert command(*args) == 0
        assert expected in capsys.readouterr().out
    assert "unknown command 'schedule plot'; allowed are show, fit" in refused(capsys, "plot")


# fit


def loss_curve(iterations: np.ndarray, seed: int) -> np.ndarray:
    return 3.0 + 6.0 * iterations**-0.4 + 0.02 * np.random.default_rng(seed).normal(size=len(iterations))


def write_run(folder: Path, losses: np.ndarray, first: int = 1, keep_probs: Any = None, **sections: Any) -> str:
    """A run folder with one row an iteration, as the trainer writes it."""
    folder.mkdir(parents=True)
    given = {"model": MODEL, "data": DataConfig(train_data_path=["corpus"]), **sections}
    config = dataclasses.asdict(Config(training=given.pop("training", TrainingConfig(train_iters=ITERATIONS)), **given))
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    means = np.ones(len(losses)) if keep_probs is None else keep_probs
    rows = [
        {"iteration": first + i, "loss": loss, "mean_keep_prob": mean}
        for i, (loss, mean) in enumerate(zip(losses.tolist(), means.tolist(), strict=True))
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def dropped_losses(baseline: np.ndarray, seed: int = 1) -> np.ndarray:
    """0.4 above the baseline at a peak at iteration 60; k = 3, b = 60."""
    t = np.arange(1, len(baseline) + 1)
    gap = 0.4 * pwegd_density(t, 3.0, 60.0) / pwegd_density(60.0, 3.0, 60.0)
    return baseline + gap + 0.03 * np.random.default_rng(seed).normal(size=len(t))


def run_pair(folder: Path, dropped: dict[str, Any] | None = None, **sections: Any) -> tuple[str, str]:
    """A baseline and a PLD run; `sections` are both runs', `dropped` the second's."""
    baseline = loss_curve(np.arange(1, ITERATIONS + 1), seed=0)
    keep_probs = np.full(ITERATIONS, 0.7)
    second = {"drop": DropConfig(policy="pld", theta=0.5), "keep_probs": keep_probs, **sections, **(dropped or {})}
    losses = second.pop("losses", dropped_losses(baseline))
    return write_run(folder / "full", baseline, **sections), write_run(folder / "pld", losses, **second)


def test_fit_writes_what_a_config_can_take(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    full, pld = run_pair(tmp_path)
    out = tmp_path / "out" / "fit"
    assert command("fit", full, pld, "--peak-theta", "0.8", "--out", str(out)) == 0
    printed = capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == ["fit.json", "fit.png", "schedule.yaml"]
    text = (out / "schedule.yaml").read_text()
    assert text in printed
    fields = yaml.safe_load(text)["drop"]
    assert (fields["schedule"], fields["theta"], fields["c"]) == ("pwegd", 0.5, 1.0)
    assert "Only a + c enters" in text
    schedule = build_schedule(DropConfig(policy="layerdrop", **fields), ITERATIONS)
    assert schedule.peak_iteration == pytest.approx(60.0, rel=0.1)
    assert schedule(schedule.peak_iteration) == pytest.approx(0.8, abs=1e-4)
    assert png_size(out / "fit.png") == (1500, 825)


def test_fit_does_not_overwrite_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    full, pld = run_pair(tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    (out / "schedule.yaml").symlink_to(Path(full) / "config.yaml")
    before = (Path(full) / "config.yaml").read_bytes()
    assert "is an input" in refused(capsys, "fit", full, pld, "--peak-theta", "0.8", "--out", str(out))
    assert (Path(full) / "config.yaml").read_bytes() == before


def test_the_printed_section_is_a_config_of_pretrain(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    full, pld = run_pair(tmp_path)
    command("fit", full, pld, "--peak-theta", "0.8", "--theta", "0.6", "--out", str(tmp_path / "out"))
    fitted = str(tmp_path / "out" / "schedule.yaml")
    args = ["--config", fitted, "--drop.policy", "pld", "--training.train_iters", "400", "--model.num_layers", "12"]
    assert command("show", *args) == 0
    assert "peak" in capsys.readouterr().out


def test_the_json_has_every_fit_and_where_it_came_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    full, pld = run_pair(tmp_path)
    command("fit", full, pld, "--peak-theta", "0.8", "--theta", "0.6", "--window", "21", "--out", str(tmp_path / "out"))
    content = json.loads((tmp_path / "out" / "fit.json").read_text())
    assert [content[key] for key in ("baseline", "dropped", "iterations", "window", "theta", "peak_theta")] == [
        *(full, pld, [1, ITERATIONS], 21, 0.6, 0.8)
    ]
    assert [fit["name"] for fit in content["fits"]] == ["pwegd", "exponential", "weibull", "lognormal"]
    pwegd, exponential = content["fits"][:2]
    assert pwegd["parameters"].keys() == {"height", "k", "b", "epsilon"}
    assert pwegd["rmse"] < exponential["rmse"] / 3
    assert pwegd["aic"] < exponential["aic"]
    assert content["schedule"].keys() == {"a", "b", "c", "epsilon", "eta"}
    printed = capsys.readouterr().out
    table = {line.split()[0]: line.split() for line in printed.splitlines() if line and not line.startswith("-")}
    assert float(table["pwegd"][3]) < 10.0 < float(table["exponential"][3])


def test_only_common_iterations_count_and_the_recovery_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    baseline = loss_curve(np.arange(1, ITERATIONS + 1), seed=0)
    losses = dropped_losses(baseline)
    losses[360:] = baseline[360:] - 1.0
    keep_probs = np.where(np.arange(ITERATIONS) < 360, 0.7, 1.0)
    full = write_run(tmp_path / "full", baseline)
    drop = DropConfig(policy="pld", recovery_fraction=0.1)
    pld = write_run(tmp_path / "pld", losses[4:], first=5, keep_probs=keep_probs[4:], drop=drop)
    assert command("fit", full, pld, "--peak-theta", "0.95", "--out", str(tmp_path / "out")) == 0
    content = json.loads((tmp_path / "out" / "fit.json").read_text())
    assert content["iterations"] == [5, 360]
    assert content["theta"] == 0.9
    assert content["fits"][0]["r_squared"] > 0.9
    assert "recovery at full depth, after iteration 360, is left out" in capsys.readouterr().out


def test_a_run_of_another_length_is_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    full, pld = run_pair(tmp_path, {"training": TrainingConfig(train_iters=900)})
    assert command("fit", full, pld, "--peak-theta", "0.8") == 0
    assert "training.train_iters differs (900, not 400)" in capsys.readouterr().out


def test_a_run_that_was_resumed_with_other_settings_is_noted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full, pld = run_pair(tmp_path)
    change = {"iteration": 101, "before": "pld", "after": "none"}
    rows = [{**change, "field": field} for field in ("drop.policy", "parallel.tensor_model_parallel_size")]
    (tmp_path / "full" / "changes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert command("fit", full, pld, "--peak-theta", "0.8") == 0
    printed = capsys.readouterr().out
    noted = "full was resumed with other settings; the last ones are used: drop.policy was pld up to iteration 100"
    assert noted in printed
    assert "parallel" not in printed, "another layout has the same losses"


def other_model(folder: Path) -> tuple[str, str]:
    return run_pair(folder, {"model": dataclasses.replace(MODEL, hidden_size=128)})


def other_data(folder: Path) -> tuple[str, str]:
    return run_pair(folder, {"data": DataConfig(train_data_path=["books"])})


def other_seed(folder: Path) -> tuple[str, str]:
    return run_pair(folder, {"training": TrainingConfig(train_iters=ITERATIONS, seed=7)})


def other_learning_rate(folder: Path) -> tuple[str, str]:
    return run_pair(folder, {"optimizer": OptimizerConfig(lr=1.0)})


def nothing_dropped(folder: Path) -> tuple[str, str]:
    return run_pair(folder, {"drop": DropConfig()})


def both_dropped(folder: Path) -> tuple[str, str]:
    return run_pair(folder, drop=DropConfig(policy="pld"))


def dropping_baseline(folder: Path) -> tuple[str, str]:
    return run_pair(folder, {"drop": DropConfig(policy="pld")}, drop=DropConfig(policy="layerdrop"))


def swapped(folder: Path) -> tuple[str, str]:
    full, pld = run_pair(folder)
    return pld, full


def twice(folder: Path) -> tuple[str, str]:
    full, _ = run_pair(folder)
    return full, full


def missing(folder: Path) -> tuple[str, str]:
    full, _ = run_pair(folder)
    return full, str(folder / "nowhere")


def no_overlap(folder: Path) -> tuple[str, str]:
    return run_pair(folder, {"first": 1001})


def all_kept(folder: Path) -> tuple[str, str]:
    return run_pair(folder, {"keep_probs": np.ones(ITERATIONS)})


def too_short(folder: Path) -> tuple[str, str]:
    return run_pair(folder, {"first": ITERATIONS - 30})


def diverged(folder: Path) -> tuple[str, str]:
    losses = dropped_losses(loss_curve(np.arange(1, ITERATIONS + 1), seed=0))
    losses[99] = np.inf
    return run_pair(folder, {"losses": losses})


def no_gap(folder: Path) -> tuple[str, str]:
    return run_pair(folder, {"losses": loss_curve(np.arange(1, ITERATIONS + 1), seed=9)})


def still_rising(folder: Path) -> tuple[str, str]:
    t = np.arange(1, ITERATIONS + 1)
    return run_pair(folder, {"losses": loss_curve(t, seed=9) + 0.001 * t})


def falling(folder: Path) -> tuple[str, str]:
    t = np.arange(1, ITERATIONS + 1)
    return run_pair(folder, {"losses": loss_curve(t, seed=9) + np.exp(-t / 100)})


MISTAKES = {
    other_model: "pld differs from full beside dropping, in model.hidden_size (128, not 64)",
    other_data: "in data.train_data_path (['books'], not ['corpus'])",
    other_seed: "in training.seed (7, not 1234)",
    other_learning_rate: "in optimizer.lr (1.0, not 0.0003)",
    nothing_dropped: "both runs have drop.policy none: the baseline must have none, and the other must drop layers",
    both_dropped: "both runs have drop.policy pld",
    dropping_baseline: "full has drop.policy layerdrop: the baseline must have none",
    swapped: "pld has drop.policy pld: the baseline must have none; the runs seem to be swapped",
    twice: "is given twice",
    missing: "nowhere does not exist",
    no_overlap: "no iteration in common: full has 1 to 400, pld has 1001 to 1400",
    all_kept: "pld kept every layer",
    too_short: "too short: 31 iterations",
    diverged: "gap at iteration 100 is not finite",
    no_gap: "never significantly above 0",
    still_rising: "no peak: it is still 0.3",
    falling: "no peak: it falls from its start",
}


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_runs_that_cannot_be_fitted_are_refused_with_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], mistake: Any
) -> None:
    out = tmp_path / "out"
    assert MISTAKES[mistake] in refused(capsys, "fit", *mistake(tmp_path), "--peak-theta", "0.95", "--out", str(out))
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "arguments are required: peak_theta"),
        (["--peak-theta", "1.5"], "peak_theta = 1.5 is not allowed: it must be a number in (0, 1]"),
        (["--peak-theta", "0.4"], "peak_theta = 0.4 is not allowed: it must be a number in [0.5, 1]"),
        (["--peak-theta", "0.8", "--theta", "0.9"], "peak_theta = 0.8 is not allowed: it must be a number in [0.9, 1]"),
        (["--peak-theta", "0.8", "--theta", "0"], "theta = 0.0 is not allowed: it must be a number in (0, 1]"),
        (["--peak-theta", "high"], '"peak_theta": Expected'),
        (["--peak-theta", "0.8", "--window", "0"], "window = 0 is not allowed"),
        (["--peak-theta", "0.8", "--window", "200"], "window = 200 is not allowed: it must be an integer in [1, 133]"),
    ],
)
def test_options_of_fit_out_of_range_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert message in refused(capsys, "fit", *run_pair(tmp_path), *options)
