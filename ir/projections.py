"""The weights on both sides of an attention, and how their elements become its channels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from skipstone.ir.errors import Unsupported
from skipstone.ir.linear import CASTS, MOVES, NORMS, LinearParts, behind_casts, is_number, operator_name
from skipstone.ir.program import Program

aten = torch.ops.aten

_TRANSPOSES = (aten.t.default, aten.transpose.int, aten.permute.default, aten.numpy_T.default)


@dataclass(frozen=True)
class Weights:
    """A projection, or the scale of a norm: what makes each element along the last dimensions of a value.

    Attributes:
        node: the value: [..., n] behind a projection, [..., *weight.shape] behind a norm.
        weight: a `get_attr` node.
        bias: a `get_attr` node, or None.
        axis: the dimension of a projection's weight that its n results lie along; None for a norm.
        offset: a norm multiplies by ``offset + weight``.
    """

    node: fx.Node
    weight: fx.Node
    bias: fx.Node | None = None
    axis: int | None = None
    offset: float = 0.0

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the dimensions that the elements lie along."""
        shape = tuple(self.weight.meta["val"].shape)
        return shape if self.axis is None else shape[self.axis : self.axis + 1]

    @property
    def count(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Path:
    """How the elements of a source become the channels of an operand of an attention.

    Attributes:
        source: where they come from.
        target: the operand, [B, H, S, D].
        nodes: what lies between, both ends included.
        factors: what they are multiplied by on the way, the tables of a rotary embedding.
        fixed: see `skipstone.ir.linear.Walk`.
        origins: int64 [H, D] each: the element that a channel comes from without any factor, then times each factor;
            -1 for none. Complex factors have two entries, for their real and their imaginary part.
    """

    source: Weights
    target: fx.Node
    nodes: frozenset[fx.Node]
    factors: tuple[fx.Node, ...]
    fixed: Mapping[fx.Node, float]
    origins: tuple[Tensor, ...] = ()

    def elements(self, head: int | None = None) -> Tensor:
        """The elements that the channels (of one head) come from, each once."""
        heads = slice(None) if head is None else head
        found = torch.cat([origin[heads].flatten() for origin in self.origins]).unique()
        return found[found >= 0]


class Projections:
    """Finds the weights around the attentions of one program."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.parts = LinearParts(program)
        self._spans = {
            node: _span(program.tensor(str(node.target)))
            for node in program.graph.nodes
            if node.op == "get_attr" and isinstance(node.meta.get("val"), Tensor)
        }

    def weights(self, node: fx.Node) -> Weights | None:
        """The projection or norm whose result `node` is, if it is one."""
        target, args = node.target, (*node.args, None, None, None)
        if target is aten.linear.default:
            return _projection(node, args[1], args[2], axis=0)
        if target is aten.addmm.default and not node.kwargs:
            return _projection(node, args[2], args[0], axis=1)
        if target in (aten.matmul.default, aten.mm.default):
            return _projection(node, args[1], None, axis=1)
        if target in NORMS:
            bias = args[3] if target is aten.layer_norm.default else None
            return _scale(node, args[2], bias)
        if target is aten.mul.Tensor:
            constants = [each for each in args[:2] if each not in self.parts.active]
            return _scale(node, constants[0], None) if len(constants) == 1 else None
        return None

    def before(self, operand: fx.Node, loose: bool = False) -> Path:
        """The path to queries, keys or values from the weights that they come from.

        Args:
            operand: [B, H, S, D].
            loose: look behind norms and added constants, for the projection. Such a path tells which elements the
                channels come from, but not how.
        Raises:
            Unsupported: it is not linear, it has several sources, or it mixes elements.
        """

        def ends(node: fx.Node) -> bool:
            found = self.weights(node)
            return found is not None and not (loose and found.axis is None)

        walk = self.parts.walk(operand, self.parts.active, ends, loose)
        if len(walk.ends) != 1:
            raise Unsupported(f"{len(walk.ends)} projections that together make {operand.name}")
        source = self.weights(next(iter(walk.ends)))
        assert source is not None
        path = Path(source, operand, frozenset(walk.nodes), tuple(walk.factors), walk.fixed)
        return replace(path, origins=self._origins(path))

    def after(self, attention: fx.Node) -> tuple[Weights, Tensor]:
        """The projection that an attention's result goes into.

        Returns:
            the projection; int64 [N, Dv], the element of its input that each channel is.
        Raises:
            Unsupported: something computes in between, or something else reads the result.
        """
        node = attention
        while True:
            readers = [user for user in node.users if not is_number(user)]
            if len(readers) != 1:
                raise Unsupported("an attention whose result is read more than once")
            reader = readers[0]
            found = self.weights(reader)
            if found is not None and found.axis is not None:
                break
            if reader.target not in (*MOVES, *CASTS):
                raise Unsupported(f"{operator_name(reader)} between the attention and its output projection")
            node = reader
        batch, heads, length, width = self.parts.shape(attention)

        def run(vector: Tensor) -> Tensor:
            given = vector.reshape(1, heads, 1, width).expand(batch, heads, length, width)
            return self.parts.evaluate(node, {attention: given}).flatten(0, -2)

        channels, share = self.parts.origins(run, heads * width)
        if channels.sort().values.tolist() != list(range(heads * width)) or bool((share != 1).any()):
            raise Unsupported("an output projection that reads other channels than the attention's")
        return found, channels.argsort().reshape(heads, width)

    def run(self, path: Path, vector: Tensor, factors: Mapping[fx.Node, Tensor]) -> Tensor:
        """The channels [B * S, H, D] that a path makes of a vector of elements, with zeros for factors not given."""
        given = {node: self.parts.filled(node, 0.0) for node in path.factors} | dict(factors)
        return self.value(path, vector, given)

    def value(self, path: Path, vector: Tensor, given: Mapping[fx.Node, Tensor]) -> Tensor:
        """The channels [B * S, H, D] that a path makes of a vector of elements."""
        values = {node: self.parts.filled(node, number) for node, number in path.fixed.items()} | dict(given)
        values[path.source.node] = vector.reshape(path.source.shape).expand(self.parts.shape(path.source.node))
        return self.parts.evaluate(path.target, values).transpose(1, 2).flatten(0, 1)

    def _origins(self, path: Path) -> tuple[Tensor, ...]:
        """See `Path.origins`: with random numbers for one factor at a time, what is found holds at every position."""
        draws = [(factor, values) for factor in path.factors for values in self.parts.random(factor)]
        found = [self.parts.origins(lambda vector: self.run(path, vector, {}), path.source.count)[0]]
        for factor, values in draws:

            def alone(vector: Tensor, given: Any = ((factor, values),)) -> Tensor:
                return self.run(path, vector, dict(given)) - self.run(path, vector, {})

            found.append(self.parts.origins(alone, path.source.count)[0])
        # A product of two factors would have been zero so far.
        vector = self.parts.draw([path.source.count])
        none = self.run(path, vector, {})
        together = {factor: sum(each for other, each in draws if other is factor) for factor in path.factors}
        separate = [self.run(path, vector, {factor: values}) - none for factor, values in draws]
        if not torch.allclose(self.run(path, vector, together), sum(separate, none), rtol=1e-9, atol=1e-9):  # type: ignore[arg-type]
            raise Unsupported(f"several factors that multiply each other on the way to {path.target.name}")
        return tuple(found)

    # ----------------------------------------------------------------------------------------------------- ownership

    def refuse_shared(self, weights: Weights) -> None:
        """Return if nothing but `weights.node` reads these weights.

        Raises:
            Unsupported: something else does, under the same name or through the same memory.
        """
        for parameter in (weights.weight, weights.bias):
            if parameter is None:
                continue
            start, stop = self._spans[parameter]
            same = [node for node, span in self._spans.items() if span[0] < stop and start < span[1]]
            if others := {reader for node in same for reader in self._readers(node)} - {weights.node}:
                raise Unsupported(f"the weight {parameter.target}, which {min(each.name for each in others)} reads too")

    def refuse_other_readers(self, paths: Sequence[Path], known: Sequence[Path], attention: fx.Node) -> None:
        """Return if what these paths carry reaches `attention` alone, and in one role.

        Args:
            known: the paths to all its operands that have one; they may share a projection, but not its results.
        Raises:
            Unsupported: something else reads it.
        """
        inside = {attention, *(node for path in known for node in path.nodes)}
        for path in paths:
            for node in path.nodes:
                for user in node.users:
                    if user not in inside and not is_number(user):
                        raise Unsupported(f"{node.name}, which {operator_name(user)} ({user.name}) reads too")
            same = [other for other in known if other.source.node is path.source.node]
            if sum(bool(torch.isin(path.elements(), other.elements()).any()) for other in same) > 1:
                raise Unsupported("a projection whose results are more than one of queries, keys and values")

    def _readers(self, parameter: fx.Node) -> set[fx.Node]:
        """What is computed from a parameter and from activations."""
        readers, pending = set[fx.Node](), list(parameter.users)
        while pending:
            user = pending.pop()
            if user in self.parts.active or user.op == "output":
                readers.add(user)
            else:
                pending += user.users
        return readers


def _projection(node: fx.Node, weight: Any, bias: Any, axis: int) -> Weights | None:
    weight, bias = behind_casts(weight), behind_casts(bias)
    if isinstance(weight, fx.Node) and weight.target in _TRANSPOSES:
        weight, axis = behind_casts(weight.args[0]), 1 - axis
    if not _is_parameter(weight) or weight.meta["val"].dim() != 2 or not (bias is None or _is_parameter(bias)):
        return None
    return Weights(node, weight, bias, axis)


def _scale(node: fx.Node, weight: Any, bias: Any) -> Weights | None:
    """A norm's scale: a parameter, or a parameter plus a number."""
    weight, bias, offset = behind_casts(weight), behind_casts(bias), 0.0
    if isinstance(weight, fx.Node) and weight.target is aten.add.Tensor and isinstance(weight.args[1], int | float):
        weight, offset = behind_casts(weight.args[0]), float(weight.args[1])
    if not _is_parameter(weight) or weight.meta["val"].numel() == 1 or not (bias is None or _is_parameter(bias)):
        return None
    return Weights(node, weight, bias, None, offset)


def _is_parameter(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "get_attr" and node.meta["val"].is_floating_point()


def _span(tensor: Tensor) -> tuple[int, int]:
    """The addresses that a tensor's elements lie between."""
    steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (steps + 1) * tensor.element_size()
