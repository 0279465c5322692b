"""What `megatron-sbld sensitivity measure` has measured, as files, and the sensitivity that follows (docs/method.md 3).

    DIR/profile.json              what was asked for: settings, and what the figures are measured with
    DIR/seed-1234/baseline.json   the values of a finished run: losses by iteration (or by batch), or influences
    DIR/seed-1234/layer-03.json   the same without layer 3
    DIR/sensitivity.json          what follows, once every layer is there

A run is written as a whole when it is finished. Settings decide what runs measure, so a folder holds runs of one set of
settings, and every file carries their fingerprint. Knows nothing of how runs are made.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from megatron_sbld.sensitivity.early_stop import interpolated_gap
from megatron_sbld.sensitivity.file import SensitivityFile, write_json
from megatron_sbld.sensitivity.stats import Estimate, combine_seeds, mean_of_batches, mean_of_series

FORMAT = "megatron-sbld-profile-1"
Method = Literal["train", "leave_one_out", "block_influence"]
NOTES: dict[str, str] = {
    "train": "gap: loss of training without the layer minus the baseline's (docs/method.md 3)",
    "leave_one_out": (
        "gap: loss at evaluation without the layer minus with it. A model that was trained with a layer nearly always "
        "misses it, so few layers or none reach the Allow list"
    ),
    "block_influence": (
        "gap: 1 - mean cosine similarity of the layer's input and output, no difference of losses and never negative. "
        "The Allow rule leaves out layers with a significantly positive gap, here all of them: the Allow list stays "
        "empty unless drop.allow_layers names its layers"
    ),
}


@dataclass(frozen=True, kw_only=True)
class LayerRun:
    """A finished run: the baseline's or a layer's."""

    values: list[float]
    """Losses by iteration (train) or batch (leave_one_out), influences by batch (block_influence)."""
    cost_iterations: float
    """Training iterations that it took; a forward pass counts as a third."""
    seconds: float
    neighbours: list[int] | None = None
    """Of a run that ended early: the layers of the next lower and the next higher gap."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a folder is to hold."""

    settings: dict[str, Any]
    """All that the values depend on but for the seed, as `section.field`: value."""
    num_layers: int
    method: Method
    seeds: list[int]
    window: int
    """Values at the end that a gap is averaged over."""
    block_fraction: float
    allow_fraction: float
    about: dict[str, Any]
    """For measured_with: command, model, data, hardware, ..."""


class MeasurementFolder:
    """The folder of a measurement."""

    def __init__(self, path: Path, request: Request) -> None:
        self.path = path
        self.request = request
        self._fingerprint = _fingerprint(request.settings)

    @classmethod
    def open(cls, path: Path, request: Request) -> MeasurementFolder:
        """Create the folder, or continue it. Raises ValueError if it holds runs of other settings, by field."""
        request = Request(**json.loads(json.dumps(dataclasses.asdict(request))))
        if (path / "profile.json").exists():
            differences = _differences(cls.read(path).request.settings, request.settings)
            if differences:
                raise ValueError(
                    f"{path} holds runs with other settings; give another --out, or use the same settings:"
                    + "".join(f"\n  {name}: {then!r} there, {now!r} now" for name, then, now in differences)
                )
        path.mkdir(parents=True, exist_ok=True)
        write_json(path / "profile.json", {"format": FORMAT, **dataclasses.asdict(request)})
        return cls(path, request)

    @classmethod
    def read(cls, path: Path) -> MeasurementFolder:
        """The folder of an earlier measurement. Raises ValueError if it is none."""
        content = _read(path / "profile.json")
        if content.pop("format", None) != FORMAT:
            raise ValueError(f"{path / 'profile.json'} does not begin with format {FORMAT!r}")
        try:
            request = Request(**content)
        except TypeError as error:
            raise ValueError(f"{path / 'profile.json'} is damaged: {error}") from error
        if request.method not in get_args(Method):
            raise ValueError(f"{path / 'profile.json'} is damaged: method is {request.method!r}")
        return cls(path, request)

    def run(self, seed: int, layer: int | None) -> LayerRun | None:
        """A finished run, None if there is none; `layer` None is the baseline."""
        file = self._file(seed, layer)
        if not file.exists():
            return None
        content = _read(file)
        if content.pop("fingerprint", None) != self._fingerprint:
            raise ValueError(f"{file} was measured with other settings than those in {self.path / 'profile.json'}")
        try:
            return LayerRun(**content)
        except TypeError as error:
            raise ValueError(f"{file} is damaged: {error}") from error

    def add(self, seed: int, layer: int | None, run: LayerRun) -> None:
        """Store a finished run; the file appears as a whole."""
        file = self._file(seed, layer)
        file.parent.mkdir(exist_ok=True)
        write_json(file, {"fingerprint": self._fingerprint, **dataclasses.asdict(run)})

    def layers(self) -> list[int]:
        """Layers that are measured with every seed, ascending."""
        numbers = range(1, self.request.num_layers + 1)
        return [n for n in numbers if all(self._file(seed, n).exists() for seed in self.request.seeds)]

    def gap(self, seed: int, layer: int) -> Estimate:
        """The gap of one layer with one seed."""
        window, method = self.request.window, self.request.method
        run, baseline = self._finished(seed, layer), self._finished(seed, None)
        if method == "block_influence":
            return mean_of_batches(run.values)
        if run.neighbours is not None:
            lower, higher = (self._finished(seed, neighbour).values for neighbour in run.neighbours)
            return interpolated_gap(run.values, baseline.values, lower, higher, window)
        if len(run.values) != len(baseline.values):
            raise ValueError(f"{self._file(seed, layer)} is damaged: it has another length than the baseline's")
        differences = [without - with_all for without, with_all in zip(run.values, baseline.values, strict=True)]
        return mean_of_batches(differences) if method == "leave_one_out" else mean_of_series(differences[-window:])

    def all_runs(self) -> list[LayerRun]:
        """Every finished run of the seeds: baselines and layers."""
        numbers = [None, *range(1, self.request.num_layers + 1)]
        found = [self.run(seed, number) for seed in self.request.seeds for number in numbers]
        return [run for run in found if run is not None]

    def _finished(self, seed: int, layer: int | None) -> LayerRun:
        run = self.run(seed, layer)
        if run is None:
            raise ValueError(f"{self._file(seed, layer)} is missing")
        return run

    def _file(self, seed: int, layer: int | None) -> Path:
        name = "baseline" if layer is None else f"layer-{layer:02d}"
        return self.path / f"seed-{seed}" / f"{name}.json"


