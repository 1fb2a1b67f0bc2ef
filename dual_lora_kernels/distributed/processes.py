"""What one process does for all."""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist

from ..sharding import portable


def in_rank_0(action: Callable[[], None]) -> None:
    """Let process 0 act, and all raise what it raises; nobody goes on before it is done."""
    error: list[Exception | None] = [None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            action()
        except Exception as raised:
            error = [portable(raised)]
    if dist.is_initialized():
        dist.broadcast_object_list(error, src=0)
    if error[0] is not None:
        raise error[0]
