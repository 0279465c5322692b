"""Layers whose forward pass in training is one compiled graph, for machines without Transformer Engine.

torch.compile fuses what megatron-core's local layer leaves to single operations (norms, biases, the activation, the
adds to the residual stream). The decision about a layer stays outside: a switchable layer asks first and calls the
graph only if it is kept, so that decisions compile nothing anew. All layers of a model share their graphs. Evaluation
and generation, whose shapes change, run Megatron's forward.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch.utils._triton import has_triton

from megatron_sbld.mcore.local.attention import SDPACoreAttention
from megatron_sbld.mcore.skip.decoder import check_kind, chunk_list, decoder_layers
from megatron_sbld.mcore.skip.switchable import SwitchableLayer

_GRAPHS = 64  # of all models in a process; torch's 8 are few for several models, and the next one would be an error


class CompiledLayer(TransformerLayer):
    """Goes in front of a built layer's own class; `compile_layers` puts it there."""

    _compiled_forward: Callable[..., Any]  # of the stock class

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The stock layer's forward: (hidden_states [s, b, h], context)."""
        if not self.training:
            return super().forward(*args, **kwargs)
        return self._compiled_forward(*args, **kwargs)


_classes: dict[type[TransformerLayer], type] = {}


def compile_layers(model: torch.nn.Module | Iterable[torch.nn.Module]) -> None:
    """Let the decoder layers of a built model run a compiled graph in training; the first pass compiles it.

    A layer that cannot be one graph raises torch's error in that pass: with `overlap_param_gather` or selective
    recomputation. torch's limit on graphs is raised to 64 here, for the whole process. A second call changes nothing.

    Args:
        model: a model, or the list of its chunks on this rank, wrapped or not.

    Raises:
        ValueError: no decoder layers, or one that is no TransformerLayer, communicates, has another attention than
            SDPACoreAttention, or is switchable already: the decision would become part of the graph.
    """
    layers = [layer for chunk in chunk_list(model) for layer in decoder_layers(chunk)]
    for layer in layers:
        _check_layer(layer)
    limit = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"  # torch 2.6
    setattr(torch._dynamo.config, limit, max(getattr(torch._dynamo.config, limit), _GRAPHS))
    for layer in layers:
        if not isinstance(layer, CompiledLayer):
            layer.__class__ = _compiled_class(type(layer))


def compiler_obstacle() -> str | None:
    """Why torch.compile cannot be used here, in a sentence; None if it can."""
    if torch.cuda.is_available():
        if not has_triton():
            return "torch compiles for a GPU with Triton, which is not usable here"
        compilers = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
        found = any(shutil.which(compiler) for compiler in compilers)
        return None if found else f"Triton needs a C compiler: there is no {' and no '.join(compilers)} (CC, PATH)"
    from torch._inductor import cpp_builder  # here, because it takes a second

    try:
        cpp_builder.get_cpp_compiler()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return None


def _check_layer(layer: TransformerLayer) -> None:
    check_kind(layer, (TransformerLayer,), "only TransformerLayer can be compiled")
    if isinstance(layer, SwitchableLayer):
        raise ValueError(f"layer {layer.layer_number} is switchable already: call compile_layers before")
    for name in ("tensor_model_parallel_size", "context_parallel_size"):
        if getattr(layer.config, name) > 1:
            raise ValueError(f"{name} = {getattr(layer.config, name)}: compiled layers cannot communicate; must be 1")
    attention = getattr(layer.self_attention, "core_attention", None)
    if not isinstance(attention, SDPACoreAttention):
        raise ValueError(
            f"layer {layer.layer_number} has {type(attention).__name__}: compiled layers need SDPACoreAttention, of "
            "megatron_sbld.mcore.local.layer_specs.gpt_block_spec"
        )


def _compiled_class(cls: type[TransformerLayer]) -> type:
    if cls not in _classes:
        members = {"__module__": cls.__module__, "_compiled_forward": torch.compile(cls.forward, fullgraph=True)}
        _classes[cls] = type(f"Compiled{cls.__name__}", (CompiledLayer, cls), members)
    return _classes[cls]
