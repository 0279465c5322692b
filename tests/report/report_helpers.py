"""Synthetic run folders, with the rows that the report reads."""

from __future__ import annotations

import dataclasses
import json

import yaml

from megatron_sbld.config.sections import Config, ModelConfig
from megatron_sbld.method.config import DropConfig

TOKENS = 2048  # of an iteration
MODEL = ModelConfig(num_layers=4, hidden_size=64, num_attention_heads=4, seq_length=256)


def row(iteration, step_time_s=0.5, keep_prob=1.0, loss=None, num_layers=4):
    return {
        "iteration": iteration,
        "loss": 5.0 / iteration if loss is None else loss,
        "step_time_s": step_time_s,
        "tokens_per_s": TOKENS / step_time_s,
        "mean_keep_prob": keep_prob,
        "kept_fraction": keep_prob,
        "consumed_tokens": TOKENS * iteration,
        "keep_probs": [keep_prob] * num_layers,
    }


def valid_row(iteration, valid_loss, train_time_s=1.0):
    return {
        "iteration": iteration,
        "valid_loss": valid_loss,
        "train_time_s": train_time_s,
        "consumed_tokens": TOKENS * iteration,
    }


def write_run(folder, rows, policy="none", tail="", **sections):
    folder.mkdir(parents=True, exist_ok=True)
    config = Config(**{"model": MODEL, "drop": DropConfig(policy=policy), **sections})
    (folder / "config.yaml").write_text(yaml.safe_dump(dataclasses.asdict(config)))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    return str(folder)


def steady_run(folder, step_time_s, keep_prob, policy, valid_loss, **sections):
    num_layers = sections.get("model", MODEL).num_layers
    rows = [row(i, step_time_s, keep_prob, num_layers=num_layers) for i in range(1, 41)]
    return write_run(folder, [*rows, valid_row(40, valid_loss)], policy, **sections)
