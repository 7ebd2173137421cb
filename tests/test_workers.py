"""Systems of benchmarks in processes of their own."""

from __future__ import annotations

import os
from functools import partial

import pytest

from benchmarks.harness import Row
from benchmarks.workers import Crew, System

FACT = Row("error", 0.5, None, 1.5, 9, at_most=True)


def counting(seconds: float) -> System:
    """A system whose turns tell the process that it is in and how often it was asked."""
    asked: list[None] = []

    def turn() -> dict[str, float]:
        asked.append(None)
        return {"process": os.getpid(), "seconds": seconds * len(asked)}

    return System({"x": turn}, 7.0, [FACT])


def failing() -> System:
    """A system that does not get ready."""
    raise SystemExit("wrong logits")


def test_systems_are_in_processes_of_their_own(capfd: pytest.CaptureFixture[str]) -> None:
    with Crew() as crew:
        first = crew.ready({"one": partial(counting, 1.0), "none": failing})
        assert list(first) == ["one"] and (first["one"].size, list(first["one"].facts)) == (7.0, [FACT])
        second = crew.ready({"none": failing, "two": partial(counting, 2.0), "one": partial(counting, 9.0)})
        assert second["one"] is first["one"] and set(second) == {"one", "two"}
        ((key, turn),), ((_, other),) = (second[name].turns().items() for name in ("one", "two"))
        assert key == ("x", 1)
        given = [turn(), other(), turn()]
    assert [each["seconds"] for each in given] == [1.0, 2.0, 2.0]
    assert given[0]["process"] == given[2]["process"] != given[1]["process"]
    assert os.getpid() not in {each["process"] for each in given}
    assert capfd.readouterr().err.count("wrong logits") == 1
