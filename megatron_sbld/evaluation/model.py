"""From a checkpoint to a model in evaluation mode, on any layout, with the tokenizer that it was trained with."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_sbld.checkpoint.files import (
    MANIFEST,
    CheckpointInfo,
    all_complete,
    find_checkpoint,
    read_train_state,
)
from megatron_sbld.checkpoint.layers import LayerMap, begun_layers
from megatron_sbld.checkpoint.manager import load_weights, saved_model
from megatron_sbld.checkpoint.start import embedding_rows, patched_drop_state
from megatron_sbld.config.files import read_config
from megatron_sbld.config.sections import Config, DataConfig, ModelConfig, ParallelConfig, TrainingConfig
from megatron_sbld.config.validate import validate
from megatron_sbld.data.tokenizer import Tokenizer, load_tokenizer
from megatron_sbld.evaluation.options import ModelOptions
from megatron_sbld.training.model import build_chunks, check_model

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainedModel:
    """What a checkpoint says of its model; read from its files alone."""

    checkpoint: CheckpointInfo
    model: ModelConfig
    tokenizer: Tokenizer
    rows: int
    """Rows of its word embeddings, padding included."""
    precision: str
    """fp32, bf16 or fp16: what it was trained in; fp32 where the checkpoint does not say."""
    consumed_tokens: int | None
    """Tokens that it was trained on; None where the checkpoint does not say, as in the next."""
    train_time_s: float | None
    seed: int | None
    layers: LayerMap | None = None
    """The checkpoint's layers that had begun, which are the model's; None where all of them had."""

    @property
    def growing(self) -> str | None:
        """A line on a run that was still growing when it was saved."""
        if self.layers is None:
            return None
        places = ", ".join(map(str, self.layers.places.values()))
        return (
            f"iteration {self.checkpoint.iteration:,}: the run was still growing, and {len(self.layers.places)} of its "
            f"{self.layers.num_saved} layers had begun ({places}): the model has these alone"
        )

    @property
    def run_dir(self) -> Path | None:
        """The run folder that the checkpoint lies in, RUN/checkpoints/iter_N; None where it lies elsewhere."""
        folder = self.checkpoint.path.absolute().parent
        run_dir = folder.parent
        return run_dir if folder.name == "checkpoints" and (run_dir / "config.yaml").exists() else None


def read_trained_models(paths: Sequence[str], options: ModelOptions, *, every_checkpoint: bool) -> list[TrainedModel]:
    """What is known of the models of several checkpoints, in this order, those of a folder by iteration.

    Args:
        paths: checkpoints, or folders of checkpoints or run folders.
        options: where their tokenizer and their config are.
        every_checkpoint: take all complete checkpoints of a folder instead of the newest.

    Raises:
        ValueError: as `read_trained_model` does, or a checkpoint is named twice.
    """
    config = None if options.config is None else read_config(options.config)
    found = [found for path in paths for found in (_checkpoints_in(Path(path)) if every_checkpoint else [Path(path)])]
    models = [read_trained_model(path, options.tokenizer, config) for path in found]
    resolved = [trained.checkpoint.path.resolve() for trained in models]
    repeated = [path for path in resolved if resolved.count(path) > 1]
    if repeated:
        raise ValueError(f"checkpoint {repeated[0]} is named more than once")
    return models


def _checkpoints_in(path: Path) -> list[Path]:
    """All complete checkpoints of a folder of checkpoints or a run folder; a checkpoint itself is one."""
    for folder in (path, path / "checkpoints"):
        complete = all_complete(folder)
        if complete:
            return [info.path for info in complete]
    return [path]


def read_trained_model(path: Path, tokenizer: str | None = None, config: Config | None = None) -> TrainedModel:
    """What is known of a checkpoint's model.

    Args:
        path: a checkpoint, or a folder of checkpoints or a run folder, whose newest complete one is taken.
        tokenizer: where the tokenizer is now, as data.tokenizer; None is where it was in training.
        config: describes the model of a checkpoint that does not, as Megatron-LM's.

    Raises:
        ValueError: no complete checkpoint, none that says what its model is, or another tokenizer than it was trained
            with.
    """
    if is_anonymous(path):
        return _read_without_manifest(path, tokenizer, config)
    found = find_checkpoint(path)
    state = read_train_state(found.path)
    saved: Mapping[str, Any] = state.get("config", {})
    model = saved_model(saved)
    begun = begun_layers(state.get("drop"), model.num_layers)
    layers = LayerMap.of_begun(begun, model.num_layers)
    loaded = _saved_tokenizer(found.path, state, tokenizer)
    samples = state.get("consumed_samples")
    return TrainedModel(
        checkpoint=found,
        model=dataclasses.replace(model, num_layers=len(begun)),
        layers=layers,
        tokenizer=loaded,
        rows=_checked_rows(found.path, loaded),
        precision=saved.get("training", {}).get("precision", "fp32"),
        consumed_tokens=state.get("consumed_tokens", None if samples is None else samples * model.seq_length),
        train_time_s=state.get("train_time_s"),
        seed=saved.get("training", {}).get("seed"),
    )


def is_anonymous(path: Path) -> bool:
    """Whether a folder is a checkpoint that does not say what model it holds, as Megatron-LM's."""
    return (path / "metadata.json").exists() and not (path / MANIFEST).exists()


