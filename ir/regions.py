"""Regions: the residual stream cut into functions of one value each, and the proof that they are just that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from skipstone.ir.errors import Unsupported
from skipstone.ir.program import Program, module_path
from skipstone.ir.stream import Sublayer
from skipstone.ir.surrogate import RESHAPES, SkipPath, sizes, skip_path

aten = torch.ops.aten


@dataclass(frozen=True)
class Region:
    """A layer or a sublayer as a function of the stream's value before it.

    Attributes:
        sublayers: what it holds.
        entry: the stream's value before.
        nodes: the operators that depend on `entry` and lead to the value behind, which comes last; in graph order.
        skip: the linear way through it.
    """

    sublayers: tuple[Sublayer, ...]
    entry: fx.Node
    nodes: tuple[fx.Node, ...]
    skip: SkipPath

    @property
    def exit(self) -> fx.Node:
        """The stream's value behind."""
        return self.nodes[-1]

    @property
    def reshaped(self) -> tuple[fx.Node, ...]:
        """The operators that only give the value before another shape, in graph order."""
        found = {self.entry: None}
        for node in self.nodes:
            if node.target in RESHAPES and node.args[0] in found:
                found[node] = None
        return tuple(found)[1:]


def cut(
    program: Program, groups: Sequence[Sequence[Sublayer]], entry: fx.Node, at_iterate: bool = False
) -> tuple[Region, ...]:
    """Consecutive regions, each from where the one before it ends.

    Args:
        groups: the sublayers of each region, in the order of the stream.
        entry: the stream's value before the first.
        at_iterate: whether the linear way through a region may depend on the stream.
    Raises:
        Unsupported: a region is no function of the value before it (see `_prove_apart`), draws random numbers, changes
            the shape of the stream, or has no linear way through it.
    """
    regions = []
    for group in groups:
        nodes = _between(entry, behind(group[-1].add, entry))
        _prove_alike(entry, nodes)
        regions.append(Region(tuple(group), entry, nodes, skip_path(entry, nodes, at_iterate)))
        entry = nodes[-1]
    _prove_apart(program, regions)
    return tuple(regions)


def behind(add: fx.Node, entry: fx.Node) -> fx.Node:
    """The stream's value behind a sublayer: its addition, in the shape of a value before it (OPT flattens it)."""
    value = add
    while sizes(value) != sizes(entry):
        readers = list(value.users)
        if len(readers) != 1 or readers[0].target not in RESHAPES:
            return add
        (value,) = readers
    return value


def _between(entry: fx.Node, exit: fx.Node) -> tuple[fx.Node, ...]:
    """The operators on the ways from one value to another, the latter last."""
    reached, node, order = {entry}, entry.next, [entry]
    while True:
        if not reached.isdisjoint(node.all_input_nodes):
            reached.add(node)
            order.append(node)
        if node is exit:
            break
        node = node.next
    leading = {exit}
    for node in reversed(order):
        if node in leading:
            leading |= reached.intersection(node.all_input_nodes)
    return tuple(node for node in order[1:] if node in leading)


def _prove_alike(entry: fx.Node, nodes: Sequence[fx.Node]) -> None:
    """Check that a region does not draw random numbers and leaves the stream's shape as it is."""
    for node in nodes:
        drops = node.target is aten.dropout.default and node.args[2]
        if drops or torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            hint = "Put the model into evaluation mode."
            raise Unsupported(f"layer_parallel with randomness ({node.name})", where=_place(node), hint=hint)
    before, after = (node.meta["val"].shape for node in (entry, nodes[-1]))
    if before != after:
        shapes = f"{list(before)} to {list(after)}"
        raise Unsupported(f"layer_parallel of a layer that changes the shape {shapes}", where=_place(nodes[-1]))


def _prove_apart(program: Program, regions: Sequence[Region]) -> None:
    """Check that nothing but the stream leads from one region into another, or from inside a region anywhere.

    Values of the stream between two regions may be read from outside, in any shape.

    Raises:
        Unsupported: there is such an edge (shared keys and values, value residuals, attention over depth).
    """
    hint = "Layers that read more of each other than the residual stream cannot run in parallel."
    owner = {node: number for number, region in enumerate(regions) for node in region.nodes}
    tainted: set[fx.Node] = set()
    for node in program.graph.nodes:
        if node in owner or not tainted.isdisjoint(node.all_input_nodes):
            tainted.add(node)
        if node not in owner:
            continue
        region = regions[owner[node]]
        for operand in node.all_input_nodes:
            if operand in tainted and operand is not region.entry and owner.get(operand) != owner[node]:
                raise Unsupported(
                    f"layer_parallel: {node.name} reads {operand.name}, which comes from another layer of its segment",
                    where=_place(node), hint=hint,
                )  # fmt: skip
        others = [user for user in node.users if owner.get(user) != owner[node]]
        if others and node is not region.exit and node not in region.reshaped:
            raise Unsupported(
                f"layer_parallel: {others[0].name} reads {node.name} from inside a layer", where=_place(node), hint=hint
            )


def _place(node: fx.Node) -> str:
    return module_path(node) or node.name
