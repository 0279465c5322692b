"""The implementations that peers.py compares: the same GPT, trained by several programs with the same decisions.

Each has pre-norm layers with biases, LayerNorm, learned positions, exact GELU, torch's scaled_dot_product_attention,
output weights tied to the embedding, no dropout, a fused AdamW with decoupled weight decay and clipping of the
gradients' norm. A layer that was dropped in a whole iteration keeps its weights and moments in all of them: here that
is `dropped_update: freeze`; the others set gradients to None, and AdamW passes over what has none. What differs belongs
to the implementation and is left as its users have it: Megatron accumulates gradients in a buffer and in bf16 keeps
fp32 copies of bf16 weights; the others run fp32 weights under autocast.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from megatron.core.num_microbatches_calculator import get_num_microbatches

from benchmarks.common.model import SwitchedModel, use_peak_rate
from megatron_sbld.config.sections import Config
from megatron_sbld.controller import DropController
from megatron_sbld.data.batches import Batch
from megatron_sbld.mcore import freeze_dropped_layers, fuse_residual
from megatron_sbld.ranks import this_device
from megatron_sbld.training.model import build_optimizer
from megatron_sbld.training.step import train_step

AFTER_ALL = 1 << 30  # an iteration that drops nothing
COMPILED = ", compiled layers"  # of a peer's name
TRANSFORMERS_HINT = "Hugging Face transformers is not installed; pip install '.[bench]' installs it"


class Peer:
    """One implementation: a model, its layers, and an iteration of its training.

    Attributes:
        name: for the report.
        model: what a microbatch passes through.
        layers: its transformer layers, in order.
    """

    name: str
    model: torch.nn.Module
    layers: Sequence[torch.nn.Module]

    def prepare(self, dropping: bool) -> None:
        """Put the layers into the state of an undropped or of a dropped block; not timed."""

    def iteration(self, batches: Sequence[Batch], number: int | None, kept: Sequence[bool]) -> float:
        """Train on the microbatches; the mean loss, on the CPU.

        number: of the dropped iteration, from which decisions can be drawn; None is an undropped one.
        kept: its decisions, [L]; all true in an undropped one.
        """
        raise NotImplementedError


class MegatronSbld(Peer):
    """This project, as its trainer runs it; an undropped iteration has stock Megatron layers, compiled or not."""

    name = "megatron-sbld"

    def __init__(
        self, config: Config, vocab_size: int, controller: DropController, dropped_update: str = "freeze"
    ) -> None:
        if config.training.torch_compile:
            self.name += COMPILED
        self._config = config
        self._controller = controller
        self._switched = SwitchedModel(config, vocab_size, controller)
        self._chunks, self.layers = self._switched.chunks, self._switched.layers
        self.model = self._chunks[0]
        self._optimizer = build_optimizer(config, self._chunks)
        if dropped_update == "freeze":
            freeze_dropped_layers(self._chunks, self._optimizer)
        use_peak_rate(self._optimizer, config)

    def prepare(self, dropping: bool) -> None:
        self._switched.switch(dropping)
        if not dropping:  # or the last dropped iteration would say what is frozen
            self._controller.begin_iteration(AFTER_ALL, get_num_microbatches())
            assert self._controller.plan.all()

    def iteration(self, batches: Sequence[Batch], number: int | None, kept: Sequence[bool]) -> float:
        if number is not None:
            self._controller.begin_iteration(number, get_num_microbatches())
            assert self._controller.plan[0].tolist() == list(kept), "every peer takes the controller's decisions"
        return train_step(self._config, self._chunks, self._optimizer, [iter(batches)], stop_requested=False).loss


class FusedMegatronSbld(MegatronSbld):
    """The same with `drop.residual: fused`, in undropped iterations too."""

    name = "megatron-sbld, residual: fused"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        fuse_residual(self._chunks)


class TorchPeer(Peer):
    """A torch module that gives logits [b, s, v], in the usual training loop."""

    def __init__(self, config: Config) -> None:
        self._precision = config.training.precision
        self._clip_grad = config.optimizer.clip_grad
        self._options = config.optimizer

    def _train(self, model: torch.nn.Module) -> None:
        """Take the model to the device and give it an optimizer."""
        self.model = model.to(this_device()).train()
        options = self._options
        self._optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=options.lr,
            betas=(options.adam_beta1, options.adam_beta2),
            eps=options.adam_eps,
            weight_decay=options.weight_decay,
            fused=True,
        )

    def _step(self, batches: Sequence[Batch], logits: Callable[[torch.Tensor], torch.Tensor]) -> float:
        self._optimizer.zero_grad()
        total: Any = 0.0
        for batch in batches:
            tokens, labels = (batch[name].to(this_device(), non_blocking=True) for name in ("tokens", "labels"))
            with torch.autocast(this_device().type, torch.bfloat16, enabled=self._precision == "bf16"):
                output = logits(tokens)
            loss = F.cross_entropy(output.float().flatten(0, 1), labels.flatten()) / len(batches)
            loss.backward()
            total = total + loss.detach()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._clip_grad)
        self._optimizer.step()
        return float(total)


class PlainLayer(torch.nn.Module):
    """A pre-norm transformer layer on [b, s, h]."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm = torch.nn.LayerNorm(hidden_size)
        self.qkv = torch.nn.Linear(hidden_size, 3 * hidden_size)
        self.projection = torch.nn.Linear(hidden_size, hidden_size)
        self.mlp_norm = torch.nn.LayerNorm(hidden_size)
        self.mlp = torch.nn.Sequential(
            torch.nn.Linear(hidden_size, 4 * hidden_size),
            torch.nn.GELU(),
            torch.nn.Linear(4 * hidden_size, hidden_size),
        )

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv(self.attention_norm(hidden_states)).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # [b, heads, s, d] each
        context = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden_states = hidden_states + self.projection(context.transpose(1, 2).flatten(2))
        return hidden_states + self.mlp(self.mlp_norm(hidden_states))


