"""The sensitivity file and the rule of the Block and Allow lists (docs/method.md 2)."""

import doctest
import json

import numpy as np
import pytest

import megatron_sbld.sensitivity.file
import megatron_sbld.sensitivity.lists
from megatron_sbld.sensitivity.file import FORMAT, SensitivityFile, normalise
from megatron_sbld.sensitivity.lists import choose_lists

GAP = [0.05, -0.02, 0.01, 0.4, 0.0, 0.1, 0.02, 0.3]
STDERR = [0.01] * 8


@pytest.fixture
def measured():
    return SensitivityFile.from_gaps(GAP, STDERR, {"command": "test"}, block_fraction=0.25, allow_fraction=0.375)


@pytest.mark.parametrize("module", [megatron_sbld.sensitivity.file, megatron_sbld.sensitivity.lists])
def test_examples_in_the_docstrings_hold(module):
    results = doctest.testmod(module)
    assert results.attempted > 0
    assert results.failed == 0


def test_normalise_maps_the_gaps_to_zero_and_one():
    assert normalise([2.0, -2.0, 0.0, 1.0]).tolist() == [1.0, 0.0, 0.5, 0.75]
    for gap in ([0.1, 0.1, 0.1], [0.1]):
        with pytest.raises(ValueError, match="equal gaps say nothing"):
            normalise(gap)
    for gap in ([0.1, float("nan")], []):
        with pytest.raises(ValueError, match="must be finite"):
            normalise(gap)


def test_block_takes_the_largest_gaps_and_allow_the_smallest_that_do_not_hurt():
    assert choose_lists(GAP, STDERR, 0.25, 0.375) == ((4, 8), (2, 3, 5))
    # Layer 7 is among the four smallest, but 0.021 is more than two standard errors above 0.
    gap = [*GAP[:6], 0.021, GAP[7]]
    assert choose_lists(gap, STDERR, 0.25, 0.5) == ((4, 8), (2, 3, 5))
    assert choose_lists(gap, [0.02] * 8, 0.25, 0.5) == ((4, 8), (2, 3, 5, 7))


def test_a_gap_of_exactly_two_standard_errors_is_not_significant():
    assert choose_lists([0.5, 0.25], [0.1, 0.125], 0.0, 0.5) == ((), (2,))


@pytest.mark.parametrize(
    ("num_layers", "fraction", "count"),
    [(20, 0.15, 3), (24, 0.15, 3), (30, 0.15, 4), (100, 0.29, 29), (10, 0.7, 7), (6, 0.15, 0), (10, 0.0, 0)],
)
def test_fractions_are_floored_but_for_rounding_error(num_layers, fraction, count):
    gap = np.linspace(-1.0, 0.0, num_layers)
    assert len(choose_lists(gap, np.ones(num_layers), fraction, 0.0)[0]) == count
    assert len(choose_lists(gap, np.ones(num_layers), 0.0, fraction)[1]) == count


def test_equal_gaps_are_taken_in_the_order_of_the_layers_and_never_twice():
    assert choose_lists([0.0] * 6, [1.0] * 6, 0.5, 0.5) == ((1, 2, 3), (4, 5, 6))
    assert choose_lists([1.0, 0.0, 1.0, 0.0, 1.0], [1.0] * 5, 0.4, 0.2) == ((1, 3), (2,))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gap_stderr": [0.1]}, "must be \\[num_layers\\]"),
        ({"gap": [], "gap_stderr": []}, "must be \\[num_layers\\]"),
        ({"gap": [0.1, float("nan")]}, "must be finite"),
        ({"gap_stderr": [0.1, -0.1]}, "not negative"),
        ({"block_fraction": 1.1}, r"^block_fraction = 1\.1"),
        ({"allow_fraction": -0.1}, r"^allow_fraction = -0\.1"),
        ({"block_fraction": 1.0, "allow_fraction": 0.5}, "ask for 2 and 1 of 2 layers"),
    ],
)
def test_the_rule_refuses_what_it_cannot_choose_from(arguments, message):
    with pytest.raises(ValueError, match=message):
        choose_lists(**{"gap": [0.1, 0.2], "gap_stderr": [0.1, 0.1], **arguments})


def test_interpolation_is_linear_in_the_relative_depth_and_holds_the_ends():
    measured = SensitivityFile.from_gaps([0.4, 0.0, 0.2, 0.8], [0.04, 0.0, 0.02, 0.08], {"command": "test"})
    deeper = measured.interpolated(8)
    # Layer l of 8 lies at (l - 0.5) / 8, a quarter of a measured layer's depth beside one of the four.
    expected = np.array([0.4, 0.3, 0.1, 0.05, 0.15, 0.35, 0.65, 0.8])
    np.testing.assert_allclose(deeper.gap, expected, atol=1e-12)
    np.testing.assert_allclose(deeper.gap_stderr, expected / 10, atol=1e-12)
    np.testing.assert_allclose(deeper.sensitivity, normalise(expected), atol=1e-12)
    assert (deeper.block, deeper.allow) == choose_lists(deeper.gap, deeper.gap_stderr)
    assert deeper.measured_with == {"command": "test", "interpolated_from_num_layers": 4}
    np.testing.assert_allclose(measured.interpolated(2).gap, [0.2, 0.5], atol=1e-12)


