"""Imported models compute what transformers computes, go back bit for bit and can be trained on; others are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from megatron_sbld.checkpoint.files import checkpoint_path, find_checkpoint
from megatron_sbld.cli import main as cli
from megatron_sbld.config.files import read_config
from megatron_sbld.config.sections import Config
from megatron_sbld.hf.export_model import export_hf
from megatron_sbld.hf.import_model import import_hf
from tests.checkpoint.checkpoint_runs import SEQUENCE, run
from tests.harness import run_distributed, single_process
from tests.hf import hf_peer
from tests.hf.hf_helpers import (
    TOKENS,
    assert_same_model,
    assert_same_tensors,
    fields_of,
    model_config,
    our_logits,
    save,
    saved_model_of,
    tensors,
    token_ids,
    write_small_tokenizer,
)
from tests.training.trainer_helpers import losses, prepare_corpus, run_here, tiny_run

GPT2 = {"vocab_size": TOKENS, "n_positions": SEQUENCE, "n_embd": 32, "n_layer": 3, "n_head": 4}
OTHERS = {
    "vocab_size": TOKENS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": SEQUENCE,
}
SOURCES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "GPT-2": ("GPT2LMHeadModel", GPT2, {}),
    "GPT-2, exact GeLU, untied": (
        "GPT2LMHeadModel",
        {**GPT2, "activation_function": "gelu", "tie_word_embeddings": False, "n_inner": 40},
        {},
    ),
    "GPT-2 in shards": ("GPT2LMHeadModel", GPT2, {"max_shard_size": "30KB"}),
    "Llama, grouped queries": (
        "LlamaForCausalLM",
        {**OTHERS, "num_key_value_heads": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
        {},
    ),
    "Llama, tied, biases, wide heads": (
        "LlamaForCausalLM",
        {**OTHERS, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "head_dim": 16},
        {},
    ),
    "GPT-NeoX, one after the other": ("GPTNeoXForCausalLM", {**OTHERS, "use_parallel_residual": False}, {}),
}
"""By name: the class, its config, and how it is saved."""


@pytest.fixture(scope="module")
def ask() -> Iterator[Callable[..., Any]]:
    with hf_peer.peer() as asking:
        yield asking


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("import")


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> str:
    return write_small_tokenizer(folder)


@pytest.fixture(scope="module")
def made(folder: Path, tokenizer: str, ask: Callable[..., Any]) -> dict[str, np.ndarray]:
    """A folder of each model as transformers saves it, with a tokenizer.json, and the logits of each."""
    logits = {}
    for name, (architecture, fields, options) in SOURCES.items():
        logits[name] = ask(hf_peer.make, str(folder / name), architecture, token_ids(), dict(options), **fields)
        shutil.copyfile(tokenizer, folder / name / "tokenizer.json")
    return logits


@pytest.mark.slow
@pytest.mark.parametrize("name", SOURCES)
def test_our_model_computes_what_transformers_computes_and_goes_back_bit_for_bit(
    folder: Path, made: dict[str, np.ndarray], tokenizer: str, tmp_path: Path, name: str
) -> None:
    imported = import_hf(str(folder / name), str(tmp_path / "in"))
    described = yaml.safe_load((tmp_path / "in" / "config.yaml").read_text())
    config = model_config(tokenizer, described["model"])
    assert config.model == saved_model_of(tmp_path / "in")
    with single_process():
        ours = our_logits(find_checkpoint(tmp_path / "in").path, config, rows=TOKENS)
    assert_same_model(ours, made[name])
    export_hf(str(tmp_path / "in"), str(tmp_path / "out"))
    assert_same_tensors(tensors(tmp_path / "out"), tensors(folder / name))
    assert imported.parameters == sum(tensor.numel() for tensor in tensors(tmp_path / "out").values())
    before, after = fields_of(folder / name), fields_of(tmp_path / "out")
    derived = {"transformers_version", "n_inner", "bos_token_id", "eos_token_id", "rope_parameters", "torch_dtype"}
    assert {key: after[key] for key in before.keys() & after.keys() - derived} == {
        key: before[key] for key in before.keys() & after.keys() - derived
    }


@pytest.mark.slow
def test_the_published_gpt2s_names_and_masks_and_torchs_own_files_are_read(
    folder: Path, made: dict[str, np.ndarray], tmp_path: Path
) -> None:
    expected = tensors(folder / "GPT-2")
    source = tmp_path / "source"
    shutil.copytree(folder / "GPT-2", source)
    (source / "model.safetensors").unlink()
    published = {name.removeprefix("transformer."): tensor for name, tensor in expected.items()}
    masks = {f"h.{layer}.attn.bias": torch.ones(1, 1, SEQUENCE, SEQUENCE).tril() for layer in range(3)}
    torch.save({**published, **masks, "lm_head.weight": published["wte.weight"]}, source / "pytorch_model.bin")
    import_hf(str(source), str(tmp_path / "in"))
    export_hf(str(tmp_path / "in"), str(tmp_path / "out"))
    assert_same_tensors(tensors(tmp_path / "out"), expected)


@pytest.mark.slow
def test_a_torch_file_that_holds_more_than_tensors_is_not_loaded(
    folder: Path, made: dict[str, np.ndarray], tmp_path: Path
) -> None:
    source, ran = tmp_path / "source", tmp_path / "ran"
    shutil.copytree(folder / "GPT-2", source)
    (source / "model.safetensors").unlink()
    torch.save({"wte.weight": Harmful(str(ran))}, source / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model.bin: is damaged, or holds more than tensors"):
        import_hf(str(source), str(tmp_path / "in"))
    assert not ran.exists()
    assert not (tmp_path / "in").exists()


class Harmful:
    """Runs code when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path(self.path).mkdir, ())


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", None])
def test_weights_are_of_the_precision_that_was_asked_for_or_of_the_sources(
    folder: Path, tokenizer: str, ask: Callable[..., Any], tmp_path: Path, precision: str | None
) -> None:
    fields, source = {**OTHERS, "num_key_value_heads": 4}, tmp_path / "source"
    ask(hf_peer.make, str(source), "LlamaForCausalLM", token_ids(), {}, **fields)
    original = tensors(source)
    if precision is None:
        half = {name: tensor.bfloat16() for name, tensor in original.items()}
        from safetensors.torch import save_file

        save_file(half, source / "model.safetensors", metadata={"format": "pt"})
    dtype = {"fp32": torch.float32, "fp16": torch.float16}.get(precision or "", torch.bfloat16)
    imported = import_hf(str(source), str(tmp_path / "in"), precision=precision, tokenizer=tokenizer)
    assert imported.precision == precision or (precision, imported.precision) == (None, "bf16")
    assert yaml.safe_load((tmp_path / "in" / "config.yaml").read_text())["training"]["precision"] == imported.precision
    export_hf(str(tmp_path / "in"), str(tmp_path / "out"))
    assert_same_tensors(tensors(tmp_path / "out"), {name: tensor.to(dtype) for name, tensor in original.items()})


