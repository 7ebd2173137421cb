"""Executables of every kind that can be saved, small; each is built once in a test run."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from skipstone import (
    FuseParallel,
    LayerParallel,
    Plan,
    QuantizeKV,
    Segment,
    SkipByPrompt,
    SkipFFNAdaptive,
    SkipSublayers,
    optimize,
)
from skipstone.calibrate import token_batches
from skipstone.ir.capture.huggingface import capture_huggingface
from skipstone.ir.program import Program
from skipstone.optimize import carried_out, lower, model_output
from skipstone.passes.skip_by_prompt import CENTROIDS
from skipstone.rewrite import rewrite
from skipstone.runtime.executable import Executable
from tests import models
from tests.versions import skip_without_group_query_attention

VOCABULARY, MASK, LAYERS = 61, 60, 2
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.4,
    "pad_token_id": 0,
}
_WORDS = {**_SIZES, "num_key_value_heads": 1, "bos_token_id": 1, "eos_token_id": 2}

_MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_WORDS)),
    "llada": lambda: LlamaForCausalLM(LlamaConfig(**_WORDS, is_causal=False, mask_token_id=MASK)),
    "bert": lambda: BertModel(BertConfig(**_SIZES), add_pooling_layer=False),
    "gpt_oss": lambda: models.model("gpt_oss"),
}


@cache
def model(name: str) -> Any:
    """A Hugging Face model. Tests must not change it."""
    torch.manual_seed(0)
    return _MODELS[name]().eval()


@cache
def program(name: str) -> Program:
    """The captured program of that model."""
    return capture_huggingface(model(name))


def _by_prompt() -> Plan:
    sets = (SkipSublayers(attention=(1,)), SkipSublayers(layers=(0,)))
    return Plan([SkipByPrompt(sets)], tensors={CENTROIDS: torch.eye(2, 2 * LAYERS, dtype=torch.float64)})


_LAYERS = LayerParallel(segments=(Segment(0, LAYERS),))

CASES: dict[str, tuple[str, Callable[[], Plan]]] = {
    "plain": ("llama", lambda: Plan()),
    "experts": ("gpt_oss", lambda: Plan()),
    "skipped": ("llama", lambda: Plan([SkipSublayers(layers=(1,), ffn=(0,))])),
    "quantized": ("llama", lambda: Plan([QuantizeKV(k="int8", v="int8", condition=False)])),
    "by_token": (
        "llama",
        lambda: Plan([QuantizeKV(k="int8", v="fp8", granularity="token", residual=4, sinks=2, condition=False)]),
    ),
    "adaptive": (
        "llama",
        lambda: Plan([SkipFFNAdaptive(threshold=0.6, cold_start=0, cold_end=0, warmup_tokens=1, max_share=1.0)]),
    ),
    "parallel": ("llama", lambda: Plan([_LAYERS, FuseParallel()])),
    "by_prompt": ("llama", _by_prompt),
    "one_set": ("llama", lambda: Plan([SkipByPrompt((SkipSublayers(layers=(0,)),))])),
    "encoder": ("bert", lambda: Plan()),
    "masked": ("llada", lambda: Plan([SkipSublayers(ffn=(1,))])),
}
"""Name -> model and plan."""
SLOW = (
    *(("experts", target) for target in ("eager", "triton", "onnxruntime")),
    *((case, "onnxruntime") for case in ("by_prompt", "masked", "parallel", "skipped")),
    *((case, "triton") for case in ("one_set", "skipped")),
)
"""Cases and targets that take long to build."""

ONNXRUNTIME = tuple(name for name in CASES if name != "by_token")  # ONNX Runtime has no such format


WIDTH = 18


class Odd(nn.Module):
    """Two inputs and nested outputs, a weight that is used twice, and views of one memory."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.second.weight = self.first.weight
        table = torch.randn(5, WIDTH)
        self.register_buffer("rows", table[1:4])
        self.register_buffer("turned", table[2:].t())

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Any]:
        """x and y: [B, S, WIDTH]."""
        hidden = self.second(torch.tanh(self.first(x))) + y
        scores = (hidden @ self.rows.t()).masked_fill(y[..., :3] > 0, float("-inf"))
        return {"hidden": (hidden, [scores.exp()]), "turned": hidden @ self.turned}


def odd_inputs(batch: int = 2, length: int = 5) -> dict[str, Tensor]:
    """Inputs of `Odd`."""
    generator = torch.Generator().manual_seed(batch * length)
    return {name: torch.randn(batch, length, WIDTH, generator=generator) for name in ("x", "y")}


@cache
def odd(target: str = "eager") -> Executable:
    """`Odd`, optimized."""
    torch.manual_seed(0)
    return optimize(Odd().eval(), target=target, example_inputs=odd_inputs(), progress=False)  # type: ignore[arg-type]


@cache
def executable(case: str, target: str) -> Any:
    """The executable of a case, as `optimize` would build it."""
    if (case, target) == ("quantized", "onnxruntime"):
        skip_without_group_query_attention()
    name, make = CASES[case]
    captured, plan = program(name), make()
    batches = token_batches([models.tokens(2, 20)], captured.source) if case == "quantized" else []
    rewritten, refusal = rewrite(captured, plan, target=target, batches=batches)
    return Executable(
        lower(rewritten, target, 1),
        config=model(name).config,
        generation_config=getattr(model(name), "generation_config", None),
        plan=carried_out(plan, rewritten, bool(batches)),
        target=target,
        threads=1,
        max_length=48,
        cache_refusal=refusal,
        output_adapter=model_output,
    )


def results(opt: Any) -> list[Tensor]:
    """What an executable of `CASES` computes: whole batches, prompts, steps, and generated text."""
    ids, mask = models.tokens(2, 9), torch.ones(2, 9, dtype=torch.int64)
    mask[1, :4] = 0
    if hasattr(opt, "denoise"):
        return [opt(ids).logits, opt.denoise(ids, length=6, steps=3, mask_token=MASK)]
    if not hasattr(opt, "prefill"):
        return [opt(ids, mask).last_hidden_state]
    logits, kept = opt.prefill(ids, mask)
    steps = [opt.decode(models.tokens(2, 1, seed)[:, 0], kept) for seed in range(3)]
    options = {"max_new_tokens": 6, "pad_token_id": 0}
    greedy = opt.generate(ids, attention_mask=mask, do_sample=False, **options)
    torch.manual_seed(1)
    sampled = opt.generate(ids, attention_mask=mask, do_sample=True, **options)
    return [opt(ids).logits, logits, *steps, greedy, sampled]
