"""Tiny runs of `megatron_sbld.training.loop.pretrain` on real text, many of them in the same processes.

    config = tiny_run(folder, corpus, drop={"policy": "layerdrop"})
    outcomes = run_trainers(2, [config, *stop_and_resume(config, 3)])     # two ranks, three calls of pretrain
    losses(config.logging.run_dir)

Rank by rank, an outcome is the exit status, or the error as text. What a run did is in its folder.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_sbld.checkpoint.start import find_start, planned_length
from megatron_sbld.config.sections import Config
from megatron_sbld.data.blend import check_data
from megatron_sbld.data.tokenizer import load_tokenizer
from megatron_sbld.method.policy import FullDepthPolicy
from megatron_sbld.sensitivity.file import SensitivityFile
from megatron_sbld.training.run import Run
from tests.harness import run_distributed

LAYERS, SEQUENCE, ITERATIONS = 4, 32, 8
REPOSITORY = Path(__file__).resolve().parents[2]

SECTIONS: dict[str, dict[str, Any]] = {
    "model": {
        "num_layers": LAYERS,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "seq_length": SEQUENCE,
        "transformer_impl": "local",
    },
    "optimizer": {"lr": 1e-2, "min_lr": 1e-3, "lr_warmup_iters": 2},
    "training": {
        "micro_batch_size": 1,
        "global_batch_size": 8,
        "train_iters": ITERATIONS,
        "eval_interval": 0,
        "eval_iters": 1,
        "precision": "fp32",
    },
    "logging": {"progress": "none", "tensorboard": False},
    "checkpoint": {"save_at_end": False},
}
FULL_DEPTH = {"policy": "none"}
HALF = {"policy": "layerdrop", "theta": 0.5}
"""Half of the layers."""
NO_DROPOUT = {"hidden_dropout": 0.0, "attention_dropout": 0.0}
LAYERS_THAT_MATTER: dict[str, dict[str, Any]] = {
    "model": {"init_method_std": 1.0},
    "optimizer": {"lr": 1e-4, "min_lr": 1e-5},
    "training": {"micro_batch_size": 2, "global_batch_size": 16, "train_iters": 40},
}
"""A run in which leaving out a layer costs tenths of nats, each another amount, and goes on doing so."""
BOTH_OVERLAPS = {
    "use_distributed_optimizer": True,
    "overlap_grad_reduce": True,
    "overlap_param_gather": True,
    "ddp_bucket_size": 20_000,
}
MODULES = (
    "argparse ast calendar codecs configparser contextlib csv dataclasses difflib doctest enum fractions functools "
    "heapq inspect optparse pickle random shutil statistics subprocess tarfile textwrap threading tokenize traceback "
    "typing uuid"
)
SOURCES = [str(Path(os.__file__).with_name(f"{name}.py")) for name in MODULES.split()]
"""Text that every machine has, in every Python from 3.10 on, and that no change of this package changes."""


def prepare_corpus(folder: Path) -> Path:
    """Python's own sources as byte-level tokens; the prefix without _train or _valid."""
    from megatron_sbld.data.prepare import PrepareConfig, prepare

    corpus = folder / "corpus"
    prepare(PrepareConfig(inputs=SOURCES, output=str(corpus), valid_fraction=0.2, workers=1, quiet=True))
    return corpus


def write_sensitivity(folder: Path, num_layers: int = LAYERS) -> str:
    """A sensitivity file in which deeper layers matter more."""
    path = folder / f"sensitivity_{num_layers}.json"
    SensitivityFile.from_gaps(
        [0.1 * layer for layer in range(num_layers)], [0.01] * num_layers, {"command": "made up"}
    ).save(path)
    return str(path)


def sbld(folder: Path) -> dict[str, Any]:
    """A drop section that leaves out about half of the layers, each with its own keep probability."""
    return {
        "policy": "sbld",
        "sensitivity": write_sensitivity(folder),
        "theta": 0.4,
        "peak_iteration": 3,
        "peak_theta": 0.5,
        "beta": 0.3,
        "theta_min": 0.3,
        "allow_layers": [2],
    }


def dynamic(folder: Path) -> dict[str, Any]:
    """`sbld` with a sensitivity that is renewed every 10 iterations from the losses of single microbatches."""
    return {
        **sbld(folder),
        "sensitivity_update": "dynamic",
        "decision_scope": "microbatch",
        "update_interval": 10,
        "update_memory": 100,
    }


