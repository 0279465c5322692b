"""What all tests share: one thread a process, a process group of one on request, and a reason for what is skipped."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: tiny models are slower on more
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

# New random examples on every developer's run, the same ones on every CI run.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")


def pytest_configure(config: pytest.Config) -> None:
    """Hide the GPUs from all but `pytest -m gpu`: the other tests are of processes with gloo and tensors on the CPU."""
    if not _runs_gpu_tests(config):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.hookimpl(tryfirst=True)  # before pytest chooses by marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip tests marked gpu where there is none. Tests that read ../shared are slow ones: `make test` needs no data."""
    for item in items:
        if "shared_file" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        reason = "needs a CUDA device, and " + (
            "there is none" if _runs_gpu_tests(config) else "is run by `make test-gpu`"
        )
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason=reason))


def _runs_gpu_tests(config: pytest.Config) -> bool:
    return config.getoption("markexpr") == "gpu"


@pytest.fixture(scope="session")
def shared_file() -> Callable[[str], Path]:
    """Takes the name of a file of ../shared/data to its path; skips the test where there is none."""

    def find(name: str) -> Path:
        path = Path(__file__).resolve().parents[2] / "shared" / "data" / name
        if not path.is_file():
            pytest.skip(f"{name} is not at ../shared/data")
        return path

    return find


@pytest.fixture(scope="module")
def asked_for(request: pytest.FixtureRequest) -> Callable[..., frozenset[str]]:
    """Takes tests of the module to those of their cases, by the parameter `name`, that this call of pytest runs.

    For modules that run all cases in one start of processes: `make test` leaves out those of `make test-slow`.
    """

    def find(*tests: Callable[..., None]) -> frozenset[str]:
        functions = {test.__name__ for test in tests}
        mine = [item for item in request.session.items if getattr(item, "module", None) is request.module]
        asked = [item for item in mine if item.originalname in functions]
        given = [(item, getattr(item, "callspec", None)) for item in asked]
        return frozenset(item.name if case is None else case.params.get("name", item.name) for item, case in given)

    return find


@pytest.fixture
def one_rank() -> Iterator[None]:
    """Megatron's parallel state in this process alone."""
    from tests.harness import model_parallel, single_process

    with single_process(), model_parallel():
        yield
