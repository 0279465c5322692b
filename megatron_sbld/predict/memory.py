"""Bytes on each pipeline rank: weights, gradients, optimizer state and activations (arXiv 2205.05198, sections 4, 5).

Weights, gradients and Adam's state take 18 bytes a parameter in bf16 or fp16 (2 + 4 + 12; the 12 are sharded by the
distributed optimizer) and 16 in fp32. A layer leaves s b h (34 + 5 a s / h) bytes of activations for its backward pass
(16 bits), spread over tensor-parallel ranks as far as the paper says; the 5 a s / h of the scores only where the
attention is neither fused nor recomputed. The formula is written here by tensor, so that it holds for SwiGLU,
grouped-query attention, fp32 and models without dropout as well. A rank holds the activations of as many microbatches
as its schedule has in flight; a dropped layer leaves none, nor does one that has not begun, whose weights, gradients
and optimizer state are there all the same. Not counted: the allocator's fragmentation, workspaces,
communication buffers and the context, for which `MARGIN` of the memory is set aside.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from megatron_sbld.config.flops import ffn_hidden_size
from megatron_sbld.config.sections import Config
from megatron_sbld.layout.pipeline import Floats
from megatron_sbld.predict.cost import Attention, bytes_per_value
from megatron_sbld.predict.iteration import IterationModel
from megatron_sbld.predict.simulate import most_in_flight

MARGIN = 0.1
"""Share of the memory that is left to what is not counted (an assumption)."""


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """GB (10^9 bytes) on a pipeline rank."""

    rank: int
    """From 1."""
    parameters: int
    """Values on one tensor-parallel rank."""
    weights: float
    gradients: float
    optimizer: float
    activations: float
    """At most, with every layer kept."""
    dropped_activations: float | None
    """At most in an iteration with its drops, on average over iterations; None where nothing is dropped."""
    in_flight: int
    """Passes whose activations are held at one time."""

    @property
    def total(self) -> float:
        """With every layer kept, as an iteration may be."""
        return self.weights + self.gradients + self.optimizer + self.activations

    @property
    def with_drops(self) -> float:
        """With the activations of iterations with drops; as `total` where nothing is dropped."""
        held = self.activations if self.dropped_activations is None else self.dropped_activations
        return self.total - self.activations + held


@dataclass(frozen=True)
class ActivationBytes:
    """Of one microbatch on a rank."""

    layer: float
    """What a layer leaves for its backward pass."""
    checkpoint: float
    """A layer's input, which is all that a recomputed one leaves."""
    whole_layer: float
    """What a layer leaves while it is recomputed."""
    embedding: float
    output: float
    """Final norm, output layer and loss."""


def activation_bytes(config: Config, vocab_size: int, attention: Attention) -> ActivationBytes:
    """By tensor, for a config and a padded vocabulary."""
    model, parallel, training = config.model, config.parallel, config.training
    tensor = parallel.tensor_model_parallel_size
    tokens = training.micro_batch_size * model.seq_length / parallel.context_parallel_size
    value, hidden, ffn = bytes_per_value(config), model.hidden_size, ffn_hidden_size(model)
    head = model.kv_channels or hidden // model.num_attention_heads
    query = head * model.num_attention_heads
    keys_values = 2 * head * (model.num_query_groups or model.num_attention_heads)
    hidden_mask = 1 if model.hidden_dropout > 0 else 0
    spread = tensor if parallel.sequence_parallel else 1

    # Two norms' inputs, the inputs of the two column-parallel layers, the masks of two dropouts: whole without sp.
    whole = hidden * (4 * value + 2 * hidden_mask) / spread
    projections = value * (query + keys_values + query) / tensor  # queries, keys and values, the projection's input
    mlp = value * ffn * ((2 if model.swiglu else 1) + 1) / tensor  # the activation function's input and output
    scores = 0.0
    if attention == "unfused":
        mask = value + 1 if model.attention_dropout > 0 else 0  # the dropout's output and mask
        attended = model.seq_length / parallel.context_parallel_size
        scores = model.num_attention_heads * attended * (value + mask) / tensor
    everything = whole + projections + mlp + scores
    modules = training.recompute_modules or ["core_attn"]
    layer = everything
    if training.recompute_granularity == "selective":
        layer -= (scores if "core_attn" in modules else 0.0) + (mlp if "mlp" in modules else 0.0)
        layer -= 2 * value * hidden / spread if "layernorm" in modules else 0.0
    logits = 4 * vocab_size / tensor  # in fp32 whatever the precision
    return ActivationBytes(
        layer=tokens * layer,
        checkpoint=tokens * hidden * value / spread,
        whole_layer=tokens * everything,
        embedding=tokens * hidden * hidden_mask / spread,
        output=tokens * (2 * value * hidden / spread + logits),
    )


