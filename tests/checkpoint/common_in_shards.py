"""A checkpoint as megatron-core 0.19 lays it out, made of one with common.pt."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

KEY = "common_state/shard_0_1"


def move_common_into_shards(checkpoint: Path) -> Path:
    """Put what ranks share where 0.19 has it, without common.pt and without a manifest of ours."""
    common, table, shard = checkpoint / "common.pt", checkpoint / ".metadata", checkpoint / "__0_1.distcp"
    assert not shard.exists()
    torch.save([torch.load(common, weights_only=False)], shard)
    metadata = pickle.loads(table.read_bytes())
    metadata.state_dict_metadata[KEY] = BytesStorageMetadata()
    metadata.storage_data[MetadataIndex(KEY)] = _StorageInfo(shard.name, 0, shard.stat().st_size)
    table.write_bytes(pickle.dumps(metadata))
    common.unlink()
    (checkpoint / "checkpoint.json").unlink(missing_ok=True)
    return checkpoint
