"""Dropping under Megatron's other switches: the same losses and gradients as the same drops without them.

Multi-token prediction, embeddings on one stage or two, precision and loss scaling, clipping and counting, recomputation
of parts, uneven stages, and the options of the gradient reduction. test_layouts.py has the plain layouts, test_moe.py
the experts. docs/compatibility_evidence.md names the cases by their keys.
"""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

from tests.harness import model_parallel, run_distributed, single_process
from tests.mcore.helpers import heterogeneous_block_spec, tiny_config, tiny_gpt
from tests.mcore.skip import per_token_runs
from tests.mcore.skip.runs import (
    BLOCK_RECOMPUTE,
    BOTH_OVERLAPS,
    FULL_RECOMPUTE,
    OVERLAP,
    SELECTIVE_RECOMPUTE,
    SHARDED,
    Case,
    Result,
    assert_equals_reference,
    reference_result,
    run_case,
    run_cases,
)

pytestmark = pytest.mark.timeout(600)

PerTokenRuns = dict[tuple[str, int, str], per_token_runs.Found]

MTP = {"model": {"mtp_num_layers": 2}, "build": {"position_embedding_type": "rope"}}
UNTIED = {"build": {"tied": False}}
BF16 = {"model": {"bf16": True, "params_dtype": torch.bfloat16}, "relative": 1e-2}
# Three good steps in a row double the scale; the fifth iteration overflows, whatever the rounding.
FP16 = {
    "model": {"fp16": True, "params_dtype": torch.float16},
    "optimizer": {"initial_loss_scale": 2.0**10, "min_loss_scale": 1.0, "loss_scale_window": 3, "hysteresis": 1},
    "overflow_at": 5,
    "relative": 1e-2,
}
CLIPPED = {"optimizer": {"clip_grad": 0.05, "log_num_zeros_in_grad": True}}
PER_TOKEN = {"model": {"calculate_per_token_loss": True}}
LLAMA = {
    "model": {
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "num_query_groups": 2,
    },
    "build": {"position_embedding_type": "rope"},
}
ATTENTION, FEED_FORWARD = {"n_heads_in_group": 1}, {"ffn_mult": 2.0}
HETEROGENEOUS = {
    "model": {
        "heterogeneous_block_specs": True,
        "heterogeneous_layers_config_encoded_json": json.dumps(
            {
                "block_configs": [
                    {"attention": ATTENTION, "ffn": FEED_FORWARD},
                    {"attention": {"no_op": True, "n_heads_in_group": None}, "ffn": FEED_FORWARD},
                    {"attention": {"n_heads_in_group": 2}, "ffn": {"no_op": True, "ffn_mult": None}},
                    {"attention": ATTENTION, "ffn": {"replace_with_linear": True, "ffn_mult": None}},
                ]
            }
        ),
    },
    "build": {"spec": heterogeneous_block_spec},
}
MLP_RECOMPUTE = {"recompute_granularity": "selective", "recompute_modules": ["mlp"]}
SEQUENCE_PARALLEL = {"sequence_parallel": True}
BF16_REDUCTION = {"grad_reduce_in_fp32": False, "reduce_scatter_with_fp32_accumulation": True}


def case(*parts: dict[str, Any], **settings: Any) -> Case:
    merged: dict[str, Any] = {"layers": 4, "iterations": 6}
    for part in (*parts, settings):
        merged.update(part)
    return Case(**merged)


