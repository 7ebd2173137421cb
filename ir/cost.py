"""What a program costs: floating point operations, bytes, dependent steps and kernels, as expressions in B, S and P.

The sizes are exact and come from the graph; the times that a `DeviceProfile` makes of them are estimates for ranking.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from skipstone.ir.device import DeviceProfile
from skipstone.ir.device import measure_cpu as measure_cpu  # re-exported beside the model that it feeds
from skipstone.ir.dialect import (
    ATTENTION_OPS,
    CACHED_OPS,
    QUANTIZED_CACHED_ATTENTION,
    WINDOWED_ATTENTION,
    WRITE_CACHE,
    cache_operands,
    kept_rows,
)
from skipstone.ir.errors import UserError
from skipstone.ir.formats import parse
from skipstone.ir.program import Program, Role

BATCH = sympy.Symbol("B", integer=True, positive=True)
SEQUENCE = sympy.Symbol("S", integer=True, positive=True)  # new tokens of a step
PAST = sympy.Symbol("P", integer=True, nonnegative=True)  # tokens in the cache before the step
ROWS = sympy.Symbol("R", integer=True, positive=True)  # rows of a sequence that reach the head
CAPACITY = sympy.Symbol("C", integer=True, positive=True)  # rows of a cache

aten = torch.ops.aten
ZERO = sympy.Integer(0)


@dataclass(frozen=True)
class Cost:
    """What one step costs. Every field is an expression in `BATCH`, `SEQUENCE`, `PAST` and `ROWS`.

    Attributes:
        flops: floating point operations of matrix products, convolutions and attention, a multiply-add being two;
            everything else counts as none, as in `torch.utils.flop_counter`.
        weight_bytes: bytes of weights that are read; of a gathered table, the rows that are gathered.
        parameter_bytes: bytes that the weights occupy, whole tables included.
        activation_bytes: bytes of activations that operators read and write when nothing is fused.
        kv_bytes: bytes of keys and values that attention reads.
        critical_path: matrix products and attentions that wait for each other.
        launches: operators that are not views.
    """

    flops: sympy.Expr
    weight_bytes: sympy.Expr
    parameter_bytes: sympy.Expr
    activation_bytes: sympy.Expr
    kv_bytes: sympy.Expr
    critical_path: sympy.Expr
    launches: sympy.Expr


def cost(program: Program, nodes: Iterable[fx.Node] | None = None) -> Cost:
    """The cost of `nodes` (default: all) of a program.

    Storage that several of the nodes read counts once; the critical path counts the steps inside `nodes` alone. What a
    gate may spare counts as if it never did.
    """
    sizes = Sizes(name_dimensions(program))
    chosen = [node for node in (nodes if nodes is not None else program.nodes()) if node.op == "call_function"]
    operators = [node for node in chosen if not is_view(node)]
    stored: dict[Any, sympy.Expr] = {}
    read: dict[Any, sympy.Expr] = {}
    for node in operators:
        for access in _weights(program, node, sizes):
            stored[access.storage] = access.whole
            read[access.key] = access.bytes
    return Cost(
        flops=_total(_flops(node, sizes) for node in operators),
        weight_bytes=_total(read.values()),
        parameter_bytes=_total(stored.values()),
        activation_bytes=_total(_activations(node, sizes) for node in operators),
        kv_bytes=_total(_keys_and_values(node, sizes) for node in operators),
        critical_path=sympy.Integer(_critical_path(program, set(operators))),
        launches=sympy.Integer(len(operators)),
    )


def evaluate(
    cost: Cost,
    batch: int,
    sequence: int,
    past: int = 0,
    rows: int | None = None,
    others: Mapping[sympy.Symbol, int] | None = None,
) -> dict[str, float]:
    """The numbers of a cost, by field name.

    Args:
        batch, sequence: sizes of the step.
        past: tokens that are in the cache already.
        rows: rows of each sequence that reach the head; all of them by default.
        others: values of further symbols, e.g. `example_sizes`.
    Raises:
        UserError: the cost depends on a size beside these.
    """
    values = {**(others or {}), BATCH: batch, SEQUENCE: sequence, PAST: past, ROWS: sequence if rows is None else rows}
    numbers = {field.name: getattr(cost, field.name).xreplace(values) for field in fields(cost)}
    if unknown := {symbol for number in numbers.values() for symbol in number.free_symbols}:
        raise UserError(f"The cost depends on sizes beside batch and sequence: {sorted(map(str, unknown))}.")
    return {name: float(number) for name, number in numbers.items()}


def example_sizes(program: Program) -> dict[sympy.Symbol, int]:
    """What the sizes of a program were when it was traced, by their own symbols."""
    placeholders = (node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder")
    sizes: list[Any] = [size for value in placeholders if isinstance(value, Tensor) for size in value.shape]
    symbolic = (size.node for size in sizes if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol)
    return {node.expr: int(node.hint) for node in symbolic}


def roofline_seconds(
    cost: Cost, profile: DeviceProfile, batch: int, sequence: int, past: int = 0, rows: int | None = None
) -> float:
    """Estimated seconds of a step: the slower of arithmetic and memory, and a gap for every operator.

    Sizes are those of `evaluate`.
    """
    numbers = evaluate(cost, batch, sequence, past, rows)
    moved = numbers["weight_bytes"] + numbers["activation_bytes"] + numbers["kv_bytes"]
    arithmetic = numbers["flops"] / profile.flops_per_second
    return max(arithmetic, moved / profile.bandwidth) + numbers["launches"] * profile.launch_gap


# Sizes


def name_dimensions(program: Program) -> dict[sympy.Symbol, sympy.Expr]:
    """What the symbols of a program's shapes mean, in `BATCH`, `SEQUENCE`, `ROWS` and `CAPACITY`.

    Batch and sequence are the first two dimensions of the tokens (or embeddings, or the first input).
    """
    names: dict[sympy.Symbol, sympy.Expr] = {}
    first = program.input(Role.TOKENS) or program.input(Role.EMBEDDINGS)
    first = first or next((node for node in program.graph.nodes if node.op == "placeholder"), None)
    known = [(first, 0, BATCH), (first, 1, SEQUENCE), (program.input(Role.LOGIT_ROWS), 1, ROWS)]
    known += [(program.input(Role.CACHE_KEY, slot), 2, CAPACITY) for slot in program.slots()]
    for node, axis, name in known:
        value = node.meta.get("val") if node is not None else None
        if not isinstance(value, Tensor) or value.dim() <= axis:
            continue
        size = _expression(value.shape[axis])
        if len(size.free_symbols) == 1 and not size.free_symbols & names.keys():
            (symbol,) = size.free_symbols
            names[symbol] = sympy.solve(size - name, symbol)[0]  # a size may be declared as a multiple of a symbol
    return names


@dataclass(frozen=True)
class Sizes:
    """Shapes of a program as expressions in the named dimensions."""

    names: dict[sympy.Symbol, sympy.Expr]

    def shape(self, value: Any) -> tuple[sympy.Expr, ...]:
        """The shape of a node's tensor. A cache is as long as what attention reads of it, ``PAST + SEQUENCE``."""
        value = value.meta.get("val") if isinstance(value, fx.Node) else value
        dimensions = (_expression(size).xreplace(self.names) for size in value.shape)
        return tuple(size.xreplace({CAPACITY: PAST + SEQUENCE}) for size in dimensions)

    def bytes(self, value: Any) -> sympy.Expr:
        """Bytes of a node's value; 0 for numbers."""
        value = value.meta.get("val") if isinstance(value, fx.Node) else value
        if isinstance(value, (tuple, list)):
            return _total(map(self.bytes, value))
        return sympy.Mul(*self.shape(value)) * value.element_size() if isinstance(value, Tensor) else ZERO


