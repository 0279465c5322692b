"""A layer on some samples of a microbatch, against each sample run by itself through the layers that it keeps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter

from megatron_sbld.controller import DropController
from megatron_sbld.mcore import freeze_dropped_layers, fuse_residual, make_switchable
from megatron_sbld.mcore.skip.moe import SampledRouter
from megatron_sbld.method.policy import Policy
from tests.harness import model_parallel, single_process
from tests.mcore.helpers import (
    MICRO_BATCH,
    SEQUENCE,
    VOCAB,
    Listed,
    build_optimizer,
    forget_moe_losses,
    moe_loss_sums,
    saved_bytes,
    tiny_config,
    tiny_gpt,
    train_step,
    wrap_ddp,
)

SAMPLES, LAYERS, WIDTH = 4, 4, 32
MOE = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_aux_loss_coeff": 0.5,
    "moe_z_loss_coeff": 0.05,
    "moe_token_dispatcher_type": "alltoall",
    "moe_router_load_balancing_type": "seq_aux_loss",
    "add_bias_linear": False,
}
LLAMA = {"normalization": "RMSNorm", "gated_linear_unit": True, "add_bias_linear": False, "num_query_groups": 2}


@pytest.fixture(scope="module", autouse=True)
def _one_process() -> Iterator[None]:
    with single_process(), model_parallel():
        yield


def switchable(policy: Policy, granularity: Any = "sample", rope: bool = False, **config: Any) -> Any:
    """(chunk in training mode, its controller)."""
    (chunk,) = tiny_gpt(
        tiny_config(num_layers=policy.num_layers, **config),
        position_embedding_type="rope" if rope else "learned_absolute",
    )
    samples = SAMPLES if granularity == "sample" else None
    controller = DropController(policy, seed=3, granularity=granularity, num_samples=samples)
    make_switchable(chunk, controller)
    return chunk.train(), controller


def tokens() -> torch.Tensor:
    """[b, s]"""
    return torch.randint(VOCAB, (SAMPLES, SEQUENCE), generator=torch.Generator().manual_seed(3))


def losses(chunk: torch.nn.Module, text: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Of every token, [b, s]."""
    return chunk(text, torch.arange(SEQUENCE).expand(len(text), -1), mask, labels=text.roll(-1, dims=1))


def gradients(chunk: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Of the parameters that have one; they are taken away."""
    found = {name: param.grad for name, param in chunk.named_parameters() if param.grad is not None}
    chunk.zero_grad(set_to_none=True)
    return found


def sample_by_sample(
    plan: np.ndarray, mask: torch.Tensor | None, keep_probs: np.ndarray | None, rope: bool, **config: Any
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Losses [b, s] and gradients of their mean over samples, each sample in a stock model of its own layers alone.

    plan: which samples run which layers, [L, b].
    keep_probs: divides the branches, through the linear maps that end them.
    """
    config = {name: value for name, value in config.items() if not name.startswith("recompute")}
    rows, total = [], {}
    for sample in range(SAMPLES):
        (stock,) = tiny_gpt(
            tiny_config(num_layers=LAYERS, **config), position_embedding_type="rope" if rope else "learned_absolute"
        )
        stock.train()
        kept = np.flatnonzero(plan[:, sample]).tolist()
        layers = [stock.decoder.layers[index] for index in kept]
        for index, layer in zip(kept, layers, strict=True):
            for linear in (layer.self_attention.linear_proj, getattr(layer.mlp, "linear_fc2", None)):
                if keep_probs is not None and linear is not None:
                    linear.register_forward_hook(
                        lambda _, __, output, scale=1 / keep_probs[index]: (
                            output[0] * scale,
                            None if output[1] is None else output[1] * scale,
                        )
                    )
        names = {param: name for name, param in stock.named_parameters()}
        stock.decoder.layers = torch.nn.ModuleList(layers)
        row = losses(stock, tokens()[sample : sample + 1], None if mask is None else mask[sample : sample + 1])
        rows.append(row.detach())
        (row.mean() / SAMPLES).backward()
        for param, name in names.items():
            if param.grad is not None:
                total[name] = total.get(name, 0) + param.grad
    return torch.cat(rows), total


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        tolerance = 1e-5 * float(gradient.norm())
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=tolerance + 1e-8, msg=name)


