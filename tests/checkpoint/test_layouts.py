"""Checkpoints of a run on several ranks: resumed bit for bit, on another layout, and after whatever can go wrong.

All cases of two ranks (checkpoint_cases.py) share one start of processes; one process before them saves for them,
one after loads what they saved.
"""

from __future__ import annotations

import dataclasses
import logging
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_sbld.checkpoint import files
from tests.checkpoint.checkpoint_cases import (
    FORMATS,
    FULL_DISKS,
    MOVES,
    RESUMED,
    four_rank_cases,
    from_one_process_cases,
    to_one_process_cases,
    two_rank_cases,
)
from tests.checkpoint.checkpoint_runs import CONFIG, VOCAB, Run, configure, run
from tests.harness import run_distributed, single_process, slow_but

# Of the cases that resume, for `make test`.
QUICK = (
    "plain",
    "distributed, bf16, fully_reshardable, both overlaps",
    "distributed, fp16 before its first step",
    "interleaved",
)


@dataclasses.dataclass(frozen=True)
class Outcomes:
    """What the ranks found, and what one process found before and after them."""

    ranks: list[dict[str, Any]]
    saved_by_one_process: dict[str, list[float]]
    loaded_by_one_process: dict[str, list[float]]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory, asked_for: Callable[..., frozenset[str]]) -> Outcomes:
    folder = tmp_path_factory.mktemp("checkpoints")
    resumed = sorted(asked_for(test_a_resumed_run_is_bit_equal_to_the_uninterrupted_one) | {"plain"})
    moved = bool(asked_for(*ON_OTHER_LAYOUTS))
    saved: dict[str, list[float]] = {}
    loaded: dict[str, list[float]] = {}
    if moved:
        with single_process():
            saved = to_one_process_cases(folder / "from_one")
    ranks = run_distributed(two_rank_cases, 2, str(folder), resumed, moved, timeout=600)
    if moved:
        with single_process():
            loaded = from_one_process_cases(folder / "to_one")
    return Outcomes(ranks, saved, loaded)


@pytest.mark.parametrize("name", slow_but(QUICK, RESUMED))
def test_a_resumed_run_is_bit_equal_to_the_uninterrupted_one(outcomes: Outcomes, name: str) -> None:
    """Would show a lost or shared Adam step, stale parameters, a random state that is not restored."""
    for rank in outcomes.ranks:
        uninterrupted, resumed = rank["resume"][name]
        assert resumed == uninterrupted


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(("source", "target"), MOVES)
def test_a_run_continues_on_another_layout(outcomes: Outcomes, form: str, source: str, target: str) -> None:
    expected, found = outcomes.ranks[-1]["layouts"][form, source, target]  # the last rank has the losses
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["not_distributed", "fully_reshardable", "dp_reshardable"])
def test_a_run_of_one_process_continues_on_two_replicas(outcomes: Outcomes, form: str) -> None:
    assert outcomes.ranks[0]["from one process"][form] == pytest.approx(outcomes.saved_by_one_process[form], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["not_distributed", "fully_reshardable", "dp_reshardable"])
def test_a_run_of_two_replicas_continues_in_one_process(outcomes: Outcomes, form: str) -> None:
    assert outcomes.loaded_by_one_process[form] == pytest.approx(outcomes.ranks[0]["to one process"][form], rel=1e-5)


@pytest.mark.slow
def test_on_another_layout_random_states_start_anew_in_the_same_way_each_time(outcomes: Outcomes) -> None:
    first, second = outcomes.ranks[0]["reseeded"]
    assert first == second


