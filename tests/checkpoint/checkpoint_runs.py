"""A few iterations of a tiny GPT on the trainer's own model and optimizer, for tests of checkpoints."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_sbld.config.run_length import RunLength
from megatron_sbld.config.sections import Config, ModelConfig, OptimizerConfig, ParallelConfig, TrainingConfig
from tests.harness import model_parallel

VOCAB = 128
SEQUENCE = 16
BATCH = 4

CONFIG = Config(
    model=ModelConfig(
        num_layers=4,
        hidden_size=32,
        num_attention_heads=4,
        seq_length=SEQUENCE,
        hidden_dropout=0.1,
        attention_dropout=0.0,
        transformer_impl="local",
    ),
    optimizer=OptimizerConfig(lr=1e-2, min_lr=1e-3, lr_warmup_iters=2),
    training=TrainingConfig(precision="fp32", global_batch_size=BATCH, train_iters=20),
)


def configure(
    *,
    dropout: float = 0.1,
    precision: str = "fp32",
    loss_scale: float | None = None,
    vpp: int | None = None,
    tp: int = 1,
    pp: int = 1,
    **parallel: Any,
) -> Config:
    """The tiny run with another layout, precision or dropout."""
    return replace(
        CONFIG,
        model=replace(CONFIG.model, hidden_dropout=dropout),
        training=replace(CONFIG.training, precision=precision, loss_scale=loss_scale),
        parallel=ParallelConfig(
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            num_virtual_stages_per_pipeline_rank=vpp,
            **parallel,
        ),
    )


@dataclass
class Run:
    """Model, optimizer and scheduler of one rank."""

    chunks: list[Any]
    optimizer: Any
    scheduler: Any

    @property
    def parts(self) -> tuple[list[Any], Any, Any]:
        """As the checkpoint functions take them."""
        return self.chunks, self.optimizer, self.scheduler

    def train(self, iterations: Iterable[int]) -> list[float]:
        """Train for the given iterations (the data depend on their numbers); the global losses, on the last stage."""
        return [self._step(iteration) for iteration in iterations]

    def _step(self, iteration: int) -> float:
        from megatron.core import parallel_state
        from megatron.core.pipeline_parallel import get_forward_backward_func

        for chunk in self.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        rows = _rows(iteration)
        losses = get_forward_backward_func()(
            forward_step_func=_forward_step,
            data_iterator=[iter(rows) for _ in self.chunks],
            model=self.chunks,
            num_microbatches=len(rows),
            seq_length=SEQUENCE,
            micro_batch_size=1,
            forward_only=False,
        )
        self.optimizer.step()
        self.scheduler.step(increment=BATCH)
        total = torch.stack([entry["loss"] for entry in losses]).sum() if losses else torch.zeros(())
        dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
        return float(total) / BATCH

    def weights(self) -> dict[str, torch.Tensor]:
        """Copies of this rank's weights by name."""
        return {
            f"{index}.{name}": param.detach().clone()
            for index, chunk in enumerate(self.chunks)
            for name, param in chunk.named_parameters()
        }


@contextmanager
def run(config: Config, seed: int = 1234, vocab_size: int = VOCAB) -> Iterator[Run]:
    """A fresh run on the config's layout."""
    from megatron_sbld.training.model import build_model, build_optimizer, build_param_scheduler

    parallel = config.parallel
    with model_parallel(
        tp=parallel.tensor_model_parallel_size,
        pp=parallel.pipeline_model_parallel_size,
        vpp=parallel.num_virtual_stages_per_pipeline_rank,
        seed=seed,
    ):
        chunks = build_model(config, vocab_size)
        optimizer = build_optimizer(config, chunks)
        yield Run(chunks, optimizer, build_param_scheduler(config, optimizer, RunLength(config.training)))


def stop_and_resume(directory: Path, config: Config, **manager_options: Any) -> tuple[list[float], list[float]]:
    """Losses of iterations 3 and 4 of an uninterrupted run, and of one resumed at 2 into a model of other weights."""
    from megatron_sbld.checkpoint.files import latest_complete
    from megatron_sbld.checkpoint.manager import CheckpointManager, load_checkpoint
    from megatron_sbld.ranks import on_rank_0

    with run(config) as first:
        manager = CheckpointManager(directory, **manager_options)
        first.train([1, 2])
        manager.save(2, *first.parts, {"consumed_samples": 2 * BATCH})
        expected = [*first.train([3, 4]), checksum(first)]
        manager.close()
    with run(config, seed=77) as second:
        latest = on_rank_0(lambda: latest_complete(directory))
        state = load_checkpoint(latest.path, *second.parts, seed=1)
        assert state == {"consumed_samples": 2 * BATCH}
        found = [*second.train([3, 4]), checksum(second)]
    return expected, found


def checksum(of: Run) -> float:
    """Sum of the absolute values of this rank's weights, in float64."""
    return sum(float(weight.double().abs().sum()) for weight in of.weights().values())


def _rows(iteration: int) -> list[torch.Tensor]:
    """This replica's rows of a global batch, each [1, SEQUENCE + 1]."""
    from megatron.core import parallel_state

    generator = torch.Generator().manual_seed(iteration)
    rows = torch.randint(0, VOCAB, (BATCH, SEQUENCE + 1), generator=generator)
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    return list(rows[rank * BATCH // size : (rank + 1) * BATCH // size].split(1))


def _forward_step(data: Iterator[torch.Tensor], model: Any) -> tuple[torch.Tensor, Any]:
    row = next(data)
    positions = torch.arange(SEQUENCE)[None]
    mask = torch.triu(torch.ones(1, 1, SEQUENCE, SEQUENCE, dtype=torch.bool), diagonal=1)
    output = model(row[:, :-1], positions, mask, labels=row[:, 1:])
    return output, partial(_loss)


def _loss(losses: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss = losses.float().mean()
    return loss, {"loss": loss.detach().clone()}
