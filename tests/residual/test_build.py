"""setup.py: which libraries it builds, from what, and what it says where it cannot."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from build_libraries import BuildError, Switches, cpu_command, cuda_command

from megatron_sbld.cxx import extension_file
from megatron_sbld.nvcc import Nvcc, NvccError, find_nvcc

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]

needs_compiler = pytest.mark.skipif(not shutil.which("c++"), reason="needs a C++ compiler")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of what a source distribution holds, without what was built."""
    copy = tmp_path / "source"
    unwanted = shutil.ignore_patterns("__pycache__", "*.so")
    for name in ("csrc", "megatron_sbld"):
        shutil.copytree(ROOT / name, copy / name, ignore=unwanted)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    return copy


def run_python(*arguments: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Python in `cwd` with these environment variables; no CUDA and no extension unless they say otherwise."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("MEGATRON_SBLD", "CUDA_HOME"))}
    environ |= {"MEGATRON_SBLD_CUDA": "off", "MEGATRON_SBLD_EXTENSION": "off", **variables}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=cwd, env=environ, capture_output=True, text=True, timeout=300)


def built(source: Path) -> set[str]:
    return {path.name for path in (source / "megatron_sbld" / "residual").glob("*.so")}


def write_nvcc(path: Path, version: str = "11.8", architectures: str = "sm_80 sm_90") -> Path:
    """A program that answers as nvcc does."""
    path.parent.mkdir(parents=True)
    codes = "\\n".join(architectures.split())
    path.write_text(
        "#!/bin/sh\n"
        f'case "$1" in --version) echo "Cuda compilation tools, release {version}, V{version}.89";;\n'
        f'  --list-gpu-code) printf "{codes}\\n";; *) exit 1;; esac\n'
    )
    path.chmod(0o755)
    return path


@needs_compiler
def test_a_wheel_without_cuda_serves_every_python_and_installs_without_any_dependency(source: Path) -> None:
    wheels = source.parent / "wheels"
    made = run_python("-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(wheels), ".", cwd=source)
    assert made.returncode == 0, made.stdout + made.stderr
    (wheel,) = wheels.glob("*.whl")
    assert "-py3-none-linux_" in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    assert [name for name in names if name.endswith(".so")] == ["megatron_sbld/residual/_residual_cpu.so"]
    assert not [name for name in names if "csrc" in name or "build_libraries" in name]
    # With which the extension can be built for whatever torch it meets.
    sources = {f"megatron_sbld/residual/_source/{name}" for name in ("bindings.cpp", "residual.h")}
    assert {name for name in names if "_source" in name} == sources

    venv = source.parent / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True, timeout=120)
    python = str(venv / "bin" / "python")
    installed = run_python("-m", "pip", "--python", python, "install", "--no-deps", str(wheel), cwd=source.parent)
    assert installed.returncode == 0, installed.stdout + installed.stderr
    # The doctor has to work where nothing else does.
    doctor = subprocess.run([python, "-m", "megatron_sbld.doctor"], capture_output=True, text=True, cwd=source.parent)
    assert doctor.returncode == 0, doctor.stderr
    assert "torch: pip install 'torch>=2.6'" in doctor.stdout
    assert "jsonargparse[signatures]>=4.49" in doctor.stdout


def test_without_compilers_the_installation_works_and_says_what_it_lacks(source: Path) -> None:
    empty = source.parent / "empty"
    empty.mkdir()
    variables = {"MEGATRON_SBLD_CUDA": "auto", "PATH": str(empty), "CUDA_HOME": str(empty), "CXX": "no-such-compiler"}
    result = run_python("setup.py", "build_ext", "--inplace", cwd=source, **variables)
    assert result.returncode == 0, result.stderr
    assert "installing without _residual_cpu.so: no C++ compiler was found (no-such-compiler)" in result.stdout
    assert f"installing without _residual_cuda.so: CUDA_HOME={empty} has no bin/nvcc" in result.stdout
    assert built(source) == set()


@needs_compiler
def test_forcing_cuda_fails_without_nvcc_and_says_why(source: Path) -> None:
    empty = str(source.parent)
    result = run_python("setup.py", "build_ext", "--inplace", cwd=source, MEGATRON_SBLD_CUDA="force", CUDA_HOME=empty)
    assert result.returncode != 0
    expected = f"MEGATRON_SBLD_CUDA=force, but _residual_cuda.so cannot be built: CUDA_HOME={empty} has no bin/nvcc"
    assert result.stderr.rstrip().endswith(expected)


