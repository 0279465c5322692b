"""Exported models compute what ours compute, whatever layout saved them, and what no format holds is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from megatron_sbld.checkpoint.files import checkpoint_path
from megatron_sbld.cli import main as cli
from megatron_sbld.config.sections import ModelConfig
from megatron_sbld.hf.export_model import export_hf, written_at_once
from megatron_sbld.hf.format import Heads
from megatron_sbld.hf.stored_weights import LAYERS, Piece, StoredWeights, write_pieces
from tests.checkpoint.checkpoint_runs import run
from tests.checkpoint.common_in_shards import move_common_into_shards
from tests.harness import run_distributed, single_process
from tests.hf import hf_peer
from tests.hf.hf_helpers import (
    LLAMA,
    MODELS,
    TOKENS,
    UNTIED,
    assert_same_model,
    assert_same_tensors,
    fields_of,
    model_config,
    our_logits,
    save,
    save_random,
    tensors,
    token_ids,
    write_small_tokenizer,
)

LAYOUTS: dict[str, dict[str, Any]] = {
    "tensor": {"tp": 2},
    "pipeline, distributed optimizer": {"pp": 2, "use_distributed_optimizer": True},
    "interleaved": {"pp": 2, "vpp": 2, "use_distributed_optimizer": True},
    "uneven": {"pp": 2, "pipeline_model_parallel_layout": "Et|t*3L"},
    "data, distributed optimizer": {"use_distributed_optimizer": True},
}
SHARDED_MODELS: dict[str, dict[str, Any]] = {
    "GPT-2": {"activation_func": "gelu_tanh"},
    "Llama, untied": {**LLAMA, **UNTIED},
}


@pytest.fixture(scope="module")
def ask() -> Iterator[Callable[..., Any]]:
    with hf_peer.peer() as asking:
        yield asking


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("export")


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> str:
    return write_small_tokenizer(folder)


@pytest.fixture(scope="module")
def saved(folder: Path, tokenizer: str) -> dict[str, np.ndarray]:
    """A checkpoint of each model in `folder`, and the logits of each."""
    with single_process():
        return {
            name: save_random(model_config(tokenizer, fields), folder / name) for name, (_, fields) in MODELS.items()
        }


@pytest.fixture(scope="module")
def gpt2(folder: Path, saved: dict[str, np.ndarray]) -> Path:
    """A run folder's checkpoints."""
    return folder / "GPT-2"


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_transformers_computes_what_our_model_computes(
    folder: Path, saved: dict[str, np.ndarray], ask: Callable[..., Any], tmp_path: Path, name: str
) -> None:
    exported = export_hf(str(folder / name), str(tmp_path / "out"))
    assert_same_model(saved[name], ask(hf_peer.logits, str(tmp_path / "out"), token_ids()))
    assert fields_of(tmp_path / "out")["architectures"] == [MODELS[name][0]]
    assert (exported.vocab_size, exported.stripped_rows) == (TOKENS, 128 - TOKENS)
    assert exported.parameters == sum(tensor.numel() for tensor in tensors(tmp_path / "out").values())