def tiny_sections(folder: Path, corpus: Path, **sections: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """A config as YAML would give it: the tiny run in `folder`, with fields of any section replaced."""
    base = {
        **SECTIONS,
        "data": {"train_data_path": [f"{corpus}_train"], "valid_data_path": []},
        "logging": {**SECTIONS["logging"], "run_dir": str(folder)},
    }
    names = [*base, *(name for name in sections if name not in base)]
    return {name: {**base.get(name, {}), **sections.get(name, {})} for name in names}


def tiny_run(folder: Path, corpus: Path, **sections: Mapping[str, Any]) -> Config:
    """`tiny_sections` as a Config."""
    types = {name: type(getattr(Config(), name)) for name in Config.__dataclass_fields__}
    values = tiny_sections(folder, corpus, **sections)
    return Config(**{name: types[name](**fields) for name, fields in values.items()})


def without_dropout(folder: Path, corpus: Path, name: str, **sections: Any) -> Config:
    """A run in which equal decisions must give equal losses."""
    return tiny_run(folder / name, corpus, **{"model": NO_DROPOUT, "drop": sbld(folder), **sections})


def change(config: Config, **sections: Mapping[str, Any]) -> Config:
    """The config with fields of some sections replaced."""
    return replace(config, **{name: replace(getattr(config, name), **fields) for name, fields in sections.items()})


def in_folder(config: Config, folder: Path | str) -> Config:
    """The same run in another run folder."""
    return change(config, logging={"run_dir": str(folder)})


def stop_and_resume(config: Config, iterations: int) -> list[Config]:
    """The same run twice: stopped and saved after some iterations, and continued to its end."""
    return [change(config, training={"exit_after_iterations": iterations}), config]


def run_trainers(
    world_size: int, configs: Sequence[Config | Sequence[Config]], timeout: float = 300.0
) -> list[list[int | str]]:
    """Call `pretrain` with each config, one after the other, on the same `world_size` new processes.

    Args:
        world_size: processes, started as torchrun would.
        configs: of each call, for all ranks or a list with one for each.
        timeout: seconds for all of it.

    Returns:
        For each config the outcome of each rank: its exit status, or "ErrorType: message".
    """
    per_call = [config if isinstance(config, Config) else list(config) for config in configs]
    return call_on_ranks(world_size, _run_on_rank, per_call, timeout)


def call_on_ranks(
    world_size: int, function: Callable[[Any], Any], arguments: Sequence[Any], timeout: float = 300.0
) -> list[list[Any]]:
    """Call `function`, which makes a process group of its own, with each argument on the same new processes.

    Returns:
        For each argument what each rank returned.
    """
    # Each call has a store of its own: keys of the last one must not be taken for the present one's.
    stores = [dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) for _ in arguments]
    ports = [store.port for store in stores]
    by_rank = run_distributed(_call_each, world_size, function, ports, list(arguments), timeout=timeout)
    return [list(outcomes) for outcomes in zip(*by_rank, strict=True)]


def _call_each(function: Callable[[Any], Any], ports: list[int], arguments: list[Any]) -> list[Any]:
    """On one rank: leave the harness's process group, let each call make its own, and come back."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    dist.barrier()  # a rank that leaves while another still connects to it fails that one
    dist.destroy_process_group()
    os.environ.update(MASTER_ADDR="127.0.0.1", LOCAL_RANK=str(rank), TORCHELASTIC_USE_AGENT_STORE="True")
    outcomes = []
    for port, argument in zip(ports, arguments, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        outcomes.append(function(argument))
    store = dist.TCPStore("127.0.0.1", ports[0], is_master=False)
    dist.init_process_group("gloo", store=dist.PrefixStore("end", store), rank=rank, world_size=world_size)
    return outcomes


def _run_on_rank(config: Config | list[Config]) -> int | str:
    return run_here(config if isinstance(config, Config) else config[int(os.environ["RANK"])])


def run_here(config: Config) -> int | str:
    """Call `pretrain` in this process."""
    from megatron_sbld.evaluation.in_training import TasksInTraining
    from megatron_sbld.training.loop import pretrain

    try:
        return pretrain(config, TasksInTraining)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def full_depth_run(config: Config) -> Run:
    """The parts of a run that drops nothing, from where the config says; within `distributed_run`."""
    tokenizer = load_tokenizer(config.data.tokenizer)
    data = check_data(config, tokenizer)
    start = find_start(config, tokenizer, data)
    policy = FullDepthPolicy(config.model.num_layers)
    return Run(config, tokenizer, data, policy, start, planned_length(config, start))


def trained(config: Config, folder: Path) -> list[float]:
    """Losses of a run from beginning to end in a folder of its own, in this process."""
    assert run_here(in_folder(config, folder)) == 0
    return losses(folder)


def rows(run_dir: Path | str) -> list[dict[str, Any]]:
    """All rows of metrics.jsonl."""
    return [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]


def train_rows(run_dir: Path | str) -> list[dict[str, Any]]:
    """The rows of training iterations, which must be 1, 2, 3, ... without a gap or a repetition."""
    found = [row for row in rows(run_dir) if "loss" in row]
    assert [row["iteration"] for row in found] == list(range(1, len(found) + 1))
    return found


def losses(run_dir: Path | str) -> list[float]:
    """Training losses by iteration."""
    return [row["loss"] for row in train_rows(run_dir)]


def valid_losses(run_dir: Path | str) -> dict[int, float]:
    """Validation losses by the iteration that they follow."""
    return {row["iteration"]: row["valid_loss"] for row in rows(run_dir) if "valid_loss" in row}


def decisions(run_dir: Path | str) -> list[list[float]]:
    """Share of the microbatches that each layer ran in, by iteration."""
    return [row["kept"] for row in train_rows(run_dir)]


def rates(run_dir: Path | str) -> list[tuple[float, int]]:
    """Learning rate after each iteration, and the layer-tokens that are consumed then."""
    return [(row["lr"], row["consumed_layer_tokens"]) for row in train_rows(run_dir)]


def updates(run_dir: Path | str) -> list[dict[str, Any]]:
    """The rows of updates of the sensitivity."""
    return [row for row in rows(run_dir) if "gap" in row]
