"""A layer on some tokens of each sample, against a stock layer with plain indexing around it, sample by sample."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

from megatron_sbld.controller import DropController
from megatron_sbld.mcore import fuse_residual, make_switchable
from megatron_sbld.method.policy import FullDepthPolicy, Policy
from megatron_sbld.method.tokens import TokenDrop, draw_tokens
from tests.harness import model_parallel, single_process
from tests.mcore.helpers import SEQUENCE, Listed, forget_moe_losses, saved_bytes, tiny_config, tiny_gpt
from tests.mcore.hybrid import tiny_hybrid
from tests.mcore.skip.test_samples import (
    LAYERS,
    LLAMA,
    MOE,
    SAMPLES,
    WIDTH,
    assert_close,
    document_mask,
    gradients,
    losses,
    tokens,
)

SEED = 3
FULL = FullDepthPolicy(LAYERS)
HALF = TokenDrop(seq_length=SEQUENCE, layers=(2, 3), min_tokens=4, step=4, iterations=4)  # 4, 8, 12, 16, ...
ROPE = {"rope": True, **LLAMA}


@pytest.fixture(scope="module", autouse=True)
def _one_process() -> Iterator[None]:
    with single_process(), model_parallel():
        yield


def model(rope: bool = False, **config: Any) -> Any:
    kind = "rope" if rope else "learned_absolute"
    (chunk,) = tiny_gpt(tiny_config(num_layers=LAYERS, **config), position_embedding_type=kind)
    return chunk.train()


def switchable(drop: TokenDrop = HALF, policy: Policy = FULL, **config: Any) -> Any:
    """(chunk in training mode, its controller)."""
    chunk = model(**config)
    controller = DropController(policy, seed=SEED, granularity="token", tokens=drop)
    make_switchable(chunk, controller)
    return chunk, controller


def seed() -> None:
    """Both streams of dropout from their beginning."""
    torch.manual_seed(5)
    model_parallel_cuda_manual_seed(5, force_reset_rng=True)


def of_samples(forward: Callable[..., Any], kept: np.ndarray) -> Callable[..., Any]:
    """Plain gather, the stock layer, scatter: kept [b, r]."""

    def run(hidden_states: torch.Tensor, attention_mask: Any, rotary_pos_emb: Any = None, **others: Any) -> Any:
        output = hidden_states.clone()
        for sample, index in enumerate(torch.from_numpy(kept)):
            mask = None
            if attention_mask is not None:
                own = attention_mask[min(sample, len(attention_mask) - 1), 0]
                mask = own[index][:, index][None, None]
            rotary = None if rotary_pos_emb is None else rotary_pos_emb[index]
            result, _ = forward(
                hidden_states=hidden_states[index, sample : sample + 1],
                attention_mask=mask,
                rotary_pos_emb=rotary,
                **others,
            )
            output[index, sample : sample + 1] = result
        return output, None

    return run


def reference(controller: DropController, mask: torch.Tensor | None, rope: bool, **config: Any) -> Any:
    """Losses [b, s] and gradients of their mean, of a stock model with the draws of the specification."""
    config = {name: value for name, value in config.items() if not name.startswith("recompute")}
    stock = model(rope, **config)
    for layer in stock.decoder.layers:
        number = layer.layer_number
        if not controller.kept(number, 0):
            layer.forward = lambda hidden_states, **_: (hidden_states, None)
        elif number in controller.tokens.layers:
            kept = draw_tokens(
                SEQUENCE,
                controller.num_tokens,
                controller.tokens.strata,
                seed=SEED,
                iteration=controller.iteration,
                samples=range(SAMPLES),
                layers=[number],
            )[0]
            layer.forward = of_samples(layer.forward, kept)
    found = losses(stock, tokens(), mask)
    found.mean().backward()
    return found.detach(), gradients(stock)


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped queries, rotary": ROPE,
    "half of each head rotated": {**ROPE, "strata": 2},
    "a mask of each sample": {"mask": True, **ROPE},
    "one mask for all": {"mask": "shared"},
    "fused residual": {"fused": True},
    "full recomputation": {
        **ROPE,
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 2,
    },
    "recomputed attention": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "with layers that are dropped": {"policy": Listed(1.0, 0.5, 0.5, 1.0)},
}


@pytest.mark.parametrize("name", CASES)
def test_a_layer_is_gather_the_stock_layer_and_scatter(name: str) -> None:
    config = {"rope": False, **CASES[name]}
    mask_kind, fused = config.pop("mask", None), config.pop("fused", False)
    policy, strata = config.pop("policy", FULL), config.pop("strata", 1)
    mask = document_mask() if mask_kind else None
    if mask_kind == "shared":
        mask = mask[:1]
    drop = TokenDrop(seq_length=SEQUENCE, layers=(2, 3), min_tokens=4, step=4, iterations=4, strata=strata)
    chunk, controller = switchable(drop, policy, **config)
    if fused:
        fuse_residual(chunk)
    kept, dropped = set(), 0
    for iteration in (1, 2, 3):
        controller.begin_iteration(iteration, 1)
        kept.add(controller.num_tokens)
        dropped += int((~controller.plan).sum())
        found = losses(chunk, tokens(), mask)
        found.mean().backward()
        expected, expected_gradients = reference(controller, mask, **config)
        torch.testing.assert_close(found.detach(), expected, rtol=1e-5, atol=1e-6)
        assert_close(gradients(chunk), expected_gradients)
    assert kept == {4, 8, 12}
    assert (dropped > 0) == (policy is not FULL)


@pytest.mark.parametrize("iteration", [4, 5])
def test_all_tokens_are_stock_bit_for_bit(iteration: int) -> None:
    results = []
    for is_switchable in (False, True):
        seed()
        config = {**ROPE, "hidden_dropout": 0.1, "attention_dropout": 0.1}
        if is_switchable:
            chunk, controller = switchable(**config)
            controller.begin_iteration(iteration, 1)
            assert controller.num_tokens == SEQUENCE
        else:
            chunk = model(**config)
        found = losses(chunk, tokens())
        found.mean().backward()
        results.append((found.detach(), gradients(chunk)))
    (stock, stock_gradients), (found, found_gradients) = results
    assert torch.equal(found, stock)
    assert found_gradients.keys() == stock_gradients.keys()
    assert all(torch.equal(found_gradients[name], stock_gradients[name]) for name in stock_gradients)


def test_left_out_tokens_pass_a_layer_bit_for_bit_and_the_input_stays_as_it_is() -> None:
    chunk, controller = switchable()
    controller.begin_iteration(1, 1)
    hidden = torch.randn(SEQUENCE, SAMPLES, WIDTH, requires_grad=True)
    before = hidden.detach().clone()
    output, context = chunk.decoder.layers[1](hidden_states=hidden, attention_mask=None)
    assert context is None
    assert output._base is None
    changed = (output != hidden).any(dim=2)  # [s, b]
    assert changed.sum(dim=0).tolist() == [4] * SAMPLES
    assert len({tuple(column) for column in changed.t().tolist()}) > 1
    total = output.sum()
    output.data = torch.empty(1)  # as deallocate_pipeline_outputs does with what a stage sends
    total.backward()
    assert torch.equal(hidden.detach(), before)
    assert torch.equal(hidden.grad[~changed], torch.ones_like(hidden)[~changed])
    assert not torch.equal(hidden.grad[changed], torch.ones_like(hidden)[changed])


def test_dropout_is_repeated_by_recomputation() -> None:
    found = []
    for recompute in ({}, {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}):
        seed()
        chunk, controller = switchable(**ROPE, hidden_dropout=0.2, attention_dropout=0.2, **recompute)
        controller.begin_iteration(2, 1)
        total = losses(chunk, tokens()).mean()
        total.backward()
        found.append((total.detach(), gradients(chunk)))
    assert torch.equal(found[0][0], found[1][0])
    assert_close(found[1][1], found[0][1])


def test_microbatches_have_the_tokens_of_their_samples_also_when_they_are_recomputed_out_of_order() -> None:
    """Two forward passes, then their backward passes from the first on, as in 1F1B."""
    recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    gradients_of = []
    for config in ({}, recompute):
        chunk, controller = switchable(**config)
        controller.begin_iteration(1, 3)
        totals = []
        for microbatch in range(3):
            for layer in chunk.decoder.layers:
                layer.current_microbatch = microbatch
            totals.append(losses(chunk, tokens()).mean())
        assert len({total.item() for total in totals}) == 3
        for total in totals:
            total.backward()
        gradients_of.append(gradients(chunk))
    assert_close(gradients_of[1], gradients_of[0])


def test_evaluation_runs_every_token_of_samples_of_any_length() -> None:
    chunk, controller = switchable()
    controller.begin_iteration(1, 1)
    stock = model().eval()
    text = tokens()[:3]
    assert torch.equal(losses(chunk.eval(), text), losses(stock, text))


def test_a_layer_saves_activations_of_its_kept_tokens_alone() -> None:
    sizes = {}
    for iteration in (1, 2, 4):
        chunk, controller = switchable()
        controller.begin_iteration(iteration, 1)
        hidden = torch.randn(SEQUENCE, SAMPLES, WIDTH, requires_grad=True)
        sizes[controller.num_tokens] = saved_bytes(chunk, chunk.decoder.layers[1], hidden)
    assert sizes[4] < 0.3 * sizes[SEQUENCE]
    assert sizes[4] < sizes[8] < 0.6 * sizes[SEQUENCE]


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("kind", ["aux_loss", "seq_aux_loss"])
def test_a_routers_losses_count_by_the_share_of_tokens_that_it_sees(kind: str, per_token: bool) -> None:
    """Four tokens of sixteen: a quarter of what a stock model's router has that sees these tokens alone."""
    config = {**MOE, "moe_router_load_balancing_type": kind, "calculate_per_token_loss": per_token}
    chunk, controller = switchable(**config)
    controller.begin_iteration(1, 1)
    hidden = torch.randn(SEQUENCE, SAMPLES, WIDTH)
    layer, stock = chunk.decoder.layers[1], model(**config).decoder.layers[1]
    kept = draw_tokens(SEQUENCE, 4, 1, seed=SEED, iteration=1, samples=range(SAMPLES), layers=[2])[0]
    index = torch.from_numpy(kept).t()  # [r, b]
    found = []
    for module, inputs, scale in (
        (layer, hidden, 1.0),
        (stock, hidden[index, torch.arange(SAMPLES)], 1.0 if per_token else 4 / SEQUENCE),
    ):
        forget_moe_losses()
        MoEAuxLossAutoScaler.set_loss_scale(torch.tensor([scale]))
        output, _ = module(hidden_states=inputs.requires_grad_(), attention_mask=None)
        (output.sum() * 0).backward()  # leaves the gradients of the auxiliary losses
        found.append({name: param.grad for name, param in module.named_parameters() if "router" in name})
    MoEAuxLossAutoScaler.set_loss_scale(torch.tensor([1.0]))
    assert_close(*found)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"packed_seq_params": PackedSeqParams()}, "does not work with packed_seq_params in training"),
        ({"inference_context": object()}, "does not work with inference_context in training"),
        ({"rotary_pos_cos": torch.ones(SEQUENCE, 4)}, "does not work with rotary_pos_cos in training"),
        ({"attention_bias": torch.ones(1, 1, SEQUENCE, SEQUENCE)}, "does not work with attention_bias in training"),
        (
            {"rotary_pos_emb": torch.ones(8, 1, 1, 8)},
            r"rotary_pos_emb of shape \[8, 1, 1, 8\]: it must be \[16, 1 or 4",
        ),
        (
            {"attention_mask": torch.zeros(SAMPLES, 1, 1, SEQUENCE, dtype=torch.bool)},
            r"attention_mask of shape \[4, 1, 1, 16\]: it must be \[1 or 4, 1, 16, 16\]",
        ),
    ],
)
def test_inputs_that_cannot_be_given_for_some_tokens_are_refused_by_name(inputs: dict, message: str) -> None:
    chunk, controller = switchable()
    controller.begin_iteration(1, 1)
    hidden = torch.randn(SEQUENCE, SAMPLES, WIDTH)
    with pytest.raises(ValueError, match=message):
        chunk.decoder.layers[1](hidden_states=hidden, **{"attention_mask": None, **inputs})


