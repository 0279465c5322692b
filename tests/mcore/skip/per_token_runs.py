"""Iterations of the trainer on a batch whose samples have very unlike numbers of tokens that count, two of them none.

`oracle` is what they must give with `training.calculate_per_token_loss`: the gradient of (sum of the losses of tokens
that count) / (their number), by autograd over the whole batch at once. test_switches.py compares.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel

from megatron_sbld.config.sections import Config, DataConfig, ModelConfig, ParallelConfig, TrainingConfig
from megatron_sbld.controller import DropController
from megatron_sbld.data.batches import Batch
from megatron_sbld.mcore import make_switchable
from megatron_sbld.training.model import build_model, build_optimizer
from megatron_sbld.training.run import microbatch_calculator
from megatron_sbld.training.step import StepResult, train_step, validation_loss
from tests.harness import model_parallel, single_process
from tests.mcore.helpers import SEQUENCE, VOCAB, Listed, fill_parameters, global_name, tiny_config, tiny_gpt
from tests.mcore.skip.runs import BOTH_OVERLAPS, gradient_projections

BATCH = 8
KEPT = {"nothing dropped": (1, 1, 1, 1), "two layers dropped": (1, 0, 1, 0), "all dropped": (0, 0, 0, 0)}
ALONE = "one process"
ON_TWO_PROCESSES: dict[str, dict[str, Any]] = {
    "DP 2": {},
    "DP 2, both overlaps": {**BOTH_OVERLAPS, "ddp_bucket_size": 2000},
    "TP 2": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "PP 2": {"pipeline_model_parallel_size": 2},
    "PP 2 interleaved": {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2},
    "CP 2": {"context_parallel_size": 2},
}
LAYOUTS = {ALONE: {}, **ON_TWO_PROCESSES}
MICRO_BATCH_SIZES = (1, 2, 4)

Gradients = dict[str, float]
"""By parameter: the gradient's product with a random direction, and its norm."""


class Found(NamedTuple):
    gradients: Gradients
    result: StepResult
    validation: float


def whole_batch() -> Batch:
    """[8, s]; samples 4 and 5 have no token that counts, the others between a sixteenth of them and all."""
    generator = torch.Generator().manual_seed(3)
    text = torch.randint(VOCAB, (BATCH, SEQUENCE + 1), generator=generator)
    counted = torch.tensor([16, 1, 3, 16, 0, 0, 8, 2])
    return {
        "tokens": text[:, :-1].contiguous(),
        "labels": text[:, 1:].contiguous(),
        "position_ids": torch.arange(SEQUENCE).expand(BATCH, -1).contiguous(),
        "loss_mask": (torch.arange(SEQUENCE) < counted[:, None]).float(),
    }


def microbatches(micro_batch_size: int) -> Iterator[Batch]:
    """This replica's, in the order of the run."""
    replica, replicas = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    for start in range(replica * micro_batch_size, BATCH, replicas * micro_batch_size):
        yield {name: tensor[start : start + micro_batch_size] for name, tensor in whole_batch().items()}


class GradientsOnly:
    """In the place of an optimizer: notes the gradients instead of making a step."""

    def __init__(self, chunks: list[DistributedDataParallel]) -> None:
        self._chunks = chunks
        self.gradients: Gradients = {}

    def zero_grad(self) -> None:
        """The buffers were zeroed before."""

    def step(self) -> tuple[bool, None, None]:
        self.gradients = gradient_projections(self._chunks)
        return True, None, None


def the_run(layout: str, micro_batch_size: int, per_token: bool) -> Config:
    return Config(
        model=ModelConfig(
            num_layers=4,
            hidden_size=32,
            num_attention_heads=4,
            seq_length=SEQUENCE,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            transformer_impl="local",
        ),
        data=DataConfig(eod_mask_loss=True),
        parallel=ParallelConfig(**LAYOUTS[layout]),
        training=TrainingConfig(
            micro_batch_size=micro_batch_size,
            global_batch_size=BATCH,
            precision="fp32",
            calculate_per_token_loss=per_token,
        ),
    )


@contextmanager
def on_layout(layout: str) -> Iterator[None]:
    parallel = ParallelConfig(**LAYOUTS[layout])
    with model_parallel(
        tp=parallel.tensor_model_parallel_size,
        pp=parallel.pipeline_model_parallel_size,
        vpp=parallel.num_virtual_stages_per_pipeline_rank,
        cp=parallel.context_parallel_size,
    ):
        yield


def run(config: Config, kept: str) -> Found:
    """An iteration of the trainer, and a validation on the same batch."""
    size = config.training.micro_batch_size
    count = BATCH // size // parallel_state.get_data_parallel_world_size()
    with microbatch_calculator(config):
        controller = DropController(Listed(*KEPT[kept]), seed=1)
        chunks = build_model(config, VOCAB)
        for chunk in chunks:
            fill_parameters(chunk.module)
        make_switchable(chunks, controller)
        build_optimizer(config, chunks)  # tells the schedules how gradients are finished
        optimizer: Any = GradientsOnly(chunks)
        controller.begin_iteration(1, count)
        result = train_step(config, chunks, optimizer, [microbatches(size) for _ in chunks], False, True)
        validation = validation_loss(config, chunks, [microbatches(size) for _ in chunks], count)
    return Found(optimizer.gradients, result, validation)


def run_all(layouts: Iterable[str]) -> dict[tuple[str, int, str], Found]:
    found = {}
    for layout in layouts:
        with on_layout(layout):
            for size, kept in itertools.product(MICRO_BATCH_SIZES, KEPT):
                found[layout, size, kept] = run(the_run(layout, size, per_token=True), kept)
    return found


def run_alone() -> dict[tuple[str, int, str], Found]:
    """The same in this process."""
    with single_process():
        return run_all([ALONE])


def run_by_microbatch(micro_batch_size: int) -> Found:
    """With Megatron's default, in this process."""
    with single_process(), on_layout(ALONE):
        return run(the_run(ALONE, micro_batch_size, per_token=False), "nothing dropped")


def oracle(kept: str) -> tuple[Gradients, float]:
    """Autograd through megatron-core's own model without the dropped layers, over the whole batch; and its loss."""
    with single_process(), model_parallel():
        (model,) = tiny_gpt(tiny_config())
        named = {global_name(model, name): param for name, param in model.named_parameters()}
        layers = [layer for layer, keep in zip(model.decoder.layers, KEPT[kept], strict=True) if keep]
        model.decoder.layers = torch.nn.ModuleList(layers)
        model.decoder.num_layers_per_pipeline_rank = len(layers)
        batch = whole_batch()
        losses = model.train()(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
        loss = (losses * batch["loss_mask"]).sum() / batch["loss_mask"].sum()
        loss.backward()
        found: Gradients = {}
        for name, param in named.items():
            gradient = torch.zeros_like(param) if param.grad is None else param.grad
            direction = torch.randn(
                list(param.shape), generator=torch.Generator().manual_seed(zlib.crc32(name.encode()))
            )
            found[name] = float((gradient * direction).sum())
            found[f"{name} norm"] = float(gradient.norm())
        return found, float(loss.detach())


def assert_equal_gradients(found: Gradients, expected: Gradients, relative: float = 1e-4) -> None:
    """Tolerances are relative to each gradient's norm."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        norm = expected[name if name.endswith(" norm") else f"{name} norm"]
        assert found[name] == pytest.approx(value, abs=relative * norm + 1e-8), name
