"""Placements of layers on pipeline stages: Megatron's notation, the best one, and how long iterations take with it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sbld.layout.placement import (
    Placement,
    best_placement,
    even_placement,
    imbalance,
    iteration_times,
    read_layout,
    stage_loads,
)


def test_chunks_go_to_the_ranks_in_turn() -> None:
    assert Placement((3, 5), 2).stages == [[1, 2, 3], [4, 5, 6, 7, 8]]
    assert Placement((1, 3, 0, 2), 2).stages == [[1], [2, 3, 4, 5, 6]]
    assert even_placement(8, 2, 2).stages == [[1, 2, 5, 6], [3, 4, 7, 8]]
    assert (even_placement(8, 2, 2).is_interleaved, even_placement(8, 2).is_interleaved) == (True, False)
    with pytest.raises(ValueError, match="7 layers cannot be divided evenly among 4 pipeline stages"):
        even_placement(7, 2, 2)


@pytest.mark.parametrize(
    ("layout", "counts"),
    [
        ("Ettt|tttttL", (3, 5)),
        ("Et*3|t*5L", (3, 5)),
        ("Et,t,t|t*5,L", (3, 5)),
        ("Ett(t|)*1t*5L", (3, 5)),
        ("E|t*8L", (0, 8)),
        ("Et*8|L", (8, 0)),
        ("(Etttt)*1(|tttt)*1L", (4, 4)),
    ],
)
def test_a_layout_is_read(layout: str, counts: tuple[int, ...]) -> None:
    assert read_layout(layout, 8, 2) == Placement(counts, 2)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ("Ettt|ttttt", "the loss L must close the last stage"),
        ("ttt|tttttL", "the embedding E must open the first stage"),
        ("tEtt|tttttL", "the embedding E must open the first stage"),
        ("Ettt|EtttttL", "the embedding E must open the first stage"),
        ("Ettt|ttLttt", "the loss L must close the last stage"),
        ("EtttL|tttttL", "the loss L must close the last stage"),
        ("Ettt|ttttL", "has 7 layers t: must have the 8 of the model"),
        ("Ettt|t*6L", "has 9 layers t: must have the 8 of the model"),
        ("Ettt|ttt|ttL", "has 3 stages: must have 2"),
        ("EttttttttL", "has 1 stages: must have 2"),
        ("", "has 1 stages: must have 2"),
        ("Ettt|ttttt m L", "' ' is not known"),
        ("ettt|tttttL", "'e' is not known"),
        ("E(ttt|tttttL", r"'\(' is not known"),
        ("Et*|t*7L", r"'\*' is not known"),
        ("Etttttttt|mL", "m is not allowed"),
        ("Et*99999999999|L", r"\*99999999999 is not allowed: at most 10000"),
    ],
)
def test_what_is_no_layout_of_the_model_is_refused_with_the_reason(layout: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_layout(layout, 8, 2)


@settings(max_examples=200, deadline=None)
@given(ends=st.tuples(st.integers(0, 13), st.integers(0, 13)), between=st.lists(st.integers(1, 13), max_size=7))
def test_a_placement_written_and_read_is_itself(ends: tuple[int, int], between: list[int]) -> None:
    counts = [ends[0], *between, ends[1]]
    placement = Placement(tuple(counts), len(counts))
    assert read_layout(placement.layout, sum(counts), len(counts)) == placement


def test_only_the_first_and_the_last_stage_can_be_without_layers() -> None:
    assert read_layout("E|t*8|L", 8, 3).layers_per_chunk == (0, 8, 0)
    assert read_layout("Et||t|t|t*5|L", 8, 3, 2).stages == [[1, 3], [4, 5, 6, 7, 8], [2]]
    for layout, chunks in (("Et*4||t*4L", 1), ("Et*3||t|t||t*3L", 2)):
        with pytest.raises(ValueError, match="leaves pipeline stage 2 without a layer"):
            read_layout(layout, 8, 3, chunks)


def brute_force(keep_probs: np.ndarray, num_stages: int, output_layers: float) -> tuple[float, float]:
    """Least busiest load, and the least sum of squares among its placements, over all cut points."""
    best = (np.inf, np.inf)
    for cuts in itertools.combinations(range(1, len(keep_probs)), num_stages - 1):
        edges = [0, *cuts, len(keep_probs)]
        loads = np.array([keep_probs[begin:end].sum() for begin, end in itertools.pairwise(edges)])
        loads[-1] += output_layers
        found = (round(loads.max(), 9), round((loads**2).sum(), 9))
        best = min(best, found)
    return best


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_the_best_placement_is_that_of_all_cut_points(data: st.DataObject) -> None:
    # Few values, so that there are ties.
    keep_probs = np.array(data.draw(st.lists(st.sampled_from([0.0, 0.25, 0.4, 0.7, 1.0]), min_size=1, max_size=9)))
    num_stages = data.draw(st.integers(1, len(keep_probs)))
    output_layers = data.draw(st.sampled_from([0.0, 0.3, 2.0, 50.0]))
    placement = best_placement(keep_probs, num_stages, output_layers)
    assert len(placement.layers_per_chunk) == placement.num_ranks == num_stages
    assert sum(placement.layers_per_chunk) == len(keep_probs)
    assert min(placement.layers_per_chunk) >= 1
    loads = stage_loads(keep_probs, placement.stages, output_layers)
    expected = brute_force(keep_probs, num_stages, output_layers)
    assert (loads.max(), (loads**2).sum()) == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize(("num_layers", "num_stages"), [(24, 4), (8, 8), (12, 1), (96, 12)])
def test_equal_keep_probs_give_the_even_placement(num_layers: int, num_stages: int) -> None:
    assert best_placement(np.full(num_layers, 0.7), num_stages) == even_placement(num_layers, num_stages)


def test_lists_at_one_end_make_the_stages_there_larger_or_smaller() -> None:
    allowed_first, blocked_last = np.full(24, 0.7), np.full(24, 0.5)
    allowed_first[:6], blocked_last[-6:] = 0.35, 1.0
    assert best_placement(allowed_first, 2).layers_per_chunk == (13, 11)
    assert best_placement(blocked_last, 2).layers_per_chunk == (15, 9)
    # 6 layers that always run and an output layer worth 3 of them are more than half of the work by themselves.
    assert best_placement(blocked_last, 2, output_layers=3.0).layers_per_chunk == (18, 6)


def test_more_stages_than_layers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"num_stages = 5 .*\[1, 4\]"):
        best_placement(np.ones(4), 5)


def test_loads_count_each_stages_layers_and_the_output_layer_on_the_last() -> None:
    keep_probs = np.array([[1.0, 0.5, 0.25, 0.0], [1.0, 1.0, 1.0, 1.0]])
    assert stage_loads(keep_probs, [[1, 4], [2, 3]], 2.0).tolist() == [[1.0, 2.75], [2.0, 4.0]]
    assert stage_loads(keep_probs[0], [[1, 2, 3, 4], []]).tolist() == [1.75, 0.0]


def test_the_imbalance_is_what_the_busiest_stage_has_above_the_mean() -> None:
    assert imbalance(np.array([2.0, 2.0, 5.0])) == pytest.approx(2 / 3)
    assert imbalance(np.array([4.0, 4.0])) == imbalance(np.zeros(2)) == 0.0


def test_with_many_microbatches_an_iteration_takes_as_long_as_its_busiest_stage() -> None:
    kept = np.ones((2, 1000, 8), dtype=bool)
    kept[1, :, :4] = False
    times = iteration_times(kept, even_placement(8, 2).stages) / 1000
    assert times == pytest.approx([4.0, 4.0], rel=0.01)  # the idle first stage saves its bubble alone
    assert iteration_times(kept, Placement((6, 2), 2).stages)[1] / 1000 == pytest.approx(2.0, rel=0.01)
    with_output = iteration_times(kept, even_placement(8, 2).stages, output_layers=3.0) / 1000
    assert with_output == pytest.approx([7.0, 7.0], rel=0.01)
