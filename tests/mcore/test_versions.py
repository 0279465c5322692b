"""What counts as a usable megatron-core, Transformer Engine and Apex."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator

import pytest
from megatron.core import package_info

from megatron_sbld.mcore.versions import check_megatron_core, nvidia_apex_available, transformer_engine_available


@pytest.fixture(autouse=True)
def _forget_answers() -> Iterator[None]:
    _forget()
    yield
    _forget()


def _forget() -> None:
    transformer_engine_available.cache_clear()
    nvidia_apex_available.cache_clear()


def _install(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Put empty modules of these names where an import finds them."""
    for name in names:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))


def test_the_megatron_core_installed_here_is_supported() -> None:
    check_megatron_core()


@pytest.mark.parametrize("version", ["0.15.3", "0.17.0", "1.16.0"])
def test_another_megatron_core_is_refused_with_what_to_install(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package_info, "__version__", version)
    with pytest.raises(RuntimeError, match=rf"{version}.*pip install"):
        check_megatron_core()


def test_the_apex_of_pypi_is_not_taken_for_nvidias(monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, "apex")
    assert not nvidia_apex_available()


def test_nvidias_apex_is_recognised_by_what_it_provides(monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, "apex", "apex.normalization", "apex.normalization.fused_layer_norm", "amp_C")
    assert nvidia_apex_available()


def test_a_transformer_engine_without_its_torch_part_is_not_available(monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, "transformer_engine")
    assert not transformer_engine_available()
    _forget()
    _install(monkeypatch, "transformer_engine", "transformer_engine.pytorch")
    assert transformer_engine_available()