ON_OTHER_LAYOUTS = (
    test_a_run_continues_on_another_layout,
    test_a_run_of_one_process_continues_on_two_replicas,
    test_a_run_of_two_replicas_continues_in_one_process,
    test_on_another_layout_random_states_start_anew_in_the_same_way_each_time,
)
REFUSED = {
    "distributed into plain": "parallel.use_distributed_optimizer is False, but the checkpoint was saved with True",
    "plain into distributed": "parallel.use_distributed_optimizer is True, but the checkpoint was saved with False",
    "dp_reshardable to tensor": "parallel.tensor_model_parallel_size is 2, but the checkpoint was saved with 1",
    "dp_reshardable to other buckets": "parallel.ddp_bucket_size give other gradient buckets",
    "dp_reshardable to pipeline": "parallel.pipeline_model_parallel_size is 2, but the checkpoint was saved with 1",
    "other precision": "training.precision is bf16, but the checkpoint was saved with fp32",
    "no such folder": "no such folder",
    "narrower": "Global shape mismatch",
    "deeper": "Global shape mismatch",
    "without biases": "it holds entries that this run does not have: decoder.layers.mlp.linear_fc1.bias",
    "rope": "it holds entries that this run does not have: embedding.position_embeddings.weight",
    "untied": "it lacks optimizer.state.exp_avg.output_layer.weight",
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_checkpoint_that_does_not_fit_is_refused_by_name_on_every_rank(outcomes: Outcomes, case: str) -> None:
    for rank in outcomes.ranks:
        message = rank["refusals"][case]
        assert message.startswith("ValueError: checkpoint /")
        assert REFUSED[case] in message


@pytest.mark.parametrize("name", ["common.pt", ".metadata", "metadata.json", "__0_0.distcp"])
def test_a_file_of_the_right_size_and_other_content_is_refused_with_the_path(outcomes: Outcomes, name: str) -> None:
    for rank in outcomes.ranks:
        message = rank["damages"][name]
        assert message.startswith("ValueError: checkpoint /")
        is_shard = name.endswith(".distcp")  # without a checksum
        assert ("iter_0000002 cannot be loaded" if is_shard else f"iter_0000002: {name} is damaged") in message
        assert "\n" not in message
        assert len(message) < 300


def test_a_background_save_holds_the_state_of_the_moment_of_saving(outcomes: Outcomes) -> None:
    for rank in outcomes.ranks:
        assert rank["background"] == {
            "complete while saving": None,
            "first complete after the second began": True,
            "second complete": True,
            "same weights": True,
            "same fp32 copies": True,
        }


@pytest.mark.parametrize("case", FULL_DISKS)
def test_a_full_disk_is_an_error_on_every_rank_and_leaves_the_former_checkpoint(outcomes: Outcomes, case: str) -> None:
    for rank in outcomes.ranks:
        message, left, latest, after_making_room = rank["full disk"][case]
        assert message.startswith("RuntimeError: checkpoint of iteration 2 could not be written")
        assert f"rank {FULL_DISKS[case][0]}: OSError: [Errno 27] File too large" in message
        assert left == ["iter_0000001"]
        assert (latest, after_making_room) == (1, 3)


def test_the_last_checkpoints_are_kept(outcomes: Outcomes) -> None:
    assert outcomes.ranks[0]["keep_last"] == ["iter_0000002", "iter_0000003"]


def stock_model() -> Any:
    """A GPTModel of the tiny run's size, built by megatron-core alone."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    sizes = CONFIG.model
    return GPTModel(
        TransformerConfig(
            num_layers=sizes.num_layers, hidden_size=sizes.hidden_size, num_attention_heads=sizes.num_attention_heads
        ),
        get_gpt_layer_local_spec(),
        VOCAB,
        sizes.seq_length,
        share_embeddings_and_output_weights=True,
    )


def same_weights(stock: Any, ours: Run) -> bool:
    weights = dict(ours.chunks[0].module.named_parameters())
    return weights.keys() == dict(stock.named_parameters()).keys() and all(
        torch.equal(weights[name], weight) for name, weight in stock.named_parameters()
    )


def test_stock_megatron_loads_a_checkpoint_by_its_own_calls(tmp_path: Path) -> None:
    from megatron.core import dist_checkpointing

    from megatron_sbld.checkpoint.manager import CheckpointManager

    path = str(files.checkpoint_path(tmp_path, 2))
    with single_process():
        with run(configure(dropout=0.0)) as ours:
            ours.train([1, 2])
            CheckpointManager(tmp_path).save(2, *ours.parts, {})
            stock = stock_model()
            stock.load_state_dict(dist_checkpointing.load({"model": stock.sharded_state_dict()}, path)["model"])
            assert same_weights(stock, ours)
            expected = ours.train([3, 4])
        with run(configure(dropout=0.0), seed=77) as loaded:
            model = loaded.chunks[0].module
            state = {"model": model.sharded_state_dict()}
            state["optimizer"] = loaded.optimizer.sharded_state_dict(state, is_loading=True)
            state = dist_checkpointing.load(state, path)
            model.load_state_dict(state["model"])
            loaded.optimizer.load_state_dict(state["optimizer"])
            loaded.scheduler.load_state_dict(state["opt_param_scheduler"])
            found = loaded.train([3, 4])

    assert (state["iteration"], state["checkpoint_version"]) == (2, 3.0)
    assert found == expected


@pytest.mark.slow
@pytest.mark.parametrize("distributed", [False, True])
def test_how_adam_is_computed_is_this_machines_choice_not_the_checkpoints(tmp_path: Path, distributed: bool) -> None:
    from megatron_sbld.checkpoint.manager import CheckpointManager, load_checkpoint

    config = configure(dropout=0.0, use_distributed_optimizer=distributed)
    with single_process():
        with run(config) as elsewhere:
            assert torch_adam_groups(elsewhere, "fused") == [True, True]
            for group in torch_adam(elsewhere).param_groups:
                group["fused"] = None  # torch's default, as on a GPU
            elsewhere.train([1, 2])
            CheckpointManager(tmp_path).save(2, *elsewhere.parts, {})
            expected = elsewhere.train([3, 4])
        with run(config, seed=77) as here:
            load_checkpoint(files.checkpoint_path(tmp_path, 2), *here.parts, seed=1)
            assert torch_adam_groups(here, "fused") == [True, True]
            assert here.train([3, 4]) == pytest.approx(expected, rel=1e-5)


def torch_adam(of: Run) -> torch.optim.Optimizer:
    return getattr(of.optimizer, "chained_optimizers", [of.optimizer])[0].optimizer


def torch_adam_groups(of: Run, option: str) -> list[Any]:
    """The option of each parameter group: with weight decay and without."""
    return [group[option] for group in torch_adam(of).param_groups]


@pytest.mark.slow
def test_the_weights_of_a_checkpoint_that_stock_megatron_saved_are_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.core import dist_checkpointing

    from megatron_sbld.checkpoint.manager import load_weights

    # Stock megatron-core reports each writer's memory by psutil, which is none of our dependencies.
    monkeypatch.setattr("megatron.core.dist_checkpointing.strategies.filesystem_async._process_memory", lambda: 0)
    with single_process(), run(configure(), seed=77) as ours:
        stock = stock_model()
        dist_checkpointing.save({"model": stock.sharded_state_dict(), "iteration": 9}, str(tmp_path))
        assert not same_weights(stock, ours)
        load_weights(tmp_path, ours.chunks)
        assert same_weights(stock, ours)


def save_and_hang(folder: str, hanging: Any) -> None:
    """In a process of its own: one complete save, and one that stops before the folder is renamed."""
    from megatron_sbld.checkpoint.manager import CheckpointManager

    with single_process(), run(configure()) as saved:
        manager = CheckpointManager(Path(folder))
        manager.save(1, *saved.parts, {"consumed_samples": 4})

        def stop(*args: Any) -> None:
            hanging.set()
            time.sleep(600)

        files.publish = stop
        manager.save(2, *saved.parts, {"consumed_samples": 8})


@pytest.mark.slow
def test_a_process_killed_during_a_save_leaves_the_former_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from megatron_sbld.checkpoint.manager import CheckpointManager

    context = multiprocessing.get_context("spawn")
    hanging = context.Event()
    process = context.Process(target=save_and_hang, args=(str(tmp_path), hanging))
    process.start()
    assert hanging.wait(120)
    process.kill()
    process.join()

    latest = files.latest_complete(tmp_path)
    assert latest is not None
    assert (latest.iteration, files.read_train_state(latest.path)) == (1, {"consumed_samples": 4})
    assert (files.incomplete_path(tmp_path, 2) / ".metadata").exists()
    with single_process(), caplog.at_level(logging.INFO):
        CheckpointManager(tmp_path)
    assert not files.incomplete_path(tmp_path, 2).exists()
    assert "left by an interrupted save" in caplog.text


@pytest.mark.parametrize("keep_last", [0, -1])
def test_keeping_no_checkpoint_is_refused(tmp_path: Path, keep_last: int) -> None:
    from megatron_sbld.checkpoint.manager import CheckpointManager

    with pytest.raises(ValueError, match=f"checkpoint.keep_last is {keep_last}: must be at least 1"):
        CheckpointManager(tmp_path, keep_last=keep_last)


def test_an_unknown_format_of_the_optimizer_is_refused(tmp_path: Path) -> None:
    from megatron_sbld.checkpoint.manager import CheckpointManager

    with pytest.raises(ValueError, match=r"optimizer_format is 'zipped': must be one of \('fully_reshardable', "):
        CheckpointManager(tmp_path, optimizer_format="zipped")


def test_the_model_that_a_config_describes_is_compared_with_the_saved_one() -> None:
    from megatron_sbld.checkpoint.manager import check_compatible

    saved = dataclasses.asdict(CONFIG)
    resolved = dataclasses.replace(CONFIG.model, ffn_hidden_size=128, kv_channels=8, max_position_embeddings=16)
    check_compatible(saved, dataclasses.replace(CONFIG, model=resolved), saved_vocab_size=VOCAB, vocab_size=VOCAB)

    del saved["model"]["activation_func"]  # as before there was a choice
    check_compatible(saved, CONFIG)
    tanh = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, activation_func="gelu_tanh"))
    with pytest.raises(ValueError, match=r"model.activation_func is 'gelu_tanh', but the checkpoint has 'gelu'"):
        check_compatible(saved, tanh)

    other = dataclasses.replace(CONFIG.model, num_layers=6, hidden_size=64)
    with pytest.raises(ValueError, match=r"model.num_layers is 6, but the checkpoint has 4; model.hidden_size is 64"):
        check_compatible(saved, dataclasses.replace(CONFIG, model=other))
    with pytest.raises(ValueError, match=r"data\.tokenizer has 257 tokens, but the checkpoint's model 128"):
        check_compatible(saved, CONFIG, saved_vocab_size=VOCAB, vocab_size=257)
    with pytest.raises(ValueError, match="no model section"):
        check_compatible({}, CONFIG)


@pytest.mark.slow
def test_a_distributed_optimizer_moves_between_all_layouts_of_four_ranks(tmp_path: Path) -> None:
    outcomes = run_distributed(four_rank_cases, 4, str(tmp_path), timeout=900)[-1]
    for move, (expected, found) in outcomes.items():
        assert found == pytest.approx(expected, rel=1e-5), move
