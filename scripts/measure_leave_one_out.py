#!/usr/bin/env python3
"""Measures how much each layer matters to a trained model, by leaving it out at evaluation: writes a sensitivity file.

For every batch of the run's validation data the loss is computed with all layers, and with each layer in turn replaced
by the identity. A layer's gap is the mean difference; its standard error comes from the batches. That is a cheap
substitute for the base sensitivity of equations.md section 3, which trains the model anew without each layer.

Run it from the repository's root, e.g. on the first run of `make quickstart`:
    python scripts/measure_leave_one_out.py runs/quickstart/TIME/undropped --output configs/quickstart_sensitivity.json
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.utils import unwrap_model
from rich.progress import track

from megatron_sbld.report.runs import read_run
from megatron_sbld.sensitivity.file import SensitivityFile
from megatron_sbld.training.checkpoint import load_weights
from megatron_sbld.training.checkpoint_files import CheckpointInfo, latest_complete
from megatron_sbld.training.config import Config, ParallelConfig
from megatron_sbld.training.data import TrainingData
from megatron_sbld.training.flops import padded_vocab_size
from megatron_sbld.training.model import build_model
from megatron_sbld.training.processes import distributed_run
from megatron_sbld.training.tokenizer import load_tokenizer

Batch = dict[str, torch.Tensor]


def main() -> None:
    args = parse_args()
    try:
        config, checkpoint = read_source(args.run, args.batches)
    except ValueError as error:
        sys.exit(f"error: {error}")
    began = time.monotonic()
    with distributed_run(config):
        model, batches = build(config, checkpoint, args.batches)
        losses = measure(model, batches)
    gaps = losses[:, 1:] - losses[:, :1]  # [batches, L]
    result = SensitivityFile.from_gaps(
        gap=gaps.mean(axis=0),
        gap_stderr=gaps.std(axis=0, ddof=1) / np.sqrt(len(gaps)),
        measured_with=provenance(config, checkpoint, losses, time.monotonic() - began),
    )
    result.save(args.output)
    report(result)
    print(f"saved {args.output}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder of an undropped run with a checkpoint")
    parser.add_argument("--output", type=Path, required=True, help="sensitivity file to write")
    parser.add_argument("--batches", type=int, default=40, help="global batches to evaluate on; default: %(default)s")
    args = parser.parse_args()
    if args.batches < 2:
        parser.error(f"--batches {args.batches} is not allowed: a standard error needs at least 2")
    return args


def read_source(run: Path, batches: int) -> tuple[Config, CheckpointInfo]:
    """The run's config, as one process evaluates it, and its newest checkpoint."""
    config = read_run(run, str(run)).config
    checkpoint = latest_complete(run / "checkpoints")
    if checkpoint is None:
        raise ValueError(f"{run / 'checkpoints'} holds no complete checkpoint; train with checkpoint.save_at_end true")
    if not config.data.valid_data_path:
        raise ValueError(f"{run} was trained without data.valid_data_path; there is nothing to evaluate on")
    training = dataclasses.replace(
        config.training, micro_batch_size=config.training.global_batch_size, eval_iters=batches
    )
    return dataclasses.replace(config, parallel=ParallelConfig(), training=training), checkpoint


def build(config: Config, checkpoint: CheckpointInfo, num_batches: int) -> tuple[DistributedDataParallel, list[Batch]]:
    """The trained model in evaluation mode, and the batches that every layer is measured on."""
    tokenizer = load_tokenizer(config.data.tokenizer)
    chunks = build_model(config, padded_vocab_size(tokenizer.vocab_size, config))
    load_weights(checkpoint.path, chunks)
    chunks[0].eval()
    batches = TrainingData(config, tokenizer, 1, 0).valid_batches(num_batches)
    return chunks[0], [next(batches) for _ in range(num_batches)]


@torch.inference_mode()
def measure(model: DistributedDataParallel, batches: list[Batch]) -> np.ndarray:
    """Mean loss of each batch with all layers and without each, [batches, 1 + L]."""
    layers = list(unwrap_model(model).decoder.layers)
    losses = np.empty((len(batches), 1 + len(layers)))
    for number, batch in enumerate(track(batches, description="batches")):
        losses[number, 0] = mean_loss(model, batch)
        for position, layer in enumerate(layers, start=1):
            with left_out(layer):
                losses[number, position] = mean_loss(model, batch)
    return losses


@contextmanager
def left_out(layer: TransformerLayer) -> Iterator[None]:
    """Replaces a layer by the identity."""
    layer.forward = lambda hidden_states, **_: (hidden_states, None)
    try:
        yield
    finally:
        del layer.forward


def mean_loss(model: DistributedDataParallel, batch: Batch) -> float:
    batch = {name: tensor.to(next(model.parameters()).device) for name, tensor in batch.items()}
    losses = model(batch["tokens"], batch["position_ids"], batch.get("attention_mask"), labels=batch["labels"])
    return float((losses.float() * batch["loss_mask"]).sum() / batch["loss_mask"].sum())


def provenance(config: Config, checkpoint: CheckpointInfo, losses: np.ndarray, seconds: float) -> dict[str, Any]:
    """What the figures are measured with, for the file."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    model = config.model
    return {
        "method": "loss of a trained model at evaluation without the layer, minus with all layers",
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit.stdout.strip() or None,
        "model": {"num_layers": model.num_layers, "hidden_size": model.hidden_size, "seq_length": model.seq_length},
        "trained_iterations": checkpoint.iteration,
        "seed": config.training.seed,
        "batches": len(losses),
        "tokens_per_batch": config.training.global_batch_size * model.seq_length,
        "baseline_loss": float(losses[:, 0].mean()),
        "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores",
        "software": f"torch {torch.__version__}, Python {platform.python_version()}",
        "date": time.strftime("%Y-%m-%d"),
        "seconds": round(seconds, 1),
    }


def report(result: SensitivityFile) -> None:
    """Prints a line for each layer."""
    print(f"validation loss with all layers: {result.measured_with['baseline_loss']:.4f}")
    print("layer      gap   stderr  sensitivity")
    rows = zip(result.gap, result.gap_stderr, result.sensitivity, strict=True)
    for layer, (gap, stderr, sensitivity) in enumerate(rows, start=1):
        listed = "  Block" if layer in result.block else "  Allow" if layer in result.allow else ""
        print(f"{layer:5d} {gap:+8.4f} {stderr:8.4f} {sensitivity:12.3f}{listed}")


if __name__ == "__main__":
    main()
