"""The options of a sensitivity measurement."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from megatron_sbld.checks import check_integer
from megatron_sbld.fields import CountOrZero, PositiveShare, Whole, check_fields
from megatron_sbld.sensitivity.measurement import Method


@dataclass(frozen=True, kw_only=True)
class MeasureOptions:
    """What is measured, and how."""

    out: str
    """Folder of the measurement; one that was interrupted is continued there."""
    method: Method = "train"
    """train: the paper's, a run without each layer against a baseline. leave_one_out: loss of a trained model at
    evaluation without each layer. block_influence: 1 - cosine similarity of each layer's input and output; no loss
    difference, so the rule for the Allow list finds no layer and drop.allow_layers has to name them."""
    iterations: CountOrZero | None = None
    """Iterations of each run (train), or of training before the evaluation (the others). None is 500; for the others
    with --from none."""
    drop_prob: PositiveShare | None = None
    """train: probability with which the one layer is dropped; None is 0.9."""
    layers: str | None = None
    """Layers to be measured, as 1-8,17, or 2/8 for the second of eight parts; None is all. `sensitivity
    merge` joins folders that have them all between them."""
    seeds: str | None = None
    """Seeds of weights, data order and decisions, as 1,2,3; gaps are averaged. None takes training.seed and
    drop.seed."""
    window: Annotated[int, Whole(2)] | None = None
    """train: iterations at the end of the runs that gaps are averaged over; None is a fifth of them, at least 10."""
    batches: Annotated[int, Whole(2)] | None = None
    """leave_one_out, block_influence: global batches to evaluate on, which come next in the data's order; None is
    40."""
    early_stop: bool = False
    """train: end a layer's run once its rank is settled and no list depends on it."""


def check_options(options: MeasureOptions) -> None:
    """Refuse options out of range, and those that the method does not use."""
    check_fields(options, "--")
    of_train = {"drop_prob": options.drop_prob, "window": options.window, "early_stop": options.early_stop or None}
    unused = {"batches": options.batches} if options.method == "train" else of_train
    for name, value in unused.items():
        if value is not None:
            raise ValueError(f"--{name} is not used by --method {options.method}: leave it out")


def parse_layers(text: str | None, num_layers: int) -> list[int]:
    """The layers that --layers names, in ascending order. Raises ValueError naming the option.

    >>> parse_layers("1-3,17", 24), parse_layers("2/10", 24), parse_layers(None, 3)
    ([1, 2, 3, 17], [2, 12, 22], [1, 2, 3])
    """
    part, slash, parts = (text or "1/1").partition("/")
    if not slash:
        return parse_numbers("--layers", text, 1, num_layers)
    if not (part.isdecimal() and parts.isdecimal()):
        raise ValueError(f"--layers {text} is not allowed: a part is written as 2/8")
    check_integer(f"--layers {text}: parts", int(parts), 1, num_layers)
    check_integer(f"--layers {text}: part", int(part), 1, int(parts))
    return list(range(int(part), num_layers + 1, int(parts)))


def parse_numbers(name: str, text: str | None, low: int, high: int) -> list[int]:
    """Numbers as `1-8,17` gives them, in ascending order; empty for None. Raises ValueError naming the option.

    >>> parse_numbers("--layers", "17,1-3", 1, 24)
    [1, 2, 3, 17]
    """
    if text is None:
        return []
    numbers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ValueError(f"{name} {text} is not allowed: {part.strip()!r} is not a number or a range such as 1-8")
        ends = [check_integer(f"{name} {text}: entry", int(end), low, high) for end in (first, last or first)]
        if ends[0] > ends[1]:
            raise ValueError(f"{name} {text} is not allowed: {part.strip()!r} must ascend")
        numbers += range(ends[0], ends[1] + 1)
    if len(set(numbers)) != len(numbers):
        raise ValueError(f"{name} {text} is not allowed: a number may be listed only once")
    return sorted(numbers)
