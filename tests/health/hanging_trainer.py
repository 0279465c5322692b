"""`megatron-sbld`, but that the main thread of rank 1 hangs in Python where iteration 5 begins to read its data."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

from megatron_sbld.cli.main import main
from megatron_sbld.data.batches import TrainingData
from megatron_sbld.health.watchdog import POSITION

HANGS_IN = 5


def hang_once(train_batches: Any) -> Any:
    def hanging(self: TrainingData, num_microbatches: int) -> Iterator[Any]:
        if os.environ["RANK"] == "1" and POSITION.iteration == HANGS_IN:
            time.sleep(3600)
        return train_batches(self, num_microbatches)

    return hanging


if __name__ == "__main__":
    TrainingData.train_batches = hang_once(TrainingData.train_batches)
    main()
