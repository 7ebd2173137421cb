"""Recognise attention in captured graphs: `scaled_dot_product_attention` and matmul-softmax-matmul.

Grouped keys and values that were repeated for every query head are taken before the repetition, and a mask that follows
from the sizes alone becomes the kind that it is.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from skipstone.ir.capture.masks import HIDDEN, classify_nodes
from skipstone.ir.dialect import ATTENTION, Kind
from skipstone.ir.program import Program, fake_value, provenance

aten = torch.ops.aten
_SDPA = aten.scaled_dot_product_attention.default
_COPIES = (aten.clone.default, aten.contiguous.default, aten.dropout.default, aten.alias.default)
_CASTS = (aten._to_copy.default, aten.to.dtype)
_SOFTMAX = (aten.softmax.int, aten._softmax.default)


@dataclass
class _Match:
    """An attention as it stands in the graph.

    Attributes:
        q, k, v: its operands, four-dimensional; `k_transposed` says that k is [B, KH, D, T].
        masks: boolean nodes, true where a query may attend; `hides` holds those that are true where it may not.
        fill: what hidden logits become; where it is a number, a query that may attend to nothing sees all keys alike.
        biases: floating-point nodes that are added to the logits.
        is_filled_before: whether a bias is added behind a mask that fills in a number: hidden keys are not alike then,
            which a query that may attend to nothing would see.
        kind: causal if the operator itself says so.
    """

    q: fx.Node
    k: fx.Node
    v: fx.Node
    scale: float
    k_transposed: bool = False
    softcap: float = 0.0
    kind: Kind = Kind.BIDIRECTIONAL
    masks: list[fx.Node] = field(default_factory=list)
    hides: list[fx.Node] = field(default_factory=list)
    fill: float = -math.inf
    biases: list[fx.Node] = field(default_factory=list)
    is_filled_before: bool = False

    @property
    def is_masked(self) -> bool:
        """Whether anything says what may be attended to, or is added to the logits."""
        return bool(self.masks or self.hides or self.biases)


def recognise_attention(program: Program, verbatim: bool = False) -> int:
    """Replace every attention that is recognised by a `skipstone::attention` node, numbered in call order.

    Attentions that are nodes of the dialect already keep the first numbers.

    Args:
        verbatim: leave masks and repeated heads as they stand, so that the model's own operator can come back. Keys of
            another length than the queries are then taken for those of a cache, not for another sequence's.
    Returns:
        how many were replaced.
    """
    found = 0
    kinds: dict[tuple[fx.Node, ...], tuple[Kind, int] | None] = {}
    slots: Iterator[int] = itertools.count(
        len([node for node in program.nodes(ATTENTION) if node.kwargs.get("slot", -1) != -1])
    )
    for node in list(program.nodes()):
        match = _from_sdpa(node) if node.target is _SDPA else _from_softmax(program, node)
        if match is None:
            continue
        with provenance(program, "capture", like=node), program.graph.inserting_before(node):
            _write_out_broadcasts(program, match)
            if not _fits(match):
                continue
            # Of the kinds that follow from sizes, all let a query see itself.
            if match.is_filled_before and (verbatim or _known_kind(program, match, kinds) is None):
                continue
            new = _verbatim(program, match, slots) if verbatim else _attention(program, match, slots, kinds)
        node.replace_all_uses_with(new)
        found += 1
    program.recompile()
    return found


def _verbatim(program: Program, match: _Match, slots: Iterator[int]) -> fx.Node:
    """The dialect's node for a match as it stands, made at the insertion point."""
    k = program.call(aten.transpose.int, match.k, 2, 3) if match.k_transposed else match.k
    mask, bias = _mask_and_bias(program.call, match)
    kind = Kind.EXPLICIT if match.kind is Kind.BIDIRECTIONAL and (mask or bias) else match.kind
    return program.call(
        ATTENTION, match.q, k, match.v, mask, bias, scale=match.scale, kind=str(kind), softcap=match.softcap,
        slot=next(slots),
    )  # fmt: skip


