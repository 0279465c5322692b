"""What a sensitivity measurement is to do: options and config checked, resolved and described, before anything runs."""

from __future__ import annotations

import dataclasses
import os
import platform
import subprocess
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.serialization import load_sharded_metadata

import megatron_sbld
from megatron_sbld.checkpoint.files import MANIFEST, find_checkpoint, verify_weights
from megatron_sbld.checkpoint.layers import begun_layers
from megatron_sbld.checkpoint.manager import saved_model
from megatron_sbld.checkpoint.start import Start, find_load
from megatron_sbld.checks import check_integer
from megatron_sbld.config.sections import MAX_SEED, Config
from megatron_sbld.config.validate import train_iterations, validate
from megatron_sbld.data.blend import RunData, check_data
from megatron_sbld.data.tokenizer import Tokenizer, load_tokenizer
from megatron_sbld.measure.options import MeasureOptions, check_options, parse_layers, parse_numbers
from megatron_sbld.method.config import DropConfig
from megatron_sbld.method.in_force import dropped_update, drops_tokens
from megatron_sbld.sensitivity.lists import choose_lists
from megatron_sbld.sensitivity.measurement import Method, Request
from megatron_sbld.sensitivity.stats import window_length
from megatron_sbld.training.model import check_model

AFFORDABLE_FRACTION = 0.05
"""Of the training run: what a measurement should cost at most (SBLD, "Layer-Wise Sensitivity")."""
FORWARD_COST = 1.0 / 3.0
"""Of a training iteration: a forward pass alone; backward takes twice as long."""

# How a drop is carried out; what decides where and how often is the measurement's own.
_DROP_FIELDS = ("decision_scope", "sampler", "balance_stages", "replicas", "granularity", "residual", "dropped_update")
_IRRELEVANT = {
    "model": set(),
    "optimizer": {"lr_schedule_by"},  # _measuring_config sets it
    "parallel": {"distributed_backend", "distributed_timeout_minutes"},
    "training": {"seed", "eval_interval", "eval_iters", "exit_after_iterations"},
    "data": {"train_data_path", "valid_data_path", "tokenizer", "data_cache_path", "num_workers"},
}


@dataclass(frozen=True, kw_only=True)
class MeasurePlan:
    """A measurement that has passed all checks."""

    config: Config
    tokenizer: Tokenizer
    data: RunData
    start: Start | None
    method: Method
    iterations: int
    drop_prob: float
    layers: list[int]
    seeds: list[int]
    window: int
    batches: int
    early_stop: bool
    own_seeds: bool
    """Whether --seeds was given: then it replaces drop.seed as well."""
    num_allow: int
    num_block: int
    """Layers that the lists may take."""
    note: str | None
    """On what --from restores."""

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return self.config.model.num_layers

    @property
    def cost_iterations(self) -> float:
        """Training iterations that the measurement costs, if no run ends early."""
        if self.method == "train":
            runs = (len(self.layers) + 1) * self.iterations
            return float(runs * len(self.seeds))
        passes = self.batches * (len(self.layers) + 1 if self.method == "leave_one_out" else 1)
        return (self.iterations + FORWARD_COST * passes) * len(self.seeds)

    def config_of(self, seed: int) -> Config:
        """The config of the runs with a seed."""
        drop = dataclasses.replace(self.config.drop, seed=seed) if self.own_seeds else self.config.drop
        training = dataclasses.replace(self.config.training, seed=seed)
        return dataclasses.replace(self.config, training=training, drop=drop)


