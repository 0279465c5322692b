"""The norms are torch's, bit for bit, and mark their parameters under sequence parallelism."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_sbld.mcore.local.norm import LayerNorm, RMSNorm, norm_class


def _config(normalization: str, **overrides: Any) -> TransformerConfig:
    values = {"num_layers": 1, "hidden_size": 32, "num_attention_heads": 4, "normalization": normalization}
    return TransformerConfig(**{**values, **overrides})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("normalization", ["LayerNorm", "RMSNorm"])
def test_output_and_gradients_equal_megatrons_norm_bit_for_bit(normalization: str, dtype: torch.dtype) -> None:
    config = _config(normalization)
    stock = WrappedTorchNorm(config, 32, eps=1e-3).to(dtype)
    ours = norm_class(normalization)(config, 32, eps=1e-3).to(dtype)
    assert ours.state_dict().keys() == stock.state_dict().keys()
    for parameter in stock.parameters():
        torch.nn.init.normal_(parameter)
    ours.load_state_dict(stock.state_dict())

    def output_and_gradients(norm: torch.nn.Module) -> list[torch.Tensor]:
        x = torch.randn((6, 2, 32), generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
        output = norm(x)
        return [output, *torch.autograd.grad(output.square().sum(), [x, *norm.parameters()])]

    for actual, expected in zip(output_and_gradients(ours), output_and_gradients(stock), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("cls", [LayerNorm, RMSNorm])
def test_parameters_are_marked_for_the_sum_over_tensor_parallel_ranks(cls: type) -> None:
    parallel = _config(cls.__name__, tensor_model_parallel_size=2, sequence_parallel=True)
    assert all(parameter.sequence_parallel for parameter in cls(parallel, 32).parameters())
    assert not any(parameter.sequence_parallel for parameter in cls(_config(cls.__name__), 32).parameters())


def test_settings_that_torchs_norms_do_not_have_are_refused_by_name() -> None:
    for name in ("layernorm_zero_centered_gamma", "persist_layer_norm", "memory_efficient_layer_norm"):
        with pytest.raises(ValueError, match=name):
            LayerNorm(_config("LayerNorm", **{name: True}), 32)
    with pytest.raises(ValueError, match="RMSNorm"):
        RMSNorm(_config("LayerNorm"), 32)
    with pytest.raises(ValueError, match="L2Norm"):
        norm_class("L2Norm")
