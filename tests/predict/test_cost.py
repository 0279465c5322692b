"""Seconds, bytes and parameters of the predictor against small cases computed by hand."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from benchmarks.bucket_model import Speeds, exposed_time, skipped
from megatron_sbld.config.sections import ModelConfig
from megatron_sbld.layout.placement import Placement
from megatron_sbld.predict.cost import pass_costs, step_costs
from megatron_sbld.predict.iteration import IterationModel
from megatron_sbld.predict.memory import activation_bytes, rank_memory
from megatron_sbld.predict.parameters import (
    chunk_parameters,
    layer_parameters,
    make_buckets,
    num_parameters,
    shard_sizes,
)
from tests.predict.predict_helpers import HARDWARE, make_setup

TOKENS, HIDDEN = 128, 256


def costs(efficiency=0.5, attention="flash", replicas=1, **fields):
    setup = make_setup(fields.pop("gpus", 1), attention=attention, **fields)
    return pass_costs(setup.config, setup.vocab_size, setup.hardware, replicas, attention, efficiency)


def test_a_group_within_a_node_has_its_links_and_one_over_nodes_its_part_of_the_network():
    assert HARDWARE.group_rate(8, 1, 16) == 100e9
    assert HARDWARE.group_rate(16, 1, 32) == 8 * 10e9  # eight rings enter each node
    assert HARDWARE.group_rate(4, 8, 32) == 10e9  # one rank on each node
    assert HARDWARE.group_rate(8, 2, 32) == 4 * 10e9
    assert HARDWARE.group_rate(4, 2, 16) == 100e9
    fast = dataclasses.replace(HARDWARE, inter_bandwidth=50.0)
    assert fast.group_rate(16, 1, 32) == 100e9  # the node's own links are narrower then
    assert HARDWARE.link_rate(2, 4) == 100e9
    assert HARDWARE.link_rate(4, 4) == 10e9


def test_a_group_that_does_not_divide_a_node_lies_on_two_and_the_slowest_decides():
    # 24 GPUs, 8 a node. TP 2 x DP 3: {0, 2, 4} is on a node, {6, 8, 10} has one rank on the first and two on the next.
    assert HARDWARE.group_rate(3, 2, 24) == 10e9
    assert HARDWARE.group_rate(3, 1, 24) == 10e9  # TP 3: {6, 7, 8}
    assert HARDWARE.group_rate(6, 1, 24) == 2 * 10e9  # TP 6: {6, ..., 11}
    assert HARDWARE.group_rate(3, 2, 6) == HARDWARE.group_rate(6, 1, 6) == 100e9  # a single block, at a node's start
    assert HARDWARE.group_rate(12, 1, 12) == 4 * 10e9
    fields = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 4, "global_batch_size": 15}
    setup = make_setup(24, **fields)
    expected = 2 * (2 / 3) * 4 / 10e9
    assert step_costs(setup.config, HARDWARE, 3).second_per_reduced == pytest.approx(expected)
    by_three = {"tensor_model_parallel_size": 3, "hidden_size": 192, "num_attention_heads": 3}
    within, across = (costs(gpus=3 * count, replicas=count, **by_three) for count in (1, 4))
    assert across.layer_forward.communication == pytest.approx(10 * within.layer_forward.communication)


def test_products_of_a_layer_take_its_flops_at_the_share_of_the_peak():
    # 24 h^2 + 4 h s / 2 FLOPs a token, half of the causal matrix; all of it without fused attention.
    flops = TOKENS * (24 * HIDDEN**2 + 4 * HIDDEN * TOKENS / 2)
    assert costs().layer_forward.matmul == pytest.approx(flops / 50e12)
    assert costs().layer_backward.matmul == pytest.approx(2 * flops / 50e12)
    whole = TOKENS * (24 * HIDDEN**2 + 4 * HIDDEN * TOKENS)
    assert costs(attention="unfused").layer_forward.matmul == pytest.approx(whole / 50e12)
    halved = costs(gpus=2, tensor_model_parallel_size=2)
    assert halved.layer_forward.matmul == pytest.approx(flops / 2 / 50e12)
    assert costs().output_forward.matmul == pytest.approx(TOKENS * 2 * HIDDEN * 1024 / 50e12)


def test_tensor_parallelism_reduces_twice_a_pass_and_sequence_parallelism_moves_as_many_bytes():
    reduction = 2 * (1 / 2) * (TOKENS * HIDDEN * 2) / 100e9  # 2 (t - 1)/t of the bytes
    plain = costs(gpus=2, tensor_model_parallel_size=2)
    assert costs().layer_forward.communication == 0
    assert plain.layer_forward.communication == pytest.approx(2 * reduction)
    split = costs(gpus=2, tensor_model_parallel_size=2, sequence_parallel=True)
    assert split.layer_forward.communication == pytest.approx(2 * reduction)
    assert split.layer_backward.communication >= reduction  # both gradients of row-parallel outputs are gathered


def test_what_runs_beside_a_product_counts_only_where_it_exceeds_it():
    reduction = TOKENS * HIDDEN * 2 / 100e9
    slow = costs(efficiency=1e-4, gpus=2, tensor_model_parallel_size=2)
    assert slow.layer_backward.communication == 0
    fast = costs(efficiency=1.0, gpus=2, tensor_model_parallel_size=2)
    qkv = TOKENS * 2 * HIDDEN * 3 * HIDDEN / 2 / 100e12
    mlp = TOKENS * 2 * HIDDEN * 4 * HIDDEN / 2 / 100e12
    expected = max(0.0, reduction - qkv) + max(0.0, reduction - mlp)
    assert 0 < expected < 2 * reduction
    assert fast.layer_backward.communication == pytest.approx(expected)


def test_full_recomputation_repeats_the_forward_pass_and_selective_the_attention_alone():
    none = costs(attention="unfused")
    full = costs(attention="unfused", recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    selective = costs(attention="unfused", recompute_granularity="selective")
    assert none.recomputed.total == 0
    assert full.recomputed == none.layer_forward
    assert selective.recomputed.matmul == pytest.approx(TOKENS * 4 * HIDDEN * TOKENS / 50e12)


def test_block_recomputation_repeats_the_first_layers_of_each_stage():
    setup = make_setup(
        2,
        pipeline_model_parallel_size=2,
        recompute_granularity="full",
        recompute_method="block",
        recompute_num_layers=1,
    )
    model = IterationModel(setup, 0.5)
    extra = model.layer_backward - model.costs.layer_backward.total
    assert extra == pytest.approx(model.costs.layer_forward.total * np.array([1, 0, 0, 0, 1, 0, 0, 0]), abs=1e-15)


def test_transfers_have_the_activations_bytes_and_sequence_parallelism_its_share():
    assert costs(gpus=2, pipeline_model_parallel_size=2).transfer == pytest.approx(TOKENS * HIDDEN * 2 / 100e9)
    split = costs(gpus=4, pipeline_model_parallel_size=2, tensor_model_parallel_size=2, sequence_parallel=True)
    assert split.transfer == pytest.approx(TOKENS * HIDDEN * 2 / 2 / 100e9)
    apart = costs(gpus=16, replicas=8, pipeline_model_parallel_size=2)
    assert apart.transfer == pytest.approx(TOKENS * HIDDEN * 2 / 10e9)


def test_reductions_and_gathers_by_hand():
    plain = step_costs(make_setup(4).config, HARDWARE, 4)
    assert plain.second_per_reduced == pytest.approx(2 * 3 / 4 * 4 / 100e9)
    assert plain.second_per_gathered == 0
    sharded = step_costs(make_setup(4, use_distributed_optimizer=True).config, HARDWARE, 4)
    assert sharded.second_per_reduced == pytest.approx(3 / 4 * 4 / 100e9)
    assert sharded.second_per_gathered == pytest.approx(3 / 4 * 2 / 100e9)
    # 28 + 4 + 8 + 8 + 2 bytes of a bf16 parameter's shard, and 4 to zero its gradient.
    assert sharded.second_per_updated == pytest.approx((50 / 4 + 4) / 1e12)
    assert step_costs(make_setup(1).config, HARDWARE, 1).second_per_reduced == 0


def test_without_overlap_a_reduction_follows_the_passes_as_a_whole():
    model = IterationModel(make_setup(2), 0.5)
    (params,) = [sum(size for size, _ in chunk_parameters(model.setup.config, 1024, model.setup.placement, 0))]
    assert model.undropped.exposed_reduction == pytest.approx(2 * (1 / 2) * 4 * params / 100e9)


@pytest.mark.parametrize("gbps", [0.5, 20.0, 1000.0])
def test_overlapped_reductions_are_those_of_the_bucket_model(gbps: float):
    hardware = dataclasses.replace(HARDWARE, intra_bandwidth=gbps)
    setup = make_setup(2, hardware=hardware, overlap_grad_reduce=True, ddp_bucket_size=500_000)
    model = IterationModel(setup, 0.5)
    (buckets,) = model.buckets
    assert len(buckets) > 5
    kept = np.array([[1] * 8, [1, 0, 0, 0, 0, 1, 1, 0], [0] * 8], dtype=bool)
    speed = Speeds(
        layer_backward=model.layer_backward[0],
        logits_backward=model.costs.output_backward.total,
        second_per_value=model.step_costs.second_per_reduced,
    )
    expected = exposed_time(buckets, kept, speed, skipped(buckets, kept))
    found = model.times([kept[:, None, :].astype(float)]).exposed_reduction
    # The embedding's backward pass is in ours alone: it ends the passes later, by itself.
    np.testing.assert_allclose(found, expected, atol=1.01 * model.costs.embedding_backward.total)
    assert skipped(buckets, kept)[2].any()


def test_only_the_first_chunk_of_the_first_stage_has_buckets():
    setup = make_setup(
        4,
        pipeline_model_parallel_size=2,
        num_virtual_stages_per_pipeline_rank=2,
        overlap_grad_reduce=True,
        ddp_bucket_size=500_000,
    )
    counts = [len(buckets) for buckets in IterationModel(setup, 0.5).buckets]
    assert counts[0] > 1
    assert counts[1:] == [1, 1, 1]


def test_a_gathered_parameter_is_waited_for_by_its_layer_alone():
    fields = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "ddp_bucket_size": 500_000}
    slow = dataclasses.replace(HARDWARE, intra_bandwidth=0.5)
    apart = IterationModel(make_setup(2, hardware=slow, **fields), 0.5).undropped
    beside = IterationModel(make_setup(2, hardware=slow, overlap_param_gather=True, **fields), 0.5)
    times = beside.undropped
    assert times.gather == 0
    # Gathering takes longer than the first forward pass: what it hides is what of that pass precedes the last bucket.
    hidden = apart.total - times.total
    first_pass = float(beside.passes(np.ones((1, 1, 8)))[0].sum())
    assert 0 < hidden[0] < first_pass


LAYER = 12 * 256**2 + 13 * 256
HALF_KEPT = np.array([[True] * 8, [True, False] * 4, [False] * 8])


def shares_of(kept):
    """[n, L] -> of one microbatch that stands for all, [n, 1, L]."""
    return kept[:, None, :].astype(float)


def test_freezing_spares_adam_the_dropped_layers():
    apply, freeze = (
        IterationModel(make_setup(1, dropped_update=update), 0.5).times([shares_of(HALF_KEPT)])
        for update in ("apply", "freeze")
    )
    spared = 28 * LAYER / (1000e9)  # seconds a layer: Adam's bytes at the memory's rate
    np.testing.assert_allclose(apply.step - freeze.step, [0, 4 * spared, 8 * spared], atol=1e-12)
    np.testing.assert_allclose(apply.total - freeze.total, [0, 4 * spared, 8 * spared], atol=1e-12)
    assert len(set(apply.step.tolist())) == 1


def test_freezing_saves_what_it_saves_on_the_slowest_rank():
    """Of two stages one drops nothing."""
    setup = make_setup(2, dropped_update="freeze", pipeline_model_parallel_size=2)
    kept = np.array([[True] * 8, [False] * 4 + [True] * 4])
    model = IterationModel(setup, 0.5)
    sizes = [sum(bucket.size for bucket in model.buckets[stage]) for stage in (0, 1)]
    expected = [size * model.step_costs.second_per_updated for size in sizes]
    assert model.times([shares_of(kept)]).step.tolist() == pytest.approx(expected)


def test_a_replica_that_holds_the_state_of_kept_layers_alone_steps_as_long_as_ever():
    """All of a chunk is one bucket, cut in two where the layers' parameters are: in front the last ones."""
    setup = make_setup(2, dropped_update="freeze", use_distributed_optimizer=True)
    model = IterationModel(setup, 0.5)
    assert model.state_sizes.sum() == num_parameters(setup.config, 1024)
    assert model.state_sizes.shape == (1, 2, 10)
    assert model.state_sizes[0].sum(axis=1) == pytest.approx([num_parameters(setup.config, 1024) / 2] * 2)
    assert model.state_sizes[0, 0, :4].sum() == model.state_sizes[0, 1, 6:].sum() == 0
    kept = np.array([[True] * 8, [False] * 3 + [True] * 5, [False] * 8])
    step = model.times([shares_of(kept)]).step
    assert step[0] == step[1] > step[2]