class PlainGPT(torch.nn.Module):
    """Token ids [b, s] -> logits [b, s, v]; a layer that is not kept is left out of the loop."""

    def __init__(self, num_layers: int, hidden_size: int, num_heads: int, seq_length: int, vocab_size: int) -> None:
        super().__init__()
        self.tokens = torch.nn.Embedding(vocab_size, hidden_size)
        self.positions = torch.nn.Embedding(seq_length, hidden_size)
        self.layers = torch.nn.ModuleList(PlainLayer(hidden_size, num_heads) for _ in range(num_layers))
        self.norm = torch.nn.LayerNorm(hidden_size)
        self.apply(_initialise)

    def forward(self, tokens: torch.Tensor, kept: Sequence[bool]) -> torch.Tensor:
        positions = torch.arange(tokens.size(1), device=tokens.device)
        hidden_states = self.tokens(tokens) + self.positions(positions)
        for layer, is_kept in zip(self.layers, kept, strict=True):
            if is_kept:
                hidden_states = layer(hidden_states)
        return F.linear(self.norm(hidden_states), self.tokens.weight)


def _initialise(module: torch.nn.Module) -> None:
    if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
        torch.nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, torch.nn.Linear):
        torch.nn.init.zeros_(module.bias)


class PlainTorch(TorchPeer):
    """Stochastic depth as a loop over layers in plain PyTorch."""

    name = "plain PyTorch"

    def __init__(self, config: Config, vocab_size: int) -> None:
        super().__init__(config)
        model = config.model
        gpt = PlainGPT(model.num_layers, model.hidden_size, model.num_attention_heads, model.seq_length, vocab_size)
        self._train(gpt)
        self.layers = list(gpt.layers)

    def iteration(self, batches: Sequence[Batch], number: int | None, kept: Sequence[bool]) -> float:
        return self._step(batches, lambda tokens: self.model(tokens, kept))


