"""What one decision is about in megatron-core's HybridModel: `drop.unit`.

A HybridModel has a layer of its own for each part of what is one layer of a GPT, and a pattern (`*-*-`) with a symbol
for each. Unit `layer` decides about every layer by itself; unit `block` about an attention layer and the MLP or the
experts right behind it as one, so that a policy of an L-layer GPT fits. Layers and units are 1-based.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from megatron_sbld.method.choices import Unit

_ATTENTION = {"*": "attention", "+": "multi-latent attention", "G": "gated delta net"}
_FEED_FORWARD = {"-": "MLP", "E": "experts"}
_KINDS = {**_ATTENTION, **_FEED_FORWARD, "M": "Mamba"}
_REFUSED = {"D": "it has not been tested, and its losses are logged over all layers"}


def layer_kinds(pattern: str) -> str:
    """The symbol of each layer of a pattern; stages ('|') and multi-token prediction ('/...') are passed over."""
    return pattern.partition("/")[0].replace("|", "")


def unit_numbers(pattern: str, unit: Unit) -> list[int]:
    """The unit of each layer of a pattern, [layers], as `layer_kinds` has them.

    >>> unit_numbers("M*-|*E*-/*-", "block")
    [1, 2, 2, 3, 3, 4, 4]

    Raises:
        ValueError: a kind of layers that cannot be dropped.
    """
    kinds = layer_kinds(pattern)
    check_kinds(kinds)
    if unit == "layer":
        return list(range(1, len(kinds) + 1))
    numbers: list[int] = []
    for index, kind in enumerate(kinds):
        ends_block = kind in _FEED_FORWARD and index > 0 and kinds[index - 1] in _ATTENTION
        numbers.append((numbers[-1] if numbers else 0) + (not ends_block))
    return numbers


def num_units(pattern: str, unit: Unit) -> int:
    """How many units the whole model has: the L of its policy."""
    return max(unit_numbers(pattern, unit), default=0)


def units_with_experts(pattern: str, unit: Unit) -> list[int]:
    """The unit of each layer with experts, in order."""
    kinds = layer_kinds(pattern)
    return [number for number, kind in zip(unit_numbers(pattern, unit), kinds, strict=True) if kind == "E"]


def check_kinds(kinds: Iterable[str]) -> None:
    """Raise ValueError for the symbol of a kind of layers that cannot be dropped."""
    for kind in kinds:
        if kind not in _KINDS:
            allowed = ", ".join(f"{symbol} ({name})" for symbol, name in _KINDS.items())
            reason = _REFUSED.get(kind, "it has not been tested")
            raise ValueError(
                f"hybrid layers of kind {kind!r} do not work with layer dropping: {reason}; allowed are {allowed}"
            )


def check_whole(numbers: Sequence[int], held: Sequence[int]) -> None:
    """Raise ValueError for a block that is split between two parts of the model.

    numbers: the unit of each layer of the model.  held: that of each layer of the part.
    """
    for number in (held[0], held[-1]) if held else ():
        layers = [index + 1 for index, other in enumerate(numbers) if other == number]
        if list(held).count(number) != len(layers):
            raise ValueError(
                f"unit = 'block' does not work with block {number} (layers {layers[0]} and {layers[-1]}) on two "
                "pipeline stages: put every separator of the pattern behind a block, or use unit 'layer'"
            )
