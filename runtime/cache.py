"""The KV cache: the buffers that attention reads and writes, and how many rows of each sequence are valid."""

from __future__ import annotations

import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from skipstone.ir.errors import ArtifactError, InvalidInput
from skipstone.ir.quantized import CacheFormat, CachePart

FORMAT = "skipstone.cache/3"


@dataclass(frozen=True)
class CacheBuffer:
    """One buffer of a cache: a part of the keys or of the values of one slot.

    Attributes:
        name: name of the program's input that takes it.
        heads: number of key (and value) heads KH.
        part: type, width and number of its rows.
        form: the format that it is part of.
    """

    name: str
    heads: int
    part: CachePart
    form: CacheFormat

    @property
    def token_bytes(self) -> float:
        """Bytes that each token takes in this buffer; 0 where its size does not depend on the number of tokens."""
        per_row = self.heads * self.part.width * self.part.dtype.itemsize
        return per_row / self.part.tokens if self.part.fixed_rows is None else 0.0

    def allocate(self, batch: int, capacity: int, device: torch.device | str) -> Tensor:
        """Zeros [B, KH, rows, width]; not empty memory, since a masked NaN still poisons a weighted sum."""
        return torch.zeros(self.shape(batch, capacity), dtype=self.part.dtype, device=device)

    def shape(self, batch: int, capacity: int) -> torch.Size:
        """[B, KH, rows, width] with room for `capacity` tokens."""
        return torch.Size((batch, self.heads, self.part.rows(capacity), self.part.width))


class Cache(ABC):
    """What executables ask of a cache, however its sequences are kept.

    Attributes:
        lengths: int64 [B], valid rows of each sequence.
        capacity: rows that each sequence has room for.
        decode_start: int64 [B], rows of each sequence that are its prompt: 0 until one is read. Tokens behind it are
            decoded, whether one or several at a time.
    """

    lengths: Tensor
    capacity: int
    decode_start: Tensor

    @property
    def batch(self) -> int:
        """Number of sequences B."""
        return len(self.lengths)

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of all buffers."""

    @abstractmethod
    def advance(self, counts: Tensor) -> None:
        """Count in the rows that a step has written: int64 [B]."""

    @abstractmethod
    def grow(self, capacity: int) -> None:
        """Make room for `capacity` rows a sequence; the buffers that depend on it become new tensors.

        Raises:
            InvalidInput: that is less than there is now.
        """

    @abstractmethod
    def crop(self, lengths: Tensor | int) -> None:
        """Forget the rows from `lengths` (one number, or integers [B]) on. The buffers stay as they are.

        A prompt that is cut ends there: what follows is decoded.

        Raises:
            InvalidInput: a length is negative or beyond what the cache holds, their number is not the batch, or rows
                that are read after the crop are not kept, or not in full precision, any more.
        """

    @abstractmethod
    def select(self, index: Tensor | Sequence[int]) -> None:
        """Keep sequences `index` (integers [N]) in that order; one may be taken more than once.

        Raises:
            InvalidInput: an index is outside [0, B), or there is none.
        """

    @abstractmethod
    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the valid rows to a safetensors file, whole or not at all.

        Raises:
            ArtifactError: the file cannot be written.
        """

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

    def _lengths_to_crop_to(self, lengths: Tensor | int) -> Tensor:
        """int64 [B]; raises like `crop`."""
        wanted = torch.as_tensor(lengths, dtype=torch.int64, device=self.lengths.device)
        if wanted.dim() > 1 or (wanted.dim() == 1 and len(wanted) != self.batch):
            raise InvalidInput(f"crop lengths have shape {list(wanted.shape)}, the cache has {self.batch} sequences.")
        if bool((wanted < 0).any()) or bool((wanted > self.lengths).any()):
            raise InvalidInput(
                f"crop to {wanted.tolist()} rows, the cache holds {self.lengths.tolist()}.",
                hint="A cache can be cropped to a shorter length only.",
            )
        return wanted.expand(self.batch).clone()

    def _index(self, index: Tensor | Sequence[int]) -> Tensor:
        """int64 [N]; raises like `select`."""
        index = torch.as_tensor(index, dtype=torch.int64, device=self.lengths.device)
        if index.dim() != 1 or len(index) == 0:
            raise InvalidInput(f"sequences are chosen by a list of indices, got shape {list(index.shape)}.")
        if int(index.min()) < 0 or int(index.max()) >= self.batch:
            raise InvalidInput(f"sequences {index.tolist()} of a cache with {self.batch}.")
        return index


