"""Compiles the residual add's libraries: what setup.py runs. Not installed; needs setuptools and compilers, not torch.

    _residual_cpu.so    from residual_cpu.cpp, with $CXX, c++, g++ or clang++
    _residual_cuda.so   from residual.cu, with the nvcc that megatron_sbld/nvcc.py finds

They are plain shared libraries (residual.h), so one wheel serves every Python and torch. The environment decides:

    MEGATRON_SBLD_CUDA=auto     what cannot be built is left out, and the output says why (`pip install -v` shows it)
    MEGATRON_SBLD_CUDA=force    what cannot be built, also the CPU library, is an error
    MEGATRON_SBLD_CUDA=off      no CUDA library
    MEGATRON_SBLD_CUDA_ARCHS="80;90;100+PTX"    for which GPUs, as far as this nvcc knows them

Where torch can be imported (`pip install --no-build-isolation`), the extension of bindings.cpp is compiled as well, for
this Python and torch alone. With MEGATRON_SBLD_EXTENSION=auto|build|off one that cannot be built there is left out, is
an error, or is not tried.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

from megatron_sbld.cxx import (
    EXTENSION_SOURCES,
    EXTENSION_VARIABLE,
    STRIP,
    BuildError,
    build_extension,
    compile_shared,
    extension_setting,
    find_cxx,
)
from megatron_sbld.nvcc import Nvcc, NvccError, find_nvcc

CSRC = Path(__file__).resolve().parent
SOURCES = {"cpu": CSRC / "residual_cpu.cpp", "cuda": CSRC / "residual.cu"}
HEADERS = [CSRC / "residual.h", CSRC / "residual_core.h"]
SWITCHES = ("auto", "force", "off")
DEFAULT_ARCHITECTURES = "80;90;100+PTX"


@dataclass(frozen=True, kw_only=True)
class Switches:
    """What the environment asks for."""

    cuda: str
    """auto, force or off."""
    architectures: tuple[int, ...]
    """Compute capabilities times ten, ascending."""
    ptx: bool
    """Whether newer GPUs get PTX of the newest architecture, which the driver compiles."""

    @classmethod
    def read(cls, environ: Mapping[str, str]) -> Switches:
        """MEGATRON_SBLD_CUDA and MEGATRON_SBLD_CUDA_ARCHS.

        Raises:
            ValueError: a value that is not allowed; names it.
        """
        cuda = environ.get("MEGATRON_SBLD_CUDA", "auto")
        if cuda not in SWITCHES:
            raise ValueError(f"MEGATRON_SBLD_CUDA={cuda!r}: must be one of {', '.join(SWITCHES)}")
        text = environ.get("MEGATRON_SBLD_CUDA_ARCHS", DEFAULT_ARCHITECTURES)
        if not re.fullmatch(r"\d{2,3}(;\d{2,3})*(\+PTX)?", text):
            raise ValueError(
                f"MEGATRON_SBLD_CUDA_ARCHS={text!r}: must be compute capabilities times ten, joined by ';', and +PTX "
                f"at the end for GPUs newer than the last, such as {DEFAULT_ARCHITECTURES!r}"
            )
        numbers = text.removesuffix("+PTX").split(";")
        return cls(cuda=cuda, architectures=tuple(sorted(set(map(int, numbers)))), ptx=text.endswith("+PTX"))


def cpu_command(environ: Mapping[str, str]) -> list[str]:
    """The C++ compiler and its options.

    Raises:
        BuildError: there is no C++ compiler.
    """
    # Contraction off: the same sums as the CUDA library and the reference, bit for bit.
    return [*find_cxx(environ), "-std=c++17", "-O3", "-ffp-contract=off", "-fPIC", "-shared", *STRIP]


def cuda_command(nvcc: Nvcc, switches: Switches) -> list[str]:
    """nvcc and its options, with those of the architectures that this one knows.

    Raises:
        BuildError: it knows none of them.
    """
    known = [number for number in switches.architectures if number in nvcc.architectures]
    if not known:
        wanted = ", ".join(f"sm_{number}" for number in switches.architectures)
        raise BuildError(f"nvcc {nvcc.version} ({nvcc.path}) compiles for none of {wanted}")
    targets = [(number, f"sm_{number}") for number in known]
    if switches.ptx:
        targets.append((known[-1], f"compute_{known[-1]}"))
    return [
        *(str(nvcc.path), "-std=c++17", "-O3", "--fmad=false", "-shared", "-cudart", "static", "-Xcompiler", "-fPIC"),
        # The static runtime's symbols are kept apart from those of the runtime that torch brings.
        *(*STRIP, "-Xlinker", "--exclude-libs=ALL", f"--threads={min(len(targets), os.cpu_count() or 1)}"),
        f"-DSBLD_ARCHITECTURES={' '.join(code for _, code in targets)}",
        *(f"-gencode=arch=compute_{number},code={code}" for number, code in targets),
    ]


def library_command(name: str, switches: Switches, environ: Mapping[str, str]) -> list[str]:
    """How the library `cpu` or `cuda` is compiled here: all but source and output.

    Raises:
        BuildError: there is no compiler for it.
    """
    if name == "cpu":
        return cpu_command(environ)
    try:
        return cuda_command(find_nvcc(environ), switches)
    except NvccError as error:
        raise BuildError(str(error)) from error


def compile_library(name: str, command: list[str], target: Path) -> str:
    """Compile one library, unless `target` is of the same sources and command; returns what the compiler printed.

    Raises:
        BuildError: the compiler fails; holds what it printed.
    """
    return compile_shared(command, [SOURCES[name], *HEADERS], target)


class BuildLibraries(build_ext):
    """`build_ext` that compiles the two libraries, and the extension where it can."""

    _built_extension: Path | None = None

    def run(self) -> None:
        try:
            switches = Switches.read(os.environ)
            for extension in self.extensions:
                self._build(extension.name.rpartition("_")[2], Path(self.get_ext_fullpath(extension.name)), switches)
            self._build_extension(Path(self.get_ext_fullpath(EXTENSIONS[0].name)).parent)
        except (BuildError, ValueError) as error:
            raise SystemExit(f"error: {error}") from error  # no traceback: the last line is the message

    def _build(self, name: str, target: Path, switches: Switches) -> None:
        if name == "cuda" and switches.cuda == "off":
            target.unlink(missing_ok=True)
            print("megatron-sbld: MEGATRON_SBLD_CUDA=off: installing without the CUDA residual kernel", flush=True)
            return
        try:
            command = library_command(name, switches, os.environ)
            printed = compile_library(name, command, target)
        except BuildError as error:
            target.unlink(missing_ok=True)  # of older sources, or of a compiler that is gone
            if switches.cuda == "force":
                raise BuildError(f"MEGATRON_SBLD_CUDA=force, but {target.name} cannot be built: {error}") from error
            print(f"megatron-sbld: installing without {target.name}: {error}", flush=True)
        else:
            print(f"megatron-sbld: {target.name} with {shlex.join(command)}", printed, sep="\n", flush=True)

    def _build_extension(self, folder: Path) -> None:
        setting = extension_setting(os.environ)
        if setting == "off":
            return
        if importlib.util.find_spec("torch") is None:
            print(
                "megatron-sbld: installing without the extension: torch is not installed where this is built",
                flush=True,
            )
            return  # with `build` the first use builds it, for the torch that it meets
        try:
            self._built_extension = build_extension(folder, os.environ)
        except (BuildError, ImportError) as error:
            if setting == "build":
                raise BuildError(f"{EXTENSION_VARIABLE}=build, but the extension cannot be built: {error}") from error
            print(f"megatron-sbld: installing without the extension: {error}", flush=True)
        else:
            print(f"megatron-sbld: {self._built_extension.name}", flush=True)

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"

    def get_outputs(self) -> list[str]:
        libraries = [self.get_ext_fullpath(extension.name) for extension in self.extensions]
        made = [*libraries, *([str(self._built_extension)] if self._built_extension else [])]
        return [path for path in made if Path(path).is_file()]

    def get_output_mapping(self) -> dict[str, str]:
        """Of an editable install: where a wheel would have the libraries, and where in the source tree they are."""
        if not self.inplace:
            return {}
        return {
            str(Path(self.build_lib, self.get_ext_filename(ext.name))): self.get_ext_fullpath(ext.name)
            for ext in self.extensions
        }

    def get_source_files(self) -> list[str]:
        return [str(path.relative_to(CSRC.parent)) for path in [*HEADERS, *SOURCES.values(), CSRC / "bindings.cpp"]]


class Package(build_py):
    """`build_py` that adds the extension's sources, so that it can be built for the torch of the first use."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        folder = Path(self.build_lib, "megatron_sbld", "residual", "_source")
        folder.mkdir(parents=True, exist_ok=True)
        for name in EXTENSION_SOURCES:
            shutil.copy(CSRC / name, folder)


class Wheel(bdist_wheel):
    """A wheel for one platform and every Python 3."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


EXTENSIONS = [
    Extension(f"megatron_sbld.residual._residual_{name}", [f"csrc/{path.name}"]) for name, path in SOURCES.items()
]
COMMANDS = {"build_ext": BuildLibraries, "build_py": Package, "bdist_wheel": Wheel}
