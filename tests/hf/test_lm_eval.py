"""EleutherAI's lm-evaluation-harness on an exported model says what `evaluate` says of its checkpoint."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from megatron_sbld.config.sections import ParallelConfig
from megatron_sbld.data.prepare import PrepareConfig, prepare
from megatron_sbld.evaluation.model import TrainedModel, read_trained_model
from megatron_sbld.evaluation.passages import read_passages
from megatron_sbld.evaluation.run import Evaluated, evaluate_checkpoints
from megatron_sbld.evaluation.tasks import LambadaTask, PerplexityTask, Task
from megatron_sbld.hf.export_model import export_hf
from tests.hf import harness_peer
from tests.training.trainer_helpers import NO_DROPOUT, REPOSITORY, run_here, tiny_run

MISSING = [name for name in ("lm_eval", "transformers", "accelerate") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(bool(MISSING), reason=f"{', '.join(MISSING)} not installed (extra `test`)"),
]

SHARED_LAMBADA = REPOSITORY.parent / "shared" / "data" / "lambada_development_plain_text.txt"
SLICE = 40
AMBIGUOUS = ("lamp", "café", "letter")  # last words of passages that begin alike: a model is right on one at most
CONTEXT = 128
MODELS: dict[str, dict[str, Any]] = {
    # Trained on the passages themselves, so that it gets many of the synthetic ones right; all of them it cannot.
    "trained, GPT-2 format": {
        "model": {"num_layers": 2, "hidden_size": 128, "seq_length": CONTEXT, **NO_DROPOUT},
        "training": {"train_iters": 300, "micro_batch_size": 8},
        "optimizer": {"lr": 5e-3, "min_lr": 5e-4},
    },
    "random, Llama format": {
        "model": {
            "num_layers": 2,
            "seq_length": CONTEXT,
            "init_method_std": 0.3,
            "position_embedding_type": "rope",
            "normalization": "RMSNorm",
            "swiglu": True,
            "add_bias_linear": False,
            "num_query_groups": 2,
        },
        "training": {"train_iters": 1},
        "optimizer": {"lr": 1e-9, "min_lr": 1e-9, "lr_warmup_iters": 0},
    },
}


@dataclass(frozen=True)
class Case:
    """A task of ours, and the text of the passages or documents that it scores."""

    task: Task
    texts: list[str]

    @property
    def kind(self) -> dict[str, Any]:
        return harness_peer.LAMBADA if isinstance(self.task, LambadaTask) else harness_peer.ROLLING


def synthetic_passages() -> list[str]:
    """Passages in the form that LAMBADA is distributed in, whose last word occurs before; some exceed the context."""
    things, places = ("lamp", "old map", "café key", "letter"), ("garden", "kitchen", "naïve box")
    passages = []
    for number, (thing, place) in enumerate(itertools.product(things, places)):
        before = f"it was day {number} , and nobody 's mood was good . " * (12 if number % 4 == 3 else 1)
        passages.append(
            f"{before}`` where is the {thing} ? '' she asked . `` i did n't take it , '' he said ; `` it was in the "
            f"{place} . '' so she went -lrb- again -rrb- to look for the {thing}"
        )
        passages.append(f"the {thing} is in the {place} . he said `` no , the {place}")
    choices = " or ".join(AMBIGUOUS)
    return passages + [f"she could have the {choices} , she thought . she took the {word}" for word in AMBIGUOUS]


def cases_of(folder: Path, source: str, passages: list[str]) -> dict[str, Case]:
    """LAMBADA's two formats, plain text detokenised and raw, of the same passages."""
    plain, rows = folder / f"{source}.txt", folder / f"{source}.jsonl"
    plain.write_text("".join(f"{passage}\n" for passage in passages), encoding="utf-8")
    natural = [passage.context + passage.target for passage in read_passages(str(plain))[0]]
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in natural), encoding="utf-8")
    return {
        f"{source}_detokenised": Case(LambadaTask(str(plain)), natural),
        f"{source}_raw": Case(LambadaTask(str(plain), raw=True), passages),
        f"{source}_jsonl": Case(LambadaTask(str(rows)), natural),
    }


@pytest.fixture(scope="module")
def source(request: pytest.FixtureRequest) -> str:
    """Where the passages are from; the models are trained on them alone."""
    if request.param == "development" and not SHARED_LAMBADA.is_file():
        pytest.skip(f"{SHARED_LAMBADA.name} is not at ../shared/data")
    return str(request.param)


def passages_of(name: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("source", [name], indirect=True, scope="module")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, source: str) -> Path:
    return tmp_path_factory.mktemp(source)


@pytest.fixture(scope="module")
def cases(folder: Path, source: str) -> dict[str, Case]:
    if source == "development":
        return cases_of(folder, source, SHARED_LAMBADA.read_text(encoding="utf-8").split("\n")[:SLICE])
    found = cases_of(folder, source, synthetic_passages())
    documents = [(REPOSITORY / name).read_text(encoding="utf-8").strip() for name in ("README.md", "Makefile")]
    rows = folder / "documents.jsonl"
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*documents, "one\n\n two"]))
    found["documents"] = Case(PerplexityTask(str(rows), stride=CONTEXT), [*documents, "one\n\n two"])
    return found


