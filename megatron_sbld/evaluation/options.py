"""The options of `megatron-sbld evaluate` and `generate`."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sbld.config.sections import ParallelConfig, Precision, TimeoutMinutes
from megatron_sbld.fields import Count, CountOrZero, NotNegative, PositiveShare, check_fields


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """How a trained model is loaded and spread over processes; data parallelism takes what the others leave."""

    tokenizer: str | None = None
    """Where the model's tokenizer is now: byte, a tokenizer.json or a folder; None is where it was in training."""
    config: str | None = None
    """Config file that describes the model of a checkpoint that does not, as Megatron-LM's."""
    precision: Precision | None = None
    """None is that of training on a GPU, and fp32 on a CPU, where the others are slow."""
    batch_tokens: Count = 16384
    """Most tokens of a microbatch, padding included; a longer input is one by itself."""
    tensor_model_parallel_size: Count = 1
    pipeline_model_parallel_size: Count = 1
    pipeline_model_parallel_layout: str | None = None
    """Which layers each stage holds, as in training; None is as many on each."""
    sequence_parallel: bool = False
    """Split the sequence outside of attention and MLP over the tensor-parallel ranks."""
    distributed_timeout_minutes: TimeoutMinutes = 10.0
    """A rank that dies or stalls for longer than this ends the evaluation on all ranks."""

    def __post_init__(self) -> None:
        check_fields(self)

    def parallel(self) -> ParallelConfig:
        """The layout."""
        return ParallelConfig(
            tensor_model_parallel_size=self.tensor_model_parallel_size,
            pipeline_model_parallel_size=self.pipeline_model_parallel_size,
            pipeline_model_parallel_layout=self.pipeline_model_parallel_layout,
            sequence_parallel=self.sequence_parallel,
            distributed_timeout_minutes=self.distributed_timeout_minutes,
        )


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How many tokens follow a prompt, and how each is chosen.

    Raises:
        ValueError: a value out of range, or one that a temperature of 0 would ignore.
    """

    max_new_tokens: Count = 100
    """Most tokens that follow a prompt; fewer where the document ends or the model's context is full."""
    temperature: NotNegative = 1.0
    """Divides the logits before a token is drawn; 0 always takes the most likely one."""
    top_k: Count | None = None
    """Draw from the k most likely tokens; None from all."""
    top_p: PositiveShare | None = None
    """Draw from the fewest most likely tokens with this probability between them, after temperature and top_k
    (nucleus sampling, Holtzman et al., 2020); None from all."""
    num_samples: Count = 1
    """Continuations of each prompt."""
    seed: CountOrZero = 1234
    """Seed of the draws; each continuation has its own random numbers, on any layout."""

    def __post_init__(self) -> None:
        check_fields(self)
        ignored = {"top_k": self.top_k, "top_p": self.top_p, "num_samples": self.num_samples}
        for name, value in ignored.items():
            if self.temperature == 0 and value != getattr(type(self), name):
                raise ValueError(
                    f"{name} = {value} has no effect with temperature = 0, which takes the likeliest token"
                )
