"""What differs between megatron-core's versions, and which of them, of Transformer Engine and of Apex are usable.

Every test runs on every version: what upstream changed without an error would fail here.
"""

from __future__ import annotations

import logging
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core import num_microbatches_calculator, package_info
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

from megatron_sbld.mcore.compat import (
    SUPPORT,
    batch_on_this_cp_rank,
    check_megatron_core,
    init_microbatches,
    nvidia_apex_available,
    ramp_steps,
    transformer_engine_available,
    wrap_in_ddp,
)
from tests.harness import model_parallel, run_distributed, single_process
from tests.mcore.helpers import tiny_config, tiny_gpt

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _forget_answers() -> Iterator[None]:
    _forget()
    yield
    _forget()


def _forget() -> None:
    transformer_engine_available.cache_clear()
    nvidia_apex_available.cache_clear()


def _install(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Put empty modules of these names where an import finds them."""
    for name in names:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))


def test_the_megatron_core_installed_here_is_supported() -> None:
    check_megatron_core()
    check_megatron_core(trainer=True)


@pytest.mark.parametrize("version", ["0.15.3", "0.21.0rc0", "1.16.0"])
def test_another_megatron_core_is_refused_with_what_to_install(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package_info, "__version__", version)
    with pytest.raises(ValueError, match=rf"{version}.*pip install 'megatron-core>=0.16.1,<0.20'"):
        check_megatron_core()


def test_the_newest_checkouts_have_the_layers_but_not_the_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package_info, "__version__", "0.20.0rc0+1a2b3c4")
    check_megatron_core()
    with pytest.raises(ValueError, match=r"0.20.0rc0\+1a2b3c4.*pip install"):
        check_megatron_core(trainer=True)


def test_the_versions_of_the_trainer_are_those_that_pip_installs() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (last,) = re.findall(r'"megatron-core>=0.16.1,<0\.(\d+)"', text)
    assert [minor for _, minor in SUPPORT if SUPPORT[0, minor].trainer] == list(range(16, int(last)))


def _split_of_two_replicas() -> list[int]:
    with model_parallel():  # no context parallelism, data parallel size 2
        batch = batch_on_this_cp_rank({"tokens": torch.arange(8)[None]})
    return batch["tokens"][0].tolist()


def test_without_context_parallelism_a_replica_keeps_its_whole_sequences() -> None:
    assert run_distributed(_split_of_two_replicas, 2) == [list(range(8))] * 2


def _batch_sizes(ramp: list[int] | None, batch: int, consumed: list[int]) -> list[int]:
    init_microbatches(rank=0, rampup_batch_size=ramp, global_batch_size=batch, micro_batch_size=2, data_parallel_size=1)
    found = []
    try:
        for samples in consumed:
            num_microbatches_calculator.update_num_microbatches(samples, consistency_check=False)
            found.append(num_microbatches_calculator.get_current_global_batch_size())
            assert num_microbatches_calculator.get_num_microbatches() == found[-1] // 2
    finally:
        num_microbatches_calculator.destroy_num_microbatches_calculator()
    return found


def test_the_batch_size_ramps_up() -> None:
    consumed = [0, 2, 3, 4, 7, 8, 11, 12, 13, 1000]
    assert _batch_sizes([2, 2, 12], 8, consumed) == [2, 2, 2, 4, 4, 6, 6, 8, 8, 8]
    assert _batch_sizes(None, 8, consumed) == [8] * len(consumed)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 40), st.integers(1, 400))
def test_the_steps_of_the_ramp_are_those_of_0_16(start: int, increment: int, steps: int, samples: int) -> None:
    batch = start + steps * increment
    found = ramp_steps([start, increment, samples], batch)
    assert sorted(found) == list(found)
    for consumed in range(samples + 3):
        step = steps if consumed > samples else int(consumed / (samples / steps))
        assert found[max(first for first in found if first <= consumed)] == start + step * increment


@pytest.mark.parametrize("overlap", [False, True])
def test_buffers_are_laid_out_as_by_megatron_and_nothing_warns(overlap: bool, caplog: pytest.LogCaptureFixture) -> None:
    options: dict[str, Any] = {"use_distributed_optimizer": True, "overlap_grad_reduce": overlap, "bucket_size": 2000}
    found = []
    with single_process(), model_parallel():
        config = tiny_config()
        for index in (0, 1):
            (chunk,) = tiny_gpt(config)
            stock = DistributedDataParallel(
                config, DistributedDataParallelConfig(**options), chunk, disable_bucketing=index > 0
            )
            expected = _buckets(stock)
            (chunk,) = tiny_gpt(config)
            caplog.clear()
            with caplog.at_level(logging.WARNING, logger="megatron.core"):
                ours = wrap_in_ddp(config, DistributedDataParallelConfig(**options), chunk, disable_bucketing=index > 0)
            assert [record.message for record in caplog.records] == []
            found.append(_buckets(ours))
            assert found[-1] == expected
    assert (len(found[0]) > 1) == overlap
    assert len(found[1]) == 1


def _buckets(model: DistributedDataParallel) -> list[tuple[int, int, int]]:
    buckets = [bucket for buffer in model.buffers for bucket in buffer.buckets]
    return [(bucket.offset, bucket.grad_data.numel(), bucket.numel_unpadded) for bucket in buckets]


def test_the_apex_of_pypi_is_not_taken_for_nvidias(monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, "apex")
    assert not nvidia_apex_available()


def test_nvidias_apex_is_recognised_by_what_it_provides(monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, "apex", "apex.normalization", "apex.normalization.fused_layer_norm", "amp_C")
    assert nvidia_apex_available()


def test_a_transformer_engine_without_its_torch_part_is_not_available(monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, "transformer_engine")
    assert not transformer_engine_available()
    _forget()
    _install(monkeypatch, "transformer_engine", "transformer_engine.pytorch")
    assert transformer_engine_available()
