"""1,000 random drop sections either are refused with a clear message or draw valid plans."""

import re
import warnings
from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from megatron_sbld.method.build import build_policy
from megatron_sbld.method.config import DropConfig, drop_field_names
from megatron_sbld.method.decisions import draw_plan, draw_sample_counts
from megatron_sbld.method.validate import validate_drop
from megatron_sbld.sensitivity.file import SensitivityFile

SHARES = st.floats(0, 1)
THETAS = st.floats(0.05, 1)
LAYERS = st.lists(st.integers(1, 16), max_size=3)
IN_RANGE = {
    "theta": THETAS,
    "a": st.floats(0, 5),
    "b": st.floats(1, 1e7),
    "c": st.floats(0, 5),
    "epsilon": st.floats(-10, 1000),
    "eta": st.floats(0, 1e6),
    "peak_iteration": st.floats(1, 1e6),
    "peak_theta": THETAS,
    "gamma": st.floats(1e-6, 1),
    "start_theta": THETAS,
    "duration": st.floats(1, 1e6),
    "power": st.floats(0.1, 10),
    "alpha": st.floats(0, 2),
    "beta": st.floats(0, 2),
    "theta_min": st.floats(0, 0.6),
    "theta_max": st.floats(0.5, 1),
    "block_layers": LAYERS,
    "block_fraction": SHARES,
    "allow_layers": LAYERS,
    "allow_fraction": SHARES,
    "allow_keep_prob": SHARES,
    "recovery_fraction": SHARES,
    "sensitivity_update": st.just("dynamic"),
    "update_interval": st.integers(1, 10**6),
    "update_memory": st.integers(10, 10**6),
    "exploration": st.floats(0, 0.49),
    "release_block": st.booleans(),
    "residual_scale": st.sampled_from(["none", "inverse_keep_prob"]),
    "decision_scope": st.sampled_from(["iteration", "microbatch"]),
    "granularity": st.sampled_from(["layer", "sample", "token"]),
    "token_layers": LAYERS,
    "min_tokens": st.sampled_from([16, 32, 40]),
    "token_step": st.sampled_from([8, 16]),
    "token_strata": st.integers(1, 8),
    "sampler": st.sampled_from(["bernoulli", "balanced"]),
    "balance_stages": st.integers(1, 8),
    "replicas": st.sampled_from(["shared", "distinct"]),
    "seed": st.integers(0, 2**63 - 1),
}
ANYTHING = st.one_of(
    st.floats(allow_nan=True, allow_infinity=True),
    st.integers(-(10**400), 10**400),
    st.text(max_size=5),
    st.booleans(),
    st.none(),
    st.lists(st.integers(-2, 20), max_size=3),
)
NAMES = drop_field_names()


@st.composite
def sections(draw):
    """Fields of a section that differ from the defaults: some in their range, now and then one of any value."""
    fields = {
        "policy": draw(st.sampled_from(["none", "sbld", "pld", "layerdrop", "stochastic_depth"])),
        "schedule": draw(st.sampled_from([None, None, "pwegd", "exponential", "linear", "polynomial", "constant"])),
        "sensitivity": "sensitivity.json",
    }
    for name in draw(st.lists(st.sampled_from(sorted(IN_RANGE)), max_size=6, unique=True)):
        fields[name] = draw(IN_RANGE[name])
    if draw(st.integers(0, 9)) == 0:
        fields[draw(st.sampled_from(NAMES))] = draw(ANYTHING)
    return fields


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder with a sensitivity file for each number of layers from 2 to 16."""
    root = tmp_path_factory.mktemp("sensitivities")
    for num_layers in range(2, 17):
        (root / str(num_layers)).mkdir()
        gap = np.random.default_rng(num_layers).normal(size=num_layers).tolist()
        measured = SensitivityFile.from_gaps(gap, [0.1] * num_layers, {"command": "test"})
        measured.save(root / str(num_layers) / "sensitivity.json")
    return root


def assert_names_what_is_wrong(message):
    named = re.findall(r"drop\.([a-z_]+)", message)
    assert named or message.startswith("pipeline stages = "), message
    assert set(named) <= set(NAMES), message


def assert_draws_valid_plans(config, policy, num_layers, train_iters, num_stages):
    balanced = config.sampler == "balanced"
    for iteration in {1, train_iters // 2 + 1, train_iters}:
        keep_probs = policy.keep_probs(iteration)
        assert keep_probs.shape == (num_layers,)
        assert np.all((keep_probs >= 0) & (keep_probs <= 1))
        assert np.isfinite(policy.theta(iteration))
        arguments = {
            "seed": config.seed,
            "iteration": iteration,
            "num_microbatches": 3,
            "scope": config.decision_scope,
            "sampler": config.sampler,
            "stages": (config.balance_stages or num_stages) if balanced else None,
        }
        if config.granularity == "sample":
            counts = draw_sample_counts(keep_probs, 4, **arguments)
            assert counts.shape == (3, num_layers)
            assert np.all(np.abs(counts - 4 * keep_probs) < 1)
            continue
        kept = draw_plan(keep_probs, **arguments, replica=2 if config.replicas == "distinct" else 0)
        assert kept.shape == (3, num_layers)
        assert kept.dtype == np.bool_
        assert kept[:, keep_probs == 1].all()
        assert not kept[:, keep_probs == 0].any()


def test_a_thousand_random_sections_are_refused_by_name_or_draw_valid_plans(folders):
    outcomes = Counter()

    @seed(20240229)
    @settings(max_examples=1000, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(sections(), st.integers(2, 16), st.integers(1, 10**6), st.integers(1, 4))
    def check(fields, num_layers, train_iters, num_stages):
        config = DropConfig(**fields)
        try:
            validate_drop(config, num_layers, train_iters, num_stages)
            policy = build_policy(config, num_layers, train_iters, folders / str(num_layers))
        except ValueError as error:
            assert_names_what_is_wrong(str(error))
            outcomes["refused"] += 1
            return
        if config.policy != "none":
            assert_draws_valid_plans(config, policy, num_layers, train_iters, num_stages)
        outcomes[config.policy] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        warnings.simplefilter("error", RuntimeWarning)
        check()
    # Enough of each kind, or the test would say little.
    assert sum(outcomes.values()) >= 1000
    assert all(outcomes[kind] >= 30 for kind in ("refused", "none", "sbld", "pld", "layerdrop", "stochastic_depth"))