def document_mask() -> torch.Tensor:
    """[b, 1, s, s], True where a token may not look: causal, with another document border in each sample."""
    masks = torch.ones(SAMPLES, 1, SEQUENCE, SEQUENCE, dtype=torch.bool).triu(diagonal=1)
    for sample in range(SAMPLES):
        masks[sample, 0, 3 + 2 * sample :, : 3 + 2 * sample] = True
    return masks


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "scaled": {"residual_scale": "inverse_keep_prob"},
    "fused residual": {"fused": True},
    "scaled, fused residual": {"residual_scale": "inverse_keep_prob", "fused": True},
    "rotary": {"rope": True, **LLAMA},
    "a mask of each sample": {"mask": True},
    "one mask for all": {"mask": "shared"},
    "full recomputation": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 2,
    },
    "recomputed attention": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
}


@pytest.mark.parametrize("name", CASES)
def test_a_microbatch_is_its_samples_each_run_through_the_layers_that_it_keeps(name: str) -> None:
    config = {"rope": False, **CASES[name]}
    scale, mask_kind = config.pop("residual_scale", "none"), config.pop("mask", None)
    fused = config.pop("fused", False)
    mask = document_mask() if mask_kind else None
    if mask_kind == "shared":
        mask = mask[:1].expand(SAMPLES, -1, -1, -1)
    policy = Listed(0.5, 0.3, 0.8, 0.6, residual_scale=scale)
    chunk, controller = switchable(policy, **config)
    if fused:
        fuse_residual(chunk)
        assert {type(layer.mlp_bda).__name__ for layer in chunk.decoder.layers} == {"_Fused"}
    seen = set()
    for iteration in (1, 2, 3):
        controller.begin_iteration(iteration, 1)
        found = losses(chunk, tokens(), mask[:1] if mask_kind == "shared" else mask)
        found.mean().backward()
        seen |= set(controller.sample_plan[0].sum(axis=1).tolist())
        keep_probs = policy.keep_probs(1) if scale != "none" else None
        expected, expected_gradients = sample_by_sample(controller.sample_plan[0], mask, keep_probs, **config)
        torch.testing.assert_close(found.detach(), expected, rtol=1e-5, atol=1e-6)
        assert_close(gradients(chunk), expected_gradients)
    assert seen >= {1, 2, 3}


def test_left_out_samples_pass_a_layer_bit_for_bit_and_kept_ones_are_the_stock_layers() -> None:
    chunk, controller = switchable(Listed(0.5, 0.5, 0.5, 0.5))
    stock = tiny_gpt(tiny_config(num_layers=LAYERS))[0].train()
    controller.begin_iteration(1, 1)
    hidden = torch.randn(SEQUENCE, SAMPLES, WIDTH)
    before = hidden.clone()
    for layer, stock_layer in zip(chunk.decoder.layers, stock.decoder.layers, strict=True):
        kept = controller.kept_samples(layer.layer_number, 0)
        assert kept is not None
        left_out = sorted(set(range(SAMPLES)) - set(kept.tolist()))
        output, context = layer(hidden_states=hidden, attention_mask=None)
        assert context is None
        assert torch.equal(output[:, left_out], hidden[:, left_out])
        alone, _ = stock_layer(hidden_states=hidden[:, kept].contiguous(), attention_mask=None)
        assert torch.equal(output[:, kept], alone)
        by_position, _ = layer(hidden, None)
        assert torch.equal(by_position, output)
        assert torch.equal(hidden, before)


