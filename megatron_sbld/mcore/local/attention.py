"""Core attention through torch's scaled_dot_product_attention, for machines without Transformer Engine.

Takes the place of megatron.core's DotProductAttention in a layer spec, with the same constructor and call, on CPU and
GPU. That one builds the whole [b, heads, s, s] matrix of scores and cannot run context-parallel; this one uses torch's
fused kernels, and under context parallelism gathers keys and values of the whole sequence on every rank.

What it cannot do (packed sequences, sliding windows, softmax offsets, an attention bias, fp8 attention, QK clipping) it
refuses by name.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region, get_cuda_rng_tracker
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn.functional import scaled_dot_product_attention

MASK_TYPES = (AttnMaskType.causal, AttnMaskType.no_mask, AttnMaskType.padding, AttnMaskType.arbitrary)


class SDPACoreAttention(MegatronModule):
    """softmax(scale * Q K^T + mask) V with dropout on the probabilities, for this rank's heads.

    Without an explicit mask the mask type decides: causal, or none. An explicit mask is used alone, as in Megatron.
    `apply_query_key_layer_scaling` changes nothing here: it divides the scores by the layer number and multiplies them
    again before the softmax, against overflow in fp16, where these kernels accumulate scores in fp32.

    Args:
        config: of the model; heads and query groups must be divisible by the tensor-parallel size.
        layer_number: 1-based; unused, part of the contract.
        attn_mask_type: which mask applies when none is given.
        attention_type: "self".
        attention_dropout: drop probability; None takes the config's.
        softmax_scale: None is 1 / sqrt(kv_channels).
        cp_comm_type: how context-parallel ranks exchange keys and values: None or "all_gather".
        pg_collection: process groups (tp, and cp under context parallelism); None takes Megatron's global ones.

    Raises:
        ValueError: the config asks for something that this attention does not do.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        _refuse_unsupported(config, attn_mask_type, attention_type, cp_comm_type)
        context_parallel = config.context_parallel_size > 1
        if pg_collection is None:
            required = ["tp", "cp"] if context_parallel else ["tp"]
            pg_collection = ProcessGroupCollection.use_mpu_process_groups(required_pgs=required)
        self.cp_group = pg_collection.cp if context_parallel else None
        self.attn_mask_type = attn_mask_type
        self.softmax_scale = 1.0 / math.sqrt(config.kv_channels) if softmax_scale is None else softmax_scale
        self.dropout_prob = config.attention_dropout if attention_dropout is None else attention_dropout

    def forward(
        self,
        query: torch.Tensor,  # [sq, b, heads, d], heads and groups of this tensor-parallel rank
        key: torch.Tensor,  # [sk, b, groups, d]
        value: torch.Tensor,  # [sk, b, groups, d]
        attention_mask: torch.Tensor | None,  # bool [b or 1, 1, sq, sk], True = not attended
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> torch.Tensor:
        """Attention output [sq, b, heads * d]; under context parallelism sq is the length of this rank's chunks.

        Raises:
            ValueError: an attention bias or packed sequences are given.
        """
        _refuse_given(attention_bias=attention_bias, packed_seq_params=packed_seq_params)
        causal = (attn_mask_type or self.attn_mask_type) == AttnMaskType.causal
        # One query (a token decoded with cached keys) sees all keys.
        needs_causal_mask = causal and attention_mask is None and query.size(0) > 1
        allowed = None if attention_mask is None else ~attention_mask  # SDPA: True = attended
        if self.cp_group is not None:
            key, value = gather_sequence(key, value, self.cp_group)
            if needs_causal_mask:
                allowed = causal_mask_of_rank(query.size(0), self.cp_group, query.device)
        if query.size(2) != key.size(2):
            key, value = (x.repeat_interleave(query.size(2) // x.size(2), dim=2) for x in (key, value))
        dropout_prob = self.dropout_prob if self.training else 0.0
        with self._random_state(dropout_prob):
            context = scaled_dot_product_attention(  # on [b, heads, s, d]
                query.permute(1, 2, 0, 3),
                key.permute(1, 2, 0, 3),
                value.permute(1, 2, 0, 3),
                attn_mask=allowed,
                dropout_p=dropout_prob,
                is_causal=needs_causal_mask and allowed is None,
                scale=self.softmax_scale,
            )
        return context.permute(2, 0, 1, 3).flatten(2)  # [sq, b, heads * d]

    def _random_state(self, dropout_prob: float) -> Any:
        """The tensor-parallel rank's own random state for dropout: ranks hold different heads.

        With sequence parallelism TransformerBlock has switched to it already. One rank alone may take any state, and a
        compiled graph cannot switch.
        """
        alone = self.config.tensor_model_parallel_size == 1
        if dropout_prob == 0.0 or self.config.sequence_parallel or (alone and torch.compiler.is_compiling()):
            return nullcontext()
        return get_cuda_rng_tracker().fork()


def gather_sequence(
    key: torch.Tensor, value: torch.Tensor, cp_group: torch.distributed.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [s / cp, b, groups, d] of this rank -> those of the whole sequence [s, b, groups, d], in order.

    Backward sums each position's gradient over the ranks and returns this rank's part. Rank i holds chunks i and
    2 cp - 1 - i of the sequence's 2 cp chunks (megatron.core.utils.get_batch_on_this_cp_rank).
    """
    cp_size, head_size = cp_group.size(), key.size(-1)
    gathered = gather_from_sequence_parallel_region(torch.cat((key, value), dim=-1), group=cp_group)
    chunks = gathered.unflatten(0, (2 * cp_size, -1))  # chunks 0, 2 cp - 1, 1, 2 cp - 2, ...
    order = [2 * i if i < cp_size else 2 * (2 * cp_size - 1 - i) + 1 for i in range(2 * cp_size)]
    in_order = chunks.index_select(0, torch.tensor(order, device=chunks.device)).flatten(0, 1)
    return in_order[..., :head_size], in_order[..., head_size:]


def causal_mask_of_rank(
    local_length: int, cp_group: torch.distributed.ProcessGroup, device: torch.device
) -> torch.Tensor:
    """bool [s / cp, s], True = attended: which keys of the whole sequence each query of this rank's two chunks sees."""
    cp_size, cp_rank, chunk = cp_group.size(), cp_group.rank(), local_length // 2
    within = torch.arange(chunk, device=device)
    queries = torch.cat((cp_rank * chunk + within, (2 * cp_size - 1 - cp_rank) * chunk + within))
    return queries[:, None] >= torch.arange(cp_size * local_length, device=device)


def _refuse_unsupported(
    config: TransformerConfig, attn_mask_type: AttnMaskType, attention_type: str, cp_comm_type: str | None
) -> None:
    """Raise for what would otherwise be computed wrongly or ignored, naming it."""
    unsupported = {
        "window_size": config.window_size is not None,
        "softmax_type": config.softmax_type != "vanilla",
        "multi_latent_attention": config.multi_latent_attention,
        "fp8_dot_product_attention": config.fp8_dot_product_attention,
        "qk_clip": config.qk_clip,
        "log_max_attention_logit": config.log_max_attention_logit,
    }
    for name, refused in unsupported.items():
        if refused:
            raise ValueError(f"{name}={getattr(config, name)!r} needs Transformer Engine's attention; leave it unset")
    if attn_mask_type not in MASK_TYPES:
        raise ValueError(f"attn_mask_type={attn_mask_type}: must be one of {[mask.name for mask in MASK_TYPES]}")
    if attention_type != "self":
        raise ValueError(f"attention_type={attention_type!r}: must be 'self'")
    if config.context_parallel_size > 1 and cp_comm_type not in (None, "all_gather"):
        raise ValueError(f"cp_comm_type={cp_comm_type!r}: must be 'all_gather' without Transformer Engine")


def _refuse_given(**arguments: Any) -> None:
    for name, value in arguments.items():
        if value is not None:
            raise ValueError(f"{name} needs Transformer Engine's attention; it must be None")
