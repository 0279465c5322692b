"""What ranks share is read from common.pt, as megatron-core up to 0.18 writes it, and from the shards, as 0.19 does."""

from __future__ import annotations

import argparse
import pathlib
import pickle
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_sbld.checkpoint import files
from megatron_sbld.checkpoint.start import patched_drop_state, saved_depth
from megatron_sbld.mcore.compat import common_state
from tests.checkpoint.checkpoint_runs import configure, run
from tests.checkpoint.common_in_shards import move_common_into_shards
from tests.harness import single_process

LAYOUTS: dict[str, Callable[[Path], Path]] = {"common.pt": lambda path: path, "in the shards": move_common_into_shards}
DROP = {"seed": 7, "iteration": 2}


class Saved:
    """A checkpoint of a tiny run with a drop state, and its weights."""

    def __init__(self, folder: Path) -> None:
        from megatron_sbld.checkpoint.manager import CheckpointManager

        with single_process(), run(configure()) as made:
            made.train([1, 2])
            CheckpointManager(folder).save(2, *made.parts, {"drop": DROP})
            self.weights = made.weights()
        self.path = files.checkpoint_path(folder, 2)

    def copy(self, folder: Path, layout: str) -> Path:
        """Of another program: without the manifest, and what ranks share as in `layout`."""
        target = Path(shutil.copytree(self.path, folder / "copy"))
        (target / files.MANIFEST).unlink()
        return LAYOUTS[layout](target)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return Saved(tmp_path_factory.mktemp("saved"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_ranks_share_is_read_from_either_place(saved: Saved, tmp_path: Path, layout: str) -> None:
    path = saved.copy(tmp_path, layout)
    state, expected = common_state(path), common_state(saved.path)
    assert state == expected
    assert (state["iteration"], state["checkpoint_version"]) == (2, 3.0)
    assert patched_drop_state(path) == DROP
    assert saved_depth(path) == 4


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_are_loaded_from_either_layout(saved: Saved, tmp_path: Path, layout: str) -> None:
    from megatron_sbld.checkpoint.manager import load_weights

    path = saved.copy(tmp_path, layout)
    with single_process(), run(configure(), seed=77) as other:
        load_weights(path, other.chunks, other.optimizer)
        found = other.weights()
    assert found.keys() == saved.weights.keys()
    assert all(torch.equal(found[name], weight) for name, weight in saved.weights.items())


def test_the_table_of_contents_names_no_class_of_one_python_alone(saved: Saved) -> None:
    assert b"pathlib" not in (saved.path / ".metadata").read_bytes()


def test_a_checkpoint_that_another_program_wrote_on_python_3_13_is_read(
    saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved.copy(tmp_path, "common.pt")
    metadata = pickle.loads((path / ".metadata").read_bytes())
    metadata.storage_meta.checkpoint_id = path
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pathlib._local", pathlib)
        patch.setattr(type(path), "__module__", "pathlib._local")
        (path / ".metadata").write_bytes(pickle.dumps(metadata))
    assert b"pathlib._local" in (path / ".metadata").read_bytes()
    assert saved_depth(path) == 4


def test_a_checkpoint_without_what_ranks_share_is_refused_by_name(saved: Saved, tmp_path: Path) -> None:
    from megatron_sbld.checkpoint.manager import load_weights

    path = saved.copy(tmp_path, "common.pt")
    (path / "common.pt").unlink()
    message = rf"checkpoint {path} cannot be loaded: it has neither common.pt nor common_state in its shards"
    with single_process(), run(configure()) as other, pytest.raises(ValueError, match=message):
        load_weights(path, other.chunks)
    with pytest.raises(ValueError, match=message):
        patched_drop_state(path)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_arguments_of_classes_that_are_not_known_here_do_not_matter(
    saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    """Of a newer megatron-core, or a path, whose class Python 3.13 pickles by another name than those before it."""
    from megatron_sbld.checkpoint.manager import load_weights

    path = saved.copy(tmp_path, "common.pt")
    module = types.ModuleType("megatron_of_the_future")
    new: Any = type("NewEnum", (), {"__module__": module.__name__, "__init__": lambda self: setattr(self, "x", 1)})
    module.NewEnum = new  # type: ignore[attr-defined]
    common = torch.load(path / "common.pt", weights_only=False)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, module.__name__, module)
        args = argparse.Namespace(num_layers=4, new=new(), path=pathlib.PurePosixPath("data"))
        torch.save({**common, "args": args}, path / "common.pt")
        LAYOUTS[layout](path)
    state = common_state(path)
    assert (state["iteration"], state["args"].num_layers) == (2, 4)
    with single_process(), run(configure(), seed=77) as other:
        load_weights(path, other.chunks)
        assert all(torch.equal(saved.weights[name], weight) for name, weight in other.weights().items())
