"""Saving a run, and continuing it: on its own layout bit for bit, on another with the same weights and moments.

`CheckpointManager` writes, `load_checkpoint` continues a run, `load_weights` takes the weights of any torch_dist
checkpoint, Megatron-LM's included; each is collective over all ranks. `check_compatible` compares a saved config with
the present one before a model is built. What is in a checkpoint is state.py's, files and completeness are
files.py's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch.distributed.checkpoint import CheckpointException

from megatron_sbld.checkpoint import files
from megatron_sbld.checkpoint import state as content
from megatron_sbld.checkpoint.files import Layout
from megatron_sbld.checkpoint.layers import LayerMap
from megatron_sbld.config.flops import ffn_hidden_size
from megatron_sbld.config.sections import Config, ModelConfig
from megatron_sbld.controller import CHECKPOINT_KEY
from megatron_sbld.mcore.optimizer.params import gather_params
from megatron_sbld.mcore.optimizer.state import load_state, sharded_state
from megatron_sbld.mcore.rng_state import reseed, restore_rng_state, sharded_rng_state
from megatron_sbld.ranks import on_rank_0

logger = logging.getLogger(__name__)

T = TypeVar("T")
OptimizerFormat = Literal["fully_reshardable", "dp_reshardable"]


class CheckpointManager:
    """Writes checkpoints into one folder: atomically, optionally in the background, keeping the last few.

    A save is complete once its folder has lost the ending `.incomplete`; a process killed before that leaves the former
    checkpoints as they were.
    """

    def __init__(
        self,
        directory: Path,
        *,
        keep_last: int | None = None,
        async_save: bool = False,
        optimizer_format: OptimizerFormat = "fully_reshardable",
    ) -> None:
        """Create the folder, or remove what an interrupted save left in it. Collective.

        Args:
            directory: where checkpoints go.
            keep_last: complete checkpoints that are kept, at least 1; None keeps all.
            async_save: copy the state to host memory, then write it in a thread while training goes on.
            optimizer_format: how the distributed optimizer's state is saved. fully_reshardable gathers it over
                data-parallel ranks and can be loaded on any layout; dp_reshardable costs no communication, but only the
                data-parallel size may change.
        """
        if keep_last is not None and keep_last < 1:
            raise ValueError(f"checkpoint.keep_last is {keep_last}: must be at least 1, or None to keep all")
        if optimizer_format not in get_args(OptimizerFormat):
            raise ValueError(f"optimizer_format is {optimizer_format!r}: must be one of {get_args(OptimizerFormat)}")
        self._directory = Path(directory)
        self._keep_last = keep_last
        self._async = async_save
        self._optimizer_format = optimizer_format
        # A group of its own, so that a thread can use it while training uses the others.
        self._group = dist.new_group(backend="gloo")
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        on_rank_0(self._prepare_directory)

    def save(
        self,
        iteration: int,
        model_chunks: Sequence[torch.nn.Module],
        optimizer: MegatronOptimizer,
        scheduler: OptimizerParamScheduler,
        train_state: dict[str, Any],
    ) -> None:
        """Save the state of this moment; with async_save it is complete once `poll` or `close` has seen it through.

        Waits for a background save that is still under way. An iteration that has a complete checkpoint is not saved
        again.

        Args:
            iteration: iterations done.
            model_chunks: this rank's model chunks, wrapped or not.
            optimizer: Megatron's optimizer.
            scheduler: Megatron's parameter scheduler.
            train_state: the trainer's own state, JSON-able; rank 0's is kept.

        Raises:
            ValueError: train_state cannot be written as JSON.
            RuntimeError: writing failed on some rank (as when its disk is full); raised on every rank.
        """
        self.close()
        train_state = files.encode_train_state(train_state)
        if on_rank_0(lambda: files.is_complete(files.checkpoint_path(self._directory, iteration))):
            return
        layout = content.current_layout(model_chunks, optimizer, self._optimizer_format)
        state = _state_to_save(iteration, model_chunks, optimizer, scheduler, layout)
        if "drop" in train_state:  # where a patched Megatron-LM looks for it; megatron-core passes over it
            state["opt_param_scheduler"][CHECKPOINT_KEY] = {
                "drop": train_state["drop"],
                "sensitivity": train_state.get("sensitivity"),
            }
            if "lr_plan" in train_state:  # the schedule has counted layer-tokens
                rate = {"consumed_layer_tokens": train_state["consumed_layer_tokens"]}
                state["opt_param_scheduler"][CHECKPOINT_KEY]["rate"] = rate
        job = _Job(iteration, layout, train_state, content.take_snapshot(state, copy=self._async))
        if not self._async:
            self._write(job)
            return
        # A daemon, so that a training loop that fails is not kept alive by its last checkpoint.
        self._thread = threading.Thread(target=self._write_in_background, args=(job,), daemon=True)
        self._thread.start()

    def poll(self) -> None:
        """Look after a background save; to be called by all ranks once an iteration. Raises what the save raised."""
        if self._thread is None:
            return
        done = torch.tensor([not self._thread.is_alive()], dtype=torch.int, device=torch.cuda.current_device())
        dist.all_reduce(done, op=dist.ReduceOp.MIN)
        if done.item():
            self.close()

    def close(self) -> None:
        """Wait for a background save, if there is one. Raises what the save raised."""
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _prepare_directory(self) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        files.remove_incomplete(self._directory)

    def _write_in_background(self, job: _Job) -> None:
        try:
            self._write(job)
        except BaseException as failure:  # raised again in the thread that trains
            self._failure = failure

    def _write(self, job: _Job) -> None:
        """Write every rank's files, then make the folder a checkpoint. A failure on any rank is raised on all."""
        folder = files.incomplete_path(self._directory, job.iteration)
        first = dist.get_rank() == 0
        try:
            self._on_all_ranks(lambda: content.write_common(folder, job.snapshot) if first else None)
            self._on_all_ranks(lambda: content.write_shards(folder, job.snapshot, self._group))
            self._on_all_ranks(lambda: self._publish(job) if first else None)
        except _WriteError as failure:
            if first:
                with contextlib.suppress(OSError):
                    files.remove(folder)
            raise RuntimeError(
                f"checkpoint of iteration {job.iteration} could not be written to {self._directory}; those before it "
                f"are as they were. {failure}"
            ) from failure

    def _publish(self, job: _Job) -> None:
        newest = files.publish(self._directory, job.iteration, job.layout, job.train_state)
        logger.info("saved checkpoint %s", newest.path)
        if self._keep_last is not None:
            files.prune(self._directory, self._keep_last, newest)

    def _on_all_ranks(self, step: Callable[[], None]) -> None:
        """Do a step of saving, wait for all ranks, and raise _WriteError on each of them if any failed."""
        failure = None
        try:
            step()
        except CheckpointException as error:  # raised on every rank, for those that failed
            own = error.failures.get(dist.get_rank())
            failure = content.reason(own[0]) if own else None
        except Exception as error:
            failure = content.reason(error)
        failures: list[str | None] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(failures, failure, group=self._group)
        reasons = {rank: text for rank, text in enumerate(failures) if text}
        if reasons:
            raise _WriteError(content.by_rank(reasons))