@pytest.mark.slow
def test_the_vocabulary_is_padded_by_copies_of_its_last_row_which_the_export_leaves_out(
    folder: Path, made: dict[str, np.ndarray], tokenizer: str, tmp_path: Path
) -> None:
    from megatron_sbld.hf.stored_weights import StoredWeights

    name = "Llama, grouped queries"
    imported = import_hf(str(folder / name), str(tmp_path / "in"), pad_vocab_to_multiple_of=16)
    assert (imported.rows, imported.vocab_size) == (112, TOKENS)
    stored = StoredWeights(find_checkpoint(tmp_path / "in").path)
    source = tensors(folder / name)
    for ours, theirs in (
        ("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
        ("output_layer.weight", "lm_head.weight"),
    ):
        rows = stored.read(ours)
        assert torch.equal(rows[:TOKENS], source[theirs])
        assert torch.equal(rows[TOKENS:], source[theirs][-1:].expand(12, -1))
    export_hf(str(tmp_path / "in"), str(tmp_path / "out"))
    assert_same_tensors(tensors(tmp_path / "out"), source)


LAYOUTS: dict[str, dict[str, Any]] = {
    "tensor": {"tp": 2},
    "uneven": {"pp": 2, "pipeline_model_parallel_layout": "Et|ttL"},
}


def load_and_save_on_two_ranks(folder: str, imported: str, tokenizer: str, fields: dict[str, Any]) -> None:
    from megatron_sbld.checkpoint.manager import load_weights

    for layout, options in LAYOUTS.items():
        config = model_config(tokenizer, fields, **options)
        with run(config, vocab_size=112) as loaded:
            load_weights(checkpoint_path(Path(imported) / "checkpoints", 0), loaded.chunks, loaded.optimizer)
            save(loaded, config, Path(folder) / layout)


@pytest.mark.slow
def test_an_imported_checkpoint_is_loaded_on_other_layouts(
    folder: Path, made: dict[str, np.ndarray], tokenizer: str, tmp_path: Path
) -> None:
    name = "Llama, grouped queries"
    import_hf(str(folder / name), str(tmp_path / "in"), pad_vocab_to_multiple_of=16)
    fields = yaml.safe_load((tmp_path / "in" / "config.yaml").read_text())["model"]
    run_distributed(load_and_save_on_two_ranks, 2, str(tmp_path), str(tmp_path / "in"), tokenizer, fields)
    for layout in LAYOUTS:
        export_hf(str(tmp_path / layout), str(tmp_path / f"{layout}_out"))
        assert_same_tensors(tensors(tmp_path / f"{layout}_out"), tensors(folder / name))


@pytest.mark.slow
def test_the_config_that_is_written_starts_a_run_from_the_imported_weights(
    ask: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from megatron_sbld.cli.parser import parse_config
    from megatron_sbld.cli.pretrain import pretrain_parser

    fields = {**GPT2, "vocab_size": 259, "n_positions": 32}
    corpus = prepare_corpus(tmp_path)
    untrained = tiny_run(tmp_path / "untrained", corpus, checkpoint={"save_at_end": True}, training={"train_iters": 3})
    assert run_here(untrained) == 0  # its export has the tokenizer's files
    export_hf(str(tmp_path / "untrained"), str(tmp_path / "source"))
    ask(hf_peer.make, str(tmp_path / "source"), "GPT2LMHeadModel", token_ids(), {}, **fields)
    with pytest.raises(SystemExit) as ended:
        cli.main(["import", "hf", str(tmp_path / "source"), str(tmp_path / "in")])
    assert ended.value.code == 0
    assert "GPT-2 format" in capsys.readouterr().out
    assert yaml.safe_load((tmp_path / "in" / "config.yaml").read_text())["data"] == {"tokenizer": "byte"}

    args = [
        f"--config={tmp_path / 'in' / 'config.yaml'}",
        f"--data.train_data_path=[{corpus}_train]",
        "--training.train_iters=2",
        "--training.eval_interval=0",
        "--optimizer.lr=1e-30",  # too little to change a weight
        "--optimizer.min_lr=0",
        "--logging.progress=none",
        "--logging.tensorboard=false",
        f"--logging.run_dir={tmp_path / 'run'}",
        "--model.hidden_dropout=0",
        "--model.attention_dropout=0",
    ]
    config: Config = parse_config(pretrain_parser(), args)[0]
    assert run_here(config) == 0
    assert len(losses(tmp_path / "run")) == 2
    export_hf(str(tmp_path / "run"), str(tmp_path / "out"))  # the weights are the imported ones
    assert_same_tensors(tensors(tmp_path / "out"), tensors(tmp_path / "source"))


REFUSED_FIELDS: dict[str, tuple[str, dict[str, Any], str]] = {
    "architecture": (
        "GPT-2",
        {"architectures": ["BloomForCausalLM"]},
        r"architectures = \['BloomForCausalLM'\]: must be",
    ),
    "no architecture": (
        "GPT-2",
        {"architectures": None, "model_type": "opt"},
        r"architectures = \['opt'\]: must be one",
    ),
    "scaled by layer": (
        "GPT-2",
        {"scale_attn_by_inverse_layer_idx": True},
        "scale_attn_by_inverse_layer_idx = True: must be False or left out",
    ),
    "unscaled": ("GPT-2", {"scale_attn_weights": False}, "scale_attn_weights = False: must be True or left out"),
    "activation": ("GPT-2", {"activation_function": "relu"}, "activation_function = 'relu': must be one of gelu, "),
    "dropouts": ("GPT-2", {"embd_pdrop": 0.3}, "embd_pdrop = 0.3: must be equal to resid_pdrop = 0.1"),
    "no layers": ("GPT-2", {"n_layer": 0}, "n_layer = 0.0: must be a whole number of at least 1"),
    "layers in words": ("GPT-2", {"n_layer": "three"}, "n_layer = 'three': must be a number"),
    "size is missing": ("GPT-2", {"n_embd": None}, "n_embd is missing"),
    "heads": (
        "GPT-2",
        {"n_head": 5},
        "describes a model that cannot be represented: model.hidden_size = 32: must be divisible",
    ),
    "quantised": ("GPT-2", {"quantization_config": {"bits": 4}}, "quantization_config = {'bits': 4}: must be None"),
    "fewer rows than tokens": ("GPT-2", {"vocab_size": 90}, "has 100 tokens, but the model's vocab_size is 90"),
    "more rows than stored": ("GPT-2", {"vocab_size": 120}, r"wte.weight has the shape \[100, 32\], but config.json"),
    "more layers than stored": ("GPT-2", {"n_layer": 4}, "GPT-2 weights: transformer.h.3.ln_1.weight is missing"),
    "fewer layers than stored": (
        "GPT-2",
        {"n_layer": 2},
        "config.json has no place for transformer.h.2.attn.c_attn.bias, ",
    ),
    "untied without output": ("GPT-2", {"tie_word_embeddings": False}, "GPT-2 weights: lm_head.weight is missing"),
    "tied with an output": (
        "GPT-2, exact GeLU, untied",
        {"tie_word_embeddings": True},
        "tie_word_embeddings = True in config.json, but lm_head.weight differs",
    ),
    "scaled rope of transformers 4": (
        "Llama, grouped queries",
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        "rope_scaling = {'type': 'linear', 'factor': 2.0}: must be of rope_type 'default' or left out",
    ),
    "scaled rope of transformers 5": (
        "Llama, grouped queries",
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}},
        "rope_parameters = .*must be of rope_type 'default'",
    ),
    "rope scaled under one of its two names": (
        "Llama, grouped queries",
        {"rope_scaling": {"rope_type": "default", "type": "yarn"}},
        "rope_scaling = .*must be of rope_type 'default'",
    ),
    "rope by layer type": (
        "Llama, grouped queries",
        {"rope_parameters": {"full_attention": {"rope_type": "yarn"}}},
        "rope_parameters = .*must be of rope_type 'default'",
    ),
    "text as base": ("Llama, grouped queries", {"rope_parameters": {"rope_theta": "x"}}, "rope_theta = 'x': must be"),
    "fraction as base": (
        "Llama, grouped queries",
        {"rope_parameters": {"rope_theta": 0.5}},
        "rope_theta = 0.5: must be",
    ),
    "part of a head": (
        "Llama, grouped queries",
        {"rope_parameters": {"partial_rotary_factor": 0.5}},
        "partial_rotary_factor = 0.5: must be 1.0",
    ),
    "biases of one kind": (
        "Llama, grouped queries",
        {"mlp_bias": True},
        "mlp_bias = True: must be equal to attention_b",
    ),
    "other activation": ("Llama, grouped queries", {"hidden_act": "gelu"}, "hidden_act = 'gelu': must be 'silu'"),
    "side by side": (
        "GPT-NeoX, one after the other",
        {"use_parallel_residual": True},
        "use_parallel_residual = True: must be false",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", REFUSED_FIELDS)
def test_what_cannot_be_held_is_refused_by_field(
    folder: Path, made: dict[str, np.ndarray], tmp_path: Path, case: str
) -> None:
    name, changes, message = REFUSED_FIELDS[case]
    source = tmp_path / "source"
    shutil.copytree(folder / name, source)
    (source / "config.json").write_text(json.dumps({**fields_of(source), **changes}))
    with pytest.raises(ValueError, match=message):
        import_hf(str(source), str(tmp_path / "in"))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "rope",
    [
        {"rope_parameters": None, "rope_scaling": None, "rope_theta": 300.0},
        {"rope_parameters": None, "rope_scaling": {"rope_type": "default"}, "rope_theta": 300.0},
        {"rope_parameters": None, "rope_scaling": {"type": "default", "rope_theta": 300.0}},
        {"rope_parameters": {"rope_type": "default", "type": "default", "rope_theta": 300.0}},
        {"rope_parameters": {"rope_theta": 400.0}, "rope_scaling": {"rope_type": "default"}, "rope_theta": 300.0},
    ],
)
def test_rotary_positions_that_are_not_scaled_are_taken(
    folder: Path, made: dict[str, np.ndarray], tmp_path: Path, rope: dict[str, Any]
) -> None:
    source = tmp_path / "source"
    shutil.copytree(folder / "Llama, grouped queries", source)
    (source / "config.json").write_text(json.dumps({**fields_of(source), **rope}))
    import_hf(str(source), str(tmp_path / "in"))
    assert read_config(str(tmp_path / "in" / "config.yaml")).model.rotary_base == 300


def without_config(source: Path) -> None:
    (source / "config.json").unlink()


def broken_config(source: Path) -> None:
    (source / "config.json").write_text("{")


def without_weights(source: Path) -> None:
    (source / "model.safetensors").unlink()


def truncated_weights(source: Path) -> None:
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def missing_shard(source: Path) -> None:
    (source / "model.safetensors").unlink()
    index = {"weight_map": {"transformer.wte.weight": "model-00001-of-00002.safetensors"}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))


