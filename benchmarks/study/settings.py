"""What a run of the study is: model, optimizer, length and drop section, without any path, and what it costs.

Tokens a parameter count all parameters, embeddings included. FLOPs are those of `megatron_sbld.config.flops`: forward
and backward pass of what ran, logits included.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_sbld.config.flops import executed_flops
from megatron_sbld.config.sections import ModelConfig
from megatron_sbld.method.build import build_policy
from megatron_sbld.method.build_tokens import build_tokens
from megatron_sbld.method.config import DropConfig

LAYERS = 12
SEQ_LENGTHS = {"once": 128, "epochs": 128, "tokens": 512}
"""By regime. At 512 and width 32 the scores of attention are more than half of a layer's FLOPs."""
TOKENS = 2048  # of an iteration
VOCABULARY = {32: 1024, 64: 2048}
"""By width: so small that the layers are about 85 % of the FLOPs."""
DECAY_SHARE = 0.2  # WSD: linear over the last fifth
WARMUP_SHARE, WARMUP_MOST = 0.05, 100
CURVE_POINTS = 16
CURVE_BATCHES = 8
_PROTOCOL = 1
"""Part of every key: raise it when something changes that the settings do not show."""


@dataclass(frozen=True, kw_only=True)
class Spec:
    """One run. `budget`: tokens a parameter of the undropped run that takes as many FLOPs."""

    width: int
    method: str
    budget: float
    lr: float
    seed: int
    drop: dict[str, Any] = field(hash=False)
    processes: int = 1
    regime: str = "once"
    """once: each novel is read once at most; epochs: a small text many times; tokens: once, in longer samples."""
    decay: str = "WSD"
    dropout: float = 0.0
    weight_decay: float = 0.1
    lr_by: str = "iterations"
    """What drives the learning rate: iterations or layer_tokens."""
    equal: str = "flops"
    """What the run shares with the undropped run of its budget: flops or iterations."""

    @property
    def seq_length(self) -> int:
        return SEQ_LENGTHS[self.regime]

    @property
    def samples(self) -> int:
        """Of an iteration."""
        return TOKENS // self.seq_length

    @property
    def name(self) -> str:
        """Readable; together with a hash of the settings it is the key."""
        parts = [self.regime, f"w{self.width}", self.method, f"{self.budget:g}", f"lr{self.lr:g}", f"s{self.seed}"]
        if self.decay != "WSD":
            parts.append(self.decay)
        if self.regime == "epochs":
            parts.append(f"dropout{self.dropout:g}-wd{self.weight_decay:g}")
        if self.regime == "tokens":
            parts += [f"equal-{self.equal}", self.lr_by]
        return "/".join(parts)

    @property
    def key(self) -> str:
        """Equal for runs that are the same in everything that matters."""
        known = json.dumps([_PROTOCOL, self.regime, settings(self)], sort_keys=True)
        return f"{self.name}#{hashlib.sha256(known.encode()).hexdigest()[:8]}"

    @property
    def budget_flops(self) -> float:
        """FLOPs of the undropped run of this budget."""
        undropped = undropped_iterations(self.width, self.budget, self.seq_length)
        return undropped * iteration_flops(self.width, LAYERS, seq_length=self.seq_length)

    @property
    def iterations(self) -> int:
        """As many as bring the expected FLOPs nearest to the budget, or as the undropped run has."""
        if self.equal == "iterations":
            return undropped_iterations(self.width, self.budget, self.seq_length)
        return iterations_for(self.width, self.budget, json.dumps(self.drop, sort_keys=True), self.seq_length)

    @property
    def expected_layers(self) -> float:
        """Layers that an iteration runs, in the mean over its tokens."""
        return self._expected[0]

    @property
    def expected_flops(self) -> float:
        return self.iterations * iteration_flops(self.width, *self._expected, seq_length=self.seq_length)

    @property
    def _expected(self) -> tuple[float, float]:
        return expected_layers(json.dumps(self.drop, sort_keys=True), self.iterations, self.seq_length)


