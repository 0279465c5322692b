"""Layer dropping attached as in Megatron-LM's `pretrain`, on real megatron-core and without a checkout.

The module whose functions are replaced is a stand-in with the names of megatron.training.training; what it trains is
megatron-core's own. Megatron-LM's own: test_training_loop.py, and of checkouts scripts/check_patches.sh.
"""

from __future__ import annotations

import logging
import sys
import types
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.num_microbatches_calculator import (
    destroy_num_microbatches_calculator,
    init_num_microbatches_calculator,
)
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_sbld.controller import CHECKPOINT_KEY
from megatron_sbld.mcore.skip.switchable import SwitchableLayer, decoder_layers
from megatron_sbld.megatron_lm import attach, with_layer_dropping
from megatron_sbld.megatron_lm.run import LayerDropping
from megatron_sbld.method.decisions import draw_plan
from megatron_sbld.sensitivity.file import SensitivityFile
from tests.mcore.helpers import SEQUENCE, build_optimizer, tiny_config, tiny_gpt, wrap_ddp
from tests.mcore.hybrid import tiny_hybrid
from tests.megatron_lm.test_arguments import parse

LAYERS, MICROBATCHES, ITERATIONS = 4, 2, 100
LAYER_FLOPS, LOGITS_FLOPS = 3.0, 7.0
HYBRID_FLOPS = {"*": 1.0, "-": 2.0, "M": 5.0, "|": 0.0}
pytestmark = pytest.mark.usefixtures("one_rank", "_calculator")


@pytest.fixture
def _calculator() -> Iterator[None]:
    init_num_microbatches_calculator(
        rank=0,
        rampup_batch_size=None,
        global_batch_size=MICROBATCHES,
        micro_batch_size=1,
        data_parallel_size=1,
        decrease_batch_size_if_needed=False,
    )
    yield
    destroy_num_microbatches_calculator()


def megatron_args(*sbld: str, **changed: Any) -> Namespace:
    """Megatron-LM's arguments, as far as they are read, with some --sbld-* arguments."""
    known = {
        **{"num_layers": LAYERS, "train_iters": ITERATIONS, "train_samples": None, "micro_batch_size": 1},
        **{"pipeline_model_parallel_size": 1, "overlap_grad_reduce": False, "fp8": None, "cuda_graph_impl": "none"},
        **{"skip_train": False, "num_experts": None, "world_size": 1, "curr_iteration": 0},
        **{"tensorboard_log_interval": 1, "log_interval": 1},
        **{"seq_length": 16, "global_batch_size": MICROBATCHES, "params_dtype": torch.float32},
    }
    return Namespace(**{**known, **vars(parse(*sbld)), **changed})


def flops(args: Namespace, batch_size: int) -> float:
    """A layer of a GPT as LAYER_FLOPS, by the square of its tokens; of a hybrid model's pattern each kind by itself."""
    pattern = getattr(args, "hybrid_layer_pattern", None)
    of_tokens = (getattr(args, "seq_length", SEQUENCE) / SEQUENCE) ** 2
    layers = (
        args.num_layers * LAYER_FLOPS * of_tokens if pattern is None else sum(map(HYBRID_FLOPS.__getitem__, pattern))
    )
    return float(batch_size * (layers + LOGITS_FLOPS))


def training_module() -> Any:
    """A module with the names that are replaced or asked for; its functions note that they were called."""
    module: Any = types.ModuleType("megatron.training.training")
    module.calls = []
    module.num_floating_point_operations = flops
    module.update_train_iters = lambda args: module.calls.append("update_train_iters")
    module.train_step = lambda *args, **kwargs: ({}, 0)
    module.training_log = lambda *args, **kwargs: module.calls.append("training_log")
    module.get_optimizer_param_scheduler = scheduler
    return module


def scheduler(optimizer: Any) -> OptimizerParamScheduler:
    """megatron-core's own."""
    return OptimizerParamScheduler(
        optimizer,
        **{"init_lr": 0.0, "max_lr": 1e-3, "min_lr": 1e-4, "lr_warmup_steps": 2, "lr_decay_steps": 100},
        **{"lr_decay_style": "cosine", "start_wd": 0.1, "end_wd": 0.1, "wd_incr_steps": 100},
        **{"wd_incr_style": "constant"},
    )


