"""All four rewrites in one plan: skipped sublayers, layers in parallel, adaptive FFNs, and a quantized cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from skipstone import FuseParallel, LayerParallel, Plan, QuantizeKV, Segment, SkipFFNAdaptive, SkipSublayers
from skipstone.optimize import optimize

pytestmark = pytest.mark.usefixtures("one_thread")

PLAN = Plan(
    [
        SkipSublayers(attention=(4,), ffn=(3,)),
        LayerParallel((Segment(1, 3),)),
        FuseParallel(),
        SkipFFNAdaptive(threshold=0.3, cold_start=1, cold_end=0, warmup_tokens=1, max_share=1.0),
        QuantizeKV(k="int8", v="int8"),
    ]
)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=7, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=96, initializer_range=0.4, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(1, 61, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def built(model: LlamaForCausalLM) -> Iterator[dict[str, Any]]:
    """The plan on both targets; the second one reapplies what the first calibrated."""
    ours = optimize(model, PLAN, target="onnxruntime", calibration=[tokens(4, 48)], progress=False)
    yield {"onnxruntime": ours, "eager": optimize(model, ours.plan, target="eager", progress=False)}


def test_each_entry_is_carried_out(built: dict[str, Any]) -> None:
    for opt in built.values():
        applied = {remark.pass_name for remark in opt.report.remarks if remark.status.name == "APPLIED"}
        assert {"skip_sublayers", "layer_parallel", "fuse_parallel", "skip_ffn_adaptive", "quantize_kv"} <= applied
        assert len(opt.program.slots()) == 5  # of 7 attentions one is left out, and two are one


@pytest.mark.parametrize("batch", [1, 2])
def test_targets_agree_in_prompts_and_steps(built: dict[str, Any], batch: int) -> None:
    ids, mask = tokens(batch, 19, seed=3), torch.ones(batch, 19, dtype=torch.int64)
    mask[1:, :7] = 0
    scores = {}
    for target, opt in built.items():
        logits, cache = opt.prefill(ids, mask)
        found = [logits]
        for column in tokens(batch, 6, seed=4).split(1, dim=1):
            found.append(opt.decode(column[:, 0], cache))
        scores[target] = torch.stack(found)
    difference = (scores["onnxruntime"] - scores["eager"]).abs().max()
    assert difference < 5e-3 * (scores["eager"].max() - scores["eager"].min())  # single codes are rounded the other way


def test_tokens_skip_and_generation_agrees(built: dict[str, Any], model: LlamaForCausalLM) -> None:
    ids = tokens(2, 11, seed=5)
    written = {target: opt.generate(ids, max_new_tokens=20, do_sample=False) for target, opt in built.items()}
    assert torch.equal(written["onnxruntime"], written["eager"])
    plan = built["eager"].plan
    full = Plan([entry for entry in plan if not isinstance(entry, SkipFFNAdaptive)], tensors=plan.tensors)
    never = optimize(model, full, target="eager", progress=False)
    assert not torch.equal(never.generate(ids, max_new_tokens=20, do_sample=False), written["eager"])
