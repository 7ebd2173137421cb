"""The KV cache of a batch whose sequences are continued by different programs."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from skipstone.ir.errors import ArtifactError
from skipstone.runtime.cache import Cache, CacheBuffer, KVCache, description, read_tensors, write_tensors

UNDECIDED = -1
"""The number of the group whose prompts are not read yet."""


@dataclass(frozen=True)
class Group:
    """Sequences that one program goes on with.

    Attributes:
        rows: int64 [N], which of the batch they are.
        cache: theirs, in that order.
    """

    rows: Tensor
    cache: KVCache


class GroupedCache(Cache):
    """A cache that falls apart into one for each continuation as soon as the prompts are read (`decide`).

    A sequence stays with its continuation, however far it is cropped: buffers that this one does without are gone, and
    so are the rows of prompts that it does not keep.

    Attributes:
        layouts: the buffers of each continuation.
        groups: by the number of the continuation, or ``UNDECIDED``; only those with a sequence.
    """

    def __init__(self, layouts: Sequence[Sequence[CacheBuffer]], groups: dict[int, Group]) -> None:
        self.layouts = tuple(tuple(layout) for layout in layouts)
        self.groups = groups

    @classmethod
    def undecided(cls, layouts: Sequence[Sequence[CacheBuffer]], cache: KVCache) -> GroupedCache:
        """A cache of sequences whose prompts are not read yet."""
        return cls(layouts, {UNDECIDED: Group(torch.arange(cache.batch, device=cache.lengths.device), cache)})

    @property
    def lengths(self) -> Tensor:  # type: ignore[override]  # made of the groups' own
        """int64 [B], valid rows of each sequence."""
        return self._of_batch("lengths")

    @property
    def decode_start(self) -> Tensor:
        """int64 [B], rows of each sequence that are its prompt."""
        return self._of_batch("decode_start")

    @decode_start.setter
    def decode_start(self, rows: Tensor) -> None:  # type: ignore[override]
        for group in self.groups.values():
            group.cache.decode_start = self._of_group(rows, group)

    @property
    def capacity(self) -> int:  # type: ignore[override]
        """Rows that each sequence has room for."""
        return min(group.cache.capacity for group in self.groups.values())

    @property
    def nbytes(self) -> int:
        """See `Cache.nbytes`."""
        return sum(group.cache.nbytes for group in self.groups.values())

    @property
    def choice(self) -> Tensor:
        """int64 [B]: the number of the continuation of each sequence, ``UNDECIDED`` before its prompt is read."""
        numbers = [torch.full_like(group.rows, number) for number, group in self.groups.items()]
        return self._in_order(numbers)

    def _of_batch(self, attribute: str) -> Tensor:
        return self._in_order([getattr(group.cache, attribute) for group in self.groups.values()])

    def _in_order(self, parts: Sequence[Tensor]) -> Tensor:
        """Values [N] of each group as values [B] of the batch."""
        if len(parts) == 1:  # all sequences, in order: the common case, asked for several times a step
            return parts[0]
        rows = torch.cat([group.rows for group in self.groups.values()])
        return torch.empty_like(torch.cat(list(parts))).index_copy_(0, rows, torch.cat(list(parts)))

    def _of_group(self, values: Tensor, group: Group) -> Tensor:
        """Values [B] of the batch as values [N] of one of its groups."""
        return values if len(self.groups) == 1 else values[group.rows]

    def decide(self, choice: Tensor, scores: Mapping[str, Tensor]) -> None:
        """Give each sequence to its continuation, and free the buffers, and the rows, that this one does without.

        Args:
            choice: int64 [B]; every sequence is undecided.
            scores: see `KVCache.compress_prompts`.
        """
        whole = self.groups.pop(UNDECIDED).cache
        for number in choice.unique().tolist():
            rows = (choice == number).nonzero().flatten()
            cache = copy.copy(whole)
            cache.keep(self.layouts[number])
            if len(rows) < whole.batch:
                cache.select(rows)
            cache.compress_prompts({name: each[rows] for name, each in scores.items()})
            self.groups[number] = Group(rows, cache)

    def advance(self, counts: Tensor) -> None:
        """See `Cache.advance`."""
        for group in self.groups.values():
            group.cache.advance(self._of_group(counts, group))

    def grow(self, capacity: int) -> None:
        """See `Cache.grow`."""
        for group in self.groups.values():
            if group.cache.capacity < capacity or capacity < self.capacity:
                group.cache.grow(capacity)

    def crop(self, lengths: Tensor | int) -> None:
        """See `Cache.crop`."""
        wanted = self._lengths_to_crop_to(lengths)
        cropped = {number: replace(group, cache=copy.copy(group.cache)) for number, group in self.groups.items()}
        for group in cropped.values():  # a group that refuses leaves the others as they were
            group.cache.crop(self._of_group(wanted, group))
        self.groups = cropped

    def select(self, index: Tensor | Sequence[int]) -> None:
        """See `Cache.select`."""
        index = self._index(index)
        place = self._in_order([torch.arange(len(each.rows), device=index.device) for each in self.groups.values()])
        choice = self.choice[index]
        groups = {}
        for number, group in self.groups.items():
            rows = (choice == number).nonzero().flatten()
            if len(rows):
                group.cache.select(place[index[rows]])
                groups[number] = Group(rows, group.cache)
        self.groups = groups

    def save(self, path: str | os.PathLike[str]) -> None:
        """See `Cache.save`."""
        tensors: dict[str, Tensor] = {}
        for number, group in self.groups.items():
            saved = group.cache.tensors() | {"rows": group.rows}
            tensors |= {f"{number}/{name}": tensor for name, tensor in saved.items()}
        write_tensors(path, tensors, _described(self.layouts))

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        layouts: Sequence[Sequence[CacheBuffer]],
        whole: Sequence[CacheBuffer],
        device: torch.device | str = "cpu",
    ) -> GroupedCache:
        """Read a cache that `save` wrote.

        Args:
            layouts: what the continuations expect.
            whole: what the program that reads prompts expects.
        Raises:
            ArtifactError: it is no such file, or a cache of other layouts.
        """
        name = os.fspath(path)
        known = {str(number): layout for number, layout in [(UNDECIDED, whole), *enumerate(layouts)]}
        apart: dict[str, dict[str, Tensor]] = {}
        for key, tensor in read_tensors(path, _described(layouts), device).items():
            number, _, rest = key.partition("/")
            apart.setdefault(number, {})[rest] = tensor
        groups = {}
        for number, tensors in apart.items():
            if number not in known or "rows" not in tensors:
                raise ArtifactError(f"{name} is damaged: it holds sequences of no program.")
            rows = tensors.pop("rows")
            cache = KVCache.of_tensors(tensors, known[number], name)
            if rows.shape != cache.lengths.shape:
                raise ArtifactError(f"{name} is damaged: its sequences are not those of a batch.")
            groups[int(number)] = Group(rows, cache)
        rows = torch.cat([group.rows for group in groups.values()]).sort().values
        if not torch.equal(rows, torch.arange(len(rows), device=rows.device)):
            raise ArtifactError(f"{name} is damaged: its sequences are not those of a batch.")
        return cls(layouts, groups)


def _described(layouts: Iterable[Sequence[CacheBuffer]]) -> str:
    return " | ".join(description(layout) for layout in layouts)
