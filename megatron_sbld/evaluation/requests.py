"""What an evaluation asks of a model, and what comes back. Pure Python: tasks need neither torch nor Megatron."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Request:
    """Tokens, of which the last ones are to be scored given all before them.

    Raises:
        ValueError: there is nothing to score, or nothing before it.
    """

    tokens: tuple[int, ...]
    """Context and, at its end, the targets. The last is no input, so that a model of n positions takes n + 1."""
    num_targets: int
    """How many at the end are scored, at least 1 and fewer than there are."""

    def __post_init__(self) -> None:
        if not 1 <= self.num_targets < len(self.tokens):
            raise ValueError(
                f"num_targets = {self.num_targets} of {len(self.tokens)} tokens: at least one, and one before it"
            )


class Score(NamedTuple):
    """What a model makes of a request."""

    log_likelihood: float
    """Natural logarithm of the probability of all targets."""
    is_greedy: bool
    """Whether every target is the most likely token; of equally likely ones the lowest id."""