class KVCache(Cache):
    """The rows that attention has seen, for a batch of sequences of different lengths.

    Rows 0..lengths[b] - 1 of sequence b are valid. What lies behind them is finite but meaningless: it is masked, and
    overwritten before it can be read. Growing, cropping, selecting, saving and loading move what is stored as it is;
    nothing is ever quantized a second time.

    Attributes:
        layout: what the buffers are.
        buffers: by name, [B, KH, rows, width], contiguous.
        lengths: int64 [B], valid rows of each sequence.
        capacity: rows C that each sequence has room for.
        decode_start: int64 [B], rows of each sequence that are its prompt: 0 until one is read. Tokens behind it are
            decoded, whether one or several at a time.
        stepped: columns of the step that has written rows which are not counted in yet, 0 without one.
        lease: whatever a session wants to keep for as long as the cache, or a copy of it, is there.
    """

    def __init__(
        self, layout: Sequence[CacheBuffer], buffers: dict[str, Tensor], lengths: Tensor, capacity: int
    ) -> None:
        self.layout = tuple(layout)
        self.buffers = buffers
        self.lengths = lengths
        self.capacity = capacity
        self.decode_start = torch.zeros_like(lengths)
        # The most rows that each sequence ever had: rings of recent rows hold those before it, even after a crop.
        self._reached = lengths.clone()
        self.stepped = 0
        self.lease: object = None
        self._at_most = 0  # no sequence is longer than this, if these are still its lengths:
        self._measured: Tensor | None = None

    @classmethod
    def allocate(
        cls, layout: Sequence[CacheBuffer], batch: int, capacity: int, device: torch.device | str = "cpu"
    ) -> KVCache:
        """An empty cache.

        Raises:
            InvalidInput: there is no buffer, or a size below one.
        """
        if not layout:
            raise InvalidInput("a KV cache needs at least one slot.")
        if batch < 1 or capacity < 1:
            raise InvalidInput(f"a KV cache of {batch} sequences with {capacity} rows holds nothing.")
        buffers = {each.name: each.allocate(batch, capacity, device) for each in layout}
        return cls(layout, buffers, torch.zeros(batch, dtype=torch.int64, device=device), capacity)

    @property
    def nbytes(self) -> int:
        """See `Cache.nbytes`."""
        return sum(tensor.nbytes for tensor in self.buffers.values())

    def has_room(self, rows: int) -> bool:
        """Whether every sequence has room for so many rows. The device is asked only where it has to be."""
        if self._measured is not self.lengths or self._at_most + rows > self.capacity:
            self._at_most, self._measured = int(self.lengths.max()), self.lengths
        return self._at_most + rows <= self.capacity

    def advance(self, counts: Tensor) -> None:
        """See `Cache.advance`."""
        is_known = self.stepped > 0 and self._measured is self.lengths
        self.lengths = self.lengths + counts
        self._reached = torch.maximum(self._reached, self.lengths)
        if is_known:  # no count is larger than the step had columns
            self._at_most, self._measured = self._at_most + self.stepped, self.lengths
        self.stepped = 0

    def grow(self, capacity: int) -> None:
        """See `Cache.grow`."""
        if capacity < self.capacity:
            raise InvalidInput(
                f"a cache of {self.capacity} rows cannot grow to {capacity}.", hint="To forget rows, use crop()."
            )
        if capacity == self.capacity:
            return
        for each in self.layout:
            old = self.buffers[each.name]
            more = each.part.rows(capacity) - each.part.rows(self.capacity)
            if more > 0:
                self.buffers[each.name] = torch.cat([old, old.new_zeros((*old.shape[:2], more, old.shape[3]))], dim=2)
        self.capacity = capacity

    def crop(self, lengths: Tensor | int) -> None:
        """See `Cache.crop`."""
        wanted = self._lengths_to_crop_to(lengths)
        unused = torch.ones_like(wanted, dtype=torch.bool)  # sequences that need nothing of what their rings hold
        for form in {each.form for each in self.layout if each.form.ring_rows}:
            needed_from = form.ring_read_from(wanted)
            unused &= needed_from >= wanted
            if bool(((needed_from < wanted) & (needed_from < self._reached - form.ring_rows)).any()):
                raise InvalidInput(
                    f"crop to {wanted.tolist()} rows of a cache that reached {self._reached.tolist()}, and that keeps "
                    f"the last {form.ring_rows} {'alone' if form.window else 'in full precision'}.",
                    hint="Crop by fewer tokens, or read the shorter prompt again.",
                )
        if self._is_compressed and bool(((wanted < self.decode_start) & (self._dropped() > 0)).any()):
            raise InvalidInput(
                f"crop to {wanted.tolist()} rows of a cache that keeps some rows alone of prompts of "
                f"{self.decode_start.tolist()}.",
                hint="Read the shorter prompt again.",
            )
        self.lengths = wanted
        self.decode_start = torch.minimum(self.decode_start, wanted)
        self._reached = torch.where(unused, wanted, self._reached)

    def select(self, index: Tensor | Sequence[int]) -> None:
        """See `Cache.select`."""
        index = self._index(index)
        self.buffers = {name: old.index_select(0, index) for name, old in self.buffers.items()}
        self.lengths = self.lengths.index_select(0, index)
        self.decode_start = self.decode_start.index_select(0, index)
        self._reached = self._reached.index_select(0, index)

    def keep(self, layout: Sequence[CacheBuffer]) -> None:
        """Keep the buffers of this layout, a part of the cache's own, and free the others."""
        self.layout = tuple(layout)
        self.buffers = {each.name: self.buffers[each.name] for each in layout}

    def compress_prompts(self, scores: Mapping[str, Tensor]) -> None:
        """Keep the rows of prompts that score best (of equal ones the first), in buffers that hold no more of a prompt.

        It stands between the reading of prompts, whose lengths are `decode_start`, and the first step behind them.

        Args:
            scores: by name of the buffer, [B, KH, S], -infinity where a sequence has no row.
        """
        if not self._is_compressed or not bool(self._dropped().any()):
            return
        capacity = self.capacity - self._dropped_by_all()
        for each in self.layout:
            if kept := each.form.prompt_rows:
                ranked = scores[each.name].argsort(dim=-1, descending=True, stable=True)
                rows = ranked[..., :kept].sort(dim=-1).values.unsqueeze(-1)
                old = self.buffers[each.name]
                new = each.allocate(self.batch, capacity, old.device)
                new[:, :, :kept] = old.gather(2, rows.expand(*rows.shape[:3], old.shape[3]))
                self.buffers[each.name] = new
        self.lease = None  # what it is for has the buffers that are to be freed

    @property
    def _is_compressed(self) -> bool:
        """Whether some buffer need not hold all of a prompt."""
        return any(each.form.prompt_rows for each in self.layout)

    def _dropped(self) -> Tensor:
        """int64 [B]: the most rows of its prompt that a sequence is without in some buffer."""
        forms = {each.form for each in self.layout}
        return torch.stack([form.dropped(self.decode_start) for form in forms]).amax(dim=0)

    def _dropped_by_all(self) -> int:
        """How many rows no sequence has in any of the buffers that would have them."""
        forms = {each.form for each in self.layout if each.part.fixed_rows is None}
        return min((int(form.dropped(self.decode_start).min()) for form in forms), default=0)

    def save(self, path: str | os.PathLike[str]) -> None:
        """See `Cache.save`."""
        write_tensors(path, self.tensors(), description(self.layout))

    def tensors(self) -> dict[str, Tensor]:
        """Everything that has to be saved, by name."""
        longest = max(1, int(self.lengths.max())) - self._dropped_by_all()
        kept = {}
        for each in self.layout:
            kept[each.name] = self.buffers[each.name][:, :, : each.part.rows(longest)].contiguous()
        return kept | {"lengths": self.lengths, "reached": self._reached, "decode_start": self.decode_start}

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], layout: Sequence[CacheBuffer], device: torch.device | str = "cpu"
    ) -> KVCache:
        """Read a cache that `save` wrote.

        Args:
            layout: what the program that goes on with it expects.
        Raises:
            ArtifactError: it is no such file, or a cache of another layout.
        """
        return cls.of_tensors(read_tensors(path, description(layout), device), layout, os.fspath(path))

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor], layout: Sequence[CacheBuffer], name: str) -> KVCache:
        """The cache that `tensors` gave; `name` is that of its file. Raises like `load`."""
        buffers = dict(tensors)
        counted = [buffers.pop(each, torch.empty(0)) for each in ("decode_start", "lengths", "reached")]
        decode_start, lengths, reached = counted
        counts = all(each.dtype == torch.int64 and each.shape == (len(lengths),) for each in counted)
        if not counts or len(lengths) == 0 or int(torch.stack(counted).min()) < 0 or bool((reached < lengths).any()):
            raise ArtifactError(f"{name} is damaged: its lengths are not those of a cache.")
        cache = cls(layout, buffers, lengths, max(1, int(lengths.max())))
        cache._reached, cache.decode_start = reached, decode_start
        if cache._is_compressed and bool((decode_start > lengths).any()):
            raise ArtifactError(f"{name} is damaged: its prompts are longer than its sequences.")
        capacity = cache.capacity - cache._dropped_by_all()
        expected = {each.name: (each.shape(len(lengths), capacity), each.part.dtype) for each in cache.layout}
        if {name: (tensor.shape, tensor.dtype) for name, tensor in buffers.items()} != expected:
            raise ArtifactError(f"{name} is damaged: its tensors are not those of a cache.")
        return cache


