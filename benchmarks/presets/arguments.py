"""Types of the command line's arguments, and an option that several presets have."""

from __future__ import annotations

import argparse

import torch

from ..harness.environment import DTYPE_NAMES

DTYPES = ("fp32", "bf16", "fp16")
"""Of layers and models."""


def count(text: str) -> int:
    """A positive integer."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a positive integer")
    return int(text)


def shape(text: str) -> tuple[int, int]:
    """``4096x11008`` → (out_features, in_features)."""
    rows, _, columns = text.partition("x")
    if not (rows.isdecimal() and columns.isdecimal() and int(rows) and int(columns)):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected OUTxIN such as 4096x11008")
    return int(rows), int(columns)


def dtype(text: str) -> str:
    """``fp32``, ``bf16`` or ``fp16``, from that or PyTorch's own name."""
    names = {str(value).removeprefix("torch."): name for name, value in DTYPE_NAMES.items()}
    name = names.get(text, text)
    if name not in DTYPES:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected one of {', '.join(DTYPES)}")
    return name


def device(text: str) -> torch.device:
    """``cpu``, ``cuda`` or ``cuda:1``, where it is there."""
    try:
        found = torch.device(text)
    except RuntimeError:
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected cpu or cuda")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(f"got {text!r}, and PyTorch sees {torch.cuda.device_count()} GPUs")
    return found


def add_device(parser: argparse.ArgumentParser) -> None:
    """``--device``, a `torch.device`."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=device, default=default, help="cpu or cuda (here: %(default)s)")
