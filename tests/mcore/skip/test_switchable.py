"""The switchable layer in one process: stock when nothing is dropped, gone when it is, refusals by name."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_sbld.controller import DropController
from megatron_sbld.mcore import fuse_residual, make_switchable
from megatron_sbld.mcore.skip import layer_buckets as ddp
from megatron_sbld.mcore.skip.switchable import decoder_layers
from megatron_sbld.method.policy import (
    FullDepthPolicy,
    LayerDropPolicy,
    PLDPolicy,
    Policy,
    SBLDPolicy,
    StochasticDepthPolicy,
)
from megatron_sbld.method.schedule import Constant
from tests.harness import model_parallel, single_process
from tests.mcore.helpers import (
    SEQUENCE,
    VOCAB,
    Listed,
    Step,
    build_optimizer,
    tiny_config,
    tiny_gpt,
    train_step,
    wrap_ddp,
)

LAYERS = 4
NOTHING_DROPPED: dict[str, Policy] = {
    "full depth": FullDepthPolicy(LAYERS),
    "SBLD": SBLDPolicy(Constant(1.0), np.linspace(0, 1, LAYERS), block_layers=(1, 2), allow_layers=()),
    "PLD": PLDPolicy(Constant(1.0), LAYERS),
    "LayerDrop, scaled": LayerDropPolicy(Constant(1.0), LAYERS, residual_scale="inverse_keep_prob"),
    "stochastic depth": StochasticDepthPolicy(Constant(1.0), LAYERS),
    "recovery": LayerDropPolicy(Constant(0.5), LAYERS, recovery_fraction=1.0, train_iters=100),
}


@pytest.fixture(scope="module", autouse=True)
def _one_process() -> Iterator[None]:
    with single_process():
        yield


def stock_spec(config: Any, vp_stage: int | None = None) -> Any:
    """megatron-core's own layer, with nothing of ours in it."""
    return get_gpt_layer_local_spec()


