"""Which data sets a run reads, in which shares, and what is wrong with them; found before a run starts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from megatron.core.datasets.utils import get_blend_from_list

from megatron_sbld.config.sections import Config
from megatron_sbld.data.dataset_files import DatasetFacts, check_written_with, read_metadata, verify_dataset
from megatron_sbld.data.tokenizer import Tokenizer

_CHECKED_TOKENS = 1 << 20  # of each end of a data set whose tokenizer is not on record


@dataclass(frozen=True)
class Blend:
    """Data sets, and the share of the samples that comes from each."""

    datasets: list[DatasetFacts]
    weights: list[float]

    @property
    def facts(self) -> list[list[float]]:
        """What tells these data from others, whatever their paths: each set's tokens, lengths and weight."""
        return [
            [dataset.tokens, dataset.lengths_crc32, weight]
            for dataset, weight in zip(self.datasets, self.weights, strict=True)
        ]


@dataclass(frozen=True)
class RunData:
    """What a run trains and validates on. Found once, because it reads every index."""

    train: Blend
    valid: Blend
    """Without data sets where there is no validation."""


def find_data(config: Config) -> RunData:
    """The data of a run, not yet held against its tokenizer. Raises ValueError as `parse_blend` does."""
    data = config.data
    return RunData(
        parse_blend(data.train_data_path, "data.train_data_path"),
        parse_blend(data.valid_data_path, "data.valid_data_path"),
    )


def parse_blend(paths: Sequence[str], field: str) -> Blend:
    """The blend that `train_data_path` or `valid_data_path` describes.

    Args:
        paths: prefixes, or weight and prefix in turn, as Megatron's --data-path. Without weights each data set counts
            by its tokens; all are repeated as often as the run needs.
        field: named in errors.

    Raises:
        ValueError: malformed weights, or files that are missing, damaged or named twice.
    """
    are_weights = [_is_number(path) for path in paths]
    weights: list[float] | None = None
    prefixes = list(paths)
    if any(are_weights):
        if are_weights != [True, False] * (len(paths) // 2):
            raise ValueError(
                f"{field} = {list(paths)}: give a weight before every prefix, or none at all (write a prefix that "
                "looks like a number with its folder, as ./1)"
            )
        prefixes, weights = get_blend_from_list(list(paths))
        bad = [weight for weight in weights or [] if not (math.isfinite(weight) and weight > 0)]
        if bad:
            raise ValueError(f"{field}: weight {bad[0]} is not a positive number")
    repeated = {prefix for prefix in prefixes if prefixes.count(prefix) > 1}
    if repeated:
        raise ValueError(f"{field}: {sorted(repeated)[0]!r} is named more than once; change its weight instead")
    try:
        datasets = [verify_dataset(prefix) for prefix in prefixes]
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from error
    return Blend(datasets, weights or [float(dataset.tokens) for dataset in datasets])


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def check_data(config: Config, tokenizer: Tokenizer) -> RunData:
    """The data of a run, found in order before it starts; needs no torch.distributed and reads few tokens.

    Raises:
        ValueError: malformed weights; files that are missing or damaged, too short for one sample, prepared with
            another tokenizer, or (looked for in the first and last million tokens where no metadata says which
            tokenizer it was) with ids beyond the vocabulary.
    """
    data = find_data(config)
    for field, blend in (("data.train_data_path", data.train), ("data.valid_data_path", data.valid)):
        for dataset in blend.datasets:
            needed = config.model.seq_length + 1
            if dataset.tokens < needed:
                raise ValueError(
                    f"{field}: {dataset.prefix} has {dataset.tokens} tokens; a sample of model.seq_length = "
                    f"{config.model.seq_length} needs {needed}"
                )
            _check_tokenizer(dataset, tokenizer, field)
    return data


def _check_tokenizer(dataset: DatasetFacts, tokenizer: Tokenizer, field: str) -> None:
    metadata = read_metadata(dataset.prefix)
    if metadata is None:
        _check_ids(dataset, tokenizer, field)
        return
    check_written_with(metadata, dataset.prefix, tokenizer, field=field, whose="data.tokenizer =")
    try:
        tokens = metadata["splits"][dataset.prefix.rpartition("_")[2]]["tokens"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{field}: the metadata (.json) of {dataset.prefix} lack {error}; prepare it again") from error
    if tokens != dataset.tokens:
        raise ValueError(
            f"{field}: {dataset.prefix} has {dataset.tokens} tokens, its metadata (.json) {tokens}: "
            "they belong to different data sets; prepare it again"
        )


def _check_ids(dataset: DatasetFacts, tokenizer: Tokenizer, field: str) -> None:
    ids = np.memmap(f"{dataset.prefix}.bin", dataset.dtype, "r")
    for part in (ids[:_CHECKED_TOKENS], ids[-_CHECKED_TOKENS:]):
        for extreme in (int(part.min()), int(part.max())):
            if not 0 <= extreme < tokenizer.vocab_size:
                raise ValueError(
                    f"{field}: {dataset.prefix} holds the id {extreme}, but data.tokenizer = {tokenizer.name!r} has "
                    f"ids 0 to {tokenizer.vocab_size - 1}"
                )
