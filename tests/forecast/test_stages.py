"""What is said about a run's pipeline stages before it trains: what each has to do, and a better placement."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from megatron_sbld.config.sections import Config, ModelConfig
from megatron_sbld.forecast.drops import forecast
from megatron_sbld.forecast.stages import StageForecast, stage_forecast, stage_forecast_text
from megatron_sbld.layout.placement import iteration_times, read_layout
from megatron_sbld.method.build import build_policy
from megatron_sbld.method.decisions import draw_plan, draw_sample_counts
from megatron_sbld.method.policy import Policy, SBLDPolicy, StagedPolicy
from megatron_sbld.method.schedule import Constant
from tests.training.trainer_helpers import change

LAYERS, ITERATIONS = 24, 1000
CONFIG = change(
    Config(model=ModelConfig(num_layers=LAYERS)),
    parallel={"pipeline_model_parallel_size": 4},
    training={"train_iters": ITERATIONS, "global_batch_size": 64},
    drop={"policy": "sbld", "sensitivity": "not read here.json", "sampler": "balanced"},
)
FLAT = SBLDPolicy(Constant(0.75), np.zeros(LAYERS))
LISTED = SBLDPolicy(Constant(0.6), np.zeros(LAYERS), block_layers=range(1, 7), allow_layers=range(13, 19))
"""Keeps 6, 3.6, 2.4 and 3.6 layers of the even stages."""


def of(
    policy: Policy, phi: float | None = 1.0, replicas: int = 1, balanced: Any = None, **sections: Any
) -> StageForecast | None:
    config = change(CONFIG, **sections)
    return stage_forecast(config, policy, forecast(policy, ITERATIONS, phi), phi, replicas, balanced)


def test_stages_are_told_with_what_they_keep_by_phase_and_in_all() -> None:
    policy = SBLDPolicy(
        Constant(0.5), np.zeros(LAYERS), block_layers=range(1, 7), recovery_fraction=0.5, train_iters=ITERATIONS
    )
    found = of(policy)
    assert found is not None
    assert found.layers == [list(range(begin, begin + 6)) for begin in (1, 7, 13, 19)]
    assert found.phases == ["1/5", "2/5", "3/5", "4/5", "5/5"]
    np.testing.assert_allclose(found.kept, [[6.0, 3.0, 3.0, 3.0]] * 5)
    np.testing.assert_allclose(found.kept_in_run, [6.0, 4.5, 4.5, 4.5])
    assert found.imbalance == pytest.approx(6 / 4.875 - 1)
    lines = stage_forecast_text(found).splitlines()
    assert lines[0].split() == ["kept", "on", "of", "layers", "1/5", "2/5", "3/5", "4/5", "5/5", "run"]
    assert lines[1].split() == ["stage", "1", "1-6", *["6.00"] * 6]
    assert lines[2].split() == ["stage", "2", "7-12", *["3.00"] * 5, "4.50"]
    assert max(map(len, lines)) <= 80


def test_a_better_placement_is_proposed_and_pasted_in_it_ends_the_matter() -> None:
    found = of(LISTED)
    assert found is not None
    assert found.proposal is not None
    placement = read_layout(found.proposal, LAYERS, 4)
    loads = [sum(LISTED.keep_probs(1)[np.array(stage) - 1]) for stage in placement.stages]
    assert max(loads) < 5
    assert found.saved > 0.1
    text = stage_forecast_text(found)
    assert f'parallel.pipeline_model_parallel_layout: "{found.proposal}"' in text
    assert f"would save {found.saved:.1%} of an iteration" in text
    assert max(map(len, text.splitlines())) <= 80

    pasted = of(LISTED, parallel={"pipeline_model_parallel_layout": found.proposal})
    assert pasted is not None
    assert (pasted.layers, pasted.proposal, pasted.saved) == (placement.stages, None, 0.0)
    assert "pipeline_model_parallel_layout" not in stage_forecast_text(pasted)


@pytest.mark.parametrize("sampler", ["bernoulli", "balanced"])
@pytest.mark.parametrize("scope", ["iteration", "microbatch"])
def test_the_saving_is_that_of_the_runs_own_decisions(sampler: str, scope: str) -> None:
    training = {"global_batch_size": 8}
    found = of(LISTED, drop={"sampler": sampler, "decision_scope": scope}, training=training)
    assert found is not None
    assert found.proposal is not None

    def mean_time(layout: str) -> float:
        stages = read_layout(layout, LAYERS, 4).stages
        options: dict[str, Any] = {"scope": scope, "sampler": sampler}
        if sampler == "balanced":
            options["stages"] = stages
        kept = [draw_plan(LISTED.keep_probs(t), CONFIG.drop.seed, t, 8, **options) for t in range(1, ITERATIONS + 1)]
        return float(iteration_times(np.array(kept), stages).mean())

    exact = 1 - mean_time(found.proposal) / mean_time("Et*6|t*6|t*6|t*6L")
    assert found.saved == pytest.approx(exact, abs=0.02)


def test_the_saving_with_decisions_about_samples_is_that_of_the_shares_that_layers_run() -> None:
    training = {"global_batch_size": 32, "micro_batch_size": 4}
    found = of(LISTED, drop={"sampler": "bernoulli", "granularity": "sample"}, training=training)
    by_layer = of(LISTED, drop={"sampler": "bernoulli"}, training=training)
    assert found is not None
    assert by_layer is not None
    assert found.proposal is not None

    def mean_time(layout: str) -> float:
        stages, seed = read_layout(layout, LAYERS, 4).stages, CONFIG.drop.seed
        counts = [draw_sample_counts(LISTED.keep_probs(t), 4, seed, t, 8) for t in range(1, ITERATIONS + 1)]
        return float(iteration_times(np.array(counts) / 4, stages).mean())

    exact = 1 - mean_time(found.proposal) / mean_time("Et*6|t*6|t*6|t*6L")
    assert found.saved == pytest.approx(exact, abs=0.01)
    assert found.saved > by_layer.saved + 0.02  # stages are less often late by chance


def test_independent_draws_leave_less_to_gain_than_the_means_say() -> None:
    balanced, bernoulli = (of(LISTED, drop={"sampler": sampler}) for sampler in ("balanced", "bernoulli"))
    assert balanced is not None
    assert bernoulli is not None
    assert bernoulli.proposal == balanced.proposal
    assert 0.01 < bernoulli.saved < balanced.saved - 0.02


@pytest.mark.parametrize("sampler", ["bernoulli", "balanced"])
def test_even_stages_are_met_with_silence(sampler: str) -> None:
    found = of(FLAT, drop={"sampler": sampler})
    assert found is not None
    assert (found.proposal, found.saved) == (None, 0.0)
    assert len(stage_forecast_text(found).splitlines()) == 5


def test_the_output_layer_counts_as_layers_where_the_vocabulary_is_known() -> None:
    phi = 24 / (24 + 6)
    found = of(FLAT, phi=phi)
    assert found is not None
    assert found.output_layers == pytest.approx(6.0)
    assert found.proposal is not None
    counts = [len(stage) for stage in read_layout(found.proposal, LAYERS, 4).stages]
    assert (sorted(counts[:3]), counts[3]) == ([7, 8, 8], 1)
    assert "output layer = 6.0 layers" in stage_forecast_text(found)
    unknown = of(LISTED, phi=None)
    assert unknown is not None
    assert "output layer not counted" in stage_forecast_text(unknown)


def test_replicas_share_the_microbatches() -> None:
    found = [of(LISTED, replicas=replicas) for replicas in (1, 4)]
    assert [one.num_microbatches for one in found if one is not None] == [64, 16]


def test_interleaved_stages_are_told_but_nothing_is_proposed() -> None:
    found = of(LISTED, parallel={"num_virtual_stages_per_pipeline_rank": 2})
    assert found is not None
    assert found.layers[0] == [1, 2, 3, 13, 14, 15]
    assert found.proposal is None
    assert "No placement is proposed for interleaved stages." in stage_forecast_text(found)
    even = of(FLAT, parallel={"num_virtual_stages_per_pipeline_rank": 2})
    assert even is not None
    assert len(stage_forecast_text(even).splitlines()) == 5


def test_a_sampler_that_evens_other_stages_is_told() -> None:
    followed = of(LISTED, balanced=[list(range(begin, begin + 6)) for begin in (1, 7, 13, 19)])
    assert followed == of(LISTED)
    resumed = of(LISTED, balanced=[list(range(1, 13)), list(range(13, 25))])
    fixed = of(LISTED, drop={"balance_stages": 2})
    assert resumed == fixed
    assert fixed is not None
    assert fixed.balances_others
    assert "balances other stages: drop.balance_stages" in stage_forecast_text(fixed)
    same = of(LISTED, drop={"balance_stages": 4})
    assert same is not None
    assert not same.balances_others


def test_stages_in_which_layers_begin_are_told_by_rank_and_no_placement_is_proposed() -> None:
    policy = StagedPolicy(
        [[0.6, 4], [1.0, LAYERS]], LAYERS, train_iters=ITERATIONS, ranks=[[1], range(2, 4), range(4, 13), range(13, 25)]
    )
    layout = {"pipeline_model_parallel_layout": "Et|t*2|t*9|t*12L"}
    found = of(policy, 0.9, parallel=layout, drop={"policy": "staged"})
    assert found is not None
    assert found.begun is not None
    assert found.begun[0] == [[1], [2], [4], [13]]
    assert found.begun[1] == found.layers
    assert found.kept == [[1.0] * 4, [1.0, 2.0, 9.0, 12.0]]
    assert (found.proposal, found.saved) == (None, 0.0)
    lines = stage_forecast_text(found).splitlines()
    assert lines[0].split() == ["kept", "on", "of", "layers", "stage", "1", "stage", "2", "run"]
    assert lines[4].split() == ["rank", "4", "13-24", "1.00", "12.00", "5.40"]
    assert lines[5].startswith("The ranks are uneven")
    assert "`megatron-sbld predict` looks for a better placement" in lines[6]
    assert max(map(len, lines)) <= 86


def test_one_stage_or_no_dropping_has_no_forecast_of_stages() -> None:
    assert of(LISTED, parallel={"pipeline_model_parallel_size": 1}) is None
    policy = build_policy(replace(CONFIG.drop, policy="none"), LAYERS, ITERATIONS)
    assert of(policy, drop={"policy": "none"}) is None


def test_a_large_pipeline_with_many_microbatches_is_told_in_seconds() -> None:
    policy = SBLDPolicy(Constant(0.6), np.linspace(0, 1, 96))
    config = change(
        CONFIG,
        model={"num_layers": 96},
        parallel={"pipeline_model_parallel_size": 16},
        training={"global_batch_size": 512, "train_iters": 500_000},
        drop={"decision_scope": "microbatch"},
    )
    outlook = forecast(policy, 500_000, 0.98)
    began = time.process_time()
    found = stage_forecast(config, policy, outlook, 0.98)
    assert time.process_time() - began < 10.0
    assert found is not None
    assert found.proposal is not None
