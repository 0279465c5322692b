"""The drop controller in one process: what it answers, refuses, saves and restores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_sbld.agreement import _raise_on_disagreement
from megatron_sbld.controller import DropController
from megatron_sbld.method.decisions import draw_plan
from megatron_sbld.method.policy import FullDepthPolicy, LayerDropPolicy, PLDPolicy
from megatron_sbld.method.schedule import Constant, Exponential
from megatron_sbld.method.tokens import TokenDrop

LAYERS = 6
HALF = LayerDropPolicy(Constant(0.5), LAYERS)


def test_it_answers_what_the_plan_says() -> None:
    controller = DropController(HALF, seed=5, scope="microbatch")
    for iteration in (1, 2, 70):  # the last is beyond the window that was verified first
        controller.begin_iteration(iteration, num_microbatches=3)
        plan = draw_plan([0.5] * LAYERS, seed=5, iteration=iteration, num_microbatches=3, scope="microbatch")
        answers = [[controller.kept(layer, m) for layer in range(1, LAYERS + 1)] for m in range(3)]
        assert answers == plan.tolist()
        assert controller.kept_fraction == plan.mean()


def test_a_new_number_of_microbatches_does_not_change_the_decisions_of_the_first_ones() -> None:
    controller = DropController(HALF, scope="microbatch")
    controller.begin_iteration(9, 2)
    two = controller.plan.copy()
    controller.begin_iteration(9, 4)
    assert np.array_equal(controller.plan[:2], two)


def test_iterations_can_be_visited_in_any_order() -> None:
    controller = DropController(HALF)
    plans = {}
    for iteration in (5, 6, 7, 100):
        controller.begin_iteration(iteration, 1)
        plans[iteration] = controller.plan.copy()
    for iteration in (100, 6, 5, 7):
        controller.begin_iteration(iteration, 1)
        assert np.array_equal(controller.plan, plans[iteration])


def test_branch_scale_is_the_inverse_of_the_present_keep_prob() -> None:
    controller = DropController(PLDPolicy(Exponential(theta=0.5, gamma=0.1), LAYERS))
    controller.begin_iteration(10, 1)
    expected = 1 / PLDPolicy(Exponential(theta=0.5, gamma=0.1), LAYERS).keep_probs(10)
    assert [controller.branch_scale(layer) for layer in range(1, LAYERS + 1)] == pytest.approx(expected)
    unscaled = DropController(HALF)
    unscaled.begin_iteration(10, 1)
    assert unscaled.branch_scale(3) == 1.0


@pytest.mark.parametrize("window", [1, 2, 64])
def test_the_window_changes_nothing_but_how_often_ranks_are_compared(window: int) -> None:
    plans = []
    for size in (window, 10):
        controller = DropController(HALF, window=size)
        for iteration in range(1, 30):
            controller.begin_iteration(iteration, 1)
            plans.append(controller.plan.tolist())
    assert plans[:29] == plans[29:]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"replicas": "distinct"},
            "replicas = 'distinct' does not work with sampler = 'bernoulli' and granularity = 'layer'",
        ),
        ({"window": 0}, "window = 0 is not allowed: it must be an integer of at least 1"),
        ({"stages": 2}, "stages = 2 does not work with sampler = 'bernoulli'"),
        ({"granularity": "tokens"}, "granularity = 'tokens' .* one of layer, sample, token"),
        ({"granularity": "token"}, "tokens = None is not allowed with granularity 'token': it must be a TokenDrop"),
        ({"tokens": 4}, "tokens = 4 is used by granularity 'token' only, got granularity 'layer'"),
        ({"granularity": "sample"}, "num_samples = None .* an integer"),
        ({"granularity": "sample", "num_samples": 0}, "num_samples = 0 .* an integer"),
        ({"num_samples": 2}, "num_samples = 2 is used by granularity 'sample' only"),
        (
            {"granularity": "sample", "num_samples": 1, "replicas": "distinct"},
            "replicas = 'distinct' does not work with num_samples = 1 and granularity = 'sample': .* set "
            "num_samples to 2 at",
        ),
    ],
)
def test_arguments_that_cannot_work_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DropController(HALF, **arguments)


def test_iterations_and_microbatches_out_of_range_are_refused() -> None:
    controller = DropController(HALF, scope="microbatch")
    with pytest.raises(ValueError, match="iteration = 0 is not allowed: it must be an integer of at least 1"):
        controller.begin_iteration(0, 1)
    with pytest.raises(ValueError, match="num_microbatches = 0 is not allowed: it must be an integer of at least 1"):
        controller.begin_iteration(1, 0)
    controller.begin_iteration(1, 2)
    with pytest.raises(RuntimeError, match="microbatch 2 of layer 1 is outside of the 2"):
        controller.kept(1, 2)


def test_tokens_are_of_a_numbered_microbatch_also_with_one_decision_an_iteration() -> None:
    tokens = TokenDrop(seq_length=16, layers=(2,), min_tokens=4, step=4, iterations=10)
    controller = DropController(FullDepthPolicy(num_layers=3), granularity="token", tokens=tokens)
    controller.begin_iteration(1, 2)
    assert controller.kept(2, 1)
    with pytest.raises(RuntimeError, match="microbatch -1 of layer 2 is outside of the 2"):
        controller.kept(2, -1)  # of a loop without Megatron's schedules


@pytest.mark.parametrize("scope", ["iteration", "microbatch"])
def test_a_layer_is_dropped_throughout_when_no_microbatch_runs_it(scope: str) -> None:
    controller = DropController(HALF, scope=scope)
    layers = range(1, LAYERS + 1)
    assert not any(controller.dropped_throughout(layer) for layer in layers)  # nothing has been drawn yet
    throughout = partly = 0
    for iteration in range(1, 20):
        controller.begin_iteration(iteration, num_microbatches=2)
        for layer in layers:
            runs = [controller.kept(layer, microbatch) for microbatch in range(2)]
            assert controller.dropped_throughout(layer) == (not any(runs))
            throughout += not any(runs)
            partly += any(runs) and not all(runs)
    assert throughout > 0
    assert (partly > 0) == (scope == "microbatch")


def test_distinct_replicas_cannot_say_what_all_of_them_dropped() -> None:
    controller = DropController(HALF, sampler="balanced", replicas="distinct")
    controller.begin_iteration(1, 1)
    with pytest.raises(ValueError, match="replicas = 'distinct' does not work with dropped_update = 'freeze'"):
        controller.dropped_throughout(1)


def test_a_restored_controller_continues_with_the_saved_stages() -> None:
    """Stages are a setting of the run, not of the layout of the moment."""
    saved = DropController(HALF, sampler="balanced", stages=[[1, 2, 5, 6], [3, 4]])
    saved.begin_iteration(3, 1)
    restored = DropController(HALF, sampler="balanced", stages=3)
    assert restored.load_state_dict(saved.state_dict()) == []
    for iteration in range(4, 20):
        saved.begin_iteration(iteration, 1)
        restored.begin_iteration(iteration, 1)
        assert np.array_equal(restored.plan, saved.plan)


def test_restoring_says_which_settings_have_changed() -> None:
    state = DropController(HALF, seed=1).state_dict()
    differences = DropController(HALF, seed=2, scope="microbatch").load_state_dict(state)
    assert differences == [
        "drop seed: 1 when saved, 2 now",
        "drop scope: 'iteration' when saved, 'microbatch' now",
    ]


def test_restoring_says_that_samples_are_decided_about_otherwise() -> None:
    state = DropController(HALF, granularity="sample", num_samples=2).state_dict()
    assert DropController(HALF, granularity="sample", num_samples=4).load_state_dict(state) == [
        "drop num_samples: 2 when saved, 4 now"
    ]
    before_there_were_samples = {k: v for k, v in state.items() if k not in ("granularity", "num_samples")}
    assert DropController(HALF).load_state_dict(before_there_were_samples) == []
    assert DropController(HALF, granularity="sample", num_samples=2).load_state_dict(before_there_were_samples) == [
        "drop granularity: 'layer' when saved, 'sample' now",
        "drop num_samples: None when saved, 2 now",
    ]


def test_the_state_of_another_depth_is_refused() -> None:
    state = DropController(HALF).state_dict()
    with pytest.raises(ValueError, match="6 layers, this one has 4"):
        DropController(LayerDropPolicy(Constant(0.5), 4)).load_state_dict(state)


@pytest.mark.parametrize("policy", ["sbld", None, Constant(0.5), LayerDropPolicy])
def test_what_is_no_policy_is_refused(policy: Any) -> None:
    with pytest.raises(ValueError, match=r"^policy = .*must be a Policy of megatron_sbld.method.policy"):
        DropController(policy)


@pytest.mark.parametrize("layer", [0, -1])
def test_layers_are_numbered_from_one(layer: int) -> None:
    """Python would take layer 0 for the last one."""
    controller = DropController(HALF)
    controller.begin_iteration(1, 1)
    for ask in (controller.kept, controller.runs_some_samples, controller.kept_samples):
        with pytest.raises(IndexError, match=f"layer {layer}: layers are numbered from 1"):
            ask(layer, 0)
    for ask_once in (controller.branch_scale, controller.dropped_throughout):
        with pytest.raises(IndexError, match=f"layer {layer}: layers are numbered from 1"):
            ask_once(layer)


@pytest.mark.parametrize("state", [None, {}, {"num_layers": 6}, {"drop": {"num_layers": 6}}])
def test_what_is_no_state_of_a_controller_is_refused_by_what_it_lacks(state: Any) -> None:
    with pytest.raises(ValueError, match=r"the drop state has no .*replicas.*must be what state_dict returned"):
        DropController(HALF).load_state_dict(state)


def test_torch_loads_a_state_whose_settings_were_numpys(tmp_path: Path) -> None:
    settings = {"seed": np.int64(3), "sampler": "balanced", "granularity": "sample", "num_samples": np.int32(2)}
    for stages in (np.int64(2), [list(np.arange(1, 4)), (4, 5, 6)]):
        controller = DropController(HALF, stages=stages, **settings)
        controller.begin_iteration(np.int64(3), np.int32(1))
        torch.save(controller.state_dict(), tmp_path / "state")
        restored = DropController(HALF, stages=3, **settings)
        assert restored.load_state_dict(torch.load(tmp_path / "state", weights_only=True)) == []
        restored.begin_iteration(3, 1)
        assert np.array_equal(restored.plan, controller.plan)


def test_distinct_replicas_keep_as_many_layers_on_each_stage() -> None:
    stages = [[1, 2, 3], [4, 5, 6]]
    replicas = [
        DropController(HALF, sampler="balanced", stages=stages, replicas="distinct", replica=rank) for rank in range(3)
    ]
    differ = 0
    for iteration in range(1, 50):
        for controller in replicas:
            controller.begin_iteration(iteration, 1)
        counts = [[controller.plan[0, :3].sum(), controller.plan[0, 3:].sum()] for controller in replicas]
        assert counts[0] == counts[1] == counts[2]
        differ += not np.array_equal(replicas[0].plan, replicas[1].plan)
    assert differ > 20


def record(**changes: object) -> np.ndarray:
    arguments: dict = {"policy": HALF, "seed": 1, **changes}
    iteration = arguments.pop("iteration", 1)
    return DropController(arguments.pop("policy"), **arguments)._record(iteration, num_microbatches=2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 2}, "rank 2: seed 2 instead of 1$"),
        ({"iteration": 4}, "rank 2: iteration 4 instead of 1$"),
        ({"policy": LayerDropPolicy(Constant(0.6), LAYERS)}, "rank 2: mean keep probability 0.6.* instead of 0.5"),
        ({"scope": "microbatch"}, "rank 2: different decisions at the same mean keep probability"),
        ({"sampler": "balanced"}, "rank 2: different decisions at the same mean keep probability"),
        ({"granularity": "sample", "num_samples": 4}, "rank 2: num_samples 4 instead of 0$"),
    ],
)
def test_a_rank_with_another_configuration_is_named_with_what_differs(changes: dict, message: str) -> None:
    from megatron_sbld.agreement import DropDisagreementError

    _raise_on_disagreement(np.stack([record(), record(), record()]))
    with pytest.raises(DropDisagreementError, match=message) as error:
        _raise_on_disagreement(np.stack([record(), record(), record(**changes)]))
    assert "rank 1" not in str(error.value)


@pytest.mark.parametrize("scope", ["iteration", "microbatch"])
@pytest.mark.parametrize("own", [{"sampler": "balanced", "stages": 2}, {"granularity": "sample", "num_samples": 3}])
def test_layer_tokens_are_what_all_replicas_run_and_each_of_them_knows_it(scope: Any, own: dict[str, Any]) -> None:
    """4 microbatches of 3 samples on each of 2 replicas, which run different layers or samples."""
    policy = LayerDropPolicy(Constant(0.7), LAYERS)
    controllers = [
        DropController(policy, scope=scope, replicas="distinct", replica=replica, **own) for replica in (0, 1)
    ]
    differ = 0
    for iteration in range(1, 30):
        for controller in controllers:
            controller.begin_iteration(iteration, num_microbatches=4)
        # [replicas, microbatches, L], shares of 3 samples
        shares = np.stack([controller.kept_shares for controller in controllers])
        for controller in controllers:
            assert controller.layer_tokens(24 * 10) == pytest.approx(float(shares.sum()) * 3 * 10)
        plans = [
            controller.plan if controller.sample_plan is None else controller.sample_plan for controller in controllers
        ]
        differ += not np.array_equal(*plans)
    assert differ > 10
    assert controllers[0].expected_shares(1) == pytest.approx([0.7] * LAYERS)


def test_another_policy_decides_from_the_next_iteration_on() -> None:
    controller = DropController(HALF, seed=5)
    controller.begin_iteration(1, 1)
    before = controller.plan.copy()
    other = LayerDropPolicy(Constant(0.9), LAYERS)
    controller.replace_policy(other)
    assert np.array_equal(controller.plan, before)
    controller.begin_iteration(2, 1)
    assert controller.keep_probs.tolist() == [0.9] * LAYERS
    for misfit in (LayerDropPolicy(Constant(0.9), 4), PLDPolicy(Constant(0.9), LAYERS)):
        with pytest.raises(ValueError, match="it replaces one of 6 and 'none'"):
            controller.replace_policy(misfit)