def train(policy: Policy | None, **config: Any) -> tuple[list[Step], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(steps, last gradients, final state dict) of four iterations with dropout; None leaves the model stock."""
    with model_parallel():
        chunks = tiny_gpt(tiny_config(num_layers=LAYERS, hidden_dropout=0.1, **config), spec=stock_spec)
        begin = None
        if policy is not None:
            controller = DropController(policy)
            make_switchable(chunks, controller)
            begin = controller.begin_iteration
        models = wrap_ddp(chunks)
        optimizer = build_optimizer(models)
        steps = [train_step(models, optimizer, iteration, begin) for iteration in range(1, 5)]
        gradients = {name: param.main_grad.clone() for name, param in chunks[0].named_parameters()}
        return steps, gradients, {key: value for key, value in chunks[0].state_dict().items() if value is not None}


def assert_bitwise_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def forward(chunk: torch.nn.Module) -> torch.Tensor:
    """Logits [b, s, v] of fixed tokens."""
    tokens = torch.randint(VOCAB, (2, SEQUENCE), generator=torch.Generator().manual_seed(3))
    return chunk(tokens, torch.arange(SEQUENCE).expand(2, -1), None)


def switchable_gpt(policy: Policy, **config: Any) -> tuple[torch.nn.Module, DropController]:
    """A switchable tiny GPT in training mode, its first iteration begun."""
    (chunk,) = tiny_gpt(tiny_config(num_layers=policy.num_layers, **config))
    controller = DropController(policy)
    make_switchable(chunk, controller)
    controller.begin_iteration(1, num_microbatches=1)
    return chunk.train(), controller


BF16 = {"params_dtype": torch.bfloat16, "bf16": True}


@pytest.mark.parametrize("config", [pytest.param({}, id="fp32"), pytest.param(BF16, id="bf16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", NOTHING_DROPPED)
def test_nothing_dropped_is_the_stock_model_bit_for_bit(name: str, config: dict[str, Any]) -> None:
    stock_steps, stock_gradients, stock_state = train(None, **config)
    steps, gradients, state = train(NOTHING_DROPPED[name], **config)
    assert steps == stock_steps
    assert_bitwise_equal(gradients, stock_gradients)
    assert_bitwise_equal(state, stock_state)


def test_a_dropped_layer_is_the_model_without_that_layer() -> None:
    with model_parallel():
        chunk, _ = switchable_gpt(Listed(1, 0, 1, 0))
        without = tiny_gpt(tiny_config(num_layers=4))[0].train()
        without.decoder.layers = torch.nn.ModuleList(without.decoder.layers[index] for index in (0, 2))
        assert torch.equal(forward(chunk), forward(without))


def test_a_dropped_layer_runs_no_module_and_saves_no_activation() -> None:
    with model_parallel():
        chunk, _ = switchable_gpt(Listed(1, 0, 1, 1))
        ran: list[int] = []
        for layer in chunk.decoder.layers:
            for module in layer.modules():
                if module is not layer:
                    module.register_forward_hook(lambda *_, number=layer.layer_number: ran.append(number))
        saved: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: saved.append(tensor.numel()) or tensor, lambda t: t
        ):
            forward(chunk)
        assert set(ran) == {1, 3, 4}
        kept_everything = len(saved)
        saved.clear()
        chunk, _ = switchable_gpt(Listed(1, 1, 1, 1))
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: saved.append(tensor.numel()) or tensor, lambda t: t
        ):
            forward(chunk)
        assert kept_everything < len(saved)


def test_dropped_layers_get_no_gradient_and_kept_ones_do() -> None:
    with model_parallel():
        chunk, _ = switchable_gpt(Listed(1, 0, 1, 0))
        forward(chunk).sum().backward()
        received = [any(param.grad is not None for param in layer.parameters()) for layer in chunk.decoder.layers]
        assert received == [True, False, True, False]


def test_evaluation_never_drops_and_never_scales() -> None:
    with model_parallel():
        chunk, _ = switchable_gpt(Listed(0.5, 0, 0, 0.5, residual_scale="inverse_keep_prob"))
        stock = tiny_gpt(tiny_config(num_layers=4))[0].eval()
        assert torch.equal(forward(chunk.eval()), forward(stock))


def generate(chunk: torch.nn.Module) -> list[torch.Tensor]:
    """Logits of a prompt and of two tokens after it, from a cache of keys and values."""
    context = StaticInferenceContext(max_batch_size=1, max_sequence_length=SEQUENCE)
    tokens = torch.randint(VOCAB, (1, 6), generator=torch.Generator().manual_seed(3))
    outputs = []
    with torch.no_grad():
        for start, end in ((0, 4), (4, 5), (5, 6)):
            positions = torch.arange(start, end)[None]
            outputs.append(
                chunk(tokens[:, start:end], positions, None, inference_context=context, runtime_gather_output=True)
            )
            context.increment_sequence_len_offset(end - start)
            context.enable_decode_mode()
    return outputs


def test_generation_with_a_cache_never_drops() -> None:
    with model_parallel():
        chunk, _ = switchable_gpt(Listed(0.5, 0, 0, 0.5, residual_scale="inverse_keep_prob"))
        stock = tiny_gpt(tiny_config(num_layers=4))[0].eval()
        for found, expected in zip(generate(chunk.eval()), generate(stock), strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("bias_is_apart", [False, True])
def test_kept_branches_are_scaled_by_one_over_their_own_keep_prob(bias_is_apart: bool) -> None:
    """PLD: x + Attn / p, then + MLP / p, with that layer's p (docs/method.md, section 4)."""
    keep_probs = (1.0, 0.5, 0.25, 0.8)
    with model_parallel():
        chunk, controller = switchable_gpt(Listed(*keep_probs, residual_scale="inverse_keep_prob"))
        controller._rows = [[True] * 4]  # keep all, whatever was drawn
        hidden = torch.randn(SEQUENCE, 2, 32)
        for layer, keep_prob in zip(chunk.decoder.layers, keep_probs, strict=True):
            for linear in (layer.self_attention.linear_proj, layer.mlp.linear_fc2):
                linear.skip_bias_add = bias_is_apart  # as Transformer Engine's are
                torch.nn.init.normal_(linear.bias)
            attention, bias = layer.self_attention(layer.input_layernorm(hidden), attention_mask=None)
            after_attention = hidden + (attention + bias if bias_is_apart else attention) / keep_prob
            mlp, bias = layer.mlp(layer.pre_mlp_layernorm(after_attention))
            expected = after_attention + (mlp + bias if bias_is_apart else mlp) / keep_prob
            assert (bias is not None) == bias_is_apart
            found, _ = layer(hidden_states=hidden, attention_mask=None)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_the_expectation_of_a_scaled_branch_is_the_branch() -> None:
    with model_parallel():
        chunk, controller = switchable_gpt(Listed(0.3, residual_scale="inverse_keep_prob"), hidden_size=8)
        layer = chunk.decoder.layers[0]
        layer.self_attention.linear_proj.weight.data.zero_()  # leaves one branch, so that the expectation is linear
        layer.self_attention.linear_proj.bias.data.zero_()
        hidden = torch.randn(SEQUENCE, 2, 8)
        draws = 3000
        total = torch.zeros_like(hidden)
        with torch.no_grad():
            branch = layer.eval()(hidden_states=hidden, attention_mask=None)[0] - hidden
            layer.train()
            for iteration in range(1, draws + 1):
                controller.begin_iteration(iteration, 1)
                total += layer(hidden_states=hidden, attention_mask=None)[0] - hidden
        # standard error of the mean of Bernoulli(p) / p, times four
        tolerance = 4 * float(np.sqrt((1 - 0.3) / 0.3 / draws))
        assert ((total / draws - branch).abs() <= tolerance * branch.abs() + 1e-6).all()


def test_parameter_names_and_sharded_keys_stay_stock() -> None:
    with model_parallel():
        stock = tiny_gpt(tiny_config(num_layers=4))[0]
        chunk, _ = switchable_gpt(Listed(1, 0, 1, 0, residual_scale="inverse_keep_prob"))
        assert list(chunk.state_dict()) == list(stock.state_dict())
        assert list(chunk.sharded_state_dict()) == list(stock.sharded_state_dict())
        assert all(isinstance(layer, TransformerLayer) for layer in chunk.decoder.layers)


def test_the_output_of_a_skipped_stage_can_be_freed_without_harm_to_its_input() -> None:
    """deallocate_pipeline_outputs replaces the output's data; an alias in autograd's sense would free the input too."""
    with model_parallel():
        chunk, _ = switchable_gpt(Listed(0, 0))
        hidden = torch.randn(SEQUENCE, 2, 32, requires_grad=True)
        before = hidden.detach().clone()
        output = hidden
        for layer in chunk.decoder.layers:
            output, _ = layer(hidden_states=output, attention_mask=None)
        assert output is not hidden
        assert output._base is None
        assert output.data_ptr() == hidden.data_ptr()  # nothing was copied
        output.data = torch.empty(1)
        assert torch.equal(hidden, before)


def test_layers_can_be_given_to_another_controller() -> None:
    with model_parallel():
        chunk, _ = switchable_gpt(Listed(0, 0, 0, 0, residual_scale="inverse_keep_prob"))
        again = DropController(Listed(1, 1, 1, 1))
        make_switchable(chunk, again)
        again.begin_iteration(1, 1)
        stock = tiny_gpt(tiny_config(num_layers=4))[0].train()
        assert torch.equal(forward(chunk), forward(stock))
        assert [type(layer).__name__ for layer in chunk.decoder.layers] == ["SwitchableTransformerLayer"] * 4


def test_training_without_begin_iteration_is_an_error_that_names_it() -> None:
    with model_parallel():
        (chunk,) = tiny_gpt(tiny_config(num_layers=4))
        make_switchable(chunk, DropController(Listed(1, 1, 1, 1)))
        with pytest.raises(RuntimeError, match="begin_iteration"):
            forward(chunk.train())


def test_a_policy_for_another_depth_is_refused() -> None:
    with model_parallel():
        chunks = tiny_gpt(tiny_config(num_layers=4))
        with pytest.raises(ValueError, match=r"policy is for 3 layers, the model has num_layers = 4"):
            make_switchable(chunks, DropController(Listed(1, 1, 1)))
        assert type(next(decoder_layers(chunks[0]))) is TransformerLayer  # refused before anything was changed


def test_a_model_without_decoder_layers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Linear has no `decoder.layers`"):
        make_switchable(torch.nn.Linear(2, 2), DropController(Listed(1)))


@pytest.mark.parametrize("model", [None, [], [None], 3])
def test_what_is_no_model_is_refused(model: Any) -> None:
    controller = DropController(Listed(1))
    for attach in (lambda: make_switchable(model, controller), lambda: fuse_residual(model)):
        with pytest.raises(ValueError, match=r"^model = .*must be a module, or a list of the chunks"):
            attach()
    with pytest.raises(ValueError, match="controller is a Listed: it must be a DropController"):
        make_switchable(torch.nn.Linear(2, 2), controller.policy)


def test_a_model_of_several_decoders_is_refused_instead_of_one_being_chosen() -> None:
    with model_parallel():
        (teacher,), (student,) = (tiny_gpt(tiny_config(num_layers=2)) for _ in range(2))
        pair = torch.nn.ModuleDict({"teacher": teacher, "student": student})
        for attach in (lambda model: make_switchable(model, DropController(Listed(1, 0))), fuse_residual):
            with pytest.raises(
                ValueError, match=r"has 2 decoders \(teacher.decoder, student.decoder\): give the model"
            ):
                attach(pair)
        make_switchable(student, DropController(Listed(1, 0)))
        assert {type(layer) for layer in decoder_layers(teacher)} == {TransformerLayer}
        make_switchable(torch.nn.ModuleDict({"model": student, "again": student}), DropController(Listed(1, 0)))


def test_distinct_replicas_refuse_overlapped_reduction_by_name() -> None:
    with model_parallel():
        chunks = tiny_gpt(tiny_config(num_layers=2))
        models = wrap_ddp(chunks, overlap_grad_reduce=True)
        controller = DropController(Listed(0, 0), sampler="balanced", replicas="distinct")
        make_switchable(models, controller)
        controller.begin_iteration(1, 1)
        with pytest.raises(ValueError, match="replicas = 'distinct' does not work with overlap_grad_reduce = True"):
            forward(models[0].train())


def test_wrappers_are_forgotten_with_their_models() -> None:
    with model_parallel():
        models = wrap_ddp(tiny_gpt(tiny_config(num_layers=2)))
        wrapper = weakref.ref(models[0])
        assert models[0] in ddp._wrappers
        del models
        gc.collect()
        assert wrapper() is None
