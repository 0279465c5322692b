"""`megatron-sbld export hf`: a checkpoint as a folder that Hugging Face's transformers loads.

Runs in one process on the CPU and builds no model: weights are read a layer at a time and written a shard at a time, so
memory is bounded by the two together. Rows of the vocabulary that only pad it are left out.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_sbld.checks import check_choice
from megatron_sbld.config.files import read_config
from megatron_sbld.config.sections import Config, ModelConfig, TrainingConfig
from megatron_sbld.config.validate import validate
from megatron_sbld.data.tokenizer import Tokenizer
from megatron_sbld.evaluation.model import TrainedModel, is_anonymous, read_trained_model
from megatron_sbld.hf.format import EMBEDDING, OUTPUT, Format, Rule, positions
from megatron_sbld.hf.formats import format_of_model
from megatron_sbld.hf.options import ExportDtype
from megatron_sbld.hf.safetensors_files import ShardWriter, parse_size
from megatron_sbld.hf.stored_weights import StoredWeights
from megatron_sbld.hf.tokenizer import write_tokenizer
from megatron_sbld.training.model import DTYPES


@dataclass(frozen=True)
class Exported:
    """What was written."""

    folder: Path
    files: list[str]
    """With weights."""
    format: str
    parameters: int
    vocab_size: int
    stripped_rows: int
    """Rows of the vocabulary that were padding."""
    notes: list[str]
    """What a reader should know: layers that had not begun, and what the format does not hold."""

    def summary(self) -> str:
        """For the console."""
        padding = f", {self.stripped_rows} rows of padding left out" if self.stripped_rows else ""
        lines = [
            f"{self.folder}: {self.format} format, {self.parameters:,} parameters in {len(self.files)} file"
            f"{'s' if len(self.files) > 1 else ''}, {self.vocab_size} tokens{padding}"
        ]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


@dataclass(frozen=True)
class _Source:
    """A checkpoint and what is known of it."""

    weights: StoredWeights
    model: ModelConfig
    tokenizer: Tokenizer
    trained: TrainedModel

    def saved_layer(self, layer: int) -> int:
        """Where a layer (from 0) is in the checkpoint, which may hold some that have not begun."""
        layers = self.trained.layers
        return layer if layers is None else layers.places[layer + 1] - 1

    @property
    def num_saved(self) -> int:
        """Layers of the checkpoint."""
        return self.model.num_layers if self.trained.layers is None else self.trained.layers.num_saved


def export_hf(
    checkpoint: str,
    out: str,
    *,
    dtype: str = "as-saved",
    max_shard_size: str = "5GB",
    tokenizer: str | None = None,
    config: str | None = None,
) -> Exported:
    """Write a checkpoint as a folder for transformers.

    Args:
        checkpoint: ours (its folder, a folder of checkpoints or a run folder), or Megatron-LM's (torch_dist).
        out: folder to make; it may exist if it is empty.
        dtype: fp32, bf16, fp16 or as-saved.
        max_shard_size: of a file with weights, such as 5GB.
        tokenizer: its spec; None is the one that the run was trained with, at the path that it had.
        config: YAML config with the model section of a checkpoint of Megatron-LM.

    Raises:
        ValueError: no format holds the model, the checkpoint is damaged, or the tokenizer is another one.
    """
    check_choice("--dtype", dtype, get_args(ExportDtype))
    target, shard_bytes = Path(out), parse_size("--max_shard_size", max_shard_size)
    check_free(target)
    source = _open(Path(checkpoint), tokenizer, config)
    form, vocab_size = format_of_model(source.model), source.tokenizer.vocab_size
    plan = list(_plan(source, form))
    source.weights.refuse_others()
    with written_at_once(target) as folder:
        writer = ShardWriter(folder, shard_bytes)
        parameters = 0
        with progress_bar("exporting", len(plan)) as advance:
            for name, index, rule in plan:
                rows = vocab_size if name in (EMBEDDING, OUTPUT) else None
                tensor = source.weights.read(name, index, rows)
                for their_name, part in zip(rule.theirs, rule.split(tensor), strict=True):
                    writer.add(their_name, part if dtype == "as-saved" else part.to(DTYPES[dtype]))
                    parameters += part.numel()
                advance()
        files = writer.close()
        saved_as = source.weights.dtype(EMBEDDING) if dtype == "as-saved" else DTYPES[dtype]
        _write_configs(folder, form, source, saved_as)
        write_tokenizer(source.tokenizer, folder, positions(source.model))
    return Exported(
        folder=target,
        files=files,
        format=form.title,
        parameters=parameters,
        vocab_size=vocab_size,
        stripped_rows=source.weights.shape(EMBEDDING)[0] - vocab_size,
        notes=[*filter(None, [source.trained.growing]), *_notes(form, source.model)],
    )


def check_free(folder: Path) -> None:
    """Refuse a folder to be made that has something in it. Raises ValueError naming it."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: exists and is not an empty folder; name another one")