def test_interpolation_to_the_same_depth_changes_nothing(measured):
    assert measured.interpolated(8) is measured


@pytest.mark.parametrize(
    ("num_layers", "message"), [(0, "num_layers = 0"), (1, "equal gaps"), (2.5, "num_layers = 2.5")]
)
def test_interpolation_to_no_depth_is_refused(measured, num_layers, message):
    with pytest.raises(ValueError, match=message):
        measured.interpolated(num_layers)


def test_a_saved_file_is_loaded_as_it_was(measured, tmp_path):
    path = tmp_path / "sensitivity.json"
    measured.save(path)
    assert SensitivityFile.load(path) == measured
    assert list(json.loads(path.read_text())) == [
        *("format", "num_layers", "gap", "gap_stderr", "sensitivity", "block", "allow", "measured_with")
    ]
    assert [entry.name for entry in tmp_path.iterdir()] == ["sensitivity.json"]


def test_a_failed_save_leaves_the_old_file_and_nothing_else(measured, tmp_path, monkeypatch):
    path = tmp_path / "sensitivity.json"
    path.write_text("old")

    def disk_full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", disk_full)
    with pytest.raises(OSError, match="No space left"):
        measured.save(path)
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["sensitivity.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, f"format = 'other' .*{FORMAT}"),
        ({"format": None}, "format = None"),
        ({"gap": None}, "gap = None .*must be a list"),
        ({"gap": GAP[:7]}, "gap has 7 values for num_layers = 8"),
        ({"num_layers": 9}, "values for num_layers = 9"),
        ({"num_layers": 8.0}, r"num_layers = 8\.0"),
        ({"num_layers": 0}, "num_layers = 0"),
        ({"gap": [*GAP[:7], float("nan")]}, "gap of layer 8 = nan"),
        ({"gap": [*GAP[:7], "0.3"]}, "gap of layer 8 = '0.3'"),
        ({"gap": [*GAP[:7], 10**400]}, "gap of layer 8 = 1000"),
        ({"gap": [0.1] * 8}, "equal gaps say nothing"),
        ({"gap_stderr": [*STDERR[:7], -0.1]}, r"gap_stderr of layer 8 = -0\.1"),
        ({"sensitivity": [0.0] * 7 + [1.0]}, "sensitivity does not follow from gap"),
        ({"sensitivity": [0.0] * 7 + [1.5]}, r"sensitivity of layer 8 = 1\.5"),
        ({"block": [9]}, "block entry = 9"),
        ({"allow": [0]}, "allow entry = 0"),
        ({"block": [1, 1]}, "only once"),
        ({"block": [1], "allow": [1]}, r"both have \[1\]"),
        ({"measured_with": "me"}, "measured_with = 'me'"),
        ({"extra": 1}, r"unknown keys: \['extra'\]"),
    ],
)
def test_a_wrong_file_is_refused_with_its_path_and_its_mistake(change, message, measured, tmp_path):
    path = tmp_path / "sensitivity.json"
    measured.save(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=rf"sensitivity\.json.*{message}"):
        SensitivityFile.load(path)


def test_missing_keys_are_named(measured, tmp_path):
    path = tmp_path / "sensitivity.json"
    path.write_text(json.dumps({"format": FORMAT, "num_layers": 8}))
    with pytest.raises(ValueError, match=r"missing keys: \['allow', 'block', 'gap'"):
        SensitivityFile.load(path)


@pytest.mark.parametrize("content", [b"", b"[1, 2]", b"null", b"\xff\xfe\x00", b"{]"])
def test_what_is_no_sensitivity_file_is_refused_with_its_path(content, tmp_path):
    path = tmp_path / "sensitivity.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"sensitivity\.json"):
        SensitivityFile.load(path)


def test_a_truncated_file_is_refused_wherever_it_ends(measured, tmp_path):
    path = tmp_path / "sensitivity.json"
    measured.save(path)
    whole = path.read_bytes().rstrip()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"sensitivity\.json is not valid JSON \(truncated\?\)"):
            SensitivityFile.load(path)


def test_a_missing_file_is_refused_with_its_path(tmp_path):
    with pytest.raises(ValueError, match=r"absent\.json cannot be read: No such file"):
        SensitivityFile.load(tmp_path / "absent.json")
