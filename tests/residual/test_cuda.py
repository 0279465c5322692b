"""The residual add's CUDA library beside its specification in torch: the same bits, streams, graphs, memory, errors."""

from __future__ import annotations

import functools
import itertools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
from megatron.core.tensor_parallel.random import checkpoint as megatron_checkpoint
from torch.utils.checkpoint import checkpoint

from megatron_sbld.residual import eager, residual_skip_add, residual_skip_add_
from megatron_sbld.residual.choice import VARIABLE, driver_cuda
from megatron_sbld.residual.native import LibraryError, load

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).resolve().parents[2]
DEVICE = "cuda"
DTYPES = [  # of x, of the residual
    (torch.float32, torch.float32),
    (torch.float16, torch.float16),
    (torch.float16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
]
HIDDEN_SIZES = [1, 7, 8, 72, 1000, 1028, 2304]  # with and without a remainder of the 8 that a thread moves
INDEX_KINDS = ["none", "dim 0", "dim 1", "per sample", "per row", "empty", "empty dim 1", "all"]
SEED = 20


@pytest.fixture(autouse=True)
def _library() -> Iterator[None]:
    """The library is asked for, so nothing falls back to torch unseen. CI has to have built it."""
    try:
        load(DEVICE)
    except LibraryError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))
    with mock.patch.dict(os.environ, {VARIABLE: DEVICE}):
        yield


@dataclass
class Problem:
    """Operands of one call, the gradient that comes back, and where x's rows are in the residual."""

    x: torch.Tensor
    residual: torch.Tensor
    bias: torch.Tensor | None
    d_y: torch.Tensor
    index: torch.Tensor | None = None
    dim: int = 0
    dropout_prob: float = 0.0
    scale: float = 1.0

    def rows(self) -> torch.Tensor:
        """[rows of x], the row of the flattened residual of each; independent of the package's own arithmetic."""
        s, b, _ = self.residual.shape
        numbers = torch.arange(s * b, device=self.x.device).view(s, b)
        if self.index is None:
            return numbers.flatten()
        if self.index.dim() == 1:
            return numbers.index_select(self.dim, self.index).flatten()
        index = self.index.t() if self.dim == 0 else self.index  # as numbers has its dimensions
        return numbers.gather(self.dim, index).flatten()


def make_problem(
    dtypes: tuple[torch.dtype, torch.dtype],
    hidden: int,
    kind: str = "none",
    s: int = 150,
    b: int = 4,
    dropout_prob: float = 0.0,
    with_bias: bool = True,
) -> Problem:
    """600 rows, unless told otherwise: bias gradients are summed over several chunks and sections."""
    rng = torch.Generator().manual_seed(SEED + hidden)
    few, some = s // 3, max(b // 2, 1)
    index, dim = {
        "none": (None, 0),
        "dim 0": (torch.randperm(s, generator=rng)[:few], 0),
        "dim 1": (torch.randperm(b, generator=rng)[:some], 1),
        "per sample": (torch.rand(b, s, generator=rng).argsort(dim=1)[:, :few], 0),
        "per row": (torch.rand(s, b, generator=rng).argsort(dim=1)[:, :some], 1),
        "empty": (torch.empty(0, dtype=torch.int64), 0),
        "empty dim 1": (torch.empty(0, dtype=torch.int64), 1),
        "all": (torch.randperm(s, generator=rng), 0),
    }[kind]
    chosen = s if index is None or dim == 1 else index.size(-1), b if index is None or dim == 0 else index.size(-1)

    def random(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng).to(DEVICE, dtype)

    return Problem(
        x=random(dtypes[0], *chosen, hidden),
        residual=random(dtypes[1], s, b, hidden),
        bias=random(dtypes[0], hidden) if with_bias else None,
        d_y=random(dtypes[1], s, b, hidden),
        index=None if index is None else index.to(DEVICE),
        dim=dim,
        dropout_prob=dropout_prob,
        scale=1.25,
    )


