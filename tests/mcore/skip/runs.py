"""One training run with drops on some layout, as numbers that can be compared with another run's.

A case names everything: layout, Megatron's options, policy and scope. `run_case` trains it; `reference` is the same
model with the same drops in one process and without any switch. Gradients are compared parameter by parameter, because
the silent corruptions show there first.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, param_and_grad_buffer
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.moe_utils import track_moe_metrics

from megatron_sbld.controller import DropController
from megatron_sbld.mcore import fuse_residual, make_switchable
from megatron_sbld.mcore.skip.moe import moe_loss_scale
from megatron_sbld.method.policy import FullDepthPolicy, LayerDropPolicy, PLDPolicy, Policy
from megatron_sbld.method.schedule import Constant, Exponential
from megatron_sbld.method.tokens import TokenDrop
from tests.harness import model_parallel, single_process
from tests.mcore.helpers import (
    GLOBAL_MICROBATCHES,
    MICRO_BATCH,
    SEQUENCE,
    build_optimizer,
    forget_moe_losses,
    forward_backward,
    full_and_own_slice,
    global_name,
    mean_loss,
    tiny_config,
    tiny_gpt,
    wrap_ddp,
)
from tests.mcore.hybrid import tiny_hybrid

FULL_RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 2}
BLOCK_RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 1}
SELECTIVE_RECOMPUTE = {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
OVERLAP = {"overlap_grad_reduce": True}
SHARDED = {"use_distributed_optimizer": True}
BOTH_OVERLAPS = {**OVERLAP, **SHARDED, "overlap_param_gather": True}


class ExtremePolicy(Policy):
    """Whole stages, single layers, all layers and none, by iteration; the first iteration drops everything."""

    PATTERNS: ClassVar = {
        8: ("00000000", "00001111", "11110000", "11001100", "00110011", "01111111", "11111110", "11111111"),
        4: ("0000", "0011", "1100", "1010", "0101", "0111", "1110", "1111"),
    }

    def __init__(self, num_layers: int) -> None:
        super().__init__(Constant(1.0), num_layers)

    def keep_probs(self, iteration: int) -> np.ndarray:
        patterns = self.PATTERNS[self.num_layers]
        return np.array([float(bit) for bit in patterns[(iteration - 1) % len(patterns)]])

    def _keep_probs(self, theta: float) -> np.ndarray:
        raise NotImplementedError


POLICIES = {
    "half": lambda num_layers: LayerDropPolicy(Constant(0.5), num_layers),
    "extreme": ExtremePolicy,
    "pld": lambda num_layers: PLDPolicy(Exponential(theta=0.4, gamma=0.5), num_layers),
    "low": lambda num_layers: LayerDropPolicy(Constant(0.2), num_layers),
    "full": FullDepthPolicy,
}


@dataclass(frozen=True)
class Case:
    """One run. `model`, `build` and `optimizer` say what is computed, the rest only how."""

    policy: str = "half"
    scope: str = "iteration"
    granularity: str = "layer"
    replicas: str = "shared"
    layers: int = 8  # of the policy
    pattern: str = ""  # of a hybrid model; a GPT has none
    unit: str = "layer"
    model: dict[str, Any] = field(default_factory=dict)  # TransformerConfig: MoE, MTP, precision, ...
    build: dict[str, Any] = field(default_factory=dict)  # tiny_gpt: tied, position_embedding_type
    optimizer: dict[str, Any] = field(default_factory=dict)
    tp: int = 1
    pp: int = 1
    cp: int = 1
    vpp: int | None = None
    ep: int = 1
    etp: int | None = None
    ddp: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)  # TransformerConfig: sequence_parallel, recomputation, ...
    overflow_at: int | None = None  # fp16: this iteration's loss scale is far too large
    optimizer_switches: dict[str, Any] = field(default_factory=dict)
    residual: str = "stock"
    evaluate: bool = False
    given_up: bool = False  # each iteration's forward passes run twice: the first ones have no backward pass
    switch_before_wrapping: bool = False
    switchable: bool = True  # False: stock layers, which drop nothing whatever the policy says
    iterations: int = 10
    relative: float = 1e-4  # tolerance against the reference

    @property
    def reference(self) -> Case:
        """The same model and the same drops without parallelism and without any switch."""
        plain = Case()
        gpt = plain if self.unit == "block" else replace(plain, pattern=self.pattern.replace("|", ""))
        return replace(
            self,
            pattern=gpt.pattern,
            unit=gpt.unit,
            **{
                name: getattr(plain, name)
                for name in ("tp", "pp", "cp", "vpp", "ep", "etp", "ddp", "config", "optimizer_switches", "relative")
            },
            switch_before_wrapping=False,
            given_up=False,
        )


def tokens_of(num_layers: int) -> TokenDrop:
    """4 of 16 tokens at first, all of them from iteration 5 on, in strata that each layout of 4 processes can draw."""
    layers = tuple(range(2, num_layers))
    return TokenDrop(seq_length=SEQUENCE, layers=layers, min_tokens=4, step=4, iterations=5, strata=4)


# Megatron replaces it in the whole process when one model asks for reduce_scatter_with_fp32_accumulation; the gradients
# of other models are then not reduced at all.
_stock_reduce_scatter = param_and_grad_buffer.dist_reduce_scatter_func


@dataclass
class Result:
    """What a run gave, by iteration; of the last one also the gradients' projections."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)  # NaN where the step was left out
    updated: list[bool] = field(default_factory=list)  # False: fp16 overflow
    loss_scales: list[float] = field(default_factory=list)
    moe_losses: list[dict[str, float]] = field(default_factory=list)  # over the layers that ran, by name
    num_zeros: list[float | None] = field(default_factory=list)
    gradients: dict[str, float] = field(default_factory=dict)
    buffers: dict[str, list[float]] = field(default_factory=dict)
    decisions: list[list[list[Any]]] = field(default_factory=list)  # bool, or a list of them for each sample


