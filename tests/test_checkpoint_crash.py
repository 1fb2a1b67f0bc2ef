"""Saving beside crashes, readers and other savers: what is loaded is always one save whole.

``DUAL_LORA_CRASHES=100`` repeats the random ones as often; the default is short.
"""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from pathlib import Path

from dual_lora_kernels import save_dual_lora

from .saving import ADAPTERS, processes, running, save_in_turn, save_one, saved

REPETITIONS = int(os.environ.get("DUAL_LORA_CRASHES", "40"))


def test_killing_a_save_loses_nothing(tmp_path: Path) -> None:
    """SIGKILL at random moments, over two or more saves (8 to 20 ms each on the disk that was tried)."""
    loaded: Counter[int] = Counter()
    interrupted = 0
    moments = random.Random(0)
    save_dual_lora(ADAPTERS[0], tmp_path)
    for _ in range(REPETITIONS):
        is_saving = processes.Event()
        with running(save_in_turn, tmp_path, is_saving):
            assert is_saving.wait(60)
            time.sleep(moments.uniform(0.0, 0.05))
        interrupted += len(list(tmp_path.iterdir())) > 2
        loaded[saved(tmp_path)] += 1
    print(f"{REPETITIONS} kills, {interrupted} while a file was written: {dict(loaded)} loaded, none lost")


def test_reading_beside_a_writer(tmp_path: Path) -> None:
    """At least until both of its adapters were read, however slow the disk."""
    loaded: Counter[int] = Counter()
    is_saving = processes.Event()
    with running(save_in_turn, tmp_path, is_saving) as writer:
        assert is_saving.wait(60)
        deadline = time.monotonic() + 60
        while loaded.total() < REPETITIONS or len(loaded) < 2:
            assert writer.is_alive()
            assert time.monotonic() < deadline
            loaded[saved(tmp_path)] += 1
    print(f"{loaded.total()} reads beside a writer: {dict(loaded)}, no mixture")


def test_of_two_savers_one_wins(tmp_path: Path) -> None:
    loaded: Counter[int] = Counter()
    for _ in range(max(2, REPETITIONS // 5)):
        start = processes.Event()
        with running(save_one, tmp_path, 0, 3, start) as one, running(save_one, tmp_path, 1, 3, start) as other:
            start.set()
            for process in (one, other):
                process.join(60)
                assert process.exitcode == 0
        loaded[saved(tmp_path)] += 1
        assert len(list(tmp_path.iterdir())) == 2
    print(f"{loaded.total()} pairs of savers: {dict(loaded)} won")
