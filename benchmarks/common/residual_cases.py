"""What residual.py measures: cases, implementations, and the bytes that each has to move.

Bytes are counted per element of the residual stream [s, b, hidden], x being bf16. "Needed" is what the function cannot
do without: forward reads x and the residual and writes y, and rows that x does not have are copied; backward reads d_y
on the rows of x and writes d_x. The residual's gradient is d_y itself, and so is d_x where x has all rows, is of the
residual's dtype and nothing is dropped: then d_y is read for the bias alone. An implementation moves more where it runs
in several passes, stores a mask, or clones. bias, index and seeds are not counted: they are a hidden-th or a row-th.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_sbld.residual import eager, residual_skip_add, residual_skip_add_

ROWS: dict[str, tuple[int | None, float]] = {  # which rows x has: (dim of the index, share of its positions)
    "all": (None, 1.0),
    "none": (1, 0.0),
    "samples-50": (1, 0.5),  # whole samples, one index for all tokens
    "samples-100": (1, 1.0),
    "tokens-50": (0, 0.5),  # random-LTD: other tokens in each sample
    "tokens-100": (0, 1.0),
}
X_BYTES = 2  # bf16


@dataclass(frozen=True)
class Case:
    """One call's shape: s tokens, b samples."""

    s: int
    b: int
    hidden: int
    rows: str
    wide: bool
    """Whether the residual is fp32; else bf16."""
    dropout_prob: float

    @property
    def elements(self) -> int:
        return self.s * self.b * self.hidden

    @property
    def share(self) -> float:
        """Of the rows, those that x has."""
        return ROWS[self.rows][1]

    @property
    def residual_bytes(self) -> int:
        return 4 if self.wide else 2


@dataclass(frozen=True)
class Traffic:
    """Bytes read and written, per element of the residual."""

    forward: float
    backward: float


class Operands:
    """Tensors of a case, random from a seed."""

    def __init__(self, case: Case, device: torch.device, seed: int) -> None:
        rng = torch.Generator(device).manual_seed(seed)
        dim, share = ROWS[case.rows]
        shape, self.index, self.dim = [case.s, case.b], None, dim or 0
        if dim is not None:
            size = shape[dim]
            numbers = torch.rand((case.b, size) if dim == 0 else (size,), generator=rng, device=device)
            shape[dim] = round(share * size)
            chosen = numbers.argsort(dim=-1)[..., : shape[dim]]
            self.index = chosen.sort(dim=-1).values  # random-LTD keeps the order
        self._device, self._rng, self._gradients = device, rng, {}  # type: ignore[var-annotated]
        self.x = self._random(*shape, case.hidden).requires_grad_()
        self.bias = self._random(case.hidden).requires_grad_()
        self.residual = self._random(case.s, case.b, case.hidden)
        if case.wide:
            self.residual = self.residual.float()
        self.residual.requires_grad_()
        self.norm = torch.ones_like(self.bias), torch.zeros_like(self.bias)
        """Weight and bias of the layer norm that some peers do with it."""
        self.positions = self.index
        """The index as torch's gather and scatter want it: [k, b, hidden] for tokens."""
        if self.index is not None and dim == 0:
            self.positions = self.index.t()[..., None].expand(self.x.shape)

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self._rng, device=self._device).bfloat16()

    def gradient(self, output: torch.Tensor) -> torch.Tensor:
        """What comes back to an output; the same values each time."""
        key = output.shape, output.dtype
        if key not in self._gradients:
            self._gradients[key] = self._random(*output.shape).to(output.dtype)
        return self._gradients[key]

    def expected(self, with_bias: bool) -> torch.Tensor:
        """y without dropout, in fp32."""
        with torch.no_grad():
            branch = self.x.float() + self.bias.float() if with_bias else self.x.float()
            residual = self.residual.float()
            if self.index is None:
                return residual + branch
            if self.dim == 1:
                return residual.index_add(1, self.index, branch)
            return residual.scatter_add(0, self.positions, branch)


@dataclass(frozen=True)
class Implementation:
    """One way to compute the residual add.

    call: (operands, residual, dropout probability) -> outputs, y first.
    traffic: the model of its bytes.
    setting: of MEGATRON_SBLD_RESIDUAL while it runs; None leaves it.
    in_place: overwrites the residual that it is given.
    own: this project's, not a peer.
    with_bias: whether x's bias is added.
    narrows: y is bf16 even if the residual is fp32.
    """

    name: str
    call: Callable[[Operands, torch.Tensor, float], tuple[torch.Tensor, ...]]
    traffic: Callable[[Case], Traffic]
    rows: Sequence[str] = tuple(ROWS)
    setting: str | None = None
    in_place: bool = False
    own: bool = False
    with_bias: bool = True
    narrows: bool = False

    def needed(self, case: Case) -> Traffic:
        """What its function cannot do without: in place the rows that x does not have are left alone."""
        return _in_place_traffic(case) if self.in_place else needed(case)


