"""What layer dropping adds to Megatron-LM's log: scalars for TensorBoard and W&B, and one line on the console.

FLOPs of an iteration, and throughput from the time of the training steps, are counted twice: of the undropped model, as
the paper and Megatron-LM do, and of the layers that ran. The FLOPs are Megatron-LM's own formula; a layer's are what
the formula gives for one layer more.
"""

from __future__ import annotations

import copy
import functools
import importlib
from argparse import Namespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_sbld.controller import DropController
from megatron_sbld.layout.units import layer_kinds, unit_numbers
from megatron_sbld.mcore.compat import hybrid_pattern, hybrid_pattern_field
from megatron_sbld.method.choices import Unit
from megatron_sbld.method.policy import SBLDPolicy

_TERA = 1e12


class Scalars:
    """Of one run; made on every rank, written on the last one, as Megatron-LM's are."""

    def __init__(self, args: Namespace, controller: DropController, training: Any, unit: Unit = "layer") -> None:
        self._args = args
        self._controller = controller
        self._training = training
        self._unit: Unit = unit
        self._seconds = 0.0
        self._flops = np.zeros(2)  # of the undropped model, executed; since the last line on the console
        self._last_flops = np.zeros(2)  # of the last iteration
        self._growth = ""
        self._layer_tokens: dict[str, float] = {}

    def note_step(self, seconds: float, batch_size: int) -> None:
        """Count an iteration, which the controller is still at."""
        self._seconds += seconds
        self._last_flops = np.array([self._undropped_flops(batch_size), self.executed_flops(batch_size)])
        self._flops += self._last_flops

    def note_layer_tokens(self, consumed: int) -> None:
        """Have the layer-tokens written that are consumed with this iteration."""
        self._layer_tokens = {"consumed_layer_tokens": float(consumed)}

    def note_growth(self, text: str) -> None:
        """Have a line about layers that begin printed with this iteration's log."""
        self._growth = text

    def executed_flops(self, batch_size: int) -> float:
        """FLOPs of the present iteration, by Megatron-LM's formula, without those of layers that did not run."""
        controller = self._controller
        of_layers = self._layer_flops_per_sample()
        if controller.tokens is None:
            saved = float((1.0 - controller.kept_shares.mean(axis=0)) @ of_layers)
            return self._undropped_flops(batch_size) - batch_size * saved
        kept = controller.plan.mean(axis=0)
        ran = of_layers.copy()
        some = np.array(controller.tokens.layers) - 1
        ran[some] = self._layer_flops_per_sample(controller.num_tokens)[some]
        return self._undropped_flops(batch_size) - batch_size * float((of_layers - kept * ran).sum())

    def write(self) -> None:
        """Add this iteration's scalars where a writer is, at Megatron-LM's intervals."""
        args, controller = self._args, self._controller
        iteration = controller.iteration
        megatron = importlib.import_module("megatron.training")
        scalars = self._scalars()
        if self._growth:
            megatron.print_rank_last(f" layer dropping, {self._growth}")
            self._growth = ""
        if iteration % args.tensorboard_log_interval == 0:
            layers = {"keep_prob": controller.keep_probs}
            if self._args.sbld_sensitivity_update == "dynamic" and isinstance(controller.policy, SBLDPolicy):
                layers["sensitivity"] = controller.policy.sensitivity
            by_layer = {
                f"{name}/layer_{number:02d}": value
                for name, values in layers.items()
                for number, value in enumerate(values.tolist(), start=1)
            }
            self._add({**scalars, **by_layer}, iteration)
        if iteration % args.log_interval == 0:
            if self._seconds > 0:
                undropped, executed = (self._flops / self._seconds / args.world_size / _TERA).tolist()
                scalars |= {"sbld throughput undropped": undropped, "sbld throughput executed": executed}
                throughput = {name: scalars[name] for name in ("sbld throughput undropped", "sbld throughput executed")}
                self._add(throughput, iteration)
            self._seconds, self._flops = 0.0, np.zeros(2)
            text = " | ".join(f"{name}: {value:.6G}" for name, value in scalars.items())
            megatron.print_rank_last(f" layer dropping at iteration {iteration} | {text}")

    def _scalars(self) -> dict[str, float]:
        model_flops, executed_flops = self._last_flops.tolist()
        flops = {"model_flops": model_flops, "executed_flops": executed_flops}
        return {**decision_scalars(self._controller), **self._layer_tokens, **flops}

    def _add(self, scalars: dict[str, float], iteration: int) -> None:
        global_vars = importlib.import_module("megatron.training.global_vars")
        tensorboard, wandb = global_vars.get_tensorboard_writer(), global_vars.get_wandb_writer()
        if tensorboard:
            for name, value in scalars.items():
                tensorboard.add_scalar(name, value, iteration)
        if wandb:
            wandb.log(scalars, iteration)

    def _undropped_flops(self, batch_size: int) -> float:
        return float(self._training.num_floating_point_operations(self._args, batch_size))

    @functools.lru_cache(maxsize=2)  # noqa: B019 (one object in a run; whole samples, and the present number of tokens)
    def _layer_flops_per_sample(self, tokens: int | None = None) -> NDArray[np.float64]:
        """FLOPs for one sample, or some tokens of it, of what each keep probability is of, [L]."""
        args = copy.copy(self._args)
        if tokens is not None:
            args.seq_length = tokens
        base = float(self._training.num_floating_point_operations(args, 1))
        hybrid = hybrid_pattern(args)
        if hybrid is not None:
            return self._hybrid_flops_per_sample(args, hybrid, base)
        pattern = _moe_pattern(args)
        costs = {}
        for kind in set(pattern):
            more = copy.copy(args)
            more.num_layers = args.num_layers + 1
            if args.num_experts is not None:
                more.moe_layer_freq = [kind, *pattern]  # in front, since multi-token prediction repeats the last one
            costs[kind] = float(self._training.num_floating_point_operations(more, 1)) - base
        return np.array([costs[kind] for kind in pattern])

    def _hybrid_flops_per_sample(self, args: Namespace, pattern: str, base: float) -> NDArray[np.float64]:
        """The same of a HybridModel, whose pattern gets one layer more of a kind in front."""
        kinds, field = layer_kinds(pattern), hybrid_pattern_field(args)
        assert field is not None, "asked for with a pattern alone"
        costs = {}
        for kind in set(kinds):
            more = copy.copy(args)
            more.num_layers = args.num_layers + 1
            setattr(more, field, kind + pattern)
            costs[kind] = float(self._training.num_floating_point_operations(more, 1)) - base
        units = np.array(unit_numbers(pattern, self._unit)) - 1
        return np.bincount(units, weights=[costs[kind] for kind in kinds]).astype(np.float64)


def decision_scalars(controller: DropController) -> dict[str, float]:
    """What is in force in the present iteration."""
    scalars = {
        "theta": controller.theta,
        "mean_keep_prob": float(controller.keep_probs.mean()),
        "kept_fraction": controller.kept_fraction,
    }
    if controller.tokens is not None:
        scalars["kept_tokens"] = controller.num_tokens
    if controller.policy.stages is not None:
        scalars["begun_layers"] = len(controller.growth.begun)
    return scalars


def _moe_pattern(args: Namespace) -> list[int]:
    """1 for each layer with experts, 0 for each dense one, as Megatron-LM's formula reads --moe-layer-freq."""
    if args.num_experts is None:
        return [0] * args.num_layers
    if isinstance(args.moe_layer_freq, int):
        return [1 if index % args.moe_layer_freq == 0 else 0 for index in range(args.num_layers)]
    return list(args.moe_layer_freq)
