"""The forecast of consumed layer-tokens against sums written out."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_sbld.config.run_length import RunLength
from megatron_sbld.config.sections import TrainingConfig
from megatron_sbld.forecast import layer_tokens
from megatron_sbld.forecast.layer_tokens import LayerTokenForecast

PLAIN = RunLength(TrainingConfig(global_batch_size=8, train_iters=20))
RAMP = RunLength(TrainingConfig(global_batch_size=8, train_iters=20, rampup_batch_size=[2, 2, 12]))
REPLANNED = RunLength(TrainingConfig(global_batch_size=8, train_iters=20), iteration=5, samples=90)


@pytest.mark.parametrize("length", [PLAIN, RAMP])
def test_it_is_the_sum_of_what_each_iteration_is_expected_to_run(length: RunLength) -> None:
    forecast = LayerTokenForecast(lambda iteration: iteration / 40, length, 20)
    expected = 0.0
    for iteration in range(1, 21):
        batch = length.samples_after(iteration) - length.samples_after(iteration - 1)
        assert forecast.after(length.samples_after(iteration - 1) + batch // 2) == pytest.approx(
            expected + batch // 2 * iteration / 40
        )
        expected += batch * iteration / 40
        assert forecast.after(length.samples_after(iteration)) == pytest.approx(expected)


def test_without_drops_it_is_the_samples_themselves() -> None:
    forecast = LayerTokenForecast(lambda _: 1.0, RAMP, 20)
    samples = range(RAMP.samples_after(20) + 1)
    assert [forecast.after(number) for number in samples] == list(samples)


def test_it_goes_on_from_what_is_done() -> None:
    forecast = LayerTokenForecast(lambda _: 0.5, PLAIN, 20, iteration=10, samples=80, consumed=50.0)
    assert [forecast.after(number) for number in (0, 40, 80, 96, 160)] == [0.0, 25.0, 50.0, 58.0, 90.0]
    done = LayerTokenForecast(lambda _: 0.5, PLAIN, 20, iteration=20, samples=160, consumed=99.0)
    assert done.after(160) == 99.0, "nothing is left to forecast"


def test_a_long_run_is_computed_from_some_of_its_iterations(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def share(iteration: int) -> float:
        asked.append(iteration)
        return 1.0 if iteration > 600 else 0.5

    length = RunLength(TrainingConfig(global_batch_size=2, train_iters=1000))
    monkeypatch.setattr(layer_tokens, "MOST_COMPUTED", 100)
    assert LayerTokenForecast(share, length, 1000).after(2000) == pytest.approx(1400.0, abs=20)
    assert len(asked) == 100
    assert min(asked) >= 1
    assert max(asked) <= 1000


@pytest.mark.parametrize("length", [PLAIN, RAMP, REPLANNED])
def test_samples_after_several_iterations_are_those_after_each(length: RunLength) -> None:
    iterations = np.arange(length.iteration, 30)
    samples = length.samples_after_each(iterations).tolist()
    assert samples == [length.samples_after(iteration) for iteration in iterations.tolist()]
    for number in range(samples[0], samples[-1] + 1):
        expected = next(t for t, read in zip(iterations.tolist(), samples, strict=True) if read >= number)
        assert length.iterations_to_read(number) == expected
