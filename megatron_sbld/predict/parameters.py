"""The parameters of a tensor-parallel rank in Megatron's order, and the buckets in which their gradients are reduced.

Buckets as in megatron-core 0.16.1 (distributed_data_parallel.py:65 and :92, param_and_grad_buffer.py:705): with
overlap_grad_reduce they close at a number of parameters on the first chunk of the first pipeline rank; every other
chunk has one bucket, and so has every chunk without the overlap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_sbld.config.flops import ffn_hidden_size
from megatron_sbld.config.sections import Config, ModelConfig
from megatron_sbld.layout.pipeline import Floats
from megatron_sbld.layout.placement import Placement


@dataclass(frozen=True)
class Bucket:
    """Parameters that are reduced together.

    Attributes:
        size: number of values.
        owners: whose they are: 0 the embedding's, 1 to L the layers', L + 1 the final norm's and the output layer's.
    """

    size: int
    owners: frozenset[int]


def default_bucket_size(data_parallel: int) -> int:
    """Megatron's, in parameters, with overlap_grad_reduce."""
    return max(40_000_000, 1_000_000 * data_parallel)


def make_buckets(params: Sequence[tuple[int, int]], bucket_size: float, alone: int | None = None) -> list[Bucket]:
    """Megatron's buckets, in the order in which they are reduced.

    From the last parameter to the first, a bucket is closed once it holds `bucket_size` values or more. Left out: the
    padding of the distributed optimizer.

    params: (values, owner as in Bucket) of each parameter, in Megatron's order.
    alone: position of a parameter that has a bucket of its own (`tied_table`).
    """
    buckets: list[Bucket] = []
    size: int = 0
    owners: set[int] = set()
    for position in reversed(range(len(params))):
        count, owner = params[position]
        if position == alone and size:
            buckets.append(Bucket(size, frozenset(owners)))
            size, owners = 0, set()
        size += count
        owners.add(owner)
        if size >= bucket_size or position == alone:
            buckets.append(Bucket(size, frozenset(owners)))
            size, owners = 0, set()
    return buckets + ([Bucket(size, frozenset(owners))] if size else [])


def shard_sizes(params: Sequence[tuple[int, int]], buckets: Sequence[Bucket], shards: int, owners: int) -> Floats:
    """How many values of each owner the distributed optimizer gives to each replica, [shards, owners].

    Every bucket is cut into equal ranges of values, whatever lies there (param_and_grad_buffer.py:82, shard_buffer).

    params, buckets: of a chunk, as make_buckets takes and gives them.
    owners: one more than the last of them.
    """
    sizes = np.zeros((shards, owners))
    ends = np.cumsum([bucket.size for bucket in buckets])
    edges = np.concatenate(
        [np.linspace(end - bucket.size, end, shards + 1)[:-1] for bucket, end in zip(buckets, ends, strict=True)]
    )  # where a range begins; its replica is the index modulo shards
    upper = np.append(edges[1:], ends[-1])
    begin = 0
    for count, owner in reversed(params):
        first, last = np.searchsorted(upper, begin, side="right"), np.searchsorted(edges, begin + count, side="left")
        for index in range(first, last):
            within = min(begin + count, upper[index]) - max(begin, edges[index])
            sizes[index % shards, owner] += within
        begin += count
    return sizes


def layer_parameters(model: ModelConfig, tensor_parallel: int = 1) -> list[int]:
    """Values of each parameter of a layer on a tensor-parallel rank.

    Column-parallel matrices are split with their biases; row-parallel ones (the projection, the MLP's second) are split
    and every rank has the whole bias.
    """
    hidden, ffn = model.hidden_size, ffn_hidden_size(model)
    head = model.kv_channels or hidden // model.num_attention_heads
    query = head * model.num_attention_heads
    queries_keys_values = query + 2 * head * (model.num_query_groups or model.num_attention_heads)
    mlp_in = (2 if model.swiglu else 1) * ffn
    norm = [hidden] if model.normalization == "RMSNorm" else [hidden, hidden]
    bias = model.add_bias_linear
    return [
        *norm,
        *(query * hidden // tensor_parallel, *([hidden] if bias else [])),
        *(
            queries_keys_values * hidden // tensor_parallel,
            *([queries_keys_values // tensor_parallel] if bias else []),
        ),
        *norm,
        *(mlp_in * hidden // tensor_parallel, *([mlp_in // tensor_parallel] if bias else [])),
        *(ffn * hidden // tensor_parallel, *([hidden] if bias else [])),
    ]


def chunk_parameters(config: Config, vocab_size: int, placement: Placement, chunk: int) -> list[tuple[int, int]]:
    """(values, owner as in Bucket) of each parameter of a chunk of the model (from 0) on a tensor-parallel rank.

    vocab_size: padded. With tied embeddings the last of several stages has a copy of them.
    """
    model, tensor = config.model, config.parallel.tensor_model_parallel_size
    chunks = len(placement.layers_per_chunk)
    first = sum(placement.layers_per_chunk[:chunk]) + 1
    table = vocab_size // tensor * model.hidden_size
    params = []
    if chunk == 0:
        params.append((table, 0))
        if model.position_embedding_type == "learned_absolute":
            params.append((model.context * model.hidden_size, 0))
    one_layer = layer_parameters(model, tensor)
    for layer in range(first, first + placement.layers_per_chunk[chunk]):
        params += [(size, layer) for size in one_layer]
    if chunk == chunks - 1:
        last = model.num_layers + 1
        params += [(model.hidden_size, last)] * (1 if model.normalization == "RMSNorm" else 2)
        if model.untie_embeddings_and_output_weights or chunks > 1:
            params.append((table, last))
    return params


def tied_table(config: Config, chunk: int, num_chunks: int, num_params: int) -> int | None:
    """Position among a chunk's parameters of tied embeddings that have a bucket of their own; None without such.

    The distributed optimizer gives them one on the first and the last of several stages (param_and_grad_buffer.py,
    _does_param_require_new_bucket).

    num_params: of the chunk, as `chunk_parameters` lists them.
    """
    tied = not config.model.untie_embeddings_and_output_weights and config.parallel.use_distributed_optimizer
    if not tied or num_chunks == 1 or chunk not in (0, num_chunks - 1):
        return None
    return 0 if chunk == 0 else num_params - 1


def num_parameters(config: Config, vocab_size: int) -> int:
    """Of the whole model, tied embeddings counted once."""
    model = config.model
    table = vocab_size * model.hidden_size * (2 if model.untie_embeddings_and_output_weights else 1)
    positions = model.context * model.hidden_size if model.position_embedding_type == "learned_absolute" else 0
    norm = model.hidden_size * (1 if model.normalization == "RMSNorm" else 2)
    return table + positions + model.num_layers * sum(layer_parameters(model)) + norm
