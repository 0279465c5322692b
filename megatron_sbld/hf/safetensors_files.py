"""Tensors in folders as transformers lays them out: one file, or shards with an index of which tensor is where."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
INDEX = "model.safetensors.index.json"


def parse_size(name: str, text: str) -> int:
    """Bytes of a size such as 5GB, 500MB or 2GiB. Raises ValueError naming the option.

    >>> parse_size("--max_shard_size", "5GB")
    5000000000
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]i?B)\s*", text, re.IGNORECASE)
    size = int(float(match[1]) * _UNITS[match[2].upper()]) if match else 0
    if size < 1:
        raise ValueError(f"{name} = {text!r}: must be a size such as 5GB, 500MB or 2GiB")
    return size


class ShardWriter:
    """Writes tensors in the order in which they come, holding one shard of them in memory.

    Args:
        folder: to write to.
        max_bytes: size of a shard; a larger tensor is a shard of its own.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._shards: list[list[str]] = []
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self.total_bytes = 0
        """Of all tensors so far."""

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take a tensor, which must not change any more."""
        if self._pending and self._pending_bytes + tensor.nbytes > self._max_bytes:
            self._flush()
        self._pending[name] = tensor.contiguous()
        self._pending_bytes += tensor.nbytes
        self.total_bytes += tensor.nbytes

    def close(self) -> list[str]:
        """Write what is left, and with several shards the index; the names of the files with tensors."""
        self._flush()
        if len(self._shards) == 1:
            self._unnamed(0).rename(self._folder / "model.safetensors")
            return ["model.safetensors"]
        names, where = [], {}
        for number, tensors in enumerate(self._shards):
            names.append(f"model-{number + 1:05d}-of-{len(self._shards):05d}.safetensors")
            self._unnamed(number).rename(self._folder / names[-1])
            where.update(dict.fromkeys(tensors, names[-1]))
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": where}
        (self._folder / INDEX).write_text(json.dumps(index, indent=2))
        return names

    def _flush(self) -> None:
        file = self._unnamed(len(self._shards))
        file.touch()
        mode = file.stat().st_mode
        save_file(self._pending, file, metadata={"format": "pt"})
        file.chmod(mode)  # the library's files are for their owner alone
        self._shards.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0

    def _unnamed(self, number: int) -> Path:
        """A shard's file while their number is not known."""
        return self._folder / f"shard-{number}.tmp"


class TensorFolder:
    """The tensors of a folder, read one by one: safetensors, or torch's own files without their code.

    Raises:
        ValueError: there are none, or a file is missing or damaged; names it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: dict[str, Any] = {}
        self._where: dict[str, str] = {}
        self._where = self._find()

    def names(self) -> list[str]:
        """Of all tensors."""
        return list(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor, without reading it."""
        with self._errors(name):
            file = self._file(name)
            return tuple(file[name].shape if isinstance(file, dict) else file.get_slice(name).get_shape())

    def read(self, name: str) -> torch.Tensor:
        """A tensor."""
        with self._errors(name):
            file = self._file(name)
            tensor: torch.Tensor = file[name] if isinstance(file, dict) else file.get_tensor(name)
            return tensor

    def _find(self) -> dict[str, str]:
        """The file of each tensor."""
        for single, index in (("model.safetensors", INDEX), ("pytorch_model.bin", "pytorch_model.bin.index.json")):
            if (self._folder / index).is_file():
                try:
                    where = json.loads((self._folder / index).read_text())["weight_map"]
                    return {str(name): str(file) for name, file in where.items()}
                except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                    raise ValueError(f"{self._folder / index}: cannot be read: {error!r}") from error
            if (self._folder / single).is_file():
                with self._errors(single):
                    return dict.fromkeys(self._open_file(single).keys(), single)
        raise ValueError(
            f"{self._folder}: has no weights; looked for model.safetensors, {INDEX}, pytorch_model.bin, "
            "pytorch_model.bin.index.json"
        )

    def _file(self, name: str) -> Any:
        file = self._where[name]
        if file not in self._open:
            self._open[file] = self._open_file(file)
        return self._open[file]

    def _open_file(self, file: str) -> Any:
        path = self._folder / file
        if path.parent != self._folder or not path.is_file():
            raise FileNotFoundError("no such file in the folder")
        if file.endswith(".safetensors"):
            return safe_open(path, framework="pt")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)

    @contextmanager
    def _errors(self, name: str) -> Iterator[None]:
        file = self._where.get(name, name)
        what = "" if file == name else f"{name} "
        try:
            yield
        except (SafetensorError, OSError, RuntimeError, KeyError, ValueError, EOFError) as error:
            text = str(error).split("\n", maxsplit=1)[0]
            raise ValueError(f"{self._folder / file}: {what}cannot be read: {text}") from error
        except Exception as error:
            if type(error).__name__ != "UnpicklingError":
                raise
            raise ValueError(
                f"{self._folder / file}: is damaged, or holds more than tensors, which is not loaded because it could "
                "run code; convert it to safetensors"
            ) from error
