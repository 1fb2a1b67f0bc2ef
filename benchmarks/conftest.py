"""Settings of ``pytest benchmarks``, the core cases under pytest-benchmark; it is not for the tests."""

from __future__ import annotations

import os

# PyTorch reads it once, when it is imported. Threads that spin make small steps 5 to 20 times slower on busy cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
