"""megatron-core on machines without a GPU; never loaded where CUDA is available."""
