"""``python -m benchmarks PRESET``."""

from __future__ import annotations

import os
import sys

# Threads that spin while they wait would take the time of those that work; OpenMP reads this as PyTorch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from .command import main

sys.exit(main())
