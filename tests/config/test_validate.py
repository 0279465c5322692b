"""Mistakes in a config are found before anything starts, each named with its field, its value and what is allowed."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sbld.config.sections import Config
from megatron_sbld.config.stages import placement_of
from megatron_sbld.config.validate import data_parallel_size, train_iterations, validate
from tests.training.trainer_helpers import change

VALID = change(
    Config(), training={"train_iters": 100}, data={"train_data_path": ["somewhere"]}, model={"num_layers": 12}
)

MISTAKES: list[tuple[dict[str, dict[str, Any]], str]] = [
    (
        {"training": {"cross_entropy_loss_fusion": True, "precision": "fp16"}},
        r"training.cross_entropy_loss_fusion = True does not work with training.precision = 'fp16': Megatron's "
        "fused loss gives its "
        r"gradient in bf16; must be false or null there",
    ),
    (
        {"training": {"torch_compile": True}, "parallel": {"tensor_model_parallel_size": 2}},
        r"training.torch_compile = True does not work with parallel.tensor_model_parallel_size = 2: a layer "
        "communicates; must be 1",
    ),
    (
        {"training": {"torch_compile": True}, "parallel": {"context_parallel_size": 2}},
        r"training.torch_compile = True does not work with parallel.context_parallel_size = 2: a layer "
        "communicates; must be 1",
    ),
    (
        {
            "training": {"torch_compile": True},
            "parallel": {
                "use_distributed_optimizer": True,
                "overlap_grad_reduce": True,
                "overlap_param_gather": True,
            },
        },
        r"training.torch_compile = True does not work with parallel.overlap_param_gather = True: modules inside a "
        "layer wait for "
        r"their parameters; must be false",
    ),
    (
        {"training": {"torch_compile": True, "recompute_granularity": "selective"}},
        r"training.torch_compile = True does not work with training.recompute_granularity = 'selective': "
        r"the compiled graph decides what to recompute; must be full or null",
    ),
    (
        {"training": {"torch_compile": True}, "drop": {"policy": "pld", "theta": 0.5, "residual": "fused"}},
        r"training.torch_compile = True does not work with drop.residual = 'fused' and drop.residual_scale = "
        r"'inverse_keep_prob': each scale would be compiled anew; set drop.residual stock, or drop.residual_scale none "
        r"\(PLD's own is inverse_keep_prob\)",
    ),
    (
        {
            "training": {"torch_compile": True},
            "drop": {
                "policy": "layerdrop",
                "theta": 0.5,
                "residual": "fused",
                "residual_scale": "inverse_keep_prob",
            },
        },
        r"training.torch_compile = True does not work with drop.residual = 'fused' and drop.residual_scale = 'inv",
    ),
    # Ranges of single fields.
    ({"model": {"num_layers": 0}}, r"model.num_layers = 0 is not allowed: it must be an integer of at least 1"),
    (
        {"model": {"hidden_size": -1024}},
        r"model.hidden_size = -1024 is not allowed: it must be an integer of at least 1",
    ),
    ({"model": {"hidden_dropout": 1.0}}, r"model.hidden_dropout = 1.0 is not allowed: it must be a number in \[0, 1\)"),
    (
        {"model": {"attention_dropout": float("nan")}},
        r"model.attention_dropout = nan is not allowed: it must be a number in \[0, 1\)",
    ),
    (
        {"model": {"layernorm_epsilon": 0.0}},
        r"model.layernorm_epsilon = 0.0 is not allowed: it must be a number in \(0, inf\)",
    ),
    ({"model": {"rotary_percent": 1.5}}, r"model.rotary_percent = 1.5 is not allowed: it must be a number in \(0, 1\]"),
    (
        {"parallel": {"tensor_model_parallel_size": 0}},
        r"parallel.tensor_model_parallel_size = 0 is not allowed: it must be an integer of at least 1",
    ),
    (
        {"parallel": {"ddp_bucket_size": 0}},
        r"parallel.ddp_bucket_size = 0 is not allowed: it must be an integer of at least 1",
    ),
    (
        {"parallel": {"distributed_timeout_minutes": 0.05}},
        r"parallel.distributed_timeout_minutes = 0.05 is not allowed: it must be a number in \[0.1, 100000\]",
    ),
    ({"data": {"num_workers": -1}}, r"data.num_workers = -1 is not allowed: it must be an integer of at least 0"),
    ({"optimizer": {"lr": float("inf")}}, r"optimizer.lr = inf is not allowed: it must be a number in \(0, inf\)"),
    ({"optimizer": {"min_lr": -1e-5}}, r"optimizer.min_lr = -1e-05 is not allowed: it must be a number in \[0, inf\)"),
    ({"optimizer": {"adam_beta2": 1.0}}, r"optimizer.adam_beta2 = 1.0 is not allowed: it must be a number in \[0, 1\)"),
    (
        {"optimizer": {"clip_grad": -1.0}},
        r"optimizer.clip_grad = -1.0 is not allowed: it must be a number in \[0, inf\)",
    ),
    (
        {"training": {"micro_batch_size": 0}},
        r"training.micro_batch_size = 0 is not allowed: it must be an integer of at least 1",
    ),
    ({"training": {"train_iters": 0}}, r"training.train_iters = 0 is not allowed: it must be an integer of at least 1"),
    ({"training": {"eval_iters": 0}}, r"training.eval_iters = 0 is not allowed: it must be an integer of at least 1"),
    ({"training": {"seed": -1}}, r"training.seed = -1 is not allowed: it must be an integer in \[0, 2147483647\]"),
    ({"training": {"seed": 2**32}}, r"training.seed = 4294967296 is not allowed: it must be an integer in"),
    (
        {"training": {"exit_after_iterations": 0}},
        r"training.exit_after_iterations = 0 is not allowed: it must be an integer of at least 1",
    ),
    ({"training": {"loss_scale": 0.0}}, r"training.loss_scale = 0.0 is not allowed: it must be a number in \(0, inf\)"),
    ({"checkpoint": {"keep_last": 0}}, r"checkpoint.keep_last = 0 is not allowed: it must be an integer of at least 1"),
    (
        {"checkpoint": {"save_interval": -5}},
        r"checkpoint.save_interval = -5 is not allowed: it must be an integer of at least 0",
    ),
    ({"logging": {"log_interval": 0}}, r"logging.log_interval = 0 is not allowed: it must be an integer of at least 1"),
    # Model.
    (
        {"model": {"hidden_size": 1000}},
        r"model.hidden_size = 1000: must be divisible by model.num_attention_heads = 16",
    ),
    (
        {"model": {"activation_func": "gelu_tanh", "swiglu": True}},
        r"model.activation_func = 'gelu_tanh' does not work with model.swiglu = True: .* no effect; leave it out",
    ),
    ({"model": {"num_query_groups": 5}}, r"model.num_query_groups = 5: must divide model.num_attention_heads = 16"),
    (
        {"model": {"position_embedding_type": "rope"}, "data": {"reset_position_ids": True}},
        r"data.reset_position_ids = True does not work with model.position_embedding_type = 'rope': it has no "
        "effect there",
    ),
    (
        {"model": {"num_query_groups": 2}, "parallel": {"tensor_model_parallel_size": 4}},
        r"model.num_query_groups = 2: must be divisible by parallel.tensor_model_parallel_size = 4",
    ),
    (
        {"model": {"max_position_embeddings": 8}},
        r"model.max_position_embeddings = 8: must be at least model.seq_length",
    ),
    (
        {"model": {"position_embedding_type": "rope", "rotary_percent": 0.11}},
        r"model.rotary_percent = 0.11: rotates 7 channels of a head; must be an even number",
    ),
    (
        {"model": {"ffn_hidden_size": 1001}, "parallel": {"tensor_model_parallel_size": 2}},
        r"model.ffn_hidden_size = 1001: must be divisible by parallel.tensor_model_parallel_size = 2",
    ),
    # Layout, on 8 processes.
    ({"parallel": {"tensor_model_parallel_size": 16}}, r"8 processes: must be a multiple of .* = 16"),
    ({"parallel": {"tensor_model_parallel_size": 3}}, r"8 processes: must be a multiple of .* = 3"),
    ({"parallel": {"pipeline_model_parallel_size": 8}}, r"model.num_layers = 12: must be divisible by the 8 pipeline"),
    (
        {"parallel": {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 4}},
        r"model.num_layers = 12: must be divisible by the 8 pipeline stages",
    ),
    (
        {"parallel": {"num_virtual_stages_per_pipeline_rank": 2}},
        r"parallel.num_virtual_stages_per_pipeline_rank = 2 does not .* it needs "
        "parallel.pipeline_model_parallel_size > 1",
    ),
    (
        {"parallel": {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 1}},
        r"parallel.num_virtual_stages_per_pipeline_rank = 1 is not allowed: it must be an integer of at least 2",
    ),
    *(
        (
            {"parallel": {"pipeline_model_parallel_size": 2, "pipeline_model_parallel_layout": layout}},
            rf"parallel.pipeline_model_parallel_layout = '{re.escape(layout)}': {reason} \(parallel.* = 2\)",
        )
        for layout, reason in (
            ("Et*5|t*6L", "has 11 layers t: must have the 12 of the model"),
            ("Et*4|t*4|t*4L", "has 3 stages: must have 2, with \\| between them"),
            ("t*6|t*6L", "the embedding E must open the first stage, and be nowhere else"),
            ("Et*6|Lt*6", "the loss L must close the last stage, and be nowhere else"),
            ("Et*6|m|t*6L", "has 3 stages: must have 2, with \\| between them"),
            ("Et*6|mt*6L", "m is not allowed: there are no multi-token prediction layers"),
            ("Ed*6|t*6L", "'d' is not known: E is the embedding, t a layer, .*"),
        )
    ),
    (
        {
            "parallel": {
                "pipeline_model_parallel_size": 2,
                "num_virtual_stages_per_pipeline_rank": 2,
                "pipeline_model_parallel_layout": "Et*5|t*7L",
            }
        },
        r"parallel.pipeline_model_parallel_layout = 'Et\*5\|t\*7L': has 2 stages: must have 4.* = 4\)",
    ),
    (
        {"parallel": {"pipeline_model_parallel_layout": "Et*5|t*7L"}},
        r"parallel.pipeline_model_parallel_layout = 'Et\*5\|t\*7L': has 2 stages: must have 1.* = 1\)",
    ),
    ({"parallel": {"sequence_parallel": True}}, r"parallel.sequence_parallel = True .* it needs parallel.tensor_model"),
    (
        {
            "model": {"seq_length": 33},
            "parallel": {"sequence_parallel": True, "tensor_model_parallel_size": 2},
        },
        r"model.seq_length = 33: with sequence_parallel it must be divisible by 2",
    ),
    (
        {"model": {"seq_length": 34}, "parallel": {"context_parallel_size": 2}},
        r"model.seq_length = 34: must be divisible by 2 \* parallel.context_parallel_size = 4",
    ),
    (
        {"parallel": {"overlap_param_gather": True}},
        r"parallel.overlap_param_gather = True .* it needs parallel.use_distri",
    ),
    (
        {
            "drop": {"policy": "pld", "sampler": "balanced", "replicas": "distinct"},
            "parallel": {"overlap_grad_reduce": True},
        },
        r"drop.replicas = 'distinct' does not work with parallel.overlap_grad_reduce = True and drop.granularity = "
        "'layer'",
    ),
    (
        {
            "drop": {"policy": "pld", "granularity": "sample", "replicas": "distinct"},
            "training": {"micro_batch_size": 1},
        },
        r"drop.replicas = 'distinct' does not work with training.micro_batch_size = 1 and drop.granularity = 'sample'",
    ),
    # Length and batch.
    (
        {"training": {"train_iters": None}},
        r"training.train_iters = None does not work with training.train_samples = None: .* give exactly",
    ),
    (
        {"training": {"train_samples": 100}},
        r"training.train_iters = 100 does not work with training.train_samples = 100: .* give exactly",
    ),
    ({"training": {"global_batch_size": 12}}, r"training.global_batch_size = 12: must be divisible by .* = 1 \* 8"),
    ({"training": {"global_batch_size": 8, "micro_batch_size": 2}}, r"training.global_batch_size = 8: must be divis"),
    (
        {
            "parallel": {"pipeline_model_parallel_size": 4, "num_virtual_stages_per_pipeline_rank": 3},
            "training": {"global_batch_size": 2},
        },
        r"training.global_batch_size = 2: must be divisible by .* = 8 \(the interleaved schedule",
    ),
    (
        {"training": {"rampup_batch_size": [8, 8, 10**15], "global_batch_size": 32}},
        r"training.rampup_batch_size = .*: its samples make more than 1,000,000 iterations of 8",
    ),
    ({"training": {"rampup_batch_size": [8]}}, r"training.rampup_batch_size = \[8\]: must be three positive numbers"),
    (
        {"training": {"rampup_batch_size": [8, 0, 8]}},
        r"training.rampup_batch_size = \[8, 0, 8\]: must be three positive",
    ),
    (
        {"training": {"rampup_batch_size": [8, 16, 100], "global_batch_size": 32}},
        r"training.rampup_batch_size = \[8, 16, 100\]: start plus one or more times the increment must give .* = 32",
    ),
    (
        {"training": {"rampup_batch_size": [8, 8, 100]}},
        r"training.rampup_batch_size = \[8, 8, 100\]: start plus one or",
    ),
    (
        {"training": {"rampup_batch_size": [4, 4, 100], "global_batch_size": 32}},
        r"training.rampup_batch_size's start = 4: must be divisible by",
    ),
    ({"training": {"train_iters": None, "train_samples": 7}}, r"training.train_samples = 7: is less than one global"),
    # Recomputation.
    (
        {"training": {"recompute_granularity": "full"}},
        r"training.recompute_granularity = 'full' .* give both training.recompute_m",
    ),
    (
        {
            "training": {
                "recompute_granularity": "full",
                "recompute_method": "uniform",
                "recompute_num_layers": 5,
            }
        },
        r"training.recompute_num_layers = 5: must divide the 12 layers of a stage",
    ),
    (
        {"training": {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 13}},
        r"training.recompute_num_layers = 13: must be at most the 12 layers of a stage",
    ),
    *(
        (
            {
                "parallel": {"pipeline_model_parallel_size": 2, "pipeline_model_parallel_layout": "Et*4|t*8L"},
                "training": {
                    "recompute_granularity": "full",
                    "recompute_method": method,
                    "recompute_num_layers": layers,
                },
            },
            rf"training.recompute_num_layers = {layers}: must {verb} the 4 and 8 layers of a stage",
        )
        for method, layers, verb in (("uniform", 8, "divide"), ("block", 9, "be at most"))
    ),
    (
        {"training": {"recompute_method": "block"}},
        r"training.recompute_method = 'block' .* set training.recompute_gran",
    ),
    (
        {"training": {"recompute_modules": ["core_attn"]}},
        r"training.recompute_modules = .* set training.recompute_gran",
    ),
    (
        {"training": {"recompute_granularity": "selective", "recompute_modules": ["core_atn"]}},
        r"training.recompute_modules entry = 'core_atn' is not allowed: it must be one of core_attn, mlp",
    ),
    # Optimizer.
    ({"optimizer": {"min_lr": 1.0}}, r"optimizer.min_lr = 1.0: must be at most optimizer.lr = 0.0003"),
    ({"optimizer": {"lr_warmup_init": 1.0}}, r"optimizer.lr_warmup_init = 1.0: must be at most optimizer.lr = 0.0003"),
    ({"optimizer": {"lr_warmup_iters": 100}}, r"optimizer.lr_warmup_iters = 100: must be below the 100"),
    ({"optimizer": {"lr_decay_samples": 100}}, r"training is counted in iters, so give lr_decay_iters"),
    (
        {
            "optimizer": {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 9, "lr_warmup_iters": 2},
            "training": {"train_iters": 10},
        },
        r"lr_wsd_decay_iters = 9: is 9 iters, but lr_decay_iters = 10 less lr_warmup_iters = 2 leaves 8",
    ),
    ({"optimizer": {"lr_decay_style": "WSD"}}, r"lr_wsd_decay_iters = None: .* it is needed by"),
    ({"optimizer": {"lr_wsd_decay_iters": 5}}, r"optimizer.lr_wsd_decay_iters = 5 .* it is needed by, and only by"),
    (
        {"optimizer": {"start_weight_decay": 0.1, "end_weight_decay": 0.2}},
        r"optimizer.start_weight_decay, end_weight_decay: differ",
    ),
    (
        {"optimizer": {"weight_decay_incr_style": "linear"}},
        r"optimizer.weight_decay_incr_style = .* give both optimizer.start_weight",
    ),
    (
        {
            "optimizer": {
                "weight_decay_incr_style": "linear",
                "start_weight_decay": 0.2,
                "end_weight_decay": 0.1,
            }
        },
        r"optimizer.end_weight_decay = 0.1: must be at least optimizer.start_weight_decay = 0.2",
    ),
    # Data.
    ({"data": {"train_data_path": []}}, r"data.train_data_path: is empty"),
    (
        {"data": {"reset_attention_mask": True}, "parallel": {"context_parallel_size": 2}},
        r"data.reset_attention_mask = True does not work with parallel.context_parallel_size = 2",
    ),
    # Dropping.
    ({"drop": {"policy": "pld", "theta": 1.5}}, r"drop.theta = 1.5"),
    ({"drop": {"policy": "sbld"}}, r"drop.sensitivity = None"),
    ({"drop": {"policy": "pld", "sampler": "balanced", "balance_stages": 5}}, r"drop.balance_stages = 5"),
]


def test_the_config_that_the_mistakes_are_made_in_is_valid() -> None:
    validate(VALID, world_size=8)


@pytest.mark.parametrize(("sections", "message"), MISTAKES, ids=[message for _, message in MISTAKES])
def test_a_mistake_is_named(sections: dict[str, dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        validate(change(VALID, **sections), world_size=8)


def test_a_run_without_a_length_is_one_problem() -> None:
    with pytest.raises(ValueError) as error:
        validate(change(VALID, training={"train_iters": None}), world_size=8)
    assert str(error.value).count("\n") == 0


def test_where_nothing_is_trained_data_may_be_missing_and_the_processes_are_as_many_as_the_layout_needs() -> None:
    layout = {"tensor_model_parallel_size": 4, "pipeline_model_parallel_size": 3}
    config = change(VALID, data={"train_data_path": []}, parallel=layout)
    validate(config, None, trains=False)
    with pytest.raises(ValueError, match=r"data.train_data_path: is empty"):
        validate(config, world_size=12)
    with pytest.raises(ValueError, match=r"model.num_layers = 12: must be divisible by the 5 pipeline stages"):
        validate(change(config, parallel={"pipeline_model_parallel_size": 5}), None, trains=False)


@pytest.mark.parametrize(
    ("layout", "chunks", "stages"),
    [
        (None, None, [6, 6]),
        ("Et*5|t*7L", None, [5, 7]),
        ("E|t*12L", None, [0, 12]),
        ("Et|t*5||t*6L", 2, [1, 11]),
        ("Et*4|t*2|t*4|t*2L", 2, [8, 4]),
    ],
)
@pytest.mark.parametrize(("method", "layers"), [(None, None), ("uniform", 1), ("block", 3)])
def test_stages_hold_what_the_layout_says(
    layout: str | None, chunks: int | None, stages: list[int], method: str | None, layers: int | None
) -> None:
    parallel = {
        "pipeline_model_parallel_size": 2,
        "num_virtual_stages_per_pipeline_rank": chunks,
        "pipeline_model_parallel_layout": layout,
    }
    recompute = {"recompute_granularity": method and "full", "recompute_method": method, "recompute_num_layers": layers}
    drop = {"policy": "pld", "sampler": "balanced"}
    config = change(VALID, parallel=parallel, training={**recompute, "global_batch_size": 16}, drop=drop)
    validate(config, world_size=8)
    held = placement_of(config).stages
    assert [len(layers) for layers in held] == stages
    assert sorted(itertools.chain(*held)) == list(range(1, 13))


def test_a_layout_can_spread_what_does_not_divide() -> None:
    config = change(VALID, model={"num_layers": 13}, drop={"policy": "pld", "sampler": "balanced"})
    parallel = {"pipeline_model_parallel_size": 2}
    with pytest.raises(
        ValueError, match=r"model.num_layers = 13: .* or be spread over them by parallel.pipeline_model"
    ):
        validate(change(config, parallel=parallel), world_size=8)
    validate(change(config, parallel={**parallel, "pipeline_model_parallel_layout": "Et*7|t*6L"}), world_size=8)


def test_all_mistakes_are_told_at_once() -> None:
    config = change(VALID, model={"num_layers": 13}, optimizer={"min_lr": 1.0}, parallel={"sequence_parallel": True})
    config = change(config, parallel={"pipeline_model_parallel_size": 2}, data={"train_data_path": []})
    with pytest.raises(ValueError) as caught:
        validate(config, world_size=8)
    fields = [line.split(" ")[0].rstrip(":") for line in str(caught.value).splitlines()]
    assert fields == ["model.num_layers", "optimizer.min_lr", "data.train_data_path", "parallel.sequence_parallel"]


def test_data_parallelism_takes_what_the_others_leave() -> None:
    parallel = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "context_parallel_size": 2}
    assert data_parallel_size(change(VALID, parallel=parallel), 24) == 3


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_iterations_of_a_number_of_samples_are_counted_like_megatron(data: st.DataObject) -> None:
    from megatron.core import num_microbatches_calculator as megatron

    from megatron_sbld.mcore.compat import init_microbatches

    start, increment = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 8))
    batch = start + increment * data.draw(st.integers(1, 6))
    ramp = data.draw(st.none() | st.tuples(st.just(start), st.just(increment), st.integers(1, 300)).map(list))
    samples = data.draw(st.integers(batch, 1000))
    training = {"train_iters": None, "train_samples": samples, "global_batch_size": batch, "rampup_batch_size": ramp}
    config = change(VALID, training=training)

    init_microbatches(rank=0, rampup_batch_size=ramp, global_batch_size=batch, micro_batch_size=1, data_parallel_size=1)
    try:
        assert train_iterations(config) == megatron_iterations(megatron, samples, batch, ramp)
    finally:
        megatron.destroy_num_microbatches_calculator()


def megatron_iterations(megatron: Any, samples: int, batch: int, ramp: list[int] | None) -> int:
    """As Megatron-LM's update_train_iters (training/training.py): the ramp by its calculator, the rest by division."""
    if ramp is None:
        return samples // batch
    consumed = iterations = 0
    while consumed <= min(ramp[2], samples):
        megatron.update_num_microbatches(consumed, consistency_check=False)
        consumed += megatron.get_current_global_batch_size()
        iterations += 1
    if samples > consumed:
        iterations += (samples - consumed) // batch
    return iterations
