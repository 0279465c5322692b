"""benchmarks/bucket_model.py: which buckets can be skipped, how often, and what of their reduction is exposed."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.bucket_model import (
    SHAPES,
    Bucket,
    Speeds,
    cut_at_layers,
    default_bucket_size,
    exposed_time,
    make_buckets,
    parameters,
    saved_bytes,
    saved_share,
    skip_probabilities,
    skipped,
)
from megatron_sbld.method.decisions import draw_plan

# Two layers of 10 and 20 values, an embedding of 5 and a final norm of 1, each with one parameter.
PARAMS = [(5, 0), (10, 1), (20, 2), (1, 3)]
BY_OWNER = [
    Bucket(1, frozenset({3})),
    Bucket(20, frozenset({2})),
    Bucket(10, frozenset({1})),
    Bucket(5, frozenset({0})),
]
SPEED = Speeds(layer_backward=10.0, logits_backward=4.0, second_per_value=1.0)


def kept(*rows: tuple[int, ...]) -> np.ndarray:
    return np.array(rows, dtype=bool)


@pytest.mark.parametrize(("shape", "millions"), [(SHAPES[0], 357), (SHAPES[1], 1652)])
def test_the_papers_shapes_have_the_number_of_parameters_in_their_names(shape, millions):
    assert sum(size for size, _ in parameters(shape)) == pytest.approx(1e6 * millions, rel=0.005)


def test_tensor_parallel_ranks_hold_their_share():
    (half,) = (shape for shape in SHAPES if shape.tensor_parallel == 2)
    assert 2 * sum(size for size, _ in parameters(half)) == pytest.approx(3.57e9, rel=0.01)


def test_the_default_bucket_grows_with_data_parallelism_from_41_replicas_on():
    assert [default_bucket_size(size) for size in (2, 40, 64)] == [40_000_000, 40_000_000, 64_000_000]


def test_buckets_are_filled_from_the_last_parameter_to_the_first():
    assert make_buckets(PARAMS, 20) == [Bucket(21, frozenset({2, 3})), Bucket(15, frozenset({0, 1}))]
    assert make_buckets(PARAMS, 21) == [Bucket(21, frozenset({2, 3})), Bucket(15, frozenset({0, 1}))]
    assert make_buckets(PARAMS, 1000) == [Bucket(36, frozenset({0, 1, 2, 3}))]


def test_cut_at_layers_each_owner_has_a_bucket():
    assert cut_at_layers(PARAMS) == BY_OWNER


def test_a_bucket_is_skipped_when_all_of_its_layers_are_dropped_and_nothing_else_is_in_it():
    buckets = [Bucket(1, frozenset({1, 2})), Bucket(1, frozenset({2})), Bucket(1, frozenset({2, 3}))]
    assert skip_probabilities(buckets, np.array([0.9, 0.6])) == pytest.approx([0.1 * 0.4, 0.4, 0.0])
    rows = skipped(buckets, kept((1, 1), (1, 0), (0, 0)))
    assert rows.tolist() == [[False, False, False], [False, True, False], [True, True, False]]


def test_the_share_of_bytes_is_what_draws_skip_on_average():
    keep_probs = np.array([0.7, 0.5])
    drawn = np.concatenate([draw_plan(keep_probs, 1, t, 1) for t in range(1, 2001)])
    sizes = np.array([bucket.size for bucket in BY_OWNER])
    assert (skipped(BY_OWNER, drawn) @ sizes).mean() / sizes.sum() == pytest.approx(
        saved_bytes(BY_OWNER, keep_probs), abs=0.02
    )


def test_a_reduction_starts_when_its_owners_are_done_and_the_one_before_is():
    # Backward: norm until 4, layer 2 until 14, layer 1 and embedding until 24. Reductions: norm 4-5, layer 2 14-34,
    # layer 1 34-44, embedding 44-49.
    assert exposed_time(BY_OWNER, kept((1, 1)), SPEED) == pytest.approx([49 - 24])


def test_dropped_layers_leave_less_backward_pass_to_hide_behind_and_skipped_ones_fewer_bytes():
    rows = kept((1, 0))  # backward: norm and layer 2 until 4, the rest until 14
    assert exposed_time(BY_OWNER, rows, SPEED) == pytest.approx([(5 + 20 + 10 + 5) - 14])
    assert exposed_time(BY_OWNER, rows, SPEED, skipped(BY_OWNER, rows)) == pytest.approx([(14 + 10 + 5) - 14])


def test_what_is_hidden_anyway_is_not_saved():
    fast = Speeds(layer_backward=10.0, logits_backward=4.0, second_per_value=0.01)
    exposed, saved = saved_share(BY_OWNER, kept((1, 0)), fast, num_microbatches=1)
    assert exposed == pytest.approx(0.15 / (1.5 * 14 + 0.15))  # layer 1 and the embedding, after the last pass
    assert saved == pytest.approx(0)


def test_more_microbatches_make_an_exposed_reduction_a_smaller_share():
    one, four = (saved_share(BY_OWNER, kept((1, 0)), SPEED, number) for number in (1, 4))
    assert one == pytest.approx((26 / (1.5 * 14 + 26), 11 / (1.5 * 14 + 26)))
    assert four == pytest.approx((26 / (4 * 1.5 * 14 + 26), 11 / (4 * 1.5 * 14 + 26)))