def rank_memory(model: IterationModel, shares: Floats | None = None) -> list[RankMemory]:
    """Memory of each pipeline rank. shares: of drawn iterations, [n, m or 1, L]; None where nothing is dropped."""
    setup = model.setup
    config = setup.config
    value = bytes_per_value(config)
    sharded = setup.replicas * config.parallel.context_parallel_size if config.parallel.use_distributed_optimizer else 1
    sizes = activation_bytes(config, setup.vocab_size, setup.attention)
    ranks = []
    for rank in range(model.num_ranks):
        chunks = range(rank, model.num_chunks, model.num_ranks)
        count = sum(bucket.size for chunk in chunks for bucket in model.buckets[chunk])
        full, in_flight = _held(model, sizes, np.ones((1, 1, config.model.num_layers)), rank)
        dropped = None if shares is None else float(_held(model, sizes, shares, rank)[0].mean())
        ranks.append(
            RankMemory(
                rank=rank + 1,
                parameters=count,
                weights=count * value / 1e9,
                gradients=count * 4 / 1e9,
                optimizer=count * (8 if value == 4 else 12) / sharded / 1e9,
                activations=float(full[0]) / 1e9,
                dropped_activations=None if dropped is None else dropped / 1e9,
                in_flight=in_flight,
            )
        )
    return ranks


def most_memory(model: IterationModel, layers: Iterable[int]) -> list[float]:
    """GB on each pipeline rank in an iteration that runs `layers` (1-based) alone."""
    shares = np.zeros((1, 1, model.setup.config.model.num_layers))
    shares[..., [layer - 1 for layer in layers]] = 1.0
    return [rank.with_drops for rank in rank_memory(model, shares)]


def _held(model: IterationModel, sizes: ActivationBytes, shares: Floats, rank: int) -> tuple[Floats, int]:
    """Bytes that a rank holds at most, [n], and in how many passes."""
    amounts = np.stack([_chunk_bytes(model, sizes, shares, chunk) for chunk in range(model.num_chunks)], axis=-1)
    most, in_flight = most_in_flight(amounts, rank, model.num_ranks, model.setup.num_microbatches)
    training = model.setup.config.training
    if training.recompute_granularity == "full":  # one piece at a time is whole again
        pieces = training.recompute_num_layers if training.recompute_method == "uniform" else 1
        most = most + (pieces or 1) * sizes.whole_layer
    return most, in_flight


def _chunk_bytes(model: IterationModel, sizes: ActivationBytes, shares: Floats, chunk: int) -> Floats:
    """What a pass through a chunk leaves, [n, m or 1]."""
    training = model.setup.config.training
    layers = np.array(model.chunk_layers[chunk], dtype=int) - 1
    each = np.full(len(layers), sizes.layer)
    if training.recompute_granularity == "full":
        number = training.recompute_num_layers or 1
        if training.recompute_method == "uniform":
            each[:] = sizes.checkpoint / number
        else:
            each[:number] = sizes.checkpoint
    held: Floats = shares[..., layers] @ each
    held = held + (sizes.embedding if chunk == 0 else 0.0)
    return held + (sizes.output if chunk == model.num_chunks - 1 else 0.0)
