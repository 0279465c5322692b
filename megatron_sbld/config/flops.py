"""Floating-point operations of a GPT by Megatron's formula, and what they say about the gain of dropping layers.

Two counts are in use, and they differ in one place. Megatron-LM (`num_floating_point_operations`, core 0.16.1) counts
the half of the attention matrix that a causal mask leaves; its 2021 paper (arXiv 2104.04473), with it docs/method.md
section 7, counts all of it. The model FLOPs here follow the former, the layers' share the latter. Norms, activations,
embedding look-ups, the optimizer and communication are counted by neither.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sbld.checks import check_number
from megatron_sbld.config.sections import Config, ModelConfig

_FLOPS_PER_MAC = 2  # one multiplication and one addition
_FORWARD_AND_BACKWARD = 3  # forward, gradient of the input, gradient of the weights
_RECOMPUTED = 4  # the same, and the forward pass once more


def ffn_hidden_size(model: ModelConfig) -> int:
    """Width of the MLP: as given, 4 h, or with SwiGLU 8/3 h rounded up to a multiple of 64."""
    if model.ffn_hidden_size is not None:
        return model.ffn_hidden_size
    if not model.swiglu:
        return 4 * model.hidden_size
    return -(-8 * model.hidden_size // (3 * 64)) * 64


def padded_vocab_size(vocab_size: int, config: Config) -> int:
    """Vocabulary rounded up as in Megatron-LM: to make_vocab_size_divisible_by * tensor_model_parallel_size."""
    multiple = config.model.make_vocab_size_divisible_by * config.parallel.tensor_model_parallel_size
    return -(-vocab_size // multiple) * multiple


@dataclass(frozen=True)
class LayerFlops:
    """FLOPs of one layer's forward pass for one token, by part."""

    query_key_value: float
    attention: float
    """Scores, and their product with the values."""
    projection: float
    """Of the attention's output."""
    mlp_in: float
    mlp_out: float

    @property
    def total(self) -> float:
        return self.query_key_value + self.attention + self.projection + self.mlp_in + self.mlp_out


def layer_flops_by_part(model: ModelConfig, *, causal: bool = True) -> LayerFlops:
    """FLOPs of one transformer layer's forward pass for one token of a sample of `seq_length` tokens, by part.

    causal: count the half of the attention matrix below the diagonal (Megatron-LM today); False counts all of it.
    """
    hidden = model.hidden_size
    head = model.kv_channels or hidden // model.num_attention_heads
    query = head * model.num_attention_heads
    key_and_value = 2 * head * (model.num_query_groups or model.num_attention_heads)
    attended = model.seq_length / 2 if causal else model.seq_length
    mlp = hidden * ffn_hidden_size(model)
    return LayerFlops(
        query_key_value=_FLOPS_PER_MAC * hidden * (query + key_and_value),
        attention=_FLOPS_PER_MAC * 2 * query * attended,
        projection=_FLOPS_PER_MAC * query * hidden,
        mlp_in=_FLOPS_PER_MAC * (2 if model.swiglu else 1) * mlp,
        mlp_out=_FLOPS_PER_MAC * mlp,
    )


def layer_flops_per_token(model: ModelConfig, *, causal: bool = True) -> float:
    """The sum of `layer_flops_by_part`."""
    return layer_flops_by_part(model, causal=causal).total


def logits_flops_per_token(model: ModelConfig, padded_vocab_size: int) -> float:
    """FLOPs of the output layer's forward pass for one token."""
    return _FLOPS_PER_MAC * model.hidden_size * padded_vocab_size


def model_flops_per_token(model: ModelConfig, padded_vocab_size: int) -> float:
    """FLOPs of one token's forward and backward pass through the undropped model, without recomputation.

    Megatron-LM's `num_floating_point_operations` divided by the tokens of a batch. Dropped layers are counted as if
    they had run, as the paper counts: tokens/s times this is the throughput of an undropped model that trains as fast.
    """
    forward = model.num_layers * layer_flops_per_token(model) + logits_flops_per_token(model, padded_vocab_size)
    return _FORWARD_AND_BACKWARD * forward


def training_flops(model: ModelConfig, padded_vocab_size: int, global_batch_size: int) -> float:
    """FLOPs of an iteration of the undropped model: `model_flops_per_token` for every token of a global batch."""
    return model_flops_per_token(model, padded_vocab_size) * global_batch_size * model.seq_length


def executed_flops(
    model: ModelConfig,
    padded_vocab_size: int,
    global_batch_size: float,
    layers_run: float,
    attention_run: float | None = None,
) -> float:
    """FLOPs of an iteration that runs `layers_run` layers in the mean over its tokens; the rest as training_flops.

    attention_run: the same over pairs of tokens, where layers run some tokens of a sample; None is as many.
    """
    skipped = (model.num_layers - layers_run) * _FORWARD_AND_BACKWARD * layer_flops_per_token(model)
    if attention_run is not None:
        skipped += (layers_run - attention_run) * _FORWARD_AND_BACKWARD * layer_flops_by_part(model).attention
    return (model_flops_per_token(model, padded_vocab_size) - skipped) * global_batch_size * model.seq_length


def attention_share(model: ModelConfig) -> float:
    """The part of a layer's FLOPs that grows as the square of the tokens, counted as `layer_share` does."""
    parts = layer_flops_by_part(model, causal=False)
    return parts.attention / parts.total


def layer_share(model: ModelConfig, padded_vocab_size: int, recompute: bool = False) -> float:
    """phi: the transformer layers' share of an iteration's FLOPs, in (0, 1] (docs/method.md section 7).

    Counted as in Megatron's 2021 paper, with the whole attention matrix. recompute: the layers' forward pass is done
    twice (full activation recomputation of every layer), the logits' once.
    """
    layers = (_RECOMPUTED if recompute else _FORWARD_AND_BACKWARD) * model.num_layers
    layer_flops = layers * layer_flops_per_token(model, causal=False)
    return layer_flops / (layer_flops + _FORWARD_AND_BACKWARD * logits_flops_per_token(model, padded_vocab_size))


def ideal_speedup(phi: float, mean_keep_prob: float) -> float:
    """Throughput over the undropped model's if a dropped layer cost nothing (docs/method.md section 7).

    phi: the layers' share of an iteration, in [0, 1]; mean_keep_prob: over layers and iterations, in [0, 1]. Raises
    ValueError outside of these, and where nothing of the iteration would be left (phi = 1, mean_keep_prob = 0).
    """
    check_number("phi", phi, "[0, 1]")
    check_number("mean_keep_prob", mean_keep_prob, "[0, 1]")
    remaining = 1 - phi * (1 - mean_keep_prob)
    if remaining <= 0:
        raise ValueError("phi = 1 with mean_keep_prob = 0 leaves nothing to run; the speed-up is not defined")
    return 1 / remaining


def implied_keep_prob(phi: float, speedup: float) -> float:
    """Mean keep probability at which an ideal implementation would reach `speedup`: the inverse of `ideal_speedup`.

    Negative when dropping every layer would not suffice, above 1 for a slow-down. Raises ValueError unless phi is in
    (0, 1] and speedup positive.
    """
    check_number("phi", phi, "(0, 1]")
    check_number("speedup", speedup, "(0, inf)")
    return 1 - (1 - 1 / speedup) / phi
