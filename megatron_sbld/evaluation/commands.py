"""The commands of `megatron-sbld` that judge and use a trained model: their options, and what they print."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO

from jsonargparse import ArgumentParser

if TYPE_CHECKING:
    from megatron_sbld.evaluation.generate import Continuation, Sampling
    from megatron_sbld.evaluation.model import TrainedModel

_NOT_IN_GENERATION = {
    "num_virtual_stages_per_pipeline_rank",
    "context_parallel_size",
    "sequence_parallel",
    "use_distributed_optimizer",
    "overlap_grad_reduce",
    "overlap_param_gather",
    "ddp_bucket_size",
    "deallocate_pipeline_outputs",
}
"""Fields of ParallelConfig that generation cannot use, or that are about training."""


def _parser(usage: str, description: str) -> ArgumentParser:
    return ArgumentParser(
        prog="megatron-sbld", usage=f"megatron-sbld {usage}", description=description, exit_on_error=False
    )


def generate(args: list[str]) -> int:
    """`megatron-sbld generate`."""
    from megatron_sbld.evaluation.generate import Sampling, encode_prompt
    from megatron_sbld.evaluation.generate import generate as continue_all
    from megatron_sbld.evaluation.model import read_trained_model
    from megatron_sbld.training.config import ParallelConfig
    from megatron_sbld.training.config_file import field_names, read_config

    given = _generate_parser().parse_args(args)
    sampling = Sampling(**{name: given[name] for name in field_names(Sampling)})
    layout = [name for name in field_names(ParallelConfig) if name not in _NOT_IN_GENERATION]
    parallel = ParallelConfig(**{name: given[name] for name in layout})
    texts = [*given.prompt, *(read_prompts(given.prompts) if given.prompts else [])]
    if not texts:
        raise ValueError("give a prompt with --prompt TEXT or --prompts FILE; --prompt '' starts a new document")
    config = read_config(given.config) if given.config else None
    trained = read_trained_model(Path(given.checkpoint), given.tokenizer, config)
    prompts = [encode_prompt(trained.tokenizer, text) for text in texts]
    with _shown(trained, sampling, texts, prompts, given.out) as show:
        continue_all(trained, prompts, sampling, parallel, precision=given.precision, on_result=show)
    return 0


def _generate_parser() -> ArgumentParser:
    from megatron_sbld.evaluation.generate import Sampling
    from megatron_sbld.training.config import ParallelConfig

    parser = _parser(
        "generate --checkpoint DIR --prompt TEXT [options]",
        "Continue prompts with a trained model, at full depth. Run it under torchrun for a model that is spread over "
        "several processes; what is left of them are replicas, which share the prompts.",
    )
    parser.add_argument(
        "--checkpoint", type=str, required=True, help="checkpoint, or run folder, whose newest complete one is taken"
    )
    parser.add_argument(
        "--prompt", action="append", default=[], help="text to continue, may be repeated; '' starts a new document"
    )
    parser.add_argument(
        "--prompts",
        type=str | None,
        help="file with a prompt a line; .jsonl: an object with a field `prompt` a line, as --out writes it",
    )
    parser.add_class_arguments(Sampling)
    parser.add_argument(
        "--out",
        type=str | None,
        help="JSON lines file to write: token ids, their log-probabilities and what ended each",
    )
    parser.add_argument(
        "--tokenizer", type=str | None, help="where the tokenizer is now, as data.tokenizer; null: as in training"
    )
    parser.add_argument(
        "--config",
        type=str | None,
        help="config file with the model section and data.tokenizer of a checkpoint that does not say what its model "
        "is, as Megatron-LM's",
    )
    parser.add_argument(
        "--precision",
        type=Literal["fp32", "bf16", "fp16"] | None,
        help="null: that of training on a GPU, fp32 on a CPU",
    )
    parser.add_class_arguments(ParallelConfig, skip=_NOT_IN_GENERATION)
    return parser


def read_prompts(path: str) -> list[str]:
    """The prompts of a file: its lines that are not empty, or the field `prompt` of each in a .jsonl file.

    Raises:
        ValueError: the file has no prompt, or a line of a .jsonl file is no object with that field.
    """
    try:
        lines = [line for line in Path(path).read_text(encoding="utf-8").split("\n") if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"prompts {path}: is not UTF-8: {error}") from error
    if not lines:
        raise ValueError(f"prompts {path}: has no prompt; one a line is expected")
    return [_prompt_of(line, path) for line in lines] if path.endswith(".jsonl") else lines


def _prompt_of(line: str, path: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"prompts {path}: {line[:60]!r} is not JSON: {error}") from error
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise ValueError(f"prompts {path}: {line[:60]!r} is no object with a text `prompt`")
    return str(row["prompt"])


@contextmanager
def _shown(
    trained: TrainedModel,
    sampling: Sampling,
    texts: Sequence[str],
    prompts: Sequence[Sequence[int]],
    out: str | None,
) -> Iterator[Any]:
    """A function that shows a continuation on the terminal and writes it to `out`; called on rank 0 alone."""
    from megatron_sbld.evaluation.generate import continuation_text

    began, tokens = time.monotonic(), 0
    several = len(texts) * sampling.num_samples > 1
    file: TextIO | None = None
    if out is not None and os.environ.get("RANK", "0") == "0":  # before work starts, so that a bad path is known
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        file = open(out, "w", encoding="utf-8")  # noqa: SIM115

    def show(continuation: Continuation) -> None:
        nonlocal tokens
        tokens += len(continuation.tokens)
        text, prompt = texts[continuation.prompt], prompts[continuation.prompt]
        follows = continuation_text(trained.tokenizer, prompt, continuation.tokens)
        if several:
            print(f"--- prompt {continuation.prompt + 1}, sample {continuation.sample + 1}")
        # On a terminal the prompt is bold, so that one sees where the model begins.
        print(f"\033[1m{text}\033[0m{follows}" if sys.stdout.isatty() else f"{text}{follows}", flush=True)
        if file is not None:
            row = {
                "prompt": text,
                "continuation": follows,
                "sample": continuation.sample + 1,
                "ended_by": continuation.ended_by,
                "prompt_tokens": list(prompt),
                "tokens": continuation.tokens,
                "log_probs": continuation.log_probs,
                "iteration": trained.checkpoint.iteration,
            }
            print(json.dumps(row, ensure_ascii=False), file=file, flush=True)

    try:
        yield show
    finally:
        if file is not None:
            file.close()
    if tokens:
        seconds = time.monotonic() - began
        print(f"iteration {trained.checkpoint.iteration:,}: {tokens} tokens in {seconds:.1f} s", file=sys.stderr)
