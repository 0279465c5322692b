"""WikiText by convention: its articles as documents, detokenised, with words and bytes counted before that.

The conventions are those of Megatron-LM's zero-shot tasks (the replacements) and of lm-evaluation-harness's `wikitext`
(the same replacements, a document for every article, what counts as a word), so that perplexities compare.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

# In this order: some would no longer match after others.
_SEPARATORS = {"s '": "s'", " @-@ ": "-", " @,@ ": ",", " @.@ ": "."}
_PUNCTUATION = ":;.!?,"
_ENCLOSING = (("(", ")"), ("[", "]"), ("{", "}"), ('"', '"'), ("'", "'"))
_REST = {
    "= = = =": "====",
    "= = =": "===",
    "= =": "==",
    " ° ": "°",
    " \n": "\n",
    "\n ": "\n",
    " N ": " 1 ",  # of Penn Treebank's numbers, kept because the convention has it
    " 's": "'s",
}


def _enclosing_patterns() -> list[tuple[re.Pattern[str], str]]:
    """White space within a pair of brackets or quotes, at both ends, and what is left without it."""
    patterns = []
    for opening, closing in _ENCLOSING:
        inner = rf"{re.escape(opening)}\s*([^{re.escape(closing)}]*?)\s*{re.escape(closing)}"
        patterns.append((re.compile(inner), rf"{opening}\1{closing}"))
    return patterns


_PATTERNS = _enclosing_patterns()


def detokenise(text: str) -> str:
    """WikiText's tokens, separated by spaces, as text."""
    for old, new in _SEPARATORS.items():
        text = text.replace(old, new)
    for mark in _PUNCTUATION:
        text = text.replace(f" {mark} ", f"{mark} ")
    for pattern, new in _PATTERNS:
        text = pattern.sub(new, text)
    for old, new in _REST.items():
        text = text.replace(old, new)
    return text


def articles(text: str) -> Iterator[str]:
    """The articles of a raw WikiText file, each beginning with its title (" = Title = "). White space alone is none."""
    lines: list[str] = []
    for line in text.split("\n"):
        if _is_title(line):
            yield from _joined(lines)
            lines = []
        lines.append(line)
    yield from _joined(lines)


def count_words(article: str) -> int:
    """Words as lm-evaluation-harness counts them: what white space separates, which makes an empty one of each end."""
    return len(re.split(r"\s+", article))


def _is_title(line: str) -> bool:
    """A heading of the first level; those below have more than one = at each end."""
    words = line.split()
    marks = [word == "=" for word in words]
    return len(words) > 2 and marks[0] and not marks[1] and marks[-1] and not marks[-2]


def _joined(lines: list[str]) -> Iterator[str]:
    text = "\n".join(lines)
    if text.strip():
        yield text
