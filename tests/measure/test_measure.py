"""`sensitivity measure` in one process on real text: planted sensitivities are found, and runs can be stopped."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from megatron_sbld.cli import main as cli
from megatron_sbld.config.sections import Config
from megatron_sbld.measure.options import parse_layers, parse_numbers
from megatron_sbld.measure.plan import has_optimizer_state
from megatron_sbld.measure.runs import OneLayerPolicy
from megatron_sbld.sensitivity.file import SensitivityFile
from megatron_sbld.sensitivity.measurement import MeasurementFolder
from megatron_sbld.training import model
from tests.measure.measure_helpers import measure, state_is_restored, values
from tests.training.trainer_helpers import (
    ITERATIONS,
    LAYERS,
    NO_DROPOUT,
    change,
    losses,
    prepare_corpus,
    run_here,
    tiny_run,
    tiny_sections,
)

N = 6
RUN = {"train_iters": 1000, "micro_batch_size": 4}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def config(tmp_path: Path, corpus: Path) -> Config:
    """A run with dropout, of which a measurement is a small part."""
    return tiny_run(tmp_path / "run", corpus, training=RUN)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A finished measurement of the tiny run."""
    folder = tmp_path_factory.mktemp("whole")
    assert measure(tiny_run(folder / "run", corpus, training=RUN), folder / "out", iterations=N) == 0
    return folder / "out"


SNAPSHOTS: dict[str, dict[str, dict[str, Any]]] = {
    "fp32": {},
    "bf16": {"training": {"precision": "bf16"}},
    "fp16, loss scale moves": {
        "training": {"precision": "fp16", "initial_loss_scale": 2.0**12, "loss_scale_window": 2, "hysteresis": 1}
    },
    "ramp of the batch size": {"training": {"rampup_batch_size": [4, 4, 12]}},
    "worker processes": {"data": {"num_workers": 1}},
    "distributed optimizer": {"parallel": {"use_distributed_optimizer": True}},
}


@pytest.mark.parametrize(
    ("name", "before"), [("fp32", 0), ("distributed optimizer", 0), *((name, 2) for name in SNAPSHOTS)]
)
def test_a_snapshot_restores_the_run_bit_for_bit(config: Config, name: str, before: int) -> None:
    assert state_is_restored((change(config, **SNAPSHOTS[name]), before)) == ""


def test_the_policy_drops_the_one_layer_alone() -> None:
    policy = OneLayerPolicy(4, layer=3, drop_prob=0.9)
    np.testing.assert_allclose(policy.keep_probs(1), [1, 1, 0.1, 1])
    assert policy.residual_scale == "none"


@pytest.mark.slow
def test_the_baseline_is_the_run_that_pretrain_would_make(config: Config, whole: Path, tmp_path: Path) -> None:
    """Same weights, data, schedule and dropout; and every layer's run differs from it."""
    stopped = change(config, training={"exit_after_iterations": N})
    assert run_here(stopped) == 75
    found = values(whole)
    assert found["baseline"] == losses(config.logging.run_dir)
    assert list(found) == ["baseline", *(f"layer {layer}" for layer in range(1, LAYERS + 1))]
    assert len({tuple(run) for run in found.values()}) == LAYERS + 1


