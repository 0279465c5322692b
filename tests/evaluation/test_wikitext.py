"""WikiText by convention: its articles, its text, its words."""

from __future__ import annotations

import pytest

from megatron_sbld.evaluation.wikitext import articles, count_words, detokenise


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        (" = Homarus gammarus = \n \n It is blue . \n", " = Homarus gammarus =\n\nIt is blue.\n"),
        ("a mass of 6 kilograms ( 13 lb ) , and", "a mass of 6 kilograms (13 lb), and"),
        ("0 @.@ 7 to 2 @.@ 2 kg , 1 @,@ 300 , red @-@ tipped", "0.7 to 2.2 kg, 1,300, red-tipped"),
        ('only becoming " lobster red " on cooking', 'only becoming "lobster red" on cooking'),
        ("the lobster 's claws and lobsters ' claws", "the lobster's claws and lobsters' claws"),
        ("what ? no ! so ; and : this", "what? no! so; and: this"),
        (" = = Life cycle = = \n = = = Eggs = = = \n", " == Life cycle ==\n=== Eggs ===\n"),
        ("[ 1 ] { x } at 5 ° C", "[1] {x} at 5°C"),
        ("the N word", "the 1 word"),
    ],
)
def test_known_lines_become_text(tokens, text):
    assert detokenise(tokens) == text


def test_an_article_begins_at_a_heading_of_the_first_level():
    text = " \n = One = \n a \n = = Part = = \n b = c \n = Two = \n d \n"
    assert list(articles(text)) == [" = One = \n a \n = = Part = = \n b = c ", " = Two = \n d \n"]


@pytest.mark.parametrize(
    "line", [" = = Part = = ", " = = Part = ", " = Part = = ", " = = ", " = ", " a = b = ", " = a = b "]
)
def test_what_only_resembles_a_title_begins_no_article(line):
    assert list(articles(f"a\n{line}\nb")) == [f"a\n{line}\nb"]


def test_text_without_headings_is_one_article_and_white_space_none():
    assert list(articles("a b \n c")) == ["a b \n c"]
    assert list(articles(" \n \n")) == []


def test_words_are_counted_as_lm_evaluation_harness_counts_them():
    assert count_words(" = One = \n a b ") == 5 + 2  # an empty word at each end


def test_the_validation_split_has_the_known_size(shared_file):
    """60 articles; 213,886 words and the two empty ones of each article."""
    found = list(articles(shared_file("wiki.valid.raw").read_text(encoding="utf-8")))
    assert len(found) == 60
    assert sum(len(article.split()) for article in found) == 213_886
    assert sum(map(count_words, found)) == 213_886 + 2 * 60
    assert not any(mark in detokenise(article) for article in found for mark in (" @-@ ", " , ", "= =", " \n"))
