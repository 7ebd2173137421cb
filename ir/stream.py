"""The residual stream: layers and sublayers, found from the graph alone.

A sublayer is ``stream' = skip(stream) + branch(stream)``. Everything that reaches the output passes through each value
of the stream, so the stream's additions are exactly the additions that dominate the output and of which one operand
dominates the others. Dominators are those of the activation graph: what depends on the tokens (or embeddings).
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import takewhile
from typing import Any

import networkx as nx
import torch
from torch import fx

from skipstone.ir.dialect import ATTENTION_OPS, EXPERTS, GATE, PREDICATED_LINEAR
from skipstone.ir.errors import Unsupported
from skipstone.ir.program import Program, Role, module_path
from skipstone.ir.surrogate import COPIES, RESHAPES, SCALINGS, SUMS

aten = torch.ops.aten

_ADDS = (aten.add.Tensor, operator.add)
_CASTS = (
    aten._to_copy.default, aten.to.dtype, aten.clone.default, aten.dropout.default, aten.contiguous.default,
    aten.alias.default,
)  # fmt: skip
_PRODUCTS = (
    aten.linear.default, aten.matmul.default, aten.mm.default, aten.bmm.default, aten.addmm.default,
    aten.baddbmm.default, aten.conv1d.default, aten.convolution.default, aten.einsum.default, EXPERTS,
    PREDICATED_LINEAR,
)  # fmt: skip
_NORMS = (aten.layer_norm.default, aten.rms_norm.default, aten.rsqrt.default)
_SOFTMAX = (aten.softmax.int, aten._softmax.default)

PARALLEL = "parallel"
"""Metadata of the additions inside a segment of layers that run at the same time: the kinds of sublayers whose results
they add. No sublayer of the residual stream is found there."""


class SublayerKind(StrEnum):
    """What a sublayer's branch does."""

    ATTENTION = "attention"
    FFN = "ffn"
    OTHER = "other"


@dataclass(frozen=True)
class Skip:
    """The linear path past a branch: the stream itself, or the stream times `factor` (a number or a graph node)."""

    factor: fx.Node | float = 1.0

    @property
    def is_identity(self) -> bool:
        """Whether the stream passes unchanged."""
        return self.factor == 1.0


@dataclass(frozen=True)
class Sublayer:
    """One residual sublayer.

    Attributes:
        index: its number in graph order.
        layer: the layer that it belongs to, counted from 0.
        kind: attention, FFN or other.
        path: module path, for people.
        add: the addition that writes the stream.
        stream: the stream's value before.
        branch: the value that is added.
        nodes: the nodes of the branch that nothing else uses, in graph order.
        parameters: the tensors that those nodes alone read.
        skip: the linear path past the branch.
        post_norm: whether the sum is normalised before the next sublayer reads it.
        parallel: whether it shares its stream value with another sublayer (GPT-J, NeoX, Phi).
    """

    index: int
    layer: int
    kind: SublayerKind
    path: str
    add: fx.Node
    stream: fx.Node
    branch: fx.Node
    nodes: tuple[fx.Node, ...]
    parameters: tuple[str, ...]
    skip: Skip
    post_norm: bool
    parallel: bool


@dataclass(frozen=True)
class ResidualStream:
    """All sublayers of a program, in order.

    Attributes:
        sublayers: the sublayers.
        entry: the first value of the stream; what the first sublayer reads, or is a sum of multiples of that value.
        exit: the last one.
    """

    sublayers: tuple[Sublayer, ...]
    entry: fx.Node
    exit: fx.Node

    @property
    def layers(self) -> int:
        """How many layers there are."""
        return 1 + max(sublayer.layer for sublayer in self.sublayers)

    def layer(self, number: int) -> tuple[Sublayer, ...]:
        """The sublayers of one layer."""
        return tuple(sublayer for sublayer in self.sublayers if sublayer.layer == number)


