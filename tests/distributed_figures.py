"""How far training on several processes is from training on one, as a table: ``python -m tests.distributed_figures``.

The tests bound what is printed here (tests/test_distributed.py).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.progress import track

from benchmarks.harness.environment import environment, sentence

from . import distributed_cases as cases
from .processes import Processes

STEPS = 20
FOUR = ("ddp", "fsdp", "fsdp tp")


def main() -> None:
    """Print the table, and write it to a file if asked."""
    parser = argparse.ArgumentParser(prog="tests.distributed_figures", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="file for the table")
    out = parser.parse_args().out
    lines = [
        "# Training on several processes against one",
        "",
        f"A Llama of 2 layers, {STEPS} steps of AdamW, gloo. Free run: the largest difference of the loss, which is "
        "about 4.1, over the run; one sign of Q that a last bit turns moves it by 0.01. Same state: the largest "
        "relative differences of the loss, and of any factor's gradient in norm, from the state that the single "
        "process has in every fourth step. In roundings of the base's dtype.",
        "",
        "| processes, layout, base | free run | loss, roundings | gradients, roundings |",
        "| --- | ---: | ---: | ---: |",
    ]
    rows = [(count, name) for count, names in ((2, tuple(cases.LAYOUTS)), (4, FOUR)) for name in names]
    pools = {count: Processes(count) for count in (2, 4)}
    for count, name in track(rows, description="layouts"):
        for dtype in (torch.float32, torch.bfloat16):
            result = pools[count].run(cases.train, name, dtype, STEPS, {})[0]
            free = max(abs(a - b) for a, b in zip(result["losses"], result["expected"], strict=True))
            loss, gradients = (result[key] / torch.finfo(dtype).eps for key in ("loss", "gradients"))
            base = str(dtype).removeprefix("torch.")
            lines.append(f"| {count}, {name}, {base} | {free:.1e} | {loss:.2f} | {gradients:.1f} |")
    for pool in pools.values():
        pool.end()
    lines += ["", sentence(environment(torch.device("cpu")))]
    text = "\n".join(lines) + "\n"
    print(text)
    if out is not None:
        out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
