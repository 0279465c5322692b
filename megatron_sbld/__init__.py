"""Layer dropping for GPT pretraining on Megatron: SBLD and the methods that it is judged against.

The public names are loaded when they are first asked for: the method needs NumPy and SciPy alone, `DropController`
torch, `make_switchable` megatron-core.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_sbld.controller import DropController
    from megatron_sbld.mcore import (
        freeze_dropped_layers,
        fuse_residual,
        grow_in_stages,
        make_switchable,
        warm_up_after_growth,
    )
    from megatron_sbld.method.decisions import draw_plan
    from megatron_sbld.method.policy import (
        FullDepthPolicy,
        LayerDropPolicy,
        PLDPolicy,
        Policy,
        SBLDPolicy,
        StagedPolicy,
        StochasticDepthPolicy,
    )
    from megatron_sbld.method.schedule import PWEGD, Constant, Exponential, Linear, Plateau, Polynomial, Schedule, Steps
    from megatron_sbld.method.stages import Stages

__version__ = "0.1.0"

_HOMES = {
    "controller": ("DropController",),
    "mcore": ("freeze_dropped_layers", "fuse_residual", "grow_in_stages", "make_switchable", "warm_up_after_growth"),
    "method.decisions": ("draw_plan",),
    "method.policy": (
        "FullDepthPolicy",
        "LayerDropPolicy",
        "PLDPolicy",
        "Policy",
        "SBLDPolicy",
        "StagedPolicy",
        "StochasticDepthPolicy",
    ),
    "method.schedule": ("PWEGD", "Constant", "Exponential", "Linear", "Plateau", "Polynomial", "Schedule", "Steps"),
    "method.stages": ("Stages",),
}

__all__ = [
    "PWEGD",
    "Constant",
    "DropController",
    "Exponential",
    "FullDepthPolicy",
    "LayerDropPolicy",
    "Linear",
    "PLDPolicy",
    "Plateau",
    "Policy",
    "Polynomial",
    "SBLDPolicy",
    "Schedule",
    "StagedPolicy",
    "Stages",
    "Steps",
    "StochasticDepthPolicy",
    "__version__",
    "draw_plan",
    "freeze_dropped_layers",
    "fuse_residual",
    "grow_in_stages",
    "make_switchable",
    "warm_up_after_growth",
]


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"megatron_sbld.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