def needed(case: Case) -> Traffic:
    """What the function cannot do without."""
    chosen, r = case.share, case.residual_bytes
    d_x = 0 if case.rows == "all" and not case.dropout_prob and not case.wide else X_BYTES
    return Traffic(chosen * (X_BYTES + 2 * r) + (1 - chosen) * 2 * r, chosen * (r + d_x))


def implementations() -> tuple[list[Implementation], list[str]]:
    """Those that can run here, and a line for each that cannot."""
    chosen = [rows for rows in ROWS if rows != "none"]
    found = [
        Implementation("fused", _functional, needed, own=True),
        Implementation("fused, in place", _in_place, _in_place_traffic, in_place=True, own=True),
        Implementation("eager specification", _functional, _eager_traffic, setting="eager", own=True),
        Implementation("Megatron compiled", partial(_megatron, compiled=True), _compiled_traffic, chosen, narrows=True),
        Implementation(
            "Megatron not compiled", partial(_megatron, compiled=False), _unfused_traffic, chosen, narrows=True
        ),
    ]
    missing = []
    if not torch.cuda.is_available():
        missing.append("Transformer Engine and flash-attention: not measured, they need a GPU")
        return found, missing
    if find_spec("transformer_engine") is None:
        missing.append("Transformer Engine: not measured, it is not installed")
    else:
        found.append(Implementation("Transformer Engine", _transformer_engine, _te_traffic, ["all"]))
    if find_spec("flash_attn") is None:
        missing.append("flash-attention (Triton): not measured, it is not installed")
    else:
        found.append(Implementation("flash-attention (Triton)", _flash_triton, _norm_traffic, ["all"], with_bias=False))
    if find_spec("dropout_layer_norm") is None:
        missing.append("flash-attention (CUDA): not measured, its dropout_layer_norm extension is not installed")
    else:
        found.append(Implementation("flash-attention (CUDA)", _flash_cuda, _norm_traffic, ["all"], with_bias=False))
    return found, missing


def versions() -> list[str]:
    """Names of the installed peers' packages, for the report."""
    names = {"transformer_engine": "transformer-engine", "flash_attn": "flash-attn", "triton": "triton"}
    found = []
    for module, package in names.items():
        try:
            if find_spec(module) is not None:
                importlib.metadata.version(package)
                found.append(package)
        except importlib.metadata.PackageNotFoundError:  # a container's build under another name
            continue
    return found


# ----------------------------------------------------------------------------------------------------------------------
# Calls


def _functional(operands: Operands, residual: torch.Tensor, prob: float) -> tuple[torch.Tensor, ...]:
    return (residual_skip_add(operands.x, residual, operands.bias, prob, 1.0, operands.index, operands.dim),)


def _in_place(operands: Operands, residual: torch.Tensor, prob: float) -> tuple[torch.Tensor, ...]:
    return (residual_skip_add_(operands.x, residual, operands.bias, prob, 1.0, operands.index, operands.dim),)


def _megatron(operands: Operands, residual: torch.Tensor, prob: float, compiled: bool) -> tuple[torch.Tensor, ...]:
    """bias_dropout_add; on part of the rows between torch's own gather and scatter."""
    add, x_with_bias = get_bias_dropout_add(True, compiled), (operands.x, operands.bias)
    index, dim, positions = operands.index, operands.dim, operands.positions
    if index is None:
        return (add(x_with_bias, residual, prob),)
    if dim == 1:
        rows = add(x_with_bias, residual.index_select(1, index), prob)
        return (residual.index_copy(1, index, rows.to(residual.dtype)),)
    rows = add(x_with_bias, residual.gather(0, positions), prob)
    return (residual.scatter(0, positions, rows.to(residual.dtype)),)


def _transformer_engine(operands: Operands, residual: torch.Tensor, prob: float) -> tuple[torch.Tensor, ...]:
    from transformer_engine.pytorch.jit import bias_dropout_add_fused_train

    return (bias_dropout_add_fused_train(operands.x, operands.bias, residual, prob),)


def _flash_triton(operands: Operands, residual: torch.Tensor, prob: float) -> tuple[torch.Tensor, ...]:
    from flash_attn.ops.triton.layer_norm import layer_norm_fn

    normalised, y = layer_norm_fn(operands.x, *operands.norm, residual=residual, dropout_p=prob, prenorm=True)
    return y, normalised


def _flash_cuda(operands: Operands, residual: torch.Tensor, prob: float) -> tuple[torch.Tensor, ...]:
    from flash_attn.ops.layer_norm import dropout_add_layer_norm

    normalised, y = dropout_add_layer_norm(operands.x, residual, *operands.norm, prob, 1e-5, prenorm=True)
    return y, normalised


