"""Which operators mix tokens: the proof that a KV cache is sound.

A cache lets a program compute new tokens alone. That is exact only if attention is the one place where tokens meet and
if a token's position comes from the `POSITIONS` input alone. The analysis follows the sequence axis through the graph:
a dimension is *along the sequence* when its size depends on the sequence length S. Every operator must then work row
by row along it: it may not reduce, contract, slice, shift or sort it. A dimension may hold the sequence together with
others (``[B * S, ...]``); how far apart its tokens stand is followed too, so that a reshape can only take apart what
was put together. A value made of no input must be the same for every token and every S: where an operator would be
refused on activations (``arange(S)``, a table cut to S rows, a sum over S ones), its result may not reach one, and
neither may S as a number. An operator that is not known here is an offender.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from skipstone.ir.dialect import ATTENTION, EXPERTS, GATE, KEEP, MATMUL_NBITS, Kind
from skipstone.ir.einsum import summed
from skipstone.ir.errors import Unsupported
from skipstone.ir.program import Program, Role, module_path

aten = torch.ops.aten

CACHEABLE = (Kind.CAUSAL, Kind.SLIDING, Kind.CHUNKED)
"""Patterns in which a token never sees a later one, and which follow from positions alone."""

_RESHAPES = (aten.reshape.default, aten.view.default, aten._unsafe_view.default, aten.flatten.using_ints)
_SQUEEZES = (aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims)
"""Operators that drop a dimension of size 1, which that of the sequence may be."""
_MOVES = (
    *_SQUEEZES, aten.transpose.int, aten.permute.default, aten.t.default, aten.unsqueeze.default, aten.expand.default,
    aten.expand_as.default, aten.broadcast_to.default,
    aten.repeat.default, aten.clone.default, aten.contiguous.default, aten.alias.default, aten.detach.default,
    aten._to_copy.default, aten.to.dtype, aten.type_as.default, aten.dropout.default, aten.constant_pad_nd.default,
    aten.view_as_complex.default, aten.view_as_real.default,
)  # fmt: skip
_ELEMENTWISE = (
    aten.polar.default, aten.complex.default, aten.masked_fill.Scalar, aten.masked_fill.Tensor,
    aten.where.ScalarOther, aten.where.ScalarSelf, aten.relu6.default, aten.softplus.default, aten.mish.default,
    aten.hardswish.default, aten.copy.default, aten.__or__.Tensor, aten.__and__.Tensor, aten.__xor__.Tensor,
)  # fmt: skip
_SIZED = (*_RESHAPES, aten.expand.default, aten.broadcast_to.default, aten.repeat.default, aten.slice.Tensor)
"""Operators to which a number is a size or a bound: `_judge_move` and `_judge_slice` see whether it may depend on S."""
_ARANGES = (aten.arange.default, aten.arange.start, aten.arange.start_step)
_READS = (aten._local_scalar_dense.default, aten.item.default)
_FILLED: dict[Any, int] = {
    aten.full.default: 1, aten.full_like.default: 1, aten.new_full.default: 2, aten.scalar_tensor.default: 0,
}  # fmt: skip
"""Constants made of a number: where it stands among the arguments."""
_CONSTANTS = (
    aten.ones_like.default, aten.zeros_like.default, aten.full_like.default, aten.full.default, aten.ones.default,
    aten.zeros.default, aten.new_ones.default, aten.new_zeros.default, aten.new_full.default,
    aten.scalar_tensor.default, aten.empty_like.default, aten.new_empty.default, aten.empty.memory_format,
)  # fmt: skip
_ALONG_DIM: dict[Any, int] = {  # operators that work along the dimension(s) in this argument
    aten.softmax.int: 1, aten._softmax.default: 1, aten.log_softmax.int: 1, aten.mean.dim: 1, aten.sum.dim_IntList: 1,
    aten.amax.default: 1, aten.amin.default: 1, aten.max.dim: 1, aten.min.dim: 1, aten.argmax.default: 1,
    aten.var.correction: 1, aten.var.dim: 1, aten.std.correction: 1, aten.std.dim: 1,
    aten.linalg_vector_norm.default: 2, aten.norm.ScalarOpt_dim: 2, aten.cumsum.default: 1, aten.cumprod.default: 1,
    aten.sort.default: 1, aten.sort.stable: 2,
    aten.topk.default: 2, aten.split.Tensor: 2, aten.split_with_sizes.default: 2, aten.chunk.default: 2,
    aten.unbind.int: 1, aten.select.int: 1, aten.gather.default: 1, aten.scatter.src: 1, aten.scatter.value: 1,
    aten.flip.default: 1, aten.index_select.default: 1, aten.glu.default: 1, aten.logsumexp.default: 1,
    aten.any.dim: 1, aten.all.dim: 1, aten.prod.dim_int: 1, aten.repeat_interleave.self_int: 2, aten.diff.default: 2,
    aten.argsort.default: 1, aten.scatter_add.default: 1, aten.unflatten.int: 1, aten.narrow.default: 1,
    aten.roll.default: 2, aten.unfold.default: 1, aten.cummax.default: 1,
}  # fmt: skip
_DEFAULT_DIM: dict[Any, Any] = {
    aten.topk.default: -1, aten.split.Tensor: 0, aten.split_with_sizes.default: 0, aten.chunk.default: 0,
    aten.unbind.int: 0, aten.sort.default: -1, aten.glu.default: -1, aten.argsort.default: -1,
}  # fmt: skip
_IN_PLACE = (aten.gather.default, aten.scatter.src, aten.scatter.value, aten.scatter_add.default)
"""Operators whose operands meet at the same index in every dimension but one, without broadcasting."""
_ROW_COPIES = (aten.repeat_interleave.self_int,)
"""Operators along a dimension that keep its rows apart."""


@dataclass(frozen=True)
class Offender:
    """A node that breaks the proof.

    Attributes:
        node: where.
        reason: what it does, in words.
        mixes: whether tokens may see each other there; if not, it only tells positions apart by counting.
    """

    node: fx.Node
    reason: str
    mixes: bool = True

    def refusal(self) -> Unsupported:
        """The offender as a typed refusal."""
        place = ", ".join(part for part in (module_path(self.node), self.node.name) if part)
        hint = "Use cache=False: each step then recomputes the sequence."
        return Unsupported(f"a KV cache: {self.reason}", where=place, hint=hint)


def prove_cacheable(program: Program) -> None:
    """Return if a KV cache is exact for this program.

    Raises:
        Unsupported: it is not; the message names the first node that mixes tokens, and how.
    """
    for offender in offenders(program):
        raise offender.refusal()


def offenders(program: Program) -> Iterator[Offender]:
    """Every node that keeps a KV cache from being exact, in graph order."""
    tokens = program.input(Role.TOKENS) or program.input(Role.EMBEDDINGS)
    if tokens is None:
        raise Unsupported("a KV cache for a program without a token or embedding input")
    sizes = tokens.meta["val"].shape[:2]
    mixing = list(_Analysis(program, sizes, axis=1).run())
    yield from mixing
    # By the same rules sequences of a batch must not meet: each may be padded, and continued, in its own way.
    for offender in _Analysis(program, sizes, axis=0).run():
        if offender.node not in [known.node for known in mixing]:
            yield Offender(offender.node, f"{_name(offender.node)} lets the sequences of a batch meet")


class _Analysis:
    """Follows, from inputs to outputs, what depends on tokens or positions and what is counted inside.

    It is written for the sequence, `axis` 1 of the inputs, and does the same for the batch, their axis 0.
    """

    def __init__(self, program: Program, sizes: Any, axis: int) -> None:
        self.program = program
        self.batch, self.length = sizes
        self.axis = axis
        self.active: set[fx.Node] = set()  # depends on the tokens or the positions
        self.inner: dict[fx.Node, sympy.Expr] = {}  # elements of the sequence dimension from one token to the next
        # What depends on neither must be the same for every token and every S, or is one of these:
        self.counted: set[fx.Node] = set()  # tells rows apart, by counting them
        self.measured: set[fx.Node] = set()  # depends on S
        self.symbols: set[sympy.Symbol] = set()  # S; a second one if nothing says that positions are as many as tokens

    def run(self) -> Iterator[Offender]:
        sources = (Role.TOKENS, Role.EMBEDDINGS, Role.POSITIONS)
        placeholders = [node for node in self.program.graph.nodes if node.op == "placeholder"]
        for port, node in zip(self.program.inputs, placeholders, strict=True):
            if port.role in sources:
                self.active.add(node)
                self.inner[node] = sympy.Integer(1)
                self.symbols |= node.meta["val"].shape[self.axis].node.expr.free_symbols
        for node in self.program.nodes():
            operands = node.all_input_nodes
            if not self._is_tensor(node):
                if node.target in _READS and not self.measured.isdisjoint(operands):
                    self.measured.add(node)
                continue
            if node.target in _CONSTANTS:
                if any(self._depends(argument) for argument in self._filling(node)):
                    self.measured.add(node)
                continue
            self.inner[node] = self._inner(node)
            reason = self._judge(node) or self._judge_fold(node)
            counted = not self.counted.isdisjoint(operands)
            if self.active.isdisjoint(operands):
                if reason:
                    (self.counted if self._counts(node) else self.measured).add(node)
                elif counted:
                    self.counted.add(node)
                continue
            self.active.add(node)
            if reason:
                yield Offender(node, reason)
            elif counted:
                reason = f"{_name(node)} uses positions that the model counts itself, not the position_ids input"
                yield Offender(node, reason, mixes=False)
        logits = self.program.output(Role.LOGITS)
        if logits is not None and not (logits in self.active and self._is_rows(logits, axis=1)):
            yield Offender(logits, "the logits are not one row a token")

    def _judge(self, node: fx.Node) -> str:
        target = node.target
        if target is ATTENTION:
            return self._judge_attention(node)
        if self._length_as_value(node) or not self.measured.isdisjoint(node.all_input_nodes):
            return f"{_name(node)} uses the sequence length as a number"
        if target is KEEP:
            apart = all(self._is_rows(operand, axis=2) for operand in node.args[1:])
            return "" if apart else "keys and values of something other than the sequence stay in the cache"
        inputs = [operand for operand in node.all_input_nodes if self._axes(operand)]
        if not inputs and not self._axes(node):
            # One row of a table, by the number of tokens: nothing of that number is seen in its size.
            return self._judge_slice(node, node) if target is aten.slice.Tensor else ""
        if len(self._axes(node)) > 1:
            return f"{_name(node)} pairs every token with every other"
        if len({self.inner[operand] for operand in inputs if operand in self.inner}) > 1:
            return f"{_name(node)} meets the tokens in two different orders"
        if target is operator.getitem or target in _MOVES or target in _RESHAPES:
            return self._judge_move(node)
        if target in _ELEMENTWISE or torch.Tag.pointwise in getattr(target, "tags", ()):
            return self._judge_broadcast(node, inputs)
        if target is aten.linear.default:
            return self._judge_contraction(node, [(node.args[0], -1), (node.args[1], -1)])
        if target in (aten.matmul.default, aten.bmm.default, aten.mm.default):
            return self._judge_contraction(node, [(node.args[0], -1), (node.args[1], -2)])
        if target is aten.einsum.default:
            return self._judge_contraction(node, summed(node))
        if target is MATMUL_NBITS:
            return self._judge_contraction(node, [(node.args[0], -1)])
        if target is aten.addmm.default:
            return self._judge_contraction(node, [(node.args[1], -1), (node.args[2], -2)])
        if target in (aten.layer_norm.default, aten.rms_norm.default):
            return self._judge_dims(node, range(-len(node.args[1]), 0))  # type: ignore[arg-type]
        if target is aten.embedding.default:
            return "" if not self._axes(node.args[0]) else f"{_name(node)} looks up a table made of tokens"
        if target in (aten.cat.default, aten.stack.default):
            return self._judge_cat(node)
        if target is aten.slice.Tensor:
            return self._judge_slice(node, node)
        if target is aten.slice_scatter.default:
            return self._judge_slice(node, node.args[1])
        if target is aten.select_scatter.default:
            return self._judge_select_scatter(node)
        if target is aten.index.Tensor:
            return self._judge_index(node)
        if target is aten.one_hot.default:
            return ""
        if target is GATE:  # one decision a row
            alike = all(self._axes(operand) == self._axes(node) for operand in node.all_input_nodes)
            return "" if alike else f"{_name(node)} meets the sequence in two different dimensions"
        if target is EXPERTS:  # one row a token in each of its operands
            return self._judge_broadcast(node, inputs)
        if target in _IN_PLACE:
            return self._judge_in_place(node)
        if target in _ROW_COPIES:
            return "" if len(node.args) > 2 else f"{_name(node)} works over the whole sequence"
        if target in _ALONG_DIM:
            place = _ALONG_DIM[target]
            dims = node.args[place] if len(node.args) > place else node.kwargs.get("dim", _DEFAULT_DIM.get(target))
            if dims is None or dims == []:
                return f"{_name(node)} works over the whole sequence"
            return self._judge_dims(node, dims if isinstance(dims, list | tuple) else [dims])
        return f"{_name(node)} is not known to keep tokens apart"

    def _judge_attention(self, node: fx.Node) -> str:
        kind = Kind(str(node.kwargs["kind"]))
        if node.kwargs.get("slot", -1) == -1:
            return "cross attention has keys that do not belong to the sequence"
        if kind not in CACHEABLE or any(argument is not None for argument in node.args[3:5]):
            reasons = {
                Kind.BIDIRECTIONAL: "bidirectional attention sees later tokens",
                Kind.BLOCK_CAUSAL: "block-causal attention sees later tokens of its block",
            }
            return reasons.get(kind, "attention with an explicit mask or bias, of which no rule is known")
        for operand in node.args[:3]:
            if not self._is_rows(operand, axis=2):
                return "attention over something other than the sequence"
        return ""

    def _judge_move(self, node: fx.Node) -> str:
        """Views keep rows apart as long as the sequence stays within one dimension and is not cut."""
        if node.target is aten.constant_pad_nd.default:
            source = node.args[0]
            padded = range(source.meta["val"].ndim - len(node.args[1]) // 2, source.meta["val"].ndim)  # type: ignore
            return f"{_name(node)} pads the sequence" if set(padded) & set(self._axes(source)) else ""
        source = node.args[0]
        if node.target in _SQUEEZES:
            dims: Any = node.args[1] if len(node.args) > 1 else range(source.meta["val"].ndim)  # type: ignore[union-attr]
            return self._judge_dims(node, dims if isinstance(dims, list | tuple | range) else [dims])
        if node.target is aten.repeat.default and not self._axes(source):
            sizes = source.meta["val"].shape  # type: ignore[union-attr]
            places = [axis - node.meta["val"].ndim + len(sizes) for axis in self._axes(node)]
            several = any(place >= 0 and sizes[place] != 1 for place in places)
            return f"{_name(node)} repeats rows along the sequence" if several else ""
        outer = self._outer(node)
        if any(sympy.fraction(part)[1] != 1 for part in (self.inner[node], outer)) or self.symbols & outer.free_symbols:
            return f"{_name(node)} takes the tokens apart in another order than they were put together"
        for axis in self._axes(node):
            size = node.meta["val"].shape[axis].node.expr
            if size.has(sympy.floor) or "//" in str(size):
                return f"{_name(node)} cuts the sequence into blocks"
        return ""

    def _judge_fold(self, node: fx.Node) -> str:
        lost = not self._axes(node) and any(self._axes(operand) for operand in node.all_input_nodes)
        return f"{_name(node)} folds the sequence away" if lost else ""

    def _judge_in_place(self, node: fx.Node) -> str:
        source, dim = node.args[:2]
        if node.target is aten.gather.default and not self._axes(source):
            looked_up = self._axes(node) == (dim % node.meta["val"].ndim,)  # type: ignore[operator]
            return "" if looked_up else f"{_name(node)} takes rows of a table by their number"
        if any(self._axes(operand) != self._axes(node) for operand in node.all_input_nodes):
            return f"{_name(node)} picks rows by their number"
        return self._judge_dims(node, [dim])

    def _judge_broadcast(self, node: fx.Node, inputs: list[fx.Node]) -> str:
        result = {axis - node.meta["val"].ndim for axis in self._axes(node)}
        for operand in inputs:
            if {axis - operand.meta["val"].ndim for axis in self._axes(operand)} != result:
                return f"{_name(node)} meets the sequence in two different dimensions"
        return ""

    def _judge_contraction(self, node: fx.Node, contracted: Sequence[tuple[Any, int]]) -> str:
        for operand, axis in contracted:
            ndim = operand.meta["val"].ndim
            if (axis % ndim if ndim > 1 else 0) in self._axes(operand):
                return f"{_name(node)} sums over the sequence"
        return ""

    def _judge_dims(self, node: fx.Node, dims: Any) -> str:
        for operand in node.all_input_nodes:
            axes = self._axes(operand)
            if axes and any(dim % operand.meta["val"].ndim in axes for dim in dims):
                return f"{_name(node)} works along the sequence"
        return ""

    def _judge_select_scatter(self, node: fx.Node) -> str:
        source, part, dim = node.args[0], node.args[1], node.args[2] % node.meta["val"].ndim  # type: ignore[operator]
        if dim in self._axes(node):
            return f"{_name(node)} replaces a row of the sequence"
        within = tuple(axis - (axis > dim) for axis in self._axes(node))
        apart = all(
            not axes or axes == own
            for axes, own in zip((self._axes(source), self._axes(part)), (self._axes(node), within), strict=True)
        )
        return "" if apart else f"{_name(node)} meets the sequence in two different dimensions"

    def _judge_index(self, node: fx.Node) -> str:
        """A table may be looked up, and parts of each row may be picked, but no rows of the sequence."""
        source, indices = node.args[0], node.args[1]
        if not self._axes(source):
            return ""
        picked = [(axis, index) for axis, index in enumerate(indices) if index is not None]  # type: ignore[arg-type]
        apart = all(axis not in self._axes(source) and not self._axes(index) for axis, index in picked)
        return "" if apart else f"{_name(node)} picks rows of the sequence"

    def _judge_cat(self, node: fx.Node) -> str:
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        ndim = node.meta["val"].ndim
        if dim % ndim in self._axes(node):  # type: ignore[operator]
            return f"{_name(node)} puts tokens before or after others"
        operands = [operand for operand in node.args[0] if self._axes(operand)]  # type: ignore[union-attr]
        return "" if len({self._axes(operand) for operand in operands}) <= 1 else f"{_name(node)} joins unlike axes"

    def _judge_slice(self, node: fx.Node, part: Any) -> str:
        """`part` is what is taken out of the first argument, or put into it."""
        source, place = node.args[0], 1 if part is node else 2
        dim = node.args[place] if len(node.args) > place else 0
        if dim % source.meta["val"].ndim not in self._axes(source):  # type: ignore
            bounded = any(self._depends(_value(bound)) for bound in node.args[place + 1 :])
            return f"{_name(node)} uses the sequence length as a number" if bounded else ""
        whole = part.meta["val"].shape == source.meta["val"].shape  # type: ignore[union-attr]
        return "" if whole else f"{_name(node)} takes a part of the sequence"

    def _inner(self, node: fx.Node) -> sympy.Expr:
        """How many elements of its dimension lie from one token of the sequence to the next; 1 unless it is shared.

        A reshape keeps the distance in memory order. Where the dimension cannot hold tokens at that distance, the
        result or `_outer` is a fraction.
        """
        source = next((each for each in node.all_input_nodes if each in self.inner and self._axes(each)), None)
        if source is None or not self._axes(node):
            return sympy.Integer(1)
        if node.target in _RESHAPES:
            return sympy.cancel(self.inner[source] * self._behind(source) / self._behind(node))
        if node.target in _ROW_COPIES and node.args[2:]:
            along = node.args[2] % source.meta["val"].ndim in self._axes(source)  # type: ignore[operator]
            return self.inner[source] * (_expression(_value(node.args[1])) if along else 1)
        return self.inner[source]

    def _outer(self, node: fx.Node) -> sympy.Expr:
        """What the sequence dimension holds beside the tokens and what lies between them."""
        if not self._axes(node):
            return sympy.Integer(1)
        size = _expression(node.meta["val"].shape[self._axes(node)[0]])
        return sympy.cancel(size / (min(self.symbols & size.free_symbols, key=str) * self.inner[node]))

    def _behind(self, node: fx.Node) -> sympy.Expr:
        """Elements in the dimensions behind that of the sequence."""
        shape = node.meta["val"].shape[self._axes(node)[0] + 1 :]
        return sympy.Mul(*map(_expression, shape))

    def _axes(self, node: Any) -> tuple[int, ...]:
        """The dimensions of a tensor value whose size depends on S; those of its first part, for several values."""
        value = node.meta.get("val") if isinstance(node, fx.Node) else None
        if isinstance(value, list | tuple):
            value = next((part for part in value if isinstance(part, torch.Tensor)), None)
        if not isinstance(value, torch.Tensor):
            return ()
        return tuple(axis for axis, size in enumerate(value.shape) if self._depends(size))

    def _depends(self, size: Any) -> bool:
        symbolic = isinstance(size, torch.SymInt | torch.SymFloat | torch.SymBool)
        return symbolic and not self.symbols.isdisjoint(size.node.expr.free_symbols)

    def _is_rows(self, node: Any, axis: int) -> bool:
        """Whether `node` is [batch, ...] with one row a token at `axis`."""
        sizes = node.meta["val"].shape
        along = axis if self.axis == 1 else 0
        return self._axes(node) == (along,) and sizes[axis] == self.length and sizes[0] == self.batch

    def _filling(self, node: fx.Node) -> list[Any]:
        place = _FILLED.get(node.target, len(node.args))
        return [_value(argument) for argument in node.args[place : place + 1]]

    def _is_tensor(self, node: fx.Node) -> bool:
        value = node.meta.get("val")
        return isinstance(value, torch.Tensor | list | tuple)

    def _counts(self, node: fx.Node) -> bool:
        """Whether the node, made of no input, gives each row a value that is the same for any S."""
        if not self._axes(node) or not self.measured.isdisjoint(node.all_input_nodes):
            return False
        if node.target in _ARANGES:
            start_and_step = (*node.args[:1], *node.args[2:]) if len(node.args) > 1 else ()
            return not any(self._depends(_value(argument)) for argument in start_and_step)
        if node.target is aten.slice.Tensor:
            return node.args[2] in (None, 0) and not self._axes(node.args[0])
        return node.target in (aten.cumsum.default, aten.tril.default, aten.triu.default)

    def _length_as_value(self, node: fx.Node) -> bool:
        """Whether the node computes with a number that depends on S."""
        return node.target not in _SIZED and any(self._depends(_value(operand)) for operand in node.all_input_nodes)


def _value(argument: Any) -> Any:
    return argument.meta.get("val") if isinstance(argument, fx.Node) else argument


def _expression(size: Any) -> sympy.Expr:
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


def _name(node: fx.Node) -> str:
    return str(node.target).removeprefix("aten.").split(".")[0]
