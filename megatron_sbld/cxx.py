"""Finds the C++ compiler, compiles shared libraries with it, and the extension on torch's C++ API among them.

    python -m megatron_sbld.cxx    builds the extension where the package is installed

Needs no torch but for the extension, so that setup.py can use it anywhere.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path

ELF = platform.system() == "Linux"
STRIP = ["-Xlinker", "--strip-all"] if ELF else []

EXTENSION = "_residual_bindings"
"""The extension's module, csrc/bindings.cpp."""
EXTENSION_VARIABLE = "MEGATRON_SBLD_EXTENSION"
EXTENSION_SETTINGS = ("auto", "build", "off")
EXTENSION_SOURCES = ("bindings.cpp", "residual.h")


class BuildError(RuntimeError):
    """A library cannot be built; the message says why."""


def find_cxx(environ: Mapping[str, str]) -> list[str]:
    """$CXX, c++, g++ or clang++, with the options that $CXX may hold.

    Raises:
        BuildError: there is no C++ compiler.
    """
    names = [environ["CXX"]] if environ.get("CXX") else ["c++", "g++", "clang++"]
    for name in names:
        program, *options = shlex.split(name)
        if found := shutil.which(program, path=environ.get("PATH", os.defpath)):
            return [found, *options]
    raise BuildError(f"no C++ compiler was found ({', '.join(names)})")


def compile_shared(command: Sequence[str], sources: Sequence[Path], target: Path) -> str:
    """Compile the first source, which includes the others; returns what the compiler printed.

    Nothing is compiled if `target` is of the same sources and command.

    Raises:
        BuildError: the compiler fails; holds what it printed.
    """
    key = _key(command, sources)
    if target.is_file() and bytes.fromhex(key) in target.read_bytes():
        return f"{target.name} is up to date"
    target.parent.mkdir(parents=True, exist_ok=True)
    written = target.with_suffix(f".{os.getpid()}.new.so")  # a process may have the old one loaded
    # Libraries follow the source that needs them.
    options = [option for option in command if not option.startswith("-l")]
    libraries = [option for option in command if option.startswith("-l")]
    build_id = ["-Xlinker", f"--build-id=0x{key}"] if ELF else []
    full = [*options, *build_id, str(sources[0]), "-o", str(written), *libraries]
    result = subprocess.run(full, capture_output=True, text=True)
    if result.returncode:
        written.unlink(missing_ok=True)
        raise BuildError(f"{full[0]} failed\n{shlex.join(full)}\n{result.stdout}{result.stderr}".rstrip())
    written.replace(target)
    return result.stdout + result.stderr


def _key(command: Sequence[str], sources: Sequence[Path]) -> str:
    """Identifies sources, compiler and options, as hexadecimal digits; the library carries it as its build id."""
    version = subprocess.run([command[0], "--version"], capture_output=True).stdout
    contents = [path.read_bytes() for path in sources if path.is_file()]
    return hashlib.sha1(b"\0".join([version, *map(str.encode, command), *contents])).hexdigest()


def extension_setting(environ: Mapping[str, str]) -> str:
    """MEGATRON_SBLD_EXTENSION, by default auto.

    Raises:
        ValueError: another value.
    """
    setting = environ.get(EXTENSION_VARIABLE, "auto")
    if setting not in EXTENSION_SETTINGS:
        raise ValueError(f"{EXTENSION_VARIABLE}={setting!r}: must be one of {', '.join(EXTENSION_SETTINGS)}")
    return setting


def extension_source() -> Path:
    """The folder of the extension's sources: of a wheel in the package, else csrc/ of the repository."""
    package = Path(__file__).resolve().parent
    installed = package / "residual" / "_source"
    return installed if installed.is_dir() else package.parent / "csrc"


def extension_file(torch_version: str) -> str:
    """The extension's file name, which says for which Python, torch and source it is."""
    contents = [(extension_source() / name).read_bytes() for name in EXTENSION_SOURCES]
    digest = hashlib.sha1(b"\0".join(contents)).hexdigest()[:8]
    return f"{EXTENSION}.{sys.implementation.cache_tag}.torch-{torch_version}.{digest}.so"


def build_extension(folder: Path, environ: Mapping[str, str]) -> Path:
    """Compile the extension for this Python and torch, half a minute of a core; older ones in the folder are deleted.

    Raises:
        BuildError: torch, its headers, Python's or a compiler are missing, or the compiler fails.
    """
    import torch
    from torch.utils import cpp_extension

    includes = [*cpp_extension.include_paths(), sysconfig.get_path("include")]
    for header, where in (("torch/extension.h", includes[:-1]), ("Python.h", includes[-1:])):
        if not any((Path(path) / header).is_file() for path in where):
            package = "Python's headers (Debian, Ubuntu: python3-dev)" if header == "Python.h" else "torch's headers"
            raise BuildError(f"{header} is not in {', '.join(where)}: install {package}")
    command = [
        *(*find_cxx(environ), "-std=c++20", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", *STRIP),
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        *(f"-I{path}" for path in includes),
        *(f"-L{path}" for path in cpp_extension.library_paths()),
        *("-lc10", "-ltorch_cpu", "-ltorch", "-ltorch_python"),
    ]
    target = folder / extension_file(torch.__version__)
    compile_shared(command, [extension_source() / name for name in EXTENSION_SOURCES], target)
    for old in folder.glob(f"{EXTENSION}.{sys.implementation.cache_tag}.torch-{torch.__version__}.*.so"):
        if old != target:
            old.unlink(missing_ok=True)
    return target


def main() -> int:
    """Build the extension beside the package's libraries, or say why not; the exit status.

    That is 1 only where MEGATRON_SBLD_EXTENSION is `build`: without the extension everything works, but slower.
    """
    setting = extension_setting(os.environ)
    if setting == "off":
        print(f"megatron-sbld: {EXTENSION_VARIABLE}=off: no extension")
        return 0
    try:
        print(f"megatron-sbld: {build_extension(Path(__file__).resolve().parent / 'residual', os.environ)}")
    except (BuildError, ImportError, OSError) as error:
        print(f"megatron-sbld: without the extension: {error}", file=sys.stderr)
        return int(setting == "build")
    return 0


if __name__ == "__main__":
    sys.exit(main())
