"""The first step of a layer that begins late: Adam's own first one (docs/method.md 8).

Megatron keeps one step count for all parameters, and Adam corrects the bias of its moments by it. A layer that waited
has moments of zero, while the count has gone on: its first update would be (1 - beta1) / sqrt(1 - beta2) times the
learning rate, 3.2 at beta2 0.999, and the next ones larger still. Its moments are therefore set to what a gradient that
had always been the present one would have left: corrected for bias they are g and g^2 after the step.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch


def prepare_first_step(adam: torch.optim.Optimizer, params: Iterable[torch.Tensor]) -> None:
    """Set the moments just before a step of Adam; an optimizer without them (SGD) needs nothing.

    adam: torch's Adam, or the fused one of Apex or Transformer Engine.
    params: of it, with the gradient that the step is made with.
    """
    groups = {param: group for group in adam.param_groups for param in group["params"]}
    for param in params:
        state, group = adam.state.get(param, {}), groups[param]
        if param.grad is None or "exp_avg_sq" not in state:
            continue
        beta1, beta2 = group["betas"]
        step = int(state["step"] if "step" in state else group.get("step", 0)) + 1
        gradient = param.grad.to(state["exp_avg"].dtype)
        torch.mul(gradient, _before(beta1, step), out=state["exp_avg"])
        torch.mul(gradient.square(), _before(beta2, step), out=state["exp_avg_sq"])


def _before(beta: float, step: int) -> float:
    """m / g before the step, for which beta m + (1 - beta) g is (1 - beta^step) g."""
    return (beta - beta**step) / beta if beta else 0.0
