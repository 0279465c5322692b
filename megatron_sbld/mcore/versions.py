"""Which libraries are installed beside us: megatron-core's version, Transformer Engine, NVIDIA's Apex.

Answers only; which layers are built from that is in layer_specs.py.
"""

from __future__ import annotations

import functools
import importlib

SUPPORTED_MEGATRON_CORE = "0.16."
OF_PATCHED_CHECKOUTS = ("0.19.", "0.20.")
"""Of the newer Megatron-LM trees that patches/ names; there only the layers are ours, not the trainer."""


def check_megatron_core() -> None:
    """Refuse a megatron-core other than 0.16 and those of the Megatron-LM checkouts that there are patches for.

    Raises:
        RuntimeError: its version is another; names both.
    """
    from megatron.core.package_info import __version__ as installed

    if not installed.startswith((SUPPORTED_MEGATRON_CORE, *OF_PATCHED_CHECKOUTS)):
        raise RuntimeError(
            f"megatron-core {installed} is installed, but this version of megatron-sbld works with 0.16 only: "
            "pip install 'megatron-core>=0.16.1,<0.17' (or use a Megatron-LM checkout that patches/README.md names)"
        )


@functools.cache
def transformer_engine_available() -> bool:
    """Whether Transformer Engine for PyTorch can be imported (a package that is there but broken cannot be used)."""
    return _importable("transformer_engine.pytorch")


@functools.cache
def nvidia_apex_available() -> bool:
    """Whether the apex that is installed is NVIDIA's; the package of that name on PyPI is a web toolkit.

    NVIDIA's provides fused layer norms and, built with its extensions, the `amp_C` that Megatron's optimizer uses.
    """
    return all(_importable(name) for name in ("apex.normalization.fused_layer_norm", "amp_C"))


def _importable(name: str) -> bool:
    try:
        importlib.import_module(name)
    except (ImportError, OSError, RuntimeError):  # absent, or built for another torch or CUDA
        return False
    return True
