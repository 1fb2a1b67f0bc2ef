"""Merging into a checkpoint of gigabytes: time beside ``cp`` of the same files, memory, and kills at random moments.

``python -m benchmarks merge --on-disk FOLDER`` runs it. The checkpoint has some of a Llama 3 8B's layers in bf16, a
file each, and the adapter all of their linear layers. Both are made in a folder of their own in FOLDER, with room for
three copies, and removed. ``cp`` and merges take turns, each in a process of its own, and a ratio compares times of one
round. A merge ends with all on the disk, ``cp`` with all in the system's cache; ``cp`` followed by ``sync`` is timed as
well. Then merges are killed (SIGKILL) at moments drawn evenly over a merge's time, each going on with what the one
before has left, until the last may end.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import track

from dual_lora_kernels import merge_checkpoint

from ..harness.resident_memory import resident_growth
from ..harness.results import Case, Measurement, Setting
from .synthetic import make_adapter, make_base

KIND = "merge_on_disk"


@dataclass(frozen=True)
class Round:
    """Seconds of one round, and by how many bytes the merge's memory grew beyond that of the imported package."""

    copy: float
    sync: float
    merge: float
    verified: float | None
    growth: int


@dataclass(frozen=True)
class Kills:
    """How many kills left a part of the files, how many came after the end, and whether the bytes are equal."""

    kills: int
    left_parts: int
    too_late: int
    equal: bool


def merge(base: Path, adapter: Path, out: Path, verify: bool = False) -> tuple[float, int]:
    """(seconds, bytes above the start) of a merge in this process."""
    started = time.perf_counter()
    growth = resident_growth(lambda: merge_checkpoint(base, adapter, out, verify=verify))
    return time.perf_counter() - started, growth or 0


def one_round(here: Path, verifies: bool) -> Round:
    """Time ``cp``, ``sync`` and a merge, and remove what they wrote."""
    started = time.perf_counter()
    subprocess.run(["cp", "-r", here / "base", here / "copy"], check=True)
    copied = time.perf_counter()
    subprocess.run(["sync"], check=True)
    synced = time.perf_counter()
    shutil.rmtree(here / "copy")
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as processes:
        seconds, growth = processes.submit(merge, here / "base", here / "adapter", here / "out").result()
        shutil.rmtree(here / "out")
        verified = None
        if verifies:
            verified, _ = processes.submit(merge, here / "base", here / "adapter", here / "out", True).result()
            shutil.rmtree(here / "out")
    return Round(copied - started, synced - copied, seconds, verified, growth)


def digests(folder: Path) -> dict[str, str]:
    """Each file's SHA-256."""
    found = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def kill_merges(here: Path, kills: int, seconds: float, console: Console) -> Kills:
    """Kill merges at moments spread over `seconds` after their start, and compare what the last one gives."""
    merge_checkpoint(here / "base", here / "adapter", here / "expected")
    expected = digests(here / "expected")
    shutil.rmtree(here / "expected")
    command = [
        sys.executable,
        "-m",
        "dual_lora_kernels.cli",
        "merge",
        *(str(here / x) for x in ("base", "adapter", "out")),
    ]
    moments = random.Random(0)
    left_parts = too_late = 0
    equal = True
    for _ in track(range(kills), "killing merges", console=console, transient=True):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not (here / ".out.unfinished").exists():
            time.sleep(0.01)  # the package is imported
        time.sleep(moments.uniform(0.0, seconds))
        process.kill()
        process.wait()
        left_parts += (here / ".out.unfinished" / "checkpoint").is_dir()
        if (here / "out").exists():
            too_late += 1
            equal &= digests(here / "out") == expected
            shutil.rmtree(here / "out")
    merge_checkpoint(here / "base", here / "adapter", here / "out")
    return Kills(kills, left_parts, too_late, equal and digests(here / "out") == expected)


def measure(folder: Path, depth: int, rank: int, rounds: int, kills: int, console: Console) -> Case:
    """Make checkpoint and adapter in `folder`, measure, and remove everything.

    Raises:
        RuntimeError: a merge that was gone on with has other bytes than one that was not killed.
    """
    with tempfile.TemporaryDirectory(dir=folder, prefix="merge-checkpoint-") as name:
        here = Path(name)
        make_adapter(here / "adapter", depth, rank)
        make_base(here / "base", depth)
        size = sum(path.stat().st_size for path in (here / "base").iterdir())
        subprocess.run(["sync"], check=True)
        one_round(here, verifies=False)  # memory that the machine has to be given first, files that come from the disk
        bar = track(range(rounds), "rounds", console=console, transient=True)
        found = [one_round(here, verifies=index == 0) for index in bar]
        killed = kill_merges(here, kills, statistics.median(each.merge for each in found), console)
    if not killed.equal:
        raise RuntimeError("a merge that was gone on with has other bytes")
    return case(depth, rank, size, found, killed)


def case(depth: int, rank: int, size: int, rounds: Sequence[Round], kills: Kills) -> Case:
    """What was measured, as the suite has it; `size` is the checkpoint's in bytes."""
    verified = next(each.verified for each in rounds if each.verified is not None)
    own = Measurement(
        tuple(each.merge for each in rounds),
        bytes={"resident": max(each.growth for each in rounds)},
        counts={
            "checkpoint_bytes": size, "verified_seconds": verified, "kills": kills.kills,
            "kills_in_the_middle": kills.left_parts, "kills_after_the_end": kills.too_late,
            "identical_after_kills": int(kills.equal),
        },
    )  # fmt: skip
    copies = {
        "cp": Measurement(tuple(each.copy for each in rounds), counts={"checkpoint_bytes": size}),
        "cp_and_sync": Measurement(tuple(each.copy + each.sync for each in rounds), counts={"checkpoint_bytes": size}),
    }
    settings: dict[str, Setting] = {"kind": KIND, "dtype": "bf16", "model": "llama-3-8b", "layers": depth, "rank": rank}
    return Case(settings, "cp", {**copies, "dual_lora": own})
