"""Megatron's optimizer: its state in checkpoints, copies in groups, the norm of the gradients."""