def _expression(size: Any) -> sympy.Expr:
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


def _total(parts: Iterable[sympy.Expr]) -> sympy.Expr:
    return sympy.expand(sympy.Add(*parts))


def is_view(node: fx.Node) -> bool:
    """Whether a call moves no data: an alias in the same dtype, an element of a tuple, or arithmetic on sizes."""
    value = node.meta.get("val")
    if node.target is operator.getitem or not isinstance(value, (Tensor, tuple, list)):
        return True
    source = node.args[0].meta.get("val") if node.args and isinstance(node.args[0], fx.Node) else None
    if not isinstance(node.target, torch._ops.OpOverload) or not isinstance(source, Tensor):
        return False
    aliases = any(result.alias_info is not None for result in node.target._schema.returns)
    return aliases and (not isinstance(value, Tensor) or value.dtype == source.dtype)


# Floating point operations


def _product_flops(node: fx.Node, sizes: Sizes, left: int = 0) -> sympy.Expr:
    """A product of matrices whose argument `left` has the contracted dimension last."""
    return 2 * sympy.Mul(*sizes.shape(node)) * sizes.shape(node.args[left])[-1]


def _einsum_flops(node: fx.Node, sizes: Sizes) -> sympy.Expr:
    """Two operands that are contracted; outer products and sums are pointwise. Ellipses count as one index each."""
    equation, operands = node.args[0], node.args[1]
    inputs, _, output = str(equation).replace(" ", "").partition("->")
    terms = inputs.split(",")
    if len(terms) != 2:
        return ZERO
    extent: dict[str, sympy.Expr] = {}
    for term, operand in zip(terms, operands, strict=True):  # type: ignore[arg-type]
        shape = sizes.shape(operand)
        head, dots, tail = term.partition("...")
        inner = shape[len(head) : len(shape) - len(tail)]
        extent |= dict(zip(head, shape, strict=False)) | dict(zip(tail, shape[len(shape) - len(tail) :], strict=True))
        if dots and len(inner) >= extent.get("rank", 0):
            extent |= {"...": sympy.Mul(*inner), "rank": len(inner)}
    extent.pop("rank", None)
    contracted = set(terms[0]) & set(terms[1]) - set(output) - {"."}
    return 2 * sympy.Mul(*extent.values()) if contracted else ZERO


