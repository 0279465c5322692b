"""Sensitivity-based layer dropping (SBLD) for GPT pretraining on Megatron.

The method (schedule, policy, plan) is pure NumPy and importable without torch or Megatron; `DropController` is loaded
on first use because it needs torch.
"""

from typing import Any

__version__ = "0.1.0"
__all__ = ["DropController", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "DropController":
        from megatron_sbld.controller import DropController

        return DropController
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
