"""Attention through a KV cache that is kept in a number format of `skipstone.ir.formats`.

The cache of a key (or value) is a list of buffers: the parts of its format, and, where the format or the plan asks for
full precision close to the query, a ring of recent rows and the first rows of the sequence. Everything here reads the
cache a tile at a time: a dequantized cache never exists.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from skipstone.ir.attention import (
    attention_weights,
    key_bias_products,
    query_key_products,
    visible,
    weighted_values,
)
from skipstone.ir.formats import Format, Full, parse
from skipstone.ir.windowed import STEP, window_rows

TILE = 1024
"""Cache rows that the reference dequantizes at a time, or fewer, so that tokens that share a scale stay together."""

SPARE = 32
"""Rows of the ring beyond those that are read: so many tokens can be cropped (speculative decoding, beams)."""


@dataclass(frozen=True)
class CachePart:
    """One buffer [B, KH, rows, width] of a cached key or value.

    Attributes:
        name: "codes", "scale", "offset", "recent" or "first".
        dtype: its element type.
        width: elements a row.
        tokens: tokens that share a row; there are ``ceil(C / tokens)`` rows in a cache of capacity C.
        fixed_rows: number of rows whatever the capacity, None for the rule above.
    """

    name: str
    dtype: torch.dtype
    width: int
    tokens: int = 1
    fixed_rows: int | None = None

    def rows(self, capacity: int) -> int:
        """Rows in a cache of that capacity."""
        return -(-capacity // self.tokens) if self.fixed_rows is None else self.fixed_rows


@dataclass(frozen=True)
class CacheFormat:
    """How a key or value is cached.

    Attributes:
        format: the number format of the body.
        residual: the newest tokens, counted from each query, that are read in full precision.
        first: tokens at the beginning of the sequence that are read in full precision (attention sinks).
        window: the newest tokens that are kept at all, beside the first ones; 0 for all tokens. See
            `skipstone.ir.windowed`.
        prompt_rows: the most rows that are kept of a prompt, 0 for all. See `skipstone.ir.kept_prompt`.
    """

    format: Format
    residual: int = 0
    first: int = 0
    window: int = 0
    prompt_rows: int = 0

    @property
    def ring_rows(self) -> int:
        """Rows of the ring of recent tokens, 0 where there is none."""
        if self.window:
            return self.window + STEP - 1
        recent = self.residual + (self.format.group_tokens if self.format.group_tokens > 1 else 0)
        return recent + SPARE if recent else 0

    def parts(self, width: int, dtype: torch.dtype) -> tuple[CachePart, ...]:
        """The buffers of vectors of `width` elements whose own dtype is `dtype`."""
        if self.window:
            return (CachePart("codes", dtype, width, fixed_rows=window_rows(self.window, self.first)),)
        parts = [CachePart(p.name, p.dtype, p.width, p.tokens) for p in self.format.parts(width, dtype)]
        if self.ring_rows:
            parts.append(CachePart("recent", dtype, width, fixed_rows=self.ring_rows))
        if self.first:
            parts.append(CachePart("first", dtype, width, fixed_rows=self.first))
        return tuple(parts)

    def dropped(self, prompt: Tensor) -> Tensor:
        """How many rows of prompts of these lengths (integers) are not kept."""
        return (prompt - self.prompt_rows).clamp(min=0) if self.prompt_rows else torch.zeros_like(prompt)

    def quantized_until(self, lengths: Tensor) -> Tensor:
        """How many rows a query reads from the codes, where its own row is the last of `lengths` (integers)."""
        group = self.format.group_tokens
        return ((lengths - self.residual).clamp(min=0) // group) * group

    def ring_read_from(self, lengths: Tensor) -> Tensor:
        """The first row that has to be in the ring of recent tokens for a query behind `lengths` rows (integers)."""
        begin = lengths - self.window + 1 if self.window else self.quantized_until(lengths)
        return begin.clamp(min=self.first)


def cache_format(name: str, residual: int = 0, first: int = 0) -> CacheFormat:
    """The cache format of a canonical format name, see `skipstone.ir.formats.parse`."""
    form = parse(name)
    return CacheFormat(form) if isinstance(form, Full) else CacheFormat(form, residual, first)


# Writing


def write_rows(
    form: CacheFormat, parts: Sequence[Tensor], x: Tensor, start: Tensor, count: Tensor | None, static: Tensor | None
) -> list[Tensor]:
    """The buffers after the rows of x have been written; rows that are there already are never encoded again.

    Args:
        form: format of the cache.
        parts: its buffers, in the order of `CacheFormat.parts`; they stay as they are.
        x: [B, KH, S, D].
        start: int64 [B], row of the first token.
        count: int64 [B], tokens of x to write, from the first on; None for all.
        static: the format's static tensor.
    """
    written = [part.clone() for part in parts]
    body = len(form.format.parts(x.shape[-1], x.dtype))
    counts = torch.full_like(start, x.shape[2]) if count is None else count
    for row, (begin, number) in enumerate(zip(start.tolist(), counts.tolist(), strict=True)):
        new = x[row : row + 1, :, :number]
        if form.format.group_tokens > 1:
            recent = _ring_rows(parts[body][row : row + 1], begin % form.format.group_tokens, begin)
            new = torch.cat([recent, new], dim=2)
        _encode_into([part[row : row + 1] for part in written[:body]], form.format, new, begin + number, static)
        _keep(form, [part[row : row + 1] for part in written[body:]], x[row : row + 1, :, :number], begin)
    return written


def _encode_into(parts: Sequence[Tensor], form: Format, x: Tensor, end: int, static: Tensor | None) -> None:
    """Encode x [1, KH, S, D], whose last row is row ``end - 1``, as far as its groups of tokens are complete."""
    begin = end - x.shape[2]
    rows = x.shape[2] // form.group_tokens * form.group_tokens
    if rows == 0:
        return
    for part, new in zip(parts, form.encode(x[:, :, :rows], static), strict=True):
        tokens = rows // new.shape[2]
        part[:, :, begin // tokens : (begin + rows) // tokens] = new


def _keep(form: CacheFormat, parts: Sequence[Tensor], x: Tensor, begin: int) -> None:
    """Copy the rows of x [1, KH, S, D] that are read in full precision into the ring and the first rows."""
    rows = x.shape[2]
    if form.ring_rows:
        last = min(rows, form.ring_rows)
        places = torch.arange(begin + rows - last, begin + rows, device=x.device) % form.ring_rows
        parts[0][:, :, places] = x[:, :, rows - last :]
    if form.first and begin < form.first:
        until = min(begin + rows, form.first)
        parts[-1][:, :, begin:until] = x[:, :, : until - begin]


def _ring_rows(ring: Tensor, number: int, end: int) -> Tensor:
    """The rows ``end - number .. end - 1`` of a ring [1, KH, R, D]."""
    places = torch.arange(end - number, end, device=ring.device) % ring.shape[2]
    return ring[:, :, places]


# Reading


class _Reader:
    """Reads one cached key or value: decoded tiles, and the rows that are in full precision.

    Args:
        form, parts, static: the cache after the new rows have been written.
        fresh: [B, KH, S, D], the new rows.
        before: the ring and first rows before the new ones were written.
        start: int64 [B].
    """

    def __init__(
        self, form: CacheFormat, parts: Sequence[Tensor], static: Tensor | None, fresh: Tensor,
        before: Sequence[Tensor], start: Tensor,
    ) -> None:  # fmt: skip
        self.form, self.static, self.width = form, static, fresh.shape[-1]
        self.exact = torch.promote_types(fresh.dtype, torch.float32)
        self.tokens = [part.tokens for part in form.format.parts(self.width, fresh.dtype)]
        self.body = parts[: len(self.tokens)]
        self.capacity = self.body[0].shape[2]
        self.rows: Tensor | None = None
        if form.ring_rows or form.first:
            self._gather(fresh, before, start)

    def _gather(self, fresh: Tensor, before: Sequence[Tensor], start: Tensor) -> None:
        """Collect full-precision rows [B, KH, R, D] and the cache row of each, [B, R]; -1 where it holds none."""
        begin = start.unsqueeze(1)
        columns = [begin + torch.arange(fresh.shape[2], device=start.device)]
        rows = [fresh]
        if ring := self.form.ring_rows:
            # Place p holds the newest row before `start` that is p modulo the ring's length.
            held = begin - 1 - (begin - 1 - torch.arange(ring, device=start.device)) % ring
            columns.append(torch.where(held >= max(self.form.first, 0), held, -1))
            rows.append(before[0])
        if first := self.form.first:
            early = torch.arange(first, device=start.device).expand(len(start), first)
            columns.append(torch.where(early < begin, early, -1))
            rows.append(before[-1])
        self.rows, self.columns = torch.cat(rows, dim=2), torch.cat(columns, dim=1)

    def tiles(self) -> Iterator[tuple[int, Tensor]]:
        """The decoded cache, as first row and [B, KH, TILE, D] of each tile, one at a time."""
        group = self.form.format.group_tokens
        step = max(TILE // group, 1) * group
        for begin in range(0, self.capacity, step):
            end = min(begin + step, self.capacity)
            pairs = zip(self.body, self.tokens, strict=True)
            cut = [part[:, :, begin // tokens : -(-end // tokens)] for part, tokens in pairs]
            yield begin, self.form.format.decode(cut, self.static, self.exact, self.width)

    def full_precision(self, lengths: Tensor) -> Tensor | None:
        """bool [B, 1, S, C]: the rows that queries with `lengths` [B, S] visible rows read in full precision."""
        if self.rows is None:
            return None
        columns = torch.arange(self.capacity, device=lengths.device)
        until = self.form.quantized_until(lengths)[:, None, :, None]
        return (columns >= until) | (columns < self.form.first)


def _products(q: Tensor, keys: _Reader, lengths: Tensor) -> Tensor:
    """``q @ k.T`` [B, N, S, C] with the keys that each query reads."""
    coarse = torch.cat([query_key_products(q, tile) for _, tile in keys.tiles()], dim=-1)
    full = keys.full_precision(lengths)
    if full is None or keys.rows is None:
        return coarse
    exact = query_key_products(q, keys.rows)
    places = torch.where(
        keys.columns < 0, keys.capacity, keys.columns
    )  # rows that hold nothing go to a column too many
    places = places[:, None, None, :].expand(exact.shape)
    fine = F.pad(coarse, (0, 1)).scatter(-1, places, exact)[..., : keys.capacity]
    return torch.where(full, fine, coarse)


def _mix(weights: Tensor, values: _Reader, lengths: Tensor) -> Tensor:
    """``weights @ v`` with the values that each query reads; weights: [B, N, S, C]."""
    full = values.full_precision(lengths)
    coarse = weights if full is None else torch.where(full, 0, weights)
    mixed = torch.zeros(*weights.shape[:3], values.width, dtype=weights.dtype, device=weights.device)
    for begin, tile in values.tiles():
        mixed = mixed + weighted_values(coarse[..., begin : begin + tile.shape[2]], tile)
    if full is None or values.rows is None:
        return mixed
    fine = F.pad(torch.where(full, weights, 0), (0, 1))
    places = torch.where(values.columns < 0, values.capacity, values.columns)[:, None, None, :]
    return mixed + weighted_values(fine.gather(-1, places.expand(*weights.shape[:3], -1)), values.rows)


def quantized_cached_attention_reference(
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
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """In plain PyTorch operators; see `quantized_cached_attention`."""
    forms = [cache_format(name, residual, first) for name in (k_format, v_format)]
    new_caches: list[list[Tensor]] = []
    readers = []
    for form, x, cache, static in zip(forms, (k, v), (k_cache, v_cache), (k_static, v_static), strict=True):
        new = write_rows(form, cache, x, start, count, static)
        body = len(form.format.parts(x.shape[-1], x.dtype))
        readers.append(_Reader(form, new, static, x, cache[body:], start))
        new_caches.append(new)
    keys, values = readers
    positions = start.unsqueeze(1) + torch.arange(q.shape[2], device=q.device)  # [B, S]
    columns = torch.arange(keys.capacity, device=q.device)
    allowed = visible(kind, window, positions[:, None, :, None], columns)
    products = _products(q, keys, positions + 1)
    constant = key_bias_products(q, key_bias, frequencies, keys.capacity, first_position)
    products = products if constant is None else products + constant
    weights = attention_weights(products * scale, allowed, None, sinks, softcap)
    return _mix(weights, values, positions + 1).to(q.dtype), new_caches[0], new_caches[1]


@torch.library.custom_op("skipstone::quantized_cached_attention", mutates_args=())
def quantized_cached_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: list[Tensor],
    v_cache: list[Tensor],
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
) -> list[Tensor]:
    """`cached_attention` through a quantized cache.

    Row i of sequence b stands at position p = ``start[b] + i``. It is encoded into the cache first, then it attends to
    what the cache gives back for the rows ``j <= p`` that `kind` allows, its own included. Rows that a format shares
    scales over (`Format.group_tokens`) are encoded when their group is complete, and read in full precision until then;
    so are the `residual` rows before each query and the `first` rows of the sequence. A token is encoded once, so that
    step by step and in one go are the same.

    Args:
        q: [B, N, S, D]; k: [B, KH, S, D]; v: [B, KH, S, Dv].
        k_cache, v_cache: the buffers of `CacheFormat.parts`, each [B, KH, rows, width].
        start: int64 [B], the number of rows already in the cache.
        count: int64 [B], the valid rows of each sequence; the others are not written. None: all are valid.
        k_static, v_static: float32 [KH, D] or [KH, 1], the static tensors of the formats that have one.
        sinks, key_bias, frequencies, scale, kind, window, softcap, slot, first_position: as in `cached_attention`.
        k_format, v_format: canonical format names.
        residual, first: rows in full precision, see `CacheFormat`.
    Returns:
        the output [B, N, S, Dv], then the buffers of the keys and of the values after the write.
    """
    operands = (q, k, v, k_cache, v_cache, start, count, k_static, v_static, sinks, key_bias, frequencies)
    out, keys, values = quantized_cached_attention_reference(
        *operands, k_format=k_format, v_format=v_format, residual=residual, first=first, scale=scale, kind=kind,
        window=window, softcap=softcap, slot=slot, first_position=first_position,
    )  # fmt: skip
    return [out.contiguous(), *keys, *values]


@quantized_cached_attention.register_fake
def _(q, k, v, k_cache, v_cache, *_operands, **_options):  # type: ignore[no-untyped-def]
    return [q.new_empty(*q.shape[:3], v.shape[-1]), *(torch.empty_like(part) for part in (*k_cache, *v_cache))]


@torch.library.custom_op("skipstone::quantized_cached_attention_", mutates_args=("k_cache", "v_cache"))
def quantized_cached_attention_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: list[Tensor],
    v_cache: list[Tensor],
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
    """`quantized_cached_attention` that writes into the buffers and returns the output alone."""
    operands = (q, k, v, k_cache, v_cache, start, count, k_static, v_static, sinks, key_bias, frequencies)
    out, keys, values = quantized_cached_attention_reference(
        *operands, k_format=k_format, v_format=v_format, residual=residual, first=first, scale=scale, kind=kind,
        window=window, softcap=softcap, slot=slot, first_position=first_position,
    )  # fmt: skip
    for buffer, new in zip((*k_cache, *v_cache), (*keys, *values), strict=True):
        buffer.copy_(new)
    return out.contiguous()


@quantized_cached_attention_.register_fake
def _(q, k, v, *_operands, **_options):  # type: ignore[no-untyped-def]
    return q.new_empty(*q.shape[:3], v.shape[-1])


QUANTIZED_CACHED_ATTENTION = torch.ops.skipstone.quantized_cached_attention.default
