"""Compares runs of Megatron-LM by their TensorBoard scalars; for scripts/check_patches.sh. Each command prints a line.

compare_runs.py same A B            losses, gradient norms and learning rates of the iterations that both have
compare_runs.py decisions A FILE    theta, mean_keep_prob, kept_fraction and each layer's keep_prob against the plan,
                                    throughput executed against undropped
compare_runs.py sensitivity FILE    write the sensitivity file of the runs
"""

from __future__ import annotations

import argparse
import sys

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_sbld.drop import build_policy
from megatron_sbld.drop_config import DropConfig
from megatron_sbld.plan import draw_plan
from megatron_sbld.sensitivity.file import SensitivityFile

LAYERS, ITERATIONS = 6, 6
DROP = {"theta": 0.4, "peak_iteration": 3, "peak_theta": 0.5, "beta": 0.3, "theta_min": 0.3, "allow_layers": [2]}
"""The drop section of scripts/check_patches.sh."""
_SAME = ("loss", "norm", "learning")


def scalars(folder: str) -> dict[str, dict[int, float]]:
    """Tag -> iteration -> value, as float32."""
    events = EventAccumulator(folder)
    events.Reload()
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def same(first: str, second: str) -> str:
    """What both runs have in common is equal, bit for bit."""
    ours, theirs = scalars(first), scalars(second)
    tags = [tag for tag in ours if any(part in tag for part in _SAME) and "samples" not in tag]
    compared = 0
    for tag in tags:
        for iteration in ours[tag].keys() & theirs[tag].keys():
            compared += 1
            if ours[tag][iteration] != theirs[tag][iteration]:
                raise SystemExit(f"{tag}, iteration {iteration}: {ours[tag][iteration]} and {theirs[tag][iteration]}")
    iterations = sorted(ours["lm loss"].keys() & theirs["lm loss"].keys())
    if not iterations:
        raise SystemExit("the runs have no iteration in common")
    last = ours["lm loss"][iterations[-1]]
    return f"{compared} scalars equal bit for bit, iterations {iterations[0]} to {iterations[-1]}; last loss {last:.7f}"


def decisions(folder: str, sensitivity: str) -> str:
    """The logged decisions are those that the trainer would draw."""
    config = DropConfig(policy="sbld", sensitivity=sensitivity, **DROP)
    policy, logged = build_policy(config, LAYERS, ITERATIONS), scalars(folder)
    kept = []
    for iteration in range(1, ITERATIONS + 1):
        keep_probs = policy.keep_probs(iteration)
        kept.append(draw_plan(keep_probs, config.seed, iteration, 1).mean())
        expected = {
            "theta": policy.theta(iteration),
            "mean_keep_prob": keep_probs.mean(),
            "kept_fraction": kept[-1],
            **{f"keep_prob/layer_{layer:02d}": value for layer, value in enumerate(keep_probs, start=1)},
        }
        for tag, value in expected.items():
            if np.float32(logged[tag][iteration]) != np.float32(value):
                raise SystemExit(f"{tag}, iteration {iteration}: {logged[tag][iteration]}, expected {value}")
        undropped, executed = (logged[f"sbld throughput {kind}"][iteration] for kind in ("undropped", "executed"))
        if not 0 < kept[-1] * undropped < executed <= undropped:  # the output layer always runs
            raise SystemExit(f"iteration {iteration}: {executed} TFLOP/s executed of {undropped}, {kept[-1]:.3f} kept")
    return f"decisions as drawn for the same seed and policy; kept fraction {np.round(kept, 3).tolist()}"


def write_sensitivity(path: str) -> str:
    """A made-up file in which deeper layers matter more."""
    gaps = [0.1 * layer for layer in range(LAYERS)]
    SensitivityFile.from_gaps(gaps, [0.01] * LAYERS, {"command": "made up"}).save(path)
    return "sensitivity: made up, deeper layers matter more"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=("same", "decisions", "sensitivity"))
    parser.add_argument("paths", nargs="+")
    given = parser.parse_args()
    run = {"same": same, "decisions": decisions, "sensitivity": write_sensitivity}[given.command]
    print(f"check_patches: {run(*given.paths)}", file=sys.stdout)
