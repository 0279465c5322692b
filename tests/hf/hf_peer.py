"""What the tests ask of transformers, in a process of its own.

Of its own, because the stand-ins that let megatron-core run on a CPU replace functions of torch, and transformers 5
then leaves rotary frequencies uninitialised without a word.

    with peer() as ask:
        logits = ask(hf_peer.logits, folder, ids)
"""

from __future__ import annotations

import functools
import importlib.util
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

MISSING = "transformers is not installed (extra `test`)"


@contextmanager
def peer() -> Iterator[Callable[..., Any]]:
    """A process for functions of this module; yields what calls one there and waits for its answer."""
    if importlib.util.find_spec("transformers") is None:
        pytest.skip(MISSING)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=_start) as pool:
        yield lambda function, *args, **fields: pool.submit(function, *args, **fields).result(timeout=300)


def _start() -> None:
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")


def logits(folder: str, ids: list[list[int]], fp32: bool = False) -> Any:
    """[b, s, vocabulary] of the model in a folder, as transformers' Auto classes load it; fp32: computed in that."""
    import torch
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    model = model.eval().float() if fp32 else model.eval()
    with torch.no_grad():
        return model(torch.tensor(ids)).logits.numpy()


def make(folder: str, architecture: str, ids: list[list[int]], save: dict[str, Any], **fields: Any) -> Any:
    """Save a model of random weights, norms and biases included; returns its logits."""
    import torch
    import transformers

    torch.manual_seed(1)
    kind: Any = getattr(transformers, architecture)
    model = kind(kind.config_class(**fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
        model.to(save.pop("dtype", torch.float32))
        model.save_pretrained(folder, **save)
        return model(torch.tensor(ids)).logits.float().numpy()


def fields_of(folder: str) -> dict[str, Any]:
    """The config as transformers understands it."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder).to_dict()


def encode(folder: str, texts: Sequence[str]) -> list[list[int]]:
    """Ids of each text by AutoTokenizer, with all that it adds by itself."""
    return [list(_tokenizer(folder)(text)["input_ids"]) for text in texts]


def decode(folder: str, ids: list[int]) -> str:
    """Text of ids without special tokens."""
    return _tokenizer(folder).decode(ids, skip_special_tokens=True)


def about_tokenizer(folder: str) -> dict[str, Any]:
    """What else AutoTokenizer says."""
    tokenizer = _tokenizer(folder)
    return {"length": len(tokenizer), "eos": tokenizer.eos_token_id, "bos": tokenizer.bos_token_id}


@functools.cache
def _tokenizer(folder: str) -> Any:
    from transformers import AutoTokenizer

    assert (Path(folder) / "tokenizer_config.json").is_file()
    return AutoTokenizer.from_pretrained(folder)
