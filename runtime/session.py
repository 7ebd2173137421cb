"""What a lowering must provide: the protocol between executables and the things that compute."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, fx

from skipstone.ir.dialect import CACHED_OPS, WINDOWED_ATTENTION, cache_operands, kept_rows
from skipstone.ir.errors import InvalidInput
from skipstone.ir.formats import Full
from skipstone.ir.program import Port, Program, Role
from skipstone.ir.quantized import CacheFormat, CachePart, cache_format
from skipstone.ir.windowed import STEP
from skipstone.runtime.cache import Cache, CacheBuffer, KVCache


@runtime_checkable
class Session(Protocol):
    """A lowered program.

    Attributes:
        program: what was lowered.
        layout: the buffers of its cache; empty without one.
    """

    program: Program
    layout: tuple[CacheBuffer, ...]

    def run(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run a program once.

        Args:
            values: one tensor per input port, by port name.
        Returns:
            the outputs by port name.
        """
        ...

    def step(self, tokens: Tensor, positions: Tensor, count: Tensor, logit_rows: Tensor, cache: Any) -> Tensor:
        """Run a cached program on new tokens, and write their keys and values into `cache`.

        The new tokens follow the ``cache.lengths`` rows that are there; the lengths are not advanced.

        Args:
            tokens: int64 [B, S], or embeddings [B, S, hidden]; valid tokens come first.
            positions: int64 [B, S].
            count: int64 [B], valid tokens of each row.
            logit_rows: int64 [B, R], in [0, S).
            cache: from `new_cache`, of B sequences, with room for S more tokens in each.
        Returns:
            logits [B, R, V]; the next call may overwrite them.
        Raises:
            InvalidInput: the cache has another batch or layout, or no room.
        """
        ...

    def new_cache(self, batch: int, capacity: int) -> Cache:
        """An empty cache for `batch` sequences of at most `capacity` tokens."""
        ...

    def load_cache(self, path: str | os.PathLike[str]) -> Cache:
        """Read a cache that `Cache.save` wrote for this session's program.

        Raises:
            ArtifactError: it is no such file, or a cache of another program.
        """
        ...


@runtime_checkable
class GreedySession(Protocol):
    """A session that chooses the best tokens by itself, without the host between them."""

    def decode(self, tokens: Tensor, positions: Tensor, cache: Any, count: int) -> Tensor:
        """Decode greedily; of equally good tokens, it is the first.

        Args:
            tokens: int64 [B, 1], the last of each sequence, which are not in the cache yet.
            positions: int64 [B, 1], theirs.
            cache: from `new_cache`, of B sequences, with room for `count` more tokens in each, which are counted in.
            count: how many tokens.
        Returns:
            int64 [B, count]. The last of them is not in the cache yet.
        Raises:
            InvalidInput: the cache has another batch or layout, or no room.
        """
        ...


