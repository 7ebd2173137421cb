"""Let each token skip FFNs that would hardly change it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from skipstone.ir.dialect import GATE, SKIP_PREDICATE
from skipstone.ir.errors import InternalError, InvalidPlan, Unsupported
from skipstone.ir.gates import spared
from skipstone.ir.program import Port, Program, Role, provenance
from skipstone.ir.stream import Sublayer, SublayerKind, find_stream, original_layer, original_layers
from skipstone.passes.base import Pass, Remark

aten = torch.ops.aten

_ROUNDING = 1e-9  # of max_share times a number of layers: 0.29 * 100 is 28.999999999999996


@dataclass(frozen=True)
class SkipFFNAdaptive(Pass):
    """Put gates behind the FFNs of the warm layers, so that each token decides in each step which of them it skips.

    A token walks through the layers. Once an FFN of a warm layer leaves it nearly as it was, it skips the FFNs of the
    following warm layers; FFN-SkipLLM (arXiv 2404.03865). Nearly: the cosine of the stream before the FFN and after its
    result was added reaches the threshold. The paper publishes neither thresholds nor boundaries, and not every model
    has FFNs that leave tokens as they are: find settings on data with `skipstone.adaptive`, and prove them with a
    budget. Prompts are always read in full, and attention always runs, so that the cache is complete.

    A gate gives zeros in the rows that skip. Rows that do not are computed together with all others, exactly as without
    gates; where every row skips, the FFN with its norm is not computed and its weights are not read
    (`skipstone.ir.gates`). A step of several sequences thus saves time where all of them skip.

    Attributes:
        threshold: cosine from which on a token skips, at least -1; above 1, or None, it never does.
        cold_start, cold_end: first and last layers of the model whose FFN is never skipped.
        warmup_tokens: tokens behind the prompt that are decoded in full.
        max_share: how many FFNs a token skips at most, as a share of the model's layers.
    """

    name: ClassVar[str] = "skip_ffn_adaptive"

    threshold: float | None = None
    cold_start: int = 1
    cold_end: int = 1
    warmup_tokens: int = 4
    max_share: float = 0.25

    def validate(self) -> None:
        """Refuse settings that fit no model.

        Raises:
            InvalidPlan: a threshold below -1, a negative number, or a share outside of (0, 1].
        """
        if self.threshold is not None and not self.threshold >= -1:
            hint = "A cosine lies between -1 and 1."
            raise InvalidPlan(f"{self.name}: threshold is {self.threshold}, expected -1 or more.", hint=hint)
        for field in ("cold_start", "cold_end", "warmup_tokens"):
            if getattr(self, field) < 0:
                raise InvalidPlan(f"{self.name}: {field} is {getattr(self, field)}, expected 0 or more.")
        if not 0 < self.max_share <= 1:
            raise InvalidPlan(f"{self.name}: max_share is {self.max_share}, expected more than 0 and at most 1.")

    def check(self, program: Program) -> None:
        """See `Pass.check`."""
        self.validate()
        if program.input(Role.START) is None:
            hint = "Remove it from the plan, or use cache=True."
            raise Unsupported(f"{self.name} for a program without a KV cache", hint=hint)
        self._warm(program)

    def _warm(self, program: Program) -> tuple[list[Sublayer], dict[Sublayer, str]]:
        """The FFNs of the warm layers that get a gate, in order, and those that cannot, with the reason.

        Raises:
            InvalidPlan: the model has too few layers for the settings.
            Unsupported: there are not two FFNs that gates can be put behind.
        """
        stream = find_stream(program)
        layers = original_layers(program, stream)
        last = layers - self.cold_end
        if last - self.cold_start < 2:
            raise InvalidPlan(
                f"{self.name}: with {self.cold_start} cold layers at the start and {self.cold_end} at the end, "
                f"{max(last - self.cold_start, 0)} of {layers} layers are warm.",
                hint="It needs two at least: the first one decides about the next. Lower cold_start or cold_end.",
            )
        if self.limit(layers) == 0:
            hint = f"The smallest share that has an effect is {1 / layers:.3g}."
            raise InvalidPlan(f"{self.name}: max_share {self.max_share} of {layers} layers is no layer.", hint=hint)
        warm = [
            each
            for each in stream.sublayers
            if each.kind is SublayerKind.FFN and self.cold_start <= original_layer(each) < last
        ]
        reasons = {each: why for each in warm if (why := _refusal(program, each))}
        gated = [each for each in warm if each not in reasons]
        if len(gated) < 2:
            found = f"{len(gated)} FFNs to skip in layers {self.cold_start} to {last - 1}; it needs two at least"
            first = next(iter(reasons), None)
            where, why = ("", "") if first is None else (first.path, f" ({reasons[first]})")
            raise Unsupported(f"{self.name} with {found}{why}", where=where, hint="Remove it from the plan.")
        return gated, reasons

    def limit(self, layers: int) -> int:
        """How many FFNs a token skips at most, in a model of so many layers."""
        return math.floor(self.max_share * layers + _ROUNDING)

    def rewrite(self, program: Program) -> list[Remark]:
        """See `Pass.rewrite`."""
        layers = original_layers(program, find_stream(program))
        limit = self.limit(layers)
        warm, refused = self._warm(program)
        start: Any = program.input(Role.START)
        starts = start, program.add_input(Port("decode_start", Role.DECODE_START), start.meta["val"].clone())
        met: list[fx.Node] = []  # for each warm FFN so far, which tokens skip from there on
        remarks = []
        for sublayer in warm:
            if met:
                _insert_gate(program, sublayer, met, limit)
                why = f"tokens may skip the FFN of layer {original_layer(sublayer)}"
                remarks.append(self.applied(sublayer.path, why))
            if sublayer is not warm[-1]:
                met.append(self._predicate(program, sublayer, starts, met))
        remarks += [self.refused(each.path, why) for each, why in refused.items()]
        most = min(limit, len(warm) - 1) / layers
        when = "never" if self.threshold is None else f"from a cosine of {self.threshold} on"
        return [*remarks, self.applied("model", f"{when}, at most {most:.0%} of the FFNs a token", largest_share=most)]

    def _predicate(
        self, program: Program, sublayer: Sublayer, starts: tuple[fx.Node, fx.Node], met: list[fx.Node]
    ) -> fx.Node:
        """bool [B, S]: the tokens that this FFN or an earlier one hardly changed."""
        after = sublayer.add
        options = {
            "threshold": math.inf if self.threshold is None else self.threshold,
            "warmup_tokens": self.warmup_tokens,
        }
        with provenance(program, self.name, like=sublayer.add), program.graph.inserting_before(after.next):
            if sublayer.parallel:  # the sum holds the attention's result, too
                after = program.call(aten.add.Tensor, sublayer.stream, _gated(sublayer))
            return program.call(SKIP_PREDICATE, sublayer.stream, after, *starts, *met[-1:], **options)

    def ensures(self, program: Program) -> None:
        """See `Pass.ensures`."""
        if not any(True for _ in program.nodes(GATE)):
            raise InternalError("no FFN has a gate")


def _insert_gate(program: Program, sublayer: Sublayer, met: list[fx.Node], limit: int) -> None:
    """Let tokens skip the sublayer that have met the condition, and not yet skipped `limit` sublayers since."""
    branch = sublayer.branch
    with provenance(program, SkipFFNAdaptive.name, like=branch), program.graph.inserting_before(branch.next):
        skip = met[-1]
        if len(met) > limit:
            done = program.call(aten.bitwise_not.default, met[-1 - limit])
            skip = program.call(aten.bitwise_and.Tensor, skip, done)
        gate = program.call(GATE, branch, skip)
    branch.replace_all_uses_with(gate, delete_user_cb=lambda user: user is not gate)
    for node in spared(gate):
        gate.prepend(node)  # some may stand before the decision


def _gated(sublayer: Sublayer) -> fx.Node:
    """The sublayer's result, behind its gate if it has one."""
    gates = [user for user in sublayer.branch.users if user.target is GATE]
    return gates[0] if gates else sublayer.branch


def _refusal(program: Program, sublayer: Sublayer) -> str:
    """Why the sublayer's result cannot be left out row by row, "" if it can."""
    node, tokens = sublayer.branch, program.input(Role.TOKENS)
    shape = node.meta["val"].shape
    if tokens is None or len(shape) != 3 or shape[:2] != tokens.meta["val"].shape:
        return "its result is not one row a token"
    while node is not sublayer.add:
        if len(node.users) != 1:
            return f"the result {node.name} is read by {len(node.users)} operators, not by the residual addition alone"
        (node,) = node.users
    return ""
