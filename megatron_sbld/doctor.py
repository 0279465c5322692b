"""`megatron-sbld doctor`: what is installed here, what will be used, what is missing and how to fix it.

Works without torch, megatron-core and the command line's own libraries: `python -m megatron_sbld.doctor` is the same.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import importlib
import importlib.metadata
import importlib.util
import json
import platform
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from megatron_sbld import __version__
from megatron_sbld.findings import Finding, table
from megatron_sbld.nvcc import NvccError, find_nvcc

EXIT_BROKEN = 1
"""Exit status where something that is installed cannot be used."""

_NVCC_PACKAGES = "pip install nvidia-cuda-nvcc nvidia-cuda-runtime nvidia-cuda-cccl"
_REINSTALL = "in megatron-sbld's source: MEGATRON_SBLD_CUDA=force pip install --no-deps --force-reinstall ."
_TRANSFORMER_ENGINE = "pip install --no-build-isolation 'transformer-engine[pytorch]'"


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU as torch or nvidia-smi names it."""

    name: str
    capability: int
    """Compute capability times ten."""


def main(args: Sequence[str] | None = None) -> int:
    """Print the report; the exit status is 0, or EXIT_BROKEN."""
    parser = argparse.ArgumentParser(
        prog="megatron-sbld doctor",
        description="Show which versions, GPUs and compiled libraries are here, what will be used, what is missing and "
        "how to fix it. Exit status: 0, or 1 if something that is installed cannot be used: a package that does not "
        "import or has a version that does not work, a torch that cannot reach the GPU, a residual library that does "
        "not load or does not fit driver or GPU, a value of MEGATRON_SBLD_RESIDUAL that cannot be used. "
        "Something that is not installed is not a failure.",
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="print JSON: findings, each with its status")
    as_json = parser.parse_args(args).json
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():  # libraries print while they are imported
        warnings.simplefilter("ignore")
        findings = list(examine())
    broken = any(finding.status == "broken" for finding in findings)
    print(json.dumps({"findings": [asdict(finding) for finding in findings]}, indent=2) if as_json else table(findings))
    return EXIT_BROKEN if broken else 0


def examine() -> Iterator[Finding]:
    """All findings, from the interpreter down to the libraries."""
    yield _python()
    yield Finding(section="packages", name="megatron-sbld", value=__version__)
    torch = _module("torch")
    core = _module("megatron.core") if torch is not None else None
    yield from _required(torch)
    yield from _optional(usable=core is not None)
    yield _nccl(torch)
    gpus, findings = _gpus(torch)
    if torch is not None:  # the residual add's package needs it
        findings += [*_libraries(gpus), _extension()]
    yield from findings
    yield from _choices(torch, core)
    yield from _core_versions(core)
    built = any(finding.name == "cuda library" and finding.status == "ok" for finding in findings)
    yield _nvcc(needed=not built)


def _python() -> Finding:
    found = Finding(section="packages", name="Python", value=f"{platform.python_version()} ({sys.executable})")
    if sys.version_info[:3] != (3, 12, 1):
        return found
    value = f"{found.value}; its garbage collector ended tests of checkpoints with a segmentation fault"
    return replace(found, value=value, status="missing", mend="use another one: 3.13 and 3.11 are tested")


def _module(name: str) -> Any:
    """The module, or None if it cannot be imported."""
    try:
        return importlib.import_module(name)
    except Exception:  # whatever a package built for another system raises; _import_error says it
        return None


def _import_error(name: str) -> str:
    """Why a module cannot be imported, in a line; empty if it can."""
    try:
        importlib.import_module(name)
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _found(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):  # a parent that does not import; a module without a spec
        return name in sys.modules