class CompiledTorch(PlainTorch):
    """The plain loop with each layer compiled by torch.compile, as torchtitan compiles its blocks."""

    name = PlainTorch.name + COMPILED

    def __init__(self, config: Config, vocab_size: int) -> None:
        super().__init__(config, vocab_size)
        forward = torch.compile(PlainLayer.forward, fullgraph=True)  # one graph for all layers
        for layer in self.layers:
            layer.forward = functools.partial(forward, layer)  # hooks that time a layer stay outside the graph


class _Logits(torch.nn.Module):
    """A Hugging Face causal language model that returns its logits alone, without a cache of keys and values."""

    def __init__(self, language_model: Any) -> None:
        super().__init__()
        self.language_model = language_model

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.language_model(input_ids=tokens, use_cache=False).logits


class HuggingFaceOPT(TorchPeer):
    """OPT of Hugging Face transformers with the LayerDrop that it has built in.

    Its decoder asks torch.rand in front of each layer and leaves the layer out where the number is below `layerdrop`.
    The numbers are replaced, after they were drawn, by ones that give the shared decisions; everything else is its own.
    """

    name = "transformers OPT"

    def __init__(self, config: Config, vocab_size: int) -> None:
        from transformers import OPTConfig, OPTForCausalLM

        super().__init__(config)
        model = config.model
        opt = OPTConfig(
            vocab_size=vocab_size,
            hidden_size=model.hidden_size,
            word_embed_proj_dim=model.hidden_size,
            num_hidden_layers=model.num_layers,
            ffn_dim=4 * model.hidden_size,
            num_attention_heads=model.num_attention_heads,
            max_position_embeddings=model.seq_length,
            activation_function="gelu",
            dropout=0.0,
            attention_dropout=0.0,
            layerdrop=0.0,
            pad_token_id=None,  # its embedding would get no gradient
            use_cache=False,
            attn_implementation="sdpa",
        )
        self._train(_Logits(OPTForCausalLM(opt)))
        self._decoder = self.model.language_model.model.decoder
        self.layers = list(self._decoder.layers)

    def prepare(self, dropping: bool) -> None:
        self._decoder.layerdrop = 0.5 if dropping else 0.0

    def iteration(self, batches: Sequence[Batch], number: int | None, kept: Sequence[bool]) -> float:
        if number is None:
            return self._step(batches, self.model)
        with forced_decisions(list(kept) * len(batches)) as left:
            loss = self._step(batches, self.model)
        assert next(left, None) is None, "the decoder asks once for each layer and microbatch"
        return loss


@contextlib.contextmanager
def forced_decisions(kept: Sequence[bool]) -> Iterator[Iterator[bool]]:
    """torch.rand that draws, then tells a LayerDrop of 0.5 the next of these decisions; gives those left."""
    rand, keep, drop, left = torch.rand, torch.tensor(1.0), torch.tensor(0.0), iter(kept)

    def draw(*args: Any, **kwargs: Any) -> torch.Tensor:
        rand(*args, **kwargs)
        return keep if next(left) else drop

    with mock.patch.object(torch, "rand", draw):
        yield left


def deepspeed_note() -> str:
    """Why DeepSpeed's progressive layer drop is not among the peers, from what is installed here."""
    try:
        distribution = importlib.metadata.distribution("deepspeed")
    except importlib.metadata.PackageNotFoundError:
        return "DeepSpeed's progressive layer drop: not measured, deepspeed is not installed"
    if any(file.name == "progressive_layer_drop.py" for file in distribution.files or []):
        reason = f"no peer of this program runs deepspeed {distribution.version}"
    else:
        reason = f"deepspeed {distribution.version} no longer has it"
    return f"DeepSpeed's progressive layer drop: not measured, {reason}"
