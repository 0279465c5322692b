"""SDPACoreAttention against Megatron's DotProductAttention; context parallelism: training/test_pretrain_ranks.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType

from megatron_sbld.mcore.local.attention import SDPACoreAttention
from tests.harness import model_parallel, single_process
from tests.mcore.helpers import tiny_config

HEADS, HEAD_SIZE, SEQUENCE, BATCH = 4, 8, 24, 3


@pytest.fixture(autouse=True, scope="module")
def _parallel_state() -> Iterator[None]:
    with single_process(), model_parallel():
        yield


def _attention(
    cls: type, mask_type: AttnMaskType = AttnMaskType.causal, layer_number: int = 1, **overrides: Any
) -> Any:
    return cls(tiny_config(**overrides), layer_number, mask_type, "self")


def _inputs(groups: int = HEADS, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(SEQUENCE, BATCH, n, HEAD_SIZE) for n in (HEADS, groups, groups)]
    return [torch.randn(s, generator=generator).to(torch.cuda.current_device(), dtype).requires_grad_() for s in shapes]


def _output_and_gradients(attention: torch.nn.Module, inputs: list[torch.Tensor], mask: torch.Tensor | None) -> list:
    output = attention(*inputs, mask)
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output)
    return [output, *torch.autograd.grad((output * direction).sum(), inputs)]


def _document_mask() -> torch.Tensor:
    """True = masked: causal, and documents of 7 tokens do not see each other; [b, 1, s, s]."""
    position = torch.arange(SEQUENCE)
    masked = (position[:, None] < position) | (position[:, None] // 7 != position // 7)
    return masked.expand(BATCH, 1, -1, -1).to(torch.cuda.current_device())


@pytest.mark.parametrize("groups", [HEADS, 2, 1])
@pytest.mark.parametrize("masked", [False, True])
def test_output_and_gradients_equal_megatrons_unfused_attention(groups: int, masked: bool) -> None:
    stock = _attention(DotProductAttention, num_query_groups=groups)
    ours = _attention(SDPACoreAttention, num_query_groups=groups)
    mask = _document_mask() if masked else None
    expected = _output_and_gradients(stock, _inputs(groups), mask)
    actual = _output_and_gradients(ours, _inputs(groups), mask)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_without_mask_and_causality_every_query_sees_every_key() -> None:
    stock = _attention(DotProductAttention, AttnMaskType.no_mask)
    ours = _attention(SDPACoreAttention, AttnMaskType.no_mask)
    torch.testing.assert_close(ours(*_inputs(), None), stock(*_inputs(), None), rtol=1e-5, atol=1e-5)


def test_a_single_query_sees_all_cached_keys() -> None:
    query, key, value = _inputs()
    stock, ours = _attention(DotProductAttention), _attention(SDPACoreAttention)
    torch.testing.assert_close(ours(query[-1:], key, value, None), stock(query[-1:], key, value, None))


def test_scale_of_the_softmax_is_taken_over() -> None:
    arguments = (tiny_config(), 1, AttnMaskType.causal, "self")
    stock, ours = (cls(*arguments, softmax_scale=0.7) for cls in (DotProductAttention, SDPACoreAttention))
    torch.testing.assert_close(ours(*_inputs(), None), stock(*_inputs(), None), rtol=1e-5, atol=1e-5)


def test_layer_scaling_of_scores_leaves_the_result_as_it_is() -> None:
    options = {"layer_number": 3, "apply_query_key_layer_scaling": True}
    stock, ours = (_attention(cls, **options) for cls in (DotProductAttention, SDPACoreAttention))
    torch.testing.assert_close(ours(*_inputs(), None), stock(*_inputs(), None), rtol=1e-5, atol=1e-5)


def test_bf16_is_as_close_to_fp32_as_megatrons_own() -> None:
    exact = _attention(DotProductAttention)(*_inputs(), None)
    inputs = _inputs(dtype=torch.bfloat16)
    stock = _attention(DotProductAttention, bf16=True, params_dtype=torch.bfloat16)(*inputs, None)
    ours = _attention(SDPACoreAttention, bf16=True, params_dtype=torch.bfloat16)(*inputs, None)
    assert (ours - exact).abs().max() <= 2 * (stock - exact).abs().max()


def test_dropout_acts_in_training_from_the_trackers_state_and_not_in_evaluation() -> None:
    ours, without = _attention(SDPACoreAttention, attention_dropout=0.5), _attention(SDPACoreAttention)
    default_state = torch.cuda.get_rng_state()
    first, second = ours(*_inputs(), None), ours(*_inputs(), None)
    assert not torch.equal(first, second)  # the tracker's state moves on
    assert torch.equal(torch.cuda.get_rng_state(), default_state)  # the default one stays
    assert torch.equal(ours.eval()(*_inputs(), None), without(*_inputs(), None))


def test_dropout_keeps_the_expected_output() -> None:
    ours, without = _attention(SDPACoreAttention, attention_dropout=0.3), _attention(SDPACoreAttention)
    inputs = [x.detach() for x in _inputs()]
    mean = torch.stack([ours(*inputs, None) for _ in range(2000)]).mean(0)
    torch.testing.assert_close(mean, without(*inputs, None), rtol=0, atol=0.15)


@pytest.mark.parametrize(
    ("name", "value"),
    [("window_size", (4, 0)), ("softmax_type", "learnable"), ("qk_clip", True), ("log_max_attention_logit", True)],
)
def test_what_it_cannot_compute_is_refused_by_name(name: str, value: Any) -> None:
    config = tiny_config()
    setattr(config, name, value)
    with pytest.raises(ValueError, match=name):
        SDPACoreAttention(config, 1, AttnMaskType.causal, "self")


def test_unsupported_mask_and_attention_types_are_refused() -> None:
    with pytest.raises(ValueError, match="attn_mask_type"):
        SDPACoreAttention(tiny_config(), 1, AttnMaskType.padding_causal, "self")
    with pytest.raises(ValueError, match="attention_type"):
        SDPACoreAttention(tiny_config(), 1, AttnMaskType.causal, "cross")


@pytest.mark.parametrize("name", ["attention_bias", "packed_seq_params"])
def test_arguments_that_only_transformer_engine_handles_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        _attention(SDPACoreAttention)(*_inputs(), None, **{name: object()})
