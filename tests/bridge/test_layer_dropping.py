"""LayerDropping in a loop that does what Megatron-Bridge's does, in its order, on a real GPTModel in one process.

Of Bridge there are stand-ins with the names that test_contract.py finds in its sources.
"""

from __future__ import annotations

import copy
import logging
import sys
import types
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.num_microbatches_calculator import (
    destroy_num_microbatches_calculator,
    init_num_microbatches_calculator,
)
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_sbld import bridge
from megatron_sbld.bridge import CheckpointManager, LayerDropping
from megatron_sbld.controller import CHECKPOINT_KEY
from megatron_sbld.mcore.skip.switchable import SwitchableLayer, decoder_layers
from megatron_sbld.method.decisions import draw_plan
from megatron_sbld.sensitivity.file import SensitivityFile
from tests.mcore.helpers import (
    GLOBAL_MICROBATCHES,
    build_optimizer,
    forward_backward,
    mean_loss,
    tiny_config,
    tiny_gpt,
    wrap_ddp,
)
from tests.mcore.hybrid import tiny_hybrid
from tests.mcore.skip.freeze_helpers import assert_frozen, states

LAYERS, ITERATIONS = 4, 8
HALF = {"policy": "layerdrop", "theta": 0.5}
pytestmark = pytest.mark.usefixtures("one_rank", "_calculator", "_bridge")


@pytest.fixture
def _calculator() -> Iterator[None]:
    init_num_microbatches_calculator(
        rank=0,
        rampup_batch_size=None,
        global_batch_size=GLOBAL_MICROBATCHES,
        micro_batch_size=1,
        data_parallel_size=1,
        decrease_batch_size_if_needed=False,
    )
    yield
    destroy_num_microbatches_calculator()


class DefaultCheckpointManager:
    """Keeps in `cfg.checkpoint.files` what Bridge's keeps on disk."""

    def __init__(self, checkpoint_config: Any) -> None:
        self.files = checkpoint_config.files
        self.checkpointing_context: dict[str, Any] = {}

    def save(self, ctx: Any, callback_manager: Any) -> None:
        self.files["saved"] = copy.deepcopy(
            {
                "step": ctx.state.train_state.step,
                "model": [chunk.state_dict() for chunk in ctx.model],
                "optimizer": ctx.optimizer.state_dict(),
                "opt_param_scheduler": ctx.opt_param_scheduler.state_dict(),
            }
        )

    def load(self, ctx: Any) -> tuple[int, int]:
        saved = copy.deepcopy(self.files["saved"])
        for chunk, state in zip(ctx.model, saved["model"], strict=True):
            chunk.load_state_dict(state)
        ctx.optimizer.load_state_dict(saved["optimizer"])
        if "opt_param_scheduler" in saved:
            ctx.opt_param_scheduler.load_state_dict(saved["opt_param_scheduler"])
        ctx.state.train_state.step = saved["step"]
        return saved["step"], 0

    def finalize_async_saves(self, state: Any, blocking: bool = False, terminate: bool = False) -> None:
        self.files["finalized"] = (blocking, terminate)


@pytest.fixture
def _bridge(monkeypatch: pytest.MonkeyPatch) -> None:
    checkpointing: Any = types.ModuleType("checkpointing")
    checkpointing.DefaultCheckpointManager = DefaultCheckpointManager
    utils: Any = types.ModuleType("instantiate_utils")
    utils.prefixes = []
    utils.register_allowed_target_prefix = utils.prefixes.append
    monkeypatch.setitem(sys.modules, "megatron.bridge.training.checkpointing", checkpointing)
    monkeypatch.setitem(sys.modules, "megatron.bridge.utils.instantiate_utils", utils)


class Provider:
    """A model config of Bridge's older kind."""

    def __init__(self) -> None:
        self.pre_wrap_hooks_of_provider: list[Any] = []

    def register_pre_wrap_hook(self, hook: Any, prepend: bool = False) -> None:
        self.pre_wrap_hooks_of_provider.append(hook)


class Writer(dict[tuple[str, int], float]):
    def add_scalar(self, name: str, value: float, iteration: int) -> None:
        self[name, iteration] = value


