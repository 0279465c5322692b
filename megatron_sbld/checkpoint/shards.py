"""How the shards of a checkpoint are written. Needs torch alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import StorageMeta


class ShardWriter(dcp.FileSystemWriter):
    """torch's writer for one folder, with a table of contents that every Python reads."""

    def __init__(self, folder: Path) -> None:
        super().__init__(
            folder,
            sync_files=True,
            thread_count=1,  # torch loses the error of any further thread, and saves a table without its tensors
            per_thread_copy_ahead=0,  # would open a CUDA context on device 0 from a background thread
        )

    def storage_meta(self) -> StorageMeta | None:
        """The folder as a string: a path that Python 3.13 pickled cannot be read by those before it."""
        stock = super().storage_meta()
        return None if stock is None else replace(stock, checkpoint_id=str(stock.checkpoint_id))
