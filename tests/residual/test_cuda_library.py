"""The CUDA library as nvcc makes it, read without a GPU: architectures, registers, width of memory accesses, symbols.

Skipped without nvcc, unless MEGATRON_SBLD_CUDA=force, as in CI: then a missing compiler fails here.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import pytest
from build_libraries import BuildError, Switches, compile_library, library_command

from megatron_sbld.nvcc import find_nvcc
from megatron_sbld.residual.native import ABI, Args, Library

pytestmark = pytest.mark.slow

FORCED = os.environ.get("MEGATRON_SBLD_CUDA") == "force"


@dataclass(frozen=True)
class Compiled:
    path: Path
    assembler: str
    """What ptxas -v printed."""
    targets: tuple[str, ...]
    """Such as sm_90."""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """The library, for the default architectures."""
    path = tmp_path_factory.mktemp("cuda") / "_residual_cuda.so"
    try:
        command = library_command("cuda", Switches.read({}), os.environ)
    except BuildError as error:
        if FORCED:
            raise
        pytest.skip(str(error))
    printed = compile_library("cuda", [*command, "-Xptxas", "-v"], path)
    targets = re.findall(r"code=(sm_\d+)", " ".join(command))
    return Compiled(path, printed, tuple(targets))


@pytest.fixture(scope="module")
def machine_code(compiled: Compiled) -> dict[tuple[str, str], str]:
    """Target and mangled kernel name to its machine code."""
    packaged = [str(path.parent) for path in Path(sysconfig.get_path("purelib")).glob("nvidia/cu[0-9]*/bin/cuobjdump")]
    search = os.pathsep.join([*packaged, str(find_nvcc().path.parent), os.environ["PATH"]])
    if not (shutil.which("cuobjdump", path=search) and shutil.which("nvdisasm", path=search)):
        message = "needs cuobjdump and nvdisasm: pip install --group disassembler"
        pytest.fail(message) if FORCED else pytest.skip(message)
    command = [shutil.which("cuobjdump", path=search), "-sass", compiled.path]
    output = subprocess.run(
        command, env={**os.environ, "PATH": search}, capture_output=True, text=True, check=True
    ).stdout
    kernels: dict[tuple[str, str], str] = {}
    for part in re.split(r"\tcode for (?=sm_)", output)[1:]:
        target, *functions = re.split(r"\bFunction : ", part)
        kernels |= {(target.split()[0], function.split()[0]): function for function in functions}
    return kernels


def test_it_loads_without_a_driver_and_says_what_it_was_built_for(compiled: Compiled) -> None:
    nvcc = find_nvcc()
    newest = compiled.targets[-1].removeprefix("sm_")
    assert Library("cuda", compiled.path).build == f"cuda {nvcc.version}; {' '.join(compiled.targets)} compute_{newest}"
    assert set(compiled.targets) == {f"sm_{number}" for number in (80, 90, 100) if number in nvcc.architectures}


def test_a_gpu_that_is_not_there_is_an_error_before_anything_is_launched(compiled: Compiled) -> None:
    """On a machine without a driver and on one with GPUs."""
    library = Library("cuda", compiled.path)
    args = Args(abi=ABI, device=99, rows0=1, rows1=1, hidden=8, x_rows0=1, x_rows1=1)
    for call in (library.forward, library.backward):
        with pytest.raises(RuntimeError, match=r"\(cuda .*\): .*(driver|device)"):
            call(args)


def test_no_kernel_spills_registers_on_any_architecture(compiled: Compiled) -> None:
    for target in compiled.targets:
        functions = re.findall(rf"Compiling entry function '(\w+)' for '{target}'", compiled.assembler)
        assert sum("forward_kernel" in name for name in functions) >= 5, target
        assert sum("backward_kernel" in name for name in functions) >= 5, target
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", compiled.assembler)
    assert len(spills) >= len(re.findall("Compiling entry function", compiled.assembler))
    assert set(spills) == {("0", "0")}


def test_the_hot_kernels_move_16_bytes_at_a_time(compiled: Compiled, machine_code: dict[tuple[str, str], str]) -> None:
    hot = {key: code for key, code in machine_code.items() if re.search(r"\d(for|back)ward_kernelI\w+Lb1E", key[1])}
    assert {target for target, _ in hot} == set(compiled.targets)
    assert len(hot) >= 10 * len(compiled.targets)
    for key, code in hot.items():
        loads, stores = (re.findall(rf"\b{name}\.E(?:\.\w+)*", code) for name in ("LDG", "STG"))
        assert stores, key
        assert all(".128" in store for store in stores), (key, stores)
        # The seed and the row's number are single numbers, the same for all threads of a block.
        assert sum(".128" in load for load in loads) >= 1, (key, loads)
        assert sum(".128" not in load for load in loads) <= 2, (key, loads)


def test_the_backward_kernel_with_a_bias_moves_16_bytes_at_a_time(
    compiled: Compiled, machine_code: dict[tuple[str, str], str]
) -> None:
    hot = {
        key: code
        for key, code in machine_code.items()
        if re.search(r"backward_bias_kernelI\w+Lb1ELb[01]ELb[01]E", key[1])
    }
    assert len(hot) == 20 * len(compiled.targets)  # 5 pairs of dtypes, with and without dropout and index
    for key, code in hot.items():
        loads, stores = (re.findall(rf"\b{name}\.E(?:\.\w+)*", code) for name in ("LDG", "STG"))
        rows_at_once = 4
        assert sum(".128" in load for load in loads) >= rows_at_once, (key, loads)
        assert sum(".128" in store for store in stores) >= rows_at_once, (key, stores)
        assert sum(".128" not in store for store in stores) == 1, (key, stores)  # a column's partial sum
        # The seed, and from an index the row of each row of x.
        assert sum(".128" not in load for load in loads) <= 1 + 2 * rows_at_once, (key, loads)


def test_it_exports_its_own_functions_alone(compiled: Compiled) -> None:
    """A symbol of the static CUDA runtime would meet the one that torch brings."""
    if not shutil.which("nm"):
        pytest.skip("needs nm")
    command = ["nm", "--dynamic", "--defined-only", "--format=posix", str(compiled.path)]
    names = {
        line.split()[0]
        for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    }
    functions = ("abi", "build", "forward", "backward", "forward_workspace", "backward_workspace")
    assert names == {f"sbld_residual_{name}" for name in functions}
    assert compiled.path.stat().st_size < 8 * 2**20  # stripped
