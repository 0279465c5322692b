"""What changes megatron-core's behaviour: the switchable layer, what it refuses, and what runs without a GPU."""

from megatron_sbld.mcore.optimizer.growth_warmup import warm_up_after_growth
from megatron_sbld.mcore.skip.freeze import freeze_dropped_layers
from megatron_sbld.mcore.skip.growth import grow_in_stages
from megatron_sbld.mcore.skip.switchable import fuse_residual, make_switchable

__all__ = ["freeze_dropped_layers", "fuse_residual", "grow_in_stages", "make_switchable", "warm_up_after_growth"]
