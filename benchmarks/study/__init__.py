"""Which way of skipping layers reaches a loss with the least compute: a study at equal training FLOPs (run.py)."""
