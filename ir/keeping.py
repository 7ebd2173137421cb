"""Keys and values that stay in the cache in the place of those that attentions have computed with."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("skipstone::keep", mutates_args=())
def keep(x: Tensor, k: Tensor, v: Tensor, *, slot: int) -> Tensor:
    """`x` as it is; where there is a cache, the next steps find these keys and values in a slot.

    Args:
        x: of any shape, what is computed behind.
        k: [B, KH, S, D]; v: [B, KH, S, Dv], of the same tokens as the keys and values of the slot's attentions.
        slot: the number of those attentions.
    Returns:
        a copy of x.
    """
    return x.clone()


@keep.register_fake
def _(x, k, v, *, slot):  # type: ignore[no-untyped-def]
    torch._check(k.shape[:3] == v.shape[:3], lambda: "k and v differ in size")
    return torch.empty_like(x)


def write_rows(cache: Tensor, rows: Tensor, start: Tensor) -> Tensor:
    """A cache [B, KH, C, D] with rows [B, KH, S, D] at ``start[b]`` to ``start[b] + S - 1``."""
    index = (start.unsqueeze(1) + torch.arange(rows.shape[2], device=rows.device))[:, None, :, None]
    return cache.scatter(2, index.expand(*rows.shape), rows.to(cache.dtype))


def write_cache_reference(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, start: Tensor
) -> tuple[Tensor, Tensor]:
    """`write_cache` in plain PyTorch operators."""
    return write_rows(k_cache, k, start), write_rows(v_cache, v, start)


@torch.library.custom_op("skipstone::write_cache", mutates_args=())
def write_cache(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, start: Tensor, *, slot: int = -1
) -> tuple[Tensor, Tensor]:
    """Put the keys and values of S new tokens into a cache, as `cached_attention` does.

    Args:
        k, v, k_cache, v_cache, start, slot: as there.
    Returns:
        both caches after the write.
    """
    return write_cache_reference(k, v, k_cache, v_cache, start)


@write_cache.register_fake
def _(k, v, k_cache, v_cache, start, *, slot=-1):  # type: ignore[no-untyped-def]
    return torch.empty_like(k_cache), torch.empty_like(v_cache)


KEEP = torch.ops.skipstone.keep.default
WRITE_CACHE = torch.ops.skipstone.write_cache.default