def _convolution_flops(node: fx.Node, sizes: Sizes) -> sympy.Expr:
    transposed = "transpose" in str(node.target) or (node.target is aten.convolution.default and node.args[6])
    pixels = sizes.shape(node.args[0] if transposed else node)
    weight = sizes.shape(node.args[1])
    return 2 * pixels[0] * sympy.Mul(*pixels[2:]) * sympy.Mul(*weight)


def _attention_flops(node: fx.Node, sizes: Sizes) -> sympy.Expr:
    """Every query with every key, masked or not; through a cache, with the keys of its window alone."""
    *lanes, rows, width = sizes.shape(node.args[0])
    columns, window = _keys_read(node, sizes), _window(node)
    columns = sympy.Min(columns, window) if window else columns
    return 2 * sympy.Mul(*lanes) * rows * columns * (width + sizes.shape(node.args[2])[-1])


def _keys_read(node: fx.Node, sizes: Sizes) -> sympy.Expr:
    """How many keys the queries of an attention read together."""
    if node.target not in CACHED_OPS:
        return sizes.shape(node.args[1])[-2]
    rows, window = sizes.shape(node.args[0])[2], _window(node)
    return sympy.Min(PAST + rows, window + rows - 1) if window else PAST + rows


def _window(node: fx.Node) -> int:
    """Keys that one query sees at most in a cache, 0 for all. Without a cache everything is computed and masked."""
    window, first = (node.kwargs.get(name, 0) for name in ("window", "first"))
    if node.target == WINDOWED_ATTENTION:
        return window + first  # type: ignore[operator, return-value]
    return window if node.target in CACHED_OPS else 0  # type: ignore[return-value]


def _experts_flops(node: fx.Node, sizes: Sizes) -> sympy.Expr:
    """Every token passes through the weights of its chosen experts."""
    per_expert = (sympy.Mul(*sizes.shape(weight)[1:]) for weight in _expert_weights(node))
    return 2 * _expert_rows(node, sizes) * _total(per_expert)


def _expert_weights(node: fx.Node) -> list[fx.Node]:
    """The stacked matrices [experts, ., .] among the arguments."""
    return [argument for argument in node.all_input_nodes if _rank(argument) == 3 and _origin(argument) is not None]


def _expert_rows(node: fx.Node, sizes: Sizes) -> sympy.Expr:
    """Tokens times experts a token: the size of the integer argument that holds the choice."""
    for argument in node.all_input_nodes:
        value = argument.meta["val"]
        if isinstance(value, Tensor) and value.dtype in (torch.int64, torch.int32):
            return sympy.Mul(*sizes.shape(argument))
    return ZERO