def computed(problem: Problem, setting: str = DEVICE, in_place: bool = False) -> dict[str, torch.Tensor]:
    """y and the gradients, from the same state of the generator each time."""
    inputs = {"x": problem.x, "residual": problem.residual, "bias": problem.bias}
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items() if tensor is not None}
    residual = leaves["residual"] * 1 if in_place else leaves["residual"]
    operator = residual_skip_add_ if in_place else residual_skip_add
    torch.manual_seed(SEED)
    with mock.patch.dict(os.environ, {VARIABLE: setting}):
        y = operator(
            leaves["x"], residual, leaves.get("bias"), problem.dropout_prob, problem.scale, problem.index, problem.dim
        )
        gradients = torch.autograd.grad(y, list(leaves.values()), problem.d_y)
    if in_place:
        assert y.data_ptr() == residual.data_ptr()
    return {"y": y.detach()} | {f"d_{name}": grad for name, grad in zip(leaves, gradients, strict=True)}


def assert_same_bits(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], case: object) -> None:
    """-0 is not 0 here."""
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype, f"{name} of {case}"
        raw = torch.int16 if tensor.element_size() == 2 else torch.int32
        assert torch.equal(tensor.contiguous().view(raw), expected[name].contiguous().view(raw)), f"{name} of {case}"


def unaligned(tensor: torch.Tensor, offset: int) -> torch.Tensor:
    """The same values, contiguous, `offset` elements into a storage."""
    placed = torch.empty(tensor.numel() + offset, dtype=tensor.dtype, device=tensor.device)[offset:]
    return placed.view(tensor.shape).copy_(tensor)


def test_the_driver_knows_the_cuda_that_torch_was_built_for() -> None:
    assert torch.version.cuda is not None
    assert (driver_cuda() or 0) >= int(torch.version.cuda.split(".")[0])


# ----------------------------------------------------------------------------------------------------------------------
# The same numbers


@pytest.mark.parametrize("kind", INDEX_KINDS)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_cuda_computes_the_bits_of_eager_torch(dtypes: tuple[torch.dtype, torch.dtype], kind: str) -> None:
    for hidden, dropout_prob, with_bias in itertools.product(HIDDEN_SIZES, (0.0, 0.3), (True, False)):
        problem = make_problem(dtypes, hidden, kind, dropout_prob=dropout_prob, with_bias=with_bias)
        case = (hidden, dropout_prob, with_bias)
        expected = computed(problem, "eager")
        assert_same_bits(computed(problem), expected, case)
        assert_same_bits(computed(problem, in_place=True), expected, (*case, "in place"))


@pytest.mark.parametrize("kind", ["none", "per sample"])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_storage_offsets_that_are_not_aligned_change_no_bit(dtypes: tuple[torch.dtype, torch.dtype], kind: str) -> None:
    problem = make_problem(dtypes, 1024, kind, dropout_prob=0.3)
    expected = computed(problem, "eager")
    for name, offset in itertools.product(("x", "residual", "bias", "d_y"), (1, 2, 3)):
        moved = replace(problem, **{name: unaligned(getattr(problem, name), offset)})
        assert getattr(moved, name).data_ptr() % 16 != 0, "the case would test nothing"
        assert_same_bits(computed(moved), expected, (name, offset))
        assert_same_bits(computed(moved, in_place=True), expected, (name, offset, "in place"))


def test_operands_that_are_not_contiguous_change_no_bit() -> None:
    problem = make_problem(DTYPES[3], 1000, "per sample", dropout_prob=0.3)
    expected = computed(problem, "eager")
    for name in ("x", "residual", "d_y"):
        tensor = getattr(problem, name)
        strided = tensor.transpose(0, 1).contiguous().transpose(0, 1)
        assert not strided.is_contiguous()
        assert_same_bits(computed(replace(problem, **{name: strided})), expected, name)
    assert problem.index is not None
    strided_index = problem.index.t().contiguous().t()
    assert_same_bits(computed(replace(problem, index=strided_index)), expected, "index")