@pytest.mark.slow
def test_the_comparison_of_logits_notices_another_activation_and_an_exchange_of_heads(
    folder: Path, saved: dict[str, np.ndarray], ask: Callable[..., Any], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    export_hf(str(folder / "GPT-2"), str(out))
    good = fields_of(out)
    assert good["activation_function"] == "gelu"
    for change in ({"activation_function": "gelu_new"}, {"layer_norm_epsilon": 1e-2}, {"n_head": 2}):
        (out / "config.json").write_text(json.dumps({**good, **change}))
        with pytest.raises(AssertionError):
            assert_same_model(saved["GPT-2"], ask(hf_peer.logits, str(out), token_ids()))


@pytest.mark.slow
def test_dropout_epsilon_and_control_tokens_are_in_the_config(
    folder: Path, tokenizer: str, ask: Callable[..., Any], tmp_path: Path
) -> None:
    fields = {"hidden_dropout": 0.2, "attention_dropout": 0.3, "layernorm_epsilon": 1e-4}
    with single_process():
        save_random(model_config(tokenizer, fields), tmp_path / "saved")
    export_hf(str(tmp_path / "saved"), str(tmp_path / "out"))
    config = ask(hf_peer.fields_of, str(tmp_path / "out"))
    expected = {"resid_pdrop": 0.2, "embd_pdrop": 0.2, "attn_pdrop": 0.3, "layer_norm_epsilon": 1e-4}
    assert {name: config[name] for name in expected} == expected
    assert (config["eos_token_id"], config["vocab_size"], config["tie_word_embeddings"]) == (TOKENS - 1, TOKENS, True)


@pytest.mark.slow
@pytest.mark.parametrize(("asked", "dtype"), [("as-saved", "bfloat16"), ("fp32", "float32"), ("fp16", "float16")])
def test_weights_have_the_type_that_was_asked_for(
    tokenizer: str, ask: Callable[..., Any], tmp_path: Path, asked: str, dtype: str
) -> None:
    config = model_config(tokenizer, {}, precision="bf16")
    with single_process():
        save_random(config, tmp_path / "saved")
        ours = our_logits(checkpoint_path(tmp_path / "saved", 3), model_config(tokenizer, {}))
    export_hf(str(tmp_path / "saved"), str(tmp_path / "out"), dtype=asked)
    assert {str(tensor.dtype) for tensor in tensors(tmp_path / "out").values()} == {f"torch.{dtype}"}
    config_json = fields_of(tmp_path / "out")
    assert (config_json["dtype"], config_json["torch_dtype"]) == (dtype, dtype)
    theirs = ask(hf_peer.logits, str(tmp_path / "out"), token_ids(), fp32=True)
    if asked == "fp16":
        np.testing.assert_allclose(ours[..., :TOKENS], theirs, atol=0.02)
    else:
        assert_same_model(ours, theirs)


@pytest.mark.slow
def test_a_large_model_is_cut_into_shards_that_are_as_large_as_was_asked_for(
    folder: Path, gpt2: Path, saved: dict[str, np.ndarray], ask: Callable[..., Any], tmp_path: Path
) -> None:
    whole, sharded = tmp_path / "whole", tmp_path / "sharded"
    export_hf(str(gpt2), str(whole))
    exported = export_hf(str(gpt2), str(sharded), max_shard_size="40KB")
    assert len(exported.files) >= 5
    assert [file.stat().st_size < 45_000 for file in sharded.glob("*.safetensors")] == [True] * len(exported.files)
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors(sharded).values())
    assert set(index["weight_map"].values()) == set(exported.files)
    assert_same_tensors(tensors(sharded), tensors(whole))
    assert_same_model(saved["GPT-2"], ask(hf_peer.logits, str(sharded), token_ids()))
    assert sorted(path.name for path in sharded.iterdir() if path.name not in exported.files) == [
        "config.json",
        "generation_config.json",
        "merges.txt",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
    ]


def save_on_two_ranks(folder: str, tokenizer: str) -> None:
    for name, fields in SHARDED_MODELS.items():
        for layout, options in LAYOUTS.items():
            config = model_config(tokenizer, fields, **options)
            with run(config) as trained:
                trained.train([1, 2, 3])
                save(trained, config, Path(folder) / name / layout)


@pytest.fixture(scope="module")
def saved_by_two_ranks(tmp_path_factory: pytest.TempPathFactory, tokenizer: str) -> Path:
    place = tmp_path_factory.mktemp("two_ranks")
    run_distributed(save_on_two_ranks, 2, str(place), tokenizer)
    return place


