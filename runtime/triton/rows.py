"""Linear layers of a decode step, with the norm before them and what is made of their results, as one operator each.

That is for steps of a single row. More rows are matrix products, and stay apart.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from skipstone.ir.norms import RMSNorm, rms_norm, target_of, uncast
from skipstone.ir.row_linear import ACTIVATIONS, ROW_LINEAR

aten = torch.ops.aten

ROWS = 1
"""Most rows for which `row_linear` is used, where it has a kernel: for more it was not measured."""


@dataclass
class Product:
    """Linear layers of one value that become one operator.

    Attributes:
        linears: the layers.
        result: what the operator computes: the layer itself, or what it is activated, gated and added to.
        activation, is_gated, residual: see `skipstone.ir.row_linear.row_linear`.
    """

    linears: list[fx.Node]
    result: fx.Node
    activation: str = "none"
    is_gated: bool = False
    residual: fx.Node | None = None


@dataclass
class Siblings:
    """The products of one value.

    Attributes:
        x: the value, or what it is the norm of.
        norm: of x, where there is one.
        products: of it.
    """

    x: fx.Node
    norm: RMSNorm | None
    products: list[Product] = field(default_factory=list)


def gather_products(graph: fx.Graph) -> None:
    """Replace the linear layers of a decode step's graph, with what stands around them, by calls of `multiply`.

    Norms are taken in if all their operands are the graph's own tensors; products of the same value become one operator
    if nothing is left to be done to each. What is inside an operator is no longer rounded to the model's dtype.
    """
    by_operand: dict[Any, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.target is aten.linear.default and _has_constants(node):
            by_operand.setdefault(node.args[0], []).append(node)
    _hoist_constants(graph)
    for layers in by_operand.values():
        x: Any = layers[0].args[0]  # as it is now, behind the replacements before
        norm = rms_norm(x)
        if norm is not None and (norm.x.meta["val"].dtype != x.meta["val"].dtype or _gain(norm) is None):
            norm = None
        siblings = Siblings(x if norm is None else norm.x, norm, _products(layers))
        alone = [each for each in siblings.products if each.result is each.linears[0] and not each.is_gated]
        for product in siblings.products:
            if product not in alone:
                _replace(graph, siblings, [product])
        if alone:
            _replace(graph, siblings, alone)
    graph.eliminate_dead_code()


def multiply(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    gain: Tensor | None,
    residual: Tensor | None,
    eps: float | None,
    offset: float,
    activation: str,
    is_gated: bool,
) -> tuple[Tensor, ...]:
    """`skipstone.ir.row_linear.row_linear`, by its kernel where there is one, apart for each weight unless gated."""
    if x.is_cuda and x.shape[:-1].numel() <= ROWS:
        options = {"eps": eps, "offset": offset, "activation": activation, "is_gated": is_gated}
        result = ROW_LINEAR(x, list(weights), list(biases), gain, residual, **options)
        return result.split([result.shape[-1]] if is_gated else [weight.shape[0] for weight in weights], dim=-1)
    exact = torch.promote_types(x.dtype, torch.float32)
    if eps is not None:
        rows = x.to(exact)
        rows = rows * (rows.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
        x = (rows if gain is None else rows * (gain.to(exact) + offset)).to(x.dtype)
    results = [linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
    act = ACTIVATIONS[activation]
    results = [act(results[0]) * results[1]] if is_gated else [act(each) for each in results]
    return tuple(each if residual is None else each + residual for each in results)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear layer. Of a single row it is a sum, which Inductor fuses with what stands around it into one kernel."""
    if x.shape[:-1].numel() == 1:
        exact = torch.promote_types(x.dtype, torch.float32)
        result = (x.reshape(-1).to(exact) * weight.to(exact)).sum(dim=-1)
        result = result if bias is None else result + bias.to(exact)
        return result.to(x.dtype).reshape(*x.shape[:-1], -1)
    return F.linear(x, weight, bias)


def _has_constants(linear: fx.Node) -> bool:
    """Whether weight and bias are tensors of the graph, which nothing writes while it runs."""
    x, *rest = linear.args
    has_dtype = all(isinstance(each, fx.Node) and each.op == "get_attr" and _fits(each, x) for each in rest if each)
    weight: Any = rest[0]
    return has_dtype and not linear.kwargs and weight.meta["val"].is_contiguous()


