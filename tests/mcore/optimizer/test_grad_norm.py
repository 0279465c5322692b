"""Gradient clipping without Transformer Engine and Apex: the same bits as megatron-core's own, in fewer operations."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from megatron.core.optimizer import clip_grads
from megatron.core.utils import local_multi_tensor_l2_norm, local_multi_tensor_scale, to_local_if_dtensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate

from megatron_sbld.mcore.optimizer.grad_norm import clip_in_groups
from tests.mcore.optimizer.operators import Count

SHAPES = [(64, 32), (32,), (1,), (7, 5), (4096,)]


@pytest.fixture(autouse=True)
def megatrons_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start from megatron-core's local functions, and leave what was there."""
    monkeypatch.setattr(clip_grads, "l2_norm_impl", local_multi_tensor_l2_norm)
    monkeypatch.setattr(clip_grads, "multi_tensor_scale_impl", local_multi_tensor_scale)
    monkeypatch.setattr(clip_grads, "to_local_if_dtensor", to_local_if_dtensor)


def gradients(scale: float, times: int) -> list[torch.nn.Parameter]:
    rng = torch.Generator().manual_seed(1)
    params = [torch.nn.Parameter(torch.zeros(shape)) for shape in SHAPES * times]
    for param in params:
        param.grad = torch.randn(param.shape, generator=rng) * scale
    return params


def clipped(scale: float, times: int = 1) -> tuple[float, list[torch.Tensor], Counter[str]]:
    params = gradients(scale, times)
    with Count() as count:
        norm = clip_grads.get_grad_norm_fp32([param.grad for param in params], grad_stats_parallel_group=None)
        clip_grads.clip_grad_by_total_norm_fp32(params, 1.0, norm)
    return norm, [param.grad for param in params], count.operators


@pytest.mark.parametrize("scale", [1e-4, 1e-2, 1.0, 1e4])
@pytest.mark.usefixtures("one_rank")
def test_norm_and_clipped_gradients_have_megatrons_bits(scale: float) -> None:
    norm, grads, _ = clipped(scale)
    clip_in_groups()
    clip_in_groups()
    norm_in_groups, grads_in_groups, _ = clipped(scale)
    assert norm_in_groups == norm
    assert all(torch.equal(a, b) for a, b in zip(grads_in_groups, grads, strict=True))


@pytest.mark.usefixtures("one_rank")
def test_the_number_of_operations_does_not_grow_with_that_of_the_parameters() -> None:
    def operations(times: int) -> int:
        operators = clipped(1.0, times)[2]
        return sum(count for name, count in operators.items() if "detach" not in name)  # a view is no work

    own = [operations(times) for times in (1, 3)]
    clip_in_groups()
    in_groups = [operations(times) for times in (1, 3)]
    assert own[1] - own[0] >= 2 * 3 * len(SHAPES)
    assert in_groups[1] == in_groups[0] < own[0]


def test_a_scaled_copy_leaves_its_sources() -> None:
    clip_in_groups()
    sources, targets = [torch.ones(3), torch.full((2,), 4.0)], [torch.zeros(3), torch.zeros(2)]
    clip_grads.multi_tensor_scale_impl(0, torch.zeros(1), [sources, targets], 0.5)
    assert [float(tensor[0]) for tensor in (*sources, *targets)] == [1.0, 4.0, 0.5, 2.0]


def test_nothing_to_scale_is_no_error() -> None:
    clip_in_groups()
    clip_grads.multi_tensor_scale_impl(0, torch.zeros(1), [[], []], 0.5)


def test_functions_of_apex_or_transformer_engine_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    def theirs() -> None: ...

    monkeypatch.setattr(clip_grads, "l2_norm_impl", theirs)
    monkeypatch.setattr(clip_grads, "multi_tensor_scale_impl", theirs)
    clip_in_groups()
    assert clip_grads.l2_norm_impl is clip_grads.multi_tensor_scale_impl is theirs


@pytest.mark.usefixtures("one_rank")
def test_a_dtensor_gives_its_local_part() -> None:
    clip_in_groups()
    tensor = torch.arange(4.0)
    distributed = DTensor.from_local(tensor, init_device_mesh("cpu", (1,)), [Replicate()])
    assert clip_grads.to_local_if_dtensor is not to_local_if_dtensor
    assert torch.equal(clip_grads.to_local_if_dtensor(distributed), tensor)
    assert clip_grads.to_local_if_dtensor(tensor) is tensor