def plan_measurement(config: Config, options: MeasureOptions, load: str | None, world_size: int) -> MeasurePlan:
    """Check everything; reads files only, and finds the same on every rank.

    load: the checkpoint of `--from`; None takes checkpoint.load, with load_optimizer as the config has it.
    Raises ValueError naming the field or the option.
    """
    check_options(options)
    lists = config.drop.block_fraction, config.drop.allow_fraction
    config = _measuring_config(config, options.out)
    validate(config, world_size)
    check_model(config)
    tokenizer = load_tokenizer(config.data.tokenizer)
    data = check_data(config, tokenizer)
    note = None
    if load is not None:
        whole_state = has_optimizer_state(Path(load))
        note = f"{load}: weights, optimizer, schedule and iteration are restored"
        if not whole_state:
            note = f"{load}: has no optimizer state that can be read; its weights are restored, from iteration 0"
        checkpoint = dataclasses.replace(config.checkpoint, load=load, load_optimizer=whole_state)
        config = dataclasses.replace(config, checkpoint=checkpoint)
    start = find_load(config, tokenizer)
    _refuse_growing(start)
    if start is not None:  # the drop section is the measurement's own
        changes = [change for change in start.changes if not change.field.startswith(("drop.", "data.valid_"))]
        start = dataclasses.replace(start, changes=changes)
    iterations, batches = _lengths(config, options, start)
    layers = parse_layers(options.layers, config.model.num_layers)
    seeds = parse_numbers("--seeds", options.seeds, 0, MAX_SEED) or [config.training.seed]
    block, allow = choose_lists(range(config.model.num_layers), [1e9] * config.model.num_layers, *lists)
    drop_prob = 0.9 if options.drop_prob is None else options.drop_prob
    return MeasurePlan(
        config=config,
        tokenizer=tokenizer,
        data=data,
        start=start,
        method=options.method,
        iterations=iterations,
        drop_prob=drop_prob,
        layers=layers,
        seeds=seeds,
        window=window_length(iterations, options.window) if options.method == "train" else batches,
        batches=batches,
        early_stop=options.early_stop,
        own_seeds=options.seeds is not None,
        num_allow=len(allow),
        num_block=len(block),
        note=note,
    )


def has_optimizer_state(path: Path) -> bool:
    """Whether a checkpoint holds optimizer state that `load_checkpoint` reads. Raises ValueError if it is none."""
    if (path / "metadata.json").exists() and not (path / MANIFEST).exists():
        verify_weights(path)
        return False
    folder = find_checkpoint(path).path
    return any(key.startswith("optimizer") for key in load_sharded_metadata(str(folder)))


def build_request(plan: MeasurePlan, world_size: int, command: str, fractions: tuple[float, float]) -> Request:
    """What the folder is to hold. fractions: of the Block and Allow lists."""
    return Request(
        settings=_settings(plan, world_size),
        num_layers=plan.num_layers,
        method=plan.method,
        seeds=plan.seeds,
        window=plan.window,
        block_fraction=fractions[0],
        allow_fraction=fractions[1],
        about=_about(plan, world_size, command),
    )


def _measuring_config(config: Config, out: str) -> Config:
    """The config with the measurement's own drop section and folder, and without validation."""
    own = {name: getattr(config.drop, name) for name in _DROP_FIELDS}
    if drops_tokens(config.drop):  # layers are measured, which run all of their tokens
        own["granularity"] = "layer"
    if config.drop.stages is not None:  # the measurement has none, but what they decide holds
        own["dropped_update"] = dropped_update(config.drop)
        if config.drop.sampler == "bernoulli":
            own["balance_stages"] = None
    drop = DropConfig(
        policy="layerdrop",  # stands for the policies of the runs, which no field can name
        residual_scale=config.drop.residual_scale or "none",
        seed=config.drop.seed,
        **own,
    )
    data = dataclasses.replace(config.data, valid_data_path=[])
    logging = dataclasses.replace(config.logging, run_dir=out)
    optimizer = dataclasses.replace(config.optimizer, lr_schedule_by="iterations")  # all runs have the same rate
    return dataclasses.replace(config, drop=drop, data=data, optimizer=optimizer, logging=logging)


def _refuse_growing(start: Start | None) -> None:
    if start is None or start.saved is None:
        return
    num_layers = saved_model(start.saved.config).num_layers
    begun = begun_layers(start.saved.train_state.get("drop"), num_layers)
    if len(begun) < num_layers:
        raise ValueError(
            f"checkpoint {start.checkpoint.path}: its run was still growing, and {len(begun)} of its {num_layers} "
            "layers had begun: measure from a checkpoint in which all have"
        )


def _lengths(config: Config, options: MeasureOptions, start: Start | None) -> tuple[int, int]:
    """Iterations that are trained, and batches that are evaluated. Raises ValueError if the run has fewer left."""
    total, first = train_iterations(config), 0
    if start is not None and start.whole_state:
        first = start.checkpoint.iteration
    if options.method == "train":
        iterations, batches = 500 if options.iterations is None else options.iterations, 0
        check_integer("--iterations", iterations, 2)
    else:
        iterations = (500 if start is None else 0) if options.iterations is None else options.iterations
        check_integer("--iterations", iterations, 0 if start is not None else 1)
        batches = 40 if options.batches is None else options.batches
    if first + iterations + batches > total:
        needed = f"--iterations {iterations}" + (f" and --batches {batches}" if batches else "")
        raise ValueError(
            f"{needed} from iteration {first} on need a run of {first + iterations + batches} iterations, but the "
            f"config has {total} (training.train_iters): the data are read in the order of the run"
        )
    limit = config.training.exit_after_iterations
    if limit is not None and limit < iterations:
        raise ValueError(
            f"training.exit_after_iterations = {limit}: must be at least --iterations {iterations}, because a run that "
            "is interrupted starts anew"
        )
    return iterations, batches


