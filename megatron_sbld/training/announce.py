"""What a run says before its first iteration: its size and layout, which loss is in force, and what will be dropped."""

from __future__ import annotations

from megatron.core.utils import get_model_config

from megatron_sbld.config.flops import attention_share, layer_share
from megatron_sbld.forecast.drops import forecast, forecast_text
from megatron_sbld.forecast.stages import stage_forecast, stage_forecast_text
from megatron_sbld.growth import stages_text
from megatron_sbld.method.in_force import drops
from megatron_sbld.method.work import Work
from megatron_sbld.training.model import (
    loss_weights_text,
)
from megatron_sbld.training.run import Run


def announce(run: Run) -> None:
    """Note them, on rank 0."""
    parallel = run.config.parallel
    params = sum(param.numel() for chunk in run.chunks for param in chunk.parameters())
    run.note(
        f"{params:,} parameters on this rank; tensor {parallel.tensor_model_parallel_size} x "
        f"pipeline {parallel.pipeline_model_parallel_size} x context {parallel.context_parallel_size} x "
        f"data {run.replicas}; policy {run.config.drop.policy}; iterations {run.iteration + 1} to {run.train_iters}"
    )
    fuses_loss = get_model_config(run.chunks[0]).cross_entropy_loss_fusion
    if fuses_loss and run.config.training.cross_entropy_loss_fusion is None:
        run.note("training.cross_entropy_loss_fusion: null takes the compiled loss (bf16 on a GPU)")
    weights = loss_weights_text(run.config)
    if weights is not None:
        run.note(weights)
    if run.layer_tokens.drives_rate:
        run.note(run.layer_tokens.text())
    if drops(run.config.drop) and run.writer is not None:
        recompute = run.config.training.recompute_granularity == "full"
        phi = layer_share(run.config.model, run.vocab_size, recompute=recompute)
        policy = run.controller.policy
        work = Work(policy, run.controller.tokens, attention_share(run.config.model))
        outlook = forecast(policy, run.train_iters, phi, work)
        run.note(forecast_text(outlook))
        balanced = run.controller.stages
        if policy.stages is not None:
            run.note(stages_text(policy.stages))
        stages = stage_forecast(run.config, policy, outlook, phi, run.replicas, balanced, work)
        if stages is not None:
            run.note(stage_forecast_text(stages))