def _rank(node: fx.Node) -> int:
    value = node.meta.get("val")
    return value.dim() if isinstance(value, Tensor) else -1


FLOPS: dict[str, Callable[[fx.Node, Sizes], sympy.Expr]] = {
    "aten::linear": _product_flops,
    "aten::matmul": _product_flops,
    "aten::mm": _product_flops,
    "aten::bmm": _product_flops,
    "aten::mv": _product_flops,
    "aten::addmm": lambda node, sizes: _product_flops(node, sizes, left=1),
    "aten::baddbmm": lambda node, sizes: _product_flops(node, sizes, left=1),
    "aten::einsum": _einsum_flops,
    "aten::convolution": _convolution_flops,
    "aten::conv1d": _convolution_flops,
    "aten::conv2d": _convolution_flops,
    "aten::conv3d": _convolution_flops,
    "aten::conv_transpose1d": _convolution_flops,
    "aten::conv_transpose2d": _convolution_flops,
    "aten::scaled_dot_product_attention": _attention_flops,
    "skipstone::attention": _attention_flops,
    "skipstone::cached_attention": _attention_flops,
    "skipstone::windowed_attention": _attention_flops,
    "skipstone::experts": _experts_flops,
    "skipstone::predicated_linear": _product_flops,
    "skipstone::matmul_nbits": _product_flops,
}


def _name(node: fx.Node) -> str:
    """The operator's name without its overload, e.g. ``aten::linear``."""
    return node.target._schema.name if isinstance(node.target, torch._ops.OpOverload) else ""


def _flops(node: fx.Node, sizes: Sizes) -> sympy.Expr:
    rule = FLOPS.get(_name(node))
    return rule(node, sizes) if rule else ZERO


# Bytes

GATHERS = ("aten::embedding", "aten::index_select", "aten::index", "aten::gather")


@dataclass(frozen=True)
class Access:
    """One read of a weight: what identifies the storage and the part of it, and the bytes of both."""

    storage: Any
    key: Any
    whole: sympy.Expr
    bytes: sympy.Expr


def _origin(node: fx.Node) -> fx.Node | None:
    """The `get_attr` node that `node` is a view of, if any."""
    while node.op == "call_function" and is_view(node) and node.args and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node if node.op == "get_attr" else None


def _weights(program: Program, node: fx.Node, sizes: Sizes) -> Iterator[Access]:
    """The weights that a node reads."""
    for argument in node.all_input_nodes:
        origin = _origin(argument)
        if origin is None or not isinstance(origin.meta.get("val"), Tensor):
            continue
        tensor = program.tensor(str(origin.target))
        storage = (tensor.untyped_storage().data_ptr() or origin.target, tensor.storage_offset(), tensor.numel())
        whole = sympy.Integer(tensor.numel() * tensor.element_size())
        if _name(node) in GATHERS and node.args[0] is argument:
            yield Access(storage, (storage, node), whole, sizes.bytes(node))
        elif _name(node) == "skipstone::experts" and argument in _expert_weights(node):
            experts = sizes.shape(argument)[0]
            touched = sympy.Min(experts, _expert_rows(node, sizes))
            yield Access(storage, (storage, node), whole, whole * touched / experts)
        else:
            part = sizes.bytes(argument)
            partial = part.is_number and part < whole  # a slice of a stacked weight; an expanded weight is read once
            yield Access(storage, (storage, argument) if partial else storage, whole, part if partial else whole)


def _activations(node: fx.Node, sizes: Sizes) -> sympy.Expr:
    """Bytes that a node reads from and writes to other nodes; weights, keys and values count elsewhere."""
    if node.target == WRITE_CACHE:
        return 2 * _total(map(sizes.bytes, node.args[:2]))  # its rows, not the whole cache
    elsewhere: tuple[Any, ...] = ()
    if node.target in ATTENTION_OPS:
        caches = cache_operands(node) if node.target in CACHED_OPS else ([], [])
        elsewhere = (*node.args[1:3], *caches[0], *caches[1])
    others = (argument for argument in node.all_input_nodes if argument not in elsewhere)
    written = sizes.bytes(node.meta["val"][0] if node.target in CACHED_OPS else node)
    table = node.args[0] if _name(node) in GATHERS else None  # of which only as much is read as is returned
    activations = (argument for argument in others if _origin(argument) is None)
    read = (written if argument is table else sizes.bytes(_unexpanded(argument)) for argument in activations)
    return _total(read) + written