def _fits(constant: fx.Node, x: Any) -> bool:
    return constant.meta["val"].dtype == x.meta["val"].dtype  # type: ignore[no-any-return]


def _gain(norm: RMSNorm) -> tuple[fx.Node | None, float] | None:
    """The tensor of the graph that the gain of a norm is, or is more than by a number; None if it is another value."""
    if norm.gain is None:
        return None, 0.0
    gain, offset = uncast(norm.gain), 0.0
    if target_of(gain) is aten.add.Tensor and isinstance(gain.args[1], int | float) and not gain.kwargs:
        gain, offset = uncast(gain.args[0]), float(gain.args[1])  # type: ignore[arg-type]
    return (gain, offset) if gain.op == "get_attr" and _fits(gain, norm.x) else None


def _products(layers: Sequence[fx.Node]) -> list[Product]:
    """What layers of one value become: pairs that gate each other, and each of the others with what follows it."""
    products, left = [], list(layers)
    for gate in layers:
        activated, activation = _activated(gate)
        product = None if activated is gate else _only_user(activated)
        if product is None or target_of(product) is not aten.mul.Tensor:
            continue
        other = next((each for each in left if each in product.args), None)
        if other is not None and gate in left and _only_user(other) is product and _shape(other) == _shape(gate):
            products.append(Product([gate, other], product, activation, is_gated=True))
            left = [each for each in left if each not in (gate, other)]
    products += [Product([layer], *_activated(layer)) for layer in left]
    for each in products:
        total = _only_user(each.result)
        is_free = total is not None and all(total is not other.result for other in products)
        if total is not None and is_free and target_of(total) is aten.add.Tensor and not total.kwargs:
            residual = next((term for term in total.args if term is not each.result), None)
            if isinstance(residual, fx.Node) and _shape(residual) == _shape(total) and _fits(residual, total):
                each.result, each.residual = total, residual
    return products


def _replace(graph: fx.Graph, siblings: Siblings, products: Sequence[Product]) -> None:
    """Put one operator in the place of products: of a single one, or of several with nothing behind them."""
    linears = [linear for each in products for linear in each.linears]
    weights = [linear.args[1] for linear in linears]
    biases = [linear.args[2] if len(linear.args) > 2 else None for linear in linears]
    gain, offset = (None, 0.0) if siblings.norm is None else _gain(siblings.norm) or (None, 0.0)
    eps, one = None if siblings.norm is None else siblings.norm.eps, products[0]
    with graph.inserting_before(min((each.result for each in products), key=list(graph.nodes).index)):
        args: Any = (siblings.x, weights, biases, gain, one.residual, eps, offset, one.activation, one.is_gated)
        call = graph.call_function(multiply, args)
        for place, each in enumerate(products):
            result = graph.call_function(operator.getitem, (call, place))
            result.meta = dict(each.result.meta)
            each.result.replace_all_uses_with(result)


def _activated(layer: fx.Node) -> tuple[fx.Node, str]:
    """What becomes of the results of a layer that nothing but an activation reads, and the activation's name."""
    user = _only_user(layer)
    target = target_of(user)
    if user is None or user.args[0] is not layer:
        return layer, "none"
    if target is aten.gelu.default:
        return user, "gelu_tanh" if user.kwargs.get("approximate") == "tanh" else "gelu"
    if target is aten.relu.default:
        square = _only_user(user)
        if square is not None and (target_of(square) is aten.square.default or _is_power(square, 2)):
            return square, "relu_squared"
        return user, "relu"
    return (user, "silu") if target is aten.silu.default else (layer, "none")


def _is_power(node: fx.Node, exponent: int) -> bool:
    return target_of(node) is aten.pow.Tensor_Scalar and node.args[1:] == (exponent,)


def _hoist_constants(graph: fx.Graph) -> None:
    """Move the graph's own tensors to its beginning, where every operator can read them."""
    first = next(iter(graph.nodes))
    for node in list(graph.nodes):
        if node.op == "get_attr" and node is not first:
            first.prepend(node)


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _shape(node: Any) -> Any:
    return node.meta["val"].shape
