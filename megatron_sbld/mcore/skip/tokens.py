"""A layer on some tokens of each sample: `drop.granularity: token` (random-LTD, docs/method.md section 5).

The kept tokens are gathered out of the residual stream [s, b, h], the stock layer runs on them as on a shorter sequence
[r, b, h], its first residual add included, and its output takes their places in the stream; the other tokens pass by
unchanged. Each sample has its own tokens, in order, so that a causal mask stays causal. What depends on a token's place
in the sequence is gathered with it: rotary embeddings and attention masks.

Where ranks hold parts of a sequence (sequence and context parallelism), each gathers its own tokens of the same draw,
as many as the others, and nothing is communicated for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from megatron.core import parallel_state
from megatron.core.ssm.mamba_layer import MambaLayer

from megatron_sbld.controller import DropController
from megatron_sbld.mcore.skip.samples import inputs_by_name
from megatron_sbld.mcore.skip.token_draws import Split, draw_tokens
from megatron_sbld.method.combinations import refuse_combinations
from megatron_sbld.method.tokens import TokenDrop

_FP8_TOKENS = 32
"""Tokens of which a rank's number is a multiple: blocks of MXFP8 and rows of FP8's products ask for 32 and 16."""
_REMEMBERED = 2
"""Microbatches whose tokens are kept: with pipeline stages one in forward and one that is recomputed take turns."""


class KeptTokens(NamedTuple):
    """The tokens that a layer runs in a microbatch."""

    rows: torch.Tensor
    """Of the stream on this rank taken as [s * b, h], int64 [r * b], token by token."""
    places: torch.Tensor
    """Of what attention sees of the sequence on this rank, ascending, int64 [b, r]."""
    whole: int
    """How many tokens attention would see."""
    split: Split


class TokenIndices:
    """The kept tokens of each layer and microbatch, on the device. Shared by the layers of one chunk."""

    def __init__(self, controller: DropController, layers: Sequence[int], *, sequence_parallel: bool) -> None:
        """layers: the units of the chunk, by the controller's numbers."""
        assert controller.tokens is not None, "made for granularity token alone"
        self._controller = controller
        self._layers = [layer for layer in dict.fromkeys(layers) if layer in controller.tokens.layers]
        self.split = split_of_this_rank(sequence_parallel)
        own = controller.tokens.seq_length // (self.split.context_ranks * self.split.sequence_ranks)
        self.whole = (0, own)
        """The dimension of hidden_states [s, b, h] that a layer runs a part of, and its whole size."""
        self._numbers = torch.tensor(self._layers, dtype=torch.int64)
        self._rows: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # of each microbatch
        self._begun = 0
        """The controller's, whose tokens they are."""

    def narrowed(
        self, forward: Callable[..., Any], layer_number: int, microbatch: int, hidden_states: torch.Tensor
    ) -> Callable[..., Any]:
        """A layer's forward on its kept tokens; the stock one where it runs all of them.

        Raises:
            RuntimeError: samples of another length than the controller was told of.
        """
        controller, split, own = self._controller, self.split, self.whole[1]
        assert controller.tokens is not None, "made for granularity token alone"
        if hidden_states.size(0) != own:
            raise RuntimeError(
                f"a rank's part of a sample has {hidden_states.size(0)} tokens, and it must have {own} of the "
                f"seq_length = {controller.tokens.seq_length} that the controller was given"
            )
        if not controller.runs_some_tokens(layer_number):
            return forward
        if self._begun != controller.begun:
            self._rows.clear()
            self._begun = controller.begun
        if microbatch not in self._rows:
            while len(self._rows) >= _REMEMBERED:
                del self._rows[next(iter(self._rows))]
            self._rows[microbatch] = self._draw(microbatch, hidden_states)
        place = self._layers.index(layer_number)
        rows, places = self._rows[microbatch]
        kept = KeptTokens(rows[place], places[place], own * split.sequence_ranks, split)
        return lambda *args, **kwargs: run_on_tokens(forward, kept, *args, **kwargs)

    def _draw(self, microbatch: int, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows [layers, r * b] and places [layers, b, r] of all layers of the chunk."""
        controller, split, num_samples = self._controller, self.split, hidden_states.size(1)
        self._numbers = self._numbers.to(hidden_states.device)  # copied once
        assert controller.tokens is not None, "made for granularity token alone"
        places = draw_tokens(
            controller.tokens.seq_length,
            controller.num_tokens,
            controller.tokens.strata,
            split,
            seed=controller.seed,
            iteration=controller.iteration,
            samples=samples_of(microbatch, num_samples),
            layers=self._numbers,
        )
        own = places.size(-1) // split.sequence_ranks
        mine = places[..., split.sequence_rank * own : (split.sequence_rank + 1) * own]
        mine = mine - split.sequence_rank * hidden_states.size(0)
        samples = torch.arange(num_samples, device=hidden_states.device)
        return (mine.transpose(1, 2) * num_samples + samples).flatten(1), places


def check_strata(controller: DropController, split: Split) -> None:
    """Raise ValueError for strata that this layout cannot draw."""
    tokens = controller.tokens
    assert tokens is not None, "asked for with granularity token alone"
    if tokens.strata % split.strata:
        raise ValueError(
            f"token_strata = {tokens.strata} is not allowed: ranks of sequence parallelism "
            f"({split.sequence_ranks}) and context parallelism ({split.context_ranks}) need a "
            f"multiple of {split.strata}"
        )


def check_layer_of_tokens(layer: Any, number: int, tokens: TokenDrop) -> None:
    """Raise ValueError for a layer that cannot run some of a sample's tokens."""
    if isinstance(layer, MambaLayer):
        raise ValueError(
            f"token_layers has {number}, but that is a {type(layer).__name__}, whose state runs on from token to "
            "token: leave it out"
        )
    if hasattr(layer, "_compiled_forward"):
        refuse_combinations({"granularity": "token", "torch_compile": True})
    if not (layer.config.fp8 or getattr(layer.config, "fp4", None)):
        return
    ranks = layer.config.context_parallel_size * (
        layer.config.tensor_model_parallel_size if layer.config.sequence_parallel else 1
    )
    if tokens.step % (_FP8_TOKENS * ranks):
        raise ValueError(
            f"token_step = {tokens.step} is not allowed with fp8 or fp4: their kernels need a multiple of "
            f"{_FP8_TOKENS * ranks} tokens on this layout"
        )


def split_of_this_rank(sequence_parallel: bool) -> Split:
    """What Megatron's parallel state says of this rank."""
    return Split(
        context_ranks=parallel_state.get_context_parallel_world_size(),
        context_rank=parallel_state.get_context_parallel_rank(),
        sequence_ranks=parallel_state.get_tensor_model_parallel_world_size() if sequence_parallel else 1,
        sequence_rank=parallel_state.get_tensor_model_parallel_rank() if sequence_parallel else 0,
    )


def samples_of(microbatch: int, num_samples: int) -> range:
    """The numbers of a microbatch's samples in the global batch, in the order of Megatron's sampler.

    Microbatch m holds on replica r the num_samples samples from (m * replicas + r) * num_samples on.
    """
    replicas, replica = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    first = (microbatch * replicas + replica) * num_samples
    return range(first, first + num_samples)


class _Gather(torch.autograd.Function):
    """Stream [s, b, h] -> its kept rows [r, b, h], and the stream for `_Scatter`, which passes its other rows by.

    Two outputs, because kept rows have their gradient from the layer alone and the others from behind it: backward
    copies one into the other, where index_select and index_copy would fill a stream with zeros for each and add them.
    The second output is a new tensor on the same storage, as in switchable.py's _SkippedLayer.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, stream: torch.Tensor, rows: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(rows)
        samples, width = stream.shape[1:]
        passed = torch.empty((1,), dtype=stream.dtype, device=stream.device)
        passed.data = stream.data
        return stream.reshape(-1, width).index_select(0, rows).view(-1, samples, width), passed

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, grad_kept: torch.Tensor, grad_passed: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        (rows,) = ctx.saved_tensors
        return _with_rows(grad_passed, rows, grad_kept), None


class _Scatter(torch.autograd.Function):
    """Stream [s, b, h] and new rows [r, b, h] -> the stream with these in the place of its own."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, stream: torch.Tensor, rows: torch.Tensor, kept: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(rows)
        return _with_rows(stream, rows, kept)

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, grad_output: torch.Tensor
    ) -> tuple[torch.Tensor, None, torch.Tensor]:
        (rows,) = ctx.saved_tensors
        samples, width = grad_output.shape[1:]
        # _Gather's backward overwrites the kept rows of the first one.
        return grad_output, None, grad_output.reshape(-1, width).index_select(0, rows).view(-1, samples, width)