@needs_compiler
def test_forcing_cuda_fails_where_nvcc_fails_and_auto_goes_on(source: Path) -> None:
    write_nvcc(source.parent / "cuda" / "bin" / "nvcc")  # answers, but cannot compile
    home = str(source.parent / "cuda")
    (source / "megatron_sbld" / "residual" / "_residual_cuda.so").write_text("of an older source")
    forced = run_python("setup.py", "build_ext", "--inplace", cwd=source, MEGATRON_SBLD_CUDA="force", CUDA_HOME=home)
    assert forced.returncode != 0
    assert "bin/nvcc -std=c++17" in forced.stderr
    tried = run_python("setup.py", "build_ext", "--inplace", cwd=source, MEGATRON_SBLD_CUDA="auto", CUDA_HOME=home)
    assert tried.returncode == 0, tried.stderr
    assert "installing without _residual_cuda.so" in tried.stdout
    assert built(source) == {"_residual_cpu.so"}


def test_the_cpu_library_is_not_optional_where_cuda_is_forced(source: Path) -> None:
    result = run_python("setup.py", "build_ext", cwd=source, MEGATRON_SBLD_CUDA="force", CXX="no-such-compiler")
    assert result.returncode != 0
    assert "_residual_cpu.so cannot be built: no C++ compiler was found (no-such-compiler)" in result.stderr


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("MEGATRON_SBLD_CUDA", "yes", "auto, force, off"),
        ("MEGATRON_SBLD_CUDA", "", "auto, force, off"),
        ("MEGATRON_SBLD_CUDA_ARCHS", "8.0;9.0", "80;90;100"),
        ("MEGATRON_SBLD_CUDA_ARCHS", "80+PTX;90", "80;90;100"),
        ("MEGATRON_SBLD_CUDA_ARCHS", "", "80;90;100"),
    ],
)
def test_an_unknown_switch_is_refused_by_name(name: str, value: str, allowed: str) -> None:
    with pytest.raises(ValueError, match=f"{name}={value!r}.*{allowed}".replace("+", r"\+")):
        Switches.read({name: value})


def test_an_unknown_switch_ends_the_installation(source: Path) -> None:
    result = run_python("setup.py", "build_ext", cwd=source, MEGATRON_SBLD_CUDA="on")
    assert result.returncode != 0
    assert result.stderr.rstrip().endswith("error: MEGATRON_SBLD_CUDA='on': must be one of auto, force, off")


@needs_compiler
def test_an_editable_build_compiles_into_the_source_tree_once_and_again_when_a_source_changes(source: Path) -> None:
    build = ("setup.py", "build_ext", "--inplace")
    assert run_python(*build, cwd=source).returncode == 0
    assert built(source) == {"_residual_cpu.so"}
    assert "_residual_cpu.so is up to date" in run_python(*build, cwd=source).stdout
    with (source / "csrc" / "residual.h").open("a") as header:
        header.write("// changed\n")
    assert "up to date" not in run_python(*build, cwd=source).stdout
    assert "up to date" not in run_python(*build, cwd=source, CXX="c++ -O2").stdout


@needs_compiler
def test_switching_cuda_off_removes_the_library_that_an_earlier_build_left(source: Path) -> None:
    (source / "megatron_sbld" / "residual" / "_residual_cuda.so").write_text("of an earlier build")
    assert run_python("setup.py", "build_ext", "--inplace", cwd=source).returncode == 0
    assert built(source) == {"_residual_cpu.so"}


def test_a_source_distribution_holds_the_sources_and_what_compiles_them(source: Path) -> None:
    program = "from setuptools.build_meta import build_sdist; print(build_sdist('.'))"
    result = run_python("-c", program, cwd=source)
    assert result.returncode == 0, result.stderr
    with tarfile.open(source / result.stdout.splitlines()[-1]) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    sources = {f"csrc/{path.name}" for path in (ROOT / "csrc").iterdir() if path.is_file()}
    assert sources | {"setup.py", "megatron_sbld/nvcc.py", "megatron_sbld/cxx.py"} <= held
    assert len(sources) >= 6


@needs_compiler
def test_the_extension_is_built_where_torch_is_and_left_out_where_it_is_not(source: Path) -> None:
    build = ("setup.py", "build_ext", "--inplace")
    isolated = (
        "import importlib.util as util, runpy, sys\n"
        "find = util.find_spec\n"
        "util.find_spec = lambda name, *more: None if name == 'torch' else find(name, *more)\n"
        f"sys.argv = {list(build)!r}\n"
        "runpy.run_path('setup.py', run_name='__main__')"
    )
    for setting in ("auto", "build"):
        without = run_python("-c", isolated, cwd=source, MEGATRON_SBLD_EXTENSION=setting)
        assert without.returncode == 0, without.stderr
        assert "installing without the extension: torch is not installed where this is built" in without.stdout
    made = run_python(*build, cwd=source, MEGATRON_SBLD_EXTENSION="build")
    assert made.returncode == 0, made.stdout + made.stderr
    (name,) = built(source) - {"_residual_cpu.so"}
    assert name == extension_file(torch.__version__)


