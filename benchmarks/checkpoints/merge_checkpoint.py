"""Merging into a checkpoint of gigabytes: speed beside ``cp`` of the same files, memory, and kills at random moments.

    python -m benchmarks.checkpoints.merge_checkpoint --folder FOLDER

The checkpoint has some of a Llama 3 8B's layers in bf16, a file each, and the adapter all of their linear layers. Both
are made in a folder of their own in FOLDER, with room for three copies, and removed. ``cp`` and merges take turns, each
in a process of its own, and a ratio compares times of one round. A merge ends with all on the disk, ``cp`` with all in
the system's cache; ``cp`` followed by ``sync`` is timed as well. Then merges are killed (SIGKILL) at moments drawn
evenly over a merge's time, each going on with what the one before has left, until the last may end.
"""

from __future__ import annotations

import argparse
import dataclasses
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

import torch
from rich.console import Console
from rich.progress import track

from dual_lora_kernels import merge_checkpoint

from ..harness import report
from ..harness.environment import environment, sentence
from ..harness.resident_memory import resident_growth
from .synthetic import make_adapter, make_base

STEM = "cpu_merge_checkpoint"
HEADINGS = ("quantity", "value")
_MEGABYTE = 1e6


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


def kill_merges(here: Path, kills: int, seconds: float) -> Kills:
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
    for _ in track(range(kills), "killing merges"):
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


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoints.merge_checkpoint", description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="where to make the checkpoint, with room for three")
    parser.add_argument("--depth", type=int, default=10, help="the model's layers, of 436 MB each (10)")
    parser.add_argument("--rank", type=int, default=16, help="r1 and r2 (16)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--out", type=Path, default=report.RESULTS)
    options = parser.parse_args(arguments)
    about = environment(torch.device("cpu"))
    console = Console()
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="merge-checkpoint-") as name:
        here = Path(name)
        make_adapter(here / "adapter", options.depth, options.rank)
        make_base(here / "base", options.depth)
        size = sum(path.stat().st_size for path in (here / "base").iterdir())
        subprocess.run(["sync"], check=True)
        one_round(here, verifies=False)  # memory that the machine has to be given first, files that come from the disk
        rounds = [one_round(here, verifies=index == 0) for index in track(range(options.rounds), "rounds")]
        kills = kill_merges(here, options.kills, statistics.median(each.merge for each in rounds))
    cells = _cells(size, rounds, kills)
    title = f"Merging into a checkpoint of {options.depth} files"
    report.print_table(title, HEADINGS, cells, console)
    settings = {name: getattr(options, name) for name in ("depth", "rank", "rounds", "kills")}
    document = {
        "settings": settings,
        "environment": about,
        "bytes": size,
        "rounds": [dataclasses.asdict(each) for each in rounds],
        "kills": dataclasses.asdict(kills),
    }
    report.write(options.out, STEM, document, [f"# {title}", report.markdown_table(HEADINGS, cells), sentence(about)])
    if not kills.equal:
        sys.exit("a merge that was gone on with has other bytes")


def _cells(size: int, rounds: Sequence[Round], kills: Kills) -> list[tuple[str, str]]:
    verified = next(each.verified for each in rounds if each.verified is not None)
    copy = [each.copy for each in rounds]
    synced = [each.copy + each.sync for each in rounds]
    merged = [each.merge for each in rounds]
    to_copy = statistics.median(one / own for one, own in zip(copy, merged, strict=True))
    to_synced = statistics.median(one / own for one, own in zip(synced, merged, strict=True))
    speeds = {"cp": copy, "cp and sync": synced, "merge": merged, "merge with --verify": [verified]}
    return [
        ("checkpoint, MB", f"{size / _MEGABYTE:,.0f}"),
        *((f"{name}, MB/s", f"{size / _MEGABYTE / statistics.median(times):,.0f}") for name, times in speeds.items()),
        ("merge's speed / cp's", f"{to_copy:.2f}"),
        ("merge's speed / that of cp and sync", f"{to_synced:.2f}"),
        ("largest memory above the start, MB", f"{max(each.growth for each in rounds) / _MEGABYTE:,.0f}"),
        ("kills: in the middle, after the end", f"{kills.left_parts}, {kills.too_late}"),
        ("bytes after all kills", "identical" if kills.equal else "different"),
    ]


if __name__ == "__main__":
    main()