def _with_rows(stream: torch.Tensor, rows: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """A copy of the stream [s, b, h], no view of another tensor, with `values` [r, b, h] at `rows`."""
    copied = stream.clone(memory_format=torch.contiguous_format)
    copied.view(-1, stream.size(-1)).index_copy_(0, rows, values.reshape(-1, stream.size(-1)).to(stream.dtype))
    return copied


def run_on_tokens(forward: Callable[..., Any], kept: KeptTokens, *args: Any, **kwargs: Any) -> Any:
    """A stock layer's (hidden_states [s, b, h], context), of which it computed the kept tokens alone.

    Raises:
        ValueError: an input that has the sequence's tokens in a way that is not known here.
    """
    kwargs = inputs_by_name("token", args, kwargs)
    stream = kwargs.pop("hidden_states")
    selected = {name: _selected(name, value, kept) for name, value in kwargs.items()}
    gathered, passed = _Gather.apply(stream, kept.rows)
    output, context = forward(hidden_states=gathered, **selected)
    return _Scatter.apply(passed, kept.rows, output), context


def _selected(name: str, value: Any, kept: KeptTokens) -> Any:
    """The kept tokens of one of a layer's other inputs."""
    if value is None:
        return None
    select = _SELECT.get(name)
    if select is None or not isinstance(value, torch.Tensor):
        raise ValueError(
            f"granularity 'token' does not work with {name} in training: only {', '.join(_SELECT)} can be given for "
            "some tokens of a sample; use granularity 'layer'"
        )
    return select(name, value, kept)


def _rotary(name: str, value: torch.Tensor, kept: KeptTokens) -> torch.Tensor:
    """Embeddings [s, b or 1, 1, d] -> [r, b, 1, d]."""
    samples = kept.places.size(0)
    if value.dim() != 4 or value.size(0) != kept.whole or value.size(1) not in (1, samples):
        raise _unknown_shape(name, value, f"[{kept.whole}, 1 or {samples}, 1, channels]")
    if value.size(1) == 1:
        return value.squeeze(1)[kept.places.t()]  # [r, b, 1, d]
    return value[kept.places.t(), torch.arange(samples, device=value.device)]


def _mask(name: str, value: torch.Tensor, kept: KeptTokens) -> torch.Tensor:
    """Mask [b or 1, 1, s, s] -> [b, 1, r, r]."""
    samples, whole = kept.places.size(0), kept.whole
    if kept.split.context_ranks > 1:
        raise ValueError(
            f"granularity 'token' does not work with {name} and context parallelism: a rank has no mask of its own"
        )
    if value.dim() != 4 or value.size(0) not in (1, samples) or value.shape[1:] != (1, whole, whole):
        raise _unknown_shape(name, value, f"[1 or {samples}, 1, {whole}, {whole}]")
    sample = torch.arange(samples, device=value.device)[:, None, None]
    by_sample = value.expand(samples, -1, -1, -1)[:, 0]
    return by_sample[sample, kept.places[:, :, None], kept.places[:, None, :]][:, None]


def _padding(name: str, value: torch.Tensor, kept: KeptTokens) -> torch.Tensor:
    """Which tokens are padding, [b, s] -> [b, r]."""
    if kept.split.sequence_ranks > 1:
        raise ValueError(f"granularity 'token' does not work with {name} and sequence parallelism in training")
    if value.shape != (kept.places.size(0), kept.whole):
        raise _unknown_shape(name, value, f"[{kept.places.size(0)}, {kept.whole}]")
    return value.gather(1, kept.places)


def _unknown_shape(name: str, value: torch.Tensor, allowed: str) -> ValueError:
    return ValueError(
        f"granularity 'token' does not work with {name} of shape {list(value.shape)}: it must be {allowed}; use "
        "granularity 'layer'"
    )


_SELECT: dict[str, Callable[[str, torch.Tensor, KeptTokens], torch.Tensor]] = {
    "attention_mask": _mask,
    "rotary_pos_emb": _rotary,
    "padding_mask": _padding,
}
"""How each of a layer's other inputs is given for some tokens."""
