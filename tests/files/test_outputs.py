"""An output never overwrites an input, whatever they are called."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron_sbld.files.outputs import refuse_inputs


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "source.txt"
    path.write_text("text")
    return path


def spelled(how: str, source: Path) -> Path:
    """Another name of the source."""
    other = source.parent.parent / "other.txt"
    if how == "hard link":
        other.hardlink_to(source)
    elif how == "symbolic link":
        other.symlink_to(source)
    elif how == "link to the folder":
        other.symlink_to(source.parent)
        return other / source.name
    elif how == "relative":
        return Path(os.path.relpath(source))
    elif how == "dots":
        return source.parent / ".." / source.parent.name / source.name
    return other if other.exists() else source


@pytest.mark.parametrize("how", ["", "hard link", "symbolic link", "link to the folder", "relative", "dots"])
def test_an_output_that_is_an_input_is_refused_under_every_name(source: Path, how: str) -> None:
    other = spelled(how, source)
    for inputs in ([source], [None, "nothing", source], [source.parent]):
        with pytest.raises(ValueError, match=r"--out: .* is an input, and would be overwritten"):
            refuse_inputs("--out", [source.parent / "new", other], inputs)
    with pytest.raises(ValueError, match="is an input"):
        refuse_inputs("--out", [source], [other])
    assert source.read_text() == "text"


def test_other_files_may_be_written(source: Path) -> None:
    other = source.parent / "other.txt"
    refuse_inputs("--out", [other], [source.parent])  # a new file in a folder of inputs
    other.write_text("other")
    refuse_inputs("--out", [other, source.parent, "/dev/null"], [source, "/dev/null", None, "byte"])
