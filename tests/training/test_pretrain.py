"""`pretrain` in one process on real text: resumed, switched, validated, and in every variant of model and precision."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from megatron_sbld.checkpoint import files
from megatron_sbld.config.sections import Config
from megatron_sbld.data.prepare import PrepareConfig, prepare
from megatron_sbld.method.build import build_policy
from megatron_sbld.method.decisions import draw_sample_counts
from megatron_sbld.training import run as run_module
from tests.harness import slow_but
from tests.training.trainer_helpers import (
    FULL_DEPTH,
    HALF,
    ITERATIONS,
    LAYERS,
    NO_DROPOUT,
    change,
    decisions,
    in_folder,
    losses,
    rows,
    run_here,
    sbld,
    stop_and_resume,
    tiny_run,
    train_rows,
    trained,
    valid_losses,
)

ALL_KEPT = {"policy": "layerdrop", "theta": 1.0}
RAMP = {"global_batch_size": 8, "rampup_batch_size": [2, 2, 12]}
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "plain": {},
    "scope microbatch": {"drop": {"decision_scope": "microbatch"}},
    "balanced": {"drop": {"sampler": "balanced", "balance_stages": 2}},
    "samples": {
        "drop": {"granularity": "sample", "decision_scope": "microbatch"},
        "training": {"micro_batch_size": 4, "global_batch_size": 16},
    },
    "ramp of the batch size": {"training": RAMP},
    "ramp by samples": {
        "training": {**RAMP, "train_iters": None, "train_samples": 60},
        "optimizer": {"lr_warmup_iters": 0, "lr_warmup_samples": 8},
    },
    "bf16": {"training": {"precision": "bf16"}},
    "fused residual": {"drop": {"residual": "fused"}, "training": {"precision": "bf16"}},
    "fp16": {"training": {"precision": "fp16", "initial_loss_scale": 2.0**20, "loss_scale_window": 2, "hysteresis": 1}},
    "full recomputation, scope microbatch": {
        "training": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
        "drop": {"decision_scope": "microbatch"},
    },
    "worker processes": {"data": {"num_workers": 1}},
}
# Of the variants that resume, for `make test`.
QUICK = ("plain", "balanced", "samples", "ramp of the batch size", "fused residual", "fp16")
MODELS: dict[str, dict[str, Any]] = {
    "RoPE": {"position_embedding_type": "rope", "rotary_percent": 0.5},
    "RMSNorm": {"normalization": "RMSNorm"},
    "GeLU's tanh approximation": {"activation_func": "gelu_tanh"},
    "SwiGLU without biases": {"swiglu": True, "add_bias_linear": False},
    "grouped queries": {"num_query_groups": 2},
    "untied embeddings": {"untie_embeddings_and_output_weights": True},
    "all of them": {
        "position_embedding_type": "rope",
        "normalization": "RMSNorm",
        "swiglu": True,
        "add_bias_linear": False,
        "num_query_groups": 2,
        "untie_embeddings_and_output_weights": True,
        "kv_channels": 16,
    },
}
RECOMPUTED: dict[str, dict[str, Any]] = {
    "uniform": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 2},
    "block": {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 1},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "selective, MLP": {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]},
}


@pytest.fixture
def config(tmp_path: Path, corpus: Path) -> Config:
    """A run with dropout and SBLD."""
    return tiny_run(tmp_path / "run", corpus, drop=sbld(tmp_path))


@pytest.mark.parametrize("name", slow_but(QUICK, VARIANTS))
def test_a_resumed_run_has_the_losses_of_the_uninterrupted_one(config: Config, tmp_path: Path, name: str) -> None:
    config = change(config, **VARIANTS[name])
    expected = trained(config, tmp_path / "whole")
    first, second = stop_and_resume(config, 3)
    assert run_here(first) == 75
    assert len(losses(config.logging.run_dir)) == 3
    assert run_here(second) == 0
    assert losses(config.logging.run_dir) == expected
    for field in ("kept", "lr", "grad_norm", "consumed_samples", "global_batch_size", "loss_scale", "update_skipped"):
        resumed = [row.get(field) for row in train_rows(config.logging.run_dir)]
        assert resumed == [row.get(field) for row in train_rows(tmp_path / "whole")], field


def test_the_loss_scale_of_fp16_goes_on_where_it_was(config: Config) -> None:
    config = change(config, **VARIANTS["fp16"])
    for part in stop_and_resume(config, 3):
        run_here(part)
    scales = [row["loss_scale"] for row in train_rows(config.logging.run_dir)]
    assert len(set(scales[3:])) > 1
    assert all(later in (earlier / 2, earlier, earlier * 2) for earlier, later in itertools.pairwise(scales))


def test_a_complete_run_started_again_does_nothing_and_says_so(
    config: Config, capfd: pytest.CaptureFixture[str]
) -> None:
    config = change(config, checkpoint={"save_at_end": True}, logging={"progress": "lines"})
    assert run_here(config) == 0
    before = rows(config.logging.run_dir)
    assert "iterations 1 to 8" in capfd.readouterr().err
    assert run_here(config) == 0
    error = capfd.readouterr().err
    assert "complete: 8 iterations" in error
    assert "iterations 9 to 8" not in error
    assert rows(config.logging.run_dir) == before


def test_rows_after_the_last_checkpoint_are_written_anew(config: Config, tmp_path: Path) -> None:
    """As after SIGKILL: the newest checkpoint is older than the last row, and the last row is torn."""
    expected = trained(config, tmp_path / "whole")
    stopped = change(config, training={"exit_after_iterations": 5}, checkpoint={"save_interval": 3})
    assert run_here(stopped) == 75
    folder = Path(config.logging.run_dir)
    for path in (folder / "checkpoints" / "iter_0000005").iterdir():
        path.write_bytes(path.read_bytes()[:10])
    with (folder / "metrics.jsonl").open("a") as stream:
        stream.write('{"iteration": 6, "lo')
    assert run_here(config) == 0
    assert losses(folder) == expected


@pytest.mark.parametrize("scope", [pytest.param("iteration", marks=pytest.mark.slow), "microbatch"])
@pytest.mark.parametrize("name", RECOMPUTED)
def test_recomputation_changes_no_loss(config: Config, tmp_path: Path, name: str, scope: str) -> None:
    config = change(config, drop={"decision_scope": scope})
    expected = trained(config, tmp_path / "stored")
    assert trained(change(config, training=RECOMPUTED[name]), tmp_path / "recomputed") == expected


@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_model_learns(config: Config, tmp_path: Path, name: str) -> None:
    config = change(config, model={**NO_DROPOUT, **MODELS[name]}, drop={"theta": 0.8, "peak_theta": 0.9})
    found = trained(config, tmp_path / "variant")
    assert all(math.isfinite(loss) for loss in found)
    assert found[-1] < found[0] - 0.5


@pytest.mark.slow
def test_the_fused_residual_is_for_every_policy_and_megatrons_without_dropout(config: Config, tmp_path: Path) -> None:
    for name, drop in {"none": FULL_DEPTH, "sbld": {}}.items():
        plain = change(config, model=NO_DROPOUT, drop=drop)
        fused = change(plain, drop={"residual": "fused"})
        assert trained(fused, tmp_path / f"{name} fused") == trained(plain, tmp_path / f"{name} stock")
    with_dropout = change(config, drop=FULL_DEPTH)
    fused = change(with_dropout, drop={"residual": "fused"})
    found, expected = trained(fused, tmp_path / "fused"), trained(with_dropout, tmp_path / "stock")
    assert found != expected, "the masks are others"
    np.testing.assert_allclose(found, expected, rtol=0.05)


def test_a_residual_that_cannot_be_computed_as_asked_is_refused_before_the_run(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEGATRON_SBLD_RESIDUAL", "cuda")
    outcome = run_here(change(config, drop={"residual": "fused"}))
    assert outcome.startswith("ValueError: MEGATRON_SBLD_RESIDUAL=cuda, but the tensors are on cpu")
    assert not Path(config.logging.run_dir).exists()
    assert run_here(config) == 0, "it is not asked for"


@pytest.mark.slow
def test_the_fused_loss_is_megatrons(config: Config, tmp_path: Path) -> None:
    """Where it is not asked for, a CPU does not take it."""
    config = change(config, training={"precision": "bf16"})
    stock = trained(config, tmp_path / "stock")
    fused = trained(change(config, training={"cross_entropy_loss_fusion": True}), tmp_path / "fused")
    assert trained(change(config, training={"cross_entropy_loss_fusion": False}), tmp_path / "not fused") == stock
    np.testing.assert_allclose(fused, stock, rtol=2e-3)
    assert fused != stock, "its sums have another order"


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_learns_like_fp32(config: Config, tmp_path: Path, precision: str) -> None:
    config = change(config, model=NO_DROPOUT)
    exact = trained(config, tmp_path / "fp32")
    training = {"precision": precision, "loss_scale": 1024.0 if precision == "fp16" else None}
    found = trained(change(config, training=training), tmp_path / precision)
    assert found != exact
    np.testing.assert_allclose(found, exact, rtol=0.02)


def test_a_policy_that_keeps_all_equals_no_policy_and_their_checkpoints_are_one_anothers(
    config: Config, tmp_path: Path
) -> None:
    none = change(in_folder(config, tmp_path / "none"), drop={**FULL_DEPTH, "sensitivity": None})
    kept = change(none, drop=ALL_KEPT)
    expected = trained(none, tmp_path / "none, whole")
    assert trained(kept, tmp_path / "kept, whole") == expected
    for first, second in ((none, kept), (kept, none)):
        folder = tmp_path / f"from {first.drop.policy}"
        stopped, _ = stop_and_resume(in_folder(first, folder), 4)
        assert run_here(stopped) == 75
        assert run_here(in_folder(second, folder)) == 0
        assert losses(folder) == expected
    sbld_at_one = change(config, drop={"theta_min": 1.0, "allow_layers": None, "allow_fraction": 0.0})
    assert trained(sbld_at_one, tmp_path / "sbld") == expected


@pytest.mark.slow
def test_dropping_is_switched_on_and_off_within_a_run(config: Config, tmp_path: Path) -> None:
    full = change(config, drop={**FULL_DEPTH, "sensitivity": None})
    whole = change(in_folder(full, tmp_path / "whole"), training={"train_iters": 12})
    expected = trained(whole, tmp_path / "whole")
    stop = {"train_iters": 12, "exit_after_iterations": 4}
    assert run_here(change(full, training=stop)) == 75
    assert run_here(change(full, training=stop, drop={"policy": "layerdrop", "theta": 0.3})) == 75
    assert run_here(change(full, training=stop)) == 0
    found, kept = losses(full.logging.run_dir), decisions(full.logging.run_dir)
    assert found[:4] == expected[:4]
    assert all(row == [1.0] * LAYERS for row in kept[:4] + kept[8:])
    assert any(0.0 in row for row in kept[4:8])
    assert found[8:] != expected[8:]


def test_metrics_count_the_samples_that_each_layer_ran(config: Config, tmp_path: Path) -> None:
    """The share of 8 samples: of 2 microbatches of 4, each with its own draw."""
    drop = {"granularity": "sample", "decision_scope": "microbatch"}
    assert run_here(change(config, drop=drop, training={"micro_batch_size": 4})) == 0
    policy = build_policy(config.drop, LAYERS, ITERATIONS)
    partial = 0
    for row in train_rows(config.logging.run_dir):
        counts = draw_sample_counts(
            policy.keep_probs(row["iteration"]), 4, config.drop.seed, row["iteration"], 2, scope="microbatch"
        )
        assert row["kept"] == pytest.approx((counts.sum(axis=0) / 8).tolist())
        assert row["kept_fraction"] == pytest.approx(counts.mean() / 4)
        partial += int(((counts > 0) & (counts < 4)).sum())
    assert partial > ITERATIONS


def test_with_microbatches_of_one_sample_decisions_about_samples_are_those_about_layers(
    config: Config, tmp_path: Path
) -> None:
    assert config.training.micro_batch_size == 1
    by_layer = trained(config, tmp_path / "layer")
    assert trained(change(config, drop={"granularity": "sample"}), tmp_path / "sample") == by_layer
    assert decisions(tmp_path / "sample") == decisions(tmp_path / "layer")


def test_recovery_ends_a_run_at_full_depth(config: Config, tmp_path: Path) -> None:
    config = change(config, drop={**HALF, "sensitivity": None, "recovery_fraction": 0.25})
    config = change(config, drop={"allow_layers": None, "peak_iteration": None, "peak_theta": None})
    trained(config, tmp_path / "run")
    kept = decisions(tmp_path / "run")
    assert any(0.0 in row for row in kept[:-2])
    assert kept[-2:] == [[1.0] * LAYERS] * 2
    assert [row["mean_keep_prob"] for row in train_rows(tmp_path / "run")] == [0.5] * 6 + [1.0] * 2


def test_validation_is_at_full_depth_and_changes_nothing(config: Config, tmp_path: Path, corpus: Path) -> None:
    expected = trained(config, tmp_path / "without")
    validated = change(config, data={"valid_data_path": [f"{corpus}_valid"]}, training={"eval_interval": 3})
    assert trained(validated, tmp_path / "with") == expected
    assert list(valid_losses(tmp_path / "with")) == [3, 6, 8]
    # With a learning rate of nothing the weights stay, so at full depth every validation gives the same.
    frozen = change(
        validated,
        optimizer={"lr": 1e-30, "min_lr": 1e-30, "weight_decay": 0.0, "lr_warmup_iters": 0},
        training={"eval_interval": 1},
    )
    trained(frozen, tmp_path / "frozen")
    assert len(set(valid_losses(tmp_path / "frozen").values())) == 1


def test_with_per_token_loss_a_run_does_not_depend_on_the_size_of_a_microbatch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With eod_mask_loss, which leaves microbatches unlike numbers of tokens; a run says which of both is in force."""
    source, prefix = tmp_path / "short.txt", str(tmp_path / "short")
    source.write_text("\n<|endoftext|>\n".join("words " * (i % 9) + f"and {i}" for i in range(300)))
    prepare(PrepareConfig(inputs=[str(source)], output=prefix, valid_fraction=0, workers=1, quiet=True))
    config = tiny_run(
        tmp_path / "run",
        tmp_path / "short",
        model=NO_DROPOUT,
        drop=HALF,
        data={"train_data_path": [str(tmp_path / "short_train")], "eod_mask_loss": True},
        logging={"progress": "lines"},
    )
    found = {}
    for per_token, size in itertools.product((True, False), (1, 4)):
        changed = {"calculate_per_token_loss": per_token, "micro_batch_size": size}
        found[per_token, size] = trained(change(config, training=changed), tmp_path / f"{per_token} {size}")
        told = capsys.readouterr().err
        assert told.count(f"training.calculate_per_token_loss: {str(per_token).lower()}, so each") == 1
        assert told.index("so each") < told.index("iteration 1/")
    np.testing.assert_allclose(found[True, 1], found[True, 4], rtol=1e-5)
    assert found[False, 1][0] == pytest.approx(found[False, 4][0], rel=1e-6), "what is reported is a mean over tokens"
    norms = {key: train_rows(tmp_path / f"{key[0]} {key[1]}")[0]["grad_norm"] for key in found}
    assert norms[True, 1] == pytest.approx(norms[True, 4], rel=1e-5)
    assert norms[False, 1] != pytest.approx(norms[False, 4], rel=1e-3)
    trained(change(config, data={"eod_mask_loss": False}), tmp_path / "all tokens")
    assert "calculate_per_token_loss" not in capsys.readouterr().err


