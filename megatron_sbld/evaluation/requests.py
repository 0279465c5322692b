"""What is scored and what comes back: the seam between tasks (data, figures) and the models that run them.

Pure Python, so that tasks and reports need no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Request:
    """Tokens of which the last are scored, each given all before it."""

    tokens: tuple[int, ...]
    """Context and, at its end, the targets. The last is no input, so that a model of n positions takes n + 1."""
    num_targets: int

    def __post_init__(self) -> None:
        if not 0 < self.num_targets < len(self.tokens):
            raise ValueError(
                f"a request of {len(self.tokens)} tokens has num_targets = {self.num_targets}; "
                "allowed: 1 to one less than its tokens, since the first target needs context"
            )


class Score(NamedTuple):
    """What a model makes of a request."""

    log_likelihood: float
    """Natural logarithm, summed over the targets."""
    is_greedy: bool
    """Whether every target is the most likely token, given all tokens before it."""
