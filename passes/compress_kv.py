"""Keep of some heads no more keys and values than those of the newest tokens and of the first ones."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from skipstone.ir.dialect import CACHED_ATTENTION, WINDOWED_ATTENTION, Kind, key_bias_of
from skipstone.ir.errors import InternalError, InvalidPlan, Unsupported
from skipstone.ir.program import ATTENTIONS, Port, Program, Role, provenance
from skipstone.ir.statistics import sites
from skipstone.ir.windowed import window_rows
from skipstone.passes.base import Pass, Remark
from skipstone.passes.kv_cache import check_slots, count_input, drop_slot
from skipstone.passes.split_heads import HEADS, SplitHeads, heads_of


@dataclass(frozen=True)
class StreamingHeads:
    """Heads of a layer that need the newest and the first tokens alone.

    Attributes:
        layer: layer of the model.
        heads: its key-value heads.
    """

    layer: int
    heads: tuple[int, ...]


@dataclass(frozen=True)
class CompressKV(Pass):
    """Give attentions that see a window of tokens a cache of that size, and let some see no more than a window.

    What an attention with a window of its own (sliding attention) never reads again is not kept: that is exact. Other
    heads become streaming heads (arXiv 2309.17453, 2410.10819): each token sees the first `sinks` tokens and the newest
    `window` ones, itself included, at the positions where they stand. This changes what the model computes as soon as
    a sequence is longer; token by token or all at once, it is the same.

    Attributes:
        window: the newest tokens that streaming heads see; None leaves all heads as they are.
        sinks: the first tokens of a sequence that they see besides (attention sinks).
        streaming: which heads these are; None for all that have no window of their own.
        layers: layers to compress; None for all.
    """

    name: ClassVar[str] = "compress_kv"

    window: int | None = None
    sinks: int = 4
    streaming: tuple[StreamingHeads, ...] | None = None
    layers: tuple[int, ...] | None = None

    def validate(self) -> None:
        """Refuse settings that fit no model.

        Raises:
            InvalidPlan: a number is too small, or heads are named that nothing is to be done with.
        """
        if self.window is not None and self.window < 1:
            raise InvalidPlan(f"{self.name}: window is {self.window}, expected 1 or more.")
        if self.sinks < 0:
            raise InvalidPlan(f"{self.name}: sinks is {self.sinks}, expected 0 or more.")
        if self.streaming is None:
            return
        if self.window is None:
            hint = "Say how many of the newest tokens they see, e.g. window=256."
            raise InvalidPlan(f"{self.name}: streaming heads without a window.", hint=hint)
        named = [each.layer for each in self.streaming]
        for layer in named:
            if named.count(layer) > 1:
                raise InvalidPlan(f"{self.name}: layer {layer} stands twice in streaming.", hint="Name it once.")
            if self.layers is not None and layer not in self.layers:
                hint = "Leave layers out, or name it there."
                raise InvalidPlan(f"{self.name}: layer {layer} has streaming heads, but is not in layers.", hint=hint)
        if any(not each.heads or min(each.heads) < 0 for each in self.streaming):
            raise InvalidPlan(f"{self.name}: streaming heads of a layer are numbers from 0 on, one at least.")

    def split(self, program: Program) -> SplitHeads | None:
        """The pass that has to run before there are cache slots, where heads of one attention differ.

        Raises:
            InvalidPlan: a layer or a head that the model does not have.
        """
        self._check_heads(program)
        groups = []
        for node in sites(program):
            chosen, own = self._streaming(node), heads_of(node)
            parts = [
                tuple(place for place, head in enumerate(own) if (head in chosen) == streams)
                for streams in (True, False)
            ]
            if all(parts):
                groups.append((node.kwargs["slot"], tuple(parts)))
        return SplitHeads(tuple(groups)) if groups else None  # type: ignore[arg-type]

    def _check_heads(self, program: Program) -> None:
        known: dict[Any, set[int]] = {}
        for node in sites(program):
            known.setdefault(node.meta.get("layer"), set()).update(heads_of(node))
        numbers = [layer for layer in known if layer is not None]
        for layer in (*(self.layers or ()), *(each.layer for each in self.streaming or ())):
            if layer not in known:
                hint = f"The nearest is {min(numbers, key=lambda n: abs(n - layer))}." if numbers else ""
                raise InvalidPlan(f"{self.name}: layer {layer} has no cached attention.", hint=hint)
        for each in self.streaming or ():
            if unknown := set(each.heads) - known[each.layer]:
                hint = f"The last one is {max(known[each.layer])}."
                problem = f"{self.name}: there is no key-value head {min(unknown)} in layer {each.layer}."
                raise InvalidPlan(problem, hint=hint)

    def _streaming(self, node: fx.Node) -> frozenset[int]:
        """The heads of an attention, as the model numbers them, that are to see a window they do not have."""
        if self.window is None or not self._is_chosen(node) or node.kwargs["kind"] != Kind.CAUSAL:
            return frozenset()
        own = heads_of(node)
        if self.streaming is None:
            return frozenset(own)
        layer = node.meta.get("layer")
        named = (head for each in self.streaming if each.layer == layer for head in each.heads)
        return frozenset(named).intersection(own)

    def _is_chosen(self, node: fx.Node) -> bool:
        return self.layers is None or node.meta.get("layer") in self.layers

    def _kept(self, node: fx.Node) -> tuple[int, int] | None:
        """How many of the newest and of the first tokens an attention sees; None for all of them."""
        if node.kwargs["kind"] == Kind.SLIDING and self._is_chosen(node):
            return int(node.kwargs["window"]), 0  # type: ignore[arg-type]
        streaming = self._streaming(node)
        if not streaming or self.window is None:
            return None
        if streaming != frozenset(heads_of(node)):
            raise InternalError(f"{node.name} has heads that see a window beside others")
        return self.window, self.sinks

    def check(self, program: Program) -> None:
        """See `Pass.check`."""
        self.validate()
        check_slots(program, self.name)
        for node, site in sites(program).items():
            if (self.layers or self.streaming) and len(node.meta.get(ATTENTIONS, ())) > 1:
                feature = f"{self.name} of some heads or layers where attentions of several layers are one"
                raise Unsupported(feature, where=site, hint="Compress all of them, or leave fuse_parallel out.")
        self._check_heads(program)

    def rewrite(self, program: Program) -> list[Remark]:
        """See `Pass.rewrite`."""
        remarks = []
        for node, site in self._sites(program):
            kept = self._kept(node)
            if kept is None:
                continue
            if reason := _refusal(node):
                remarks.append(self.refused(site, reason))
                continue
            call = self._compress(program, node, *kept)
            drop_slot(program, node)
            rows = window_rows(*kept)
            what = f"the newest {kept[0]} tokens" + (f" and the first {kept[1]}" if kept[1] else "")
            heads = f"of heads {', '.join(map(str, call.meta[HEADS]))} " if HEADS in call.meta else ""
            why = "" if node.kwargs["kind"] == Kind.CAUSAL else ", which is all that they see"
            remarks.append(self.applied(site, f"{heads}{what} are kept{why}", cache_rows=rows))
        return remarks or [self.missed("model", "no attention sees a window of tokens, and none is to")]

    def _sites(self, program: Program) -> Iterator[tuple[fx.Node, str]]:
        return ((node, site) for node, site in sites(program).items() if node.target == CACHED_ATTENTION)

    def _compress(self, program: Program, node: fx.Node, window: int, first: int) -> fx.Node:
        """Put the windowed form of `node` in its place; the node itself is left over."""
        slot: Any = node.kwargs["slot"]
        q, k, v, *old, start, _, sinks = (*node.args, None, None)[:8]
        with provenance(program, self.name, like=node), program.graph.inserting_before(node):
            ports, buffers = [], []
            for which, role, held in zip(("key", "value"), (Role.CACHE_KEY, Role.CACHE_VALUE), old, strict=True):
                fake = held.meta["val"]  # type: ignore[union-attr]
                shape = (*fake.shape[:2], window_rows(window, first), fake.shape[3])
                ports.append(Port(f"{which}_{slot}", role, slot))
                buffers.append(program.add_input(ports[-1], fake.new_empty(shape)))
            options: dict[str, Any] = {name: node.kwargs[name] for name in ("scale", "softcap") if name in node.kwargs}
            options |= {"window": window, "first": first, "slot": slot}
            operands = (q, k, v, *buffers, start, count_input(program), sinks)
            call = program.call(WINDOWED_ATTENTION, *operands, **options)
            out, *written = (program.call(operator.getitem, call, index) for index in range(3))
        next(user for user in node.users if user.args[1] == 0).replace_all_uses_with(out)
        for port, result in zip(ports, written, strict=True):
            program.add_output(Port(f"new_{port.name}", port.role, port.slot, port.part), result)
        return call

    def ensures(self, program: Program) -> None:
        """See `Pass.ensures`."""
        for node, site in self._sites(program):
            if self._kept(node) is not None and not _refusal(node):
                raise InternalError(f"the attention at {site} is not compressed")


def _refusal(node: fx.Node) -> str:
    """Why an attention keeps all its keys and values, "" if it need not."""
    if key_bias_of(node) is not None:
        return "its keys are kept without their bias, which quantize_kv(condition=True) splits off"
    if len(node.args) > 6 and node.args[6] is not None:
        return "it adds a bias to its logits, for all columns of the cache"
    return ""
