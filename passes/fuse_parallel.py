"""Compute what became parallel as one: wide and grouped products, one attention over the heads of all layers.

`LayerParallel` leaves a copy of every operator for each layer that runs at the same time as others. Here the copies
become single operators over stacked weights (`skipstone.passes.stacked`), and the corrections of the states one product
with a triangular matrix: with A_l = a_l I, and u_l what layer l adds to a_l times the state that it reads,

    h_l' = P [h_0; u],    P[l, 0] = a_1 ... a_l,    P[l, j] = a_{j+1} ... a_l.

Where only the state behind the last layer is read, it is a sum, and the projections in front of that sum are one
projection of all their inputs side by side. Projections that read the same value become one in any model: the queries,
keys and values of an attention, the gate and the rise of an FFN.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from skipstone.ir.dialect import GATE
from skipstone.ir.gates import spared
from skipstone.ir.lanes import START, STATE, Group, Lane, NotAlike, Operator, Pack, align, groups
from skipstone.ir.program import Program, module_path, provenance
from skipstone.ir.stream import PARALLEL
from skipstone.ir.surrogate import COPIES, RESHAPES, SCALINGS, SUMS
from skipstone.passes.base import Pass, Remark
from skipstone.passes.stacked import LINEAR, Stacked, Value
from skipstone.passes.stacked_weights import StackedWeights

aten = torch.ops.aten

_HALF = (torch.bfloat16, torch.float16)
_DIFFERENCES = (aten.sub.Tensor, operator.sub)


@dataclass(frozen=True)
class FuseParallel(Pass):
    """Turn operators that run at the same time into single ones over stacked weights.

    Results differ by rounding alone. Stacks are new tensors beside those of the model; a weight that is nowhere read
    any more is left out of the program. What cannot become one stays as it is, and a remark says why.
    """

    name: ClassVar[str] = "fuse_parallel"

    def rewrite(self, program: Program) -> list[Remark]:
        """See `Pass.rewrite`."""
        weights, remarks = StackedWeights(program, _families(groups(program))), []
        for name in [group.name for group in groups(program)]:
            group = next(each for each in groups(program) if each.name == name)
            where = f"layers {name.start} to {name.stop - 1}, iteration {name.iteration + 1}"
            if len(group.lanes) < 2:
                remarks.append(self.missed(where, "one layer alone"))
                continue
            before = weights.bytes
            try:
                with provenance(program, self.name, like=group.lanes[-1].exit):
                    _Fusion(program, group, weights).run()
            except NotAlike as reason:
                remarks.append(self.refused(where, f"left side by side: {reason}"))
                continue
            made = weights.bytes - before
            remarks.append(self.applied(where, f"{len(group.lanes)} side by side as one", stacked_bytes=made))
        program.recompile()
        for gate in program.nodes(GATE):
            for node in spared(gate):
                gate.prepend(node)  # parts of a trace may stand before the decision
        remarks += self._fuse_siblings(program, weights)
        program.moved = {**program.moved, **weights.moved}
        return remarks or [self.missed("model", "nothing runs side by side")]

    def _fuse_siblings(self, program: Program, weights: StackedWeights) -> list[Remark]:
        """Make one projection of those that read the same value."""
        readers: dict[tuple[Any, bool], list[fx.Node]] = {}
        for node in program.nodes(LINEAR):
            source, *own = node.args
            if all(isinstance(arg, fx.Node) and arg.op == "get_attr" and len(arg.users) == 1 for arg in own):
                readers.setdefault((source, len(own) > 1), []).append(node)
        remarks = []
        for (source, has_bias), nodes in readers.items():
            if len(nodes) < 2 or len({node.meta["val"].dtype for node in nodes}) > 1:
                continue
            before = weights.bytes
            with provenance(program, self.name, like=nodes[0]), program.graph.inserting_before(nodes[0]):
                operands: list[Any] = []
                for index in (1, 2) if has_bias else (1,):
                    packs: Any = [Pack("tensors", (node.args[index],)) for node in nodes]  # type: ignore[arg-type]
                    operands.append(weights.flat(weights.rows(packs)))
                whole, start = program.call(LINEAR, source, *operands), 0
                for node in nodes:
                    size = int(node.meta["val"].shape[-1])
                    part = program.call(aten.slice.Tensor, whole, -1, start, start + size)
                    node.replace_all_uses_with(part)
                    start += size
            paths = ", ".join(module_path(node) for node in nodes)
            remarks.append(self.applied(paths, "one projection", stacked_bytes=weights.bytes - before))
        return remarks


class _Fusion:
    """The fusion of one group.

    Raises:
        NotAlike: its lanes do not do the same.
    """

    def __init__(self, program: Program, group: Group, weights: StackedWeights) -> None:
        self.program, self.group = program, group
        order = {node: place for place, node in enumerate(program.graph.nodes)}
        own = [node for lane in group.lanes for node in (*lane.nodes, *lane.states)]
        self.end = max(own, key=order.__getitem__)
        self.behind = {node for node, place in order.items() if place > order[self.end]}
        self.kinds = [_Kind(program, lanes, weights, group.name.correction) for lanes in _kinds(group).values()]

    def run(self) -> None:
        """Compute the states behind the lanes, and let everything behind the group read these.

        Raises:
            NotAlike: the lanes cannot be computed as one; nothing that the program returns has changed then.
        """
        lanes = self.group.lanes
        read = [any(user in self.behind for state in lane.states for user in state.users) for lane in lanes]
        last_alone = not any(read[:-1]) and all(kind.contributions is not None for kind in self.kinds)
        with self.program.graph.inserting_before(self.end.next):
            result = self._last() if last_alone else self._trace()
            result.meta[PARALLEL] = tuple(
                kind for lane in lanes for node in lane.nodes for kind in node.meta.get(PARALLEL, ())
            )
            casts: dict[torch.dtype, fx.Node] = {}
            for number, lane in enumerate(lanes):
                for old in lane.states if read[number] else ():
                    dtype = old.meta["val"].dtype
                    new = casts.setdefault(dtype, _cast(self.program, result, dtype))
                    if not last_alone:
                        new = self.program.call(aten.select.int, new, 0, number)
                    new.meta |= {key: old.meta.pop(key) for key in (STATE, START) if key in old.meta}
                    old.replace_all_uses_with(new, delete_user_cb=lambda user: user in self.behind)

    def _last(self) -> fx.Node:
        """The state behind the last lane: the one before the first, and all that lanes add to it."""
        state = _cast(self.program, self.group.start, self.kinds[0].dtype)
        for kind in self.kinds:
            state = self.program.call(aten.add.Tensor, state, kind.total())
            state.meta[PARALLEL] = ()
        return state

    def _trace(self) -> fx.Node:
        """The states behind all lanes, along the first axis."""
        if self.group.name.correction == "none":
            return self._in_order([kind.results() for kind in self.kinds])
        changes = self._in_order([kind.changes() for kind in self.kinds])
        factors = {number: factor for kind in self.kinds for number, factor in kind.factors.items()}
        matrix = _products([factors[lane.number] for lane in self.group.lanes])
        name = self.group.name
        label = f"corrections_{name.start}_{name.stop}_{name.stage}_{name.iteration}"
        weight = self.program.add_tensor(label, matrix.to(changes.meta["val"].dtype))
        start = _cast(self.program, self.group.start, changes.meta["val"].dtype)
        first = self.program.call(aten.unsqueeze.default, start, 0)
        values = self.program.call(aten.cat.default, [first, changes], 0)
        axes = "abcdefgh"[: start.meta["val"].ndim]
        return self.program.call(aten.einsum.default, f"lk,k{axes}->l{axes}", [weight, values])

    def _in_order(self, parts: Sequence[fx.Node]) -> fx.Node:
        """The values of all lanes in the order of the layers, from those of lanes that are alike."""
        if len(parts) == 1:
            return parts[0]
        numbered = {
            lane.number: self.program.call(aten.select.int, part, 0, place)
            for kind, part in zip(self.kinds, parts, strict=True)
            for place, lane in enumerate(kind.lanes)
        }
        return self.program.call(aten.stack.default, [numbered[lane.number] for lane in self.group.lanes])


class _Kind:
    """Lanes of a group that are alike, as one.

    Attributes:
        lanes: those.
        dtype: of the corrections.
        factors: what each lane multiplies a change of the stream by, by its number.
        contributions: what lanes add to the stream, if that is all they do to it.

    Raises:
        NotAlike: they are not, or a correction is more than a factor.
    """

    def __init__(self, program: Program, lanes: Sequence[Lane], weights: StackedWeights, correction: str) -> None:
        self.program, self.lanes, self.correction = program, tuple(lanes), correction
        self.operators = align(lanes)
        self.stacked = Stacked(program, self.operators, len(lanes), weights)
        dtype = lanes[0].exit.meta["val"].dtype
        self.dtype = torch.float32 if dtype in _HALF else dtype
        self.path = [] if correction == "none" else self._linear_way()
        self.factors = dict.fromkeys((lane.number for lane in lanes), 1.0)
        adds = all(self._adds(self.operators[place]) for place in self.path)
        if correction == "path":
            self.factors = {lane.number: self._factor(number) for number, lane in enumerate(lanes)}
        elif not adds:
            self.path = []
        self.contributions = self._contributions() if self.path and adds else None

    def _linear_way(self) -> list[int]:
        """The places of the operators that carry what lanes read to what they compute, by sums and factors alone."""
        self.path = []
        for place, each in enumerate(self.operators):
            carried = [arg for arg in each.args if self._carries(arg)]
            if carried and each.target in (*SUMS, *SCALINGS, *COPIES, *RESHAPES):
                self.path.append(place)
        needed = {len(self.operators) - 1}
        for place in reversed(self.path):
            if place in needed:
                needed |= {arg.place for arg in self.operators[place].args if self._carries(arg)}
        way = [place for place in self.path if place in needed]
        if len(self.operators) - 1 not in way:
            raise NotAlike("corrections that are more than a factor")
        return way

    def _adds(self, each: Operator) -> bool:
        """Whether an operator of the linear way leaves a change of the stream as it is."""
        if each.target in (*COPIES, *RESHAPES):
            return True
        left, right = (self._carries(arg) for arg in each.args[:2])
        plain = each.target not in _DIFFERENCES and bool(each.nodes[0].kwargs.get("alpha", 1) == 1)
        return each.target in SUMS and left != right and (left or plain)

    def _factor(self, number: int) -> float:
        """What a lane multiplies a change of the stream by."""
        found = {-1: 1.0}
        for place in self.path:
            each = self.operators[place]
            carried = next(arg for arg in each.args if self._carries(arg))
            if each.target in SUMS:
                left, right = (found[arg.place] if self._carries(arg) else 0.0 for arg in each.args[:2])
                alpha: Any = each.nodes[0].kwargs.get("alpha", 1)
                found[place] = left + (-alpha if each.target in _DIFFERENCES else alpha) * right
            elif each.target is aten.neg.default:
                found[place] = -found[carried.place]
            elif each.target in SCALINGS:
                others = [arg for arg in each.args if arg is not carried]
                if any(isinstance(arg, Pack) and arg.kind in ("inside", "entry") for arg in others):
                    raise NotAlike("corrections with factors that depend on the stream")
                other = _number(self.program, others[0].nodes[number] if isinstance(others[0], Pack) else others[0])
                divides = each.target in (aten.div.Tensor, aten.div.Scalar)
                found[place] = found[carried.place] / other if divides else found[carried.place] * other
            else:
                found[place] = found[carried.place]
        return found[self.path[-1]]

    def _contributions(self) -> list[Pack] | None:
        found = []
        for place in self.path:
            each = self.operators[place]
            if each.target in RESHAPES:
                return None
            if each.target in SUMS:
                found.append(next(arg for arg in each.args[:2] if not self._carries(arg)))
        return found if all(isinstance(pack, Pack) for pack in found) else None

    def total(self) -> fx.Node:
        """The sum over lanes of all that they add to the stream."""
        total: fx.Node | None = None
        # From the last: what an earlier one adds may be needed lane by lane before it.
        for pack in reversed(self.contributions or ()):
            part = self.stacked.total(pack, self.dtype)
            total = part if total is None else self._add(total, part)
        if total is None:
            raise NotAlike("nothing is added to the stream")
        return total

    def results(self) -> fx.Node:
        """What lanes compute, [N, ...]."""
        return _cast(self.program, self.stacked.stacked(self.stacked.at(len(self.operators) - 1)), self.dtype)

    def changes(self) -> fx.Node:
        """What lanes compute less their factor times what they read, [N, ...], summed up from the branches."""
        if not self.path:
            entry = self.stacked.read(Pack("entry", tuple(lane.entry for lane in self.lanes)))
            read = _cast(self.program, entry.node, self.dtype)
            return self.program.call(aten.sub.Tensor, self.results(), read)
        shares: dict[int, Value | None] = {-1: None}
        for place in self.path:
            shares[place] = self._share(self.operators[place], shares)
        change = shares[self.path[-1]]
        if change is None:
            raise NotAlike("nothing is added to the stream")
        return self.stacked.stacked(change)

    def _share(self, each: Operator, shares: dict[int, Value | None]) -> Value | None:
        """What of an operator's value does not come along the linear way."""
        if each.target in SUMS:
            left, right = (self._part(arg, shares) for arg in each.args[:2])
            factor = each.nodes[0].kwargs.get("alpha", 1) * (-1 if each.target in _DIFFERENCES else 1)  # type: ignore[operator]
            if right is not None and factor != 1:
                right = Value(self.program.call(aten.mul.Tensor, right.node, factor), right.stacked)
            if left is None or right is None:
                return right if left is None else left
            return Value(self._add(left.node, right.node), left.stacked or right.stacked)
        carried = next(arg for arg in each.args if self._carries(arg))
        share = shares[carried.place]
        if share is None or each.target in COPIES:
            return share
        if each.target not in SCALINGS:
            raise NotAlike("a residual stream whose shape changes within a layer")
        others = [self._part(arg, shares) if isinstance(arg, Pack) else arg for arg in each.args if arg is not carried]
        operands = [other.node if isinstance(other, Value) else other for other in others]
        stacked = share.stacked or any(isinstance(other, Value) and other.stacked for other in others)
        return Value(self.program.call(each.target, share.node, *operands), stacked)

    def _part(self, arg: Any, shares: dict[int, Value | None]) -> Value | None:
        if self._carries(arg):
            return shares[arg.place]
        if not isinstance(arg, Pack):
            raise NotAlike("a number is added to the stream")
        value = self.stacked.read(arg)
        node = _cast(self.program, value.node, self.dtype)
        rank = self.lanes[0].exit.meta["val"].ndim + 1
        return Value(self.stacked.raised(node, rank) if value.stacked else node, value.stacked)

    def _carries(self, arg: Any) -> bool:
        return isinstance(arg, Pack) and (arg.kind == "entry" or arg.place in self.path)

    def _add(self, left: fx.Node, right: fx.Node) -> fx.Node:
        added = self.program.call(aten.add.Tensor, left, right)
        added.meta[PARALLEL] = ()
        return added