@pytest.mark.parametrize("scope", ["iteration", "microbatch"])
def test_each_microbatch_leaves_out_the_samples_that_the_plan_says(scope: Any) -> None:
    """Seen from outside: which samples a layer changed."""
    (chunk,) = tiny_gpt(tiny_config())
    controller = DropController(
        Listed(0.6, 0.3, 1.0, 0.0), seed=3, scope=scope, granularity="sample", num_samples=SAMPLES
    )
    make_switchable(chunk, controller)
    chunk.train()
    plans = set()
    for iteration in (1, 2):
        controller.begin_iteration(iteration, 3)
        for microbatch in range(3):
            hidden = torch.randn(SEQUENCE, SAMPLES, WIDTH)
            for layer in chunk.decoder.layers:
                layer.current_microbatch = microbatch  # as Megatron's schedules do
                output, _ = layer(hidden_states=hidden, attention_mask=None)
                changed = (output != hidden).any(dim=2).any(dim=0)
                assert changed.tolist() == controller.sample_plan[microbatch, layer.layer_number - 1].tolist()
            plans.add(controller.sample_plan[microbatch].tobytes())
    assert len(plans) == (2 if scope == "iteration" else 6)


@pytest.mark.parametrize("kept", [(1, 1, 1, 1), (0, 0, 0, 0), (1, 0, 1, 0)])
def test_whole_layers_are_those_of_granularity_layer_bit_for_bit(kept: tuple[int, ...]) -> None:
    results = []
    for granularity in ("layer", "sample"):
        torch.manual_seed(5)
        chunk, controller = switchable(Listed(*kept), granularity, hidden_dropout=0.1)
        controller.begin_iteration(1, 1)
        found = losses(chunk, tokens())
        found.mean().backward()
        results.append((found.detach(), gradients(chunk)))
    (layer, layer_gradients), (sample, sample_gradients) = results
    assert torch.equal(sample, layer)
    assert sample_gradients.keys() == layer_gradients.keys()
    assert all(torch.equal(sample_gradients[name], layer_gradients[name]) for name in layer_gradients)


def test_a_layer_saves_activations_of_its_kept_samples_alone() -> None:
    sizes = {}
    for count in (1, 2, SAMPLES):
        chunk, controller = switchable(Listed(count / SAMPLES))
        controller.begin_iteration(1, 1)
        hidden = torch.randn(SEQUENCE, SAMPLES, WIDTH, requires_grad=True)
        sizes[count] = saved_bytes(chunk, chunk.decoder.layers[0], hidden)
    # Indices, and a causal mask of the microbatch's size in attention, are all that does not grow with the samples.
    assert sizes[1] < 0.4 * sizes[SAMPLES]
    assert sizes[1] < sizes[2] < 0.65 * sizes[SAMPLES]


def test_evaluation_runs_every_sample() -> None:
    chunk, controller = switchable(Listed(0.5, 0.0, 0.3, 0.5, residual_scale="inverse_keep_prob"))
    controller.begin_iteration(1, 1)
    stock = tiny_gpt(tiny_config(num_layers=LAYERS))[0].eval()
    text = tokens()[:3]  # also of another size than a microbatch
    assert torch.equal(losses(chunk.eval(), text), losses(stock, text))


def test_the_output_can_be_freed_without_harm_to_the_input() -> None:
    """As deallocate_pipeline_outputs does with what a stage sends."""
    chunk, controller = switchable(Listed(0.5))
    controller.begin_iteration(1, 1)
    hidden = torch.randn(SEQUENCE, SAMPLES, WIDTH, requires_grad=True)
    output, _ = chunk.decoder.layers[0](hidden_states=hidden, attention_mask=None)
    assert output._base is None
    total = output.sum()
    output.data = torch.empty(1)
    total.backward()
    assert hidden.grad.isfinite().all()
    left_out = [s for s in range(SAMPLES) if s not in controller.kept_samples(1, 0)]
    assert torch.equal(hidden.grad[:, left_out], torch.ones(SEQUENCE, len(left_out), WIDTH))


def weight_of_sequences_per_token() -> float:
    """What stock Megatron multiplies seq_aux_loss by, with calculate_per_token_loss: 1, or before 0.19 1 / samples."""
    norms = []
    for per_token in (False, True):
        config = {**MOE, "moe_z_loss_coeff": None, "calculate_per_token_loss": per_token}
        (stock,) = tiny_gpt(tiny_config(num_layers=LAYERS, **config))
        MoEAuxLossAutoScaler.set_loss_scale(torch.tensor([1.0]))
        (losses(stock.train(), tokens()).sum() * 0).backward()  # leaves the gradients of the auxiliary losses
        gradient = next(grad for name, grad in gradients(stock).items() if name.endswith("router.weight"))
        norms.append(float(gradient.norm()) / (SAMPLES * SEQUENCE if per_token else 1))
    weight = norms[1] / norms[0]
    assert weight == pytest.approx(1.0) or weight == pytest.approx(1 / SAMPLES)
    return weight


