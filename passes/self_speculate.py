"""Let a cheaper form of the model guess its next tokens, and the model check them: the same results in fewer steps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from skipstone.ir.dialect import WRITING_OPS
from skipstone.ir.errors import InternalError, InvalidPlan, Unsupported
from skipstone.ir.program import ATTENTIONS, Draft, Program, module_path
from skipstone.ir.quantized import SPARE
from skipstone.passes.base import Pass, Remark
from skipstone.passes.fuse_parallel import FuseParallel
from skipstone.passes.kv_cache import shared_slot
from skipstone.passes.layer_parallel import LayerParallel
from skipstone.passes.quantize_weights import QuantizeWeights
from skipstone.passes.skip_ffn_adaptive import SkipFFNAdaptive
from skipstone.passes.skip_sublayers import SkipSublayers
from skipstone.passes.split_heads import HEADS

MOST = SPARE - 1
"""Tokens that may be guessed at a time: caches that keep recent tokens apart can be cropped by so many and one."""


@dataclass(frozen=True)
class SelfSpeculate(Pass):
    """Generate with a draft: the model itself, made cheaper in ways that would change results, whose guesses it checks.

    The draft guesses some tokens one by one. The model then reads all of them in one step, keeps those that it would
    have chosen itself, and puts its own token behind them, so that each step gives one token at least. What is
    generated is what the model generates: greedily the same tokens, but for how a step of several tokens rounds, in
    sampling the same distribution (rejection sampling; Leviathan et al., arXiv 2211.17192). It is faster where the
    draft is much cheaper than the model, guesses well, and the model reads several tokens in little more time than one.
    Draft & Verify (arXiv 2309.08168) and SWIFT (2410.06916) draft by skipping layers, LayerSkip (2404.16710) by leaving
    early.

    The draft has no cache of its own. It reads the keys and values of the model, and what it writes behind them is
    overwritten when the model reads the same tokens. Where it computes several attentions as one (`parallel`), it keeps
    copies of theirs.

    Every other entry of the plan holds for both. Of the fields below, at least one says what the draft does besides;
    `skip` adds to what the plan skips, the others stand for the plan's own entry of that kind.

    Text repeats itself. Where the last tokens stood in a sequence before, with `lookup` what followed them there is the
    guess, which costs nothing (prompt lookup; LLMA, arXiv 2304.04487); elsewhere the draft is asked.

    Attributes:
        tokens: how many the draft guesses before the model checks them.
        skip: sublayers that it leaves out.
        parallel: layers that it runs at the same time; what can is fused then (`FuseParallel`).
        weights: bits of its weights, which are beside those of the model.
        adaptive: FFNs that its tokens may skip.
        lookup: how many tokens are taken from the sequence itself where it seems to repeat, 0 for none.
    """

    name: ClassVar[str] = "self_speculate"

    tokens: int = 4
    skip: SkipSublayers | None = None
    parallel: LayerParallel | None = None
    weights: QuantizeWeights | None = None
    adaptive: SkipFFNAdaptive | None = None
    lookup: int = 0

    def validate(self) -> None:
        """Refuse settings that fit no model.

        Raises:
            InvalidPlan: too few or too many tokens, a draft that is the model itself, or an impossible entry.
        """
        if not 1 <= self.tokens <= MOST:
            nearest = min(max(self.tokens, 1), MOST)
            raise InvalidPlan(f"{self.name}: {self.tokens} tokens at a time.", hint=f"The nearest is {nearest}.")
        if not 0 <= self.lookup <= MOST:
            nearest = min(max(self.lookup, 0), MOST)
            raise InvalidPlan(f"{self.name}: lookup of {self.lookup} tokens.", hint=f"The nearest is {nearest}.")
        if not self._own() or self._own() == [SkipSublayers()]:
            hint = "Say how it is cheaper, e.g. SelfSpeculate(skip=SkipSublayers(layers=(3,)))."
            raise InvalidPlan(f"{self.name}: the draft is the model itself.", hint=hint)
        for entry in (self.parallel, self.adaptive):
            if entry is not None:
                entry.validate()

    def entries(self, plan: Iterable[Pass]) -> list[Pass]:
        """What is done to the model for the draft: entries of a plan, in no order.

        Args:
            plan: the entries of the plan that this one stands in.
        """
        found: dict[type[Pass], Pass] = {type(each): each for each in plan if not isinstance(each, SelfSpeculate)}
        for own in self._own():
            before = found.get(type(own))
            if isinstance(own, SkipSublayers) and isinstance(before, SkipSublayers):
                own = _both(before, own)
            found[type(own)] = own
        if self.parallel is not None:
            found[FuseParallel] = FuseParallel()
        return list(found.values())

    def _own(self) -> list[Pass]:
        return [each for each in (self.skip, self.parallel, self.weights, self.adaptive) if each is not None]

    def check(self, program: Program) -> None:
        """See `Pass.check`. The program has its draft already, whose buffers are not known yet."""
        self.validate()
        if (writer := shared_slot(program)) is not None:
            feature = f"{self.name} for a cache slot that several iterations write: several tokens a step give others"
            raise Unsupported(feature, where=module_path(writer), hint="Use kv='iterate' in layer_parallel.")
        if program.draft is None:
            raise InternalError(f"{self.name} without a draft")
        if not program.draft.program.slots():
            hint = "Let the draft keep one attention at least."
            raise Unsupported(f"{self.name} with a draft that has no KV cache", hint=hint)

    def rewrite(self, program: Program) -> list[Remark]:
        """See `Pass.rewrite`."""
        assert program.draft is not None
        draft = _sharing(program.draft.program, program)
        buffers = dict(_sources(program, draft))
        program.draft = Draft(draft, self.tokens, buffers, self.lookup)
        shared = {tensor.untyped_storage().data_ptr() for tensor in program.tensors().values()}
        own = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for tensor in draft.tensors().values()
            if tensor.untyped_storage().data_ptr() not in shared
        }
        operators = [sum(1 for _ in each.nodes()) for each in (draft, program)]
        slots = [len(each.slots()) for each in (draft, program)]
        what = f"a draft of {operators[0]} operators, of {operators[1]}, and {slots[0]} cache slots, of {slots[1]}"
        remarks = [self.applied("model", f"{self.tokens} tokens at a time from {what}", own_bytes=sum(own.values()))]
        mine = {each.name for each in self._own()} | {FuseParallel.name}
        for record in draft.history:
            if record.name in mine:
                remarks += [replace(each, where=f"draft, {each.where}") for each in record.remarks]
        return remarks

    def ensures(self, program: Program) -> None:
        """See `Pass.ensures`."""
        if program.draft is None or not program.draft.buffers:
            raise InternalError(f"{self.name} left no draft")


def _both(one: SkipSublayers, other: SkipSublayers) -> SkipSublayers:
    """What leaves out the sublayers of both."""
    united = {each.name: (*getattr(one, each.name), *getattr(other, each.name)) for each in fields(SkipSublayers)}
    return SkipSublayers(**{name: tuple(dict.fromkeys(values)) for name, values in united.items()})


def _sharing(draft: Program, program: Program) -> Program:
    """A draft with the program's own tensors where it has equal ones: both were rewritten, each for itself."""
    known: dict[Any, list[Tensor]] = {}
    for tensor in program.tensors().values():
        known.setdefault((tensor.shape, tensor.dtype), []).append(tensor)
    places = {tensor.data_ptr() for tensor in program.tensors().values()}
    tensors = draft.tensors()
    for name, tensor in tensors.items():
        if tensor.data_ptr() not in places:
            same = (each for each in known.get((tensor.shape, tensor.dtype), ()) if torch.equal(each, tensor))
            tensors[name] = next(same, tensor)
    return replace(draft, module=fx.GraphModule(tensors, draft.graph))


