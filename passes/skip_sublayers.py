"""Leave out sublayers of the residual stream: attention, FFN, or whole layers."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from skipstone.ir.errors import InvalidPlan, Unsupported
from skipstone.ir.program import Program
from skipstone.ir.stream import Sublayer, SublayerKind, find_stream, original_layer, original_layers
from skipstone.ir.surrogate import sizes
from skipstone.passes.base import Pass, Remark

aten = torch.ops.aten

_CASTS = (aten._to_copy.default, aten.to.dtype, aten.clone.default, aten.dropout.default)


@dataclass(frozen=True)
class SkipSublayers(Pass):
    """Remove the branches of chosen sublayers; the stream passes them by.

    The branch goes with its norm and its weights (weights that are used elsewhere stay). In a post-norm model the norm
    belongs to the stream and stays. So does what multiplies the stream on its way past the branch: a factor, or the
    matrix by which hyper-connections mix their streams, which leaves ``X' = H_res X``. Skip to the Good Part (arXiv
    2603.07475), per sublayer.

    Attributes:
        attention: layers that lose their attention.
        ffn: layers that lose their FFN.
        layers: layers that lose every sublayer.
        paths: module paths; every sublayer at or below one of them goes.
    """

    name: ClassVar[str] = "skip_sublayers"

    attention: tuple[int, ...] = ()
    ffn: tuple[int, ...] = ()
    layers: tuple[int, ...] = ()
    paths: tuple[str, ...] = ()

    def check(self, program: Program) -> None:
        """See `Pass.check`."""
        chosen = self.sites(program)
        if chosen and len(chosen) == len(find_stream(program).sublayers):
            raise InvalidPlan(
                "the plan skips every sublayer of the model; nothing would be left of it.",
                hint="Leave at least one layer.",
            )

    def sites(self, program: Program) -> tuple[Sublayer, ...]:
        """The sublayers that this plan entry names, in order.

        Raises:
            InvalidPlan: a layer out of range, a layer without such a sublayer, or a path that names none.
        """
        stream = find_stream(program)
        layers = original_layers(program, stream)
        chosen: set[int] = set()
        for field, kinds in (("attention", [SublayerKind.ATTENTION]), ("ffn", [SublayerKind.FFN]), ("layers", None)):
            for layer in getattr(self, field):
                if not 0 <= layer < layers:
                    raise InvalidPlan(
                        f"skip_sublayers: {field} names layer {layer}, but the model has layers 0 to {layers - 1}.",
                        hint=f"The nearest is {min(max(layer, 0), layers - 1)}.",
                    )
                own = [s for s in stream.sublayers if original_layer(s) == layer]
                found = [s.index for s in own if kinds is None or s.kind in kinds]
                if not found:
                    raise InvalidPlan(f"skip_sublayers: layer {layer} has no {field} sublayer.")
                chosen |= set(found)
        for path in self.paths:
            found = [s.index for s in stream.sublayers if s.path == path or s.path.startswith(path + ".")]
            if not found:
                close = difflib.get_close_matches(path, [s.path for s in stream.sublayers], n=1, cutoff=0.0)
                raise InvalidPlan(
                    f"skip_sublayers: no sublayer has the module path {path!r}.",
                    hint=f"The nearest is {close[0]!r}." if close else "",
                )
            chosen |= set(found)
        return tuple(s for s in stream.sublayers if s.index in chosen)

    def rewrite(self, program: Program) -> list[Remark]:
        """See `Pass.rewrite`."""
        chosen = self.sites(program)
        before = program.weight_bytes()
        for add, other in bypassed(chosen).items():
            add.replace_all_uses_with(other)
        program.recompile()
        saved = before - program.weight_bytes()
        remarks = [self.applied(s.path, f"{s.kind} of layer {original_layer(s)} skipped") for s in chosen]
        if not remarks:
            return [self.missed("model", "the plan entry names no sublayer")]
        return [*remarks, self.applied("model", f"{saved:,} bytes of weights gone", weight_bytes=saved)]


def bypassed(sublayers: Iterable[Sublayer]) -> dict[fx.Node, fx.Node]:
    """The additions that fall away without these sublayers, each with the value of the graph that takes its place.

    Raises:
        Unsupported: a branch goes somewhere else than into additions to the stream, or changes the stream's form.
    """
    gone: dict[fx.Node, Sublayer] = {}  # values that are no longer there, and the sublayer that they came from
    instead: dict[fx.Node, fx.Node] = {}
    pending = [(sublayer.branch, sublayer) for sublayer in sublayers]
    while pending:
        node, sublayer = pending.pop()
        gone[node] = sublayer
        for user in node.users:
            if user.target in _CASTS:
                pending.append((user, sublayer))
                continue
            other = _other_operand(user, node, sublayer)
            if other in gone:  # both branches of a sum of two
                instead.pop(user, None)
                pending.append((user, sublayer))
            else:
                instead[user] = other
    return {add: _resolved(other, instead) for add, other in instead.items()}


def _other_operand(add: fx.Node, branch: fx.Node, sublayer: Sublayer) -> fx.Node:
    operands = add.args[:2]
    if add.target is not aten.add.Tensor or not all(isinstance(operand, fx.Node) for operand in operands):
        raise Unsupported(
            f"skipping a sublayer whose result feeds {add.name} ({add.target})",
            where=sublayer.path,
            hint="Only branches that are added to the stream can be left out exactly.",
        )
    first, second = operands
    if add.kwargs.get("alpha", 1) != 1 and first is branch:
        raise Unsupported("skipping a branch beside a scaled stream", where=sublayer.path)
    other: fx.Node = second if first is branch else first  # type: ignore[assignment]
    if sizes(other) != sizes(add) or other.meta["val"].dtype != add.meta["val"].dtype:
        raise Unsupported(
            f"skipping a sublayer whose result gives the stream another shape or dtype at {add.name}",
            where=sublayer.path,
            hint="Leave it in, or expand or cast the stream before the addition.",
        )
    return other


def _resolved(node: fx.Node, instead: Mapping[fx.Node, fx.Node]) -> fx.Node:
    """What stands for a value in the end: the addition that takes another's place may itself fall away."""
    while node in instead:
        node = instead[node]
    return node