def test_replicas_of_a_stage_with_tied_embeddings_share_them_and_its_layers_evenly():
    """They have a bucket of their own there, else one replica would hold little but them."""
    setup = make_setup(4, dropped_update="freeze", use_distributed_optimizer=True, pipeline_model_parallel_size=2)
    model = IterationModel(setup, 0.5)
    assert [[bucket.owners for bucket in buckets] for buckets in model.buckets] == [
        [{0, 1, 2, 3, 4}, {0}],  # positions are with the layers
        [{9}, {5, 6, 7, 8, 9}],
    ]
    layers = model.state_sizes[:, :, 1:9].sum(axis=2)
    np.testing.assert_allclose(layers, np.full((2, 2), 2 * LAYER), rtol=0.03)
    kept = np.array([[True] * 8, [False] * 8])
    step = model.times([shares_of(kept)]).step
    assert step[0] - step[1] == pytest.approx(2 * LAYER * model.step_costs.second_per_stepped, rel=0.03)


@pytest.mark.parametrize("bucket_size", [100_000, 500_000, 2_000_000])
def test_every_value_of_every_bucket_is_held_by_one_replica(bucket_size):
    setup = make_setup(4)
    params = chunk_parameters(setup.config, 1024, setup.placement, 0)
    buckets = make_buckets(params, bucket_size)
    owner_of = np.repeat([owner for _, owner in reversed(params)], [size for size, _ in reversed(params)])
    expected = np.zeros((4, 10))
    begin = 0
    for bucket in buckets:
        for shard, values in enumerate(np.array_split(owner_of[begin : begin + bucket.size], 4)):
            expected[shard] += np.bincount(values, minlength=10)
        begin += bucket.size
    found = shard_sizes(params, buckets, 4, 10)
    np.testing.assert_allclose(found, expected, atol=len(buckets))  # where a bucket's size is no multiple of 4
    assert found.sum(axis=0).tolist() == pytest.approx(expected.sum(axis=0).tolist())


