"""`megatron-sbld pretrain`: check everything, build and restore it, train to the end or to a request to stop."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
import signal
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.num_microbatches_calculator import (
    destroy_num_microbatches_calculator,
    get_current_global_batch_size,
    get_num_microbatches,
    init_num_microbatches_calculator,
    update_num_microbatches,
)
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler, get_canonical_lr_for_logging
from megatron.core.utils import get_model_config

from megatron_sbld.controller import DropController
from megatron_sbld.drop import build_policy, updates_sensitivity
from megatron_sbld.evaluation.in_training import TasksInTraining
from megatron_sbld.exit_status import EXIT_TO_BE_CONTINUED
from megatron_sbld.mcore import freeze_dropped_layers, fuse_residual, make_switchable
from megatron_sbld.mcore.rng_state import reseed
from megatron_sbld.policy import Policy
from megatron_sbld.strict_yaml import dump_yaml
from megatron_sbld.training.between import BetweenIterations, is_due
from megatron_sbld.training.checkpoint import CheckpointManager, load_checkpoint, load_weights, on_rank_0
from megatron_sbld.training.checkpoint_state import failures_name
from megatron_sbld.training.config import Config
from megatron_sbld.training.data import TrainingData, check_data, data_facts
from megatron_sbld.training.flops import layer_share, padded_vocab_size, training_flops
from megatron_sbld.training.forecast import forecast, forecast_text
from megatron_sbld.training.liveness import SAVING
from megatron_sbld.training.metrics import MetricsWriter, check_logging, set_aside
from megatron_sbld.training.model import (
    build_model,
    build_optimizer,
    build_param_scheduler,
    check_model,
    loss_weights_text,
)
from megatron_sbld.training.processes import distributed_run, world_size_from_environment
from megatron_sbld.training.resume import PLANNED_FIELDS, warnings_of_decisions
from megatron_sbld.training.run_length import RunLength
from megatron_sbld.training.run_lock import RunLock
from megatron_sbld.training.sensitivity_update import SensitivityUpdate
from megatron_sbld.training.stage_forecast import stage_forecast, stage_forecast_text
from megatron_sbld.training.stages import placement_of
from megatron_sbld.training.start import Start, find_start
from megatron_sbld.training.step import StepResult, train_step
from megatron_sbld.training.tokenizer import Tokenizer, load_tokenizer
from megatron_sbld.training.validate import data_parallel_size, validate
from megatron_sbld.training.watchdog import POSITION

logger = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""What Slurm sends before it takes nodes away: the one by itself, the other where sbatch's --signal asks for it."""

_VERIFIED_ITERATIONS = 64
"""Iterations whose decisions ranks compare at once."""


def pretrain(config: Config) -> int:
    """Train as the config says; the exit status is 0 when the run is complete, else EXIT_TO_BE_CONTINUED.

    Raises:
        ValueError: a mistake in the config, the data or the checkpoint; before the first iteration.
        RuntimeError: something could not be read or written on the way.
        FloatingPointError: the loss is no longer finite.
        DropDisagreementError: ranks would drop different layers.
        RankLostError: another rank died or stalled; mostly the process ends instead (watchdog.py).
    """
    world_size = world_size_from_environment()
    validate(config, world_size)
    check_model(config)
    check_logging(config.logging)
    tokenizer = load_tokenizer(config.data.tokenizer)
    check_data(config, tokenizer)
    tasks = TasksInTraining(config, tokenizer)
    with (
        distributed_run(config),
        microbatch_calculator(config),
        stop_flag() as stop,
        run_folder_lock(config.logging.run_dir, "logging.run_dir"),
    ):
        start = find_start(config, tokenizer)  # not before the lock: a process that is just ending may still save
        length = RunLength(config.training) if start is None else start.length(config)
        policy = build_policy(config.drop, config.model.num_layers, length.train_iters)
        run = Run(config, tokenizer, policy, start)
        first = run.iteration
        try:
            with closing(run):
                run.open_run_folder()
                tasks.open_file(run.iteration, goes_on=run.goes_on)
                return run.train(stop, tasks)
        except OSError as error:
            if run.iteration == first:
                raise
            # No mistake of the user's: a disk or a file system, which may be better next time.
            raise RuntimeError(f"after iteration {run.iteration}: {error}") from error


@dataclass
class StopFlag:
    """Set by STOP_SIGNALS; read at the end of each iteration, and between the parts of validation and tasks."""

    requested: bool = False

    def request(self, signum: int, frame: FrameType | None) -> None:
        self.requested = True


