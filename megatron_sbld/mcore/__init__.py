"""Everything that touches megatron-core: the switchable layer, what it refuses, and what runs without a GPU."""

from megatron_sbld.mcore.switchable import make_switchable

__all__ = ["make_switchable"]
