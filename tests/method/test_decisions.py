"""Decisions: pinned values, the properties of docs/method.md 6, and rates that pass statistical tests (fixed seeds)."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, chi2

from megatron_sbld.method import decisions as plan
from megatron_sbld.method.decisions import MAX_SEED, draw_plan, draw_sample_counts, draw_samples, philox4x32

KEEP_PROBS = np.linspace(1.0, 0.3, 12)
SAMPLERS = ["bernoulli", "balanced"]


def as_text(kept):
    return ["".join("01"[int(value)] for value in row) for row in kept]


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_known_answers_of_its_authors(counter, key, words):
    assert philox4x32(np.array([counter], dtype=np.uint64), tuple(key)).tolist() == [words]


def test_uniform_numbers_are_philoxs_first_two_words_as_53_bits():
    uniforms = plan._uniforms(1234 + (5 << 32), 7, np.arange(2), np.arange(1, 4), stream=0)
    for microbatch in range(2):
        for layer in range(1, 4):
            words = philox4x32(np.array([[7, microbatch, layer, 0]], dtype=np.uint64), (1234, 5))[0].tolist()
            assert uniforms[microbatch, layer - 1] == ((words[0] << 32 | words[1]) >> 11) / 2**53


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, ["111111001000"] * 4),
        ({"scope": "microbatch"}, ["111111001000", "111111001100", "111100101010", "101011010001"]),
        (
            {"scope": "microbatch", "sampler": "balanced", "stages": 3},
            ["110101110101", "111101010110", "101111011000", "111101111000"],
        ),
        (
            {"scope": "microbatch", "sampler": "balanced", "stages": 3, "replica": 1},
            ["101101110101", "111101101100", "110111010001", "111111011000"],
        ),
        (
            {"sampler": "balanced", "stages": [[1, 2, 3, 7, 8, 9], [4, 5, 6, 10, 11, 12]]},
            ["101111011010"] * 4,
        ),
        (
            {"seed": MAX_SEED, "iteration": 2**32 - 1, "num_microbatches": 2, "scope": "microbatch"},
            ["111011011100", "110001111101"],
        ),
    ],
)
def test_golden_decisions_never_change(arguments, expected):
    kept = draw_plan(KEEP_PROBS, **{"seed": 1234, "iteration": 7, "num_microbatches": 4, **arguments})
    assert kept.dtype == np.bool_
    assert as_text(kept) == expected


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_scope_iteration_repeats_the_first_row_of_scope_microbatch(sampler):
    whole = draw_plan(KEEP_PROBS, 1, 5, 6, scope="iteration", sampler=sampler)
    rows = draw_plan(KEEP_PROBS, 1, 5, 6, scope="microbatch", sampler=sampler)
    assert as_text(whole) == as_text(rows)[:1] * 6
    assert len(set(as_text(rows))) > 1


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("scope", ["iteration", "microbatch"])
def test_a_row_does_not_depend_on_the_number_of_microbatches(sampler, scope):
    few = draw_plan(KEEP_PROBS, 3, 9, 2, scope=scope, sampler=sampler)
    many = draw_plan(KEEP_PROBS, 3, 9, 50, scope=scope, sampler=sampler)
    np.testing.assert_array_equal(few, many[:2])


def test_a_bernoulli_decision_does_not_depend_on_other_layers():
    others = KEEP_PROBS.copy()
    others[5:] = 0.5
    kept = draw_plan(KEEP_PROBS, 3, 9, 100, scope="microbatch")
    np.testing.assert_array_equal(kept[:, :5], draw_plan(others, 3, 9, 100, scope="microbatch")[:, :5])
    np.testing.assert_array_equal(kept[:, :5], draw_plan(KEEP_PROBS[:5], 3, 9, 100, scope="microbatch"))


def test_a_higher_keep_probability_never_drops_what_a_lower_one_keeps():
    low = draw_plan(np.full(24, 0.5), 3, 9, 100, scope="microbatch")
    high = draw_plan(np.full(24, 0.6), 3, 9, 100, scope="microbatch")
    assert np.all(high[low])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_seed_iteration_and_microbatch_each_change_the_decisions(sampler):
    def draw(seed, iteration):
        return as_text(draw_plan(np.full(40, 0.5), seed, iteration, 4, scope="microbatch", sampler=sampler))

    seeds = [0, 1, 1 << 32, MAX_SEED]
    rows = [row for seed in seeds for iteration in (1, 2, 3) for row in draw(seed, iteration)]
    assert len(set(rows)) == len(rows)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_keep_probability_one_always_keeps_and_zero_always_drops(sampler):
    keep_probs = np.array([1.0, 0.0, 0.3, 1.0, 0.0, 0.7, 1.0, 1.0 / 3.0, 1.0])
    kept = draw_plan(keep_probs, 11, 1, 20_000, scope="microbatch", sampler=sampler)
    assert kept[:, keep_probs == 1.0].all()
    assert not kept[:, keep_probs == 0.0].any()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_drop_rates_over_iterations_pass_a_binomial_test(sampler):
    kept = np.stack([draw_plan(KEEP_PROBS, 20, t, 1, sampler=sampler)[0] for t in range(1, 3001)])
    for layer, keep_prob in enumerate(KEEP_PROBS):
        assert binomtest(int(kept[:, layer].sum()), len(kept), keep_prob).pvalue > 1e-4, f"layer {layer + 1}"


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_drop_rates_over_microbatches_pass_a_binomial_test(sampler):
    kept = draw_plan(KEEP_PROBS, 21, 1, 100_000, scope="microbatch", sampler=sampler)
    for layer, keep_prob in enumerate(KEEP_PROBS):
        assert binomtest(int(kept[:, layer].sum()), len(kept), keep_prob).pvalue > 1e-4, f"layer {layer + 1}"


def test_bernoulli_draws_of_different_layers_and_iterations_are_uncorrelated():
    signs = np.concatenate([draw_plan(np.full(16, 0.5), 5, t, 1) for t in range(8000)]) * 2.0 - 1.0
    between_layers = (signs.T @ signs / len(signs))[np.triu_indices(16, k=1)]
    between_iterations = signs[1:].T @ signs[:-1] / len(signs)
    for correlations in (between_layers, between_iterations):
        statistic = len(signs) * (correlations**2).sum()
        assert chi2.sf(statistic, df=correlations.size) > 1e-4


def test_the_balanced_samplers_marginals_are_exact():
    # Over all 8 offsets of keep probabilities that are multiples of 1/8, each layer is kept exactly 8 keep_prob times.
    eighths = np.array([8, 3, 0, 5, 1, 8, 7, 2, 6, 4])
    unit = plan._ONE // 8
    for order in (np.arange(10), np.random.default_rng(0).permutation(10)):
        lengths = np.broadcast_to(eighths[order] * unit, (8, 10))
        kept = plan._sample_systematically(lengths, np.arange(8)[:, None] * unit)
        np.testing.assert_array_equal(kept.sum(axis=0), eighths[order])


STAGE_LISTS = [None, 1, 4, [[1, 2, 3, 13, 14, 15], [4, 5, 6, 16, 17, 18], [7, 8, 9, 19], [10, 11, 12, 20], []]]


@pytest.mark.parametrize("stages", STAGE_LISTS)
def test_every_balanced_draw_keeps_a_stages_expectation_give_or_take_less_than_one(stages):
    keep_probs = np.random.default_rng(1).uniform(size=20)
    kept = draw_plan(keep_probs, 4, 2, 5000, scope="microbatch", sampler="balanced", stages=stages)
    stage_of_layer = plan._stage_of_layer(stages, 20)
    for stage in range(stage_of_layer.max() + 1):
        members = stage_of_layer == stage
        counts = kept[:, members].sum(axis=1)
        assert np.all(np.abs(counts - keep_probs[members].sum()) < 1.0)
        assert len(set(counts)) == 2, "a fractional expectation needs both neighbours"


@st.composite
def stages_and_keep_probs(draw):
    """Keep probabilities of every kind, 0 and 1 and awkward fractions among them, and a spread over stages."""
    some = st.sampled_from([0.0, 1.0, 0.5, 0.1, 1 / 3, 1e-9, 1 - 1e-9])
    keep_probs = draw(st.lists(st.floats(0.0, 1.0) | some, min_size=1, max_size=40))
    stage_of_layer = draw(st.lists(st.integers(0, 5), min_size=len(keep_probs), max_size=len(keep_probs)))
    layers = enumerate(stage_of_layer, start=1)
    by_stage = [[], [], [], [], [], []]
    for layer, stage in layers:
        by_stage[stage].append(layer)
    return keep_probs, by_stage


@settings(max_examples=200, deadline=None)
@given(drawn=stages_and_keep_probs(), seed=st.integers(0, MAX_SEED), iteration=st.integers(0, 2**32 - 1))
def test_no_stage_ever_keeps_one_layer_more_or_less_than_it_expects(drawn, seed, iteration):
    keep_probs, stages = drawn
    for scope, replica in (("iteration", 0), ("microbatch", 0), ("microbatch", 3)):
        kept = draw_plan(keep_probs, seed, iteration, 32, scope, "balanced", stages, replica)
        for stage in stages:
            members = np.array(stage, dtype=int) - 1
            expected = sum(Fraction(keep_probs[layer - 1]) for layer in stage)
            # Probabilities are rounded to the sampler's fixed point; nothing else is.
            slack = Fraction(len(keep_probs), 2 * plan._ONE)
            assert {int(count) for count in kept[:, members].sum(axis=1)} <= {
                count for count in range(len(stage) + 1) if abs(count - expected) < 1 + slack
            }


@settings(max_examples=25, deadline=None)
@given(drawn=stages_and_keep_probs(), seed=st.integers(0, MAX_SEED))
def test_the_balanced_sampler_keeps_every_layers_probability_whatever_the_stages(drawn, seed):
    keep_probs, stages = drawn
    rows = 4000
    shares = draw_plan(keep_probs, seed, 1, rows, "microbatch", "balanced", stages).mean(axis=0)
    deviation = np.sqrt(np.array(keep_probs) * (1 - np.array(keep_probs)) / rows)
    np.testing.assert_array_less(np.abs(shares - keep_probs), 6 * deviation + 6 / rows)


def test_a_stage_whose_expectation_is_whole_keeps_exactly_that_many():
    kept = draw_plan(np.full(24, 0.75), 4, 2, 2000, scope="microbatch", sampler="balanced", stages=6)
    assert np.all(kept.reshape(2000, 6, 4).sum(axis=2) == 3)


def test_balanced_draws_know_more_patterns_than_two():
    kept = draw_plan(np.full(8, 0.5), 4, 2, 2000, scope="microbatch", sampler="balanced")
    assert len(set(as_text(kept))) == 70  # all choices of 4 of 8


def test_replicas_keep_as_many_layers_on_each_stage_but_different_ones():
    keep_probs = np.random.default_rng(2).uniform(size=24)
    stages = [[*range(1, 4), *range(13, 19)], list(range(4, 13)), list(range(19, 25))]
    plans = [
        draw_plan(keep_probs, 6, 3, 1000, scope="microbatch", sampler="balanced", stages=stages, replica=replica)
        for replica in (0, 1, 2, 63)
    ]
    for other in plans[1:]:
        assert (other != plans[0]).any(axis=1).mean() > 0.9
        for stage in stages:
            members = np.array(stage) - 1
            np.testing.assert_array_equal(other[:, members].sum(axis=1), plans[0][:, members].sum(axis=1))


@pytest.mark.parametrize("replica", [1, 7])
def test_every_replica_keeps_the_marginals(replica):
    kept = draw_plan(KEEP_PROBS, 8, 1, 50_000, scope="microbatch", sampler="balanced", stages=2, replica=replica)
    for layer, keep_prob in enumerate(KEEP_PROBS):
        assert binomtest(int(kept[:, layer].sum()), len(kept), keep_prob).pvalue > 1e-4


def test_the_order_of_layers_within_a_stage_list_does_not_matter():
    forward = draw_plan(KEEP_PROBS[:4], 1, 1, 50, "microbatch", "balanced", stages=[[1, 2], [3, 4]])
    backward = draw_plan(KEEP_PROBS[:4], 1, 1, 50, "microbatch", "balanced", stages=[[2, 1], [4, 3]])
    np.testing.assert_array_equal(forward, backward)


@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.int32, np.int64, np.uint64])
def test_numpys_integers_are_the_same_numbers(kind):
    """Of a loop's own: small ones overflow where Python's do not."""
    seed, iteration, replica = kind(5), kind(3), kind(1)
    balanced = {"sampler": "balanced", "stages": 2}
    plan = draw_plan([0.5] * 4, seed, iteration, kind(2), replica=replica, **balanced)
    np.testing.assert_array_equal(plan, draw_plan([0.5] * 4, 5, 3, 2, replica=1, **balanced))
    counts = draw_sample_counts([0.5] * 4, kind(3), seed, iteration, kind(2))
    np.testing.assert_array_equal(counts, draw_sample_counts([0.5] * 4, 3, 5, 3, 2))
    samples = draw_samples(counts, kind(3), seed, iteration, replica=replica)
    np.testing.assert_array_equal(samples, draw_samples(counts, 3, 5, 3, replica=1))


def test_a_model_of_one_layer_is_drawn():
    for sampler in SAMPLERS:
        assert 0 < draw_plan([0.5], 1, 1, 200, scope="microbatch", sampler=sampler).sum() < 200


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keep_probs": []}, "keep_probs has shape"),
        ({"keep_probs": [[0.5]]}, "keep_probs has shape"),
        ({"keep_probs": [0.5, 0.5, float("nan"), 0.5]}, "layer 3 = .*nan"),
        ({"keep_probs": [0.5, 1.0000001, 0.5, 0.5]}, "layer 2 = .*1.0000001"),
        ({"keep_probs": [-1e-9, 0.5, 0.5, 0.5]}, "layer 1 = "),
        ({"seed": -1}, "^seed = -1"),
        ({"seed": 2**63}, "^seed = "),
        ({"seed": 1.0}, r"^seed = 1\.0"),
        ({"iteration": -1}, "^iteration = -1"),
        ({"iteration": 2**32}, "^iteration = "),
        ({"num_microbatches": 0}, "^num_microbatches = 0"),
        ({"scope": "step"}, "^scope = 'step' .*iteration, microbatch"),
        ({"sampler": "uniform"}, "^sampler = 'uniform' .*bernoulli, balanced"),
        ({"sampler": "bernoulli", "stages": 2}, "does not use stages = 2"),
        ({"sampler": "bernoulli", "replica": 1}, "or replica = 1"),
        ({"replica": -1}, "^replica = -1"),
        ({"replica": 2**24}, "^replica = "),
        ({"stages": 3}, "stages = 3 .*4 layers are not divisible"),
        ({"stages": 0}, "^stages = 0"),
        ({"stages": 8}, "^stages = 8"),
        ({"stages": [[1, 2], [3]]}, r"leave out layers \[4\]"),
        ({"stages": [[1, 2], [2, 3, 4]]}, "only once"),
        ({"stages": [[0, 1], [2, 3, 4]]}, "stages entry = 0"),
        ({"stages": [1, 2, 3, 4]}, "list of layers for each stage"),
    ],
)
def test_arguments_that_make_no_plan_are_refused_by_name(change, message):
    good = {"keep_probs": [0.5] * 4, "seed": 1, "iteration": 1, "num_microbatches": 2, "sampler": "balanced"}
    draw_plan(**good)
    with pytest.raises(ValueError, match=message):
        draw_plan(**{**good, **change})
