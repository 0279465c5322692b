"""Finding a CUDA compiler and what it compiles for: setup.py and `megatron-sbld doctor` ask. Standard library only."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path


class NvccError(RuntimeError):
    """There is no nvcc, or it does not run; the message says where it was looked for."""


@dataclass(frozen=True, kw_only=True)
class Nvcc:
    """An nvcc that runs."""

    path: Path
    """The compiler itself, also where the PATH has a wrapper script of it."""
    version: str
    """Of the CUDA toolkit, such as 13.0."""
    architectures: frozenset[int]
    """Compute capabilities that it compiles for, times ten: 90 is sm_90."""
    origin: str
    """How it was found: CUDA_HOME, PATH or a Python package."""


def find_nvcc(environ: Mapping[str, str] = os.environ, site_packages: Iterable[str] | None = None) -> Nvcc:
    """The nvcc of CUDA_HOME if that is set, else the one on the PATH, else that of the package nvidia-cuda-nvcc.

    Args:
        environ: environment variables.
        site_packages: folders with Python packages; default: this environment's, also while pip isolates a build.

    Raises:
        NvccError: none found, CUDA_HOME has none, or the one found does not run.
    """
    if environ.get("CUDA_HOME"):
        path, origin = Path(environ["CUDA_HOME"], "bin", "nvcc"), "CUDA_HOME"
        if not path.is_file():
            raise NvccError(f"CUDA_HOME={environ['CUDA_HOME']} has no bin/nvcc")
    elif on_path := shutil.which("nvcc", path=environ.get("PATH", os.defpath)):
        path, origin = Path(on_path), "PATH"
    elif packaged := _packaged_nvcc(_site_packages() if site_packages is None else site_packages):
        path, origin = packaged, "Python package nvidia-cuda-nvcc"
    else:
        raise NvccError("no nvcc was found (in $CUDA_HOME/bin, on the PATH, in the Python package nvidia-cuda-nvcc)")
    return _ask(path, origin)


def _packaged_nvcc(site_packages: Iterable[str]) -> Path | None:
    found = [path for folder in site_packages for path in sorted(Path(folder).glob("nvidia/cu[0-9]*/bin/nvcc"))]
    return found[-1] if found else None


def _site_packages() -> list[str]:
    """This environment's: pip takes them off sys.path while it builds in isolation, but leaves the paths' scheme."""
    return list(dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *filter(None, sys.path)]))


def _ask(path: Path, origin: str) -> Nvcc:
    version = re.search(r"release (\d+\.\d+)", _output(path, "--version"))
    architectures = re.findall(r"sm_(\d+)$", _output(path, "--list-gpu-code"), re.MULTILINE)
    if version is None or not architectures:
        raise NvccError(f"{path} does not answer --version and --list-gpu-code as nvcc of CUDA 11.8 or newer does")
    home = re.search(r"^#\$ _HERE_=(.+)$", _output(path, "--dryrun", "none.cu"), re.MULTILINE)
    return Nvcc(
        path=Path(home[1], "nvcc").resolve() if home and Path(home[1], "nvcc").is_file() else path,
        version=version[1],
        architectures=frozenset(map(int, architectures)),
        origin=origin,
    )


def _output(path: Path, *arguments: str) -> str:
    """What nvcc prints, on either stream; a failure of --dryrun, for its missing file, is not one of the compiler."""
    try:
        result = subprocess.run([path, *arguments], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NvccError(f"{path} does not run: {error}") from error
    if result.returncode and "--dryrun" not in arguments:
        raise NvccError(f"{path} {' '.join(arguments)} failed: {(result.stderr or result.stdout).strip()}")
    return result.stdout + result.stderr