def find_stream(program: Program) -> ResidualStream:
    """Find the residual stream.

    Raises:
        Unsupported: the program has none.
    """
    finder = _Finder(program)
    found = [site for node in finder.spine for site in finder.sites(node)]
    if not found and any(PARALLEL in node.meta for node in program.nodes()):
        raise Unsupported("the residual stream of a program whose layers all run at the same time")
    if not found:
        raise Unsupported(
            "a model without a residual stream: no addition carries a value past a branch to the output",
            hint="Layer and FFN skipping need residual connections.",
        )
    sublayers = _number([finder.sublayer(*site) for site in found])
    if len(sublayers) > 1:
        # A norm behind the last sublayer is the head's, or the stream's if those before it are.
        sublayers[-1] = replace(sublayers[-1], post_norm=sublayers[-2].post_norm)
    entry = sublayers[0].stream
    while entry in finder.returns:
        entry = finder.returns[entry]
    return ResidualStream(tuple(sublayers), entry, sublayers[-1].add)


class _Finder:
    """The activation graph of a program, with its dominators."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.order = {node: position for position, node in enumerate(program.graph.nodes)}
        root = self._root()
        self.graph: nx.DiGraph = nx.DiGraph()
        self.graph.add_node(root)
        self.parts: dict[fx.Node, frozenset[fx.Node]] = {root: frozenset([root])}
        """The values that a value is a sum of multiples of, whatever their shape; itself among them."""
        self.returns: dict[fx.Node, fx.Node] = {}
        """Sums that take up an earlier value of the stream once more (nanochat: the first, and one from the middle)."""
        for node in program.nodes():
            if isinstance(node.meta.get("val"), torch.SymInt | int | float):
                continue
            for operand in self._passed(node):
                if operand in self.graph:
                    self.graph.add_edge(operand, node)
            if node in self.graph:
                self.parts[node] = frozenset([node]).union(*(self.parts[each] for each in self._summed(node)))
        self.dominator = nx.immediate_dominators(self.graph, root)
        self.root = root
        # Heads may be tapped from the middle: the stream is the one that leads furthest.
        results = [node for node in program.output_node().all_input_nodes if node in self.graph]
        spines = [self._chain(result)[::-1] for result in results]
        self.spine = max(spines, key=lambda spine: sum(bool(self.sites(node)) for node in spine), default=[])

    def _passed(self, node: fx.Node) -> list[fx.Node]:
        """The operands through which the stream may pass."""
        # Which rows skip is decided from earlier values of the stream, which do not pass through what obeys.
        if node.target in (GATE, PREDICATED_LINEAR):
            return [node.args[0]]  # type: ignore[list-item]
        active = [each for each in node.args[:2] if isinstance(each, fx.Node) and each in self.graph]
        if node.target in SUMS and len(active) == 2:
            for operand, other in (active, active[::-1]):
                earlier = self._through(other)[0]
                if earlier in self.parts[operand]:
                    self.returns[node] = earlier
                    return [operand]
        return node.all_input_nodes

    def _summed(self, node: fx.Node) -> list[fx.Node]:
        """The operands that the node's value is a sum of multiples of."""
        active = [operand for operand in node.all_input_nodes if operand in self.graph]
        linear = node.target in (*SUMS, *COPIES, *RESHAPES) or (node.target in SCALINGS and len(active) == 1)
        return active if linear else []

    def _root(self) -> fx.Node:
        for role in (Role.TOKENS, Role.EMBEDDINGS):
            node = self.program.input(role)
            if node is not None:
                return node
        floating = [
            node
            for node in self.program.graph.nodes
            if node.op == "placeholder" and node.meta["val"].is_floating_point() and node.users
        ]
        if not floating:
            raise Unsupported("a residual stream in a program without a token, embedding or floating-point input")
        return floating[0]

    def _chain(self, node: fx.Node) -> list[fx.Node]:
        """`node`, its immediate dominator, and so on to the root."""
        chain = [node]
        while chain[-1] is not self.root:
            above = self.dominator[chain[-1]]
            if above is None or above is chain[-1]:
                break
            chain.append(above)
        return chain

    def dominates(self, above: fx.Node, below: fx.Node) -> bool:
        """Whether every path from the root to `below` passes `above`, another node."""
        return above is not below and below in self.graph and above in self._chain(below)

    def sites(self, add: fx.Node) -> list[tuple[fx.Node, fx.Node, fx.Node, Skip, bool]]:
        """The sublayers that this node of the spine writes: (add, stream, branch, skip, parallel)."""
        if add.target not in _ADDS or len(add.all_input_nodes) != 2 or add in self.returns or PARALLEL in add.meta:
            return []
        leaves = self._leaves(add, add)
        for split in ([*add.args[:2]], leaves) if len(leaves) > 2 else ([*add.args[:2]],):
            for candidate in split:
                sources = [_behind_casts(leaf) for leaf in split if leaf is not candidate]
                stream, skip = _behind_casts(candidate), Skip()
                if not all(self.dominates(stream, source) for source in sources):
                    stream, skip = self._through(candidate)  # type: ignore[arg-type]
                if stream is self.root or not all(self.dominates(stream, source) for source in sources):
                    continue
                sources = self._split(stream, sources)
                if not all(self._computes(stream, source) for source in sources):
                    continue
                return [(add, stream, source, skip, len(sources) > 1) for source in sources]
        return []

    def _split(self, stream: fx.Node, sources: list[fx.Node]) -> list[fx.Node]:
        """A single branch that is a sum of attention and something else is two sublayers side by side."""
        if len(sources) != 1:
            return sources
        leaves = [_behind_casts(leaf) for leaf in self._leaves(sources[0], sources[0])]
        attending = [self._attends(self._between(stream, leaf)) for leaf in leaves]
        return leaves if len(leaves) == 2 and sum(attending) == 1 else sources

    def _leaves(self, node: fx.Node, top: fx.Node) -> list[fx.Node]:
        """The operands of a tree of additions, in order; inner additions are used only by the tree."""
        inner = _behind_casts(node)
        if inner.target not in _ADDS or len(inner.all_input_nodes) != 2 or (node is not top and len(inner.users) > 1):
            return [node]
        if any(not isinstance(operand, fx.Node) or operand not in self.graph for operand in inner.args[:2]):
            return [node]
        return [leaf for operand in inner.args[:2] for leaf in self._leaves(operand, top)]  # type: ignore[arg-type]

    def _through(self, node: fx.Node) -> tuple[fx.Node, Skip]:
        """Look through casts and multiplications by what is no activation."""
        node = _behind_casts(node)
        if node.target is aten.mul.Tensor:
            active = [operand for operand in node.args[:2] if isinstance(operand, fx.Node) and operand in self.graph]
            if len(active) == 1:
                factor = next(operand for operand in node.args[:2] if operand is not active[0])
                return _behind_casts(active[0]), Skip(factor if isinstance(factor, fx.Node) else float(factor))  # type: ignore
        return node, Skip()

    def _computes(self, stream: fx.Node, branch: fx.Node) -> bool:
        return any(node.target in _PRODUCTS or node.target in ATTENTION_OPS for node in self._between(stream, branch))

    def _between(self, stream: fx.Node, branch: fx.Node) -> set[fx.Node]:
        """Activation nodes on paths from the stream value to the branch's result."""
        pending, found = [branch], set()
        while pending:
            node = pending.pop()
            if node is stream or node in found or not self.dominates(stream, node):
                continue
            found.add(node)
            pending += [operand for operand in node.all_input_nodes if operand in self.graph]
        return found

    def _attends(self, nodes: Iterable[fx.Node]) -> bool:
        """Whether the nodes hold an attention, recognised or not (a softmax over a symbolic number of keys)."""
        for node in nodes:
            if node.target in ATTENTION_OPS:
                return True
            if node.target in _SOFTMAX and isinstance(node.meta["val"].shape[-1], torch.SymInt):
                return True
        return False

    def sublayer(self, add: fx.Node, stream: fx.Node, branch: fx.Node, skip: Skip, parallel: bool) -> Sublayer:
        between = self._between(stream, branch)
        own = self._exclusive(between, branch)
        kind = SublayerKind.OTHER
        if self._attends(between):
            kind = SublayerKind.ATTENTION
        elif any(node.target in _PRODUCTS for node in between):
            kind = SublayerKind.FFN
        return Sublayer(
            index=-1,
            layer=-1,
            kind=kind,
            path=_path(own or between, kind),
            add=add,
            stream=stream,
            branch=branch,
            nodes=tuple(sorted(own, key=self.order.__getitem__)),
            parameters=_parameters(own),
            skip=skip,
            post_norm=self._normalised(add),
            parallel=parallel,
        )

    def _exclusive(self, between: set[fx.Node], branch: fx.Node) -> set[fx.Node]:
        """Those nodes whose every use stays inside the branch."""
        own = {branch}
        for node in sorted(between, key=self.order.__getitem__, reverse=True):
            if all(user in own for user in node.users):
                own.add(node)
        return own

    def _normalised(self, add: fx.Node) -> bool:
        """Post-norm: between this addition and the next of the spine the stream itself goes through a norm."""
        position = self.spine.index(add)
        for node in self.spine[position + 1 :]:
            if PARALLEL in node.meta:  # layers without a linear skip path do not run at the same time
                return False
            if found := self.sites(node):
                return add not in self.parts[found[0][1]]
        return False