def _kinds(group: Group) -> dict[Any, list[Lane]]:
    """The lanes of a group by what operators they have."""
    kinds: dict[Any, list[Lane]] = {}
    for lane in group.lanes:
        kinds.setdefault(tuple(node.target for node in lane.nodes), []).append(lane)
    return kinds


def _families(found: Sequence[Group]) -> dict[str, tuple[str, ...]]:
    """For tensors by name, those in the same place of all lanes of a segment, in whatever iteration."""
    members: dict[Any, dict[int, str]] = {}
    for group in found:
        name = group.name
        for kind, lanes in _kinds(group).items():
            for lane in lanes:
                for place, node in enumerate(lane.nodes):
                    for index, operand in enumerate(node.all_input_nodes):
                        if operand.op == "get_attr":
                            key = name.start, name.stop, name.stage, kind, place, index
                            members.setdefault(key, {})[lane.number] = str(operand.target)
    families: dict[str, tuple[str, ...]] = {}
    for own in members.values():
        names = tuple(own[number] for number in sorted(own))
        if len(set(names)) == len(names):
            families.update(dict.fromkeys(names, names))
    return families


def _products(factors: Sequence[float]) -> torch.Tensor:
    """P of the corrections, float64 [L, L + 1]: P[l, j] is the product of the factors behind j and up to l."""
    matrix = torch.zeros(len(factors), len(factors) + 1, dtype=torch.float64)
    for row, factor in enumerate(factors):
        if row:
            matrix[row] = matrix[row - 1]
        matrix[row, : row + 1] *= factor
        matrix[row, 0] = math.prod(factors[: row + 1])
        matrix[row, row + 1] = 1.0
    return matrix


def _number(program: Program, value: Any) -> float:
    """A number that the model's tensors give."""
    result = _constant(program, value)
    if isinstance(result, torch.Tensor):
        if result.numel() != 1:
            raise NotAlike("a residual stream that is scaled feature by feature")
        return float(result)
    return float(result)


def _constant(program: Program, value: Any) -> Any:
    if not isinstance(value, fx.Node):
        return value
    if value.op == "get_attr":
        return program.tensor(str(value.target))
    if value.op != "call_function":
        raise NotAlike("a residual stream that is scaled by an input")
    args, kwargs = fx.map_arg((value.args, value.kwargs), lambda node: _constant(program, node))
    return value.target(*args, **kwargs)  # type: ignore[operator]


def _cast(program: Program, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    if node.meta["val"].dtype == dtype:
        return node
    return program.call(aten._to_copy.default, node, dtype=dtype)
