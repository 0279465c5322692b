"""`megatron-sbld import hf`: a model in Hugging Face's GPT-2, Llama or GPT-NeoX format as a checkpoint of ours.

    OUT/config.yaml                 to start from: model, tokenizer, precision, and checkpoint.load
        checkpoints/iter_0000000/   weights alone, for any parallel layout
        tokenizer/                  a copy of the tokenizer's files

Reads and writes one weight at a time; nothing but tensors is loaded from the source, no code of it is run.
"""

from __future__ import annotations

import dataclasses
import io
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch

from megatron_sbld.checkpoint import files
from megatron_sbld.checkpoint import state as content
from megatron_sbld.checks import check_choice, check_integer
from megatron_sbld.config.sections import CheckpointConfig, Config, DataConfig, ModelConfig, Precision, TrainingConfig
from megatron_sbld.data.tokenizer import Tokenizer
from megatron_sbld.files.strict_json import load_json
from megatron_sbld.files.strict_yaml import dump_yaml
from megatron_sbld.hf.export_model import check_free, check_model, progress_bar, written_at_once
from megatron_sbld.hf.format import EMBEDDING, OUTPUT, FieldReader, Format, Rule
from megatron_sbld.hf.formats import format_of_config
from megatron_sbld.hf.safetensors_files import TensorFolder
from megatron_sbld.hf.stored_weights import LAYERS, Piece, write_pieces
from megatron_sbld.hf.tokenizer import added_at_ends, import_tokenizer
from megatron_sbld.training.model import DTYPES


@dataclass(frozen=True)
class Imported:
    """What was written."""

    folder: Path
    format: str
    parameters: int
    vocab_size: int
    rows: int
    """Of the word embeddings."""
    precision: str
    notes: list[str]

    def summary(self) -> str:
        """For the console."""
        lines = [
            f"{self.folder}: {self.format} format, {self.parameters:,} parameters in {self.precision}, "
            f"{self.vocab_size} tokens in {self.rows} rows",
            *(f"note: {note}" for note in self.notes),
            f"train from it with: megatron-sbld pretrain --config {self.folder / 'config.yaml'} "
            "--data.train_data_path [PREFIX] --training.train_iters N --logging.run_dir DIR",
        ]
        return "\n".join(lines)


def import_hf(
    source: str,
    out: str,
    *,
    precision: str | None = None,
    tokenizer: str | None = None,
    pad_vocab_to_multiple_of: int = 1,
) -> Imported:
    """Make a checkpoint of a folder in Hugging Face's format.

    Args:
        source: local folder with config.json and weights.
        out: folder to make; it may exist if it is empty.
        precision: fp32, bf16 or fp16; None is that of the word embeddings in the source.
        tokenizer: its spec; None looks into the source.
        pad_vocab_to_multiple_of: copies of the last row are appended until the vocabulary's rows are a multiple of it,
            as tensor parallelism needs.

    Raises:
        ValueError: something cannot be held, naming the field of config.json or the tensor.
    """
    check_choice("--precision", precision, (*get_args(Precision), None))
    check_integer("--pad_vocab_to_multiple_of", pad_vocab_to_multiple_of, 1)
    folder, target = Path(source), Path(os.path.abspath(out))
    check_free(target)
    fields = _read_config(folder)
    form = format_of_config(fields)
    fields.only(quantization_config=None)
    model, given_rows = form.model(fields), fields.count("vocab_size")
    check_model(model, str(folder / "config.json"))
    with written_at_once(target) as unfinished:
        loaded, spec = import_tokenizer(tokenizer or source, unfinished / "tokenizer")
        if loaded.vocab_size > given_rows:
            raise ValueError(
                f"tokenizer {tokenizer or source!r}: has {loaded.vocab_size} tokens, but the model's vocab_size is "
                f"{given_rows}"
            )
        weights = _Weights(TensorFolder(folder), form, model, given_rows)
        if precision is None:
            precision = weights.precision()
        config = Config(
            model=model,
            data=DataConfig(tokenizer=spec.replace(str(unfinished), str(target))),
            training=TrainingConfig(precision=precision),  # type: ignore[arg-type]
            checkpoint=CheckpointConfig(load=str(target)),
        )
        rows = -(-given_rows // pad_vocab_to_multiple_of) * pad_vocab_to_multiple_of
        parameters = _write_checkpoint(unfinished / "checkpoints", weights, config, rows, loaded)
        _write_yaml(unfinished / "config.yaml", config, source)
    return Imported(
        folder=target,
        format=form.title,
        parameters=parameters,
        vocab_size=loaded.vocab_size,
        rows=rows,
        precision=precision,
        notes=_notes(fields, loaded, given_rows),
    )


class _Weights:
    """The tensors of a folder as our weights; all of them are looked up before the first is read."""

    def __init__(self, tensors: TensorFolder, form: Format, model: ModelConfig, rows: int) -> None:
        self._tensors = tensors
        self._form = form
        self.model = model
        self.rules: list[tuple[int | None, Rule]] = [
            *((None, rule) for rule in [*form.vocabulary_rules(model, rows), *form.outer_rules(model)]),
            *((layer, rule) for layer in range(model.num_layers) for rule in form.layer_rules(model, layer)),
        ]
        self._names = self._by_full_name()
        self._check()

    def precision(self) -> str:
        """Of the word embeddings. Raises ValueError for a type that we do not train in."""
        dtype = self.read(self._form.embedding).dtype
        for name, candidate in DTYPES.items():
            if candidate == dtype:
                return name
        raise ValueError(f"{self._form.embedding} is of type {dtype}; give --precision {', '.join(DTYPES)}")

    def read(self, name: str) -> torch.Tensor:
        """A tensor by the name that it has with the output layer's model."""
        return self._tensors.read(self._names[name])

    def _by_full_name(self) -> dict[str, str]:
        """Names as the model with the output layer has them, for checkpoints of either."""
        form = self._form
        names = {}
        for name in self._tensors.names():
            full = name if name.startswith(form.prefix) or name == form.output else form.prefix + name
            if not re.fullmatch(form.buffers, full):
                names[full] = name
        return names

    def _check(self) -> None:
        unused = set(self._names)
        for _, rule in self.rules:
            for name, shape in zip(rule.theirs, rule.their_shapes(), strict=True):
                if name not in self._names:
                    raise ValueError(f"{self._form.title} weights: {name} is missing")
                found = self._tensors.shape(self._names[name])
                if found != shape:
                    raise ValueError(
                        f"{self._form.title} weights: {name} has the shape {list(found)}, but config.json gives "
                        f"{list(shape)}"
                    )
                unused.discard(name)
        if self._form.output in unused:  # tied, and stored all the same
            if not torch.equal(self.read(self._form.output), self.read(self._form.embedding)):
                raise ValueError(
                    f"{self._form.title} weights: tie_word_embeddings = True in config.json, but {self._form.output} "
                    f"differs from {self._form.embedding}"
                )
            unused.discard(self._form.output)
        if unused:
            names = sorted(unused)
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise ValueError(f"{self._form.title} weights: config.json has no place for {', '.join(names[:5])}{more}")


def _read_config(folder: Path) -> FieldReader:
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder}: is not a local folder of a model (no config.json)")
    try:
        fields = load_json(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path}: must be a mapping of fields")
    return FieldReader(fields, str(path))


