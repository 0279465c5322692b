"""The residual libraries as native.py loads them: the structure is that of the header, and every obstacle is named."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
from build_libraries import compile_library, cpu_command

from megatron_sbld.residual.native import ABI, Args, Library, LibraryError, load

CSRC = Path(__file__).resolve().parents[2] / "csrc"

pytestmark = pytest.mark.skipif(not shutil.which("c++"), reason="needs a C++ compiler")


def compile_source(folder: Path, source: str, *options: str) -> Path:
    """A program or, with -shared, a library of this C++ source."""
    (folder / "source.cpp").write_text(source)
    target = folder / "compiled.so"
    subprocess.run(["c++", f"-I{CSRC}", *options, str(folder / "source.cpp"), "-o", str(target)], check=True)
    return target


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    """The CPU library of these sources."""
    target = tmp_path_factory.mktemp("native") / "_residual_cpu.so"
    compile_library("cpu", cpu_command({"PATH": "/usr/bin:/bin:/usr/local/bin"}), target)
    return Library("cpu", target)


def test_the_structure_and_the_interface_number_are_those_of_the_header(tmp_path: Path) -> None:
    names = [field[0] for field in Args._fields_]
    numbers = ["SBLD_RESIDUAL_ABI", "sizeof(sbld_residual_args)"]
    numbers += [f"offsetof(sbld_residual_args, {name})" for name in names]
    lines = [f'  std::printf("%zu ", size_t({number}));' for number in numbers]
    program = "\n".join(["#include <cstdio>", '#include "residual.h"', "int main() {", *lines, "}"])
    output = subprocess.run([compile_source(tmp_path, program)], capture_output=True, text=True, check=True).stdout
    ours = [ABI, ctypes.sizeof(Args), *(getattr(Args, name).offset for name in names)]
    assert list(map(int, output.split())) == ours


def test_the_library_adds_and_multiplies(library: Library) -> None:
    x, residual, y = (ctypes.c_float * 4)(1, 2, 3, 4), (ctypes.c_float * 4)(10, 20, 30, 40), (ctypes.c_float * 4)()
    args = Args(abi=ABI, multiplier=0.5, rows0=2, rows1=1, hidden=2, x_rows0=2, x_rows1=1)
    args.x, args.residual, args.y = map(ctypes.addressof, (x, residual, y))
    library.forward(args)
    assert list(y) == [10.5, 21.0, 31.5, 42.0]
    d_x, d_bias = (ctypes.c_float * 4)(), (ctypes.c_float * 2)()
    args.d_y, args.d_x, args.d_bias = map(ctypes.addressof, (y, d_x, d_bias))
    workspace = ctypes.create_string_buffer(library.backward_workspace(args) + 1)
    args.workspace = ctypes.addressof(workspace)
    library.backward(args)
    assert list(d_x) == [5.25, 10.5, 15.75, 21.0]
    assert list(d_bias) == [21.0, 31.5]


def test_what_the_library_refuses_is_an_error_with_its_text(library: Library) -> None:
    for call in (library.forward, library.backward):
        with pytest.raises(RuntimeError, match=r"residual add, (forward|backward) \(cpu\): \w+"):
            call(Args(abi=ABI + 1))


def test_rows_of_x_that_the_residual_cannot_have_are_refused(library: Library) -> None:
    index = ctypes.c_int64(0)
    for dim, x_rows in ((0, (3, 3)), (0, (2, 2)), (1, (2, 4)), (1, (1, 3))):
        args = Args(abi=ABI, index_dim=dim, rows0=2, rows1=3, hidden=8, x_rows0=x_rows[0], x_rows1=x_rows[1])
        args.index = ctypes.addressof(index)
        for call in (library.forward, library.backward):
            with pytest.raises(RuntimeError, match="no more rows than residual along index_dim, and as many along"):
                call(args)


def test_a_library_that_is_not_built_says_how_to_build_it(tmp_path: Path) -> None:
    with pytest.raises(LibraryError, match=r"_residual_cuda.so is not built; with nvcc .*pip install"):
        Library("cuda", tmp_path / "_residual_cuda.so")
    with pytest.raises(LibraryError, match=r"is not built; with a C\+\+ compiler .*pip install"):
        Library("cpu", tmp_path / "_residual_cpu.so")


def test_a_library_of_another_interface_is_refused_with_both_numbers(tmp_path: Path) -> None:
    path = compile_source(tmp_path, 'extern "C" int sbld_residual_abi() { return 99; }', "-shared", "-fPIC")
    with pytest.raises(LibraryError, match=rf"interface 99, this megatron-sbld needs {ABI}; .*pip install"):
        Library("cpu", path)


def test_a_library_without_the_functions_is_refused_by_their_names(tmp_path: Path) -> None:
    source = f'extern "C" int sbld_residual_abi() {{ return {ABI}; }}'
    with pytest.raises(LibraryError, match=r"sbld_residual_forward.*pip install"):
        Library("cpu", compile_source(tmp_path, source, "-shared", "-fPIC"))


def test_a_file_that_the_loader_refuses_is_an_error_with_the_loaders_text(tmp_path: Path) -> None:
    path = tmp_path / "_residual_cpu.so"
    path.write_text("not a library")
    with pytest.raises(LibraryError, match=r"cannot be loaded: .*(file too short|invalid ELF header)"):
        Library("cpu", path)


def test_an_unknown_library_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="'gpu': must be one of cuda, cpu"):
        load("gpu")
