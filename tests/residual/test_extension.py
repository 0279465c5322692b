"""The extension: what it takes and what it leaves to op.py, and that both have the same bits."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_sbld.residual import choice, op, residual_skip_add
from megatron_sbld.residual.extension import bindings, describe_extension

SHAPE = (6, 3, 24)


@pytest.fixture(autouse=True)
def extension(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv(choice.VARIABLE, "auto")
    found = bindings()
    if found is None:
        pytest.skip(describe_extension())
    return found


def calls() -> Iterator[dict[str, Any]]:
    """Calls that differ in one thing or more each."""
    rng = torch.Generator().manual_seed(0)
    dtypes = [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.float16,) * 2, (torch.bfloat16, torch.float32)]
    indices = [
        (None, 0, SHAPE),
        (torch.tensor([4, 0, 5]), 0, (3, 3, 24)),
        (torch.tensor([2, 0]), 1, (6, 2, 24)),
        (torch.stack([torch.randperm(6, generator=rng)[:4] for _ in range(3)]), 0, (4, 3, 24)),
        (torch.stack([torch.randperm(3, generator=rng)[:2] for _ in range(6)]), 1, (6, 2, 24)),
    ]
    for (x_dtype, residual_dtype), (index, dim, shape), bias, prob in itertools.product(
        dtypes, indices, (True, False), (0.0, 0.25)
    ):
        yield {
            "x": torch.randn(shape, generator=rng).to(x_dtype),
            "residual": torch.randn(SHAPE, generator=rng).to(residual_dtype),
            "bias": torch.randn(24, generator=rng).to(x_dtype) if bias else None,
            "dropout_prob": prob,
            "scale": 1.5,
            "index": index,
            "dim": dim,
        }


def outcome(call: dict[str, Any], needed: tuple[str, ...] = ("x", "residual", "bias")) -> list[torch.Tensor | None]:
    """y, the gradients that are needed, and the generator's state after it."""
    names = [name for name in needed if call[name] is not None]
    leaves = {name: call[name].clone().requires_grad_() for name in names}
    torch.manual_seed(3)
    y = residual_skip_add(**{**call, **leaves})
    y.backward(torch.arange(y.numel()).view(y.shape).to(y.dtype) / 100)
    return [y.detach(), *(leaf.grad for leaf in leaves.values()), torch.get_rng_state()]


def test_both_ways_have_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = list(calls())
    assert len(cases) == 80
    found = [outcome(call) for call in cases]
    monkeypatch.setattr(op, "bindings", lambda: None)
    for call, one in zip(cases, found, strict=True):
        for mine, other in zip(one, outcome(call), strict=True):
            assert torch.equal(mine, other), call


@pytest.mark.parametrize("needed", [("x",), ("residual",), ("bias",), ("x", "bias")])
def test_only_what_is_needed_gets_a_gradient(needed: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    call = next(one for one in calls() if one["bias"] is not None and one["dropout_prob"])
    found = outcome(call, needed)
    assert len(found) == 2 + len(needed)
    monkeypatch.setattr(op, "bindings", lambda: None)
    assert all(torch.equal(mine, other) for mine, other in zip(found, outcome(call, needed), strict=True))


def ones(**more: Any) -> dict[str, Any]:
    return {"x": torch.ones(2, 2, 8), "residual": torch.ones(2, 2, 8), **more}


def taken(extension: Any, call: dict[str, Any]) -> bool:
    defaults = {"bias": None, "dropout_prob": 0.0, "scale": 1.0, "index": None, "dim": 0, "training": True}
    return extension.residual_skip_add(*({**ones(), **defaults, **call}.values()), 0) is not None


def test_what_fits_is_taken(extension: Any) -> None:
    for call in (ones(), ones(bias=torch.ones(8)), ones(index=torch.tensor([1, 0])), ones(scale=2, dropout_prob=0)):
        assert taken(extension, call)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"x": torch.ones(2, 8)}, "must be equal without an index"),
        ({"residual": torch.ones(2, 2, 8).half()}, "must be of x's dtype or float32"),
        ({"bias": torch.ones(7)}, "bias is"),
        ({"bias": torch.ones(1, 8)}, "bias is"),
        ({"dropout_prob": 1.0}, "dropout_prob must be in"),
        ({"dropout_prob": -0.1}, "dropout_prob must be in"),
        ({"dropout_prob": float("nan")}, "dropout_prob must be in"),
        ({"dropout_prob": 1 - 1e-9}, "would drop everything"),
        ({"scale": torch.ones(())}, "scale is tensor"),
        ({"dim": 2}, "dim is 2"),
        ({"training": 1}, "training is 1"),
        ({"index": torch.tensor([0, 0])}, "names a position twice"),
        ({"index": torch.tensor([0, 2])}, "index has values from 0 to 2"),
        ({"index": torch.tensor([-1, 0])}, "index has values from -1 to 0"),
        ({"index": torch.tensor([0, 1], dtype=torch.int32)}, "must be int64"),
        ({"index": torch.tensor([0])}, "x must be"),
    ],
)
def test_what_does_not_fit_is_refused_by_the_same_message(extension: Any, call: dict[str, Any], message: str) -> None:
    assert not taken(extension, call)
    with pytest.raises(ValueError, match=message):
        residual_skip_add(**ones(**call))


