"""Layer dropping in Megatron-LM's training loop: what a patched `pretrain_gpt.py`, or any script, calls."""

from megatron_sbld.megatron_lm.attach import with_layer_dropping

__all__ = ["with_layer_dropping"]
