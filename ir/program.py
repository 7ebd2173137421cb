"""The program: a functional FX graph over ATen and the dialect, with roles for what goes in and comes out.

A program owns its graph but not its tensors: every `get_attr` node names a tensor of the graph module, and those alias
the user's model until a pass replaces one (the overlay). The user's model itself is never written to.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch.utils._pytree import TreeSpec

from skipstone.ir.errors import InternalError, Unsupported


class Role(StrEnum):
    """What an input or output of a program means."""

    TOKENS = "tokens"  # int64 [B, S]
    EMBEDDINGS = "embeddings"  # float [B, S, hidden], instead of tokens
    POSITIONS = "positions"  # int64 [B, S]
    PADDING = "padding"  # int64 or bool [B, S], 1 where the token is real (bidirectional models)
    START = "start"  # int64 [B], rows of each sequence that are in the cache already
    COUNT = "count"  # int64 [B], valid rows among the new ones of each sequence
    DECODE_START = "decode_start"  # int64 [B], rows of each sequence that are its prompt
    LOGIT_ROWS = "logit_rows"  # int64 [B, R], the rows of the sequence that reach the head
    CACHE_KEY = "cache_key"  # [B, KH, rows, width], one part of the keys of one slot
    CACHE_VALUE = "cache_value"  # [B, KH, rows, width], one part of the values of one slot
    CHOICE = "choice"  # int64 [B], which continuation goes on with each sequence
    PROMPT_SCORES = "prompt_scores"  # float [B, KH, S], how much each row of one slot is worth keeping
    LOGITS = "logits"  # float [B, S or R, vocabulary]
    TENSOR = "tensor"  # anything else, known by its name alone


@dataclass(frozen=True)
class Port:
    """One input or output of a program.

    Attributes:
        name: the placeholder's name, or the output's key.
        role: what it means.
        slot: the cache slot that it belongs to, for the cache roles and the scores of its rows.
        part: which buffer of the cached keys or values it is, see `skipstone.ir.quantized.CachePart`.
    """

    name: str
    role: Role
    slot: int | None = None
    part: str = "codes"

    @property
    def is_buffer(self) -> bool:
        """Whether it is a buffer of the cache."""
        return self.role in (Role.CACHE_KEY, Role.CACHE_VALUE)


@dataclass(frozen=True)
class Source:
    """Facts about the model that a program was captured from.

    Attributes:
        name: class name of the model.
        dtype: dtype of its parameters.
        device: device of its parameters.
        vocabulary: number of token ids it embeds, if it embeds tokens.
        max_positions: the largest sequence it has positions for, if it says so.
        parameters: number of parameters, shared ones counted once.
        fingerprint: sha256 over parameter names, shapes, dtypes and a sample of their values.
        first_position: what the model calls the position of the first token where it is not told (RoBERTa: not 0).
    """

    name: str
    dtype: torch.dtype
    device: torch.device
    vocabulary: int | None
    max_positions: int | None
    parameters: int
    fingerprint: str
    first_position: int = 0


@dataclass(frozen=True)
class Record:
    """One entry of a program's history: what a pass said and what it did to the graph.

    Attributes:
        name: name of the pass.
        remarks: its remarks (`skipstone.passes.base.Remark`), in order.
        nodes_before, nodes_after: operator counts of the graph.
        seconds: time it took.
        code: the readable graph after the pass.
    """

    name: str
    remarks: tuple[Any, ...]
    nodes_before: int
    nodes_after: int
    seconds: float
    code: str = field(repr=False)


@dataclass(frozen=True)
class Draft:
    """A cheaper program that guesses what another one, the model, would say, for the model to check.

    Attributes:
        program: with a cache.
        tokens: how many it guesses before the model checks them.
        buffers: for each of its cache buffers, by name, those of the model whose heads it holds, side by side.
        lookup: how many tokens are taken from the sequence itself, where it seems to repeat, without asking the draft.
    """

    program: Program
    tokens: int
    buffers: Mapping[str, tuple[str, ...]]
    lookup: int = 0


@dataclass
class Program:
    """A functional graph with roles.

    Attributes:
        module: the graph module. Placeholders are `inputs` in order, `get_attr` nodes are tensors, and the output node
            returns one flat tuple, `outputs` in order. Every node but the output carries `meta["val"]` (fake tensor,
            or a plain number for size arithmetic).
        inputs, outputs: the ports, in graph order.
        source: facts about the captured model.
        output_spec: how the user's model structured its outputs.
        layers: how many layers the captured model has, once `skipstone.ir.stream.note_layers` has counted them.
        cache_refusal: why this program can have no KV cache, where the capture knows it already.
        calibration: statistics of real data that passes may ask for, by name; see `skipstone.ir.statistics`.
        history: what has been done to the program, in order.
        continuations: programs that go on with a sequence once its prompt is read, over some of this one's slots; the
            output of role ``CHOICE`` says which. Without any, the program itself goes on.
        draft: what guesses its next tokens, if anything does.
        moved: tensors of the captured model whose values lie in a stack now, by their names, as views of it.
    """

    module: fx.GraphModule
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    source: Source
    output_spec: TreeSpec | None = None
    layers: int | None = None
    cache_refusal: Unsupported | None = None
    calibration: dict[str, Tensor] = field(default_factory=dict)
    history: list[Record] = field(default_factory=list)
    continuations: tuple[Program, ...] = ()
    draft: Draft | None = None
    moved: dict[str, Tensor] = field(default_factory=dict)

    @property
    def graph(self) -> fx.Graph:
        """The graph itself."""
        return self.module.graph

    def nodes(self, *targets: Any) -> Iterator[fx.Node]:
        """The call nodes of the graph in order; those of `targets` alone, if any are given."""
        for node in self.graph.nodes:
            if node.op == "call_function" and (not targets or node.target in targets):
                yield node

    def tensor(self, name: str) -> Tensor:
        """The tensor that `get_attr` nodes of this dotted name stand for.

        Raises:
            InternalError: there is no such tensor.
        """
        owner: Any = self.module
        for part in name.split("."):
            owner = getattr(owner, part, None)
        if not isinstance(owner, Tensor):
            raise InternalError(f"the program has no tensor {name!r}")
        return owner

    def add_tensor(self, name: str, tensor: Tensor) -> fx.Node:
        """A `get_attr` node, at the graph's insertion point, for a tensor that the program did not have.

        Args:
            name: of the tensor, without dots.
            tensor: detached or not, its values become part of the program.
        Raises:
            InternalError: the name is taken.
        """
        if hasattr(self.module, name):
            raise InternalError(f"the program has {name!r} already")
        self.module.register_buffer(name, tensor.detach())
        node = self.graph.get_attr(name)
        mode = _fake_mode([other.meta.get("val") for other in self.graph.nodes])
        node.meta["val"] = tensor.detach() if mode is None else mode.from_tensor(tensor.detach(), static_shapes=True)
        return node

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """A call node at the graph's insertion point, with its fake value."""
        node = self.graph.call_function(target, args, kwargs)
        node.meta["val"] = fake_value(node)
        return node

    def add_input(self, port: Port, value: Tensor) -> fx.Node:
        """A placeholder behind the others, with a fake value."""
        last = [node for node in self.graph.nodes if node.op == "placeholder"][-1]
        with self.graph.inserting_after(last):
            node = self.graph.placeholder(port.name)
        node.meta["val"] = value
        self.inputs = (*self.inputs, port)
        return node

    def add_output(self, port: Port, node: fx.Node) -> None:
        """Return one more value, behind the others."""
        returned = self.output_node()
        returned.args = ((*returned.args[0], node),)  # type: ignore[misc]
        self.outputs = (*self.outputs, port)

    def remove_inputs(self, nodes: Sequence[fx.Node]) -> None:
        """Remove placeholders that nothing reads."""
        placeholders = [node for node in self.graph.nodes if node.op == "placeholder"]
        self.inputs = tuple(port for port, node in zip(self.inputs, placeholders, strict=True) if node not in nodes)
        for node in nodes:
            self.graph.erase_node(node)

    def remove_outputs(self, nodes: Sequence[fx.Node]) -> None:
        """No longer return the values of these nodes."""
        returned = self.output_node()
        pairs = zip(self.outputs, returned.args[0], strict=True)  # type: ignore[arg-type]
        kept = [(port, node) for port, node in pairs if node not in nodes]
        self.outputs = tuple(port for port, _ in kept)
        returned.args = (tuple(node for _, node in kept),)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors that the graph reads, by name, in graph order."""
        names = dict.fromkeys(str(node.target) for node in self.graph.nodes if node.op == "get_attr")
        return {name: self.tensor(name) for name in names}

    def weight_bytes(self) -> int:
        """Bytes of the tensors that the graph reads; what several tensors share is counted once."""
        spans: dict[int, list[tuple[int, int]]] = {}
        for tensor in self.tensors().values():
            start = int(tensor.storage_offset()) * tensor.element_size()
            own = spans.setdefault(tensor.untyped_storage().data_ptr(), [])
            own.append((start, start + tensor.numel() * tensor.element_size()))
        total = 0
        for own in spans.values():
            reached = 0
            for start, stop in sorted(own):
                total += max(stop - max(start, reached), 0)
                reached = max(reached, stop)
        return total

    def input(self, role: Role, slot: int | None = None, part: str = "codes") -> fx.Node | None:
        """The placeholder of that role (and slot, and part of it), or None."""
        placeholders = [node for node in self.graph.nodes if node.op == "placeholder"]
        for port, node in zip(self.inputs, placeholders, strict=True):
            if (port.role, port.slot, port.part) == (role, slot, part):
                return node
        return None

    def output_node(self) -> fx.Node:
        """The graph's output node."""
        return next(iter(reversed(self.graph.nodes)))

    def output(self, role: Role, slot: int | None = None, part: str = "codes") -> fx.Node | None:
        """The node whose value leaves the program under that role (and slot, and part of it), or None."""
        for port, node in zip(self.outputs, self.output_node().args[0], strict=True):  # type: ignore[arg-type]
            if (port.role, port.slot, port.part) == (role, slot, part):
                return node
        return None

    def slots(self) -> tuple[int, ...]:
        """The cache slots of the program, in order."""
        return tuple(
            port.slot
            for port in self.inputs
            if port.role == Role.CACHE_KEY and port.slot is not None and port.part == "codes"
        )

    def copy(self) -> Program:
        """A copy with its own graph and the same tensors."""
        graph = fx.Graph()
        mapping: dict[fx.Node, fx.Node] = {}
        returned = graph.graph_copy(self.graph, mapping)
        graph.output(returned)
        for old, new in mapping.items():
            new.meta = copy.copy(old.meta)
        module = fx.GraphModule(self.tensors(), graph)
        return replace(self, module=module, history=list(self.history))

    def recompile(self) -> None:
        """Drop dead nodes and unused tensors, check the graph's form, and regenerate its code."""
        # A functional program has no side effects, whatever FX thinks of seeded operators.
        self.graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
        self.graph.lint()
        self.module = fx.GraphModule(self.tensors(), self.graph)

    def dump(self, directory: str | os.PathLike[str]) -> None:
        """Write the readable graph after every pass; see `skipstone.ir.printer.dump`."""
        from skipstone.ir.printer import dump  # the printer knows programs

        dump(self, directory)

    def run(self, **values: Tensor) -> dict[str, Tensor]:
        """Execute the graph with plain PyTorch.

        Args:
            values: one tensor per input port, by port name.
        Returns:
            the outputs by port name.
        """
        results = self.module(*(values[port.name] for port in self.inputs))
        return {port.name: value for port, value in zip(self.outputs, results, strict=True)}


