"""The token dropping that the `drop` section stands for, with the defaults of docs/method.md section 5."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from megatron_sbld.method.config import DropConfig, default_of
from megatron_sbld.method.in_force import changed_fields, drops_tokens, named_as_fields
from megatron_sbld.method.tokens import TokenDrop, token_layers

_MIN_SHARE = 16  # random-LTD: 128 of 2,048 tokens
_ITERATIONS_SHARE = 0.7
_OF_LINEAR = ("min_tokens", "token_iterations")


def build_tokens(
    config: DropConfig, num_layers: int, train_iters: int, seq_length: int, strata: int = 1
) -> TokenDrop | None:
    """What a run of T = train_iters iterations on samples of seq_length tokens drops; None unless granularity is token.

    strata: what the layout needs (tokens.py), which holds unless the section has token_strata.
    Raises ValueError naming the field.
    """
    if not drops_tokens(config):
        return None
    check_tokens(config, num_layers)
    step = config.token_step
    if step > seq_length:
        raise ValueError(
            f"drop.token_step = {step} is not allowed: at most model.seq_length, {seq_length} tokens of a sample"
        )
    iterations = config.token_iterations or max(1, round(_ITERATIONS_SHARE * train_iters))
    default_tokens = max(step, seq_length // _MIN_SHARE // step * step)
    with named_as_fields():
        tokens = TokenDrop(
            seq_length=seq_length,
            layers=token_layers(config.token_layers, num_layers),
            min_tokens=config.min_tokens or default_tokens,
            step=step,
            iterations=iterations,
            table=_table(config, train_iters),
            strata=config.token_strata or strata,
        )
    if tokens.strata % strata:
        raise ValueError(
            f"drop.token_strata = {tokens.strata} is not allowed: the layout needs a multiple of {strata}, so that "
            "each rank holds whole strata"
        )
    return tokens


def with_strata(tokens: TokenDrop, strata: int, needed: int) -> TokenDrop:
    """The same with the strata of a checkpoint; ValueError where the layout, which needs `needed`, cannot draw them."""
    if strata % needed:
        raise ValueError(
            f"drop.token_strata = None is not allowed: the checkpoint's tokens are drawn from {strata} strata, and "
            f"this layout needs a multiple of {needed}; set it, which draws other tokens from here on"
        )
    with named_as_fields():
        return replace(tokens, strata=strata)


def check_tokens(config: DropConfig, num_layers: int) -> None:
    """Refuse fields about tokens that do not work together, for whatever seq_length. Raises ValueError."""
    changed = changed_fields(config)
    if config.token_schedule == "steps":
        unused = sorted(changed & set(_OF_LINEAR))
    else:
        unused = sorted(changed & {"token_steps"})
    if unused:
        field, other = unused[0], "linear" if config.token_schedule == "steps" else "steps"
        raise ValueError(
            f"drop.{field} = {getattr(config, field)} is not used by drop.token_schedule {config.token_schedule}: "
            f"leave it out, or set drop.token_schedule to {other}"
        )
    if config.min_tokens is not None and config.min_tokens % config.token_step:
        raise ValueError(
            f"drop.min_tokens = {config.min_tokens} is not allowed: it must be a multiple of drop.token_step, "
            f"{config.token_step}"
        )
    if config.token_strata is not None and config.token_step % config.token_strata:
        raise ValueError(
            f"drop.token_strata = {config.token_strata} is not allowed: it must divide drop.token_step, "
            f"{config.token_step}"
        )
    with named_as_fields():
        token_layers(config.token_layers, num_layers)
        _table(config, train_iters=1)


def _is_pair(step: Any) -> bool:
    return isinstance(step, Sequence) and len(step) == 2 and all(isinstance(value, int | float) for value in step)


def _table(config: DropConfig, train_iters: int) -> tuple[tuple[int, int], ...]:
    if config.token_schedule != "steps":
        assert config.token_steps == default_of("token_steps"), "checked before"
        return ()
    steps = config.token_steps
    if not isinstance(steps, Sequence) or not steps or not all(_is_pair(step) for step in steps):
        raise ValueError(
            f"token_steps = {steps} is not allowed with token_schedule steps: it must be a list of [share, tokens]"
        )
    shares = [share for share, _ in steps]
    if shares != sorted(set(shares)) or shares[0] < 0 or shares[-1] != 1.0:
        raise ValueError(f"token_steps = {steps} is not allowed: the shares must ascend from above 0 to 1.0")
    if any(tokens != tokens // 1 or tokens < 1 for _, tokens in steps):
        raise ValueError(f"token_steps = {steps} is not allowed: tokens are whole numbers of at least 1")
    return tuple((math.floor(round(share * train_iters, 6)), int(tokens)) for share, tokens in steps)
