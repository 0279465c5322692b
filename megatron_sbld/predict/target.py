"""What `--target_gain` proposes: the largest theta, and SBLD's lists, at which a drop section gains so much."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from megatron_sbld.checks import check_number
from megatron_sbld.method.config import DropConfig
from megatron_sbld.method.in_force import uses_theta
from megatron_sbld.method.policy import SBLDPolicy
from megatron_sbld.predict.gain import LOWEST_THETA, Prediction, Predictor


@dataclass(frozen=True, kw_only=True)
class Target:
    """What `--target_gain` proposes."""

    target: float
    drop: DropConfig
    """With the theta, and lists, that come closest."""
    prediction: Prediction
    reached: bool
    note: str
    block_layers: list[int]
    allow_layers: list[int]


def find_target(predictor: Predictor, drop: DropConfig, target: float) -> Target:
    """The largest theta at which a drop section gains at least `target`, by bisection over its allowed range.

    Where no theta in [0.4, 1] gains it, SBLD's lists are changed within the paper's 10 to 20 % of the layers: more in
    the Allow list and fewer in the Block list. Where the least that it can gain is more, the Allow list shrinks.

    Raises ValueError for a section without a theta or a target out of range.
    """
    check_number("target_gain", target, "(0, 10)")
    check_has_theta(drop)
    note = ""
    highest = min(1.0, drop.peak_theta or 1.0)
    lowest = min(LOWEST_THETA, highest)
    most = _at(predictor, drop, lowest)
    if most.gain < target and _lists_are_free(drop):
        wider = dataclasses.replace(drop, block_fraction=0.10, allow_fraction=0.20)
        if (found := _at(predictor, wider, lowest)).gain > most.gain:
            drop, most = wider, found
            note = "no theta gains that with the configured lists, so Block is 10 % and Allow 20 % of the layers here"
    if most.gain < target:
        note = f"cannot be reached: theta = {lowest} gains {most.gain:+.1%}, and the paper recommends none below"
        return _target(predictor, drop, target, lowest, False, note)
    least = _at(predictor, drop, highest)
    if least.gain >= target and _lists_are_free(drop):
        for fraction in (each for each in (0.10, 0.05, 0.0) if each < drop.allow_fraction):
            narrower = dataclasses.replace(drop, allow_fraction=fraction)
            if (found := _at(predictor, narrower, highest)).gain < target:
                drop, least = narrower, found
                note = f"the configured Allow list alone gains more, so it is {fraction:.0%} of the layers here"
                break
    if least.gain >= target:
        note = f"theta = {highest:g} already gains {least.gain:+.1%}"
        return _target(predictor, drop, target, highest, True, note)
    low, high = lowest, highest  # gains at low reach the target, at high they do not
    while high - low > 5e-4:
        middle = (low + high) / 2
        if _at(predictor, drop, middle).gain >= target:
            low = middle
        else:
            high = middle
    return _target(predictor, drop, target, low, True, note)


def _at(predictor: Predictor, drop: DropConfig, theta: float) -> Prediction:
    return predictor.predict(dataclasses.replace(drop, theta=theta))


def _lists_are_free(drop: DropConfig) -> bool:
    return drop.policy == "sbld" and drop.block_layers is None and drop.allow_layers is None


def _target(predictor: Predictor, drop: DropConfig, target: float, theta: float, reached: bool, note: str) -> Target:
    chosen = dataclasses.replace(drop, theta=theta)
    policy = predictor.policy(chosen)
    lists = (policy.block_layers, policy.allow_layers) if isinstance(policy, SBLDPolicy) else ((), ())
    return Target(
        target=target,
        drop=chosen,
        prediction=predictor.predict(chosen),
        reached=reached,
        note=note,
        block_layers=list(lists[0]),
        allow_layers=list(lists[1]),
    )


def check_has_theta(drop: DropConfig) -> None:
    """Raise ValueError for a section whose gain theta cannot set."""
    needed = "--target_gain needs drop.policy sbld, pld, layerdrop or stochastic_depth"
    if drop.policy == "none":
        raise ValueError(f"{needed}: none drops no layers")
    if drop.policy == "staged":
        raise ValueError(f"{needed}: it proposes theta, and the gain of staged is set by drop.stages")
    if not uses_theta(drop):
        raise ValueError("--target_gain proposes drop.theta, which drop.schedule steps does not use: change drop.steps")