@pytest.mark.slow
def test_a_second_baseline_after_other_runs_has_the_losses_of_the_first(
    config: Config, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layer 2's policy keeps all here, so its run must repeat the baseline after layer 1's has moved everything."""
    policy = OneLayerPolicy._keep_probs
    monkeypatch.setattr(
        OneLayerPolicy,
        "_keep_probs",
        lambda self, theta: np.ones(LAYERS) if self.layer == 2 else policy(self, theta),
    )
    assert measure(config, tmp_path / "out", iterations=N) == 0
    found, expected = values(tmp_path / "out"), values(whole)
    assert found["layer 2"] == found["baseline"] == expected["baseline"]
    assert found["layer 3"] == expected["layer 3"]


@pytest.mark.slow
def test_an_interrupted_measurement_goes_on_and_equals_the_uninterrupted_one(
    config: Config, whole: Path, tmp_path: Path
) -> None:
    stopping = change(config, training={"exit_after_iterations": 2 * N + 2})
    out, done = tmp_path / "out", []
    while (status := measure(stopping, out, iterations=N)) == 75:
        done.append(len(values(out)))
        assert not (out / "sensitivity.json").exists()
    assert status == 0
    assert done == [2, 4]
    assert values(out) == values(whole)
    first, second = (json.loads((folder / "sensitivity.json").read_text()) for folder in (out, whole))
    assert first["gap"] == second["gap"]
    assert first["gap_stderr"] == second["gap_stderr"]


@pytest.mark.slow
def test_a_finished_measurement_started_again_does_nothing(config: Config, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("layer-*.json")}
    assert measure(config, tmp_path / "out", iterations=N) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.slow
def test_parts_on_their_own_equal_the_whole(config: Config, whole: Path, tmp_path: Path) -> None:
    assert measure(config, tmp_path / "a", iterations=N, layers="1,4") == 0
    assert measure(config, tmp_path / "b", iterations=N, layers="2-3") == 0
    assert not (tmp_path / "a" / "sensitivity.json").exists()
    with pytest.raises(SystemExit) as ended:
        cli.main(
            ["sensitivity", "merge", str(tmp_path / "a"), str(tmp_path / "b"), "--output", str(tmp_path / "m.json")]
        )
    assert ended.value.code == 0
    merged, expected = (SensitivityFile.load(file) for file in (tmp_path / "m.json", whole / "sensitivity.json"))
    assert (merged.gap, merged.gap_stderr, merged.block) == (expected.gap, expected.gap_stderr, expected.block)


@pytest.mark.slow
def test_another_config_is_refused_by_field_and_what_does_not_matter_is_not(
    config: Config, whole: Path, tmp_path: Path
) -> None:
    shutil.copytree(whole, tmp_path / "out")
    other = change(config, optimizer={"lr": 0.02}, model={"hidden_dropout": 0.2}, drop={"decision_scope": "microbatch"})
    refused = measure(other, tmp_path / "out", iterations=N + 1)
    for field in ("optimizer.lr: 0.01 there, 0.02 now", "model.hidden_dropout", "drop.decision_scope", "--iterations"):
        assert field in str(refused)
    assert "training.seed" not in str(refused)
    alike = change(
        config,
        training={"eval_iters": 3},
        drop={"policy": "pld", "theta": 0.5},
        logging={"run_dir": str(tmp_path / "elsewhere"), "log_interval": 5},
    )
    assert measure(alike, tmp_path / "out", iterations=N) == 0
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.slow
def test_seeds_are_other_weights_and_data_and_are_averaged(config: Config, whole: Path, tmp_path: Path) -> None:
    assert measure(config, tmp_path / "out", iterations=N, seeds="1234,7") == 0
    assert values(tmp_path / "out") == values(whole)  # drop.seed is 1234 as well
    other = values(tmp_path / "out", seed=7)
    assert not set(other["baseline"]) & set(values(whole)["baseline"])
    found = SensitivityFile.load(tmp_path / "out" / "sensitivity.json")
    by_seed = found.measured_with["gaps_by_seed"]
    np.testing.assert_allclose(found.gap, np.mean([by_seed["7"], by_seed["1234"]], axis=0))
    assert found.measured_with["cost_iterations"] == 2 * (LAYERS + 1) * N
    mean_of_7 = np.subtract(other["layer 2"], other["baseline"]).mean()
    assert by_seed["7"][1] == pytest.approx(mean_of_7)


@pytest.mark.slow
def test_the_file_says_what_it_was_measured_with(whole: Path, corpus: Path) -> None:
    text = (whole / "sensitivity.json").read_text()
    about = json.loads(text)["measured_with"]
    assert str(corpus.parent) not in text
    expected = {"iterations": N, "window": N, "drop_prob": 0.9, "seeds": [1234], "cost_iterations": (LAYERS + 1) * N}
    assert {key: about[key] for key in expected} == expected
    assert about["drop"] == {
        "decision_scope": "iteration",
        "granularity": "layer",
        "residual_scale": "none",
        "dropped_update": "apply",
    }
    assert about["model"]["num_layers"] == LAYERS
    assert about["data"] == ["corpus_train"]
    assert not list(whole.glob("*.tmp"))


@pytest.mark.slow
def test_a_dropped_layer_is_updated_as_the_config_says(config: Config, whole: Path, tmp_path: Path) -> None:
    """Layer 1 runs in iterations 1 and 4: only then can it be seen what the optimizer did to it in 2 and 3."""
    assert measure(change(config, drop={"dropped_update": "freeze"}), tmp_path / "out", iterations=N) == 0
    about = json.loads((tmp_path / "out" / "sensitivity.json").read_text())["measured_with"]
    assert about["drop"]["dropped_update"] == "freeze"
    frozen, applied = values(tmp_path / "out"), values(whole)
    assert frozen["baseline"] == applied["baseline"]
    assert frozen["layer 1"][:3] == applied["layer 1"][:3]
    assert frozen["layer 1"][3] != applied["layer 1"][3]


# Layers whose importance is known: 1 is the only one that learns, 5 disturbs, the others are identities.
PLANTED_LAYERS, LEARNING, DISTURBING = 6, 1, 5
PLANTED_RUN: dict[str, dict[str, Any]] = {
    "model": {**NO_DROPOUT, "num_layers": PLANTED_LAYERS, "init_method_std": 0.1},
    "training": {"train_iters": 5000, "micro_batch_size": 4},
    "drop": {"block_fraction": 0.17, "allow_fraction": 0.34},
}


@pytest.fixture
def planted(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """Only layer 1 and the last norm learn: embeddings are frozen, so no other way leads to the next token."""
    build = model._build_chunk

    def build_planted(*args: Any) -> torch.nn.Module:
        chunk = build(*args)
        generator = torch.Generator().manual_seed(1)
        frozen = [*chunk.embedding.parameters()]
        for layer in chunk.decoder.layers:
            if layer.layer_number == LEARNING:
                continue
            frozen += layer.parameters()
            for projection in (layer.self_attention.linear_proj, layer.mlp.linear_fc2):
                noise = torch.randn(projection.weight.shape, generator=generator)
                projection.weight.data.copy_(noise if layer.layer_number == DISTURBING else torch.zeros_like(noise))
        for param in frozen:
            param.requires_grad_(False)
        return chunk

    monkeypatch.setattr(model, "_build_chunk", build_planted)
    return tiny_run(tmp_path / "run", corpus, **PLANTED_RUN)


IDENTITIES = [layer for layer in range(1, PLANTED_LAYERS + 1) if layer not in (LEARNING, DISTURBING)]


def gaps(out: Path) -> tuple[SensitivityFile, dict[int, float]]:
    found = SensitivityFile.load(out / "sensitivity.json")
    return found, dict(enumerate(found.gap, start=1))


@pytest.mark.slow
def test_planted_sensitivities_are_found_and_fill_the_lists(planted: Config, tmp_path: Path) -> None:
    assert measure(planted, tmp_path / "out", iterations=40) == 0
    found, gap = gaps(tmp_path / "out")
    assert all(gap[layer] == 0.0 for layer in IDENTITIES)
    assert gap[LEARNING] > 5 * found.gap_stderr[LEARNING - 1]
    assert gap[DISTURBING] < -3 * found.gap_stderr[DISTURBING - 1]
    assert found.block == (LEARNING,)
    assert DISTURBING in found.allow
    assert len(found.allow) == 2


@pytest.mark.slow
@pytest.mark.parametrize("method", ["leave_one_out", "block_influence"])
def test_the_cheaper_estimates_find_what_does_nothing_but_not_what_does_harm(
    planted: Config, tmp_path: Path, method: str
) -> None:
    """Their limit, as `--help` and the file say: a model that was trained with a layer misses it, whatever it is."""
    assert measure(planted, tmp_path / "out", method=method, iterations=40, batches=10) == 0
    found, gap = gaps(tmp_path / "out")
    assert all(gap[layer] == pytest.approx(0.0, abs=1e-6) for layer in IDENTITIES)
    assert gap[LEARNING] > 5 * found.gap_stderr[LEARNING - 1]
    assert gap[DISTURBING] > 0.0
    assert found.measured_with["cost_iterations"] == pytest.approx(
        40 + 10 / 3 * (7 if method[0] == "l" else 1), abs=0.1
    )
    assert "Allow" in found.measured_with["note"]
    assert "drop" not in found.measured_with


@pytest.mark.slow
def test_leave_one_out_evaluates_what_pretrain_would_have_trained_and_goes_on_where_it_was(
    config: Config, tmp_path: Path
) -> None:
    """Its batches come next in the run's order, from a checkpoint as after training; layers can be parts."""
    saved = change(config, training={"exit_after_iterations": N})
    assert run_here(saved) == 75
    options = {"method": "leave_one_out", "batches": 3}
    assert measure(config, tmp_path / "trained", iterations=N, **options) == 0
    assert measure(config, tmp_path / "loaded", load=config.logging.run_dir, **options) == 0
    assert values(tmp_path / "loaded") == values(tmp_path / "trained")
    assert measure(config, tmp_path / "part", load=config.logging.run_dir, layers="2", **options) == 0
    assert values(tmp_path / "part")["layer 2"] == values(tmp_path / "loaded")["layer 2"]


@pytest.mark.slow
def test_from_a_checkpoint_goes_on_as_the_run_would(config: Config, tmp_path: Path) -> None:
    saved = change(config, training={"exit_after_iterations": 4})
    assert run_here(saved) == 75
    checkpoint = config.logging.run_dir
    assert has_optimizer_state(Path(checkpoint))
    shutil.copytree(checkpoint, tmp_path / "copy")
    assert measure(config, tmp_path / "out", load=tmp_path / "copy", iterations=3) == 0
    assert run_here(change(config, training={"exit_after_iterations": 3})) == 75
    assert values(tmp_path / "out")["baseline"] == losses(checkpoint)[4:7]
    about = SensitivityFile.load(tmp_path / "out" / "sensitivity.json").measured_with["checkpoint"]
    assert (about["iteration"], about["whole_state"]) == (4, True)


@pytest.mark.slow
def test_a_config_with_stages_is_measured_at_full_depth_with_what_they_decide(config: Config, tmp_path: Path) -> None:
    stages = {"policy": "staged", "stages": [[0.5, 2], [1.0, 4]], "balance_stages": 2}
    staged = change(config, drop=stages, logging={"run_dir": str(tmp_path / "run")})
    assert measure(staged, tmp_path / "measured", iterations=3, layers="1") == 0
    about = MeasurementFolder.read(tmp_path / "measured").request.about
    assert about["drop"]["dropped_update"] == "freeze"
    assert run_here(change(staged, training={"exit_after_iterations": 2})) == 75
    refused = measure(staged, tmp_path / "growing", load=tmp_path / "run", iterations=3)
    assert "still growing, and 2 of its 4 layers had begun: measure from a checkpoint in which all have" in str(refused)


@pytest.mark.slow
def test_weights_without_optimizer_state_start_at_iteration_zero_and_are_noted(
    config: Config, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """As in a checkpoint of Megatron-LM, whose optimizer state has other names."""
    assert run_here(change(config, training={"exit_after_iterations": 2})) == 75
    checkpoint = Path(config.logging.run_dir) / "checkpoints" / "iter_0000002"
    (checkpoint / "checkpoint.json").unlink()
    assert not has_optimizer_state(checkpoint)
    lines = change(config, logging={"progress": "lines"})
    assert measure(lines, tmp_path / "out", load=checkpoint, iterations=3) == 0
    assert (
        "has no optimizer state that can be read; its weights are restored, from iteration 0" in capfd.readouterr().err
    )
    assert not set(values(tmp_path / "out")["baseline"]) & set(losses(config.logging.run_dir))


@pytest.mark.slow
def test_a_run_ends_early_once_its_rank_is_settled(planted: Config, tmp_path: Path) -> None:
    """Between the two whose rank decides the lists, which run to their end; and again for a part that is merged."""
    planted = change(planted, drop={"allow_fraction": 0.17})
    options = {"iterations": 40, "early_stop": True}
    assert measure(planted, tmp_path / "out", layers="1-2,5", **options) == 0
    runs = values(tmp_path / "out")
    assert {len(runs[name]) for name in ("baseline", "layer 1", "layer 5")} == {40}
    assert 10 <= len(runs["layer 2"]) < 40
    found = MeasurementFolder.read(tmp_path / "out")
    low, middle, high = (found.gap(1234, layer) for layer in (DISTURBING, 2, LEARNING))
    assert low.mean < middle.mean < high.mean
    assert middle.mean == pytest.approx(0.0, abs=0.2 * (high.mean - low.mean))


@pytest.mark.slow
def test_runs_that_cannot_be_told_apart_do_not_end_early(planted: Config, tmp_path: Path) -> None:
    layers = ",".join(map(str, IDENTITIES[:3]))  # whose losses are equal, bit for bit
    assert measure(planted, tmp_path / "out", layers=layers, iterations=12, window=4, early_stop=True) == 0
    assert {len(run) for run in values(tmp_path / "out").values()} == {12}


def test_the_share_of_the_training_run_is_printed_and_too_much_warns(
    config: Config, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    config = change(config, training={"train_iters": 100}, logging={"progress": "lines"})
    assert measure(config, tmp_path / "out", iterations=2) == 0
    printed = capfd.readouterr().err
    assert "costs 10 iterations, 10.0% of a training run of 100" in printed
    assert "run 1/5  baseline 1/2  loss " in printed
    assert "run 3/5  layer 2 2/2  gap so far " in printed
    assert "run 5/5 done: layer 4, gap " in printed
    assert "above 5 %: no number of iterations would fit" in caplog.text
    config = change(config, training={"train_iters": 400})
    assert measure(config, tmp_path / "more", iterations=5) == 0
    assert "--iterations 4 would fit" in caplog.text


def test_progress_none_prints_nothing(config: Config, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert measure(config, tmp_path / "out", iterations=2, layers="1") == 0
    assert capfd.readouterr().err == ""


OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"iterations": 1}, "--iterations = 1"),
    ({"iterations": 2000}, r"--iterations 2000 from iteration 0 on need a run of 2000 iterations, .* has 1000"),
    ({"drop_prob": 0.0}, r"--drop_prob = 0.0 is not allowed: .* \(0, 1\]"),
    ({"drop_prob": 1.5}, "--drop_prob = 1.5"),
    ({"layers": "0-2"}, "--layers 0-2: entry = 0"),
    ({"layers": "1,2-9"}, r"--layers 1,2-9: entry = 9 .* \[1, 4\]"),
    ({"layers": "3-1"}, "'3-1' must ascend"),
    ({"layers": "1,1"}, "only once"),
    ({"layers": "one"}, "'one' is not a number or a range"),
    ({"layers": "3/2"}, r"--layers 3/2: part = 3 .* \[1, 2\]"),
    ({"layers": "1/5"}, r"--layers 1/5: parts = 5 .* \[1, 4\]"),
    ({"layers": "1/two"}, "--layers 1/two is not allowed: a part is written as 2/8"),
    ({"seeds": "1,x"}, "--seeds 1,x is not allowed"),
    ({"window": 700}, "window = 700"),
    ({"batches": 3}, "--batches is not used by --method train"),
    ({"method": "leave_one_out", "drop_prob": 0.5}, "--drop_prob is not used by --method leave_one_out"),
    ({"method": "block_influence", "early_stop": True}, "--early_stop is not used by --method block_influence"),
    ({"method": "leave_one_out", "iterations": 0}, "--iterations = 0"),
    ({"method": "leave_one_out", "iterations": 990}, "--iterations 990 and --batches 40"),
]


@pytest.mark.parametrize(("options", "message"), OPTIONS)
def test_options_that_cannot_work_are_refused_before_anything_is_made(
    config: Config, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    refused = measure(config, tmp_path / "out", **options)
    with pytest.raises(ValueError, match=message):
        raise ValueError(refused)
    assert not (tmp_path / "out").exists()


def test_a_limit_under_which_no_run_would_end_is_refused(config: Config, tmp_path: Path) -> None:
    refused = measure(change(config, training={"exit_after_iterations": 3}), tmp_path / "out", iterations=N)
    assert "training.exit_after_iterations = 3: must be at least --iterations 6" in str(refused)


def test_numbers_are_given_as_ranges() -> None:
    assert parse_numbers("--layers", "7, 1-3", 1, 8) == [1, 2, 3, 7]
    assert parse_numbers("--layers", None, 1, 8) == []


@pytest.mark.parametrize("parts", [1, 3, 8])
def test_parts_have_every_layer_once(parts: int) -> None:
    layers = [parse_layers(f"{part}/{parts}", 8) for part in range(1, parts + 1)]
    assert sorted(itertools.chain(*layers)) == parse_layers(None, 8) == list(range(1, 9))
    assert max(map(len, layers)) - min(map(len, layers)) <= 1


def write(folder: Path, sections: dict[str, Any]) -> str:
    (folder / "config.yaml").write_text(yaml.safe_dump(sections))
    return str(folder / "config.yaml")


@pytest.mark.slow
def test_the_command_writes_file_and_plot_and_prints_the_table(
    corpus: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, tiny_sections(tmp_path / "run", corpus, training={"train_iters": 1000}))
    out = tmp_path / "out"
    arguments = ["--out", str(out), "--training.micro_batch_size", "4", "--config", path, "--iterations", str(N)]
    with pytest.raises(SystemExit) as ended:
        cli.main(["sensitivity", "measure", *arguments])
    assert ended.value.code == 0
    assert (out / "sensitivity.png").read_bytes().startswith(b"\x89PNG")
    assert "sensitivity" in capsys.readouterr().out
    found, expected = (SensitivityFile.load(folder / "sensitivity.json") for folder in (out, whole))
    assert found.gap == expected.gap
    assert found.measured_with["command"] == " ".join(["megatron-sbld", "sensitivity", "measure", *arguments])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--iteration", "3"], "unknown option --iteration; did you mean iterations"),
        (["--out", "x", "--method", "guess"], "method"),
        (["--out", "x", "--optimizer.lrr", "3"], "unknown option --optimizer.lrr; did you mean lr"),
        ([], "out"),
        (["--out", "x"], "training.train_iters = None"),
        (["--out", "x", "--training.train_iters", "600", "--data.train_data_path", "[nowhere]"], "nowhere.idx"),
        (["--out", "x", "--from", "nowhere"], "training.train_iters = None"),
    ],
)
def test_mistakes_on_the_command_line_end_in_one_message(
    capsys: pytest.CaptureFixture[str], args: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["sensitivity", "measure", *args])
    printed = capsys.readouterr().err
    assert ended.value.code == cli.EXIT_MISTAKE
    assert message in " ".join(printed.split())
    assert "Traceback" not in printed


