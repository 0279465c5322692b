"""Seconds of the parts of an iteration on one rank: matrix products, memory traffic and communication.

A matrix product takes its FLOPs (flops.py) at a share of the peak that calibration finds; elementwise operations move
bytes at the memory's speed; a ring over n ranks moves (n - 1)/n of a gathered or scattered tensor and twice that of a
reduced one, without latency. Counted from megatron-core 0.16.1:

- Tensor parallelism. Forward: a reduction after the attention's projection and one after the MLP; with sequence
  parallelism a gather before and a scatter after each of both, as many bytes. Backward: the same, but what a
  column-parallel layer sends runs beside its weight gradient's product (with sequence parallelism its input is gathered
  once more, beside the other product), and only what exceeds that counts (tensor_parallel/layers.py).
- Elementwise: norms, residual adds with dropout, the activation function, softmax and dropout of the scores where the
  attention is not fused, and the loss over fp32 logits (tensor_parallel/cross_entropy.py). Backward moves twice as
  much.
- Context parallelism: keys and values go round the ring beside the attention; what exceeds it counts.
- The optimizer: Adam's reads and writes of fp32 state, the norm, the scaling by clipping, and zeroing the gradients.

Not counted: latencies and launches, data loading, logging, validation, checkpoints, the decisions themselves (0.02 to
0.12 % of an iteration, benchmarks/results/realised_gain_*.md), and with overlap_param_gather the gathers that
drop.dropped_update freeze leaves out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_sbld.config.flops import ffn_hidden_size, layer_flops_by_part, logits_flops_per_token
from megatron_sbld.config.sections import Config
from megatron_sbld.predict.hardware import Hardware

Attention = Literal["flash", "unfused"]
"""flash: fused, half of the causal matrix computed and none of it stored; unfused: all of it computed and stored."""

_BACKWARD = 2  # gradients of the input and of the weights; elementwise operations read one more tensor


@dataclass(frozen=True)
class Seconds:
    """Seconds of a pass by what they are spent on."""

    matmul: float = 0.0
    memory: float = 0.0
    communication: float = 0.0

    @property
    def total(self) -> float:
        return self.matmul + self.memory + self.communication

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(self.matmul + other.matmul, self.memory + other.memory, self.communication + other.communication)

    def __mul__(self, factor: float) -> Seconds:
        return Seconds(self.matmul * factor, self.memory * factor, self.communication * factor)


@dataclass(frozen=True)
class Costs:
    """Seconds of one microbatch's passes on a rank."""

    layer_forward: Seconds
    layer_backward: Seconds
    recomputed: Seconds
    """What the backward pass of a recomputed layer repeats of its forward pass."""
    embedding_forward: Seconds
    embedding_backward: Seconds
    output_forward: Seconds
    """Logits and loss."""
    output_backward: Seconds
    transfer: float
    """From a pipeline rank to the next."""


@dataclass(frozen=True)
class _Rates:
    """What all parts of a microbatch's passes on a rank are counted with."""

    value: int
    """Bytes of a weight or activation."""
    matmul: float
    """FLOPs of a token per second of a microbatch."""
    traffic: float
    """Seconds for a byte a token."""
    tokens: float
    activations: float
    """Bytes of the hidden states between layers."""
    gather: float
    """Seconds in which these are gathered over the tensor-parallel ranks, or scattered."""
    gpus: int
    spread: int
    """Ranks that share the tokens outside of attention and MLP."""
    mask: int
    """Bytes that hidden dropout keeps for a value."""


def pass_costs(
    config: Config, vocab_size: int, hardware: Hardware, data_parallel: int, attention: Attention, efficiency: float
) -> Costs:
    """The costs for a config.

    vocab_size: padded.  data_parallel: replicas, without context parallelism.
    efficiency: share of the peak that matrix products reach, (0, 1].
    """
    rates = _rates(config, hardware, data_parallel, efficiency)
    forward, backward, recomputed = _layer(config, hardware, rates, attention)
    embedding_forward, embedding_backward = _embedding(config, rates)
    output_forward, output_backward = _output(config, rates, vocab_size)
    return Costs(
        layer_forward=forward,
        layer_backward=backward,
        recomputed=recomputed,
        embedding_forward=embedding_forward,
        embedding_backward=embedding_backward,
        output_forward=output_forward,
        output_backward=output_backward,
        transfer=_transfer(config, hardware, data_parallel, rates.activations / rates.spread),
    )


