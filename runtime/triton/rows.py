"""Linear layers of a decode step, with the norm before them and what is made of their results, as one operator each."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from skipstone.ir.norms import RMSNorm, is_shape, only_user, rms_norm, target_of, uncast
from skipstone.ir.predicated import PREDICATED_LINEAR
from skipstone.ir.rotations import Rotation, rotation
from skipstone.runtime.triton.products import multiply

aten = torch.ops.aten


@dataclass(frozen=True)
class Layer:
    """A linear layer, or layers of several lanes at once.

    Attributes:
        result: [B, S, F], or [N, B, S, F] for N lanes.
        weight: [F, D] or [N, F, D].
        bias: [F], and none for lanes.
        skip: the tokens [B, S] whose results are zeros, if any can be.
    """

    result: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    skip: fx.Node | None = None

    @property
    def x(self) -> fx.Node:
        """What it reads, [B, S, D] or [N, B, S, D], as the graph is now."""
        node: Any = self.result
        return node.args[0].args[0].args[0] if self.is_stack else node.args[0]  # type: ignore[no-any-return]

    @property
    def is_stack(self) -> bool:
        """Whether it has lanes."""
        return self.weight.meta["val"].ndim == 3  # type: ignore[no-any-return]


@dataclass
class Product:
    """Layers of one value that become one operator.

    Attributes:
        layers: the layers.
        result: what the operator computes: the layer's result, or what that is activated, gated and added to.
        activation, is_gated, residual: see `skipstone.ir.row_linear.row_linear`.
        rotations: of heads that are the first columns of the result; all have the same cosines and sines.
    """

    layers: list[Layer]
    result: fx.Node
    activation: str = "none"
    is_gated: bool = False
    residual: fx.Node | None = None
    rotations: list[Rotation] = field(default_factory=list)

    @property
    def rotated(self) -> int:
        """How many columns are rotated."""
        return sum(each.heads.meta["val"].shape[-3] * each.heads.meta["val"].shape[-1] for each in self.rotations)


def gather_products(graph: fx.Graph) -> None:
    """Replace the linear layers of a decode step's graph, with what stands around them, by calls of `multiply`.

    Norms are taken in if all their operands are the graph's own tensors; products of the same value become one operator
    if nothing is left to be done to each. What is inside an operator is no longer rounded to the model's dtype.
    """
    by_operand: dict[Any, list[Layer]] = {}
    for node in graph.nodes:
        if (layer := _layer(node)) is not None:
            by_operand.setdefault((layer.x, layer.is_stack, layer.skip), []).append(layer)
    _hoist_constants(graph)
    for layers in by_operand.values():
        x = layers[0].x
        norm = _norm(graph, x)
        if norm is not None and (norm.x.meta["val"].dtype != x.meta["val"].dtype or _gain(norm) is None):
            norm = None
        products = _products(layers)
        alone = [each for each in products if each.result is each.layers[0].result]
        for product in products:
            if product not in alone:
                _replace(graph, x, norm, [product])
        if alone:
            _replace(graph, x, norm, alone)
    graph.eliminate_dead_code()


def _norm(graph: fx.Graph, x: fx.Node) -> RMSNorm | None:
    """The norm whose result a value is, or whose results it holds some rows of: then of those rows."""
    if target_of(x) is not aten.gather.default or target_of(x.args[2]) is not aten.expand.default:
        return rms_norm(x)
    source, axis, index = x.args
    norm = rms_norm(source)  # type: ignore[arg-type]
    chosen: Any = index.args[0]  # type: ignore[union-attr]
    are_rows = axis == 1 and x.meta["val"].ndim == 3 and is_shape(chosen, (*_shape(x)[:2], 1))
    if norm is None or not are_rows or not _fits(norm.x, x):
        return None
    with graph.inserting_before(x):
        rows = graph.call_function(aten.gather.default, (norm.x, axis, index))
    rows.meta = {"val": x.meta["val"]}
    return replace(norm, x=rows)


def _layer(node: fx.Node) -> Layer | None:
    """The layer that a node is, if weight and bias are tensors of the graph, which nothing writes while it runs."""
    if node.target is aten.linear.default:
        x, weight, bias = (*node.args, None)[:3]
        is_constant = all(each is None or _is_constant(each, x) for each in (weight, bias))
        return Layer(node, weight, bias) if is_constant and not node.kwargs else None  # type: ignore[arg-type]
    if node.target is PREDICATED_LINEAR:
        x, weight, skip, bias = (*node.args, None)[:4]
        is_constant = all(each is None or _is_constant(each, x) for each in (weight, bias))
        return Layer(node, weight, bias, skip) if is_constant and not node.kwargs else None  # type: ignore[arg-type]
    return _stack(node)


def _stack(node: fx.Node) -> Layer | None:
    """The layers of several lanes: x [N, B, S, D] as [N, B S, D], times the transposed weight, in x's shape again."""
    product: Any = node.args[0] if node.target is aten.reshape.default else None
    if target_of(product) is not aten.matmul.default or len(product.users) > 1:
        return None
    flat, turned = product.args
    if target_of(flat) is not aten.reshape.default or target_of(turned) is not aten.transpose.int:
        return None
    x, weight = flat.args[0], turned.args[0]
    if not _is_constant(weight, x) or {axis % 3 for axis in turned.args[1:]} != {1, 2}:
        return None
    before, lanes = _shape(x), _shape(weight)
    if len(before) != 4 or len(lanes) != 3:
        return None
    fits = is_shape(node, (*before[:3], lanes[1])) and is_shape(x, (lanes[0], *before[1:]))
    return Layer(node, weight, None) if fits else None