def container(files: dict[str, Any] | None = None, model: Any = None, **optimizer: Any) -> Any:
    """A ConfigContainer, as far as it is read."""
    return SimpleNamespace(
        model=model or SimpleNamespace(pre_wrap_hooks=[]),
        train=SimpleNamespace(train_iters=ITERATIONS, micro_batch_size=2),
        optimizer=SimpleNamespace(**{"optimizer": "adam", "optimizer_cuda_graph": False, **optimizer}),
        ddp=SimpleNamespace(use_megatron_fsdp=False, overlap_grad_reduce=False),
        dist=SimpleNamespace(use_torch_fsdp2=False, use_megatron_fsdp=False, use_decentralized_pg=False),
        checkpoint=SimpleNamespace(custom_manager_class=None, files={} if files is None else files),
        logger=SimpleNamespace(tensorboard_log_interval=1),
        inprocess_restart=None,
        peft=None,
    )


def scheduler(optimizer: Any) -> OptimizerParamScheduler:
    return OptimizerParamScheduler(
        optimizer,
        **{"init_lr": 0.0, "max_lr": 1e-2, "min_lr": 1e-3, "lr_warmup_steps": 2, "lr_decay_steps": 100},
        **{"lr_decay_style": "cosine", "start_wd": 0.1, "end_wd": 0.1, "wd_incr_steps": 100},
        **{"wd_incr_style": "constant"},
    )


class Run:
    """Bridge's `setup` and `train`, in their order."""

    def __init__(self, cfg: Any, callback: LayerDropping, *, load: bool = False, pattern: str = "") -> None:
        self.callback = callback
        config = tiny_config(num_layers=len(pattern) or LAYERS)
        chunks: list[Any] = tiny_hybrid(config, pattern) if pattern else list(tiny_gpt(config))
        self.chunk = chunks[0]
        for hook in getattr(cfg.model, "pre_wrap_hooks", None) or cfg.model.pre_wrap_hooks_of_provider:
            chunks = hook(chunks)
        self.model = wrap_ddp(chunks)
        self.optimizer = build_optimizer(self.model, min_lr=1e-4)
        self.scheduler = scheduler(self.optimizer)
        self.state = SimpleNamespace(
            train_state=SimpleNamespace(step=0), tensorboard_logger=Writer(), wandb_logger=None
        )
        module, _, name = cfg.checkpoint.custom_manager_class.rpartition(".")
        self.manager = getattr(sys.modules[module], name)(cfg.checkpoint)
        if load:
            self.manager.load(self._context(opt_param_scheduler=self.scheduler))
        for one in self.model:
            one.train()
        self.callback.on_train_start(self._context())

    def _context(self, **more: Any) -> Any:
        return SimpleNamespace(
            state=self.state,
            model=self.model,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            user_state={},
            **more,
        )

    def step(self) -> tuple[float, list[list[bool]]]:
        """One iteration: its loss, and what was kept."""
        self.callback.on_train_step_start(self._context())
        for one in self.model:
            one.zero_grad_buffer()
        self.optimizer.zero_grad()
        iteration = self.state.train_state.step + 1
        loss = mean_loss(forward_backward(self.model, iteration, GLOBAL_MICROBATCHES))
        self.optimizer.step()
        self.scheduler.step(increment=1)
        losses = {"lm loss": torch.tensor(loss)}
        self.callback.on_train_step_end(self._context(loss_dict=losses, grad_norm=0.0, skipped_iter=False))
        self.state.train_state.step += 1
        return loss, self.controller.plan.tolist()

    @property
    def controller(self) -> Any:
        return self.callback._in_force().controller

    def save(self) -> None:
        self.manager.save(self._context(opt_param_scheduler=self.scheduler), None)


def started(files: dict[str, Any] | None = None, *, load: bool = False, **drop: Any) -> Run:
    cfg = container(files)
    return Run(cfg, LayerDropping(cfg, **drop), load=load)