def _attention(
    program: Program, match: _Match, slots: Iterator[int], kinds: dict[tuple[fx.Node, ...], tuple[Kind, int] | None]
) -> fx.Node:
    """The dialect's node for a match, made at the insertion point."""

    def call(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = program.graph.call_function(target, args, kwargs)
        node.meta["val"] = fake_value(node)
        return node

    k = call(aten.transpose.int, match.k, 2, 3) if match.k_transposed else match.k
    k, v = _ungrouped(k, match.v)
    kind, window = match.kind, 0
    if match.is_masked and kind is Kind.BIDIRECTIONAL:
        known = _known_kind(program, match, kinds)
        if known is None:
            kind = Kind.EXPLICIT
        else:
            (kind, window), match.masks, match.hides, match.biases = known, [], [], []
    mask, bias = _mask_and_bias(call, match)
    cross = not statically_known_true(match.q.meta["val"].shape[2] == k.meta["val"].shape[2])
    return call(
        ATTENTION, match.q, k, v, mask, bias, scale=match.scale, kind=str(kind), window=window, softcap=match.softcap,
        slot=-1 if cross else next(slots),
    )  # fmt: skip


def _known_kind(
    program: Program, match: _Match, kinds: dict[tuple[fx.Node, ...], tuple[Kind, int] | None]
) -> tuple[Kind, int] | None:
    """The kind and window of the masks of a match, None where they follow from more than sizes; kept in `kinds`."""
    shown = (*match.masks, *match.biases)
    parts = (*shown, *match.hides)
    if parts not in kinds:  # layers share their masks
        kinds[parts] = classify_nodes(program, shown, match.hides)
    return kinds[parts]


def _write_out_broadcasts(program: Program, match: _Match) -> None:
    """Expand single sequences and heads that PyTorch's operators broadcast: to one batch, to as many keys as values."""

    def expand(name: str, axis: int, *others: str) -> None:
        operand: fx.Node = getattr(match, name)
        likes = [like for like in (getattr(match, other) for other in others) if _size(like, axis) != 1]
        if _size(operand, axis) != 1 or not likes:
            return
        size = _size(likes[0], axis)
        sizes: list[Any] = [-1] * 4
        sizes[axis] = size if isinstance(size, int) else program.call(aten.sym_size.int, likes[0], axis)
        setattr(match, name, program.call(aten.expand.default, operand, sizes))

    for name, others in (("q", "kv"), ("k", "qv"), ("v", "qk")):
        expand(name, 0, *others)
    for name, other in (("k", "v"), ("v", "k"), ("q", "k")):
        expand(name, 1, other)


def _size(node: fx.Node, axis: int) -> Any:
    """The size of a dimension: a number where it is known to be one."""
    size = node.meta["val"].shape[axis]
    return size if isinstance(size, int) or size.node.expr.free_symbols else int(size)


def _fits(match: _Match) -> bool:
    """Whether the operands have the sizes of one attention."""
    q, k, v = (operand.meta["val"].shape for operand in (match.q, match.k, match.v))
    same = ((q[0], k[0]), (k[0], v[0]), (k[1], v[1]), (q[1] % k[1], 0))
    return all(statically_known_true(one == other) for one, other in same)


def _mask_and_bias(call: Any, match: _Match) -> tuple[fx.Node | None, fx.Node | None]:
    """What stands for the masks and biases of a match in the dialect, made at the insertion point.

    The dialect gives a query that may attend to nothing zeros. Where logits are filled with a number such a query sees
    all keys alike: the mask then becomes the lowest bias, beside which logits of any size vanish.
    """
    masks = [*match.masks, *(call(aten.logical_not.default, each) for each in match.hides)]
    mask, bias = _combined(call, masks, aten.logical_and), _combined(call, match.biases, aten.add)
    if mask is None or match.fill == -math.inf:
        return mask, bias
    lowest = torch.finfo(torch.float32).min
    if bias is None:
        return None, call(aten.where.Scalar, mask, 0.0, lowest)
    dtype = torch.promote_types(bias.meta["val"].dtype, torch.float32)
    return None, call(aten.where.ScalarOther, mask, call(aten._to_copy.default, bias, dtype=dtype), lowest)


def _combined(call: Any, nodes: list[fx.Node], join: Any) -> fx.Node | None:
    result = None
    for node in nodes:
        overload = join.Tensor if join is aten.add else join.default
        result = node if result is None else call(overload, result, node)
    return result


def _from_sdpa(node: fx.Node) -> _Match | None:
    arguments = dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), node.args, strict=False))
    arguments |= node.kwargs
    q, k, v, mask, scale = (arguments.get(name) for name in ("query", "key", "value", "attn_mask", "scale"))
    if arguments.get("dropout_p") or any(_rank(operand) != 4 for operand in (q, k, v)):
        return None
    if scale is None:
        scale = int(q.meta["val"].shape[-1]) ** -0.5  # type: ignore[union-attr]
    if not isinstance(scale, int | float):
        return None
    match = _Match(q, k, v, float(scale))  # type: ignore[arg-type]
    if arguments.get("is_causal"):
        match.kind = Kind.CAUSAL
    if isinstance(mask, fx.Node):
        (match.masks if mask.meta["val"].dtype == torch.bool else match.biases).append(mask)
    return match


def _from_softmax(program: Program, node: fx.Node) -> _Match | None:
    """softmax(mask and bias of softcap(scale * (q @ k^T))) @ v, all four-dimensional."""
    if node.target is not aten.matmul.default or _rank(node) != 4:
        return None
    weights = _through(node.args[0])
    if _target(weights) not in _SOFTMAX or weights.args[1] not in (-1, 3):
        return None
    v: Any = node.args[1]
    match = _Match(v, v, v, 1.0)
    logits = _peel_masks(program, _through(weights.args[0]), match)
    logits = _peel_softcap(logits, match)
    logits = _peel_scale(logits, match)
    if _target(logits) is not aten.matmul.default:
        return None
    match.q, match.k = logits.args
    if any(_rank(operand) != 4 for operand in (match.q, match.k, v)):
        return None
    if _target(match.k) is aten.transpose.int and {axis % 4 for axis in match.k.args[1:]} == {2, 3}:  # type: ignore[operator]
        match.k = match.k.args[0]  # type: ignore[assignment]
    else:
        match.k_transposed = True
    return match


