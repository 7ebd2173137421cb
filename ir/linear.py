"""Linear parts of a graph: found by walking it, measured by running it.

Between a projection and an attention stand reshapes, splits and a rotary embedding, in as many spellings as there are
models. None is recognised by its spelling. A part of the graph is accepted if every operator in it is linear; what it
does is then measured exactly, by running it in float64 on vectors whose elements carry their own number.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from skipstone.ir.errors import Unsupported
from skipstone.ir.program import Program, Role

aten = torch.ops.aten

CASTS = (
    aten._to_copy.default, aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.type_as.default,
)  # fmt: skip
MOVES = (
    operator.getitem, aten.reshape.default, aten.view.default, aten._unsafe_view.default, aten.flatten.using_ints,
    aten.unflatten.int, aten.transpose.int, aten.permute.default, aten.t.default, aten.unsqueeze.default,
    aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.expand.default, aten.repeat.default,
    aten.repeat_interleave.self_int, aten.slice.Tensor, aten.select.int, aten.narrow.default, aten.index.Tensor,
    aten.index_select.default, aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int,
    aten.clone.default, aten.contiguous.default, aten.alias.default, aten.detach.default,
    aten.view_as_complex.default, aten.view_as_real.default, aten.neg.default,
)  # fmt: skip
"""Operators that move, repeat or negate the elements of their first argument."""
NORMS = (aten.layer_norm.default, aten.rms_norm.default)
_JOINS = (aten.cat.default, aten.stack.default)
_SUMS = (aten.add.Tensor, aten.sub.Tensor)
_PRODUCTS = (aten.mul.Tensor, aten.matmul.default, aten.bmm.default, aten.mm.default)
"""Linear in either operand."""
_BATCH, _LENGTH = 2, 3
"""Sizes for running a part. Where tokens meet, its rows differ."""


@dataclass
class Walk:
    """What a walk from a value back to what it is linear in has met.

    Attributes:
        nodes: all nodes, both ends included.
        ends: where it ended.
        factors: what values were multiplied by: neither live nor constant tensors of the program.
        fixed: nodes that a loose walk takes to have one value everywhere, and that value.
    """

    nodes: dict[fx.Node, None] = field(default_factory=dict)
    ends: dict[fx.Node, None] = field(default_factory=dict)
    factors: dict[fx.Node, None] = field(default_factory=dict)
    fixed: dict[fx.Node, float] = field(default_factory=dict)


class LinearParts:
    """Walks and runs parts of one program. What it has found stays valid while tensors change and nodes do not.

    Attributes:
        positions: the input of positions, if there is one.
        active: the nodes that depend on another input.
        turning: the nodes that depend on the positions alone.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.device = program.source.device
        self.positions = program.input(Role.POSITIONS)
        self.active: set[fx.Node] = set()
        self.turning: set[fx.Node] = set()
        self._sizes: dict[Any, int] = {}
        self._generator = torch.Generator().manual_seed(0)  # the user's random state stays as it is
        for node in program.graph.nodes:
            if node.op == "placeholder":
                (self.turning if node is self.positions else self.active).add(node)
                for dim, size in enumerate(node.meta["val"].shape):
                    if isinstance(size, torch.SymInt):
                        self._sizes.setdefault(size.node.expr, _BATCH if dim == 0 else _LENGTH)
            elif node.op == "call_function" and not is_number(node):
                if not self.active.isdisjoint(node.all_input_nodes):
                    self.active.add(node)
                elif not self.turning.isdisjoint(node.all_input_nodes):
                    self.turning.add(node)

    # ------------------------------------------------------------------------------------------------------- walking

    def walk(self, target: fx.Node, live: set[fx.Node], ends: Callable[[fx.Node], bool], loose: bool = False) -> Walk:
        """Walk from `target` back to the nodes that it is linear in.

        Args:
            live: `active` or `turning`, the nodes to walk over; all others are constants to it.
            ends: tells where to stop.
            loose: also walk through norms, and past added constants.
        Raises:
            Unsupported: an operator that is not linear comes first; the message names it.
        """
        found, pending = Walk(), [target]
        while pending:
            node = pending.pop()
            if node in found.nodes:
                continue
            found.nodes[node] = None
            if ends(node):
                found.ends[node] = None
                continue
            operands = self._linear_operands(node, live, found)
            if not operands and loose:
                operands = self._normalised(node, live, found)
            if not operands:
                raise Unsupported(f"{operator_name(node)} ({node.name}) on the way to {target.name}")
            pending += operands
        return found

    def _linear_operands(self, node: fx.Node, live: set[fx.Node], found: Walk) -> list[fx.Node]:
        """The live operands, if `node` is linear in them; none if not."""
        if node.op != "call_function":
            return []
        first: Any = node.args[0]
        if node.target in CASTS:
            return [first]
        if node.target in MOVES:
            varying = [each for each in node.all_input_nodes if each in self.active or each in self.turning]
            return [first] if varying == [first] and first in live else []
        if node.target in _JOINS:
            return list(first) if all(part in live for part in first) else []
        if node.target is aten.div.Tensor:
            return [first] if first in live and isinstance(node.args[1], int | float) else []
        lively = [each for each in node.args[:2] if isinstance(each, fx.Node) and each in live]
        if node.target in _SUMS and len(lively) == 2:
            return lively
        if node.target in _PRODUCTS and len(lively) == 1:
            for other in node.all_input_nodes:
                if other not in lively and other.op == "call_function" and not is_number(other):
                    found.factors[other] = None
            return lively
        return []

    def _normalised(self, node: fx.Node, live: set[fx.Node], found: Walk) -> list[fx.Node]:
        """The operand that `node` is a norm of, or adds a constant to; its statistics and the constant are noted."""
        if node.target in NORMS:
            return [node.args[0]]  # type: ignore[list-item]
        if node.target not in (*_SUMS, aten.mul.Tensor):
            return []
        for value, other in (node.args[:2], node.args[1::-1]):
            if not isinstance(value, fx.Node) or value not in live or not isinstance(other, fx.Node):
                continue
            is_statistic = other.meta["val"].shape[-1:] == (1,) and value.meta["val"].shape[-1:] != (1,)
            if is_statistic or (other not in live and node.target in _SUMS):
                found.fixed[other] = 1.0 if node.target is aten.mul.Tensor else 0.0
                return [value]
        return []

    # ------------------------------------------------------------------------------------------------------- running

    def evaluate(self, node: fx.Node, given: Mapping[fx.Node, Tensor]) -> Any:
        """The value of `node` in float64, with the values of some nodes given. A norm gives its input unchanged."""
        known: dict[fx.Node, Any] = dict(given)

        def value(node: fx.Node) -> Any:
            if node not in known:
                known[node] = self._compute(node, value)
            return known[node]

        return value(node)

    def _compute(self, node: fx.Node, value: Callable[[fx.Node], Any]) -> Any:
        if is_number(node):
            return self._number(node.meta["val"])
        if node.op == "get_attr":
            return _exact(self.program.tensor(str(node.target)).detach())
        if node.op == "placeholder":
            raise Unsupported(f"a constant that depends on the input {node.name}")
        if node.target in NORMS:
            return _exact(value(node.args[0]))  # type: ignore[arg-type]
        if node.target in CASTS and node.meta["val"].is_floating_point():
            return value(node.args[0]).double()  # type: ignore[arg-type]
        args, kwargs = fx.map_arg((node.args, node.kwargs), value)
        return _exact(node.target(*args, **kwargs))  # type: ignore[operator]

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """The shape of a node's value when parts are run."""
        return tuple(self._number(size) for size in node.meta["val"].shape)

    def _number(self, value: Any) -> Any:
        if not isinstance(value, torch.SymInt):
            return value
        expression = value.node.expr
        if expression not in self._sizes:
            number = expression.subs(self._sizes)
            if number.free_symbols:
                raise Unsupported("a size that depends on data")
            self._sizes[expression] = int(number)
        return self._sizes[expression]

    def filled(self, node: fx.Node, number: float) -> Tensor:
        """A value for a node, with one number everywhere."""
        dtype = torch.complex128 if node.meta["val"].is_complex() else torch.float64
        return torch.full(self.shape(node), number, dtype=dtype, device=self.device)

    def draw(self, shape: Sequence[int]) -> Tensor:
        """Random numbers in [0.5, 1.5), none of them zero: float64."""
        return (torch.rand(tuple(shape), generator=self._generator, dtype=torch.float64) + 0.5).to(self.device)

    def random(self, node: fx.Node) -> list[Tensor]:
        """Values for a node: random ones, or random real ones and random imaginary ones."""
        draw = self.draw(self.shape(node))
        return [draw, draw * 1j] if node.meta["val"].is_complex() else [draw]

    def origins(self, run: Callable[[Tensor], Tensor], count: int) -> tuple[Tensor, Tensor]:
        """Which element of a vector each element of a linear function comes from.

        Args:
            run: takes float64 [count], returns [tokens, ...].
            count: number of elements.
        Returns:
            int64 [...], the element, -1 for none; float64 [tokens, ...], the factor it is multiplied by.
        Raises:
            Unsupported: it comes from more than one, or from others for other tokens.
        """
        share = run(torch.ones(count, dtype=torch.float64, device=self.device))
        named = run(torch.arange(1, count + 1, dtype=torch.float64, device=self.device))
        found = (named / share).nan_to_num(0, 0, 0).round().long().clamp(1, count) - 1
        found = torch.where(share == 0, -1, found)
        vector = self.draw([count])
        expected = torch.where(share == 0, 0.0, share * vector[found])
        if bool((found != found[:1]).any()) or not torch.allclose(run(vector), expected, rtol=1e-9, atol=0.0):
            raise Unsupported("channels that mix several elements of a projection")
        return found[0], share


def is_number(node: fx.Node) -> bool:
    """Whether a node is arithmetic on sizes."""
    return isinstance(node.meta.get("val"), int | float | torch.SymInt | torch.SymFloat | torch.SymBool)


def operator_name(node: fx.Node) -> str:
    """The name of a node's operator, for people."""
    return str(getattr(node.target, "overloadpacket", node.target))


def behind_casts(node: Any) -> Any:
    """The value that was cast to the one given."""
    while isinstance(node, fx.Node) and node.target in CASTS:
        node = node.args[0]
    return node


def _exact(value: Any) -> Any:
    """Floating-point tensors in float64, complex ones likewise; anything else as it is."""
    if isinstance(value, list | tuple):
        return type(value)(map(_exact, value))
    if isinstance(value, Tensor) and value.is_complex():
        return value.to(torch.complex128)
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