def _required(torch: Any) -> Iterator[Finding]:
    """The packages that megatron-sbld requires: the main ones, and of the others those that are not as required."""
    modules = {"torch": "torch", "megatron-core": "megatron.core", "numpy": "numpy"}
    requirements = {package: (package, "") for package in modules} | _requirements()
    for package, (requirement, allowed) in requirements.items():
        row: dict[str, Any] = {"section": "packages", "name": package}
        version, mend = _version(package), f"pip install '{requirement}'"
        support = _core_support(version) if package == "megatron-core" and torch is not None else None
        allows = version is None or _allows(allowed, version)
        if support is not None and (allows or support.status == "missing"):
            yield support
        elif version is None:
            yield Finding(**row, value="not installed", status="missing", mend=mend)
        elif not allows:
            yield Finding(**row, value=f"{version}, but {requirement} is needed", status="broken", mend=mend)
        elif package not in modules:
            continue
        elif error := _import_error(modules[package]):
            mend = f"pip install --force-reinstall --no-deps '{package}=={version}'"
            if re.search(r"\btriton\b", error):
                mend = "pip install triton: megatron-core 0.19 imports it undeclared; torch brings it if built for CUDA"
            yield Finding(**row, value=f"{version} cannot be imported: {error}", status="broken", mend=mend)
        elif package == "torch":
            build = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
            yield Finding(**row, value=f"{torch.__version__}, {build}")
        else:
            yield Finding(**row, value=version)


def _core_support(version: str | None) -> Finding | None:
    """What works with the megatron-core that is imported, and how that is known; None if it was not tested.

    `version` is pip's, None of a Megatron-LM checkout; one that is not what is imported is not described.
    """
    if _module("megatron.core.package_info") is None or _module("megatron_sbld.mcore.compat") is None:
        return None
    from megatron.core.package_info import __version__ as found_version

    from megatron_sbld.mcore.compat import INSTALL, SUPPORT, core_version

    imported = found_version.partition("+")[0]  # 0.19 adds the commit of a repository around its folder
    if core_version() not in SUPPORT or version not in (None, imported):
        return None
    support = SUPPORT[core_version()]
    value = f"{imported}{'' if version else ' of a checkout'}; {support.why}"
    found = Finding(section="packages", name="megatron-core", value=value)
    return found if support.trainer else replace(found, status="missing", mend=f"for the commands: {INSTALL}")


def _core_versions(core: Any) -> Iterator[Finding]:
    """Every version of megatron-core that something here works with, and how that is known."""
    if core is None or _module("megatron_sbld.mcore.compat") is None:
        return
    from megatron_sbld.mcore.compat import SUPPORT

    for (major, minor), support in SUPPORT.items():
        yield Finding(section="versions of megatron-core", name=f"{major}.{minor}", value=support.why)


def _requirements() -> dict[str, tuple[str, str]]:
    """What the installed megatron-sbld requires without extras: package to (as pip takes it, allowed versions)."""
    try:
        lines = importlib.metadata.requires("megatron-sbld") or []
    except importlib.metadata.PackageNotFoundError:  # the source tree, not installed
        lines = []
    matches = [re.match(r"(([\w.-]+)(?:\[[^\]]*\])?([^;]*))", line) for line in lines if "extra ==" not in line]
    return {match[2]: (match[1].strip(), match[3].strip()) for match in matches if match}


def _allows(allowed: str, version: str) -> bool:
    """Whether a version is within e.g. `>=2.6`; true where `packaging`, which megatron-core brings, is missing."""
    if _module("packaging.specifiers") is None:
        return True
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(allowed).contains(version, prereleases=True)


def _optional(usable: bool) -> Iterator[Finding]:
    """Transformer Engine, Apex, flash-attn; `usable` is whether torch and megatron-core import."""
    for package, module in {"Transformer Engine": "transformer_engine.pytorch", "flash-attn": "flash_attn"}.items():
        if not _found(module.partition(".")[0]):
            yield Finding(section="packages", name=package, value="not installed", status="absent")
        elif error := _import_error(module):
            mend = f"pip uninstall {module.partition('.')[0].replace('_', '-')}, or build it for this torch"
            yield Finding(section="packages", name=package, value=error, status="broken", mend=mend)
        else:
            version = getattr(importlib.import_module(module.partition(".")[0]), "__version__", "installed")
            yield Finding(section="packages", name=package, value=str(version))
    yield _apex(usable)


