"""How a process of a run ends, beside 0 (complete) and 1 (an exception): what batch jobs decide by."""

EXIT_MISTAKE = 2
"""A user's mistake, as argparse's own: starting again would end alike."""

EXIT_TO_BE_CONTINUED = 75
"""A run that was asked to stop (SIGTERM, SIGUSR1, training.exit_after_iterations) and has saved: start it again."""

EXIT_RANK_LOST = 76
"""A rank that ends because another one died, stalled or failed: start the run again to go on."""

EXIT_INTERRUPTED = 130
"""Ctrl-C, as shells have it."""

EXIT_BROKEN_PIPE = 141
"""What read the output has ended; as shells have SIGPIPE."""