def test_a_padding_mask_is_gathered() -> None:
    chunk, controller = switchable()
    controller.begin_iteration(1, 1)
    seen = {}
    layer = chunk.decoder.layers[1]
    stock = type(layer).__mro__[2]
    padding = torch.arange(SAMPLES * SEQUENCE).view(SAMPLES, SEQUENCE)

    def forward(self: Any, hidden_states: torch.Tensor, padding_mask: torch.Tensor, **others: Any) -> Any:
        seen["mask"] = padding_mask
        return hidden_states, None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stock, "forward", forward)
        layer(hidden_states=torch.randn(SEQUENCE, SAMPLES, WIDTH), attention_mask=None, padding_mask=padding)
    kept = draw_tokens(SEQUENCE, 4, 1, seed=SEED, iteration=1, samples=range(SAMPLES), layers=[2])[0]
    assert np.array_equal(seen["mask"].numpy(), kept + SEQUENCE * np.arange(SAMPLES)[:, None])


def test_samples_of_another_length_are_an_error_that_names_it() -> None:
    chunk, controller = switchable()
    controller.begin_iteration(1, 1)
    with pytest.raises(RuntimeError, match=r"8 tokens, and it must have 16 of the seq_length = 16"):
        chunk.decoder.layers[1](hidden_states=torch.randn(8, SAMPLES, WIDTH), attention_mask=None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"apply_rope_fusion": True}, "granularity = 'token' does not work with apply_rope_fusion = True"),
        ({"multi_latent_attention": True}, "granularity = 'token' does not work with multi_latent_attention = True"),
        ({"window_size": (8, 0)}, r"granularity = 'token' does not work with window_size = \(8, 0\)"),
        (
            {"num_moe_experts": 4, "moe_router_load_balancing_type": "global_aux_loss"},
            "granularity = 'token' does not work with moe_router_load_balancing_type = 'global_aux_loss'",
        ),
        ({"tp_comm_overlap": True}, "granularity = 'token' does not work with tp_comm_overlap = True"),
        (
            {"fp8": "e4m3", "fp8_recipe": "tensorwise"},
            "token_step = 4 is not allowed with fp8 or fp4: .* a multiple of 32",
        ),
    ],
)
def test_switches_that_need_whole_samples_are_refused_by_name(change: dict, message: str) -> None:
    chunk = model()
    for name, value in change.items():
        setattr(chunk.config, name, value)
    with pytest.raises(ValueError, match=message):
        make_switchable(chunk, DropController(FULL, granularity="token", tokens=HALF))


def test_a_mamba_layer_keeps_all_tokens() -> None:
    config = tiny_config(num_layers=4)
    (chunk,) = tiny_hybrid(config, "*-M-")
    drop = TokenDrop(seq_length=SEQUENCE, layers=(2, 3), min_tokens=4, step=4, iterations=4)
    with pytest.raises(ValueError, match="token_layers has 3, but that is a MambaLayer"):
        make_switchable(chunk, DropController(FULL, granularity="token", tokens=drop))
