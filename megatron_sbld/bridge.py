"""Layer dropping in Megatron-Bridge: one callback for its `pretrain`, which adds a hook to the model's config.

    cfg = llama32_1b_pretrain_config()
    pretrain(cfg, forward_step, callbacks=[LayerDropping(cfg, policy="pld", theta=0.5)])

    switchable layers   a pre-wrap hook of cfg.model
    decisions           on_train_step_start, on every rank before the pipeline schedule starts
    optimizer, state    CheckpointManager.load, or on_train_start where nothing is loaded
    losses, scalars     on_train_step_end

The drop state is in the state dict of Megatron's parameter scheduler, as in Megatron-LM. Bridge saves that by itself.
It loads it before it calls any callback, so a checkpoint manager of ours, which wraps Bridge's, hooks in first. This
module has not run in Bridge yet: tests/bridge/test_contract.py reads what it needs of Bridge from Bridge's sources.
"""

from __future__ import annotations

import importlib
import logging
import weakref
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.num_microbatches_calculator import get_num_microbatches

from megatron_sbld.files.paths import CONFIG_PATHS, expand_option
from megatron_sbld.mcore.skip.decoder import decoder_units
from megatron_sbld.megatron_lm.attached import AttachedDrops
from megatron_sbld.megatron_lm.checks import check_fused_residual
from megatron_sbld.megatron_lm.scalars import decision_scalars
from megatron_sbld.method.build_tokens import build_tokens
from megatron_sbld.method.combinations import refuse_combinations
from megatron_sbld.method.config import DropConfig, drop_field_names
from megatron_sbld.method.in_force import drop_settings, drops, drops_tokens
from megatron_sbld.method.recipes import with_recipe
from megatron_sbld.method.tokens import strata_needed
from megatron_sbld.method.validate import validate_drop

logger = logging.getLogger(__name__)

_MANAGER = f"{__name__}.CheckpointManager"
_SHARDED = "it gathers and frees a layer's parameters around a forward pass that a skip leaves out"
REFUSED = {
    "dist.use_torch_fsdp2": _SHARDED,
    "dist.use_megatron_fsdp": _SHARDED,
    "ddp.use_megatron_fsdp": _SHARDED,
    "dist.use_decentralized_pg": "layer dropping asks megatron-core's parallel state for ranks, and it has none then",
    "inprocess_restart.enabled": "it builds a second model in a process whose first one is still attached",
    "peft": "adapters in layers that are already switchable have not been tested",
}
"""Settings of ConfigContainer that do not work with a policy, and why."""


