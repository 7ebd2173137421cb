"""Give every attention a cache slot, so that a program computes only its new tokens."""

from __future__ import annotations

import operator
from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from skipstone.ir.dialect import (
    ATTENTION,
    CACHED_ATTENTION,
    KEEP,
    WRITE_CACHE,
    WRITING_OPS,
    cache_operands,
    first_buffer,
)
from skipstone.ir.errors import InternalError, Unsupported
from skipstone.ir.program import Port, Program, Role, fake_value, module_path, provenance
from skipstone.ir.sequence import prove_cacheable
from skipstone.passes.base import Pass, Remark

aten = torch.ops.aten


_SHARING = frozenset(["layer_parallel", "fuse_parallel"])
"""Passes that give several attentions one number."""


@dataclass(frozen=True)
class InsertKVCache(Pass):
    """Turn each `attention` into a `cached_attention` with a slot, numbered densely in graph order.

    Attentions that have one number share a slot: each takes the buffers that the one before has written, reads what
    earlier steps have left there, and writes over the rows of the new tokens. A `keep` is the last of them to write.

    The program gains the inputs ``start``, ``logit_rows``, ``key_i`` and ``value_i`` and the outputs ``new_key_i`` and
    ``new_value_i``. It is done only where `skipstone.ir.sequence` proves that tokens mix in attention alone.
    """

    name: ClassVar[str] = "kv_cache"

    def check(self, program: Program) -> None:
        """See `Pass.check`."""
        if program.cache_refusal is not None:
            raise program.cache_refusal
        if program.input(Role.TOKENS) is None or program.output(Role.LOGITS) is None:
            raise Unsupported("a KV cache for a program without tokens and logits", hint="Use cache=False.")
        known = (Role.TOKENS, Role.POSITIONS, Role.PADDING)
        if other := [port.name for port in program.inputs if port.role not in known]:
            raise Unsupported(f"a KV cache for a program with a further input ({other[0]})", hint="Use cache=False.")
        prove_cacheable(program)
        if program.input(Role.PADDING) is not None:
            raise Unsupported("a KV cache for a program with a padding mask", hint="Use cache=False.")
        if not any(True for _ in program.nodes(ATTENTION)):
            raise Unsupported("a KV cache: no attention was recognised in the model", hint="Use cache=False.")

    def rewrite(self, program: Program) -> list[Remark]:
        """See `Pass.rewrite`."""
        select_logit_rows(program)
        start = program.add_input(Port("start", Role.START), _like_batch(program, ()))
        held: dict[Any, list[fx.Node]] = {}  # by number: the buffers, as the last that wrote them has left them
        writers: Counter[int] = Counter()
        remarks = []
        for node in list(program.nodes(ATTENTION, KEEP)):
            number = node.kwargs["slot"]
            if number in held and _SHARING.isdisjoint(node.meta.get("made_by", ())):
                raise InternalError(f"{node.name} has the number of another attention, {number}")
            if number not in held:
                held[number] = _buffers(program, len(held), node)
                remarks.append(self.applied(f"slot {len(held) - 1}", module_path(node)))
            slot = list(held).index(number)
            with provenance(program, self.name, like=node), program.graph.inserting_before(node):
                out, held[number] = _cached(program, node, held[number], start, slot)
            node.replace_all_uses_with(out)
            program.graph.erase_node(node)
            writers[slot] += 1
        for slot, (key, value) in enumerate(held.values()):
            program.add_output(Port(f"new_key_{slot}", Role.CACHE_KEY, slot), key)
            program.add_output(Port(f"new_value_{slot}", Role.CACHE_VALUE, slot), value)
        shared = [slot for slot, number in writers.items() if number > 1]
        if shared:  # first, where people see it
            why = "decoding token by token no longer equals reading all at once: kept is what was written last"
            where = f"slot{'s' * (len(shared) > 1)} {', '.join(map(str, shared))}"
            remarks.insert(0, self.applied(where, why, shared=len(shared)))
        return remarks

    def ensures(self, program: Program) -> None:
        """See `Pass.ensures`."""
        if any(True for _ in program.nodes(ATTENTION, KEEP)):
            raise InternalError("an attention without a cache slot is left")


def number_apart(program: Program) -> None:
    """Give every attention that is to have a cache a number of its own, which no other shares."""
    nodes = (node for node in program.nodes(ATTENTION) if node.kwargs.get("slot", -1) != -1)
    for number, node in enumerate(nodes):
        node.kwargs = {**node.kwargs, "slot": number}


def _buffers(program: Program, slot: int, node: fx.Node) -> list[fx.Node]:
    """The inputs for the keys and the values of an attention."""
    pairs = zip((("key", Role.CACHE_KEY), ("value", Role.CACHE_VALUE)), node.args[1:3], strict=True)
    return [
        program.add_input(Port(f"{which}_{slot}", role, slot), _like_cache(program, value))  # type: ignore[arg-type]
        for (which, role), value in pairs
    ]


def _cached(
    program: Program, node: fx.Node, caches: list[fx.Node], start: fx.Node, slot: int
) -> tuple[fx.Node, list[fx.Node]]:
    """What stands for an attention or a `keep` where there is a cache, and the buffers behind it."""
    x, k, v, *_ = node.args
    if node.target == KEEP:
        call = program.call(WRITE_CACHE, k, v, *caches, start, slot=slot)
    else:
        constants = node.args[5:]  # sinks, key bias and its frequencies
        call = program.call(
            CACHED_ATTENTION, x, k, v, *caches, start, None, *constants, **{**node.kwargs, "slot": slot}
        )
    *outs, key, value = (program.call(operator.getitem, call, index) for index in range(first_buffer(call) + 2))
    return (outs[0] if outs else x), [key, value]  # type: ignore[return-value]


