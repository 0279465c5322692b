"""LAMBADA's tokens as text: what is joined to what, and how many of the development split's passages come out badly."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sbld.evaluation.detokenise import detokenise

FAULTS = {
    "a mark or an ending apart from its word": r" (?:[.,?!;:]|\.\.\.|n't|'s|'re|'ll|'ve)(?= |$)",
    "quotes of the Treebank": r"`|''",
    "brackets of the Treebank": r"-[lr][rsc]b-",
    "a quote with a space on both sides": r"""(?:^| )["'](?: |$)""",
    "a quote that closes where it should open": r"""[a-z0-9.,?!]"[a-z0-9]""",
    "an ellipsis or a dash glued to what follows": r"(?:\.\.\.|--)[a-z]",
}
"""Each is in hundreds of passages as NLTK 3.10's TreebankWordDetokenizer writes them, in 728 of 4,869 altogether."""


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        ("`` i do n't know , '' she said . `` why ?", '"i don\'t know," she said. "why?'),
        ("he 's there , they 're not , i 'd go , we 'll see", "he's there, they're not, i'd go, we'll see"),
        ("` look , ' he said . ` it 's the boys ' room", "'look,' he said. 'it's the boys' room"),
        ("the gordons ' house ... and then -- well", "the gordons' house... and then -- well"),
        ("he -lrb- kind of -rrb- slept -lsb- sic -rsb- there", "he (kind of) slept [sic] there"),
        ("you ca n't go , you wo n't , i can not say", "you can't go, you won't, i cannot say"),
        ("i am gon na go ; i got ta sleep", "i am gonna go; i gotta sleep"),
        ("it cost $ 10 , or 50 % more", "it cost $10, or 50% more"),
        ("out . '' `` and '' `` so", 'out." "and" "so'),  # begins within a quotation
        ("empty threats . ' ' i do not , ' she said", "empty threats.' 'i do not,' she said"),
        ("voice continued : '' -- 8600 , '' he said", 'voice continued: "-- 8600," he said'),
        ("underneath stencilled ' a bit dirty ? ' in red", "underneath stencilled 'a bit dirty?' in red"),
        ("`` h. . . hi , '' she said", '"h... hi," she said'),
        ("can not", "can not"),  # the last word stays apart, whatever it is
        ("they shouted , `` run", 'they shouted, "run'),
    ],
)
def test_tokens_are_joined_as_text_is_written(tokens, text):
    assert detokenise(tokens.split()) == text


WORDS = st.lists(
    st.sampled_from(["he", "boys", "i", "so", "``", "''", "`", "'", ".", ",", "...", "--", "n't", "'s", "("])
)


@given(WORDS, st.sampled_from(["jared", "na", "not", "me", "i"]))
def test_no_token_is_lost_and_the_last_word_stays_a_word_of_its_own(tokens, last):
    tokens = [*tokens, last]
    text = detokenise(tokens)
    plain = {"``": '"', "''": '"', "`": "'"}
    assert text.replace(" ", "") == "".join(plain.get(token, token) for token in tokens)
    assert text.split(" ")[-1].lstrip("\"'(") == last


def test_no_passage_of_the_development_split_comes_out_badly(shared_file):
    lines = shared_file("lambada_development_plain_text.txt").read_text(encoding="utf-8").splitlines()
    texts = [detokenise(line.split(" ")) for line in lines]
    found = {fault: sum(bool(re.search(pattern, text)) for text in texts) for fault, pattern in FAULTS.items()}
    assert found == dict.fromkeys(FAULTS, 0)
    assert len(texts) == 4869


def test_text_that_is_written_as_text_stays_as_it_is(shared_file):
    lines = shared_file("lambada_development_plain_text.txt").read_text(encoding="utf-8").splitlines()
    texts = [detokenise(line.split(" ")) for line in lines]
    assert [detokenise(text.split(" ")) for text in texts] == texts


def test_the_last_word_of_the_development_split_gets_an_opening_quote_at_most(shared_file):
    lines = shared_file("lambada_development_plain_text.txt").read_text(encoding="utf-8").splitlines()
    glued = 0
    for line in lines:
        word, found = line.split(" ")[-1], detokenise(line.split(" ")).split(" ")[-1]
        assert found in (word, f'"{word}', f"'{word}")
        glued += found != word
    assert glued == 38
