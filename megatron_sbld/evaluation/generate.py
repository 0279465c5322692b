"""Continues prompts with a trained model at full depth, on megatron-core's inference wrapper and key-value cache.

Of megatron-core's inference only the wrapper around the model is used: it runs on CPU and GPU, with tensor and
pipeline parallelism. The loop over tokens and the choice of each are here, because of its two engines
- the dynamic one does not run on a CPU: it needs CUDA events, NVTX and flash-attn ("flash attn verion v2.7.3 and above
  is required for dynamic batching");
- the static one is deprecated in favour of it, needs CUDA events too ("Tried to instantiate dummy base class Event"),
  takes ids of rows that only pad the word embeddings, and top-k or top-p but not both, and draws the tokens of all
  samples from one generator.

Nothing is dropped: the model is built as for evaluation, without switchable layers.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import GPTInferenceWrapper

from megatron_sbld.config.sections import ParallelConfig
from megatron_sbld.data.tokenizer import Tokenizer
from megatron_sbld.evaluation.model import TrainedModel, evaluation_config, load_chunks
from megatron_sbld.evaluation.options import Sampling
from megatron_sbld.health.watchdog import POSITION
from megatron_sbld.mcore.compat import inference_wrapper
from megatron_sbld.ranks import this_device
from megatron_sbld.training.processes import distributed_run, world_size_from_environment

EndedBy = Literal["end_of_document", "max_new_tokens", "context"]


class Continuation(NamedTuple):
    """What follows a prompt."""

    prompt: int
    """Index of the prompt, from 0."""
    sample: int
    """Index among the prompt's continuations, from 0."""
    tokens: list[int]
    """With the end-of-document token, where that ended it."""
    log_probs: list[float]
    """Natural logarithm of each token's probability under the model itself: at temperature 1, over all tokens."""
    ended_by: EndedBy


def generate(
    trained: TrainedModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    parallel: ParallelConfig,
    *,
    precision: str | None = None,
    on_result: Callable[[Continuation], None] = lambda continuation: None,
) -> list[Continuation]:
    """Continue prompts with a checkpoint's model; on one process or, under torchrun, on many.

    Args:
        trained: the model.
        prompts: tokens of each, see `encode_prompt`.
        sampling: how tokens are chosen.
        parallel: the layout; replicas share the prompts.
        precision: see `evaluation_config`.
        on_result: called on rank 0 with each continuation as soon as its prompt and those before it are through.

    Returns:
        Continuations in the order of prompts and samples; the same on every rank.

    Raises:
        ValueError: a prompt is empty or longer than the model's context, the model cannot be spread like that, the
            layout is one that the wrapper does not support, or the checkpoint is damaged.
    """
    for number, prompt in enumerate(prompts, start=1):
        if not 1 <= len(prompt) <= trained.model.context:
            raise ValueError(
                f"prompt {number} has {len(prompt)} tokens: must have 1 to {trained.model.context}, the model's context"
            )
    _check_layout(parallel)
    config = evaluation_config(trained, parallel, world_size_from_environment(), precision)
    with distributed_run(config):
        POSITION.enter(f"generating from {trained.checkpoint.path}", trained.checkpoint.iteration)
        (model,) = load_chunks(trained, config)
        return continue_prompts(model, trained, prompts, sampling, on_result)


def encode_prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    """Tokens of a prompt; of an empty one the end-of-document token, which in training comes before every document."""
    return tokenizer.encode(text) or [tokenizer.eod]


def continuation_text(tokenizer: Tokenizer, prompt: Sequence[int], tokens: Sequence[int]) -> str:
    """What `tokens` add to the text of `prompt`: characters may span the border, spaces depend on what is before."""
    before, whole = tokenizer.decode(prompt), tokenizer.decode([*prompt, *tokens])
    return whole[len(before) :] if whole.startswith(before) else tokenizer.decode(tokens)


def _check_layout(parallel: ParallelConfig) -> None:
    for name, supported in (
        ("context_parallel_size", 1),
        ("num_virtual_stages_per_pipeline_rank", None),
        ("sequence_parallel", False),
    ):
        if getattr(parallel, name) != supported:
            raise ValueError(
                f"parallel.{name} = {getattr(parallel, name)}: generation runs with tensor and pipeline parallelism "
                f"only; use {supported}, a checkpoint loads on any layout"
            )


def continue_prompts(
    model: torch.nn.Module,
    trained: TrainedModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    on_result: Callable[[Continuation], None] = lambda continuation: None,
) -> list[Continuation]:
    """`generate` with this rank's part of a model that is already loaded. Collective."""
    group = parallel_state.get_data_parallel_group()
    replica, replicas = dist.get_rank(group), dist.get_world_size(group)
    results: list[Continuation] = []
    for first in range(0, len(prompts), replicas):
        index = first + replica
        own = _continue(model, trained, prompts[index], sampling, index) if index < len(prompts) else []
        by_replica: list[list[Continuation]] = [[] for _ in range(replicas)]
        dist.all_gather_object(by_replica, own, group=group)
        for continuation in (continuation for found in by_replica for continuation in found):
            results.append(continuation)
            if dist.get_rank() == 0:
                on_result(continuation)
    return results