def sensitivity_of(folders: Sequence[MeasurementFolder]) -> SensitivityFile:
    """The sensitivity that the folders hold between them, each layer against its own folder's baseline.

    Raises:
        ValueError: they differ in a setting, a layer is in two of them or in none, or a file is damaged.
    """
    first = folders[0].request
    for other in folders[1:]:
        _check_alike(folders[0], other)
    owner: dict[int, MeasurementFolder] = {}
    for folder in folders:
        for layer in folder.layers():
            if layer in owner:
                raise ValueError(f"layer {layer} is in {owner[layer].path} and in {folder.path}: leave one out")
            owner[layer] = folder
    missing = [layer for layer in range(1, first.num_layers + 1) if layer not in owner]
    if missing:
        raise ValueError(f"layers {missing} of {first.num_layers} are not measured (with every seed of {first.seeds})")
    by_seed = {
        seed: [owner[layer].gap(seed, layer) for layer in range(1, first.num_layers + 1)] for seed in first.seeds
    }
    combined = [combine_seeds(list(estimates)) for estimates in zip(*by_seed.values(), strict=True)]
    return SensitivityFile.from_gaps(
        [estimate.mean for estimate in combined],
        [estimate.stderr for estimate in combined],
        {**_measured_with(folders), "gaps_by_seed": {str(seed): [e.mean for e in by_seed[seed]] for seed in by_seed}},
        first.block_fraction,
        first.allow_fraction,
    )


def _check_alike(first: MeasurementFolder, other: MeasurementFolder) -> None:
    """Refuse parts that cannot be joined, by field."""
    ours, theirs = (
        {**folder.request.settings, "seeds": folder.request.seeds, "window": folder.request.window}
        for folder in (first, other)
    )
    differences = _differences(ours, theirs)
    if differences:
        raise ValueError(
            f"{first.path} and {other.path} were measured with different settings:"
            + "".join(f"\n  {name}: {a!r} and {b!r}" for name, a, b in differences)
        )


def _measured_with(folders: Sequence[MeasurementFolder]) -> dict[str, Any]:
    request, runs = folders[0].request, [folder.all_runs() for folder in folders]
    everything = [run for part in runs for run in part]
    result: dict[str, Any] = {
        "method": request.method,
        "note": NOTES[request.method],
        **request.about,
        "window": request.window,
        "seeds": request.seeds,
        "cost_iterations": round(sum(run.cost_iterations for run in everything), 1),
        "seconds": round(sum(run.seconds for run in everything), 1),
    }
    if request.method != "train":
        del result["window"]
    stopped = sum(run.neighbours is not None for run in everything)
    if stopped:
        result["runs_stopped_early"] = stopped
    if len(folders) > 1:
        keys = ("command", "commit", "hardware", "date")
        result["parts"] = [
            {"layers": folder.layers(), **{key: folder.request.about.get(key) for key in keys}} for folder in folders
        ]
    return result


def _differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    names: Iterable[str] = dict.fromkeys([*ours, *theirs])
    return [(name, ours.get(name), theirs.get(name)) for name in names if ours.get(name) != theirs.get(name)]


def _fingerprint(settings: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"{path}, which `megatron-sbld sensitivity measure` writes, cannot be read: {error.strerror}"
        ) from error
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it holds no object")
    return content
