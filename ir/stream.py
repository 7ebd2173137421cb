"""The residual stream: layers and sublayers, found from the graph alone.

A sublayer is ``stream' = skip(stream) + branch(stream)``. Everything that reaches the output passes through each value
of the stream, so the stream's additions are exactly the additions that dominate the output and of which one operand
dominates the others, or is a multiple of what does. In hyper-connections that multiple is a matrix over several
streams: the branch reads a mixture of them, and its result is spread over them. Dominators are those of the activation
graph: what depends on the tokens (or embeddings).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import takewhile

import torch
from torch import fx

from skipstone.ir.activations import Activations, behind_casts, lookups
from skipstone.ir.dialect import ATTENTION_OPS, EXPERTS, MATMUL_NBITS, PREDICATED_LINEAR
from skipstone.ir.errors import Unsupported
from skipstone.ir.program import Program, module_path
from skipstone.ir.surrogate import COPIES, PRODUCTS, RESHAPES, SCALINGS, SUMS, Coefficient, SkipPath, linear_way

aten = torch.ops.aten

_ADDS = (aten.add.Tensor, operator.add)
_PRODUCTS = (
    aten.linear.default, aten.matmul.default, aten.mm.default, aten.bmm.default, aten.addmm.default,
    aten.baddbmm.default, aten.conv1d.default, aten.convolution.default, aten.einsum.default, EXPERTS,
    PREDICATED_LINEAR, MATMUL_NBITS,
)  # fmt: skip
_SPREADS = (*SCALINGS, *PRODUCTS, *RESHAPES, *COPIES, aten.expand.default)
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
        skip: the linear path past the branch; without the branch, it is what leads from `stream` to the next sublayer.
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
    skip: SkipPath
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
    # What else is made of the tokens (embeddings that layers add to values, experts chosen by token) reaches the output
    # beside the stream: of all values that are looked up, the stream begins with the one that leads furthest.
    starts: Sequence[fx.Node | None] = lookups(program) or [None]
    finders = [_Finder(program, start) for start in starts]
    finder = max(finders, key=lambda each: len(each.found(each.spine)))
    found = finder.found(finder.spine)
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


class _Finder(Activations):
    """Finds the sublayers of a program."""

    def __init__(self, program: Program, lookup: fx.Node | None) -> None:
        super().__init__(program, lookup)
        # Heads may be tapped from the middle: the stream is the one that leads furthest.
        results = [node for node in program.output_node().all_input_nodes if node in self.graph]
        spines = [self.chain(result)[::-1] for result in results]
        self.spine = max(spines, key=lambda spine: len(self.found(spine)), default=[])

    def found(self, spine: Iterable[fx.Node]) -> list[tuple[fx.Node, fx.Node, fx.Node, SkipPath, bool]]:
        """The sublayers that the nodes of a spine write; see `sites`."""
        return [site for node in spine for site in self.sites(node)]

    def sites(self, add: fx.Node) -> list[tuple[fx.Node, fx.Node, fx.Node, SkipPath, bool]]:
        """The sublayers that this node of the spine writes: (add, stream, branch, skip, parallel)."""
        if add.target not in _ADDS or len(add.all_input_nodes) != 2 or add in self.returns or PARALLEL in add.meta:
            return []
        leaves = self._leaves(add, add)
        for split in ([*add.args[:2]], leaves) if len(leaves) > 2 else ([*add.args[:2]],):
            for candidate in split:
                sources = [behind_casts(leaf) for leaf in split if leaf is not candidate]
                stream = behind_casts(candidate)
                if not all(self.dominates(stream, source) for source in sources):
                    stream = behind_casts(self.dominator[add])
                if not all(self.dominates(stream, source) for source in sources):
                    continue
                skip = self._skip(stream, candidate)  # type: ignore[arg-type]
                if skip is None:
                    continue
                sources = self._split(stream, sources)
                if not all(self._computes(stream, source) for source in sources):
                    continue
                return [(add, stream, source, skip, len(sources) > 1) for source in sources]
        return []

    def _skip(self, stream: fx.Node, value: fx.Node) -> SkipPath | None:
        """How a value is a multiple of the stream, if it is that and nothing else."""
        path = linear_way(stream, self.between(stream, value))
        if path is None or path.coefficient is Coefficient.UNKNOWN:
            return None
        carrying = {stream, *path.nodes}
        pure = all(carrying.issuperset(node.args[:2]) for node in path.nodes if node.target in SUMS)
        return path if pure else None

    def _split(self, stream: fx.Node, sources: list[fx.Node]) -> list[fx.Node]:
        """A single branch that is a sum of attention and something else is two sublayers side by side."""
        if len(sources) != 1:
            return sources
        leaves = [behind_casts(leaf) for leaf in self._leaves(sources[0], sources[0])]
        attending = [self._attends(self.between(stream, leaf)) for leaf in leaves]
        return leaves if len(leaves) == 2 and sum(attending) == 1 else sources

    def _leaves(self, node: fx.Node, top: fx.Node) -> list[fx.Node]:
        """The operands of a tree of additions, in order; inner additions are used only by the tree."""
        inner = behind_casts(node)
        if inner.target not in _ADDS or len(inner.all_input_nodes) != 2 or (node is not top and len(inner.users) > 1):
            return [node]
        if any(not isinstance(operand, fx.Node) or operand not in self.graph for operand in inner.args[:2]):
            return [node]
        return [leaf for operand in inner.args[:2] for leaf in self._leaves(operand, top)]  # type: ignore[arg-type]

    def _computes(self, stream: fx.Node, branch: fx.Node) -> bool:
        return any(node.target in _PRODUCTS or node.target in ATTENTION_OPS for node in self.between(stream, branch))

    def _attends(self, nodes: Iterable[fx.Node]) -> bool:
        """Whether the nodes hold an attention, recognised or not (a softmax over a symbolic number of keys)."""
        for node in nodes:
            if node.target in ATTENTION_OPS:
                return True
            if node.target in _SOFTMAX and isinstance(node.meta["val"].shape[-1], torch.SymInt):
                return True
        return False

    def _inner(self, stream: fx.Node, branch: fx.Node) -> list[fx.Node]:
        """The nodes of a branch; over several streams, those behind their mixture and before its result is spread."""
        result = branch
        while _size(result) >= _size(stream):
            active = [each for each in result.all_input_nodes if each in self.graph and _width(each) == _width(stream)]
            if result.target not in _SPREADS or len(active) != 1:
                return self.between(stream, branch)
            (result,) = active
        if not self.dominates(stream, result):
            return self.between(stream, branch)
        chain = self.chain(result)
        mixture = next(each for each in reversed(chain[: chain.index(stream)]) if _size(each) < _size(stream))
        return self.between(mixture, result)

    def sublayer(self, add: fx.Node, stream: fx.Node, branch: fx.Node, skip: SkipPath, parallel: bool) -> Sublayer:
        between, inner = self.between(stream, branch), self._inner(stream, branch)
        own = _exclusive(between)
        kind = SublayerKind.OTHER
        if self._attends(inner):
            kind = SublayerKind.ATTENTION
        elif any(node.target in _PRODUCTS for node in inner):
            kind = SublayerKind.FFN
        return Sublayer(
            index=-1,
            layer=-1,
            kind=kind,
            path=_path(own.intersection(inner) or own, kind),
            add=add,
            stream=stream,
            branch=branch,
            nodes=tuple(each for each in between if each in own),
            parameters=_parameters(own),
            skip=skip,
            post_norm=self._normalised(add),
            parallel=parallel,
        )

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


def _exclusive(between: Sequence[fx.Node]) -> set[fx.Node]:
    """Those nodes of a branch, its result last, whose every use stays inside it."""
    own = {between[-1]}
    for node in reversed(between):
        if own.issuperset(node.users):
            own.add(node)
    return own


def _size(node: fx.Node) -> float:
    """How many elements a token has in a value: the product of the fixed sizes."""
    value = node.meta["val"]
    if not isinstance(value, torch.Tensor):
        return math.inf
    return math.prod(size for size in value.shape if isinstance(size, int))


def _width(node: fx.Node) -> int:
    """The size of a value's last dimension."""
    value = node.meta["val"]
    return value.shape[-1] if isinstance(value, torch.Tensor) and value.ndim else 1


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
