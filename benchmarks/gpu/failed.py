"""``python -m benchmarks.gpu.failed FOLDER``: whether a part of the GPU session in FOLDER, its ``--out``, failed.

The session itself ends well then: what the other parts measured is worth its document. Exit status: 0 no part failed, 1
some did, 2 there is no session, or more than one.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from .session import FOLDER, STEM


def main(arguments: Sequence[str] | None = None) -> int:
    """Print each failed part with its reason, and return the exit status; 2, by SystemExit."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.failed", description="Which parts failed.")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="the session's --out")
    folder: Path = parser.parse_args(arguments).folder
    pattern = f"*/{FOLDER}/{STEM}.json"
    summaries = list(folder.glob(pattern))
    if len(summaries) != 1:
        parser.error(f"FOLDER: got {str(folder)!r} with {len(summaries)} files {pattern}, expected one")
    parts = json.loads(summaries[0].read_text(encoding="utf-8"))["parts"]
    failed = {key: part["reason"] for key, part in parts.items() if part["status"] == "failed"}
    for key, reason in failed.items():
        print(f"{key} failed: {reason}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