@pytest.mark.parametrize("per_token", [False, True])
def test_a_routers_losses_count_by_the_share_of_samples_that_it_sees(per_token: bool) -> None:
    """The mean over samples of each one's auxiliary losses, as at full depth, in the gradients; nothing in the log."""
    config = {**MOE, "calculate_per_token_loss": per_token}
    tokens_of_a_microbatch = SAMPLES * SEQUENCE
    policy = Listed(0.5, 0.3, 0.8, 0.6)
    stock_weight = weight_of_sequences_per_token()
    chunk, controller = switchable(policy, **config)
    for iteration in (1, 2):
        controller.begin_iteration(iteration, 1)
        forget_moe_losses()
        # As Megatron's schedules and finalize_model_grads do, on one rank: per token, gradients are divided at the end.
        MoEAuxLossAutoScaler.set_loss_scale(torch.tensor([1.0]))
        found = losses(chunk, tokens())
        (found.sum() if per_token else found.mean()).backward()
        mine = gradients(chunk)
        if per_token:
            mine = {name: gradient / tokens_of_a_microbatch for name, gradient in mine.items()}
        logged = moe_loss_sums()["seq_load_balancing_loss"].clone()
        MoEAuxLossAutoScaler.set_loss_scale(torch.tensor([1.0 / SAMPLES]))  # a microbatch of each sample
        forget_moe_losses()
        by_sequence = {"moe_aux_loss_coeff": MOE["moe_aux_loss_coeff"] * (stock_weight if per_token else 1)}
        expected, theirs = sample_by_sample(controller.sample_plan[0], None, None, False, **{**MOE, **by_sequence})
        torch.testing.assert_close(found.detach(), expected, rtol=1e-5, atol=1e-6)
        assert_close(mine, theirs)
        summed = moe_loss_sums()["seq_load_balancing_loss"]
        counts = torch.from_numpy(controller.sample_plan[0].sum(axis=1)).clamp(min=1)
        torch.testing.assert_close(logged, summed / counts, rtol=1e-4, atol=1e-6)
    MoEAuxLossAutoScaler.set_loss_scale(torch.tensor([1.0]))


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("kinds", ["aux_loss", ["aux_loss", "seq_aux_loss"]])
def test_a_loss_over_the_kept_samples_together_counts_by_their_share(kinds: Any, per_token: bool) -> None:
    config = {**MOE, "moe_router_load_balancing_type": kinds, "calculate_per_token_loss": per_token}
    if isinstance(kinds, list):
        config["moe_aux_loss_coeff"] = [0.5, 0.0 if per_token else 0.3]  # that of sequences per token: above
    chunk, controller = switchable(Listed(0.75), **config)  # 3 of 4
    controller.begin_iteration(1, 1)
    kept = controller.kept_samples(1, 0)
    assert kept is not None
    stock = tiny_gpt(tiny_config(num_layers=1, **config))[0].train()
    tokens_of_a_microbatch = SAMPLES * SEQUENCE
    found = []
    for model, text, loss_scale in ((chunk, tokens(), 1.0), (stock, tokens()[kept], len(kept) / SAMPLES)):
        MoEAuxLossAutoScaler.set_loss_scale(torch.tensor([1.0 if per_token else loss_scale]))
        total = losses(model, text).sum()
        (total if per_token else total / tokens_of_a_microbatch).backward()
        found.append({name: grad for name, grad in gradients(model).items() if name.startswith("decoder.layers")})
    MoEAuxLossAutoScaler.set_loss_scale(torch.tensor([1.0]))
    assert_close(*found)