def _rates(config: Config, hardware: Hardware, data_parallel: int, efficiency: float) -> _Rates:
    model, parallel = config.model, config.parallel
    tensor, context = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    tokens = config.training.micro_batch_size * model.seq_length / context
    value = bytes_per_value(config)
    gpus = tensor * context * data_parallel * parallel.pipeline_model_parallel_size
    activations = tokens * model.hidden_size * value
    return _Rates(
        value=value,
        matmul=hardware.peak * efficiency * tensor / tokens,
        traffic=tokens / hardware.memory_rate,
        tokens=tokens,
        activations=activations,
        gather=(tensor - 1) / tensor * activations / hardware.group_rate(tensor, 1, gpus),
        gpus=gpus,
        spread=tensor if parallel.sequence_parallel else 1,
        mask=1 if model.hidden_dropout > 0 else 0,
    )


def _layer(config: Config, hardware: Hardware, rates: _Rates, attention: Attention) -> tuple[Seconds, Seconds, Seconds]:
    """Forward, backward, and what of the forward pass the backward pass repeats."""
    rate, gather = rates.matmul, rates.gather
    flops = layer_flops_by_part(config.model, causal=attention == "flash")
    around, activation, scores = _layer_bytes(config, rates, attention)
    around_ring = _around_ring(config, hardware, rates)
    forward = Seconds(
        matmul=flops.total / rate,
        memory=(around + activation + scores) * rates.traffic,
        communication=4 * gather + _exposed(around_ring, flops.attention / rate),
    )
    columns = [flops.query_key_value / rate, flops.mlp_in / rate]  # of one of the backward pass's two products
    if config.parallel.sequence_parallel:
        sent = 2 * gather + sum(2 * _exposed(gather, product) for product in columns)
    else:
        sent = sum(_exposed(2 * gather, product) for product in columns)
    backward = Seconds(
        matmul=_BACKWARD * flops.total / rate,
        memory=_BACKWARD * (around + activation + scores) * rates.traffic,
        communication=sent + _exposed(2 * around_ring, _BACKWARD * flops.attention / rate),
    )
    recomputed = _recomputed(
        config,
        forward,
        attention=Seconds(matmul=flops.attention / rate, memory=scores * rates.traffic),
        mlp=Seconds(
            matmul=(flops.mlp_in + flops.mlp_out) / rate,
            memory=activation * rates.traffic,
            communication=2 * gather,
        ),
    )
    return forward, backward, recomputed


def _layer_bytes(config: Config, rates: _Rates, attention: Attention) -> tuple[float, float, float]:
    """Bytes a token that elementwise operations move: around attention and MLP, in the MLP, on the scores."""
    model, value = config.model, rates.value
    tensor = config.parallel.tensor_model_parallel_size
    # two norms, two residual adds
    around = model.hidden_size * (2 * 2 * value + 2 * (3 * value + rates.mask)) / rates.spread
    activation = (3 if model.swiglu else 2) * value * ffn_hidden_size(model) / tensor
    scores = 0.0
    if attention == "unfused":
        mask = (2 * value + 1) if model.attention_dropout > 0 else 0
        scores = model.num_attention_heads / tensor * model.seq_length * (2 * value + mask)
    return around, activation, scores


def _around_ring(config: Config, hardware: Hardware, rates: _Rates) -> float:
    """Seconds in which keys and values go round the context-parallel ranks."""
    model = config.model
    tensor, context = config.parallel.tensor_model_parallel_size, config.parallel.context_parallel_size
    if context == 1:
        return 0.0
    head = model.kv_channels or model.hidden_size // model.num_attention_heads
    keys_values = 2 * head * (model.num_query_groups or model.num_attention_heads) / tensor
    return (context - 1) * rates.tokens * keys_values * rates.value / hardware.group_rate(context, tensor, rates.gpus)


def _embedding(config: Config, rates: _Rates) -> tuple[Seconds, Seconds]:
    """Forward and backward."""
    hidden, value = config.model.hidden_size, rates.value
    is_split = config.parallel.sequence_parallel
    forward = Seconds(
        memory=hidden * (2 * value + 2 * value * rates.mask) * rates.traffic,
        communication=rates.gather if is_split else 2 * rates.gather,
    )
    backward = Seconds(
        memory=_BACKWARD * hidden * (2 * value + 2 * value * rates.mask) * rates.traffic,
        communication=rates.gather if is_split else 0.0,
    )
    return forward, backward


