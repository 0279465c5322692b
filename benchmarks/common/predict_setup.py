"""What predict_check.py predicts for: a config on given hardware."""

from __future__ import annotations

from typing import Any

from benchmarks.common.report import ROOT
from megatron_sbld.config.sections import Config
from megatron_sbld.config.stages import placement_of
from megatron_sbld.config.validate import validate
from megatron_sbld.predict.hardware import Hardware
from megatron_sbld.predict.iteration import Setup

SENSITIVITY = str(ROOT / "configs" / "quickstart_sensitivity.json")
VOCAB_SIZE = 51200  # of the paper's models and of 175B


def make_setup(config: Config, hardware: Hardware, gpus: int, vocab_size: int, attention: Any) -> Setup:
    validate(config, gpus, trains=False)
    return Setup(
        config=config,
        vocab_size=vocab_size,
        hardware=hardware,
        gpus=gpus,
        attention=attention,
        placement=placement_of(config),
    )