TWO_PROCESSES = {
    "MTP, PP 2, extreme": case(MTP, pp=2, policy="extreme"),
    "MTP, DP 2, both overlaps, bucket of a parameter, extreme": case(
        MTP, policy="extreme", ddp={**BOTH_OVERLAPS, "bucket_size": 1}
    ),
    "untied, PP 2 interleaved, both overlaps": case(UNTIED, pp=2, vpp=2, policy="extreme", ddp=BOTH_OVERLAPS),
    "bf16, DP 2, both overlaps": case(BF16, ddp=BOTH_OVERLAPS),
    "fp16 with an overflow, PP 2, extreme": case(FP16, pp=2, policy="extreme", iterations=8),
    "clipped and zeros counted, TP 2": case(CLIPPED, tp=2),
    "clipped and zeros counted, PP 2": case(CLIPPED, pp=2),
    "clipped and zeros counted, DP 2, both overlaps": case(CLIPPED, ddp=BOTH_OVERLAPS),
    "per-token loss, DP 2, both overlaps": case(PER_TOKEN, ddp=BOTH_OVERLAPS),
    "selective recomputation, PP 2, microbatch": case(pp=2, scope="microbatch", config=SELECTIVE_RECOMPUTE),
    "given up and repeated, PP 2, full recomputation, microbatch": case(
        pp=2, scope="microbatch", config=FULL_RECOMPUTE, given_up=True
    ),
    "given up and repeated, PP 2 interleaved, block recomputation, samples": case(
        pp=2, vpp=2, scope="microbatch", granularity="sample", config=BLOCK_RECOMPUTE, given_up=True
    ),
    "given up and repeated, DP 2, both overlaps, extreme": case(policy="extreme", ddp=BOTH_OVERLAPS, given_up=True),
    "PP 2, a first stage of one layer": case(pp=2, policy="extreme", config={"num_layers_in_first_pipeline_stage": 1}),
    "DP 2, gathers started by hooks alone": case(ddp={**BOTH_OVERLAPS, "align": False}, policy="extreme"),
    "PP 2 interleaved, gathers and reductions aligned": case(
        pp=2, vpp=2, policy="extreme", ddp={**BOTH_OVERLAPS, "align_param_gather": True}
    ),
}
MORE_ON_TWO_PROCESSES = {
    "MTP, DP 2, overlapped reduction": case(MTP, ddp=OVERLAP),
    "MTP, PP 2, full recomputation, microbatch": case(
        MTP, pp=2, scope="microbatch", config={**FULL_RECOMPUTE, "recompute_num_layers": 1}
    ),
    "untied, PP 2, extreme": case(UNTIED, pp=2, policy="extreme"),
    "tied, PP 2, rotary, extreme": case(build={"position_embedding_type": "rope"}, pp=2, policy="extreme"),
    "bf16, PP 2, extreme": case(BF16, pp=2, policy="extreme"),
    "fp16 with an overflow, DP 2, both overlaps": case(FP16, ddp=BOTH_OVERLAPS, iterations=8),
    "per-token loss, PP 2": case(PER_TOKEN, pp=2),
    "selective recomputation, TP 2 with sequence parallelism": case(
        tp=2, config={**SELECTIVE_RECOMPUTE, **SEQUENCE_PARALLEL}
    ),
    "recomputation of the MLP, PP 2, microbatch": case(pp=2, scope="microbatch", config=MLP_RECOMPUTE),
    "recomputation of the MLP, TP 2 with sequence parallelism, microbatch": case(
        tp=2, scope="microbatch", config={**MLP_RECOMPUTE, **SEQUENCE_PARALLEL}
    ),
    "full recomputation, distributed activations, TP 2, microbatch": case(
        tp=2,
        scope="microbatch",
        config={**FULL_RECOMPUTE, "recompute_num_layers": 1, "distribute_saved_activations": True},
    ),
    "PP 2, stages by layout": case(
        pp=2, vpp=2, policy="extreme", config={"pipeline_model_parallel_layout": "Et|t|t|tL"}
    ),
    "DP 2, average in the collective": case(ddp={**BOTH_OVERLAPS, "average_in_collective": True}),
    "DP 2, NaN and large gradients checked": case(
        policy="extreme", ddp={**BOTH_OVERLAPS, "check_for_nan_in_grad": True, "check_for_large_grads": True}
    ),
    "DP 2, buckets padded for bandwidth": case(ddp={**BOTH_OVERLAPS, "pad_buckets_for_high_nccl_busbw": True}),
    "DP 2, fp32 accumulation in the reduction, bf16": case(BF16, ddp={**SHARDED, **BF16_REDUCTION}, relative=2e-2),
    "PP 2 interleaved, gathers with the optimizer's step": case(
        pp=2,
        vpp=2,
        policy="extreme",
        ddp=BOTH_OVERLAPS,
        optimizer_switches={"overlap_param_gather_with_optimizer_step": True},
    ),
    "PP 2 interleaved, gathers and reductions not aligned": case(
        pp=2, vpp=2, policy="extreme", ddp={**BOTH_OVERLAPS, "align": False}
    ),
    "Llama's layers, PP 2, extreme": case(LLAMA, pp=2, policy="extreme"),
    "Llama's layers, TP 2 with sequence parallelism": case(LLAMA, tp=2, config=SEQUENCE_PARALLEL),
    "heterogeneous layers, PP 2, extreme": case(HETEROGENEOUS, pp=2, policy="extreme"),
    "heterogeneous layers, DP 2, both overlaps, PLD": case(HETEROGENEOUS, policy="pld", ddp=BOTH_OVERLAPS),
    "PP 2, variable sequence lengths": case(
        # Megatron asks for the dispatcher even of a model without experts.
        pp=2,
        config={"variable_seq_lengths": True, "moe_token_dispatcher_type": "alltoall"},
    ),
}
FOUR_PROCESSES = {
    "TP 2 x PP 2, sequence parallel": case(tp=2, pp=2, config=SEQUENCE_PARALLEL, iterations=10),
    "TP 2 x DP 2, both overlaps, extreme": case(tp=2, policy="extreme", ddp=BOTH_OVERLAPS, iterations=10),
    "PP 2 x DP 2, both overlaps": case(pp=2, ddp=BOTH_OVERLAPS, iterations=10),
    "PP 2 x DP 2, both overlaps, extreme": case(pp=2, policy="extreme", ddp=BOTH_OVERLAPS, iterations=10),
    "TP 2 x DP 2, sequence parallel, full recomputation, both overlaps": case(
        tp=2, config={**SEQUENCE_PARALLEL, **FULL_RECOMPUTE}, ddp=BOTH_OVERLAPS, iterations=10
    ),
    "MTP, PP 2 x DP 2, both overlaps, extreme": case(MTP, pp=2, policy="extreme", ddp=BOTH_OVERLAPS, iterations=10),
    "untied, PP 2 x DP 2, both overlaps, extreme": case(
        UNTIED, pp=2, policy="extreme", ddp=BOTH_OVERLAPS, iterations=10
    ),
    "fp16 with an overflow, PP 2 x DP 2, both overlaps, extreme": case(
        FP16, pp=2, policy="extreme", ddp=BOTH_OVERLAPS, iterations=10
    ),
    "bf16, TP 2 x PP 2, sequence parallel": case(
        BF16, tp=2, pp=2, config=SEQUENCE_PARALLEL, iterations=10, relative=3e-2
    ),
    "PP 2 x DP 2 interleaved, aligned, extreme": case(
        pp=2, vpp=2, policy="extreme", ddp={**BOTH_OVERLAPS, "align_param_gather": True}, iterations=10
    ),
}