class LayerDropping:
    """A callback for Megatron-Bridge's `pretrain`, of one run. Make it on every rank, after all changes of `cfg`.

    Args:
        cfg: Bridge's ConfigContainer, which is given to `pretrain`. It gets a pre-wrap hook and a checkpoint manager.
        drop: fields of the drop section: policy, theta, sensitivity, dropped_update, ... (docs/method.md).

    Raises:
        ValueError: a field that does not exist, or a checkpoint manager that is another's. What fields hold is
            checked once Bridge has validated its own config, before the model is wrapped.
    """

    def __init__(self, cfg: Any, /, **drop: Any) -> None:
        unknown = sorted(drop.keys() - set(drop_field_names()))
        if unknown:
            raise ValueError(f"drop.{unknown[0]} is not allowed: allowed are {', '.join(drop_field_names())}")
        self._cfg, self._given = cfg, drop
        self._drops: AttachedDrops | None = None
        self._is_attached = False
        _use_manager(cfg.checkpoint)
        if hasattr(cfg.model, "register_pre_wrap_hook"):  # a provider
            cfg.model.register_pre_wrap_hook(self.pre_wrap_hook)
        else:
            cfg.model.pre_wrap_hooks.append(self.pre_wrap_hook)

    def pre_wrap_hook(self, model: list[torch.nn.Module]) -> list[torch.nn.Module]:
        """Make the chunks of the model on this rank switchable; returns them."""
        if self._drops is not None:
            raise RuntimeError("LayerDropping serves one run: make a new one, with a new cfg, for another model")
        self._drops = self._checked(model[0])
        self._drops.add(model)
        for chunk in model:
            _of_chunk[chunk] = weakref.ref(self)
        return model

    def attach(self, optimizer: Any, scheduler: Any) -> None:
        """Attend to optimizer and scheduler, once, before a checkpoint is loaded. Collective."""
        if not self._is_attached:
            self._in_force().attach(optimizer, scheduler)
            self._is_attached = True

    def on_train_start(self, context: Any) -> None:
        """Model, optimizer and scheduler are built, and a checkpoint has been loaded if there is one."""
        drops = self._in_force()
        self.attach(context.optimizer, context.scheduler)
        step = context.state.train_state.step
        if not drops.check_resumed(step) and dist.get_rank() == 0:
            logger.warning(
                "the run goes on after iteration %s without the drop state of its checkpoint: checkpoint.load_optim is "
                "off, or checkpoint.custom_manager_class = %r is not %r",
                *(step, self._cfg.checkpoint.custom_manager_class, _MANAGER),
            )

    def on_train_step_start(self, context: Any) -> None:
        """Decide for the iteration, on every rank."""
        growth = self._in_force().begin(context.state.train_state.step + 1, get_num_microbatches())
        if growth and dist.get_rank() == 0:
            logger.warning("layer dropping, %s", growth)

    def on_train_step_end(self, context: Any) -> None:
        """Take in the losses, and write the scalars where Bridge has a writer."""
        drops = self._in_force()
        drops.observe(context.loss_dict or {})
        iteration = drops.controller.iteration
        if iteration % self._cfg.logger.tensorboard_log_interval:
            return
        scalars = decision_scalars(drops.controller)
        if context.state.tensorboard_logger is not None:
            for name, value in scalars.items():
                context.state.tensorboard_logger.add_scalar(name, value, iteration)
        if context.state.wandb_logger is not None:
            context.state.wandb_logger.log(scalars, iteration)

    def _checked(self, chunk: Any) -> AttachedDrops:
        """The drops in force; chunk: of the model as it is built."""
        cfg, model = self._cfg, chunk.config
        fields = {
            name: expand_option(f"drop.{name}", value) if f"drop.{name}" in CONFIG_PATHS else value
            for name, value in self._given.items()
        }
        drop = DropConfig(**fields)
        num_layers = decoder_units(chunk, "block").total if drop.unit == "block" else model.num_layers
        drop = with_recipe(drop, num_layers, self._given.keys())
        # The balanced sampler takes the stages as they are built.
        validate_drop(drop, num_layers, cfg.train.train_iters, num_stages=None)
        if drops(drop):
            for path, reason in REFUSED.items():
                value = _setting(cfg, path)
                if value:
                    raise ValueError(f"{path} = {value!r} does not work with layer dropping: {reason}; switch it off")
            known = {section: vars(getattr(cfg, section)) for section in ("optimizer", "ddp", "train")}
            settings = {"model": vars(model), **known, "drop": drop_settings(drop)}
            sections = {name: section for section, values in settings.items() for name in values}
            merged = {name: value for values in settings.values() for name, value in values.items()}
            refuse_combinations(merged, lambda name: f"{sections[name]}.{name}", program="Megatron-Bridge")
        if drop.residual == "fused":
            check_fused_residual(model.params_dtype, "drop.residual")
        tokens = None
        if drops_tokens(drop):
            strata = strata_needed(model)
            tokens = build_tokens(drop, num_layers, cfg.train.train_iters, chunk.max_sequence_length, strata)
        return AttachedDrops(drop, num_layers, cfg.train.train_iters, cfg.train.micro_batch_size, tokens)

    def _in_force(self) -> AttachedDrops:
        if self._drops is None:
            raise RuntimeError(
                "no layer can be dropped, since LayerDropping's hook of cfg.model did not run: make LayerDropping(cfg) "
                "after the last change of cfg.model, and give `pretrain` the same cfg"
            )
        return self._drops


class CheckpointManager:
    """Bridge's own checkpoint manager, which tells LayerDropping before it loads. Named in cfg.checkpoint."""

    def __init__(self, checkpoint_config: Any) -> None:
        checkpointing = importlib.import_module("megatron.bridge.training.checkpointing")
        self._stock = checkpointing.DefaultCheckpointManager(checkpoint_config)

    def save(self, ctx: Any, callback_manager: Any) -> None:
        """As Bridge."""
        self._stock.save(ctx, callback_manager)

    def load(self, ctx: Any) -> tuple[int, int]:
        """As Bridge, with the drop state beside the scheduler's."""
        if ctx.optimizer is not None and ctx.opt_param_scheduler is not None:  # training
            _layer_dropping_of(ctx.model).attach(ctx.optimizer, ctx.opt_param_scheduler)
        return self._stock.load(ctx)

    def finalize_async_saves(self, state: Any, blocking: bool = False, terminate: bool = False) -> None:
        """As Bridge."""
        self._stock.finalize_async_saves(state, blocking=blocking, terminate=terminate)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stock, name)  # checkpointing_context


_of_chunk: weakref.WeakKeyDictionary[torch.nn.Module, weakref.ref[LayerDropping]] = weakref.WeakKeyDictionary()


def _layer_dropping_of(model: list[Any]) -> LayerDropping:
    """That of a model on this rank, wrapped."""
    found = next((_of_chunk[module] for chunk in model for module in chunk.modules() if module in _of_chunk), None)
    layer_dropping = None if found is None else found()
    if layer_dropping is None:
        raise RuntimeError(
            f"checkpoint.custom_manager_class is {_MANAGER}, but the model is of no LayerDropping: make "
            "LayerDropping(cfg) after the last change of cfg.model"
        )
    return layer_dropping


def _use_manager(checkpoint: Any) -> None:
    if checkpoint.custom_manager_class not in (None, _MANAGER):
        raise ValueError(
            f"checkpoint.custom_manager_class = {checkpoint.custom_manager_class!r} does not work with layer dropping: "
            "its own manager loads the drop state; leave it out"
        )
    utils = importlib.import_module("megatron.bridge.utils.instantiate_utils")
    utils.register_allowed_target_prefix(f"{__name__}.")
    checkpoint.custom_manager_class = _MANAGER


def _setting(cfg: Any, path: str) -> Any:
    for name in path.split("."):
        cfg = None if cfg is None else getattr(cfg, name)
    return cfg
