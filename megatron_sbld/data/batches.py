"""Training data: megatron-core's GPTDataset over prepared files, checked before a run, read in Megatron's order.

The order of the samples is a function of the config alone; which of them a rank reads next is a function of the
samples consumed so far. So a resumed run, also on another number of replicas, goes on exactly where it stopped, and a
ramp of the batch size needs nothing more. megatron-core builds and caches the sample indices.
"""

from __future__ import annotations

import signal
import tempfile
from collections.abc import Iterator, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.utils import Split
from torch.utils.data import DataLoader, Dataset

from megatron_sbld.config.run_length import RunLength
from megatron_sbld.config.sections import Config
from megatron_sbld.data.blend import Blend, RunData
from megatron_sbld.data.tokenizer import Tokenizer
from megatron_sbld.ranks import on_rank_0

Batch = dict[str, torch.Tensor]
"""A microbatch: tokens, labels and position_ids int64 [b, s], loss_mask float32 [b, s], and with reset_attention_mask
attention_mask bool [b, 1, s, s], True where attention is forbidden."""

_BATCH_KEYS = ("tokens", "labels", "loss_mask", "position_ids", "attention_mask")
_CHECKED_TOKENS = 1 << 20  # of each end of a data set whose tokenizer is not on record


@dataclass(frozen=True)
class _DatasetTokenizer:
    """What GPTDataset asks of a tokenizer. It has no `pad`, so that no id of a real token is taken for padding."""

    eod: int
    vocab_size: int
    unique_identifiers: dict[str, Any]
    """Part of the name under which indices are cached. The sequence lengths are in it: Megatron's own name holds the
    path alone, and would take the indices of a set that was prepared anew for those of the new one."""


def build_datasets(
    config: Config, tokenizer: Tokenizer, data: RunData, *, train_samples: int, valid_samples: int, cache_path: str
) -> tuple[Dataset, Dataset | None]:
    """megatron-core's data sets for training and validation; called on all ranks, with torch.distributed initialised.

    Args:
        config: the run.
        tokenizer: of the data.
        data: of the run; it has passed `check_data`.
        train_samples: samples that the run reads; with its seed they fix the order, as in Megatron-LM.
        valid_samples: samples of one validation.
        cache_path: folder, shared by all ranks, for the sample indices, which rank 0 builds.

    Returns:
        The training and validation sets, at least that long; None without valid_data_path.
    """
    if not dist.is_initialized() or dist.get_rank() == 0:
        _remove_broken_indices(Path(cache_path))
    train = _build_split(config, tokenizer, data.train, Split.train, train_samples, cache_path)
    if not data.valid.datasets:
        return train, None
    return train, _build_split(config, tokenizer, data.valid, Split.valid, valid_samples, cache_path)


def _build_split(
    config: Config, tokenizer: Tokenizer, blend: Blend, split: Split, samples: int, cache_path: str
) -> Dataset:
    data = config.data
    identifiers = {
        "tokenizer": tokenizer.fingerprint(),
        "lengths": {dataset.prefix: dataset.lengths_crc32 for dataset in blend.datasets},
    }
    blends: list[Any] = [None] * len(Split)
    blends[split.value] = ([dataset.prefix for dataset in blend.datasets], blend.weights)
    sizes = [0] * len(Split)
    sizes[split.value] = samples
    dataset_config = GPTDatasetConfig(
        random_seed=config.training.seed,
        sequence_length=config.model.seq_length,
        blend_per_split=blends,
        path_to_cache=cache_path,
        tokenizer=_DatasetTokenizer(tokenizer.eod, tokenizer.vocab_size, identifiers),
        reset_position_ids=data.reset_position_ids,
        reset_attention_mask=data.reset_attention_mask,
        eod_mask_loss=data.eod_mask_loss,
        create_attention_mask=data.reset_attention_mask,
        # Megatron rounds each set's share up, so many sets and few samples draw more from one than 0.5 % allows for.
        mid_level_dataset_surplus=0.005 + 2 * len(blend.datasets) / samples,
    )
    try:
        return BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, dataset_config).build()[split.value]
    except Exception as error:
        if not isinstance(error.__cause__, OSError):
            raise
        raise OSError(_cache_refusal(cache_path, error.__cause__)) from error


