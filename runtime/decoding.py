"""Decoding token by token, and many tokens at a time: the loops of `generate`, without transformers' bookkeeping."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from skipstone.runtime.cache import Cache
from skipstone.runtime.executable import TokenModel

AHEAD = 32
"""Greedy tokens that a device decodes before the host looks at them."""


class Answer:
    """A bool on a device, on its way to the host; to ask for its value waits for it.

    Attributes:
        takes_time: whether the device may still be about to compute it.
    """

    def __init__(self, value: Tensor) -> None:
        self.takes_time = value.is_cuda
        self._value = value
        if self.takes_time:
            self._value = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(value, non_blocking=True)
            self._arrival = torch.cuda.Event()
            self._arrival.record()

    def __bool__(self) -> bool:
        if self.takes_time:
            self._arrival.synchronize()
        return bool(self._value)


@torch.no_grad()
def generate_tokens(
    model: TokenModel,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    processor: Callable[[Tensor, Tensor], Tensor],
    finished: Callable[[Tensor, None], Tensor],
    positions: Tensor | None = None,
    sample: bool = False,
    pad_token: Tensor | None = None,
    streamer: Any = None,
) -> Tensor:
    """Decode token by token until every sequence is finished: the common case, without transformers' bookkeeping.

    Tokens, random numbers and what the streamer sees are those of `GenerationMixin._sample`.

    Args:
        model: a model with a cache.
        input_ids: int64 [B, S], padded on the left.
        attention_mask: [B, S], or None when nothing is padded.
        processor: maps tokens so far [B, T] and float32 scores [B, V] to scores.
        finished: maps tokens so far [B, T] to bool [B], true where a sequence ends.
        positions: int64 [B, S] of the prompt; by default valid tokens count from 0.
        sample: draw from the distribution instead of taking the best token.
        pad_token: int64 scalar that is written after the end of a sequence; None to go on writing tokens.
        streamer: receives every new column through `put`, then `end`.
    Returns:
        int64 [B, total], the prompt and the new tokens.
    """
    logits, cache, position, length = read_prompt(model, input_ids, attention_mask, positions)
    only_row = torch.zeros_like(position)
    one_each = torch.ones_like(cache.lengths)
    running = torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
    while True:
        # A copy: processors may write to the scores, and the session may reuse its buffer.
        scores = processor(input_ids, logits[:, 0].to(input_ids.device, torch.float32, copy=True))
        if sample:
            chosen = torch.multinomial(scores.softmax(dim=-1), num_samples=1).squeeze(1)
        else:
            chosen = scores.argmax(dim=-1)
        written = chosen if pad_token is None else torch.where(running, chosen, pad_token)
        input_ids = torch.cat([input_ids, written.unsqueeze(1)], dim=1)
        running = running & ~finished(input_ids, None)
        goes_on = Answer(running.any())
        if streamer is not None:
            streamer.put(written.cpu())
        # A device would stand still until the host knows whether to go on: it begins the next step before, which is
        # one too many at the end. Where a step needs more room, it is known first.
        begins_early = goes_on.takes_time and length < cache.capacity
        if not begins_early and not goes_on:
            break
        length += 1
        model.check_length(length)
        model.reserve(cache, length)
        # Finished rows go on with their own token, since the pad token need not be one that the model knows.
        logits = model.session.step(chosen.unsqueeze(1).to(model.device), position, one_each, only_row, cache)
        cache.advance(one_each)
        position = position + 1
        if begins_early and not goes_on:
            break
    if streamer is not None:
        streamer.end()
    return input_ids


@torch.no_grad()
def generate_greedily(
    model: TokenModel,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    max_length: int,
    ends: Tensor | None = None,
    positions: Tensor | None = None,
    pad_token: Tensor | None = None,
) -> Tensor:
    """What `generate_tokens` decodes greedily, by a session that chooses tokens by itself.

    Args:
        model: a model with a cache, whose session is a `GreedySession`.
        input_ids, attention_mask, positions, pad_token: see `generate_tokens`.
        max_length: of prompt and new tokens, more than there are.
        ends: int64 [E], tokens that end a sequence; None to go on.
    Returns:
        int64 [B, total], the prompt and the new tokens.
    """
    logits, cache, position, length = read_prompt(model, input_ids, attention_mask, positions)
    session: Any = model.session
    tokens = logits[:, 0].argmax(dim=-1, keepdim=True)
    running = torch.ones_like(tokens, dtype=torch.bool)
    columns, kept = [input_ids.to(model.device)], [torch.tensor(input_ids.shape[1])]
    left = max_length - input_ids.shape[1]
    while True:
        is_end = torch.zeros_like(tokens, dtype=torch.bool)
        if ends is not None:
            is_end = torch.isin(tokens, ends.to(tokens.device))
        # A sequence goes on until one of its tokens is an end, which is still written.
        over = is_end.cumsum(dim=1) > 0
        running = running & ~torch.cat([torch.zeros_like(over[:, :1]), over[:, :-1]], dim=1)
        columns.append(tokens if pad_token is None else torch.where(running, tokens, pad_token.to(tokens.device)))
        kept.append(running.any(dim=0).sum())
        left -= tokens.shape[1]
        running = (running & ~is_end)[:, -1:]
        goes_on = Answer(running.any())
        # As in `generate_tokens`, a device goes on before the host knows whether it has to.
        count = min(AHEAD, left)
        begins_early = goes_on.takes_time and length + count <= cache.capacity
        if count == 0 or (not begins_early and not goes_on):
            break
        model.check_length(length + count)
        model.reserve(cache, length + count)
        tokens = session.decode(tokens[:, -1:], position, cache, count)
        length, position = length + count, position + count
        if begins_early and not goes_on:
            break
    total = int(torch.stack([each.to(model.device) for each in kept]).sum())
    return torch.cat(columns, dim=1)[:, :total].to(input_ids.device)


def read_prompt(
    model: TokenModel, input_ids: Tensor, attention_mask: Tensor | None, positions: Tensor | None
) -> tuple[Tensor, Cache, Tensor, int]:
    """Logits [B, 1, V] behind a prompt, the cache that it is in, positions [B, 1] behind it, and the longest length.

    The length is kept on the host, so that the device need not be asked at each step.
    """
    tokens, layout = model.prepare(input_ids, attention_mask)
    batch, width = tokens.shape
    cache = model.new_cache(batch, width)
    cache.decode_start = layout.counts
    last = (layout.counts - 1).unsqueeze(1)
    position = layout.counts.unsqueeze(1) + model.program.source.first_position
    if positions is not None:
        positions = layout.to_front(positions.expand(batch, width).to(model.device))
        position = positions.gather(1, last) + 1
    logits = model.advance(tokens, layout, last, positions=positions, cache=cache)
    return logits, cache, position, int(layout.counts.max())
