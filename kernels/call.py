"""The operands of one call of quantized cached attention, as kernels take them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from skipstone.ir.errors import InvalidInput, Unsupported
from skipstone.ir.quantized import CacheFormat, cache_format
from skipstone.kernels.launch import FIRST_TO_OVERLAP, alignment, buffer
from skipstone.kernels.tiles import FORMATS

WIDEST = 256
OLDEST = 80
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
KINDS = ("causal", "sliding", "chunked")


@dataclass(frozen=True)
class Call:
    """Operands and options of `skipstone.ir.quantized.quantized_cached_attention`, under the same names."""

    q: Tensor
    k: Tensor
    v: Tensor
    k_cache: Sequence[Tensor]
    v_cache: Sequence[Tensor]
    start: Tensor
    count: Tensor | None = None
    k_static: Tensor | None = None
    v_static: Tensor | None = None
    sinks: Tensor | None = None
    key_bias: Tensor | None = None
    k_format: str = "full"
    v_format: str = "full"
    residual: int = 0
    first: int = 0
    scale: float = 1.0
    kind: str = "causal"
    window: int = 0
    softcap: float = 0.0
    arch: int = 0

    @cached_property
    def keys(self) -> CacheFormat:
        """The format of the keys."""
        return cache_format(self.k_format, self.residual, self.first)

    @cached_property
    def values(self) -> CacheFormat:
        """The format of the values."""
        return cache_format(self.v_format, self.residual, self.first)

    @property
    def batch(self) -> int:
        """B, the number of sequences."""
        return self.q.shape[0]

    @property
    def kv_heads(self) -> int:
        """KH, the number of key heads."""
        return self.k.shape[1]

    @property
    def group(self) -> int:
        """g, the number of query heads to a key head."""
        return self.q.shape[1] // self.k.shape[1]

    @property
    def queries(self) -> int:
        """S, the number of new tokens."""
        return self.q.shape[2]

    @property
    def capacity(self) -> int:
        """C, the number of rows of the cache."""
        return self.k_cache[0].shape[2]

    @property
    def exact(self) -> tuple[int, int, int]:
        """Rows in full precision: the newest of each query, the first of the sequence, and those of the ring."""
        if self.k_format == self.v_format == "full":
            return 0, 0, 0
        return self.residual, self.first, max(self.keys.ring_rows, self.values.ring_rows)

    @property
    def is_step(self) -> bool:
        """Whether there is one new token, whose row is read from the cache alone."""
        return self.queries == 1 and not any(self.exact)

    @property
    def overlaps(self) -> bool:
        """Whether kernels begin while the one before is still running, see `skipstone.kernels.overlap`."""
        return self.arch >= FIRST_TO_OVERLAP

    def check(self) -> None:
        """Refuse what the kernels cannot do.

        Raises:
            Unsupported: a format, head size, dtype, pattern, operand or device without a kernel.
            InvalidInput: a tensor that does not fit.
        """
        for name, form, x in (("key", self.keys, self.k), ("value", self.values, self.v)):
            base, _, size = form.format.name.partition(":")
            if base not in FORMATS:
                raise Unsupported(
                    f"Triton kernels for the {name} format {form.format.name!r}",
                    hint=f"There are {', '.join(FORMATS)}.",
                )
            if size and int(size) & (int(size) - 1):
                raise Unsupported(
                    f"Triton kernels for groups of {size} channels", hint="Use a power of two, such as 32 or 16."
                )
            widest = WIDEST // 2 if x.dtype == torch.float32 else WIDEST
            if x.shape[-1] > widest:
                raise Unsupported(
                    f"Triton kernels for a {name} of {x.shape[-1]} channels in {x.dtype}",
                    hint=f"At most {WIDEST} in float16 and bfloat16, {WIDEST // 2} in float32.",
                )
        if self.q.dtype not in DTYPES or not self.q.dtype == self.k.dtype == self.v.dtype:
            raise Unsupported(
                f"Triton kernels for queries, keys and values of {self.q.dtype}, {self.k.dtype} and {self.v.dtype}",
                hint="All three are float16, bfloat16 or float32.",
            )
        if self.kind not in KINDS:
            raise Unsupported(f"attention of kind {self.kind!r} through a cache", hint=f"It is {', '.join(KINDS)}.")
        if 0 < self.arch < OLDEST:
            raise Unsupported(f"Triton kernels for devices of sm_{self.arch}", hint=f"They need sm_{OLDEST} or later.")
        if self.key_bias is not None:
            raise Unsupported("Triton kernels for a key bias beside the keys", hint="Quantize with condition=False.")
        for static in (self.k_static, self.v_static):
            if static is not None and not (static.is_contiguous() and static.dtype == torch.float32):
                raise InvalidInput("Static scales are contiguous float32 tensors.")

    def arguments(self) -> Mapping[str, Any]:
        """Arguments that every kernel of attention takes."""
        return {
            "q": buffer(self.q),
            "keys": tuple(map(buffer, self.k_cache)),
            "values": tuple(map(buffer, self.v_cache)),
            "k_static": self.k_static,
            "v_static": self.v_static,
            "k_new": buffer(self.k),
            "v_new": buffer(self.v),
            "start": self.start,
            "count": self.count,
            "scale": self.scale,
            "softcap": self.softcap,
            "window": self.window,
            "queries": self.queries,
        }

    def formats(self, *names: str) -> Mapping[str, Any]:
        """The constants `names` of both formats, of "FORM", "GROUP", "ALIGN", "PARTS" and "WIDTH"."""
        constants: dict[str, Any] = {}
        both = (("K", self.keys.format, self.k, self.k_cache), ("V", self.values.format, self.v, self.v_cache))
        for prefix, form, x, cache in both:
            known = {
                "FORM": form.name.partition(":")[0],
                "GROUP": getattr(form, "group", 0),
                "ALIGN": tuple(map(alignment, cache)),
                "PARTS": len(form.parts(x.shape[-1], x.dtype)),
                "WIDTH": x.shape[-1],
            }
            constants |= {f"{prefix}_{name}": known[name] for name in names}
        return constants