def _saved_tokenizer(path: Path, state: Mapping[str, Any], spec: str | None) -> Tokenizer:
    """The tokenizer that a run was trained with. Raises ValueError if this is another one, or it is not there."""
    try:
        trained_with, fingerprint = state["config"]["data"]["tokenizer"], state["tokenizer"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"checkpoint {path}: {MANIFEST} does not say which tokenizer it is of ({error})") from error
    try:
        loaded = load_tokenizer(spec or trained_with)
    except ValueError as error:
        if spec is not None:
            raise
        raise ValueError(f"checkpoint {path}: {error}; give --tokenizer SPEC") from error
    if loaded.fingerprint() != fingerprint:
        raise ValueError(
            f"tokenizer {loaded.name!r}: encodes differently from the one that checkpoint {path} was trained with "
            f"({trained_with!r})"
        )
    return loaded


def _read_without_manifest(path: Path, tokenizer: str | None, config: Config | None) -> TrainedModel:
    if config is None:
        raise ValueError(
            f"checkpoint {path}: does not say what model it holds; give --config FILE with its model section and its "
            "data.tokenizer"
        )
    loaded = load_tokenizer(tokenizer or config.data.tokenizer)
    name = path.name.removeprefix("iter_")
    begun = begun_layers(patched_drop_state(path), config.model.num_layers)
    return TrainedModel(
        checkpoint=CheckpointInfo(path, iteration=int(name) if name.isdecimal() else 0),
        model=dataclasses.replace(config.model, num_layers=len(begun)),
        layers=LayerMap.of_begun(begun, config.model.num_layers),
        tokenizer=loaded,
        rows=_checked_rows(path, loaded),
        precision=config.training.precision,
        consumed_tokens=None,
        train_time_s=None,
        seed=None,
    )


def _checked_rows(path: Path, tokenizer: Tokenizer) -> int:
    rows = embedding_rows(path)
    if rows < tokenizer.vocab_size:
        raise ValueError(
            f"checkpoint {path}: its word embeddings have {rows} rows, but tokenizer {tokenizer.name!r} has "
            f"{tokenizer.vocab_size} tokens"
        )
    return rows


def evaluation_config(
    trained: TrainedModel, parallel: ParallelConfig, world_size: int, precision: str | None = None
) -> Config:
    """The config of a run that evaluates: the checkpoint's model on another layout.

    Args:
        trained: the model.
        parallel: the layout.
        world_size: processes.
        precision: None is that of training on a GPU, and fp32 on a CPU, where the others are slow.

    Raises:
        ValueError: the model cannot be spread like that.
    """
    if precision is None:
        precision = trained.precision if torch.cuda.is_available() else "fp32"
    config = Config(
        model=trained.model,
        parallel=parallel,
        data=DataConfig(tokenizer=trained.tokenizer.name),
        training=TrainingConfig(train_iters=1, global_batch_size=world_size, precision=precision),  # type: ignore[arg-type]
    )
    validate(config, world_size, trains=False)
    check_model(config)
    if trained.rows % parallel.tensor_model_parallel_size:
        raise ValueError(
            f"parallel.tensor_model_parallel_size = {parallel.tensor_model_parallel_size}: must divide the "
            f"{trained.rows} rows of the word embeddings in checkpoint {trained.checkpoint.path}"
        )
    return config


def load_chunks(trained: TrainedModel, config: Config) -> list[torch.nn.Module]:
    """This rank's chunks of the model with the checkpoint's weights, in evaluation mode. Collective.

    Raises:
        ValueError: the checkpoint is damaged, or its model is not the one that its config describes.
    """
    if trained.growing is not None and dist.get_rank() == 0:
        logger.warning("%s", trained.growing)
    chunks = build_chunks(config, trained.rows)
    load_weights(trained.checkpoint.path, chunks, layers=trained.layers)
    for chunk in chunks:
        chunk.eval()
    return chunks
