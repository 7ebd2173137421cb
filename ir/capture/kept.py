"""What a frame keeps of its attentions, apart from what it computes.

A compiled call returns keys and values beside the model's results, or writes them to a cache. Rewrites shall see layers
that only the residual stream connects, and an attention that nothing reads any more shall go with its projections. So
the frame first keeps *blanks*: its cache as it would be without the attention, with zeros for new rows. Behind the
rewrites `skipstone.runtime.frame` puts the keys and values back that are still computed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from skipstone.ir.activations import root_of
from skipstone.ir.capture.dynamo import Frame
from skipstone.ir.dialect import ATTENTION
from skipstone.ir.errors import Unsupported
from skipstone.ir.program import Program, module_path, provenance

aten = torch.ops.aten

KEPT = "kept"
"""Metadata of a value that a frame keeps of an attention: its number among all of them."""
BLANK = "blank"
"""Metadata of what a frame keeps where that attention is left out: the same number."""

_JOINS = (
    aten.cat.default, aten.index_copy.default, aten.index_put.default, aten.slice_scatter.default, aten.scatter.src,
)  # fmt: skip
"""Operators that join new rows to those of a cache."""


def set_caches_apart(frame: Frame) -> None:
    """Let results and written inputs read blank rows, and not the keys and values of attentions.

    `KEPT` and `BLANK` mark the two.

    Raises:
        Unsupported: the size of a new row does not follow from the sizes of inputs.
    """
    program = frame.program
    computed = _computed(program)
    sizes = _sizes(program)
    for attention in list(program.nodes(ATTENTION)):
        for node in _rows(attention.args[1:3], computed):
            leaving = [user for user in node.users if _leaves(user)]
            if not leaving or KEPT in node.meta:
                continue
            with provenance(program, "capture", like=node), program.graph.inserting_before(node):
                blank = _blank(program, node, computed, sizes)
            for user in leaving:
                user.replace_input_with(node, blank)
            node.meta[KEPT] = blank.meta[BLANK] = len(frame.kept)
            frame.kept.append(module_path(attention))
    program.recompile()


def _computed(program: Program) -> set[fx.Node]:
    """The floating-point values that are computed from the tokens, the embeddings or what stands for them."""
    reached = {root_of(program)}
    for node in program.nodes():
        if isinstance(node.meta.get("val"), Tensor) and not reached.isdisjoint(node.all_input_nodes):
            reached.add(node)
    return {node for node in reached if node.meta["val"].is_floating_point()}


def _rows(operands: Sequence[Any], computed: set[fx.Node]) -> list[fx.Node]:
    """What keys and values are made of, as long as their heads are apart: [B, KH, T, D], or with repeated heads."""
    pending, found = list(operands), dict[fx.Node, None]()
    while pending:
        node = pending.pop()
        if node in computed and node not in found and node.meta["val"].ndim >= 4:
            found[node] = None
            pending += node.all_input_nodes
    return list(found)


def _leaves(node: fx.Node) -> bool:
    """Whether a value is only returned, as it is or in part."""
    if node.op == "output":
        return True
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.ndim == 4 and bool(node.users) and all(map(_leaves, node.users))


def _sizes(program: Program) -> dict[str, tuple[fx.Node, int | None]]:
    """Where each open size can be had: an input that is this number, or an input and the axis that has this size."""
    found: dict[str, tuple[fx.Node, int | None]] = {}
    for node in program.graph.find_nodes(op="placeholder"):
        value = node.meta["val"]
        if isinstance(value, torch.SymInt):
            found.setdefault(str(value), (node, None))
        for axis, size in enumerate(value.shape) if isinstance(value, Tensor) else ():
            if isinstance(size, torch.SymInt):
                found.setdefault(str(size), (node, axis))
    return found


def _blank(
    program: Program, node: fx.Node, computed: set[fx.Node], sizes: Mapping[str, tuple[fx.Node, int | None]]
) -> fx.Node:
    """What is kept without the attention, made at the insertion point."""

    def size(value: Any) -> Any:
        if not isinstance(value, torch.SymInt):
            return value
        if str(value) not in sizes:
            raise Unsupported(
                f"cached rows of the size {value}", where=module_path(node), hint="Use skipstone.optimize."
            )
        source, axis = sizes[str(value)]
        return source if axis is None else program.call(aten.sym_size.int, source, axis)

    def zeros(each: fx.Node) -> fx.Node:
        value = each.meta["val"]
        shape = [size(length) for length in value.shape]
        return program.call(aten.zeros.default, shape, dtype=value.dtype, device=value.device)

    def blanked(each: fx.Node) -> fx.Node:
        return zeros(each) if each in computed else each

    if node.target not in _JOINS:
        return zeros(node)
    args = fx.map_arg(node.args, blanked)
    return program.call(node.target, *args, **node.kwargs)  # type: ignore[arg-type, misc]
