"""What a run starts from: nothing, its own newest checkpoint, or another run's; decided before anything is built."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing

from megatron_sbld.checkpoint.files import (
    MANIFEST,
    CheckpointInfo,
    find_checkpoint,
    latest_complete,
    verify,
    verify_weights,
)
from megatron_sbld.checkpoint.layers import LAYERS, begun_layers
from megatron_sbld.checkpoint.manager import check_compatible, saved_model
from megatron_sbld.checkpoint.resume import Change, SavedRun, check_resume, find_changes, run_length
from megatron_sbld.checkpoint.state import failures_name
from megatron_sbld.config.run_length import RunLength
from megatron_sbld.config.sections import Config
from megatron_sbld.controller import CHECKPOINT_KEY
from megatron_sbld.data.blend import RunData
from megatron_sbld.data.tokenizer import Tokenizer
from megatron_sbld.mcore.compat import common_state

_EMBEDDING = "embedding.word_embeddings.weight"


@dataclass(frozen=True)
class Start:
    """A checkpoint to start from: another run's weights alone, or all of the state of this run or another."""

    checkpoint: CheckpointInfo
    whole_state: bool
    vocab_size: int
    """Rows of its word embeddings. The model keeps them, because a layout that pads the vocabulary to another size
    would add rows that take part in every softmax, and with them to every loss."""
    saved: SavedRun | None = None
    """What is to be continued, where all of the state is taken over."""
    changes: list[Change] = field(default_factory=list)
    """What the present config has otherwise than the saved one; of a run that goes on."""
    grown_from: list[int] | None = None
    """Layers that had begun in the checkpoint, where they are fewer than it or this model has.

    They are this run's first stage, or all of its layers. None: each layer is the checkpoint's own."""
    saved_layers: int = 0
    """Layers of that checkpoint."""


def planned_length(config: Config, start: Start | None) -> RunLength:
    """The length of a run, as planned when it began or when checkpoint.replan planned it anew."""
    if start is None or start.saved is None:
        return RunLength(config.training)
    return run_length(start.saved, config)


def find_start(config: Config, tokenizer: Tokenizer, data: RunData) -> Start | None:
    """Apply checkpoint.resume and checkpoint.load. Reads files only; every rank finds the same.

    Raises:
        ValueError: the checkpoint that the config asks for is not there, is damaged, is of another model, or plans the
            run otherwise than the config does.
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
        start: Start | None = _checked_start(config, tokenizer, own, whole_state=True)
    else:
        start = find_load(config, tokenizer)
    if start is not None and start.saved is not None:
        try:
            start = dataclasses.replace(start, changes=check_resume(start.saved, config, data.train.facts))
        except ValueError as error:
            raise ValueError(f"checkpoint {start.checkpoint.path}: {error}") from error
    return start


def find_load(config: Config, tokenizer: Tokenizer) -> Start | None:
    """Apply checkpoint.load alone, however the saved run was planned. Raises ValueError as `find_start` does."""
    if config.checkpoint.load is None:
        return None
    path, whole_state = Path(config.checkpoint.load), config.checkpoint.load_optimizer
    is_megatron_lm = (path / "metadata.json").exists() and not (path / MANIFEST).exists()
    found = CheckpointInfo(path, iteration=0) if is_megatron_lm and not whole_state else find_checkpoint(path)
    return _checked_start(config, tokenizer, found, whole_state)


def _checked_start(config: Config, tokenizer: Tokenizer, found: CheckpointInfo, whole_state: bool) -> Start:
    """Refuse a checkpoint of another model, as far as it tells: Megatron-LM's own have no manifest to compare with."""
    growing = not whole_state and config.drop.policy != "none" and config.drop.stages is not None
    if (found.path / MANIFEST).exists():
        saved, begun, saved_layers = _read_saved_run(config, tokenizer, found, whole_state, growing)
    else:
        saved, begun, saved_layers = None, *_layers_without_manifest(config, found.path, growing)
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
    if not whole_state:
        saved = None
    changes = find_changes(saved.config, config) if saved else []
    takes_all = whole_state or len(begun) == saved_layers == config.model.num_layers
    return Start(found, whole_state, rows, saved, changes, None if takes_all else begun, saved_layers)


def _read_saved_run(
    config: Config, tokenizer: Tokenizer, found: CheckpointInfo, whole_state: bool, growing: bool
) -> tuple[SavedRun, list[int], int]:
    """What a checkpoint of ours says: the run, its layers that had begun, how many it has. Raises as _checked_start."""
    manifest = verify(found.path)
    saved = SavedRun(manifest.iteration, manifest.layout, manifest.train_state)
    saved_layers = saved_model(saved.config).num_layers
    begun = begun_layers(saved.train_state.get("drop"), saved_layers)
    check_compatible(
        saved.config,
        config,
        saved_vocab_size=saved.train_state.get("vocab_size"),
        vocab_size=tokenizer.vocab_size,
        begun=None if whole_state else len(begun),
        growing=growing,
    )
    if saved.train_state.get("tokenizer", tokenizer.fingerprint()) != tokenizer.fingerprint():
        raise ValueError(
            f"checkpoint {found.path}: data.tokenizer = {tokenizer.name!r} encodes text differently from the tokenizer "
            "that the checkpoint was trained with"
        )
    return saved, begun, saved_layers


def _layers_without_manifest(config: Config, path: Path, growing: bool) -> tuple[list[int], int]:
    """The layers of a Megatron-LM checkpoint that had begun, and how many it has. Raises as _checked_start."""
    layers = config.model.num_layers
    saved_layers = saved_depth(path) or layers
    begun = begun_layers(patched_drop_state(path), saved_layers)
    if len(begun) > layers or (len(begun) < layers and not growing):
        others = "" if len(begun) == saved_layers else " that had begun: its run was still growing"
        raise ValueError(
            f"checkpoint {path}: model.num_layers is {layers}, but the checkpoint has {len(begun)}{others}"
        )
    return begun, saved_layers


def embedding_rows(path: Path) -> int:
    """Rows of the word embeddings in a torch_dist checkpoint. Raises ValueError if it is damaged."""
    verify_weights(path)
    with failures_name(path):
        rows: int = dist_checkpointing.load_tensors_metadata(str(path))[_EMBEDDING].global_shape[0]
    return rows


def saved_depth(path: Path) -> int | None:
    """Layers in a torch_dist checkpoint whose layers are alike, as Megatron-LM writes them; None in any other."""
    with failures_name(path):
        tensors = dist_checkpointing.load_tensors_metadata(str(path))
    for name, tensor in tensors.items():
        if name.startswith(LAYERS) and not name.removeprefix(LAYERS)[0].isdigit():
            depth: int = tensor.global_shape[0]
            return depth
    return None


def patched_drop_state(path: Path) -> Mapping[str, Any] | None:
    """The drop state in a checkpoint of a patched Megatron-LM; None in any other."""
    with failures_name(path):
        scheduler = common_state(path).get("opt_param_scheduler") or {}
    found: Mapping[str, Any] | None = (scheduler.get(CHECKPOINT_KEY) or {}).get("drop")
    return found
