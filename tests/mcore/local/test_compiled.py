"""Layers whose forward in training is a compiled graph; `pretrain` with them is in tests/training/test_compiled.py."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_sbld.controller import DropController
from megatron_sbld.mcore import fuse_residual, make_switchable
from megatron_sbld.mcore.local import compiled
from megatron_sbld.mcore.local.compiled import compile_layers
from tests.harness import model_parallel, single_process
from tests.mcore.helpers import SEQUENCE, Listed, tiny_config, tiny_gpt


@pytest.fixture(scope="module", autouse=True)
def _one_process() -> Iterator[None]:
    with single_process():
        yield


def test_evaluation_compiles_nothing_and_is_megatrons_bit_for_bit() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with model_parallel():
        (graph,), (stock,) = (tiny_gpt(tiny_config(hidden_dropout=0.5)) for _ in range(2))
        compile_layers(graph)
        hidden = torch.randn(SEQUENCE, 2, 32)
        for ours, theirs in zip(graph.eval().decoder.layers, stock.eval().decoder.layers, strict=True):
            found = ours(hidden_states=hidden, attention_mask=None)[0]
            assert torch.equal(found, theirs(hidden_states=hidden, attention_mask=None)[0])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0


def test_names_of_parameters_and_state_stay() -> None:
    with model_parallel():
        (graph,), (stock,) = (tiny_gpt(tiny_config()) for _ in range(2))
        compile_layers(graph)
        assert graph.state_dict().keys() == stock.state_dict().keys()


def test_the_switch_comes_in_front_of_the_graph() -> None:
    with model_parallel():
        (chunk,) = tiny_gpt(tiny_config())
        for _ in range(2):
            compile_layers(chunk)
        controller = DropController(Listed(0.5, 0.5, 0.5, 0.5))
        make_switchable(chunk, controller)
        names = [cls.__name__ for cls in type(chunk.decoder.layers[0]).__mro__[:5]]
        assert names == [
            "SwitchableCompiledTransformerLayer",
            "SwitchableLayer",
            "CompiledTransformerLayer",
            "CompiledLayer",
            "TransformerLayer",
        ]
        make_switchable(chunk, controller)


def test_layers_that_are_switchable_already_are_refused() -> None:
    with model_parallel():
        (chunk,) = tiny_gpt(tiny_config())
        make_switchable(chunk, DropController(Listed(0.5, 0.5, 0.5, 0.5)))
        with pytest.raises(ValueError, match="layer 1 is switchable already: call compile_layers before"):
            compile_layers(chunk)


@pytest.mark.parametrize("order", ["compile fuse switch", "fuse compile switch", "compile switch fuse"])
@pytest.mark.parametrize("residual_scale", ["none", "inverse_keep_prob"])
def test_fused_branches_of_a_compiled_layer_may_not_be_scaled(order: str, residual_scale: str) -> None:
    controller = DropController(Listed(0.5, 0.5, 0.5, 0.5, residual_scale=residual_scale))
    with model_parallel():
        (chunk,) = tiny_gpt(tiny_config())
        steps: dict[str, Callable[[], object]] = {
            "compile": lambda: compile_layers(chunk),
            "fuse": lambda: fuse_residual(chunk),
            "switch": lambda: make_switchable(chunk, controller),
        }
        *before, last = [steps[name] for name in order.split()]
        for step in before:
            step()
        if residual_scale == "none":
            last()
            return
        with pytest.raises(ValueError, match="layer 1: torch_compile = True does not work with residual = 'fused'"):
            last()


@pytest.mark.parametrize("name", ["tensor_model_parallel_size", "context_parallel_size"])
def test_layers_that_communicate_are_refused(name: str) -> None:
    with model_parallel():
        (chunk,) = tiny_gpt(tiny_config())
        setattr(chunk.config, name, 2)
        with pytest.raises(ValueError, match=f"{name} = 2: compiled layers cannot communicate; must be 1"):
            compile_layers(chunk)


def test_another_attention_is_refused() -> None:
    with model_parallel():
        (chunk,) = tiny_gpt(tiny_config())
        chunk.decoder.layers[1].self_attention.core_attention = torch.nn.Identity()
        with pytest.raises(ValueError, match="layer 2 has Identity: compiled layers need SDPACoreAttention"):
            compile_layers(chunk)
        assert type(chunk.decoder.layers[0]) is TransformerLayer


def test_layers_of_another_kind_are_refused() -> None:
    with model_parallel():
        (chunk,) = tiny_gpt(tiny_config())
        chunk.decoder.layers[1] = torch.nn.Linear(2, 2)
        with pytest.raises(ValueError, match="a decoder layer is a Linear; only TransformerLayer can be compiled"):
            compile_layers(chunk)


def test_on_a_gpu_triton_and_a_c_compiler_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(compiled, "has_triton", lambda: True)
    monkeypatch.setenv("CC", sys.executable)
    assert compiled.compiler_obstacle() is None
    monkeypatch.setenv("CC", "no-such-compiler")
    assert compiled.compiler_obstacle() == "Triton needs a C compiler: there is no no-such-compiler (CC, PATH)"
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", "/nowhere")
    assert compiled.compiler_obstacle() == "Triton needs a C compiler: there is no gcc and no clang (CC, PATH)"
    monkeypatch.setattr(compiled, "has_triton", lambda: False)
    assert "with Triton, which is not usable" in compiled.compiler_obstacle()


def test_what_is_no_gpt_is_refused() -> None:
    with pytest.raises(ValueError, match="only GPT-like models"):
        compile_layers(torch.nn.Linear(2, 2))
