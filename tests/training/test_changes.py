"""What a resumed run was given otherwise is kept in its folder, for the iterations that it holds for."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_sbld.checkpoint.resume import Change
from megatron_sbld.training.changes import CHANGES_FILE, SettingChange, read_changes, record_changes

RATE = Change("optimizer.lr", 0.1, 0.2)
DATA = Change("data.train_data_path", ["a"], ["b", "c"])


def test_changes_are_read_back_in_order(tmp_path: Path) -> None:
    record_changes(tmp_path, 11, [RATE])
    record_changes(tmp_path, 21, [DATA])
    first, second = read_changes(tmp_path)
    assert first == SettingChange(11, "optimizer.lr", 0.1, 0.2)
    assert first.text == "optimizer.lr was 0.1 up to iteration 10, then 0.2"
    assert second == SettingChange(21, "data.train_data_path", ["a"], ["b", "c"])


def test_changes_of_iterations_that_run_again_are_void(tmp_path: Path) -> None:
    record_changes(tmp_path, 11, [RATE])
    record_changes(tmp_path, 21, [DATA])
    record_changes(tmp_path, 15, [])
    assert [change.iteration for change in read_changes(tmp_path)] == [11]
    record_changes(tmp_path, 11, [])
    assert read_changes(tmp_path) == []


def test_a_run_that_never_changed_has_no_file(tmp_path: Path) -> None:
    idle = Change("drop.balance_stages", 2, None, idle="the balanced sampler keeps the checkpoint's stages")
    record_changes(tmp_path, 11, [Change("model.init_method_std", 0.1, 0.2), idle])
    assert list(tmp_path.iterdir()) == []
    assert read_changes(tmp_path) == []


def test_a_torn_line_is_left_out_and_a_damaged_one_refused(tmp_path: Path) -> None:
    record_changes(tmp_path, 11, [RATE])
    file = tmp_path / CHANGES_FILE
    whole = file.read_text()
    file.write_text(whole + whole[:20])
    assert [change.field for change in read_changes(tmp_path)] == ["optimizer.lr"]
    file.write_text(whole + '{"iteration": 21}\n')
    with pytest.raises(ValueError, match=r"changes\.jsonl is damaged"):
        read_changes(tmp_path)