def test_a_resumed_run_validates_like_the_uninterrupted_one(config: Config, tmp_path: Path, corpus: Path) -> None:
    config = change(config, data={"valid_data_path": [f"{corpus}_valid"]}, training={"eval_interval": 2})
    trained(config, tmp_path / "whole")
    for part in stop_and_resume(config, 4):
        run_here(part)
    assert valid_losses(config.logging.run_dir) == valid_losses(tmp_path / "whole")
    assert [row["iteration"] for row in rows(config.logging.run_dir)] == [1, 2, 2, 3, 4, 4, 5, 6, 6, 7, 8, 8]


def test_training_by_samples_takes_megatrons_steps(config: Config, tmp_path: Path) -> None:
    by_samples = change(config, **VARIANTS["ramp by samples"])
    trained(by_samples, tmp_path / "samples")
    found = [(row["global_batch_size"], row["consumed_samples"]) for row in train_rows(tmp_path / "samples")]
    # 12 samples of ramp in 3 steps of 4 samples, from 2 up to 8.
    sizes = [2, 2, 4, 6, 8, 8, 8, 8, 8]
    assert found == list(zip(sizes, np.cumsum(sizes).tolist(), strict=True))


def test_the_same_number_of_samples_gives_the_same_run_as_iterations(config: Config, tmp_path: Path) -> None:
    expected = trained(config, tmp_path / "iterations")
    by_samples = change(
        config,
        training={"train_iters": None, "train_samples": 8 * ITERATIONS},
        optimizer={"lr_warmup_iters": 0, "lr_warmup_samples": 16},
    )
    assert trained(by_samples, tmp_path / "samples") == expected


