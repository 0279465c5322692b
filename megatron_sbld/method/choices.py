"""The words of the drop section, each set here alone: fields, arguments, checks and messages take them from here."""

from __future__ import annotations

from typing import Literal

PolicyName = Literal["none", "sbld", "pld", "layerdrop", "stochastic_depth", "staged"]
"""Where keep probabilities come from."""
ScheduleName = Literal["pwegd", "exponential", "linear", "polynomial", "constant", "steps", "plateau"]
"""theta over training."""
RecipeName = Literal["sbld-paper", "pld-paper", "raptr", "ddd", "staged", "random-ltd"]
"""Settings of a published method."""
Depth = Literal["uniform", "linear", "exponential"]
"""How LayerDrop's rate 1 - theta(t) grows with depth."""
StageRule = Literal["first", "last", "spread", "sensitivity"]
"""Which layers begin first: the first ones, the last ones, evenly spread ones, the most sensitive ones."""
StageInit = Literal["random", "zero", "copy"]
"""What a layer begins as: as initialised, with output projections of zero, or as a copy of a running layer."""
SensitivityUpdate = Literal["none", "dynamic"]
"""Whether training re-estimates the sensitivity."""
ResidualScale = Literal["none", "inverse_keep_prob"]
"""Factor of a kept layer's branches: 1, or 1 / keep_prob of that layer."""
ResidualAdd = Literal["stock", "fused"]
"""Who adds a branch to the residual stream."""
Scope = Literal["iteration", "microbatch"]
"""How long one draw holds."""
Granularity = Literal["layer", "sample", "token"]
"""What a decision is about."""
TokenSchedule = Literal["linear", "steps"]
"""How many tokens a layer runs over training, with granularity token."""
Unit = Literal["layer", "block"]
"""Whether the layers of one block of a hybrid model are decided about by themselves or as one."""
Sampler = Literal["bernoulli", "balanced"]
"""How decisions of layers hang together."""
Replicas = Literal["shared", "distinct"]
"""Whether data-parallel replicas take the same decisions."""
DroppedUpdate = Literal["apply", "freeze"]
"""What the optimizer does to a layer that was dropped throughout."""
