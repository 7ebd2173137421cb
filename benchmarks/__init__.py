"""Benchmarks: `python -m benchmarks.NAME [--quick] [--json FILE]` from the repository root.

Systems take turns in one process. A thread pool that spins while it waits would take the cores from whoever's turn it
is, so OpenMP is told to sleep, before anything loads it.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
