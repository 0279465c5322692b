"""Stand-ins for a missing GPU: what megatron-core 0.16 asks of CUDA, answered by the CPU.

megatron-core names CUDA outright (`device="cuda"`, `torch.cuda.current_device()`, "torch.cuda.FloatTensor") on paths
that any training run takes. `install_cpu_standins` replaces those few names in torch by ones that work without a GPU,
so that models, schedules, DDP, optimizers, recomputation and dist_checkpointing run on gloo. Each replacement says
which line of megatron/core first needs it.

It works before or after megatron.core is imported: megatron-core looks these names up in `torch` when it calls them,
and the one name that it binds at import is replaced in its own module. It changes torch for the whole process and is
not undone. Where CUDA is available nothing here may be loaded:

    if not torch.cuda.is_available():
        from megatron_sbld.mcore.cpu.standins import install_cpu_standins
        install_cpu_standins()

Streams are stood in for as far as MoE's token dispatcher needs them, where nothing runs beside anything. Not covered:
what overlaps by streams (several distributed-optimizer instances, shared experts, CUDA graphs, offloading). On gloo,
`overlap_p2p_comm` together with `deallocate_pipeline_outputs` is silently wrong: the caller must switch it off.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

CPU = torch.device("cpu")

_installed = False


def install_cpu_standins() -> None:
    """Make megatron-core run on the CPU of this process; does nothing the second time.

    Raises:
        RuntimeError: CUDA is available, so Megatron has to use it.
    """
    global _installed
    if torch.cuda.is_available():
        raise RuntimeError("CPU stand-ins must not be installed where CUDA is available: it would hide the GPU")
    if _installed:
        return
    for owner, name, replacement in _torch_replacements():
        setattr(owner, name, replacement)
    _replace_megatron_rng()
    _replace_router_gemm()
    _installed = True


def _torch_replacements() -> list[tuple[Any, str, Callable[..., Any]]]:
    """(owner, attribute, replacement) of every name in torch that is replaced."""
    on_cpu = _on_cpu_instead_of_cuda
    return [
        (torch.cuda, "current_device", lambda: CPU),  # distributed/param_and_grad_buffer.py:806
        (
            torch.cuda,
            "synchronize",
            lambda device=None: None,
        ),  # pipeline_parallel/p2p_communication.py:398
        (torch.cuda, "Stream", _Stream),  # transformer/moe/token_dispatcher.py:445
        (torch.cuda, "current_stream", lambda device=None: _Stream()),  # transformer/moe/token_dispatcher.py:871
        (torch.cuda, "stream", contextlib.nullcontext),  # transformer/moe/token_dispatcher.py:874
        (dist, "all_to_all_single", _with_splits_as_lists(dist.all_to_all_single)),  # tensor_parallel/mappings.py:444
        (torch.cuda, "manual_seed", _seed_cpu),  # tensor_parallel/random.py:237
        (torch.cuda, "get_rng_state", _get_cpu_rng_state),  # tensor_parallel/random.py:235
        (torch.cuda, "set_rng_state", _set_cpu_rng_state),  # rerun_state_machine.py:970
        (torch.cuda.random, "get_rng_state", _get_cpu_rng_state),  # tensor_parallel/random.py:55
        (torch.Tensor, "cuda", lambda tensor, *args, **kwargs: tensor),  # models/common/language_module:244
        (torch.Tensor, "type", _type_as_on_cuda(torch.Tensor.type)),  # optimizer/clip_grads.py:167, optimizer.py:671
        (torch, "tensor", on_cpu(torch.tensor)),  # optimizer/optimizer.py:907, clip_grads.py:90
        (torch, "zeros", on_cpu(torch.zeros)),  # pipeline_parallel/schedules.py:596
        (torch, "ones", on_cpu(torch.ones)),  # transformer/utils.py:35
        (torch, "empty", on_cpu(torch.empty)),  # dist_checkpointing/exchange_utils.py:326
        (torch, "empty_like", on_cpu(torch.empty_like)),  # dist_checkpointing/exchange_utils.py:104
    ]


def _on_cpu_instead_of_cuda(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The factory, with a CUDA device replaced by the CPU, and without pinning memory for a device that is not there.

    Every other device is left alone. models/common/embeddings/rope_utils.py:62 pins.
    """

    @functools.wraps(factory)
    def create(*args: Any, **kwargs: Any) -> torch.Tensor:
        kwargs.pop("pin_memory", None)
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs["device"] = CPU
        return factory(*args, **kwargs)

    return create


def _type_as_on_cuda(stock_type: Callable[..., Any]) -> Callable[..., Any]:
    """Tensor.type that calls a CPU tensor's type what it would be on CUDA; conversions are untouched."""

    @functools.wraps(stock_type)
    def tensor_type(tensor: torch.Tensor, dtype: Any = None, **kwargs: Any) -> Any:
        if dtype is not None:
            return stock_type(tensor, dtype, **kwargs)
        return stock_type(tensor).replace("torch.", "torch.cuda.", 1)

    return tensor_type


class _Stream:
    """A stream on a device that does everything in order, and the event that it records."""

    def wait_stream(self, stream: _Stream) -> None: ...

    def record_event(self) -> _Stream:
        return self

    def synchronize(self) -> None: ...


def _with_splits_as_lists(all_to_all_single: Callable[..., Any]) -> Callable[..., Any]:
    """all_to_all_single that takes split sizes as tensors too: Megatron makes arrays only of those on CUDA."""

    @functools.wraps(all_to_all_single)
    def exchange(output: torch.Tensor, input: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        for name in ("output_split_sizes", "input_split_sizes"):
            if isinstance(kwargs.get(name), torch.Tensor):
                kwargs[name] = kwargs[name].tolist()
        return all_to_all_single(output, input, *args, **kwargs)

    return exchange


def _seed_cpu(seed: int) -> None:
    torch.default_generator.manual_seed(int(seed))


def _get_cpu_rng_state(device: Any = None) -> torch.Tensor:
    return torch.get_rng_state()


def _set_cpu_rng_state(new_state: torch.Tensor, device: Any = None) -> None:
    torch.set_rng_state(new_state)


def _replace_router_gemm() -> None:
    """Define a name of Transformer Engine that the router asks for without it (transformer/moe/moe_utils.py:1192)."""
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def _replace_megatron_rng() -> None:
    """Let Megatron's tracker of CUDA random states keep states of the CPU generator.

    Its setter (tensor_parallel/random.py:74) queues itself until CUDA is initialised, that is for ever. And it warns
    when a region of the tracker moves the CPU's generator (:287), which here is the very purpose.
    """
    from megatron.core.tensor_parallel import random

    def set_state(new_state: torch.Tensor, device: int = -1, graph_safe: bool = False) -> None:
        _set_cpu_rng_state(new_state)

    random._set_cuda_rng_state = set_state
    logging.getLogger(random.__name__).addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())
