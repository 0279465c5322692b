"""What an iteration runs, counted from a torch.profiler trace: operators, kernels, and waits for the device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

# Each makes the host wait: on a GPU for the device, on a CPU it is where a GPU would have been waited for.
SYNCHRONISATIONS = (
    "aten::_local_scalar_dense",
    "aten::item",
    "aten::is_nonzero",
    "cudaDeviceSynchronize",
    "cudaEventSynchronize",
    "cudaStreamSynchronize",
)

# Of the CUDA runtime's and driver's calls, those that an iteration asks for: allocations and queries vary.
RUNTIME_PREFIXES = ("cuda", "cu")
COUNTED_RUNTIME_CALLS = ("Launch", "Memcpy", "Memset", "Synchronize")
PROFILERS_OWN = ("Activity Buffer Request", "Command Buffer Full", "Lazy Function Loading", "Runtime Triggered Module")


def record(run: Callable[[], object]) -> profile:
    """The trace of one call, on the CPU and, where there is one, on the GPU."""
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as trace:
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # its own wait is the same in every trace
    return trace


def host_operations(trace: profile) -> Counter[str]:
    """How often each operator, autograd node, kernel launch, copy or wait ran on the host."""
    return Counter(
        event.name for event in trace.events() if event.device_type == DeviceType.CPU and is_operation(event.name)
    )


def is_operation(name: str) -> bool:
    """Whether an event is the iteration's own doing, and not the allocator's, the loader's or the profiler's."""
    if name.startswith(RUNTIME_PREFIXES):
        return any(call in name for call in COUNTED_RUNTIME_CALLS)
    return not name.startswith(PROFILERS_OWN)


def device_operations(trace: profile) -> Counter[str]:
    """How often each kernel or copy ran on the GPU; empty without one."""
    return Counter(event.name for event in trace.events() if event.device_type == DeviceType.CUDA)


def synchronisations(operations: Counter[str]) -> int:
    """Waits for the device; an item() counts once, though it is seen as two operators."""
    nested = min(operations["aten::item"], operations["aten::_local_scalar_dense"])
    return sum(operations[name] for name in SYNCHRONISATIONS) - nested


def difference(operations: Counter[str], reference: Counter[str]) -> dict[str, int]:
    """How many more (or fewer, negative) of each operation there are; only those that differ, by name."""
    names = sorted(operations.keys() | reference.keys())
    return {name: operations[name] - reference[name] for name in names if operations[name] != reference[name]}