@pytest.mark.slow
@pytest.mark.parametrize("name", SHARDED_MODELS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_checkpoint_of_any_layout_is_exported(
    saved_by_two_ranks: Path, tokenizer: str, ask: Callable[..., Any], tmp_path: Path, name: str, layout: str
) -> None:
    place = saved_by_two_ranks / name / layout
    with single_process():
        ours = our_logits(checkpoint_path(place, 3), model_config(tokenizer, SHARDED_MODELS[name]))
    export_hf(str(place), str(tmp_path / "out"))
    assert_same_model(ours, ask(hf_peer.logits, str(tmp_path / "out"), token_ids()))


def rewrite(source: StoredWeights, target: Path, rename: Callable[[str], str], numbered: bool) -> None:
    """The same weights under other names, without a manifest, as another program may have saved them."""
    target.mkdir()
    pieces = []
    for name in [key for key in source._tensors if "_extra_state" not in key]:
        if not name.startswith(LAYERS):
            pieces.append(Piece(name, source.shape(name), source.dtype(name), lambda name=name: source.read(name)))
            continue
        layers, rest = source.shape(name)[0], rename(name.removeprefix(LAYERS))
        for layer in range(layers):
            pieces.append(
                Piece(
                    name=f"{LAYERS}{layer}.{rest}" if numbered else LAYERS + rest,
                    shape=source.shape(name)[1:],
                    dtype=source.dtype(name),
                    load=lambda name=name, layer=layer: source.read(name, layer),
                    layer=None if numbered else layer,
                    num_layers=layers,
                )
            )
    write_pieces(target, pieces, lambda: None)
    for name in ("metadata.json", "common.pt"):
        shutil.copyfile(source.path / name, target / name)


@pytest.mark.parametrize("numbered", [False, True])
@pytest.mark.parametrize("unfused", [False, True])
def test_layers_stored_one_by_one_and_norms_by_their_other_names_are_found(
    gpt2: Path, tokenizer: str, tmp_path: Path, numbered: bool, unfused: bool
) -> None:
    def rename(name: str) -> str:
        if not unfused:
            return name
        name = name.replace("self_attention.linear_qkv.layer_norm_", "input_layernorm.")
        return name.replace("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm.")

    rewrite(StoredWeights(checkpoint_path(gpt2, 3)), tmp_path / "other", rename, numbered)
    describe(tmp_path, tokenizer)
    export_hf(str(gpt2), str(tmp_path / "expected"))
    export_hf(str(tmp_path / "other"), str(tmp_path / "out"), config=str(tmp_path / "config.yaml"))
    assert_same_tensors(tensors(tmp_path / "out"), tensors(tmp_path / "expected"))


def describe(folder: Path, tokenizer: str, **changes: Any) -> None:
    """The config.yaml of the tiny GPT-2."""
    model = {**dataclasses.asdict(model_config(tokenizer, {}).model), **changes}
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": model, "data": {"tokenizer": tokenizer}}))


def test_a_checkpoint_in_the_layout_of_core_0_19_is_exported(gpt2: Path, tokenizer: str, tmp_path: Path) -> None:
    move_common_into_shards(Path(shutil.copytree(checkpoint_path(gpt2, 3), tmp_path / "other")))
    describe(tmp_path, tokenizer)
    export_hf(str(gpt2), str(tmp_path / "expected"))
    export_hf(str(tmp_path / "other"), str(tmp_path / "out"), config=str(tmp_path / "config.yaml"))
    assert_same_tensors(tensors(tmp_path / "out"), tensors(tmp_path / "expected"))


@pytest.mark.slow
def test_a_checkpoint_that_stock_megatron_saved_is_exported_with_a_config(
    tokenizer: str, ask: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.core import dist_checkpointing

    # Stock megatron-core reports each writer's memory by psutil, which is none of our dependencies.
    monkeypatch.setattr("megatron.core.dist_checkpointing.strategies.filesystem_async._process_memory", lambda: 0)
    config = model_config(tokenizer, {})
    (tmp_path / "stock").mkdir()
    with single_process(), run(config) as made:
        stock = made.chunks[0].module
        dist_checkpointing.save({"model": stock.sharded_state_dict(), "iteration": 9}, str(tmp_path / "stock"))
    with single_process():
        ours = our_logits(tmp_path / "stock", config)
    with pytest.raises(ValueError, match="does not say what model it holds; give --config FILE"):
        export_hf(str(tmp_path / "stock"), str(tmp_path / "out"))
    describe(tmp_path, tokenizer)
    export_hf(str(tmp_path / "stock"), str(tmp_path / "out"), config=str(tmp_path / "config.yaml"))
    assert_same_model(ours, ask(hf_peer.logits, str(tmp_path / "out"), token_ids()))


WRONGLY_DESCRIBED = {
    "fewer layers": ({"num_layers": 3}, r"has 4 layers, but the model 3 \(model.num_layers\)"),
    "narrower": ({"hidden_size": 16}, r"word_embeddings.weight has the shape \[128, 32\], expected \[128, 16\]"),
    "another MLP": ({"ffn_hidden_size": 64}, r"linear_fc1.weight has the shape \[128, 32\], expected \[64, 32\]"),
    "untied": (UNTIED, "lacks output_layer.weight"),
    "rope": ({"position_embedding_type": "rope"}, "does not have: embedding.position_embeddings.weight"),
    "no field": ({"hidden": 3}, "unknown field model.hidden; did you mean hidden_size"),
    "no such heads": ({"num_attention_heads": 5}, "model.hidden_size = 32: must be divisible by"),
}


@pytest.mark.parametrize("case", WRONGLY_DESCRIBED)
def test_a_config_that_does_not_describe_the_checkpoint_is_refused(
    gpt2: Path, tokenizer: str, tmp_path: Path, case: str
) -> None:
    changes, message = WRONGLY_DESCRIBED[case]
    rewrite(StoredWeights(checkpoint_path(gpt2, 3)), tmp_path / "other", lambda name: name, False)
    describe(tmp_path, tokenizer, **changes)
    with pytest.raises(ValueError, match=message):
        export_hf(str(tmp_path / "other"), str(tmp_path / "out"), config=str(tmp_path / "config.yaml"))


REFUSED_MODELS = {
    "RMSNorm with learned positions": (
        {"normalization": "RMSNorm"},
        [
            "GPT-2: model.normalization = 'RMSNorm': must be 'LayerNorm'",
            "Llama: model.position_embedding_type = 'learned_absolute': must be 'rope'; model.swiglu = False: must be",
        ],
    ),
    "part of a head with RMSNorm": (
        {**LLAMA, "rotary_percent": 0.5},
        ["Llama: model.rotary_percent = 0.5: must be 1.0\n"],
    ),
    "SwiGLU with LayerNorm": (
        {**LLAMA, "normalization": "LayerNorm"},
        ["Llama: model.normalization = 'LayerNorm': must be 'RMSNorm'\n", "GPT-NeoX: model.swiglu = True: must be"],
    ),
    "no biases": ({"add_bias_linear": False}, ["GPT-2: model.add_bias_linear = False: must be True\n"]),
    "grouped queries": (
        {"num_query_groups": 2},
        ["GPT-2: model.num_query_groups = 2: must be None or num_attention_heads = 4\n"],
    ),
    "wide heads": ({"kv_channels": 16}, ["GPT-2: model.kv_channels = 16: must be hidden_size / num_attention_heads"]),
}


@pytest.mark.parametrize("case", REFUSED_MODELS)
def test_what_no_format_holds_is_refused_by_field(tokenizer: str, tmp_path: Path, case: str) -> None:
    fields, messages = REFUSED_MODELS[case]
    with single_process():
        save_random(model_config(tokenizer, fields), tmp_path / "saved")
    with pytest.raises(ValueError) as caught:
        export_hf(str(tmp_path / "saved"), str(tmp_path / "out"))
    for message in messages:
        assert message in f"{caught.value}\n"
    assert not (tmp_path / "out").exists()


def test_another_tokenizer_is_refused_and_one_that_moved_has_to_be_named(
    gpt2: Path, tokenizer: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="tokenizer 'byte': encodes differently from the one that checkpoint"):
        export_hf(str(gpt2), str(tmp_path / "out"), tokenizer="byte")
    place = tmp_path / "saved"
    shutil.copytree(checkpoint_path(gpt2, 3), checkpoint_path(place, 3))
    manifest = checkpoint_path(place, 3) / "checkpoint.json"
    manifest.write_text(manifest.read_text().replace(tokenizer, "/gone/tokenizer.json"))
    with pytest.raises(ValueError, match=r"/gone/tokenizer.json': no such file or folder; .*; give --tokenizer SPEC"):
        export_hf(str(place), str(tmp_path / "out"))
    export_hf(str(place), str(tmp_path / "out"), tokenizer=tokenizer)


def test_a_damaged_checkpoint_is_refused_with_the_name_of_the_file(gpt2: Path, tmp_path: Path) -> None:
    place = checkpoint_path(tmp_path / "saved", 3)
    shutil.copytree(checkpoint_path(gpt2, 3), place)
    data = place / "__0_0.distcp"
    whole = data.read_bytes()
    for damaged, message in (
        (b"x" * len(whole), r"__0_0.distcp cannot be read"),
        (whole[:-100], r"__0_0.distcp has .* bytes, but had"),
    ):
        data.write_bytes(damaged)
        with pytest.raises(ValueError, match=message):
            export_hf(str(place), str(tmp_path / "out"))
    data.unlink()
    with pytest.raises(ValueError, match=r"__0_0.distcp is missing"):
        export_hf(str(place), str(tmp_path / "out"))
    data.write_bytes(whole)
    (place / ".metadata").write_bytes(b"x" * (place / ".metadata").stat().st_size)
    with pytest.raises(ValueError, match=r"\.metadata is damaged"):
        export_hf(str(place), str(tmp_path / "out"))
    with pytest.raises(ValueError, match=r"\.metadata cannot be read"):  # as of a checkpoint without our manifest
        StoredWeights(place)
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_an_export_that_fails_or_was_killed_leaves_no_folder_that_looks_whole(
    gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*args: Any) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("megatron_sbld.hf.export_model.write_tokenizer", full_disk)
        with pytest.raises(OSError, match="No space left"):
            export_hf(str(gpt2), str(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out.incomplete").mkdir()
    with pytest.raises(ValueError, match=r"out.incomplete: exists; remove it unless"):
        export_hf(str(gpt2), str(tmp_path / "out"))
    (tmp_path / "out.incomplete").rmdir()
    (tmp_path / "out").mkdir()  # empty: taken
    export_hf(str(gpt2), str(tmp_path / "out"))
    modes = {path.stat().st_mode for path in (tmp_path / "out").iterdir()}
    assert len(modes) == 1, "all files can be read by the same people"


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_to_other_storage_leads_there(tmp_path: Path, exists: bool) -> None:
    there = tmp_path / "storage"
    if exists:
        there.mkdir()
    (tmp_path / "out").symlink_to(there)
    with written_at_once(tmp_path / "out") as folder:
        (folder / "config.json").touch()
    assert (tmp_path / "out").is_symlink()
    assert [path.name for path in there.iterdir()] == ["config.json"]


def test_mistakes_on_the_command_line_end_with_one_message(
    gpt2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    given = ["--checkpoint", str(gpt2)]
    for args, message in (
        (["hf", *given, str(tmp_path / "full")], "exists and is not an empty folder"),
        (["hf", *given, str(tmp_path / "out"), "--max_shard_size", "5"], "--max_shard_size = '5': must be a size such"),
        (["hf", *given, str(tmp_path / "out"), "--dtype", "fp8"], "fp8"),
        (["hf", *given, str(tmp_path / "out"), "--config", "c.yaml"], "already says which model it holds"),
        (["hf", "--checkpoint", str(tmp_path / "none"), str(tmp_path / "out")], "not a checkpoint of megatron-sbld"),
        (["onnx"], "unknown command 'export onnx'"),
    ):
        with pytest.raises(SystemExit) as ended:
            cli.main(["export", *args])
        assert ended.value.code == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_command_says_what_it_wrote_and_its_help_says_what_it_takes(
    gpt2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["export", "hf", "--checkpoint", str(gpt2), str(tmp_path / "out")])
    assert ended.value.code == 0
    assert f"{tmp_path / 'out'}: GPT-2 format, " in capsys.readouterr().out
    for command in (["export", "hf", "--help"], ["import", "--help"]):
        with pytest.raises(SystemExit) as ended:
            cli.main(command)
        assert ended.value.code == 0
        assert "--tokenizer" in capsys.readouterr().out


def test_queries_keys_and_values_are_cut_by_group() -> None:
    heads = Heads.of(ModelConfig(hidden_size=12, num_attention_heads=6, num_query_groups=2, kv_channels=1))
    rows = torch.tensor([0, 1, 2, 10, 20, 3, 4, 5, 11, 21])  # three queries, a key and a value of each of two groups
    query, key, value = heads.split(rows)
    assert (query.tolist(), key.tolist(), value.tolist()) == ([0, 1, 2, 3, 4, 5], [10, 11], [20, 21])
    assert heads.join([query, key, value]).tolist() == rows.tolist()
