"""random-LTD: r(t) as DeepSpeed documents it, draws that are uniform and independent, and what is refused."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from scipy.stats import binomtest, chi2

from megatron_sbld.method.build import build_policy
from megatron_sbld.method.build_tokens import build_tokens, with_strata
from megatron_sbld.method.config import DropConfig
from megatron_sbld.method.in_force import drop_settings
from megatron_sbld.method.tokens import TokenDrop, draw_tokens, strata_of_layout
from megatron_sbld.method.validate import validate_drop

S = 64
PINNED = [[[3, 7, 11, 31, 49, 61]]]


def drawn(num_tokens=16, strata=1, iteration=1, samples=range(4), layers=(2, 3), seed=1234):
    return draw_tokens(S, num_tokens, strata, seed=seed, iteration=iteration, samples=samples, layers=layers)


def build(train_iters=1000, seq_length=2048, num_layers=12, strata=1, **fields):
    config = DropConfig(**{"granularity": "token", **fields})
    validate_drop(config, num_layers, train_iters)
    return build_tokens(config, num_layers, train_iters, seq_length, strata)


def test_a_draw_is_pinned():
    """A checkpoint of today draws the same tomorrow, on any machine."""
    assert drawn(num_tokens=6, samples=[0], layers=[2]).tolist() == PINNED
    assert drawn(num_tokens=6, samples=[5], layers=[2]).tolist() != PINNED


@pytest.mark.parametrize(("num_tokens", "strata"), [(1, 1), (16, 1), (16, 4), (64, 1), (24, 8)])
def test_tokens_are_sorted_and_none_is_there_twice(num_tokens, strata):
    found = drawn(num_tokens, strata)
    assert found.shape == (2, 4, num_tokens)
    assert np.all(np.diff(found, axis=-1) > 0)
    assert found.min() >= 0 and found.max() < S  # noqa: PT018
    by_stratum = found.reshape(2, 4, strata, -1) // (S // strata)
    assert np.array_equal(by_stratum, np.broadcast_to(np.arange(strata)[:, None], by_stratum.shape))


@pytest.mark.parametrize("strata", [1, 4])
def test_each_token_is_equally_likely(strata):
    """A binomial test of each token, and a chi-square test of all together, at a level of 1e-4 for the table."""
    draws = np.concatenate([drawn(16, strata, iteration, range(32)).reshape(-1, 16) for iteration in range(1, 41)])
    counts = np.bincount(draws.ravel(), minlength=S)
    total, share = len(draws), 16 / S
    assert all(binomtest(int(count), total, share).pvalue > 1e-4 / S for count in counts)
    # Without replacement the counts are less spread than independent ones: by (S - r) / (S - 1) in each stratum.
    size = S // strata
    statistic = ((counts - total * share) ** 2 / (total * share * (1 - share))).sum() * (size - 1) / size
    assert chi2.sf(statistic, S - strata) > 1e-4


@pytest.mark.parametrize("axis", ["layers", "samples", "iterations"])
def test_draws_are_independent(axis):
    """How many tokens two draws have in common is hypergeometric: the mean of many is near its expectation."""
    if axis == "layers":
        first, second = drawn(16, samples=range(2000))
    elif axis == "samples":
        ((first),) = drawn(16, samples=range(0, 2000), layers=[2])
        ((second),) = drawn(16, samples=range(2000, 4000), layers=[2])
    else:
        ((first),) = drawn(16, iteration=1, samples=range(2000), layers=[2])
        ((second),) = drawn(16, iteration=2, samples=range(2000), layers=[2])
    common = np.array([len(np.intersect1d(one, other)) for one, other in zip(first, second, strict=True)])
    expected, variance = 16 * 16 / S, 16 * (16 / S) * (1 - 16 / S) * (S - 16) / (S - 1)
    assert abs(common.mean() - expected) < 4 * np.sqrt(variance / len(common))
    assert 0.85 < common.var() / variance < 1.15


def test_a_draw_depends_on_what_it_is_of_alone_and_grows_with_the_number_of_tokens():
    whole = drawn(16, samples=range(8), layers=[2, 3, 4])
    assert np.array_equal(drawn(16, samples=range(3, 6), layers=[3]), whole[1:2, 3:6])
    more = drawn(32, samples=range(8), layers=[2, 3, 4])
    assert np.isin(whole[0, 0], more[0, 0]).all()
    for other in ({"seed": 1235}, {"iteration": 2}):
        assert not np.array_equal(drawn(16, samples=range(8), layers=[2, 3, 4], **other), whole)


def test_the_defaults_are_random_ltds():
    tokens = build(train_iters=1000)
    assert (tokens.min_tokens, tokens.step, tokens.iterations, tokens.strata) == (128, 16, 700, 1)
    assert tokens.layers == tuple(range(2, 12))
    assert tokens.tokens(700) == 2048
    short = build(seq_length=100)  # no multiple of the step
    assert short.min_tokens == 16
    assert sorted({short.tokens(t) for t in range(1, 1001)}) == [16, 32, 48, 64, 80, 96, 100]


def test_shares_are_one_for_layers_that_run_all_tokens():
    tokens = TokenDrop(seq_length=64, layers=(2,), min_tokens=16, step=16, iterations=100)
    assert tokens.shares(1, 3).tolist() == [1.0, 0.25, 1.0]


def test_a_table_says_how_many_tokens_until_when():
    tokens = build(token_schedule="steps", token_steps=[[0.25, 512], [0.5, 1024], [1.0, 2048]])
    assert [tokens.tokens(t) for t in (1, 250, 251, 500, 501, 1000)] == [512, 512, 1024, 1024, 2048, 2048]


@pytest.mark.parametrize(
    ("sequence_ranks", "context_ranks", "strata"), [(1, 1, 1), (4, 1, 4), (1, 2, 4), (2, 2, 4), (4, 2, 8), (3, 2, 12)]
)
def test_strata_of_a_layout(sequence_ranks, context_ranks, strata):
    assert strata_of_layout(sequence_ranks, context_ranks) == strata


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"min_tokens": 100}, r"drop\.min_tokens = 100 .* multiple of drop\.token_step, 16"),
        ({"min_tokens": 4096}, r"drop\.min_tokens = 4096 .*\[1, 2048\]"),
        ({"token_strata": 3}, r"drop\.token_strata = 3 .* divide drop\.token_step, 16"),
        ({"token_step": 4096, "min_tokens": 4096}, r"drop\.token_step = 4096 .* at most model\.seq_length, 2048"),
        ({"token_layers": [13]}, r"drop\.token_layers entry = 13 .*\[1, 12\]"),
        ({"token_layers": []}, r"drop\.token_layers = \[\] .* none of the 12 layers"),
        ({"token_layers": [2, 2]}, r"drop\.token_layers = \[2, 2\] .*only once"),
        ({"token_steps": [[1.0, 64]]}, r"drop\.token_steps = .* not used by drop\.token_schedule linear: .* to steps"),
        ({"token_schedule": "steps"}, r"drop\.token_steps = None .* a list of \[share, tokens\]"),
        (
            {"token_schedule": "steps", "token_steps": [[1.0, 64]], "min_tokens": 64},
            r"drop\.min_tokens = 64 is not used by drop\.token_schedule steps: .* to linear",
        ),
        ({"token_schedule": "steps", "token_steps": [[0.5, 64]]}, r"drop\.token_steps = .* ascend from above 0 to 1"),
        ({"token_schedule": "steps", "token_steps": [[1.0, 60]]}, r"drop\.token_steps entry = 60 .* multiple of"),
        ({"token_schedule": "steps", "token_steps": [[1.0, 60.5]]}, r"drop\.token_steps = .* whole numbers"),
        ({"token_schedule": "steps", "token_steps": [3]}, r"drop\.token_steps = \[3\] .* a list of \[share"),
        ({"token_iterations": 0}, r"drop\.token_iterations = 0 .* at least 1"),
    ],
)
def test_what_cannot_be_is_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=message):
        build(**fields)


def test_strata_that_the_layout_cannot_draw_are_refused():
    assert build(strata=4).strata == 4
    assert build(strata=4, token_strata=8).strata == 8
    with pytest.raises(ValueError, match=r"drop\.token_strata = 2 is not allowed: the layout needs a multiple of 4"):
        build(strata=4, token_strata=2)
    assert with_strata(build(), 8, needed=4).strata == 8
    with pytest.raises(ValueError, match=r"drawn from 1 strata, and this layout needs a multiple of 2; set it"):
        with_strata(build(), 1, needed=2)


def test_with_policy_none_the_section_is_in_force_and_the_policies_fields_have_no_effect():
    with pytest.warns(UserWarning, match=r"no effect with drop\.policy none: drop\.stages, drop\.theta"):
        build(theta=0.5, stages=[[1.0, 12]])
    config = DropConfig(granularity="token", recovery_fraction=0.5)
    assert drop_settings(config).keys().isdisjoint({"theta", "sampler", "stages", "residual_scale"})
    assert drop_settings(config)["granularity"] == "token"
    policy = build_policy(config, 12, 1000)
    assert np.array_equal(policy.keep_probs(1), np.ones(12))
    assert policy.first_recovery_iteration == 501


def test_fields_about_tokens_have_no_effect_with_another_granularity():
    with pytest.warns(UserWarning, match=r"no effect with drop\.policy pld and drop\.granularity layer: drop\.min_tok"):
        validate_drop(DropConfig(policy="pld", min_tokens=128), 12, 1000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        validate_drop(DropConfig(policy="pld", min_tokens=128, granularity="token"), 12, 1000)