@contextmanager
def written_at_once(folder: Path) -> Iterator[Path]:
    """A folder beside the one that is to be made, which gets its name when all has been written, and is gone else.

    Raises:
        ValueError: a process that was killed has left one, or another one is writing it.
    """
    folder = Path(os.path.realpath(folder))  # of a link to an empty folder that folder gets the content
    unfinished = folder.parent / f"{folder.name}.incomplete"
    try:
        unfinished.mkdir(parents=True)
    except FileExistsError:
        raise ValueError(f"{unfinished}: exists; remove it unless another process is writing it") from None
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from error
    try:
        yield unfinished
        if folder.exists():
            folder.rmdir()
        unfinished.rename(folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


@contextmanager
def progress_bar(doing: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar of so many weights on a terminal; yields what counts one."""
    console = Console(stderr=True)
    columns = TextColumn(f"{doing} weights"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=total)
        yield lambda: progress.advance(task)


def check_model(model: ModelConfig, described_in: str) -> None:
    """Refuse sizes that no model of ours can have. Raises ValueError naming the file and the field."""
    try:
        validate(Config(model=model, training=TrainingConfig(train_iters=1)), None, trains=False)
    except ValueError as error:
        raise ValueError(f"{described_in}: describes a model that cannot be represented: {error}") from error


def _open(path: Path, tokenizer: str | None, config_file: str | None) -> _Source:
    if config_file is not None and not is_anonymous(path):
        raise ValueError(
            f"--config {config_file}: checkpoint {path} already says which model it holds; leave out this option"
        )
    config = None if config_file is None else read_config(config_file)
    trained = read_trained_model(path, tokenizer, config)
    if config_file is not None:
        check_model(trained.model, config_file)
    return _Source(StoredWeights(trained.checkpoint.path), trained.model, trained.tokenizer, trained)


def _plan(source: _Source, form: Format) -> Iterator[tuple[str, int | None, Rule]]:
    """Where each weight is stored, and its rule; all of them are looked up before the first is read."""
    weights, model = source.weights, source.model
    rows = weights.shape(EMBEDDING)[0]
    for rule in [*form.vocabulary_rules(model, rows), *form.outer_rules(model)]:
        weights.check(rule.ours, None, rule.shape)
        yield rule.ours, None, rule
    for layer in range(model.num_layers):
        for rule in form.layer_rules(model, layer):
            name, index = weights.of_layer(rule.ours, source.saved_layer(layer), source.num_saved)
            weights.check(name, index, rule.shape)
            yield name, index, rule


def _write_configs(folder: Path, form: Format, source: _Source, dtype: torch.dtype) -> None:
    model, eod, name = source.model, source.tokenizer.eod, str(dtype).removeprefix("torch.")
    config = {
        "architectures": [form.architecture],
        "model_type": form.model_type,
        "vocab_size": source.tokenizer.vocab_size,
        **form.config(model),
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "initializer_range": model.init_method_std,
        "bos_token_id": eod,
        "eos_token_id": eod,
        "use_cache": True,
        "torch_dtype": name,  # read by transformers 4
        "dtype": name,  # by 5
    }
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", {"bos_token_id": eod, "eos_token_id": eod})


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _notes(form: Format, model: ModelConfig) -> list[str]:
    if form.model_type == "llama" and model.hidden_dropout:
        return [f"model.hidden_dropout = {model.hidden_dropout} is lost: the Llama format has no field for it"]
    return []