@pytest.mark.parametrize("model", [Provider, lambda: SimpleNamespace(pre_wrap_hooks=[])], ids=["provider", "config"])
def test_decisions_are_drawn_before_each_step_and_are_those_of_the_plan(model: Any) -> None:
    cfg = container(model=model())
    run = Run(cfg, LayerDropping(cfg, **HALF, decision_scope="microbatch"))
    assert all(isinstance(layer, SwitchableLayer) for layer in decoder_layers(run.chunk))
    for iteration in (1, 2, 3):
        expected = draw_plan([0.5] * LAYERS, 1234, iteration, GLOBAL_MICROBATCHES, scope="microbatch")
        np.testing.assert_array_equal(run.step()[1], expected)


def test_dropped_layers_are_skipped() -> None:
    run = started(**HALF)
    ran: list[int] = []
    for layer in decoder_layers(run.chunk):
        layer.self_attention.register_forward_hook(lambda *_, number=layer.layer_number: ran.append(number))
    for _ in range(4):
        ran.clear()
        _, kept = run.step()
        assert sorted(ran) == sorted((np.flatnonzero(kept[0]) + 1).tolist() * GLOBAL_MICROBATCHES)


@pytest.mark.parametrize("update", ["freeze", "apply"])
def test_the_optimizer_leaves_dropped_layers_alone_with_freeze_only(update: str) -> None:
    run = started(**HALF, dropped_update=update)
    for _ in range(4):
        before = states(run.model, run.optimizer)
        _, kept = run.step()
        dropped = set((np.flatnonzero(~np.array(kept[0])) + 1).tolist())
        if update == "freeze" and run.state.train_state.step > 1:  # the first step has a learning rate of 0
            assert_frozen(before, states(run.model, run.optimizer), dropped)
    weights = {name: state["weight"] for name, state in before.items()}
    after = {name: state["weight"] for name, state in states(run.model, run.optimizer).items()}
    layers = {f"decoder.layers.{number - 1}." for number in dropped}
    unchanged = [torch.equal(after[name], weights[name]) for name in after if name.startswith(tuple(layers))]
    assert dropped
    assert all(unchanged) if update == "freeze" else not any(unchanged)


STAGED = {"policy": "staged", "stages": [[0.5, 2], [1.0, LAYERS]], "stage_init": "copy", "stage_warmup": 0.25}
SETTINGS: dict[str, dict[str, Any]] = {
    "freeze": {**HALF, "dropped_update": "freeze", "decision_scope": "microbatch"},
    "balanced": {**HALF, "sampler": "balanced"},
    "still growing": STAGED,
    "dynamic": {"policy": "sbld", "theta": 0.6, "sensitivity_update": "dynamic", "theta_min": 0.2},
}


@pytest.fixture
def settings(request: pytest.FixtureRequest, tmp_path: Any) -> dict[str, Any]:
    drop = SETTINGS[request.param]
    if request.param == "dynamic":
        path = tmp_path / "sensitivity.json"
        SensitivityFile.from_gaps([0.1, 0.4, 0.2, 0.3], [0.05] * LAYERS, {"command": "made up"}).save(path)
        drop = {**drop, "sensitivity": str(path)}
    return drop


@pytest.mark.parametrize("settings", SETTINGS, indirect=True)
@pytest.mark.parametrize("saved_after", [3, 5])
def test_a_resumed_run_equals_the_uninterrupted_one(settings: dict[str, Any], saved_after: int) -> None:
    files: dict[str, Any] = {}
    first = started(files, **settings)
    before = [first.step() for _ in range(saved_after)]
    first.save()
    expected = before + [first.step() for _ in range(ITERATIONS - saved_after)]
    assert CHECKPOINT_KEY in files["saved"]["opt_param_scheduler"]
    second = started(files, load=True, **settings)
    assert second.state.train_state.step == saved_after
    assert [second.step() for _ in range(ITERATIONS - saved_after)] == expected[saved_after:]
    mine, theirs = (states(run.model, run.optimizer) for run in (second, first))
    assert all(torch.equal(mine[name][key], value) for name, kept in theirs.items() for key, value in kept.items())


