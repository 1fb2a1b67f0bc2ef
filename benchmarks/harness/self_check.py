"""Whether this machine, as it is now, shows a difference of 10 % that is known to be there.

Ten and eleven repetitions of one product are timed as all subjects are, by interleaved rounds. However the machine is
loaded, one of them has 1.1 times as much to do.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from rich.console import Console

from .timing import Quartiles, interleaved, ratios

PLANTED = 1.1
SEEN = (1.05, 1.15)
"""Between these the median must be: half the difference to either side."""
_REPETITIONS = {"as it is": 10, "planted": 11}
_ROUNDS = 31
_SIZE = {"cpu": 384, "cuda": 4096}
"""Of the product: a few ms on a core, and on a GPU far more than its launch takes, as a layer's products."""


def self_check(device: torch.device, console: Console | None = None) -> Quartiles:
    """How many times as long the planted subject seems to take, over 31 rounds (some seconds)."""
    size = _SIZE[device.type]
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    operand = torch.randn(size, size, device=device, dtype=dtype)
    product = torch.empty_like(operand)

    def repeated(times: int) -> Callable[[], None]:
        def run() -> None:
            for _ in range(times):
                torch.mm(operand, operand, out=product)

        return run

    subjects = {name: repeated(times) for name, times in _REPETITIONS.items()}
    show = console is not None and console.is_terminal
    seconds = interleaved(subjects, rounds=_ROUNDS, warmup=2, device=device, console=console, show=show)
    return ratios(seconds, "planted", "as it is")


def warning(seen: Quartiles) -> str | None:
    """What is to be said of results beside such a self-check; None where it saw the difference."""
    if SEEN[0] <= seen.median <= SEEN[1]:
        return None
    return (
        f"SELF-CHECK FAILED: of a planted difference of {PLANTED:g} ×, {seen.median:.3f} × was seen (quartiles "
        f"{seen.lower:.3f} and {seen.upper:.3f}; {SEEN[0]:g} to {SEEN[1]:g} is allowed). The machine is too busy or "
        "too unsteady for figures of this run to be trusted within 10 %"
    )
