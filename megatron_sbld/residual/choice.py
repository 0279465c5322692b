"""Who computes the residual add: the CUDA library, the same source compiled for the CPU, or plain torch.

`MEGATRON_SBLD_RESIDUAL` says: `cuda`, `cpu` and `eager` are used or raise; `auto`, the default, takes the library of
the tensors' device where it can be used, else eager torch, and says once in the log what it took and why.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os

import torch

from megatron_sbld.residual.native import Library, fits_driver, load, runs_on

VARIABLE = "MEGATRON_SBLD_RESIDUAL"
SETTINGS = ("auto", "cuda", "cpu", "eager")

logger = logging.getLogger(__name__)


def library_for(device: torch.device, dtype: torch.dtype) -> Library | None:
    """The library that computes on tensors of this device and dtype, or None for eager torch.

    Raises:
        ValueError: the variable has an unknown value, or asks for a library that cannot compute on these tensors.
        RuntimeError: it asks for a library that cannot be used; the reason is in the message.
    """
    return _library_for(_setting(), device.type, device.index or 0, dtype)


def describe_choice(device: torch.device) -> str:
    """What is used on this device and why, in a sentence.

    Raises:
        ValueError, RuntimeError: as library_for.
    """
    setting = _setting()
    library, reason = _choose(setting, device.type, device.index or 0)
    return f"residual add on {device.type}: {'the library' if library else 'eager torch'} ({reason})"


def driver_cuda() -> int | None:
    """The newest CUDA that the driver knows, as its major version; None without a driver."""
    if not torch.cuda.is_available():
        return None
    version = ctypes.c_int()
    if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version)) != 0:
        return None
    return version.value // 1000


def _setting() -> str:
    setting = os.environ.get(VARIABLE, "auto")
    if setting not in SETTINGS:
        raise ValueError(f"{VARIABLE}={setting!r}: must be one of {', '.join(SETTINGS)}")
    return setting


@functools.cache
def _library_for(setting: str, device_type: str, device_index: int, dtype: torch.dtype) -> Library | None:
    if setting == "eager":
        return None
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        if setting != "auto":
            raise ValueError(
                f"{VARIABLE}={setting} computes in float32, float16 and bfloat16, not in {dtype}: use eager"
            )
        logger.info("residual add on %s in %s: eager torch (no library computes in it)", device_type, dtype)
        return None
    library, _ = _choose(setting, device_type, device_index)
    return library


@functools.cache
def _choose(setting: str, device_type: str, device_index: int) -> tuple[Library | None, str]:
    if setting == "eager":
        return None, f"{VARIABLE}=eager"
    if setting != "auto":
        if device_type != setting:
            raise ValueError(f"{VARIABLE}={setting}, but the tensors are on {device_type}: use auto or eager")
        return _load(setting, device_index), f"{VARIABLE}={setting}"
    if device_type not in ("cuda", "cpu"):
        return None, f"there is no library for {device_type}"
    try:
        library = _load(device_type, device_index)
    except RuntimeError as error:
        logger.info("residual add on %s: eager torch (%s)", device_type, error)
        return None, str(error)
    logger.info("residual add on %s: the library built for %s", device_type, library.build)
    return library, f"built for {library.build}"


def _load(name: str, device_index: int) -> Library:
    """The library, if it runs on this device."""
    library = load(name)
    if name == "cuda":
        driver = driver_cuda()
        if driver is not None and not fits_driver(library.build, driver):
            raise RuntimeError(
                f"the CUDA library was built for {library.build}, but the driver knows CUDA {driver} only"
            )
        major, minor = torch.cuda.get_device_capability(device_index)
        if not runs_on(library.build, major * 10 + minor):
            raise RuntimeError(
                f"the CUDA library was built for {library.build}, but the GPU has compute capability {major}.{minor}"
            )
    return library