ATTENTIONS = "attentions"
"""Metadata of an attention that stands for others of the model: their module paths, in the order of the heads."""

INHERITED = ("layer", "heads", ATTENTIONS)
"""Metadata of a node that stays with what replaces it: its layer in the original model; of an attention its heads, and
what it is made of."""


def module_path(node: fx.Node) -> str:
    """The dotted path of the innermost module that a node came from ("" for the root).

    Export keeps `('layers.0', 'package.Class')` in `nn_module_stack`, Dynamo `("L['self'].layers.0", Class)`; both
    are read here, and nowhere else.
    """
    stack = node.meta.get("nn_module_stack") or {}
    path = ""
    for entry, _class in stack.values():
        path = str(entry).removeprefix("L['self']").removeprefix(".")
    return path


def propagate(program: Program, nodes: Iterable[fx.Node] | None = None) -> None:
    """Recompute `meta["val"]` of `nodes` (default: every call node) from their arguments' fake values."""
    for node in list(nodes if nodes is not None else program.nodes()):
        node.meta["val"] = fake_value(node)


def fake_value(node: fx.Node) -> Any:
    """What a call node returns, computed on the fake values of its arguments.

    Raises:
        InternalError: an argument carries no value.
    """

    def value(argument: fx.Node) -> Any:
        if "val" not in argument.meta:
            raise InternalError(f"node {argument.name} has no value metadata (needed by {node.name})")
        return argument.meta["val"]

    args, kwargs = fx.map_arg((node.args, node.kwargs), value)
    mode = _fake_mode((args, kwargs)) or _fake_mode([other.meta.get("val") for other in node.graph.nodes])
    target: Callable[..., Any] = node.target  # type: ignore[assignment]
    if mode is None:
        return target(*args, **kwargs)
    # Without the Python dispatcher, torch 2.11 takes the symbolic sizes of a matrix product for numbers.
    with enable_python_dispatcher(), mode, torch.no_grad():
        return target(*args, **kwargs)


def _fake_mode(values: Any) -> Any:
    for value in torch.utils._pytree.tree_leaves(values):
        if hasattr(value, "fake_mode"):
            return value.fake_mode
    return None


@contextmanager
def provenance(program: Program, by: str, like: fx.Node | None = None) -> Iterator[None]:
    """Mark every node created inside as made by pass `by`; what it does not say of itself it takes from `like`."""
    before = set(program.graph.nodes)
    yield
    for node in program.graph.nodes:
        if node not in before:
            node.meta["made_by"] = (*node.meta.get("made_by", ()), by)
            if like is not None and "nn_module_stack" not in node.meta:
                node.meta["nn_module_stack"] = like.meta.get("nn_module_stack", {})
                node.meta["stack_trace"] = like.meta.get("stack_trace", "")
                inherited = [key for key in INHERITED if key in like.meta and key not in node.meta]
                node.meta |= {key: like.meta[key] for key in inherited}
