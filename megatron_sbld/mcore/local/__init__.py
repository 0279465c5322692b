"""Megatron's layers without Transformer Engine."""
