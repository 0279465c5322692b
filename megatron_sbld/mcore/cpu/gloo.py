"""Process groups of gloo that stay whole: one thread each.

With torch's two threads a group, coalesced all-gathers that are under way together damage the heap (torch 2.13; pytorch
issue 65237 looks alike): interleaved stages with `overlap_param_gather`, which gather several buckets at once, crashed
in 8 of 212 runs of 10 iterations, with stock Megatron layers too, and in none of 86 with one thread.
"""

from __future__ import annotations

import datetime
import functools
import os
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d


@functools.cache
def use_one_gloo_thread() -> None:
    """Give every gloo group that this process makes from now on one thread, and all of them the same network device.

    A device is a thread too, which looks for events a hundred times a second; torch makes one for each group. It is
    the one of GLOO_SOCKET_IFNAME at the time of the first group, as torch chooses it.
    """
    gloo = distributed_c10d.ProcessGroupGloo

    @functools.cache
    def devices() -> list[Any]:
        interfaces = [name for name in os.environ.get("GLOO_SOCKET_IFNAME", "").split(",") if name]
        return [gloo.create_device(interface=name) for name in interfaces] or [gloo.create_default_device()]

    class OneThread(gloo):  # type: ignore[misc, valid-type]
        def __init__(
            self,
            store: dist.Store,
            rank: int,
            size: int,
            timeout: datetime.timedelta = distributed_c10d.default_pg_timeout,
            **settings: Any,
        ) -> None:
            options = gloo._Options()  # type: ignore[attr-defined]  # torch's stub has another name
            options._devices, options._timeout, options._threads = devices(), timeout, 1
            for name, value in settings.items():  # enable_reconfigure, from torch 2.14 on
                setattr(options, name, value)
            super().__init__(store, rank, size, options)

    distributed_c10d.ProcessGroupGloo = OneThread  # type: ignore[misc]
