"""`skipstone::quantized_cached_attention_` on CUDA devices: append, attend, and keep what is read in full precision."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from skipstone.ir.quantized import quantized_cached_attention_
from skipstone.kernels.append import append, keep
from skipstone.kernels.call import Call
from skipstone.kernels.decode_attention import decode_attention, splits
from skipstone.kernels.launch import Launch
from skipstone.kernels.prefill_attention import prefill_attention
from skipstone.kernels.tuning import decode_tile, prefill_tile


def launches(call: Call, out: Tensor, processors: int) -> Iterator[Launch]:
    """The launches of a call, in order.

    Args:
        call: checked operands.
        out: [B, N, S, Dv], which the output goes to.
        processors: how many the device has.
    """
    tile = decode_tile(call)
    shares = splits(call, tile, processors)
    is_split = shares > 1 or call.queries * call.group <= tile.rows
    if not (is_split and call.is_step):
        yield append(call)
    if is_split:
        yield from decode_attention(call, out, tile, shares)
    else:
        yield prefill_attention(call, out, prefill_tile(call))
    if any(call.exact):
        # The ring may drop rows that the first of many queries still reads: it is written last.
        yield keep(call)


@quantized_cached_attention_.register_kernel("cuda")
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Sequence[Tensor],
    v_cache: Sequence[Tensor],
    start: Tensor,
    count: Tensor | None = None,
    k_static: Tensor | None = None,
    v_static: Tensor | None = None,
    sinks: Tensor | None = None,
    key_bias: Tensor | None = None,
    frequencies: Tensor | None = None,
    *,
    k_format: str,
    v_format: str,
    residual: int = 0,
    first: int = 0,
    scale: float,
    kind: str,
    window: int = 0,
    softcap: float = 0.0,
    slot: int = -1,
    first_position: int = 0,
) -> Tensor:
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    properties = torch.cuda.get_device_properties(q.device)
    call = Call(
        q, k, v, k_cache, v_cache, start, count, k_static, v_static, sinks, key_bias, k_format=k_format,
        v_format=v_format, residual=residual, first=first, scale=scale, kind=kind, window=window, softcap=softcap,
        arch=properties.major * 10 + properties.minor,
    )  # fmt: skip
    call.check()
    out = q.new_empty(*q.shape[:3], v.shape[-1])
    for launch in launches(call, out, properties.multi_processor_count):
        launch()
    return out
