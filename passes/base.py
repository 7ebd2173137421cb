"""What a pass is, what it says, and how passes are run one after another."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import ClassVar

from skipstone.ir.errors import InvalidPlan
from skipstone.ir.printer import readable
from skipstone.ir.program import Program, Record
from skipstone.ir.verify import verify


class Status(StrEnum):
    """What became of a place that a pass looked at."""

    APPLIED = "applied"
    MISSED = "missed"
    REFUSED = "refused"


@dataclass(frozen=True)
class Remark:
    """One sentence of a pass about one place.

    Attributes:
        pass_name: who says it.
        status: applied, missed (nothing to do, or no match) or refused (it would not be exact).
        where: module path, slot or node.
        why: the reason, for people.
        numbers: figures that go with it, e.g. bytes saved.
    """

    pass_name: str
    status: Status
    where: str = ""
    why: str = ""
    numbers: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        parts = [f"{self.pass_name}: {self.status}", self.where, self.why]
        return " | ".join(part for part in parts if part)


@dataclass(frozen=True)
class Pass:
    """A rewrite. Its dataclass fields are its place in a Plan; it holds no other state.

    `rewrite` changes the program it is given and returns remarks; `ensures` then looks at the result. The pipeline
    gives every pass a copy, so that a pass that fails leaves its input as it was.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1

    def check(self, program: Program) -> None:
        """Refuse, before anything is changed, what cannot be done on this program.

        Raises:
            InvalidPlan: a field does not fit the program.
            Unsupported: it would not be exact.
        """

    def rewrite(self, program: Program) -> list[Remark]:
        """Change `program` in place and say what was done."""
        raise NotImplementedError

    def ensures(self, program: Program) -> None:
        """Raise InternalError when the result is not what the pass promises."""

    def behind_prompts(self) -> Pass | None:
        """What does the same to the programs that go on behind prompts; None where `rewrite` has just made them."""
        return self

    def applied(self, where: str, why: str = "", **numbers: float) -> Remark:
        """A remark of this pass: something was done."""
        return Remark(self.name, Status.APPLIED, where, why, numbers)

    def missed(self, where: str, why: str) -> Remark:
        """A remark of this pass: there was nothing to do."""
        return Remark(self.name, Status.MISSED, where, why)

    def refused(self, where: str, why: str) -> Remark:
        """A remark of this pass: it would not have been exact."""
        return Remark(self.name, Status.REFUSED, where, why)


@dataclass(frozen=True)
class Pipeline:
    """Passes in order.

    Attributes:
        passes: what to run.
        strict: verify the program after every pass, and treat a pass that applied nowhere as an error.
        stop_after: name of the last pass to run, to find the one that breaks a model by bisection.
    """

    passes: Sequence[Pass]
    strict: bool = True
    stop_after: str | None = None

    def __post_init__(self) -> None:
        names = [each.name for each in self.passes]
        if self.stop_after is not None and self.stop_after not in names:
            raise InvalidPlan(
                f"stop_after names no pass of this pipeline: {self.stop_after!r}.", hint=f"It has {names}."
            )

    def run(self, program: Program) -> Program:
        """The rewritten program; the one given is left as it was.

        Raises:
            InvalidPlan: in strict mode, a pass of the plan applied nowhere.
            Malformed: a pass broke an invariant.
        """
        for each in self.passes:
            program = run_pass(each, program, self.strict)
            if each.name == self.stop_after:
                break
        return program


def run_pass(each: Pass, program: Program, strict: bool = True) -> Program:
    """Run one pass on a copy of `program`, verify the result, and enter it into the history.

    What goes on with a sequence behind its prompt (`Program.continuations`) gets the rewrite of `behind_prompts`.
    """
    started = time.perf_counter()
    each.check(program)
    before = sum(1 for _ in program.nodes())
    result = program.copy()
    remarks = each.rewrite(result)
    result.recompile()
    if (behind := each.behind_prompts()) is not None:
        result.continuations = tuple(run_pass(behind, part, strict) for part in result.continuations)
    each.ensures(result)
    if strict:
        verify(result, after=each.name)
        if not _mandatory(each) and not any(remark.status is Status.APPLIED for remark in remarks):
            raise InvalidPlan(
                f"pass {each.name} applied nowhere: {'; '.join(map(str, remarks)) or 'no match'}.",
                hint="Remove it from the plan, or call with strict=False.",
            )
    after = sum(1 for _ in result.nodes())
    seconds = time.perf_counter() - started
    result.history.append(Record(each.name, tuple(remarks), before, after, seconds, readable(result)))
    return result


def _mandatory(each: Pass) -> bool:
    """Passes that run on every program, whether or not they find something to do."""
    return each.name in ("cleanup", "condition_kv", "kv_cache", "behind_prompt")


def summary(remarks: Iterable[Remark]) -> dict[Status, int]:
    """How many remarks there are of each status."""
    counts = dict.fromkeys(Status, 0)
    for remark in remarks:
        counts[remark.status] += 1
    return counts
