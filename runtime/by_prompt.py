"""Running a program that reads prompts together with those that go on with them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from skipstone.ir.errors import InvalidInput, Unsupported
from skipstone.ir.program import Role
from skipstone.runtime.grouped_cache import UNDECIDED, GroupedCache
from skipstone.runtime.session import ProgramSession


class PromptSession:
    """Reads prompts with one session, and goes on with each sequence with the one that its prompt chose.

    The sequences of a step that go on with the same program run together; see `skipstone.runtime.session.Session`.
    Prompts are read whole, since all of a prompt chooses. A step that goes on behind them is made in two.

    Args:
        prompts: of a program with continuations.
        continuations: their sessions, in order.
    """

    def __init__(self, prompts: ProgramSession, continuations: Sequence[ProgramSession]) -> None:
        self.program, self.layout = prompts.program, prompts.layout
        self.prompts, self.continuations = prompts, tuple(continuations)

    def run(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `Session.run`: everything is prompt."""
        return self.prompts.run(values)

    def step(self, tokens: Tensor, positions: Tensor, count: Tensor, logit_rows: Tensor, cache: Any) -> Tensor:
        """See `Session.step`.

        Raises:
            InvalidInput: the cache has another batch or layout, or no room.
            Unsupported: the step ends within a prompt.
        """
        if not isinstance(cache, GroupedCache):
            raise InvalidInput("the cache was made for another program.", hint="Use the cache that prefill() returned.")
        if UNDECIDED in cache.groups:
            whole = cache.groups[UNDECIDED].cache
            # Where nobody said how long prompts are, they are what is read first.
            prompt = torch.where(whole.decode_start > 0, whole.decode_start - whole.lengths, count)
            if not torch.equal(count, prompt):
                return self._step_beyond(prompt, tokens, positions, count, logit_rows, cache)
            roles = (Role.LOGITS, Role.CHOICE, Role.PROMPT_SCORES)
            logits, *others = self.prompts.step_roles(tokens, positions, count, logit_rows, whole, *roles)
            whole.decode_start = whole.lengths + prompt
            choice = others.pop(0) if len(self.continuations) > 1 else torch.zeros_like(count)
            cache.decide(choice, self._by_buffer(others))
            return logits
        inputs = tokens, positions, count, logit_rows
        if len(cache.groups) == 1:
            ((number, group),) = cache.groups.items()
            return self.continuations[number].step(*inputs, group.cache)
        parts = []
        for number, group in cache.groups.items():
            own = [each.index_select(0, group.rows) for each in inputs]
            parts.append(self.continuations[number].step(own[0], own[1], own[2], own[3], group.cache))
        rows = torch.cat([group.rows for group in cache.groups.values()])
        together = torch.cat(parts)
        return torch.empty_like(together).index_copy_(0, rows, together)

    def _by_buffer(self, scores: Sequence[Tensor]) -> dict[str, Tensor]:
        """The scores of the rows of each slot, in the order in which the program returns them, by buffer."""
        slots = [port.slot for port in self.program.outputs if port.role == Role.PROMPT_SCORES]
        by_slot = dict(zip(slots, scores, strict=True))
        buffers = [port for port in self.program.inputs if port.is_buffer and port.slot in by_slot]
        return {port.name: by_slot[port.slot] for port in buffers}

    def _step_beyond(
        self,
        prompt: Tensor,
        tokens: Tensor,
        positions: Tensor,
        count: Tensor,
        logit_rows: Tensor,
        cache: GroupedCache,
    ) -> Tensor:
        """`step`, where a sequence has more tokens than the `prompt` [B] that it begins with, as speculation has."""
        if bool((count < prompt).any()):
            hint = "Read each prompt in one step; leave out prefill_chunk_size."
            raise Unsupported("reading a prompt in pieces where all of it chooses what is skipped", hint=hint)
        behind, begin = count - prompt, prompt.unsqueeze(1)
        width = int(behind.max())
        cache.grow(max(cache.capacity, int(prompt.max()) + width))  # short prompts may have more behind them
        logits = self.step(tokens, positions, prompt, logit_rows.minimum((begin - 1).clamp(min=0)), cache).clone()
        cache.advance(prompt)
        columns = (begin + torch.arange(width, device=tokens.device)).clamp(max=tokens.shape[1] - 1)
        rows = (logit_rows - begin).clamp(0, width - 1)
        try:
            later = self.step(tokens.gather(1, columns), positions.gather(1, columns), behind, rows, cache)
        finally:
            cache.advance(-prompt)  # whoever asks for the step counts all of it in
        return torch.where((logit_rows < begin).unsqueeze(-1), logits, later)

    def new_cache(self, batch: int, capacity: int) -> GroupedCache:
        """See `Session.new_cache`."""
        return GroupedCache.undecided(self._layouts, self.prompts.new_cache(batch, capacity))

    def load_cache(self, path: str | os.PathLike[str]) -> GroupedCache:
        """See `Session.load_cache`."""
        return GroupedCache.load(path, self._layouts, self.layout, self.program.source.device)

    @property
    def _layouts(self) -> list[Any]:
        return [session.layout for session in self.continuations]