@pytest.mark.parametrize("rows", [1, 15, 17, 63, 65, 1024, 1025, 16384, 16385, 20000])
def test_bias_gradients_have_one_order_at_the_edges_of_chunks_and_sections(rows: int) -> None:
    problem = make_problem(DTYPES[0], 72, s=rows, b=1, dropout_prob=0.1)
    assert_same_bits(computed(problem), computed(problem, "eager"), rows)


@pytest.mark.parametrize("kind", ["none", "per sample"])
def test_bias_gradients_are_the_same_where_those_of_x_are_not_wanted(kind: str) -> None:
    for hidden, dropout_prob in itertools.product(HIDDEN_SIZES, (0.0, 0.3)):
        problem = make_problem(DTYPES[3], hidden, kind, dropout_prob=dropout_prob)
        seed, threshold = torch.tensor([SEED], device=DEVICE), eager.drop_threshold(dropout_prob)
        arguments = (problem.d_y, problem.index, seed, 1.25, threshold, problem.dim, problem.x.shape, problem.x.dtype)
        backward = torch.ops.megatron_sbld.residual_skip_add_backward
        (_, expected), (nothing, found) = backward(*arguments, True, True), backward(*arguments, False, True)
        assert nothing.numel() == 0
        assert torch.equal(found, expected), (hidden, dropout_prob)


def test_a_plain_sum_hands_its_gradient_on() -> None:
    for hidden, in_place in itertools.product(HIDDEN_SIZES, (False, True)):
        problem = make_problem(DTYPES[3], hidden)
        problem.scale = 1.0
        found = computed(problem, in_place=in_place)
        assert_same_bits(found, computed(problem, "eager"), (hidden, in_place))
        assert found["d_x"].data_ptr() == problem.d_y.data_ptr()


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", [64, 63])
def test_extreme_values_change_no_bit(dtypes: tuple[torch.dtype, torch.dtype], hidden: int) -> None:
    """Zeros of either sign, subnormals, what overflows in sum or product, infinities; no NaN: its bits are free."""
    problem = make_problem(dtypes, hidden, dropout_prob=0.3, with_bias=False)
    rng = torch.Generator().manual_seed(SEED)

    def choice_of(values: list[float], like: torch.Tensor) -> torch.Tensor:
        numbers = torch.tensor(values, dtype=torch.float64)[torch.randint(len(values), like.shape, generator=rng)]
        return numbers.to(DEVICE, like.dtype)

    finite = []
    for dtype in {*dtypes}:
        info = torch.finfo(dtype)
        finite += [0.0, -0.0, info.smallest_normal, -info.smallest_normal / 2, info.max, -info.max, info.max / 1.25]
    small = torch.finfo(dtypes[1])
    moderate = [0.0, -0.0, 1.0, small.smallest_normal / 4, small.max / 2, -small.max / 2]
    problem.residual = choice_of(moderate, problem.residual)
    problem.x = choice_of([*finite, float("inf"), -float("inf")], problem.x)
    problem.d_y = choice_of([*finite, float("inf")], problem.d_y)
    expected = computed(problem, "eager")
    assert not any(bool(tensor.isnan().any()) for tensor in expected.values())
    assert bool(expected["y"].isinf().any())
    assert_same_bits(computed(problem), expected, hidden)


