"""Which implementation gpt_block_spec chooses, and that its local one is Megatron's local layer otherwise."""

from __future__ import annotations

import logging

import pytest
import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_sbld.mcore.local import layer_specs
from megatron_sbld.mcore.local.attention import SDPACoreAttention
from megatron_sbld.mcore.local.layer_specs import choose_transformer_impl, gpt_block_spec
from megatron_sbld.mcore.local.linear import ColumnParallelLinear, RowParallelLinear
from megatron_sbld.mcore.local.norm import LayerNorm, RMSNorm
from tests.mcore.helpers import tiny_config, tiny_gpt, train


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.fixture(params=[True, False], ids=["engine", "no_engine"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(layer_specs, "transformer_engine_available", lambda: request.param)
    return request.param


@pytest.mark.usefixtures("gpu")
def test_auto_takes_transformer_engine_where_it_is_installed(engine: bool) -> None:
    assert choose_transformer_impl("auto")[0] == ("transformer_engine" if engine else "local")


@pytest.mark.usefixtures("gpu")
def test_transformer_engine_that_was_asked_for_is_used_or_refused(engine: bool) -> None:
    if engine:
        assert choose_transformer_impl("transformer_engine")[0] == "transformer_engine"
    else:
        with pytest.raises(ValueError, match=r"model\.transformer_impl.*cannot be imported"):
            choose_transformer_impl("transformer_engine")


@pytest.mark.usefixtures("no_gpu", "engine")
def test_without_a_gpu_auto_is_local_and_transformer_engine_is_refused() -> None:
    assert choose_transformer_impl("auto") == ("local", "Transformer Engine needs a CUDA device")
    with pytest.raises(ValueError, match="CUDA device"):
        choose_transformer_impl("transformer_engine")


@pytest.mark.usefixtures("gpu", "engine")
def test_local_is_local_whatever_is_installed() -> None:
    assert choose_transformer_impl("local")[0] == "local"


def test_an_unknown_implementation_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'fast'.*auto, local, transformer_engine"):
        choose_transformer_impl("fast")


@pytest.mark.usefixtures("one_rank", "no_gpu")
@pytest.mark.parametrize(("normalization", "norm"), [("LayerNorm", LayerNorm), ("RMSNorm", RMSNorm)])
def test_every_norm_linear_layer_and_attention_of_the_local_block_is_ours(normalization: str, norm: type) -> None:
    block = tiny_gpt(tiny_config(normalization=normalization))[0].decoder
    assert type(block.final_layernorm) is norm
    for layer in block.layers:
        assert (type(layer.input_layernorm), type(layer.pre_mlp_layernorm)) == (norm, norm)
        assert type(layer.self_attention.core_attention) is SDPACoreAttention
        assert type(layer.self_attention.linear_qkv) is type(layer.mlp.linear_fc1) is ColumnParallelLinear
        assert type(layer.self_attention.linear_proj) is type(layer.mlp.linear_fc2) is RowParallelLinear


@pytest.mark.usefixtures("one_rank", "no_gpu")
def test_training_with_it_equals_training_with_megatrons_local_layers() -> None:
    def stock(config: TransformerConfig, vp_stage: int | None) -> TransformerBlockSubmodules:
        layers = [get_gpt_layer_local_spec()] * config.num_layers
        return TransformerBlockSubmodules(layer_specs=layers, layer_norm=LayerNorm)

    ours, theirs = tiny_gpt(tiny_config()), tiny_gpt(tiny_config(), spec=stock)
    assert ours[0].state_dict().keys() == theirs[0].state_dict().keys()
    for actual, expected in zip(train(ours), train(theirs), strict=True):
        assert actual.loss == pytest.approx(expected.loss, rel=1e-5)
        assert actual.grad_norm == pytest.approx(expected.grad_norm, rel=1e-4)


@pytest.mark.usefixtures("one_rank", "no_gpu")
def test_the_choice_and_its_reason_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    layer_specs._log_once.cache_clear()
    with caplog.at_level(logging.INFO, logger=layer_specs.__name__):
        for _ in range(2):
            gpt_block_spec(tiny_config())
    assert [record.getMessage() for record in caplog.records] == [
        "transformer_impl: local (Transformer Engine needs a CUDA device)"
    ]
