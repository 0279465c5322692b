"""Generation against full forward passes without a cache and against scores, on one process and on other layouts."""

from __future__ import annotations

import gzip
import json
import lzma
import string
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_sbld.cli import main as cli
from megatron_sbld.config.sections import ParallelConfig
from megatron_sbld.data.prepare import PrepareConfig, prepare
from megatron_sbld.data.tokenizer import load_tokenizer
from megatron_sbld.evaluation.generate import (
    Continuation,
    Sampling,
    choose,
    continuation_text,
    continue_prompts,
    encode_prompt,
    generate,
)
from megatron_sbld.evaluation.model import TrainedModel, evaluation_config, load_chunks, read_trained_model
from megatron_sbld.evaluation.prompts import read_prompts
from megatron_sbld.evaluation.requests import Request
from megatron_sbld.evaluation.scoring import score
from megatron_sbld.training.processes import distributed_run, world_size_from_environment
from tests.training.trainer_helpers import HALF, call_on_ranks, prepare_corpus, run_here, tiny_run

pytestmark = pytest.mark.timeout(600)

VARIED = {"init_method_std": 1.0}
"""Weights with which the next token depends on all before it, if they are not trained much. Rounding grows with them,
to thousandths of a log probability."""
MODELS: dict[str, dict[str, Any]] = {
    "learned positions": {**VARIED, "max_position_embeddings": 48},
    "RoPE, grouped queries, RMSNorm, SwiGLU, untied": {
        **VARIED,
        "position_embedding_type": "rope",
        "rotary_percent": 0.5,
        "num_query_groups": 2,
        "normalization": "RMSNorm",
        "swiglu": True,
        "add_bias_linear": False,
        "untie_embeddings_and_output_weights": True,
    },
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "DP 4": {},
    "TP 2 x DP 2": {"tensor_model_parallel_size": 2},
    "PP 4": {"pipeline_model_parallel_size": 4},
    "PP 2 uneven x TP 2": {
        "pipeline_model_parallel_size": 2,
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_layout": "Et|tttL",
    },
}
GREEDY = Sampling(max_new_tokens=20, temperature=0)
DRAWN = Sampling(max_new_tokens=12, temperature=1.5, top_k=50, top_p=0.9, num_samples=2, seed=7)
PROMPTS = ["import numpy", "x", "", "def f(self):\n    return"]
ALPHABET = string.ascii_lowercase + "\n"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_corpus(tmp_path_factory.mktemp("generate"))


@pytest.fixture(scope="module")
def runs(corpus: Path) -> list[Path]:
    """A run of a few iterations of each of MODELS; the layers of the last were dropped, and what they add scaled."""
    folders = []
    for index, model in enumerate(MODELS.values()):
        folders.append(corpus.parent / f"run{index}")
        drop = {**HALF, "residual_scale": "inverse_keep_prob"} if index else {}
        config = tiny_run(
            folders[-1],
            corpus,
            model=model,
            drop=drop,
            optimizer={"lr": 1e-4, "min_lr": 1e-4},
            checkpoint={"save_at_end": True},
        )
        assert run_here(config) == 0
    return folders