def test_what_it_does_not_take_is_computed_all_the_same(extension: Any) -> None:
    class Counted(torch.Tensor):
        pass

    for call in (
        {"x": torch.ones(2, 2, 8).double(), "residual": torch.ones(2, 2, 8).double()},
        {"x": torch.ones(0, 2, 8), "residual": torch.ones(0, 2, 8)},
        {"x": torch.ones(2, 2, 8).as_subclass(Counted)},
    ):
        assert not taken(extension, call)
        given = ones(**call)
        assert torch.equal(residual_skip_add(**given), given["x"] + given["residual"])


def test_who_watches_operators_sees_one_in_both_directions(extension: Any) -> None:
    class Watcher(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    seen: list[str] = []
    call = ones(x=torch.ones(2, 2, 8, requires_grad=True), scale=2.0)
    with Watcher():
        residual_skip_add(**call)
    assert seen == ["megatron_sbld.residual_skip_add.default"]
    seen.clear()
    y = residual_skip_add(**call)  # by the extension
    with Watcher():
        y.backward(torch.ones(2, 2, 8))
    assert "megatron_sbld.residual_skip_add_backward.default" in seen


def test_a_tangent_is_not_lost(extension: Any) -> None:
    with forward_ad.dual_level() as level:
        # forward_ad.make_dual would first script torch's decompositions, which fails under some tracers.
        dual = torch._VF._make_dual(torch.ones(2, 2, 8), torch.ones(2, 2, 8), level=level)
        assert not taken(extension, {"x": dual})


def test_a_gradient_is_differentiated_no_further() -> None:
    x = torch.ones(2, 2, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(residual_skip_add(x, x, scale=2.0).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_saved_tensors_pass_the_hooks_of_a_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils.checkpoint import checkpoint

    def gradient(recomputed: bool) -> torch.Tensor:
        x = torch.linspace(0, 1, 32).view(2, 2, 8).requires_grad_()
        torch.manual_seed(5)
        function: Callable[[torch.Tensor], torch.Tensor] = lambda t: residual_skip_add(t * t, t, dropout_prob=0.5)  # noqa: E731
        y = checkpoint(function, x, use_reentrant=False) if recomputed else function(x)
        y.sum().backward()
        assert x.grad is not None
        return x.grad

    assert torch.equal(gradient(True), gradient(False))


def test_a_change_of_the_variable_is_seen(extension: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert taken(extension, ones())
    monkeypatch.setenv(choice.VARIABLE, "eager")
    assert not taken(extension, ones())
    monkeypatch.setenv(choice.VARIABLE, "no-such")
    with pytest.raises(ValueError, match="no-such"):
        taken(extension, ones())
    monkeypatch.setenv(choice.VARIABLE, "auto")
    assert taken(extension, ones())