def test_freezing_leaves_out_gathers_of_buckets_that_hold_dropped_layers_alone():
    fields = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "ddp_bucket_size": 500_000}
    apply, freeze = (
        IterationModel(make_setup(2, dropped_update=update, **fields), 0.5) for update in ("apply", "freeze")
    )
    found = freeze.times([shares_of(HALF_KEPT)]).gather
    np.testing.assert_array_equal(apply.times([shares_of(HALF_KEPT)]).gather, found[0])
    kept = [bucket.size for bucket in freeze.buckets[0] if bucket.owners & {0, 9}]
    assert found[2] == pytest.approx(sum(kept) * freeze.step_costs.second_per_gathered)
    assert found[2] < found[1] <= found[0]


def test_a_parameter_count_is_megatrons_formula():
    model = ModelConfig(num_layers=8, hidden_size=256, num_attention_heads=4, seq_length=128)
    assert sum(layer_parameters(model)) == 12 * 256**2 + 13 * 256
    setup = make_setup(1)
    expected = 8 * (12 * 256**2 + 13 * 256) + (1024 + 128) * 256 + 2 * 256
    assert num_parameters(setup.config, 1024) == expected
    assert sum(size for size, _ in chunk_parameters(setup.config, 1024, setup.placement, 0)) == expected
    halves = make_setup(2, pipeline_model_parallel_size=2)
    chunks = [chunk_parameters(halves.config, 1024, halves.placement, chunk) for chunk in (0, 1)]
    assert sum(size for chunk in chunks for size, _ in chunk) == expected + 1024 * 256  # a copy of the embeddings
    assert {owner for _, owner in chunks[1]} == {5, 6, 7, 8, 9}