@pytest.fixture(scope="module")
def models(folder: Path, cases: dict[str, Case], source: str) -> dict[str, TrainedModel]:
    """Runs of MODELS with a byte-level BPE, trained on the passages' text."""
    texts = [text for case in cases.values() if isinstance(case.task, LambadaTask) for text in case.texts]
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=1200, special_tokens=["<|endoftext|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare(
        PrepareConfig(
            inputs=[str(folder / "train.jsonl")],
            output=str(folder / "corpus"),
            tokenizer=str(folder / "tokenizer.json"),
            workers=1,
            quiet=True,
        )
    )
    trained = {}
    for index, (name, sections) in enumerate(MODELS.items()):
        if source == "development":  # of which nothing has to be right
            sections = {**sections, "training": {**sections["training"], "train_iters": 10}}
        config = tiny_run(
            folder / f"run{index}",
            folder / "corpus",
            **sections,
            data={"train_data_path": [f"{folder / 'corpus'}_train"], "tokenizer": str(folder / "tokenizer.json")},
            checkpoint={"save_at_end": True},
        )
        assert run_here(config) == 0
        trained[name] = read_trained_model(folder / f"run{index}")
    return trained


@pytest.fixture(scope="module")
def theirs(folder: Path, cases: dict[str, Case], models: dict[str, TrainedModel]) -> dict[str, dict[str, Any]]:
    """By model and case: the harness's metrics, and what it says of each passage."""
    tasks = folder / "tasks"
    tasks.mkdir()
    for name, case in cases.items():
        rows = tasks / f"{name}.jsonl"
        rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in case.texts))
        harness_peer.write_task(tasks, name, case.kind, rows)
    exported = {name: str(folder / f"exported{index}") for index, name in enumerate(models)}
    for name, target in exported.items():
        export_hf(str(models[name].checkpoint.path), target)
    request, answer = folder / "request.json", folder / "answer.json"
    asked = {"models": list(exported.values()), "tasks": list(cases), "task_folder": str(tasks)}
    request.write_text(json.dumps(asked))
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HOME": str(folder / "huggingface"),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "tests.hf.harness_peer", str(request), str(answer)]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-5000:]
    found = json.loads(answer.read_text())
    return {name: found[target] for name, target in exported.items()}


@pytest.fixture(scope="module")
def ours(cases: dict[str, Case], models: dict[str, TrainedModel]) -> dict[str, dict[str, Evaluated]]:
    """By model and case."""
    by_case = {case: evaluate_checkpoints(cases[case].task, list(models.values()), ParallelConfig()) for case in cases}
    return {model: {case: by_case[case][index] for case in cases} for index, model in enumerate(models)}


def assert_same_lambada(ours: Evaluated, theirs: dict[str, Any]) -> None:
    assert [score.is_greedy for score in ours.scores] == [bool(answer[1]) for answer in theirs["answers"]]
    assert [score.log_likelihood for score in ours.scores] == pytest.approx(
        [answer[0] for answer in theirs["answers"]], rel=1e-4, abs=1e-4
    )
    assert ours.result.accuracy == theirs["metrics"]["acc,none"]
    assert ours.result.perplexity == pytest.approx(theirs["metrics"]["perplexity,none"], rel=1e-4)


@passages_of("synthetic")
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("form", ["detokenised", "raw", "jsonl"])
def test_lambada_of_synthetic_passages(ours: Any, theirs: Any, model: str, form: str) -> None:
    found = ours[model][f"synthetic_{form}"]
    assert 0 < found.result.truncated < found.result.passages
    assert_same_lambada(found, theirs[model][f"synthetic_{form}"])
    if model == "trained, GPT-2 format":
        assert 0 < found.result.accuracy < 1


@passages_of("development")
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("form", ["detokenised", "raw", "jsonl"])
def test_lambada_of_its_development_split(ours: Any, theirs: Any, model: str, form: str) -> None:
    found = ours[model][f"development_{form}"]
    assert found.result.passages == SLICE
    assert 0 < found.result.truncated < SLICE
    assert_same_lambada(found, theirs[model][f"development_{form}"])


@passages_of("synthetic")
@pytest.mark.parametrize("model", MODELS)
def test_perplexity_in_disjoint_windows(ours: Any, theirs: Any, model: str) -> None:
    found, metrics = ours[model]["documents"].result, theirs[model]["documents"]["metrics"]
    assert found.documents < found.windows
    assert found.bits_per_byte == pytest.approx(metrics["bits_per_byte,none"], rel=1e-5)
    assert found.word_perplexity == pytest.approx(metrics["word_perplexity,none"], rel=1e-4)
