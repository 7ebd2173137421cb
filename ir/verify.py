"""What every program must be, whichever pass made it.

A violation raises `Malformed` with the number of the invariant, the pass that ran last, the node, and the lines around
it. The invariants:

1. Nodes are placeholders, tensors, calls of functions and one output; each is used only after it is computed.
2. Every value has the shape, dtype and device that its node gives on fake tensors.
3. Ports and graph agree: one port a placeholder and output, equal names, and the types that roles require.
4. Every cache slot is written once a step, or by a chain that hands its buffers on; nothing else reads them.
5. No operator writes to its arguments.
6. The branches of a condition take and return the same types; what a gate spares comes after its decision.
7. Nothing is dead: every tensor and every call has a user.
8. Every call says where it came from: a module path, a stack trace, or the pass that made it.
9. What continues a program has no cache buffer that the program does not have.
10. Each cache buffer of a draft holds heads of buffers that the program has.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols, statically_known_true

from skipstone.ir.dialect import GATE, WRITING_OPS, cache_operands, first_buffer
from skipstone.ir.errors import Malformed
from skipstone.ir.gates import spared
from skipstone.ir.printer import excerpt, type_text
from skipstone.ir.program import Port, Program, Role, fake_value

Violation = tuple[fx.Node | None, str]  # where, and what does not hold
COND = torch.ops.higher_order.cond
NUMBERS = (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool)
IN_PLACE_NAMES = (
    "setitem delitem iadd isub imul imatmul itruediv ifloordiv imod ipow iand ior ixor ilshift irshift iconcat"
)
IN_PLACE = {getattr(operator, name) for name in IN_PLACE_NAMES.split()}
INT64 = (torch.int64,)
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
CODES = (*FLOATS, torch.int8, torch.uint8)
# role -> rank (None for any) and dtypes
REQUIRED: dict[Role, tuple[int | None, tuple[torch.dtype, ...]]] = {
    Role.TOKENS: (2, INT64),
    Role.EMBEDDINGS: (3, FLOATS),
    Role.POSITIONS: (2, INT64),
    Role.PADDING: (2, (torch.int64, torch.bool)),
    Role.START: (1, INT64),
    Role.LOGIT_ROWS: (2, INT64),
    Role.COUNT: (1, INT64),
    Role.DECODE_START: (1, INT64),
    Role.CACHE_KEY: (4, CODES),
    Role.CACHE_VALUE: (4, CODES),
    Role.CHOICE: (1, INT64),
    Role.PROMPT_SCORES: (3, FLOATS),
    Role.LOGITS: (None, FLOATS),
}


def verify(program: Program, after: str = "", rules: Collection[int] | None = None) -> None:
    """Check every invariant of `program`, which stays as it is.

    Args:
        after: name of the pass that ran last, for the message.
        rules: numbers of the invariants to check; None for all.
    Raises:
        Malformed: the first invariant that does not hold.
    """
    for number in RULES if rules is None else rules:
        for node, why in RULES[number](program):
            around = excerpt(program, node) if node is not None else ""
            raise Malformed(number, why, node=node.name if node is not None else "", after=after, around=around)


def _well_formed(program: Program) -> Iterator[Violation]:
    """Nodes are placeholders, tensors, calls of functions and one output; each is used only after it is computed."""
    seen: set[fx.Node] = set()
    for node in program.graph.nodes:
        if node.op not in ("placeholder", "get_attr", "call_function", "output"):
            yield node, f"a program has no {node.op} nodes"
        for argument in node.all_input_nodes:
            if argument not in seen:
                yield node, f"uses {argument.name} before it is computed"
        seen.add(node)
    if program.output_node().op != "output":
        yield program.output_node(), "the last node is not the output"
    try:
        program.graph.lint()
    except Exception as error:  # lint raises bare RuntimeErrors and more
        yield None, str(error)


def _values_agree(program: Program) -> Iterator[Violation]:
    """Every value has the shape, dtype and device that its node gives on fake tensors."""
    with _fake(program):
        for node in program.graph.nodes:
            if node.op == "output" or node.target == COND or _branch(program, node) is not None:
                continue
            if "val" not in node.meta:
                yield node, "carries no value"
                continue
            recorded = node.meta["val"]
            if node.op == "placeholder":
                continue
            try:
                actual = program.tensor(str(node.target)) if node.op == "get_attr" else fake_value(node)
            except Exception as error:  # whatever an operator raises on arguments that it does not take
                yield node, f"cannot be evaluated: {error}"
                continue
            if difference := _difference(recorded, actual):
                yield node, f"recorded as {type_text(recorded)}, computed as {type_text(actual)}: {difference} differs"


def _ports_agree(program: Program) -> Iterator[Violation]:
    """Ports and graph agree: one port a placeholder and output, equal names, and the types that roles require."""
    placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
    if len(placeholders) != len(program.inputs):
        yield None, f"{len(program.inputs)} input ports for {len(placeholders)} placeholders"
        return
    returned = program.output_node().args[0]
    if not isinstance(returned, (tuple, list)) or not all(isinstance(value, fx.Node) for value in returned):
        yield program.output_node(), "the output is not one flat tuple of nodes"
        return
    if len(returned) != len(program.outputs):
        yield program.output_node(), f"{len(program.outputs)} output ports for {len(returned)} outputs"
        return
    for port, node in zip(program.inputs, placeholders, strict=True):
        if port.name not in (node.name, node.target):
            yield node, f"its port is called {port.name!r}"
    for ports in (program.inputs, program.outputs):
        names = [port.name for port in ports]
        if repeated := {name for name in names if names.count(name) > 1}:
            yield None, f"several ports are called {sorted(repeated)}"
    for port, node in zip((*program.inputs, *program.outputs), (*placeholders, *returned), strict=True):
        yield from _port_type(port, node)


def _port_type(port: Port, node: fx.Node) -> Iterator[Violation]:
    """What is wrong with the type of the node at a port."""
    if (port.slot is not None) != (port.is_buffer or port.role == Role.PROMPT_SCORES):
        yield node, f"port {port.name!r} of role {port.role} has slot {port.slot}"
    if port.role not in REQUIRED:
        return
    rank, dtypes = REQUIRED[port.role]
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.dtype not in dtypes or (rank is not None and value.dim() != rank):
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        shape = f" of {rank} dimensions" if rank is not None else ""
        yield node, f"role {port.role} requires {wanted}{shape}, found {type_text(value)}"


def _slots_written_once(program: Program) -> Iterator[Violation]:
    """Every cache slot is written once a step, or by a chain that hands its buffers on; nothing else reads them."""
    writers: dict[int, list[fx.Node]] = {}
    for node in program.nodes(*WRITING_OPS):
        slot: Any = node.kwargs.get("slot", -1)
        writers.setdefault(slot, []).append(node)
    slots = program.slots()
    if len(set(slots)) < len(slots) or min(slots, default=0) < 0:
        yield None, f"the slots are {list(slots)}, not a number of its own for each"
    for slot, chain in writers.items():
        if slot not in slots:
            yield chain[0], f"writes slot {slot}, which no input holds"
    for port in (*program.inputs, *program.outputs):
        if port.is_buffer and port.slot is not None:
            yield from _slot_port(program, port, writers.get(port.slot, []))


def _slot_port(program: Program, port: Port, writers: Sequence[fx.Node]) -> Iterator[Violation]:
    """What is wrong with one buffer of the keys or values of a slot."""
    role, slot = port.role, port.slot
    before, after = program.input(role, slot, port.part), program.output(role, slot, port.part)
    if before is None or after is None:
        yield before or after, f"the {role} of slot {slot} has no {'input' if before is None else 'output'}"
        return
    if not writers:
        yield before, f"no attention writes slot {slot}"
        return
    held = before
    for place, writer in enumerate(writers):
        keys, values = cache_operands(writer)
        mine = keys if role == Role.CACHE_KEY else values
        if held not in mine:
            yield writer, f"writes slot {slot}, but does not take {held.name}"
            return
        for user in held.users:
            if user is not writer:
                yield user, f"reads {held.name}, which belongs to {writer.name}"
        result = first_buffer(writer) + mine.index(held) + (len(keys) if role == Role.CACHE_VALUE else 0)
        left = [user for user in writer.users if user.target is operator.getitem and user.args[1] == result]
        if place + 1 < len(writers) and len(left) == 1:
            (held,) = left
        elif place + 1 < len(writers):
            yield writer, f"leaves output {result}, the {role} of slot {slot}, in {len(left)} places"
            return
    if after.target is not operator.getitem or after.args != (writer, result):
        yield after, f"leaves as the {role} of slot {slot}, but is not output {result} of {writer.name}"
    for user in after.users:
        if user is not program.output_node():
            yield user, f"reads {after.name}, the written cache of slot {slot}"
    if difference := _difference(before.meta.get("val"), after.meta.get("val")):
        yield after, f"the {role} of slot {slot} changes its {difference}"


def _functional(program: Program) -> Iterator[Violation]:
    """No operator writes to its arguments."""
    graphs = [module.graph for module in program.module.modules() if isinstance(module, fx.GraphModule)]
    for node in (node for graph in graphs for node in graph.nodes if node.op == "call_function"):
        overload = isinstance(node.target, torch._ops.OpOverload)
        if node.target._schema.is_mutable if overload else node.target in IN_PLACE or "out" in node.kwargs:
            yield node, f"{node.target} writes to its arguments"


def _branches_agree(program: Program) -> Iterator[Violation]:
    """The branches of a condition take and return the same types; what a gate spares comes after its decision."""
    for node in program.nodes(COND):
        branches: tuple[Any, ...] = node.args[1:3]
        operands: Any = node.args[3]
        modules = [_branch(program, branch) for branch in branches]
        if len(modules) != 2 or None in modules:
            yield node, "the branches are not two graphs of the program"
            continue
        results: list[Any] = []
        with _fake(program):
            for branch, module in zip(branches, modules, strict=True):
                try:
                    results.append(module(*fx.map_arg(operands, lambda argument: argument.meta["val"])))  # type: ignore[misc]
                except Exception as error:  # a branch may fail in any way on operands that it does not take
                    yield node, f"branch {branch.target} does not take these operands: {error}"
        if len(results) < len(modules):
            continue
        if difference := _difference(*results):
            yield node, f"branches return {type_text(results[0])} and {type_text(results[1])}: {difference} differs"
        elif "val" not in node.meta or (difference := _difference(node.meta["val"], results[0])):
            yield node, f"recorded as {type_text(node.meta.get('val'))}, branches return {type_text(results[0])}"
    for node in program.nodes(GATE):
        decision: Any = node.args[1]
        first = next(iter(spared(node)), None)
        if first is None:
            yield node, "is a gate that spares nothing"
        elif not first > decision:
            yield first, f"is spared by {node.name}, but stands before {decision.name}, which decides about it"


def _nothing_dead(program: Program) -> Iterator[Violation]:
    """Nothing is dead: every tensor and every call has a user."""
    read = {str(node.target) for node in program.graph.nodes if node.op == "get_attr"}
    for node in program.graph.nodes:
        if node.op in ("get_attr", "call_function") and not node.users:
            yield node, "has no user"
    module = program.module
    for owned in (module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False)):
        for name, _ in owned:
            # tensors inside a branch belong to the branch's graph
            if not any(name == target or name.startswith(f"{target}.") for target in read):
                yield None, f"no node reads the tensor {name}"


def _provenance(program: Program) -> Iterator[Violation]:
    """Every call says where it came from: a module path, a stack trace, or the pass that made it."""
    for node in program.nodes():
        if isinstance(node.meta.get("val"), NUMBERS):  # arithmetic on sizes is made by export itself
            continue
        if not any(node.meta.get(key) for key in ("nn_module_stack", "made_by", "stack_trace")):
            yield node, "nothing says where it came from"


def _continues(program: Program) -> Iterator[Violation]:
    """What continues a program has no cache buffer that the program does not have."""
    for number, part in enumerate(program.continuations):
        for own, other in ((program.inputs, part.inputs), (program.outputs, part.outputs)):
            buffers = [port for port in other if port.is_buffer and port not in own]
            if buffers:
                yield None, f"continuation {number} has the buffer {buffers[0].name}"


def _drafts(program: Program) -> Iterator[Violation]:
    """Each cache buffer of a draft holds heads of buffers that the program has."""
    if program.draft is None:
        return
    own = _cache_buffers(program)
    for name, value in _cache_buffers(program.draft.program).items():
        sources = program.draft.buffers.get(name, ())
        if not sources or not own.keys() >= set(sources):
            yield None, f"the draft's buffer {name} holds {', '.join(sources) or 'nothing'}"
            continue
        rows = {(own[each].dtype, own[each].shape[3]) for each in sources}
        if rows != {(value.dtype, value.shape[3])} or sum(own[each].shape[1] for each in sources) != value.shape[1]:
            yield None, f"the draft's buffer {name} has not the heads of {', '.join(sources)}"


def _cache_buffers(program: Program) -> dict[str, Any]:
    """The fake values of the cache buffers, by name."""
    placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
    pairs = zip(program.inputs, placeholders, strict=True)
    return {port.name: node.meta["val"] for port, node in pairs if port.is_buffer}


RULES: dict[int, Callable[[Program], Iterator[Violation]]] = {
    1: _well_formed,
    2: _values_agree,
    3: _ports_agree,
    4: _slots_written_once,
    5: _functional,
    6: _branches_agree,
    7: _nothing_dead,
    8: _provenance,
    9: _continues,
    10: _drafts,
}


def _branch(program: Program, node: Any) -> fx.GraphModule | None:
    """The graph that a `get_attr` node stands for, if it is one."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    owner: Any = program.module
    for part in str(node.target).split("."):
        owner = getattr(owner, part, None)
    return owner if isinstance(owner, fx.GraphModule) else None


