"""What a run starts from: nothing, its own newest checkpoint, or another run's; decided before anything is built."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron.core import dist_checkpointing

from megatron_sbld.training.checkpoint import check_compatible
from megatron_sbld.training.checkpoint_files import (
    MANIFEST,
    CheckpointInfo,
    find_checkpoint,
    latest_complete,
    read_train_state,
    verify_weights,
)
from megatron_sbld.training.checkpoint_state import failures_name
from megatron_sbld.training.config import Config
from megatron_sbld.training.tokenizer import Tokenizer

_EMBEDDING = "embedding.word_embeddings.weight"


@dataclass(frozen=True)
class Start:
    """A checkpoint to start from: another run's weights alone, or all of the state of this run or another."""

    checkpoint: CheckpointInfo
    whole_state: bool
    vocab_size: int
    """Rows of its word embeddings. The model keeps them, because a layout that pads the vocabulary to another size
    would add rows that take part in every softmax, and with them to every loss."""


def find_start(config: Config, tokenizer: Tokenizer) -> Start | None:
    """Apply checkpoint.resume and checkpoint.load. Reads files only; every rank finds the same.

    Raises:
        ValueError: the checkpoint that the config asks for is not there, is damaged, or is of another model.
    """
    folder = Path(config.logging.run_dir) / "checkpoints"
    own = latest_complete(folder)
    if config.checkpoint.resume == "never" and own is not None:
        raise ValueError(
            f"checkpoint.resume = 'never': {folder} holds a checkpoint of iteration {own.iteration}; "
            "name another logging.run_dir, or use 'auto' to continue"
        )
    if config.checkpoint.resume == "always" and own is None:
        raise ValueError(f"checkpoint.resume = 'always': {folder} holds no complete checkpoint")
    if own is not None:
        return _checked_start(config, tokenizer, own, whole_state=True)
    return find_load(config, tokenizer)


def find_load(config: Config, tokenizer: Tokenizer) -> Start | None:
    """Apply checkpoint.load alone. Raises ValueError as `find_start` does."""
    if config.checkpoint.load is None:
        return None
    path, whole_state = Path(config.checkpoint.load), config.checkpoint.load_optimizer
    is_megatron_lm = (path / "metadata.json").exists() and not (path / MANIFEST).exists()
    found = CheckpointInfo(path, iteration=0) if is_megatron_lm and not whole_state else find_checkpoint(path)
    return _checked_start(config, tokenizer, found, whole_state)


def _checked_start(config: Config, tokenizer: Tokenizer, found: CheckpointInfo, whole_state: bool) -> Start:
    """Refuse a checkpoint of another model, as far as it tells: Megatron-LM's own have no manifest to compare with."""
    if (found.path / MANIFEST).exists():
        saved = read_train_state(found.path)
        check_compatible(
            saved.get("config", {}),
            config,
            saved_vocab_size=saved.get("vocab_size"),
            vocab_size=tokenizer.vocab_size,
        )
    rows = embedding_rows(found.path)
    tensor = config.parallel.tensor_model_parallel_size
    if rows < tokenizer.vocab_size:
        raise ValueError(
            f"checkpoint {found.path}: its word embeddings have {rows} rows, but data.tokenizer = {tokenizer.name!r} "
            f"has {tokenizer.vocab_size} tokens"
        )
    if rows % tensor:
        raise ValueError(
            f"parallel.tensor_model_parallel_size = {tensor}: must divide the {rows} rows of the word embeddings in "
            f"checkpoint {found.path}"
        )
    return Start(found, whole_state, rows)


def embedding_rows(path: Path) -> int:
    """Rows of the word embeddings in a torch_dist checkpoint. Raises ValueError if it is damaged."""
    verify_weights(path)
    with failures_name(path):
        rows: int = dist_checkpointing.load_tensors_metadata(str(path))[_EMBEDDING].global_shape[0]
    return rows
