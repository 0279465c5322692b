"""Everything that touches megatron-core: the switchable layer, what it refuses, and what runs without a GPU."""

from megatron_sbld.mcore.dropped_update import freeze_dropped_layers
from megatron_sbld.mcore.switchable import fuse_residual, make_switchable

__all__ = ["freeze_dropped_layers", "fuse_residual", "make_switchable"]
