"""How fast a device is: the three numbers that the cost model needs, measured once and remembered."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch

READ_BYTES = 256 * 2**20  # larger than any cache
MATRIX = 1024
REPEATS = 7


@dataclass(frozen=True)
class DeviceProfile:
    """What a device can do at best.

    Attributes:
        bandwidth: bytes read from memory a second.
        flops_per_second: float32 floating point operations of a matrix product a second.
        launch_gap: seconds that starting one operator takes.
    """

    bandwidth: float
    flops_per_second: float
    launch_gap: float


def measure_cpu(threads: int) -> DeviceProfile:
    """The profile of this machine's CPU with `threads` threads.

    Measured on first use (about a second), then read from `cache_directory()`.
    """
    file = cache_directory() / f"cpu-{_processor()}-{os.cpu_count()}-torch{torch.__version__}-{threads}.json"
    with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):  # absent, cut off, or of another version
        return DeviceProfile(**json.loads(file.read_text()))
    profile = _measure(threads)
    with contextlib.suppress(OSError):  # without a writable directory it is measured again next time
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, suffix=".tmp", delete=False) as partial:
            partial.write(json.dumps(asdict(profile)))
        os.replace(partial.name, file)
    return profile


def cache_directory() -> Path:
    """Where measurements are kept: ``$XDG_CACHE_HOME/skipstone`` or ``~/.cache/skipstone``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "skipstone"


def _processor() -> str:
    """A name of this machine's processor that can stand in a file name."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2] for line in lines if line.startswith("model name"))
    return "-".join("".join(letter if letter.isalnum() else " " for letter in name).split())


def _measure(threads: int) -> DeviceProfile:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            large = torch.ones(READ_BYTES // 4)
            matrix = torch.ones(MATRIX, MATRIX)
            small = torch.ones(16)
            small_steps = 1000
            return DeviceProfile(
                bandwidth=READ_BYTES / _seconds(large.sum),
                flops_per_second=2 * MATRIX**3 / _seconds(lambda: matrix @ matrix),
                launch_gap=_seconds(lambda: [small + small for _ in range(small_steps)]) / small_steps,
            )
    finally:
        torch.set_num_threads(before)


def _seconds(work: Callable[[], object]) -> float:
    """The median time of `work` after one warm-up."""
    work()
    times = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return median(times)
