"""`--sbld-lr-schedule-by layer_tokens`: a Megatron-LM scheduler that layer-tokens drive, and what it goes on from."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_sbld.controller import CHECKPOINT_KEY
from megatron_sbld.megatron_lm.arguments import drop_config, ignored_arguments, lr_schedule_by
from megatron_sbld.megatron_lm.run import LayerDropping
from tests.megatron_lm import test_run
from tests.megatron_lm.test_arguments import parse
from tests.megatron_lm.test_run import LAYERS, MICROBATCHES, _calculator, scheduler, step

pytestmark = pytest.mark.usefixtures("one_rank", _calculator.__name__)

HALF = ("--sbld-policy", "layerdrop", "--sbld-theta", "0.5")
DRIVEN = (*HALF, "--sbld-lr-schedule-by", "layer_tokens")
STAGES = ("--sbld-stages", "[[0.5, 2], [1.0, 4]]", "--sbld-stage-warmup", "0.1")
SAMPLES = 100
"""Over which the rate of test_run's scheduler decays: of 50 iterations."""


def attached(*words: str) -> tuple[LayerDropping, OptimizerParamScheduler, Any]:
    """test_run's, with an optimizer that has the limits of the rate, as Megatron-LM's has."""
    run, hooked, model = test_run.attached(*words)
    for group in hooked.optimizer.param_groups:
        group.update(max_lr=1e-3, min_lr=1e-4)
    return run, hooked, model


def train(run: LayerDropping, hooked: Any, iterations: range) -> list[float]:
    """The rate after each iteration; Megatron-LM steps the scheduler inside of its train_step."""
    rates = []
    for iteration in iterations:
        step(run, iteration)
        hooked.step(increment=MICROBATCHES)
        rates.append(hooked.optimizer.param_groups[0]["lr"])
    return rates


def stock_rates(hooked: OptimizerParamScheduler, horizon: float, increments: list[float]) -> list[float]:
    """Those of megatron-core's own scheduler of another horizon."""
    stock, rates = scheduler(hooked.optimizer), []
    stock.lr_decay_steps = horizon  # type: ignore[assignment]
    for increment in increments:
        stock.step(increment)  # type: ignore[arg-type]
        rates.append(stock.optimizer.param_groups[0]["lr"])
    return rates


def test_it_is_stepped_by_what_ran_over_what_the_run_is_forecast_to_consume() -> None:
    run, hooked, _ = attached(*DRIVEN)
    rates, ran = [], []
    for iteration in range(1, 61):
        rates += train(run, hooked, range(iteration, iteration + 1))
        ran.append(int(run.controller.plan[0].sum()))
    increments = [MICROBATCHES * layers / LAYERS for layers in ran]
    assert rates == pytest.approx(stock_rates(hooked, SAMPLES / 2, increments))
    assert hooked.wd_incr_steps == SAMPLES / 2
    assert run._scalars._scalars()["consumed_layer_tokens"] == sum(ran) * MICROBATCHES * 16


@pytest.mark.parametrize("words", [("--sbld-theta", "1.0"), ()])
def test_a_run_that_drops_nothing_has_the_stock_rate_bit_for_bit(words: tuple[str, ...]) -> None:
    run, hooked, _ = attached(
        "--sbld-policy", "layerdrop", *(words or ("--sbld-recovery-fraction", "1.0")), *DRIVEN[4:]
    )
    rates = train(run, hooked, range(1, 61))
    assert rates == stock_rates(hooked, SAMPLES, [MICROBATCHES] * 60)


@pytest.mark.parametrize("words", [(), STAGES])
def test_it_goes_on_bit_for_bit(words: tuple[str, ...]) -> None:
    whole, hooked, _ = attached(*DRIVEN, *words)
    expected = train(whole, hooked, range(1, 31))
    state = hooked.state_dict()
    expected += train(whole, hooked, range(31, 61))
    resumed, other, _ = attached(*DRIVEN, *words)
    other.load_state_dict(state)
    assert other.num_steps == state["num_steps"]
    assert train(resumed, other, range(31, 61)) == expected[30:]
    assert other.state_dict() == hooked.state_dict()


def test_stages_are_forecast_and_the_rate_rises_again() -> None:
    """Two of four layers for 50 iterations, whose layer-tokens are those of 50 samples."""
    run, hooked, _ = attached("--sbld-policy", "staged", *STAGES, *DRIVEN[4:])
    assert hooked.lr_decay_steps == SAMPLES / 2
    rates = train(run, hooked, range(1, 52))
    plain = stock_rates(hooked, SAMPLES / 2, [MICROBATCHES / 2] * 51)
    assert rates[:49] == pytest.approx(plain[:49])
    assert rates[49] == pytest.approx(plain[49] / 10), "of the first of ten iterations since layers began"


def test_a_schedule_that_counted_otherwise_is_refused_and_an_undropped_one_is_not(
    caplog: pytest.LogCaptureFixture,
) -> None:
    _, by_iterations, _ = attached(*HALF)
    _, driven, _ = attached(*DRIVEN)
    for hooked, other, word in ((driven, by_iterations, "iterations"), (by_iterations, driven, "layer_tokens")):
        state = {**other.state_dict(), "lr_decay_steps": hooked.lr_decay_steps, "wd_incr_steps": hooked.wd_incr_steps}
        with pytest.raises(ValueError, match=rf"--sbld-lr-schedule-by .* has counted by {word}; give {word}"):
            hooked.load_state_dict(state)
    assert "rate" not in by_iterations.state_dict()[CHECKPOINT_KEY]
    stock = scheduler(driven.optimizer)
    stock.step(increment=10)
    run, driven, _ = attached("--sbld-policy", "layerdrop", "--sbld-theta", "1.0", *DRIVEN[4:])
    with caplog.at_level(logging.WARNING):
        driven.load_state_dict(stock.state_dict())
    assert driven.num_steps == 10
    assert run._rate is not None
    assert run._rate.consumed == 10 * 16 * LAYERS


def test_without_a_policy_it_is_named_as_without_effect_and_a_long_warm_up_is_refused() -> None:
    args = parse("--sbld-lr-schedule-by", "layer_tokens")
    assert ignored_arguments(drop_config(args), lr_schedule_by(args)) == ("--sbld-lr-schedule-by",)
    assert lr_schedule_by(parse()) == "iterations"
    with pytest.raises(ValueError, match=r"--lr-warmup-iters, -samples or -fraction: with layer_tokens it lasts for"):
        attached("--sbld-policy", "layerdrop", "--sbld-theta", "0.01", "--sbld-lr-schedule-by", "layer_tokens")
