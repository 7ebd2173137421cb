"""Read the kind of an attention mask from the function that defines it, by evaluating it on sampled positions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from skipstone.ir.dialect import Kind, visible

MaskFunction = Callable[[Any, Any, Any, Any], Any]


def classify(function: MaskFunction, local_size: int | None) -> tuple[Kind, int]:
    """The kind and window that reproduce `function` on every sampled pair of positions, or explicit.

    Args:
        function: `f(batch, head, query, key) -> bool` on broadcasting index tensors.
        local_size: the window or chunk size that came with it, if any. Samples reach past it, so that a large window
            is never taken for none.
    """
    if _reads_data(function):
        return Kind.EXPLICIT, 0
    positions = _samples(local_size)
    queries, keys = positions[:, None], positions[None, :]
    zero = torch.zeros((), dtype=torch.int64)
    try:
        truth = torch.as_tensor(function(zero, zero, queries, keys)).broadcast_to(len(positions), len(positions))
    except IndexError:  # it looks positions up in a table of the present length
        return Kind.EXPLICIT, 0
    near = (local_size - 1, local_size, local_size + 1) if local_size else range(1, 65)
    candidates: list[tuple[Kind, int]] = [(Kind.CAUSAL, 0), (Kind.BIDIRECTIONAL, 0)]
    for kind in (Kind.SLIDING, Kind.CHUNKED, Kind.BIDIRECTIONAL, Kind.BLOCK_CAUSAL):
        candidates += [(kind, window) for window in near if window > 0]
    for kind, window in candidates:
        pattern = visible(kind, window, queries, keys)
        if torch.equal(truth, torch.ones_like(truth) if pattern is None else pattern):
            return kind, window
    return Kind.EXPLICIT, 0


def _samples(local_size: int | None) -> Tensor:
    """Dense small positions, powers of two up to a million, and the neighbourhood of multiples of `local_size`."""
    positions = {*range(72), *(2**power for power in range(7, 21))}
    for multiple in range(1, 5):
        positions |= {max(0, multiple * (local_size or 0) + shift) for shift in range(-3, 4)}
    return torch.tensor(sorted(positions))


def _reads_data(function: Any) -> bool:
    """Whether the function closes over tensors with content; all-zero ones (no left padding) carry none."""
    return any(bool(tensor.any()) for tensor in _closed_over(function, set()))


def _closed_over(value: Any, seen: set[int]) -> Iterator[Tensor]:
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _closed_over(item, seen)
    elif isinstance(value, FunctionType):
        for cell in value.__closure__ or ():
            yield from _closed_over(cell.cell_contents, seen)
