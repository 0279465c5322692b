"""residual_skip_add on a CPU: what it computes, row by row; the compiled library against eager torch, bit for bit; what
torch expects of an operator; what is refused."""

from __future__ import annotations

import ctypes
import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

from megatron_sbld.residual import choice, eager, native, op, residual_skip_add, residual_skip_add_
from megatron_sbld.residual.extension import _addresses, bindings, describe_extension

DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
]
INDEX_KINDS = ("none", "dim 0", "dim 1", "tokens of each sample", "samples of each token")


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    return lambda setting: monkeypatch.setenv(choice.VARIABLE, setting)


@pytest.fixture(params=["extension", "ctypes"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How a library is called. All that this file says holds for both."""
    if request.param == "ctypes":
        monkeypatch.setattr(op, "bindings", lambda: None)
    elif (extension := bindings()) is None:
        pytest.skip(describe_extension())
    else:
        extension.set_choice(_addresses)  # forgets which library it took
    return request.param


@pytest.fixture(params=["cpu", "eager"])
def setting(request: pytest.FixtureRequest, use: Callable[[str], None]) -> str:
    use(request.param)
    return request.param


class Case:
    """Random inputs of one call.

    shape: [s, b, hidden] of the residual.
    kind: of INDEX_KINDS; share: of the positions that index names.
    """

    def __init__(
        self,
        shape: tuple[int, int, int] = (7, 3, 20),
        kind: str = "none",
        share: float = 0.5,
        dtypes: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32),
        bias: bool = True,
        dropout_prob: float = 0.3,
        scale: float = 1.25,
        seed: int = 0,
    ) -> None:
        rng = torch.Generator().manual_seed(seed)
        length, batch, hidden = shape
        self.dim = 1 if kind in ("dim 1", "samples of each token") else 0
        size, others = shape[self.dim], shape[1 - self.dim]
        kept = round(share * size)
        self.index = None
        if kind in ("dim 0", "dim 1"):
            self.index = torch.randperm(size, generator=rng)[:kept]
        elif kind != "none":
            self.index = torch.stack([torch.randperm(size, generator=rng)[:kept] for _ in range(others)])
        x_shape = list(shape)
        if self.index is not None:
            x_shape[self.dim] = kept
        self.x = torch.randn(x_shape, generator=rng).to(dtypes[0])
        self.residual = torch.randn(length, batch, hidden, generator=rng).to(dtypes[1])
        self.bias = torch.randn(hidden, generator=rng).to(dtypes[0]) if bias else None
        self.d_y = torch.randn(length, batch, hidden, generator=rng).to(dtypes[1])
        self.dropout_prob, self.scale, self.seed = dropout_prob, scale, seed

    def run(self, function: Callable[..., torch.Tensor] = residual_skip_add, clone: bool = False) -> list[torch.Tensor]:
        """y and the gradients of x, residual and bias."""
        inputs = [
            tensor.clone().requires_grad_() for tensor in (self.x, self.residual, self.bias) if tensor is not None
        ]
        x, residual = inputs[0], inputs[1].clone() if clone else inputs[1]
        torch.manual_seed(self.seed)
        y = function(x, residual, *inputs[2:] or [None], self.dropout_prob, self.scale, self.index, self.dim)
        y.backward(self.d_y)
        return [y.detach(), *(tensor.grad for tensor in inputs)]

    def rows(self) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
        """(position in x, position in the residual) of each row of x."""
        for i, j in itertools.product(range(self.x.size(0)), range(self.x.size(1))):
            if self.index is None:
                yield (i, j), (i, j)
            elif self.dim == 0:
                yield (i, j), (int(self.index[i] if self.index.dim() == 1 else self.index[j, i]), j)
            else:
                yield (i, j), (i, int(self.index[j] if self.index.dim() == 1 else self.index[i, j]))


# ----------------------------------------------------------------------------------------------------------------------
# What is computed


@pytest.mark.parametrize("kind", INDEX_KINDS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.usefixtures("setting")
def test_without_dropout_it_is_the_sum_row_by_row(kind: str, bias: bool) -> None:
    case = Case(kind=kind, bias=bias, dropout_prob=0.0)
    y, d_x, d_residual, *d_bias = case.run()
    expected, expected_d_x = case.residual.clone(), torch.zeros_like(case.x)
    for x_row, row in case.rows():
        expected[row] += case.scale * (case.x[x_row] + (case.bias if bias else 0))
        expected_d_x[x_row] = case.scale * case.d_y[row]
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(d_x, expected_d_x)
    assert torch.equal(d_residual, case.d_y)
    if bias:
        torch.testing.assert_close(d_bias[0], expected_d_x.sum((0, 1)))


@pytest.mark.parametrize(("dtype", "bias"), [(torch.float32, True), (torch.bfloat16, False), (torch.float16, False)])
@pytest.mark.usefixtures("setting")
def test_all_rows_without_dropout_and_scale_are_megatrons_bits(dtype: torch.dtype, bias: bool) -> None:
    """In half precision Megatron's own rounds x + bias as well, unless it is compiled."""
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add

    case = Case(dropout_prob=0.0, scale=1.0, dtypes=(dtype, dtype), bias=bias)
    stock = get_bias_dropout_add(training=True, fused=False)

    def megatrons(x: Any, residual: Any, bias: Any, prob: float, *_: Any) -> torch.Tensor:
        return stock((x, bias), residual, prob)

    for found, expected in zip(case.run()[:3], case.run(megatrons)[:3], strict=True):  # y, d_x, d_residual
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dropout_prob", [0.1, 0.5, 0.9])
@pytest.mark.usefixtures("setting")
def test_dropout_keeps_its_share_and_the_expectation(dropout_prob: float) -> None:
    shape = (64, 16, 256)
    residual = torch.zeros(shape)
    torch.manual_seed(2)
    y = residual_skip_add(torch.ones(shape), residual, None, dropout_prob)
    kept = y != 0
    error = math.sqrt(dropout_prob * (1 - dropout_prob) / kept.numel())
    assert abs(float(kept.float().mean()) - (1 - dropout_prob)) < 4 * error
    assert float(y[kept].min()) == float(y[kept].max()) == pytest.approx(1 / (1 - dropout_prob), rel=1e-3)
    for dim in range(3):  # no row, sample or column is favoured
        share = kept.float().mean([other for other in range(3) if other != dim])
        assert float((share - (1 - dropout_prob)).abs().max()) < 5 * error * math.sqrt(shape[dim])


@pytest.mark.parametrize("kind", INDEX_KINDS)
@pytest.mark.usefixtures("setting")
def test_the_mask_belongs_to_the_place_in_the_stream_not_to_the_index(kind: str) -> None:
    shape = (9, 4, 24)
    case = Case(shape, kind=kind)
    case.x.fill_(1.0), case.residual.zero_()
    kept = case.run()[0] != 0
    torch.manual_seed(case.seed)
    every_row = residual_skip_add(torch.ones(shape), torch.zeros(shape), case.bias, case.dropout_prob) != 0
    for _, row in case.rows():
        assert torch.equal(kept[row], every_row[row])


@pytest.mark.usefixtures("setting")
def test_the_seed_is_drawn_from_torchs_generator() -> None:
    case = Case()
    first, same = case.run(), case.run()
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    case.seed += 1
    assert not torch.equal(case.run()[0], first[0])
    torch.manual_seed(case.seed)
    residual_skip_add(case.x, case.residual, dropout_prob=0.5)
    residual_skip_add(case.x, case.residual, dropout_prob=0.5, training=False)
    residual_skip_add(case.x, case.residual)
    after_one_draw = torch.rand(1)
    torch.manual_seed(case.seed)
    torch.randint(2**63 - 1, (1,))
    assert torch.equal(torch.rand(1), after_one_draw), "without dropout nothing is drawn"


@pytest.mark.usefixtures("setting")
def test_without_training_nothing_is_dropped_and_the_scale_stays() -> None:
    case = Case(dropout_prob=0.5)
    y = residual_skip_add(case.x, case.residual, case.bias, 0.5, 2.0, training=False)
    torch.testing.assert_close(y, case.residual + 2 * (case.x + case.bias))


@pytest.mark.parametrize("kind", INDEX_KINDS[1:])
@pytest.mark.usefixtures("setting")
def test_an_empty_index_copies_and_a_full_one_is_none(kind: str) -> None:
    nothing = Case(kind=kind, share=0.0)
    y, d_x, d_residual, d_bias = nothing.run()
    assert torch.equal(y, nothing.residual)
    assert torch.equal(d_residual, nothing.d_y)
    assert (d_x.numel(), float(d_bias.abs().max())) == (0, 0.0)
    everything = Case(kind=kind, share=1.0)
    everything.index = everything.index.sort(dim=-1).values
    without = Case(kind="none")
    without.x, without.bias, without.residual = everything.x, everything.bias, everything.residual
    without.d_y = everything.d_y
    assert all(torch.equal(a, b) for a, b in zip(everything.run(), without.run(), strict=True))


@pytest.mark.usefixtures("setting")
def test_views_that_are_not_contiguous_are_the_same_numbers() -> None:
    case, other = Case(kind="dim 1"), Case(kind="dim 1")
    other.x = case.x.transpose(0, 2).contiguous().transpose(0, 2)
    other.residual = case.residual.transpose(0, 1).contiguous().transpose(0, 1)
    other.d_y = case.d_y.repeat_interleave(2, dim=2)[..., ::2]
    assert not other.x.is_contiguous()
    assert not other.d_y.is_contiguous()
    assert all(torch.equal(a, b) for a, b in zip(case.run(), other.run(), strict=True))


@pytest.mark.parametrize("shape", [(20,), (5, 20), (2, 3, 4, 20)])
@pytest.mark.usefixtures("setting")
def test_other_numbers_of_dimensions_are_rows_of_hidden(shape: tuple[int, ...]) -> None:
    x, residual = torch.randn(shape), torch.randn(shape)
    torch.manual_seed(0)
    y = residual_skip_add(x, residual, dropout_prob=0.2)
    torch.manual_seed(0)
    rows = residual_skip_add(x.view(1, -1, 20), residual.view(1, -1, 20), dropout_prob=0.2)
    assert torch.equal(y, rows.view(shape))


@pytest.mark.parametrize("kind", INDEX_KINDS)
@pytest.mark.usefixtures("setting")
def test_in_place_is_the_same_in_the_residuals_storage(kind: str) -> None:
    case = Case(kind=kind)
    assert all(torch.equal(a, b) for a, b in zip(case.run(), case.run(residual_skip_add_, clone=True), strict=True))
    residual = case.residual.clone()
    with torch.no_grad():
        y = residual_skip_add_(case.x, residual, case.bias, case.dropout_prob, case.scale, case.index, case.dim)
    assert y.data_ptr() == residual.data_ptr()


@pytest.mark.usefixtures("setting")
def test_in_place_of_a_residual_that_shares_memory_with_x_is_refused() -> None:
    memory = torch.arange(48.0).view(6, 1, 8)
    index = torch.tensor([3, 2])  # row 3 is to be read for row 2 when it has been written
    for x, residual in ((memory[2:4], memory), (memory[:2], memory[1:])):
        with pytest.raises(ValueError, match="x shares memory with residual"):
            residual_skip_add_(x, residual, index=index)
    apart = residual_skip_add_(memory[:2], memory[2:], index=index)
    assert torch.equal(apart[2:], torch.arange(32.0, 48).view(2, 1, 8) + torch.arange(16.0).view(2, 1, 8).flip(0))


@pytest.mark.usefixtures("setting")
def test_rows_beyond_two_to_the_31_elements_are_reached() -> None:
    rows, hidden = 2**19 + 2, 4096
    stream = torch.empty(rows, 1, hidden, dtype=torch.bfloat16)  # pages that nobody touches take no memory
    index = torch.tensor([rows - 1, 0])
    x, before = torch.randn(2, 2, 1, hidden).bfloat16()
    stream[index] = before
    residual_skip_add_(x, stream, index=index)
    assert torch.equal(stream[index], (before.float() + x.float()).bfloat16())
    backward = torch.ops.megatron_sbld.residual_skip_add_backward
    d_x, _ = backward(stream, index, None, 1.5, 0, 0, x.shape, x.dtype, True, False)
    assert torch.equal(d_x, (stream[index].float() * 1.5).bfloat16())


def test_in_place_of_what_backward_needs_is_refused_by_torch() -> None:
    x = torch.randn(4, 2, 16, requires_grad=True)
    hidden = x * 1.0
    branch = torch.nn.functional.layer_norm(hidden, (16,))
    y = residual_skip_add_(branch, hidden)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# ----------------------------------------------------------------------------------------------------------------------
# The compiled library


@settings(max_examples=200, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 80), st.integers(1, 9), st.integers(1, 70)),
    kind=st.sampled_from(INDEX_KINDS),
    share=st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    dtypes=st.sampled_from(DTYPES),
    bias=st.booleans(),
    dropout_prob=st.sampled_from([0.0, 1e-6, 0.1, 0.5, 0.99]),
    scale=st.sampled_from([1.0, 1 / 0.7, 0.0, -3.0]),
    seed=st.integers(0, 2**62),
)
def test_the_library_equals_eager_bit_for_bit(**kwargs: Any) -> None:
    case = Case(**kwargs)
    assert_same_bits(case)


