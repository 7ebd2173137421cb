"""Systems in processes of their own: they get ready at the same time, and are then timed one after another.

What takes minutes to compile takes as long for many systems as for one where there are enough cores, and one that fails
takes none of the others with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.harness import Row, Turn


@dataclass(frozen=True)
class System:
    """What a process has made.

    Attributes:
        turns: by name.
        size: bytes that it reads in a step at least.
        facts: figures that were found meanwhile.
    """

    turns: Mapping[str, Turn]
    size: float = 0.0
    facts: Sequence[Row] = ()


Build = Callable[[], System]
"""Makes a system; a function of a module, or a `partial` of one, for it goes to another process."""


class Worker:
    """A system in a process of its own, which ends with this one.

    Attributes:
        name: of the system.
        size, facts: of the system, once it is ready.
    """

    def __init__(self, name: str, build: Build) -> None:
        self.name = name
        self.size: float = 0.0
        self.facts: Sequence[Row] = ()
        self._turns: Sequence[str] = ()
        context = get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, build))
        self._process.start()
        other.close()

    def is_ready(self) -> bool:
        """Wait until the system can be timed; False if its process has ended instead."""
        if not self._turns:
            try:
                self._turns, self.size, self.facts = self._connection.recv()
            except EOFError:
                return False
        return True

    def turns(self) -> dict[tuple[str, int], Turn]:
        """Turns of a ready system, each with one thread."""
        return {(name, 1): lambda name=name: self._ask(name) for name in self._turns}  # type: ignore[misc]

    def _ask(self, name: str) -> Mapping[str, float]:
        self._connection.send(name)
        figures: Mapping[str, float] = self._connection.recv()
        return figures

    def close(self) -> None:
        """End the process, once it is done with what it does."""
        self._connection.close()
        self._process.join()


def _serve(connection: Connection[Any, Any], build: Build) -> None:
    system = build()
    connection.send((tuple(system.turns), system.size, tuple(system.facts)))
    while True:
        try:
            name = connection.recv()
        except EOFError:
            return
        connection.send(system.turns[name]())


class Crew:
    """Workers by the name of their system, which are started once and kept until the crew's block ends."""

    def __init__(self) -> None:
        self._running: dict[str, Worker] = {}

    def begin(self, builds: Mapping[str, Build]) -> None:
        """Start those that do not run yet, without waiting for them."""
        for name, build in builds.items():
            if name not in self._running:
                self._running[name] = Worker(name, build)

    def ready(self, builds: Mapping[str, Build]) -> dict[str, Worker]:
        """The workers of those that get ready; they are started if they do not run yet."""
        self.begin(builds)
        return {name: self._running[name] for name in builds if self._running[name].is_ready()}

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._running.values():
            worker.close()
