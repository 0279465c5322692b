"""What the benchmarks share, and the parts of those that are too long for one file."""
