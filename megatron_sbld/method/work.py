"""What a layer is expected to do in an iteration: the share of its tokens that it runs, and of its FLOPs.

They differ with granularity token, where a layer that runs r of s tokens has r / s of what grows with the tokens and
(r / s)^2 of attention's scores (docs/method.md section 5).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_sbld.method.policy import Policy
from megatron_sbld.method.tokens import TokenDrop


@dataclass(frozen=True)
class Work:
    """Of a policy, and of the tokens that its layers drop."""

    policy: Policy
    tokens: TokenDrop | None = None
    attention_share: float = 0.0
    """The part of a layer's FLOPs that grows as the square of the tokens (flops.attention_share)."""

    def num_tokens(self, iteration: int) -> int | None:
        """r(t); None unless tokens are dropped."""
        if self.tokens is None:
            return None
        recovers = iteration >= self.policy.first_recovery_iteration
        return self.tokens.seq_length if recovers else self.tokens.tokens(iteration)

    def kept(self, iteration: int) -> NDArray[np.float64]:
        """Expected share of its tokens that each layer runs, [L]."""
        return self.policy.keep_probs(iteration) * self.token_shares(iteration)

    def flops(self, iteration: int) -> NDArray[np.float64]:
        """Expected share of each layer's FLOPs, [L]."""
        if self.tokens is None:
            return self.policy.keep_probs(iteration)
        return self.policy.keep_probs(iteration) * self.flops_of(self.token_shares(iteration))

    def flops_of(self, shares: NDArray[np.float64]) -> NDArray[np.float64]:
        """What shares of the tokens are of a layer's FLOPs."""
        return shares * (1.0 - self.attention_share) + shares**2 * self.attention_share

    def token_shares(self, iteration: int) -> NDArray[np.float64]:
        """What share of the tokens each layer runs where it is kept, [L]."""
        if self.tokens is None or iteration >= self.policy.first_recovery_iteration:
            return np.ones(self.policy.num_layers)
        return self.tokens.shares(iteration, self.policy.num_layers)
