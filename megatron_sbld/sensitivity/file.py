"""The sensitivity file: measured gaps of every layer and what follows from them, as JSON (equations.md 2 and 3).

Keys: format, num_layers, gap (loss without the layer minus the baseline's), gap_stderr, sensitivity (the gaps scaled to
[0, 1]), block and allow (the lists that the rule picked), measured_with (free: command, commit, model, data, ...).
Knows nothing of how gaps are measured.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_sbld.checks import check_integer, check_layers, check_number
from megatron_sbld.sensitivity.lists import choose_lists
from megatron_sbld.strict_json import load_json

FORMAT = "megatron-sbld-sensitivity-1"


@dataclass(frozen=True, kw_only=True)
class SensitivityFile:
    """What a sensitivity file holds; layer numbers are 1-based, lists of values are in the order of the layers.

    Raises ValueError for values that contradict each other or are out of range.
    """

    num_layers: int
    gap: tuple[float, ...]
    gap_stderr: tuple[float, ...]
    sensitivity: tuple[float, ...]
    block: tuple[int, ...]
    allow: tuple[int, ...]
    measured_with: dict[str, Any]

    def __post_init__(self) -> None:
        check_integer("num_layers", self.num_layers, 1)
        self._check_values("gap", self.gap, "(-inf, inf)")
        self._check_values("gap_stderr", self.gap_stderr, "[0, inf)")
        self._check_values("sensitivity", self.sensitivity, "[0, 1]")
        if not np.allclose(self.sensitivity, normalise(self.gap), rtol=0.0, atol=1e-6):
            raise ValueError("sensitivity does not follow from gap: it must be (gap - min gap) / (max gap - min gap)")
        block = check_layers("block", self.block, self.num_layers)
        allow = check_layers("allow", self.allow, self.num_layers)
        in_both = sorted(set(block) & set(allow))
        if in_both:
            raise ValueError(f"block and allow both have {in_both}: a layer may be in one list only")
        if not isinstance(self.measured_with, dict):
            raise ValueError(f"measured_with = {self.measured_with!r} is not allowed: it must be an object")

    @classmethod
    def from_gaps(
        cls,
        gap: Sequence[float],
        gap_stderr: Sequence[float],
        measured_with: dict[str, Any],
        block_fraction: float = 0.15,
        allow_fraction: float = 0.15,
    ) -> SensitivityFile:
        """The file of measured gaps, [L] each, with sensitivity and lists by the rules of equations.md 2."""
        block, allow = choose_lists(gap, gap_stderr, block_fraction, allow_fraction)
        return cls(
            num_layers=len(gap),
            gap=tuple(map(float, gap)),
            gap_stderr=tuple(map(float, gap_stderr)),
            sensitivity=tuple(normalise(gap).tolist()),
            block=block,
            allow=allow,
            measured_with=measured_with,
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SensitivityFile:
        """Read a file. Raises ValueError, naming the file and what is wrong with it."""
        try:
            content = load_json(Path(path).read_text(encoding="utf-8-sig"))
            return cls(**_checked_content(content))
        except OSError as error:
            raise ValueError(f"sensitivity file {path} cannot be read: {error.strerror}") from error
        except json.JSONDecodeError as error:
            raise ValueError(f"sensitivity file {path} is not valid JSON (truncated?): {error}") from error
        except ValueError as error:
            raise ValueError(f"sensitivity file {path}: {error}") from error

    def interpolated(self, num_layers: int) -> SensitivityFile:
        """An estimate for a model of another depth; the file itself for its own.

        Gaps and standard errors are linear in the relative depth (l - 0.5) / L of the measured layers, and those of the
        first and the last one hold beyond them. Sensitivity and lists follow from the gaps (equations.md 2).
        measured_with says from how many layers. Raises ValueError where the gaps become equal, as for one layer.
        """
        if num_layers == self.num_layers:
            return self
        measured, wanted = _relative_depths(self.num_layers), _relative_depths(num_layers)
        gap, gap_stderr = (np.interp(wanted, measured, values).tolist() for values in (self.gap, self.gap_stderr))
        provenance = {**self.measured_with, "interpolated_from_num_layers": self.num_layers}
        return SensitivityFile.from_gaps(gap, gap_stderr, provenance)

    def measured_otherwise(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Of these settings of a drop section, those that the gaps were measured with another value of, and that value.

        Compared is what measured_with has under "drop"; null there stands for the default and is not compared.
        """
        measured = self.measured_with.get("drop")
        if not isinstance(measured, dict):
            return {}
        others = {name: measured.get(name) for name in settings}
        return {name: value for name, value in others.items() if value is not None and value != settings[name]}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file; it is replaced as a whole or not at all."""
        write_json(Path(path), {"format": FORMAT, **dataclasses.asdict(self)})

    def _check_values(self, name: str, values: Sequence[float], allowed: str) -> None:
        if len(values) != self.num_layers:
            raise ValueError(f"{name} has {len(values)} values for num_layers = {self.num_layers}: one for each layer")
        for layer, value in enumerate(values, start=1):
            check_number(f"{name} of layer {layer}", value, allowed)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write an object as a file that is replaced as a whole or not at all."""
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    path = Path(os.path.realpath(path))  # a link stays one
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def normalise(gap: ArrayLike) -> NDArray[np.float64]:
    """S of equations.md 2: (gap - min gap) / (max gap - min gap), float64 [L]; refuses gaps that are all equal.

    >>> normalise([0.5, -0.5, 0.0]).tolist()
    [1.0, 0.0, 0.5]
    """
    gaps = np.asarray(gap, dtype=np.float64)
    if not (gaps.size and np.isfinite(gaps).all()):
        raise ValueError(f"gap = {gaps.tolist()} is not allowed: it must be finite for every layer")
    lowest, highest = gaps.min(), gaps.max()
    if not highest > lowest:
        raise ValueError(f"gap is {lowest} for all layers: equal gaps say nothing about which layers matter")
    return (gaps - lowest) / (highest - lowest)


def _relative_depths(num_layers: int) -> NDArray[np.float64]:
    """The middle of each layer's share of the depth, in (0, 1)."""
    return (np.arange(check_integer("num_layers", num_layers, 1)) + 0.5) / num_layers


def _checked_content(content: Any) -> dict[str, Any]:
    """The keys of SensitivityFile, with lists as tuples, from what the JSON text held."""
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"format = {found!r} is not allowed: it must be an object with format {FORMAT!r}")
    expected = {field.name for field in dataclasses.fields(SensitivityFile)}
    given = content.keys() - {"format"}
    if given != expected:
        missing, unknown = sorted(expected - given), sorted(given - expected)
        raise ValueError(f"missing keys: {missing}; unknown keys: {unknown}")
    lists = expected - {"num_layers", "measured_with"}
    for name in sorted(lists):
        if not isinstance(content[name], list):
            raise ValueError(f"{name} = {content[name]!r} is not allowed: it must be a list")
    return {name: tuple(content[name]) if name in lists else content[name] for name in expected}
