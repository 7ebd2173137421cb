"""Errors of skipstone, in three families that are never mixed.

* `UserError`: the request is wrong; the message says what, where, and what to do.
* `Unsupported`: the request is fine, but it cannot be done exactly; the message names the feature and the way out.
* `InternalError`: a defect of skipstone itself.
"""

from __future__ import annotations


class SkipstoneError(Exception):
    """Base of everything that skipstone raises on purpose."""


class UserError(SkipstoneError, ValueError):
    """The request itself is wrong. Nothing was changed and nothing was left behind.

    Args:
        problem: what is wrong, in one sentence.
        hint: what to do about it.
    """

    def __init__(self, problem: str, *, hint: str = "") -> None:
        self.problem, self.hint = problem, hint
        super().__init__(f"{problem} {hint}".strip())


class InvalidPlan(UserError):
    """A plan with an unknown field, an index out of range, or a combination that cannot be."""


class InvalidInput(UserError):
    """A model input that the program cannot take: shape, dtype, token id, length."""


class ArtifactError(UserError):
    """A file or directory that cannot be written or is not a complete artifact."""


class Unsupported(SkipstoneError, NotImplementedError):
    """Something that cannot be done exactly, and is therefore not done.

    Args:
        feature: what is not supported, e.g. ``"attention argument 'position_bias'"``.
        where: the module path or graph node at which it stands.
        hint: the way out.
    """

    def __init__(self, feature: str, *, where: str = "", hint: str = "") -> None:
        self.feature, self.where, self.hint = feature, where, hint
        place = f" at {where}" if where else ""
        super().__init__(f"unsupported: {feature}{place}." + (f" {hint}" if hint else ""))


class InternalError(SkipstoneError, RuntimeError):
    """A defect of skipstone, not of its use."""


class Malformed(InternalError):
    """A program broke a numbered invariant of `skipstone.ir.verify`.

    Args:
        rule: number of the invariant.
        why: what does not hold.
        node: name of the graph node.
        after: name of the pass that ran last.
        around: printed lines of the graph around the node.
    """

    def __init__(self, rule: int, why: str, *, node: str = "", after: str = "", around: str = "") -> None:
        self.rule, self.why, self.node, self.after = rule, why, node, after
        place = f" (node {node})" if node else ""
        made_by = f" after pass {after!r}" if after else ""
        super().__init__(f"invariant {rule} does not hold{made_by}{place}: {why}" + (f"\n{around}" if around else ""))