def model_settings(width: int, seq_length: int = 128) -> dict[str, Any]:
    return {
        "num_layers": LAYERS,
        "hidden_size": width,
        "num_attention_heads": 4,
        "seq_length": seq_length,
        "init_method_std": round(width**-0.5, 3),  # Megatron's 0.02 is meant for widths of thousands
    }


def parameters(width: int, seq_length: int = 128) -> int:
    """All of the model's: tied embeddings, positions, layers with biases and norms, last norm."""
    return (VOCABULARY[width] + seq_length + 2) * width + LAYERS * (12 * width**2 + 13 * width)


def iteration_flops(
    width: int, layers_run: float, attention_run: float | None = None, *, seq_length: int = 128
) -> float:
    """FLOPs of an iteration that runs so many layers in the mean over tokens, and over pairs of them."""
    model = ModelConfig(**model_settings(width, seq_length))
    return executed_flops(model, VOCABULARY[width], TOKENS // seq_length, layers_run, attention_run)


def undropped_iterations(width: int, budget: float, seq_length: int = 128) -> int:
    return max(1, round(budget * parameters(width, seq_length) / TOKENS))


@functools.cache
def iterations_for(width: int, budget: float, drop: str, seq_length: int = 128) -> int:
    """Iterations whose expected FLOPs are nearest to the budget: the mean share of layers hardly depends on them."""
    iterations = undropped_iterations(width, budget, seq_length)
    flops = iterations * iteration_flops(width, LAYERS, seq_length=seq_length)
    for _ in range(6):
        expected = expected_layers(drop, iterations, seq_length)
        found = max(1, round(flops / iteration_flops(width, *expected, seq_length=seq_length)))
        if found == iterations:
            break
        iterations = found
    return iterations


@functools.cache
def expected_layers(drop: str, iterations: int, seq_length: int = 128) -> tuple[float, float]:
    """Sum of the layers' expected shares of an iteration's tokens, and of pairs of tokens; means over the run.

    drop: the section in JSON.
    """
    section = DropConfig(**json.loads(drop))
    policy = build_policy(section, LAYERS, iterations)
    tokens = build_tokens(section, LAYERS, iterations, seq_length)
    sums = [0.0, 0.0]
    if tokens is None:
        sums = [math.fsum(policy.keep_probs(t).sum() for t in range(1, iterations + 1))] * 2
    else:
        for power in (1, 2):
            sums[power - 1] = math.fsum(
                float(policy.keep_probs(t) @ tokens.shares(t, LAYERS) ** power) for t in range(1, iterations + 1)
            )
    return sums[0] / iterations, sums[1] / iterations


def settings(spec: Spec) -> dict[str, Any]:
    """The config's sections, as far as the study sets them; a sensitivity file stands there by its content."""
    iterations = spec.iterations
    optimizer: dict[str, Any] = {
        "lr": spec.lr,
        "min_lr": 0.0,
        "lr_decay_style": spec.decay,
        "lr_warmup_iters": min(WARMUP_MOST, int(WARMUP_SHARE * iterations)),
        "weight_decay": spec.weight_decay,
    }
    if spec.lr_by != "iterations":
        optimizer["lr_schedule_by"] = spec.lr_by
    if spec.decay == "WSD":
        optimizer |= {
            "lr_wsd_decay_iters": max(1, round(DECAY_SHARE * iterations)),
            "lr_wsd_decay_style": "linear",
        }
    training = {
        "micro_batch_size": spec.samples // spec.processes,
        "global_batch_size": spec.samples,
        "train_iters": iterations,
        "eval_interval": max(1, iterations // CURVE_POINTS),
        "eval_iters": CURVE_BATCHES,
        "seed": spec.seed,
        "precision": "fp32",
    }
    drop = {**spec.drop, "seed": spec.seed}
    if "sensitivity" in drop:
        drop["sensitivity"] = hashlib.sha256(Path(drop["sensitivity"]).read_bytes()).hexdigest()[:12]
    model = model_settings(spec.width, spec.seq_length) | {
        "hidden_dropout": spec.dropout,
        "attention_dropout": spec.dropout,
    }
    return {"model": model, "optimizer": optimizer, "training": training, "drop": drop}
