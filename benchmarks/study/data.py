"""Texts of the study, in tokens: byte-level BPEs, the novels, a small part of them, and two held-out sets.

`valid` is what runs are watched with (and stopped by, in the regime of many epochs), `final` is what their last loss is
of; they are beginnings of different held-out novels. Nothing of it is written anywhere but into the work folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import tokenizers

from benchmarks.study.settings import VOCABULARY
from megatron_sbld.data.documents import DocumentRules, read_documents

ROOT = Path(__file__).resolve().parents[2]
SEPARATOR = "<|endoftext|>"
DEFAULT_TEXT = ROOT.parent / "shared" / "data"
VALID_CHARACTERS, FINAL_CHARACTERS = 60_000, 120_000  # of each novel: about 200,000 tokens of the final loss
SMALL_DOCUMENTS, SMALL_CHARACTERS = 10, 30_000
FACTS = "texts.json"


def prepare(text: Path, work: Path) -> None:
    """Everything that runs read, written into the work folder; what is there already is left alone."""
    train, held_out = _text_files(text)
    work.mkdir(parents=True, exist_ok=True)
    if (work / FACTS).exists():
        return
    books, others = _documents(train), _documents(held_out)
    half = len(others) // 2
    parts = {
        "train": books,
        "small": [book[:SMALL_CHARACTERS] for book in books[:SMALL_DOCUMENTS]],
        "valid": [book[:VALID_CHARACTERS] for book in others[:half]],
        "final": [book[:FINAL_CHARACTERS] for book in others[half:]],
    }
    tokens = {}
    for vocabulary in VOCABULARY.values():
        tokenizer = work / f"tokenizer_{vocabulary}.json"
        _train_tokenizer(books, vocabulary, tokenizer)
        for name, documents in parts.items():
            tokens[f"{name}_{vocabulary}"] = _tokenize(documents, work, f"{name}_{vocabulary}", tokenizer)
    facts = {"text": _digest(parts), "tokens": tokens}
    (work / FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def text_id(work: Path) -> str | None:
    """What the prepared texts are; None where nothing is prepared."""
    file = work / FACTS
    return json.loads(file.read_text(encoding="utf-8"))["text"] if file.exists() else None


def tokens_of(work: Path, name: str, width: int) -> int:
    return json.loads((work / FACTS).read_text(encoding="utf-8"))["tokens"][f"{name}_{VOCABULARY[width]}"]


def data_section(work: Path, regime: str, width: int) -> dict[str, object]:
    """The data section of a run's config."""
    vocabulary = VOCABULARY[width]
    train = {"once": "train", "epochs": "small", "tokens": "train"}[regime]
    return {
        "tokenizer": str(work / f"tokenizer_{vocabulary}.json"),
        "train_data_path": [str(work / f"{train}_{vocabulary}_train")],
        "valid_data_path": [str(work / f"valid_{vocabulary}_train")],
        "perplexity_path": str(work / f"final_{vocabulary}_train"),
        "perplexity_format": "dataset",
        "data_cache_path": str(work / "data_cache"),
    }


def _text_files(text: Path) -> tuple[Path, Path]:
    """The training and the held-out text of a folder. Raises ValueError where there is not one of each."""
    found = []
    for kind in ("train", "valid"):
        files = sorted(path for path in text.glob(f"*{kind}.txt*") if path.is_file())
        if len(files) != 1:
            raise ValueError(
                f"--text {text} is not allowed: it must be a folder with one file *{kind}.txt (or .txt.xz, .txt.gz), "
                f"novels with a line {SEPARATOR} after each; found {len(files)}"
            )
        found += files
    return found[0], found[1]


def _documents(path: Path) -> list[str]:
    return [text for text in read_documents(str(path), DocumentRules(separator=SEPARATOR)) if text.strip()]


def _train_tokenizer(books: Sequence[str], vocabulary: int, file: Path) -> None:
    backend = tokenizers.ByteLevelBPETokenizer()
    backend.train_from_iterator(books, vocab_size=vocabulary, special_tokens=[SEPARATOR], show_progress=False)
    backend.save(str(file))


def _tokenize(documents: Sequence[str], work: Path, name: str, tokenizer: Path) -> int:
    """A data set of all documents, as `megatron-sbld prepare` makes it; its tokens. The text itself does not stay."""
    from megatron_sbld.data.prepare import PrepareConfig  # loads megatron-core: only where it is needed
    from megatron_sbld.data.prepare import prepare as make_dataset

    text = work / f"{name}.txt"
    text.write_text("".join(f"{document.rstrip()}\n{SEPARATOR}\n" for document in documents), encoding="utf-8")
    files = {"inputs": [str(text)], "output": str(work / name), "tokenizer": str(tokenizer)}
    try:
        config = PrepareConfig(**files, valid_fraction=0.0, workers=1, overwrite=True, quiet=True)
        return make_dataset(config).splits["train"].tokens
    finally:
        text.unlink()


def _digest(parts: dict[str, list[str]]) -> str:
    content = hashlib.sha256()
    for name, documents in parts.items():
        content.update(name.encode())
        for document in documents:
            content.update(document.encode())
    return content.hexdigest()[:12]
