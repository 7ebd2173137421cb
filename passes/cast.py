"""Compute in another floating-point type."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch.fx.node import map_aggregate

from skipstone.ir.errors import InternalError
from skipstone.ir.program import Program, propagate
from skipstone.passes.base import Pass, Remark

_HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class CastToFloat32(Pass):
    """Turn bfloat16 and float16 tensors, and casts to those types, into float32.

    For targets without half-precision kernels. Widening the weights is exact; the program then computes what the same
    model computes in float32. Each tensor is converted once, shared ones stay shared.
    """

    name: ClassVar[str] = "cast_to_float32"

    def rewrite(self, program: Program) -> list[Remark]:
        """See `Pass.rewrite`."""
        converted: dict[tuple[Any, ...], torch.Tensor] = {}
        added = 0
        for node in list(program.graph.nodes):
            if node.op == "get_attr" and program.tensor(str(node.target)).dtype in _HALVES:
                tensor = program.tensor(str(node.target))
                key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
                if key not in converted:
                    converted[key] = tensor.to(torch.float32)
                    added += tensor.numel() * 4
                _set_tensor(program, str(node.target), converted[key])
                node.meta["val"] = node.meta["val"].to(torch.float32)
            elif node.op == "placeholder" and getattr(node.meta["val"], "dtype", None) in _HALVES:
                node.meta["val"] = node.meta["val"].to(torch.float32)
            elif node.op == "call_function":
                node.args = map_aggregate(node.args, _widen)  # type: ignore[assignment]
                node.kwargs = map_aggregate(node.kwargs, _widen)  # type: ignore[assignment]
        if not converted:
            return [self.missed("model", "no half-precision tensors")]
        program.source = replace(program.source, dtype=torch.float32)
        propagate(program)
        return [self.applied("model", f"weights in float32: {added:,} bytes", weight_bytes=added)]

    def ensures(self, program: Program) -> None:
        """See `Pass.ensures`."""
        for node in program.graph.nodes:
            if getattr(node.meta.get("val"), "dtype", None) in _HALVES:
                raise InternalError(f"node {node.name} still computes in {node.meta['val'].dtype}")


def _widen(value: Any) -> Any:
    return torch.float32 if value in _HALVES else value


def _set_tensor(program: Program, name: str, tensor: torch.Tensor) -> None:
    *path, leaf = name.split(".")
    owner: Any = program.module
    for part in path:
        owner = getattr(owner, part)
    delattr(owner, leaf)
    owner.register_buffer(leaf, tensor)