def run_on_two_processes() -> tuple[dict[str, Result], PerTokenRuns]:
    return run_cases(TWO_PROCESSES), per_token_runs.run_all(per_token_runs.ON_TWO_PROCESSES)


@pytest.fixture(scope="module")
def both_on_two_processes() -> list[tuple[dict[str, Result], PerTokenRuns]]:
    return run_distributed(run_on_two_processes, 2, timeout=400)


@pytest.fixture(scope="module")
def two_processes(both_on_two_processes: list[tuple[dict[str, Result], PerTokenRuns]]) -> list[dict[str, Result]]:
    return [results for results, _ in both_on_two_processes]


@pytest.fixture(scope="module")
def per_token(both_on_two_processes: list[tuple[dict[str, Result], PerTokenRuns]]) -> PerTokenRuns:
    """Iterations of the trainer with calculate_per_token_loss, by layout, micro_batch_size and what is dropped."""
    return {**per_token_runs.run_alone(), **both_on_two_processes[0][1]}


@pytest.fixture(scope="module")
def whole_batch() -> dict[str, tuple[dict[str, float], float]]:
    """Gradients and loss of the whole batch at once, by what is dropped."""
    return {kept: per_token_runs.oracle(kept) for kept in per_token_runs.KEPT}


@pytest.fixture(scope="module")
def more_on_two_processes() -> list[dict[str, Result]]:
    return run_distributed(run_cases, 2, MORE_ON_TWO_PROCESSES, timeout=550)


@pytest.fixture(scope="module")
def four_processes() -> list[dict[str, Result]]:
    return run_distributed(run_cases, 4, FOUR_PROCESSES, timeout=400)


@pytest.mark.slow
@pytest.mark.parametrize("name", TWO_PROCESSES)
def test_two_processes_equal_one(two_processes: list[dict[str, Result]], name: str) -> None:
    assert_equals_reference(two_processes, name, TWO_PROCESSES[name])


@pytest.mark.slow
@pytest.mark.parametrize("kept", per_token_runs.KEPT)
@pytest.mark.parametrize("layout", per_token_runs.LAYOUTS)
def test_per_token_loss_has_the_gradient_of_the_whole_batch_whatever_the_size_of_a_microbatch(
    per_token: PerTokenRuns, whole_batch: dict[str, tuple[dict[str, float], float]], layout: str, kept: str
) -> None:
    gradients, loss = whole_batch[kept]
    for size in per_token_runs.MICRO_BATCH_SIZES:
        found = per_token[layout, size, kept]
        per_token_runs.assert_equal_gradients(found.gradients, gradients)
        assert found.result.loss == pytest.approx(loss, rel=1e-5)
        assert found.validation == pytest.approx(whole_batch["nothing dropped"][1], rel=1e-5), "it is at full depth"


