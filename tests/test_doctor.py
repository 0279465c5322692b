"""`megatron-sbld doctor`: what it finds, also where packages are broken or absent, and its exit status."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import package_info

from megatron_sbld import doctor
from megatron_sbld.cli import main as cli
from megatron_sbld.doctor import Finding, Gpu
from megatron_sbld.mcore.compat import SUPPORT
from megatron_sbld.residual import native

ROOT = Path(__file__).resolve().parents[1]

WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU would")


def write_package(folder: Path, name: str, source: str = "") -> None:
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(source)


def write_nvidia_smi(folder: Path) -> None:
    """An nvidia-smi of a machine with one GPU."""
    program = folder / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 9.0, 550.54.15'\n")
    program.chmod(0o755)


def examine(packages: Path, **variables: str) -> tuple[int, dict[str, dict[str, Any]], str]:
    """Exit status, findings by name, and standard error of the doctor with these packages before the installed ones."""
    environ = {**os.environ, "PYTHONPATH": f"{packages}{os.pathsep}{ROOT}", **variables}
    command = [sys.executable, "-m", "megatron_sbld.doctor", "--json"]
    result = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120, cwd=packages)
    assert result.stdout, result.stderr
    return result.returncode, {each["name"]: each for each in json.loads(result.stdout)["findings"]}, result.stderr


def test_the_command_shows_versions_and_what_will_be_used(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["doctor"])
    assert ended.value.code == 0
    lines = {line[2:21].strip(): line for line in capsys.readouterr().out.splitlines() if line.startswith("  ")}
    assert torch.__version__ in lines["torch"]
    assert f"{package_info.__version__.partition('+')[0]}; supported: " in lines["megatron-core"]
    assert "auto takes" in lines["transformer_impl"]
    assert "can be used" in lines["torch_compile"]
    assert {"Python", "megatron-sbld", "numpy", "NCCL", "cuda library", "cpu library", "residual add"} <= lines.keys()


def test_every_supported_megatron_core_is_listed_with_how_that_is_known() -> None:
    found = {finding.name: finding.value for finding in doctor._core_versions(package_info)}
    assert found == {f"0.{minor}": SUPPORT[0, minor].why for minor in range(16, 21)}
    assert list(doctor._core_versions(None)) == []


def test_without_a_compiler_layers_cannot_be_compiled() -> None:
    with torch._inductor.config.patch("cpp.cxx", (None, "no-such-compiler")):
        (found,) = [finding for finding in doctor.examine() if finding.name == "torch_compile"]
    assert (found.status, "No working C++ compiler" in found.value) == ("absent", True)


def test_the_usage_lists_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    assert "\n  doctor " in capsys.readouterr().out


@pytest.mark.slow
def test_what_is_installed_but_broken_is_named_and_fails(tmp_path: Path) -> None:
    write_package(tmp_path, "flash_attn", "print('noise')\nraise ImportError('undefined symbol: _ZN3c10')\n")
    write_package(tmp_path, "apex")  # as PyPI's, a web toolkit
    metadata = tmp_path / "megatron_core-0.15.3.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: megatron-core\nVersion: 0.15.3\n")
    status, findings, errors = examine(tmp_path, MEGATRON_SBLD_RESIDUAL="no-such")
    assert status == doctor.EXIT_BROKEN
    broken = {name: finding["value"] for name, finding in findings.items() if finding["status"] == "broken"}
    assert broken.keys() == {"flash-attn", "megatron-core", "residual add"}
    assert "undefined symbol: _ZN3c10" in broken["flash-attn"]
    assert broken["megatron-core"].startswith("0.15.3, but megatron-core")
    assert "MEGATRON_SBLD_RESIDUAL='no-such'" in broken["residual add"]
    assert all(findings[name]["mend"] for name in broken)
    assert "is not NVIDIA's" in findings["Apex"]["value"]
    assert "noise" in errors  # kept out of the JSON


def test_a_torch_that_does_not_import_is_reported_without_a_traceback(tmp_path: Path) -> None:
    write_package(tmp_path, "torch", "raise ImportError('libcudart.so.12: cannot open shared object file')\n")
    status, findings, errors = examine(tmp_path)
    assert status == doctor.EXIT_BROKEN
    assert "libcudart.so.12: cannot open shared object file" in findings["torch"]["value"]
    assert findings["transformer_impl"]["value"] == "megatron-core cannot be imported"
    assert "Traceback" not in errors


def test_megatron_core_that_does_not_import_leaves_the_rest_of_the_report(tmp_path: Path) -> None:
    write_package(tmp_path, "megatron", "")
    write_package(tmp_path, "megatron/core", "raise RuntimeError('no such operator')\n")
    status, findings, _ = examine(tmp_path)
    assert status == doctor.EXIT_BROKEN
    assert "RuntimeError: no such operator" in findings["megatron-core"]["value"]
    assert findings["torch"]["status"] == "ok"
    assert findings["residual add"]["status"] == "ok"


def test_a_checkout_newer_than_any_release_has_the_layers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package_info, "__version__", "0.20.0rc0")
    found = doctor._core_support(None)
    assert found is not None
    assert found.value.startswith("0.20.0rc0 of a checkout; layers in a patched Megatron-LM checkout only")
    assert "pip install 'megatron-core>=0.16.1,<0.20'" in found.mend
    monkeypatch.setattr(package_info, "__version__", "0.21.0")
    assert doctor._core_support("0.21.0") is None


def test_triton_that_is_missing_for_megatron_core_is_named(tmp_path: Path) -> None:
    write_package(tmp_path, "megatron", "")
    write_package(tmp_path, "megatron/core", "import triton\n")
    write_package(tmp_path, "triton", "raise ModuleNotFoundError(\"No module named 'triton'\", name='triton')\n")
    _, findings, _ = examine(tmp_path)
    assert findings["megatron-core"]["mend"].startswith("pip install triton")


def test_a_python_whose_garbage_collector_crashes_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 12, 2, "final", 0))
    assert doctor._python().status == "ok"
    monkeypatch.setattr(sys, "version_info", (3, 12, 1, "final", 0))
    assert "segmentation fault" in doctor._python().value


@WITHOUT_GPU
def test_a_gpu_that_torch_cannot_use_is_shown_with_its_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_nvidia_smi(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    gpus, findings = doctor._gpus(torch)
    assert gpus == [Gpu(name="NVIDIA H100 80GB HBM3", capability=90)]
    assert findings[0].value == "NVIDIA H100 80GB HBM3, compute capability 9.0, driver 550.54.15"
    expected = ("missing", "built without CUDA") if torch.version.cuda is None else ("broken", "cannot reach the GPU")
    assert (findings[1].status, expected[1] in findings[1].value) == (expected[0], True)


@pytest.mark.parametrize(
    ("build", "capability", "runs"),
    [
        ("cuda 13.0; sm_80 sm_90 sm_100 compute_100", 80, True),
        ("cuda 13.0; sm_80 sm_90 sm_100 compute_100", 86, True),  # same major capability, newer minor one
        ("cuda 13.0; sm_80 sm_90 sm_100 compute_100", 75, False),
        ("cuda 13.0; sm_80 sm_90 sm_100 compute_100", 120, True),  # from PTX
        ("cuda 11.8; sm_80 sm_90", 100, False),
        ("cuda 11.8; sm_80 sm_90 compute_90", 100, True),
        ("cuda 12.4; sm_86", 80, False),  # older minor capability
    ],
)
def test_machine_code_runs_on_its_major_capability_and_ptx_on_everything_newer(
    build: str, capability: int, runs: bool
) -> None:
    assert native.runs_on(build, capability) is runs


def test_a_library_that_does_not_fit_driver_or_gpu_is_told_how_to_be_built() -> None:
    build, turing, hopper = "cuda 13.0; sm_80 sm_90", Gpu(name="T4", capability=75), Gpu(name="H100", capability=90)
    assert doctor._obstacle(build, [hopper], 13) is None
    assert doctor._obstacle(build, [], None) is None
    reason, mend = doctor._obstacle(build, [hopper], 12) or ("", "")
    assert reason == "the driver knows CUDA up to 12 only"
    assert "CUDA_HOME set to a toolkit of CUDA 12" in mend
    reason, mend = doctor._obstacle(build, [hopper, turing], 13) or ("", "")
    assert reason == "no code for T4"
    assert "MEGATRON_SBLD_CUDA_ARCHS=75" in mend


def test_the_table_marks_what_is_wrong_and_ends_with_what_mends_it() -> None:
    findings = [
        Finding(section="packages", name="torch", value="2.6", status="ok"),
        Finding(section="packages", name="flash-attn", value="undefined symbol", status="broken", mend="pip uninstall"),
        Finding(section="GPUs", name="GPU", value="none", status="absent"),
    ]
    assert doctor.table(findings).splitlines() == [
        "packages",
        "  torch       2.6",
        "  flash-attn  BROKEN: undefined symbol",
        "",
        "GPUs",
        "  GPU         none",
        "",
        "to do",
        "  flash-attn: pip uninstall",
    ]