def test_a_checkpoint_that_is_none_is_refused(config: Config, tmp_path: Path) -> None:
    assert "not a checkpoint of megatron-sbld" in str(measure(config, tmp_path / "out", load=tmp_path, iterations=3))


@pytest.mark.slow
def test_sigterm_ends_the_run_at_the_next_iteration_and_the_next_call_goes_on(
    config: Config, corpus: Path, tmp_path: Path
) -> None:
    path = write(tmp_path, tiny_sections(tmp_path / "run", corpus, training={**RUN, "train_iters": 5000}))
    out, iterations = tmp_path / "out", 40
    command = [sys.executable, "-m", "megatron_sbld", "sensitivity", "measure", "--config", path]
    command += ["--out", str(out), "--layers", "1-2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([*command, "--iterations", str(iterations)], stdout=log, stderr=log, env=environment)
        try:
            deadline = time.monotonic() + 240
            while not (out / "seed-1234" / "baseline.json").exists():
                assert process.poll() is None, (tmp_path / "log").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.01)
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 75, (tmp_path / "log").read_text()
        finally:
            process.kill()
    done = values(out)
    assert "layer 2" not in done
    config = change(config, training={"train_iters": 5000})
    assert measure(config, out, iterations=iterations, layers="1-2") == 0
    assert {name: run for name, run in values(out).items() if name in done} == done
    assert len(values(out)["layer 2"]) == iterations