def run_case(case: Case) -> Result:
    # What another case's model left in the process.
    forget_moe_losses()
    param_and_grad_buffer.dist_reduce_scatter_func = _stock_reduce_scatter
    with model_parallel(tp=case.tp, pp=case.pp, cp=case.cp, vpp=case.vpp, ep=case.ep, etp=case.etp):
        num_layers = len(case.pattern.replace("|", "")) or case.layers
        config = tiny_config(**{"num_layers": num_layers, **case.model, **case.config})
        controller = DropController(
            POLICIES[case.policy](case.layers),
            seed=7,
            scope=case.scope,
            granularity=case.granularity,
            num_samples=MICRO_BATCH if case.granularity == "sample" else None,
            tokens=tokens_of(case.layers) if case.granularity == "token" else None,
            replicas=case.replicas,
            replica=parallel_state.get_data_parallel_rank(),
        )
        chunks = tiny_hybrid(config, case.pattern, **case.build) if case.pattern else tiny_gpt(config, **case.build)
        if case.switchable and case.switch_before_wrapping:
            make_switchable(chunks, controller, unit=case.unit)
        models = wrap_ddp(chunks, **case.ddp)
        if case.switchable and not case.switch_before_wrapping:
            make_switchable(models, controller, unit=case.unit)
        if case.residual == "fused":
            fuse_residual(models)
        optimizer = build_optimizer(models, **case.optimizer, **case.optimizer_switches)
        result = Result()
        for iteration in range(1, case.iterations + 1):
            _run_iteration(case, models, optimizer, controller, iteration, result)
        result.buffers = named_buffers(models)
        return result


