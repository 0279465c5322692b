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
from megatron_sbld.method.config import DropConfig

LAYERS = 12
SEQ_LENGTH = 128
SAMPLES = 16  # of an iteration, which is 2,048 tokens
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
    """once: each novel is read once at most; epochs: a small text many times."""
    decay: str = "WSD"
    dropout: float = 0.0
    weight_decay: float = 0.1

    @property
    def name(self) -> str:
        """Readable; together with a hash of the settings it is the key."""
        parts = [self.regime, f"w{self.width}", self.method, f"{self.budget:g}", f"lr{self.lr:g}", f"s{self.seed}"]
        if self.decay != "WSD":
            parts.append(self.decay)
        if self.regime == "epochs":
            parts.append(f"dropout{self.dropout:g}-wd{self.weight_decay:g}")
        return "/".join(parts)

    @property
    def key(self) -> str:
        """Equal for runs that are the same in everything that matters."""
        known = json.dumps([_PROTOCOL, self.regime, settings(self)], sort_keys=True)
        return f"{self.name}#{hashlib.sha256(known.encode()).hexdigest()[:8]}"

    @property
    def budget_flops(self) -> float:
        """FLOPs of the undropped run of this budget."""
        return undropped_iterations(self.width, self.budget) * iteration_flops(self.width, LAYERS)

    @property
    def iterations(self) -> int:
        """As many as bring the expected FLOPs nearest to the budget."""
        return iterations_for(self.width, self.budget, json.dumps(self.drop, sort_keys=True))

    @property
    def expected_layers(self) -> float:
        """Layers that an iteration runs, in the mean."""
        return expected_layers(json.dumps(self.drop, sort_keys=True), self.iterations)

    @property
    def expected_flops(self) -> float:
        return self.iterations * iteration_flops(self.width, self.expected_layers)


def model_settings(width: int) -> dict[str, Any]:
    return {
        "num_layers": LAYERS,
        "hidden_size": width,
        "num_attention_heads": 4,
        "seq_length": SEQ_LENGTH,
        "init_method_std": round(width**-0.5, 3),  # Megatron's 0.02 is meant for widths of thousands
    }


def parameters(width: int) -> int:
    """All of the model's: tied embeddings, positions, layers with biases and norms, last norm."""
    return (VOCABULARY[width] + SEQ_LENGTH + 2) * width + LAYERS * (12 * width**2 + 13 * width)


def iteration_flops(width: int, layers_run: float) -> float:
    """FLOPs of an iteration that runs so many layers in the mean."""
    return executed_flops(ModelConfig(**model_settings(width)), VOCABULARY[width], SAMPLES, layers_run)


def undropped_iterations(width: int, budget: float) -> int:
    return max(1, round(budget * parameters(width) / (SAMPLES * SEQ_LENGTH)))


@functools.cache
def iterations_for(width: int, budget: float, drop: str) -> int:
    """Iterations whose expected FLOPs are nearest to the budget: the mean share of layers hardly depends on them."""
    flops = undropped_iterations(width, budget) * iteration_flops(width, LAYERS)
    iterations = undropped_iterations(width, budget)
    for _ in range(6):
        found = max(1, round(flops / iteration_flops(width, expected_layers(drop, iterations))))
        if found == iterations:
            break
        iterations = found
    return iterations


@functools.cache
def expected_layers(drop: str, iterations: int) -> float:
    """Sum of the layers' keep probabilities, mean over the run; `drop`: the section in JSON."""
    section = json.loads(drop)
    if section["policy"] == "none":
        return float(LAYERS)
    policy = build_policy(DropConfig(**section), LAYERS, iterations)
    return math.fsum(policy.keep_probs(t).sum() for t in range(1, iterations + 1)) / iterations


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
    if spec.decay == "WSD":
        optimizer |= {
            "lr_wsd_decay_iters": max(1, round(DECAY_SHARE * iterations)),
            "lr_wsd_decay_style": "linear",
        }
    training = {
        "micro_batch_size": SAMPLES // spec.processes,
        "global_batch_size": SAMPLES,
        "train_iters": iterations,
        "eval_interval": max(1, iterations // CURVE_POINTS),
        "eval_iters": CURVE_BATCHES,
        "seed": spec.seed,
        "precision": "fp32",
    }
    drop = {**spec.drop, "seed": spec.seed}
    if "sensitivity" in drop:
        drop["sensitivity"] = hashlib.sha256(Path(drop["sensitivity"]).read_bytes()).hexdigest()[:12]
    model = model_settings(spec.width) | {"hidden_dropout": spec.dropout, "attention_dropout": spec.dropout}
    return {"model": model, "optimizer": optimizer, "training": training, "drop": drop}
