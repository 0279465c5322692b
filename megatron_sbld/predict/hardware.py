"""GPUs and the links between them: peaks from the vendor's data sheets, and which of them a group of ranks shares.

Sources: NVIDIA's data sheets of A100 80GB SXM, H100 SXM and H200 SXM (dense bf16, where the sheets give Hopper's with
sparsity, twice as much; NVLink in one direction, where the sheets give the sum of both); the network is that of a DGX
A100 (one ConnectX-6 of 200 Gbit/s a GPU) and of a DGX H100 and H200 (one ConnectX-7 of 400 Gbit/s a GPU). The
efficiencies are assumptions: what copies and collectives commonly reach of a peak.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_sbld.fields import Count, Positive, PositiveShare, check_fields
from megatron_sbld.files.strict_yaml import load_yaml


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """A cluster of equal nodes with equal GPUs. GB are 10^9 bytes, bandwidths in one direction."""

    name: str
    peak_tflops: Positive
    """Dense matrix products in the training precision, TFLOP/s."""
    memory_gb: Positive
    """Memory of a GPU."""
    hbm_bandwidth: Positive
    """GB/s of a GPU's memory."""
    intra_bandwidth: Positive
    """GB/s of a GPU to the others of its node."""
    inter_bandwidth: Positive
    """GB/s of a GPU to other nodes: a node's network divided by its GPUs."""
    gpus_per_node: Count = 8
    hbm_efficiency: PositiveShare = 0.8
    """Share of hbm_bandwidth that elementwise operations and the optimizer reach (an assumption)."""
    link_efficiency: PositiveShare = 0.8
    """Share of the links' bandwidths that collectives reach (an assumption)."""

    def __post_init__(self) -> None:
        check_fields(self, "hardware: ")

    @property
    def peak(self) -> float:
        """FLOP/s."""
        return self.peak_tflops * 1e12

    @property
    def memory_rate(self) -> float:
        """Bytes/s that elementwise operations move."""
        return self.hbm_bandwidth * 1e9 * self.hbm_efficiency

    def group_rate(self, size: int, stride: int, gpus: int) -> float:
        """Bytes/s and rank of a ring over `size` ranks that are `stride` apart, all such groups of the GPUs at work.

        Within a node it is the node's links. Over several, a ring enters and leaves each node once, and as many rings
        as the group has ranks on a node share the group's part of the network. The slowest group decides: that with the
        fewest ranks on one of its nodes.
        """
        on_a_node = _fewest_on_a_node(size, stride, gpus, self.gpus_per_node)
        if on_a_node == size:
            bandwidth = self.intra_bandwidth
        else:
            bandwidth = on_a_node * self.inter_bandwidth
            if on_a_node > 1:
                bandwidth = min(bandwidth, self.intra_bandwidth)
        return bandwidth * 1e9 * self.link_efficiency

    def link_rate(self, size: int, stride: int) -> float:
        """Bytes/s between neighbours of such a group of all GPUs: of the slowest pair, which decides in a pipeline."""
        within = size * stride <= self.gpus_per_node
        return (self.intra_bandwidth if within else self.inter_bandwidth) * 1e9 * self.link_efficiency


@functools.lru_cache
def _fewest_on_a_node(size: int, stride: int, gpus: int, gpus_per_node: int) -> int:
    """Of any group and any node that it has ranks on, how many; `size` where every group lies within one node.

    Groups are Megatron's: each block of size * stride ranks holds `stride` of them.
    """
    fewest = size
    for block in range(0, gpus, size * stride):
        for first in range(block, block + stride):
            ranks = range(first, first + size * stride, stride)
            fewest = min(fewest, *Counter(rank // gpus_per_node for rank in ranks).values())
    return fewest


_H100 = Hardware(
    name="H100 SXM",
    peak_tflops=989.4,
    memory_gb=80.0,
    hbm_bandwidth=3350.0,
    intra_bandwidth=450.0,
    inter_bandwidth=50.0,
)
KNOWN = {
    "a100-80gb": Hardware(
        name="A100-80GB SXM",
        peak_tflops=312.0,
        memory_gb=80.0,
        hbm_bandwidth=2039.0,
        intra_bandwidth=300.0,
        inter_bandwidth=25.0,
    ),
    "h100": _H100,
    "h200": dataclasses.replace(_H100, name="H200 SXM", memory_gb=141.0, hbm_bandwidth=4800.0),
}


def load_hardware(spec: str, **changes: Any) -> Hardware:
    """The hardware of that name, or of a YAML file with Hardware's fields; changes: fields that replace its own.

    Raises ValueError for an unknown name, a file that cannot be used, or a value that is not allowed.
    """
    changes = {field: value for field, value in changes.items() if value is not None}
    if spec in KNOWN:
        return dataclasses.replace(KNOWN[spec], **changes)
    if not spec.endswith((".yaml", ".yml")):
        raise ValueError(f"--hardware {spec} is not allowed: it must be {', '.join(KNOWN)} or a .yaml file")
    try:
        values = load_yaml(Path(spec).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"--hardware {spec}: cannot be read: {error}") from error
    except ValueError as error:
        raise ValueError(f"--hardware {spec}: {error}") from error
    fields = dataclasses.fields(Hardware)
    if not isinstance(values, dict):
        raise ValueError(f"--hardware {spec}: must be a mapping of {', '.join(field.name for field in fields)}")
    values = {"name": Path(spec).stem, **values, **changes}
    unknown = sorted(set(map(str, values)) - {field.name for field in fields})
    missing = [field.name for field in fields if field.default is dataclasses.MISSING and field.name not in values]
    if unknown:
        raise ValueError(
            f"--hardware {spec}: unknown field {unknown[0]}; allowed are {', '.join(field.name for field in fields)}"
        )
    if missing:
        raise ValueError(f"--hardware {spec}: {missing[0]} is missing; needed are all but the efficiencies and name")
    if not isinstance(values["name"], str):
        raise ValueError(f"--hardware {spec}: name = {values['name']!r} is not allowed: it must be a text")
    return Hardware(**values)
