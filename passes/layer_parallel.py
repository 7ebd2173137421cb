"""Run layers at the same time: all read a guess of the stream, which is corrected along the layers' linear skip paths.

The states h_0, ..., h_N before and behind N layers solve ``h_l = f_l(h_{l-1})``. Each iteration evaluates all layers on
the states of the iteration before (at first h_0 everywhere) and corrects them by a structured Newton step:

    h_l' = f_l(h_{l-1}) + A_l (h_{l-1}' - h_{l-1}),    h_0' = h_0

with A_l the linear skip path of the layer, `skipstone.ir.surrogate`. After k iterations h_1, ..., h_k are exact
whatever A_l is, so N iterations are the model itself. SNLP (arXiv 2605.17842).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from typing import Any, ClassVar, Literal, NoReturn

import torch
from torch import fx

from skipstone.ir.dialect import ATTENTION, GATE, KEEP
from skipstone.ir.errors import InternalError, InvalidPlan, Unsupported
from skipstone.ir.gates import spared
from skipstone.ir.lanes import LANE, START, STATE, GroupName, Place, State
from skipstone.ir.program import ATTENTIONS, Program, module_path, provenance
from skipstone.ir.regions import Region, behind, cut
from skipstone.ir.stream import PARALLEL, Sublayer, SublayerKind, find_stream, original_layer, original_layers
from skipstone.ir.surrogate import COPIES, PRODUCTS, SUMS, Coefficient, SkipPath
from skipstone.passes.base import Pass, Remark
from skipstone.passes.kv_cache import number_apart

aten = torch.ops.aten

Unit = Literal["layer", "sublayer", "two_stage"]
Surrogate = Literal["auto", "at_iterate", "identity", "zero"]
Policy = Literal["iterate", "last", "final"]

_HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Segment:
    """Consecutive layers that run at the same time.

    Attributes:
        start, stop: the first of the layers, and the one behind the last.
        iterations: Newton steps; as many as there are units is exact.
        unit: what runs at the same time. "layer": whole layers. "sublayer": all attentions and all FFNs. "two_stage":
            all attentions, and behind the sum of their results all FFNs, in one iteration.
        surrogate: what stands for the Jacobian of a unit. "auto": its linear skip path, as the graph has it; over the
            streams of hyper-connections that is a matrix (HCN). "at_iterate": the same where a factor of that path is a
            function of the stream (a gate, mixing matrices that each token makes for itself); the function's value in
            the iteration is taken for a constant. "identity": one, also where the skip path scales or mixes. "zero":
            nothing, which is Jacobi's iteration.
        tolerance: from the third iteration on, a token goes without whose last state changed in the iteration before by
            at most this share of its size; what none of the tokens needs is not computed. 0 for all iterations.
    """

    start: int
    stop: int
    iterations: int = 1
    unit: Unit = "layer"
    surrogate: Surrogate = "auto"
    tolerance: float = 0.0

    def __str__(self) -> str:
        return f"layer {self.start}" if self.stop == self.start + 1 else f"layers {self.start} to {self.stop - 1}"

    def validate(self) -> None:
        """Refuse a segment that no model has.

        Raises:
            InvalidPlan: it is empty, or has too few or too many iterations.
        """
        if not 0 <= self.start < self.stop:
            problem = f"layer_parallel: a segment from {self.start} to {self.stop} holds no layer."
            raise InvalidPlan(problem, hint="'stop' is the layer behind the last one.")
        if self.iterations < 1:
            problem = f"layer_parallel: {self} with {self.iterations} iterations."
            raise InvalidPlan(problem, hint="The nearest is 1.")
        if not 0 <= self.tolerance < math.inf:
            raise InvalidPlan(f"layer_parallel: {self} with the tolerance {self.tolerance}.", hint="The nearest is 0.")
        if self.tolerance and self.iterations < 3:
            problem = f"layer_parallel: {self} with a tolerance and {self.iterations} iterations."
            raise InvalidPlan(problem, hint="It takes the third and later ones away: set 'iterations' to 3 or more.")
        if self.unit == "layer":
            self.limit(self.stop - self.start, "layers")
        if self.unit == "two_stage":
            self.limit(1, "iteration of the unit 'two_stage'")
            if self.surrogate == "zero":
                problem = f"layer_parallel: {self} in two stages with the surrogate 'zero'."
                raise InvalidPlan(problem, hint="Two stages sum all results: take 'auto'.")

    def limit(self, most: int, of: str) -> None:
        """Refuse more iterations than can change anything.

        Raises:
            InvalidPlan: there are more.
        """
        if self.iterations > most:
            problem = f"layer_parallel: {self} with {self.iterations} iterations, for {most} {of}."
            raise InvalidPlan(problem, hint=f"The nearest is {most}.")


@dataclass(frozen=True)
class _State:
    """One state of the stream: as layers read it, and in the dtype that corrections are summed in, float32 or wider."""

    value: fx.Node
    wide: fx.Node


@dataclass(frozen=True)
class LayerParallel(Pass):
    """Run the layers of each segment at the same time. It changes results, unless every layer has its own iteration.

    The graph holds a copy of a layer's operators for each iteration that matters. Iteration k cannot change what lies
    before layer k, and in the iterations left only so many layers at the end can still be reached: K iterations of N
    layers are ``K (N - K + 1)`` evaluations, and N iterations the model's own graph. States that are read elsewhere
    (returned, probed, taken back at the end of the model) are those of the last iteration.

    A segment of the first layers begins at the first value of the residual stream (`ResidualStream.entry`).

    Attributes:
        segments: in the order of the model's layers, without overlap.
        kv: which keys and values stay in the cache for later steps. "iterate": those of each iteration, in slots of
            their own, so that decoding token by token equals reading all at once. "last": those of the last iteration
            that evaluates a layer, which all its iterations read; "final": those of the corrected state before a layer,
            which are computed once more. With one slot a layer, what is read in one step is computed in another way
            than what is read in several, except where every layer has its own iteration. Without a cache, this means
            nothing.
    """

    name: ClassVar[str] = "layer_parallel"

    segments: tuple[Segment, ...] = ()
    kv: Policy = "iterate"

    def validate(self) -> None:
        """Refuse settings that fit no model.

        Raises:
            InvalidPlan: no segment, one that no model has, segments that overlap or stand out of order, or corrected
                states where there are none.
        """
        if not self.segments:
            raise InvalidPlan("layer_parallel without a segment.", hint="Write LayerParallel((Segment(2, 4),)).")
        for segment in self.segments:
            segment.validate()
        for first, second in pairwise(self.segments):
            if second.start < first.stop:
                problem = f"layer_parallel: {second} stand behind {first} in the plan."
                raise InvalidPlan(problem, hint="Segments follow each other without overlap.")
        staged = [segment for segment in self.segments if segment.unit == "two_stage"]
        if staged and self.kv == "final":
            problem = f"layer_parallel: {staged[0]} in two stages with kv='final': no layer's state is corrected."
            raise InvalidPlan(problem, hint="Take kv='iterate'; of one iteration, it is one slot a layer.")

    def check(self, program: Program) -> None:
        """See `Pass.check`."""
        self.validate()
        if program.slots():
            raise InternalError("layer_parallel runs before there are cache slots")
        for segment in self.segments:
            _stages(program, segment)

    def rewrite(self, program: Program) -> list[Remark]:
        """See `Pass.rewrite`."""
        # All is read off the graph before it changes. From the back: a segment begins at a state of the one before.
        found = [(segment, _stages(program, segment)) for segment in self.segments]
        ends = [self._run(program, segment, stages) for segment, stages in reversed(found)][::-1]
        program.recompile()
        if self.kv == "iterate":
            number_apart(program)
        alive = set(program.graph.nodes)
        return [
            self._remark(segment, stages, sum(end in alive for end in evaluated))
            for (segment, stages), evaluated in zip(found, ends, strict=True)
        ]

    def _remark(self, segment: Segment, stages: Sequence[Sequence[Region]], evaluations: int) -> Remark:
        units = sum(map(len, stages))
        path = _surrogate(segment, [region.skip for stage in stages for region in stage])
        unit = {"layer": "layer", "sublayer": "sublayer", "two_stage": "sublayer in two stages"}[segment.unit]
        most = f"at most {segment.iterations}" if segment.tolerance else str(segment.iterations)
        why = f"{units} x {unit}, iterations {most}, surrogate {path}, {evaluations} evaluations"
        depth = segment.iterations * len(stages)
        return self.applied(str(segment), why, units=units, depth=depth, evaluations=evaluations)

    def _run(self, program: Program, segment: Segment, stages: Sequence[Sequence[Region]]) -> list[fx.Node]:
        """Put the iterations of a segment in the place of its layers; the results of all evaluations, dead ones too."""
        first, last = stages[0][0], stages[-1][-1]
        inside = {node for stage in stages for region in stage for node in region.nodes}
        for region in (region for stage in stages for region in stage):
            _reshape_apart(program, region, inside)
        late = _readers(first, last, inside)
        evaluated: list[fx.Node] = []
        with provenance(program, self.name, like=last.exit), program.graph.inserting_before(last.exit.next):
            start = _State(first.entry, _wide(program, first.entry))
            for number, stage in enumerate(stages):
                trace = _iterate(program, stage, start, segment, number, evaluated)
                if self.kv == "final":
                    trace[-1] = _kept_anew(program, stage, start, trace, segment.iterations)
                start = trace[-1]
                if len(stages) == 1:
                    for region, state in zip(stage, trace, strict=True):
                        _replace(region.exit, state.value, inside)
            _replace(last.exit, start.value, inside)
        place = start.value
        for node in late:
            place.append(node)
            place = node
        return evaluated

    def ensures(self, program: Program) -> None:
        """See `Pass.ensures`."""
        if not any(PARALLEL in node.meta for node in program.nodes()):
            raise InternalError("no layer runs in parallel")


# What runs at the same time


def _stages(program: Program, segment: Segment) -> tuple[tuple[Region, ...], ...]:
    """The units of a segment, for each stage that runs behind another.

    Raises:
        InvalidPlan: the model has no such layers, or not as many units as iterations.
        Unsupported: the units are not functions of the residual stream with a linear skip path.
    """
    stream = find_stream(program)
    layers = original_layers(program, stream)
    if segment.stop > layers:
        problem = f"layer_parallel: {segment}, but the model has layers 0 to {layers - 1}."
        raise InvalidPlan(problem, hint=f"The nearest 'stop' is {layers}.")
    groups = []
    for layer in range(segment.start, segment.stop):
        own = [each for each in stream.sublayers if original_layer(each) == layer]
        if not own:
            problem = f"layer_parallel: layer {layer} of {segment} is skipped by the plan."
            raise InvalidPlan(problem, hint="End the segment before it, and begin another behind it.")
        groups.append(own)
    before = groups[0][0].index - 1
    entry = stream.entry if before < 0 else behind(stream.sublayers[before].add, stream.entry)
    at_iterate = segment.surrogate == "at_iterate"
    if segment.tolerance and entry.meta["val"].ndim != 3:
        feature = f"layer_parallel with a tolerance, of states that are no rows of tokens ({entry.name})"
        raise Unsupported(feature, where=groups[0][0].path, hint="Leave out 'tolerance'.")
    if segment.unit == "layer":
        return (cut(program, groups, entry, at_iterate),)
    regions = cut(program, [part for group in groups for part in _by_addition(group)], entry, at_iterate)
    for region in regions:
        if not region.skip.is_identity:
            what = "streams that are mixed" if region.skip.kind == "mixing" else "a scaled residual stream"
            _refuse_unit(segment, region.sublayers[0], what)
    segment.limit(len(regions), "sublayers")
    if segment.unit == "sublayer":
        return (regions,)
    for group in groups:
        if [each.kind for each in group] != [SublayerKind.ATTENTION, SublayerKind.FFN] or group[0].parallel:
            _refuse_unit(segment, group[0], "a layer that is not attention, then FFN")
    _refuse_readers(segment, regions)
    return regions[::2], regions[1::2]


def _by_addition(sublayers: Sequence[Sublayer]) -> list[list[Sublayer]]:
    """Sublayers that one addition adds to the stream (GPT-J, NeoX, Phi) are one unit."""
    parts: dict[fx.Node, list[Sublayer]] = {}
    for each in sublayers:
        parts.setdefault(each.add, []).append(each)
    return list(parts.values())


def _surrogate(segment: Segment, paths: Sequence[SkipPath]) -> str:
    """What stands for the Jacobians of a segment, in words: that of the unit in which it is most."""
    if segment.surrogate in ("identity", "zero"):
        return segment.surrogate
    kinds = {path.kind for path in paths}
    kind = next(each for each in ("mixing", "scale", "identity") if each in kinds)
    depends = any(path.coefficient is Coefficient.DEPENDENT for path in paths)
    return f"{kind} at the iterate" if depends else kind


def _refuse_unit(segment: Segment, sublayer: Sublayer, what: str) -> NoReturn:
    feature = f"layer_parallel with the unit {segment.unit!r} and {what}"
    raise Unsupported(feature, where=sublayer.path, hint="Take the unit 'layer'.")


def _refuse_readers(segment: Segment, regions: Sequence[Region]) -> None:
    """Two stages have no state behind a single layer that another operator could read."""
    for region, following in pairwise(regions):
        states = (region.exit, *following.reshaped)
        if any(user not in following.nodes for state in states for user in state.users):
            _refuse_unit(segment, region.sublayers[0], "a state inside the segment that is read elsewhere")


# The iterations


def _iterate(
    program: Program, regions: Sequence[Region], start: _State, segment: Segment, stage: int, evaluated: list[fx.Node]
) -> list[_State]:
    """The states behind each region after all iterations; `evaluated` gets the results of the regions themselves."""
    before = [start] * (len(regions) + 1)
    corrections = {"identity": "identity", "zero": "none"}
    previous, settled = before, None
    for iteration in range(segment.iterations):
        correction: Any = corrections.get(segment.surrogate, "path")
        group = GroupName(segment.start, segment.stop, stage, iteration, correction)
        if iteration:
            before[iteration].wide.meta[START] = group
        if segment.tolerance and iteration > 1:  # before all that it spares
            settled = _settled(program, segment.tolerance, before[-1], previous[-1], settled)
        after = list(before)  # the first `iteration` states are final
        for number in range(iteration, len(regions)):
            region = regions[number]
            copies = _evaluate(program, region, before[number].value)
            _note_lane(group, number, region, copies)
            result = copies[region.exit]
            evaluated.append(result)
            after[number + 1] = _State(result, _wide(program, result))
            # Behind a final state there is nothing to correct. Left out, it is exactly nothing: results are bitwise
            # those of the model.
            if segment.surrogate != "zero" and after[number] is not before[number]:
                change = program.call(aten.sub.Tensor, after[number].wide, before[number].wide)
                if segment.surrogate in ("auto", "at_iterate"):
                    change = _along(program, region.skip, change, copies)
                wide = program.call(aten.add.Tensor, after[number + 1].wide, change)
                wide.meta[PARALLEL] = ()
                after[number + 1] = _State(_cast(program, wide, result.meta["val"].dtype), wide)
            for state in (after[number + 1].value, after[number + 1].wide):
                state.meta[STATE] = State(group, number)
        if settled is not None:
            after[iteration + 1 :] = _kept(program, settled, before[iteration + 1 :], after[iteration + 1 :])
        previous, before = before, after
    return before[1:]


def _settled(program: Program, tolerance: float, new: _State, old: _State, before: fx.Node | None) -> fx.Node:
    """bool [B, S]: the tokens whose last state hardly changed in an iteration, this one or an earlier one."""
    change = program.call(aten.sub.Tensor, new.wide, old.wide)
    size, step = (program.call(aten.linalg_vector_norm.default, each, 2, [-1]) for each in (new.wide, change))
    reached = program.call(aten.le.Tensor, step, program.call(aten.mul.Tensor, size, tolerance))
    return reached if before is None else program.call(aten.bitwise_or.Tensor, reached, before)


def _kept(program: Program, settled: fx.Node, before: Sequence[_State], after: Sequence[_State]) -> list[_State]:
    """States that stay what they were where tokens have settled. One gate spares all that the new ones need."""
    old, new = (
        program.call(aten.cat.default, [state.wide for state in states], -1) if len(states) > 1 else states[0].wide
        for states in (before, after)
    )
    gated = program.call(GATE, new, settled)
    for node in spared(gated):
        gated.prepend(node)  # parts of the states before may stand before the decision
    whole = program.call(aten.where.self, program.call(aten.unsqueeze.default, settled, -1), old, gated)
    kept, width = [], int(after[0].wide.meta["val"].shape[-1])
    for number, state in enumerate(after):
        wide = whole
        if len(after) > 1:
            wide = program.call(aten.slice.Tensor, whole, -1, number * width, (number + 1) * width)
        kept.append(_State(_cast(program, wide, state.value.meta["val"].dtype), wide))
    return kept


def _kept_anew(
    program: Program, regions: Sequence[Region], start: _State, trace: Sequence[_State], iterations: int
) -> _State:
    """The last state, behind which the keys and values of the corrected states stay in the cache.

    The first layers read their final states in one of the iterations already.
    """
    kept = trace[-1].value
    for region, state in list(zip(regions, (start, *trace), strict=False))[iterations:]:
        copies = _evaluate(program, region, state.value)
        behind_attention: set[fx.Node] = set()
        for node in region.nodes:
            if node.target == ATTENTION:
                if not behind_attention.isdisjoint(node.args[1:3]):  # type: ignore[arg-type]
                    feature = "layer_parallel with kv='final' of keys that another attention of the layer makes"
                    raise Unsupported(feature, where=module_path(node), hint="Take kv='iterate' or kv='last'.")
                k, v = fx.map_arg(node.args[1:3], lambda operand, copies=copies: copies.get(operand, operand))  # type: ignore[misc]
                kept = program.call(KEEP, kept, k, v, slot=node.kwargs["slot"])
            if node.target == ATTENTION or not behind_attention.isdisjoint(node.all_input_nodes):
                behind_attention.add(node)
    return _State(kept, trace[-1].wide)


def _evaluate(program: Program, region: Region, entry: fx.Node) -> dict[fx.Node, fx.Node]:
    """Copies of a region's operators that read another state."""
    copies = {region.entry: _cast(program, entry, region.entry.meta["val"].dtype)}
    for node in region.nodes:
        copies[node] = program.graph.node_copy(node, lambda operand: copies.get(operand, operand))
        if node.target == ATTENTION:
            copies[node].meta[ATTENTIONS] = (module_path(node),)
    for sublayer in region.sublayers:
        add = copies[sublayer.add]
        add.meta[PARALLEL] = (*add.meta.get(PARALLEL, ()), str(sublayer.kind))
    return copies


