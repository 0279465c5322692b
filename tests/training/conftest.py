"""What the tests of the trainer share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.training.trainer_helpers import prepare_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small text, prepared; of a module of its own, because files that run beside each other must not share it."""
    return prepare_corpus(tmp_path_factory.mktemp("corpus"))
