"""What the tests of checkpoints do on their ranks; every case returns what it found, for test_layouts.py."""

from __future__ import annotations

import dataclasses
import resource
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_sbld.checkpoint import files
from tests.checkpoint.checkpoint_runs import CONFIG, Run, configure, run, stop_and_resume

RESUMED = {
    "plain": ({}, {}),
    "bf16": ({"precision": "bf16"}, {}),
    "fp16": ({"precision": "fp16", "loss_scale": 1024.0}, {}),
    "fp16 before its first step": ({"precision": "fp16"}, {}),
    "distributed, dp_reshardable": ({"use_distributed_optimizer": True}, {"optimizer_format": "dp_reshardable"}),
    "distributed, bf16, dp_reshardable": (
        {"use_distributed_optimizer": True, "precision": "bf16"},
        {"optimizer_format": "dp_reshardable"},
    ),
    "distributed, fully_reshardable": ({"use_distributed_optimizer": True}, {}),
    "distributed, bf16, fully_reshardable, both overlaps": (
        {
            "use_distributed_optimizer": True,
            "precision": "bf16",
            "overlap_grad_reduce": True,
            "overlap_param_gather": True,
            "ddp_bucket_size": 20_000,
        },
        {},
    ),
    "distributed, dp_reshardable, both overlaps": (
        {
            "use_distributed_optimizer": True,
            "overlap_grad_reduce": True,
            "overlap_param_gather": True,
            "ddp_bucket_size": 20_000,
        },
        {"optimizer_format": "dp_reshardable"},
    ),
    "distributed, fp16 before its first step": ({"use_distributed_optimizer": True, "precision": "fp16"}, {}),
    "pipeline": ({"pp": 2}, {}),
    "tensor": ({"tp": 2}, {}),
    "interleaved": ({"pp": 2, "vpp": 2}, {}),
    "interleaved, distributed": ({"pp": 2, "vpp": 2, "use_distributed_optimizer": True}, {}),
    "in the background": ({}, {"async_save": True}),
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "data": {},
    "tensor": {"tp": 2},
    "pipeline": {"pp": 2},
    "interleaved": {"pp": 2, "vpp": 2},
}
MOVES = [
    ("data", "tensor"),
    ("tensor", "data"),
    ("data", "pipeline"),
    ("pipeline", "data"),
    ("pipeline", "interleaved"),
    ("interleaved", "tensor"),
]
FORMATS: dict[str, dict[str, Any]] = {"not_distributed": {}, "fully_reshardable": {"use_distributed_optimizer": True}}

FULL_DISKS = {
    # rank that has no room, bytes that a file may have there, whether saving in the background
    "shards of rank 1": (1, 4096, False),
    "common file": (0, 512, False),
    "in the background": (1, 4096, True),
}


def save_run(folder: Path, config: Any, *, optimizer_format: str = "fully_reshardable") -> list[float]:
    """Train two iterations, save, and return the losses of the next two."""
    from megatron_sbld.checkpoint.manager import CheckpointManager

    with run(config) as saved:
        manager = CheckpointManager(folder, optimizer_format=optimizer_format)
        saved.train([1, 2])
        manager.save(2, *saved.parts, {})
        return saved.train([3, 4])


def load_run(folder: Path, config: Any) -> list[float]:
    """The losses of the next two iterations after loading into a model of other weights."""
    from megatron_sbld.checkpoint.manager import load_checkpoint

    with run(config, seed=77) as loaded:
        load_checkpoint(files.checkpoint_path(folder, 2), *loaded.parts, seed=5)
        return loaded.train([3, 4])


def error_of(function: Callable[[], Any]) -> str:
    """Kind and message of the error that a call must raise."""
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def absolute_sum(tensors: Iterable[torch.Tensor]) -> float:
    return sum(float(tensor.double().abs().sum()) for tensor in tensors)


def resume_cases(folder: Path, names: Iterable[str]) -> dict[str, Any]:
    outcomes = {}
    for name in names:
        config, options = RESUMED[name]
        outcomes[name] = stop_and_resume(folder / name.replace(" ", "_"), configure(**config), **options)
    return outcomes


def layout_cases(folder: Path) -> dict[str, Any]:
    """Per format and change of layout: the losses on the layout that saved, and on the other."""
    outcomes = {}
    for form, optimizer in FORMATS.items():
        expected = {
            source: save_run(folder / form / source, configure(dropout=0.0, **optimizer, **layout))
            for source, layout in LAYOUTS.items()
        }
        for source, target in MOVES:
            found = load_run(folder / form / source, configure(dropout=0.0, **optimizer, **LAYOUTS[target]))
            outcomes[form, source, target] = (expected[source], found)
    return outcomes