def _gated(layer: Layer) -> Product | None:
    """What a layer becomes whose first half gates its second."""
    width = layer.weight.meta["val"].shape[-2]
    parts = _parts(layer.result)
    if sorted(parts) != [(0, width // 2), (width // 2, width)]:
        return None
    first, second = parts[0, width // 2], parts[width // 2, width]
    activated, activation = _activated(first)
    product = only_user(activated)
    if activated is first or product is not only_user(second) or target_of(product) is not aten.mul.Tensor:
        return None
    return Product([layer], product, activation, is_gated=True)  # type: ignore[arg-type]


def _parts(whole: fx.Node) -> dict[tuple[int, int], fx.Node]:
    """The parts of a value's last dimension, by first and last channel, if nothing reads anything else of it."""
    width = whole.meta["val"].shape[-1]
    found: dict[tuple[int, int], fx.Node] = {}
    user: Any
    item: Any
    for user in whole.users:
        axis = user.args[2] if target_of(user) is aten.split.Tensor and len(user.args) > 2 else None
        if target_of(user) is aten.slice.Tensor and _is_last(whole, user.args[1]) and len(user.args) == 4:
            found[user.args[2], min(user.args[3], width)] = user
        elif axis is not None and _is_last(whole, axis) and isinstance(size := user.args[1], int):
            for item in user.users:
                found[item.args[1] * size, min((item.args[1] + 1) * size, width)] = item
        else:
            return {}
    return found


def _rotations(layer: Layer) -> list[Rotation]:
    """The rotary embeddings of the heads that are the first columns of a layer's results."""
    width = layer.weight.meta["val"].shape[-2]
    whole = {(0, width): layer.result}
    parts = whole if target_of(only_user(layer.result)) is aten.reshape.default else _parts(layer.result)
    found: list[Rotation] = []
    end = 0
    for place, part in sorted(parts.items()):
        heads = _heads(part, place[1] - place[0])
        each = None if heads is None or place[0] != end else rotation(heads)
        if each is None or (found and (each.cos, each.sin) != (found[0].cos, found[0].sin)):
            break
        found, end = [*found, each], place[1]
    return found


def _heads(part: fx.Node, width: int) -> fx.Node | None:
    """The results [..., S, H D] of a layer as heads [..., H, S, D], if that is how they are read."""
    apart = only_user(part)
    heads = None if target_of(apart) is not aten.reshape.default else only_user(apart)  # type: ignore[arg-type]
    if heads is None or target_of(heads) is not aten.transpose.int:
        return None
    before, shape = _shape(part)[:-1], _shape(apart)
    last = len(shape) - 1
    fits = len(shape) == len(before) + 2 and is_shape(apart, (*before, shape[-2], shape[-1]))  # type: ignore[arg-type]
    is_swap = {axis % len(shape) for axis in heads.args[1:]} == {last - 2, last - 1}  # type: ignore[operator]
    return heads if fits and is_swap and shape[-2] * shape[-1] == width else None


def _is_last(whole: fx.Node, axis: Any) -> bool:
    return axis in (-1, whole.meta["val"].ndim - 1)


def _is_constant(constant: Any, x: Any) -> bool:
    """Whether a value is a tensor of the graph in one piece, of x's dtype."""
    if not isinstance(constant, fx.Node) or constant.op != "get_attr":
        return False
    return _fits(constant, x) and constant.meta["val"].is_contiguous()  # type: ignore[no-any-return]


def _fits(constant: fx.Node, x: Any) -> bool:
    return constant.meta["val"].dtype == x.meta["val"].dtype  # type: ignore[no-any-return]


def _gain(norm: RMSNorm) -> tuple[fx.Node | None, float] | None:
    """The tensor of the graph that the gain of a norm is, or is more than by a number; None if it is another value."""
    if norm.gain is None:
        return None, 0.0
    gain, offset = _squeezed(norm.gain), 0.0
    if target_of(gain) is aten.add.Tensor and isinstance(gain.args[1], int | float) and not gain.kwargs:
        gain, offset = _squeezed(gain.args[0]), float(gain.args[1])  # type: ignore[arg-type]
    return (gain, offset) if _is_constant(gain, norm.x) and gain.meta["val"].ndim <= 2 else None


def _squeezed(gain: Any) -> fx.Node:
    """A gain without dimensions of one that stand between lanes and channels, and casts."""
    while (gain := uncast(gain)).target is aten.unsqueeze.default and gain.args[1] == 1:
        gain = gain.args[0]
    return gain  # type: ignore[no-any-return]


def _products(layers: Sequence[Layer]) -> list[Product]:
    """What layers of one value become: those that gate each other, and each of the others with what follows it."""
    products = [gated for layer in layers if (gated := _gated(layer)) is not None]
    left = [layer for layer in layers if all(layer not in each.layers for each in products)]
    for gate in list(left):
        activated, activation = _activated(gate.result)
        product = None if activated is gate.result else only_user(activated)
        if product is None or target_of(product) is not aten.mul.Tensor:
            continue
        other = next((each for each in left if each.result in product.args), None)
        if other is None or gate not in left or only_user(other.result) is not product:
            continue
        if is_shape(other.result, _shape(gate.result)):
            products.append(Product([gate, other], product, activation, is_gated=True))
            left = [each for each in left if each not in (gate, other)]
    products += [Product([layer], *_activated(layer.result), rotations=_rotations(layer)) for layer in left]
    for each in products:
        total = only_user(each.result)
        is_free = total is not None and all(total is not other.result for other in products)
        if total is not None and is_free and target_of(total) is aten.add.Tensor and not total.kwargs:
            residual = next((term for term in total.args if term is not each.result), None)
            lanes = [_shape(total), _shape(total)[1:]] if each.layers[0].is_stack else [_shape(total)]
            if isinstance(residual, fx.Node) and is_shape(residual, *lanes) and _fits(residual, total):
                each.result, each.residual = total, residual
    return products


def _replace(graph: fx.Graph, x: fx.Node, norm: RMSNorm | None, products: Sequence[Product]) -> None:
    """Put one operator in the place of products: of a single one, or of several with nothing behind them."""
    layers = [layer for each in products for layer in each.layers]
    weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
    gain, offset = (None, 0.0) if norm is None else _gain(norm) or (None, 0.0)
    x, eps, one = (x, None, products[0]) if norm is None else (norm.x, norm.eps, products[0])
    place_of = list(graph.nodes).index
    first = min((each.result for each in products), key=place_of)
    cos, sin = _angles(products)
    if cos is None or max(map(place_of, (cos, sin))) > place_of(first):  # type: ignore[arg-type]
        cos = sin = None
    for each in products:
        each.rotations = [turn for turn in each.rotations if (turn.cos, turn.sin) == (cos, sin)]
    with graph.inserting_before(first):
        args: Any = (
            x, weights, biases, gain, one.residual, layers[0].skip, cos, sin, [each.rotated for each in products], eps,
            offset, one.activation, one.is_gated,
        )  # fmt: skip
        call = graph.call_function(multiply, args)
        for place, each in enumerate(products):
            result = graph.call_function(operator.getitem, (call, place))
            result.meta = dict(each.result.meta)
            each.result.replace_all_uses_with(result)
    for turn in (turn for each in products for turn in each.rotations):
        turn.result.replace_all_uses_with(turn.heads)


def _angles(products: Sequence[Product]) -> tuple[fx.Node | None, fx.Node | None]:
    """Cosines and sines of the first rotary embedding of products."""
    return next(((turn.cos, turn.sin) for each in products for turn in each.rotations), (None, None))


def _activated(layer: fx.Node) -> tuple[fx.Node, str]:
    """What becomes of the results of a layer that nothing but an activation reads, and the activation's name."""
    user = only_user(layer)
    target = target_of(user)
    if user is None or user.args[0] is not layer:
        return layer, "none"
    if target is aten.gelu.default:
        return user, "gelu_tanh" if user.kwargs.get("approximate") == "tanh" else "gelu"
    if target is aten.relu.default:
        square = only_user(user)
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


def _shape(node: Any) -> Any:
    return node.meta["val"].shape