@contextmanager
def stop_flag() -> Iterator[StopFlag]:
    flag = StopFlag()
    previous = {number: signal.signal(number, flag.request) for number in STOP_SIGNALS}
    try:
        yield flag
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def microbatch_calculator(config: Config) -> Iterator[None]:
    """Megatron's global calculator of microbatches and of the ramp of the batch size."""
    training = config.training
    init_num_microbatches_calculator(
        rank=dist.get_rank(),
        rampup_batch_size=training.rampup_batch_size,
        global_batch_size=training.global_batch_size,
        micro_batch_size=training.micro_batch_size,
        data_parallel_size=data_parallel_size(config, dist.get_world_size()),
        decrease_batch_size_if_needed=False,
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


class Run:
    """A run's parts and how far it has come. Built on every rank, in the same order.

    Writes nothing unless `open_run_folder` is called, so that others (profile.py) can train without a run folder.
    """

    def __init__(self, config: Config, tokenizer: Tokenizer, policy: Policy, start: Start | None) -> None:
        self.config = config
        self.run_dir = Path(config.logging.run_dir)
        self.goes_on = start is not None and start.checkpoint.path.parent == self.run_dir / "checkpoints"
        """Whether it starts from a checkpoint of its own, so that the rows in the run folder are its own too."""
        self.tokenizer = tokenizer
        self.length = RunLength(config.training) if start is None else start.length(config)
        self.train_iters = self.length.train_iters
        self.iteration = 0
        self.consumed_samples = 0
        self._extra_tokens = 0  # of samples of another seq_length, beyond those of the present one
        self.train_time_s = 0.0
        self.vocab_size = padded_vocab_size(tokenizer.vocab_size, config) if start is None else start.vocab_size
        self.replicas = data_parallel_size(config, dist.get_world_size())
        self.controller = build_controller(config, policy)
        self.sensitivity = SensitivityUpdate(config.drop, self.controller) if updates_sensitivity(config.drop) else None
        self.chunks: list[DistributedDataParallel] = build_model(config, self.vocab_size)
        if config.drop.policy != "none":
            make_switchable(self.chunks, self.controller)
        if config.drop.residual == "fused":
            fuse_residual(self.chunks)
        self.optimizer: MegatronOptimizer = build_optimizer(config, self.chunks)
        if config.drop.policy != "none" and config.drop.dropped_update == "freeze":
            freeze_dropped_layers(self.chunks, self.optimizer)
        self.scheduler: OptimizerParamScheduler = build_param_scheduler(config, self.optimizer, self.length)
        self.checkpoints: CheckpointManager | None = None
        self.writer: MetricsWriter | None = None
        self.interrupted: list[str] = []
        """What is due at this iteration and was interrupted by a request to stop (between.py)."""
        self.last_loss = math.nan
        """Mean loss per token of the last iteration."""
        if start is not None:
            self._restore(start)
        self.data = TrainingData(config, tokenizer, self.length, self.consumed_samples)

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

    def train(self, stop: StopFlag, tasks: TasksInTraining) -> int:
        """Iterate to the end, validating, evaluating and saving on the way; the exit status."""
        assert self.checkpoints is not None, "open_run_folder comes before train"
        config, first = self.config, self.iteration + 1
        if self.iteration < self.train_iters:
            self._announce(first)
        for chunk in self.chunks:
            chunk.train()
        between = BetweenIterations(self, tasks, stop)
        self.interrupted = between.do(between.missed(self.interrupted))
        if self.interrupted or (self.iteration < self.train_iters and between.is_stopping()):
            return self._stopped()  # nothing has changed since it was saved
        while self.iteration < self.train_iters:
            asked = self.iterate(stop)
            done = self.iteration == self.train_iters
            limit = config.training.exit_after_iterations
            self.checkpoints.poll()
            due = between.due(done)
            self.interrupted = due if asked else between.do(due)
            stopping = (
                asked
                or bool(self.interrupted)
                or (limit is not None and self.iteration - first + 1 >= limit)
                or (bool(due) and between.is_stopping())
            )
            if self._save_is_due(done, stopping):
                self._save()
            if self.interrupted or (stopping and not done):
                return self._stopped()
        self.note(f"complete: {self.train_iters} iterations, {self.consumed_samples:,} samples")
        return 0

    def _stopped(self) -> int:
        left = f", before its {' and '.join(self.interrupted)}" if self.interrupted else ""
        self.note(
            f"stopped as asked after iteration {self.iteration} of {self.train_iters}{left}; start again to go on"
        )
        return EXIT_TO_BE_CONTINUED

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
        self.controller.begin_iteration(self.iteration + 1, num_microbatches)
        batches = itertools.tee(self.data.train_batches(num_microbatches), len(self.chunks))
        by_microbatch = self.sensitivity is not None and self.sensitivity.needs_microbatch_losses
        result = train_step(self.config, self.chunks, self.optimizer, batches, stop.requested, by_microbatch)
        if result.update_successful:
            self.scheduler.step(increment=batch_size)
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
        sensitivity.observe(result)
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
            "global_batch_size": batch_size,
            "keep_probs": [round(keep_prob, 6) for keep_prob in controller.keep_probs.tolist()],
            "kept": [round(share, 6) for share in controller.kept_shares.mean(axis=0).tolist()],
            "update_skipped": not result.update_successful,
        }
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

    def _save_is_due(self, done: bool, stopping: bool) -> bool:
        checkpoint = self.config.checkpoint
        return stopping or (done and checkpoint.save_at_end) or is_due(self.iteration, checkpoint.save_interval)

    def _save(self) -> None:
        POSITION.enter(SAVING)
        train_state = {
            "consumed_samples": self.consumed_samples,
            "consumed_tokens": self.consumed_tokens,
            "train_time_s": self.train_time_s,
            "interrupted": self.interrupted,
            "drop": self.controller.state_dict(),
            "sensitivity": None if self.sensitivity is None else self.sensitivity.state_dict(),
            "config": dataclasses.asdict(self.config),
            "vocab_size": self.tokenizer.vocab_size,
            "tokenizer": self.tokenizer.fingerprint(),
            "planned_from": [self.length.iteration, self.length.samples],
            "train_data": data_facts(self.config),
        }
        assert self.checkpoints is not None, "open_run_folder comes before train"
        self.checkpoints.save(self.iteration, self.chunks, self.optimizer, self.scheduler, train_state)

    def _restore(self, start: Start) -> None:
        if not start.whole_state:
            load_weights(start.checkpoint.path, self.chunks, self.optimizer)
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
        if self.config.drop.sampler == "balanced" and self.config.drop.balance_stages is not None:
            self.controller.stages = self.config.drop.balance_stages
        if any(change.field == "training.seed" for change in start.changes):
            reseed(self.config.training.seed, self.iteration)
        lines += warnings_of_decisions(start.saved, self.config, self.replicas)
        if dist.get_rank() == 0:
            for line in lines:
                logger.warning("%s", line)
            load, own = self.config.checkpoint.load, start.checkpoint.path
            if load is not None and self.goes_on:
                logger.info("checkpoint.load = %r is not loaded: the run goes on from its own newest, %s", load, own)

    def _open_writer(self) -> MetricsWriter:
        self.run_dir.mkdir(parents=True, exist_ok=True)
        resolved = dataclasses.asdict(self.config)
        (self.run_dir / "config.yaml").write_text(dump_yaml(resolved), encoding="utf-8")
        if not self.goes_on:
            set_aside(self.run_dir / "metrics.jsonl")
        return MetricsWriter(self.config.logging, self.iteration + 1, self.train_iters, resolved)

    def _announce(self, first: int) -> None:
        parallel = self.config.parallel
        params = sum(param.numel() for chunk in self.chunks for param in chunk.parameters())
        self.note(
            f"{params:,} parameters on this rank; tensor {parallel.tensor_model_parallel_size} x "
            f"pipeline {parallel.pipeline_model_parallel_size} x context {parallel.context_parallel_size} x "
            f"data {self.replicas}; policy {self.config.drop.policy}; iterations {first} to {self.train_iters}"
        )
        fuses_loss = get_model_config(self.chunks[0]).cross_entropy_loss_fusion
        if fuses_loss and self.config.training.cross_entropy_loss_fusion is None:
            self.note("training.cross_entropy_loss_fusion: null takes the compiled loss (bf16 on a GPU)")
        weights = loss_weights_text(self.config)
        if weights is not None:
            self.note(weights)
        if self.config.drop.policy != "none" and self.writer is not None:
            recompute = self.config.training.recompute_granularity == "full"
            phi = layer_share(self.config.model, self.vocab_size, recompute=recompute)
            outlook = forecast(self.controller.policy, self.train_iters, phi)
            self.note(forecast_text(outlook))
            balanced = self.controller.stages
            stages = stage_forecast(self.config, self.controller.policy, outlook, phi, self.replicas, balanced)
            if stages is not None:
                self.note(stage_forecast_text(stages))

    def note(self, text: str) -> None:
        """Show a line, on rank 0."""
        if self.writer is not None:
            self.writer.note(text)


def build_controller(config: Config, policy: Policy) -> DropController:
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
        replicas="shared" if drop.policy == "none" else drop.replicas,  # nothing of it is checked with policy none
        replica=parallel_state.get_data_parallel_rank(),
        window=window,
    )
