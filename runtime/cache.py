"""The KV cache: one pair of fixed-capacity buffers a slot, and how many rows of each sequence are valid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from skipstone.ir.errors import InvalidInput


@dataclass(frozen=True)
class SlotShape:
    """What one cache slot holds for each token.

    Attributes:
        kv_heads: number of key (and value) heads KH.
        key_width, value_width: elements of one key and of one value.
        dtype: element type of both.
    """

    kv_heads: int
    key_width: int
    value_width: int
    dtype: torch.dtype

    @property
    def token_bytes(self) -> int:
        """Bytes that one token takes in this slot."""
        return self.kv_heads * (self.key_width + self.value_width) * self.dtype.itemsize


@dataclass
class KVCache:
    """The rows that attention has seen, for a batch of sequences of different lengths.

    Rows 0..lengths[b] - 1 of sequence b are valid. What lies behind them is finite but meaningless: it is masked, and
    overwritten before it can be read.

    Attributes:
        keys: per slot, [B, KH, C, D], contiguous.
        values: per slot, [B, KH, C, Dv], contiguous.
        lengths: int64 [B], valid rows of each sequence.
    """

    keys: list[Tensor]
    values: list[Tensor]
    lengths: Tensor

    @classmethod
    def allocate(
        cls, slots: Sequence[SlotShape], batch: int, capacity: int, device: torch.device | str = "cpu"
    ) -> KVCache:
        """An empty cache.

        Raises:
            InvalidInput: there is no slot, or a size below one.
        """
        if not slots:
            raise InvalidInput("a KV cache needs at least one slot.")
        if batch < 1 or capacity < 1:
            raise InvalidInput(f"a KV cache of {batch} sequences with {capacity} rows holds nothing.")
        # Zeros, not empty memory: a masked NaN still poisons a weighted sum.
        return cls(
            [torch.zeros(batch, s.kv_heads, capacity, s.key_width, dtype=s.dtype, device=device) for s in slots],
            [torch.zeros(batch, s.kv_heads, capacity, s.value_width, dtype=s.dtype, device=device) for s in slots],
            torch.zeros(batch, dtype=torch.int64, device=device),
        )

    @property
    def capacity(self) -> int:
        """Rows C that each sequence has room for."""
        return self.keys[0].shape[2]

    @property
    def batch(self) -> int:
        """Number of sequences B."""
        return self.keys[0].shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))

    def grow(self, capacity: int) -> None:
        """Make room for `capacity` rows a sequence; all buffers become new tensors.

        Raises:
            InvalidInput: that is less than there is now.
        """
        if capacity < self.capacity:
            raise InvalidInput(
                f"a cache of {self.capacity} rows cannot grow to {capacity}.", hint="To forget rows, use crop()."
            )
        if capacity > self.capacity:
            for buffers in (self.keys, self.values):
                for slot, old in enumerate(buffers):
                    new = old.new_zeros(*old.shape[:2], capacity, old.shape[3])
                    new[:, :, : old.shape[2]] = old
                    buffers[slot] = new

    def crop(self, lengths: Tensor | int) -> None:
        """Forget the rows from `lengths` (one number, or integers [B]) on. The buffers stay as they are.

        Raises:
            InvalidInput: a length is negative or beyond what the cache holds, or their number is not the batch.
        """
        wanted = torch.as_tensor(lengths, dtype=torch.int64, device=self.lengths.device)
        if wanted.dim() > 1 or (wanted.dim() == 1 and len(wanted) != self.batch):
            raise InvalidInput(f"crop lengths have shape {list(wanted.shape)}, the cache has {self.batch} sequences.")
        if bool((wanted < 0).any()) or bool((wanted > self.lengths).any()):
            raise InvalidInput(
                f"crop to {wanted.tolist()} rows, the cache holds {self.lengths.tolist()}.",
                hint="A cache can be cropped to a shorter length only.",
            )
        self.lengths = wanted.expand(self.batch).clone()

    def select(self, index: Tensor | Sequence[int]) -> None:
        """Keep sequences `index` (integers [N]) in that order; one may be taken more than once.

        Raises:
            InvalidInput: an index is outside [0, B), or there is none.
        """
        index = torch.as_tensor(index, dtype=torch.int64, device=self.lengths.device)
        if index.dim() != 1 or len(index) == 0:
            raise InvalidInput(f"sequences are chosen by a list of indices, got shape {list(index.shape)}.")
        if int(index.min()) < 0 or int(index.max()) >= self.batch:
            raise InvalidInput(f"sequences {index.tolist()} of a cache with {self.batch}.")
        for buffers in (self.keys, self.values):
            for slot, old in enumerate(buffers):
                buffers[slot] = old.index_select(0, index)
        self.lengths = self.lengths.index_select(0, index)

    def reorder(self, index: Tensor | Sequence[int]) -> None:
        """Continue sequence `index[b]` (integers [B]) as sequence b, as beam search does.

        Raises:
            InvalidInput: as `select`, or the number of indices is not the batch.
        """
        if len(index) != self.batch:
            raise InvalidInput(f"{len(index)} indices reorder a cache of {self.batch} sequences.")
        self.select(index)

    def repeat(self, times: int) -> None:
        """Repeat each sequence `times` times, copies side by side.

        Raises:
            InvalidInput: `times` is below one.
        """
        if times < 1:
            raise InvalidInput(f"cannot repeat a cache {times} times.")
        if times > 1:
            self.select(torch.arange(self.batch).repeat_interleave(times))