def test_a_background_save_is_the_same_checkpoint_and_the_last_ones_are_kept(config: Config, tmp_path: Path) -> None:
    saving = change(config, checkpoint={"save_interval": 2, "keep_last": 2, "save_at_end": True})
    assert run_here(in_folder(saving, tmp_path / "foreground")) == 0
    assert run_here(in_folder(change(saving, checkpoint={"async_save": True}), tmp_path / "background")) == 0
    for name in ("foreground", "background"):
        folder = tmp_path / name / "checkpoints"
        assert sorted(path.name for path in folder.iterdir()) == [
            "iter_0000006",
            "iter_0000008",
            "latest_checkpointed_iteration.txt",
        ]
    states = [files.verify(tmp_path / name / "checkpoints" / "iter_0000006") for name in ("foreground", "background")]
    assert states[0].files == states[1].files
    for name in ("foreground", "background"):
        again = in_folder(config, tmp_path / f"again {name}")
        load = {"load": str(tmp_path / name / "checkpoints" / "iter_0000006"), "load_optimizer": True}
        assert run_here(change(again, checkpoint=load)) == 0
        assert [row["loss"] for row in rows(tmp_path / f"again {name}")] == losses(tmp_path / name)[6:]


def test_the_run_folder_repeats_the_run(config: Config, tmp_path: Path) -> None:
    expected = trained(config, tmp_path / "first")
    saved = yaml.safe_load((tmp_path / "first" / "config.yaml").read_text())
    assert saved == dataclasses.asdict(in_folder(config, tmp_path / "first"))
    again = Config(**{name: type(getattr(config, name))(**fields) for name, fields in saved.items()})
    assert trained(again, tmp_path / "second") == expected


