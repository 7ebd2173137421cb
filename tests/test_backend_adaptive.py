"""Adaptive FFN skipping in the backend of torch.compile: decisions are those of `skipstone.optimize`."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

import skipstone
from skipstone import FuseParallel, Plan, SkipFFNAdaptive, SkipSublayers
from skipstone.errors import Unsupported, UserError
from skipstone.ir.dialect import PREDICATED_LINEAR
from tests.backend_cases import close, compiled
from tests.backend_cases import uncompiled as uncompiled
from tests.ffn_oracles import ALWAYS
from tests.test_backend_refusals import refusal
from tests.tiny_models import tiny_model, tokens

PAD = 0
SOME = {"llama": 0.62, "gpt2": 0.8, "gpt_neox": 0.62}
"""Cosines from which on some tokens skip and others do not."""

pytestmark = pytest.mark.usefixtures("one_thread", "uncompiled")


def starts(*positions: int) -> Tensor:
    return torch.tensor(positions, dtype=torch.int64)


def entry(name: str) -> SkipFFNAdaptive:
    return replace(ALWAYS, threshold=SOME[name], warmup_tokens=1)


@cache
def ours(name: str, plan: Plan) -> Any:
    """The executable whose decisions are right."""
    return skipstone.optimize(tiny_model(name), plan, target="eager", progress=False)


def generated(model: Any, ids: Tensor, **options: Any) -> Tensor:
    mask = (ids != PAD).long()
    result: Tensor = model.generate(
        ids, attention_mask=mask, max_new_tokens=9, do_sample=False, pad_token_id=PAD, **options
    )
    return result


@torch.no_grad()
@pytest.mark.parametrize("cache", [pytest.param(None, marks=pytest.mark.slow), "static"])
@pytest.mark.parametrize(
    "name", ["llama", pytest.param("gpt2", marks=pytest.mark.slow), pytest.param("gpt_neox", marks=pytest.mark.slow)]
)
def test_generate(name: str, cache: str | None) -> None:
    """Without padding and padded on the left, where prompts of one batch end at different positions."""
    plan, begins = Plan([entry(name)]), starts(0, 0)
    model = copy.deepcopy(tiny_model(name))
    options = {"plan": plan, "decode_start": begins}
    model.forward = torch.compile(model.forward, backend="skipstone", options=options, fullgraph=True)
    ids, padded = tokens(2, 5), tokens(2, 5, seed=1)
    padded[0, :2] = PAD
    ids[ids == PAD] = PAD + 1
    padded[:, 2:][padded[:, 2:] == PAD] = PAD + 1
    padded[1, :2] = 7
    for prompt in (ids, padded):
        begins.copy_((prompt != PAD).sum(dim=1))
        wanted = generated(ours(name, plan), prompt)
        assert torch.equal(generated(model, prompt, cache_implementation=cache), wanted)
        assert not torch.equal(wanted, generated(tiny_model(name), prompt)), "nothing was skipped"
    with torch.compiler.set_stance("fail_on_recompile"):
        begins.fill_(1000)  # nothing is behind the prompt
        found = generated(model, ids, cache_implementation=cache)
    assert torch.equal(found, generated(tiny_model(name), ids))


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_tokens_decide_alike_alone_and_together(kind: str, batch: int) -> None:
    model, plan = tiny_model("llama"), Plan([entry("llama")])
    fast, _ = compiled(model, plan, decode_start=starts(4))
    ids = tokens(batch, 11)
    opt = ours("llama", plan)
    first, kept = opt.prefill(ids[:, :4])
    wanted = [first, *(opt.decode(column, kept) for column in ids[:, 4:].T)]
    for widths in ([4, *[1] * 7], [4, 3, 1, 3], [3, 8]):
        cache = DynamicCache() if kind == "dynamic" else StaticCache(model.config, max_cache_len=16)
        begin = 0
        for width in widths:
            places = torch.arange(begin, begin + width).expand(batch, -1)
            out = fast(input_ids=ids[:, begin : begin + width], position_ids=places, past_key_values=cache)
            begin, cache = begin + width, out.past_key_values
            if begin >= 4:
                close(out.logits[:, -1], wanted[begin - 4])


@pytest.mark.slow
@torch.no_grad()
def test_open_sizes_are_compiled_once() -> None:
    model, plan = tiny_model("llama"), Plan([SkipSublayers(ffn=(0,)), FuseParallel(), entry("llama")])
    fast, reports = compiled(model, plan, dynamic=True, decode_start=starts(2))
    opt = ours("llama", plan)
    stances = ["default", "fail_on_recompile", "fail_on_recompile"]
    for (batch, length), stance in zip([(2, 5), (3, 9), (4, 6)], stances, strict=True):
        ids = tokens(batch, length)
        with torch.compiler.set_stance(stance):
            out = fast(input_ids=ids, position_ids=torch.arange(length).expand(batch, -1), use_cache=False).logits
        first, kept = opt.prefill(ids[:, :2])
        close(out[:, 1], first)
        for column in range(2, length):
            close(out[:, column], opt.decode(ids[:, column], kept))
    assert len(reports) == 1


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_every_row_that_skips_reads_no_weight(dtype: torch.dtype) -> None:
    """Weights of nan behind a decision that holds for all."""
    model: PreTrainedModel = copy.deepcopy(tiny_model("llama")).to(dtype)
    fast, reports = compiled(model, Plan([ALWAYS]), decode_start=starts(0))
    for layer in model.model.layers[1:]:
        for parameter in layer.mlp.parameters():
            parameter.fill_(float("nan"))
    out = fast(input_ids=tokens(2, 5), position_ids=torch.arange(5).expand(2, -1)).logits
    assert out.dtype == dtype and out.isfinite().all()
    assert reports[0].code.count(str(PREDICATED_LINEAR).removesuffix(".default")) == 9
    assert "predicate_ffn: applied | model.layers.1.mlp" in str(reports[0])


@torch.no_grad()
def test_what_is_missing_is_refused() -> None:
    model, plan, ids = tiny_model("llama"), Plan([ALWAYS]), tokens(2, 5)
    places = torch.arange(5).expand(2, -1)

    def refused(kind: type[Exception], *given: Any, **options: Any) -> str:
        def call(ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
            return model(input_ids=ids, position_ids=position_ids).logits  # type: ignore[no-any-return]

        return refusal(kind, call, *given, options=options)

    assert "that is not told which tokens are a prompt. Pass options={'decode_start'" in refused(
        Unsupported, ids, places, plan=plan
    )
    assert refused(UserError, ids, places, plan=Plan([SkipSublayers(ffn=(1,))]), decode_start=starts(3)) == (
        "option 'decode_start' without skip_ffn_adaptive in the plan. Leave it out."
    )
    for wrong in (torch.tensor(5), torch.tensor([5.0])):
        assert "is no list of positions. Pass an int64 tensor" in refused(
            UserError, ids, places, plan=plan, decode_start=wrong
        )
    assert "holds 3 positions on cpu, for 2 sequences on cpu" in refused(
        UserError, ids, places, plan=plan, decode_start=starts(1, 2, 3)
    )
    assert "Call the model with input_ids and position_ids" in refused(
        Unsupported, ids, plan=plan, decode_start=starts(3)
    )
