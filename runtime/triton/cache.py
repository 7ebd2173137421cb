"""Cache buffers that are used again, so that the decode steps which were captured over them are, too."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from skipstone.runtime.cache import CacheBuffer, KVCache

STEP = 256
"""New caches have a multiple of so many rows, so that their buffers fit the next one more often than not."""

IDLE = 2
"""How many sets of buffers are kept that no cache uses."""


@dataclass
class Storage:
    """The buffers of a cache, by name, and the decode steps over them by the session that captured each."""

    buffers: Mapping[str, Tensor]
    steps: dict[Any, Any] = field(default_factory=dict)


class Lease:
    """A storage, for as long as some cache refers to the lease."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()  # a deep copy of the cache, in memory or in another process, has buffers of its own

    def covers(self, cache: KVCache) -> bool:
        """Whether the buffers of a cache are those of the storage, or some of them."""
        return all(self.storage.buffers.get(name) is tensor for name, tensor in cache.buffers.items())


class Pool:
    """Storages of one layout. Those that no cache uses any longer are leased again."""

    def __init__(self, layout: Sequence[CacheBuffer], device: torch.device) -> None:
        self.layout, self.device = tuple(layout), device
        self._idle: list[Storage] = []
        self._held: list[tuple[Mapping[str, Tensor], Storage]] = []

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """An empty cache for `batch` sequences of at least `capacity` tokens.

        Raises:
            InvalidInput: see `KVCache.allocate`.
        """
        capacity = -(-capacity // STEP) * STEP
        storage = self._take({each.name: each.shape(batch, capacity) for each in self.layout})
        if storage is None:
            cache = KVCache.allocate(self.layout, batch, capacity, self.device)
            storage = Storage(dict(cache.buffers))
        else:
            for buffer in storage.buffers.values():
                buffer.zero_()
            lengths = torch.zeros(batch, dtype=torch.int64, device=self.device)
            cache = KVCache(self.layout, dict(storage.buffers), lengths, capacity)
        cache.lease = self._lease(storage)
        return cache

    def settle(self, cache: KVCache) -> Storage:
        """The storage of a cache. One that has new buffers, since it grew, moves to an idle storage or becomes one."""
        lease = cache.lease
        if not isinstance(lease, Lease) or not lease.covers(cache):
            storage = self._take({each.name: _roomy(each, cache.buffers[each.name]) for each in cache.layout})
            if storage is None:
                storage = Storage({each.name: _with_room(each, cache.buffers[each.name]) for each in cache.layout})
            for name, own in storage.buffers.items():
                if own is not (tensor := cache.buffers[name]):
                    own[:, :, : tensor.shape[2]] = tensor
            cache.buffers = dict(storage.buffers)
            cache.lease = lease = self._lease(storage)
        return lease.storage

    def held(self, like: KVCache) -> Mapping[str, Tensor]:
        """The buffers that were held last beside those of `like`, if any were."""
        found = self._beside(like)
        return {} if found is None else found.buffers

    def hold(self, cache: KVCache, like: KVCache) -> None:
        """Keep the buffers of a cache as its storage, as long as `like` has the buffers that it has now.

        Those that are no buffers of `like` are leased to nobody else; all are forgotten when others came since.
        """
        storage = self._beside(like)
        if storage is None:
            storage = Storage(dict(cache.buffers))
            self._held = [*self._held, (dict(like.buffers), storage)][-IDLE:]
        cache.lease = Lease(storage)

    def _beside(self, like: KVCache) -> Storage | None:
        for buffers, storage in self._held:
            if buffers.keys() == like.buffers.keys() and all(buffers[name] is like.buffers[name] for name in buffers):
                return storage
        return None

    def _take(self, shapes: Mapping[str, torch.Size]) -> Storage | None:
        """An idle storage whose buffers have these shapes."""
        for place, storage in enumerate(self._idle):
            if {name: tensor.shape for name, tensor in storage.buffers.items()} == shapes:
                return self._idle.pop(place)
        return None

    def _lease(self, storage: Storage) -> Lease:
        lease = Lease(storage)
        weakref.finalize(lease, self._give_back, storage).atexit = False
        return lease

    def _give_back(self, storage: Storage) -> None:
        self._idle = [*self._idle, storage][-IDLE:]


def _roomy(buffer: CacheBuffer, tensor: Tensor) -> torch.Size:
    """The shape of a buffer with rows as those of new caches have: a prompt leaves as many as there is room for."""
    if buffer.part.fixed_rows is not None:
        return tensor.shape
    step = buffer.part.rows(STEP)
    return torch.Size((*tensor.shape[:2], -(-tensor.shape[2] // step) * step, tensor.shape[3]))


def _with_room(buffer: CacheBuffer, tensor: Tensor) -> Tensor:
    """The tensor itself if it has that shape, else zeros."""
    shape = _roomy(buffer, tensor)
    return tensor if tensor.shape == shape else tensor.new_zeros(shape)
