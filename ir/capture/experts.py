"""Experts modules of transformers as one `skipstone::experts`.

transformers' own forms of a mixture of experts (grouped, batched) share what the module says of itself: where its
matrices are and how they lie, and a method between the two products. That method is traced, and its expression is read:
what it is not known to be exactly is not recognised.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from skipstone.ir.dialect import Activation, Layout, experts

Expression = Any
"""``(operator, *arguments)``; ``"x"`` is the input, and numbers are themselves."""

Experts = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Rows [T, H], chosen experts [T, K] and their weights [T, K] to results [T, H]."""


def recognise_experts(module: nn.Module) -> Experts | None:
    """What an experts module computes, as one `skipstone::experts`; None if the operator does not cover it.

    Args:
        module: a module whose class is decorated with transformers' `use_experts_implementation`.
    """
    own: Any = module
    names = ["gate_up_proj" if own.has_gate else "up_proj", "down_proj"]
    stacks: list[Any] = [getattr(module, name, None) for name in names]
    if not all(isinstance(stack, Tensor) and stack.is_floating_point() for stack in stacks):
        return None
    count, *sizes = stacks[0].shape
    if getattr(module, "has_post_expert_norm", False) or getattr(module, "num_experts", None) != count:
        return None
    width = sizes[1 if own.is_transposed else 0]
    example = torch.zeros(2, width, dtype=stacks[0].dtype, device=stacks[0].device)
    options = read_gate(own._apply_gate if own.has_gate else own.act_fn, example)
    if options is None:
        return None
    options["transposed"] = own.is_transposed
    names += [f"{name}_bias" for name in names if own.has_bias]

    def form(x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        # Parameters are looked up anew: while torch.export traces, others stand in their place.
        return experts(x, index.to(torch.int64), weights, *(getattr(module, name) for name in names), **options)

    return form


def read_gate(function: Callable[[Tensor], Tensor], example: Tensor) -> dict[str, Any] | None:
    """The options of `skipstone::experts` with which `gated` is `function`; None if there are none.

    Args:
        function: from a first product [T, U] to the input of the second.
        example: a first product, of any values.
    """
    try:
        graph = make_fx(lambda x: function(x))(example).graph  # a method would count `self` among its inputs
    except RuntimeError:  # make_fx cannot follow values that decide the control flow, and such a gate is not known
        return None
    if any(isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable for node in graph.nodes):
        return None
    result = _expression(graph.output_node().args[0], {})
    match result:
        case ("mul", left, right):
            width = example.shape[1]
            if product := _product(left, right, width) or _product(right, left, width):
                return product
    match _activation(result):
        case (activation, alpha, "x"):
            return {"activation": activation, "alpha": alpha, "layout": str(Layout.UNGATED)}
    return None


def _product(gate: Expression, up: Expression, width: int) -> dict[str, Any] | None:
    """Options for ``activation(gate) * (up + shift)``, both parts perhaps within limits."""
    found, shift = _activation(gate), 0.0
    if found is None:
        return None
    activation, alpha, gate = found
    match up:
        case ("add", up, float(shift)):
            pass
    gate, gate_limit = _bounded(gate, None)
    up, up_limit = _bounded(up, -1.0)
    layouts: dict[Any, Layout] = {((0, 1), (width / 2, 1)): Layout.CONCATENATED, ((0, 2), (1, 2)): Layout.INTERLEAVED}
    layout = layouts.get((_part(gate, width), _part(up, width)))
    if layout is None or gate_limit != up_limit:
        return None
    return {"activation": activation, "alpha": alpha, "layout": str(layout), "limit": gate_limit, "shift": shift}


def _part(value: Expression, width: int) -> tuple[float, float] | None:
    """The first column of a part of the input, and the distance to its next one."""
    match value:
        case ("getitem", ("split", "x", size, -1.0 | 1.0), which) if 2 * size == width:
            return which * size, 1.0
        case ("slice", "x", -1.0 | 1.0, first, end, 2.0) if end >= width:
            return first, 2.0
    return None


def _bounded(value: Expression, below: float | None) -> tuple[Expression, float]:
    """The value within its limit, which is 0 if there is none; the lower bound is `below` times the limit."""
    match value:
        case ("clamp", inner, low, float(limit)) if limit > 0 and low == (below and below * limit):
            return inner, limit
    return value, 0.0


def _activation(value: Expression) -> tuple[str, float, Expression] | None:
    """The activation that an expression is, its alpha, and its argument."""
    match value:
        case ("silu", x):
            return Activation.SWISH.value, 1.0, x
        case ("mul", x, ("sigmoid", y)) if x == y:
            return Activation.SWISH.value, 1.0, x
        case ("mul", x, ("sigmoid", ("mul", y, float(alpha)))) if x == y:
            return Activation.SWISH.value, alpha, x
        case ("gelu", x):
            return Activation.GELU.value, 1.0, x
        case ("gelu", x, "tanh"):
            return Activation.GELU_TANH.value, 1.0, x
        case ("relu", x):
            return Activation.RELU.value, 1.0, x
        case ("pow", ("relu", x), 2.0):
            return Activation.RELU_SQUARED.value, 1.0, x
    return None


def _expression(value: Any, known: dict[fx.Node, Expression]) -> Expression:
    """The expression of a traced value; factors and terms that are numbers come last."""
    if not isinstance(value, fx.Node):
        return float(value) if isinstance(value, int | float) else value
    if value.op == "placeholder":
        return "x"
    if value not in known:
        target: Any = value.target
        name = target.__name__ if target is operator.getitem else getattr(target, "overloadpacket", target)
        name = str(name).removeprefix("aten.")
        arguments = [_expression(argument, known) for argument in (*value.args, *value.kwargs.values())]
        if name in ("mul", "add") and isinstance(arguments[0], float):
            arguments.reverse()
        known[value] = (name, *arguments)
    return known[value]
