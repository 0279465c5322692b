"""What one test leaves in Megatron's globals must not meet the next one's model."""

from __future__ import annotations

import pytest

from tests.mcore.helpers import forget_moe_losses


@pytest.fixture(autouse=True)
def _no_moe_losses_of_other_models() -> None:
    forget_moe_losses()