@pytest.mark.slow
def test_megatrons_default_reports_the_mean_over_tokens_and_weighs_microbatches_alike(
    whole_batch: dict[str, tuple[dict[str, float], float]],
) -> None:
    """Otherwise the cases of the per-token loss would show nothing."""
    gradients, loss = whole_batch["nothing dropped"]
    samples, whole = per_token_runs.run_by_microbatch(1), per_token_runs.run_by_microbatch(per_token_runs.BATCH)
    assert [samples.result.loss, samples.validation, whole.validation] == pytest.approx([loss] * 3, rel=1e-5)
    per_token_runs.assert_equal_gradients(whole.gradients, gradients)
    with pytest.raises(AssertionError):
        per_token_runs.assert_equal_gradients(samples.gradients, gradients, relative=0.1)


@pytest.mark.slow
def test_a_microbatch_without_a_token_that_counts_reports_no_loss(per_token: PerTokenRuns) -> None:
    """0 would be taken for a perfect one where the sensitivity is estimated from single microbatches."""
    losses = per_token[per_token_runs.ALONE, 2, "nothing dropped"].result.microbatch_losses
    assert [math.isnan(loss) for loss in losses] == [False, False, True, False]


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE_ON_TWO_PROCESSES)
def test_more_switches_on_two_processes_equal_one(more_on_two_processes: list[dict[str, Result]], name: str) -> None:
    assert_equals_reference(more_on_two_processes, name, MORE_ON_TWO_PROCESSES[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", FOUR_PROCESSES)
def test_four_processes_equal_one(four_processes: list[dict[str, Result]], name: str) -> None:
    assert_equals_reference(four_processes, name, FOUR_PROCESSES[name])


def test_fp16_runs_leave_out_the_step_that_overflows_and_no_other() -> None:
    """Otherwise the cases above would not show an overflow at all."""
    result = reference_result(TWO_PROCESSES["fp16 with an overflow, PP 2, extreme"])
    assert result.updated == [iteration != 5 for iteration in range(1, 9)]
    assert result.loss_scales[3] == 2.0**11


@pytest.mark.slow
def test_zeros_are_counted_with_the_dropped_layers_and_equal_on_every_layout(
    two_processes: list[dict[str, Result]],
) -> None:
    names = [name for name in TWO_PROCESSES if name.startswith("clipped")]
    expected = reference_result(TWO_PROCESSES[names[0]])
    for name in names:
        for rank in two_processes:
            # A gradient may be zero by chance in one order of summation alone.
            assert rank[name].num_zeros == pytest.approx(expected.num_zeros, rel=1e-2, abs=10), name
    parameters_of_a_layer = 12 * 32 * 32 + 13 * 32
    for zeros, rows in zip(expected.num_zeros, expected.decisions, strict=True):
        assert zeros is not None
        assert zeros >= parameters_of_a_layer * (4 - sum(rows[0]))


def test_recomputation_of_parts_is_bitwise_the_same_in_one_process() -> None:
    with single_process():
        cases = {
            str(config): case(scope="microbatch", config=config, iterations=3)
            for config in (
                {},
                SELECTIVE_RECOMPUTE,
                {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]},
            )
        }
        plain, *others = run_cases(cases).values()
    for result in others:
        assert result.losses == plain.losses
        assert result.gradients == plain.gradients


@pytest.mark.parametrize("skip_bias_add", [True, False], ids=["Megatron's linear layers", "ours"])
def test_recomputing_an_mlp_with_biases_is_wrong_in_megatron_itself_alone(skip_bias_add: bool) -> None:
    """Its checkpoint returns the bias as an output, so that autograd takes the parameter for one of its results."""
    with single_process(), model_parallel():
        (chunk,) = tiny_gpt(tiny_config(**MLP_RECOMPUTE))
        linear = chunk.decoder.layers[0].mlp.linear_fc2
        assert not linear.skip_bias_add
        linear.skip_bias_add = skip_bias_add
        assert linear.bias.is_leaf
        tokens = torch.zeros(1, 8, dtype=torch.long)
        chunk.train()(tokens, torch.arange(8)[None], None)
        assert linear.bias.is_leaf == (not skip_bias_add)


def test_dropout_is_repeated_by_recomputation() -> None:
    dropout = {"model": {"hidden_dropout": 0.1, "attention_dropout": 0.1}}
    with single_process():
        plain = run_case(case(dropout, scope="microbatch", iterations=3))
        recomputed = run_case(case(dropout, scope="microbatch", iterations=3, config=FULL_RECOMPUTE))
    assert recomputed.losses == plain.losses
    assert recomputed.gradients == plain.gradients
