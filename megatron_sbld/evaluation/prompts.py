"""Prompts out of a file, and what follows them on the terminal and in a file."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from megatron_sbld.evaluation.generate import Continuation, continuation_text
from megatron_sbld.evaluation.model import TrainedModel


def read_prompts(path: str) -> list[str]:
    """The prompts of a file: its lines that are not empty, or in a .jsonl file the field `prompt` of each.

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
def shown(
    trained: TrainedModel, texts: Sequence[str], prompts: Sequence[Sequence[int]], num_samples: int, out: str | None
) -> Iterator[Callable[[Continuation], None]]:
    """A function that shows a continuation on the terminal and writes it to `out`, to be called on rank 0 alone.

    Args:
        trained: the model.
        texts: the prompts.
        prompts: their tokens.
        num_samples: continuations of each, which have a heading where there are several in all.
        out: a JSON lines file, which is replaced as soon as there is something to write.

    Raises:
        ValueError: `out` is a folder.
    """
    if out is not None:
        if Path(out).is_dir():
            raise ValueError(f"out = {out!r}: is a folder; must be a file")
        Path(out).parent.mkdir(parents=True, exist_ok=True)
    began, tokens, mode = time.monotonic(), 0, "w"

    def show(continuation: Continuation) -> None:
        nonlocal tokens, mode
        tokens += len(continuation.tokens)
        text, prompt = texts[continuation.prompt], prompts[continuation.prompt]
        follows = continuation_text(trained.tokenizer, prompt, continuation.tokens)
        if len(texts) * num_samples > 1:
            print(f"--- prompt {continuation.prompt + 1}, sample {continuation.sample + 1}")
        # On a terminal the prompt is bold, so that one sees where the model begins.
        print(f"\033[1m{text}\033[0m{follows}" if sys.stdout.isatty() else f"{text}{follows}", flush=True)
        if out is not None:
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
            with Path(out).open(mode, encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            mode = "a"

    yield show
    if tokens:
        seconds = time.monotonic() - began
        print(f"iteration {trained.checkpoint.iteration:,}: {tokens} tokens in {seconds:.1f} s", file=sys.stderr)
