"""Tokenizers as files that transformers' AutoTokenizer reads without code of its own, and back.

What is written encodes as ours does: no token is added, and a control token's name in a text is encoded as characters
(`split_special_tokens`, which a caller of transformers can switch off). A text that is no valid Unicode (lone
surrogates) can be encoded by neither.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from megatron_sbld.data.tokenizer import ByteTokenizer, FileTokenizer, Tokenizer, load_tokenizer

_BYTE_CONTROL_TOKENS = ("<|endoftext|>", "<|pad|>", "<|bos|>")  # ids 256 to 258


def write_tokenizer(tokenizer: Tokenizer, folder: Path, max_length: int) -> None:
    """Write tokenizer.json and tokenizer_config.json; for GPT-2's kind of BPE also vocab.json and merges.txt.

    Args:
        tokenizer: whose `eod` becomes the end-of-sequence token.
        folder: to write to.
        max_length: tokens that the model takes.
    """
    backend = _byte_backend() if isinstance(tokenizer, ByteTokenizer) else _backend_of(tokenizer)
    content = json.loads(backend.to_str())
    content["post_processor"] = None  # what adds tokens at the ends of a text
    (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    eod = backend.id_to_token(tokenizer.eod)
    assert eod is not None, "a tokenizer has its own end-of-document token"
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": eod,  # begins the first document as it begins every other one
        "eos_token": eod,
        **({"pad_token": _BYTE_CONTROL_TOKENS[1]} if isinstance(tokenizer, ByteTokenizer) else {}),
        "model_max_length": max_length,
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": bool((content["pre_tokenizer"] or {}).get("add_prefix_space", False)),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")
    if _is_gpt2_bpe(content, eod):
        backend.model.save(str(folder))


def import_tokenizer(source: str, folder: Path) -> tuple[Tokenizer, str]:
    """Copy a tokenizer's files; the byte tokenizer, also as `write_tokenizer` writes it, needs none.

    Args:
        source: what `load_tokenizer` takes.
        folder: is made if there is something to copy.

    Returns:
        The tokenizer, and the spec to load it again: `byte`, or the path of what was copied.

    Raises:
        ValueError: it cannot be loaded.
    """
    loaded = load_tokenizer(source)
    if (
        isinstance(loaded, ByteTokenizer)
        or loaded.fingerprint() == FileTokenizer("byte", _byte_backend()).fingerprint()
    ):
        return ByteTokenizer(), "byte"
    folder.mkdir(parents=True)
    path = Path(source)
    if path.is_file():
        shutil.copyfile(path, folder / "tokenizer.json")
    elif (path / "tokenizer.json").is_file():
        shutil.copyfile(path / "tokenizer.json", folder / "tokenizer.json")
    else:
        for name in ("vocab.json", "merges.txt"):
            found = path / name if (path / name).is_file() else path / f"gpt2-{name}"
            shutil.copyfile(found, folder / name)
    return load_tokenizer(str(folder)), str(folder)


def added_at_ends(tokenizer: Tokenizer) -> list[str]:
    """Tokens that transformers would add to every text, from the tokenizer's post-processor; ours adds none."""
    if not isinstance(tokenizer, FileTokenizer):
        return []
    ids: list[int] = tokenizer.backend.encode("", add_special_tokens=True).ids
    return [str(tokenizer.backend.id_to_token(token)) for token in ids]


def _backend_of(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    assert isinstance(tokenizer, FileTokenizer), f"no files are known for {type(tokenizer).__name__}"
    return tokenizer.backend


def _byte_backend() -> tokenizers.Tokenizer:
    """The byte tokenizer: GPT-2's alphabet of bytes, numbered by their values, and no merges."""
    backend = tokenizers.Tokenizer(models.BPE(vocab=_byte_alphabet(), merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(_BYTE_CONTROL_TOKENS))
    return backend


def _byte_alphabet() -> dict[str, int]:
    """The character that stands for each byte in a byte-level BPE: itself if visible, else one from U+0100 on."""
    visible = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return {
        **{chr(byte): byte for byte in sorted(visible)},
        **{chr(256 + index): byte for index, byte in enumerate(hidden)},
    }


def _is_gpt2_bpe(content: dict[str, Any], eod: str) -> bool:
    """Whether vocab.json and merges.txt say all: GPT-2's pattern, and the end-of-text token among the others."""
    pre_tokenizer = content["pre_tokenizer"] or {}
    return (
        content["model"].get("type") == "BPE"
        and content["normalizer"] is None
        and pre_tokenizer.get("type") == "ByteLevel"
        and pre_tokenizer.get("use_regex", True)
        and not pre_tokenizer["add_prefix_space"]
        and all(token["content"] == eod for token in content["added_tokens"])
        and eod in content["model"]["vocab"]
    )
