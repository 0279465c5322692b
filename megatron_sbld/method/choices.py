"""The words of the drop section, each set here alone: fields, arguments, checks and messages take them from here."""

from __future__ import annotations

from typing import Literal

PolicyName = Literal["none", "sbld", "pld", "layerdrop", "stochastic_depth"]
"""Where keep probabilities come from."""
ScheduleName = Literal["pwegd", "exponential", "linear", "polynomial", "constant"]
"""theta over training."""
SensitivityUpdate = Literal["none", "dynamic"]
"""Whether training re-estimates the sensitivity."""
ResidualScale = Literal["none", "inverse_keep_prob"]
"""Factor of a kept layer's branches: 1, or 1 / keep_prob of that layer."""
ResidualAdd = Literal["stock", "fused"]
"""Who adds a branch to the residual stream."""
Scope = Literal["iteration", "microbatch"]
"""How long one draw holds."""
Granularity = Literal["layer", "sample"]
"""What a decision is about."""
Sampler = Literal["bernoulli", "balanced"]
"""How decisions of layers hang together."""
Replicas = Literal["shared", "distinct"]
"""Whether data-parallel replicas take the same decisions."""
DroppedUpdate = Literal["apply", "freeze"]
"""What the optimizer does to a layer that was dropped throughout."""
