"""Which heads need no more than the newest and the first tokens: measured on data, first each alone, then together."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from tqdm import tqdm

from skipstone.budget import Budget, Comparison
from skipstone.calibrate import Batch, observe_attentions, program_inputs
from skipstone.certify import refuse_model
from skipstone.ir.dialect import ATTENTION, Kind, attention_reference
from skipstone.ir.errors import InvalidInput, Unsupported
from skipstone.ir.program import Program, Role
from skipstone.ir.stream import note_layers
from skipstone.passes.compress_kv import CompressKV, StreamingHeads


@dataclass(frozen=True, order=True)
class Head:
    """A key-value head of a layer's attention."""

    layer: int
    head: int


@dataclass(frozen=True)
class StreamingFigures:
    """What a choice of heads costs on the data that it was made on.

    Attributes:
        entry: the plan entry.
        heads: how many heads see the window, of how many.
        seen: the predictions with it and the model's.
    """

    entry: CompressKV
    heads: tuple[int, int]
    seen: Comparison


def choose_streaming_heads(
    program: Program,
    batches: Sequence[Batch],
    budget: Budget,
    *,
    window: int = 256,
    sinks: int = 4,
    progress: bool = False,
) -> StreamingFigures:
    """As many heads as can see a window within a budget, with a bound at its confidence.

    The heads are ordered by the change of their attention's output when they alone see the window (see `head_errors`),
    and a number of the first ones is sought by bisection, each time measured together: whether fewer heads would keep
    the budget is not asked where more do.

    Args:
        program: without a cache.
        batches: sequences, some of them longer than a window and its first tokens.
        budget: with a limit on predictions.
        window, sinks: see `skipstone.passes.compress_kv.CompressKV`.
        progress: show a progress bar.
    Raises:
        InvalidInput: the budget has no such limit, or no sequence is longer than what heads see.
        InvalidPlan: an impossible window.
        Unsupported: no attention could see a window, or none does within the budget.
    """
    refuse_model(program, batches)
    CompressKV(window=window, sinks=sinks).validate()
    if not budget.limits:
        raise InvalidInput("a budget without a limit on predictions.", hint="Give nll, kl or top1.")
    longest = max(int(batch.valid.sum(dim=1).max()) for batch in batches)
    if longest <= window + sinks:
        problem = f"the longest sequence has {longest} tokens, of which heads would see {window + sinks}."
        raise InvalidInput(problem, hint="Give longer sequences, as long as the model will be used with, or a window.")
    note_layers(program)
    errors = head_errors(program, batches, window, sinks, progress)
    if not errors:
        name = program.source.name
        raise Unsupported(f"streaming heads in {name}: no attention of a layer sees all tokens before it")
    order = sorted(errors, key=lambda head: (errors[head], head))
    best: StreamingFigures | None = None
    fits, exceeds = 0, len(order) + 1
    steps = math.ceil(math.log2(len(order) + 1)) + 1
    with tqdm(desc="streaming heads", total=steps, unit=" sets", disable=not progress, leave=False) as bar:
        trial = len(order)
        while exceeds - fits > 1:
            chosen = order[:trial]
            seen = compare_streaming(program, batches, chosen, window, sinks)
            if seen.keeps(budget):
                fits, best = trial, StreamingFigures(entry_of(chosen, window, sinks), (trial, len(order)), seen)
            else:
                exceeds = trial
            trial = (fits + exceeds) // 2
            bar.update()
    if best is None:
        raise Unsupported(
            f"a head of {program.source.name} that sees {window} tokens and the first {sinks}, within the budget",
            hint="Allow more, or give a larger window.",
        )
    return best


def entry_of(heads: Sequence[Head], window: int, sinks: int) -> CompressKV:
    """The plan entry that lets these heads see a window."""
    layers = sorted({each.layer for each in heads})
    own = {layer: tuple(sorted(each.head for each in heads if each.layer == layer)) for layer in layers}
    return CompressKV(window, sinks, tuple(StreamingHeads(layer, members) for layer, members in own.items()))