def note_layers(program: Program) -> None:
    """Note on the nodes of every sublayer which layer they belong to, for passes that run after layers have gone."""
    try:
        stream = find_stream(program)
    except Unsupported:  # then layers cannot be named in a plan
        return
    program.layers = stream.layers
    for sublayer in stream.sublayers:
        for node in sublayer.nodes:
            node.meta["layer"] = sublayer.layer


def original_layers(program: Program, stream: ResidualStream) -> int:
    """How many layers the captured model has: the noted number, or that of the stream where none was noted."""
    return stream.layers if program.layers is None else program.layers


def original_layer(sublayer: Sublayer) -> int:
    """The layer of the captured model that a sublayer came from: the noted one, or its own where none was noted."""
    noted = (node.meta["layer"] for node in sublayer.nodes if "layer" in node.meta)
    return next(noted, sublayer.layer)


def _behind_casts(node: Any) -> Any:
    while isinstance(node, fx.Node) and node.target in _CASTS:
        node = node.args[0]
    return node


def _path(nodes: set[fx.Node], kind: SublayerKind) -> str:
    """The attention's own module, or the module that holds all of a branch's products."""
    attention = [module_path(node) for node in nodes if node.target in ATTENTION_OPS]
    if kind is SublayerKind.ATTENTION and attention:
        return attention[0]
    paths = [module_path(node) for node in nodes if node.target in _PRODUCTS] or [module_path(n) for n in nodes]
    parts = [path.split(".") for path in paths if path]
    return ".".join(_common_prefix(parts))


