"""Exported tokenizers encode arbitrary text as ours do, read by AutoTokenizer with its own defaults, and come back."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from megatron_sbld.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from megatron_sbld.hf.tokenizer import added_at_ends, import_tokenizer, write_tokenizer
from tests.hf import hf_peer
from tests.training.trainer_helpers import REPOSITORY, SOURCES

TEXTS = [
    "",
    " ",
    "  two  spaces \n\n end ",
    "naïve façade 日本語 Ω 🙂\r\n\ttab",
    "e\u0301 \u2028 x\x00y \ufffd",
    "before<|endoftext|>after <|endoftext|> </s><s> <|pad|>",
    " 's don't it's 3.14159 ...",
    "\u00a0\x1c\u3000mixed \u200d spaces",
    "word" * 6000 + " " + "word " * 6000,
]
# Without surrogates, which no tokenizer encodes.
ANY_TEXT = st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(" \n\t'<|>endoftextsp")))


def byte_level(folder: Path, *, add_prefix_space: bool = False, post_processor: Any = None) -> str:
    """A BPE trained on Python's sources, as GPT-2's but for what is asked for."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    backend.decoder = decoders.ByteLevel()
    if post_processor is not None:
        backend.post_processor = post_processor
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train(SOURCES[:20], trainer)
    backend.save(str(folder / "tokenizer.json"))
    return str(folder / "tokenizer.json")


def trained(folder: Path) -> str:
    return byte_level(folder)


def prefixing(folder: Path) -> str:
    return byte_level(folder, add_prefix_space=True)


def adding_tokens(folder: Path) -> str:
    ends = [("<|endoftext|>", 0)]
    return byte_level(
        folder, post_processor=processors.TemplateProcessing("<|endoftext|> $A <|endoftext|>", None, ends)
    )


def llama_like(folder: Path) -> str:
    """Words marked by a low line, bytes for what is not in the vocabulary, <s> before every text."""
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<unk>", "<s>", "</s>", *bytes_], show_progress=False, max_token_length=12
    )
    backend.train(SOURCES[:4], trainer)
    content = json.loads(backend.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] not in bytes_]
    backend = tokenizers.Tokenizer.from_str(json.dumps(content))
    backend.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    backend.save(str(folder / "tokenizer.json"))
    return str(folder / "tokenizer.json")


def published_gpt2(folder: Path) -> str:
    published = REPOSITORY.parent / "shared" / "data"
    if not (published / "gpt2-vocab.json").is_file():
        pytest.skip("gpt2-vocab.json is not at ../shared/data")
    return str(published)


def of_bytes(folder: Path) -> str:
    return "byte"


KINDS = {make.__name__: make for make in (of_bytes, trained, published_gpt2, prefixing, adding_tokens, llama_like)}


@pytest.fixture(scope="module")
def ask() -> Iterator[Callable[..., Any]]:
    with hf_peer.peer() as asking:
        yield asking


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=pytest.mark.slow) if name == "published_gpt2" else name for name in KINDS],
)
def kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, str]:
    """A tokenizer, and the folder of its export beside the config.json of a model."""
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer = load_tokenizer(KINDS[request.param](folder))
    (folder / "out").mkdir()
    write_tokenizer(tokenizer, folder / "out", 64)
    model_type = "llama" if request.param == "llama_like" else "gpt2"
    (folder / "out" / "config.json").write_text(json.dumps({"model_type": model_type}))
    return tokenizer, str(folder / "out")


@pytest.mark.slow
def test_known_hard_texts_have_the_same_ids(kind: tuple[Tokenizer, str], ask: Callable[..., Any]) -> None:
    tokenizer, folder = kind
    assert ask(hf_peer.encode, folder, TEXTS) == [tokenizer.encode(text) for text in TEXTS]


@pytest.mark.slow
@given(texts=st.lists(ANY_TEXT, min_size=1, max_size=20))
@example(texts=["<|endoftext|>"])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_has_the_same_ids(kind: tuple[Tokenizer, str], ask: Callable[..., Any], texts: list[str]) -> None:
    tokenizer, folder = kind
    assert ask(hf_peer.encode, folder, texts) == [tokenizer.encode(text) for text in texts]


@pytest.mark.slow
@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_ids_have_the_same_text(kind: tuple[Tokenizer, str], ask: Callable[..., Any], data: st.DataObject) -> None:
    tokenizer, folder = kind
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    assert ask(hf_peer.decode, folder, ids) == tokenizer.decode(ids)


@pytest.mark.slow
def test_sizes_and_the_end_of_a_document_are_ours(kind: tuple[Tokenizer, str], ask: Callable[..., Any]) -> None:
    tokenizer, folder = kind
    found = ask(hf_peer.about_tokenizer, folder)
    assert found == {"length": tokenizer.vocab_size, "eos": tokenizer.eod, "bos": tokenizer.eod}


def test_an_exported_tokenizer_comes_back(kind: tuple[Tokenizer, str], tmp_path: Path) -> None:
    tokenizer, folder = kind
    found, spec = import_tokenizer(folder, tmp_path / "tokenizer")
    assert found.fingerprint() == tokenizer.fingerprint()
    assert spec == ("byte" if isinstance(tokenizer, ByteTokenizer) else str(tmp_path / "tokenizer"))
    assert load_tokenizer(spec).fingerprint() == tokenizer.fingerprint()


def test_vocabulary_and_merges_of_gpt2s_kind_are_written_as_well(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    tokenizer = load_tokenizer(trained(tmp_path))
    write_tokenizer(tokenizer, tmp_path / "out", 64)
    (tmp_path / "out" / "tokenizer.json").unlink()
    assert load_tokenizer(str(tmp_path / "out")).fingerprint() == tokenizer.fingerprint()
    found, spec = import_tokenizer(str(tmp_path / "out"), tmp_path / "copied")
    assert found.fingerprint() == load_tokenizer(spec).fingerprint() == tokenizer.fingerprint()


@pytest.mark.parametrize(
    ("make", "added"), [(trained, []), (adding_tokens, ["<|endoftext|>", "<|endoftext|>"]), (llama_like, ["<s>"])]
)
def test_what_transformers_would_add_to_a_text_is_known(
    tmp_path: Path, make: Callable[[Path], str], added: list[str]
) -> None:
    assert added_at_ends(load_tokenizer(make(tmp_path))) == added