def attached(
    *sbld: str, pattern: str | None = None, **changed: Any
) -> tuple[LayerDropping, OptimizerParamScheduler, Any]:
    """A run whose model (with a pattern a HybridModel), optimizer and scheduler are built, in Megatron-LM's order."""
    num_layers = LAYERS if pattern is None else len(pattern)
    args = megatron_args(*sbld, hybrid_layer_pattern=pattern, num_layers=num_layers, **changed)
    run = LayerDropping(args, ITERATIONS, training_module())
    config = tiny_config(num_layers=num_layers)
    chunks = tiny_gpt(config) if pattern is None else tiny_hybrid(config, pattern)
    run.add(list(chunks))
    model = wrap_ddp(chunks)
    optimizer = build_optimizer(model)
    return run, run.get_optimizer_param_scheduler(scheduler, optimizer), chunks[0]


def step(run: LayerDropping, iteration: int) -> None:
    run._args.curr_iteration = iteration - 1
    run.train_step(lambda: ({}, 0))


def test_decisions_are_drawn_before_the_step_and_are_those_of_the_plan() -> None:
    run, _, model = attached("--sbld-policy", "layerdrop", "--sbld-theta", "0.5", "--sbld-decision-scope", "microbatch")
    assert all(isinstance(layer, SwitchableLayer) for layer in decoder_layers(model))
    for iteration in (1, 2, 7):
        seen = []
        run._args.curr_iteration = iteration - 1
        run.train_step(lambda seen=seen: seen.append(run.controller.plan.copy()) or ({}, 0))
        expected = draw_plan([0.5] * LAYERS, 1234, iteration, MICROBATCHES, scope="microbatch")
        np.testing.assert_array_equal(seen[0], expected)


def test_the_balanced_samplers_stages_are_the_layers_as_they_were_built() -> None:
    run, *_ = attached("--sbld-policy", "layerdrop", "--sbld-sampler", "balanced")
    assert run.controller.stages == [[1, 2, 3, 4]]
    run, *_ = attached("--sbld-policy", "layerdrop", "--sbld-sampler", "balanced", "--sbld-balance-stages", "2")
    assert run.controller.stages == 2


def test_the_state_is_in_the_schedulers_and_a_stock_scheduler_passes_over_it() -> None:
    run, hooked, _ = attached("--sbld-policy", "layerdrop")
    step(run, 5)
    hooked.step(increment=2)
    state = hooked.state_dict()
    assert state[CHECKPOINT_KEY]["drop"]["iteration"] == 5
    stock = scheduler(hooked.optimizer)
    stock.load_state_dict(state)
    assert stock.state_dict() == {name: value for name, value in state.items() if name != CHECKPOINT_KEY}


def test_a_checkpoint_without_layer_dropping_is_taken_and_a_changed_seed_is_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    _, hooked, _ = attached("--sbld-policy", "layerdrop")
    hooked.load_state_dict(scheduler(hooked.optimizer).state_dict())
    state = hooked.state_dict()
    _, other, _ = attached("--sbld-policy", "layerdrop", "--sbld-seed", "7")
    with caplog.at_level(logging.WARNING):
        other.load_state_dict(state)
    assert "drop seed: 1234 when saved, 7 now" in caplog.text


def test_stages_whose_state_was_not_loaded_are_refused_before_a_layer_begins_anew() -> None:
    stages = ("--sbld-policy", "staged", "--sbld-stages", "[[0.5, 2], [1.0, 4]]", "--sbld-stage-init", "copy")
    run, hooked, _ = attached(*stages)
    run._args.iteration = 70  # --no-load-optim
    with pytest.raises(ValueError, match=r"--sbld-stages = .* after iteration 70, .* which was not loaded"):
        step(run, 71)
    hooked.load_state_dict(scheduler(hooked.optimizer).state_dict())  # of a run without layer dropping
    step(run, 71)
    assert run.controller.growth.begun == frozenset(range(1, LAYERS + 1))


def dynamic_sensitivity(folder: Path) -> tuple[str, ...]:
    """Arguments of a run that keeps its sensitivity up to date."""
    path = str(folder / "sensitivity.json")
    gaps = [0.1 * layer for layer in range(LAYERS)]
    SensitivityFile.from_gaps(gaps, [0.05] * LAYERS, {"command": "made up"}).save(path)
    words = ("--sbld-policy", "sbld", "--sbld-sensitivity", path, "--sbld-theta", "0.5")
    return (
        *words,
        "--sbld-sensitivity-update",
        "dynamic",
        "--sbld-update-interval",
        "10",
        "--sbld-update-memory",
        "200",
    )


def test_a_loss_that_sensitivity_cannot_be_kept_from_is_named(tmp_path: Path) -> None:
    run, *_ = attached(*dynamic_sensitivity(tmp_path))
    run.train_step(lambda: ({}, 0))  # as of an iteration that is left out
    with pytest.raises(ValueError, match="reports no 'lm loss', from which sensitivity is computed; it has my loss"):
        run.train_step(lambda: ({"my loss": torch.tensor(5.0)}, 0))