def head_errors(
    program: Program, batches: Sequence[Batch], window: int, sinks: int, progress: bool = False
) -> dict[Head, float]:
    """How much a head that sees a window changes the output of its attention: ``|O' - O| / |O|``, for each head.

    O are the outputs of all heads of the attention, O' those with this one changed; Frobenius norms over the tokens
    that have more before them than they would see. Heads of attentions that do not see all tokens have none.

    Args:
        program: without a cache.
        batches: sequences, some of them longer than what a head sees.
    """
    changed: dict[Head, float] = {}
    whole: dict[int, float] = {}
    for batch in tqdm(batches, "errors of heads", disable=not progress, leave=False):
        beyond = batch.valid.to(program.source.device, copy=True)
        beyond[:, : window + sinks] = False

        def observe(node: fx.Node, _site: str, args: tuple[Any, ...], beyond: Tensor = beyond) -> None:
            if not _may_stream(node):
                return
            options: Any = node.kwargs
            layer, kv_heads = node.meta["layer"], args[1].shape[1]
            seen = (args, _with_window(args, range(kv_heads), window, sinks))
            exact, windowed = (attention_reference(*each, **options).transpose(1, 2)[beyond] for each in seen)
            squares = (windowed - exact).double().square().sum(dim=(0, 2)).reshape(kv_heads, -1).sum(dim=1)
            whole[layer] = whole.get(layer, 0.0) + float(exact.double().square().sum())
            for head, square in enumerate(squares.tolist()):
                changed[Head(layer, head)] = changed.get(Head(layer, head), 0.0) + square

        observe_attentions(program, batch, observe)
    return {head: math.sqrt(square / (whole[head.layer] or 1.0)) for head, square in changed.items()}


@torch.no_grad()
def compare_streaming(
    program: Program, batches: Sequence[Batch], heads: Sequence[Head], window: int, sinks: int
) -> Comparison:
    """The predictions of a model some of whose heads see a window, and its own; see `head_errors`."""
    chosen: dict[int, list[int]] = {}
    for each in heads:
        chosen.setdefault(each.layer, []).append(each.head)
    place = [port.role for port in program.outputs].index(Role.LOGITS)
    changed = _Streaming(program, chosen, window, sinks)
    found = []
    for batch in batches:
        inputs = program_inputs(program, batch)
        found.append(Comparison.of(program.module(*inputs)[place].cpu(), changed.run(*inputs)[place].cpu(), batch))
    return Comparison.concatenate(found)


def _may_stream(node: fx.Node) -> bool:
    """Whether an attention of a program without a cache sees all tokens before it."""
    return node.target is ATTENTION and node.kwargs["kind"] == Kind.CAUSAL and "layer" in node.meta


def _with_window(args: tuple[Any, ...], heads: Collection[int], window: int, sinks: int) -> tuple[Any, ...]:
    """The operands of an attention, with a mask by which these of its key-value heads see a window."""
    q, k, v, mask, *others = (*args, None)
    i, j = torch.arange(q.shape[2], device=q.device)[:, None], torch.arange(k.shape[2], device=q.device)
    seen = (j > i - window) | (j < sinks)
    streams = torch.tensor([head in heads for head in range(k.shape[1])], device=q.device)
    streams = streams.repeat_interleave(q.shape[1] // k.shape[1])[:, None, None]
    allowed = torch.where(streams, seen, True)[None]
    return q, k, v, allowed if mask is None else allowed & mask, *others[: len(args) - 4]


class _Streaming(fx.Interpreter):
    """Runs a program without a cache; key-value heads of some layers see a window."""

    def __init__(self, program: Program, heads: Mapping[int, Collection[int]], window: int, sinks: int) -> None:
        super().__init__(program.module)
        self.extra_traceback = False
        self.heads, self.window, self.sinks = heads, window, sinks

    def run_node(self, n: fx.Node) -> Any:
        heads = self.heads.get(n.meta["layer"], ()) if _may_stream(n) else ()
        if not heads:
            return super().run_node(n)
        args, options = self.fetch_args_kwargs_from_env(n)
        return attention_reference(*_with_window(args, heads, self.window, self.sinks), **options)