@contextmanager
def _fake(program: Program) -> Iterator[None]:
    """Evaluate on the program's fake tensors without leaving a trace in its shape environment."""
    values = (node.meta.get("val") for node in program.graph.nodes)
    mode = next((value.fake_mode for value in values if hasattr(value, "fake_mode")), None)
    with ExitStack() as stack:
        if mode is not None:
            # operators without tensor arguments (arange) would run for real, and fix a symbolic size, outside the mode
            stack.enter_context(mode)
            if mode.shape_env is not None:
                stack.enter_context(mode.shape_env.suppress_guards())
                stack.enter_context(mode.shape_env.ignore_fresh_unbacked_symbols())
        stack.enter_context(torch.no_grad())
        yield


def _difference(left: Any, right: Any) -> str:
    """In what two values differ ("shape", "dtype", "device", "number", "kind"), or "" if they agree."""
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        if left.dtype != right.dtype:
            return "dtype"
        if left.device != right.device:
            return "device"
        same = left.dim() == right.dim() and all(map(_equal, left.shape, right.shape))
        return "" if same else "shape"
    if isinstance(left, (tuple, list)) and isinstance(right, (tuple, list)):
        if len(left) != len(right):
            return "length"
        return next((found for found in map(_difference, left, right) if found), "")
    if isinstance(left, NUMBERS) and isinstance(right, NUMBERS):
        return "" if _equal(left, right) else "number"
    return "" if type(left) is type(right) else "kind"


def _equal(left: Any, right: Any) -> bool:
    """Whether two numbers, symbolic or not, are the same expression."""
    first, second = (number.node.expr if hasattr(number, "node") else sympy.sympify(number) for number in (left, right))
    if first == second:
        return True
    if free_unbacked_symbols(first) or free_unbacked_symbols(second):
        return True  # every evaluation of a data-dependent size makes a new symbol
    return statically_known_true(left == right)
