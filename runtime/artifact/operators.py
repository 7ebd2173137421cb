"""The functions that the graph of an artifact may call, by name. Nothing is ever imported for a name.

Operators of ATen are taken if they neither write to their arguments nor take the name of a file; private ones only from
a list, since many of them leave it to their callers to check what they are given.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch

import skipstone.ir.dialect
import skipstone.ir.row_linear  # noqa: F401 - both register the operators of the dialect
from skipstone.ir.errors import ArtifactError

NAMESPACES = ("aten", "skipstone")

# fmt: off
_PRIVATE = (
    "_assert_async", "_assert_scalar", "_assert_tensor_metadata", "_conj", "_grouped_mm", "_local_scalar_dense",
    "_log_softmax", "_safe_softmax", "_scaled_dot_product_flash_attention_for_cpu", "_softmax", "_to_copy",
    "_unsafe_view",
)
_OPERATOR = (
    "add", "and_", "eq", "floordiv", "ge", "getitem", "gt", "le", "lt", "mod", "mul", "ne", "neg", "not_", "or_", "sub",
    "truediv",
)
# fmt: on
_SIZES = ("sym_float", "sym_int", "sym_ite", "sym_max", "sym_min", "sym_not", "sym_sum")

FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    **{f"operator.{name}": getattr(operator, name) for name in _OPERATOR},
    **{f"torch.{name}": getattr(torch, name) for name in _SIZES if hasattr(torch, name)},
    **{f"math.{name}": getattr(math, name) for name in ("ceil", "floor", "trunc")},
}
"""What is computed with sizes, and what takes one of several results."""

_NAMES = {function: name for name, function in FUNCTIONS.items()}
_OVERLOAD = re.compile(r"(\w+)\.(\w+)\.(?!__)(\w+)", re.ASCII)


def name_of(target: Any) -> str | None:
    """The name of what a node calls, None where an artifact cannot hold it."""
    if not isinstance(target, torch._ops.OpOverload):
        return _NAMES.get(target)
    return str(target) if target.namespace in NAMESPACES and _is_harmless(target) else None


def function_of(name: str) -> Callable[..., Any]:
    """The function of that name.

    Raises:
        ArtifactError: an artifact may not call it, or this version of PyTorch does not have it.
    """
    if name in FUNCTIONS:
        return FUNCTIONS[name]
    parts = _OVERLOAD.fullmatch(name)
    if parts and parts[1] in NAMESPACES and _is_dispatched(*parts.groups()):
        overload: Any = getattr(getattr(getattr(torch.ops, parts[1]), parts[2]), parts[3])
        if _is_harmless(overload):
            function: Callable[..., Any] = overload
            return function
    raise ArtifactError(f"{name} is no operator that an artifact may use.", hint="Is PyTorch older than at saving?")


def _is_dispatched(namespace: str, name: str, overload: str) -> bool:
    """Whether it is an operator of the dispatcher; TorchScript has others, which write files among other things."""
    return torch._C._dispatch_has_kernel(f"{namespace}::{name}" + ("" if overload == "default" else f".{overload}"))


def _is_harmless(overload: torch._ops.OpOverload) -> bool:
    schema = overload._schema
    name = schema.name.split("::")[1]
    private = name.startswith("_") and not name.startswith("__") and name not in _PRIVATE
    return not schema.is_mutable and not private and all(each.name != "filename" for each in schema.arguments)
