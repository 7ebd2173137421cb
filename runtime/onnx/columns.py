"""The interface that loaders of exported decoders expect: one attention mask, and caches that grow by the new tokens.

A session of skipstone keeps each sequence at the front of its cache and counts its rows. Exported graphs are called as
Hugging Face models are: the tokens of a batch stand in common columns, ``attention_mask`` [B, past + S] says which of
them are real, and the new keys and values follow the past ones in every row. So a padded column, on whichever side,
stays in the cache, and attention must not see it.

GroupQueryAttention does all of it. Where its cache has no room it returns a longer one; where it has, as
onnxruntime-genai's shared buffers do, the same graph writes into it. The lengths that it asks for are those of the
mask, the same for every sequence, and the mask is its `attention_bias`: the operator adds it behind a soft cap. A
hidden column gets the lowest finite number, not -infinity, so that rows of padding, which see nothing, stay finite.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from skipstone.ir.attention import attend, key_bias_products, visible
from skipstone.ir.dialect import PROMPT_MEAN, PROMPT_TURN
from skipstone.ir.errors import InternalError
from skipstone.ir.program import Port, Program, Role
from skipstone.runtime.onnx.forms import OnnxForms

aten = torch.ops.aten

TOKENS, MASK, POSITIONS, LOGITS = "input_ids", "attention_mask", "position_ids", "logits"
PAST, PRESENT = "past_key_values.{slot}.{which}", "present.{slot}.{which}"
"""Names of optimum and onnxruntime-genai for the cache of a slot, `which` being ``key`` or ``value``."""

_NAMES = {Role.TOKENS: TOKENS, Role.PADDING: MASK, Role.POSITIONS: POSITIONS, Role.LOGITS: LOGITS}
_WHICH = {Role.CACHE_KEY: "key", Role.CACHE_VALUE: "value"}


def in_columns(program: Program, slots: Sequence[int] | None = None) -> Program:
    """A program with a cache behind the inputs and outputs of an exported decoder.

    ``attention_mask`` takes the place of ``start``, every row of the new tokens gets its logits, and the ports have the
    names of the convention; slots are numbered from 0 without gaps, and positions count from 0. To be lowered with
    `ColumnForms`. Programs that continue others go the same way, over the numbers of those.

    Args:
        slots: those to number; by default the program's own.
    """
    slots = program.slots() if slots is None else slots
    program = program.copy()
    program.continuations = tuple(in_columns(each, slots) for each in program.continuations)
    tokens, start = program.input(Role.TOKENS), program.input(Role.START)
    past = program.input(Role.CACHE_KEY, program.slots()[0])
    if tokens is None or start is None or past is None:
        raise InternalError("a cached program without tokens, start or cache")
    _keep_all_rows(program)
    batch, rows = tokens.meta["val"].shape
    shape = (batch, past.meta["val"].shape[2] + rows)
    mask = program.add_input(Port(MASK, Role.PADDING), tokens.meta["val"].new_empty(shape))
    with program.graph.inserting_after(mask):
        size = program.call(aten.sym_size.int, tokens, 1)
    with program.graph.inserting_after(size):
        real = program.call(aten.sum.dim_IntList, mask, [1])
    with program.graph.inserting_after(real):
        # Of a sequence's real tokens so many are behind its first new column, counted back from its last one: negative
        # where padding precedes them.
        counted = program.call(aten.sub.Tensor, real, size)
    start.replace_all_uses_with(counted)
    program.remove_inputs([start])
    added = [size, real, counted, *_count_new(program, mask, size), *_count_from_zero(program)]
    for node in added:
        node.meta |= {"nn_module_stack": {}, "made_by": ("export",)}
    numbers = {slot: number for number, slot in enumerate(slots)}
    program.inputs = tuple(_renamed(port, numbers, PAST) for port in program.inputs)
    program.outputs = tuple(_renamed(port, numbers, PRESENT) for port in program.outputs)
    program.recompile()
    return program


def _keep_all_rows(program: Program) -> None:
    """Let all rows of the new tokens reach the head, not some that an input picks."""
    rows = program.input(Role.LOGIT_ROWS)
    if rows is None:
        raise InternalError("a cached program without logit_rows")
    below = {rows}
    for node in list(program.nodes()):
        if node.target is aten.gather.default and node.args[2] in below:
            node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
        elif node.all_input_nodes and below.issuperset(node.all_input_nodes):
            below.add(node)
    program.graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
    program.remove_inputs([rows])


def _count_new(program: Program, mask: fx.Node, size: fx.Node) -> list[fx.Node]:
    """Count the real ones among the new tokens where the program asks for their number."""
    count = program.input(Role.COUNT)
    if count is None:
        return []
    with program.graph.inserting_after(size):
        columns = program.call(aten.sym_size.int, mask, 1)
    with program.graph.inserting_after(columns):
        past = program.call(operator.sub, columns, size)
    with program.graph.inserting_after(past):
        new = program.call(aten.slice.Tensor, mask, 1, past, sys.maxsize)
    with program.graph.inserting_after(new):
        real = program.call(aten.sum.dim_IntList, new, [1])
    count.replace_all_uses_with(real)
    program.remove_inputs([count])
    return [columns, past, new, real]


def _count_from_zero(program: Program) -> list[fx.Node]:
    """Let positions count from 0, as loaders count them, whatever the model calls the first one."""
    positions, first = program.input(Role.POSITIONS), program.source.first_position
    if positions is None or first == 0:
        return []
    with program.graph.inserting_after(positions):
        own = program.call(aten.add.Tensor, positions, first)
    positions.replace_all_uses_with(own, delete_user_cb=lambda user: user is not own)
    return [own]


def _renamed(port: Port, numbers: dict[int, int], cache: str) -> Port:
    if port.slot is None:
        return replace(port, name=_NAMES.get(port.role, port.name))
    return replace(port, name=cache.format(slot=numbers[port.slot], which=_WHICH[port.role]))


class ColumnForms(OnnxForms):
    """The forms of a program that `in_columns` made: S new tokens in the last columns of a mask [B, T]."""

    in_place = False
    sizes: ClassVar[Mapping[Role, tuple[str, ...]]] = {
        **OnnxForms.sizes,
        Role.PADDING: ("batch_size", "total_sequence_length"),
        Role.DECODE_START: ("batch_size",),
        **dict.fromkeys(_WHICH, ("batch_size", "", "past_sequence_length")),
    }

    def __init__(self, program: Program) -> None:
        super().__init__(program)
        self.places = {port.role: place for place, port in enumerate(program.inputs) if port.slot is None}
        self.hidden: Tensor | None = None

    def run(self, *inputs: Any, **options: Any) -> Any:
        self.mask: Tensor = inputs[self.places[Role.PADDING]]
        self.past = inputs
        return super().run(*inputs, **options)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target in (PROMPT_MEAN, PROMPT_TURN):
            return self._prompt_feature(target, args)
        return super().call_function(target, args, kwargs)

    def _prompt_feature(self, target: Any, args: tuple[Any, ...]) -> Tensor:
        """A mean over the real tokens, wherever they stand: rows of zeros add nothing to it."""
        *streams, count = args
        rows = streams[0].shape[1]
        real = (self.mask[:, -rows:] != 0).unsqueeze(-1)
        cleared = [torch.where(real, each, 0.0) for each in streams]
        mean: Tensor = super().call_function(target, (*cleared, torch.full_like(count, rows)), {})
        share = rows / count.to(mean.dtype)
        return mean * (share if mean.ndim == 1 else share.unsqueeze(1))

    @property
    def _columns(self) -> Any:
        return self.mask.shape[1]

    def _key_positions(self) -> Tensor:
        """int64 [B, T]: how many real tokens stand before each column's; the first ones' for padding before them."""
        return ((self.mask != 0).to(torch.int64).cumsum(1) - 1).clamp(min=0)

    def _sizes(self, start: Tensor, rows: Any) -> tuple[Tensor, Tensor, Tensor]:
        if start not in self.lengths:
            last, count = (torch.full_like(start, size, dtype=torch.int32) for size in (self._columns - 1, rows))
            self.lengths[start] = last, torch.full((), self._columns, dtype=torch.int32), count
        return self.lengths[start]

    def _key_bias_products(
        self, q: Tensor, key_bias: Tensor | None, frequencies: Tensor | None, total: Tensor, first_position: int
    ) -> Tensor | None:
        products = key_bias_products(q, key_bias, frequencies, self._columns, first_position)
        if products is None:
            return None
        index = self._key_positions()[:, None, None, :].expand(products.shape)
        return products.gather(-1, index)

    def _attention_bias(self, rows: Any, bias: Tensor | None) -> Tensor | None:
        if self.hidden is None:
            lowest = torch.finfo(torch.float32).min
            row = torch.where(self.mask != 0, 0.0, lowest)[:, None, None, :]
            self.hidden = row.expand(-1, 1, rows, -1)
        return self.hidden if bias is None else bias + self.hidden  # the lowest number swallows what is added to it

    def _written_shape(self, cache: Tensor) -> Any:
        return (*cache.shape[:2], self._columns, cache.shape[3])

    def _cached_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        start: Tensor,
        bias: Tensor | None = None,
        sinks: Tensor | None = None,
        key_bias: Tensor | None = None,
        frequencies: Tensor | None = None,
        *,
        scale: float,
        kind: str,
        window: int = 0,
        softcap: float = 0.0,
        slot: int = -1,
        first_position: int = 0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        keys, values = self._write_cache(k, v, k_cache, v_cache, start)
        # As in transformers, a window counts columns, and chunks begin at the first real token.
        first = (self.mask != 0).to(torch.int64).argmax(dim=1, keepdim=True)
        places = torch.arange(self._columns) - first
        queries = places[:, None, -k.shape[2] :, None]
        allowed = (self.mask != 0)[:, None, None, :]
        if (seen := visible(kind, window, queries, places[:, None, None, :])) is not None:
            allowed = allowed & seen
        products = self._key_bias_products(q, key_bias, frequencies, start, first_position)
        return attend(q, keys, values, allowed, bias, sinks, scale, softcap, products), keys, values

    def _write_cache(
        self, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, start: Tensor
    ) -> tuple[Tensor, Tensor]:
        return self._appended(k_cache, k), self._appended(v_cache, v)

    def _appended(self, cache: Tensor, new: Tensor) -> Tensor:
        """A cache with the new rows behind the past ones, in place of those that another attention has put there."""
        is_past = any(cache is each for each in self.past)
        past = cache if is_past else cache[:, :, : -new.shape[2]]
        whole = torch.cat([past, new.to(cache.dtype)], dim=2)
        torch._check(whole.shape[2] == self._columns)
        return whole
