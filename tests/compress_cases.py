"""A model, plans that compress its cache, and what they mean, told by the model itself under masks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import skipstone
from skipstone.ir.capture.huggingface import capture_huggingface
from skipstone.ir.program import Program
from skipstone.passes.compress_kv import CompressKV, StreamingHeads
from skipstone.plan import Plan

LAYERS, VOCABULARY, HEADS = 3, 61, 4
KV_HEADS = {"mha": 4, "gqa": 2}
TARGETS = ("eager", "onnxruntime")


@dataclass(frozen=True)
class Case:
    """A plan entry, and by layer the key-value heads that it lets see a window; None for all of them."""

    entry: CompressKV
    streaming: dict[int, tuple[int, ...] | None]


CASES = {
    "all": Case(CompressKV(window=20), dict.fromkeys(range(LAYERS))),
    "some heads": Case(
        CompressKV(window=9, sinks=3, streaming=(StreamingHeads(0, (1,)), StreamingHeads(2, (0, 1)))),
        {0: (1,), 2: (0, 1)},
    ),
    "one layer": Case(CompressKV(window=1, sinks=0, layers=(1,)), {1: None}),
}


def model(heads: str, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    return _model(heads, dtype)


@cache
def _model(heads: str, dtype: torch.dtype) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS[heads], max_position_embeddings=512,
        initializer_range=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=2, attn_implementation="eager",
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().to(dtype)


def captured(heads: str, dtype: torch.dtype = torch.float32) -> Program:
    return _captured(heads, dtype)


@cache
def _captured(heads: str, dtype: torch.dtype) -> Program:
    return capture_huggingface(model(heads, dtype))


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def executable(heads: str, case: str, target: Any = "eager", dtype: torch.dtype = torch.float32) -> Any:
    return _executable(heads, case, target, dtype)


@cache
def _executable(heads: str, case: str, target: Any, dtype: torch.dtype) -> Any:
    return optimized(heads, Plan([CASES[case].entry]), target, dtype)


def optimized(heads: str, plan: Plan, target: Any = "eager", dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """What `optimize` gives; the model is captured once."""
    options = {"progress": False, "threads": 1} | options
    with patch.object(import_module("skipstone.optimize"), "capture", lambda *_: captured(heads, dtype).copy()):
        return skipstone.optimize(model(heads, dtype), plan, target=target, **options)


@contextmanager
def masked(heads: str, case: str, dtype: torch.dtype = torch.float32) -> Iterator[LlamaForCausalLM]:
    """The user's model, whose attentions are given a mask for each head."""
    entry, own = CASES[case].entry, model(heads, dtype)
    handles = []
    for number, layer in enumerate(own.model.layers):
        if number not in CASES[case].streaming:
            continue
        chosen = CASES[case].streaming[number]
        group = HEADS // KV_HEADS[heads]
        streams = torch.tensor([chosen is None or head // group in chosen for head in range(HEADS)])

        def hide(_module: Any, args: Any, named: dict[str, Any], streams: Tensor = streams) -> Any:
            rows = named["hidden_states"].shape[1] if "hidden_states" in named else args[0].shape[1]
            i, j = torch.arange(rows)[:, None], torch.arange(rows)
            seen = (j <= i) & ((j > i - entry.window) | (j < entry.sinks))
            seen = torch.where(streams[:, None, None], seen, j <= i)
            return args, {**named, "attention_mask": torch.where(seen, 0.0, -torch.inf).to(dtype)[None]}

        handles.append(layer.self_attn.register_forward_pre_hook(hide, with_kwargs=True))
    try:
        yield own
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def reference(heads: str, case: str, rows: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Logits [S, V] of one sequence of tokens [S], read at once and without a cache."""
    with masked(heads, case, dtype) as own:
        return own(rows[None]).logits[0]