def _common_prefix(parts: list[list[str]]) -> list[str]:
    """The elements that all lists start with."""
    return [column[0] for column in takewhile(lambda column: len(set(column)) == 1, zip(*parts, strict=False))]


def _parameters(nodes: set[fx.Node]) -> tuple[str, ...]:
    """Tensors that are read by these nodes and by no others."""
    found: dict[str, None] = {}
    for node in nodes:
        for operand in node.all_input_nodes:
            if operand.op == "get_attr" and all(user in nodes for user in operand.users):
                found[str(operand.target)] = None
    return tuple(sorted(found))


def _number(sublayers: list[Sublayer]) -> list[Sublayer]:
    """Number sublayers and layers: a layer ends where a kind would repeat, but cross attention joins its layer."""
    numbered: list[Sublayer] = []
    layer, kinds = 0, set[SublayerKind]()
    for index, sublayer in enumerate(sublayers):
        joins = sublayer.parallel and numbered and numbered[-1].add is sublayer.add
        repeats = sublayer.kind in kinds or (sublayer.kind is SublayerKind.ATTENTION and SublayerKind.FFN in kinds)
        if kinds and repeats and not joins and not _is_cross(sublayer):
            layer, kinds = layer + 1, set()
        kinds.add(sublayer.kind)
        numbered.append(replace(sublayer, index=index, layer=layer))
    return numbered


def _is_cross(sublayer: Sublayer) -> bool:
    attentions = [node for node in sublayer.nodes if node.target in ATTENTION_OPS]
    return bool(attentions) and all(node.kwargs.get("slot", -1) == -1 for node in attentions)
