"""What every benchmark needs: facts about the machine, timing in turns, a table for people and JSON for programs."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from skipstone.plan import write_atomically

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "onnxruntime", "onnx", "onnxscript", "numpy", "triton", "optimum-quanto")
WIDTH = 120  # of printed tables, on any terminal: no figure is cut off


@dataclass(frozen=True)
class Row:
    """One figure of a benchmark.

    Attributes:
        metric: its name.
        value: what was measured.
        baseline: the figure that a ratio compares with, in the unit of the measurement (milliseconds, bytes).
        goal: what was aimed at.
        samples: how many measurements the value is a median of.
        at_most: whether the goal is an upper bound.
    """

    metric: str
    value: float
    baseline: float | None
    goal: float | None
    samples: int
    at_most: bool = False

    @property
    def met(self) -> bool | None:
        """Whether the goal is met; None without a goal."""
        if self.goal is None:
            return None
        return self.value <= self.goal if self.at_most else self.value >= self.goal


@dataclass(frozen=True)
class Samples:
    """Measurements of one system, in seconds, by the number of threads it ran with."""

    by_threads: Mapping[int, Sequence[float]]

    @property
    def best_threads(self) -> int:
        """The number of threads with the smallest median."""
        return min(self.by_threads, key=lambda threads: statistics.median(self.by_threads[threads]))

    @property
    def median(self) -> float:
        """The median at the best number of threads, in seconds."""
        return statistics.median(self.by_threads[self.best_threads])

    @property
    def count(self) -> int:
        """How many measurements that median is over."""
        return len(self.by_threads[self.best_threads])


# One turn of a system with a given number of threads: name of a figure -> seconds.
Turn = Callable[[], Mapping[str, float]]


def take_turns(systems: Mapping[tuple[str, int], Turn], rounds: int) -> dict[str, Samples]:
    """Run every system in every round, after a first round that is not counted.

    Systems that compete must see the same machine: a slow minute then slows all of them. The order is reversed in every
    second round, so that none always follows the same neighbour.

    Args:
        systems: what to run, by name and number of threads.
        rounds: how many rounds to count.
    Returns:
        the measurements by figure.
    """
    seconds: dict[str, dict[int, list[float]]] = {}
    threads_before = torch.get_num_threads()
    try:
        for number in range(rounds + 1):
            order = list(systems.items())
            for (_, threads), turn in reversed(order) if number % 2 else order:
                torch.set_num_threads(threads)
                figures = turn()
                for name, value in figures.items() if number > 0 else ():
                    seconds.setdefault(name, {}).setdefault(threads, []).append(value)
    finally:
        torch.set_num_threads(threads_before)
    return {name: Samples(by_threads) for name, by_threads in seconds.items()}


def timed(action: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds that an action takes, and its result."""
    started = time.perf_counter()
    result = action()
    return time.perf_counter() - started, result


def read_floor(buffer: torch.Tensor, size: float) -> float:
    """Seconds that reading `size` bytes of memory takes, by summing a buffer much larger than the caches."""
    seconds, _ = timed(buffer.sum)
    return seconds * size / (buffer.numel() * buffer.element_size())


def device() -> dict[str, Any]:
    """Facts about the machine."""
    facts: dict[str, Any] = {"cpu": _cpu(), "cores": os.cpu_count(), "isa": torch.backends.cpu.get_cpu_capability()}
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the speed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def arguments(name: str, description: str) -> argparse.ArgumentParser:
    """The command line that all benchmarks share."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
    parser.add_argument("--quick", action="store_true", help="fewer samples; ends within 5 minutes on 2 cores")
    parser.add_argument(
        "--json", type=Path, default=RESULTS / f"{name}.json", metavar="FILE", help="where the figures go"
    )
    return parser


def publish(title: str, rows: Sequence[Row], path: Path) -> None:
    """Print the rows as a table and write them as JSON, whole or not at all."""
    Console(width=WIDTH).print(_table(title, rows))
    plain = [{key: value for key, value in asdict(row).items() if key != "at_most"} for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"device": device(), "versions": versions(), "rows": plain}
    write_atomically(path, f"{json.dumps(content, indent=2)}\n".encode())
    print(f"written to {path}")


def _table(title: str, rows: Sequence[Row]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("metric", no_wrap=True)
    for heading in ("value", "baseline", "goal", "samples"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("met")
    for row in rows:
        goal = "" if row.goal is None else f"{'<=' if row.at_most else '>='} {row.goal:g}"
        baseline = "" if row.baseline is None else f"{row.baseline:.4g}"
        met = {None: "", True: "yes", False: "no"}[row.met]
        table.add_row(row.metric, f"{row.value:.4g}", baseline, goal, str(row.samples), met)
    return table
