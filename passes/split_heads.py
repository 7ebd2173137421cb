"""Split an attention by heads, so that groups of heads can be cached in different ways."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from skipstone.ir.dialect import ATTENTION
from skipstone.ir.errors import InternalError
from skipstone.ir.program import Program, module_path, provenance
from skipstone.passes.base import Pass, Remark
from skipstone.passes.kv_cache import number_apart

aten = torch.ops.aten

HEADS = "heads"
"""Metadata of the attentions that this pass makes: the key-value heads, as the model numbers them."""


@dataclass(frozen=True)
class SplitHeads(Pass):
    """Turn attentions into one attention for each group of key-value heads. Heads do not mix, so it is exact.

    Attributes:
        groups: for each attention to split, its number (`slot`) in call order and the groups of its key-value heads,
            counted from 0 in this attention.
    """

    name: ClassVar[str] = "split_heads"

    groups: tuple[tuple[int, tuple[tuple[int, ...], ...]], ...] = ()

    def rewrite(self, program: Program) -> list[Remark]:
        """See `Pass.rewrite`."""
        wanted = dict(self.groups)
        remarks = []
        for node in list(program.nodes(ATTENTION)):
            if groups := wanted.get(node.kwargs.get("slot", -1)):  # type: ignore[arg-type]
                with provenance(program, self.name, like=node), program.graph.inserting_before(node):
                    whole = _split(program, node, groups)
                remarks.append(self.applied(module_path(node), f"split into {len(groups)} groups of heads"))
                node.replace_all_uses_with(whole)
                program.graph.erase_node(node)
        number_apart(program)
        return remarks or [self.missed("model", "no attention is to be split")]

    def ensures(self, program: Program) -> None:
        """See `Pass.ensures`."""
        for node in program.nodes(ATTENTION):
            if node.meta["val"].shape[1] != node.args[0].meta["val"].shape[1]:  # type: ignore[union-attr]
                raise InternalError(f"{node.name} lost heads")


def heads_of(node: fx.Node) -> tuple[int, ...]:
    """The key-value heads of an attention, as the model numbers them."""
    own: tuple[int, ...] = node.meta.get(HEADS) or tuple(range(int(node.args[1].meta["val"].shape[1])))  # type: ignore[union-attr]
    return own


def _split(program: Program, node: fx.Node, groups: Sequence[Sequence[int]]) -> fx.Node:
    q, k, v, mask, bias, sinks, key_bias, frequencies = (*node.args, *[None] * 5)[:8]
    heads, kv_heads = (int(x.meta["val"].shape[1]) for x in (q, k))  # type: ignore[union-attr]
    per_group = heads // kv_heads
    results, order, own = [], [], heads_of(node)
    for group in groups:
        queries = [head * per_group + member for head in group for member in range(per_group)]
        operands = (
            _take(program, q, 1, queries),
            _take(program, k, 1, group),
            _take(program, v, 1, group),
            *(_take(program, each, 1, queries) for each in (mask, bias)),
            _take(program, sinks, 0, queries),
            _take(program, key_bias, 1, group),
            frequencies,
        )
        results.append(program.call(ATTENTION, *operands, **node.kwargs))
        results[-1].meta[HEADS] = tuple(own[head] for head in group)
        order += queries
    whole = program.call(aten.cat.default, results, 1)
    return whole if order == sorted(order) else _take(program, whole, 1, [order.index(head) for head in range(heads)])


def _take(program: Program, x: Any, axis: int, index: Sequence[int]) -> Any:
    """The entries `index` of `x` along `axis`; x itself where it is None or has one entry for all."""
    if x is None or x.meta["val"].shape[axis] == 1:
        return x
    if list(index) == list(range(index[0], index[0] + len(index))):
        return program.call(aten.slice.Tensor, x, axis, index[0], index[0] + len(index))
    chosen = program.add_tensor(f"heads_{'_'.join(map(str, index))}_{len(program.tensors())}", torch.tensor(index))
    return program.call(aten.index_select.default, x, axis, chosen)
