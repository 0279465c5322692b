"""Parallel layouts by name, and the trainer's config of a measurement."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import torch

from megatron_sbld.config.sections import Config, DataConfig, ModelConfig, ParallelConfig, TrainingConfig

MEGATRON_BUCKET_LAYERS = 3.2  # Megatron's default of 40M parameters, in layers of GPT-3 350M


@dataclass(frozen=True)
class Layout:
    """How the model is spread over processes, and which samplers drop its layers; the rest is data-parallel."""

    processes: int
    tensor: int = 1
    pipeline: int = 1
    overlap: bool = False
    distributed_optimizer: bool = False
    samplers: tuple[str, ...] = ("bernoulli",)

    @property
    def replicas(self) -> int:
        return self.processes // (self.tensor * self.pipeline)

    @property
    def title(self) -> str:
        name = f"TP {self.tensor} x PP {self.pipeline} x DP {self.replicas}" if self.processes > 1 else "1 process"
        with_ = ["overlap_grad_reduce"] * self.overlap + ["distributed optimizer"] * self.distributed_optimizer
        with_ += ["overlap_param_gather"] * (self.overlap and self.distributed_optimizer)
        return name + (", " + ", ".join(with_) if with_ else "")


SAMPLERS = ("bernoulli", "balanced")
FIRST_STAGE = "first-stage"
TOKENS = "tokens"
"""In the place of a sampler: the same layers always run, keep_prob of them, as in the first stage of a staged run."""
LAYOUTS = {
    "single": Layout(1),
    "tp2": Layout(2, tensor=2),
    "pp2": Layout(2, pipeline=2),
    "dp2": Layout(2),
    "dp2-overlap": Layout(2, overlap=True, distributed_optimizer=True),
    "pp2-samplers": Layout(2, pipeline=2, samplers=SAMPLERS),
    "pp4-samplers": Layout(4, pipeline=4, samplers=SAMPLERS),
}
ALL_LAYOUTS = ("single", "tp2", "pp2", "dp2")
CPU_DEFAULTS: dict[str, Any] = {  # an iteration of about half a second on one core
    "hidden_size": 128,
    "num_attention_heads": 4,
    "seq_length": 256,
    "vocab_size": 512,
    "micro_batch_size": 1,
    "global_batch_size": 4,
    "precision": "fp32",
}
GPU_DEFAULTS: dict[str, Any] = {
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "seq_length": 2048,
    "vocab_size": 50304,
    "micro_batch_size": 4,
    "global_batch_size": 16,
    "precision": "bf16",
}


def model_defaults() -> dict[str, Any]:
    """The model that is measured on this machine."""
    return GPU_DEFAULTS if torch.cuda.is_available() else CPU_DEFAULTS


def bucket_size(args: argparse.Namespace, layout: Layout) -> int | None:
    """Parameters of a gradient bucket; None leaves it to Megatron."""
    if not layout.overlap:
        return None
    if args.bucket_size is not None or torch.cuda.is_available():
        return args.bucket_size
    return round(MEGATRON_BUCKET_LAYERS * 12 * args.hidden_size**2)


def make_config(args: argparse.Namespace, layout: Layout, train_iters: int = 1000) -> Config:
    """The trainer's config of a measurement; what is not an option of it has the trainer's default, but dropout.

    train_iters: over which the learning rate falls, where the measurement has a scheduler.
    """
    full = args.recompute_granularity == "full"
    return Config(
        model=ModelConfig(
            num_layers=args.num_layers,
            hidden_size=args.hidden_size,
            num_attention_heads=args.num_attention_heads,
            seq_length=args.seq_length,
            hidden_dropout=0.0,
            attention_dropout=0.0,  # torch has no fused attention with dropout on CPUs
        ),
        parallel=ParallelConfig(
            tensor_model_parallel_size=layout.tensor,
            pipeline_model_parallel_size=layout.pipeline,
            overlap_grad_reduce=layout.overlap,
            use_distributed_optimizer=layout.distributed_optimizer,
            overlap_param_gather=layout.overlap and layout.distributed_optimizer,
            ddp_bucket_size=bucket_size(args, layout),
        ),
        data=DataConfig(train_data_path=["random tokens"]),
        training=TrainingConfig(
            micro_batch_size=args.micro_batch_size,
            global_batch_size=args.global_batch_size,
            train_iters=train_iters,
            seed=args.seed,
            precision=args.precision,
            recompute_granularity=args.recompute_granularity,
            recompute_method="uniform" if full else None,
            recompute_num_layers=1 if full else None,
        ),
    )