def _write_checkpoint(directory: Path, weights: _Weights, config: Config, rows: int, tokenizer: Tokenizer) -> int:
    """Write iteration 0; returns the number of parameters."""
    precision = config.training.precision
    pieces = [_piece(weights, layer, rule, rows, DTYPES[precision]) for layer, rule in weights.rules]
    layout = files.Layout(
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        num_virtual_stages_per_pipeline_rank=1,
        context_parallel_size=1,
        data_parallel_size=1,
        optimizer_format=content.NOT_DISTRIBUTED,
        optimizer_buckets=[],
        precision=precision,
    )
    common = io.BytesIO()
    metadata = content.content_metadata(content.NOT_DISTRIBUTED)
    torch.save({"iteration": 0, "checkpoint_version": 3.0, "content_metadata": metadata}, common)
    folder = files.incomplete_path(directory, 0)
    content.write_common(folder, content.Snapshot(common.getvalue(), {}))
    with progress_bar("importing", len(pieces)) as advance:
        write_pieces(folder, pieces, advance)
    train_state = {
        "consumed_samples": 0,
        "train_time_s": 0.0,
        "config": dataclasses.asdict(config),
        "vocab_size": tokenizer.vocab_size,
        "tokenizer": tokenizer.fingerprint(),
    }
    files.publish(directory, 0, layout, files.encode_train_state(train_state))
    return sum(torch.Size(piece.shape).numel() for piece in pieces)


def _piece(weights: _Weights, layer: int | None, rule: Rule, rows: int, dtype: torch.dtype) -> Piece:
    """A weight that is read when it is written; the vocabulary's grow to `rows` by copies of their last row."""
    is_vocabulary = rule.ours in (EMBEDDING, OUTPUT)

    def load() -> torch.Tensor:
        tensor = rule.join([weights.read(name) for name in rule.theirs]).to(dtype)
        missing = rows - tensor.shape[0] if is_vocabulary else 0
        return torch.cat([tensor, tensor[-1:].expand(missing, -1)]) if missing else tensor

    return Piece(
        name=rule.ours if layer is None else LAYERS + rule.ours,
        shape=(rows, *rule.shape[1:]) if is_vocabulary else rule.shape,
        dtype=dtype,
        load=load,
        layer=layer,
        num_layers=weights.model.num_layers,
    )


def _write_yaml(path: Path, config: Config, source: str) -> None:
    """What the source decides; everything else keeps its defaults."""
    model = dataclasses.asdict(config.model)
    sections: dict[str, dict[str, Any]] = {
        "model": {name: value for name, value in model.items() if value is not None},
        "data": {"tokenizer": config.data.tokenizer},
        "training": {"precision": config.training.precision},
        "checkpoint": {"load": config.checkpoint.load},
    }
    head = f"# Made of {source} by megatron-sbld import hf. Give data, training and a run folder of your own.\n"
    path.write_text(head + dump_yaml(sections), encoding="utf-8")


def _notes(fields: FieldReader, tokenizer: Tokenizer, rows: int) -> list[str]:
    notes = []
    eos = fields.get("eos_token_id", tokenizer.eod)
    if tokenizer.eod not in (eos if isinstance(eos, list) else [eos]):
        notes.append(f"eos_token_id is {eos}, but documents will be ended by the tokenizer's {tokenizer.eod}")
    if added := added_at_ends(tokenizer):
        notes.append(f"transformers adds {' '.join(added)} to each text; here nothing is added")
    if tokenizer.vocab_size < rows:
        notes.append(f"{rows - tokenizer.vocab_size} rows beyond the tokenizer's tokens count as padding")
    return notes