def from_one_process_cases(folder: Path) -> dict[str, list[float]]:
    """Losses after loading what one process saved."""
    return {
        "not_distributed": load_run(folder / "not_distributed", configure(dropout=0.0)),
        "fully_reshardable": load_run(
            folder / "fully_reshardable", configure(dropout=0.0, use_distributed_optimizer=True)
        ),
        "dp_reshardable": load_run(folder / "dp_reshardable", configure(dropout=0.0, use_distributed_optimizer=True)),
    }


def to_one_process_cases(folder: Path) -> dict[str, list[float]]:
    """Save on two data-parallel ranks, for one process to load."""
    distributed = configure(dropout=0.0, use_distributed_optimizer=True)
    return {
        "not_distributed": save_run(folder / "not_distributed", configure(dropout=0.0)),
        "fully_reshardable": save_run(folder / "fully_reshardable", distributed),
        "dp_reshardable": save_run(folder / "dp_reshardable", distributed, optimizer_format="dp_reshardable"),
    }


def refusal_cases(folder: Path) -> dict[str, str]:
    """Messages of checkpoints that do not fit."""
    plain, distributed = folder / "plain", folder / "distributed"
    save_run(plain, configure())
    save_run(distributed, configure(use_distributed_optimizer=True), optimizer_format="dp_reshardable")
    narrower = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, hidden_size=16))
    deeper = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, num_layers=6))
    no_bias = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, add_bias_linear=False))
    rope = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, position_embedding_type="rope"))
    untied = dataclasses.replace(
        CONFIG, model=dataclasses.replace(CONFIG.model, untie_embeddings_and_output_weights=True)
    )
    return {
        "distributed into plain": error_of(lambda: load_run(distributed, configure())),
        "plain into distributed": error_of(lambda: load_run(plain, configure(use_distributed_optimizer=True))),
        "dp_reshardable to tensor": error_of(
            lambda: load_run(distributed, configure(tp=2, use_distributed_optimizer=True))
        ),
        "dp_reshardable to pipeline": error_of(
            lambda: load_run(distributed, configure(pp=2, use_distributed_optimizer=True))
        ),
        "dp_reshardable to other buckets": error_of(
            lambda: load_run(
                distributed,
                configure(use_distributed_optimizer=True, overlap_grad_reduce=True, ddp_bucket_size=20_000),
            )
        ),
        "other precision": error_of(lambda: load_run(plain, configure(precision="bf16"))),
        "no such folder": error_of(lambda: load_run(folder / "nowhere", configure())),
        "narrower": error_of(lambda: load_run(plain, narrower)),
        "deeper": error_of(lambda: load_run(plain, deeper)),
        "without biases": error_of(lambda: load_run(plain, no_bias)),
        "rope": error_of(lambda: load_run(plain, rope)),
        "untied": error_of(lambda: load_run(plain, untied)),
    }


def damage_cases(folder: Path) -> dict[str, str]:
    """Messages of checkpoints whose files have been overwritten with as many other bytes."""
    save_run(folder / "good", configure())
    messages = {}
    for name in ("common.pt", ".metadata", "metadata.json", "__0_0.distcp"):
        place = folder / name.replace(".", "_")
        if dist.get_rank() == 0:
            shutil.copytree(folder / "good", place)
            damaged = files.checkpoint_path(place, 2) / name
            damaged.write_bytes(b"x" * damaged.stat().st_size)
        dist.barrier()
        messages[name] = error_of(lambda place=place: load_run(place, configure()))
    return messages


