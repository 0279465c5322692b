"""Scores against the logits of one request at a time, on one process and on other layouts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_sbld.config.sections import ParallelConfig
from megatron_sbld.data.tokenizer import Tokenizer
from megatron_sbld.evaluation.lambada import LambadaResult
from megatron_sbld.evaluation.model import evaluation_config, load_chunks, read_trained_model
from megatron_sbld.evaluation.requests import Request, Score
from megatron_sbld.evaluation.run import evaluate_checkpoints
from megatron_sbld.evaluation.scoring import plan_calls
from megatron_sbld.evaluation.tasks import Asked, Task
from megatron_sbld.training.processes import distributed_run
from tests.training.trainer_helpers import call_on_ranks, prepare_corpus, run_here, tiny_run

pytestmark = pytest.mark.timeout(600)

BATCH_TOKENS = 96  # three requests or fewer, one where it is long
LAYOUTS: dict[str, dict[str, Any]] = {
    "DP 4": {},
    "TP 2 x DP 2": {"tensor_model_parallel_size": 2},
    "TP 4, sequence parallel": {"tensor_model_parallel_size": 4, "sequence_parallel": True},
    "PP 2 x DP 2": {"pipeline_model_parallel_size": 2},
    "PP 2 uneven x TP 2": {
        "pipeline_model_parallel_size": 2,
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_layout": "Et|tttL",
    },
    "PP 2 interleaved x DP 2": {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2},
    "CP 2 x TP 2": {"context_parallel_size": 2, "tensor_model_parallel_size": 2},
}


class Continuations(Task):
    """Pieces of this file, their ends to be predicted, and spaces, which even a model of 8 iterations can."""

    name = "continuations"
    data = __file__

    def ask(self, tokenizer: Tokenizer, context: int) -> Asked:
        tokens = tokenizer.encode(Path(__file__).read_text())
        lengths = [2, 3, context + 1, 17, 16, 18, 5, 12, context, 31, 30, 2, 9]
        pieces = [
            Request(tuple(tokens[50 * index : 50 * index + length]), 1 + index % (length - 1))
            for index, length in enumerate(lengths)
        ]
        spaces = [Request(tuple(tokenizer.encode(" " * length)), 1) for length in (4, 19)]
        return Asked([*pieces, *spaces], result=no_figures, data=__file__, files=[__file__], options={})


def no_figures(scores: Sequence[Score]) -> LambadaResult:
    """Scores alone are looked at here."""
    return LambadaResult(0.0, None, 0.0, None, len(scores), 0, 0)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few iterations: 259 byte-level tokens in 384 rows, and 40 positions: inputs are padded beyond them."""
    folder = tmp_path_factory.mktemp("scoring")
    config = tiny_run(
        folder / "run", prepare_corpus(folder), model={"seq_length": 40}, checkpoint={"save_at_end": True}
    )
    assert run_here(config) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def expected(run_dir: Path) -> list[Score]:
    """One request at a time, unpadded, with torch's own log_softmax over the tokenizer's tokens."""
    trained = read_trained_model(run_dir)
    config = evaluation_config(trained, ParallelConfig(), world_size=1)
    scores = []
    with distributed_run(config), torch.no_grad():
        (model,) = load_chunks(trained, config)
        for request in Continuations().ask(trained.tokenizer, trained.model.context).requests:
            tokens = torch.tensor([request.tokens])
            positions = torch.arange(tokens.shape[1] - 1)[None]
            logits = model(tokens[:, :-1], positions, None)[0, -request.num_targets :, : trained.tokenizer.vocab_size]
            targets = tokens[0, -request.num_targets :]
            log_probs = logits.log_softmax(-1)[torch.arange(request.num_targets), targets]
            scores.append(Score(log_probs.sum().item(), bool((logits.argmax(-1) == targets).all())))
    assert {score.is_greedy for score in scores} == {True, False}, "the test would not notice a wrong argmax"
    return scores


def assert_equal_scores(found: list[Score], expected: list[Score]) -> None:
    assert [score.is_greedy for score in found] == [score.is_greedy for score in expected]
    assert [score.log_likelihood for score in found] == pytest.approx(
        [score.log_likelihood for score in expected], rel=1e-5
    )


def test_batched_scores_are_those_of_single_requests(run_dir: Path, expected: list[Score]) -> None:
    (evaluated,) = evaluate_checkpoints(
        Continuations(), [read_trained_model(run_dir)], ParallelConfig(), batch_tokens=BATCH_TOKENS
    )
    assert_equal_scores(evaluated.scores, expected)
    assert evaluated.trained.consumed_tokens == 8 * 8 * 40


@pytest.mark.slow
def test_every_layout_gives_the_same_scores(run_dir: Path, expected: list[Score]) -> None:
    by_layout = call_on_ranks(4, evaluate_layout, [(str(run_dir), layout) for layout in LAYOUTS.values()])
    for name, by_rank in zip(LAYOUTS, by_layout, strict=True):
        for rank, scores in enumerate(by_rank):
            assert not isinstance(scores, str), f"{name}, rank {rank}: {scores}"
            assert_equal_scores(scores, expected)


def evaluate_layout(given: tuple[str, dict[str, Any]]) -> list[Score] | str:
    run_dir, layout = given
    try:
        models = [read_trained_model(Path(run_dir))]
        (evaluated,) = evaluate_checkpoints(
            Continuations(), models, ParallelConfig(**layout), batch_tokens=BATCH_TOKENS
        )
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return evaluated.scores


@given(
    lengths=st.lists(st.integers(1, 300), max_size=40),
    batch_tokens=st.integers(1, 1000),
    replicas=st.integers(1, 4),
    unit=st.sampled_from([1, 16, 48]),
)
def test_calls_cover_every_request_once(lengths: list[int], batch_tokens: int, replicas: int, unit: int) -> None:
    calls = plan_calls(lengths, batch_tokens, replicas, unit)
    seen = [index for call in calls for indices in call.microbatches for index in indices]
    assert sorted(seen) == list(range(len(lengths)))
    for call in calls:
        assert call.length % unit == 0
        assert call.rows == 1 or call.rows * call.length <= batch_tokens
        for indices in call.microbatches:
            assert 1 <= len(indices) <= call.rows
            assert all(call.length - unit < lengths[index] <= call.length for index in indices)
    assert [call.length for call in calls] == sorted({call.length for call in calls}, reverse=True)


@pytest.mark.parametrize(("tokens", "targets"), [((1,), 1), ((1, 2), 2), ((1, 2), 0)])
def test_a_request_needs_a_context_and_a_target(tokens: tuple[int, ...], targets: int) -> None:
    with pytest.raises(ValueError, match="num_targets"):
        Request(tokens, targets)


def test_layouts_that_cannot_hold_the_model_are_refused(run_dir: Path) -> None:
    trained = read_trained_model(run_dir)
    refused: list[tuple[Callable[[], Any], str]] = [
        (lambda: evaluation_config(trained, ParallelConfig(tensor_model_parallel_size=2), 1), "1 processes"),
        (lambda: evaluation_config(trained, ParallelConfig(pipeline_model_parallel_size=3), 3), "num_layers"),
    ]
    for call, message in refused:
        with pytest.raises(ValueError, match=message):
            call()
    assert math.isfinite(trained.train_time_s or math.nan)
