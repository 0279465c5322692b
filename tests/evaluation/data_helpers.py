"""A tokenizer whose tokens can be read off."""

from __future__ import annotations

from megatron_sbld.data.tokenizer import Tokenizer


class CharacterTokenizer(Tokenizer):
    """A token a character; `merged` strings are one token each, wherever they stand."""

    name = "characters"
    eod = 0

    def __init__(self, *merged):
        self._merged = {text: 2**20 + number for number, text in enumerate(merged)}
        self.vocab_size = 2**20 + len(merged)

    def encode(self, text):
        ids, position = [], 0
        while position < len(text):
            found = next((part for part in self._merged if text.startswith(part, position)), None)
            ids.append(self._merged[found] if found else ord(text[position]))
            position += len(found) if found else 1
        return ids

    def decode(self, ids):
        texts = {number: text for text, number in self._merged.items()}
        return "".join(texts.get(i) or chr(i) for i in ids if i)

    def fingerprint(self):
        return f"characters {sorted(self._merged)}"