class ProgramSession(ABC):
    """What sessions of one program have in common; see `Session`."""

    program: Program
    layout: tuple[CacheBuffer, ...]

    @abstractmethod
    def run(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `Session.run`."""

    @abstractmethod
    def step_outputs(self, values: Mapping[str, Tensor], cache: KVCache, names: Sequence[str]) -> tuple[Tensor, ...]:
        """Run a step on the inputs of `step_inputs`, write into `cache`, and return the outputs of these names."""

    def step(self, tokens: Tensor, positions: Tensor, count: Tensor, logit_rows: Tensor, cache: Any) -> Tensor:
        """See `Session.step`."""
        (logits,) = self.step_roles(tokens, positions, count, logit_rows, cache, Role.LOGITS)
        return logits

    def step_roles(
        self, tokens: Tensor, positions: Tensor, count: Tensor, logit_rows: Tensor, cache: Any, *roles: Role
    ) -> tuple[Tensor, ...]:
        """`step`, for the outputs of these roles, in the order of the roles."""
        check_cache(self.layout, tokens, cache, tokens.shape[1])
        values = step_inputs(self.program, tokens, positions, count, logit_rows, cache)
        names = [port.name for role in roles for port in self.program.outputs if port.role == role]
        outputs = self.step_outputs(values, cache, names)
        cache.stepped = tokens.shape[1]
        return outputs

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """See `Session.new_cache`."""
        return KVCache.allocate(self.layout, batch, capacity, self.program.source.device)

    def load_cache(self, path: str | os.PathLike[str]) -> KVCache:
        """See `Session.load_cache`."""
        return KVCache.load(path, self.layout, self.program.source.device)

    def cache_over(self, buffers: dict[str, Tensor], like: KVCache) -> KVCache:
        """A cache of this session over some buffers that another has, too, with the lengths and the room of that."""
        own = {
            each.name: buffers[each.name]
            if each.name in buffers
            else each.allocate(like.batch, like.capacity, like.lengths.device)
            for each in self.layout
        }
        return KVCache(self.layout, own, like.lengths, like.capacity)


def cache_layout(program: Program) -> tuple[CacheBuffer, ...]:
    """The buffers of a program's cache, in the order of its inputs."""
    forms: dict[fx.Node, CacheFormat] = {}
    for node in program.nodes(*CACHED_OPS):
        for buffers, option in zip(cache_operands(node), ("k_format", "v_format"), strict=True):
            forms |= dict.fromkeys(buffers, _form(node, option))
    placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
    pairs = zip(program.inputs, placeholders, strict=True)
    return tuple(_buffer(port, node.meta["val"], forms[node]) for port, node in pairs if port.is_buffer)


def _form(node: fx.Node, option: str) -> CacheFormat:
    """How an attention keeps its keys or its values; `option` names their format."""
    settings: Any = node.kwargs
    if node.target == WINDOWED_ATTENTION:
        return CacheFormat(Full(), first=settings.get("first", 0), window=settings["window"])
    form = cache_format(settings.get(option, "full"), settings.get("residual", 0), settings.get("first", 0))
    return replace(form, prompt_rows=kept_rows(node))


def longest_step(layout: Sequence[CacheBuffer]) -> int | None:
    """The most tokens of one step, where the cache sets a limit: it has room for so many beside what they read."""
    return STEP if any(each.form.window for each in layout) else None


def _buffer(port: Port, fake: Tensor, form: CacheFormat) -> CacheBuffer:
    """The buffer that an input [B, KH, rows, width] of a program takes."""
    heads, rows, width = (fake.shape[axis] for axis in (1, 2, 3))
    tokens = form.format.group_tokens if port.part in ("scale", "offset") else 1
    fixed = int(rows) if form.window or port.part in ("recent", "first") else None
    return CacheBuffer(port.name, int(heads), CachePart(port.part, fake.dtype, int(width), tokens, fixed), form)


def step_inputs(
    program: Program, tokens: Tensor, positions: Tensor, count: Tensor, logit_rows: Tensor, cache: Cache
) -> dict[str, Tensor]:
    """The inputs of a step other than the cache's buffers, by port name; a program may do without some of them."""
    by_role = {
        Role.TOKENS: tokens,
        Role.EMBEDDINGS: tokens,
        Role.POSITIONS: positions,
        Role.START: cache.lengths,
        Role.COUNT: count,
        Role.DECODE_START: cache.decode_start,
        Role.LOGIT_ROWS: logit_rows,
    }
    return {port.name: by_role[port.role] for port in program.inputs if port.role in by_role}


def written_buffers(program: Program) -> dict[str, str]:
    """For each output of a program that replaces a cache buffer, the name of that buffer."""
    names = {(port.role, port.slot, port.part): port.name for port in program.inputs if port.is_buffer}
    return {port.name: names[port.role, port.slot, port.part] for port in program.outputs if port.is_buffer}


def check_cache(layout: tuple[CacheBuffer, ...], tokens: Tensor, cache: Any, rows: int) -> None:
    """Refuse steps from these tokens [B, S] on that would write `rows` rows a sequence, if some are outside the cache.

    Raises:
        InvalidInput: the cache has another batch or layout, or no room for the tokens.
    """
    if not isinstance(cache, KVCache) or (cache.layout is not layout and cache.layout != layout):
        raise InvalidInput("the cache was made for another program.", hint="Use the cache that prefill() returned.")
    if cache.batch != tokens.shape[0]:
        raise InvalidInput(f"tokens of {tokens.shape[0]} sequences for a cache of {cache.batch}.")
    if tokens.shape[1] > STEP and (limit := longest_step(layout)) is not None:
        hint = "Call the executable, which reads them in several steps."
        raise InvalidInput(f"a step of {tokens.shape[1]} tokens, the cache takes {limit} at a time.", hint=hint)
    if not cache.has_room(rows):
        needed = int(cache.lengths.max()) + rows
        raise InvalidInput(f"{needed} rows in a cache with room for {cache.capacity}.", hint="Call cache.grow().")


def check_threads(threads: Any) -> None:
    """Refuse what is no number of threads, nor None for the runtime's own choice.

    Raises:
        InvalidInput: it is something else.
    """
    if threads is not None and (type(threads) is not int or threads < 1):
        raise InvalidInput(f"threads is {threads!r}, expected at least 1, or None.")
