"""Every field of the installed megatron-core's configs is in docs/compatibility_evidence.md, or listed as harmless."""

from __future__ import annotations

import dataclasses
import re

import pytest
from megatron.core import optimizer
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import optimizer_config
from megatron.core.package_info import __version__ as installed
from megatron.core.transformer import MLATransformerConfig, TransformerConfig
from megatron.core.transformer.heterogeneous.heterogeneous_config import HeterogeneousTransformerConfig

from megatron_sbld.mcore.skip.refusals import REASONS
from tests.mcore.known_fields import OF_FSDP, OF_NO_CONCERN
from tests.repository.test_feature_table import VERSIONS, table

CONFIGS = [
    TransformerConfig,
    MLATransformerConfig,
    HeterogeneousTransformerConfig,
    DistributedDataParallelConfig,
    optimizer.OptimizerConfig,
    *(
        getattr(optimizer_config, name)
        for name in ("AdamOptimizerConfig", "SGDOptimizerConfig")
        if hasattr(optimizer_config, name)  # of 0.16 and 0.17
    ),
]
FIELDS = {field.name for config in CONFIGS for field in dataclasses.fields(config)}
LISTED = [name for names in OF_NO_CONCERN.values() for name in names.split()]


def named(switch: str) -> set[str]:
    return set(re.findall(r"`(\w+)`", switch))


TABLE = {name for switch, *_ in table() for name in named(switch)}


def unknown(fields: set[str]) -> list[str]:
    return sorted(name for name in fields - TABLE - set(LISTED) if not name.startswith(OF_FSDP))


def test_no_field_of_the_installed_version_is_new() -> None:
    """A new one has to be read, and put into the table or into known_fields.py."""
    assert unknown(FIELDS) == []


def test_a_new_field_is_found() -> None:
    assert unknown({*FIELDS, "skips_layers_itself"}) == ["skips_layers_itself"]


def test_no_field_is_listed_twice() -> None:
    assert sorted(LISTED) == sorted(set(LISTED))
    assert TABLE & set(LISTED) == set()


def test_what_is_refused_is_not_of_no_concern() -> None:
    assert REASONS.keys() & set(LISTED) == set()
    assert REASONS.keys() <= TABLE


@pytest.mark.parametrize("row", table(), ids=lambda row: row[0][:60])
def test_the_column_of_the_installed_version_says_which_switches_it_has(row: tuple[str, ...]) -> None:
    column = next((index for index, version in enumerate(VERSIONS, 1) if installed.startswith(f"{version}.")), None)
    if column is None:
        pytest.skip(f"the table has no column for megatron-core {installed}")
    if row[column] == "-" and " = " not in row[0]:  # the value alone may be new
        assert named(row[0]) & FIELDS == set()
