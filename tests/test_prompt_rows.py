"""How many rows of prompts a budget asks for, and the proof that it is kept."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch.nn.functional import kl_div

import skipstone
from skipstone import Budget, CompressKV, CompressPrompt, Plan, find_compress_prompt
from skipstone.budget import METRICS
from skipstone.calibrate import Batch, token_batches
from skipstone.certify import within
from skipstone.errors import InvalidInput, InvalidPlan, Unsupported
from skipstone.ir.capture.huggingface import capture_huggingface
from skipstone.ir.cost import kv_bytes, kv_bytes_of_prompt
from skipstone.ir.program import Program
from skipstone.optimize import lower
from skipstone.prompt_rows import choose_prompt_rows, compare_behind_prompts, executable_of
from skipstone.rewrite import rewrite
from skipstone.runtime.executable import Executable
from tests.compress_cases import KV_HEADS, LAYERS, captured, model, optimized, tokens
from tests.prompt_cases import CASES, reference

pytestmark = pytest.mark.usefixtures("one_thread")

LIKE = CompressPrompt(observed=4, sinks=2, pool=3)
LEAST = 7


@cache
def batches() -> list[Batch]:
    """Two lengths, one of them padded: prompts of 30, 26 and 13 tokens."""
    mask = torch.ones(3, 60, dtype=torch.int64)
    mask[1, 51:] = 0
    data = [{"input_ids": tokens(3, 60), "attention_mask": mask}, tokens(2, 25, seed=1)]
    return token_batches(data, captured("gqa").source)


@cache
def without_values() -> Program:
    """A model whose attentions give nothing, whatever is kept."""
    own = copy.deepcopy(model("gqa"))
    with torch.no_grad():
        for layer in own.model.layers:
            layer.self_attn.v_proj.weight.zero_()
    return capture_huggingface(own)


def build(plan: Plan, program: Program) -> Executable:
    rewritten, _ = rewrite(program.copy(), plan, target="eager")
    return Executable(lower(rewritten, "eager"), plan=plan, report=skipstone.Report("Llama", "eager"))


@pytest.mark.slow
def test_the_least_is_kept_where_nothing_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("skipstone.prompt_rows.TRIALS", 4)
    found = choose_prompt_rows(without_values(), batches(), Budget(kl=0.0), like=LIKE)
    assert found.entry == CompressPrompt(LEAST, observed=4, sinks=2, pool=3)
    assert METRICS["kl"](found.seen).value == 0


def divergence(rows: int) -> float:
    """What it costs to keep so many rows, nats a token behind the prompts, told by the model under masks."""
    entry, total, count = CompressPrompt(rows, observed=4, sinks=2, pool=3), 0.0, 0
    for batch in batches():
        for text, valid in zip(batch.tokens, batch.valid, strict=True):
            own = text[: int(valid.sum())]
            prompt = (len(own) + 1) // 2
            with torch.no_grad():
                full = model("gqa")(own[None]).logits[0]
            changed = reference("gqa", entry, own[:prompt], own[prompt:])
            logs = (each[prompt:-1].double().log_softmax(-1) for each in (changed, full))
            total += float(kl_div(*logs, log_target=True, reduction="sum"))
            count += len(own) - prompt - 1
    return total / count


def test_the_number_is_the_first_that_keeps_the_budget() -> None:
    figures = {rows: divergence(rows) for rows in (LEAST, 20)}
    assert figures[LEAST] > 2 * figures[20] > 0
    budget = Budget(kl=1.5 * figures[20], confidence=0.5)
    found = choose_prompt_rows(captured("gqa"), batches(), budget, like=LIKE)
    assert LEAST < found.entry.rows <= 20
    assert divergence(found.entry.rows) <= 1.5 * figures[20]
    assert divergence(found.entry.rows - 1) > figures[20]


def test_a_plan_is_compared_as_it_is_carried_out() -> None:
    plans = Plan([]), Plan([replace(LIKE, rows=LEAST)])
    seen = compare_behind_prompts(*(executable_of(captured("gqa"), plan) for plan in plans), batches())
    assert METRICS["kl"](seen).value == pytest.approx(divergence(LEAST), rel=1e-4)


def test_a_found_plan_is_proved_though_it_is_no_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    program = without_values()
    monkeypatch.setattr("skipstone.certify.speedup", lambda *_: 0.8)
    entry = CompressPrompt(LEAST, observed=4, sinks=2)
    opt = within(lambda plan: build(plan, program), [Plan([entry])], Budget(kl=1e-9), batches())
    assert opt.plan.entries == (entry,)
    assert [each.holds for each in opt.plan.certificates] == [True]
    kept = (60 - (30 - LEAST)) / 60
    assert (
        opt.report.budget[-1]
        == f"keys and values of 60 tokens, 30 of them a prompt, take {kept:.1%} of the model's bytes"
    )


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            CompressPrompt(30, observed=4),
            r"compress_prompt: .* has 60 tokens, all of which would be kept.*60",
        ),
        (CompressKV(window=60), r"compress_kv: the longest .* has 60 tokens, all of which streaming heads see.* 64"),
    ],
)
def test_what_the_data_does_not_test_is_not_proved(entry: CompressPrompt | CompressKV, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        within(lambda plan: build(plan, captured("gqa")), [Plan([entry])], Budget(kl=1.0), batches())


REFUSALS = {
    "no limit": (Budget(evaluate=lambda _: 1.0, max_drop=0.0), LIKE, InvalidInput, "without a limit on predictions"),
    "short": (Budget(kl=1.0), CompressPrompt(), InvalidInput, "the longest prompt has 30 tokens, of which 37 are kept"),
    "settings": (Budget(kl=1.0), CompressPrompt(observed=4, pool=2), InvalidPlan, "pool is 2, expected an odd number"),
    "too little": (Budget(kl=0.0), LIKE, Unsupported, "prompts of LlamaForCausalLM that are not kept whole, within"),
}


@pytest.mark.parametrize("name", [*list(REFUSALS)[:-1], pytest.param("too little", marks=pytest.mark.slow)])
def test_what_cannot_be_chosen_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("skipstone.prompt_rows.TRIALS", 4)
    budget, like, error, message = REFUSALS[name]
    with pytest.raises(error, match=message):
        choose_prompt_rows(captured("gqa"), batches(), budget, like=like)


def test_the_data_of_the_proof_is_left_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def choose(_program: Program, own: list[Batch], _budget: Budget, **_settings: object) -> object:
        asked.append(sum(len(each.tokens) for each in own))
        raise KeyboardInterrupt

    monkeypatch.setattr("skipstone.find.choose_prompt_rows", choose)
    monkeypatch.setattr("skipstone.find.capture", lambda *_: captured("gqa"))
    with pytest.raises(KeyboardInterrupt):
        find_compress_prompt(model("gqa"), [tokens(10, 60)], Budget(kl=0.1))
    assert asked == [6]


def test_bytes_are_those_of_the_cache() -> None:
    opt = optimized("gqa", Plan([CASES["all"]]))
    token = 2 * KV_HEADS["gqa"] * 8 * 4
    assert kv_bytes_of_prompt(opt.program) == opt.report.after.kv_bytes_of_prompt == LAYERS * 12 * token
    assert opt.report.before.kv_bytes_of_prompt is None
    assert kv_bytes(opt.program, 50, 40) == LAYERS * 22 * token
    assert kv_bytes(opt.program, 50, 5) == LAYERS * 50 * token
    assert f"<= {LAYERS * 12 * token / 1024:.4g} KiB" in str(opt.report)
    one = optimized("gqa", Plan([CASES["one layer"]])).program
    assert kv_bytes_of_prompt(one) is None
    assert kv_bytes(one, 50, 40) == (2 * 50 + 10 + 7) * token
