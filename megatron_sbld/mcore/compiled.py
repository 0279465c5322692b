"""Layers whose forward pass in training is one compiled graph, for machines without Transformer Engine.

torch.compile fuses what megatron-core's local layer leaves to single operations (norms, biases, the activation, the
adds to the residual stream), and its graph costs the host less than Megatron's modules. The decision about a layer
stays outside: a switchable layer asks first and calls the graph only if it is kept, so that decisions compile nothing
anew. All layers of a model share one graph. Evaluation and generation, whose shapes change, run Megatron's forward.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_sbld.mcore.switchable import SwitchableLayer, decoder_layers


class CompiledLayer(TransformerLayer):
    """Goes in front of a built layer's own class; `compile_layers` puts it there."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The stock layer's forward: (hidden_states [s, b, h], context)."""
        if not self.training:
            return super().forward(*args, **kwargs)
        return self._compiled_forward(*args, **kwargs)

    def _compiled_forward(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("each subclass has the compiled forward of its own stock class")


_classes: dict[type[TransformerLayer], type] = {}


def compile_layers(model: torch.nn.Module | Iterable[torch.nn.Module]) -> None:
    """Let the decoder layers of a built model run a compiled graph in training; the first pass compiles it.

    A layer that cannot be one graph raises torch's error in that pass. Which switches those are is checked by the
    trainer's config (`training.torch_compile`). Calling it again changes nothing.

    Args:
        model: a model, or the list of its chunks on this rank, wrapped or not.

    Raises:
        ValueError: no decoder layers, or layers that are switchable already: the decision would become part of the
            graph.
    """
    chunks = [model] if isinstance(model, torch.nn.Module) else list(model)
    for layer in [layer for chunk in chunks for layer in decoder_layers(chunk)]:
        if isinstance(layer, SwitchableLayer):
            raise ValueError(f"layer {layer.layer_number} is switchable already: call compile_layers before")
        if not isinstance(layer, CompiledLayer):
            layer.__class__ = _compiled_class(type(layer))


def _compiled_class(cls: type[TransformerLayer]) -> type:
    if cls not in _classes:
        members = {"__module__": cls.__module__, "_compiled_forward": torch.compile(cls.forward, fullgraph=True)}
        _classes[cls] = type(f"Compiled{cls.__name__}", (CompiledLayer, cls), members)
    return _classes[cls]