@dataclasses.dataclass(frozen=True)
class _Job:
    """A checkpoint that is to be written."""

    iteration: int
    layout: Layout
    train_state: dict[str, Any]
    snapshot: content.Snapshot


class _WriteError(Exception):
    """A step of saving failed on some rank."""


def load_checkpoint(
    path: Path,
    model_chunks: Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    *,
    seed: int,
) -> dict[str, Any]:
    """Continue a saved run: weights, optimizer, scheduler and random states; returns its train state. Collective.

    On the layout that saved it, training goes on bit for bit. On another, random states cannot be mapped: they start
    anew as a function of `seed` and the iteration, which is logged once.

    Args:
        path: a checkpoint of megatron-sbld.
        model_chunks: this rank's model chunks, wrapped or not.
        optimizer: Megatron's optimizer, of the same kind (distributed or not) and precision as the saved one.
        scheduler: Megatron's parameter scheduler.
        seed: of the run, for another layout.

    Raises:
        ValueError: the checkpoint is not complete, cannot be read, or does not fit this model, optimizer or layout.
    """
    path = Path(path)
    manifest = on_rank_0(lambda: files.verify(path))
    saved = manifest.layout
    distributed_format = content.FULLY_RESHARDABLE
    if saved.optimizer_format != content.NOT_DISTRIBUTED:
        distributed_format = saved.optimizer_format
    present = on_rank_0(lambda: content.current_layout(model_chunks, optimizer, distributed_format))
    content.check_layout(path, saved=saved, present=present)

    metadata = content.content_metadata(present.optimizer_format)
    state = content.model_state(model_chunks, metadata)
    state["optimizer"] = sharded_state(optimizer, state, content.with_group(metadata), is_loading=True)
    if present == saved:
        state["rng_state"] = sharded_rng_state(is_loading=True)
    with content.failures_name(path):
        loaded = content.read(path, state, ignored=() if present == saved else ("rng_state",))
        content.load_model(model_chunks, loaded)
        load_state(optimizer, loaded["optimizer"])
        scheduler.load_state_dict(loaded["opt_param_scheduler"])
    if present == saved:
        restore_rng_state(loaded["rng_state"])
    else:
        reseed(seed, manifest.iteration)
        if dist.get_rank() == 0:
            logger.info("checkpoint %s was saved on another layout: random states (dropout) start anew", path)
    return manifest.train_state