_Key = tuple[tuple[str, ...], Any]
"""What a slot holds keys and values of: the module paths of its attentions, and their heads where they were split."""


def _sources(program: Program, draft: Program) -> Iterator[tuple[str, tuple[str, ...]]]:
    """For each cache buffer of a draft, the buffers of the program whose heads it holds.

    Raises:
        Unsupported: the program does not keep what the draft reads, or in another form.
    """
    kept = _slots(program)
    for key, nodes in _slots(draft).items():
        for number, node in enumerate(nodes):
            own = [_same(kept, key, number, len(nodes))] if key in kept else _apart(kept, key)
            if any(_form(each) != _form(node) for each in own):
                feature = f"{SelfSpeculate.name} with keys and values in other formats than the model's"
                raise Unsupported(feature, where=key[0][0])
            theirs = [_buffers(program, each) for each in own]
            for part, (name, fake) in _buffers(draft, node).items():
                found = [each[part] for each in theirs]
                shapes = {(int(each.shape[3]), each.dtype) for _, each in found}
                heads = sum(int(each.shape[1]) for _, each in found)
                if shapes != {(int(fake.shape[3]), fake.dtype)} or heads != int(fake.shape[1]):
                    feature = f"{SelfSpeculate.name} with keys and values of another shape than the model's"
                    raise Unsupported(feature, where=key[0][0])
                yield name, tuple(each for each, _ in found)


