"""Run a function on several gloo processes, and set up Megatron's parallel state in them.

Starting processes costs seconds (each imports torch and Megatron), so start them once and run many cases inside:

    def cases() -> dict[str, list[float]]:
        with model_parallel(tp=2):
            tensor = train(...)
        with model_parallel(pp=2):
            pipeline = train(...)
        return {"tensor": tensor, "pipeline": pipeline}

    per_rank = run_distributed(cases, world_size=2)      # a list with each rank's return value
"""

from __future__ import annotations

import datetime
import faulthandler
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

SEED = 1234

# gloo runs on the CPU also where there is a GPU; one thread each, or tiny models wait for one another; loopback only.
ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


def slow_but(quick: Collection[str], names: Iterable[str]) -> list[Any]:
    """Parameters of a test that runs with the quick ones in `make test`, with the others in `make test-slow`."""
    return [pytest.param(name, marks=[] if name in quick else [pytest.mark.slow]) for name in names]


def run_distributed(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 300.0) -> list[Any]:
    """Call `fn(*args)` on every rank of `world_size` new processes and return what each returned, by rank.

    `fn` must be importable (module level), its arguments and its return value picklable.

    Raises:
        RuntimeError: a rank raised; the message holds its traceback, and what others raised. They are ended.
        TimeoutError: not all ranks came to an end within `timeout` seconds. They are ended.
    """
    # Of TCP, not of a file: ranks look into a file again after 10 ms, for each of the groups of each case.
    patience = datetime.timedelta(seconds=timeout)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=patience)
    with tempfile.TemporaryDirectory() as folder:
        with mock.patch.dict(os.environ, ENVIRONMENT):
            context = mp.start_processes(
                _run_rank,
                (world_size, store.port, folder, fn, args, timeout),
                nprocs=world_size,
                join=False,
                start_method="spawn",
            )
        try:
            _join(context, deadline=time.monotonic() + timeout, description=f"{fn.__qualname__} on {world_size} ranks")
        except mp.ProcessRaisedException as error:
            raise RuntimeError(_tracebacks(folder)) from error
        finally:
            for process in context.processes:
                process.kill()
                process.join()
        return [pickle.loads(_result_file(folder, rank).read_bytes()) for rank in range(world_size)]


def _join(context: mp.ProcessContext, deadline: float, description: str) -> None:
    """Wait for all ranks; the first that raises ends the others, since they may be waiting for it."""
    while not context.join(timeout=1.0, grace_period=1.0):
        if time.monotonic() > deadline:
            waiting = [rank for rank, process in enumerate(context.processes) if process.is_alive()]
            raise TimeoutError(f"{description}: ranks {waiting} did not finish in time")


def _run_rank(
    rank: int, world_size: int, port: int, folder: str, fn: Callable[..., Any], args: tuple, timeout: float
) -> None:
    """One process: leave the function's result in a file, or what it raised."""
    faulthandler.enable()  # a crash in native code says where Python was
    try:
        result = _call_in_group(rank, world_size, port, fn, args, timeout)
        _result_file(folder, rank).write_bytes(pickle.dumps(result))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        _error_file(folder, rank).write_text(traceback.format_exc())
        raise


def _call_in_group(
    rank: int, world_size: int, port: int, fn: Callable[..., Any], args: tuple, timeout: float
) -> object:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size))
    torch.set_num_threads(1)
    install_standins_if_needed()
    dist.init_process_group(
        "gloo",
        store=dist.TCPStore("127.0.0.1", port, is_master=False, timeout=datetime.timedelta(seconds=timeout)),
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=timeout),
    )
    return fn(*args)


def _result_file(folder: str, rank: int) -> Path:
    return Path(folder) / f"rank{rank}.pickle"


def _error_file(folder: str, rank: int) -> Path:
    return Path(folder) / f"rank{rank}.error"


def _tracebacks(folder: str) -> str:
    """What each failed rank raised, the first one first: others lose their connection to it, and may be noticed before.

    The order is that of writing it down, so the last lines of all stand there: the cause may be in the second.
    """
    first, *others = sorted(Path(folder).glob("*.error"), key=lambda file: file.stat().st_mtime_ns)
    consequences = [f"then {file.stem}: {file.read_text().splitlines()[-1]}" for file in others]
    return "\n".join([f"{first.stem} failed:", first.read_text(), *consequences])


def install_standins_if_needed() -> None:
    """Let megatron-core run on the CPU where there is no GPU, on groups like those of the trainer."""
    from megatron_sbld.mcore.cpu.gloo import use_one_gloo_thread

    use_one_gloo_thread()
    if not torch.cuda.is_available():
        from megatron_sbld.mcore.cpu.standins import install_cpu_standins

        install_cpu_standins()


@contextmanager
def single_process() -> Iterator[None]:
    """A process group of this one process, for unit tests of modules that ask for Megatron's groups."""
    install_standins_if_needed()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def model_parallel(
    tp: int = 1,
    pp: int = 1,
    vpp: int | None = None,
    cp: int = 1,
    ep: int = 1,
    etp: int | None = None,
    seed: int = SEED,
) -> Iterator[None]:
    """Megatron's parallel state for one case: data parallelism takes what tp, pp and cp leave of the world.

    `vpp` is the number of model chunks of a pipeline rank. `ep` ranks share out the experts, each of which is split
    over `etp` ranks (None: whole where ep > 1, else tp). Random states are seeded as Megatron seeds a run.
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp,
        context_parallel_size=cp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=etp or (1 if ep > 1 else tp),
    )
    try:
        torch.manual_seed(seed)
        model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        _destroy_subgroups()
        # Of the class: kept from a test with another loss scale, it has a shape that the next test's does not fit.
        MoEAuxLossAutoScaler.main_loss_backward_scale = None


def _destroy_subgroups() -> None:
    """End every process group but the default one: Megatron forgets its own, but each keeps threads and sockets."""
    if dist.get_world_size() > 1:
        dist.barrier()  # nobody may still be in a collective of a group that ends
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
