"""What one decision is about in a hybrid model."""

from __future__ import annotations

import pytest

from megatron_sbld.layout.units import check_whole, num_units, unit_numbers, units_with_experts


@pytest.mark.parametrize(
    ("pattern", "blocks"),
    [
        ("*-*-", [1, 1, 2, 2]),
        ("*-|*-", [1, 1, 2, 2]),
        ("*E*E/*E/*E", [1, 1, 2, 2]),
        ("+-GE", [1, 1, 2, 2]),
        ("M*-M*-", [1, 2, 2, 3, 4, 4]),
        ("M-M-*-", [1, 2, 3, 4, 5, 5]),
        ("*--**-", [1, 1, 2, 3, 4, 4]),
        ("-*", [1, 2]),
        ("*|-", [1, 1]),
        ("", []),
    ],
)
def test_a_block_is_attention_and_the_feed_forward_layer_right_behind_it(pattern: str, blocks: list[int]) -> None:
    assert unit_numbers(pattern, "block") == blocks
    assert num_units(pattern, "block") == max(blocks, default=0)
    assert unit_numbers(pattern, "layer") == list(range(1, len(blocks) + 1))


def test_layers_with_experts_are_found_by_their_unit() -> None:
    assert units_with_experts("*-*E|M*E/*E", "layer") == [4, 7]
    assert units_with_experts("*-*E|M*E/*E", "block") == [2, 4]


@pytest.mark.parametrize(("pattern", "reason"), [("D-", "its losses are logged"), ("*X", "it has not been tested")])
def test_kinds_that_cannot_be_dropped_are_refused_with_what_is_allowed(pattern: str, reason: str) -> None:
    with pytest.raises(ValueError, match=rf"{reason}.*allowed are \* \(attention\)"):
        unit_numbers(pattern, "layer")


def test_a_block_on_two_stages_is_refused_by_its_number_and_layers() -> None:
    numbers = unit_numbers("*-*-", "block")
    check_whole(numbers, numbers[:2])
    check_whole(numbers, [])
    for held in (numbers[:3], numbers[3:]):
        with pytest.raises(ValueError, match=r"block 2 \(layers 3 and 4\) on two pipeline stages"):
            check_whole(numbers, held)
