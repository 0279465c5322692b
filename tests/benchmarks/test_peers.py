"""The programs that benchmarks/peers.py compares compute the same: losses from the same weights and decisions."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from benchmarks.common.gain import time_ratio
from benchmarks.common.layouts import Layout, make_config
from benchmarks.common.model import random_batches
from benchmarks.common.peer_models import (
    CompiledTorch,
    HuggingFaceOPT,
    MegatronSbld,
    PlainGPT,
    PlainTorch,
    TorchPeer,
    forced_decisions,
)
from benchmarks.common.processes import megatron_run
from benchmarks.common.rounds import Deadline
from benchmarks.peers import Decisions
from megatron_sbld.config.sections import Config
from megatron_sbld.controller import DropController

ARGS = argparse.Namespace(
    **{"num_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 16, "vocab_size": 64},
    **{"micro_batch_size": 2, "global_batch_size": 4, "precision": "fp32", "recompute_granularity": None},
    **{"keep_probs": [0.7, 0.5], "rounds": 3, "block_iterations": 2, "warmup": 1, "seed": 1239},
)
ALL = [True] * 4


@pytest.fixture
def config() -> Iterator[Config]:
    """Of a tiny GPT, with Megatron's parallel state and two microbatches an iteration."""
    config = make_config(ARGS, Layout(1))
    with megatron_run(config):
        yield config


def copy_to_plain(source: MegatronSbld, target: PlainTorch) -> None:
    """Give the plain model Megatron's weights; Megatron keeps query, key and value of each head together."""
    gpt, chunk = target.model, source.model.module
    assert isinstance(gpt, PlainGPT)
    with torch.no_grad():
        gpt.tokens.weight.copy_(chunk.embedding.word_embeddings.weight)
        gpt.positions.weight.copy_(chunk.embedding.position_embeddings.weight)
        gpt.norm.load_state_dict(weights(chunk.decoder.final_layernorm))
        for layer, theirs in zip(gpt.layers, source.layers, strict=True):
            layer.attention_norm.load_state_dict(weights(theirs.input_layernorm))
            layer.mlp_norm.load_state_dict(weights(theirs.pre_mlp_layernorm))
            for name, values in weights(theirs.self_attention.linear_qkv).items():
                by_head = values.unflatten(0, (ARGS.num_attention_heads, 3, -1))
                layer.qkv.get_parameter(name).copy_(by_head.transpose(0, 1).flatten(0, 2))
            layer.projection.load_state_dict(weights(theirs.self_attention.linear_proj))
            layer.mlp[0].load_state_dict(weights(theirs.mlp.linear_fc1))
            layer.mlp[2].load_state_dict(weights(theirs.mlp.linear_fc2))


def copy_to_opt(source: PlainTorch, target: HuggingFaceOPT) -> None:
    gpt, decoder = source.model, target.model.language_model.model.decoder
    with torch.no_grad():
        decoder.embed_tokens.weight.copy_(gpt.tokens.weight)
        decoder.embed_positions.weight[2:].copy_(gpt.positions.weight)  # OPT's positions start at 2
        decoder.final_layer_norm.load_state_dict(gpt.norm.state_dict())
        for layer, theirs in zip(decoder.layers, gpt.layers, strict=True):
            layer.self_attn_layer_norm.load_state_dict(theirs.attention_norm.state_dict())
            layer.final_layer_norm.load_state_dict(theirs.mlp_norm.state_dict())
            for index, name in enumerate(("q_proj", "k_proj", "v_proj")):
                part = {key: value.chunk(3)[index] for key, value in theirs.qkv.state_dict().items()}
                getattr(layer.self_attn, name).load_state_dict(part)
            layer.self_attn.out_proj.load_state_dict(theirs.projection.state_dict())
            layer.fc1.load_state_dict(theirs.mlp[0].state_dict())
            layer.fc2.load_state_dict(theirs.mlp[2].state_dict())


def weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: param.detach() for name, param in module.named_parameters()}


def losses(peer: MegatronSbld | TorchPeer, decisions: Decisions) -> list[float]:
    """Of an undropped iteration, three dropped ones and an undropped one."""
    batches = random_batches(ARGS, 2, ARGS.seed)
    found = []
    peer.model.train()
    for number in (None, 1, 2, 3, None):
        peer.prepare(dropping=number is not None)
        found.append(peer.iteration(batches, number, ALL if number is None else decisions.kept(number)))
    return found


def build(config: Config, dropped_update: str = "freeze") -> tuple[MegatronSbld, PlainTorch, Decisions]:
    """With weights large enough for a layer's absence to be seen in the loss."""
    decisions = Decisions(ARGS)
    own = MegatronSbld(config, ARGS.vocab_size, DropController(decisions.policy(), seed=ARGS.seed), dropped_update)
    with torch.no_grad():
        for param in own.model.parameters():
            param.mul_(4 if param.dim() > 1 else 1)
    plain = PlainTorch(config, ARGS.vocab_size)
    copy_to_plain(own, plain)
    return own, plain, decisions


