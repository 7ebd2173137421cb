"""What a lowering must provide: the protocol between executables and the things that compute."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from torch import Tensor

from skipstone.ir.errors import InternalError, InvalidInput
from skipstone.ir.program import Program, Role
from skipstone.runtime.cache import KVCache, SlotShape


@runtime_checkable
class Session(Protocol):
    """A lowered program.

    Attributes:
        program: what was lowered.
        slots: shapes of its cache slots, in slot order; empty without a cache.
    """

    program: Program
    slots: tuple[SlotShape, ...]

    def run(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run a program once.

        Args:
            values: one tensor per input port, by port name.
        Returns:
            the outputs by port name.
        """
        ...

    def step(self, tokens: Tensor, positions: Tensor, start: Tensor, logit_rows: Tensor, cache: KVCache) -> Tensor:
        """Run a cached program on new tokens, and write their keys and values into `cache`.

        `cache.lengths` is neither read nor advanced: that is the caller's matter.

        Args:
            tokens: int64 [B, S], or embeddings [B, S, hidden]; valid tokens come first.
            positions: int64 [B, S].
            start: int64 [B], rows of each sequence that are in the cache already; ``start + S <= cache.capacity``.
            logit_rows: int64 [B, R], in [0, S).
            cache: of this session's slots and B sequences.
        Returns:
            logits [B, R, V]; the next call may overwrite them.
        Raises:
            InvalidInput: the cache has another batch or number of slots, or no room.
        """
        ...


def slot_shapes(program: Program) -> tuple[SlotShape, ...]:
    """The shapes of a program's cache slots, in slot order.

    Raises:
        InternalError: slots are not numbered 0, 1, ..., or one lacks its key or its value.
    """
    slots = sorted(program.slots())
    if slots != list(range(len(slots))):
        raise InternalError(f"cache slots are not dense: {slots}")
    shapes = []
    for slot in slots:
        key, value = program.input(Role.CACHE_KEY, slot), program.input(Role.CACHE_VALUE, slot)
        if key is None or value is None:
            raise InternalError(f"cache slot {slot} lacks its key or its value")
        fake, width = key.meta["val"], value.meta["val"].shape[3]
        shapes.append(SlotShape(int(fake.shape[1]), int(fake.shape[3]), int(width), fake.dtype))
    return tuple(shapes)


def step_inputs(
    program: Program, tokens: Tensor, positions: Tensor, start: Tensor, logit_rows: Tensor
) -> dict[str, Tensor]:
    """The inputs of a step other than the cache, by port name; a program may do without some of them."""
    by_role = {
        Role.TOKENS: tokens,
        Role.EMBEDDINGS: tokens,
        Role.POSITIONS: positions,
        Role.START: start,
        Role.LOGIT_ROWS: logit_rows,
    }
    return {port.name: by_role[port.role] for port in program.inputs if port.role in by_role}


def check_cache(slots: tuple[SlotShape, ...], tokens: Tensor, start: Tensor, cache: KVCache) -> None:
    """Refuse a step that would write outside the cache.

    Raises:
        InvalidInput: the cache has another batch or number of slots, or no room for the tokens.
    """
    if len(cache.keys) != len(slots):
        raise InvalidInput(f"the program has {len(slots)} cache slots, the cache {len(cache.keys)}.")
    if cache.batch != tokens.shape[0]:
        raise InvalidInput(f"tokens of {tokens.shape[0]} sequences for a cache of {cache.batch}.")
    if (needed := int(start.max()) + tokens.shape[1]) > cache.capacity:
        raise InvalidInput(f"{needed} rows in a cache with room for {cache.capacity}.", hint="Call cache.grow().")
