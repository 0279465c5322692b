"""The buckets of benchmarks/bucket_model.py against those that Megatron's DistributedDataParallel really makes."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from benchmarks.bucket_model import Bucket, Shape, make_buckets, parameters
from tests.harness import model_parallel, single_process
from tests.mcore.helpers import SEQUENCE, VOCAB, tiny_config, tiny_gpt, wrap_ddp

LAYERS, HIDDEN = 4, 32


@pytest.fixture(scope="module", autouse=True)
def _one_process() -> Iterator[None]:
    with single_process():
        yield


def owner(name: str) -> int:
    """As in Bucket."""
    if "embedding" in name:
        return 0
    layer = re.search(r"decoder\.layers\.(\d+)\.", name)
    return int(layer.group(1)) + 1 if layer else LAYERS + 1


@pytest.mark.parametrize("bucket_size", [1, 3000, 10_000, 30_000, 10**9])
def test_the_modelled_buckets_are_megatrons(bucket_size: int) -> None:
    with model_parallel():
        (chunk,) = tiny_gpt(tiny_config(num_layers=LAYERS, hidden_size=HIDDEN))
        (model,) = wrap_ddp([chunk], overlap_grad_reduce=True, bucket_size=bucket_size)
        names = {param: name for name, param in model.module.named_parameters()}
        (buffer,) = model.buffers
        real = [
            Bucket(
                sum(param.numel() for param in bucket.params_list),
                frozenset(owner(names[param]) for param in bucket.params_list),
            )
            for bucket in buffer.buckets
        ]
        assert sum(bucket.size for bucket in real) == sum(param.numel() for param in names)
    assert make_buckets(parameters(Shape("tiny", LAYERS, HIDDEN, 4, seq_length=SEQUENCE), VOCAB), bucket_size) == real