def test_a_dynamic_sensitivity_goes_on_from_its_state(tmp_path: Path) -> None:
    words = dynamic_sensitivity(tmp_path)
    noise = np.random.default_rng(0).normal(size=201)

    def observed(run: LayerDropping, iteration: int) -> list[float]:
        run._args.curr_iteration = iteration - 1

        def stock() -> Any:
            dropped = ~run.controller.plan[0]
            return {"lm loss": torch.tensor(5.0 + dropped[1] + 0.01 * noise[iteration])}, 0

        run.train_step(stock)
        return run.controller.policy.sensitivity.tolist()  # type: ignore[attr-defined]

    whole, scheduled, _ = attached(*words)
    before = whole.controller.policy.sensitivity.tolist()  # type: ignore[attr-defined]
    states, seen = {}, {}
    for iteration in range(1, 201):
        seen[iteration] = observed(whole, iteration)
        if iteration == 125:
            states = scheduled.state_dict()
    assert seen[9] == before != seen[200]
    resumed, hooked, _ = attached(*words)
    hooked.load_state_dict(states)
    for iteration in range(126, 201):
        assert observed(resumed, iteration) == seen[iteration]


def test_executed_flops_are_the_undropped_models_without_the_layers_that_did_not_run() -> None:
    run, *_ = attached("--sbld-policy", "layerdrop", "--sbld-theta", "0.5", "--sbld-decision-scope", "microbatch")
    for iteration in range(1, 6):
        step(run, iteration)
        ran = run.controller.plan.sum() / MICROBATCHES
        assert run._scalars.executed_flops(MICROBATCHES) == pytest.approx(
            MICROBATCHES * (ran * LAYER_FLOPS + LOGITS_FLOPS)
        )


@pytest.mark.parametrize(
    ("pattern", "unit", "costs"),
    [
        ("*-*-*-*-", "block", [3.0] * 4),
        ("M*-M-*-", "block", [5.0, 3.0, 5.0, 2.0, 3.0]),
        ("M*-M-*-", "layer", [5.0, 1.0, 2.0, 5.0, 2.0, 1.0, 2.0]),
    ],
)
def test_a_hybrid_models_policy_decisions_and_flops_are_of_its_units(
    pattern: str, unit: str, costs: list[float]
) -> None:
    run, _, model = attached("--sbld-policy", "layerdrop", "--sbld-theta", "0.5", "--sbld-unit", unit, pattern=pattern)
    assert all(isinstance(layer, SwitchableLayer) for layer in decoder_layers(model))
    assert run._drops._layers_of_pipeline_ranks() == [list(range(1, len(costs) + 1))]
    for iteration in range(1, 6):
        step(run, iteration)
        expected = draw_plan([0.5] * len(costs), 1234, iteration, MICROBATCHES)
        np.testing.assert_array_equal(run.controller.plan, expected)
        executed = MICROBATCHES * (float(expected[0] @ np.array(costs)) + LOGITS_FLOPS)
        assert run._scalars.executed_flops(MICROBATCHES) == pytest.approx(executed)


def test_a_hybrid_models_recipe_and_lists_count_its_units() -> None:
    words = ("--sbld-policy", "layerdrop", "--sbld-keep-layers", "5")
    with pytest.raises(ValueError, match="--sbld-keep-layers entry = 5 is not allowed"):
        attached(*words, "--sbld-unit", "block", pattern="*-*-*-*-")
    run, *_ = attached(*words, pattern="*-*-*-*-")
    assert run.controller.keep_probs.tolist() == [1.0] * 8
    with pytest.raises(ValueError, match="hybrid layers of kind 'D'"):
        attached("--sbld-policy", "layerdrop", pattern="D-D-")


def test_tokens_alone_are_dropped_with_policy_none() -> None:
    words = ("--sbld-granularity", "token", "--sbld-token-step", "4", "--sbld-token-iterations", "6")
    layout = {"seq_length": SEQUENCE, "sequence_parallel": False, "tensor_model_parallel_size": 1}
    run, hooked, model = attached(*words, **layout, context_parallel_size=1)
    assert all(isinstance(layer, SwitchableLayer) for layer in decoder_layers(model))
    for iteration, tokens in ((1, 4), (2, 8), (4, 12), (6, 16)):
        step(run, iteration)
        assert run.controller.num_tokens == tokens
        executed = (2 + (LAYERS - 2) * (tokens / SEQUENCE) ** 2) * LAYER_FLOPS + LOGITS_FLOPS
        assert run._scalars.executed_flops(MICROBATCHES) == pytest.approx(MICROBATCHES * executed)
    assert hooked.state_dict()["sbld"]["drop"]["token_strata"] == 1
    with pytest.raises(ValueError, match=r"--sbld-token-step = 32 is not allowed: at most model\.seq_length, 16"):
        attached("--sbld-granularity", "token", "--sbld-token-step", "32", **layout, context_parallel_size=1)


