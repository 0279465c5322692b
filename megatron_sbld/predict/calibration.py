"""Calibration on the undropped baseline.

One number is calibrated, the share of the peak that matrix products reach, so that the undropped model has the given
throughput.
"""

from __future__ import annotations

import math

from scipy.optimize import brentq

from megatron_sbld.checks import check_number
from megatron_sbld.config.flops import model_flops_per_token
from megatron_sbld.predict.iteration import IterationModel, Setup

_LOWEST_EFFICIENCY = 1e-6


def calibrate(setup: Setup, tokens_per_s: float) -> float:
    """Share of the peak that matrix products reach for the undropped model to have this throughput, (0, 1].

    Raises ValueError where memory and communication alone, or products at the peak, take longer than that.
    """
    check_number("tokens_per_s", tokens_per_s, "(0, inf)")
    target = setup.tokens / tokens_per_s

    def excess(log_efficiency: float) -> float:
        return math.log(float(IterationModel(setup, math.exp(log_efficiency)).undropped.total[0]) / target)

    at_peak = excess(0.0)
    if at_peak > 0:
        raise ValueError(
            f"baseline of {tokens_per_s:,.0f} tokens/s is not allowed: with matrix products at the full peak of "
            f"{setup.hardware.name} this model allows {tokens_per_s / math.exp(at_peak):,.0f} at most; check the "
            "throughput (of all GPUs together), the bandwidths and the overlaps"
        )
    lowest = math.log(_LOWEST_EFFICIENCY)
    if excess(lowest) < 0:
        raise ValueError(f"baseline of {tokens_per_s:,.6f} tokens/s is not allowed: below a millionth of the peak")
    return math.exp(brentq(excess, lowest, 0.0, xtol=1e-9))


def mfu_tokens_per_s(setup: Setup, mfu: float) -> float:
    """Tokens/s of all GPUs at a model FLOPs utilisation (Megatron-LM's count of FLOPs, without recomputation)."""
    check_number("mfu", mfu, "(0, 1]")
    flops = model_flops_per_token(setup.config.model, setup.vocab_size)
    return mfu * setup.hardware.peak * setup.gpus / flops