@pytest.fixture(scope="module")
def alphabet_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has learnt documents of one line, the alphabet."""
    folder = tmp_path_factory.mktemp("alphabet")
    documents = folder / "documents.jsonl"
    documents.write_text("\n".join(json.dumps({"text": ALPHABET}) for _ in range(100)))
    prepare(PrepareConfig(inputs=[str(documents)], output=str(folder / "corpus"), workers=1, quiet=True))
    config = tiny_run(
        folder / "run",
        folder / "corpus",
        model={"num_layers": 2},
        training={"train_iters": 80},
        checkpoint={"save_at_end": True},
    )
    assert run_here(config) == 0
    return folder / "run"


def prompts_of(trained: TrainedModel) -> list[list[int]]:
    return [encode_prompt(trained.tokenizer, text) for text in PROMPTS]


@pytest.mark.parametrize("index", range(len(MODELS)), ids=list(MODELS))
def test_greedy_is_the_argmax_of_forward_passes_without_a_cache(runs: list[Path], index: int) -> None:
    trained = read_trained_model(runs[index])
    prompts = prompts_of(trained)
    found = generate(trained, prompts, GREEDY, ParallelConfig())
    config = evaluation_config(trained, ParallelConfig(), world_size=1)
    with distributed_run(config), torch.no_grad():
        (model,) = load_chunks(trained, config)
        for prompt, continuation in zip(prompts, found, strict=True):
            assert continuation.tokens == argmax_chain(model, trained, prompt)
        requests = [
            Request((*prompt, *continuation.tokens), len(continuation.tokens))
            for prompt, continuation in zip(prompts, found, strict=True)
        ]
        scores = score(ParallelConfig(), [model], requests, vocab_size=trained.tokenizer.vocab_size, batch_tokens=1024)
    assert all(score.is_greedy for score in scores)
    assert [sum(continuation.log_probs) for continuation in found] == pytest.approx(
        [score.log_likelihood for score in scores], abs=0.02
    )
    assert len({token for continuation in found for token in continuation.tokens}) > 10, "the model says too little"


def argmax_chain(model: torch.nn.Module, trained: TrainedModel, prompt: list[int]) -> list[int]:
    added: list[int] = []
    limit = min(GREEDY.max_new_tokens, trained.model.context + 1 - len(prompt))
    while len(added) < limit and added[-1:] != [trained.tokenizer.eod]:
        tokens = torch.tensor([[*prompt, *added]])
        logits = model(tokens, torch.arange(tokens.shape[1])[None], None)[0, -1, : trained.tokenizer.vocab_size]
        added.append(int(logits.argmax()))
    return added


@pytest.mark.slow
def test_every_layout_gives_the_same_continuations(runs: list[Path]) -> None:
    expected = continuations_of(runs, {})
    outcomes = call_on_ranks(4, continue_on_layout, [(runs, layout) for layout in LAYOUTS.values()])
    for name, by_rank in zip(LAYOUTS, outcomes, strict=True):
        for rank, found in enumerate(by_rank):
            assert not isinstance(found, str), f"{name}, rank {rank}: {found}"
            assert_equal_continuations(found, expected)


def continue_on_layout(given: tuple[list[Path], dict[str, Any]]) -> list[Continuation] | str:
    try:
        return continuations_of(*given)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def continuations_of(runs: list[Path], layout: dict[str, Any]) -> list[Continuation]:
    """Of all models, in the processes of one run."""
    models = [read_trained_model(run) for run in runs]
    configs = [
        evaluation_config(trained, ParallelConfig(**layout), world_size_from_environment()) for trained in models
    ]
    found = []
    with distributed_run(configs[0]):
        for trained, config in zip(models, configs, strict=True):
            (model,) = load_chunks(trained, config)
            prompts = prompts_of(trained)[1:]  # as many as make replicas wait for each other
            for sampling in (GREEDY, DRAWN):
                found += continue_prompts(model, trained, prompts, replace(sampling, max_new_tokens=5))
    return found


def assert_equal_continuations(found: list[Continuation], expected: list[Continuation]) -> None:
    assert [one._replace(log_probs=[]) for one in found] == [one._replace(log_probs=[]) for one in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.log_probs == pytest.approx(other.log_probs, abs=1e-2)


def test_draws_depend_on_seed_prompt_and_sample_alone(runs: list[Path]) -> None:
    trained = read_trained_model(runs[0])
    prompts = prompts_of(trained)
    first = generate(trained, prompts, DRAWN, ParallelConfig())
    assert first == generate(trained, prompts, DRAWN, ParallelConfig())
    more = generate(trained, prompts[:2], replace(DRAWN, num_samples=3), ParallelConfig())
    assert_equal_continuations([one for one in more if one.sample < 2], first[:4])
    others = generate(trained, prompts, replace(DRAWN, seed=8), ParallelConfig())
    assert all(one.tokens != other.tokens for one, other in zip(first, others, strict=True))
    assert len({tuple(one.tokens) for one in more}) == len(more)
    twice = generate(trained, [prompts[0], prompts[0]], DRAWN, ParallelConfig())
    assert len({tuple(one.tokens) for one in twice}) == len(twice)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("top_k", [None, 1, 3, 100])
@pytest.mark.parametrize("top_p", [None, 0.2, 0.7, 1.0])
def test_tokens_are_drawn_with_the_probabilities_that_are_asked_for(
    temperature: float, top_k: int | None, top_p: float | None
) -> None:
    logits = np.random.default_rng(3).normal(scale=2, size=12)
    draws = 5000  # equidistant numbers, of which each token gets its share
    uniforms = (torch.arange(draws, dtype=torch.float64) + 0.5) / draws
    tokens = choose(torch.tensor(logits).expand(draws, -1), uniforms, temperature, top_k, top_p)
    shares = np.bincount(tokens.numpy(), minlength=len(logits)) / draws
    np.testing.assert_allclose(shares, expected_probs(logits, temperature, top_k, top_p), atol=1.5 / draws)


def expected_probs(logits: np.ndarray, temperature: float, top_k: int | None, top_p: float | None) -> np.ndarray:
    """Token by token, as the terms are defined."""
    probs = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
    likely = sorted(range(len(probs)), key=lambda token: -probs[token])[: top_k or len(probs)]
    of_these = sum(probs[token] for token in likely)
    kept, total = [], 0.0
    for token in likely:
        if total < (top_p or 1.0) * of_these:
            kept.append(token)
        total += probs[token]
    result = np.zeros_like(probs)
    result[kept] = probs[kept] / probs[kept].sum()
    return result


def test_the_extremes_of_temperature_and_random_numbers() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, -2.0]] * 3)
    uniforms = torch.tensor([0.0, 0.5, 1 - 2.0**-53], dtype=torch.float64)
    assert choose(logits, uniforms, temperature=0).tolist() == [1, 1, 1]  # of equal ones the lowest
    assert choose(logits, uniforms, temperature=1e-300).tolist() == [1, 2, 2]
    assert choose(logits, uniforms, temperature=1e300).tolist() == [1, 0, 3]
    assert choose(logits, uniforms, top_k=3).tolist() == [1, 2, 0]


def command(*args: str) -> int | str | None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["generate", *args])
    return ended.value.code


def test_the_command_prints_what_follows_and_stops_at_the_end_of_the_document(
    alphabet_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "out.jsonl"
    arguments = ["--checkpoint", str(alphabet_run), "--temperature", "0", "--out", str(out)]
    assert command(*arguments, "--prompt", "efgh") == 0
    printed = capsys.readouterr()
    assert printed.out == ALPHABET[4:] + "\n"
    assert "20 tokens" in printed.err
    (row,) = [json.loads(line) for line in out.read_text().splitlines()]
    assert row["prompt"] + row["continuation"] == ALPHABET[4:]
    assert row["prompt_tokens"] + row["tokens"] == [*ALPHABET[4:].encode(), 256]
    assert row["ended_by"] == "end_of_document"
    assert len(row["log_probs"]) == len(row["tokens"])
    assert -1 < sum(row["log_probs"]) < 0

    # What it wrote is a file of prompts; the empty prompt starts a document; --max_new_tokens counts.
    prompts = out.rename(tmp_path / "prompts.jsonl")
    assert command(*arguments, "--prompt", "", "--prompts", str(prompts), "--max_new_tokens", "5") == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["prompt"], row["continuation"], row["ended_by"]) for row in rows] == [
        ("", "abcde", "max_new_tokens"),
        ("efgh", "ijklm", "max_new_tokens"),
    ]
    assert capsys.readouterr().out == ("--- prompt 1, sample 1\nabcde\n--- prompt 2, sample 1\nefghijklm\n")


def test_neither_prompts_nor_the_run_are_overwritten(
    alphabet_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("efgh\n")
    (tmp_path / "link").symlink_to(tmp_path / "prompts.txt")
    run_files = [path for path in alphabet_run.rglob("*") if path.is_file()]
    before = {path: path.read_bytes() for path in run_files}
    weights = next(path for path in run_files if path.parent.name.startswith("iter_"))
    for out in (tmp_path / "prompts.txt", tmp_path / "link", alphabet_run / "metrics.jsonl", weights):
        arguments = ["--checkpoint", str(alphabet_run), "--prompts", str(tmp_path / "prompts.txt"), "--out", str(out)]
        assert command(*arguments) == cli.EXIT_MISTAKE
        assert "is an input, and would be overwritten" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in run_files} == before
    assert (tmp_path / "prompts.txt").read_text() == "efgh\n"


def test_a_full_context_ends_a_continuation(alphabet_run: Path, tmp_path: Path) -> None:
    trained = read_trained_model(alphabet_run)
    whole = encode_prompt(trained.tokenizer, (ALPHABET + ALPHABET)[:32])
    longest, almost = generate(trained, [whole, whole[2:]], GREEDY, ParallelConfig())
    assert (len(longest.tokens), longest.ended_by) == (1, "context")
    assert (len(almost.tokens), almost.ended_by) == (3, "context")
    with pytest.raises(ValueError, match="prompt 2 has 33 tokens: must have 1 to 32"):
        generate(trained, [whole, [*whole, 1]], GREEDY, ParallelConfig())


def test_half_precision_runs_on_a_cpu_too(alphabet_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--checkpoint", str(alphabet_run), "--prompt", "efgh", "--temperature", "0", "--precision", "bf16"]
    assert command(*arguments) == 0
    assert capsys.readouterr().out == ALPHABET[4:] + "\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--prompt"),
        (["--prompt", "a", "--temperature", "-1"], "temperature"),
        (["--prompt", "a", "--top_k", "0"], "top_k"),
        (["--prompt", "a", "--top_p", "1.5"], "top_p"),
        (["--prompt", "a", "--max_new_tokens", "0"], "max_new_tokens"),
        (["--prompt", "a", "--temperature", "0", "--top_k", "4"], "top_k = 4 has no effect"),
        (["--prompt", "a" * 33], "prompt 1 has 33 tokens"),
        (["--prompt", "a", "--tensor_model_parallel_size", "2"], "tensor_model_parallel_size"),
        (["--prompt", "a", "--sequence_parallel", "true"], "sequence_parallel"),
        (["--prompts", "no_such_file"], "no_such_file"),
        (["--prompt", "a", "--out", "/"], "is a folder"),
    ],
)
def test_mistakes_are_named(
    alphabet_run: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert command("--checkpoint", str(alphabet_run), *arguments) == cli.EXIT_MISTAKE
    printed = capsys.readouterr()
    assert message in printed.err
    assert "Traceback" not in printed.err


def test_layouts_without_a_cache_are_refused(runs: list[Path]) -> None:
    trained = read_trained_model(runs[0])
    for layout in (
        {"context_parallel_size": 2},
        {"tensor_model_parallel_size": 2, "sequence_parallel": True},
        {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2},
    ):
        with pytest.raises(ValueError, match="tensor and pipeline parallelism only"):
            generate(trained, [[1]], GREEDY, ParallelConfig(**layout))


def test_prompts_are_lines_or_json(tmp_path: Path) -> None:
    lines, rows = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    lines.write_text("Once upon\n\n a time \n")
    assert read_prompts(str(lines)) == ["Once upon", " a time "]
    rows.write_text('{"prompt": "two\\nlines"}\n{"prompt": ""}\n')
    assert read_prompts(str(rows)) == ["two\nlines", ""]
    refused: list[tuple[str, str]] = [
        ("", "no prompt"),
        ('{"text": "x"}', "text `prompt`"),
        ("{", "not JSON"),
        ('{"prompt": "a", "more": ' + "[" * 100_000, "not JSON"),
        ('{"prompt": "\\ud83d"}', "half of a surrogate pair"),
    ]
    for content, message in refused:
        rows.write_text(content)
        with pytest.raises(ValueError, match=message):
            read_prompts(str(rows))


@pytest.mark.parametrize("name", ["a.txt", "a.JSONL", "a.ndjson", "a.json"])
def test_prompts_have_no_byte_order_mark_and_json_lines_are_found(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.write_bytes(b'\xef\xbb\xbf{"prompt": "one"}\r\n{"prompt": "two"}\r\n')
    assert read_prompts(str(file)) == ["one", "two"]
    (tmp_path / "plain.txt").write_bytes(b"\xef\xbb\xbfone\r\n{two}\r\n")
    assert read_prompts(str(tmp_path / "plain.txt")) == ["one", "{two}"]


@pytest.mark.parametrize(("suffix", "compress"), [("gz", gzip.compress), ("xz", lzma.compress)])
def test_compressed_prompts_are_unpacked(tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes]) -> None:
    for name, content in (("a.txt", b"one\ntwo\n"), ("a.jsonl", b'{"prompt": "one"}\n{"prompt": "two"}\n')):
        file = tmp_path / f"{name}.{suffix}"
        file.write_bytes(compress(content))
        assert read_prompts(str(file)) == ["one", "two"]
        file.write_bytes(compress(content)[:-10])
        with pytest.raises(ValueError, match=rf"{name}\.{suffix}: damaged \.{suffix} file"):
            read_prompts(str(file))


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.txt", b"one\nna\xefve\n", "line 2, byte offset 6: 0xef is not UTF-8"),
        ("a.txt", "one\n".encode("utf-16"), "it is UTF-16"),
        ("a.json", b'[{"prompt": "one"}]', "it is one JSON array"),
    ],
)
def test_prompts_that_are_no_text_are_told_by_name(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"prompts .*{name}: {reason}"):
        read_prompts(str(tmp_path / name))


def test_the_text_that_follows_is_what_is_added_to_the_prompts() -> None:
    tokenizer = load_tokenizer("byte")
    tokens = "naïve".encode()
    assert continuation_text(tokenizer, tokens[:2], tokens[2:]) == "ïve"
    # A character that the border cuts.
    assert continuation_text(tokenizer, tokens[:3], tokens[3:]) == tokenizer.decode(tokens[3:])
    assert isinstance(encode_prompt(tokenizer, ""), list)
