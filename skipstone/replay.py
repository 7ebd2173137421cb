"""Running a program again and again with different sublayers left out, each time only from the first difference on.

The values that cross the beginning of a sublayer that may go are kept: the stream, and what the program computes once
for all layers (rotary angles, masks). A set of sublayers then costs the part of the program behind the first sublayer
in which it differs from the set whose values are kept. What is kept decides the time alone, never the result: a value
that is not there is computed.

For N sublayers that run one after another, the kept stream takes about ``N * tokens * hidden * itemsize`` bytes, where
N is twice the number of layers; a sublayer that is left out keeps nothing, its stream being the one before.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor, fx

from skipstone.ir.program import Program
from skipstone.ir.stream import ResidualStream
from skipstone.passes.skip_sublayers import bypassed


class Evaluator(fx.Interpreter):
    """Computes chosen values of a graph from known ones, and nothing that they do not need."""

    def __init__(self, program: Program) -> None:
        super().__init__(program.module, garbage_collect_values=False)
        self.extra_traceback = False  # it would put the node into the message of our own errors
        self.position = {node: place for place, node in enumerate(program.graph.nodes)}

    @torch.no_grad()
    def compute(
        self,
        wanted: Collection[fx.Node],
        known: Mapping[fx.Node, Any],
        instead: Mapping[fx.Node, fx.Node] | None = None,
    ) -> dict[fx.Node, Any]:
        """The values of nodes.

        Args:
            wanted: the nodes.
            known: values of nodes, those of all placeholders that are needed among them.
            instead: nodes that are not computed, and the node whose value each takes.
        """
        instead = instead or {}
        order = sorted(self.needed(wanted, known, instead), key=self.position.__getitem__)
        left = Counter(operand for node in order for operand in _operands(node, instead))
        self.env = dict(known)
        for node in order:
            self.env[node] = self.env[instead[node]] if node in instead else self.run_node(node)
            for operand in _operands(node, instead):
                left[operand] -= 1
                if not left[operand] and operand not in wanted:
                    del self.env[operand]
        values = {node: self.env[node] for node in wanted}
        self.env = {}
        return values

    def needed(
        self, wanted: Iterable[fx.Node], known: Collection[fx.Node], instead: Mapping[fx.Node, fx.Node]
    ) -> set[fx.Node]:
        """The nodes to compute for `wanted`."""
        found: set[fx.Node] = set()
        pending = list(wanted)
        while pending:
            node = pending.pop()
            if node not in found and node not in known:
                found.add(node)
                pending += _operands(node, instead)
        return found


class Replay:
    """A program over fixed inputs, with sublayers left out.

    Args:
        program: without a cache.
        stream: its residual stream.
        inputs: for each batch, the program's inputs in the order of its ports.
        optional: numbers (`Sublayer.index`) of the sublayers that may be left out.
        result: the node whose value is asked for; it depends on the end of the stream.

    Attributes:
        passes: work done so far, in passes of the whole program over all batches; part of a pass counts by its share
            of the sublayers.
    """

    def __init__(
        self,
        program: Program,
        stream: ResidualStream,
        inputs: Sequence[Sequence[Tensor]],
        optional: Iterable[int],
        result: fx.Node,
    ) -> None:
        self.stream, self.result, self.passes = stream, result, 0.0
        self.evaluator = Evaluator(program)
        position = self.evaluator.position
        self.start = {each.index: min(map(position.__getitem__, each.nodes)) for each in stream.sublayers}
        cuts = sorted({*map(self.start.__getitem__, optional), position[stream.exit] + 1})
        self.kept = [node for node in program.nodes() if self._crosses(node, cuts)]
        placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
        self.values: list[dict[fx.Node, Any]] = [dict(zip(placeholders, each, strict=True)) for each in inputs]
        self.base: frozenset[int] | None = None

    def _crosses(self, node: fx.Node, cuts: Sequence[int]) -> bool:
        """Whether a value made before one of the cuts is used behind it."""
        position = self.evaluator.position
        place = bisect_right(cuts, position[node])
        return place < len(cuts) and cuts[place] <= max((position[user] for user in node.users), default=0)

    def rebase(self, skipped: Set[int]) -> None:
        """Keep the values of the program without these sublayers; sets near this one are cheap from now on."""
        begin, instead = self._begin(skipped)
        used = self.evaluator.needed([self.result], (), instead)
        later = [node for node in self.kept if self.evaluator.position[node] >= begin and node in used]
        for batch, values in enumerate(self.values):
            known = self._before(values, begin)
            self.values[batch] = known | self.evaluator.compute(later, known, instead)
        self.base = frozenset(skipped)

    def results(self, skipped: Set[int]) -> Iterator[Tensor]:
        """The result for each batch without these sublayers."""
        begin, instead = self._begin(skipped)
        for values in self.values:
            yield self.evaluator.compute([self.result], self._before(values, begin), instead)[self.result]

    def _begin(self, skipped: Set[int]) -> tuple[int, dict[fx.Node, fx.Node]]:
        """Where a set first differs from the base, and the additions that fall away; the work is counted."""
        begin = 0
        if self.base is not None:
            differing = self.base.symmetric_difference(skipped)
            begin = min((self.start[index] for index in differing), default=len(self.evaluator.position))
        self.passes += sum(start >= begin for start in self.start.values()) / len(self.start)
        return begin, bypassed([each for each in self.stream.sublayers if each.index in skipped])

    def _before(self, values: Mapping[fx.Node, Any], begin: int) -> dict[fx.Node, Any]:
        """The values that do not depend on the sublayers from `begin` on."""
        position = self.evaluator.position
        return {node: value for node, value in values.items() if position[node] < begin or node.op == "placeholder"}


def _operands(node: fx.Node, instead: Mapping[fx.Node, fx.Node]) -> Sequence[fx.Node]:
    return (instead[node],) if node in instead else node.all_input_nodes
