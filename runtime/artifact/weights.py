"""Tensors in one safetensors file: what shares memory goes on sharing it, and every byte is written once.

The file holds spans of memory. A span that is one whole tensor has its name, dtype and shape; others are flat, named
after the first tensor in them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from skipstone.ir.errors import Unsupported

DTYPES: Mapping[str, torch.dtype] = {
    str(each).removeprefix("torch."): each for each in vars(torch).values() if isinstance(each, torch.dtype)
}
"""Every dtype by its name."""
_STORED = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.bool,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8,
)  # fmt: skip
"""Dtypes that the file has names for; others are bytes in it."""
ALIGNMENT = 16
"""Bytes of the largest dtype, which the places of all others are multiples of."""


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype, e.g. ``float32``."""
    return str(dtype).removeprefix("torch.")


def write(tensors: Mapping[str, Tensor], path: Path) -> dict[str, dict[str, Any]]:
    """Write tensors to a safetensors file.

    Returns:
        where each of them lies, as plain data.
    Raises:
        Unsupported: tensors overlap, and no storage holds them all.
    """
    tensors = {name: each.detach().resolve_conj().resolve_neg() for name, each in tensors.items()}
    spans: dict[str, Tensor] = {}
    places: dict[str, dict[str, Any]] = {}
    for names in _overlapping(tensors):
        own = [tensors[name] for name in names]
        start, span = _span(own)
        spans[names[0]] = _with_own_storage(span)
        for name, tensor in zip(names, own, strict=True):
            places[name] = {
                "span": names[0],
                "dtype": dtype_name(tensor.dtype),
                "shape": list(tensor.shape),
                "stride": list(tensor.stride()),
                "offset": (_extent(tensor)[0] - start) // tensor.element_size(),
            }
    save_file(spans, path)
    return {name: places[name] for name in tensors}


def read(path: Path, places: Mapping[str, Mapping[str, Any]], device: torch.device) -> dict[str, Tensor]:
    """Tensors that `write` wrote, in memory of their own on `device`.

    Args:
        places: of the tensors that are wanted, from `write`.
    Raises:
        Exception: any, where the file or a place is damaged.
    """
    spans: dict[str, Tensor] = {}
    tensors = {}
    with safe_open(path, framework="pt", device="cpu") as file:
        for name, place in places.items():
            if place["span"] not in spans:
                # A copy: the file is mapped into memory, not aligned, and may change there.
                spans[place["span"]] = file.get_tensor(place["span"]).to(device, copy=True).reshape(-1)
            dtype, flat = DTYPES[place["dtype"]], spans[place["span"]].view(torch.uint8)
            flat = flat[: len(flat) - len(flat) % dtype.itemsize].view(dtype)
            tensors[name] = flat.as_strided(place["shape"], place["stride"], place["offset"])  # checks its bounds
    return tensors


def _with_own_storage(span: Tensor) -> Tensor:
    """The same memory in a storage of its own: safetensors refuses others, not only where bytes are shared."""
    if span.numel() == 0:
        return span
    flat: Tensor = torch.from_dlpack(span.reshape(-1).view(torch.uint8))
    return flat.view(span.dtype).view(span.shape)


def _overlapping(tensors: Mapping[str, Tensor]) -> Iterable[list[str]]:
    """Groups of tensors that have bytes in common, each in the order of their places."""
    group: list[str] = []
    reached: tuple[str, int] | None = None  # device and address behind the group
    for name in sorted(tensors, key=lambda each: (str(tensors[each].device), *_extent(tensors[each]))):
        device, (start, stop) = str(tensors[name].device), _extent(tensors[name])
        if reached is not None and (device != reached[0] or start >= reached[1]):
            yield group
            group, reached = [], None
        group.append(name)
        reached = (device, stop if reached is None else max(reached[1], stop))
    if group:
        yield group


def _extent(tensor: Tensor) -> tuple[int, int]:
    """The addresses that a tensor reaches, from the first byte to the one behind the last."""
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    reach = 1 + sum((size - 1) * stride for size, stride in pairs) if tensor.numel() else 0
    return tensor.data_ptr(), tensor.data_ptr() + reach * tensor.element_size()


def _span(tensors: list[Tensor]) -> tuple[int, Tensor]:
    """The memory that tensors lie in, the first of which comes first: its address, and a tensor over it."""
    first = tensors[0]
    start, stop = _extent(first)[0], max(_extent(each)[1] for each in tensors)
    dtype = first.dtype
    if start == stop:
        return start, torch.empty(0, dtype=torch.uint8)
    if dtype not in _STORED or any(each.dtype != dtype for each in tensors):
        dtype, start = torch.uint8, start - start % ALIGNMENT
    elif first.is_contiguous() and _extent(first) == (start, stop):
        return start, first
    for tensor in tensors:  # memory that came through NumPy has storages that are smaller
        storage = tensor.untyped_storage()
        offset = start - storage.data_ptr()
        if offset >= 0 and stop <= storage.data_ptr() + storage.nbytes():
            flat = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage, offset, (stop - start,), (1,))
            return start, flat.view(dtype)
    raise Unsupported("saving tensors over memory that overlaps in part", hint="Clone the parameters of the model.")
