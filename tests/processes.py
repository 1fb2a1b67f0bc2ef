"""Processes joined by gloo, which stay for a whole test run: PyTorch takes seconds to import in each."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

_PATIENCE = 120
"""Seconds that a case may take; one that hangs is a failure, not the end of the run."""


class Failed(AssertionError):
    """A case failed in a process."""


class Processes:
    """`count` processes with a default process group. The first call starts them, and so does one after a failure."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._workers: list[tuple[multiprocessing.process.BaseProcess, Connection]] = []

    def run(self, case: Callable[..., Any], *args: Any) -> list[Any]:
        """What ``case(*args)``, a function of a module, returns in each process. Raises `Failed` with a traceback."""
        if not self._workers:
            self._start()
        for _, pipe in self._workers:
            pipe.send((case, args))
        results, problems = [], []
        for rank, (_, pipe) in enumerate(self._workers):
            try:
                ended = pipe.poll(_PATIENCE)
                result, problem = pipe.recv() if ended else (None, f"no end within {_PATIENCE} s")
            except EOFError:
                result, problem = None, "the process ended"
            results.append(result)
            if problem is not None:
                problems.append(f"process {rank}: {problem}")
        if problems:
            self.end()
            raise Failed("\n".join(problems))
        return results

    def end(self) -> None:
        """End the processes."""
        for process, pipe in self._workers:
            pipe.close()
            process.kill()
            process.join()
        self._workers = []

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        meeting = tempfile.mktemp(prefix="gloo-")
        for rank in range(self.count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(rank, self.count, meeting, theirs), daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, ours))


def _work(rank: int, count: int, meeting: str, pipe: Connection) -> None:
    os.environ |= {"OMP_NUM_THREADS": "1", "RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank)}
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=count, timeout=timedelta(seconds=60)
    )
    while True:
        try:
            case, args = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((case(*args), None))
        except BaseException:
            pipe.send((None, traceback.format_exc()))
