"""The seam: megatron-core's layers become switchable, and what a skipped layer owes the rest of Megatron."""
