#!/usr/bin/env python3
"""Draws a sensitivity file, and the keep probabilities that policies make of it. Needs neither torch nor Megatron.

    python examples/draw.py [SENSITIVITY.json [OUT.png]]

Without arguments it draws configs/quickstart_sensitivity.json into sensitivity_and_schedules.png.
"""

import json
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from megatron_sbld import PWEGD, Exponential, PLDPolicy, SBLDPolicy

default = Path(__file__).resolve().parent.parent / "configs" / "quickstart_sensitivity.json"
source = Path(sys.argv[1]) if len(sys.argv) > 1 else default
out = Path(sys.argv[2]) if len(sys.argv) > 2 else Path("sensitivity_and_schedules.png")
measured = json.loads(source.read_text())
layers = np.arange(1, measured["num_layers"] + 1)
iterations = np.arange(1, 10_001, 20)

schedule = PWEGD.from_peak(theta=0.5, peak_iteration=1000, peak_theta=0.75, shape=3.0)
policies = {
    "SBLD": SBLDPolicy(
        schedule, measured["sensitivity"], block_layers=measured["block"], allow_layers=measured["allow"]
    ),
    "PLD": PLDPolicy(Exponential(theta=0.5, gamma=0.001), len(layers)),
}

figure = Figure(figsize=(12, 3.5), layout="constrained")
left, middle, right = figure.subplots(1, 3)
left.bar(layers, measured["gap"], yerr=measured["gap_stderr"])
left.set(xlabel="layer", ylabel="loss with this layer dropped - baseline", title="sensitivity")
for name, policy in policies.items():
    middle.plot(iterations, [policy.theta(t) for t in iterations], label=name)
    right.plot(layers, policy.keep_probs(5000), marker="o", label=name)
middle.set(xlabel="iteration", ylabel="theta", ylim=(0, 1.02), title="schedules")
right.set(xlabel="layer", ylabel="keep probability", ylim=(0, 1.02), title="at iteration 5,000")
middle.legend()
right.legend()
figure.savefig(out, dpi=150)
print(f"wrote {out}")
