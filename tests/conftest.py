"""Fixtures and rules that hold for every test."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

TEST_DATA = "SKIPSTONE_TEST_DATA"


def pytest_configure() -> None:
    """Give torch two threads, or one beside other workers, whatever the size of the machine."""
    alone = os.environ.get("PYTEST_XDIST_WORKER") is None
    torch.set_num_threads(min(2 if alone else 1, os.cpu_count() or 1))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests for CUDA devices where there is none."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test draws the same random numbers, alone or in any order."""
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For files whose models are so small that they only lose time to a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of test data outside the repository."""
    folder = os.environ.get(TEST_DATA)
    if not folder:
        pytest.skip(f"needs test data outside the repository: set {TEST_DATA} to its folder")
    path = Path(folder)
    if not path.is_dir():
        pytest.fail(f"{TEST_DATA} names {folder}, which is no folder")
    return path
