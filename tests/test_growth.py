"""What is said of a run whose layers begin in stages."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megatron_sbld.growth import growth_text, stages_text
from megatron_sbld.method.stages import Stages


def test_stages_are_told_with_their_layers() -> None:
    stages = Stages.resolve([[0.5, 1], [0.8, 3], [1.0, 6]], 6, 100)
    assert stages_text(stages).splitlines() == [
        "until iteration 50 1 layer (1) runs",
        "until iteration 80 3 layers (1, 3, 5) run",
        "from iteration 81 on all 6 layers run",
    ]
    passed_over = Stages.resolve([[0.0, 1], [0.8, 3], [1.0, 6]], 6, 100)
    assert stages_text(passed_over).splitlines()[0] == "until iteration 80 3 layers (1, 3, 5) run"
    resumed = replace(stages, begun_before=frozenset(range(1, 7)))
    assert stages_text(resumed) == "from iteration 1 on all 6 layers run"


@pytest.mark.parametrize(
    ("entering", "running", "init", "told"),
    [
        (range(2, 25), [1], "copy", "23 layers (2-24) begin, as copies of 1"),
        ([2, 3, 5], [1, 4], "copy", "3 layers (2-3, 5) begin, as copies of 1, 4"),
        ([2], [1], "copy", "1 layer (2) begins, as a copy of 1"),
        ([2], [1], "zero", "1 layer (2) begins, with output projections of zero"),
        ([1, 3], [2], "random", "2 layers (1, 3) begin, as initialised"),
    ],
)
def test_growth_is_told_with_what_the_layers_begin_as(entering: Any, running: list[int], init: Any, told: str) -> None:
    assert growth_text(601, entering, running, init) == f"iteration 601: {told}"