def _continue(
    model: torch.nn.Module, trained: TrainedModel, prompt: Sequence[int], sampling: Sampling, index: int
) -> list[Continuation]:
    """The continuations of one prompt, all at once, on the ranks that hold one replica of the model."""
    rows, tokenizer = sampling.num_samples, trained.tokenizer
    limit = min(sampling.max_new_tokens, trained.model.context + 1 - len(prompt))
    wrapper = _wrapper(model, trained.rows, rows, len(prompt) + limit - 1)
    generators = [random.Random(f"{sampling.seed} {index} {row}") for row in range(rows)]
    found: list[list[tuple[int, float]]] = [[] for _ in range(rows)]
    unfinished = set(range(rows))
    tokens = torch.tensor([list(prompt)] * rows, device=this_device())  # [rows, s], then [rows, 1]
    start = 0
    while unfinished and start < len(prompt) + limit - 1:
        POSITION.microbatches += 1
        positions = torch.arange(start, start + tokens.shape[1], device=tokens.device).expand_as(tokens)
        logits = wrapper.run_one_forward_step({"tokens": tokens, "position_ids": positions, "attention_mask": None})
        wrapper.inference_context.enable_decode_mode()
        start += tokens.shape[1]
        uniforms = torch.tensor([generator.random() for generator in generators], dtype=torch.float64)
        chosen = _choose_everywhere(logits, uniforms, sampling, tokenizer.vocab_size)  # [rows, 2]: token, log_prob
        tokens = chosen[:, :1].long()
        for row, (token, log_prob) in enumerate(chosen.tolist()):
            if row in unfinished:
                found[row].append((int(token), log_prob))
                if token == tokenizer.eod:
                    unfinished.remove(row)
    full: EndedBy = "max_new_tokens" if limit == sampling.max_new_tokens else "context"
    return [
        Continuation(
            prompt=index,
            sample=row,
            tokens=[token for token, _ in chosen],
            log_probs=[log_prob for _, log_prob in chosen],
            ended_by=full if row in unfinished else "end_of_document",
        )
        for row, chosen in enumerate(found)
    ]


def _wrapper(model: torch.nn.Module, vocab_rows: int, max_requests: int, max_length: int) -> GPTInferenceWrapper:
    """megatron-core's wrapper, with an empty cache for `max_requests` sequences of `max_length` tokens."""
    wrapper = inference_wrapper(model, vocab_rows, max_requests, max_length)
    wrapper.prep_model_for_inference()
    return wrapper


def _choose_everywhere(
    logits: torch.Tensor | None, uniforms: torch.Tensor, sampling: Sampling, vocab_size: int
) -> torch.Tensor:
    """Next tokens and their log-probabilities, float64 [rows, 2], on all ranks of a replica as the last of them chose.

    Args:
        logits: [rows, s, padded vocabulary], of which the last position counts; None before the last pipeline stage.
        uniforms: [rows], in [0, 1).
        sampling: how.
        vocab_size: tokens of the tokenizer.
    """
    group = parallel_state.get_model_parallel_group()
    source = dist.get_process_group_ranks(group)[-1]
    chosen = torch.empty(len(uniforms), 2, dtype=torch.float64)
    if dist.get_rank() == source:
        assert logits is not None, "the last rank of a replica is on its last pipeline stage"
        last = logits[:, -1, :vocab_size].float()
        tokens = choose(last, uniforms, sampling.temperature, sampling.top_k, sampling.top_p)
        chosen[:, 0] = tokens
        chosen[:, 1] = last.log_softmax(dim=-1).cpu().gather(1, tokens[:, None])[:, 0]
    chosen = chosen.to(this_device())
    dist.broadcast(chosen, source, group=group)
    return chosen


def choose(
    logits: torch.Tensor,
    uniforms: torch.Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> torch.Tensor:
    """A token for each row by inversion of the cumulative distribution, most likely tokens first: int64 [rows].

    Args:
        logits: [rows, vocabulary], on any device.
        uniforms: float64 [rows], in [0, 1).
        temperature: divides the logits; 0 takes the argmax, of equal ones the lowest id.
        top_k: tokens that can be drawn; None is all.
        top_p: probability of those that can be drawn, of what temperature and top_k have left; None is all of it.
    """
    if temperature == 0:
        return logits.argmax(dim=-1).cpu()
    ordered, ids = (tensor.cpu() for tensor in logits.sort(dim=-1, descending=True, stable=True))
    ordered = ordered.double()
    probs = ((ordered - ordered[:, :1]) / temperature).softmax(dim=-1)
    if top_k is not None:
        probs[:, top_k:] = 0
    if top_p is not None:
        before = probs.cumsum(dim=-1) - probs
        probs[before >= top_p * probs.sum(dim=-1, keepdim=True)] = 0
    cumulative = probs.cumsum(dim=-1)
    rank = (cumulative <= uniforms[:, None] * cumulative[:, -1:]).sum(dim=-1, keepdim=True)
    last = (probs > 0).sum(dim=-1, keepdim=True) - 1  # where rounding would go beyond
    return ids.gather(1, torch.minimum(rank, last))[:, 0]
