"""Compares runs of Megatron-LM and of `megatron-sbld pretrain`. A command prints a line.

For scripts/check_patches.sh, and by its functions for test_training_loop.py.

compare_runs.py same A B            losses, gradient norms and learning rates, bit for bit, of iterations --first to the
                                    last of A; B is to have logged those and no others
compare_runs.py near A B            the same to rounding and without validation, where A or B may be `pretrain`'s;
                                    --other-layout leaves out the gradient norms
compare_runs.py decisions A FILE    theta, mean_keep_prob, kept_fraction and each layer's keep_prob against the plan,
                                    throughput executed against undropped
compare_runs.py perplexity A B C    losses in folders of `megatron-sbld evaluate perplexity --out`: A as B, to rounding,
                                    and not as C
compare_runs.py sensitivity FILE    write the sensitivity file of the runs

A run is a folder of TensorBoard events, or the run folder of `pretrain`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_sbld.method.build import build_policy
from megatron_sbld.method.config import DropConfig
from megatron_sbld.method.decisions import draw_plan
from megatron_sbld.method.policy import Policy
from megatron_sbld.sensitivity.file import SensitivityFile

DROP = {"theta": 0.4, "peak_iteration": 3, "peak_theta": 0.5, "beta": 0.3, "theta_min": 0.3, "allow_layers": [2]}
"""The drop section of scripts/check_patches.sh."""
TOLERANCE = 1e-4
"""Relative. Rounding is below 1e-6 on a CPU; weights without the optimizer's moments miss by more than 1e-3."""
_LOSS, _VALIDATION = "lm loss", "lm loss validation"
_METRICS = {_LOSS: "loss", "grad-norm": "grad_norm", "learning-rate": "lr"}
"""Megatron-LM's tags, and the names in metrics.jsonl."""

Scalars = Mapping[str, Mapping[int, float]]
"""Tag -> iteration -> value."""


def scalars(folder: str) -> Scalars:
    """All that Megatron-LM logged, as float32."""
    events = EventAccumulator(folder)
    events.Reload()
    # Of an iteration's values the first: the last validation is done again at the end, and may then not be flushed.
    return {
        tag: {event.step: event.value for event in reversed(events.Scalars(tag))} for tag in events.Tags()["scalars"]
    }


def _either(folder: str) -> Scalars:
    metrics = Path(folder, "metrics.jsonl")
    if not metrics.exists():
        return scalars(folder)
    rows = [row for row in map(json.loads, metrics.read_text().splitlines()) if "loss" in row]
    return {tag: {row["iteration"]: row[name] for row in rows} for tag, name in _METRICS.items()}


def _pairs(
    ours: Scalars, theirs: Scalars, tags: list[str], given: argparse.Namespace
) -> Iterator[tuple[str, float, float]]:
    """What is compared, with its name; a run that did not begin or end where it should is refused."""
    iterations = range(given.first, given.iterations + 1)
    whole = sorted(ours[_LOSS])
    # A checkpoint that was not found: training began anew.
    if sorted(theirs[_LOSS]) != list(iterations) or whole != list(range(whole[0], given.iterations + 1)):
        raise SystemExit(f"iterations {whole} and {sorted(theirs[_LOSS])} were logged, expected {list(iterations)}")
    for tag in tags:
        for iteration in iterations:
            if tag != _VALIDATION or iteration in ours[tag]:
                yield f"{tag}, iteration {iteration}", ours[tag][iteration], theirs[tag][iteration]


def same(first_run: str, second_run: str, given: argparse.Namespace) -> str:
    """What both runs have in common is equal, bit for bit."""
    ours, theirs = scalars(first_run), scalars(second_run)
    compared = list(_pairs(ours, theirs, [*_METRICS, "loss-scale", _VALIDATION], given))
    for name, one, other in compared:
        if one != other:
            raise SystemExit(f"{name}: {one} and {other}")
    last = given.iterations
    return (
        f"{len(compared)} scalars equal bit for bit, iterations {given.first} to {last}; "
        f"last loss {ours[_LOSS][last]:.7f}, validation {ours[_VALIDATION][last]:.7f}"
    )


