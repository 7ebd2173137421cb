"""The equations of `torch.einsum`, read."""

from __future__ import annotations

from typing import Any

from torch import fx


def equation(node: fx.Node) -> tuple[list[str], str]:
    """The name of each dimension of each operand, and the names in the result; "." for dimensions without a name.

    Args:
        node: a call of ``aten.einsum.default``.
    """
    text: Any = node.args[0]
    operands: Any = node.args[1]
    left, arrow, result = text.replace(" ", "").replace("...", ".").partition("->")
    if not arrow:  # the names that occur once, in the order of the alphabet
        result = "".join(sorted(name for name in set(left) - {","} if name == "." or left.count(name) == 1))
    sources = [
        names.replace(".", "." * (operand.meta["val"].ndim - len(names) + 1))
        for operand, names in zip(operands, left.split(","), strict=True)
    ]
    return sources, result


def summed(node: fx.Node) -> list[tuple[fx.Node, int]]:
    """The operands of an einsum, each with the dimensions that it sums over."""
    operands: Any = node.args[1]
    sources, result = equation(node)
    return [
        (operand, dim)
        for operand, names in zip(operands, sources, strict=True)
        for dim, name in enumerate(names)
        if name not in result
    ]
