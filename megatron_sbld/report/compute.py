"""What runs have computed: the FLOPs of what ran, forward and backward, embeddings and logits included.

Rows of metrics.jsonl have them (`executed_flops`); for rows that older versions wrote they follow from the share of the
layers that ran. Recomputed activations, the optimizer, validation and evaluation are not counted.
"""

from __future__ import annotations

import numpy as np

from megatron_sbld.config.flops import attention_share, executed_flops, padded_vocab_size
from megatron_sbld.config.sections import Config
from megatron_sbld.data.tokenizer import load_tokenizer
from megatron_sbld.method.in_force import drops_tokens
from megatron_sbld.method.tokens import token_layers
from megatron_sbld.report.runs import FloatArray, RunData


def vocab_size_of(config: Config) -> int | None:
    """The padded vocabulary; None where the run's tokenizer is not found."""
    try:
        return padded_vocab_size(load_tokenizer(config.data.tokenizer).vocab_size, config)
    except ValueError:
        return None


def flops_until(run: RunData, iterations: FloatArray) -> FloatArray | None:
    """FLOPs from the start to the end of each of `iterations`; None where some row neither has them nor lets them be
    computed.
    """
    flops = _flops_of_rows(run)
    if flops is None:
        return None
    sums = np.concatenate([[0.0], np.cumsum(flops)])
    return np.asarray(sums[np.searchsorted(run.column("iteration"), iterations, side="right")])


def total_flops(run: RunData) -> float | None:
    """FLOPs of all iterations; None where they are not known."""
    flops = _flops_of_rows(run)
    return None if flops is None else float(flops.sum())


def kept_flops(run: RunData) -> FloatArray:
    """Share of the layers' FLOPs that each iteration ran, attention counted whole as in docs/method.md section 7."""
    drop, model = run.config.drop, run.config.model
    kept = run.column("kept_fraction")
    if not drops_tokens(drop):
        return kept
    layers = np.array(token_layers(drop.token_layers, model.num_layers)) - 1
    by_layer = np.array([row["kept"] for row in run.train])  # [iterations, L], in tokens
    attended = by_layer.copy()
    attended[:, layers] *= run.column("kept_tokens")[:, None] / model.seq_length
    share = attention_share(model)
    return np.asarray((1.0 - share) * kept + share * attended.mean(axis=1))


def _flops_of_rows(run: RunData) -> FloatArray | None:
    if all("executed_flops" in row for row in run.train):
        return run.column("executed_flops")
    vocab_size = vocab_size_of(run.config)
    if vocab_size is None:
        return None
    model = run.config.model
    layers = model.num_layers * run.column("kept_fraction")
    samples = np.diff(run.column("consumed_tokens"), prepend=0.0) / model.seq_length
    return np.array(
        [
            row.get("executed_flops") or executed_flops(model, vocab_size, batch, ran)
            for row, batch, ran in zip(run.train, samples, layers, strict=True)
        ]
    )
