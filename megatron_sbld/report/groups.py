"""Which runs repeat one experiment with other seeds, and what such a group is called.

Two runs belong together if their resolved configs are equal but for training.seed, drop.seed, data.data_cache_path and
the logging section (where a run is written and what is shown of it). drop.sensitivity may differ as well, but only if
every seed is there once and has a file of its own: then a file was measured for each seed. Otherwise the files are what
is compared, and each makes a group.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_sbld.config.sections import Config, LoggingConfig
from megatron_sbld.report.runs import RunData, shortest_ends

_SEPARATORS = re.compile(r"([-_=.,+]+)")
_NUMBERED = re.compile(r"(.*?)\d+")
_SEED_WORDS = ("", "s", "seed", "seeds")  # a seed in a folder's name stands alone or follows one of these
_SEED_NAME = re.compile(r"(seeds?|s)?[-_=.,+]?\d+", re.IGNORECASE)
_SEED_IN_NAME = re.compile(r"(^|[-_=.,+])seed[-_=]?\d+(?=$|[-_=.,+])", re.IGNORECASE)


@dataclass(frozen=True)
class RunGroup:
    """Runs of one config with different seeds, in the order given; never empty."""

    label: str
    """Name of the group in tables and plots: as much of what its paths have in common as tells it from the others."""
    runs: list[RunData]

    @property
    def config(self) -> Config:
        """The config of the first run; the others' differ in what grouping ignores."""
        return self.runs[0].config

    @property
    def policy(self) -> str:
        """Name of the drop policy."""
        return self.runs[0].policy

    @property
    def validated(self) -> list[RunData]:
        """The runs that have a validation."""
        return [run for run in self.runs if run.valid]


def group_runs(runs: Sequence[RunData], group: bool = True) -> list[RunGroup]:
    """Groups runs that differ only in their seeds, in the order of each group's first run.

    group: False makes a group of every run.
    """
    if not group:
        return [RunGroup(label=run.label, runs=[run]) for run in runs]
    members = []
    for alike in _classes(runs, _experiment):
        members += (
            [alike] if _has_one_sensitivity_a_seed(alike) else _classes(alike, lambda run: run.config.drop.sensitivity)
        )
    members.sort(key=lambda group: runs.index(group[0]))
    return [RunGroup(label, group) for label, group in zip(_labels(members), members, strict=True)]


def _classes(runs: Sequence[RunData], key: Callable[[RunData], object]) -> list[list[RunData]]:
    """Runs by equal keys, which need not be hashable."""
    classes: list[tuple[object, list[RunData]]] = []
    for run in runs:
        value = key(run)
        found = next((members for other, members in classes if other == value), None)
        if found is None:
            classes.append((value, [run]))
        else:
            found.append(run)
    return [members for _, members in classes]


def _experiment(run: RunData) -> Config:
    """The config without what may differ within a group."""
    config = run.config
    return dataclasses.replace(
        config,
        training=dataclasses.replace(config.training, seed=0),
        drop=dataclasses.replace(config.drop, seed=0, sensitivity=None),
        data=dataclasses.replace(config.data, data_cache_path=None),
        logging=LoggingConfig(),
    )


def _has_one_sensitivity_a_seed(runs: Sequence[RunData]) -> bool:
    seeds = {run.seed for run in runs}
    files = {run.config.drop.sensitivity for run in runs}
    return len(files) == 1 or len(files) == len(seeds) == len(runs)


def _labels(groups: Sequence[list[RunData]]) -> list[str]:
    """Labels that differ: the runs' own where no group has several, else what a group's paths have in common.

    A group whose runs' names have nothing in common, or the same as another group's, is called after its first run.
    """
    by_first_run = [
        group[0].label if len(group) == 1 else f"{group[0].label} and {len(group) - 1} more" for group in groups
    ]
    if all(len(group) == 1 for group in groups):
        return by_first_run
    parts = [_common_parts([run.path.parts for run in group]) for group in groups]
    named = [number for number, of_group in enumerate(parts) if of_group and parts.count(of_group) == 1]
    labels = list(by_first_run)
    for number, label in zip(named, shortest_ends([parts[number] for number in named]), strict=True):
        labels[number] = label
    return labels if len(set(labels)) == len(labels) else by_first_run


def _common_parts(paths: Sequence[Sequence[str]]) -> list[str]:
    """What folders have in common, from the end: out/pld/seed-1 and out/pld/seed-2, or out/pld-1 and -2: out/pld.

    Empty if their names have nothing in common. One path loses what its names call a seed.
    """
    parts: list[str] = []
    for names in zip(*(reversed(path) for path in paths), strict=False):
        common = _common_name(names)
        if not common and not parts and not all(_SEED_NAME.fullmatch(name) for name in names):
            return []
        if common:
            parts.insert(0, common)
    return parts


def _common_name(names: Sequence[str]) -> str:
    """Words that `names` have in common, without those that count seeds; empty if there is none."""
    if len(names) == 1:
        return _SEED_IN_NAME.sub("", names[0]).lstrip("-_=.,+")
    if len(set(names)) == 1:
        return names[0]
    common, separator = "", ""
    for position, words in enumerate(zip(*(_SEPARATORS.split(name) for name in names), strict=False)):
        if position % 2:  # the pattern's group: what stands between words
            separator = words[0]
            continue
        word = _common_word(words)
        if word:
            common += separator + word if common else word
    return common


def _common_word(words: Sequence[str]) -> str:
    """A word that is the same, or what stands before its number; empty if it is another or names a seed."""
    numbered = [_NUMBERED.fullmatch(word) for word in words]
    stems = set(words) if len(set(words)) == 1 else {match[1] if match else None for match in numbered}
    stem = stems.pop() if len(stems) == 1 else None
    return "" if stem is None or stem.lower() in _SEED_WORDS else stem
