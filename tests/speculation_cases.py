"""Models and drafts of every quality, for the tests of generation with a draft."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from skipstone import (
    FuseParallel,
    LayerParallel,
    Plan,
    QuantizeKV,
    QuantizeWeights,
    Segment,
    SelfSpeculate,
    SkipFFNAdaptive,
    SkipSublayers,
)
from skipstone.calibrate import token_batches
from skipstone.ir.capture.huggingface import capture_huggingface
from skipstone.ir.program import Program
from skipstone.optimize import lower, rewrite
from skipstone.passes.base import Pass
from skipstone.runtime.executable import Executable

VOCABULARY, POSITIONS, PAD = 61, 48, 0
LONG: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": PAD}

PERFECT = SelfSpeculate(skip=SkipSublayers(layers=(1,)))
"""The draft leaves out what adds nothing."""
FAIR = SelfSpeculate(tokens=3, skip=SkipSublayers(layers=(1, 2)))
"""Some of its guesses are right."""
FUSED = SelfSpeculate(tokens=3, parallel=LayerParallel((Segment(2, 4),)))
"""Two attentions are one in the draft, which has copies of their keys and values."""


def _llama() -> LlamaForCausalLM:
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=POSITIONS, initializer_range=0.3, pad_token_id=PAD,
            bos_token_id=1, eos_token_id=None,
        )
    )  # fmt: skip
    with torch.no_grad():
        for layer, share in ((1, 0.0), (2, 0.4)):
            for module in (model.model.layers[layer].self_attn.o_proj, model.model.layers[layer].mlp.down_proj):
                module.weight.mul_(share)
    return model


def _gpt2() -> GPT2LMHeadModel:
    size = {"vocab_size": VOCABULARY, "n_positions": POSITIONS, "bos_token_id": 1, "eos_token_id": None}
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=3, n_head=4, pad_token_id=PAD, **size))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


@cache
def model(name: str = "llama", dtype: torch.dtype = torch.float64) -> Any:
    """Layer 1 of "llama" (grouped heads) adds nothing, and layer 2 little. Each head of "gpt2" has its own keys."""
    torch.manual_seed(0)
    return {"llama": _llama, "gpt2": _gpt2}[name]().eval().to(dtype)


@cache
def captured(name: str = "llama", dtype: torch.dtype = torch.float64) -> Program:
    return capture_huggingface(model(name, dtype))


def program(
    entries: Sequence[Pass], name: str = "llama", dtype: torch.dtype = torch.float64, target: str = "eager"
) -> Program:
    batches = token_batches([prompt(20, 20)["input_ids"]], captured(name, dtype).source)
    if not any(isinstance(each, QuantizeKV) for each in entries):
        batches = []
    return rewrite(captured(name, dtype), Plan(entries), target=target, batches=batches)[0]


@cache
def built(
    entries: tuple[Pass, ...], name: str = "llama", dtype: torch.dtype = torch.float64, target: str = "eager"
) -> Any:
    """The executable of a plan, made once."""
    return Executable(lower(program(entries, name, dtype, target), target, threads=1), target=target)


def plain(executable: Any) -> Any:
    """The same without its draft."""
    return Executable(executable.session.model, target=executable.target, max_length=executable.max_length)


def prompt(*lengths: int, seed: int = 0) -> dict[str, Tensor]:
    """A batch of random prompts, padded on the left."""
    width = max(lengths)
    generator = torch.Generator().manual_seed(seed + sum(lengths))
    ids = torch.randint(3, VOCABULARY, (len(lengths), width), generator=generator)
    mask = torch.stack([(torch.arange(width) >= width - length).long() for length in lengths])
    return {"input_ids": ids.where(mask.bool(), PAD), "attention_mask": mask}


@contextmanager
def counted(executable: Any) -> Iterator[list[int]]:
    """Steps, drafted and accepted tokens of what is generated inside, once it is."""
    found: list[int] = []
    before = vars(executable.speculation).copy()
    yield found
    found += [getattr(executable.speculation, name) - before[name] for name in ("steps", "drafted", "accepted")]


def _parallel(*segment: int, kv: Any = "iterate") -> LayerParallel:
    start, stop, iterations = segment
    return LayerParallel((Segment(start, stop, iterations=iterations),), kv=kv)


_ADAPTIVE = SkipFFNAdaptive(threshold=0.3, cold_start=0, cold_end=0, warmup_tokens=2, max_share=1.0)
_CHANNEL = QuantizeKV("int8", "int8", granularity="channel")
_TOKEN = QuantizeKV("int4", "int8", granularity="token", group=8, residual=5, sinks=2)
_GROUP = QuantizeKV("int4", "int4", granularity="group", group=8, residual=6, sinks=1)
_LATE = SelfSpeculate(skip=SkipSublayers(ffn=(3,)))

CASES: dict[str, tuple[Pass, ...]] = {
    "perfect": (PERFECT,),
    "fair": (FAIR,),
    "terrible": (SelfSpeculate(tokens=1, skip=SkipSublayers(layers=(0, 3))),),
    "sublayers": (SelfSpeculate(tokens=31, skip=SkipSublayers(attention=(0, 2, 3), ffn=(1,))),),
    "fused": (FUSED,),
    "fused twice": (SelfSpeculate(parallel=_parallel(0, 4, 2)),),
    "last": (SelfSpeculate(parallel=_parallel(0, 4, 2, kv="last")),),
    "final": (SelfSpeculate(parallel=_parallel(0, 4, 2, kv="final")),),
    "weights": (SelfSpeculate(weights=QuantizeWeights(4)),),
    "adaptive": (SelfSpeculate(adaptive=_ADAPTIVE),),
    "all": (SelfSpeculate(5, SkipSublayers(attention=(3,)), _parallel(0, 2, 1), QuantizeWeights(8), _ADAPTIVE),),
    "beneath: skipped": (SkipSublayers(attention=(0,), layers=(1,)), SelfSpeculate(skip=SkipSublayers(ffn=(2,)))),
    "beneath: parallel": (_parallel(0, 3, 2), FuseParallel(), _LATE),
    "beneath: other parallel": (_parallel(0, 2, 2), FUSED),
    "beneath: adaptive": (_ADAPTIVE, FAIR),
    "beneath: channels": (_CHANNEL, FAIR),
    "beneath: channels, fused": (_CHANNEL, FUSED),
    "beneath: tokens": (_TOKEN, FAIR),
    "beneath: tokens, fused": (_TOKEN, FUSED),
    "beneath: groups": (_GROUP, FAIR),
    "beneath: groups, fused": (_GROUP, FUSED),
}
"""Plans for "llama"."""
