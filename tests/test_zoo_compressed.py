"""Windows, and what is kept of prompts, on every architecture that generates through a cache.

The oracle is the same program without a cache, whose attentions get the mask that the plan means: it knows nothing of
rings, splits, rows and steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from skipstone.ir.capture.huggingface import capture_huggingface
from skipstone.ir.capture.validate import relative_difference
from skipstone.ir.dialect import ATTENTION, CACHED_ATTENTION, WINDOWED_ATTENTION, attention_reference, kept_rows
from skipstone.ir.kept_prompt import prompt_scores_reference
from skipstone.ir.program import Program, Role
from skipstone.ir.statistics import sites
from skipstone.ir.stream import note_layers
from skipstone.passes.compress_kv import CompressKV, StreamingHeads
from skipstone.passes.compress_prompt import CompressPrompt
from skipstone.plan import Plan
from skipstone.rewrite import rewrite
from skipstone.runtime.by_prompt import PromptSession
from skipstone.runtime.eager import EagerSession
from skipstone.runtime.executable import TokenModel
from tests.tiny_models import tiny_model, tokens
from tests.zoo import CACHED

SAMPLE = ("llama", "gemma3_text", "deepseek_v3")
LENGTH, PROMPT = 30, 17
WINDOW, SINKS, KEPT = 6, 2, 9


Mask = Callable[[fx.Node, Tensor, Tensor, Tensor | None], Tensor]
"""What an attention sees at most, bool [B or 1, N, S, S]; of its queries [B, N, S, D], keys [B, KH, S, D] and sinks."""


class Masked(fx.Interpreter):
    """A program without a cache, whose attentions that see all tokens before them see less."""

    def __init__(self, program: Program, mask: Mask) -> None:
        super().__init__(program.module)
        self.mask, self.known = mask, sites(program)

    def run_node(self, n: fx.Node) -> Any:
        if n.target is not ATTENTION or n.kwargs["kind"] != "causal" or n not in self.known:
            return super().run_node(n)
        (q, k, v, *others), options = self.fetch_args_kwargs_from_env(n)
        mask = self.mask(n, q, k, others[2] if len(others) > 2 else None)
        mask = mask if not others or others[0] is None else mask & others[0]
        return attention_reference(q, k, v, mask, *others[1:], **options)


def windows(streaming: dict[Any, tuple[int, ...]]) -> Mask:
    """Heads that are to see a window, by layer, and all of the layers that are not named."""

    def mask(node: fx.Node, q: Tensor, k: Tensor, _sinks: Tensor | None) -> Tensor:
        rows = torch.arange(q.shape[2])
        ahead = rows[:, None] - rows
        seen = torch.ones(q.shape[1], *ahead.shape, dtype=torch.bool)
        for head in streaming.get(node.meta.get("layer"), range(k.shape[1])):
            group = q.shape[1] // k.shape[1]
            seen[head * group : (head + 1) * group] = (ahead < WINDOW) | (rows < SINKS)
        return seen[None]

    return mask


def what_is_kept(node: fx.Node, q: Tensor, k: Tensor, sinks: Tensor | None) -> Tensor:
    """Behind the prompt, of the prompt those tokens that its end looks at most."""
    options: Any = {"scale": node.kwargs["scale"], "softcap": node.kwargs.get("softcap", 0.0)}
    operands = q[:, :, :PROMPT], k[:, :, :PROMPT], torch.full((len(q),), PROMPT), sinks
    scores = prompt_scores_reference(*operands, observed=3, first=SINKS, pool=3, **options)
    rows = torch.arange(q.shape[2])
    seen = (rows[:, None] < PROMPT) | (rows >= PROMPT)
    order = scores.argsort(dim=-1, descending=True, stable=True)  # of equal ones, the first are kept
    best = torch.zeros(scores.shape, dtype=torch.bool).scatter(2, order[..., :KEPT], True)
    kept = torch.nn.functional.pad(best, (0, q.shape[2] - PROMPT)).repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    return seen | kept[:, :, None]


@torch.no_grad()
def assert_windows(name: str) -> None:
    ids, source = tokens(2, LENGTH), capture_huggingface(tiny_model(name))
    note_layers(source)
    heads = {
        node.meta["layer"]: (int(node.args[1].meta["val"].shape[1]) - 1,)  # type: ignore[union-attr]
        for node in sites(source)
        if "layer" in node.meta
    }
    chosen = {
        layer: (own if layer == max(heads) else tuple(range(own[0] + 1)))
        for layer, own in heads.items()
        if len(heads) == len(sites(source))  # else some attentions stand outside of layers, or several in one
    }
    streaming = tuple(StreamingHeads(layer, own) for layer, own in chosen.items())
    entries = [(CompressKV(WINDOW, SINKS), {})]
    entries += [(CompressKV(WINDOW, SINKS, streaming), chosen)] if chosen else []
    for entry, masks in entries:
        program, _ = rewrite(source.copy(), Plan([entry]), target="eager")
        kinds = [node.kwargs["kind"] for node in program.nodes(CACHED_ATTENTION)]
        assert any(True for _ in program.nodes(WINDOWED_ATTENTION))
        assert set(kinds) <= ({"causal"} if masks else set()), kinds
        wanted = _uncached(source, windows(masks), ids)
        opt = TokenModel(EagerSession(program))
        cache = opt.new_cache(*ids.shape)
        found = [opt.decode(ids[:, :PROMPT], cache)]
        found += [opt.decode(ids[:, [at]], cache) for at in range(PROMPT, LENGTH)]
        assert relative_difference(torch.cat(found, dim=1), wanted) < 1e-4


@torch.no_grad()
def assert_prompts(name: str) -> None:
    ids, source = tokens(2, LENGTH), capture_huggingface(tiny_model(name))
    program, _ = rewrite(source.copy(), Plan([CompressPrompt(KEPT, observed=3, sinks=SINKS, pool=3)]), target="eager")
    (behind,) = program.continuations
    causal = [node for node in behind.nodes(CACHED_ATTENTION) if node.kwargs["kind"] == "causal"]
    assert causal and all(map(kept_rows, causal))
    wanted = _uncached(source, what_is_kept, ids)
    opt = TokenModel(PromptSession(EagerSession(program), [EagerSession(behind)]))
    logits, cache = opt.prefill(ids[:, :PROMPT])
    found = [logits[:, None], *(opt.decode(ids[:, [at]], cache) for at in range(PROMPT, LENGTH - 4))]
    found.append(opt.decode(ids[:, LENGTH - 4 :], cache))
    assert relative_difference(torch.cat(found, dim=1), wanted[:, PROMPT - 1 :]) < 1e-4


def _uncached(program: Program, mask: Mask, ids: Tensor) -> Tensor:
    positions = (torch.arange(ids.shape[1]) + program.source.first_position).expand(ids.shape)
    values = {Role.TOKENS: ids, Role.POSITIONS: positions}
    results = Masked(program, mask).run(*(values[port.role] for port in program.inputs))
    logits: Tensor = results[[port.role for port in program.outputs].index(Role.LOGITS)]
    return logits


@pytest.mark.parametrize("name", [SAMPLE[0], *(pytest.param(name, marks=pytest.mark.slow) for name in SAMPLE[1:])])
def test_windows_of_a_sample_of_architectures(name: str) -> None:
    assert_windows(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CACHED if name not in SAMPLE])
def test_windows_of_every_architecture_with_a_cache(name: str) -> None:
    assert_windows(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", CACHED)
def test_prompts_of_every_architecture_with_a_cache(name: str) -> None:
    assert_prompts(name)
