"""LAMBADA and perplexity as tasks: data that are read once and asked of one model after another."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

from megatron_sbld.config.sections import TextFormat
from megatron_sbld.data.documents import InputFormat
from megatron_sbld.data.tokenizer import Tokenizer
from megatron_sbld.evaluation import lambada, perplexity
from megatron_sbld.evaluation.lambada import LambadaResult
from megatron_sbld.evaluation.passages import read_passages
from megatron_sbld.evaluation.perplexity import PerplexityResult
from megatron_sbld.evaluation.requests import Request, Score
from megatron_sbld.evaluation.results import Data, Evaluation, evaluation, identify
from megatron_sbld.evaluation.texts import read_texts

Result = LambadaResult | PerplexityResult


@dataclass(frozen=True)
class Asked:
    """A task in the tokens of one model."""

    requests: Sequence[Request]
    result: Callable[[Sequence[Score]], Result]
    """What the scores of the requests, in their order, come to."""
    data: str
    """Where the data are, as the user wrote it."""
    files: list[str]
    """What they were read from."""
    options: dict[str, Any]
    """What of the task changes the figures: format, stride, ..."""
    write_examples: Callable[[Sequence[Score], Path], None] | None = None
    """Writes what the model makes of each request, a JSON line each; None where the task has none."""
    notes: Sequence[str] = ()
    """For the console: what the data were taken for."""

    @cached_property
    def identity(self) -> Data:
        """The data's name and hash; reads the files once, when it is first asked for."""
        return identify([self.data], self.files)

    def evaluation(
        self,
        task: Task,
        result: Result,
        *,
        iteration: int,
        consumed_tokens: int | None,
        train_time_s: float | None,
        precision: str,
    ) -> Evaluation:
        """What is kept of a result; see Evaluation for the arguments."""
        return evaluation(
            task=task.name,
            iteration=iteration,
            consumed_tokens=consumed_tokens,
            train_time_s=train_time_s,
            precision=precision,
            data=self.identity,
            options=self.options,
            result=result,
        )


class Task(ABC):
    """What is asked of models."""

    name: ClassVar[str]
    data: str
    """Where the data are, as the user wrote it."""

    @abstractmethod
    def ask(self, tokenizer: Tokenizer, context: int) -> Asked:
        """The task for a model with this tokenizer that takes `context` tokens at once.

        Raises:
            ValueError: the data are missing or broken, or something of them cannot be asked of this model.
        """


class LambadaTask(Task):
    """The last word of each passage.

    Args:
        data: a file of passages, plain text or JSON lines.
        passage_format: which of them; auto goes by the file's name and content.
        raw: score plain text as it is, with spaces between tokens, instead of detokenised.
        limit: passages that are scored, from the first; None is all.

    Raises:
        ValueError: the file is missing or broken.
    """

    name = "lambada"

    def __init__(
        self, data: str, passage_format: InputFormat = "auto", *, raw: bool = False, limit: int | None = None
    ) -> None:
        self.data = data
        passages, found = read_passages(data, passage_format, detokenise=False if raw else None)
        self._passages = passages[: _checked_limit(limit)]
        self._options = {"format": found, "detokenised": found == "text" and not raw, "limit": limit}

    def ask(self, tokenizer: Tokenizer, context: int) -> Asked:
        asked = lambada.encode_passages(self._passages, tokenizer, context)
        return Asked(
            requests=asked.requests,
            result=partial(lambada.summarise, asked),
            data=self.data,
            files=[self.data],
            options={**self._options, "context": context},
            write_examples=partial(lambada.write_examples, asked),
            notes=[f"data taken for {'JSON lines' if self._options['format'] == 'jsonl' else 'plain text'}"],
        )


class PerplexityTask(Task):
    """Every token of some text, in sliding windows.

    Args:
        data: a file, a folder, or the prefix of a prepared data set.
        text_format: what it is; auto goes by names.
        stride: tokens by which windows advance; None is half of the context, for WikiText all of it.
        separator: text: a line equal to this ends a document; None makes every file one.
        text_key: JSON lines: the key of the text.
        limit: documents that are scored, from the first; None is all.
    """

    name = "perplexity"

    def __init__(
        self,
        data: str,
        text_format: TextFormat = "auto",
        *,
        stride: int | None = None,
        separator: str | None = None,
        text_key: str = "text",
        limit: int | None = None,
    ) -> None:
        self.data = data
        self._format, self._stride, self._separator, self._text_key = text_format, stride, separator, text_key
        self._limit = _checked_limit(limit)

    def ask(self, tokenizer: Tokenizer, context: int) -> Asked:
        texts = read_texts([self.data], tokenizer, self._format, separator=self._separator, text_key=self._text_key)
        documents = texts.documents[: self._limit]
        stride = perplexity.resolve_stride(self._stride, context, texts.text_format)
        windows = perplexity.make_windows(documents, tokenizer.eod, context, stride)
        return Asked(
            requests=windows,
            result=partial(perplexity.summarise, documents, windows),
            data=self.data,
            files=texts.files,
            notes=texts.kinds,
            options={
                "format": texts.text_format,
                "stride": stride,
                "separator": self._separator,
                "text_key": self._text_key,
                "limit": self._limit,
                "context": context,
            },
        )


def _checked_limit(limit: int | None) -> int | None:
    if limit is not None and limit < 1:
        raise ValueError(f"limit = {limit}: must be at least 1")
    return limit
