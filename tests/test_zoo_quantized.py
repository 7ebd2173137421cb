"""Conditioned and quantized caches on every architecture that generates through one.

Two oracles that know nothing of the architecture: conditioning changes nothing, and a quantized cache gives step by
step what it gives in one go.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from skipstone.calibrate import Batch, measure
from skipstone.ir.capture.huggingface import capture_huggingface
from skipstone.ir.capture.validate import relative_difference
from skipstone.ir.dialect import EXPERTS, QUANTIZED_CACHED_ATTENTION
from skipstone.ir.program import Program
from skipstone.ir.stream import note_layers
from skipstone.passes.base import Pipeline, Status, run_pass
from skipstone.passes.cleanup import Cleanup
from skipstone.passes.condition_kv import ConditionKV, Rewrite
from skipstone.passes.kv_cache import InsertKVCache
from skipstone.passes.quantize_kv import QuantizeKV
from skipstone.rewrite import prepare_quantization
from skipstone.runtime.eager import EagerSession
from skipstone.runtime.executable import TokenModel
from tests.tiny_models import tiny_model, tokens
from tests.zoo import CACHED

SAMPLE = ("llama", "gemma3_text", "qwen3", "gpt_neox", "deepseek_v3", "gptj")
LENGTH, PROMPT = 24, 15

LATENT, SHARED = "multi-head latent attention", "shared with another attention"
ALL_REFUSED: dict[str, str] = {
    **dict.fromkeys(("axk1", "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "minicpm3", "youtu"), LATENT),
    **dict.fromkeys(("diffllama", "gemma3n_text"), SHARED),
}
"""Architectures that keep their whole cache in full precision, and why."""


@dataclass(frozen=True)
class Found:
    """What the two oracles say of one architecture.

    Attributes:
        conditioned: largest difference that conditioning makes to the logits, over their range.
        stepwise: largest difference between decoding step by step and in one go, over the range.
        error: the same between the quantized program and the model.
        routed: whether it has experts, of which small errors may choose others.
        refused: reasons for which attentions stay in full precision.
    """

    conditioned: float
    stepwise: float
    error: float
    routed: bool
    refused: tuple[str, ...]


@torch.no_grad()
def check(name: str) -> Found:
    """Condition and quantize a tiny model of an architecture."""
    model, ids = tiny_model(name), tokens(2, LENGTH)
    model.config.use_cache = False
    exact = model(input_ids=ids).logits
    program = capture_huggingface(model)
    note_layers(program)
    program = run_pass(Cleanup(), program)
    data = tokens(2, LENGTH, seed=1)
    program.calibration |= measure(program, [Batch(data, torch.ones_like(data, dtype=torch.bool))], ConditionKV.name)
    conditioned = run_pass(ConditionKV(tuple(Rewrite), large_bias=1e-9), program)  # every bias counts as large
    quantize = QuantizeKV(granularity="token")
    quantized = prepare_quantization(program, quantize, ())
    quantized = Pipeline([InsertKVCache(), quantize], strict=False).run(quantized)
    remarks = quantized.history[-1].remarks
    refused = tuple(sorted({remark.why for remark in remarks if remark.status is Status.REFUSED}))
    whole, steps = _logits(quantized, ids, LENGTH), _logits(quantized, ids, PROMPT)
    return Found(
        relative_difference(_logits(run_pass(InsertKVCache(), conditioned), ids, LENGTH), exact),
        relative_difference(steps, whole) if any(True for _ in quantized.nodes(QUANTIZED_CACHED_ATTENTION)) else 0.0,
        relative_difference(whole, exact),
        any(True for _ in program.nodes(EXPERTS)),
        refused,
    )


def _logits(program: Program, ids: torch.Tensor, prompt: int) -> torch.Tensor:
    """Logits [B, S, V]: those of the first `prompt` tokens in one go, the others token by token."""
    opt = TokenModel(EagerSession(program))
    cache = opt.new_cache(*ids.shape)
    parts = [opt.decode(ids[:, :prompt], cache)]
    return torch.cat([*parts, *(opt.decode(ids[:, [at]], cache) for at in range(prompt, ids.shape[1]))], dim=1)


def assert_sound(name: str) -> None:
    found = check(name)
    assert found.conditioned < 1e-4, found
    # A product of one row may round a code another way in float32: far less than rounding all of them.
    assert found.stepwise <= found.error / 5, found
    assert found.routed or found.error < 0.1, found
    if name in ALL_REFUSED:
        assert ALL_REFUSED[name] in " ".join(found.refused), found
    else:
        assert not found.refused and found.error > 0, found


@pytest.mark.parametrize("name", [*SAMPLE[:2], *(pytest.param(name, marks=pytest.mark.slow) for name in SAMPLE[2:])])
def test_a_sample_of_architectures(name: str) -> None:
    assert_sound(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CACHED if name not in SAMPLE])
def test_every_architecture_with_a_cache(name: str) -> None:
    assert_sound(name)
