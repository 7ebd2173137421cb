"""Attention of several lanes as one: their heads side by side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from skipstone.ir.dialect import ATTENTION, KEEP
from skipstone.ir.lanes import NotAlike, Operator, Pack
from skipstone.ir.program import ATTENTIONS, module_path

if TYPE_CHECKING:
    from skipstone.passes.stacked import Stacked

aten = torch.ops.aten


def attend(lanes: Stacked, each: Operator) -> tuple[fx.Node, bool]:
    """The results of the attention of all lanes, [N, B, H, S, D], or of the one that is the same for all, and which.

    Lanes whose attention sees others, or as far as others, have one together; the others have theirs, as have those
    that share a cache slot with another iteration, in which other lanes stand side by side.

    Raises:
        NotAlike: an operand has no form over several lanes.
    """
    operands = [lanes.read(arg) if isinstance(arg, Pack) else arg for arg in each.args]
    if not any(value is not None and value.stacked for value in operands):
        nodes = [None if value is None else value.node for value in operands]
        return lanes.call(ATTENTION, *nodes, **each.nodes[0].kwargs), False
    if any(value is not None for value in operands[6:]):
        raise NotAlike("attention with a key bias has no form over several layers")
    kinds: dict[Any, list[int]] = {}
    slots = Counter(node.kwargs.get("slot", -1) for node in lanes.program.nodes(ATTENTION, KEEP))
    for lane, node in enumerate(each.nodes):
        slot = node.kwargs.get("slot", -1)
        shared = slot if slots[slot] > 1 and slot != -1 else None
        kinds.setdefault((node.kwargs["kind"], node.kwargs.get("window", 0), shared), []).append(lane)
    results = [_heads(lanes, each, operands, own) for own in kinds.values()]
    if len(results) == 1:
        return results[0], True
    order = [lane for own in kinds.values() for lane in own]
    whole = lanes.call(aten.cat.default, results, 0)
    return lanes.chosen(whole, [order.index(lane) for lane in range(lanes.lanes)]), True


def _heads(lanes: Stacked, each: Operator, operands: Sequence[Any], own: list[int]) -> fx.Node:
    """Attention [n, B, H, S, D] of some of the lanes."""
    q, k, v = (_merged(lanes, lanes.chosen(lanes.stacked(value), own)) for value in operands[:3])
    mask, bias, sinks = (*operands[3:6], None, None, None)[:3]
    rest = [_of_heads(lanes, mask, own), _of_heads(lanes, bias, own), None]
    if sinks is not None:
        rest[2] = lanes.call(aten.flatten.using_ints, lanes.chosen(lanes.stacked(sinks), own), 0, 1)
    while rest and rest[-1] is None:
        rest.pop()
    out = lanes.call(ATTENTION, q, k, v, *rest, **each.nodes[own[0]].kwargs)
    out.meta[ATTENTIONS] = tuple(module_path(each.nodes[lane]) for lane in own)
    return lanes.lanes_first(lanes.call(aten.unflatten.int, out, 1, [len(own), each.value.shape[1]]), 1)


def _of_heads(lanes: Stacked, value: Any, own: list[int]) -> fx.Node | None:
    """A mask or a bias [B, H or 1, S, T] for the heads of some of the lanes."""
    if value is None:
        return None
    node: fx.Node = value.node
    if not value.stacked:
        is_of_all = node.meta["val"].shape[1] == 1
        return node if is_of_all else lanes.call(aten.cat.default, [node] * len(own), 1)
    if node.meta["val"].shape[2] == 1:
        raise NotAlike("attention with a mask for all heads of each layer has no form over several layers")
    return _merged(lanes, lanes.chosen(node, own))


def _merged(lanes: Stacked, node: fx.Node) -> fx.Node:
    """[n, B, H, S, D] as [B, n * H, S, D]."""
    return lanes.call(aten.flatten.using_ints, lanes.call(aten.transpose.int, node, 0, 1), 1, 2)
