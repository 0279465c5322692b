"""What scripts/check_patches.sh judges by: a run that differs, or is not the one that was meant, is refused."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import pytest
from torch.utils.tensorboard import SummaryWriter

from tests.megatron_lm.compare_runs import TOLERANCE, near, perplexity, same

RESUMED = Namespace(first=4, iterations=6, other_layout=False)
LOSS = 10.0


def run(folder: Path, first: int = 1, loss: float = LOSS, validation: float = 9.0, at_the_end: float = 8.0) -> str:
    """Six iterations as Megatron-LM logs them, from one on; the last has this loss, and a second validation."""
    with SummaryWriter(str(folder)) as writer:
        for iteration in range(first, 7):
            writer.add_scalar("lm loss", loss if iteration == 6 else LOSS, iteration)
            for tag in ("grad-norm", "learning-rate", "loss-scale"):
                writer.add_scalar(tag, 1.0, iteration)
            if iteration in (3, 6):
                writer.add_scalar("lm loss validation", validation, iteration)
        writer.add_scalar("lm loss validation", at_the_end, 6)
    return str(folder)


def pretrained(folder: Path, loss: float = LOSS) -> str:
    """The same as `megatron-sbld pretrain` does."""
    rows = [{"iteration": i, "loss": loss if i == 6 else LOSS, "grad_norm": 1.0, "lr": 1.0} for i in range(1, 7)]
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"valid_loss": 1.0}]))
    return str(folder)


def evaluated(folder: Path, loss: float) -> str:
    folder.mkdir()
    (folder / "evaluations.jsonl").write_text(json.dumps({"metrics": {"loss": loss}}) + "\n")
    return str(folder)


def test_a_resumed_run_is_compared_from_where_it_begins(tmp_path: Path) -> None:
    found = same(run(tmp_path / "whole"), run(tmp_path / "resumed", 4), RESUMED)
    assert found.startswith("13 scalars equal bit for bit, iterations 4 to 6; last loss 10.0")


@pytest.mark.parametrize("first", [1, 5])
def test_a_run_that_began_elsewhere_is_refused(tmp_path: Path, first: int) -> None:
    """As one that found no checkpoint and, training anew, has the losses of the whole run."""
    whole, other = run(tmp_path / "whole"), run(tmp_path / "other", first)
    for compare in (same, near):
        with pytest.raises(SystemExit, match=r"were logged, expected \[4, 5, 6\]"):
            compare(whole, other, RESUMED)


def test_the_last_bit_of_a_loss_and_of_a_validation_is_seen(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole")
    with pytest.raises(SystemExit, match="lm loss, iteration 6"):
        same(whole, run(tmp_path / "loss", 4, loss=LOSS + 1e-6), RESUMED)
    with pytest.raises(SystemExit, match="lm loss validation, iteration 6"):
        same(whole, run(tmp_path / "validation", 4, validation=9.000001), RESUMED)


def test_the_second_validation_of_an_iteration_does_not_count(tmp_path: Path) -> None:
    """Megatron-LM validates once more at the end, on other samples, and may exit before that is in the file."""
    found = same(run(tmp_path / "whole"), run(tmp_path / "resumed", 4, at_the_end=7.0), RESUMED)
    assert "validation 9.0" in found


def test_the_trainers_run_is_equal_to_rounding_and_no_further(tmp_path: Path) -> None:
    resumed = run(tmp_path / "resumed", 4)
    found = near(pretrained(tmp_path / "ours", LOSS * (1 + TOLERANCE / 2)), resumed, RESUMED)
    assert "lm loss 5.0e-05, grad-norm 0.0e+00" in found
    for name, loss in (("far", LOSS * (1 + 2 * TOLERANCE)), ("nan", float("nan"))):
        with pytest.raises(SystemExit, match=r"lm loss, iteration 6: .* apart"):
            near(pretrained(tmp_path / name, loss), resumed, RESUMED)


def test_checkpoints_that_score_otherwise_are_refused(tmp_path: Path) -> None:
    one, alike, other = (evaluated(tmp_path / str(loss), loss) for loss in (5.0, 5.0001, 5.01))
    assert perplexity(one, alike, other, RESUMED) == "loss of a text 5.0000000 and 5.0001000, 5.0100000 half way"
    with pytest.raises(SystemExit, match=r"loss of the text: 5\.0 and 5\.01"):
        perplexity(one, other, alike, RESUMED)
    with pytest.raises(SystemExit, match=r"loss of the text: 5\.0, and 5\.0001 with an earlier checkpoint"):
        perplexity(one, alike, alike, RESUMED)


def test_runs_that_both_ended_early_are_refused(tmp_path: Path) -> None:
    whole, resumed = run(tmp_path / "whole"), run(tmp_path / "resumed", 4)
    with pytest.raises(SystemExit, match=r"expected \[4, 5, 6, 7\]"):
        same(whole, resumed, Namespace(first=4, iterations=7, other_layout=False))
