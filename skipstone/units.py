"""What may be left out of a model, and the time that each of it takes."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Set
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from skipstone.ir.cost import cost, measure_cpu, roofline_seconds
from skipstone.ir.device import DeviceProfile
from skipstone.ir.errors import InternalError, InvalidInput, Unsupported
from skipstone.ir.program import Program, Role
from skipstone.ir.stream import ResidualStream, SublayerKind, find_stream
from skipstone.passes.base import run_pass
from skipstone.passes.kv_cache import InsertKVCache
from skipstone.passes.skip_sublayers import SkipSublayers, bypassed

Kind = Literal["attention", "ffn", "layer"]


@dataclass(frozen=True, order=True)
class Unit:
    """Something that is left out whole: the attention of a layer, its FFN, or the layer.

    Attributes:
        kind: which of them.
        layer: number of the layer, as `SkipSublayers` counts.
    """

    kind: Kind
    layer: int

    def __str__(self) -> str:
        return f"{self.kind} {self.layer}"


def entry_of(units: Iterable[Unit]) -> SkipSublayers:
    """The plan entry that leaves out these units."""
    chosen = list(units)
    layers = {kind: tuple(sorted(unit.layer for unit in chosen if unit.kind == kind)) for kind in get_args(Kind)}
    return SkipSublayers(attention=layers["attention"], ffn=layers["ffn"], layers=layers["layer"])


@dataclass(frozen=True)
class Space:
    """Which units there are to choose from, and which of them may go together.

    Attributes:
        kinds: ``("attention", "ffn")`` for sublayers, or one of them, or ``("layer",)`` for whole layers.
        protected: layers of which nothing goes; None for the first and the last.
        minimum_gap: how far apart the layers of any two units must be: 0 for no rule, 1 for one unit a layer, 2 for no
            two neighbours (the rule of Skip to the Good Part, arXiv 2603.07475).
    Raises:
        InvalidInput: a kind or a number that cannot be.
    """

    kinds: tuple[Kind, ...] = ("attention", "ffn")
    protected: tuple[int, ...] | None = None
    minimum_gap: int = 0

    def __post_init__(self) -> None:
        unknown = [kind for kind in self.kinds if kind not in get_args(Kind)]
        if unknown or not self.kinds or isinstance(self.kinds, str):
            raise InvalidInput(f"kinds is {self.kinds!r}.", hint=f"Give a tuple of {', '.join(get_args(Kind))}.")
        if "layer" in self.kinds and len(self.kinds) > 1:
            raise InvalidInput("a layer holds its sublayers: they cannot both be units.", hint="Use kinds=('layer',).")
        if self.minimum_gap < 0:
            raise InvalidInput(f"minimum_gap is {self.minimum_gap}, expected at least 0.")

    def units(self, stream: ResidualStream) -> dict[Unit, frozenset[int]]:
        """The units of a model, and the numbers (`Sublayer.index`) of the sublayers that go with each.

        A layer with a sublayer that is neither attention nor FFN is no unit.

        Raises:
            InvalidInput: a protected layer that is not there, or nothing to choose from.
            Unsupported: a unit whose sublayers cannot be left out exactly.
        """
        last = stream.layers - 1
        protected = (0, last) if self.protected is None else self.protected
        if wrong := [layer for layer in protected if not 0 <= layer <= last]:
            raise InvalidInput(
                f"protected names layer {wrong[0]}, but the model has layers 0 to {last}.",
                hint=f"The nearest is {min(max(wrong[0], 0), last)}.",
            )
        found: dict[Unit, frozenset[int]] = {}
        for layer in sorted(set(range(stream.layers)) - set(protected)):
            own = stream.layer(layer)
            for kind in self.kinds:
                members = [each for each in own if kind in ("layer", each.kind)]
                if members and all(each.kind is not SublayerKind.OTHER for each in members):
                    bypassed(members)
                    found[Unit(kind, layer)] = frozenset(each.index for each in members)
        if not found:
            raise InvalidInput(
                f"there is nothing to leave out: of layers 0 to {last}, {sorted(set(protected))} are protected.",
                hint="Protect fewer layers, e.g. protected=().",
            )
        return found

    def allows(self, chosen: Collection[Unit], unit: Unit) -> bool:
        """Whether a further unit may go with those chosen."""
        return all(abs(unit.layer - other.layer) >= self.minimum_gap for other in chosen)


SUBLAYERS = Space()
LAYERS = Space(kinds=("layer",))

CONTEXT = 512
"""Tokens in the cache at the decode step whose time is saved, where nothing else is said."""


def unit_milliseconds(
    program: Program,
    units: Mapping[Unit, Set[int]],
    profile: DeviceProfile | None = None,
    context: int = CONTEXT,
) -> dict[Unit, float]:
    """Estimated milliseconds that leaving out each unit saves: a roofline over its operators, see `skipstone.ir.cost`.

    They are those of a decode step of one sequence through a KV cache. Where the program can have no cache, they are
    those of a pass over the whole sequence.

    Args:
        program: without a cache.
        units: see `Space.units`.
        profile: the device; None measures this machine's CPU.
        context: tokens in the cache, or of the sequence.
    Raises:
        Unsupported: the program runs on another device and no profile is given.
    """
    profile = profile_of(program) if profile is None else profile
    sizes = {"batch": 1, "sequence": 1, "past": context}
    try:
        program, count = run_pass(InsertKVCache(), program, strict=False), len(find_stream(program).sublayers)
    except Unsupported:
        sizes = {"batch": 1, "sequence": context, "past": 0}
        count = len(find_stream(program).sublayers)
    # Keys and values that leave the program would keep the products behind them from counting as the sublayer's own.
    rows = (Role.CACHE_KEY, Role.CACHE_VALUE)
    program = program.copy()
    program.remove_outputs([node for slot in program.slots() for role in rows if (node := program.output(role, slot))])
    program.recompile()
    sublayers = {each.index: each for each in find_stream(program).sublayers}
    if len(sublayers) != count:
        raise InternalError(f"with a cache there are {len(sublayers)} sublayers, without it {count}")
    found = {}
    for unit, members in units.items():
        nodes = [node for index in members for node in (*sublayers[index].nodes, sublayers[index].add)]
        found[unit] = 1e3 * roofline_seconds(cost(program, nodes), profile, **sizes)
    return found


def profile_of(program: Program) -> DeviceProfile:
    """The profile of this machine's CPU, for a program that runs on it.

    Raises:
        Unsupported: it runs on another device.
    """
    if program.source.device.type != "cpu":
        hint = "Give a profile, or milliseconds= of your own."
        raise Unsupported(f"measuring how fast {program.source.device} is", hint=hint)
    return measure_cpu(torch.get_num_threads())