def load_weights(
    path: Path,
    model_chunks: Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer | None = None,
    layers: LayerMap | None = None,
) -> None:
    """Load the weights alone from any torch_dist checkpoint, Megatron-LM's or ours, saved on any layout. Collective.

    Args:
        path: the checkpoint's own folder.
        model_chunks: this rank's model chunks, wrapped or not.
        optimizer: its fp32 copies of the weights are renewed; None if there is none.
        layers: which layers of the checkpoint go where; the model's others keep their weights. None: each to its own.

    Raises:
        ValueError: it is not a checkpoint, is damaged, or is of another model.
    """
    path = Path(path)
    on_rank_0(lambda: files.verify_weights(path))
    with content.failures_name(path):
        state = content.model_state(model_chunks, content.content_metadata(content.NOT_DISTRIBUTED), layers)
        others = ("optimizer", "chained_", "rng_state", "rerun_state_machine")
        loaded = content.read(path, state, ignored=others, partly=layers is not None)
        content.load_model(model_chunks, loaded)
    if optimizer is not None:
        optimizer.reload_model_params()


def check_compatible(
    saved_config: Mapping[str, Any],
    config: Config,
    *,
    saved_vocab_size: int | None = None,
    vocab_size: int | None = None,
    begun: int | None = None,
    growing: bool = False,
) -> None:
    """Refuse a checkpoint whose weights do not fit the model that a config describes.

    Args:
        saved_config: `dataclasses.asdict` of the config that was saved.
        config: the present one.
        saved_vocab_size: tokens of the saved run's tokenizer; compared where both are given.
        vocab_size: tokens of the present tokenizer.
        begun: layers that had begun in the checkpoint, where these alone are taken; None: all are.
        growing: whether the model may have more layers than are taken.

    Raises:
        ValueError: names every field that differs, its value and the checkpoint's.
    """
    present, saved = _fields_of_weights(config.model), _fields_of_weights(saved_model(saved_config))
    note = ""
    if begun is not None and begun < saved["num_layers"]:
        saved["num_layers"], note = begun, " that had begun: its run was still growing"
    problems = [
        f"model.{name} is {present[name]!r}, but the checkpoint has {saved[name]!r}{note * (name == 'num_layers')}"
        for name in present
        if present[name] != saved[name] and not (growing and name == "num_layers" and present[name] > saved[name])
    ]
    if None not in (saved_vocab_size, vocab_size) and vocab_size != saved_vocab_size:
        problems.append(f"data.tokenizer has {vocab_size} tokens, but the checkpoint's model {saved_vocab_size}")
    if problems:
        raise ValueError("the checkpoint holds another model: " + "; ".join(problems))


def saved_model(saved_config: Mapping[str, Any]) -> ModelConfig:
    """The model section of a saved config (`dataclasses.asdict`); what either version does not know takes its default.

    Raises:
        ValueError: there is none that can be read.
    """
    names = {field.name for field in dataclasses.fields(ModelConfig)}
    try:
        return ModelConfig(**{name: value for name, value in saved_config["model"].items() if name in names})
    except (KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"the checkpoint's config has no model section that can be read: {error!r}") from error


def _fields_of_weights(model: ModelConfig) -> dict[str, Any]:
    """What decides the shape and the meaning of the weights, with defaults resolved."""
    rope = model.position_embedding_type == "rope"
    return {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": model.num_query_groups or model.num_attention_heads,
        "kv_channels": model.kv_channels or model.hidden_size // model.num_attention_heads,
        "ffn_hidden_size": ffn_hidden_size(model),
        "activation_func": model.activation_func,
        "swiglu": model.swiglu,
        "add_bias_linear": model.add_bias_linear,
        "normalization": model.normalization,
        "position_embedding_type": model.position_embedding_type,
        "max_position_embeddings": None if rope else model.max_position_embeddings or model.seq_length,
        "rotary_base": model.rotary_base if rope else None,
        "rotary_percent": model.rotary_percent if rope else None,
        "untie_embeddings_and_output_weights": model.untie_embeddings_and_output_weights,
    }


def _state_to_save(
    iteration: int,
    model_chunks: Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    layout: Layout,
) -> dict[str, Any]:
    """Megatron-LM's state dict of a run. Collective."""
    metadata = content.content_metadata(layout.optimizer_format)
    gather_params(model_chunks)
    state = content.model_state(model_chunks, metadata)
    state["optimizer"] = sharded_state(optimizer, state, content.with_group(metadata))
    state["opt_param_scheduler"] = scheduler.state_dict()
    state["rng_state"] = sharded_rng_state()
    state.update(iteration=iteration, checkpoint_version=3.0, content_metadata=metadata)
    return state