def test_the_dynamic_sensitivity_is_that_of_the_losses_and_goes_on_from_its_state(tmp_path: Any) -> None:
    drop = {**SETTINGS["dynamic"], "update_interval": 10, "update_memory": 200, "sensitivity": str(tmp_path / "s.json")}
    SensitivityFile.from_gaps([0.1, 0.4, 0.2, 0.3], [0.05] * LAYERS, {"command": "made up"}).save(drop["sensitivity"])
    noise = np.random.default_rng(0).normal(size=200)

    def observed(run: Run) -> list[float]:
        """What is in force after an iteration in which dropping layer 2 has cost 1."""
        run.callback.on_train_step_start(run._context())
        loss = 5.0 + (not run.controller.plan[0, 1]) + 0.01 * noise[run.state.train_state.step]
        run.callback.on_train_step_end(run._context(loss_dict={"lm loss": torch.tensor(loss)}))
        run.state.train_state.step += 1
        return run.controller.policy.sensitivity.tolist()

    files: dict[str, Any] = {}
    cfg, resumed_cfg = container(files), container(files)
    for each in (cfg, resumed_cfg):
        each.train.train_iters = 200
    whole = Run(cfg, LayerDropping(cfg, **drop))
    seen = []
    for iteration in range(200):
        if iteration == 125:
            whole.save()
        seen.append(observed(whole))
    assert seen[8] != seen[-1]
    assert np.argmax(seen[-1]) == 1
    resumed = Run(resumed_cfg, LayerDropping(resumed_cfg, **drop), load=True)
    assert [observed(resumed) for _ in range(75)] == seen[125:]


def test_a_stock_scheduler_passes_over_the_drop_state() -> None:
    files: dict[str, Any] = {}
    run = started(files, **HALF)
    run.step()
    run.save()
    stock = scheduler(run.optimizer)
    state = files["saved"]["opt_param_scheduler"]
    stock.load_state_dict(state)
    assert stock.state_dict() == {name: value for name, value in state.items() if name != CHECKPOINT_KEY}


def saved_after_one_step(**drop: Any) -> dict[str, Any]:
    """The files of a run of one iteration."""
    files: dict[str, Any] = {}
    run = started(files, **drop)
    run.step()
    run.save()
    return files


def test_every_layer_has_begun_in_a_checkpoint_of_a_run_without_layer_dropping(
    caplog: pytest.LogCaptureFixture,
) -> None:
    files = saved_after_one_step(policy="none")
    assert CHECKPOINT_KEY not in files["saved"]["opt_param_scheduler"]
    started(files, load=True, **HALF).step()
    with caplog.at_level(logging.WARNING):
        run = started(files, load=True, **STAGED)
    assert "drop stages: no effect, every layer had begun when saved" in caplog.text
    before = states(run.model, run.optimizer)
    run.callback.on_train_step_start(run._context())
    after = states(run.model, run.optimizer)
    assert all(torch.equal(after[name]["weight"], state["weight"]) for name, state in before.items()), "not copied over"


def test_a_state_that_was_not_loaded_is_told_and_refused_for_stages(caplog: pytest.LogCaptureFixture) -> None:
    files = saved_after_one_step(**HALF)
    del files["saved"]["opt_param_scheduler"]  # load_optim: false
    with caplog.at_level(logging.WARNING):
        started(files, load=True, **HALF).step()
    assert "goes on after iteration 1 without the drop state of its checkpoint" in caplog.text
    with pytest.raises(ValueError, match=r"drop\.stages = .* which was not loaded; load it, or leave drop\.stages out"):
        started(files, load=True, **STAGED)


@pytest.mark.parametrize(("unit", "layers"), [("block", LAYERS), ("layer", 2 * LAYERS)])
def test_a_hybrid_models_policy_is_of_its_units(unit: str, layers: int) -> None:
    cfg = container()
    run = Run(cfg, LayerDropping(cfg, unit=unit, **HALF), pattern="*-" * LAYERS)
    loss, kept = run.step()
    assert [len(row) for row in kept] == [layers] * GLOBAL_MICROBATCHES
    if unit == "block":
        assert (loss, kept) == started(**HALF).step()


def test_without_a_policy_nothing_is_switchable() -> None:
    run = started(policy="none")
    assert not any(isinstance(layer, SwitchableLayer) for layer in decoder_layers(run.chunk))
    assert run.step()[1] == [[True] * LAYERS] * GLOBAL_MICROBATCHES


