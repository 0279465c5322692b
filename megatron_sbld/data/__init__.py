"""From text to microbatches."""
