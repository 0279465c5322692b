"""The extension that calls the residual add's libraries without Python in between (csrc/bindings.cpp), if there is one.

It is of one Python and one torch, which the libraries are not, so it is optional: op.py does the same through ctypes,
with the same bits and several times the host time. `MEGATRON_SBLD_EXTENSION` decides: `auto`, the default, takes it
where it is built; `build` builds it on first use, into a cache, or raises; `off` does without.

    python -m megatron_sbld.cxx    builds it where the package is installed
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import importlib.util
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ExtensionFileLoader
from pathlib import Path
from types import ModuleType

import torch

from megatron_sbld.cxx import (
    EXTENSION,
    EXTENSION_VARIABLE,
    BuildError,
    build_extension,
    extension_file,
    extension_setting,
)
from megatron_sbld.residual.choice import library_for
from megatron_sbld.residual.native import ABI

_FUNCTIONS = ("forward", "backward", "forward_workspace", "backward_workspace")
_HERE = Path(__file__).resolve().parent

logger = logging.getLogger(__name__)


class ExtensionError(RuntimeError):
    """The extension cannot be used; the message says why."""


@functools.cache
def bindings() -> ModuleType | None:
    """The extension, ready to be called; None to do without.

    Raises:
        ValueError: MEGATRON_SBLD_EXTENSION has an unknown value.
        ExtensionError: it is `build`, and the extension cannot be built or loaded.
    """
    module, reason = _found()
    logger.info("residual add: %s", reason)
    return module


def describe_extension() -> str:
    """Whether the extension is used, and why not.

    Raises:
        ValueError, ExtensionError: as bindings.
    """
    return _found()[1]


def build(folder: Path) -> Path:
    """Compile the extension for this Python and torch into a folder; of several processes one does, the others wait.

    Raises:
        ExtensionError: it cannot be built.
    """
    try:
        with _locked(folder):
            return build_extension(folder, os.environ)
    except (BuildError, OSError) as error:
        raise ExtensionError(f"the extension cannot be built: {error}") from error


def cache_folder() -> Path:
    """Where `build` puts it: $XDG_CACHE_HOME/megatron-sbld, by default in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megatron-sbld"


@functools.cache
def _found() -> tuple[ModuleType | None, str]:
    setting = extension_setting(os.environ)
    if setting == "off":
        return None, f"called through ctypes ({EXTENSION_VARIABLE}=off)"
    name = extension_file(torch.__version__)
    path = next((folder / name for folder in (_HERE, cache_folder()) if (folder / name).is_file()), None)
    if path is None:
        if setting == "auto":
            return (
                None,
                "called through ctypes (the extension is not built: python -m megatron_sbld.cxx)",
            )
        path = build(cache_folder())
    try:
        return _load(path), "called by the extension"
    except ImportError as error:
        if setting == "build":
            raise ExtensionError(f"{path} cannot be loaded: {error}") from error
        logger.warning("residual add: the extension cannot be loaded: %s", error)
        return None, f"called through ctypes ({path.name} cannot be loaded: {error})"


def _load(path: Path) -> ModuleType:
    loader = ExtensionFileLoader(EXTENSION, str(path))
    spec = importlib.util.spec_from_loader(EXTENSION, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    if module.abi != ABI:
        raise ImportError(f"it has interface {module.abi}, this megatron-sbld needs {ABI}")
    module.set_choice(_addresses)
    return module


def _addresses(device: str, dtype: torch.dtype) -> tuple[int, ...] | None:
    """Where the functions of the library for these tensors are; None for eager torch. The extension asks once."""
    library = library_for(torch.device(device), dtype)
    if library is None:
        return None
    functions = ctypes.CDLL(str(library.path))
    pointers = (ctypes.cast(getattr(functions, f"sbld_residual_{name}"), ctypes.c_void_p) for name in _FUNCTIONS)
    return tuple(pointer.value or 0 for pointer in pointers)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{EXTENSION}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
