"""A built model's decoder: its layers, and the numbers by which a controller knows them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from megatron.core.ssm.mamba_layer import MambaLayer
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_sbld.layout.units import check_kinds, check_whole, num_units, unit_numbers
from megatron_sbld.mcore.compat import hybrid_pattern
from megatron_sbld.method.choices import Unit


class DecoderUnits(NamedTuple):
    """What of a model's units a chunk holds."""

    numbers: dict[torch.nn.Module, int]
    """The unit (1-based) of each layer, in order."""
    total: int
    """Units of the whole model."""
    name: str
    """What the model calls the total."""


def chunk_list(model: torch.nn.Module | Iterable[torch.nn.Module]) -> list[torch.nn.Module]:
    """The chunks of a model on this rank, whether it is given as one or as a list. Raises ValueError for none."""
    chunks = [model] if isinstance(model, torch.nn.Module) else list(model) if isinstance(model, Iterable) else []
    if not chunks or not all(isinstance(chunk, torch.nn.Module) for chunk in chunks):
        raise ValueError(f"model = {model!r} is not allowed: it must be a module, or a list of the chunks on this rank")
    return chunks


def decoder_layers(chunk: torch.nn.Module) -> Iterator[Any]:
    """The layers of the decoder on this rank, in order; multi-token prediction keeps its own elsewhere.

    Raises:
        ValueError: the module has no decoder, or several, as that of a student and its teacher.
    """
    yield from _find_decoder(chunk)[1].layers


def decoder_units(chunk: torch.nn.Module, unit: Unit) -> DecoderUnits:
    """The units of a chunk's layers: of a GPT its layers, of a HybridModel by its pattern.

    Raises:
        ValueError: as decoder_layers; a hybrid model with layers that cannot be dropped, with unit `block` one whose
            pattern is not known or leaves a block on two stages.
    """
    model, decoder = _find_decoder(chunk)
    layers = list(decoder.layers)
    for layer in layers:
        check_kind(layer)
    kinds = getattr(decoder, "layer_type_list", None)  # of hybrid models alone
    pattern = None if kinds is None else hybrid_pattern(model)
    if kinds is not None:
        check_kinds(kinds)
    if kinds is None or unit == "layer":
        name = f"num_layers = {decoder.config.num_layers}"
        if pattern is not None:
            name += f" (with unit 'block' {num_units(pattern, 'block')})"
        return DecoderUnits({layer: layer.layer_number for layer in layers}, decoder.config.num_layers, name)
    if pattern is None:
        raise ValueError(
            f"unit = 'block' does not work with a {type(model).__name__} whose hybrid_layer_pattern is not known: "
            "build it with one, or use unit 'layer'"
        )
    of_layers = unit_numbers(pattern, unit)
    numbers = {layer: of_layers[layer.layer_number - 1] for layer in layers}
    check_whole(of_layers, list(numbers.values()))
    return DecoderUnits(numbers, of_layers[-1], f"{of_layers[-1]} blocks ({len(of_layers)} layers)")


def check_kind(
    layer: torch.nn.Module,
    kinds: tuple[type, ...] = (TransformerLayer, MambaLayer),
    allowed: str = "only TransformerLayer and MambaLayer can be made switchable",
) -> None:
    """Raise ValueError, which ends with `allowed`, for a decoder layer of another kind."""
    if not isinstance(layer, kinds):
        raise ValueError(f"a decoder layer is a {type(layer).__name__}; {allowed}")


def _find_decoder(chunk: torch.nn.Module) -> tuple[Any, Any]:
    """The module that has a decoder, and the decoder."""
    found: dict[Any, tuple[str, Any]] = {}
    for name, module in chunk.named_modules():
        decoder: Any = getattr(module, "decoder", None)
        if hasattr(decoder, "layers"):
            found.setdefault(decoder, (f"{name}.decoder".removeprefix("."), module))
    if not found:
        raise ValueError(f"{type(chunk).__name__} has no `decoder.layers`: only GPT-like models can be switchable")
    if len(found) > 1:
        names = ", ".join(name for name, _ in found.values())
        raise ValueError(
            f"{type(chunk).__name__} has {len(found)} decoders ({names}): give the model that is "
            "meant, or one after the other, each with a controller of its own number of layers"
        )
    ((decoder, (_, module)),) = found.items()
    return module, decoder
