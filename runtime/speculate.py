"""Generating with a draft: it guesses a few tokens, and the model reads all of them in one step to check them."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from skipstone.ir.program import Draft
from skipstone.runtime.cache import Cache, KVCache
from skipstone.runtime.decoding import read_prompt
from skipstone.runtime.executable import TokenModel
from skipstone.runtime.session import GreedySession, ProgramSession

MATCH = 3
"""A sequence seems to repeat itself where so many tokens stood in it before."""

Processor = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Speculation:
    """What drafting has done so far.

    Attributes:
        steps: of the model, those for prompts not counted.
        drafted: tokens that were guessed, per sequence.
        accepted: those that stand in what was generated.
    """

    steps: int = 0
    drafted: int = 0
    accepted: int = 0

    def __post_init__(self) -> None:
        self._turn = threading.Lock()

    def count(self, steps: int = 0, drafted: int = 0, accepted: int = 0) -> None:
        """Add to the counts; threads may do so at the same time."""
        with self._turn:
            self.steps += steps
            self.drafted += drafted
            self.accepted += accepted

    def __str__(self) -> str:
        share = f" ({self.accepted / self.drafted:.0%})" if self.drafted else ""
        return f"{self.steps} steps, {self.accepted} of {self.drafted} drafted tokens accepted{share}"


class SpeculativeSession:
    """A program's session together with that of its draft; see `skipstone.runtime.session.Session`.

    Args:
        model: of a program.
        draft: of its draft's program.
        how: the draft.
    Attributes:
        tokens: how many are guessed before the model checks them.
        lookup: how many are copied from the sequence itself where it seems to repeat, instead of asking the draft.
        speculation: counts over all sequences that were generated.
    """

    def __init__(self, model: ProgramSession, draft: ProgramSession, how: Draft) -> None:
        self.program, self.layout = model.program, model.layout
        self.model, self.draft = model, draft
        self.tokens, self.lookup, self.sources = how.tokens, how.lookup, how.buffers
        self.speculation = Speculation()

    def run(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `Session.run`: by the model."""
        return self.model.run(values)

    def step(self, tokens: Tensor, positions: Tensor, count: Tensor, logit_rows: Tensor, cache: Any) -> Tensor:
        """See `Session.step`: by the model."""
        return self.model.step(tokens, positions, count, logit_rows, cache)

    def new_cache(self, batch: int, capacity: int) -> Cache:
        """See `Session.new_cache`."""
        return self.model.new_cache(batch, capacity)

    def load_cache(self, path: str | os.PathLike[str]) -> Cache:
        """See `Session.load_cache`."""
        return self.model.load_cache(path)


