"""What model.activation_func names is what is computed, with Megatron's fusions and without."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_gelu import bias_gelu

from megatron_sbld.config.sections import Config, ModelConfig
from megatron_sbld.training.model import _activation, gelu_tanh, transformer_config

X = torch.linspace(-6, 6, 1001)


def test_the_default_is_the_exact_gelu_that_it_always_was() -> None:
    on_this_machine = transformer_config(Config())
    assert on_this_machine.activation_func is F.gelu
    assert not on_this_machine.bias_activation_fusion


def test_the_tanh_approximation_differs_from_the_exact_gelu_and_is_megatrons_fused_one() -> None:
    assert 1e-4 < (gelu_tanh(X) - F.gelu(X)).abs().max() < 1e-3
    with torch.compiler.set_stance("force_eager"):
        fused = bias_gelu(torch.full_like(X, 0.25), X - 0.25)
    torch.testing.assert_close(fused, gelu_tanh(X), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", ["gelu", "gelu_tanh"])
def test_a_fused_activation_is_the_one_that_was_asked_for(name: str, bias: bool, on_gpu: bool) -> None:
    model = ModelConfig(activation_func=name, add_bias_linear=bias)  # type: ignore[arg-type]
    function, fused = _activation(model, on_gpu)
    assert fused == (on_gpu and bias and name == "gelu_tanh")
    if fused:
        assert function is F.gelu  # by which Megatron chooses its fused tanh approximation
    else:
        torch.testing.assert_close(function(X), F.gelu(X, approximate="tanh" if name == "gelu_tanh" else "none"))


def test_swiglu_is_fused_on_a_gpu_alone() -> None:
    assert _activation(ModelConfig(swiglu=True), True) == (F.silu, True)
    assert _activation(ModelConfig(swiglu=True), False) == (F.silu, False)
