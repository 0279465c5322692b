"""Saving a run, finding a checkpoint, and going on from it."""
