"""Small texts for evaluations, made of this package's own words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

_PASSAGES = (
    "the layer that was dropped keeps its weights , and the layer that was kept moves them .",
    "`` you did n't say that , '' she said , and he knew that she did n't believe what he had said",
    "a model of a few iterations knows little more than that a space follows a word",
    "each rank draws the same decision from the same seed , so no rank waits for another rank",
    "what is measured once is a number and what is measured three times is a measurement",
    "he read the page again , and when he came to the end of it he turned the page",
    "she had asked for tea",
)


@pytest.fixture(scope="session")
def passages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file in LAMBADA's plain form."""
    file = tmp_path_factory.mktemp("passages") / "passages.txt"
    file.write_text("".join(f"{passage}\n" for passage in _PASSAGES), encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def passages_jsonl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file in its other form."""
    file = tmp_path_factory.mktemp("passages") / "passages.jsonl"
    file.write_text("".join(json.dumps({"text": passage}) + "\n" for passage in _PASSAGES), encoding="utf-8")
    return file
