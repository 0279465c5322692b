"""What the patches for Megatron-LM call: layer dropping in Megatron-LM's own `pretrain_gpt.py`."""

from megatron_sbld.megatron_lm.attach import with_layer_dropping

__all__ = ["with_layer_dropping"]