def test_routers_are_stock_again_when_layers_are_given_to_decisions_about_layers() -> None:
    chunk, _ = switchable(Listed(0.5, 0.5, 0.5, 0.5), **MOE)
    routers = [module for module in chunk.modules() if isinstance(module, TopKRouter)]
    assert all(isinstance(router, SampledRouter) for router in routers)
    controller = DropController(Listed(1, 1, 1, 1))
    make_switchable(chunk, controller)
    controller.begin_iteration(1, 1)
    stock = tiny_gpt(tiny_config(num_layers=LAYERS, **MOE))[0].train()
    for model in (chunk, stock):
        losses(model, tokens()[:2]).mean().backward()
    found, expected = gradients(chunk), gradients(stock)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_microbatch_of_another_size_is_an_error_that_names_it() -> None:
    chunk, controller = switchable(Listed(0.5, 1.0, 1.0, 1.0))
    controller.begin_iteration(1, 1)
    with pytest.raises(RuntimeError, match=r"3 samples, and the controller was given num_samples = 4: .*micro_batch"):
        losses(chunk, tokens()[:3])


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"packed_seq_params": PackedSeqParams()}, "does not work with packed_seq_params in training"),
        ({"inference_context": object()}, "does not work with inference_context in training"),
        ({"rotary_pos_cos": torch.ones(SEQUENCE, 4)}, "does not work with rotary_pos_cos in training"),
        ({"attention_mask": (None, None)}, "does not work with attention_mask in training"),
        (
            {"attention_mask": torch.zeros(3, 1, SEQUENCE, SEQUENCE, dtype=torch.bool)},
            r"attention_mask of shape \[3, 1, 16, 16\]: dimension 0 must be 1 or the 4 samples",
        ),
    ],
)
def test_inputs_that_cannot_be_given_for_some_samples_are_refused_by_name(inputs: dict, message: str) -> None:
    chunk, controller = switchable(Listed(0.5))
    controller.begin_iteration(1, 1)
    hidden = torch.randn(SEQUENCE, SAMPLES, WIDTH)
    with pytest.raises(ValueError, match=message):
        chunk.decoder.layers[0](hidden_states=hidden, **{"attention_mask": None, **inputs})


def test_more_inputs_by_position_than_are_known_are_refused() -> None:
    chunk, controller = switchable(Listed(0.5))
    controller.begin_iteration(1, 1)
    with pytest.raises(ValueError, match="needs a layer's inputs by name, got 3 by position"):
        chunk.decoder.layers[0](torch.randn(SEQUENCE, SAMPLES, WIDTH), None, None)


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        ({}, {"tp_comm_overlap": True}, "granularity = 'sample' does not work with tp_comm_overlap = True"),
        (
            {**MOE, "moe_router_load_balancing_type": "global_aux_loss"},
            {},
            "granularity = 'sample' does not work with moe_router_load_balancing_type = 'global_aux_loss'",
        ),
    ],
)
def test_switches_that_need_whole_microbatches_are_refused_by_name(config: dict, change: dict, message: str) -> None:
    (chunk,) = tiny_gpt(tiny_config(**config))
    for name, value in change.items():
        setattr(chunk.config, name, value)
    with pytest.raises(ValueError, match=message):
        make_switchable(chunk, DropController(Listed(1, 1, 1, 1), granularity="sample", num_samples=2))
    make_switchable(chunk, DropController(Listed(1, 1, 1, 1)))


def test_a_layer_is_frozen_only_when_no_sample_ran_it() -> None:
    models = wrap_ddp(tiny_gpt(tiny_config()))
    optimizer = build_optimizer(models)
    controller = DropController(
        Listed(0.2, 0.2, 0.2, 0.2), seed=3, granularity="sample", num_samples=MICRO_BATCH, replicas="distinct"
    )
    make_switchable(models, controller)
    freeze_dropped_layers(models, optimizer)
    layers = models[0].module.decoder.layers
    outcomes = set()
    for iteration in range(1, 7):
        before = [layer.mlp.linear_fc2.weight.detach().clone() for layer in layers]
        train_step(models, optimizer, iteration, controller.begin_iteration)
        for layer, weight in zip(layers, before, strict=True):
            frozen = torch.equal(layer.mlp.linear_fc2.weight, weight)
            assert frozen == controller.dropped_throughout(layer.layer_number)
            outcomes.add(frozen)
    assert outcomes == {True, False}
