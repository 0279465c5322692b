"""A run: its parts, built and restored, one iteration, and what is written of it. loop.py says in which order."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.num_microbatches_calculator import (
    destroy_num_microbatches_calculator,
    get_current_global_batch_size,
    get_num_microbatches,
    update_num_microbatches,
)
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler, get_canonical_lr_for_logging

from megatron_sbld.checkpoint.layers import LayerMap
from megatron_sbld.checkpoint.manager import CheckpointManager, load_checkpoint, load_weights
from megatron_sbld.checkpoint.resume import PLANNED_FIELDS, warnings_of_decisions
from megatron_sbld.checkpoint.start import Start
from megatron_sbld.checkpoint.state import failures_name
from megatron_sbld.config.flops import executed_flops, padded_vocab_size, training_flops
from megatron_sbld.config.run_length import RunLength
from megatron_sbld.config.sections import Config
from megatron_sbld.config.stages import placement_of
from megatron_sbld.config.tokens import tokens_of
from megatron_sbld.config.validate import data_parallel_size
from megatron_sbld.controller import DropController
from megatron_sbld.data.batches import TrainingData
from megatron_sbld.data.blend import RunData
from megatron_sbld.data.tokenizer import Tokenizer
from megatron_sbld.files.strict_yaml import dump_yaml
from megatron_sbld.growth import growth_text
from megatron_sbld.health.liveness import SAVING
from megatron_sbld.health.run_lock import RunLock
from megatron_sbld.health.watchdog import POSITION
from megatron_sbld.mcore import (
    freeze_dropped_layers,
    fuse_residual,
    grow_in_stages,
    make_switchable,
    warm_up_after_growth,
)
from megatron_sbld.mcore.compat import init_microbatches
from megatron_sbld.mcore.rng_state import reseed
from megatron_sbld.method.in_force import dropped_update, drops, stage_warmup_iters, updates_sensitivity
from megatron_sbld.method.policy import Policy
from megatron_sbld.method.tokens import TokenDrop
from megatron_sbld.ranks import on_rank_0
from megatron_sbld.training.changes import CHANGES_FILE, record_changes
from megatron_sbld.training.layer_tokens import LayerTokens
from megatron_sbld.training.metrics import MetricsWriter, set_aside
from megatron_sbld.training.model import (
    build_model,
    build_optimizer,
    build_param_scheduler,
)
from megatron_sbld.training.sensitivity_update import SensitivityUpdate
from megatron_sbld.training.step import StepResult, train_step
from megatron_sbld.training.stop import StopFlag

logger = logging.getLogger(__name__)

_VERIFIED_ITERATIONS = 64
"""Iterations whose decisions ranks compare at once."""


class Run:
    """A run's parts and how far it has come. Built on every rank, in the same order.

    Writes nothing unless `open_run_folder` is called, so that others (measure/) can train without a run folder.
    """

    def __init__(
        self,
        config: Config,
        tokenizer: Tokenizer,
        data: RunData,
        policy: Policy,
        start: Start | None,
        length: RunLength,
    ) -> None:
        self.config = config
        self.run_dir = Path(config.logging.run_dir)
        self.goes_on = start is not None and start.checkpoint.path.parent == self.run_dir / "checkpoints"
        """Whether it starts from a checkpoint of its own, so that the rows in the run folder are its own too."""
        self._changes = [] if start is None else start.changes
        self.tokenizer = tokenizer
        self.length = length
        self.train_iters = length.train_iters
        self.iteration = 0
        self.consumed_samples = 0
        self._extra_tokens = 0  # of samples of another seq_length, beyond those of the present one
        self.train_time_s = 0.0
        self.vocab_size = padded_vocab_size(tokenizer.vocab_size, config) if start is None else start.vocab_size
        self.replicas = data_parallel_size(config, dist.get_world_size())
        self.controller = build_controller(config, policy, tokens_of(config, self.train_iters))
        self.sensitivity = SensitivityUpdate(config.drop, self.controller) if updates_sensitivity(config.drop) else None
        self.chunks: list[DistributedDataParallel] = build_model(config, self.vocab_size)
        if drops(config.drop):
            make_switchable(self.chunks, self.controller)
        if config.drop.residual == "fused":
            fuse_residual(self.chunks)
        self.optimizer: MegatronOptimizer = build_optimizer(config, self.chunks)
        if config.drop.policy != "none" and dropped_update(config.drop) == "freeze":
            freeze_dropped_layers(self.chunks, self.optimizer)
        if policy.stages is not None:
            grow_in_stages(
                self.chunks,
                self.optimizer,
                self.controller,
                config.drop.stage_init,
                copy_moments=config.drop.stage_copy_moments,
            )
        self.scheduler: OptimizerParamScheduler = build_param_scheduler(config, self.optimizer, self.length)
        self.layer_tokens = LayerTokens(config, length, self.controller, self.scheduler)
        if policy.stages is not None and config.drop.stage_warmup:
            warm_up_after_growth(self.scheduler, self.controller, stage_warmup_iters(config.drop, self.train_iters))
        self.checkpoints: CheckpointManager | None = None
        self.writer: MetricsWriter | None = None
        self.interrupted: list[str] = []
        """What is due at this iteration and was interrupted by a request to stop (between.py)."""
        self.last_loss = math.nan
        """Mean loss per token of the last iteration."""
        if start is None or not start.whole_state:
            self.layer_tokens.begin()
        if start is not None:
            self._restore(start)
        self._train_data = data.train.facts
        self.data = TrainingData(config, tokenizer, data, length, self.consumed_samples)

    @property
    def consumed_tokens(self) -> int:
        """Tokens trained on, also by samples of another seq_length before checkpoint.replan."""
        return self.consumed_samples * self.config.model.seq_length + self._extra_tokens

    def open_run_folder(self) -> None:
        """Let the run save checkpoints and write its metrics. Collective."""
        self.checkpoints = CheckpointManager(
            self.run_dir / "checkpoints",
            keep_last=self.config.checkpoint.keep_last,
            async_save=self.config.checkpoint.async_save,
        )
        self.writer = self._open_writer() if dist.get_rank() == 0 else None

    def close(self) -> None:
        """Finish what runs in the background."""
        self.data.close()
        if self.checkpoints is not None:
            self.checkpoints.close()
        if self.writer is not None:
            self.writer.close()

    def iterate(self, stop: StopFlag) -> bool:
        """One training iteration; whether any rank was asked to stop."""
        POSITION.enter("training", self.iteration + 1)
        update_num_microbatches(self.consumed_samples, consistency_check=False)
        num_microbatches, batch_size = get_num_microbatches(), get_current_global_batch_size()
        began = time.perf_counter()
        begun = self.controller.growth.begun
        self.controller.begin_iteration(self.iteration + 1, num_microbatches)
        if entering := self.controller.growth.begun - begun:
            self.note(growth_text(self.iteration + 1, entering, begun, self.config.drop.stage_init))
        batches = itertools.tee(self.data.train_batches(num_microbatches), len(self.chunks))
        by_microbatch = self.sensitivity is not None and self.sensitivity.needs_microbatch_losses
        result = train_step(self.config, self.chunks, self.optimizer, batches, stop.requested, by_microbatch)
        # A whole number, but for rounding that may differ where replicas run different layers.
        layer_tokens = round(self.controller.layer_tokens(batch_size * self.config.model.seq_length))
        increment = self.layer_tokens.count(layer_tokens, batch_size)
        if result.update_successful:
            self.scheduler.step(increment=increment)
        step_time_s = time.perf_counter() - began
        self.iteration += 1
        self.consumed_samples += batch_size
        self.train_time_s += step_time_s
        self.last_loss = result.loss
        self._check_finite(result)
        if self.writer is not None:
            self.writer.train_row(self._train_row(result, step_time_s, batch_size))
        if self.sensitivity is not None:
            self._update_sensitivity(self.sensitivity, result)
        return result.stop_requested

    def _check_finite(self, result: StepResult) -> None:
        """Stop before what an infinite gradient made of the weights is saved: the loss shows it an iteration later."""
        found = {"loss": result.loss}
        if result.update_successful and result.grad_norm is not None:
            found["norm of the gradients"] = result.grad_norm
        for name, value in found.items():
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"the {name} is {value} at iteration {self.iteration}: the run is stopped and nothing is saved; "
                    "lower optimizer.lr, lengthen the warm-up, or resume from an earlier checkpoint"
                )

    def _update_sensitivity(self, sensitivity: SensitivityUpdate, result: StepResult) -> None:
        sensitivity.observe(result.loss, result.microbatch_losses)
        row = sensitivity.update_if_due()
        if row is not None and self.writer is not None:
            self.writer.sensitivity_row(row)

    def _train_row(self, result: StepResult, step_time_s: float, batch_size: int) -> dict[str, Any]:
        seq_length, controller = self.config.model.seq_length, self.controller
        row: dict[str, Any] = {
            "iteration": self.iteration,
            "loss": result.loss,
            "lr": get_canonical_lr_for_logging(self.optimizer.param_groups),
            "grad_norm": result.grad_norm,
            "step_time_s": step_time_s,
            "tokens_per_s": batch_size * seq_length / step_time_s,
            "theta": controller.theta,
            "mean_keep_prob": float(controller.keep_probs.mean()),
            "kept_fraction": controller.kept_fraction,
            "consumed_tokens": self.consumed_tokens,
            "consumed_samples": self.consumed_samples,
            "consumed_layer_tokens": self.layer_tokens.consumed,
            "global_batch_size": batch_size,
            "keep_probs": [round(keep_prob, 6) for keep_prob in controller.keep_probs.tolist()],
            "kept": [round(share, 6) for share in controller.kept_shares.mean(axis=0).tolist()],
            "update_skipped": not result.update_successful,
            "executed_flops": self._executed_flops(batch_size),
        }
        if controller.tokens is not None:
            row["kept_tokens"] = controller.num_tokens
        if controller.policy.stages is not None:
            row["begun_layers"] = len(controller.growth.begun)
        if result.num_zeros is not None:
            row["num_zeros"] = result.num_zeros
        if self.config.training.precision == "fp16":
            row["loss_scale"] = self.optimizer.get_loss_scale().item()
        if torch.cuda.is_available():
            flops = training_flops(self.config.model, self.vocab_size, batch_size)
            row["model_tflops_per_gpu"] = flops / step_time_s / dist.get_world_size() / 1e12
            if self.config.logging.peak_tflops is not None:
                row["mfu"] = row["model_tflops_per_gpu"] / self.config.logging.peak_tflops
        return row

    def _executed_flops(self, batch_size: int) -> float:
        """FLOPs of the iteration on all ranks: of what ran, embeddings and logits included."""
        ran, attended = (
            float(shares.mean(axis=0).sum())
            for shares in (self.controller.kept_shares, self.controller.attended_shares)
        )
        attended_run = None if self.controller.tokens is None else attended
        return executed_flops(self.config.model, self.vocab_size, batch_size, ran, attended_run)

    def save(self) -> None:
        """Save a checkpoint of this moment. Collective."""
        POSITION.enter(SAVING)
        train_state = {
            "consumed_samples": self.consumed_samples,
            "consumed_tokens": self.consumed_tokens,
            **self.layer_tokens.state_dict(),
            "train_time_s": self.train_time_s,
            "interrupted": self.interrupted,
            "drop": self.controller.state_dict(),
            "sensitivity": None if self.sensitivity is None else self.sensitivity.state_dict(),
            "config": dataclasses.asdict(self.config),
            "vocab_size": self.tokenizer.vocab_size,
            "tokenizer": self.tokenizer.fingerprint(),
            "planned_from": [self.length.iteration, self.length.samples],
            "train_data": self._train_data,
        }
        assert self.checkpoints is not None, "open_run_folder comes before train"
        self.checkpoints.save(self.iteration, self.chunks, self.optimizer, self.scheduler, train_state)

    def _restore(self, start: Start) -> None:
        if not start.whole_state:
            layers = None
            if start.grown_from is not None:
                layers = LayerMap.into(self.controller.growth.begun, start.grown_from, start.saved_layers)
            load_weights(start.checkpoint.path, self.chunks, self.optimizer, layers)
            return
        state = load_checkpoint(
            start.checkpoint.path, self.chunks, self.optimizer, self.scheduler, seed=self.config.training.seed
        )
        assert start.saved is not None, "a checkpoint whose whole state is loaded is one of ours"
        self.iteration = start.checkpoint.iteration
        with failures_name(start.checkpoint.path):
            self.consumed_samples = int(state["consumed_samples"])
            self._extra_tokens = start.saved.consumed_tokens - self.consumed_tokens
            self.train_time_s = float(state["train_time_s"])
            self.interrupted = list(state.get("interrupted", []))
            self.controller.load_state_dict(state["drop"])  # what it finds changed is among start.changes
            lines = [change.text for change in start.changes]
            if any(change.field in PLANNED_FIELDS for change in start.changes):
                lines.append(
                    f"planned anew from iteration {self.iteration + 1} on, for a run of {self.train_iters}: learning "
                    "rate, drops and the order of the data; samples that were read may come again"
                )
            if self.sensitivity is not None and state.get("sensitivity") is not None:
                lines += self.sensitivity.load_state_dict(state["sensitivity"])
            rate_line = self.layer_tokens.restore(start.saved, start.changes, self.consumed_samples)
            lines += [rate_line] * bool(rate_line)
        if self.config.drop.sampler == "balanced" and self.config.drop.balance_stages is not None:
            self.controller.stages = self.config.drop.balance_stages
        if self.config.drop.token_strata is not None:
            self.controller.tokens = tokens_of(self.config, self.train_iters)
        if any(change.field == "training.seed" for change in start.changes):
            reseed(self.config.training.seed, self.iteration)
        lines += warnings_of_decisions(start.saved, self.config, self.replicas)
        if dist.get_rank() == 0:
            for line in lines:
                logger.warning("%s", line)
            load, own = self.config.checkpoint.load, start.checkpoint.path
            if load is not None and self.goes_on:
                logger.info("checkpoint.load = %r is not loaded: the run continues from its own newest, %s", load, own)

    def _open_writer(self) -> MetricsWriter:
        self.run_dir.mkdir(parents=True, exist_ok=True)
        resolved = dataclasses.asdict(self.config)
        (self.run_dir / "config.yaml").write_text(dump_yaml(resolved), encoding="utf-8")
        if self.goes_on:
            record_changes(self.run_dir, self.iteration + 1, self._changes)
        else:
            for name in ("metrics.jsonl", CHANGES_FILE):
                set_aside(self.run_dir / name)
        return MetricsWriter(self.config.logging, self.iteration + 1, self.train_iters, resolved)

    def note(self, text: str) -> None:
        """Show a line, on rank 0."""
        if self.writer is not None:
            self.writer.note(text)


def build_controller(config: Config, policy: Policy, tokens: TokenDrop | None = None) -> DropController:
    """The controller of this run; the balanced sampler's stages are this layout's unless the config says how many."""
    drop = config.drop
    stages = None
    if drop.sampler == "balanced":
        stages = drop.balance_stages or placement_of(config).stages
    window = _VERIFIED_ITERATIONS
    if updates_sensitivity(drop):
        # Equal windows between updates: one that an update cuts short has been drawn in vain.
        window = math.ceil(drop.update_interval / math.ceil(drop.update_interval / window))
    return DropController(
        policy,
        seed=drop.seed,
        scope=drop.decision_scope,
        sampler=drop.sampler,
        stages=stages,
        granularity=drop.granularity,
        num_samples=config.training.micro_batch_size if drop.granularity == "sample" else None,
        tokens=tokens,
        replicas="shared" if drop.policy == "none" else drop.replicas,  # nothing of it is checked with policy none
        replica=parallel_state.get_data_parallel_rank(),
        window=window,
    )


@contextmanager
def microbatch_calculator(config: Config) -> Iterator[None]:
    """Megatron's global calculator of microbatches and of the ramp of the batch size."""
    training = config.training
    init_microbatches(
        rank=dist.get_rank(),
        rampup_batch_size=training.rampup_batch_size,
        global_batch_size=training.global_batch_size,
        micro_batch_size=training.micro_batch_size,
        data_parallel_size=data_parallel_size(config, dist.get_world_size()),
    )
    try:
        yield
    finally:
        destroy_num_microbatches_calculator()


@contextmanager
def run_folder_lock(folder: str, field: str) -> Iterator[None]:
    """Hold the lock of a folder that `field` names, on rank 0. Collective; raises as RunLock does, on all ranks."""
    lock = RunLock(Path(folder), field)
    on_rank_0(lock.take)
    try:
        yield
    finally:
        lock.release()
