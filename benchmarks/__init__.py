"""The benchmarks: README.md says what each one asks, how it is run and what it found last."""
