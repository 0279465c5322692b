"""Groups of gloo with one thread, as every version of torch makes them."""

from __future__ import annotations

import torch.distributed as dist
from torch.distributed import distributed_c10d

from megatron_sbld.mcore.cpu.gloo import use_one_gloo_thread


def test_a_group_has_one_thread_and_the_settings_that_torch_gives_it() -> None:
    """torch 2.14 gives `enable_reconfigure` beside the timeout, and other versions may give others."""
    use_one_gloo_thread()
    group = distributed_c10d.ProcessGroupGloo(dist.HashStore(), 0, 1, group_name="a group")
    assert group.options._threads == 1
    assert group.options.group_name == "a group"
