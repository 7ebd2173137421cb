"""`skipstone::windowed_attention` against attention over all tokens under a mask, however the tokens come in."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from skipstone.ir.attention import attend
from skipstone.ir.windowed import STEP, WINDOWED_ATTENTION, window_rows

HEADS, KV_HEADS, WIDTH = 4, 2, 8


def drawn(batch: int, tokens: int, heads: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, heads, tokens, WIDTH, dtype=torch.float64, generator=generator)


def written_out(q: Tensor, k: Tensor, v: Tensor, window: int, first: int, sinks: Tensor | None, cap: float) -> Tensor:
    """What each token sees, as the paper says it: over all tokens, under a mask."""
    i, j = torch.arange(q.shape[2])[:, None], torch.arange(q.shape[2])
    allowed = (j <= i) & ((i - j < window) | (j < first))
    return attend(q, k, v, allowed, None, sinks, 0.4, cap)


@st.composite
def runs(draw: st.DrawFn) -> tuple[int, int, list[int], list[int], int]:
    """A window, first tokens, the sizes of the steps, how many tokens the second sequence has less, and a seed."""
    window, first = draw(st.integers(1, 40)), draw(st.integers(0, 9))
    sizes = draw(st.lists(st.sampled_from((1, 2, 7, 33, STEP - 1, STEP)), min_size=1, max_size=9))
    behind = [draw(st.integers(0, size)) for size in sizes]
    return window, first, sizes, behind, draw(st.integers(0, 2**16))


@settings(deadline=None, max_examples=25)
@given(runs(), st.booleans(), st.sampled_from((0.0, 3.0)))
def test_steps_of_any_size_are_one_masked_attention(
    run: tuple[int, int, list[int], list[int], int], has_sinks: bool, cap: float
) -> None:
    window, first, sizes, behind, seed = run
    lengths = [sum(sizes), sum(sizes) - sum(behind)]
    whole = [drawn(2, lengths[0], heads, seed + n) for n, heads in enumerate((HEADS, KV_HEADS, KV_HEADS))]
    sinks = torch.linspace(-1, 1, HEADS, dtype=torch.float64) if has_sinks else None
    wanted = written_out(*whole, window, first, sinks, cap)
    # Garbage where nothing was written: what is masked must not matter.
    caches = [torch.full((2, KV_HEADS, window_rows(window, first), WIDTH), 1e6, dtype=torch.float64)] * 2
    start = torch.zeros(2, dtype=torch.int64)
    for size, less in zip(sizes, behind, strict=True):
        count = torch.tensor([size, size - less])
        rows = (start[:, None] + torch.arange(size)).clamp(max=lengths[0] - 1)[:, None, :, None]
        new = [each.gather(2, rows.expand(-1, each.shape[1], -1, WIDTH)) for each in whole]
        out, *caches = WINDOWED_ATTENTION(
            *new, *caches, start, count, sinks, scale=0.4, window=window, first=first, softcap=cap
        )
        for row, number in enumerate(count.tolist()):
            begin = int(start[row])
            seen, expected = out[row, :, :number], wanted[row, :, begin : begin + number]
            assert torch.allclose(seen, expected, atol=1e-12), (row, begin)
        start = start + count


@pytest.mark.parametrize("first", [0, 3])
def test_only_what_is_seen_again_is_kept(first: int) -> None:
    """Each row of the cache is the newest token of its place; what went by is gone, and so is what was not valid."""
    window, tokens = 5, 2 * STEP + 40
    ring = window + STEP - 1
    rows = torch.arange(tokens, dtype=torch.float64).reshape(1, 1, -1, 1)
    cache = torch.zeros(1, 1, window_rows(window, first), 1, dtype=torch.float64)
    keys = cache
    for begin in range(0, tokens, STEP):
        new = rows[:, :, begin : begin + STEP]
        count = torch.tensor([new.shape[2] - 1 if begin + STEP >= tokens else new.shape[2]])
        _, keys, _ = WINDOWED_ATTENTION(
            new, new, new, keys, cache, torch.tensor([begin]), count, scale=1.0, window=window, first=first
        )
    newest = tokens - 2
    assert keys[0, 0, :first, 0].tolist() == list(range(first))
    assert sorted(keys[0, 0, first:-1, 0].tolist()) == list(range(newest - ring + 1, newest + 1))
    assert keys[0, 0, -1, 0] == newest + 1


def test_too_long_a_step_is_refused() -> None:
    x, cache = torch.zeros(1, 1, STEP + 1, 8), torch.zeros(1, 1, window_rows(4, 0), 8)
    start = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(RuntimeError, match=f"a step of {STEP + 1} tokens, more than {STEP}"):
        WINDOWED_ATTENTION(x, x, x, cache, cache, start, start + STEP + 1, scale=1.0, window=4)


def test_a_cache_of_another_size_is_refused() -> None:
    x, cache = torch.zeros(1, 1, 2, 8), torch.zeros(1, 1, window_rows(4, 0), 8)
    start = torch.zeros(1, dtype=torch.int64)
    for device in ("cpu", "meta"):
        operands = [each.to(device) for each in (x, x, x, cache, cache, start, start)]
        with pytest.raises(RuntimeError, match=f"a cache of {STEP + 4} rows, a window takes {STEP + 7}"):
            WINDOWED_ATTENTION(*operands, scale=1.0, window=4, first=3)


def test_the_operator_is_registered_as_torch_wants_it() -> None:
    q, k = drawn(2, 3, HEADS, 0), drawn(2, 3, KV_HEADS, 1)
    cache = torch.zeros(2, KV_HEADS, window_rows(6, 2), WIDTH, dtype=torch.float64)
    start, count = torch.tensor([0, 4]), torch.tensor([3, 2])
    options = {"scale": 1.0, "window": 6, "first": 2, "softcap": 0.0, "slot": 0}
    torch.library.opcheck(WINDOWED_ATTENTION, (q, k, k, cache, cache, start, count, None), options)
