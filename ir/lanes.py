"""Lanes: the same operators over different weights, none of which reads what another computes.

Layers that run at the same time are lanes of a group: the pass that makes them notes for every operator which lane it
is in and where, and for every lane which value it reads and which state of the stream it leads to. `groups` reads these
notes, and `alike` says whether lanes do the same: then they can be computed as one, over stacked weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from skipstone.ir.dialect import ATTENTION
from skipstone.ir.program import Program

LANE = "lane"
"""Metadata of the operators of a lane: a `Place`."""

STATE = "lane_state"
"""Metadata of a state of the stream behind a lane: a `State`."""

START = "lanes_start"
"""Metadata of the state before the first lane of an iteration other than the first, in the dtype of the corrections:
the `GroupName` of that iteration."""

APART = ("slot", "kind", "window")
"""Settings of attentions that may differ between lanes that are alike."""


@dataclass(frozen=True)
class GroupName:
    """What runs at the same time.

    Attributes:
        start, stop: the first of the layers that it is of, and the one behind the last.
        stage: which of the parts that run one after another.
        iteration: which of them, from 0.
        correction: how a change of the stream passes a lane: along its own linear way ("path"), as it is ("identity"),
            or not at all ("none").
    """

    start: int
    stop: int
    stage: int
    iteration: int
    correction: Literal["path", "identity", "none"]


@dataclass(frozen=True)
class Place:
    """Where an operator stands.

    Attributes:
        group: what it runs with.
        lane: the number of its lane.
        place: its number among the operators of the lane.
        entry: which of its operands is the value that the lane reads, as a place in `all_input_nodes`; -1 for none.
    """

    group: GroupName
    lane: int
    place: int
    entry: int = -1


@dataclass(frozen=True)
class State:
    """The state behind a lane of a group, corrected."""

    group: GroupName
    lane: int


@dataclass(frozen=True)
class Lane:
    """One lane.

    Attributes:
        number: its place in the order of the layers.
        entry: the value of the stream that it reads.
        nodes: its operators in graph order; the value behind comes last.
        states: the corrected states behind it.
    """

    number: int
    entry: fx.Node
    nodes: tuple[fx.Node, ...]
    states: tuple[fx.Node, ...]

    @property
    def exit(self) -> fx.Node:
        """What it computes."""
        return self.nodes[-1]


@dataclass(frozen=True)
class Group:
    """Lanes that run at the same time.

    Attributes:
        name: what it is.
        lanes: in the order of the layers; those that something is read of.
        start: the state before the first of them; in the dtype of the corrections, where there is one.
    """

    name: GroupName
    lanes: tuple[Lane, ...]
    start: fx.Node


def groups(program: Program) -> list[Group]:
    """The groups of a program, in graph order."""
    nodes: dict[GroupName, dict[int, list[fx.Node]]] = {}
    states: dict[tuple[GroupName, int], list[fx.Node]] = {}
    starts: dict[GroupName, fx.Node] = {}
    for node in program.graph.nodes:
        if place := node.meta.get(LANE):
            nodes.setdefault(place.group, {}).setdefault(place.lane, []).append(node)
        if state := node.meta.get(STATE):
            states.setdefault((state.group, state.lane), []).append(node)
        if name := node.meta.get(START):
            starts[name] = node
    found = []
    for name, members in nodes.items():
        lanes = tuple(
            Lane(number, _entry(own), tuple(own), tuple(states.get((name, number), own[-1:])))
            for number, own in sorted(members.items())
        )
        found.append(Group(name, lanes, starts.get(name, lanes[0].entry)))
    return found


def _entry(nodes: Sequence[fx.Node]) -> fx.Node:
    return next(node.all_input_nodes[place] for node in nodes if (place := node.meta[LANE].entry) >= 0)


@dataclass(frozen=True)
class Pack:
    """What the lanes read at one place.

    Attributes:
        kind: values "inside" the lanes, at `place`; the "entry" of each; one value that is "common" to all; "tensors"
            of the program; or values from "outside".
        nodes: one for each lane.
        place: of the operators whose results these are, if they are inside.
    """

    kind: Literal["inside", "entry", "common", "tensors", "outside"]
    nodes: tuple[fx.Node, ...]
    place: int = -1


@dataclass(frozen=True)
class Operator:
    """One operator in all lanes.

    Attributes:
        nodes: its call in each lane.
        args: of all calls; each `Pack` in them stands for one node a lane.
    """

    nodes: tuple[fx.Node, ...]
    args: tuple[Any, ...]

    @property
    def target(self) -> Any:
        """What is called."""
        return self.nodes[0].target

    @property
    def value(self) -> Any:
        """The fake value of one call; those of the others have the same sizes."""
        return self.nodes[0].meta["val"]


class NotAlike(Exception):
    """Lanes do not do the same; the message says where and why."""


def align(lanes: Sequence[Lane]) -> list[Operator]:
    """The operators of lanes that are alike.

    Raises:
        NotAlike: they are not.
    """
    if len({len(lane.nodes) for lane in lanes}) > 1:
        raise NotAlike("layers of different operators")
    places = [{node: place for place, node in enumerate(lane.nodes)} for lane in lanes]
    operators = []
    for nodes in zip(*(lane.nodes for lane in lanes), strict=True):
        first = nodes[0]
        if any(node.target != first.target or _kind(node.meta["val"]) != _kind(first.meta["val"]) for node in nodes):
            raise NotAlike(f"{first.name} has no counterpart in each layer")
        if any(_settings(node) != _settings(first) for node in nodes):
            raise NotAlike(f"the settings of {first.name} differ")
        # The last lane says what is read: of the first of a model, the state before it may be a value that all read.
        reads_entry = nodes[-1].meta[LANE].entry >= 0
        padded = zip(*(_padded(node, nodes) for node in nodes), strict=True)
        args = tuple(_joined(lanes, places, each, reads_entry) for each in padded)
        operators.append(Operator(nodes, args))
    return operators


def _joined(
    lanes: Sequence[Lane], places: Sequence[dict[fx.Node, int]], values: tuple[Any, ...], reads_entry: bool
) -> Any:
    first = values[0]
    if isinstance(first, list | tuple):
        if any(not isinstance(value, list | tuple) or len(value) != len(first) for value in values):
            raise NotAlike("operators of different numbers of operands")
        return [_joined(lanes, places, each, reads_entry) for each in zip(*values, strict=True)]
    if not any(isinstance(value, fx.Node) for value in values):
        if any(type(value) is not type(first) or value != first for value in values):
            raise NotAlike(f"the constants {', '.join(map(str, values))} in one place")
        return first
    if not all(isinstance(value, fx.Node) for value in values):
        raise NotAlike("operands that not every layer has")
    inside = {own.get(value, -1) for own, value in zip(places, values, strict=True)}
    if inside != {-1}:
        if len(inside) > 1:
            raise NotAlike(f"{first.name} is read where other layers read something else")
        return Pack("inside", values, inside.pop())
    if all(value is lane.entry for lane, value in zip(lanes, values, strict=True)) and reads_entry:
        return Pack("entry", values)
    if any(_kind(value.meta["val"]) != _kind(first.meta["val"]) for value in values):
        raise NotAlike(f"{first.name} is read where other layers read something else")
    if all(value is first for value in values):
        return Pack("common", values)
    return Pack("tensors" if all(value.op == "get_attr" for value in values) else "outside", values)


def _padded(node: fx.Node, nodes: Sequence[fx.Node]) -> tuple[Any, ...]:
    return (*node.args, *[None] * (max(len(each.args) for each in nodes) - len(node.args)))


def _settings(node: fx.Node) -> dict[str, Any]:
    """Keyword arguments, but those that may differ."""
    if node.target is not ATTENTION:
        return dict(node.kwargs)
    return {name: value for name, value in node.kwargs.items() if name not in APART}


def _kind(value: Any) -> Any:
    """Sizes and dtype of a value, to compare."""
    if isinstance(value, torch.Tensor):
        return str(value.shape), value.dtype
    return [_kind(each) for each in value] if isinstance(value, list | tuple) else str(value)
