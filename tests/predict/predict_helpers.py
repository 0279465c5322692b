"""Setups of the predictor for its tests: a small GPT on made-up hardware with round numbers."""

from __future__ import annotations

import dataclasses
from typing import Any

from megatron_sbld.config.sections import Config, ModelConfig, ParallelConfig, TrainingConfig
from megatron_sbld.config.stages import placement_of
from megatron_sbld.config.validate import validate
from megatron_sbld.predict.gain import Predictor
from megatron_sbld.predict.hardware import Hardware
from megatron_sbld.predict.iteration import IterationModel, Setup

HARDWARE = Hardware(
    name="round numbers",
    peak_tflops=100.0,
    memory_gb=80.0,
    hbm_bandwidth=1000.0,
    intra_bandwidth=100.0,
    inter_bandwidth=10.0,
    hbm_efficiency=1.0,
    link_efficiency=1.0,
)


def make_setup(
    gpus: int = 1, *, hardware: Hardware = HARDWARE, attention: Any = "flash", vocab_size: int = 1024, **fields: Any
) -> Setup:
    """fields: of the sections model, parallel, training and drop, by their own names."""
    sections: dict[str, Any] = {
        "model": ModelConfig(num_layers=8, hidden_size=256, num_attention_heads=4, seq_length=128),
        "parallel": ParallelConfig(),
        "training": TrainingConfig(micro_batch_size=1, global_batch_size=16, train_iters=200),
        "drop": Config().drop,
    }
    for name, value in fields.items():
        (section,) = (key for key, found in sections.items() if name in {f.name for f in dataclasses.fields(found)})
        sections[section] = dataclasses.replace(sections[section], **{name: value})
    config = Config(**sections)
    validate(config, gpus, trains=False)
    return Setup(
        config=config,
        vocab_size=vocab_size,
        hardware=hardware,
        gpus=gpus,
        attention=attention,
        placement=placement_of(config),
    )


def make_predictor(gpus: int = 1, *, efficiency: float = 0.4, **fields: Any) -> Predictor:
    """Calibrated on the throughput that the model itself has at an efficiency."""
    setup = make_setup(gpus, **fields)
    return Predictor(setup, setup.tokens / float(IterationModel(setup, efficiency).undropped.total[0]))
