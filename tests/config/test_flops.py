"""The FLOP counts equal Megatron-LM's own function and the figures of docs/method.md section 7."""

from __future__ import annotations

import pytest

from megatron_sbld.config.flops import (
    ideal_speedup,
    implied_keep_prob,
    layer_flops_per_token,
    layer_share,
    model_flops_per_token,
    padded_vocab_size,
    training_flops,
)
from megatron_sbld.config.sections import Config, ModelConfig, ParallelConfig

VOCAB = 51200
MODEL_1B7 = ModelConfig(num_layers=24, hidden_size=2304, num_attention_heads=24, seq_length=2048)
MODEL_3B6 = ModelConfig(num_layers=30, hidden_size=3072, num_attention_heads=32, seq_length=2048)
MODEL_350M = ModelConfig(num_layers=24, hidden_size=1024, num_attention_heads=16, seq_length=2048)
GQA_SWIGLU = ModelConfig(
    num_layers=32,
    hidden_size=4096,
    num_attention_heads=32,
    num_query_groups=8,
    ffn_hidden_size=14336,
    swiglu=True,
    seq_length=8192,
)
WIDE_HEADS = ModelConfig(
    num_layers=2, hidden_size=128, num_attention_heads=4, kv_channels=64, swiglu=True, seq_length=256
)


@pytest.mark.parametrize(
    ("model", "padded_vocab_size", "global_batch_size", "flops"),
    [
        (MODEL_1B7, VOCAB, 512, 1.1073181603332096e16),
        (MODEL_350M, VOCAB, 1, 4973572128768.0),
        (GQA_SWIGLU, 128256, 4, 1686582117531648.0),
        (WIDE_HEADS, 384, 8, 9059696640.0),
    ],
    ids=["1.7B", "350M", "grouped queries and swiglu", "heads wider than the model"],
)
def test_iteration_flops_equal_what_megatron_lm_0_16_1_returns(model, padded_vocab_size, global_batch_size, flops):
    """The expected values were printed by its num_floating_point_operations; swiglu's default width is 384 for 128."""
    assert training_flops(model, padded_vocab_size, global_batch_size) == pytest.approx(flops, rel=1e-12)


def test_iteration_flops_are_token_flops_times_the_tokens_of_the_batch():
    per_iteration = training_flops(MODEL_350M, VOCAB, 16)
    assert per_iteration == pytest.approx(16 * 2048 * model_flops_per_token(MODEL_350M, VOCAB), rel=1e-12)


def test_full_attention_counts_twice_the_causal_attention_and_nothing_else():
    extra = layer_flops_per_token(MODEL_1B7, causal=False) - layer_flops_per_token(MODEL_1B7, causal=True)
    assert extra == 2 * 2 * 2304 * 2048 / 2


def test_full_count_is_the_formula_of_megatrons_2021_paper():
    """96 B s l h^2 (1 + s / 6h + V / 16lh) with recomputation: a quarter of its layer part is one forward pass."""
    hidden, seq = 2304, 2048
    assert layer_flops_per_token(MODEL_1B7, causal=False) == pytest.approx(24 * hidden**2 * (1 + seq / (6 * hidden)))


@pytest.mark.parametrize(
    ("vocab_size", "tensor_parallel", "padded"), [(50257, 1, 50304), (50257, 8, 51200), (259, 1, 384), (384, 1, 384)]
)
def test_vocabulary_is_padded_to_a_multiple_for_every_tensor_parallel_rank(vocab_size, tensor_parallel, padded):
    config = Config(parallel=ParallelConfig(tensor_model_parallel_size=tensor_parallel))
    assert padded_vocab_size(vocab_size, config) == padded


@pytest.mark.parametrize(
    ("model", "recompute", "phi"),
    [(MODEL_1B7, True, 0.952), (MODEL_3B6, True, 0.970), (MODEL_1B7, False, 0.937), (MODEL_3B6, False, 0.960)],
)
def test_layer_share_of_the_papers_models(model, recompute, phi):
    assert layer_share(model, VOCAB, recompute=recompute) == pytest.approx(phi, abs=5e-4)


@pytest.mark.parametrize(
    ("model", "gain", "mean_keep_prob"),
    [
        (MODEL_1B7, 0.0836, 0.919),
        (MODEL_1B7, 0.2074, 0.820),
        (MODEL_1B7, 0.3469, 0.730),
        (MODEL_1B7, 0.0419, 0.958),
        (MODEL_1B7, 0.1435, 0.868),
        (MODEL_1B7, 0.2697, 0.777),
        (MODEL_3B6, 0.0791, 0.924),
        (MODEL_3B6, 0.1928, 0.833),
        (MODEL_3B6, 0.3118, 0.755),
        (MODEL_3B6, 0.0340, 0.966),
        (MODEL_3B6, 0.1249, 0.886),
        (MODEL_3B6, 0.2187, 0.815),
    ],
)
def test_implied_keep_prob_of_the_papers_measured_gains(model, gain, mean_keep_prob):
    phi = layer_share(model, VOCAB, recompute=True)
    assert implied_keep_prob(phi, 1 + gain) == pytest.approx(mean_keep_prob, abs=1e-3)


@pytest.mark.parametrize("mean_keep_prob", [0.0, 0.4, 0.73, 1.0])
def test_implied_keep_prob_inverts_ideal_speedup(mean_keep_prob):
    assert implied_keep_prob(0.952, ideal_speedup(0.952, mean_keep_prob)) == pytest.approx(mean_keep_prob, abs=1e-12)


def test_ideal_speedup_is_one_when_nothing_is_dropped_and_doubles_when_half_of_everything_is():
    assert ideal_speedup(0.952, 1.0) == 1.0
    assert ideal_speedup(1.0, 0.5) == 2.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ideal_speedup(1.2, 0.5), r"phi = 1\.2 .* in \[0, 1\]"),
        (lambda: ideal_speedup(0.9, -0.1), r"mean_keep_prob = -0\.1 .* in \[0, 1\]"),
        (lambda: ideal_speedup(1.0, 0.0), "leaves nothing to run"),
        (lambda: implied_keep_prob(0.0, 1.1), r"phi = 0\.0 .* in \(0, 1\]"),
        (lambda: implied_keep_prob(0.9, 0.0), r"speedup = 0\.0 .* in \(0, inf\)"),
    ],
)
def test_values_out_of_range_are_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()
