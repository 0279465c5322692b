"""What the options of `megatron-sbld export hf` and `import hf` may be."""

from __future__ import annotations

from typing import Literal

from megatron_sbld.config.sections import Precision

ExportDtype = Literal[Precision, "as-saved"]
"""Type of the weights in the folder."""
