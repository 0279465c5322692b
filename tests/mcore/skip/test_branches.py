"""Who takes a layer's branches back to the residual stream: the fused add beside Megatron's own."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import torch

from megatron_sbld.controller import DropController
from megatron_sbld.mcore import fuse_residual, make_switchable
from megatron_sbld.mcore.skip.branches import _Fused, _Scaled
from tests.harness import model_parallel, single_process
from tests.mcore.helpers import SEQUENCE, Listed, heterogeneous_block_spec, tiny_config, tiny_gpt, train

KEEP_PROBS = (1.0, 0.5, 0.25, 0.8)


@pytest.fixture(scope="module", autouse=True)
def _one_process() -> Iterator[None]:
    with single_process():
        yield


def steps(*, fused: bool, keep_probs: tuple[float, ...] = KEEP_PROBS, scale: str = "none", **config: float) -> list:
    with model_parallel():
        chunks = tiny_gpt(tiny_config(**config))
        controller = DropController(Listed(*keep_probs, residual_scale=scale))
        make_switchable(chunks, controller)
        if fused:
            fuse_residual(chunks)
        return train(chunks, before_iteration=controller.begin_iteration)


@pytest.mark.parametrize("scale", ["none", "inverse_keep_prob"])
def test_without_dropout_training_is_megatrons(scale: str) -> None:
    for found, expected in zip(steps(fused=True, scale=scale), steps(fused=False, scale=scale), strict=True):
        assert found.loss == pytest.approx(expected.loss, rel=1e-6)
        assert found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-5)


def test_without_dropout_and_scale_it_is_megatrons_bit_for_bit() -> None:
    assert steps(fused=True) == steps(fused=False)


def test_with_dropout_it_is_another_mask_of_the_same_share() -> None:
    found, expected = steps(fused=True, hidden_dropout=0.5), steps(fused=False, hidden_dropout=0.5)
    assert found != expected
    assert found == steps(fused=True, hidden_dropout=0.5)
    with model_parallel():
        (chunk,) = tiny_gpt(tiny_config(hidden_dropout=0.5))
        fuse_residual(chunk)
        layer = chunk.decoder.layers[0].train()
        hidden = torch.zeros(SEQUENCE, 64, 32)
        with torch.no_grad():
            layer.mlp.linear_fc2.bias.fill_(1.0)
            layer.mlp.linear_fc2.weight.zero_()
            layer.self_attention.linear_proj.weight.zero_()
            layer.self_attention.linear_proj.bias.zero_()
            kept = layer(hidden_states=hidden, attention_mask=None)[0]
        assert set(kept.unique().tolist()) == {0.0, 2.0}
        assert float(kept.mean()) == pytest.approx(1.0, abs=0.03)


def test_evaluation_is_megatrons_bit_for_bit() -> None:
    with model_parallel():
        (fused,), (stock,) = (tiny_gpt(tiny_config(hidden_dropout=0.5)) for _ in range(2))
        fuse_residual(fused)
        hidden = torch.randn(SEQUENCE, 2, 32)
        for ours, theirs in zip(fused.eval().decoder.layers, stock.eval().decoder.layers, strict=True):
            found = ours(hidden_states=hidden, attention_mask=None)[0]
            assert torch.equal(found, theirs(hidden_states=hidden, attention_mask=None)[0])


def test_names_of_parameters_and_state_stay() -> None:
    with model_parallel():
        (fused,), (stock,) = (tiny_gpt(tiny_config()) for _ in range(2))
        fuse_residual(fused)
        assert fused.state_dict().keys() == stock.state_dict().keys()


def test_it_may_come_before_or_after_the_switch_and_twice() -> None:
    with model_parallel():
        (chunk,) = tiny_gpt(tiny_config())
        layer = chunk.decoder.layers[1]
        stock = layer.mlp_bda
        scaled = DropController(Listed(*KEEP_PROBS, residual_scale="inverse_keep_prob"))
        make_switchable(chunk, scaled)
        assert (type(layer.mlp_bda), layer.mlp_bda.stock) == (_Scaled, stock)
        for _ in range(2):
            fuse_residual(chunk)
            assert (type(layer.mlp_bda), layer.mlp_bda.stock) == (_Fused, stock)
        make_switchable(chunk, scaled)
        assert (type(layer.mlp_bda), layer.mlp_bda.stock) == (_Fused, stock)


def test_a_layer_without_a_branch_is_left_alone() -> None:
    attention, feed_forward = {"n_heads_in_group": 1}, {"ffn_mult": 2.0}
    blocks = [
        {"attention": {"no_op": True, "n_heads_in_group": None}, "ffn": feed_forward},
        {"attention": attention, "ffn": {"no_op": True, "ffn_mult": None}},
    ]
    with model_parallel():
        config = tiny_config(
            num_layers=2,
            heterogeneous_block_specs=True,
            heterogeneous_layers_config_encoded_json=json.dumps({"block_configs": blocks}),
        )
        (chunk,) = tiny_gpt(config, spec=heterogeneous_block_spec)
        fuse_residual(chunk)
        fused = [
            [isinstance(layer.self_attn_bda, _Fused), isinstance(layer.mlp_bda, _Fused)]
            for layer in chunk.decoder.layers
        ]
        assert fused == [[False, True], [True, False]]


def test_what_is_no_gpt_is_refused() -> None:
    with pytest.raises(ValueError, match="only GPT-like models"):
        fuse_residual(torch.nn.Linear(2, 2))