def check_cache(cache: Path) -> None:
    """Find a cache that cannot be written while other ranks do not wait yet for what rank 0 builds in it.

    One that cannot be written but holds indices may hold all that are needed. Raises OSError naming the field.
    """
    try:
        cache.mkdir(parents=True, exist_ok=True)
        if not any(cache.glob("*.npy")):
            with tempfile.TemporaryFile(dir=cache):
                pass
    except OSError as error:
        raise OSError(_cache_refusal(str(cache), error)) from error


def _cache_refusal(cache_path: str, error: OSError) -> str:
    return f"data.data_cache_path = {cache_path!r} (default: data_cache in the run folder): {error.strerror}"


def _remove_broken_indices(cache: Path) -> None:
    """Delete indices that a killed run left half-written: Megatron would take them for whole and fail to read them."""
    for path in cache.glob("*.npy"):
        try:
            np.load(path, mmap_mode="r")
        except OSError:
            raise
        except Exception:  # NumPy parses a header as Python: a damaged one raises whatever Python's parser does
            path.unlink(missing_ok=True)


class PretrainingSampler:
    """Rows of a rank's microbatches, in the order of Megatron-LM's sampler of the same name.

    Microbatch m from `consumed_samples` on holds, on replica r, the `micro_batch_size` consecutive samples from
    consumed_samples + (m * replicas + r) * micro_batch_size. An incomplete last microbatch is left out.
    """

    def __init__(
        self, *, total_samples: int, consumed_samples: int, micro_batch_size: int, replica: int, replicas: int
    ) -> None:
        assert 0 <= replica < replicas, f"replica {replica} of {replicas}"
        step = micro_batch_size * replicas
        self._starts = range(
            consumed_samples + replica * micro_batch_size,
            total_samples - (replicas - replica) * micro_batch_size + 1,
            step,
        )
        self._micro_batch_size = micro_batch_size

    def __len__(self) -> int:
        return len(self._starts)

    def __iter__(self) -> Iterator[list[int]]:
        for start in self._starts:
            yield list(range(start, start + self._micro_batch_size))


def data_loader(dataset: Dataset, sampler: PretrainingSampler, num_workers: int) -> DataLoader[Batch]:
    """Microbatches of `sampler`'s rows, read ahead by `num_workers` processes; 0 reads in this one."""
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=num_workers,
        collate_fn=_collate,
        worker_init_fn=_leave_signals_to_the_trainer,
        persistent_workers=num_workers > 0,
        pin_memory=torch.cuda.is_available(),
        # A loader draws a seed whenever it starts. From the global generator that would change the dropout of all
        # later iterations, and a resumed run would no longer equal the uninterrupted one.
        generator=torch.Generator(),
    )


def _collate(samples: list[dict[str, torch.Tensor]]) -> Batch:
    return {key: torch.stack([sample[key] for sample in samples]) for key in _BATCH_KEYS if key in samples[0]}


