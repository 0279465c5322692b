"""What a field may hold is read from its type: by the checks, whose messages name it, and by --help."""

from __future__ import annotations

import typing
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import pytest

from megatron_sbld.config.sections import Config
from megatron_sbld.data.prepare_config import PrepareConfig
from megatron_sbld.evaluation.options import ModelOptions, Sampling
from megatron_sbld.fields import Count, Finite, In, Share, Whole, check_fields, notes, problems, ranges
from megatron_sbld.measure.options import MeasureOptions
from megatron_sbld.predict.command import PredictOptions


@dataclass(frozen=True, kw_only=True)
class Section:
    count: Count = 3
    maybe: Annotated[Share | None, "a note"] = None
    wide: Annotated[int, Whole(0, 9)] = 0
    number: Finite = 0.0
    word: Literal["one", "two"] | None = "one"
    words: list[Literal["one", "two"]] | None = None
    switch: bool = False
    text: str = ""
    free: list[int] | None = None


@dataclass(frozen=True, kw_only=True)
class Outer:
    section: Section


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("count", 0, "count = 0 is not allowed: it must be an integer of at least 1"),
        ("count", 1.5, "count = 1.5 is not allowed: it must be an integer of at least 1"),
        ("count", True, "count = True is not allowed"),
        ("count", None, "count = null: must have a value"),
        ("maybe", 1.1, r"maybe = 1.1 is not allowed: it must be a number in \[0, 1\]"),
        ("wide", 10, r"wide = 10 is not allowed: it must be an integer in \[0, 9\]"),
        ("number", float("nan"), "number = nan is not allowed: .*, and finite"),
        ("word", "three", "word = 'three' is not allowed: it must be one of one, two"),
        ("words", ["one", "three"], "words entry = 'three' is not allowed: it must be one of one, two"),
        ("switch", 1, "switch = 1 is not allowed: it must be True or False"),
        ("text", 1, "text = 1 is not allowed: it must be text"),
        ("free", None, None),
        ("free", [-1], None),
        ("word", None, None),
        ("maybe", None, None),
        ("words", ["two"], None),
    ],
)
def test_a_field_holds_what_its_type_says(field: str, value: Any, message: str | None) -> None:
    section = replace(Section(), **{field: value})
    if message is None:
        check_fields(section)
        return
    with pytest.raises(ValueError, match=rf"^drop\.{message}"):
        check_fields(section, "drop.")


def test_all_fields_are_looked_at() -> None:
    assert len(problems(Section(count=0, number=float("inf"), text=1))) == 3  # type: ignore[arg-type]


def test_notes_are_found_outside_and_inside_of_a_union() -> None:
    assert notes(Section, str) == {"maybe": "a note"}
    assert notes(Section, In) == {"maybe": In("[0, 1]"), "number": In("(-inf, inf)")}


def test_ranges_are_sentences_for_the_help() -> None:
    assert ranges(Section) == {"count": "At least 1.", "maybe": "In [0, 1].", "wide": "In [0, 9]."}
    assert ranges(Outer)["section.wide"] == "In [0, 9]."
    assert (str(In("(0, inf)")), str(In("[0, inf)"))) == ("above 0", "at least 0")


SECTIONS = [*typing.get_type_hints(Config).values(), PrepareConfig, ModelOptions, Sampling, MeasureOptions]


@pytest.mark.parametrize("section", [*SECTIONS, PredictOptions], ids=lambda section: section.__name__)
def test_every_number_has_its_range_beside_it(section: type) -> None:
    limited = {**notes(section, Whole), **notes(section, In)}
    numbers = {
        name
        for name, hint in typing.get_type_hints(section).items()
        if {int, float} & {hint, *typing.get_args(hint)} and typing.get_origin(hint) is not list
    }
    assert numbers == set(limited)