def _peel_masks(program: Program, logits: Any, match: _Match) -> Any:
    """Go back over masks and biases, and note them down.

    It stops at a mask that fills in another value than one before.
    """
    while True:
        if _target(logits) is aten.add.Tensor and not logits.kwargs and isinstance(logits.args[1], fx.Node):
            match.biases.append(logits.args[1])
            logits = _through(logits.args[0])
            continue
        if _target(logits) is aten.masked_fill.Scalar:
            source, mask, value = logits.args
            noted = match.hides
        elif _target(logits) in (aten.where.self, aten.where.ScalarOther):
            mask, source, value = logits.args
            noted = match.masks
        else:
            return logits
        fill = _number(program, value)
        is_first = not match.masks and not match.hides
        if not fill <= HIDDEN or (fill != match.fill and not is_first):
            return logits
        match.fill = fill
        match.is_filled_before = match.is_filled_before or (fill != -math.inf and bool(match.biases))
        noted.append(mask)
        logits = _through(source)


def _peel_scale(logits: Any, match: _Match) -> Any:
    """Go back over factors, and multiply them."""
    while _target(logits) in (aten.mul.Tensor, aten.div.Tensor) and isinstance(logits.args[1], int | float):
        factor = float(logits.args[1])
        match.scale *= factor if logits.target is aten.mul.Tensor else 1 / factor
        logits = _through(logits.args[0])
    return logits


def _peel_softcap(logits: Any, match: _Match) -> Any:
    """Go back over ``cap * tanh(logits / cap)``."""
    if _target(logits) is not aten.mul.Tensor or not isinstance(logits.args[1], int | float):
        return logits
    tanh = _through(logits.args[0])
    inner: Any = _through(tanh.args[0]) if _target(tanh) is aten.tanh.default else None
    if _target(inner) is aten.div.Tensor and inner.args[1] == logits.args[1]:
        match.softcap = float(logits.args[1])
        return _through(inner.args[0])
    return logits


def _number(program: Program, value: Any) -> float:
    """The number that a value is, or that fills a tensor; NaN if it is none."""
    value = _through(value)
    if isinstance(value, fx.Node) and value.op == "get_attr":
        tensor = program.tensor(str(value.target))
        value = float(tensor) if tensor.numel() == 1 else None
    elif _target(value) in (aten.full.default, aten.scalar_tensor.default):
        value = value.args[1 if value.target is aten.full.default else 0]
    return float(value) if isinstance(value, int | float) else math.nan


def _ungrouped(k: fx.Node, v: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Keys and values before they were repeated for the query heads of their group, where both were."""
    narrow = _before_repeat(k), _before_repeat(v)
    heads = [each.meta["val"].shape[1] for each in narrow]
    return narrow if heads[0] == heads[1] else (k, v)


def _before_repeat(node: fx.Node) -> fx.Node:
    """The operand of ``repeat_interleave(x, n, 1)`` or of ``x[:, :, None].expand(...).reshape(...)``."""
    node = _copied(node)
    if node.target is aten.repeat_interleave.self_int and node.args[2:] == (1,):
        return node.args[0]  # type: ignore[return-value]
    if node.target is aten.reshape.default:
        expanded = _copied(node.args[0])
        unsqueezed: Any = _copied(expanded.args[0]) if _target(expanded) is aten.expand.default else None
        if _target(unsqueezed) is aten.unsqueeze.default and unsqueezed.args[1] == 2:
            source: fx.Node = _copied(unsqueezed.args[0])
            batch, heads, *rest = source.meta["val"].shape
            copies = expanded.meta["val"].shape[2]
            if tuple(node.meta["val"].shape) == (batch, heads * copies, *rest):
                return source
    return node


def _copied(value: Any) -> Any:
    while _target(value) in _COPIES or _takes_all(value):
        value = value.args[0]
    return value


def _takes_all(value: Any) -> bool:
    """Whether a value is a slice of all that there is, as PyTorch 2.11 traces several of ``x[:, :, None]``."""
    if _target(value) is not aten.slice.Tensor:
        return False
    bounds = dict(enumerate(value.args))
    return bounds.get(2) in (None, 0) and bounds.get(3) in (None, sys.maxsize) and bounds.get(4, 1) == 1


def _through(value: Any) -> Any:
    """The value behind operators that do not change it in evaluation mode, and behind casts."""
    while _target(value) in (*_COPIES, *_CASTS):
        value = value.args[0]
    return value


def _target(value: Any) -> Any:
    return value.target if isinstance(value, fx.Node) and value.op == "call_function" else None


def _rank(value: Any) -> int:
    tensor = value.meta.get("val") if isinstance(value, fx.Node) else None
    return tensor.ndim if isinstance(tensor, torch.Tensor) else -1
