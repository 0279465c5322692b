"""What the tests on a Slurm cluster share: a folder for the jobs of a module, tokens, a run to be interrupted."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launch.jobs import write_long_run
from tests.training.trainer_helpers import prepare_corpus


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cluster")


@pytest.fixture(scope="module")
def corpus(folder: Path) -> Path:
    return prepare_corpus(folder)


@pytest.fixture(scope="module")
def config(folder: Path, corpus: Path) -> Path:
    return write_long_run(folder, corpus)