def _apex(usable: bool) -> Finding:
    if not _found("apex"):
        return Finding(section="packages", name="Apex", value="not installed", status="absent")
    if not usable:
        value = "installed; whether it is NVIDIA's shows once torch and megatron-core import"
        return Finding(section="packages", name="Apex", value=value, status="absent")
    from megatron_sbld.mcore.compat import nvidia_apex_available

    if nvidia_apex_available():
        return Finding(section="packages", name="Apex", value=f"NVIDIA's {_version('apex') or ''}".rstrip())
    if _found("apex.normalization"):
        value = "NVIDIA's, but without its CUDA extensions: ignored"
        return Finding(section="packages", name="Apex", value=value, status="absent")
    value = "the package named apex that is installed is not NVIDIA's: ignored"
    return Finding(section="packages", name="Apex", value=value, status="absent")


def _nccl(torch: Any) -> Finding:
    if torch is None or not torch.distributed.is_available() or not torch.distributed.is_nccl_available():
        value = "torch cannot be imported" if torch is None else "not in this torch: gloo is used"
        return Finding(section="packages", name="NCCL", value=value, status="absent")
    return Finding(section="packages", name="NCCL", value=".".join(map(str, torch.cuda.nccl.version())))


def _gpus(torch: Any) -> tuple[list[Gpu], list[Finding]]:
    """The GPUs, by torch where it reaches them, and what there is to say about them."""
    rows = _nvidia_smi()
    driver = rows[0][2] if rows else "unknown"
    if torch is not None and torch.cuda.is_available():
        properties = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
        gpus = [Gpu(name=each.name, capability=each.major * 10 + each.minor) for each in properties]
        findings = [_gpu(number, gpu, driver) for number, gpu in enumerate(gpus)]
        return gpus, findings
    gpus = [Gpu(name=name, capability=round(float(capability) * 10)) for name, capability, _ in rows]
    findings = [_gpu(number, gpu, driver) for number, gpu in enumerate(gpus)]
    if not gpus:
        findings.append(Finding(section="GPUs", name="GPU", value="none, or no driver", status="absent"))
    elif torch is not None and torch.version.cuda is None:
        value = f"{torch.__version__} is built without CUDA"
        mend = "install a torch built for CUDA: pytorch.org says how"
        findings.append(Finding(section="GPUs", name="torch", value=value, status="missing", mend=mend))
    elif torch is not None:
        value = f"torch for CUDA {torch.version.cuda} cannot reach the GPU: {_cuda_error(torch)}"
        mend = f"a newer driver than {driver}, a torch for an older CUDA, or CUDA_VISIBLE_DEVICES"
        findings.append(Finding(section="GPUs", name="torch", value=value, status="broken", mend=mend))
    return gpus, findings


def _gpu(number: int, gpu: Gpu, driver: str) -> Finding:
    capability = f"{gpu.capability // 10}.{gpu.capability % 10}"
    value = f"{gpu.name}, compute capability {capability}, driver {driver}"
    return Finding(section="GPUs", name=f"GPU {number}", value=value)


def _cuda_error(torch: Any) -> str:
    try:
        torch.cuda.init()
    except Exception as error:
        return str(error).splitlines()[0]
    return "no device is visible"


