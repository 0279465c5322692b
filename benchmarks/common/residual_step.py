"""Step times of one GPT whose branches Megatron or the fused residual add brings back, in alternating blocks."""

from __future__ import annotations

import argparse
import itertools
import time
from dataclasses import replace

import numpy as np
from megatron.core.num_microbatches_calculator import get_num_microbatches

from benchmarks.common.layouts import Layout, make_config
from benchmarks.common.model import DISTINCT_BATCHES, random_batches, use_peak_rate
from benchmarks.common.processes import megatron_run
from benchmarks.common.rounds import progress_bar
from megatron_sbld.config.sections import Config
from megatron_sbld.layout.pipeline import Floats
from megatron_sbld.mcore import fuse_residual
from megatron_sbld.mcore.skip.switchable import decoder_layers
from megatron_sbld.training.model import build_model, build_optimizer
from megatron_sbld.training.step import train_step

BRANCHES = ("self_attn_bda", "mlp_bda")


def step_config(args: argparse.Namespace, dropout_prob: float) -> Config:
    config = make_config(args, Layout(1))
    return replace(config, model=replace(config.model, hidden_dropout=dropout_prob))


def measure_step(args: argparse.Namespace, config: Config) -> tuple[Floats, Floats]:
    """Seconds of blocks with stock and with fused residual adds, [rounds] each; starts and ends a process group."""
    with megatron_run(config):
        return _Step(args, config).measure()


class _Step:
    """The trainer's model and iteration."""

    def __init__(self, args: argparse.Namespace, config: Config) -> None:
        self._args, self._config = args, config
        self._chunks = build_model(config, args.vocab_size)
        self._layers = [layer for chunk in self._chunks for layer in decoder_layers(chunk)]
        self._functions = {False: self._branches()}
        fuse_residual(self._chunks)
        self._functions[True] = self._branches()
        self._optimizer = build_optimizer(config, self._chunks)
        use_peak_rate(self._optimizer, config)
        batches = random_batches(args, DISTINCT_BATCHES * get_num_microbatches(), args.seed)
        self._batches = itertools.cycle(batches)

    def measure(self) -> tuple[Floats, Floats]:
        for chunk in self._chunks:
            chunk.train()
        for fused in (False, True):
            self._block(fused, self._args.warmup)
        seconds: dict[bool, list[float]] = {False: [], True: []}
        with progress_bar() as progress:
            for round_ in progress.track(range(self._args.rounds), description="steps"):
                for fused in (False, True) if round_ % 2 == 0 else (True, False):
                    seconds[fused].append(self._block(fused, self._args.block_iterations))
        return np.array(seconds[False]), np.array(seconds[True])

    def _branches(self) -> list[list[object]]:
        """What brings each layer's branches back, [L][2]."""
        return [[getattr(layer, name) for name in BRANCHES] for layer in self._layers]

    def _block(self, fused: bool, iterations: int) -> float:
        for layer, functions in zip(self._layers, self._functions[fused], strict=True):
            for name, function in zip(BRANCHES, functions, strict=True):
                setattr(layer, name, function)
        data = [list(itertools.islice(self._batches, get_num_microbatches())) for _ in range(iterations)]
        began = time.perf_counter()
        for batches in data:  # an iteration ends with the loss on the CPU, so a GPU has done everything
            result = train_step(self._config, self._chunks, self._optimizer, [iter(batches)], stop_requested=False)
        seconds = time.perf_counter() - began
        if not np.isfinite(result.loss):
            raise RuntimeError(f"the loss is {result.loss}: the times would be those of another computation")
        return seconds