def test_grouped_queries_swiglu_and_missing_biases_by_hand():
    model = ModelConfig(
        hidden_size=256,
        num_attention_heads=8,
        num_query_groups=2,
        swiglu=True,
        ffn_hidden_size=512,
        add_bias_linear=False,
        normalization="RMSNorm",
    )
    attention = 256 * 256 + (256 + 2 * 2 * 32) * 256
    assert sum(layer_parameters(model)) == 2 * 256 + attention + 3 * 256 * 512


def test_activations_are_the_published_formula():
    def layer(attention="unfused", gpus=1, **fields):
        setup = make_setup(gpus, **fields)
        return activation_bytes(setup.config, 1024, attention).layer

    sbh, scores = TOKENS * HIDDEN, 5 * 4 * TOKENS / HIDDEN  # 5 a s / h
    assert layer() == sbh * (34 + scores)
    assert layer("flash") == sbh * 34
    assert layer(recompute_granularity="selective") == sbh * 34
    assert layer(gpus=2, tensor_model_parallel_size=2) == sbh * (10 + 24 / 2 + scores / 2)
    assert layer(gpus=2, tensor_model_parallel_size=2, sequence_parallel=True) == sbh * (34 + scores) / 2
    assert layer("flash", hidden_dropout=0.0) == sbh * 32
    assert layer("flash", precision="fp32", hidden_dropout=0.0) == sbh * 64