@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda dtypes: "+".join(str(dtype)[6:] for dtype in dtypes))
def test_so_it_does_where_numbers_are_large_small_or_none(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    case = Case((40, 8, 64), dtypes=dtypes)
    special = [
        0.0,
        -0.0,
        math.inf,
        -math.inf,
        math.nan,
        65504.0,
        65520.0,
        -65519.0,
        6e-8,
        5.96e-8,
        2.9e-8,
        1e-40,
        3.3e38,
    ]
    for tensor in (case.x, case.residual, case.d_y):
        values = torch.tensor(special).to(tensor.dtype)
        tensor.view(-1)[:: len(special) + 1] = values[
            torch.arange(len(tensor.view(-1)[:: len(special) + 1])) % len(special)
        ]
    assert_same_bits(case)


@pytest.mark.parametrize("rows", [1, 15, 17, 63, 64, 65, 1024, 1025, 16384, 16385, 20000])
def test_so_it_sums_the_bias_gradient_over_any_number_of_rows(rows: int) -> None:
    assert_same_bits(Case((rows, 1, 3), dtypes=(torch.bfloat16, torch.float32)))


def assert_same_bits(case: Case) -> None:
    found = {}
    for setting in ("cpu", "eager"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(choice.VARIABLE, setting)
            found[setting] = case.run()
    for actual, expected in zip(found["cpu"], found["eager"], strict=True):
        assert actual.dtype == expected.dtype
        is_nan = expected.isnan()
        assert torch.equal(actual.isnan(), is_nan)
        integer = torch.int32 if actual.dtype == torch.float32 else torch.int16
        same = actual.contiguous().view(integer) == expected.contiguous().view(integer)
        assert bool((same | is_nan).all())


# Random123's known answers for philox4x32, 10 rounds: counter, key, result.
PHILOX = [
    ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), PHILOX)
def test_philox_gives_the_published_numbers(counter: list[int], key: list[int], expected: list[int]) -> None:
    words = eager.philox4x32(tuple(map(torch.tensor, counter)), (torch.tensor(key[0]), torch.tensor(key[1])))
    assert [int(word) for word in words] == expected

    functions = ctypes.CDLL(str(Path(native.__file__).with_name("_residual_cpu.so")))
    found = (ctypes.c_uint32 * 4)()
    functions.sbld_philox4x32_10((ctypes.c_uint32 * 4)(*counter), (ctypes.c_uint32 * 2)(*key), found)
    assert list(found) == expected


# ----------------------------------------------------------------------------------------------------------------------
# What torch expects of an operator


@pytest.mark.parametrize("kind", INDEX_KINDS)
def test_gradients_in_double_precision(kind: str, use: Callable[[str], None]) -> None:
    use("eager")
    case = Case((3, 2, 5), kind=kind)
    inputs = [tensor.double().requires_grad_() for tensor in (case.x, case.residual, case.bias)]

    def function(*tensors: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(1)
        return residual_skip_add(*tensors, 0.3, 1.7, case.index, case.dim)

    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("kind", INDEX_KINDS)
@pytest.mark.usefixtures("setting")
def test_opcheck(kind: str) -> None:
    case = Case(kind=kind)
    inputs = [tensor.clone().requires_grad_() for tensor in (case.x, case.residual, case.bias)]
    arguments = (*inputs, case.index, torch.tensor([5]), 1.7, 20000, case.dim)
    torch.library.opcheck(torch.ops.megatron_sbld.residual_skip_add.default, arguments)
    torch.library.opcheck(
        torch.ops.megatron_sbld.residual_skip_add_.default, (case.x, case.residual, case.bias, *arguments[3:])
    )
    for wanted in ((True, True), (True, False), (False, True), (False, False)):
        backward = (case.d_y, *arguments[3:], list(case.x.shape), case.x.dtype, *wanted)
        torch.library.opcheck(torch.ops.megatron_sbld.residual_skip_add_backward.default, backward)


@pytest.mark.usefixtures("setting")
def test_fake_tensors_have_the_shapes_of_real_ones() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        x, residual = (mode.from_tensor(torch.randn(4, 2, 16, dtype=torch.bfloat16)) for _ in range(2))
        y = residual_skip_add(x.requires_grad_(), residual.float(), dropout_prob=0.1)
        y.sum().backward()
    assert (y.shape, y.dtype, x.grad.shape, x.grad.dtype) == (x.shape, torch.float32, x.shape, torch.bfloat16)


@pytest.mark.parametrize("kind", ["none", "dim 1"])
@pytest.mark.parametrize("operator", [residual_skip_add, residual_skip_add_])
@pytest.mark.usefixtures("setting")
def test_it_compiles_without_a_break(operator: Callable[..., torch.Tensor], kind: str) -> None:
    case = Case(kind=kind)

    def doubled(x: torch.Tensor, residual: torch.Tensor, *args: Any) -> torch.Tensor:
        return operator(x, residual * 2, *args)

    torch._dynamo.reset()
    compiled = torch.compile(doubled, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(case.run(compiled), case.run(doubled), strict=True))


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.usefixtures("setting")
def test_a_recomputed_pass_has_the_same_mask(use_reentrant: bool) -> None:
    case = Case(kind="dim 0")

    def checkpointed(*args: Any) -> torch.Tensor:
        return checkpoint(residual_skip_add, *args, use_reentrant=use_reentrant)

    assert all(torch.equal(a, b) for a, b in zip(case.run(checkpointed), case.run(), strict=True))


@pytest.mark.parametrize(
    ("needed", "dropout_prob", "made"),
    [
        ("residual", 0.3, []),
        ("x", 0.3, [(True, False)]),
        ("bias", 0.3, [(False, True)]),
        ("x", 0.0, []),
        ("bias", 0.0, [(False, True)]),
    ],
)
@pytest.mark.usefixtures("setting")
def test_only_the_gradients_that_are_needed_are_made(
    needed: str, dropout_prob: float, made: list[tuple[bool, bool]]
) -> None:
    case, calls = Case(), []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.megatron_sbld.residual_skip_add_backward.default:
                calls.append(args[-2:])
            return func(*args, **kwargs or {})

    tensors = {"x": case.x, "residual": case.residual, "bias": case.bias}
    tensors[needed] = tensors[needed].clone().requires_grad_()
    y = residual_skip_add(**tensors, dropout_prob=dropout_prob)
    with Record():
        y.backward(case.d_y)
    assert calls == made
    assert tensors[needed].grad is not None
    assert all(tensor.grad is None for name, tensor in tensors.items() if name != needed)


def test_a_second_derivative_is_refused() -> None:
    x = torch.randn(2, 2, 8, requires_grad=True)
    y = residual_skip_add(x, torch.zeros(2, 2, 8))
    (gradient,) = torch.autograd.grad((y**2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


OPERATORS = pytest.mark.parametrize("operator", [residual_skip_add, residual_skip_add_])


@OPERATORS
@pytest.mark.usefixtures("setting")
def test_a_plain_sum_hands_its_gradient_on_without_a_copy(operator: Callable[..., torch.Tensor]) -> None:
    def shares_memory(**changes: Any) -> bool:
        case = Case(**{"dropout_prob": 0.0, "scale": 1.0, **changes})
        x, residual = case.x.requires_grad_(), case.residual.requires_grad_()
        y = operator(x, residual.clone(), case.bias, case.dropout_prob, case.scale, case.index, case.dim)
        d_x, d_residual = torch.autograd.grad(y, (x, residual), case.d_y)
        assert (d_x.shape, d_x.dtype) == (x.shape, x.dtype)
        assert d_residual.data_ptr() == case.d_y.data_ptr()
        return d_x.data_ptr() == case.d_y.data_ptr()

    assert shares_memory()
    assert shares_memory(dtypes=(torch.bfloat16, torch.bfloat16))
    assert not shares_memory(dtypes=(torch.bfloat16, torch.float32))
    assert not shares_memory(scale=1.5)
    assert not shares_memory(dropout_prob=0.1)
    assert not shares_memory(kind="dim 0", share=1.0)


def torchs_sum(x: torch.Tensor, residual: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return residual + (x + bias)


def add_in_place_form(x: torch.Tensor, residual: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return residual_skip_add_(x, residual.clone(), bias)


def checkpointed(x: torch.Tensor, residual: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return checkpoint(residual_skip_add, x, residual, bias, use_reentrant=False)


def compiled(x: torch.Tensor, residual: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return torch.compile(residual_skip_add, fullgraph=True, backend="aot_eager")(x, residual, bias)


@pytest.mark.parametrize("add", [residual_skip_add, add_in_place_form, checkpointed, compiled])
@pytest.mark.usefixtures("setting")
def test_gradients_that_share_memory_accumulate_as_those_of_torchs_sum(add: Callable[..., torch.Tensor]) -> None:
    """A stream whose branches read it; small whole numbers, so that every order of adding gives the same bits."""

    def gradients(add: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
        rng = torch.Generator().manual_seed(3)
        x, stream, bias = (torch.randint(-2, 3, shape, generator=rng).float() for shape in ((5, 2, 8), (5, 2, 8), (8,)))
        leaves = [tensor.requires_grad_() for tensor in (x, stream, bias)]
        doubled = stream * 2
        doubled.retain_grad()
        hidden = doubled
        for _ in range(3):
            hidden = add(x * hidden, hidden, bias)
            hidden.register_hook(lambda gradient: gradient * 2)
        hidden = add(x, hidden, bias)  # a leaf as the branch
        d_y = torch.randint(-2, 3, hidden.shape, generator=rng).float()
        arrived = d_y.clone()
        for _ in range(2):
            hidden.backward(d_y, retain_graph=True)
        assert torch.equal(d_y, arrived)
        assert not any(a.grad.data_ptr() == b.data_ptr() for a in leaves for b in (d_y, doubled.grad))
        return [doubled.grad, *(leaf.grad for leaf in leaves)]

    for found, expected in zip(gradients(add), gradients(torchs_sum), strict=True):
        assert torch.equal(found, expected)


@OPERATORS
@pytest.mark.usefixtures("setting")
def test_gradients_of_leaves_are_each_their_own(operator: Callable[..., torch.Tensor]) -> None:
    """An optimizer scales them in place."""
    x, residual = (torch.ones(3, 2, 8, requires_grad=True) for _ in range(2))
    for _ in range(2):
        operator(x, residual.clone()).backward(torch.ones(3, 2, 8))
        x.grad.mul_(3.0)
    assert (float(x.grad.min()), float(residual.grad.min()), float(residual.grad.max())) == (12.0, 2.0, 2.0)


@pytest.mark.parametrize("hooked", ["x", "residual"])
@pytest.mark.usefixtures("setting")
def test_a_hook_that_writes_into_its_gradient_does_what_it_does_to_torchs_sum(hooked: str) -> None:
    """torch forbids such hooks, because gradients share memory; here they share no more than its own do."""

    def gradients(add: Callable[..., torch.Tensor]) -> list[float]:
        leaves = {name: torch.ones(2, 2, 8, requires_grad=True) for name in ("x", "residual")}
        operands = {name: leaf * 1 for name, leaf in leaves.items()}
        operands[hooked].register_hook(lambda gradient: gradient.mul_(2))
        add(*operands.values()).backward(torch.ones(2, 2, 8))
        return [float(leaf.grad.mean()) for leaf in leaves.values()]

    assert gradients(residual_skip_add) == gradients(torch.add)


@OPERATORS
def test_a_gradient_without_memory_of_its_own_is_handed_on(operator: Callable[..., torch.Tensor]) -> None:
    x, residual, bias = torch.zeros(3, 2, 8), torch.zeros(3, 2, 8), torch.zeros(8)
    leaves = [tensor.requires_grad_() for tensor in (x, residual, bias)]
    operator(x, residual.clone(), bias).sum().backward()  # one number, expanded
    assert all(leaf.grad.is_contiguous() for leaf in leaves)
    assert [float(leaf.grad.sum()) for leaf in leaves] == [48.0] * 3


class Wrapped(torch.Tensor):
    """A tensor without memory of its own, as of quantised or distributed parameters."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Wrapped:
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        plain = tree_map(lambda value: value.inner if isinstance(value, cls) else value, (args, kwargs or {}))
        return func(*plain[0], **plain[1])


@pytest.mark.parametrize("name", ["x", "residual", "bias", "index"])
@pytest.mark.usefixtures("setting")
def test_a_tensor_without_memory_of_its_own_is_asked_for_its_values(name: str) -> None:
    case = Case(kind="dim 0")
    tensors = {"x": case.x, "residual": case.residual, "bias": case.bias, "index": case.index}
    expected = residual_skip_add(**tensors)
    assert torch.equal(residual_skip_add(**{**tensors, name: Wrapped(tensors[name])}), expected)


@pytest.mark.usefixtures("setting")
def test_the_sum_can_be_written(setting: str) -> None:
    case = Case()
    y = residual_skip_add(case.x.requires_grad_(), case.residual)
    expected = y.detach() * 2 + case.x.detach()
    residual_skip_add_(case.x, y.mul_(2))
    torch.testing.assert_close(y.detach(), expected)


def test_nothing_of_the_branch_is_kept_for_backward() -> None:
    saved: list[torch.Tensor] = []
    case = Case(kind="dim 1")
    x = case.x.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        residual_skip_add(x, case.residual, case.bias, 0.3, index=case.index, dim=case.dim)
    assert sorted(tensor.numel() for tensor in saved) == [1, len(case.index)]


# ----------------------------------------------------------------------------------------------------------------------
# What is refused


def arguments(**changes: Any) -> dict[str, Any]:
    return {"x": torch.zeros(4, 2, 8), "residual": torch.zeros(4, 2, 8)} | changes


INDEX = torch.tensor([0, 2])
WRONG = {
    "an integer x": (arguments(x=torch.zeros(4, 2, 8, dtype=torch.int32)), "x is torch.int32: must be one of"),
    "a narrower residual": (
        arguments(residual=torch.zeros(4, 2, 8).half()),
        "residual is torch.float16 and x torch.float32",
    ),
    "another shape": (
        arguments(x=torch.zeros(2, 2, 8)),
        r"x is \[2, 2, 8\], residual \[4, 2, 8\]: must be equal without",
    ),
    "another bias": (arguments(bias=torch.zeros(7)), r"bias is torch.float32 \[7\]: must be .* \[8\]"),
    "another device": (arguments(bias=torch.zeros(8, device="meta")), "bias is on meta, x on cpu"),
    "no hidden": (arguments(x=torch.zeros(4, 0), residual=torch.zeros(4, 0)), "with hidden > 0"),
    "no dimension": (
        arguments(x=torch.tensor(1.0), residual=torch.tensor(1.0), bias=torch.zeros(8)),
        r"x is \[\]: must be \[..., hidden\]",
    ),
    "an int32 index": (arguments(index=INDEX.int()), "index is torch.int32: must be int64"),
    "a third dimension": (arguments(index=INDEX, dim=2), "dim is 2: must be 0 or 1"),
    "a dimension that nothing is chosen from": (arguments(dim=-1), "dim is -1: must be 0 or 1"),
    "an index without a dimension": (arguments(index=torch.tensor(1)), "index has 1 or 2"),
    "an index of another size": (arguments(index=INDEX), r"x must be \[2, 2, 8\] and index \[2\] or \[2, 2\]"),
    "a position that is not there": (
        arguments(x=torch.zeros(2, 2, 8), index=torch.tensor([0, 4])),
        r"index has values from 0 to 4: must be in \[0, 4\)",
    ),
    "a negative position": (arguments(x=torch.zeros(2, 2, 8), index=torch.tensor([-1, 2])), "from -1 to 2"),
    "more positions than there are": (
        arguments(x=torch.zeros(5, 2, 8), index=torch.tensor([0, 1, 2, 3, 0])),
        "index has 5 positions of 4: it names one twice",
    ),
    "a position twice": (arguments(x=torch.zeros(2, 2, 8), index=torch.tensor([3, 3])), "names a position twice"),
    "a probability of 1": (arguments(dropout_prob=1.0), r"dropout_prob must be in \[0, 1\), got 1.0"),
    "nearly 1": (arguments(dropout_prob=1 - 1e-9), "would drop everything"),
    "a negative probability": (arguments(dropout_prob=-0.1), "got -0.1"),
    "a probability in a tensor": (
        arguments(dropout_prob=torch.tensor(0.1)),
        r"dropout_prob is tensor\(0.1000\): must be",
    ),
    "a scale to be learned": (
        arguments(scale=torch.ones(1, requires_grad=True)),
        "scale is tensor.* would get no gradient",
    ),
    "no scale": (arguments(scale=None), "scale is None: must be a number"),
}


@pytest.mark.parametrize(("kwargs", "message"), WRONG.values(), ids=WRONG.keys())
@pytest.mark.usefixtures("setting")
def test_wrong_input_is_refused_by_name(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        residual_skip_add(**kwargs)


def test_what_is_asked_for_is_used_or_raises(use: Callable[[str], None]) -> None:
    tensors = arguments()
    use("gpu")
    with pytest.raises(ValueError, match="MEGATRON_SBLD_RESIDUAL='gpu': must be one of auto, cuda, cpu, eager"):
        residual_skip_add(**tensors)
    use("cuda")
    with pytest.raises(ValueError, match="MEGATRON_SBLD_RESIDUAL=cuda, but the tensors are on cpu"):
        residual_skip_add(**tensors)
    use("cpu")
    doubles = {name: tensor.double() for name, tensor in tensors.items()}
    with pytest.raises(ValueError, match="use eager"):
        residual_skip_add(**doubles)
    use("auto")
    assert residual_skip_add(**doubles).dtype == torch.float64


def test_auto_says_once_what_it_took_and_why(
    use: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def missing(name: str) -> native.Library:
        raise native.LibraryError("it is not built", name)

    use("auto")
    for cached in (choice._library_for, choice._choose):
        cached.cache_clear()
    with caplog.at_level("INFO", logger=choice.__name__):
        with monkeypatch.context() as patch:
            patch.setattr(choice, "load", missing)
            for _ in range(2):
                residual_skip_add(**arguments())
        for cached in (choice._library_for, choice._choose):
            cached.cache_clear()
        for _ in range(2):
            residual_skip_add(**arguments())
    eager_torch, library = (record.getMessage() for record in caplog.records)
    assert eager_torch.startswith("residual add on cpu: eager torch (it is not built; with a C++ compiler at hand, ")
    assert library == "residual add on cpu: the library built for cpu"
    assert choice.describe_choice(torch.device("cpu")) == "residual add on cpu: the library (built for cpu)"


def test_auto_says_that_no_library_computes_in_double_precision(
    use: Callable[[str], None], caplog: pytest.LogCaptureFixture
) -> None:
    use("auto")
    choice._library_for.cache_clear()
    with caplog.at_level("INFO", logger=choice.__name__):
        for _ in range(2):
            residual_skip_add(torch.zeros(2, 8).double(), torch.zeros(2, 8).double())
    (message,) = (record.getMessage() for record in caplog.records)
    assert message == "residual add on cpu in torch.float64: eager torch (no library computes in it)"


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        ("cuda 13.0; sm_80 sm_90", None),
        ("cuda 12.9; sm_80 compute_80", "but the driver knows CUDA 11 only"),
        ("cuda 13.0; sm_80", "but the GPU has compute capability 9.0"),
    ],
)
def test_a_cuda_library_that_cannot_run_here_is_not_chosen(
    build: str, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stands for a machine with a GPU of capability 9.0; which driver it has depends on the case."""
    library = type("Library", (), {"build": build})()
    monkeypatch.setattr(choice, "load", lambda name: library)
    monkeypatch.setattr(choice, "driver_cuda", lambda: 11 if "driver" in (reason or "") else 13)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    choose = choice._choose.__wrapped__
    if reason is None:
        assert choose("auto", "cuda", 0) == (library, f"built for {build}")
        return
    chosen, why = choose("auto", "cuda", 0)
    assert chosen is None
    assert reason in why
    with pytest.raises(RuntimeError, match=reason):
        choose("cuda", "cuda", 0)
