"""Stages: nested sets of layers, the iterations at which they end, and the gate in front of every policy."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from megatron_sbld.method.policy import LayerDropPolicy, PLDPolicy, SBLDPolicy, StagedPolicy, StochasticDepthPolicy
from megatron_sbld.method.schedule import Constant, Plateau, Steps
from megatron_sbld.method.stages import Stages, nearest_running


def resolve(counts: list[int], num_layers: int, rule: Any = "spread", **options: Any) -> list[tuple[int, ...]]:
    shares = np.linspace(0, 1, len(counts) + 2)[1:]
    stages = [[share, count] for share, count in zip(shares, [*counts, num_layers], strict=True)]
    return list(Stages.resolve(stages, num_layers, 100, rule, **options).sets[:-1])


@pytest.mark.parametrize(
    ("counts", "rule", "expected"),
    [
        ([1, 2, 4], "spread", [(1,), (1, 7), (1, 4, 7, 10)]),
        ([3, 6], "spread", [(1, 5, 9), (1, 3, 5, 7, 9, 11)]),
        ([1, 3], "first", [(1,), (1, 2, 3)]),
        ([1, 3], "last", [(12,), (10, 11, 12)]),
        ([2, 4], [5, 1, 12, 2], [(1, 5), (1, 2, 5, 12)]),
        ([2], [5, 1], [(1, 5)]),
    ],
)
def test_which_layers_begin_first(counts: list[int], rule: Any, expected: list[tuple[int, ...]]) -> None:
    assert resolve(counts, 12, rule) == expected


def test_the_most_sensitive_layers_begin_first() -> None:
    assert resolve([1, 3], 4, "sensitivity", sensitivity=[0.2, 1.0, 0.2, 0.5]) == [(2,), (1, 2, 4)]
    with pytest.raises(ValueError, match="sensitivity file"):
        resolve([1, 3], 4, "sensitivity")


@pytest.mark.parametrize("rule", ["first", "last", "spread"])
@pytest.mark.parametrize("sizes", [[6, 6], [3, 3, 3, 3], [1, 5, 6], [0, 12], [2, 0, 10], [1, 1]])
def test_every_rank_with_layers_runs_its_share(sizes: list[int], rule: str) -> None:
    ends = np.cumsum(sizes)
    ranks = [list(range(end - size + 1, end + 1)) for end, size in zip(ends, sizes, strict=True)]
    total = sum(sizes)
    counts = list(range(1, total + 1))
    sets = resolve(counts, total, rule, ranks=ranks)
    for count, layers in zip(counts, sets, strict=True):
        assert len(layers) == max(count, sum(size > 0 for size in sizes))
        for rank, size in zip(ranks, sizes, strict=True):
            held = len(set(rank) & set(layers))
            assert held >= min(size, 1)
            assert abs(held - len(layers) * size / total) <= 1.0 or held == 1
    for smaller, larger in itertools.pairwise(sets):
        assert set(smaller) <= set(larger)


def test_a_stage_ends_after_its_share_of_the_iterations() -> None:
    policy = StagedPolicy([[0.1, 1], [0.7, 2], [1.0, 4]], 4, train_iters=30)
    assert policy.stages is not None
    assert policy.stages.ends == (3, 21, 30)  # 0.1 * 30 is 3.0000000000000004, 0.7 * 30 is 21 less a bit
    runs = [policy.keep_probs(iteration).sum() for iteration in (0, 1, 3, 4, 21, 22, 30, 31)]
    assert runs == [1, 1, 1, 2, 2, 4, 4, 4]
    assert policy.stages.last_growth == 22
    at_once = StagedPolicy([[0.0, 1], [1.0, 4]], 4, train_iters=30)
    assert [at_once.keep_probs(iteration).sum() for iteration in (0, 1)] == [1, 4]


def test_iterations_since_layers_last_began() -> None:
    stages = Stages.resolve([[0.0, 1], [0.3, 2], [0.6, 2.0], [0.8, 3], [1.0, 4]], 4, 10)
    since = [stages.iterations_since_growth(iteration) for iteration in range(1, 11)]
    assert since == [None, None, None, None, None, None, 1, 2, 1, 2]
    grown = stages.continued(stages.state_dict(), [1, 2, 3])
    assert [grown.iterations_since_growth(iteration) for iteration in range(7, 11)] == [None, None, 1, 2]


def test_one_layer_has_nothing_to_grow() -> None:
    assert StagedPolicy([[0.5, 1], [1.0, 1]], 1, train_iters=10).keep_probs(1).tolist() == [1.0]


@pytest.mark.parametrize("name", ["PLD", "LayerDrop", "SBLD", "stochastic depth"])
def test_any_policy_is_multiplied_by_the_gate(name: str) -> None:
    stages = Stages.resolve([[0.5, 2], [1.0, 4]], 4, 10)
    made = {
        "PLD": lambda **options: PLDPolicy(Constant(0.5), 4, **options),
        "LayerDrop": lambda **options: LayerDropPolicy(Constant(0.5), 4, **options),
        "SBLD": lambda **options: SBLDPolicy(Constant(0.5), [0.1, 0.4, 0.8, 1.0], block_layers=(4,), **options),
        "stochastic depth": lambda **options: StochasticDepthPolicy(Constant(0.5), 4, **options),
    }[name]
    free, gated = made(), made(stages=stages)
    assert gated.keep_probs(5).tolist() == (free.keep_probs(5) * [1, 0, 1, 0]).tolist()
    assert gated.keep_probs(6).tolist() == free.keep_probs(6).tolist()


def test_layers_that_are_always_kept_wait_for_their_stage_too() -> None:
    stages = Stages.resolve([[0.5, 1], [1.0, 4]], 4, 10)
    policy = LayerDropPolicy(Constant(0.5), 4, keep_layers=[1, 4], stages=stages)
    assert policy.keep_probs(1).tolist() == [1.0, 0.0, 0.0, 0.0]
    assert policy.keep_probs(6).tolist() == [1.0, 0.5, 0.5, 1.0]
    with pytest.raises(ValueError, match="keep_layers and allow_layers"):
        SBLDPolicy(Constant(0.5), [0.0, 1.0], keep_layers=[1], allow_layers=[1])


def test_a_saved_run_keeps_its_sets_on_another_layout_and_goes_back_no_stage() -> None:
    stages = [[0.5, 2], [1.0, 4]]
    saved = Stages.resolve(stages, 4, 10, ranks=[[1, 2], [3, 4]])
    elsewhere = Stages.resolve(stages, 4, 10, "spread").continued(saved.state_dict(), [1, 3])
    assert elsewhere.sets == saved.sets
    other = Stages.resolve([[0.5, 1], [1.0, 4]], 4, 10, "last").continued(saved.state_dict(), [1, 3])
    assert other.begun(1) == {1, 3, 4}
    longer = Stages.resolve(stages, 4, 1000).continued(saved.state_dict(), [1, 2, 3, 4])
    assert longer.begun(1) == {1, 2, 3, 4}
    with pytest.raises(ValueError, match="stages of the checkpoint"):
        Stages.resolve([[0.5, 1], [1.0, 2]], 2, 10).continued(saved.state_dict(), [1])


def test_growing_into_the_recovery_is_refused() -> None:
    stages = Stages.resolve([[0.8, 1], [1.0, 4]], 4, 100)
    PLDPolicy(Constant(0.5), 4, recovery_fraction=0.2, train_iters=100, stages=stages)
    with pytest.raises(ValueError, match="begin at iteration 81, but in the recovery, from iteration 80"):
        PLDPolicy(Constant(0.5), 4, recovery_fraction=0.21, train_iters=100, stages=stages)


@pytest.mark.parametrize(
    ("stages", "rule", "message"),
    [
        ([], "spread", "must be a list of"),
        ("0.5", "spread", "must be a list of"),
        ([[0.5, 1]], "spread", r"ending with \[1.0, 4\]"),
        ([[0.5, 1], [1.0, 3]], "spread", r"ending with \[1.0, 4\]"),
        ([[0.5, 3], [0.7, 2], [1.0, 4]], "spread", "must ascend"),
        ([[0.5, 1], [0.5, 2], [1.0, 4]], "spread", "must ascend"),
        ([[0.5, 0], [1.0, 4]], "spread", r"in \[1, 4\]"),
        ([[1.5, 1], [1.0, 4]], "spread", r"in \[0, 1\]"),
        ([[0.99999999, 1], [1.0, 4]], "spread", "the layers that are left would never begin"),
        ([[0.5], [1.0, 4]], "spread", "stages entry"),
        ([[0.5, 1], [1.0, 4]], "middle", "first, last, spread, sensitivity"),
        ([[0.5, 2], [1.0, 4]], [1], "at least the 2 layers"),
        ([[0.5, 2], [1.0, 4]], [1, 1], "only once"),
        ([[0.5, 2], [1.0, 4]], [1, 5], r"in \[1, 4\]"),
    ],
)
def test_what_cannot_be_is_refused(stages: Any, rule: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Stages.resolve(stages, 4, 10, rule)


@pytest.mark.parametrize(("layer", "source"), [(1, 3), (2, 3), (4, 3), (5, 3), (7, 6)])
def test_the_nearest_running_layer_below_else_above(layer: int, source: int) -> None:
    assert nearest_running(layer, [3, 6]) == source


def test_layerdrop_by_depth() -> None:
    exponential = LayerDropPolicy(Constant(0.5), 3, depth="exponential").keep_probs(1)
    np.testing.assert_allclose(exponential, [1.0, 1 - 0.5 * (2**0.5 - 1), 0.5])
    for depth in ("linear", "exponential"):
        assert LayerDropPolicy(Constant(0.5), 1, depth=depth).keep_probs(1).tolist() == [1.0]  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="uniform, linear, exponential"):
        LayerDropPolicy(Constant(0.5), 3, depth="cubic")  # type: ignore[arg-type]


def test_steps_and_plateau() -> None:
    raptr = Steps.of_shares([[0.25, 0.4], [0.5, 0.6], [0.75, 0.8], [1.0, 1.0]], train_iters=10)
    assert raptr(np.arange(11)).tolist() == [0.4, 0.4, 0.4, 0.6, 0.6, 0.6, 0.8, 0.8, 1.0, 1.0, 1.0]
    assert Plateau(theta=0.8, hold_until=4, decay_until=4)([3, 4, 5]).tolist() == [0.8, 0.8, 1.0]
    for steps in ([], [[0.5, 0.6]], [[0.7, 0.5], [0.5, 0.6], [1.0, 1.0]], [[1.0, 0.0]], [[1.0, 2.0]], "abc", [[1.0]]):
        with pytest.raises(ValueError, match=r"theta|steps"):
            Steps.of_shares(steps, train_iters=10)
    with pytest.raises(ValueError, match="decay_until"):
        Plateau(theta=0.8, hold_until=5, decay_until=4)