def background_case(folder: Path) -> dict[str, Any]:
    """Train on and overwrite the weights while the save is held back, then look at what was saved."""
    from megatron_sbld.checkpoint import state as checkpoint_state
    from megatron_sbld.checkpoint.manager import CheckpointManager, load_weights

    write_shards = checkpoint_state.write_shards
    go_on = threading.Event()
    checkpoint_state.write_shards = lambda *args: go_on.wait(60) and write_shards(*args)
    with run(configure(precision="bf16")) as saved:
        manager = CheckpointManager(folder, async_save=True)
        saved.train([1])
        as_saved = saved.weights()
        manager.save(1, *saved.parts, {})
        while_saving = files.latest_complete(folder)
        saved.train([2])
        for chunk in saved.chunks:
            for param in chunk.parameters():
                param.data.zero_()
        manager.poll()
        go_on.set()
        manager.save(2, *saved.parts, {})  # waits for the one under way
        after_waiting = files.checkpoint_path(folder, 1).exists()
        deadline = time.monotonic() + 60
        while not files.checkpoint_path(folder, 2).exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        manager.poll()
        manager.close()
    checkpoint_state.write_shards = write_shards
    with run(configure(precision="bf16"), seed=77) as loaded:
        load_weights(files.checkpoint_path(folder, 1), loaded.chunks, loaded.optimizer)
        found = loaded.weights()
        masters = [param for group in loaded.optimizer.param_groups for param in group["params"]]
    return {
        "complete while saving": while_saving,
        "first complete after the second began": after_waiting,
        "second complete": files.is_complete(files.checkpoint_path(folder, 2)),
        "same weights": all(torch.equal(found[name], weight) for name, weight in as_saved.items()),
        "same fp32 copies": absolute_sum(masters) == absolute_sum(as_saved.values()),
    }


@contextmanager
def full_disk(on_rank: int, limit: int) -> Iterator[None]:
    """On one rank, no file may grow beyond `limit` bytes."""
    if dist.get_rank() != on_rank:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def full_disk_cases(folder: Path) -> dict[str, Any]:
    """A complete save, one that runs out of room, and one more: message, what is left, and what is found."""
    from megatron_sbld.checkpoint.manager import CheckpointManager

    outcomes = {}
    for name, (rank, limit, background) in FULL_DISKS.items():
        place = folder / name.replace(" ", "_")
        with run(configure(tp=2)) as saved:
            manager = CheckpointManager(place, async_save=background)

            def save(iteration: int, saved: Run = saved, manager: CheckpointManager = manager) -> None:
                manager.save(iteration, *saved.parts, {})
                manager.close()

            save(1)
            with full_disk(rank, limit):
                message = error_of(lambda save=save: save(2))
            dist.barrier()
            left = sorted(path.name for path in place.glob("iter_*"))
            latest = files.latest_complete(place)
            dist.barrier()
            save(3)
        outcomes[name] = (message, left, latest.iteration, files.latest_complete(place).iteration)
    return outcomes


def keep_last_case(folder: Path) -> list[str]:
    from megatron_sbld.checkpoint.manager import CheckpointManager

    with run(configure()) as saved:
        manager = CheckpointManager(folder, keep_last=2, async_save=True)
        for iteration in (1, 2, 3):
            manager.save(iteration, *saved.parts, {})
        manager.close()
        manager.save(3, *saved.parts, {})  # saved already: as at the end of a run
    return sorted(path.name for path in folder.glob("iter_*"))


def two_rank_cases(folder: str, resumed: Iterable[str], moved: bool) -> dict[str, Any]:
    """The cases of two ranks, each with a folder of its own: named ones that resume; also those on other layouts?"""
    place = Path(folder)
    found = {
        "resume": resume_cases(place / "resume", resumed),
        "refusals": refusal_cases(place / "refusals"),
        "damages": damage_cases(place / "damages"),
        "background": background_case(place / "background"),
        "full disk": full_disk_cases(place / "full_disk"),
        "keep_last": keep_last_case(place / "keep_last"),
    }
    if moved:
        found |= {
            "layouts": layout_cases(place / "layouts"),
            "from one process": from_one_process_cases(place / "from_one"),
            "to one process": to_one_process_cases(place / "to_one"),
            "reseeded": [load_run(place / "resume" / "plain", configure(tp=2)) for _ in range(2)],
        }
    return found


FOUR_RANK_LAYOUTS: dict[str, dict[str, Any]] = {
    "tensor x pipeline": {"tp": 2, "pp": 2},
    "data x tensor": {"tp": 2},
    "data x interleaved": {"pp": 2, "vpp": 2},
    "data": {},
}


def four_rank_cases(folder: str) -> dict[tuple[str, str], Any]:
    """The distributed optimizer with both overlaps, between all layouts of four ranks."""
    options = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
    outcomes = {}
    for source, saved_layout in FOUR_RANK_LAYOUTS.items():
        place = Path(folder) / source.replace(" ", "_")
        expected = save_run(place, configure(dropout=0.0, ddp_bucket_size=20_000, **options, **saved_layout))
        for target, layout in FOUR_RANK_LAYOUTS.items():
            # Other buckets as well: they are no part of the format.
            outcomes[source, target] = (expected, load_run(place, configure(dropout=0.0, **options, **layout)))
    return outcomes