@pytest.mark.parametrize("dropped_update", ["freeze", "apply"])
def test_the_plain_loop_trains_as_megatron_does(config: Config, dropped_update: str) -> None:
    own, plain, decisions = build(config, dropped_update)
    assert sum(p.numel() for p in own.model.parameters()) == sum(p.numel() for p in plain.model.parameters())
    assert not all(decisions.kept(1)), "the seed is chosen so that iterations drop layers"
    if dropped_update == "apply":  # moves the dropped layers with a zero gradient; so does the loop's with this
        plain._optimizer.zero_grad = partial(plain._optimizer.zero_grad, set_to_none=False)
    found = losses(plain, decisions)
    assert found == pytest.approx(losses(own, decisions), rel=1e-3)
    assert found[-1] < 0.98 * found[0]


def test_a_program_with_other_decisions_has_another_loss(config: Config) -> None:
    own, plain, decisions = build(config)
    batches = random_batches(ARGS, 2, ARGS.seed)
    expected = plain.iteration(batches, 1, decisions.kept(1))
    copy_to_plain(own, plain)
    found = plain.iteration(batches, 1, [not kept for kept in decisions.kept(1)])
    assert found != pytest.approx(expected, rel=1e-3)


def test_transformers_opt_trains_as_the_plain_loop_does(config: Config) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed: pip install '.[bench]'")
    _, plain, decisions = build(config)
    opt = HuggingFaceOPT(config, ARGS.vocab_size)
    copy_to_opt(plain, opt)
    assert losses(opt, decisions) == pytest.approx(losses(plain, decisions), rel=1e-4)


@pytest.mark.slow
def test_compiled_layers_of_this_project_train_as_its_eager_ones_do(config: Config) -> None:
    own, _, decisions = build(config)
    controller = DropController(decisions.policy(), seed=ARGS.seed)
    compiled = MegatronSbld(
        replace(config, training=replace(config.training, torch_compile=True)), ARGS.vocab_size, controller
    )
    assert compiled.name == "megatron-sbld, compiled layers"
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        for param, source in zip(compiled.model.parameters(), own.model.parameters(), strict=True):
            param.copy_(source)
    assert losses(compiled, decisions) == pytest.approx(losses(own, decisions), rel=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2, "of stock layers and of switchable ones"


@pytest.mark.slow
def test_the_compiled_loop_trains_as_the_plain_one_does_and_has_one_graph_for_all_layers(config: Config) -> None:
    _, plain, decisions = build(config)
    compiled = CompiledTorch(config, ARGS.vocab_size)
    compiled.model.load_state_dict(plain.model.state_dict())
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    assert losses(compiled, decisions) == pytest.approx(losses(plain, decisions), rel=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_a_layer_that_is_not_kept_runs_no_module(config: Config) -> None:
    _, plain, _ = build(config)
    ran: list[int] = []
    for index, layer in enumerate(plain.layers):
        layer.register_forward_hook(lambda *_, index=index: ran.append(index))
    plain.iteration(random_batches(ARGS, 2, ARGS.seed), 1, [True, False, False, True])
    assert ran == [0, 3, 0, 3]


def test_forced_decisions_are_told_in_order_and_torch_draws_again_afterwards() -> None:
    with forced_decisions([True, False, True]) as left:
        assert [bool(torch.rand([]) < 0.5) for _ in range(2)] == [False, True]  # below layerdrop: dropped
        assert list(left) == [True]
    torch.manual_seed(0)
    assert len({float(torch.rand([])) for _ in range(8)}) == 8


def test_every_dropped_block_has_iterations_of_its_own_keep_prob() -> None:
    decisions = Decisions(ARGS)
    numbers = [
        t for round_ in range(3) for keep_prob in ARGS.keep_probs for t in decisions.iterations(round_, keep_prob)
    ]
    assert numbers == list(range(1, 3 * 2 * 2 + 1))
    for keep_prob in ARGS.keep_probs:
        for number in decisions.iterations(2, keep_prob):
            assert decisions.policy().keep_probs(number).tolist() == [keep_prob] * 4
    assert len({tuple(decisions.kept(number)) for number in numbers}) > 1


def test_the_speed_of_two_programs_is_compared_round_by_round() -> None:
    own = np.array([1.0, 2.0, 4.0, 8.0])
    ratio = time_ratio(1.5 * own, own, seed=0)
    assert [ratio.value, ratio.low, ratio.high] == pytest.approx([1.5, 1.5, 1.5])


@pytest.mark.usefixtures("one_rank")
def test_a_deadline_lets_two_rounds_pass() -> None:
    late, early = Deadline(minutes=0), Deadline(minutes=60)
    assert [late.round_done() for _ in range(3)] == [False, True, True]
    assert [early.round_done() for _ in range(3)] == [False, False, False]
    assert (late.rounds, early.rounds) == (3, 3)