def _run_iteration(
    case: Case,
    models: list[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    controller: DropController,
    iteration: int,
    result: Result,
) -> None:
    num_microbatches = GLOBAL_MICROBATCHES // parallel_state.get_data_parallel_world_size()
    for attempt in range(1 + case.given_up):
        for model in models:
            model.train()
            model.zero_grad_buffer()
        optimizer.zero_grad()
        controller.begin_iteration(iteration, num_microbatches)
        if attempt < case.given_up:
            forward_backward(models, iteration, num_microbatches, forward_only=True)
    if iteration == case.overflow_at:
        _multiply_loss_scale(optimizer, 2.0**30)
    elif case.overflow_at is not None and iteration == case.overflow_at + 1:
        _multiply_loss_scale(optimizer, 2.0**-30)
    result.losses.append(mean_loss(forward_backward(models, iteration, num_microbatches)))
    plan = controller.plan if controller.sample_plan is None else controller.sample_plan
    result.decisions.append(plan.tolist())
    if case.model.get("num_moe_experts"):
        result.moe_losses.append(logged_moe_losses(models[0].config, controller, case.pattern, case.unit))
    result.loss_scales.append(float(optimizer.get_loss_scale()))
    if iteration == case.iterations:
        result.gradients = gradient_projections(models)
    updated, grad_norm, num_zeros = optimizer.step()
    result.updated.append(bool(updated))
    result.grad_norms.append(float("nan") if grad_norm is None else float(grad_norm))
    result.num_zeros.append(None if num_zeros is None else float(num_zeros))
    if case.evaluate and iteration % 3 == 0:
        result.losses.append(evaluation_loss(models, iteration))


def _multiply_loss_scale(optimizer: MegatronOptimizer, factor: float) -> None:
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        part.grad_scaler._scale *= factor


def evaluation_loss(models: list[DistributedDataParallel], iteration: int) -> float:
    """Loss at full depth between two iterations, with Megatron's own handling of gathers in flight."""
    for model in models:
        if model.use_forward_hook:
            model.disable_forward_pre_hook()
        model.eval()
    num_microbatches = GLOBAL_MICROBATCHES // parallel_state.get_data_parallel_world_size()
    loss = mean_loss(forward_backward(models, iteration, num_microbatches, forward_only=True))
    for model in models:
        if model.use_forward_hook:
            model.enable_forward_pre_hook()
    return loss


def gradient_projections(models: list[DistributedDataParallel]) -> dict[str, float]:
    """For each parameter of the whole model, its reduced gradient's product with a random direction and its norm."""
    mine: dict[str, float] = {}
    for model in models:
        gather_gradient_shards(model)
        chunk = getattr(model.module, "module", model.module)  # Float16Module between the two
        for name, param in chunk.named_parameters():
            if (
                name == "output_layer.weight"
                and getattr(chunk, "mtp_process", False)
                and chunk.share_embeddings_and_output_weights
            ):
                continue  # Megatron allocates it, and uses the embedding's weight
            name = global_name(chunk, name)
            shape, own_slice, group = full_and_own_slice(name, param)
            direction = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
            product = (param.main_grad * own_slice(direction)).sum().double()
            square = param.main_grad.double().square().sum()
            both = torch.stack([product, square])
            if group is not None:
                dist.all_reduce(both, group=group)
            mine[name], mine[f"{name} norm"] = both[0].item(), both[1].sqrt().item()
    return _merged(mine)


def gather_gradient_shards(model: DistributedDataParallel) -> None:
    """With the distributed optimizer each rank holds its shard of the reduced gradients: put them together."""
    if not model.ddp_config.use_distributed_optimizer:
        return
    for group, bucket_groups in (
        (model.intra_dp_cp_group, model.bucket_groups),
        (model.intra_expt_dp_group, model.expert_parallel_bucket_groups),
    ):
        for bucket in (bucket for bucket_group in bucket_groups for bucket in bucket_group.buckets):
            shard = bucket.grad_data.chunk(group.size())[group.rank()].clone()
            dist.all_gather_into_tensor(bucket.grad_data, shard, group=group)


def logged_moe_losses(
    config: TransformerConfig, controller: DropController, pattern: str = "", unit: Any = "layer"
) -> dict[str, float]:
    """What Megatron logs of the iteration's auxiliary losses; it starts the next sums.

    But for the z-loss, which Megatron does not average over replicas.
    """
    total: dict[str, torch.Tensor] = {}
    track_moe_metrics(
        moe_loss_scale(controller, config, pattern or None, unit),
        controller.iteration,
        total_loss_dict=total,
        num_layers=pattern.count("E") if pattern else config.num_layers,  # as Megatron-LM does
        moe_layer_freq=config.moe_layer_freq,
        mtp_num_layers=config.mtp_num_layers,
    )
    return {name: float(value) for name, value in total.items() if name != "z_loss"}


def named_buffers(models: list[DistributedDataParallel]) -> dict[str, list[float]]:
    """The whole model's buffers that training changes: the routers' expert biases."""
    mine: dict[str, list[float]] = {}
    for model in models:
        chunk = getattr(model.module, "module", model.module)
        for name, buffer in chunk.named_buffers():
            if name.endswith("expert_bias"):
                mine[global_name(chunk, name)] = buffer.tolist()
    return _merged(mine)


def _merged(mine: dict[str, Any]) -> dict[str, Any]:
    everyone: list[dict[str, Any]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, mine)
    return {name: value for theirs in everyone for name, value in theirs.items()}


def run_cases(cases: dict[str, Case]) -> dict[str, Result]:
    return {name: run_case(case) for name, case in cases.items()}


def reference_result(case: Case) -> Result:
    """The result of the case's reference, run once in this process."""
    key = repr(case.reference)
    if key not in _reference_results:
        with single_process():
            _reference_results[key] = run_case(case.reference)
    return _reference_results[key]


_reference_results: dict[str, Result] = {}


def assert_equals_reference(ranks: Sequence[Mapping[str, Result]], name: str, case: Case) -> None:
    """Each rank's result of the named case is its reference's, within the case's tolerance."""
    reference = reference_result(case)
    for rank in ranks:
        assert_equal_decisions(rank[name], reference)
        assert_equal_runs(rank[name], reference, case.relative)


def assert_equal_runs(found: Result, expected: Result, relative: float = 1e-4) -> None:
    """Losses, norms and each parameter's last gradient agree; tolerances are relative to that gradient's norm."""
    np.testing.assert_allclose(found.losses, expected.losses, rtol=relative)
    np.testing.assert_allclose(found.grad_norms, expected.grad_norms, rtol=10 * relative)
    assert found.updated == expected.updated
    assert found.loss_scales == expected.loss_scales
    assert found.gradients.keys() == expected.gradients.keys()
    for name, value in expected.gradients.items():
        scale = expected.gradients[name if name.endswith(" norm") else f"{name} norm"]
        assert found.gradients[name] == pytest.approx(value, abs=100 * relative * scale + 1e-6), name
    for mine, theirs in zip(found.moe_losses, expected.moe_losses, strict=True):
        assert mine == pytest.approx(theirs, rel=10 * relative, nan_ok=True)
    assert found.buffers == {name: pytest.approx(value, abs=1e-6) for name, value in expected.buffers.items()}


def assert_equal_decisions(found: Result, expected: Result) -> None:
    """The same drops in every microbatch that both know (replicas divide them)."""
    for mine, theirs in zip(found.decisions, expected.decisions, strict=True):
        common = min(len(mine), len(theirs))
        assert mine[:common] == theirs[:common]