def test_a_rank_needs_18_bytes_a_parameter_and_the_distributed_optimizer_shards_12_of_them():
    (memory,) = rank_memory(IterationModel(make_setup(4), 0.5))
    count = memory.parameters
    assert memory.weights + memory.gradients + memory.optimizer == pytest.approx(18 * count / 1e9)
    (sharded,) = rank_memory(IterationModel(make_setup(4, use_distributed_optimizer=True), 0.5))
    assert sharded.optimizer == pytest.approx(12 * count / 4 / 1e9)
    (single,) = rank_memory(IterationModel(make_setup(4, precision="fp32"), 0.5))
    assert single.weights + single.gradients + single.optimizer == pytest.approx(16 * count / 1e9)


def test_a_stage_holds_its_layers_for_each_microbatch_in_flight_and_dropped_ones_leave_nothing():
    setup = make_setup(4, pipeline_model_parallel_size=4, hidden_dropout=0.0, attention="flash")
    model = IterationModel(setup, 0.5)
    half = np.zeros((1, 1, 8))
    half[..., ::2] = 1.0
    memory = rank_memory(model, half)
    layer = TOKENS * HIDDEN * 32
    output = TOKENS * (4 * HIDDEN + 4 * 1024)
    assert [rank.activations * 1e9 for rank in memory] == pytest.approx(
        [4 * 2 * layer, 3 * 2 * layer, 2 * 2 * layer, 2 * layer + output]
    )
    assert [rank.dropped_activations * 1e9 for rank in memory] == pytest.approx(
        [4 * layer, 3 * layer, 2 * layer, layer + output]
    )
    assert [rank.in_flight for rank in memory] == [4, 3, 2, 1]


def test_recomputed_layers_leave_their_inputs_and_one_is_whole_again():
    fields = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    (memory,) = rank_memory(IterationModel(make_setup(1, hidden_dropout=0.0, **fields), 0.5))
    output = TOKENS * (4 * HIDDEN + 4 * 1024)
    assert memory.activations * 1e9 == pytest.approx(TOKENS * HIDDEN * (8 * 2 + 32) + output)


@pytest.mark.parametrize("layers", [(8, 0), (5, 3)])
def test_unequal_stages_do_all_of_the_work(layers: tuple[int, int]):
    setup = dataclasses.replace(make_setup(2, pipeline_model_parallel_size=2), placement=Placement(layers, 2))
    model = IterationModel(setup, 0.5)
    run = model.run(np.ones((1, 1, 8)))
    parts = model.costs
    ends = parts.embedding_forward + parts.embedding_backward + parts.output_forward + parts.output_backward
    layers_work = 8 * (parts.layer_forward + parts.layer_backward).total
    assert run.busy.sum() == pytest.approx(16 * (layers_work + ends.total))


