"""The tasks as a run over checkpoints takes them: read once, encoded for each model, summed up from its scores.

What a task says of its data and options is what its rows of evaluations.jsonl are told apart by.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_sbld.evaluation import lambada, perplexity
from megatron_sbld.evaluation.passages import PassageFormat, read_passages
from megatron_sbld.evaluation.requests import Request, Score
from megatron_sbld.evaluation.results import Data, identify
from megatron_sbld.evaluation.texts import TextFormat, Texts, read_texts
from megatron_sbld.training.tokenizer import Tokenizer


class LambadaTask:
    """LAMBADA on a file of passages; arguments and errors are those of `read_passages`."""

    name = "lambada"

    def __init__(self, path: str, passage_format: PassageFormat = "auto", *, detokenise: bool | None = None) -> None:
        self._file = read_passages(path, passage_format, detokenise=detokenise)
        self._encoded: lambada.Lambada | None = None
        self.data: Data = identify([path], [path])
        self.options: dict[str, Any] = {
            "format": self._file.passage_format,
            "detokenise": self._file.detokenised,
        }

    def requests(self, tokenizer: Tokenizer, context: int) -> Sequence[Request]:
        """A request for each passage. Raises ValueError naming a last word that cannot be scored."""
        self._encoded = lambada.encode_passages(self._file.passages, tokenizer, context)
        return self._encoded.requests

    def result(self, scores: Sequence[Score]) -> lambada.LambadaResult:
        """Figures of the scores of the last `requests`."""
        return lambada.summarise(self._last(), scores)

    def write_examples(self, scores: Sequence[Score], file: Path) -> None:
        """Writes what became of every passage, one JSON line each."""
        lambada.write_examples(self._last(), scores, file)

    def _last(self) -> lambada.Lambada:
        assert self._encoded is not None, "requests() comes first"
        return self._encoded


class PerplexityTask:
    """Perplexity of texts; arguments and errors are those of `read_texts`, which reads them for the first model.

    Args:
        stride: see `perplexity.resolve_stride`, which looks at it for the first model.
    """

    name = "perplexity"

    def __init__(
        self,
        inputs: Sequence[str],
        text_format: TextFormat = "auto",
        *,
        stride: int | None = None,
        text_key: str = "text",
        separator: str | None = None,
    ) -> None:
        self._inputs, self._format, self._stride = list(inputs), text_format, stride
        self._text_key, self._separator = text_key, separator
        self._texts: Texts | None = None
        self._encoded_by: str | None = None
        self._windows: list[Request] = []
        self._data: Data | None = None
        self.options: dict[str, Any] = {}
        """Known when `requests` has been called, as data."""

    @property
    def data(self) -> Data:
        """What is evaluated on."""
        assert self._data is not None, "requests() comes first"
        return self._data

    def requests(self, tokenizer: Tokenizer, context: int) -> Sequence[Request]:
        """The windows of all documents. Raises ValueError naming a text that cannot be read, or the stride."""
        texts = self._read(tokenizer)
        stride = perplexity.resolve_stride(self._stride, context, texts.text_format)
        self._windows = perplexity.make_windows(texts.documents, tokenizer.eod, context, stride)
        self.options = {"format": texts.text_format, "stride": stride, "max_length": context}
        if self._separator is not None:
            self.options["separator"] = self._separator
        if self._text_key != "text":
            self.options["text_key"] = self._text_key
        return self._windows

    def result(self, scores: Sequence[Score]) -> perplexity.PerplexityResult:
        """Figures of the scores of the last `requests`."""
        assert self._texts is not None, "requests() comes first"
        return perplexity.summarise(self._texts.documents, self._windows, scores)

    def _read(self, tokenizer: Tokenizer) -> Texts:
        """Read and encoded anew only for another tokenizer."""
        fingerprint = tokenizer.fingerprint()
        if self._texts is None or self._encoded_by != fingerprint:
            self._texts = read_texts(
                self._inputs, tokenizer, self._format, text_key=self._text_key, separator=self._separator
            )
            self._encoded_by = fingerprint
            self._data = identify(self._inputs, self._texts.files)
        return self._texts
