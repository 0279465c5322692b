"""Runs a script of a Megatron-LM checkout where there is no GPU: `python on_cpu.py CHECKOUT/pretrain_gpt.py ARGUMENTS`.

For tests and scripts/check_patches.sh. Nothing here is needed, or used, on a machine with CUDA. megatron-core runs by the
package's own stand-ins; Megatron-LM's training code asks for a few things more, each with what needs it.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import runpy
import sys
import types
import typing
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def prepare(checkout: Path) -> None:
    """Make the checkout's `megatron` the one that is imported, and let it run on the CPU."""
    _take_compiled_helpers(checkout)
    sys.path.insert(0, str(checkout))
    if not hasattr(typing, "override"):
        typing.override = importlib.import_module("typing_extensions").override  # type: ignore[attr-defined]
    _stand_in_for_triton()
    from megatron_sbld.mcore.standins import install_cpu_standins

    install_cpu_standins()
    torch.cuda.device_count = lambda: 1  # initialize.py asserts that a rank has a device
    torch.cuda.set_device = lambda device: None
    torch.cuda.get_device_capability = lambda device=None: (0, 0)  # type: ignore[assignment]
    init_process_group = dist.init_process_group

    def without_device(*args: Any, **kwargs: Any) -> None:
        kwargs.pop("device_id", None)
        init_process_group(*args, **kwargs)

    dist.init_process_group = without_device
    initialize = importlib.import_module("megatron.training.initialize")
    initialize._compile_dependencies = lambda: None
    stock = initialize.initialize_megatron
    training = importlib.import_module("megatron.training.training")
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


def _stand_in_for_triton() -> None:
    """Kernels that are decorated at import and never called."""
    if importlib.util.find_spec("triton") is not None:
        return
    triton, language = types.ModuleType("triton"), types.ModuleType("triton.language")
    triton.jit = lambda function=None, **options: function or (lambda kernel: kernel)  # type: ignore[attr-defined]
    triton.language = language  # type: ignore[attr-defined]
    language.constexpr = Any  # type: ignore[attr-defined]
    for module in (triton, language):
        module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, loader=None)
        sys.modules[module.__name__] = module


if __name__ == "__main__":
    script = Path(sys.argv[1]).resolve()
    sys.argv = [str(script), *sys.argv[2:]]
    prepare(script.parent)
    runpy.run_path(str(script), run_name="__main__")
