"""The residual add's compiled libraries, called through their C interface (csrc/residual.h).

    library = load("cuda")
    args = Args(ABI, dtype, dtype, 0, ...)    # the fields of struct sbld_residual_args, in their order or by name
    library.forward(args)

Takes addresses, not tensors: no torch here, and no check of what the addresses point to.
"""

from __future__ import annotations

import ctypes
import functools
import re
from pathlib import Path

ABI = 2
"""SBLD_RESIDUAL_ABI of the header that `Args` mirrors."""

NAMES = ("cuda", "cpu")


class Args(ctypes.Structure):
    """struct sbld_residual_args; None is a null pointer."""

    _fields_ = [
        ("abi", ctypes.c_int32),
        ("x_dtype", ctypes.c_int32),
        ("residual_dtype", ctypes.c_int32),
        ("index_dim", ctypes.c_int32),
        ("device", ctypes.c_int32),
        ("drop_threshold", ctypes.c_uint32),
        ("multiplier", ctypes.c_float),
        ("reserved", ctypes.c_int32),
        ("rows0", ctypes.c_int64),
        ("rows1", ctypes.c_int64),
        ("hidden", ctypes.c_int64),
        ("x_rows0", ctypes.c_int64),
        ("x_rows1", ctypes.c_int64),
        ("index_stride0", ctypes.c_int64),
        ("index_stride1", ctypes.c_int64),
        ("x", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("residual", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("d_y", ctypes.c_void_p),
        ("d_x", ctypes.c_void_p),
        ("d_bias", ctypes.c_void_p),
        ("index", ctypes.c_void_p),
        ("seed", ctypes.c_void_p),
        ("workspace", ctypes.c_void_p),
        ("stream", ctypes.c_void_p),
    ]


class LibraryError(RuntimeError):
    """A library cannot be used; the message says why, and what mends it.

    Args:
        reason: why.
        name: cuda or cpu.
    """

    def __init__(self, reason: str, name: str) -> None:
        compiler = "nvcc (a CUDA toolkit)" if name == "cuda" else "a C++ compiler"
        self.reason = reason
        self.mend = f"with {compiler} at hand, in megatron-sbld's source: pip install -v --no-deps --force-reinstall ."
        super().__init__(f"{reason}; {self.mend}")


class Library:
    """A loaded library.

    Args:
        name: cuda or cpu.
        path: of the shared library.

    Raises:
        LibraryError: it is not there, the loader refuses it, or it was built for another interface.
    """

    def __init__(self, name: str, path: Path) -> None:
        if not path.is_file():
            raise LibraryError(f"{path.name} is not built", name)
        try:
            functions = ctypes.CDLL(str(path))
            abi = functions.sbld_residual_abi()
            if abi != ABI:
                raise LibraryError(f"{path} has interface {abi}, this megatron-sbld needs {ABI}", name)
            self._forward = _function(functions, "forward", ctypes.c_char_p)
            self._backward = _function(functions, "backward", ctypes.c_char_p)
            self._forward_workspace = _function(functions, "forward_workspace", ctypes.c_size_t)
            self._backward_workspace = _function(functions, "backward_workspace", ctypes.c_size_t)
            functions.sbld_residual_build.restype = ctypes.c_char_p
            self.build: str = functions.sbld_residual_build().decode()
            """What it was built for, such as "cuda 13.0; sm_80 sm_90 compute_90"."""
        except (OSError, AttributeError) as error:  # the loader's text; a function that is not there
            raise LibraryError(f"{path} cannot be loaded: {error}", name) from error
        self.name = name
        self.path = path

    def forward(self, args: Args) -> None:
        """y = residual, y[row] += multiplier * mask * (x + bias). On a GPU it is queued on args.stream.

        Raises:
            RuntimeError: what the library or CUDA says.
        """
        error = self._forward(args)
        if error is not None:
            raise RuntimeError(f"residual add, forward ({self.build}): {error.decode()}")

    def backward(self, args: Args) -> None:
        """d_x = multiplier * mask * d_y[row], d_bias its sum over rows; each may be null. Raises as `forward` does."""
        error = self._backward(args)
        if error is not None:
            raise RuntimeError(f"residual add, backward ({self.build}): {error.decode()}")

    def forward_workspace(self, args: Args) -> int:
        """Bytes of workspace that `forward` needs for these shapes."""
        return self._forward_workspace(args)

    def backward_workspace(self, args: Args) -> int:
        """Bytes of workspace that `backward` needs for these shapes."""
        return self._backward_workspace(args)


@functools.cache
def load(name: str) -> Library:
    """The library `cuda` or `cpu` that was installed with this package.

    Raises:
        LibraryError: it cannot be used, with the reason.
        ValueError: another name.
    """
    if name not in NAMES:
        raise ValueError(f"residual library {name!r}: must be one of {', '.join(NAMES)}")
    return Library(name, library_path(name))


def runs_on(build: str, capability: int) -> bool:
    """Whether a library built for e.g. `cuda 13.0; sm_80 compute_80` runs on a compute capability (times ten).

    Machine code runs on its major capability from its minor one up, PTX on everything newer.
    """
    machine = [int(number) for number in re.findall(r"\bsm_(\d+)", build)]
    ptx = [int(number) for number in re.findall(r"\bcompute_(\d+)", build)]
    return any(sm // 10 == capability // 10 and sm <= capability for sm in machine) or any(
        sm <= capability for sm in ptx
    )


def fits_driver(build: str, driver_cuda: int) -> bool:
    """Whether the CUDA runtime in a library works with a driver that knows CUDA up to this major version.

    A driver works with every minor version of its major one, and with older ones.
    """
    cuda = re.match(r"cuda (\d+)", build)
    return cuda is None or int(cuda[1]) <= driver_cuda


def library_path(name: str) -> Path:
    """Where the library is, if it is built."""
    return Path(__file__).with_name(f"_residual_{name}.so")


def _function(functions: ctypes.CDLL, name: str, restype: type) -> ctypes._NamedFuncPointer:
    function = getattr(functions, f"sbld_residual_{name}")
    function.argtypes = [ctypes.POINTER(Args)]
    function.restype = restype
    return function
