"""Words of settings that rooms share which do not import each other: Megatron's parts and the config."""

from __future__ import annotations

from typing import Literal

TransformerImpl = Literal["auto", "local", "transformer_engine"]
"""Which spec layers are built from."""
Normalization = Literal["LayerNorm", "RMSNorm"]
"""Of the layers' inputs and of the output; Megatron's names."""
