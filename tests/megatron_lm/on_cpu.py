"""Runs a script of a Megatron-LM checkout where there is no GPU: `python on_cpu.py CHECKOUT/pretrain_gpt.py ARGUMENTS`.

Without a checkout around the script or the working directory it is the installed megatron.training that runs.
For tests and scripts/check_patches.sh; a machine with CUDA needs nothing of it. megatron-core runs by the package's own
stand-ins. Megatron-LM's training code asks for a few things more, and is run in place as a script.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.machinery
import importlib.util
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def prepare(checkout: Path | None = None) -> None:
    """Let the training code run on the CPU: the installed one, or the checkout's, whose `megatron` is imported then."""
    if checkout is not None:
        _take_compiled_helpers(checkout)
        sys.path.insert(0, str(checkout))
    if not hasattr(typing, "override"):
        typing.override = importlib.import_module("typing_extensions").override  # type: ignore[attr-defined]
    torch.compile = lambda function=None, **options: function or (lambda later: later)  # type: ignore[assignment]
    with _triton():
        standins = importlib.import_module("megatron_sbld.mcore.cpu.standins")
        initialize = importlib.import_module("megatron.training.initialize")
        training = importlib.import_module("megatron.training.training")
    standins.install_cpu_standins()
    torch.cuda.device_count = lambda: 1  # initialize.py asserts that a rank has a device
    torch.cuda.set_device = lambda device: None
    properties = types.SimpleNamespace(name="none", major=0, minor=0, total_memory=0, multi_processor_count=1)
    torch.cuda.get_device_properties = lambda device=None: properties
    init_process_group = dist.init_process_group

    def without_device(*args: Any, **kwargs: Any) -> None:
        kwargs.pop("device_id", None)
        init_process_group(*args, **kwargs)

    dist.init_process_group = without_device
    if checkout is not None:
        initialize._compile_dependencies = lambda: None
    stock = initialize.initialize_megatron
    training.initialize_megatron = lambda **kwargs: stock(**{**kwargs, "allow_no_cuda": True})
    training.set_jit_fusion_options = lambda *args, **kwargs: None


def _take_compiled_helpers(checkout: Path) -> None:
    """The installed megatron-core has the data sets' compiled helpers, which a checkout compiles when it runs."""
    name = "megatron.core.datasets.helpers_cpp"
    for folder in map(Path, sys.path):
        for library in (folder / "megatron/core/datasets").glob("helpers_cpp*.so"):
            if checkout in library.parents:
                return
            loader = importlib.machinery.ExtensionFileLoader(name, str(library))
            spec = importlib.util.spec_from_file_location(name, library, loader=loader)
            assert spec is not None
            module = importlib.util.module_from_spec(spec)
            loader.exec_module(module)
            sys.modules[name] = module
            return


class _Triton(types.ModuleType):
    """Kernels that are decorated at import and never called: every name is a decorator that changes nothing."""

    __version__ = "0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda function=None, *args, **options: function if callable(function) else lambda kernel: kernel


@contextlib.contextmanager
def _triton() -> Iterator[None]:
    """A triton for the checkout's imports alone: torch's own compiler must not find it."""
    if importlib.util.find_spec("triton") is not None:
        yield
        return
    names = ("triton", "triton.language", "triton.language.extra")
    sys.modules.update({name: _Triton(name) for name in names})
    sys.modules["triton"].language = sys.modules["triton.language"]  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


if __name__ == "__main__":  # saving spawns a process, which imports this file again and needs nothing of it
    del sys.argv[0]
    script = Path(sys.argv[0]).resolve()
    folders = (Path.cwd(), *script.parents)
    prepare(next((folder for folder in folders if (folder / "megatron" / "training").is_dir()), None))
    exec(compile(script.read_text(), str(script), "exec", dont_inherit=True))