class DraftCache:
    """What a draft reads and writes: the buffers of the model's cache, and copies where it keeps several as one.

    Args:
        session: that of the draft.
        cache: the model's.
    Attributes:
        kv: the cache of the draft.
    """

    def __init__(self, session: SpeculativeSession, cache: KVCache) -> None:
        self._held = dict(cache.buffers)
        self._copied: dict[str, tuple[str, ...]] = {}
        self._rows = 0  # so many rows of each sequence are copied
        buffers: dict[str, Tensor] = {}
        taken: set[str] = set()
        for each in session.draft.layout:
            sources = session.sources[each.name]
            if len(sources) == 1 and sources[0] not in taken:
                buffers[each.name] = cache.buffers[sources[0]]
                taken.add(sources[0])
            else:  # heads of several, or iterations that would overwrite each other's
                self._copied[each.name] = sources
        self.kv = session.draft.cache_over(buffers, cache)

    def is_of(self, cache: KVCache) -> bool:
        """Whether its buffers are still those of the model's cache."""
        return all(cache.buffers[name] is tensor for name, tensor in self._held.items())

    def follow(self, cache: KVCache) -> None:
        """Stand where the model's cache stands; what was drafted behind is forgotten."""
        self.kv.lengths, self.kv.decode_start = cache.lengths, cache.decode_start
        if not self._copied:
            return
        last, first = int(cache.lengths.max()), self._rows
        for each in self.kv.layout:
            if each.name in self._copied:
                begin, end = (0, None) if each.part.fixed_rows else (first // each.part.tokens, each.part.rows(last))
                own = [cache.buffers[name][:, :, begin:end] for name in self._copied[each.name]]
                torch.cat(own, dim=1, out=self.kv.buffers[each.name][:, :, begin:end])
        self._rows = int(cache.lengths.min())


@torch.no_grad()
def generate_speculatively(
    model: TokenModel,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    processor: Processor | None,
    drafting: Processor | None,
    finished: Callable[[Tensor, None], Tensor],
    max_length: int,
    ends_anywhere: bool = False,
    positions: Tensor | None = None,
    sample: bool = False,
    pad_token: Tensor | None = None,
    streamer: Any = None,
) -> Tensor:
    """What `generate_tokens` decodes: greedily the same tokens, in sampling from the same distribution.

    The sequences of a batch go on together: by as many tokens as all of those that are not finished accept. Where a
    step of several tokens rounds in another way than one of a single token, best tokens may differ that are equally
    good but for rounding.

    Args:
        model: a model with a cache, whose session is a `SpeculativeSession`.
        input_ids, attention_mask, finished, positions, sample, pad_token, streamer: see `generate_tokens`.
        processor: as of `generate_tokens`; it is called once for each token that is written. None for none.
        drafting: the same for the draft's guesses, which may be any. None for none.
        max_length: of prompt and new tokens.
        ends_anywhere: whether `finished` takes tokens on the host, whatever device the prompt is on.
    Returns:
        int64 [B, total], the prompt and the new tokens.
    """
    session: Any = model.session
    chooser = _Chooser(processor, drafting, sample)
    logits, cache, position, length = read_prompt(model, input_ids, attention_mask, positions)
    assert isinstance(cache, KVCache)  # no program with a draft has others
    draft = DraftCache(session, cache)
    # Where nothing else is asked for, the best tokens are brought to the host all at once.
    home = torch.device("cpu") if chooser.is_plain and ends_anywhere else input_ids.device
    written = _Written(input_ids.to(home), finished, pad_token, streamer)
    guesses = torch.empty(len(input_ids), 0, dtype=torch.int64, device=home)
    before = None  # lengths of the cache before the model read the guesses
    while True:
        kept, accepted = written.put(chooser.choices(written, logits, guesses), guesses)
        session.speculation.count(accepted=accepted)
        if not written.goes_on:
            break
        if before is not None:
            cache.crop(before + kept)
            position, length = position + kept, length + kept
        model.check_length(length + 1)
        room = max_length - written.tokens.shape[1] - 1
        if model.limit is not None:
            room = min(room, model.limit - length - 1)
        model.reserve(cache, length + 1 + min(room, max(session.tokens, session.lookup)))
        last = written.last.to(model.device)
        copied = written.repeated(min(session.lookup, room))
        if copied is not None:
            guesses = chooser.copied(copied)
        else:
            if not draft.is_of(cache):
                draft = DraftCache(session, cache)
            draft.follow(cache)
            count = min(session.tokens, room)
            guesses = chooser.guesses(session.draft, draft.kv, written.tokens, last, position, count)
        columns = torch.arange(1 + guesses.shape[1], device=model.device)
        read = torch.full_like(cache.lengths, len(columns))
        logits = session.step(
            torch.cat([last, guesses.to(model.device)], dim=1),
            position + columns,
            read,
            columns.expand(len(input_ids), -1).contiguous(),
            cache,
        )
        before = cache.lengths
        cache.advance(read)
        guesses = guesses.to(home)
        session.speculation.count(steps=1, drafted=guesses.shape[1])
    if streamer is not None:
        streamer.end()
    return written.tokens.to(input_ids.device)


class _Written:
    """What has been generated so far.

    Attributes:
        tokens: int64 [B, T], with the prompt.
        last: int64 [B, 1], what was chosen last; finished sequences go on with their own tokens.
        running: bool [B], the sequences that are not finished.
        goes_on: whether there are any.
    """

    def __init__(
        self, tokens: Tensor, finished: Callable[[Tensor, None], Tensor], pad_token: Tensor | None, streamer: Any
    ) -> None:
        self.tokens, self.last = tokens, tokens[:, -1:]
        self.running = torch.ones(len(tokens), dtype=torch.bool, device=tokens.device)
        self.goes_on = True
        self._finished, self._streamer = finished, streamer
        self._pad_token = None if pad_token is None else pad_token.to(tokens.device)

    def repeated(self, count: int) -> Tensor | None:
        """What followed the last time that each sequence had its last `MATCH` tokens, if all of them did before.

        Where less than `count` tokens followed, they are taken to go on repeating.

        Returns:
            int64 [B, count], or None.
        """
        total = self.tokens.shape[1]
        if count < 1 or total <= MATCH:
            return None
        hits = (self.tokens[:, :-1].unfold(1, MATCH, 1) == self.tokens[:, None, -MATCH:]).all(dim=-1)
        if not bool((hits.any(dim=1) | ~self.running).all()):
            return None
        begin = (hits * torch.arange(1, 1 + hits.shape[1], device=hits.device)).amax(dim=1, keepdim=True) + MATCH - 1
        columns = begin + torch.arange(count, device=hits.device) % (total - begin)
        # Finished sequences may hold pad tokens, which need not be known to the model.
        return torch.where(self.running.unsqueeze(1), self.tokens.gather(1, columns), self.last)

    def put(self, choices: Iterator[Tensor], guesses: Tensor) -> tuple[int, int]:
        """Write choices [B] up to the first that differs from its guess.

        Args:
            choices: one more than there are guesses; each is made when it is asked for.
            guesses: int64 [B, G].
        Returns:
            how many were written, and how many of them were guessed.
        """
        kept = accepted = 0
        for chosen in choices:
            written = chosen if self._pad_token is None else torch.where(self.running, chosen, self._pad_token)
            self.tokens = torch.cat([self.tokens, written.unsqueeze(1)], dim=1)
            # Without a pad token, sequences that are finished go on, and agree as well.
            needed = torch.ones_like(self.running) if self._pad_token is None else self.running
            agrees = kept < guesses.shape[1] and bool(((chosen == guesses[:, kept]) | ~needed).all())
            self.running = self.running & ~self._finished(self.tokens, None)
            if self._streamer is not None:
                self._streamer.put(written.cpu())
            kept, accepted = kept + 1, accepted + agrees
            self.last, self.goes_on = chosen.unsqueeze(1), bool(self.running.any())
            if not (agrees and self.goes_on):
                break
        return kept, accepted


class _Chooser:
    """Chooses tokens for the model, and guesses them for the draft.

    Args:
        processor, drafting, sample: see `generate_speculatively`.
    Attributes:
        is_plain: whether the best tokens are chosen, as the logits give them.
    """

    def __init__(self, processor: Processor | None, drafting: Processor | None, sample: bool) -> None:
        self.is_plain = processor is None and not sample
        self._processor, self._drafting, self._sample = processor, drafting, sample
        self._odds: list[Tensor] = []  # of each guess: the probabilities [B, V] that it was drawn with

    def guesses(
        self, session: ProgramSession, cache: KVCache, tokens: Tensor, last: Tensor, position: Tensor, count: int
    ) -> Tensor:
        """Guess what follows.

        Args:
            session: of the draft, whose `cache` holds all but the last tokens.
            tokens: int64 [B, T], what has been generated.
            last: int64 [B, 1], the last tokens, on the device of the draft.
            position: int64 [B, 1], theirs.
            count: how many tokens to guess.
        Returns:
            int64 [B, count].
        """
        self._odds = []
        if self._drafting is None and not self._sample and count and isinstance(session, GreedySession):
            return session.decode(last, position, cache, count)
        one, row = torch.ones_like(cache.lengths), torch.zeros_like(last)
        found = [last]
        for _ in range(count):
            logits = session.step(found[-1], position, one, row, cache)[:, 0]
            cache.advance(one)
            if self.is_plain:
                guess = logits.argmax(dim=-1, keepdim=True)
            else:
                guess = self._drawn(_scores(self._drafting, tokens, logits)).unsqueeze(1)
                tokens = torch.cat([tokens, guess], dim=1)
            found.append(guess.to(last.device))
            position = position + 1
        return torch.cat(found, dim=1)[:, 1:]

    def copied(self, guesses: Tensor) -> Tensor:
        """Guesses [B, count] that were not drawn: each was certain."""
        self._odds = []
        return guesses

    def _drawn(self, scores: Tensor) -> Tensor:
        if not self._sample:
            return scores.argmax(dim=-1)
        self._odds.append(scores.softmax(dim=-1))
        return torch.multinomial(self._odds[-1], num_samples=1).squeeze(1)

    def choices(self, written: _Written, logits: Tensor, guesses: Tensor) -> Iterator[Tensor]:
        """What the model chooses [B], a column of its logits [B, G + 1, V] after the other, as far as it is asked.

        A drawn token is the guess with probability min(1, p / q), with p and q the probabilities of the model and of
        the draft, and else drawn from what p has more than q: altogether it is distributed like p.
        """
        if self.is_plain:
            yield from logits.argmax(dim=-1).to(guesses.device).unbind(1)
            return
        for column in range(logits.shape[1]):
            scores = _scores(self._processor, written.tokens, logits[:, column])
            if not self._sample:
                yield scores.argmax(dim=-1)
                continue
            model = scores.softmax(dim=-1)
            if column == guesses.shape[1]:
                yield torch.multinomial(model, num_samples=1).squeeze(1)
                continue
            guess = guesses[:, column : column + 1]
            draft = self._odds[column] if self._odds else torch.zeros_like(model).scatter_(1, guess, 1.0)
            accepted = torch.rand_like(model[:, :1]) * draft.gather(1, guess) < model.gather(1, guess)
            rest = (model - draft).clamp(min=0)
            # Without any rest the two are equal, and the guess is accepted, but for rounding.
            rest = torch.where(rest.sum(dim=-1, keepdim=True) > 0, rest, model)
            yield torch.where(accepted, guess, torch.multinomial(rest, num_samples=1)).squeeze(1)


def _scores(processor: Processor | None, tokens: Tensor, logits: Tensor) -> Tensor:
    """Processed scores [B, V] in float32, a copy: processors may write to them."""
    scores = logits.to(tokens.device, torch.float32, copy=True)
    return scores if processor is None else processor(tokens, scores)