def shard_elsewhere(source: Path) -> None:
    (source / "model.safetensors").rename(source.parent / "stolen.safetensors")
    index = {"weight_map": {"transformer.wte.weight": "../stolen.safetensors"}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))


def without_tokenizer(source: Path) -> None:
    (source / "tokenizer.json").unlink()


DAMAGES = {
    without_config: r"source: is not a local folder of a model \(no config.json\)",
    broken_config: r"config.json: cannot be read",
    without_weights: r"has no weights; looked for model.safetensors",
    truncated_weights: r"source/model.safetensors: cannot be read",
    missing_shard: r"model-00001-of-00002.safetensors: .* cannot be read: no such file in the folder",
    shard_elsewhere: r"stolen.safetensors: .* cannot be read: no such file in the folder",
    without_tokenizer: r"the folder has none of tokenizer.json",
}


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_source_is_refused_by_file(
    folder: Path, made: dict[str, np.ndarray], tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    source = tmp_path / "source"
    shutil.copytree(folder / "GPT-2", source)
    damage(source)
    with pytest.raises(ValueError, match=DAMAGES[damage]):
        import_hf(str(source), str(tmp_path / "in"))
    assert not (tmp_path / "in").exists()


@pytest.mark.slow
def test_an_imported_checkpoint_is_no_start_with_optimizer_state(
    folder: Path, made: dict[str, np.ndarray], tokenizer: str, tmp_path: Path
) -> None:
    from megatron_sbld.checkpoint.manager import load_checkpoint

    import_hf(str(folder / "GPT-2"), str(tmp_path / "in"))
    fields = yaml.safe_load((tmp_path / "in" / "config.yaml").read_text())["model"]
    with single_process(), run(model_config(tokenizer, fields), vocab_size=TOKENS) as other:
        with pytest.raises(ValueError, match=r"cannot be loaded: .*(lacks|optimizer)"):
            load_checkpoint(find_checkpoint(tmp_path / "in").path, *other.parts, seed=1)


def test_padding_to_a_multiple_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--pad_vocab_to_multiple_of = 0 is not allowed"):
        import_hf(str(tmp_path), str(tmp_path / "in"), pad_vocab_to_multiple_of=0)