def test_the_run_of_the_config_is_left_alone(config: Config, tmp_path: Path) -> None:
    assert run_here(change(config, training={"exit_after_iterations": ITERATIONS})) == 75
    before = sorted(path for path in Path(config.logging.run_dir).rglob("*"))
    assert measure(config, tmp_path / "out", iterations=2, layers="1") == 0
    assert sorted(path for path in Path(config.logging.run_dir).rglob("*")) == before


def test_all_runs_of_a_measurement_have_the_rate_of_their_iterations(config: Config, tmp_path: Path) -> None:
    """By layer-tokens the run without a layer would have another one than the baseline, also behind a checkpoint."""
    driven = change(config, drop={"policy": "layerdrop", "theta": 0.5}, optimizer={"lr_schedule_by": "layer_tokens"})
    assert run_here(change(driven, training={"exit_after_iterations": 2})) == 75
    by_iterations = change(driven, optimizer={"lr_schedule_by": "iterations"})
    for load in (None, driven.logging.run_dir):
        found = []
        for name, case in {"driven": driven, "by iterations": by_iterations}.items():
            out = tmp_path / f"{name} from {'checkpoint' if load else 'nothing'}"
            assert measure(case, out, load, iterations=3, layers="1") == 0
            found.append(values(out))
        assert found[0] == found[1]