def _nvidia_smi() -> list[tuple[str, str, str]]:
    """Name, compute capability and driver of each GPU; none where there is no nvidia-smi or no driver."""
    command = ["nvidia-smi", "--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    rows = csv.reader(result.stdout.splitlines(), skipinitialspace=True)
    return [(row[0], row[1], row[2]) for row in rows if len(row) == 3 and re.fullmatch(r"\d+\.\d", row[1])]


def _libraries(gpus: Sequence[Gpu]) -> Iterator[Finding]:
    """The residual add's libraries: whether they are built, load, and have code for these GPUs and this driver."""
    from megatron_sbld.residual import native
    from megatron_sbld.residual.choice import driver_cuda

    for name in native.NAMES:
        row: dict[str, Any] = {"section": "residual add", "name": f"{name} library"}
        try:
            library = native.load(name)
        except native.LibraryError as error:
            if native.library_path(name).is_file():
                yield Finding(**row, value=error.reason, status="broken", mend=error.mend)
            elif name == "cuda" and not gpus:
                yield Finding(**row, value="not built", status="absent")
            else:
                yield Finding(**row, value="not built", status="missing", mend=error.mend)
            continue
        obstacle = _obstacle(library.build, gpus, driver_cuda()) if name == "cuda" else None
        if obstacle:
            value, mend = f"{library.build}; {obstacle[0]}", obstacle[1]
            yield Finding(**row, value=value, status="broken", mend=mend)
        else:
            yield Finding(**row, value=f"{library.build}; loads")


def _extension() -> Finding:
    """The extension that calls them: whether it is built for this Python and torch, and loads."""
    from megatron_sbld.residual.extension import ExtensionError, bindings, describe_extension

    row: dict[str, Any] = {"section": "residual add", "name": "extension"}
    try:
        used, reason = bindings() is not None, describe_extension()
    except (ValueError, ExtensionError) as error:
        return Finding(**row, value=str(error), status="broken", mend="unset MEGATRON_SBLD_EXTENSION")
    mend = "" if used else "with a C++ compiler at hand: python -m megatron_sbld.cxx"
    return Finding(**row, value=reason, status="ok" if used else "missing", mend=mend)


def _obstacle(build: str, gpus: Sequence[Gpu], driver_cuda: int | None) -> tuple[str, str] | None:
    """Why a library that was built for `cuda 13.0; sm_90 compute_90` does not run here, and what mends it."""
    from megatron_sbld.residual.native import fits_driver, runs_on

    if driver_cuda and not fits_driver(build, driver_cuda):
        reason = f"the driver knows CUDA up to {driver_cuda} only"
        return reason, f"with CUDA_HOME set to a toolkit of CUDA {driver_cuda}, {_REINSTALL}"
    for gpu in gpus:
        if not runs_on(build, gpu.capability):
            return f"no code for {gpu.name}", f"with MEGATRON_SBLD_CUDA_ARCHS={gpu.capability}, {_REINSTALL}"
    return None


def _choices(torch: Any, core: Any) -> Iterator[Finding]:
    """What runs will use."""
    row: dict[str, Any] = {"section": "in use"}
    if torch is None:
        yield Finding(**row, name="residual add", value="torch cannot be imported", status="absent")
    else:
        yield _residual_choice(torch)
    if core is None:
        yield Finding(**row, name="transformer_impl", value="megatron-core cannot be imported", status="absent")
        return
    from megatron_sbld.mcore.local.compiled import compiler_obstacle
    from megatron_sbld.mcore.local.layer_specs import choose_transformer_impl

    chosen, reason = choose_transformer_impl("auto")
    value = f"auto takes {chosen} ({reason})"
    if torch.cuda.is_available() and chosen == "local" and not _found("transformer_engine"):
        yield Finding(**row, name="transformer_impl", value=value, status="missing", mend=_TRANSFORMER_ENGINE)
    else:
        yield Finding(**row, name="transformer_impl", value=value)
    obstacle = compiler_obstacle()
    value = obstacle or "can be used where transformer_impl is local, if training.torch_compile asks for it"
    yield Finding(**row, name="torch_compile", value=value, status="ok" if obstacle is None else "absent")


def _residual_choice(torch: Any) -> Finding:
    from megatron_sbld.residual import describe_choice

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return Finding(section="in use", name="residual add", value=describe_choice(device))
    except (ValueError, RuntimeError) as error:
        mend = "unset MEGATRON_SBLD_RESIDUAL, or what the message says"
        return Finding(section="in use", name="residual add", value=str(error), status="broken", mend=mend)


def _nvcc(needed: bool) -> Finding:
    """The compiler; `needed` if a CUDA library is still to be built."""
    try:
        nvcc = find_nvcc()
    except NvccError as error:
        mend = f"to build the CUDA library here, load a CUDA module, or {_NVCC_PACKAGES}" if needed else ""
        return Finding(section="to build with", name="nvcc", value=str(error), status="absent", mend=mend)
    return Finding(section="to build with", name="nvcc", value=f"{nvcc.version}, {nvcc.path} (from {nvcc.origin})")


if __name__ == "__main__":
    sys.exit(main())
