"""The trainer's model as the benchmarks run it: on random tokens, its layers switchable or Megatron's own by turns."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from megatron_sbld.config.sections import Config
from megatron_sbld.controller import DropController
from megatron_sbld.data.batches import Batch
from megatron_sbld.mcore import make_switchable
from megatron_sbld.mcore.skip.switchable import decoder_layers
from megatron_sbld.training.model import build_model

DISTINCT_BATCHES = 16  # iterations after which the random tokens repeat


class SwitchedModel:
    """A model whose layers become stock ones again by having their own classes back.

    So undropped and dropped blocks share one model, one optimizer state and one set of processes.
    """

    def __init__(self, config: Config, vocab_size: int, controller: DropController) -> None:
        self.chunks = build_model(config, vocab_size)
        self.layers = [layer for chunk in self.chunks for layer in decoder_layers(chunk)]
        self._classes = {False: self._present_classes()}
        make_switchable(self.chunks, controller)
        self._classes[True] = self._present_classes()

    def switch(self, switchable: bool) -> None:
        """Give each layer the class that it was built with, or the switchable one."""
        for layer, cls in zip(self.layers, self._classes[switchable], strict=True):
            layer.__class__ = cls

    @property
    def stock_classes(self) -> set[type]:
        return set(self._classes[False])

    def _present_classes(self) -> list[type]:
        return [type(layer) for layer in self.layers]


def use_peak_rate(optimizer: Any, config: Config) -> None:
    """Give the optimizer the config's learning rate, which else its scheduler does."""
    for group in optimizer.param_groups:
        group["lr"] = config.optimizer.lr


def random_batches(args: argparse.Namespace, num_batches: int, seed: int) -> list[Batch]:
    """Microbatches of random tokens; the seed alone decides which."""
    rng = torch.Generator().manual_seed(seed)
    size, length = args.micro_batch_size, args.seq_length
    batches = []
    for _ in range(num_batches):
        text = torch.randint(args.vocab_size, (size, length + 1), generator=rng)
        batches.append(
            {
                "tokens": text[:, :-1].contiguous(),
                "labels": text[:, 1:].contiguous(),
                "loss_mask": torch.ones(size, length),
                "position_ids": torch.arange(length).expand(size, -1).contiguous(),
            }
        )
    return batches
