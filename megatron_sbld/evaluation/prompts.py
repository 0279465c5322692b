"""Prompts out of a file, and what follows them on the terminal and in a file."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from megatron_sbld.data.text_files import NotTextError, bare_ending, json_line, read_text, refuse_one_value
from megatron_sbld.evaluation.generate import Continuation, continuation_text
from megatron_sbld.evaluation.model import TrainedModel

_LINE_END = re.compile(r"\r\n|\r|\n")


def read_prompts(path: str) -> list[str]:
    """The prompts of a file: its lines that are not empty, or in JSON lines the field `prompt` of each.

    Taken for JSON lines are .jsonl and .ndjson, and what begins with a JSON object that has a text `prompt`.

    Raises:
        ValueError: the file is not UTF-8 or has no prompt, or one of its JSON lines is no object with that field.
    """
    try:
        text = read_text(path)
        lines = [line for line in _LINE_END.split(text) if line.strip()]
        if not lines:
            raise ValueError(f"prompts {path}: has no prompt; one a line is expected")
        shape, value = json_line(lines[0])
        is_lines = bare_ending(path) in (".jsonl", ".ndjson") or (shape == "object" and _has_prompt(value))
        if bare_ending(path) == ".json" and not is_lines:
            refuse_one_value(shape)
    except NotTextError as error:
        raise ValueError(f"prompts {path}: {error}") from error
    return [_prompt_of(line, path) for line in lines] if is_lines else lines


def _has_prompt(row: object) -> bool:
    return isinstance(row, dict) and isinstance(row.get("prompt"), str)


def _prompt_of(line: str, path: str) -> str:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"prompts {path}: {line[:60]!r} is not JSON: {error}") from error
    if not _has_prompt(row):
        raise ValueError(f"prompts {path}: {line[:60]!r} is no object with a text `prompt`")
    prompt = str(row["prompt"])
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise ValueError(f"prompts {path}: {line[:60]!r} has half of a surrogate pair, which is not text")
    return prompt


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
