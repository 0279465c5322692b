"""Checkpoints of tiny models, and the logits of ours, for tests of export and import."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from megatron_sbld.config.sections import Config, DataConfig, ModelConfig
from tests.checkpoint.checkpoint_runs import SEQUENCE, Run, configure, run

TOKENS = 100
"""Of the tokenizer; the model's vocabulary has 128 rows."""
LLAMA: dict[str, Any] = {
    "position_embedding_type": "rope",
    "normalization": "RMSNorm",
    "swiglu": True,
    "add_bias_linear": False,
    "num_query_groups": 2,
}
NEOX: dict[str, Any] = {"position_embedding_type": "rope", "rotary_percent": 0.5}
UNTIED = {"untie_embeddings_and_output_weights": True}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT-2": ("GPT2LMHeadModel", {}),
    "GPT-2, tanh, untied": ("GPT2LMHeadModel", {"activation_func": "gelu_tanh", **UNTIED}),
    "GPT-2, narrow MLP, more positions": (
        "GPT2LMHeadModel",
        {"ffn_hidden_size": 48, "max_position_embeddings": 24, "layernorm_epsilon": 1e-3},
    ),
    "Llama": ("LlamaForCausalLM", LLAMA),
    "Llama, untied": ("LlamaForCausalLM", {**LLAMA, **UNTIED}),
    "Llama, biases, wide heads, other base": (
        "LlamaForCausalLM",
        {**LLAMA, "add_bias_linear": True, "kv_channels": 16, "rotary_base": 500, "num_query_groups": 1},
    ),
    "GPT-NeoX": ("GPTNeoXForCausalLM", NEOX),
    "GPT-NeoX, tanh, untied, whole heads": (
        "GPTNeoXForCausalLM",
        {**NEOX, **UNTIED, "rotary_percent": 1.0, "activation_func": "gelu_tanh", "rotary_base": 500},
    ),
}
"""By name: the class of transformers that holds it, and our model's fields."""


def token_ids(seed: int = 0, tokens: int = TOKENS, length: int = SEQUENCE) -> list[list[int]]:
    """Three sequences."""
    return np.random.default_rng(seed).integers(0, tokens, (3, length)).tolist()


def write_small_tokenizer(folder: Path) -> str:
    """A byte-level BPE of TOKENS tokens as a tokenizer.json; its path."""
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())[: TOKENS - 1]
    vocabulary = {token: number for number, token in enumerate([*characters, "<|endoftext|>"])}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>"])
    path = folder / "small_tokenizer.json"
    backend.save(str(path))
    return str(path)


def model_config(tokenizer: str, fields: dict[str, Any], **layout: Any) -> Config:
    """The tiny run of the checkpoint tests with another model, and weights that make logits differ."""
    config = configure(dropout=0.0, **layout)
    return replace(
        config,
        model=replace(config.model, **{"init_method_std": 0.2, **fields}),
        data=DataConfig(tokenizer=tokenizer),
    )


def train_state(config: Config) -> dict[str, Any]:
    """What the trainer saves of a run, as far as export reads it."""
    from megatron_sbld.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(config.data.tokenizer)
    return {
        "config": dataclasses.asdict(config),
        "vocab_size": tokenizer.vocab_size,
        "tokenizer": tokenizer.fingerprint(),
    }


def save(of: Run, config: Config, folder: Path) -> None:
    """Save a run as the trainer does. Collective."""
    from megatron_sbld.checkpoint.manager import CheckpointManager

    CheckpointManager(folder).save(3, *of.parts, train_state(config))


def save_random(config: Config, folder: Path) -> np.ndarray:
    """Save a model of random weights, norms and biases included; its logits for `token_ids()`. One process."""
    with run(config) as made:
        with torch.no_grad():
            for parameter in made.chunks[0].parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        save(made, config, folder)
        return logits_of(made)


def our_logits(checkpoint: Path, config: Config, ids: list[list[int]] | None = None, rows: int = 128) -> np.ndarray:
    """[b, s, rows] of the trainer's own model with a checkpoint's weights, for `token_ids()` if no ids are given."""
    from megatron_sbld.checkpoint.manager import load_weights

    with run(config, seed=77, vocab_size=rows) as loaded:
        load_weights(checkpoint, loaded.chunks)
        return logits_of(loaded, ids)


def logits_of(of: Run, ids: list[list[int]] | None = None) -> np.ndarray:
    """[b, s, rows of the vocabulary] of a model in one process."""
    tokens = torch.tensor(token_ids() if ids is None else ids)
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    with torch.no_grad():
        return of.chunks[0].eval()(tokens, positions, None).float().numpy()


def assert_same_model(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Logits equal to 1e-5 and argmax everywhere, on logits of a size at which that says something."""
    vocabulary = theirs.shape[-1]
    assert np.std(ours) > 0.3
    np.testing.assert_allclose(ours[..., :vocabulary], theirs, atol=1e-5, rtol=1e-5)
    assert (ours[..., :vocabulary].argmax(-1) == theirs.argmax(-1)).all()


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder of safetensors."""
    from safetensors.torch import load_file

    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def assert_same_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Equal bit for bit, with the same names and types."""
    assert sorted(found) == sorted(expected)
    different = [
        name
        for name, tensor in expected.items()
        if found[name].dtype != tensor.dtype or not torch.equal(found[name], tensor)
    ]
    assert different == []


def fields_of(folder: Path) -> dict[str, Any]:
    """The content of config.json."""
    return json.loads((folder / "config.json").read_text())


def saved_model_of(folder: Path) -> ModelConfig:
    """The model section of a checkpoint of ours."""
    from megatron_sbld.checkpoint.files import find_checkpoint, read_train_state
    from megatron_sbld.checkpoint.manager import saved_model

    return saved_model(read_train_state(find_checkpoint(folder).path)["config"])