def test_freeze_and_the_fused_residual_are_put_in_force() -> None:
    _, plain, stock = attached("--sbld-policy", "layerdrop")
    assert not plain.optimizer.optimizer._optimizer_step_pre_hooks
    _, hooked, model = attached(
        "--sbld-policy", "layerdrop", "--sbld-dropped-update", "freeze", "--sbld-residual", "fused"
    )
    assert hooked.optimizer.optimizer._optimizer_step_pre_hooks
    for layer, other in zip(decoder_layers(model), decoder_layers(stock), strict=True):
        assert layer.self_attn_bda != other.self_attn_bda


def install_training(monkeypatch: pytest.MonkeyPatch, args: Namespace) -> Any:
    """Let the stand-in be found where Megatron-LM's training code is looked for."""
    module, package = training_module(), types.ModuleType("megatron.training")
    package.get_args = lambda: args  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "megatron.training", package)
    monkeypatch.setitem(sys.modules, "megatron.training.training", module)
    return module


def test_scalars_go_to_both_writers_and_the_console_at_megatron_lms_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    run, *_ = attached("--sbld-policy", "pld", "--sbld-theta", "0.5")
    run._args.tensorboard_log_interval, run._args.log_interval = 2, 4
    tensorboard: list[tuple[str, float, int]] = []
    wandb: list[tuple[dict[str, float], int]] = []
    console: list[str] = []
    package: Any = types.ModuleType("megatron.training")
    package.print_rank_last = console.append
    writers: Any = types.ModuleType("megatron.training.global_vars")
    writers.get_tensorboard_writer = lambda: Namespace(add_scalar=lambda *row: tensorboard.append(row))
    writers.get_wandb_writer = lambda: Namespace(log=lambda *row: wandb.append(row))
    monkeypatch.setitem(sys.modules, "megatron.training", package)
    monkeypatch.setitem(sys.modules, "megatron.training.global_vars", writers)
    for iteration in range(1, 5):
        step(run, iteration)
        assert run.training_log(lambda: "stock") == "stock"
    keep_probs = run.controller.policy.keep_probs(4)
    logged = {name: value for name, value, iteration in tensorboard if iteration == 4}
    assert logged == {name: value for row, iteration in wandb if iteration == 4 for name, value in row.items()}
    assert {iteration for *_, iteration in tensorboard} == {2, 4}
    assert logged["mean_keep_prob"] == pytest.approx(keep_probs.mean())
    assert logged["keep_prob/layer_03"] == keep_probs[2]
    assert 0 < logged["sbld throughput executed"] <= logged["sbld throughput undropped"]
    assert logged["executed_flops"] == run._scalars.executed_flops(MICROBATCHES) <= logged["model_flops"]
    assert logged["model_flops"] == MICROBATCHES * (LAYERS * LAYER_FLOPS + LOGITS_FLOPS)
    assert len(console) == 1
    assert "kept_fraction" in console[0]


def test_layers_that_begin_are_told_once_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    run, *_ = attached("--sbld-policy", "staged", "--sbld-stages", "[[0.01, 1], [1.0, 4]]")
    run._args.tensorboard_log_interval = run._args.log_interval = 10**6
    console: list[str] = []
    package: Any = types.ModuleType("megatron.training")
    package.print_rank_last = console.append
    monkeypatch.setitem(sys.modules, "megatron.training", package)
    begun = []
    grows_at = ITERATIONS // 100 + 1
    for iteration in range(grows_at - 1, grows_at + 3):
        step(run, iteration)
        run.training_log(lambda: None)
        begun.append(run._scalars._scalars()["begun_layers"])
    assert begun == [1, 4, 4, 4]
    assert console == [f" layer dropping, iteration {grows_at}: 3 layers (2-4) begin, as initialised"]