def test_what_is_in_force_is_written_where_bridge_has_a_writer() -> None:
    run = started(**HALF)
    for iteration in (1, 2):
        _, kept = run.step()
        assert run.state.tensorboard_logger["theta", iteration] == 0.5
        assert run.state.tensorboard_logger["kept_fraction", iteration] == np.mean(kept)


def test_the_manager_is_allowed_by_name_and_hands_on_what_is_bridges() -> None:
    cfg = container()
    LayerDropping(cfg, **HALF)
    assert sys.modules["megatron.bridge.utils.instantiate_utils"].prefixes == ["megatron_sbld.bridge."]
    assert cfg.checkpoint.custom_manager_class == "megatron_sbld.bridge.CheckpointManager"
    manager = CheckpointManager(cfg.checkpoint)
    manager.finalize_async_saves(None, blocking=True)
    assert cfg.checkpoint.files["finalized"] == (True, False)
    assert manager.checkpointing_context == {}


@pytest.mark.parametrize(
    ("drop", "changed", "message"),
    [
        ({"polcy": "pld"}, {}, r"drop\.polcy is not allowed: allowed are .*policy"),
        ({**HALF, "theta": 1.5}, {}, r"drop\.theta = 1\.5"),
        ({**HALF, "keep_layers": [9]}, {}, r"drop\.keep_layers"),
        (HALF, {"optimizer.optimizer": "muon"}, r"drop\.policy = 'layerdrop' does not work with optimizer\.optimizer"),
        (
            {**HALF, "dropped_update": "freeze"},
            {"optimizer.optimizer_cuda_graph": True},
            r"drop\.dropped_update = 'freeze' does not work with optimizer\.optimizer_cuda_graph = True",
        ),
        (
            {**HALF, "replicas": "distinct", "sampler": "balanced"},
            {"ddp.overlap_grad_reduce": True},
            r"drop\.replicas = 'distinct' does not work with ddp\.overlap_grad_reduce = True",
        ),
        (HALF, {"peft": "lora"}, "peft = 'lora' does not work with layer dropping"),
        (
            HALF,
            {"inprocess_restart": SimpleNamespace(enabled=True)},
            r"inprocess_restart\.enabled = True does not work",
        ),
        (HALF, {"dist.use_decentralized_pg": True}, r"dist\.use_decentralized_pg = True does not work"),
        (HALF, {"checkpoint.custom_manager_class": "other.Manager"}, r"custom_manager_class = 'other\.Manager'"),
    ],
)
def test_a_mistake_is_refused_by_name(drop: dict[str, Any], changed: dict[str, Any], message: str) -> None:
    cfg = container()
    for path, value in changed.items():
        *sections, name = path.split(".")
        target = cfg
        for section in sections:
            target = getattr(target, section)
        setattr(target, name, value)
    with pytest.raises(ValueError, match=message):
        Run(cfg, LayerDropping(cfg, **drop))


def test_a_policy_of_the_dynamic_sensitivity_by_microbatches_is_refused_in_bridge(tmp_path: Any) -> None:
    path = tmp_path / "sensitivity.json"
    SensitivityFile.from_gaps([0.1, 0.4, 0.2, 0.3], [0.05] * LAYERS, {"command": "made up"}).save(path)
    drop = {"policy": "sbld", "sensitivity": str(path), "sensitivity_update": "dynamic", "decision_scope": "microbatch"}
    with pytest.raises(ValueError, match=r"does not work with drop\.decision_scope = 'microbatch' in Megatron-Bridge"):
        started(**drop)


def test_a_model_that_the_hook_did_not_see_is_not_trained_in_silence() -> None:
    cfg = container()
    callback = LayerDropping(cfg, **HALF)
    cfg.model = SimpleNamespace(pre_wrap_hooks=[lambda model: model])
    with pytest.raises(RuntimeError, match=r"hook of cfg\.model did not run"):
        Run(cfg, callback)
    with pytest.raises(RuntimeError, match="the model is of no LayerDropping"):
        bridge._layer_dropping_of([torch.nn.Linear(1, 1)])


def test_a_second_model_needs_a_callback_of_its_own() -> None:
    cfg = container()
    callback = LayerDropping(cfg, **HALF)
    Run(cfg, callback)
    with pytest.raises(RuntimeError, match="LayerDropping serves one run"):
        Run(cfg, callback)
