"""Counting what an iteration runs, for benchmarks/profile_trace.py: names alone, without a model."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from benchmarks.common.operations import difference, host_operations, is_operation, record, synchronisations


def test_only_counts_that_differ_are_named_with_their_sign():
    assert difference(Counter(a=2, b=1, d=4), Counter(a=1, c=3, d=4)) == {"a": 1, "b": 1, "c": -3}
    assert difference(Counter(a=2), Counter(a=2)) == {}


@pytest.mark.parametrize("name", ["aten::mm", "cudaLaunchKernel", "cuLaunchKernel", "cudaMemcpyAsync", "MulBackward0"])
def test_operators_launches_and_copies_are_operations(name):
    assert is_operation(name)


@pytest.mark.parametrize("name", ["cudaMalloc", "cudaEventQuery", "Activity Buffer Request", "Lazy Function Loading"])
def test_what_the_allocator_and_the_profiler_do_is_none(name):
    assert not is_operation(name)


def test_an_item_is_one_wait_and_a_cuda_synchronisation_another():
    assert synchronisations(Counter({"aten::item": 3, "aten::_local_scalar_dense": 3, "aten::mm": 9})) == 3
    assert synchronisations(Counter({"aten::item": 1, "aten::_local_scalar_dense": 1, "cudaStreamSynchronize": 2})) == 3


def test_what_a_call_runs_is_counted_with_its_backward_pass():
    weight = torch.ones(2, 2, requires_grad=True)
    operations = host_operations(record(lambda: (weight @ weight).sum().item()))
    assert operations["aten::mm"] == 1
    assert synchronisations(operations) == 1
    trained = host_operations(record(lambda: (weight @ weight).sum().backward()))
    assert trained["aten::mm"] == 3
    assert synchronisations(trained) == 0
