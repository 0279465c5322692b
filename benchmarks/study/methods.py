"""The methods of the study, in the order of what is most worth knowing. A method is a drop section.

Published settings where there are some; SBLD, PLD and LayerDrop as in docs/method.md. `SENSITIVITY` stands for the
file of the model's width, which `run.py` measures before the first method that needs it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks.study.settings import LAYERS

SENSITIVITY = "<sensitivity of this width>"


@dataclass(frozen=True)
class Method:
    """says: what it is, in the report. head: the method whose learning rates it takes, of which it is a variant."""

    name: str
    says: str
    drop: dict[str, Any]
    head: str | None = None
    processes: int = 1

    @property
    def needs_sensitivity(self) -> bool:
        return SENSITIVITY in self.drop.values()


def staged(layers: int, share: float = 0.6, **more: Any) -> dict[str, Any]:
    """`layers` layers until a share of the iterations, then all of them."""
    return {"policy": "staged", "stages": [[share, layers], [1.0, LAYERS]], **more}


def _raptr_steps() -> list[list[float]]:
    """Half, two thirds, five sixths and all of the layers, a quarter of the run each; first and last are kept."""
    others = LAYERS - 2
    counts = [max(round(LAYERS * share) - 2, 1) for share in (1 / 2, 2 / 3, 5 / 6, 1)]
    return [[0.25 * (stage + 1), count / others] for stage, count in enumerate(counts)]


UNDROPPED = Method("undropped", "every layer, always", {"policy": "none"})
CORE = (
    Method("staged-1", "one layer until 60 % of the iterations, then all", staged(1)),
    Method("staged-quarter", "a quarter of the layers until 60 %", staged(LAYERS // 4)),
    Method("staged-half", "half of the layers until 60 %", staged(LAYERS // 2)),
)
PUBLISHED = (
    Method("pld", "PLD, theta 0.5", {"policy": "pld", "theta": 0.5}),
    Method("sbld", "SBLD, theta 0.5", {"policy": "sbld", "theta": 0.5, "sensitivity": SENSITIVITY}),
    Method("layerdrop", "LayerDrop, each layer kept with 0.8", {"policy": "layerdrop", "theta": 0.8}),
    Method(
        "ddd",
        "Don't Drop Dropout: rate 0.2 at the last layer, until 31 %, gone at 38.5 %",
        {
            "policy": "layerdrop",
            "schedule": "plateau",
            "theta": 0.8,
            "hold_until": 0.31,
            "decay_until": 0.385,
            "depth": "linear",
            "residual_scale": "inverse_keep_prob",
        },
    ),
    Method(
        "raptr",
        "RaPTr: random 6, 8, 10, 12 of 12 layers, first and last kept",
        {
            "policy": "layerdrop",
            "schedule": "steps",
            "steps": _raptr_steps(),
            "keep_layers": [1, LAYERS],
            "sampler": "balanced",
            "balance_stages": 1,
        },
    ),
)
VARIANTS = (
    Method("staged-1-zero", "staged-1, new layers add nothing at first", staged(1, stage_init="zero"), "staged-1"),
    Method("staged-1-copy", "staged-1, new layers are copies", staged(1, stage_init="copy"), "staged-1"),
    Method("staged-1-at-40", "staged-1, growth at 40 %", staged(1, 0.4), "staged-1"),
    Method("staged-1-at-80", "staged-1, growth at 80 %", staged(1, 0.8), "staged-1"),
    Method("staged-1-rewarm", "staged-1, the rate rises again over 5 %", staged(1, stage_warmup=0.05), "staged-1"),
    Method("staged-half-zero", "staged-half, new layers add nothing", staged(6, stage_init="zero"), "staged-half"),
    Method("staged-half-copy", "staged-half, new layers are copies", staged(6, stage_init="copy"), "staged-half"),
    Method(
        "staged-half-rewarm", "staged-half, the rate rises again over 5 %", staged(6, stage_warmup=0.05), "staged-half"
    ),
    Method("staged-half-at-40", "staged-half, growth at 40 %", staged(6, 0.4), "staged-half"),
    Method("staged-half-at-80", "staged-half, growth at 80 %", staged(6, 0.8), "staged-half"),
    Method(
        "staged-twice",
        "3 layers until 30 %, 6 until 60 %",
        {"policy": "staged", "stages": [[0.3, 3], [0.6, 6], [1.0, LAYERS]]},
        "staged-half",
    ),
)
COMBINED = (
    Method(
        "staged-half-order",
        "staged-half, the most sensitive layers first",
        staged(6, stage_layers="sensitivity", sensitivity=SENSITIVITY),
        "staged-half",
    ),
    Method(
        "staged-half-sbld",
        "SBLD (theta 0.7) among half of the layers until 60 %, then among all, the last fifth at full depth",
        {
            **staged(6),
            "policy": "sbld",
            "theta": 0.7,
            "recovery_fraction": 0.2,
            "sensitivity": SENSITIVITY,
        },
        "staged-half",
    ),
)
REPLICAS = (
    Method(
        "distinct",
        "LayerDrop 0.8, two replicas that drop other layers",
        {"policy": "layerdrop", "theta": 0.8, "sampler": "balanced", "replicas": "distinct"},
        "layerdrop",
        processes=2,
    ),
)
TOKENS = (
    Method(
        "random-ltd",
        "random-LTD: all layers but the first and the last run 1/4 of the tokens at first, all of them from 70 % on",
        {"policy": "none", "granularity": "token", "min_tokens": 128},
    ),
    Method(
        "random-ltd-sbld",
        "random-LTD in the layers that SBLD (theta 0.5) keeps",
        {"policy": "sbld", "theta": 0.5, "sensitivity": SENSITIVITY, "granularity": "token", "min_tokens": 128},
    ),
)
"""With samples of 512 tokens; beside them SBLD alone."""
METHODS = {method.name: method for method in (UNDROPPED, *CORE, *PUBLISHED, *VARIANTS, *COMBINED, *TOKENS, *REPLICAS)}
