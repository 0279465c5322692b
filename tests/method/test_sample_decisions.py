"""Decisions about samples: pinned values, exact expectations, uniform subsets, and what ranks share (fixed seeds)."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, chi2, chisquare

from megatron_sbld.method.decisions import MAX_SAMPLES, MAX_SEED, draw_plan, draw_sample_counts, draw_samples

KEEP_PROBS = np.linspace(1.0, 0.3, 12)
SAMPLERS = ["bernoulli", "balanced"]


def draw(keep_probs, num_samples, seed, iteration, num_microbatches, scope="iteration", replica=0, **sampler):
    """(counts [M, L], samples [M, L, b])."""
    counts = draw_sample_counts(keep_probs, num_samples, seed, iteration, num_microbatches, scope, **sampler)
    return counts, draw_samples(counts, num_samples, seed, iteration, scope, replica)


def as_text(samples):
    """A row of each microbatch, a word of each layer."""
    return [" ".join("".join("01"[int(value)] for value in layer) for layer in row) for row in samples]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, ["1111 1111 0111 1011 0111 1011 1010 1010 0101 0110 0100 1000"] * 2),
        (
            {"scope": "microbatch"},
            [
                "1111 1111 0111 1011 0111 1011 1010 1010 0101 0110 0100 1000",
                "1111 1111 1111 1101 1011 0111 0110 0101 1100 1100 0001 1000",
            ],
        ),
        (
            {"scope": "microbatch", "sampler": "balanced", "stages": 3},
            [
                "1111 1111 0111 1011 0111 1011 1011 1010 0101 0110 0100 1000",
                "1111 1111 1111 1101 1011 0111 0110 0101 1100 1100 0001 1000",
            ],
        ),
        ({"replica": 1, "num_microbatches": 1}, ["1111 1111 1011 1011 1110 1101 0011 1010 1001 0110 0010 0001"]),
        (
            {"seed": MAX_SEED, "iteration": 2**32 - 1, "num_microbatches": 1, "num_samples": 3},
            ["111 111 110 011 111 011 110 110 101 110 010 010"],
        ),
    ],
)
def test_golden_decisions_never_change(arguments, expected):
    settings = {"num_samples": 4, "seed": 1234, "iteration": 7, "num_microbatches": 2, **arguments}
    counts, samples = draw(KEEP_PROBS, **settings)
    assert (counts.dtype, samples.dtype) == (np.int64, np.bool_)
    assert as_text(samples) == expected


@pytest.mark.parametrize("scope", ["iteration", "microbatch"])
@pytest.mark.parametrize("sampler", [{}, {"sampler": "balanced"}, {"sampler": "balanced", "stages": 4}])
def test_one_sample_is_the_decision_about_the_layer(scope, sampler):
    keep_probs = [1.0, 0.0, *KEEP_PROBS[2:]]
    for iteration in range(1, 200):
        counts, samples = draw(keep_probs, 1, 3, iteration, 3, scope, **sampler)
        expected = draw_plan(keep_probs, 3, iteration, 3, scope, **sampler)
        np.testing.assert_array_equal(counts, expected)
        np.testing.assert_array_equal(samples[:, :, 0], expected)
        if sampler:
            of_replica = {"num_microbatches": 3, "scope": scope, "replica": 5, **sampler}
            counts = draw_sample_counts(keep_probs, 1, 3, iteration, **of_replica)
            np.testing.assert_array_equal(counts, draw_plan(keep_probs, 3, iteration, **of_replica))


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("num_samples", [2, 3, 4, 16])
def test_a_layer_runs_its_expected_number_of_samples_rounded_down_or_up(sampler, num_samples):
    counts = draw_sample_counts(KEEP_PROBS, num_samples, 20, 1, 50_000, "microbatch", sampler)
    for layer, expected in enumerate(KEEP_PROBS * num_samples):
        whole = int(np.floor(expected))
        assert set(counts[:, layer]) <= {whole, whole + 1}
        one_more = int((counts[:, layer] - whole).sum())
        assert binomtest(one_more, len(counts), expected - whole).pvalue > 1e-4, f"layer {layer + 1}"


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_each_sample_of_each_layer_is_kept_with_the_layers_probability(sampler):
    _, samples = draw(KEEP_PROBS, 4, 21, 1, 50_000, "microbatch", sampler=sampler)
    for layer, keep_prob in enumerate(KEEP_PROBS):
        for sample in range(4):
            kept = int(samples[:, layer, sample].sum())
            assert binomtest(kept, len(samples), keep_prob).pvalue > 1e-4, f"layer {layer + 1}, sample {sample}"


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_every_subset_of_a_size_is_equally_likely(size):
    counts = np.full((60_000, 1), size)
    samples = draw_samples(counts, 5, 11, 1, "microbatch")[:, 0]
    subsets = dict.fromkeys(combinations(range(5), size), 0)
    for row in samples:
        subsets[tuple(np.flatnonzero(row).tolist())] += 1
    assert chisquare(list(subsets.values())).pvalue > 1e-4


def test_subsets_of_different_layers_and_microbatches_are_uncorrelated():
    samples = draw_samples(np.full((20_000, 8), 2), 4, 5, 1, "microbatch")[:, :, 0] * 2.0 - 1.0  # of the first sample
    between_layers = (samples.T @ samples / len(samples))[np.triu_indices(8, k=1)]
    between_microbatches = samples[1:].T @ samples[:-1] / len(samples)
    for correlations in (between_layers, between_microbatches):
        assert chi2.sf(len(samples) * (correlations**2).sum(), df=correlations.size) > 1e-4


def test_how_many_says_nothing_about_which():
    """The number and the subset are drawn from different streams."""
    counts, samples = draw([0.3], 4, 8, 1, 60_000, "microbatch")  # 1 or 2
    table = [samples[counts[:, 0] == count, 0].sum(axis=0) / count for count in (1, 2)]
    for row in table:
        assert chisquare(row).pvalue > 1e-4


def test_keep_probability_one_keeps_every_sample_and_zero_none():
    keep_probs = np.array([1.0, 0.0, 0.3, 1.0, 1.0 / 3.0])
    for sampler in SAMPLERS:
        _, samples = draw(keep_probs, 8, 11, 1, 5000, "microbatch", sampler=sampler)
        assert samples[:, keep_probs == 1.0].all()
        assert not samples[:, keep_probs == 0.0].any()


def test_scope_iteration_repeats_the_first_microbatchs_samples():
    _, whole = draw(KEEP_PROBS, 4, 1, 5, 6, "iteration")
    _, rows = draw(KEEP_PROBS, 4, 1, 5, 6, "microbatch")
    assert as_text(whole) == as_text(rows)[:1] * 6
    assert len(set(as_text(rows))) == 6


def test_a_row_does_not_depend_on_the_number_of_microbatches_or_other_layers():
    _, few = draw(KEEP_PROBS, 4, 3, 9, 2, "microbatch")
    _, many = draw(KEEP_PROBS, 4, 3, 9, 50, "microbatch")
    np.testing.assert_array_equal(few, many[:2])
    _, shallow = draw(KEEP_PROBS[:5], 4, 3, 9, 50, "microbatch")
    np.testing.assert_array_equal(shallow, many[:, :5])


def test_a_higher_keep_probability_never_drops_a_sample_that_a_lower_one_keeps():
    _, low = draw(np.full(24, 0.5), 6, 3, 9, 100, "microbatch")
    _, high = draw(np.full(24, 0.6), 6, 3, 9, 100, "microbatch")
    assert np.all(high[low])
    assert high.sum() > low.sum()


def test_seed_iteration_and_microbatch_each_change_the_samples():
    def rows(seed, iteration):
        return as_text(draw_samples(np.full((4, 40), 2), 4, seed, iteration, "microbatch"))

    everything = [row for seed in (0, 1, 1 << 32, MAX_SEED) for iteration in (1, 2, 3) for row in rows(seed, iteration)]
    assert len(set(everything)) == len(everything)


def test_replicas_take_as_many_samples_but_different_ones():
    drawn = [draw(KEEP_PROBS, 4, 6, 3, 1000, "microbatch", replica=replica) for replica in (0, 1, 2, 63)]
    for counts, samples in drawn[1:]:
        np.testing.assert_array_equal(counts, drawn[0][0])
        np.testing.assert_array_equal(samples.sum(axis=-1), counts)
        # Layers that run some samples agree by chance alone: 1 in 4 or 6 for 4 samples.
        partial = (counts > 0) & (counts < 4)
        assert (samples[partial] == drawn[0][1][partial]).all(axis=-1).mean() < 0.27


@settings(max_examples=100, deadline=None)
@given(
    keep_probs=st.lists(st.floats(0.0, 1.0) | st.sampled_from([0.0, 1.0, 1 / 3, 1 - 1e-9]), min_size=1, max_size=20),
    num_samples=st.integers(1, 40),
    num_stages=st.integers(1, 3),
    seed=st.integers(0, MAX_SEED),
)
def test_the_balanced_sampler_evens_stages_in_samples(keep_probs, num_samples, num_stages, seed):
    stages = [list(range(1 + stage, len(keep_probs) + 1, num_stages)) for stage in range(num_stages)]
    counts = draw_sample_counts(keep_probs, num_samples, seed, 1, 16, "microbatch", "balanced", stages)
    for stage in stages:
        members = np.array(stage, dtype=int) - 1
        expected = np.array(keep_probs)[members].sum() * num_samples
        assert np.all(np.abs(counts[:, members].sum(axis=1) - expected) < 1 + 1e-9 * num_samples)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_samples": 0}, r"^num_samples = 0 .*\[1, 65536\]"),
        ({"num_samples": MAX_SAMPLES + 1}, "^num_samples = 65537"),
        ({"num_samples": 2.0}, r"^num_samples = 2\.0"),
        ({"keep_probs": [0.5, 1.5]}, "layer 2 = .*1.5"),
        ({"keep_probs": [0.5] * 2**16}, "65536 layers are not allowed"),
        ({"stages": 2}, "does not use stages = 2"),
        ({"replica": 1}, "or replica = 1"),
        ({"seed": -1}, "^seed = -1"),
    ],
)
def test_arguments_that_make_no_counts_are_refused_by_name(change, message):
    good = {"keep_probs": [0.5] * 4, "num_samples": 2, "seed": 1, "iteration": 1, "num_microbatches": 2}
    draw_sample_counts(**good)
    with pytest.raises(ValueError, match=message):
        draw_sample_counts(**{**good, **change})


def test_a_replica_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"^replica = 16777216"):
        draw_samples(np.ones((1, 2), dtype=np.int64), 2, 1, 1, replica=2**24)
