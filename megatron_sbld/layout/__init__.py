"""Which layers a pipeline stage holds, and how long an iteration of stages takes. NumPy alone."""
