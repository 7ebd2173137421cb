"""How operators of parallel lanes run as one, over values and weights with the lanes along a leading axis.

Each operator has a rule, as in vectorized maps over functions: what works element by element broadcasts, what names a
dimension counts it one further, products take stacks of weights, and an attention takes the heads of all lanes as heads
of its own. What is the same for all lanes is computed once and not stacked. Values are made when they are asked for, so
that a sum over lanes can be had without them: `Stacked.total` joins the projections of all lanes to a single one.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from skipstone.ir.dialect import ATTENTION
from skipstone.ir.lanes import NotAlike, Operator, Pack
from skipstone.ir.program import Program
from skipstone.ir.stream import PARALLEL
from skipstone.passes.stacked_attention import attend
from skipstone.passes.stacked_weights import StackedWeights

aten = torch.ops.aten

LINEAR, ADDMM = aten.linear.default, aten.addmm.default
_AS_THEY_ARE = (
    aten._to_copy.default, aten.to.dtype, aten.clone.default, aten.contiguous.default, aten.alias.default,
    aten.dropout.default, operator.getitem,
)  # fmt: skip
"""Operators of one tensor that do not count its dimensions."""
_DIMENSIONS: dict[Any, tuple[int, ...]] = {
    aten.transpose.int: (1, 2), aten.permute.default: (1,), aten.unsqueeze.default: (1,), aten.squeeze.dim: (1,),
    aten.slice.Tensor: (1,), aten.select.int: (1,), aten.split.Tensor: (2,), aten.split_with_sizes.default: (2,),
    aten.chunk.default: (2,), aten.flatten.using_ints: (1, 2), aten.unflatten.int: (1,), aten.mean.dim: (1,),
    aten.sum.dim_IntList: (1,), aten.amax.default: (1,), aten.amin.default: (1,), aten.softmax.int: (1,),
    aten.cumsum.default: (1,), aten.rms_norm.default: (), aten.layer_norm.default: (),
}  # fmt: skip
"""Operators of one tensor, and which of their arguments are dimensions; negative ones stay as they are."""
_DEFAULTS: dict[Any, tuple[Any, ...]] = {
    aten.slice.Tensor: (0,), aten.split.Tensor: (0, 0), aten.split_with_sizes.default: (0, 0),
    aten.chunk.default: (0, 0), aten.flatten.using_ints: (0, -1),
}  # fmt: skip
"""What their arguments from the second on are where they are left out."""
_SIZES = (aten.reshape.default, aten.view.default, aten._unsafe_view.default, aten.expand.default)
ORIGIN = ("nn_module_stack", "stack_trace")
_NORMS = (aten.layer_norm.default, aten.rms_norm.default)


@dataclass(frozen=True)
class Value:
    """A value of all lanes.

    Attributes:
        node: its node.
        stacked: whether it has the lanes along its first axis; if not, it is the same for all.
    """

    node: fx.Node
    stacked: bool


class Stacked:
    """The operators of lanes that are alike, as one; nodes are made at the graph's insertion point.

    Args:
        program: what they are in.
        operators: what all lanes do, `skipstone.ir.lanes.align`.
        lanes: how many there are.
        weights: where stacks of tensors come from.
    """

    def __init__(self, program: Program, operators: Sequence[Operator], lanes: int, weights: StackedWeights) -> None:
        self.program, self.operators, self.lanes, self.weights = program, operators, lanes, weights
        self._made: dict[int, Value] = {}
        self._stacks: dict[tuple[fx.Node, ...], Value] = {}
        self._origin: fx.Node | None = None

    def at(self, place: int) -> Value:
        """What the operators at a place compute.

        Raises:
            NotAlike: an operator has no form over several lanes.
        """
        if place not in self._made:
            outer, self._origin = self._origin, self.operators[place].nodes[0]
            self._made[place] = self._rule(self.operators[place])(place)
            self._origin = outer
        return self._made[place]

    def read(self, pack: Pack) -> Value:
        """What lanes read; raises like `at`."""
        if pack.kind == "inside":
            return self.at(pack.place)
        if all(node is pack.nodes[0] for node in pack.nodes):
            return Value(pack.nodes[0], stacked=False)
        if pack.nodes not in self._stacks:
            self._stacks[pack.nodes] = Value(self._stack(pack), stacked=True)
        return self._stacks[pack.nodes]

    def stacked(self, value: Value) -> fx.Node:
        """The value with the lanes along its first axis, whether they differ or not."""
        if value.stacked:
            return value.node
        wide = self.call(aten.unsqueeze.default, value.node, 0)
        return self.call(aten.expand.default, wide, [self.lanes, *[-1] * value.node.meta["val"].ndim])

    def total(self, pack: Pack, dtype: torch.dtype) -> fx.Node:
        """The sum over all lanes of what they read, in a dtype; raises like `at`."""
        if pack.kind == "inside" and pack.place not in self._made and self._is_projection(pack.place):
            return self._cast(self._joint_projection(self.operators[pack.place]), dtype)
        value = self.read(pack)
        if not value.stacked:
            return self.call(aten.mul.Tensor, self._cast(value.node, dtype), self.lanes)
        return self.call(aten.sum.dim_IntList, self._cast(value.node, dtype), [0])

    # Rules

    def _rule(self, each: Operator) -> Callable[[int], Value]:
        target = each.target
        tags = getattr(target, "tags", ())
        if target is LINEAR:
            return self._linear
        if target is ADDMM:
            return self._addmm
        if target is ATTENTION:
            return lambda place: Value(*attend(self, self.operators[place]))
        if target is aten.cat.default:
            return self._cat
        if target in (aten.type_as.default,):
            return self._type_as
        if target in _NORMS:
            return self._norm
        if target in _SIZES:
            return self._sized
        if target in _AS_THEY_ARE or target in _DIMENSIONS:
            return self._counted
        if torch.Tag.pointwise in tags:
            return self._pointwise
        raise NotAlike(f"{target} has no form over several layers")

    def _pointwise(self, place: int) -> Value:
        each = self.operators[place]
        rank = each.value.ndim
        values = {id(arg): self.read(arg) for arg in each.args if isinstance(arg, Pack)}
        stacked = any(value.stacked for value in values.values())

        def aligned(arg: Any) -> Any:
            if not isinstance(arg, Pack):
                return arg
            value = values[id(arg)]
            return self.raised(value.node, rank + 1) if value.stacked else value.node

        node = self.call(each.target, *map(aligned, each.args), **each.nodes[0].kwargs)
        if any(PARALLEL in other.meta for other in each.nodes):
            node.meta[PARALLEL] = ()
        return Value(node, stacked)

    def raised(self, node: fx.Node, rank: int) -> fx.Node:
        """A stack of values of a lower rank than others that it broadcasts with."""
        while node.meta["val"].ndim < rank:
            node = self.call(aten.unsqueeze.default, node, 1)
        return node

    def _counted(self, place: int) -> Value:
        """Operators of one tensor whose other arguments may be dimensions."""
        each = self.operators[place]
        source, *rest = each.args
        if not isinstance(source, Pack) or any(isinstance(arg, Pack) and arg.kind != "common" for arg in rest):
            raise NotAlike(f"{each.target} has no form over several layers")
        value = self.read(source)
        rest += _DEFAULTS.get(each.target, ())[len(rest) :]
        for index in _DIMENSIONS.get(each.target, ()) if value.stacked else ():
            if index - 1 < len(rest):
                rest[index - 1] = _counted_further(rest[index - 1])
        if each.target is aten.permute.default and value.stacked:
            rest[0] = [0, *rest[0]]
        rest = [arg.nodes[0] if isinstance(arg, Pack) else arg for arg in rest]
        return Value(self.call(each.target, value.node, *rest, **each.nodes[0].kwargs), value.stacked)

    def _sized(self, place: int) -> Value:
        """Reshapes, whose sizes are numbers or, for open ones, common values."""
        each = self.operators[place]
        source, sizes = each.args[:2]
        value = self.read(source)
        found = [size.nodes[0] if isinstance(size, Pack) else size for size in sizes]
        if not value.stacked:
            return Value(self.call(each.target, value.node, found), stacked=False)
        node = self.raised(value.node, len(found) + 1) if each.target is aten.expand.default else value.node
        target = each.target if each.target is aten.expand.default else aten.reshape.default
        return Value(self.call(target, node, [self.lanes, *found]), stacked=True)

    def _cat(self, place: int) -> Value:
        each = self.operators[place]
        # A vector without elements joins values of any rank (an empty cache of transformers); a stack of it would not.
        values = [self.read(pack) for pack in each.args[0] if tuple(pack.nodes[0].meta["val"].shape) != (0,)]
        dim = each.args[1] if len(each.args) > 1 else 0
        if not any(value.stacked for value in values):
            return Value(self.call(each.target, [value.node for value in values], dim), stacked=False)
        parts = [self.stacked(value) for value in values]
        return Value(self.call(each.target, parts, _counted_further(dim)), stacked=True)

    def _type_as(self, place: int) -> Value:
        each = self.operators[place]
        value = self.read(each.args[0])
        return Value(self._cast(value.node, each.value.dtype), value.stacked)

    def _norm(self, place: int) -> Value:
        """A norm without its gain and bias, which follow: they may differ between lanes."""
        each = self.operators[place]
        plain = self._plain(each)
        node, stacked = plain.node, plain.stacked
        for arg, join in zip(each.args[2:4], (aten.mul.Tensor, aten.add.Tensor), strict=False):
            if isinstance(arg, Pack):
                own = self.read(arg)
                stacked = stacked or own.stacked
                part = self.raised(own.node, each.value.ndim + 1) if own.stacked else own.node
                node = self.call(join, node, part)
        return Value(node, stacked)

    def _plain(self, each: Operator) -> Value:
        """A norm without gain and bias."""
        x, own = self.read(each.args[0]), each.args
        options = (None, *own[3:]) if each.target is aten.rms_norm.default else (None, None, *own[4:])
        return Value(self.call(each.target, x.node, own[1], *options), x.stacked)

    def _linear(self, place: int) -> Value:
        """Projections of one value, of all lanes and of siblings within a lane, are one product."""
        siblings = self._siblings(place)
        source = self.operators[place].args[0]
        if not siblings:
            value = self.read(source)
            arguments = [
                self.read(arg).node if isinstance(arg, Pack) else arg for arg in self.operators[place].args[1:]
            ]
            return Value(self.call(LINEAR, value.node, *arguments), value.stacked)
        x, gains = self._without_gain(source)
        operands = [(*self.operators[each].args, None)[1:3] for each in siblings]
        weights, biases = zip(*operands, strict=True)
        return self._product(place, siblings, x, gains, weights, biases)

    def _product(
        self, place: int, siblings: Sequence[int], x: Value, gains: Pack | None, weights: Sequence[Pack], biases: Any
    ) -> Value:
        weight = self.weights.rows(weights, gains)
        bias = self.weights.rows(biases) if biases[0] is not None else None
        if x.stacked:
            product = self._grouped(x.node, weight, bias)
        else:
            flat = [None if each is None else self.weights.flat(each) for each in (weight, bias)]
            wide = self.call(LINEAR, x.node, *flat)
            apart = self.call(aten.unflatten.int, wide, -1, [self.lanes, weight.meta["val"].shape[1]])
            product = self.lanes_first(apart, -2)
        start = 0
        for each, own in zip(siblings, weights, strict=True):
            size = int(own.nodes[0].meta["val"].shape[0])
            whole = size == weight.meta["val"].shape[1]
            part = product if whole else self.call(aten.slice.Tensor, product, -1, start, start + size)
            self._made[each] = Value(part, stacked=True)
            start += size
        return self._made[place]

    def _grouped(self, x: fx.Node, weight: fx.Node, bias: fx.Node | None) -> fx.Node:
        """``x[n] @ weight[n].T + bias[n]`` for x [N, ..., D], weight [N, F, D], bias [N, F]."""
        shape = x.meta["val"].shape
        leading = [size if isinstance(size, int) else self.call(aten.sym_size.int, x, axis)
                   for axis, size in enumerate(shape[:-1])]  # fmt: skip
        rows = self.call(aten.reshape.default, x, [self.lanes, -1, shape[-1]]) if len(shape) != 3 else x
        product = self.call(aten.matmul.default, rows, self.call(aten.transpose.int, weight, 1, 2))
        if bias is not None:
            product = self.call(aten.add.Tensor, product, self.call(aten.unsqueeze.default, bias, 1))
        if len(shape) == 3:
            return product
        return self.call(aten.reshape.default, product, [*leading, weight.meta["val"].shape[1]])

    def _addmm(self, place: int) -> Value:
        """``bias + x @ weight`` for x [R, D], weight [D, F], as GPT-2 has it."""
        each = self.operators[place]
        bias, source, weight = each.args[:3]
        if each.nodes[0].kwargs or not all(isinstance(arg, Pack) for arg in each.args[:3]):
            raise NotAlike(f"{each.target} has no form over several layers")
        offset, x, factor = (self.read(arg) for arg in (bias, source, weight))
        stacked = x.stacked or factor.stacked or offset.stacked
        product = self.call(aten.matmul.default, x.node, factor.node)
        added = self.raised(offset.node, 3) if offset.stacked else offset.node
        return Value(self.call(aten.add.Tensor, product, added), stacked)

    # Projections

    def _siblings(self, place: int) -> list[int]:
        """The projections, `place` among them, that read the same value as it does; none if its weight is common."""
        each = self.operators[place]
        source, weight, bias = (*each.args, None)[:3]
        if weight.kind != "tensors" or (bias is not None and bias.kind != "tensors"):
            return []
        return [
            other
            for other, candidate in enumerate(self.operators)
            if candidate.target is LINEAR
            and candidate.args[0] == source
            and candidate.args[1].kind == "tensors"
            and (len(candidate.args) > 2 and candidate.args[2] is not None) == (bias is not None)
        ]

    def _is_projection(self, place: int) -> bool:
        """Whether a place is a projection of values that differ, with weights that nothing else reads."""
        each = self.operators[place]
        if each.target is not LINEAR or self._siblings(place) != [place] or not self.weights.is_whole(each.args[1]):
            return False
        return self.read(each.args[0]).stacked

    def _joint_projection(self, each: Operator) -> fx.Node:
        """The sum over lanes of projections: one, of all their inputs side by side."""
        source, weight, bias = (*each.args, None)[:3]
        x = self.read(source).node
        last = x.meta["val"].ndim - 2
        order = [*range(1, last + 1), 0, last + 1]
        side_by_side = self.call(aten.flatten.using_ints, self.call(aten.permute.default, x, order), -2, -1)
        added = [] if bias is None else [self.weights.summed(bias)]
        return self.call(LINEAR, side_by_side, self.weights.columns(weight), *added)

    def _without_gain(self, source: Pack) -> tuple[Value, Pack | None]:
        """What a projection reads, and the gains that its weights take over.

        That is done where lanes then read the same value, which a single wide product can take; and only in float32 or
        more, where a weight that is rounded once more makes no difference.
        """
        gained = self._gain(source)
        if gained is None:
            return self.read(source), None
        plain, gains = gained
        return plain(), gains

    def _gain(self, source: Pack) -> tuple[Callable[[], Value], Pack] | None:
        if source.kind != "inside":
            return None
        each = self.operators[source.place]
        if each.value.dtype not in (torch.float32, torch.float64):
            return None
        if each.target in _NORMS and isinstance(each.args[0], Pack):
            gains, bias = (*each.args, None, None)[2:4]
            is_plain = each.target is aten.rms_norm.default or bias is None
            if is_plain and isinstance(gains, Pack) and gains.kind == "tensors" and self._would_be_common(each.args[0]):
                return lambda: self._plain(each), gains
            return None
        if each.target is aten.mul.Tensor and all(isinstance(arg, Pack) for arg in each.args):
            for gains, other in (each.args, each.args[::-1]):
                if gains.kind == "tensors" and gains.nodes[0].meta["val"].ndim == 1 and self._would_be_common(other):
                    return lambda other=other: self.read(other), gains  # type: ignore[misc]
        return None

    def _would_be_common(self, pack: Pack) -> bool:
        """Whether a value would be the same for all lanes if they read the same state."""
        if pack.kind != "inside":
            return pack.kind in ("entry", "common")
        return all(map(self._would_be_common, _packs(self.operators[pack.place].args)))

    # Nodes

    def chosen(self, node: fx.Node, lanes: list[int]) -> fx.Node:
        """Some lanes of a stack."""
        if lanes == list(range(node.meta["val"].shape[0])):
            return node
        if lanes == list(range(lanes[0], lanes[-1] + 1)):
            return self.call(aten.slice.Tensor, node, 0, lanes[0], lanes[-1] + 1)
        return self.call(aten.stack.default, [self.call(aten.select.int, node, 0, lane) for lane in lanes])

    def _stack(self, pack: Pack) -> fx.Node:
        """Values of the lanes as one: a stack of tensors, a part of a stack that they come from, or a new one."""
        if pack.kind == "tensors":
            return self.weights.stack(pack)
        sources = {node.args[0] for node in pack.nodes if node.target is aten.select.int and node.args[1] == 0}
        if len(sources) == 1 and all(node.target is aten.select.int for node in pack.nodes):
            return self.chosen(sources.pop(), [int(node.args[2]) for node in pack.nodes])  # type: ignore[arg-type]
        return self.call(aten.stack.default, list(pack.nodes))

    def lanes_first(self, node: fx.Node, axis: int) -> fx.Node:
        """A value whose lanes lie along an axis, with that axis first."""
        rank = node.meta["val"].ndim
        order = [axis % rank, *(each for each in range(rank) if each != axis % rank)]
        return self.call(aten.permute.default, node, order)

    def _cast(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        return node if node.meta["val"].dtype == dtype else self.call(aten._to_copy.default, node, dtype=dtype)

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A node, of the module that the operator of the first lane is of."""
        node = self.program.call(target, *args, **kwargs)
        if self._origin is not None:
            node.meta |= {key: self._origin.meta[key] for key in ORIGIN if key in self._origin.meta}
        return node


def _counted_further(dims: Any) -> Any:
    """Dimensions of a value as those of a stack of it."""
    if isinstance(dims, list | tuple):
        return [_counted_further(dim) for dim in dims]
    return dims + 1 if dims >= 0 else dims


def _packs(args: Any) -> Iterator[Pack]:
    for arg in args:
        if isinstance(arg, Pack):
            yield arg
        elif isinstance(arg, list | tuple):
            yield from _packs(arg)
