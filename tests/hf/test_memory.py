"""Exporting takes memory for a layer and a shard, not for the model: the peak of a process, from Linux's /proc."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from megatron_sbld.config.sections import ModelConfig
from megatron_sbld.hf.export_model import export_hf
from megatron_sbld.hf.formats import GPT2
from megatron_sbld.hf.stored_weights import LAYERS, Piece, write_pieces
from tests.hf.hf_helpers import tensors

pytestmark = pytest.mark.slow

HIDDEN, DEPTH = 512, 18
LAYER_BYTES = 12 * HIDDEN**2 * 4
SHARD_BYTES = 20_000_000
SMALL_BUFFERS_BYTES = 15_000_000


def export_measured(folder: str) -> None:
    """In a process of its own: a small export first, then print by how much another goes beyond the memory in use."""
    place = Path(folder)
    for name in ("small", "big"):
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
        before = memory_of_process("VmRSS")
        export_hf(str(place / name), str(place / f"{name}_out"), config=f"{place / name}.yaml", max_shard_size="20MB")
        print(memory_of_process("VmHWM") - before)


def memory_of_process(field: str) -> int:
    """Bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def write_ones(folder: Path, model: ModelConfig) -> None:
    """A checkpoint of a GPT-2 as another program might have saved it, and the config beside it."""
    form, layers = GPT2(), model.num_layers
    rules = [
        *((None, rule) for rule in [*form.vocabulary_rules(model, 259), *form.outer_rules(model)]),
        *((layer, rule) for layer in range(layers) for rule in form.layer_rules(model, layer)),
    ]
    pieces = [
        Piece(
            name=rule.ours if layer is None else LAYERS + rule.ours,
            shape=rule.shape,
            dtype=torch.float32,
            load=lambda rule=rule: torch.ones(rule.shape),
            layer=layer,
            num_layers=layers,
        )
        for layer, rule in rules
    ]
    folder.mkdir()
    write_pieces(folder, pieces, lambda: None)
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    torch.save({}, folder / "common.pt")
    folder.with_suffix(".yaml").write_text(yaml.safe_dump({"model": dataclasses.asdict(model)}))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_memory_is_bounded_by_a_layer_and_a_shard(tmp_path: Path) -> None:
    write_ones(tmp_path / "small", ModelConfig(num_layers=1, hidden_size=32, num_attention_heads=4, seq_length=64))
    big = ModelConfig(num_layers=DEPTH, hidden_size=HIDDEN, num_attention_heads=8, seq_length=64)
    write_ones(tmp_path / "big", big)
    program = f"from tests.hf.test_memory import export_measured; export_measured({str(tmp_path)!r})"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        capture_output=True,
        text=True,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},  # freed memory goes back at once and is not counted
        cwd=Path(__file__).resolve().parents[2],
    )
    assert done.returncode == 0, done.stderr
    used, everything = int(done.stdout.split()[-1]), DEPTH * LAYER_BYTES
    assert used < LAYER_BYTES + SHARD_BYTES + SMALL_BUFFERS_BYTES < everything / 3
    assert sum(tensor.nbytes for tensor in tensors(tmp_path / "big_out").values()) > everything
