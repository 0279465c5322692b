"""Tokenizers: bytes, GPT-2's vocab.json with merges.txt, or any tokenizer.json.

A tokenizer here turns plain text into ids and back. It adds no token of its own (whoever writes documents appends
`eod`), and text never turns into a control token: the characters `<|endoftext|>` in a text are encoded as characters.
"""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

EOD_NAMES = ("<|endoftext|>", "<|end_of_text|>", "<|eod|>", "<eod>", "<|eos|>", "<eos>", "</s>")
"""Names under which a tokenizer.json may hold its end-of-document token, in order of preference."""

_GPT2_FILES = (("vocab.json", "merges.txt"), ("gpt2-vocab.json", "gpt2-merges.txt"))

# Encoded into every fingerprint: tokenizers with one vocabulary but other rules of cutting or merging differ here.
_PROBE = "The 1st naïve test's text:\n\n  def f(x):\t# 日本語 Ωmega 🙂 <|endoftext|>\r\nABC abc 3.14159 ..."

# BPE slows down and needs about 100 bytes a token on long inputs; GPT-2's pattern always cuts before a single space.
_PIECE_CHARACTERS = 16384
_SAFE_CUT = re.compile(r"(?<=\S) (?=\S)")


class Tokenizer(ABC):
    """What the rest of the package needs of a tokenizer. `name` is the spec that it was loaded from."""

    name: str
    vocab_size: int
    """Largest id + 1."""
    eod: int
    """Id of the end-of-document token."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without an end-of-document token."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; special tokens are left out, invalid UTF-8 becomes U+FFFD."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A hash that is equal for tokenizers that encode alike; stored with data sets and checkpoints."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text."""
        return [self.encode(text) for text in texts]


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes 0..255 and three special ids, numbered as in Megatron's byte-level tokenizer."""

    name = "byte"
    vocab_size = 259
    eod = 256
    pad = 257
    bos = 258

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")

    def fingerprint(self) -> str:
        return _hash(["byte", self.vocab_size, self.eod])


class FileTokenizer(Tokenizer):
    """A tokenizer of the `tokenizers` library, as read from files.

    Args:
        name: what the user called it.
        backend: the tokenizer; its truncation and padding are switched off, since documents are encoded whole.

    Raises:
        ValueError: it has no end-of-document token.
    """

    def __init__(self, name: str, backend: tokenizers.Tokenizer) -> None:
        self.name = name
        self._backend = backend
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True  # despite its name: special tokens in a text are encoded as text
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        found = [token for token in EOD_NAMES if token in vocabulary]
        if not found:
            raise ValueError(f"tokenizer {name!r} has no end-of-document token; looked for {', '.join(EOD_NAMES)}")
        self.eod = vocabulary[found[0]]
        self._cuttable = _cuts_before_spaces(backend)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for piece in _pieces(text) if self._cuttable else [text]:
            ids.extend(self._backend.encode(piece, add_special_tokens=False).ids)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._backend.decode(list(ids), skip_special_tokens=True)

    @property
    def backend(self) -> tokenizers.Tokenizer:
        """The library's tokenizer; not to be changed."""
        return self._backend

    def fingerprint(self) -> str:
        # Not a hash of the files: they differ between formats and library versions that encode alike.
        return _hash([sorted(self._backend.get_vocab().items()), self.eod, self.encode(_PROBE)])


def is_of_bytes(tokens: int | None, num_bytes: int | None) -> bool:
    """Whether tokens are bytes: their perplexity by word, as 4e10, says nothing that bits per byte do not."""
    return bool(tokens and num_bytes and tokens >= num_bytes)


def load_tokenizer(spec: str) -> Tokenizer:
    """The tokenizer that `spec` names.

    Args:
        spec: `byte`, the path of a tokenizer.json, or a folder with tokenizer.json, vocab.json and merges.txt, or
            gpt2-vocab.json and gpt2-merges.txt.

    Raises:
        ValueError: nothing is there, it is no tokenizer, or it has no end-of-document token.
    """
    if spec == "byte":
        return ByteTokenizer()
    path = Path(spec)
    if path.is_file():
        return FileTokenizer(spec, _read_tokenizer_json(path))
    if not path.is_dir():
        raise ValueError(f"tokenizer {spec!r}: no such file or folder; allowed: byte, a tokenizer.json, or a folder")
    if (path / "tokenizer.json").is_file():
        return FileTokenizer(spec, _read_tokenizer_json(path / "tokenizer.json"))
    for vocab, merges in _GPT2_FILES:
        if (path / vocab).is_file() and (path / merges).is_file():
            return FileTokenizer(spec, _read_gpt2(path / vocab, path / merges))
    looked_for = ["tokenizer.json", *(f"{vocab} with {merges}" for vocab, merges in _GPT2_FILES)]
    raise ValueError(f"tokenizer {spec!r}: the folder has none of {', '.join(looked_for)}")


def _read_tokenizer_json(path: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more specific
        raise ValueError(f"tokenizer {str(path)!r} is not a tokenizer.json: {error}") from error


def _read_gpt2(vocab: Path, merges: Path) -> tokenizers.Tokenizer:
    try:
        backend = tokenizers.Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
    except Exception as error:  # the library raises nothing more specific
        raise ValueError(f"tokenizer {str(vocab)!r} with {merges.name} is not a byte-level BPE: {error}") from error
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if backend.token_to_id(EOD_NAMES[0]) is not None:  # adding it where it is missing would invent a new id
        backend.add_special_tokens([EOD_NAMES[0]])
    return backend


def _cuts_before_spaces(backend: tokenizers.Tokenizer) -> bool:
    """Whether encoding a text is the same as encoding the parts between its single spaces: GPT-2's rules alone."""
    parts = json.loads(backend.to_str())
    pre_tokenizer = parts["pre_tokenizer"] or {}
    return (
        parts["normalizer"] is None
        and pre_tokenizer.get("type") == "ByteLevel"
        and pre_tokenizer.get("use_regex", True)
        and not pre_tokenizer["add_prefix_space"]
        and all(token["special"] for token in parts["added_tokens"])
    )


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > _PIECE_CHARACTERS:
        cut = _SAFE_CUT.search(text, start + _PIECE_CHARACTERS)
        if cut is None:
            break
        yield text[start : cut.start()]
        start = cut.start()
    yield text[start:]


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