# ----------------------------------------------------------------------------------------------------------------------
# The model


def _in_place_traffic(case: Case) -> Traffic:
    return Traffic(case.share * (X_BYTES + 2 * case.residual_bytes), needed(case).backward)


def _compiled_traffic(case: Case) -> Traffic:
    """One kernel forward, which stores a mask of a byte an element; backward one for d_x and one for the bias.

    Without dropout d_x is d_y itself. y is bf16 even if the residual is not; its gradient is then cast.
    """
    mask = 1 if case.dropout_prob else 0
    cast = 4 if case.wide else 0  # d_residual in fp32
    forward = 2 * X_BYTES + case.residual_bytes + mask
    backward = (2 * X_BYTES + mask if mask else 0) + (X_BYTES + mask) + (cast and X_BYTES + cast)
    return _with_gather(case, forward, backward)


def _te_traffic(case: Case) -> Traffic:
    """As Megatron's compiled one, but y has the residual's dtype."""
    x, r, mask = X_BYTES, case.residual_bytes, 1 if case.dropout_prob else 0
    d_x = r + mask + x if mask or case.wide else 0
    return Traffic(x + 2 * r + mask, d_x + r + mask)


def _unfused_traffic(case: Case) -> Traffic:
    """x + bias, dropout with a mask of a byte an element, the sum; backward dropout's and the bias's."""
    x, dropout = X_BYTES, bool(case.dropout_prob)
    cast = case.residual_bytes + x if case.wide else 0
    forward = cast + 2 * x + (2 * x + 1 if dropout else 0) + 3 * x
    backward = (2 * x + 1 if dropout else 0) + x + cast
    return _with_gather(case, forward, backward)


def _with_gather(case: Case, forward: float, backward: float) -> Traffic:
    """Bytes of an add on the chosen rows, with what torch's gather and scatter move around it.

    Forward: rows read and written by gather, all rows cloned, rows read and written by scatter. Backward: rows of d_y
    read and written; d_y cloned with zeros on the rows; the rows' gradients added into zeros of the whole size; the sum
    of the residual's two gradients.
    """
    if case.rows == "all":
        return Traffic(forward, backward)
    r, chosen = case.residual_bytes, case.share
    return Traffic(chosen * (forward + 4 * r) + 2 * r, chosen * (backward + 2 * r + r + 3 * r) + 2 * r + r + 3 * r)


def _norm_traffic(case: Case) -> Traffic:
    """The add with the layer norm that follows it: also writes the normalised rows and reads y for their gradient.

    The mask is drawn again (Triton) or a byte an element (CUDA, counted for both).
    """
    r, mask = case.residual_bytes, 1 if case.dropout_prob else 0
    return Traffic(X_BYTES + 2 * r + X_BYTES + mask, X_BYTES + 3 * r + X_BYTES + mask)


def _eager_traffic(case: Case) -> Traffic:
    """Operand and result bytes of each of its operations, counted on tensors without storage.

    Where d_x is d_y, the operations for the bias's gradient alone.
    """
    meta = partial(torch.empty, device="meta")
    rows, x_rows = case.s * case.b, round(case.share * case.s * case.b)
    residual_dtype = torch.float32 if case.wide else torch.bfloat16
    x, residual = (
        meta(x_rows, case.hidden, dtype=torch.bfloat16),
        meta(rows, case.hidden, dtype=residual_dtype),
    )
    if x_rows == 0:  # the operator clones, and its gradient is empty
        return needed(case)
    bias, seed = meta(case.hidden, dtype=torch.bfloat16), meta(1, dtype=torch.int64)
    index = None if case.rows == "all" else meta(x_rows, dtype=torch.int64)
    threshold = eager.drop_threshold(case.dropout_prob)
    with ByteCounter() as forward:
        eager.forward(x, residual, bias, index, seed, eager.multiplier(1.0, threshold), threshold)
    with ByteCounter() as backward:
        with_x = needed(case).backward > case.share * case.residual_bytes
        eager.backward(residual, index, seed, eager.multiplier(1.0, threshold), threshold, torch.bfloat16, with_x, True)
    return Traffic(forward.bytes / case.elements, backward.bytes / case.elements)


class ByteCounter(TorchDispatchMode):
    """Counts the bytes of operands and results of all operations that are no views."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.is_view:
            return result
        if func is torch.ops.aten.index.Tensor:
            self.bytes += 2 * _size(result)  # reads the rows that it takes, not all
        elif func is torch.ops.aten.index_copy_.default:
            self.bytes += 2 * _size(args[3])
        else:
            tensors = torch.utils._pytree.tree_leaves((args, kwargs, result))
            self.bytes += sum(_size(tensor) for tensor in tensors if isinstance(tensor, torch.Tensor))
        return result


def _size(tensor: torch.Tensor) -> int:
    """Bytes in memory; what is broadcast is there once."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