@pytest.mark.parametrize("words", [(), ("--sbld-theta", "0.5"), ("--sbld-sensitivity", "nowhere.json")])
def test_without_a_policy_nothing_is_replaced_and_the_model_is_as_it_was(
    words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    module = install_training(monkeypatch, megatron_args(*words))
    attach._warn_of_ignored.cache_clear()
    stock = dict(vars(module))

    def pretrain(datasets: Any, model_provider: Any, **kwargs: Any) -> type:
        model = model_provider(pre_process=True)
        assert vars(module) == stock
        return type(next(iter(decoder_layers(model))))

    provider = lambda pre_process: tiny_gpt(tiny_config(num_layers=LAYERS))[0]  # noqa: E731
    assert not issubclass(with_layer_dropping(pretrain)(None, provider), SwitchableLayer)
    warnings = [f"no effect with --sbld-policy none: {words[0]}"] if words else []  # the policy may be forgotten
    ours = [record for record in caplog.records if record.name.startswith("megatron_sbld")]  # 0.19 deprecates GPTModel
    assert [record.getMessage() for record in ours if record.levelno == logging.WARNING] == warnings


def test_functions_are_replaced_while_pretrain_runs_and_put_back_after_a_failure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = install_training(monkeypatch, megatron_args("--sbld-policy", "layerdrop"))
    stock = dict(vars(module))

    def pretrain(datasets: Any, model_provider: Any, **kwargs: Any) -> None:
        model = model_provider(pre_process=True)
        assert isinstance(next(iter(decoder_layers(model))), SwitchableLayer)
        assert module.train_step is not stock["train_step"]
        raise KeyboardInterrupt

    provider = lambda pre_process: tiny_gpt(tiny_config(num_layers=LAYERS))[0]  # noqa: E731
    with pytest.raises(KeyboardInterrupt):
        with_layer_dropping(pretrain)(None, provider)
    assert {name: vars(module)[name] for name in stock} == stock


def test_a_run_counted_in_samples_stays_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron-LM would otherwise take the learning rate's schedule from fields that are counted in iterations."""
    sbld = ("--sbld-policy", "pld", "--sbld-theta", "0.5")
    args = megatron_args(*sbld, train_iters=None, train_samples=ITERATIONS * MICROBATCHES)
    module = install_training(monkeypatch, args)

    def update_train_iters(given: Namespace) -> None:
        given.train_iters = given.train_samples // MICROBATCHES

    monkeypatch.setattr(module, "update_train_iters", update_train_iters)
    probs = {}

    def pretrain(datasets: Any, model_provider: Any, **kwargs: Any) -> None:
        (layer, *_) = decoder_layers(model_provider(pre_process=True))
        probs["in samples"] = layer._drop_controller.policy.keep_probs(ITERATIONS)

    provider = lambda pre_process: tiny_gpt(tiny_config(num_layers=LAYERS))[0]  # noqa: E731
    with_layer_dropping(pretrain)(None, provider)
    assert args.train_iters is None
    run, _, _ = attached(*sbld)
    np.testing.assert_array_equal(probs["in samples"], run.controller.policy.keep_probs(ITERATIONS))


def test_a_config_with_hooks_gets_one_and_its_parser_the_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    install_training(monkeypatch, megatron_args("--sbld-policy", "layerdrop"))
    config = Namespace(model=Namespace(pre_wrap_hooks=[]))

    def pretrain(given: Any, datasets: Any) -> Any:
        (hook,) = given.model.pre_wrap_hooks
        return hook(list(tiny_gpt(tiny_config(num_layers=LAYERS))))

    def parse_args(extra_args_provider: Any = None, args_defaults: Any = None) -> Any:
        return extra_args_provider

    wrapped, parser = with_layer_dropping(pretrain, parse_args)
    assert parser(args_defaults={}) is not None
    (chunk,) = wrapped(config, None)
    assert all(isinstance(layer, SwitchableLayer) for layer in decoder_layers(chunk))


def test_without_such_a_config_the_model_provider_is_wrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    install_training(monkeypatch, megatron_args("--sbld-policy", "layerdrop"))

    def pretrain(config: Any, datasets: Any, model_provider: Any = None) -> Any:
        return model_provider(pre_process=True)

    provider = lambda pre_process: tiny_gpt(tiny_config(num_layers=LAYERS))[0]  # noqa: E731
    wrapped, _ = with_layer_dropping(pretrain, lambda: None)
    for model in (
        wrapped(Namespace(model=None), None, provider),
        wrapped(Namespace(model=None), None, model_provider=provider),
    ):
        assert all(isinstance(layer, SwitchableLayer) for layer in decoder_layers(model))


def test_a_training_module_of_another_version_is_refused_by_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    module = install_training(monkeypatch, megatron_args("--sbld-policy", "layerdrop"))
    del module.train_step
    with pytest.raises(RuntimeError, match="has no train_step"):
        with_layer_dropping(lambda datasets, provider, **kwargs: provider())(None, lambda: None)