def test_an_extension_that_cannot_be_built_says_what_is_missing(source: Path) -> None:
    program = ("-m", "megatron_sbld.cxx")
    result = run_python(*program, cwd=source, CXX="no-such-compiler", MEGATRON_SBLD_EXTENSION="auto")
    assert result.returncode == 0
    assert result.stderr == "megatron-sbld: without the extension: no C++ compiler was found (no-such-compiler)\n"
    forced = run_python(*program, cwd=source, CXX="no-such-compiler", MEGATRON_SBLD_EXTENSION="build")
    assert forced.returncode == 1


@needs_compiler
def test_on_first_use_it_is_built_into_the_cache_by_one_of_many_processes(source: Path, tmp_path: Path) -> None:
    program = "from megatron_sbld.residual.extension import bindings; print(bindings().__file__)"
    variables = {"MEGATRON_SBLD_EXTENSION": "build", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    with ThreadPoolExecutor(2) as pool:
        runs = list(pool.map(lambda _: run_python("-c", program, cwd=source, **variables), range(2)))
    assert [run.returncode for run in runs] == [0, 0], runs[0].stderr + runs[1].stderr
    path = tmp_path / "cache" / "megatron-sbld" / extension_file(torch.__version__)
    assert {run.stdout.strip() for run in runs} == {str(path)}
    assert list(path.parent.glob("*.so")) == [path]
    refused = run_python("-c", program, cwd=source, MEGATRON_SBLD_EXTENSION="yes")
    assert "ValueError: MEGATRON_SBLD_EXTENSION='yes': must be one of auto, build, off" in refused.stderr


def test_cuda_home_wins_over_the_path_and_that_over_a_package(tmp_path: Path) -> None:
    home = write_nvcc(tmp_path / "home" / "bin" / "nvcc", version="12.4")
    on_path = write_nvcc(tmp_path / "path" / "nvcc", version="11.8")
    packaged = write_nvcc(tmp_path / "site" / "nvidia" / "cu13" / "bin" / "nvcc", version="13.5")
    environ = {"PATH": f"{on_path.parent}:/usr/bin:/bin", "CUDA_HOME": str(tmp_path / "home")}
    site = [str(tmp_path / "site")]
    assert find_nvcc(environ, site) == Nvcc(
        path=home, version="12.4", architectures=frozenset({80, 90}), origin="CUDA_HOME"
    )
    assert find_nvcc({"PATH": environ["PATH"]}, site).path == on_path
    assert find_nvcc({"PATH": str(tmp_path)}, site).path == packaged
    with pytest.raises(NvccError, match="CUDA_HOME=/nowhere has no bin/nvcc"):
        find_nvcc({"PATH": environ["PATH"], "CUDA_HOME": "/nowhere"}, site)
    with pytest.raises(NvccError, match="no nvcc was found"):
        find_nvcc({"PATH": str(tmp_path)}, [])


def test_an_nvcc_that_does_not_run_is_an_error_with_its_path(tmp_path: Path) -> None:
    broken = write_nvcc(tmp_path / "bin" / "nvcc")
    broken.write_text("#!/bin/sh\necho no licence >&2; exit 3\n")
    with pytest.raises(NvccError, match=f"{broken} --version failed: no licence"):
        find_nvcc({"CUDA_HOME": str(tmp_path)}, [])


def test_an_older_nvcc_compiles_for_the_architectures_that_it_knows() -> None:
    nvcc = Nvcc(path=Path("nvcc"), version="11.8", architectures=frozenset({70, 80, 86, 90}), origin="PATH")
    command = cuda_command(nvcc, Switches.read({}))
    assert [option for option in command if option.startswith("-gencode")] == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_90,code=compute_90",
    ]
    assert "-DSBLD_ARCHITECTURES=sm_80 sm_90 compute_90" in command
    exact = cuda_command(nvcc, Switches.read({"MEGATRON_SBLD_CUDA_ARCHS": "86"}))
    assert [option for option in exact if option.startswith("-gencode")] == ["-gencode=arch=compute_86,code=sm_86"]


def test_an_nvcc_that_knows_none_of_the_architectures_is_refused() -> None:
    nvcc = Nvcc(path=Path("nvcc"), version="11.8", architectures=frozenset({80}), origin="PATH")
    with pytest.raises(BuildError, match=r"nvcc 11.8 .*none of sm_100, sm_120"):
        cuda_command(nvcc, Switches.read({"MEGATRON_SBLD_CUDA_ARCHS": "120;100"}))


def test_the_cpu_library_is_compiled_without_contraction_and_by_the_compiler_asked_for(tmp_path: Path) -> None:
    compiler = tmp_path / "my++"
    compiler.touch(mode=0o755)
    command = cpu_command({"PATH": str(tmp_path), "CXX": "my++ -march=native"})
    assert command[:2] == [str(compiler), "-march=native"]
    assert "-ffp-contract=off" in command