def reference(problem: Problem, kept: torch.Tensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The formula with torch's own operations at one precision; kept: [rows of x, hidden], of the dropout."""
    rows, hidden = problem.rows(), problem.x.size(-1)
    threshold = eager.drop_threshold(problem.dropout_prob)
    factor = kept.to(dtype) * (problem.scale / (1 - threshold / eager.THRESHOLDS))
    x = problem.x.to(dtype).reshape(-1, hidden)
    branch = x if problem.bias is None else x + problem.bias.to(dtype)
    residual = problem.residual.to(dtype).view(-1, hidden)
    d_branch = problem.d_y.to(dtype).view(-1, hidden)[rows] * factor
    found = {
        "y": residual.index_add(0, rows, branch * factor).view(problem.residual.shape),
        "d_x": d_branch.view(problem.x.shape),
        "d_residual": problem.d_y.to(dtype),
    }
    return found if problem.bias is None else found | {"d_bias": d_branch.sum(0)}


@pytest.mark.parametrize("kind", ["none", "dim 1", "per sample"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_errors_are_at_most_twice_those_of_torch_at_the_same_precision(dtype: torch.dtype, kind: str) -> None:
    for hidden, dropout_prob in itertools.product((7, 1024), (0.0, 0.1)):
        problem = make_problem((dtype, dtype), hidden, kind, dropout_prob=dropout_prob)
        torch.manual_seed(SEED)
        seed = torch.randint(2**63 - 1, (1,), device=DEVICE)
        kept = eager.kept_mask(seed, problem.rows(), hidden, eager.drop_threshold(dropout_prob))
        exact = reference(problem, kept, torch.float64)
        torchs = reference(problem, kept, dtype)
        for name, tensor in computed(problem).items():
            error = (tensor.double() - exact[name]).abs().max()
            allowed = 2 * (torchs[name].double() - exact[name]).abs().max()
            atol = torch.finfo(torch.float32).eps * len(problem.rows())
            assert error <= allowed + atol, f"{name}, hidden {hidden}, dropout_prob {dropout_prob}"


def test_three_runs_give_the_same_bits() -> None:
    problem = make_problem(DTYPES[3], 2304, "per sample", s=2048, dropout_prob=0.1)
    first = computed(problem)
    for number in (2, 3):
        assert_same_bits(computed(problem), first, f"run {number}")


def test_more_than_two_to_the_31_elements() -> None:
    rows, hidden, threshold = 2**18 + 64, 8192, eager.drop_threshold(0.1)
    assert rows * hidden > 2**31
    needed = 6 * rows * hidden * 2  # x, residual, y, d_y and d_x, and some more
    free = torch.cuda.mem_get_info()[0]
    if free < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of GPU memory, {free / 2**30:.0f} are free")
    x, residual, d_y = (torch.empty(rows, 1, hidden, dtype=torch.bfloat16, device=DEVICE).normal_() for _ in range(3))
    seed = torch.tensor([SEED], device=DEVICE)
    multiplier = eager.multiplier(1.0, threshold)
    operators = torch.ops.megatron_sbld
    for index in (None, torch.arange(rows - 1, -1, -1, device=DEVICE)):
        y = operators.residual_skip_add(x, residual, None, index, seed, multiplier, threshold, 0)
        d_x, _ = operators.residual_skip_add_backward(
            d_y, index, seed, multiplier, threshold, 0, x.shape, x.dtype, True, False
        )
        for at in (slice(0, 8), slice(rows - 64, rows)):  # rows of the residual
            places = torch.arange(rows, device=DEVICE)[at]
            of_x = places if index is None else rows - 1 - places
            kept = eager.kept_mask(seed, places, hidden, threshold)
            factor = torch.tensor(multiplier, dtype=torch.float32, device=DEVICE)
            update = torch.where(kept, x[of_x, 0].float() * factor, 0.0)
            assert torch.equal(y[at, 0], (residual[at, 0].float() + update).bfloat16())
            assert torch.equal(d_x[of_x, 0], torch.where(kept, d_y[at, 0].float() * factor, 0.0).bfloat16())
        del y, d_x


# ----------------------------------------------------------------------------------------------------------------------
# Random numbers


def mask_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach() != 0


def test_the_mask_follows_the_current_generator_as_megatrons_do() -> None:
    """Equal states, as on tensor-parallel ranks, give equal masks; a fork, as under sequence parallelism, another."""
    x, residual = torch.ones(64, 2, 256, device=DEVICE), torch.zeros(64, 2, 256, device=DEVICE)

    def draw() -> torch.Tensor:
        return mask_of(residual_skip_add(x, residual, dropout_prob=0.5))

    tracker = CudaRNGStatesTracker()
    tracker.add("another rank", 17)
    torch.cuda.manual_seed(SEED)
    state = torch.cuda.get_rng_state()
    first, second = draw(), draw()
    torch.cuda.set_rng_state(state)
    with tracker.fork("another rank"):
        forked = draw()
    again = draw()
    assert torch.equal(again, first), "a fork must leave the default state as it was"
    assert not torch.equal(first, second)
    assert not torch.equal(first, forked)
    assert float(first.float().mean()) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("recompute", ["reentrant", "non-reentrant", "megatron"])
def test_a_recomputed_branch_draws_its_mask_again(recompute: str) -> None:
    problem = make_problem(DTYPES[0], 256, dropout_prob=0.5)
    wrappers: dict[str, Callable[..., torch.Tensor]] = {
        "reentrant": functools.partial(checkpoint, use_reentrant=True),
        "non-reentrant": functools.partial(checkpoint, use_reentrant=False),
        "megatron": lambda function, *args: megatron_checkpoint(function, False, *args),
    }

    def branch(x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return residual_skip_add(x * x, residual, problem.bias, problem.dropout_prob).square()

    def run(wrapper: Callable[..., torch.Tensor] | None) -> dict[str, torch.Tensor]:
        x, residual = (tensor.detach().requires_grad_() for tensor in (problem.x, problem.residual))
        torch.manual_seed(SEED)
        y = branch(x, residual) if wrapper is None else wrapper(branch, x, residual)
        torch.rand(1, device=DEVICE)  # what comes between the passes moves the generator
        y.backward(problem.d_y)
        assert x.grad is not None
        assert residual.grad is not None
        return {"y": y.detach(), "d_x": x.grad, "d_residual": residual.grad}

    assert_same_bits(run(wrappers[recompute]), run(None), recompute)


# ----------------------------------------------------------------------------------------------------------------------
# Streams, graphs, the compiler


@pytest.mark.parametrize("forked", [False, True], ids=["default generator", "state of Megatron's tracker"])
@pytest.mark.parametrize("kind", ["none", "per sample"])
def test_each_replay_of_a_cuda_graph_has_a_fresh_mask(kind: str, forked: bool) -> None:
    problem = make_problem(DTYPES[3], 256, kind, dropout_prob=0.5)
    x, residual = torch.ones_like(problem.x).requires_grad_(), torch.zeros_like(problem.residual)
    d_y = torch.ones_like(problem.d_y)
    graph = torch.cuda.CUDAGraph()
    tracker = CudaRNGStatesTracker(use_cudagraphable_rng=True)
    if forked:
        tracker.add("residual", SEED)
        graph.register_generator_state(tracker.get_states()["residual"])

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        y = residual_skip_add(x, residual, None, 0.5, 1.0, problem.index, problem.dim)
        return y.detach(), torch.autograd.grad(y, x, d_y)[0]

    def pass_through() -> tuple[torch.Tensor, torch.Tensor]:
        if not forked:
            return step()
        with tracker.fork("residual"):
            return step()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            pass_through()
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        y, d_x = pass_through()
    masks = []
    for _ in range(4):
        graph.replay()
        of_backward = mask_of(d_x).view(-1, 256)
        of_forward = mask_of(y).view(-1, 256)
        assert torch.equal(of_forward[problem.rows()], of_backward)
        assert int(of_forward.sum()) == int(of_backward.sum()), "only the rows of x get anything"
        assert float(of_backward.float().mean()) == pytest.approx(0.5, abs=0.02)
        masks.append(of_backward)
    for one, other in itertools.combinations(masks, 2):
        assert not torch.equal(one, other)


def test_a_replay_from_the_same_state_has_the_same_mask() -> None:
    x, residual = torch.ones(64, 2, 256, device=DEVICE), torch.zeros(64, 2, 256, device=DEVICE)
    residual_skip_add(x, residual, dropout_prob=0.5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = residual_skip_add(x, residual, dropout_prob=0.5)
    masks = []
    for _ in range(2):
        torch.cuda.manual_seed(SEED)
        graph.replay()
        masks.append(mask_of(y))
    assert torch.equal(*masks)
    torch.cuda.manual_seed(SEED)
    assert torch.equal(mask_of(residual_skip_add(x, residual, dropout_prob=0.5)), masks[0])


def test_streams_do_not_disturb_each_other() -> None:
    """Each call's workspace and result are its own stream's."""
    problems = [make_problem(DTYPES[3], hidden, "per sample", s=512, dropout_prob=0.1) for hidden in (512, 1000, 2304)]
    expected = [computed(problem) for problem in problems]
    streams = [torch.cuda.Stream() for _ in problems]
    torch.cuda.synchronize()
    found: list[tuple[int, dict[str, torch.Tensor]]] = []
    for _ in range(20):
        for number, (problem, stream) in enumerate(zip(problems, streams, strict=True)):
            with torch.cuda.stream(stream):
                found.append((number, computed(problem)))
    torch.cuda.synchronize()
    for number, result in found:
        assert_same_bits(result, expected[number], f"stream {number}")


def test_a_stream_waits_for_what_it_is_told_to_wait_for() -> None:
    """The kernel runs on the current stream: behind a slow producer there it must not start early."""
    x, residual = torch.zeros(256, 4, 1024, device=DEVICE), torch.zeros(256, 4, 1024, device=DEVICE)
    residual_skip_add(x, residual)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # clock cycles: about 50 ms
        x.fill_(3.0)
        y = residual_skip_add(x, residual)
    stream.synchronize()
    assert bool((y == 3.0).all())


@pytest.mark.parametrize("kind", ["none", "dim 1", "per sample"])
def test_a_compiled_function_has_one_graph_and_the_same_numbers(kind: str) -> None:
    problem = make_problem(DTYPES[3], 1000, kind)

    def function(x: torch.Tensor, residual: torch.Tensor, prob: float) -> torch.Tensor:
        return residual_skip_add(x * 2, residual, problem.bias, prob, 1.25, problem.index, problem.dim) * 2

    def run(call: Callable[..., torch.Tensor], prob: float) -> dict[str, torch.Tensor]:
        x, residual = (tensor.detach().requires_grad_() for tensor in (problem.x, problem.residual))
        y = call(x, residual, prob)
        d_x, d_residual = torch.autograd.grad(y, (x, residual), problem.d_y)
        return {"y": y.detach(), "d_x": d_x, "d_residual": d_residual}

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True)
    assert_same_bits(run(compiled, 0.0), run(function, 0.0), kind)
    # The compiler draws random numbers of its own; the mask of both passes must still be one.
    problem.x.fill_(1.0)
    problem.residual.zero_()
    problem.d_y.fill_(1.0)
    problem.bias = None
    torch._dynamo.reset()
    dropped = run(torch.compile(function, fullgraph=True), 0.5)
    of_forward = mask_of(dropped["y"]).view(-1, 1000)[problem.rows()]
    assert torch.equal(of_forward, mask_of(dropped["d_x"]).view(-1, 1000))
    assert float(of_forward.float().mean()) == pytest.approx(0.5, abs=0.02)


def test_tensors_on_another_gpu_are_computed_there() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    problem = make_problem(DTYPES[3], 1000, "per sample")
    expected = computed(problem)
    there = torch.device("cuda", 1)
    tensors = {name: getattr(problem, name).to(there) for name in ("x", "residual", "bias", "d_y", "index")}
    assert torch.cuda.current_device() == 0
    found = computed(replace(problem, **tensors))
    assert torch.cuda.current_device() == 0
    assert_same_bits({name: tensor.to(DEVICE) for name, tensor in found.items()}, expected, there)


# ----------------------------------------------------------------------------------------------------------------------
# Memory and errors


def test_in_place_takes_no_memory_for_the_residual() -> None:
    problem = make_problem(DTYPES[3], 1024, "dim 1", s=1024)
    size = problem.residual.numel() * problem.residual.element_size()

    def peak(operator: Callable[..., torch.Tensor]) -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        operator(problem.x, problem.residual, problem.bias, 0.1, 1.0, problem.index, problem.dim)
        return torch.cuda.max_memory_allocated() - before

    with torch.no_grad():
        assert peak(residual_skip_add_) < 0.01 * size
        assert size <= peak(residual_skip_add) < 1.01 * size


WRONG_INDEX = """
import os
import torch
from megatron_sbld.residual import residual_skip_add, residual_skip_add_
x, residual = torch.ones(2, 3, 64, device="cuda"), torch.zeros(5, 3, 64, device="cuda")
index = torch.tensor([1, {position}], device="cuda")
def backward(with_bias):
    more = (x.shape, x.dtype, True, with_bias)
    torch.ops.megatron_sbld.residual_skip_add_backward(residual, index, None, 1.0, 0, 0, *more)
calls = {{
    "functional": lambda: residual_skip_add(x, residual, index=index),
    "in place": lambda: residual_skip_add_(x, residual, index=index),
    "backward": lambda: backward(False),
    "backward with bias": lambda: backward(True),
}}
torch.cuda.synchronize()
try:
    calls["{call}"]()
    torch.cuda.synchronize()
except RuntimeError as error:
    print("device error:", error, flush=True)
    os._exit(7)  # the context is lost, so nothing is tidied up
"""


def run_script(script: str, *before: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """In a process of its own, with the library asked for."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [*before, sys.executable, "-c", script],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path, VARIABLE: DEVICE},
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
    )


@pytest.mark.parametrize("call", ["functional", "in place", "backward", "backward with bias"])
def test_an_index_out_of_range_is_an_error_of_the_device(call: str) -> None:
    for position in (-1, 5):
        done = run_script(WRONG_INDEX.format(call=call, position=position))
        assert done.returncode == 7, f"{position}: {done.stdout}{done.stderr}"
    assert run_script(WRONG_INDEX.format(call=call, position=4)).returncode == 0, "a right index is none"


SANITIZED = """
import itertools
import torch
from megatron_sbld.residual import residual_skip_add, residual_skip_add_
s, b = 40, 3
indices = [
    (None, 0), (torch.tensor([7, 0, 39]), 0), (torch.tensor([2, 0]), 1), (torch.empty(0, dtype=torch.int64), 0),
    (torch.rand(b, s).argsort(dim=1)[:, :17], 0), (torch.rand(s, b).argsort(dim=1)[:, :2], 1),
]
dtypes = [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32), (torch.float32, torch.float32)]
for (index, dim), hidden, (dtype, wide), prob in itertools.product(indices, (1, 1000, 1001), dtypes, (0.0, 0.3)):
    index = None if index is None else index.cuda()
    rows = [s, b]
    if index is not None:
        rows[dim] = index.size(-1)
    x = torch.ones(*rows, hidden, dtype=dtype, device="cuda", requires_grad=True)
    bias = torch.ones(hidden, dtype=dtype, device="cuda", requires_grad=True)
    residual = torch.ones(s, b, hidden, dtype=wide, device="cuda")
    for operator in (residual_skip_add, residual_skip_add_):
        y = operator(x, residual.clone(), bias, prob, 1.0, index, dim)
        torch.autograd.grad(y, (x, bias), torch.ones_like(y))
        torch.autograd.grad(operator(x, residual.clone(), None, prob, 1.0, index, dim), x, torch.ones_like(y))
torch.cuda.synchronize()
print("finished")
"""


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer_finds_nothing(tool: str) -> None:
    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "compute-sanitizer"
    program = shutil.which("compute-sanitizer") or (str(toolkit) if toolkit.is_file() else None)
    if program is None:
        pytest.skip("compute-sanitizer is not on the PATH nor in CUDA_HOME")
    # Without torch's caching each tensor is an allocation of its own, and a step beyond it is seen.
    with mock.patch.dict(os.environ, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}):
        done = run_script(SANITIZED, program, "--tool", tool, "--error-exitcode", "86", timeout=580)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-4000:]
    assert "finished" in done.stdout
    assert re.search(r"(ERROR SUMMARY: 0 errors|0 hazards displayed)", output), output[-4000:]