def _unexpanded(node: fx.Node) -> fx.Node:
    """What a broadcast view repeats: its memory is read once."""
    while node.target is aten.expand.default:
        node = node.args[0]  # type: ignore[assignment]
    return node


def _keys_and_values(node: fx.Node, sizes: Sizes) -> sympy.Expr:
    if node.target not in (*ATTENTION_OPS, aten.scaled_dot_product_attention.default):
        return ZERO
    batch, heads = sizes.shape(node.args[1])[:2]
    return batch * heads * _keys_read(node, sizes) * sum(token_bytes(node))


def token_bytes(node: fx.Node) -> tuple[float, float]:
    """Bytes that the key and the value of one token and one head take where an attention reads them from."""
    key, value = (argument.meta["val"] for argument in node.args[1:3])  # type: ignore[union-attr]
    if node.target is not QUANTIZED_CACHED_ATTENTION:
        return int(key.shape[-1]) * key.element_size(), int(value.shape[-1]) * value.element_size()
    keys, values = (parse(str(node.kwargs[name])) for name in ("k_format", "v_format"))
    return keys.token_bytes(int(key.shape[-1]), key.dtype), values.token_bytes(int(value.shape[-1]), value.dtype)


def kv_bytes_per_token(program: Program) -> int:
    """Bytes of keys and values that each token of a sequence adds, over the cache slots; rounded up."""
    return math.ceil(sum(size for _, size in _growing_slots(program)))


def kv_bytes(program: Program, tokens: int, prompt: int) -> int:
    """Bytes of keys and values of a sequence, of whose `tokens` the first `prompt` are its prompt.

    Where several programs may go on with it, it is the most that one of them keeps.
    """
    return max(
        math.ceil(sum((tokens - max(prompt - (rows or prompt), 0)) * size for rows, size in slots)) + fixed
        for slots, fixed in ((_kept(each), kv_bytes_fixed(each)) for each in program.continuations or (program,))
    )


def kv_bytes_of_prompt(program: Program) -> int | None:
    """The most bytes of keys and values that a prompt takes once it is read; None where they grow with it."""
    behind = [_kept(each) for each in program.continuations or (program,)]
    if any(not slots or not all(rows for rows, _ in slots) for slots in behind):
        return None
    return max(math.ceil(sum(rows * size for rows, size in slots)) for slots in behind)


def _kept(program: Program) -> list[tuple[int, float]]:
    """Of each slot that grows with a sequence, the most rows of a prompt, 0 for all, and the bytes of a token."""
    return [(kept_rows(node), size) for node, size in _growing_slots(program)]


def _growing_slots(program: Program) -> Iterator[tuple[fx.Node, float]]:
    """The slots that grow with a sequence: the attention that writes each, and the bytes that a token takes in it."""
    writers = {node.kwargs.get("slot", -1): node for node in program.nodes(*ATTENTION_OPS)}
    for slot, node in writers.items():
        if slot != -1 and node.target != WINDOWED_ATTENTION:
            yield node, int(node.args[1].meta["val"].shape[1]) * sum(token_bytes(node))  # type: ignore[union-attr]


def kv_bytes_fixed(program: Program) -> int:
    """Bytes that a sequence takes in the cache however long it is: windows, and rows in full precision beside codes."""
    placeholders = (node for node in program.graph.nodes if node.op == "placeholder")
    pairs = zip(program.inputs, placeholders, strict=True)
    buffers = (node.meta["val"] for port, node in pairs if port.is_buffer)
    return sum(math.prod(each.shape[1:]) * each.element_size() for each in buffers if isinstance(each.shape[2], int))


def _critical_path(program: Program, chosen: set[fx.Node]) -> int:
    """The most nodes of `chosen` with floating point operations on one path through the graph."""
    depth: dict[fx.Node, int] = {}
    for node in program.graph.nodes:
        before = max((depth[argument] for argument in node.all_input_nodes), default=0)
        depth[node] = before + (node in chosen and _name(node) in FLOPS)
    return max(depth.values(), default=0)