def _note_lane(group: GroupName, number: int, region: Region, copies: Mapping[fx.Node, fx.Node]) -> None:
    for place, node in enumerate(region.nodes):
        read = node.all_input_nodes
        copies[node].meta[LANE] = Place(group, number, place, read.index(region.entry) if region.entry in read else -1)


def _along(program: Program, path: SkipPath, change: fx.Node, copies: Mapping[fx.Node, fx.Node]) -> fx.Node:
    """What a change of the stream becomes on the linear way through a region, of which there are copies."""
    carried: dict[Any, fx.Node] = {path.entry: change}
    for node in path.nodes:
        if node.target in COPIES:
            carried[node] = carried[node.args[0]]
        elif node.target in SUMS and not all(operand in carried for operand in node.args[:2]):
            carried[node] = _added(program, node, carried)
        else:
            carried[node] = _applied(program, node, {**copies, **carried})
    return carried[path.nodes[-1]]


def _applied(program: Program, node: fx.Node, values: Mapping[fx.Node, fx.Node]) -> fx.Node:
    """An operator on other values; those of a product are brought to one dtype, the widest."""
    if node.target in PRODUCTS:
        own = {each: values.get(each, each) for each in node.all_input_nodes}
        dtype = reduce(torch.promote_types, (each.meta["val"].dtype for each in own.values()))
        values = {each: _cast(program, value, dtype) for each, value in own.items()}
    operands = fx.map_arg(node.args, lambda each: values.get(each, each))
    return program.call(node.target, *operands, **node.kwargs)  # type: ignore[arg-type, misc]


