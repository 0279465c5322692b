"""theta(t) of the `drop` section: its schedule with the defaults of docs/method.md 1, 4 and 8."""

from __future__ import annotations

from megatron_sbld.method.config import DropConfig
from megatron_sbld.method.in_force import named_as_fields, schedule_name
from megatron_sbld.method.schedule import (
    PWEGD,
    Constant,
    Exponential,
    Linear,
    Plateau,
    Polynomial,
    Schedule,
    Steps,
    amplitude_for_peak,
    scale_for_peak,
)

_DEFAULT_PEAK_FRACTION = 0.1
_PLD_DECAYS = 100.0


def build_schedule(config: DropConfig, train_iters: int) -> Schedule:
    """theta(t) of the section for a run of T iterations; what is None takes the defaults of docs/method.md 1 and 4.

    Raises ValueError naming the field.
    """
    if config.policy == "staged":  # the gate alone
        return Constant(1.0)
    name = schedule_name(config)
    duration = train_iters if config.duration is None else config.duration
    with named_as_fields():
        if name == "pwegd":
            return _build_pwegd(config, train_iters)
        if name == "exponential":
            return Exponential(config.theta, _PLD_DECAYS / train_iters if config.gamma is None else config.gamma)
        if name == "linear":
            return Linear(config.start_theta, config.theta, duration)
        if name == "polynomial":
            return Polynomial(config.start_theta, config.theta, duration, config.power)
        if name == "plateau":
            hold, decay = (share * train_iters for share in (config.hold_until, config.decay_until))
            return Plateau(theta=config.theta, hold_until=hold, decay_until=decay)
        if name == "steps":
            if config.steps is None:
                raise ValueError("steps = None is not allowed with schedule steps: it must be a list of [share, theta]")
            return Steps.of_shares(config.steps, train_iters)
        return Constant(config.theta)


def _build_pwegd(config: DropConfig, train_iters: int) -> PWEGD:
    shape = config.a + config.c
    if shape < 1.0:
        raise ValueError(f"a + drop.c = {shape} is not allowed: below 1 the schedule is infinite at epsilon")
    if config.b is not None:
        b = config.b
    elif shape == 1.0:
        raise ValueError("b = None is not allowed with a + c = 1: such a schedule peaks at epsilon whatever b is")
    else:
        peak = _DEFAULT_PEAK_FRACTION * train_iters if config.peak_iteration is None else config.peak_iteration
        b = scale_for_peak(peak, shape, config.epsilon)
    if config.eta is not None:
        eta = config.eta
    else:
        peak_theta = config.theta + (1.0 - config.theta) / 2.0 if config.peak_theta is None else config.peak_theta
        eta = amplitude_for_peak(peak_theta, config.theta, shape, b)
    return PWEGD(theta=config.theta, a=config.a, b=b, c=config.c, epsilon=config.epsilon, eta=eta)