def shared_slot(program: Program) -> fx.Node | None:
    """The first of what writes a cache slot that another has written before it, if there is one."""
    seen: set[Any] = set()
    for node in program.nodes(*WRITING_OPS):
        if node.kwargs["slot"] in seen:
            return node
        seen.add(node.kwargs["slot"])
    return None


def check_slots(program: Program, name: str) -> None:
    """Refuse a program whose cache slots a pass of this name cannot give another form.

    Raises:
        Unsupported: there are none, or several iterations write one.
    """
    if not program.slots():
        hint = "Remove it from the plan, or use cache=True."
        raise Unsupported(f"{name} for a program without a KV cache", hint=hint)
    if (writer := shared_slot(program)) is not None:
        feature = f"{name} for a cache slot that several iterations write"
        raise Unsupported(feature, where=module_path(writer), hint="Take kv='iterate' in layer_parallel.")


def select_logit_rows(program: Program) -> None:
    """Gather the rows `logit_rows` [B, R] of the last hidden state before the head reads it.

    A prompt of S tokens then makes R rows of logits, not S. The gather goes to the earliest node of the chain that
    leads to the logits alone and keeps [B, S, ...] rows apart: everything behind it works on R rows.
    """
    logits = program.output(Role.LOGITS)
    if logits is None:
        raise InternalError("a program without logits has no rows to select")
    hidden = _head_input(logits)
    rows = program.add_input(Port("logit_rows", Role.LOGIT_ROWS), _like_batch(program, ("rows",)))
    width = hidden.meta["val"].shape[-1]
    with provenance(program, InsertKVCache.name, like=hidden), program.graph.inserting_before(hidden.next):
        index = program.call(aten.unsqueeze.default, rows, -1)
        wide = program.call(aten.expand.default, index, [-1, -1, int(width)])
        gathered = program.call(aten.gather.default, hidden, 1, wide)
    hidden.replace_all_uses_with(gathered, delete_user_cb=lambda user: user is not gathered)
    seen = False
    for node in program.nodes():
        seen = seen or node is gathered
        if seen and node is not gathered:
            node.meta["val"] = fake_value(node)


def count_input(program: Program) -> fx.Node:
    """The input of role ``COUNT`` of a program with a cache; it is added where there is none."""
    start = program.input(Role.START)
    if start is None:
        raise InternalError("a cached program without the input `start`")
    return program.input(Role.COUNT) or program.add_input(Port("count", Role.COUNT), start.meta["val"].clone())


def drop_slot(program: Program, node: fx.Node) -> None:
    """Remove a cached attention that nothing but the program's outputs reads, with the ports of its slot."""
    buffers = [buffer for half in cache_operands(node) for buffer in half]
    program.remove_outputs([user for user in node.users if user.args[1] != 0])
    for user in list(node.users):
        program.graph.erase_node(user)
    program.graph.erase_node(node)
    program.remove_inputs(buffers)


_ROW_WISE = frozenset(
    [
        aten.linear.default, aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.tanh.default,
        aten.clone.default, aten._to_copy.default, aten.to.dtype, aten.neg.default, aten.clamp.default,
        aten.matmul.default,
    ]
)  # fmt: skip


def _head_input(logits: fx.Node) -> fx.Node:
    """Walk back from the logits over row-wise operators to the input of the head's matrix product."""
    node = logits
    while node.op == "call_function" and node.target in _ROW_WISE:
        operands = [a for a in node.args if isinstance(a, fx.Node) and a.op != "get_attr"]
        activations = [a for a in operands if a.meta["val"].ndim == 3]
        if len(activations) != 1:
            break
        is_head = node.target in (aten.linear.default, aten.matmul.default)
        if len(activations[0].users) > 1 and not is_head:
            break
        node = activations[0]
        if is_head and len(node.users) == 1:
            return node
        if is_head:
            break
    if node is logits or len(node.users) != 1:
        raise Unsupported("a head that is not a row-wise function of one hidden state", where=logits.name)
    return node


def _like_batch(program: Program, extra: tuple[str, ...]) -> torch.Tensor:
    tokens = program.input(Role.TOKENS).meta["val"]  # type: ignore[union-attr]
    return tokens.new_empty((tokens.shape[0], *(_fresh_size(tokens, 5 + i) for i in range(len(extra)))))


def _like_cache(program: Program, value: fx.Node) -> torch.Tensor:
    start = program.input(Role.START)
    fake = value.meta["val"]
    capacity = start.meta.setdefault("capacity", None)  # type: ignore[union-attr]
    if capacity is None:
        capacity = start.meta["capacity"] = _fresh_size(fake, 64)  # type: ignore[union-attr]
    return fake.new_empty((fake.shape[0], fake.shape[1], capacity, fake.shape[3]))


def _fresh_size(like: torch.Tensor, hint: int) -> torch.SymInt:
    """A new symbolic size of the program's own shape environment."""
    mode = like.fake_mode  # type: ignore[attr-defined]
    example = torch.empty(hint, device="meta")
    fake = mode.from_tensor(
        example,
        symbolic_context=torch.fx.experimental.symbolic_shapes.StatelessSymbolicContext(
            dynamic_sizes=[torch.fx.experimental.symbolic_shapes.DimDynamic.DYNAMIC]
        ),
        source=torch._dynamo.source.ConstantSource(f"size_{hint}_{id(example)}"),
    )
    return fake.shape[0]
