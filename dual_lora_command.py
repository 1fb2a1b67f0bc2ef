"""The ``dual-lora`` command: the package's command line, or one line that says why the package cannot be imported.

It stands outside the package, whose import is what may fail.
"""

from __future__ import annotations

import sys


def main() -> int:
    """Run `dual_lora_kernels.cli.main` and return its exit status; 1 where the package cannot be imported."""
    try:
        from dual_lora_kernels.cli import main as run
    except (ImportError, OSError) as error:  # OSError: PyTorch's own libraries cannot be loaded
        print(
            f"dual-lora: the package cannot be imported ({type(error).__name__}: {error}). It needs PyTorch ≥ 2.11 and "
            "safetensors; see README, Install",
            file=sys.stderr,
        )
        return 1
    return run()
