"""A run and a measurement hold the lock of their folder (health/test_run_lock.py) before they read or write it."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from megatron_sbld.health.run_lock import LOCK_FILE, RunLock
from megatron_sbld.measure.measure import measure
from megatron_sbld.measure.options import MeasureOptions
from megatron_sbld.training import run
from tests.health.test_run_lock import Holder
from tests.training.trainer_helpers import change, losses, prepare_corpus, run_here, tiny_run


def test_pretrain_and_measure_take_the_lock_before_they_write_and_give_it_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "RunLock", partial(RunLock, wait_s=0.1))
    config = tiny_run(tmp_path / "run", prepare_corpus(tmp_path), training={"train_iters": 4})
    assert run_here(change(config, training={"exit_after_iterations": 2})) == 75
    before = sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "run").rglob("*") if path.is_file())
    holder = Holder(tmp_path / "run", "locking")
    try:
        lock_file = tmp_path / "run" / LOCK_FILE
        outcome = str(run_here(config))
        assert outcome.startswith("ValueError: logging.run_dir = "), outcome
        with pytest.raises(ValueError, match=r"--out = .*: another run uses this folder"):
            measure(config, MeasureOptions(out=str(tmp_path / "run"), iterations=2))
        after = sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "run").rglob("*") if path.is_file())
        assert [entry for entry in after if entry[0] != lock_file] == [
            entry for entry in before if entry[0] != lock_file
        ]
    finally:
        holder.kill()
    assert run_here(config) == 0
    assert len(losses(tmp_path / "run")) == 4
