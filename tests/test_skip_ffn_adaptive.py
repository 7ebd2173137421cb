"""Adaptive FFN skipping: every token decides for itself, and decides the same however it is read."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from skipstone import Plan, QuantizeKV, SkipFFNAdaptive, SkipSublayers
from skipstone.errors import InvalidPlan, Unsupported
from skipstone.ir.gates import cosine, skip_predicate
from skipstone.optimize import rewrite
from skipstone.runtime.eager import EagerSession
from skipstone.runtime.executable import Executable
from tests import models

ALWAYS = SkipFFNAdaptive(threshold=-1.0, cold_start=0, cold_end=0, warmup_tokens=0, max_share=1.0)
PROMPT, LENGTH = 5, 12


@cache
def executable(name: str, *entries: Any) -> Any:
    program, _ = rewrite(models.program(name), Plan(entries), target="eager")
    return Executable(EagerSession(program))


def stepwise(opt: Any, ids: Tensor, prompt: int = PROMPT, mask: Tensor | None = None, chunk: int = 1) -> Tensor:
    """Logits [B, S - prompt, V] of the tokens behind the prompt, so many at a time."""
    _, cache = opt.prefill(ids[:, :prompt], mask)
    return torch.cat([opt.decode(part, cache) for part in ids[:, prompt:].split(chunk, dim=1)], dim=1)


@torch.no_grad()
def oracle(model: Any, ids: Tensor, entry: SkipFFNAdaptive, prompt: int = PROMPT) -> tuple[Tensor, list[list[int]]]:
    """The same from the layers of a Llama, one sequence; and for each token the layers whose FFN it skipped."""
    past = DynamicCache(config=model.config)
    model(input_ids=ids[:, :prompt], past_key_values=past)
    layers = model.model.layers
    threshold = math.inf if entry.threshold is None else entry.threshold
    most, rows, skips = math.floor(entry.max_share * len(layers) + 1e-9), [], []
    for at in range(prompt, ids.shape[1]):
        h = model.model.embed_tokens(ids[:, at : at + 1])
        angles = model.model.rotary_emb(h, torch.tensor([[at]]))
        met, skipped = False, list[int]()
        for number, layer in enumerate(layers):
            attention, _ = layer.self_attn(
                layer.input_layernorm(h), position_embeddings=angles, attention_mask=None, past_key_values=past
            )
            h = h + attention
            warm = entry.cold_start <= number < len(layers) - entry.cold_end
            if warm and met and len(skipped) < most:
                skipped.append(number)
                continue
            before, h = h, h + layer.mlp(layer.post_attention_layernorm(h))
            met |= warm and at >= prompt + entry.warmup_tokens and float(cosine(before, h)) >= threshold
        rows.append(model.lm_head(model.model.norm(h))[:, 0])
        skips.append(skipped)
    return torch.stack(rows, dim=1), skips


def assert_close(given: Tensor, expected: Tensor) -> None:
    spread = float(expected.max() - expected.min())
    torch.testing.assert_close(given / spread, expected / spread, rtol=0, atol=1e-5)


# --------------------------------------------------------------------------------------------------------- what it does


@pytest.mark.parametrize(
    "entry",
    [
        ALWAYS,
        replace(ALWAYS, threshold=None),
        replace(ALWAYS, max_share=0.34),
        replace(ALWAYS, warmup_tokens=3),
        replace(ALWAYS, cold_start=1),
        *(replace(ALWAYS, threshold=threshold) for threshold in (0.55, 0.7, 0.8, 0.9)),
    ],
    ids=lambda entry: f"{entry.threshold}-{entry.cold_start}-{entry.warmup_tokens}-{entry.max_share}",
)
def test_tokens_skip_what_the_paper_says(entry: SkipFFNAdaptive) -> None:
    ids = models.tokens(1, LENGTH, seed=3)
    expected, _ = oracle(models.model("llama"), ids, entry)
    assert_close(stepwise(executable("llama", entry), ids), expected)


def test_the_thresholds_of_these_tests_decide_differently() -> None:
    """Else the oracle would say little: some tokens skip no FFN, some one, some two."""
    ids = models.tokens(1, LENGTH, seed=3)
    counts = {
        len(skipped)
        for threshold in (0.55, 0.7, 0.8, 0.9)
        for skipped in oracle(models.model("llama"), ids, replace(ALWAYS, threshold=threshold))[1]
    }
    assert counts == {0, 1, 2}


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "mixtral"])
def test_never_is_the_full_model(name: str) -> None:
    ids = models.tokens(2, LENGTH)
    with torch.no_grad():
        expected = models.model(name)(input_ids=ids).logits[:, PROMPT:]
    never = executable(name, replace(ALWAYS, threshold=None))
    assert_close(stepwise(never, ids), expected)
    assert torch.equal(stepwise(never, ids), stepwise(executable(name, replace(ALWAYS, threshold=2.0)), ids))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "mixtral"])
def test_always_is_the_static_drop_behind_a_full_prompt(name: str) -> None:
    """The static drop decodes from the cache that the full model has made of the prompt."""
    ids = models.tokens(2, LENGTH)
    static, gated = executable(name, SkipSublayers(ffn=(1, 2))), executable(name, ALWAYS)
    _, cache = executable(name).prefill(ids[:, :PROMPT])
    cache.layout = static.session.layout
    assert_close(stepwise(gated, ids), static.decode(ids[:, PROMPT:], cache))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("threshold", [-1.0, 0.7])
def test_steps_of_any_size_decide_the_same(name: str, threshold: float) -> None:
    opt, ids = executable(name, replace(ALWAYS, threshold=threshold, warmup_tokens=2)), models.tokens(2, LENGTH)
    one = stepwise(opt, ids)
    for chunk in (2, 3, LENGTH):
        assert_close(stepwise(opt, ids, chunk=chunk), one)


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_a_batch_decide_for_themselves(side: str) -> None:
    """Each row is as if alone, whatever the padding and the other rows."""
    opt, counts = executable("llama", replace(ALWAYS, threshold=0.7, warmup_tokens=1)), (3, 7, 5)
    prompts = [models.tokens(1, count, seed=count)[0] for count in counts]
    more = models.tokens(3, 6, seed=9)
    padded, mask = torch.zeros(3, 7, dtype=torch.int64), torch.zeros(3, 7, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        columns = slice(7 - len(prompt), 7) if side == "left" else slice(0, len(prompt))
        padded[row, columns], mask[row, columns] = prompt, 1
    _, cache = opt.prefill(padded, mask)
    together = torch.cat([opt.decode(each, cache) for each in more.split(1, dim=1)], dim=1)
    for row, prompt in enumerate(prompts):
        alone = stepwise(opt, torch.cat([prompt, more[row]]).unsqueeze(0), prompt=len(prompt))
        assert_close(together[row : row + 1], alone)


def test_prompts_are_read_in_full() -> None:
    ids = models.tokens(2, LENGTH)
    opt, full = executable("llama", ALWAYS), executable("llama")
    assert_close(opt.prefill(ids)[0], full.prefill(ids)[0])
    assert_close(opt(input_ids=ids).logits, full(input_ids=ids).logits)


def test_the_cache_knows_where_prompts_ended(tmp_path: Path) -> None:
    """Through reordering, growing, saving and loading."""
    opt, ids = executable("llama", replace(ALWAYS, warmup_tokens=2)), models.tokens(2, LENGTH)
    expected = stepwise(opt, ids)
    _, cache = opt.prefill(ids[:, :PROMPT])
    opt.decode(ids[:, PROMPT : PROMPT + 1], cache)
    cache.save(tmp_path / "cache.safetensors")
    restored = opt.load_cache(tmp_path / "cache.safetensors")
    restored.grow(restored.capacity * 2)
    restored.select(torch.tensor([1, 0]))
    rest = torch.cat([opt.decode(ids.flip(0)[:, [at]], restored) for at in range(PROMPT + 1, LENGTH)], dim=1)
    assert_close(rest.flip(0), expected[:, 1:])


def test_generate_skips() -> None:
    ids = models.tokens(1, PROMPT, seed=3)
    written = executable("llama", ALWAYS).generate(ids, max_new_tokens=6, do_sample=False)
    expected, _ = oracle(models.model("llama"), written, ALWAYS)
    assert written[0, PROMPT + 1 :].tolist() == expected[0, :-1].argmax(-1).tolist()


def test_bfloat16() -> None:
    """Cosines are computed in float32: at -1 and 2, nothing depends on the rounding."""
    before, after = torch.randn(2, 1, 1, 64, dtype=torch.bfloat16)
    assert cosine(before, after).dtype == torch.float32
    here = torch.zeros(1, dtype=torch.int64)
    for threshold, met in ((-1.0, True), (1.5, False)):
        assert bool(skip_predicate(before, after, here, here, threshold=threshold, warmup_tokens=0)) == met


# ------------------------------------------------------------------------------------------------------ with the others


def test_with_other_passes() -> None:
    """A layer less, and keys and values in int8."""
    ids = models.tokens(1, LENGTH)
    entries = (SkipSublayers(attention=(1,)), ALWAYS, QuantizeKV(k="int8", v="int8", granularity="token"))
    plain = (SkipSublayers(attention=(1,), ffn=(1, 2)), entries[2])
    skipping, static = executable("llama", *entries), executable("llama", *plain)
    _, cache = executable("llama", entries[0], entries[2]).prefill(ids[:, :PROMPT])
    cache.layout = static.session.layout
    given, expected = stepwise(skipping, ids), static.decode(ids[:, PROMPT:], cache)
    assert_close(given, expected)


def test_plans_keep_it(tmp_path: Path) -> None:
    plan = Plan([SkipSublayers(ffn=(1,)), replace(ALWAYS, threshold=0.5), QuantizeKV()])
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan


# ----------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"threshold": -1.5}, "threshold is -1.5"),
        ({"cold_start": -1}, "cold_start is -1"),
        ({"warmup_tokens": -2}, "warmup_tokens is -2"),
        ({"max_share": 0.0}, "max_share is 0.0"),
        ({"max_share": 1.1}, "max_share is 1.1"),
        ({"cold_start": 2}, "1 of 3 layers are warm"),
        ({"cold_end": 9}, "0 of 3 layers are warm"),
        ({"max_share": 0.2}, "of 3 layers is no layer"),
    ],
)
def test_impossible_settings_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidPlan, match=message):
        executable("llama", replace(ALWAYS, **change))


def test_without_a_cache_it_is_refused() -> None:
    with pytest.raises(Unsupported, match="without a KV cache"):
        rewrite(models.program("llama"), Plan([ALWAYS]), target="eager", cache=False)


# --------------------------------------------------------------------------------------------------------- ONNX Runtime


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_onnx_runtime_skips_the_same(name: str) -> None:
    """At thresholds that leave no decision to rounding; the skipped branches hold no product."""
    from skipstone.runtime.onnx.lower import lower
    from skipstone.runtime.onnx.session import OnnxSession

    entry = replace(ALWAYS, warmup_tokens=2)
    program, _ = rewrite(models.program(name), Plan([entry]), target="onnxruntime")
    plain, _ = rewrite(models.program(name), Plan([]), target="onnxruntime")
    ids = models.tokens(2, LENGTH)
    assert_close(stepwise(Executable(OnnxSession(program)), ids), stepwise(executable(name, entry), ids))
    lowered = lower(program)
    choices = [node for node in onnx.load_from_string(lowered.proto).graph.node if node.op_type == "If"]
    branches = [[{each.op_type for each in attribute.g.node} for attribute in node.attribute] for node in choices]
    products = [
        sorted(any("MatMul" in each or each == "Gemm" for each in kinds) for kinds in pair) for pair in branches
    ]
    assert products.count([False, True]) == 2
    assert sum(each.nbytes for each in lowered.tensors.values()) == sum(
        each.nbytes for each in lower(plain).tensors.values()
    )
