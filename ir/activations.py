"""The activation graph of a program: what depends on its tokens, and which values all of that passes through."""

from __future__ import annotations

from typing import Any

import networkx as nx
import torch
from torch import fx

from skipstone.ir.dialect import GATE, PREDICATED_LINEAR
from skipstone.ir.errors import Unsupported
from skipstone.ir.program import Program, Role
from skipstone.ir.surrogate import PRODUCTS, SCALINGS, SUMS, passes_on

aten = torch.ops.aten

CASTS = (
    aten._to_copy.default, aten.to.dtype, aten.clone.default, aten.dropout.default, aten.contiguous.default,
    aten.alias.default,
)  # fmt: skip
"""Operators that change no more of a value than its number format."""


class Activations:
    """The activation graph of a program, with its dominators.

    Attributes:
        graph: the values that depend on the tokens, embeddings, or the first floating-point input.
        root: that input.
        order: every node of the program and its place in graph order.
        parts: the values that a value is a sum of multiples of, whatever their shape; itself among them.
        returns: sums that take up an earlier value of the stream once more (nanochat: the first, and one from the
            middle), and that value.
    """

    def __init__(self, program: Program, lookup: fx.Node | None = None) -> None:
        """Build the graph.

        Args:
            lookup: the one value made of the tokens alone (see `lookups`) that counts as theirs; None for all. What
                else is made of them (embeddings that layers add to values, experts chosen by token) is no activation.
        """
        self.order = {node: position for position, node in enumerate(program.graph.nodes)}
        self.root = root_of(program)
        self.graph: nx.DiGraph = nx.DiGraph()
        self.graph.add_node(self.root)
        self.parts: dict[fx.Node, frozenset[fx.Node]] = {self.root: frozenset([self.root])}
        self.returns: dict[fx.Node, fx.Node] = {}
        for node in program.nodes():
            if isinstance(node.meta.get("val"), torch.SymInt | int | float):
                continue
            operands = self._passed(node)
            if lookup is not None:
                operands = [self.root] if node is lookup else [each for each in operands if each is not self.root]
            for operand in operands:
                if operand in self.graph:
                    self.graph.add_edge(operand, node)
            if node in self.graph:
                self.parts[node] = frozenset([node]).union(*(self.parts[each] for each in self._summed(node)))
        self.dominator: dict[fx.Node, fx.Node] = nx.immediate_dominators(self.graph, self.root)
        self._depth = {self.root: 0}
        for node in self.order:
            if node in self.graph and node is not self.root:
                self._depth[node] = self._depth[self.dominator[node]] + 1

    def _passed(self, node: fx.Node) -> list[fx.Node]:
        """The operands through which the stream may pass."""
        # Which rows skip is decided from earlier values of the stream, which do not pass through what obeys.
        if node.target in (GATE, PREDICATED_LINEAR):
            return [node.args[0]]  # type: ignore[list-item]
        active = [each for each in node.args[:2] if isinstance(each, fx.Node) and each in self.graph]
        if node.target in SUMS and len(active) == 2:
            for operand, other in (active, active[::-1]):
                earlier = self._unscaled(other)
                if earlier in self.parts[operand]:
                    self.returns[node] = earlier
                    return [operand]
        return node.all_input_nodes

    def _summed(self, node: fx.Node) -> list[fx.Node]:
        """The operands that the node's value is a sum of multiples of."""
        active = [operand for operand in node.all_input_nodes if operand in self.graph]
        if node.target in (*SCALINGS, *PRODUCTS) and len(active) > 1:
            return []
        return [operand for operand in active if passes_on(node, operand)]

    def _unscaled(self, node: fx.Node) -> fx.Node:
        """Look through casts and a multiplication by what is no activation."""
        node = behind_casts(node)
        if node.target is aten.mul.Tensor:
            active = [operand for operand in node.args[:2] if isinstance(operand, fx.Node) and operand in self.graph]
            if len(active) == 1:
                return behind_casts(active[0])  # type: ignore[no-any-return]
        return node

    def chain(self, node: fx.Node) -> list[fx.Node]:
        """`node`, its immediate dominator, and so on to the root."""
        chain = [node]
        while chain[-1] is not self.root:
            above = self.dominator[chain[-1]]
            if above is None or above is chain[-1]:
                break
            chain.append(above)
        return chain

    def dominates(self, above: fx.Node, below: fx.Node) -> bool:
        """Whether every path from the root to `below` passes `above`, another node."""
        if above is below or above not in self._depth or below not in self._depth:
            return False
        while self._depth[below] > self._depth[above]:
            below = self.dominator[below]
        return below is above

    def between(self, above: fx.Node, below: fx.Node) -> list[fx.Node]:
        """The activations on paths from one value to another that pass nothing else, `below` last; in graph order."""
        pending, found = [below], set()
        while pending:
            node = pending.pop()
            if node is above or node in found or not self.dominates(above, node):
                continue
            found.add(node)
            pending += [operand for operand in node.all_input_nodes if operand in self.graph]
        return sorted(found, key=self.order.__getitem__)


def root_of(program: Program) -> fx.Node:
    """The input that activations come from.

    Raises:
        Unsupported: there is none.
    """
    for role in (Role.TOKENS, Role.EMBEDDINGS):
        node = program.input(role)
        if node is not None:
            return node
    for node in program.graph.find_nodes(op="placeholder"):
        value = node.meta["val"]
        if isinstance(value, torch.Tensor) and value.is_floating_point() and node.users:
            return node
    raise Unsupported("a residual stream in a program without a token, embedding or floating-point input")


def lookups(program: Program) -> list[fx.Node]:
    """The floating-point values that are made of token ids and weights, but of no other such value; in graph order."""
    tokens = program.input(Role.TOKENS)
    numbers, derived, found = {tokens}, set[fx.Node](), list[fx.Node]()
    for node in program.nodes():
        value = node.meta.get("val")
        if not derived.isdisjoint(node.all_input_nodes):
            derived.add(node)
        elif not numbers.isdisjoint(node.all_input_nodes) and isinstance(value, torch.Tensor):
            if value.is_floating_point():
                found.append(node)
                derived.add(node)
            else:
                numbers.add(node)
    return found


def behind_casts(node: Any) -> Any:
    """The value before it was cast or copied."""
    while isinstance(node, fx.Node) and node.target in CASTS:
        node = node.args[0]
    return node