def test_a_loss_that_is_not_finite_stops_the_run_and_saves_nothing(config: Config) -> None:
    config = change(config, optimizer={"lr": 1e30, "clip_grad": 0.0}, checkpoint={"save_interval": 1})
    outcome = str(run_here(config))
    assert outcome.startswith("FloatingPointError: the loss is ")
    last = train_rows(config.logging.run_dir)[-1]["iteration"]
    checkpoint = files.latest_complete(Path(config.logging.run_dir) / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.iteration == last


@pytest.mark.parametrize("clip_grad", [1.0, 0.0])
def test_a_gradient_that_is_not_finite_stops_the_run_before_it_is_saved(
    config: Config, monkeypatch: pytest.MonkeyPatch, clip_grad: float
) -> None:
    """The loss of that iteration is finite; its weights are not, and keep_last would remove the last good ones."""
    config = change(
        config,
        drop={**FULL_DEPTH, "sensitivity": None},
        optimizer={"clip_grad": clip_grad},
        checkpoint={"save_interval": 2, "keep_last": 1},
    )
    build_model, backward_passes = run_module.build_model, itertools.count(1)

    def build(*args: Any) -> Any:
        chunks = build_model(*args)
        weight = next(iter(chunks[0].module.decoder.layers[1].parameters()))
        fourth = 4 * config.training.global_batch_size
        weight.register_hook(lambda grad: grad * math.inf if next(backward_passes) == fourth else grad)
        return chunks

    with monkeypatch.context() as patched:
        patched.setattr(run_module, "build_model", build)
        outcome = str(run_here(config))
    assert outcome.startswith("FloatingPointError: the norm of the gradients is inf at iteration 4")
    checkpoint = files.latest_complete(Path(config.logging.run_dir) / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.iteration == 2
    assert run_here(config) == 0


def test_the_process_is_left_as_it_was(config: Config) -> None:
    assert run_here(change(config, checkpoint={"load": "nowhere"})) != 0
    assert run_here(config) == 0
    assert not torch.distributed.is_initialized()