def test_the_parts_of_an_undropped_iteration_sum_to_it():
    for fields in ({}, {"pipeline_model_parallel_size": 2}, {"tensor_model_parallel_size": 2}):
        model = IterationModel(make_setup(4, use_distributed_optimizer=True, **fields), 0.5)
        parts = model.undropped_parts()
        assert sum(parts.values()) == pytest.approx(float(model.undropped.total[0]))
        assert min(parts.values()) >= -1e-12


def test_on_one_stage_waiting_for_parameters_is_gathering_and_no_bubble():
    slow = dataclasses.replace(HARDWARE, intra_bandwidth=0.5)
    fields = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
    model = IterationModel(make_setup(2, hardware=slow, **fields), 0.5)
    parts = model.undropped_parts()
    assert parts["pipeline bubble and waiting"] == 0
    size = sum(bucket.size for bucket in model.buckets[0])
    whole = size * model.step_costs.second_per_gathered
    assert 0.5 * whole < parts["parameter gathering, exposed"] <= whole
    assert sum(parts.values()) == pytest.approx(float(model.undropped.total[0]))
    stages = IterationModel(make_setup(4, hardware=slow, pipeline_model_parallel_size=2, **fields), 0.5)
    parts = stages.undropped_parts()
    assert min(parts["pipeline bubble and waiting"], parts["parameter gathering, exposed"]) > 0
    assert sum(parts.values()) == pytest.approx(float(stages.undropped.total[0]))


OVERLAPPED = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}


@pytest.mark.parametrize("kept", [1.0, 0.0])
def test_a_later_stages_gather_begins_with_its_first_pass_whether_its_layers_are_dropped_or_not(kept: float):
    slow = dataclasses.replace(HARDWARE, intra_bandwidth=0.5)
    fields = {"pipeline_model_parallel_size": 2, "ddp_bucket_size": 10**9, **OVERLAPPED}
    fields["untie_embeddings_and_output_weights"] = True  # tied ones have a bucket of their own
    model = IterationModel(make_setup(4, hardware=slow, **fields), 0.5)
    shares = np.full((1, 1, 8), kept)
    forward = model.passes(shares)[0][0, 0]
    gathers = [chunk[0].size * model.step_costs.second_per_gathered for chunk in model.buckets]
    assert [len(chunk) for chunk in model.buckets] == [1, 1]
    run = model.run(shares, record=True)
    first, second = (event for event in run.events if event.what.is_forward and event.what.microbatch == 0)
    assert first.end[0] == pytest.approx(gathers[0] + forward[0])
    assert second.start[0] == pytest.approx(first.end[0] + model.costs.transfer)
    assert second.end[0] == pytest.approx(second.start[0] + gathers[1] + forward[1])


def test_each_bucket_of_a_stage_is_gathered_while_the_one_before_is_in_use():
    def model(gbps: float) -> IterationModel:
        hardware = dataclasses.replace(HARDWARE, intra_bandwidth=gbps)
        fields = {"pipeline_model_parallel_size": 2, "ddp_bucket_size": 300_000, **OVERLAPPED}
        return IterationModel(make_setup(4, hardware=hardware, **fields), 0.5)

    def first_pass(model: IterationModel, kept: float) -> float:
        events = model.run(np.full((1, 1, 8), kept), record=True).events
        return float(next(event.end[0] for event in events if event.rank == 0))

    slow, fast = model(0.5), model(1e6)
    sizes = [bucket.size for bucket in slow.buckets[0]]
    assert len(sizes) > 4
    gather = sum(sizes) * slow.step_costs.second_per_gathered
    embedding, layers = slow.costs.embedding_forward.total, 4 * slow.layer_forward[0]
    assert gather <= first_pass(slow, 0.0) <= gather + embedding  # no layer to hide it behind
    assert gather < first_pass(slow, 1.0) < gather + embedding + layers
    first = sizes[-1] * fast.step_costs.second_per_gathered  # nothing hides this one
    assert first_pass(fast, 1.0) == pytest.approx(first + embedding + layers)
