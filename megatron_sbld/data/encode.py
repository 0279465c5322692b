"""Documents to token ids, in several processes, in the order of the documents.

The result does not depend on the number of processes. Texts are held only for the batches under way. This module
imports neither torch nor Megatron, so that a worker process starts quickly.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import numpy as np

from megatron_sbld.data.tokenizer import Tokenizer, load_tokenizer

_BATCH_CHARACTERS = 1 << 20
_BATCHES_PER_WORKER = 3  # under way at once: enough that no worker waits, few enough to bound memory


@dataclass(frozen=True)
class EncodedDocument:
    """Ids of one document, ended by the end-of-document token, and the UTF-8 bytes of its text."""

    ids: np.ndarray
    text_bytes: int


_worker_tokenizer: Tokenizer | None = None  # a worker process loads its tokenizer once


def encode_documents(
    texts: Iterable[str], tokenizer: Tokenizer, dtype: type[np.integer], workers: int
) -> Generator[EncodedDocument, None, None]:
    """Encode `texts` one after the other; closing the generator ends the workers.

    Args:
        texts: the documents.
        tokenizer: one that `load_tokenizer(tokenizer.name)` gives, which is how workers get theirs.
        dtype: of the ids.
        workers: processes; 1 encodes in this one.

    Raises:
        ChildProcessError: a worker process was killed.
    """
    batches = _batches(texts)
    if workers == 1:
        for batch in batches:
            yield from _encode(batch, tokenizer, dtype)
        return
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=(tokenizer.name,)
    )
    try:
        yield from _encode_in_pool(batches, pool, dtype, workers * _BATCHES_PER_WORKER)
    except BrokenProcessPool as error:
        raise ChildProcessError(
            f"a worker process was killed, perhaps for memory; fewer than {workers} workers need less of it, and so "
            "does a smaller max_document_bytes where documents are long"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _encode_in_pool(
    batches: Iterable[list[str]], pool: ProcessPoolExecutor, dtype: type[np.integer], window: int
) -> Iterator[EncodedDocument]:
    pending: deque[Future[list[EncodedDocument]]] = deque()
    for batch in batches:
        pending.append(pool.submit(_encode_in_worker, batch, dtype))
        if len(pending) == window:
            yield from pending.popleft().result()
    while pending:
        yield from pending.popleft().result()


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _encode(batch: list[str], tokenizer: Tokenizer, dtype: type[np.integer]) -> list[EncodedDocument]:
    return [
        EncodedDocument(np.array([*tokenizer.encode(text), tokenizer.eod], dtype=dtype), len(text.encode("utf-8")))
        for text in batch
    ]


def _encode_in_worker(batch: list[str], dtype: type[np.integer]) -> list[EncodedDocument]:
    assert _worker_tokenizer is not None, "the worker was started without _start_worker"
    return _encode(batch, _worker_tokenizer, dtype)


def _start_worker(tokenizer_spec: str) -> None:
    global _worker_tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends its workers
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    _worker_tokenizer = load_tokenizer(tokenizer_spec)


def _exit_with_parent() -> None:
    """A worker of a parent that was killed would wait for work forever: it holds both ends of its own queue."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker has a parent"
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)
