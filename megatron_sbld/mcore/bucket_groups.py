"""Gradient buckets that are not communicated when nothing in them can have changed.

Megatron reduces every bucket in every iteration, also one whose parameters all belong to layers that no microbatch ran:
a sum of zeros. And with the distributed optimizer it gathers every bucket's parameters after every step, also when all
of them were frozen (`dropped_update: freeze`). A bucket group made skippable leaves out both. What that is worth is in
benchmarks/bucket_model.py.

Whether a layer ran is recorded by the layer itself (`LayerRecord`), not asked of the plan, so that a gradient that was
accumulated over several iterations, or by a layer made stock again, is never taken for zero. All ranks that reduce
together must record the same: data-parallel replicas must share their decisions.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup


class LayerRecord:
    """What one layer has done since its gradients were last zeroed."""

    __slots__ = ("is_cleared", "ran", "skipped")

    def __init__(self) -> None:
        self.ran: bool | None = None  # not known before it runs or gradients are zeroed for the first time
        self.skipped = False
        self.is_cleared = False  # whether a wrapper's groups do so when they zero gradients

    def clear(self) -> None:
        """Gradients are zero now."""
        self.ran = self.skipped = False

    @property
    def has_zero_gradient(self) -> bool:
        """Whether the layer was skipped whenever its turn came; False if it did not come."""
        return self.skipped and self.ran is False


class _Finished:
    """Stands for the handle of a communication that was left out."""

    def wait(self) -> None:
        """Return at once."""


class RecordedBucketGroup(_ParamAndGradBucketGroup):
    """A bucket group that tells switchable layers when their gradients are zeroed; a built group gets this class."""

    _drop_records: list[LayerRecord]

    def reset(self) -> None:
        """Called when the buffer is zeroed, before each iteration."""
        super().reset()
        for record in self._drop_records:
            record.clear()


class SkippableBucketGroup(RecordedBucketGroup):
    """A bucket group whose parameters all belong to switchable layers."""

    _drop_stale: bool | None
    """Whether a step may have changed parameters since they were gathered; None where no step tells."""
    param_gather_handle: Any

    def start_grad_sync(self, force_all_reduce: bool | None = False) -> None:
        """Reduce the group's gradients unless they are zero on every rank."""
        if not all(record.has_zero_gradient for record in self._drop_records):
            super().start_grad_sync(force_all_reduce)
        elif self.ddp_config.overlap_grad_reduce and self.ddp_config.num_distributed_optimizer_instances == 1:
            self.grad_reduce_handle = _Finished()  # finish_grad_sync insists on one

    def start_param_sync(self, force_sync: bool = False) -> None:
        """Gather the group's parameters unless all of them are as they were at the last time."""
        if self._drop_stale is not False or force_sync or self.param_gather_handle is not None:
            super().start_param_sync(force_sync)
            self._drop_stale = None if self._drop_stale is None else False
            return
        if self.ddp_config.overlap_param_gather:
            self.param_gather_handle = _Finished()  # finish_param_sync goes on to the next group after it
        self.param_gather_dispatched = True

    def note_step(self, frozen: Container[LayerRecord]) -> None:
        """The optimizer made a step, in which it left the layers of these records as they were, on every rank."""
        unchanged = all(record in frozen for record in self._drop_records)
        self._drop_stale = not unchanged or self._drop_stale is not False


def make_skippable(wrapper: DistributedDataParallel, records: Mapping[torch.nn.Parameter, LayerRecord]) -> None:
    """Let the groups of a wrapper whose parameters all have a record leave communication out. Again, it does nothing.

    Call it in the same iteration on all ranks that reduce together.

    Args:
        wrapper: of the model, or of a chunk of it.
        records: those of each switchable layer's parameters.
    """
    if wrapper.ddp_config.reuse_grad_buf_for_mxfp8_param_ag:
        return  # gradients share their storage with gathered parameters, so that a buffer that was zeroed may not be
    for group in bucket_groups(wrapper):
        built = type(group) in (_ParamAndGradBucketGroup, RecordedBucketGroup)
        if built and all(param in records for param in group.params):
            group.__class__ = SkippableBucketGroup
            group._drop_records = list(dict.fromkeys(records[param] for param in group.params))
            group._drop_stale = None


def make_recorded(wrapper: DistributedDataParallel, records: Mapping[torch.nn.Parameter, LayerRecord]) -> None:
    """Let all groups of a wrapper that hold parameters with a record tell it when gradients are zeroed."""
    for group in bucket_groups(wrapper):
        held = [records[param] for param in group.params if param in records]
        if type(group) is _ParamAndGradBucketGroup and held:
            group.__class__ = RecordedBucketGroup
            group._drop_records = list(dict.fromkeys(held))
            for record in held:
                record.is_cleared = True


def bucket_groups(wrapper: DistributedDataParallel) -> Iterable[_ParamAndGradBucketGroup]:
    """All bucket groups of a wrapper."""
    return [*wrapper.bucket_groups, *wrapper.expert_parallel_bucket_groups]