def _output(config: Config, rates: _Rates, vocab_size: int) -> tuple[Seconds, Seconds]:
    """Forward and backward of logits and loss."""
    hidden, value, gather = config.model.hidden_size, rates.value, rates.gather
    tensor, is_split = config.parallel.tensor_model_parallel_size, config.parallel.sequence_parallel
    logits = logits_flops_per_token(config.model, vocab_size) / rates.matmul
    per_logit = value + 36  # the cast to fp32, maximum, subtraction, exponential, sum, division
    per_logit_backward = value + 12  # the gradient in place, and its cast
    forward = Seconds(
        matmul=logits,
        memory=(vocab_size / tensor * per_logit + 2 * value * hidden / rates.spread) * rates.traffic,
        communication=gather if is_split else 0.0,
    )
    backward = Seconds(
        matmul=_BACKWARD * logits,
        memory=(vocab_size / tensor * per_logit_backward + 4 * value * hidden / rates.spread) * rates.traffic,
        communication=_exposed(gather, logits) * 2 if is_split else _exposed(2 * gather, logits),
    )
    return forward, backward


def _exposed(seconds: float, hidden_by: float) -> float:
    """What is left of communication that runs beside a matrix product."""
    return max(0.0, seconds - hidden_by)


def _recomputed(config: Config, forward: Seconds, attention: Seconds, mlp: Seconds) -> Seconds:
    """What of a layer's forward pass the backward pass repeats."""
    training = config.training
    if training.recompute_granularity == "full":
        return forward
    if training.recompute_granularity == "selective":
        parts = {"core_attn": attention, "mlp": mlp, "layernorm": Seconds()}
        return sum((parts[name] for name in training.recompute_modules or ["core_attn"]), Seconds())
    return Seconds()


def _transfer(config: Config, hardware: Hardware, data_parallel: int, size: float) -> float:
    """Seconds of `size` bytes from a pipeline rank to the next."""
    parallel = config.parallel
    stages = parallel.pipeline_model_parallel_size
    if stages == 1:
        return 0.0
    stride = parallel.tensor_model_parallel_size * parallel.context_parallel_size * data_parallel
    return size / hardware.link_rate(stages, stride)


@dataclass(frozen=True)
class StepCosts:
    """Seconds of what follows an iteration's passes, by the parameters that it concerns."""

    second_per_reduced: float
    """Of one gradient value of the rank, reduced over the replicas."""
    second_per_gathered: float
    """Of one parameter of the rank, gathered from the replicas; 0 without the distributed optimizer."""
    second_per_updated: float
    """Of one parameter of the rank, whose optimizer's state its replicas share with the distributed optimizer: the
    optimizer's memory traffic."""
    second_per_stepped: float
    """The part of it that a frozen parameter is spared, of one parameter whose state the rank holds."""
    second_per_tied: float
    """Of one value of the word embeddings, whose gradients the first and the last stage add up."""


def step_costs(config: Config, hardware: Hardware, data_parallel: int) -> StepCosts:
    """The costs for a config. data_parallel: replicas, without context parallelism."""
    parallel = config.parallel
    tensor, stages = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    size = data_parallel * parallel.context_parallel_size
    ring = (size - 1) / size / hardware.group_rate(size, tensor, size * tensor * stages)  # seconds a byte
    sharded = parallel.use_distributed_optimizer
    value = bytes_per_value(config)
    gradient = 4  # bytes: fp32, as the trainer and Megatron-LM reduce those of bf16
    # Adam reads gradient, weight and both moments and writes the last three; the norm reads the gradients, clipping
    # reads and writes them; from 16 bits they are copied to fp32 and the weights back.
    adam = 28
    update = adam + 4 + 8 + (0 if value == 4 else 8 + value)
    tied = 0.0
    if stages > 1 and not config.model.untie_embeddings_and_output_weights:
        tied = gradient / hardware.link_rate(stages, size * tensor)  # both ends send all: 2 (n - 1)/n = 1 for two
    return StepCosts(
        second_per_reduced=(1 if sharded else 2) * gradient * ring,
        second_per_gathered=value * ring if sharded else 0.0,
        second_per_updated=(update / (size if sharded else 1) + gradient) / hardware.memory_rate,
        second_per_stepped=adam / hardware.memory_rate,
        second_per_tied=tied,
    )


def bytes_per_value(config: Config) -> int:
    """Of weights and activations."""
    return 4 if config.training.precision == "fp32" else 2
