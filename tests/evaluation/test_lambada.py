"""LAMBADA's requests and figures: tokens as lm-evaluation-harness has them, truncation, golden aggregates."""

from __future__ import annotations

import json
import math

import pytest

from megatron_sbld.data.tokenizer import load_tokenizer
from megatron_sbld.evaluation.lambada import encode_passages, summarise, write_examples
from megatron_sbld.evaluation.passages import Passage, read_passages
from megatron_sbld.evaluation.requests import Score
from megatron_sbld.evaluation.tasks import LambadaTask
from tests.evaluation.data_helpers import CharacterTokenizer


@pytest.fixture(scope="module")
def gpt2(shared_file):
    return load_tokenizer(str(shared_file("gpt2-vocab.json").parent))


def encode_pair(tokenizer, context, continuation):
    """What lm-evaluation-harness 0.4 does for causal models (TemplateLM._encode_pair), written from its description."""
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    whole = tokenizer.encode(context + continuation)
    return whole[: len(tokenizer.encode(context))], whole[len(tokenizer.encode(context)) :]


@pytest.mark.parametrize("detokenise", [True, False])
def test_the_tokens_of_the_development_split_are_those_of_lm_evaluation_harness(gpt2, shared_file, detokenise):
    path = str(shared_file("lambada_development_plain_text.txt"))
    passages = read_passages(path, detokenise=detokenise)[0][::20]
    lambada = encode_passages(passages, gpt2, 1024)
    for passage, request in zip(passages, lambada.requests, strict=True):
        text = passage.context + passage.target
        words = text.split(" ")
        context, target = encode_pair(gpt2, " ".join(words[:-1]), " " + words[-1])
        assert list(request.tokens) == context + target
        assert request.num_targets == len(target)
    assert not any(lambada.truncated)


def test_gpt2s_targets_begin_with_a_space(gpt2):
    request = encode_passages([Passage(1, "the dagger is", " precariously")], gpt2, 1024).requests[0]
    assert gpt2.decode(request.tokens[-request.num_targets :]) == " precariously"
    assert request.num_targets > 1


def test_a_merge_over_the_border_counts_as_lm_evaluation_harness_counts_it():
    tokenizer = CharacterTokenizer("b c")
    request = encode_passages([Passage(1, "ab", " cd")], tokenizer, 10).requests[0]
    whole, border = tokenizer.encode("ab cd"), len(tokenizer.encode("ab"))
    assert list(request.tokens) == whole
    assert request.num_targets == len(whole) - border == 1


@pytest.mark.parametrize(("max_length", "kept", "truncated"), [(11, "abc def ghij", False), (10, "bc def ghij", True)])
def test_the_input_of_a_long_passage_is_kept_from_the_right_and_the_last_target_needs_no_position(
    max_length, kept, truncated
):
    lambada = encode_passages([Passage(1, "abc def", " ghij")], CharacterTokenizer(), max_length)
    assert lambada.requests[0].tokens == tuple(map(ord, kept))
    assert lambada.requests[0].num_targets == 5
    assert lambada.truncated == [truncated]


def test_targets_that_fill_the_context_keep_one_token_before_them():
    request = encode_passages([Passage(1, "abc def", " ghij")], CharacterTokenizer(), 5).requests[0]
    assert "".join(map(chr, request.tokens)) == "f ghij"


@pytest.mark.parametrize(
    ("tokenizer", "max_length", "problem"),
    [
        (CharacterTokenizer(), 4, r"line 7: the last word 'ghij' has 5 tokens after 7 of context .*max_length = 4"),
        (CharacterTokenizer("c def ghij"), 20, r"line 7: the last word 'ghij' has -4 tokens"),
    ],
)
def test_a_target_that_cannot_be_scored_is_named(tokenizer, max_length, problem):
    with pytest.raises(ValueError, match=problem):
        encode_passages([Passage(7, "abc def", " ghij")], tokenizer, max_length)


def encoded(count, **fields):
    return encode_passages(
        [Passage(line, "abc def", " gh", **fields) for line in range(1, count + 1)], CharacterTokenizer(), 8
    )


def test_figures_of_known_scores():
    """Losses 1, 2, 3 and 6: mean 3, sample variance 14/3; 3 of 4 right."""
    scores = [Score(-1.0, True), Score(-2.0, True), Score(-3.0, False), Score(-6.0, True)]
    result = summarise(encoded(4, is_glued=True), scores)
    assert result.accuracy == 0.75
    assert result.accuracy_stderr == pytest.approx(math.sqrt(0.75 * 0.25 / 3))
    assert result.perplexity == pytest.approx(math.exp(3.0))
    assert result.perplexity_stderr == pytest.approx(math.exp(3.0) * math.sqrt(14 / 3 / 4))
    assert (result.passages, result.truncated, result.glued) == (4, 4, 4)


def test_the_error_of_the_accuracy_is_the_sample_deviation_over_the_root_of_n():
    scores = [Score(-1.0, number % 3 == 0) for number in range(10)]
    values = [float(score.is_greedy) for score in scores]
    mean = sum(values) / 10
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / 9)
    assert summarise(encoded(10), scores).accuracy_stderr == pytest.approx(deviation / math.sqrt(10))


def test_one_passage_has_no_error_and_a_hopeless_model_an_infinite_perplexity():
    result = summarise(encoded(1), [Score(-1e5, False)])
    assert (result.accuracy, result.accuracy_stderr, result.perplexity_stderr) == (0.0, None, None)
    assert result.perplexity == math.inf


def test_a_score_too_few_is_refused():
    with pytest.raises(ValueError, match="1 scores for 2 requests"):
        summarise(encoded(2), [Score(-1.0, True)])


def test_every_passage_is_written_for_inspection(tmp_path):
    write_examples(encoded(2), [Score(-1.5, True), Score(-2.5, False)], tmp_path / "out" / "examples.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "out" / "examples.jsonl").read_text().splitlines()]
    assert rows[1] == {
        "line": 2,
        "context_tail": "abc def",
        "target": " gh",
        "log_likelihood": -2.5,
        "is_greedy": False,
        "num_target_tokens": 3,
        "truncated": True,
    }
    assert len(rows) == 2


def test_a_task_is_asked_of_each_model_in_its_own_tokens_and_context(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("`` go , '' she said\n")
    task, raw = LambadaTask(str(tmp_path / "a.txt")), LambadaTask(str(tmp_path / "b.txt"), raw=True)
    long, short = (task.ask(CharacterTokenizer(), context) for context in (100, 6))
    assert "".join(map(chr, long.requests[0].tokens)) == '"go," she said'
    assert "".join(map(chr, raw.ask(CharacterTokenizer(), 100).requests[0].tokens)) == "`` go , '' she said"
    assert len(short.requests[0].tokens) == 7
    assert [asked.result([Score(-1.0, True)]).truncated for asked in (long, short)] == [0, 1]
    assert long.identity.sha256 == raw.ask(CharacterTokenizer(), 100).identity.sha256
    assert (long.options["detokenised"], raw.ask(CharacterTokenizer(), 100).options["detokenised"]) == (True, False)
    long.write_examples([Score(-1.0, True)], tmp_path / "examples.jsonl")
    assert json.loads((tmp_path / "examples.jsonl").read_text())["target"] == " said"
