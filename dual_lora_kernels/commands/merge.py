"""``dual-lora merge``."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import torch

from ..checkpoint_merge import MergeSummary, merge_checkpoint
from .common import Subparsers, byte_bar, ends_in_words

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_EPILOG = """\
example:
  dual-lora merge models/Llama-3-8B runs/adapter models/Llama-3-8B-tuned --verify

The result loads with AutoModelForCausalLM.from_pretrained, where this package is not installed. A merge that was killed
leaves .<OUT>.unfinished beside OUT; the same command goes on with it. Memory stays some hundred MB, however large the
model. Exit status: 0 merged, 1 something does not fit, is damaged or cannot be written, 2 wrong usage, 130 Ctrl-C.
"""


def add(subparsers: Subparsers) -> None:
    """Add the parser."""
    parser = subparsers.add_parser(
        "merge",
        help="merge adapters into a checkpoint on disk, in bounded memory",
        description="Merge adapters into a checkpoint on disk, file by file, and write a plain checkpoint.\n"
        "It has bit for bit the weights that training computed with.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("base", type=Path, metavar="BASE", help="folder of the base model: safetensors, sharded or not")
    parser.add_argument(
        "adapters", type=Path, nargs="+", metavar="ADAPTER",
        help="folder of a saved adapter, this package's or PEFT's; several are merged one after the other",
    )  # fmt: skip
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write; it must be new")
    parser.add_argument(
        "--dtype", choices=_DTYPES, help="cast the base to this first, as from_pretrained(dtype=…) does (its own)"
    )
    parser.add_argument("--verify", action="store_true", help="recompute every weight by another backend, and compare")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT where it is a checkpoint already")
    parser.add_argument("--json", action="store_true", help="what was done as a JSON object")

    @ends_in_words
    def run(arguments: argparse.Namespace) -> int:
        with byte_bar() as progress:
            summary = merge_checkpoint(
                arguments.base, arguments.adapters, arguments.out,
                dtype=_DTYPES.get(arguments.dtype), overwrite=arguments.overwrite, verify=arguments.verify,
                progress=progress,
            )  # fmt: skip
        print(json.dumps(dataclasses.asdict(summary), indent=2) if arguments.json else _in_words(summary))
        return 0

    parser.set_defaults(run=run)


def _in_words(summary: MergeSummary) -> str:
    speed = summary.bytes / max(summary.seconds, 1e-9) / 1e6
    resumed = f", {summary.resumed} of them written before" if summary.resumed else ""
    lines = [
        f"{summary.out}: {summary.files} file{'s' if summary.files != 1 else ''} of weights{resumed}, "
        f"{summary.bytes / 1e6:,.1f} MB in {summary.seconds:.1f} s ({speed:,.0f} MB/s)",
        f"{summary.merged} weights merged by backend '{summary.backend}', {summary.copied} tensors copied",
        *summary.notes,
    ]
    found = summary.verification
    if found is not None:
        alone = " (the only one here)" if found.backend == summary.backend else ""
        others = "none has other bits" if not found.other_bits else (
            f"{found.other_bits:,} have other last bits, all within the rounding of fp32 sums"
        )  # fmt: skip
        lines.append(f"verified by backend '{found.backend}'{alone}: of {found.weights:,} merged weights {others}")
    return "\n".join(lines)