def _same(kept: dict[_Key, list[fx.Node]], key: _Key, number: int, count: int) -> fx.Node:
    """The attention of the program for the `number`-th of `count` of a draft. Iterations of one share it.

    Raises:
        Unsupported: a module attends several times, and not as often in the draft.
    """
    if len(kept[key]) not in (1, count):
        feature = f"{SelfSpeculate.name} for a module that attends {len(kept[key])} times, {count} times in the draft"
        raise Unsupported(feature, where=key[0][0])
    return kept[key][number if len(kept[key]) > 1 else 0]


def _apart(kept: dict[_Key, list[fx.Node]], key: _Key) -> list[fx.Node]:
    """The attentions of the program that one of a draft is made of.

    Raises:
        Unsupported: the program does not have them, or has them several times.
    """
    found = [kept.get(((path,), key[1]), []) for path in key[0]]
    if wrong := [path for path, nodes in zip(key[0], found, strict=True) if len(nodes) != 1]:
        raise Unsupported(
            f"{SelfSpeculate.name} with keys and values that the model does not keep one by one",
            where=wrong[0],
            hint="Let the draft run layers at the same time that the plan runs one after another.",
        )
    return [nodes[0] for nodes in found]


def _slots(program: Program) -> dict[_Key, list[fx.Node]]:
    """What writes each cache slot first, by what the slot is for, in order."""
    slots: dict[_Key, list[fx.Node]] = {}
    seen = set()
    for node in program.nodes(*WRITING_OPS):
        if node.kwargs["slot"] not in seen:
            seen.add(node.kwargs["slot"])
            paths = node.meta.get(ATTENTIONS) or (module_path(node),)
            slots.setdefault((paths, node.meta.get(HEADS)), []).append(node)
    return slots


def _buffers(program: Program, node: fx.Node) -> dict[tuple[str, str], tuple[str, Tensor]]:
    """Name and fake value of each buffer of what writes a slot, by role and part."""
    placeholders = [each for each in program.graph.nodes if each.op == "placeholder"]
    return {
        (port.role, port.part): (port.name, each.meta["val"])
        for port, each in zip(program.inputs, placeholders, strict=True)
        if port.slot == node.kwargs["slot"]
    }


def _form(node: fx.Node) -> tuple[Any, ...]:
    """The formats in which keys and values are kept."""
    return tuple(node.kwargs.get(name) for name in ("k_format", "v_format", "residual", "first"))
