"""Let each prompt decide which sublayers its continuation goes without."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import fx

from skipstone.ir.cost import kv_bytes_per_token
from skipstone.ir.dialect import CACHED_OPS, PROMPT_MEAN, PROMPT_TURN
from skipstone.ir.errors import InternalError, InvalidPlan, Unsupported
from skipstone.ir.program import Port, Program, Role, module_path, provenance
from skipstone.ir.stream import Sublayer, find_stream, original_layer
from skipstone.passes.base import Pass, Remark
from skipstone.passes.kv_cache import count_input, drop_slot
from skipstone.passes.skip_sublayers import SkipSublayers, bypassed

aten = torch.ops.aten

CENTROIDS, WEIGHT, BIAS = (f"skip_by_prompt/{name}" for name in ("centroids", "weight", "bias"))
"""Tensors of a plan: for each set, the similarity profile of its prompts, [sets, sublayers]; of routers, the weights
[sublayers, hidden] and biases [sublayers]. Rows and columns are the sublayers that the plan leaves, in their order."""


@dataclass(frozen=True)
class SkipByPrompt(Pass):
    """Read each prompt in full, choose one of a few sets of sublayers for it, and decode without those.

    The choice falls when a sequence's first tokens are read, and stays for as long as the sequence lasts; FiRST (arXiv
    2410.12513). Sequences of one batch choose for themselves. The keys and values of attentions that are left out are
    freed as soon as the prompt is read.

    By similarity, a prompt goes to the nearest of the sets' centroids; its place is how far each sublayer turned the
    stream on average (``1 - cos``). By routers, each sublayer has a linear function of the prompt's mean state before
    it, whose sigmoid is the probability that the sublayer is left out; the most probable of the sets is taken.
    Centroids and routers are tensors of the plan: see `skipstone.prompts` and `skipstone.training`.

    Attributes:
        sets: what is left out, for each kind of prompts; an entry that names nothing decodes in full.
        by: what chooses among several sets.
    """

    name: ClassVar[str] = "skip_by_prompt"

    sets: tuple[SkipSublayers, ...] = ()
    by: Literal["similarity", "routers"] = "similarity"

    def validate(self) -> None:
        """Refuse settings that fit no model.

        Raises:
            InvalidPlan: there is no set, or one stands there twice.
        """
        if not self.sets:
            raise InvalidPlan(f"{self.name} without a set.", hint="Write SkipByPrompt((SkipSublayers(ffn=(3,)),)).")
        for (first, one), (second, other) in itertools.combinations(enumerate(self.sets), 2):
            if one == other:
                raise InvalidPlan(f"{self.name}: sets {first} and {second} are the same.", hint="Merge them.")

    def check(self, program: Program) -> None:
        """See `Pass.check`."""
        self.validate()
        if not program.slots():
            hint = "Remove it from the plan, or use cache=True."
            raise Unsupported(f"{self.name} for a program without a KV cache", hint=hint)
        for entry in self.sets:
            entry.check(program)
        stream = find_stream(program)
        if scaled := [each for each in stream.sublayers if each.parallel and not each.skip.is_identity]:
            raise Unsupported(f"{self.name} with sublayers side by side and a scaled stream", where=scaled[0].path)
        if len(self.sets) > 1:
            shape, tokens = stream.entry.meta["val"].shape, program.input(Role.TOKENS)
            if (
                tokens is None
                or len(shape) != 3
                or list(map(str, shape[:2])) != list(map(str, tokens.meta["val"].shape))
            ):
                raise Unsupported(f"{self.name} by a residual stream of shape {list(shape)}", where=stream.entry.name)
            sublayers, width = len(stream.sublayers), int(shape[-1])
            if self.by == "similarity":
                self._check_tensor(program, CENTROIDS, (len(self.sets), sublayers))
            else:
                self._check_tensor(program, WEIGHT, (sublayers, width))
                self._check_tensor(program, BIAS, (sublayers,))

    def _check_tensor(self, program: Program, name: str, shape: tuple[int, ...]) -> None:
        tensor = program.calibration.get(name)
        hint = "Find the plan on data, or keep the tensors that it was saved with."
        if tensor is None:
            raise InvalidPlan(f"{self.name} has {len(self.sets)} sets, and the plan has no {name!r}.", hint=hint)
        if tuple(tensor.shape) != shape or not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
            found = f"{tensor.dtype} {list(tensor.shape)}"
            raise InvalidPlan(f"{self.name}: {name!r} is {found}, expected finite numbers {list(shape)}.", hint=hint)

    def rewrite(self, program: Program) -> list[Remark]:
        """See `Pass.rewrite`."""
        whole = program.copy()
        if len(self.sets) > 1:
            program.add_output(Port("choice", Role.CHOICE), self._choice(program))
        program.continuations = tuple(_without(whole, entry) for entry in self.sets)
        return [
            self.applied(
                f"set {number}",
                _named(entry.sites(whole)),
                weight_bytes=whole.weight_bytes() - part.weight_bytes(),
                kv_bytes_per_token=kv_bytes_per_token(whole) - kv_bytes_per_token(part),
            )
            for number, (entry, part) in enumerate(zip(self.sets, program.continuations, strict=True))
        ]

    def behind_prompts(self) -> None:
        """See `Pass.behind_prompts`."""

    def _choice(self, program: Program) -> fx.Node:
        """int64 [B]: the number of the set for each sequence."""
        stream = find_stream(program)
        count = count_input(program)
        features = [self._feature(program, each, count) for each in stream.sublayers]
        end = program.output_node()
        with provenance(program, self.name, like=features[-1]), program.graph.inserting_before(end):
            prompt = program.call(aten.stack.default, features, 1)
            if self.by == "similarity":
                centroids = self._tensor(program, CENTROIDS, prompt)
                away = program.call(aten.sub.Tensor, program.call(aten.unsqueeze.default, prompt, 1), centroids)
                squares = program.call(aten.mul.Tensor, away, away)
                return program.call(aten.argmin.default, program.call(aten.sum.dim_IntList, squares, [-1]), -1)
            weight, bias = (self._tensor(program, name, prompt) for name in (WEIGHT, BIAS))
            products = program.call(aten.sum.dim_IntList, program.call(aten.mul.Tensor, prompt, weight), [-1])
            logits = program.call(aten.add.Tensor, products, bias)
            # The log-probabilities of sets differ by the logits of what they leave out.
            indices = [{each.index for each in entry.sites(program)} for entry in self.sets]
            members = torch.tensor([[float(each.index in own) for each in stream.sublayers] for own in indices])
            chosen = program.add_tensor("skip_by_prompt_sets", members.to(prompt.meta["val"].dtype))
            return program.call(aten.argmax.default, program.call(aten.linear.default, logits, chosen), -1)

    def _feature(self, program: Program, sublayer: Sublayer, count: fx.Node) -> fx.Node:
        """What the choice takes of a sublayer: [B], or [B, hidden]; computed where its operands are at hand."""
        before, after = sublayer.stream, sublayer.add
        with provenance(program, self.name, like=after), program.graph.inserting_before(after.next):
            if self.by == "routers":
                return program.call(PROMPT_MEAN, before, count)
            if sublayer.parallel:  # the sum holds the other sublayer's result, too
                after = program.call(aten.add.Tensor, before, sublayer.branch)
            return program.call(PROMPT_TURN, before, after, count)

    def _tensor(self, program: Program, name: str, like: fx.Node) -> fx.Node:
        value = program.calibration[name].to(like.meta["val"].device, like.meta["val"].dtype)
        return program.add_tensor(name.replace("/", "_"), value)

    def ensures(self, program: Program) -> None:
        """See `Pass.ensures`."""
        if len(program.continuations) != len(self.sets):
            raise InternalError(f"{len(program.continuations)} continuations for {len(self.sets)} sets")


def _named(sublayers: Sequence[Sublayer]) -> str:
    """What a set leaves out, in words."""
    if not sublayers:
        return "decodes in full"
    return f"decodes without {', '.join(f'{each.kind} {original_layer(each)}' for each in sublayers)}"


def _without(program: Program, entry: SkipSublayers) -> Program:
    """A cached program without some of its sublayers, and without the cache slots of their attentions.

    Raises:
        InvalidPlan: no attention is left.
        Unsupported: a module attends more than once. Calibrated tensors go by module and number of the call.
    """
    calls = Counter(module_path(node) for node in program.nodes(*CACHED_OPS))
    if repeated := [path for path, number in calls.items() if number > 1]:
        raise Unsupported(f"{SkipByPrompt.name} for a model with an attention that runs twice", where=repeated[0])
    part = program.copy()
    for add, other in bypassed(entry.sites(part)).items():
        add.replace_all_uses_with(other)
    part.recompile()
    while unread := [node for node in part.nodes(*CACHED_OPS) if not _is_read(node)]:
        if len(unread) == len(part.slots()):
            hint = "Without any, a sequence would forget what it has read."
            raise InvalidPlan(f"{SkipByPrompt.name}: the set {entry} leaves no attention.", hint=hint)
        for node in unread:
            drop_slot(part, node)
        part.recompile()
    return part


def _is_read(attention: fx.Node) -> bool:
    """Whether anything but the cache takes a cached attention's result."""
    return any(user.args[1] == 0 for user in attention.users)