def near(first_run: str, second_run: str, given: argparse.Namespace) -> str:
    """What both programs log of every iteration is equal to rounding."""
    ours, theirs = _either(first_run), _either(second_run)
    # Megatron's gradient norm is another by 3e-4 on TP 2, in both programs.
    tags = [tag for tag in _METRICS if not (given.other_layout and tag == "grad-norm")]
    largest = dict.fromkeys(tags, 0.0)
    for name, one, other in _pairs(ours, theirs, tags, given):
        tag = name.split(",")[0]
        largest[tag] = max(largest[tag], _difference(name, one, other))
    shown = ", ".join(f"{tag} {value:.1e}" for tag, value in largest.items())
    return f"equal to rounding, iterations {given.first} to {given.iterations}; largest relative differences: {shown}"


def _difference(name: str, one: float, other: float) -> float:
    difference = abs(one - other) / abs(one)
    if not difference <= TOLERANCE:
        raise SystemExit(f"{name}: {one} and {other}, more than {TOLERANCE:g} apart")
    return difference


def decisions(folder: str, sensitivity: str, given: argparse.Namespace) -> str:
    """The logged decisions are those that the trainer would draw."""
    config = DropConfig(policy="sbld", sensitivity=sensitivity, **DROP)
    policy = build_policy(config, given.layers, given.iterations)
    kept = check_decisions(scalars(folder), policy, config.seed, range(given.first, given.iterations + 1))
    return f"decisions as drawn for the same seed and policy; kept fraction {np.round(kept, 3).tolist()}"


def check_decisions(logged: Scalars, policy: Policy, seed: int, iterations: Iterable[int]) -> list[float]:
    """Refuse decisions that are not the policy's; the kept fraction of each iteration."""
    kept: list[float] = []
    for iteration in iterations:
        keep_probs = policy.keep_probs(iteration)
        kept.append(float(draw_plan(keep_probs, seed, iteration, 1).mean()))
        expected = {
            "theta": policy.theta(iteration),
            "mean_keep_prob": keep_probs.mean(),
            "kept_fraction": kept[-1],
            **{f"keep_prob/layer_{layer:02d}": value for layer, value in enumerate(keep_probs, start=1)},
        }
        for tag, value in expected.items():
            found = logged[tag].get(iteration, np.nan)
            if np.float32(found) != np.float32(value):
                raise SystemExit(f"{tag}, iteration {iteration}: {found}, expected {value}")
        undropped, executed = (logged[f"sbld throughput {kind}"][iteration] for kind in ("undropped", "executed"))
        share = executed / undropped
        if not (kept[-1] < share < 1 or kept[-1] == share == 1):  # the output layer always runs
            raise SystemExit(f"iteration {iteration}: {executed} TFLOP/s executed of {undropped}, {kept[-1]:.3f} kept")
    return kept


def perplexity(first_folder: str, second_folder: str, earlier_folder: str, given: argparse.Namespace) -> str:
    """Two checkpoints score alike, and not as an earlier one does."""
    (one,), (other,), (earlier,) = (
        [json.loads(row)["metrics"]["loss"] for row in Path(folder, "evaluations.jsonl").read_text().splitlines()]
        for folder in (first_folder, second_folder, earlier_folder)
    )
    _difference("loss of the text", one, other)
    if not abs(one - earlier) > TOLERANCE * one:
        raise SystemExit(f"loss of the text: {one}, and {earlier} with an earlier checkpoint")
    return f"loss of a text {one:.7f} and {other:.7f}, {earlier:.7f} half way"


def write_sensitivity(path: str, given: argparse.Namespace) -> str:
    """A made-up file in which deeper layers matter more."""
    gaps = [0.1 * layer for layer in range(given.layers)]
    SensitivityFile.from_gaps(gaps, [0.01] * given.layers, {"command": "made up"}).save(path)
    return f"made up for {given.layers} layers, deeper ones matter more"


COMMANDS = {
    "same": same,
    "near": near,
    "decisions": decisions,
    "perplexity": perplexity,
    "sensitivity": write_sensitivity,
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("paths", nargs="+")
    parser.add_argument("--first", type=int, default=1)
    parser.add_argument("--other-layout", action="store_true")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--iterations", type=int, default=6)
    arguments = parser.parse_args()
    print(COMMANDS[arguments.command](*arguments.paths, arguments))
