"""Turns LAMBADA's tokens, separated by spaces, back into the text that they were cut from.

The passages are lower-case and cut by the Penn Treebank's rules: quotes are `` and '', or ` and ', n't and 's stand
alone, brackets are -lrb- and the like. Case and paragraphs are lost, so the result is not the text of OpenAI's
lambada_test.jsonl, but it is spaced as text is, which is what models are trained on.

Own code rather than NLTK's TreebankWordDetokenizer, which leaves single quotes and brackets as they are and glues an
ellipsis or a dash to the word after it: tests/evaluation/test_detokenise.py counts what goes wrong on the development
split.
"""

from __future__ import annotations

from collections.abc import Sequence

_BRACKETS = {"-lrb-": "(", "-rrb-": ")", "-lsb-": "[", "-rsb-": "]", "-lcb-": "{", "-rcb-": "}"}
_ENDINGS = ("n't", "'s", "'m", "'re", "'d", "'ll", "'ve")
_AFTER_NO_SPACE = (".", ",", "?", "!", ";", ":", "...", "?!", "!?", "!!", "!!!", "??", "%", ")", "]", "}", *_ENDINGS)
_BEFORE_NO_SPACE = ("(", "[", "{", "$", "£", "€")
_SPLIT_WORDS = {  # words that the Treebank's rules cut in two
    "can": "not",
    "gon": "na",
    "wan": "na",
    "got": "ta",
    "gim": "me",
    "lem": "me",
    "d'": "ye",
    "'t": "was",
}
_CLAUSE_ENDS = frozenset([".", ",", "?", "!", ";", "...", "?!", "!?", "--", "-"])

_OPENING, _CLOSING = "opening", "closing"


def detokenise(tokens: Sequence[str]) -> str:
    """The text of a passage. No token is changed but quotes and brackets, and none is left out.

    The last word stays as it is, with a quote or bracket in front of it where one was opened just before.
    """
    double, single = _Quotes('"'), _Quotes("'")
    text: list[str] = []
    glue = True  # whether the next token follows without a space
    for position, token in enumerate(tokens):
        before = tokens[position - 1] if position else None
        after = tokens[position + 1] if position + 1 < len(tokens) else None
        written, side = _BRACKETS.get(token, token), None
        if token == "``":
            written, side = '"', double.open()
        elif token in ("''", '"'):
            written, side = '"', double.either(before, after)
        elif token == "`":
            written, side = "'", single.open()
        elif token == "'":
            written, side = "'", single.either(before, after)
        is_last = after is None
        joins = side == _CLOSING or written in _AFTER_NO_SPACE
        joins = joins or (before is not None and _SPLIT_WORDS.get(before) == token and not is_last)
        text.append(written if glue or joins else f" {written}")
        glue = side == _OPENING or written in _BEFORE_NO_SPACE
    return "".join(text)


class _Quotes:
    """Which side the quotes of one kind are on; a passage may begin within a quotation and end within one."""

    def __init__(self, mark: str) -> None:
        self._mark = mark
        self._is_open = False

    def open(self) -> str:
        self._is_open = True  # also when one is open: every paragraph of a long speech opens it anew
        return _OPENING

    def either(self, before: str | None, after: str | None) -> str:
        """The side of a mark that mostly closes, but opens where the passage's tokeniser did not notice."""
        apostrophe = self._mark == "'" and before is not None and before.isalpha() and before.endswith("s")
        if apostrophe and after is not None:  # a possessive
            return _CLOSING
        if self._is_open:
            self._is_open = False
            return _CLOSING
        closed_just_now = before in ("''", "'", '"')
        if self._mark == "'":
            within_clause = before is not None and before not in _CLAUSE_ENDS and not closed_just_now
            opens = after is not None and (closed_just_now or within_clause or after == "i") and after[0].isalnum()
        else:
            opens = after is not None and (closed_just_now or before in (None, ":"))
        self._is_open = opens
        return _OPENING if opens else _CLOSING