def write_tensors(path: str | os.PathLike[str], tensors: dict[str, Tensor], layout: str) -> None:
    """Write a cache to a safetensors file, whole or not at all.

    Args:
        layout: what it is made of, in one line.
    Raises:
        ArtifactError: the file cannot be written.
    """
    path = Path(path)
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as temporary:
            complete = Path(temporary) / path.name
            save_file(tensors, complete, metadata={"format": FORMAT, "layout": layout})
            os.replace(complete, path)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"Cannot write the cache {path}: {error}.") from error


def read_tensors(path: str | os.PathLike[str], layout: str, device: torch.device | str) -> dict[str, Tensor]:
    """What `write_tensors` wrote.

    Raises:
        ArtifactError: it is no such file, or a cache of another layout.
    """
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"Cannot read the cache {os.fspath(path)}: {error}.") from error
    if metadata.get("format") != FORMAT:
        raise ArtifactError(f"{os.fspath(path)} is not a cache of this version ({FORMAT}).")
    if metadata.get("layout") != layout:
        raise ArtifactError(
            f"{os.fspath(path)} holds a cache of another program.",
            hint="Load it into the model and plan that it was saved from.",
        )
    return tensors


def description(layout: Iterable[CacheBuffer]) -> str:
    """One line that is equal for equal layouts."""
    return "; ".join(f"{each.name} {each.heads} {each.part} {each.form}" for each in layout)