def _added(program: Program, node: fx.Node, carried: dict[Any, fx.Node]) -> fx.Node:
    """A change on its way through a sum with what does not carry it."""
    left, right = node.args[:2]
    if left in carried:
        return carried[left]
    sign = -1 if node.target in (aten.sub.Tensor, operator.sub) else 1
    factor = sign * node.kwargs.get("alpha", 1)  # type: ignore[operator]
    return carried[right] if factor == 1 else program.call(aten.mul.Tensor, carried[right], factor)


def _wide(program: Program, node: fx.Node) -> fx.Node:
    dtype = node.meta["val"].dtype
    return _cast(program, node, torch.float32 if dtype in _HALF else dtype)


def _cast(program: Program, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    if node.meta["val"].dtype == dtype:
        return node
    return program.call(aten._to_copy.default, node, dtype=dtype)


# Who reads the states


def _replace(state: fx.Node, by: fx.Node, inside: set[fx.Node]) -> None:
    """Let everything outside of the segment's own layers, which are dead from now on, read the new state."""
    state.replace_all_uses_with(by, delete_user_cb=lambda user: user not in inside)


def _reshape_apart(program: Program, region: Region, inside: set[fx.Node]) -> None:
    """Let what reads the state before a region in another shape from outside of the segment reshape it for itself."""
    copies: dict[fx.Node, fx.Node] = {}
    for node in region.reshaped:
        with program.graph.inserting_after(node):
            copies[node] = program.graph.node_copy(node, lambda operand: copies.get(operand, operand))
        node.replace_all_uses_with(copies[node], delete_user_cb=lambda user: user not in inside)


def _readers(first: Region, last: Region, inside: set[fx.Node]) -> list[fx.Node]:
    """What stands among the layers of a segment and depends on their states, without being part of them; in order."""
    found: list[fx.Node] = []
    known, node = set(inside), first.entry.next
    while node is not last.exit:
        if node not in inside and not known.isdisjoint(node.all_input_nodes):
            found.append(node)
            known.add(node)
        node = node.next
    return found