def _leave_signals_to_the_trainer(worker: int) -> None:
    """Slurm's signals and Ctrl-C reach all processes; the trainer needs its workers to save in peace."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class TrainingData:
    """A run's microbatches on this rank; built on every rank once Megatron's parallel state is initialised.

    All ranks read: those of one replica (tensor, pipeline and context parallel) get the same microbatches.

    Args:
        config: the run.
        tokenizer: of the data.
        data: of the run; it has passed `check_data`.
        length: of the run.
        consumed_samples: samples that the run has trained on so far.
    """

    def __init__(
        self, config: Config, tokenizer: Tokenizer, data: RunData, length: RunLength, consumed_samples: int
    ) -> None:
        self._replica = parallel_state.get_data_parallel_rank()
        self._replicas = parallel_state.get_data_parallel_world_size()
        self._config = config
        self._tokenizer = tokenizer
        training = config.training
        self._cache_path = config.data.data_cache_path or str(Path(config.logging.run_dir) / "data_cache")
        on_rank_0(lambda: check_cache(Path(self._cache_path)))
        train, valid = build_datasets(
            config,
            tokenizer,
            data,
            train_samples=length.samples_to_read,
            valid_samples=training.eval_iters * training.global_batch_size,
            cache_path=self._cache_path,
        )
        self._train_set = train
        self.go_to(consumed_samples)
        self._valid = None if valid is None else self._loader(valid, 0)

    def go_to(self, consumed_samples: int) -> None:
        """Let `train_batches` go on after this many samples of the run."""
        self._train: Iterator[Batch] = iter(())  # ends the former's worker processes before there are new ones
        self._train = self._check(iter(self._loader(self._train_set, consumed_samples)), "data.train_data_path")

    def close(self) -> None:
        """End the worker processes, which ignore the SIGTERM with which Python would end them at its exit."""
        self._train = iter(())
        self._valid = None

    def train_batches(self, num_microbatches: int) -> Iterator[Batch]:
        """The next microbatches of the run. Each call goes on where the one before it has been read to.

        Raises:
            ValueError: a file is damaged in a way that only shows when it is read.
        """
        for _ in range(num_microbatches):
            batch = next(self._train, None)
            if batch is None:
                raise RuntimeError("the training data are used up; they were built for fewer samples than are now read")
            yield batch

    def valid_batches(self, num_microbatches: int) -> Iterator[Batch]:
        """Microbatches of the validation set from its beginning: every validation of a run sees the same samples.

        Raises:
            ValueError: the run has no validation set, or a damaged file.
        """
        if self._valid is None:
            raise ValueError("data.valid_data_path is empty: there is nothing to validate on")
        batches = self._check(iter(self._valid), "data.valid_data_path")
        for _ in range(num_microbatches):
            yield next(batches)

    def _check(self, batches: Iterator[Batch], field: str) -> Iterator[Batch]:
        return _checked(batches, field, self._tokenizer, self._cache_path)

    def _loader(self, dataset: Dataset, consumed_samples: int) -> DataLoader[Batch]:
        assert isinstance(dataset, Sized), "megatron-core's data sets have a length"
        sampler = PretrainingSampler(
            total_samples=len(dataset),
            consumed_samples=consumed_samples,
            micro_batch_size=self._config.training.micro_batch_size,
            replica=self._replica,
            replicas=self._replicas,
        )
        return data_loader(dataset, sampler, self._config.data.num_workers)


def _checked(batches: Iterator[Batch], field: str, tokenizer: Tokenizer, cache_path: str) -> Iterator[Batch]:
    """The batches, if they can be read and hold tokens that the model knows.

    On a GPU an unknown id would end in a device-side assertion that says nothing of the data. A function, not a method:
    a generator that refers to what holds it is not freed with it, and worker processes live as long as it.
    """
    vocab_size = tokenizer.vocab_size
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except (IndexError, ValueError) as error:
            raise ValueError(
                f"{field}: cannot be read ({str(error).splitlines()[-1]}); the data, or their indices in "
                f"{cache_path}, are damaged: delete that folder, and if it stays, prepare the data again"
            ) from error
        for extreme in (*batch["tokens"].aminmax(), *batch["labels"].aminmax()):
            if not 0 <= extreme < vocab_size:
                raise ValueError(
                    f"{field}: holds the id {int(extreme)}, but data.tokenizer = {tokenizer.name!r} has ids "
                    f"0 to {vocab_size - 1}: a .bin file is damaged; prepare it again"
                )
        yield batch