def _settings(plan: MeasurePlan, world_size: int) -> dict[str, Any]:
    """All that the measured values depend on but for the seed, by field."""
    config = plan.config
    settings: dict[str, Any] = {"processes": world_size}
    for section, ignored in _IRRELEVANT.items():
        for name, value in dataclasses.asdict(getattr(config, section)).items():
            if name not in ignored:
                settings[f"{section}.{name}"] = value
    settings["data.tokenizer"] = f"{_name(config.data.tokenizer)} {plan.tokenizer.fingerprint()}"
    settings["data.train_data_path"] = [
        [_name(found.prefix), found.tokens, found.lengths_crc32, weight]
        for found, weight in zip(plan.data.train.datasets, plan.data.train.weights, strict=True)
    ]
    settings["--from"] = _checkpoint(plan.start) if plan.start is not None else None
    settings |= {"--method": plan.method, "--iterations": plan.iterations}
    if plan.method != "train":
        return settings | {"--batches": plan.batches}
    settings |= {f"drop.{name}": getattr(config.drop, name) for name in (*_DROP_FIELDS, "residual_scale")}
    settings["drop.seed"] = "--seeds" if plan.own_seeds else config.drop.seed
    settings |= {"--drop_prob": plan.drop_prob, "--early_stop": plan.early_stop}
    if plan.early_stop:  # what decides when a run ends
        settings |= {"--window": plan.window, "layers of the lists": [plan.num_block, plan.num_allow]}
    return settings


def _about(plan: MeasurePlan, world_size: int, command: str) -> dict[str, Any]:
    """What the figures are measured with, for whoever reads the file. No paths of this machine."""
    config, model, training = plan.config, plan.config.model, plan.config.training
    about: dict[str, Any] = {
        "command": command,
        "commit": _commit(),
        "processes": world_size,
        "model": {
            name: getattr(model, name) for name in ("num_layers", "hidden_size", "num_attention_heads", "seq_length")
        },
        "batch": {"micro_batch_size": training.micro_batch_size, "global_batch_size": training.global_batch_size},
        "precision": training.precision,
        "train_iters": train_iterations(config),
        "tokenizer": _name(config.data.tokenizer),
        "data": [_name(path) for path in config.data.train_data_path],
        "iterations": plan.iterations,
        "checkpoint": _checkpoint(plan.start) if plan.start is not None else None,
    }
    if plan.method == "train":
        names = ("decision_scope", "granularity", "residual_scale", "dropped_update")
        about |= {"drop_prob": plan.drop_prob, "drop": {name: getattr(config.drop, name) for name in names}}
        about["drop"]["dropped_update"] = dropped_update(config.drop)
    else:
        about |= {"batches": plan.batches}
    gpus = torch.cuda.is_available()
    return about | {
        "hardware": f"{world_size} x {torch.cuda.get_device_name()}" if gpus else f"{os.cpu_count()} CPU cores",
        "software": f"torch {torch.__version__}, Python {platform.python_version()}",
        "date": time.strftime("%Y-%m-%d"),
    }


def _checkpoint(start: Start) -> dict[str, Any]:
    """A checkpoint without its path: name, iteration, what is taken of it, and a checksum of what describes it."""
    path = start.checkpoint.path
    described = path / MANIFEST if (path / MANIFEST).exists() else path / ".metadata"
    return {
        "name": path.name,
        "iteration": start.checkpoint.iteration,
        "whole_state": start.whole_state,
        "crc32": zlib.crc32(described.read_bytes()),
    }


def _name(path: str) -> str:
    return Path(path).name


def _commit() -> str | None:
    """The commit that this package is at, if it runs from a git checkout that holds it."""
    package = Path(megatron_sbld.__file__).parent
    for arguments in (["ls-files", "--error-unmatch", "__init__.py"], ["rev-parse", "--short", "HEAD"]):
        try:
            git: Sequence[str] = ["git", "-C", str(package), *arguments]
            result = subprocess.run(git, capture_output=True, text=True, check=False)
        except OSError:  # no git
            return None
        if result.returncode != 0:
            return None
    return result.stdout.strip()
