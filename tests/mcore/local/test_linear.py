"""The linear layers against megatron-core's: the same outputs and gradients, and who adds the bias."""

from __future__ import annotations

import pytest
import torch
from megatron.core import tensor_parallel

from megatron_sbld.mcore.local.linear import ColumnParallelLinear, RowParallelLinear
from tests.mcore.helpers import tiny_config

COLUMN = (ColumnParallelLinear, tensor_parallel.ColumnParallelLinear, {})
ROW = (RowParallelLinear, tensor_parallel.RowParallelLinear, {"input_is_parallel": True})
FUSIONS = ("bias_activation_fusion", "bias_dropout_fusion")

pytestmark = pytest.mark.usefixtures("one_rank")


def build(cls: type, *, bias: bool, skip_bias_add: bool, fused: bool = False, **kwargs: object) -> torch.nn.Module:
    config = tiny_config(**dict.fromkeys(FUSIONS, fused))
    layer = cls(
        *(32, 48), config=config, init_method=config.init_method, bias=bias, skip_bias_add=skip_bias_add, **kwargs
    )
    if bias:
        torch.nn.init.normal_(layer.bias)
    return layer


def outputs_and_gradients(layer: torch.nn.Module) -> list[torch.Tensor]:
    """Output with its bias, and the gradients of the input and of each parameter."""
    hidden = torch.randn(6, 2, 32, generator=torch.Generator().manual_seed(7)).requires_grad_()
    output, bias = layer(hidden)
    output = output if bias is None else output + bias
    return [output.detach(), *torch.autograd.grad((output**3).sum(), [hidden, *layer.parameters()])]


@pytest.mark.parametrize(("own", "stock", "kwargs"), [COLUMN, ROW], ids=["column", "row"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("skip_bias_add", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_they_compute_what_megatrons_do(
    own: type, stock: type, kwargs: dict[str, object], bias: bool, skip_bias_add: bool, fused: bool
) -> None:
    same = dict(kwargs, bias=bias, skip_bias_add=skip_bias_add, fused=fused)
    ours, theirs = build(own, **same), build(stock, **same)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    ours.load_state_dict(theirs.state_dict())
    for actual, expected in zip(outputs_and_gradients(ours), outputs_and_gradients(theirs), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("own", "kwargs"), [(COLUMN[0], COLUMN[2]), (ROW[0], ROW[2])], ids=["column", "row"])
@pytest.mark.parametrize(
    ("skip_bias_add", "fused", "returned"), [(False, True, False), (True, False, False), (True, True, True)]
)
def test_the_bias_is_returned_only_where_megatron_fuses_it_elsewhere(
    own: type, kwargs: dict[str, object], skip_bias_add: bool, fused: bool, returned: bool
) -> None:
    layer = build(own, bias=True, skip_bias_add=skip_bias_add, fused=fused, **kwargs)
    assert (layer(torch.zeros(6, 2, 32))[1] is not None) == returned


def test_a_weight_given_in_the_call_is_used() -> None:
    layer, other = build(ColumnParallelLinear, bias=False, skip_bias_add=False), torch.randn(48, 32)
    hidden = torch.randn(6, 2, 32)
    torch.testing.assert_close(layer(hidden, other)[0], hidden @ other.T)


@pytest.mark.parametrize(("own", "kwargs"), [(COLUMN[0], COLUMN[2]), (ROW[0], ROW[2])], ids=["column", "row"])
def test_the_weights_gradient_is_added_to_megatrons_buffer(own: type, kwargs: dict[str, object]) -> None:
    layer = build(own, bias=True, skip_bias_add=False, **kwargs)
    expected = outputs_and_gradients(layer)
    for param in layer.parameters():  # as Megatron's DistributedDataParallel does
        param.main_grad, param.grad_added_to_main_grad = torch.ones_like(param), False
    for passes in (1, 2):
        output, d_hidden, _, d_bias = outputs_and_gradients(layer)
        torch.testing.assert_close(output, expected[0])
        torch.testing.assert_close(d_hidden, expected[1])
        torch.testing.assert_close(d_bias, expected[3])
        torch.testing.assert_close(layer.weight.main_grad, 1 + passes * expected[2], rtol=1e-5, atol=1e-4)
        assert layer.weight.grad_added_to_main_grad
    assert not layer.bias.grad_added_to_main_grad


def test_a_buffer_of_another_type_is_left_to_megatron() -> None:
    layer = build(ColumnParallelLinear, bias=True, skip_bias_add=False)
    layer.weight.main_grad, layer.weight.grad_added_to_main_grad = torch.zeros(48, 32, dtype=torch.float64), False
    expected = outputs_and_gradients(build_like(layer))
    for actual, wanted in zip(outputs_and_gradients(layer), expected, strict=True):
        torch.testing.assert_close(actual, wanted)
    assert not layer.weight.main_grad.any()
    assert not layer.weight.grad_added_to_main_grad


def build_like(layer: torch.nn.Module) -> torch.nn.Module:
    copy = build(type(layer), bias=True, skip_bias_add=False)
    copy.load_state_dict(layer.state_dict())
    return copy
