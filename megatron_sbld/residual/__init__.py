"""The fused residual add: residual, and on the rows that went through a layer, + scale * dropout(branch + bias)."""

from megatron_sbld.residual.choice import describe_choice
from megatron_sbld.residual.op import residual_skip_add, residual_skip_add_

__all__ = ["describe_choice", "residual_skip_add", "residual_skip_add_"]
