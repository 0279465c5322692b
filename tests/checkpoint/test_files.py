"""Checkpoints as files: what counts as complete, which one is found, what is removed."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_sbld.checkpoint import files
from megatron_sbld.checkpoint.files import CheckpointInfo, Layout

LAYOUT = Layout(
    tensor_model_parallel_size=1,
    pipeline_model_parallel_size=2,
    num_virtual_stages_per_pipeline_rank=1,
    context_parallel_size=1,
    data_parallel_size=4,
    optimizer_format="dp_reshardable",
    optimizer_buckets=[[100, 20]],
    precision="bf16",
)


def make(directory: Path, iteration: int, **train_state: object) -> CheckpointInfo:
    """A complete checkpoint with stand-in contents."""
    folder = files.incomplete_path(directory, iteration)
    folder.mkdir(parents=True)
    for name in ("common.pt", ".metadata", "metadata.json", "__0_0.distcp"):
        (folder / name).write_bytes(b"content of " + name.encode())
    return files.publish(directory, iteration, LAYOUT, {"iteration": iteration, **train_state})


def test_a_published_checkpoint_is_found_with_its_train_state_and_layout(tmp_path: Path) -> None:
    info = make(tmp_path, 7, consumed_samples=56, loss=0.1 + 0.2)

    assert info == CheckpointInfo(tmp_path / "iter_0000007", 7)
    assert files.latest_complete(tmp_path) == info
    assert files.verify(info.path).layout == LAYOUT
    assert files.read_train_state(info.path) == {"iteration": 7, "consumed_samples": 56, "loss": 0.1 + 0.2}


def test_the_tracker_is_written_as_megatron_lm_reads_it(tmp_path: Path) -> None:
    make(tmp_path, 7)
    make(tmp_path, 12)

    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "12"


def test_the_highest_iteration_is_the_latest_whatever_the_tracker_says(tmp_path: Path) -> None:
    make(tmp_path, 9_999_999)
    make(tmp_path, 10_000_000)
    (tmp_path / files.TRACKER).write_text("9999999")

    assert files.latest_complete(tmp_path) == CheckpointInfo(tmp_path / "iter_10000000", 10_000_000)


@pytest.mark.parametrize("folder", ["nothing", "."])
def test_without_a_checkpoint_there_is_no_latest_one(tmp_path: Path, folder: str) -> None:
    assert files.latest_complete(tmp_path / folder) is None


def test_an_interrupted_save_is_ignored_and_removed_at_the_next_start(tmp_path: Path) -> None:
    complete = make(tmp_path, 1)
    interrupted = files.incomplete_path(tmp_path, 2)
    interrupted.mkdir()
    (interrupted / "__0_0.distcp").write_bytes(b"half")
    (tmp_path / "notes").mkdir()

    assert files.latest_complete(tmp_path) == complete
    files.remove_incomplete(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["iter_0000001", "notes"]


def test_a_manifest_before_renaming_does_not_make_a_checkpoint(tmp_path: Path) -> None:
    make(tmp_path, 1)
    make(tmp_path, 2).path.rename(files.incomplete_path(tmp_path, 2))

    latest = files.latest_complete(tmp_path)
    assert latest is not None
    assert latest.iteration == 1


def _truncate(path: Path) -> None:
    (path / "__0_0.distcp").write_bytes(b"short")


def _lose_a_file(path: Path) -> None:
    (path / ".metadata").unlink()


def _lose_the_manifest(path: Path) -> None:
    (path / files.MANIFEST).unlink()


def _cut_the_manifest(path: Path) -> None:
    text = (path / files.MANIFEST).read_text()
    (path / files.MANIFEST).write_text(text[: len(text) // 2])


def _edit_manifest(path: Path, **changes: object) -> None:
    content = json.loads((path / files.MANIFEST).read_text())
    (path / files.MANIFEST).write_text(json.dumps({**content, **changes}))


DAMAGES = {
    "truncated": (_truncate, "__0_0.distcp has 5 bytes, but had 23 when it was saved"),
    "file lost": (_lose_a_file, r"\.metadata is missing \(20 bytes when it was saved\)"),
    "other content": (
        lambda path: (path / ".metadata").write_bytes(b"x" * 20),
        r"\.metadata is damaged: its content is not what was saved",
    ),
    "checksums not a table": (lambda path: _edit_manifest(path, sha256=[3]), "malformed"),
    "manifest lost": (_lose_the_manifest, "not a checkpoint of megatron-sbld"),
    "manifest cut": (_cut_the_manifest, "checkpoint.json cannot be read"),
    "manifest of another program": (lambda path: _edit_manifest(path, format="x"), "does not begin with format"),
    "later format": (lambda path: _edit_manifest(path, format_version=2), "format_version is 2; only 1 can be read"),
    "files not a table": (lambda path: _edit_manifest(path, files=3), "malformed"),
    "layout without a size": (lambda path: _edit_manifest(path, layout={}), "malformed.*tensor_model_parallel_size"),
    "train state not a table": (lambda path: _edit_manifest(path, train_state=5), "malformed"),
    "manifest is a list": (lambda path: (path / files.MANIFEST).write_text("[]"), "does not begin with format"),
    "manifest is not text": (lambda path: (path / files.MANIFEST).write_bytes(b"\xff\xfe"), "cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_skipped_with_a_warning_and_refused_by_name(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    inflict, message = DAMAGES[damage]
    before = make(tmp_path, 1)
    damaged = make(tmp_path, 2).path
    inflict(damaged)

    with caplog.at_level(logging.WARNING):
        assert files.latest_complete(tmp_path) == before
    assert str(damaged) in caplog.text
    with pytest.raises(ValueError, match=message) as refusal:
        files.verify(damaged)
    assert str(damaged) in str(refusal.value)


def test_a_checkpoint_of_before_there_were_checksums_is_complete(tmp_path: Path) -> None:
    path = make(tmp_path, 2).path
    content = json.loads((path / files.MANIFEST).read_text())
    assert sorted(content.pop("sha256")) == [".metadata", "common.pt", "metadata.json"]
    (path / files.MANIFEST).write_text(json.dumps(content))
    assert files.verify(path).iteration == 2


def test_a_damaged_checkpoint_is_replaced_when_its_iteration_is_saved_again(tmp_path: Path) -> None:
    _truncate(make(tmp_path, 2).path)

    assert files.latest_complete(tmp_path) is None
    assert make(tmp_path, 2) == files.latest_complete(tmp_path)


def test_pruning_keeps_the_last_ones(tmp_path: Path) -> None:
    newest = [make(tmp_path, iteration) for iteration in (10, 20, 30)][-1]

    files.prune(tmp_path, 2, newest)

    assert sorted(path.name for path in tmp_path.glob("iter_*")) == ["iter_0000020", "iter_0000030"]


def test_pruning_counts_no_damaged_checkpoint_and_never_removes_the_newest(tmp_path: Path) -> None:
    """As after a resume from iteration 10 because 30 was damaged: 30 must not push out the only good ones."""
    make(tmp_path, 10)
    _truncate(make(tmp_path, 30).path)
    newest = make(tmp_path, 20)

    files.prune(tmp_path, 1, newest)

    assert files.latest_complete(tmp_path) == newest
    assert not files.checkpoint_path(tmp_path, 10).exists()
    assert files.checkpoint_path(tmp_path, 30).exists()


def moved(path: Path, storage: Path) -> Path:
    """Move a folder to other storage and leave a link to it; returns where it is now."""
    storage.mkdir(exist_ok=True)
    path.rename(storage / path.name)
    path.symlink_to(storage / path.name)
    return storage / path.name


def test_a_checkpoint_that_is_a_link_is_pruned_by_removing_the_link(tmp_path: Path) -> None:
    directory = tmp_path / "checkpoints"
    there = moved(make(directory, 10).path, tmp_path / "storage")
    newest = make(directory, 20)
    files.prune(directory, 1, newest)

    assert [path.name for path in directory.glob("iter_*")] == ["iter_0000020"]
    assert files.verify(there).iteration == 10
    files.remove_incomplete(directory)


@pytest.mark.parametrize("left", ["to a folder", "to nothing", "a file"])
def test_what_is_in_the_place_of_an_unfinished_or_damaged_checkpoint_is_removed(tmp_path: Path, left: str) -> None:
    """Among them a link that pruning had renamed, after which no run could start."""
    directory, there = tmp_path / "checkpoints", make(tmp_path / "storage", 1).path
    directory.mkdir()
    for path in (files.incomplete_path(directory, 1), files.checkpoint_path(directory, 2)):
        if left == "a file":
            path.write_text("")
        else:
            path.symlink_to(there if left == "to a folder" else tmp_path / "nowhere")
    files.remove_incomplete(directory)
    assert not files.incomplete_path(directory, 1).is_symlink()
    assert make(directory, 2) == files.latest_complete(directory)
    assert not files.checkpoint_path(directory, 2).is_symlink()
    assert files.verify(there).iteration == 1


def test_a_folder_of_checkpoints_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "storage").mkdir()
    (tmp_path / "run").mkdir()
    directory = tmp_path / "run" / "checkpoints"
    directory.symlink_to(tmp_path / "storage")
    newest = [make(directory, iteration) for iteration in (1, 2)][-1]
    files.incomplete_path(directory, 3).mkdir()
    files.remove_incomplete(directory)
    files.prune(directory, 1, newest)
    assert files.find_checkpoint(tmp_path / "run") == newest
    assert sorted(path.name for path in (tmp_path / "storage").glob("iter_*")) == ["iter_0000002"]


def test_a_link_whose_storage_is_not_there_is_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = make(tmp_path / "checkpoints", 10)
    there = moved(make(tmp_path / "checkpoints", 20).path, tmp_path / "storage")
    (tmp_path / "storage").rename(tmp_path / "not mounted")
    with caplog.at_level(logging.WARNING):
        assert files.latest_complete(tmp_path / "checkpoints") == before
    assert f"iter_0000020: it points to {there}, where no folder is" in caplog.text


def test_a_tracker_that_cannot_be_written_loses_no_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / files.TRACKER / "taken").mkdir(parents=True)
    with caplog.at_level(logging.WARNING):
        saved = make(tmp_path, 7)
    assert files.latest_complete(tmp_path) == saved
    assert f"checkpoint {saved.path} is complete, but {files.TRACKER} could not be written" in caplog.text


def test_a_checkpoint_is_found_by_its_own_path_its_folder_or_its_run(tmp_path: Path) -> None:
    make(tmp_path / "checkpoints", 1)
    latest = make(tmp_path / "checkpoints", 2)
    older = files.checkpoint_path(tmp_path / "checkpoints", 1)

    assert files.find_checkpoint(tmp_path) == latest
    assert files.find_checkpoint(tmp_path / "checkpoints") == latest
    assert files.find_checkpoint(older) == CheckpointInfo(older, 1)


def test_a_path_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a checkpoint of megatron-sbld"):
        files.find_checkpoint(tmp_path / "nowhere")


def test_weights_may_come_from_a_checkpoint_that_megatron_lm_wrote(tmp_path: Path) -> None:
    stock = make(tmp_path, 1).path
    _lose_the_manifest(stock)
    files.verify_weights(stock)

    _lose_a_file(stock)
    with pytest.raises(ValueError, match=r"not a checkpoint in Megatron's torch_dist format \(no \.metadata\)"):
        files.verify_weights(stock)


def test_a_train_state_is_given_as_it_will_be_read_back() -> None:
    assert files.encode_train_state({"a": (1, 2), "b": {3: None}}) == {"a": [1, 2], "b": {"3": None}}


def test_a_train_state_that_json_cannot_hold_is_refused() -> None:
    with pytest.raises(ValueError, match="train_state must be JSON-able"):
        files.encode_train_state({"a": object()})


def test_finding_checkpoints_needs_neither_torch_nor_megatron() -> None:
    program = (
        "import sys; sys.modules['torch'] = sys.modules['megatron'] = None\n"
        "from megatron_sbld.checkpoint import files\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
