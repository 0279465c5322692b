from pathlib import Path

import numpy as np
import pytest

from megatron_sbld.data.dataset_files import SPLITS, DatasetWriter, read_metadata, split_prefix, verify_dataset


@pytest.fixture
def prepared(tmp_path):
    output = str(tmp_path / "out")
    with DatasetWriter(output, SPLITS, np.uint16, overwrite=False) as writer:
        for length in range(2, 11):
            writer.add("train", np.arange(length))
        writer.add("valid", np.arange(3))
        writer.commit({"tokenizer": "none, for this test"})
    return split_prefix(output, "train")


def test_a_whole_set_is_described(prepared):
    facts = verify_dataset(prepared)
    assert (facts.sequences, facts.tokens, facts.dtype) == (9, 54, np.uint16)
    assert read_metadata(prepared)["tokenizer"] == "none, for this test"
    assert read_metadata("elsewhere_train") is None


def test_a_truncated_bin_is_refused_with_both_sizes(prepared):
    path = Path(f"{prepared}.bin")
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(
        ValueError, match=rf"out_train\.bin: cut short or damaged: expected {size} bytes, found {size - 2}"
    ):
        verify_dataset(prepared)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: b"", "not an index of a Megatron data set"),
        (lambda content: b"{}" + content[2:], "not an index of a Megatron data set"),
        (lambda content: content[:9] + b"\x02" + content[10:], "expected 1 as its version, found 2"),
        (lambda content: content[:17] + b"\x09" + content[18:], "unknown type of token ids"),
        (lambda content: content[:-1], r"expected \d+ bytes, found \d+"),
        (lambda content: content[:18] + b"\xff" * 8 + content[26:], "cut short or damaged"),
        (lambda content: content[:34] + b"\x01\0\0\0" + content[38:], r"out_train\.bin: cut short or damaged"),
        (lambda content: content[:-8] + b"\0" * 8, "documents do not cover"),
        (lambda content: content[:-16] + b"\xff" * 8 + content[-8:], "documents do not cover"),
        # The position of the third of 9 sequences: header of 34 bytes, 9 lengths, 2 positions.
        (lambda content: content[:86] + b"\x01" + content[87:], "positions of its sequences contradict"),
    ],
)
def test_a_damaged_index_is_refused(prepared, damage, message):
    path = Path(f"{prepared}.idx")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=message):
        verify_dataset(prepared)


def test_a_sound_index_is_checked_in_parts(prepared, monkeypatch):
    whole = verify_dataset(prepared)
    for at_once in (1, 2, 8, 9):
        monkeypatch.setattr("megatron_sbld.data.dataset_files._CHECKED_AT_ONCE", at_once)
        assert verify_dataset(prepared) == whole


def test_a_prefix_given_with_its_suffix_is_refused_with_a_hint(prepared):
    with pytest.raises(ValueError, match=r"give the prefix without \.bin or \.idx"):
        verify_dataset(f"{prepared}.bin")


def test_damaged_metadata_is_refused_and_other_json_files_are_none_of_ours(prepared, tmp_path):
    path = tmp_path / "out.json"
    path.write_text(path.read_text()[:-20])
    with pytest.raises(ValueError, match=r"out\.json: damaged metadata"):
        read_metadata(prepared)
    path.write_text('{"text": "the source of a set that Megatron-LM prepared"}\n')
    assert read_metadata(prepared) is None


def test_two_processes_cannot_write_the_same_output_at_once(prepared, tmp_path):
    arguments = (str(tmp_path / "out"), SPLITS, np.uint16, True)
    with DatasetWriter(*arguments), pytest.raises(ValueError, match="another process is writing it"):
        with DatasetWriter(*arguments):
            pass
    assert not (tmp_path / ".out.partial").exists()
    verify_dataset(prepared)


def test_a_folder_as_output_is_refused(tmp_path):
    for output in (str(tmp_path), f"{tmp_path}/new/"):
        with pytest.raises(ValueError, match="is a folder"):
            DatasetWriter(output, SPLITS, np.uint16, overwrite=True)
