"""What a model format of Hugging Face's transformers is: a config.json, and a table of weights in both directions.

A `Rule` pairs one of our weights with the tensors that hold it there. Nothing is computed on the way, only cut, joined,
reordered and transposed, so that a weight that goes there and back is the same bit for bit.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn

import torch

from megatron_sbld.config.sections import ModelConfig

EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT = "output_layer.weight"
POSITIONS = "embedding.position_embeddings.weight"
FINAL_NORM = "decoder.final_layernorm."

_REQUIRED = object()


def _same(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return tensors[0]


@dataclass(frozen=True)
class Rule:
    """One of our weights and the tensors that hold it in Hugging Face's format."""

    ours: str
    """Name in a checkpoint of ours; a layer's without `decoder.layers.`."""
    shape: tuple[int, ...]
    """Of our weight."""
    theirs: tuple[str, ...]
    """Names in Hugging Face's format, in the order of `split`."""
    split: Callable[[torch.Tensor], Sequence[torch.Tensor]] = lambda tensor: [tensor]
    """Our weight as theirs."""
    join: Callable[[Sequence[torch.Tensor]], torch.Tensor] = _same
    """Theirs as our weight."""

    def their_shapes(self) -> list[tuple[int, ...]]:
        """Shapes of their tensors, in the order of `theirs`."""
        return [tuple(tensor.shape) for tensor in self.split(torch.empty(self.shape, device="meta"))]


@dataclass(frozen=True)
class Heads:
    """How attention heads share out the rows of Megatron's linear_qkv.

    By group: its queries, its key, its value, so [groups, queries a group + 2, head, ...]; Hugging Face's formats hold
    all queries, all keys and all values [heads * head, ...].
    """

    groups: int
    queries: int
    """Of a group."""
    head: int
    """Channels of a head."""

    @classmethod
    def of(cls, model: ModelConfig) -> Heads:
        """The heads of a model."""
        groups = model.num_query_groups or model.num_attention_heads
        return cls(groups, model.num_attention_heads // groups, head_size(model))

    @property
    def rows(self) -> int:
        """Rows of linear_qkv."""
        return self.groups * (self.queries + 2) * self.head

    @property
    def rows_of_queries(self) -> int:
        """Channels of all heads together: columns of linear_proj."""
        return self.groups * self.queries * self.head

    def split(self, qkv: torch.Tensor) -> list[torch.Tensor]:
        """Queries, keys and values of linear_qkv's weight or bias."""
        grouped = qkv.reshape(self.groups, self.queries + 2, self.head, *qkv.shape[1:])
        parts = grouped[:, : self.queries], grouped[:, self.queries], grouped[:, self.queries + 1]
        return [part.reshape(-1, *qkv.shape[1:]) for part in parts]

    def join(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """The inverse of `split`."""
        rest = parts[0].shape[1:]
        grouped = [part.reshape(self.groups, -1, self.head, *rest) for part in parts]
        return torch.cat(grouped, dim=1).reshape(-1, *rest)


def head_size(model: ModelConfig) -> int:
    """Channels of an attention head."""
    return model.kv_channels or model.hidden_size // model.num_attention_heads


def positions(model: ModelConfig) -> int:
    """The longest sequence that the model takes; with learned positions their number."""
    return model.max_position_embeddings or model.seq_length


class Format(ABC):
    """One of transformers' model classes."""

    title: ClassVar[str]
    """As users call it."""
    model_type: ClassVar[str]
    architecture: ClassVar[str]
    prefix: ClassVar[str]
    """Begins the names of all tensors but the output layer's; missing in checkpoints of the model without it."""
    buffers: ClassVar[str] = r"(?!)"
    """Regular expression of tensors in checkpoints that are no weights: masks, rotary frequencies."""
    output: ClassVar[str] = "lm_head.weight"
    embedding: ClassVar[str]
    """The word embeddings, with the prefix."""

    @abstractmethod
    def problems(self, model: ModelConfig) -> list[str]:
        """Why the format cannot hold a model: field, value and what it would have to be; empty if it can."""

    @abstractmethod
    def config(self, model: ModelConfig) -> dict[str, Any]:
        """The fields of config.json that are this format's own."""

    @abstractmethod
    def model(self, config: FieldReader) -> ModelConfig:
        """The model that a config.json describes. Raises ValueError naming the field that cannot be held."""

    @abstractmethod
    def outer_rules(self, model: ModelConfig) -> list[Rule]:
        """The weights besides those of layers and of the vocabulary."""

    @abstractmethod
    def layer_rules(self, model: ModelConfig, layer: int) -> list[Rule]:
        """The weights of a layer, numbered from 0."""

    def vocabulary_rules(self, model: ModelConfig, rows: int) -> list[Rule]:
        """Word embeddings and, if they are not tied to them, the output layer."""
        shape = (rows, model.hidden_size)
        rules = [Rule(EMBEDDING, shape, (self.embedding,))]
        if model.untie_embeddings_and_output_weights:
            rules.append(Rule(OUTPUT, shape, (self.output,)))
        return rules


def unmet(model: ModelConfig, demands: Mapping[str, tuple[Any, str]]) -> list[str]:
    """Fields of the model that are not as demanded: {field: (whether it is, what it must be)}."""
    return [
        f"model.{name} = {getattr(model, name)!r}: must be {allowed}"
        for name, (is_met, allowed) in demands.items()
        if not is_met
    ]


class FieldReader:
    """Reads config.json; every complaint names the field, its value and what is allowed.

    Args:
        fields: the content.
        path: of the file, for messages.
    """

    def __init__(self, fields: Mapping[str, Any], path: str) -> None:
        self._fields = fields
        self._path = path

    def get(self, name: str, default: Any = _REQUIRED) -> Any:
        """A field as it is; null counts as missing. Raises ValueError where it is missing and has no default."""
        value = self._fields.get(name)
        if value is not None:
            return value
        if default is _REQUIRED:
            raise ValueError(f"{self._path}: {name} is missing")
        return default

    def number(self, name: str, default: Any = _REQUIRED) -> float:
        """A finite number."""
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            self.refuse(name, value, "a number")
        return float(value)

    def count(self, name: str, default: Any = _REQUIRED) -> int:
        """A whole number of at least 1."""
        value = self.number(name, default)
        if value < 1 or value != int(value):
            self.refuse(name, value, "a whole number of at least 1")
        return int(value)

    def flag(self, name: str, default: Any = _REQUIRED) -> bool:
        """true or false."""
        value = self.get(name, default)
        if not isinstance(value, bool):
            self.refuse(name, value, "true or false")
        return bool(value)

    def choose(self, name: str, allowed: Mapping[str, str], default: Any = _REQUIRED) -> str:
        """What one of the allowed names stands for."""
        value = self.get(name, default)
        if value not in allowed:
            self.refuse(name, value, f"one of {', '.join(allowed)}")
        return allowed[value]

    def only(self, **expected: Any) -> None:
        """Refuse fields that have another value than the one that can be held; a missing field has that value."""
        for name, value in expected.items():
            found = self._fields.get(name)
            if found is not None and found != value:
                self.refuse(name, found, f"{value!r} or left out; anything else cannot be represented")

    def refuse(self, name: str, value: Any, allowed: str) -> NoReturn:
        """Raise ValueError for a field."""
        raise ValueError(f"{self._path}: {name} = {value!r}: must be {allowed}")
