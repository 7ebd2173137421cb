"""Quantized caches in ONNX Runtime: every form of GroupQueryAttention against the reference operator."""

from __future__ import annotations

from collections import Counter
from unittest.mock import patch

import onnx
import pytest
import torch

from skipstone.ir.errors import Unsupported
from skipstone.ir.program import Program
from skipstone.passes.base import run_pass
from skipstone.passes.quantize_kv import QuantizeKV
from skipstone.runtime.onnx.lower import lower
from skipstone.runtime.onnx.quantized import refuse_formats
from tests.test_onnx_lowering import STEPS, all_nodes, assert_same_steps, build

OPTIONS = [
    {},
    {"heads": 6, "kv_heads": 1, "width": 16},
    {"width": 64},
    {"softcap": 2.0},
    {"sinks": True},
    {"kind": "sliding", "window": 1},
    {"kind": "sliding", "window": 4},
    {"sinks": True, "softcap": 3.0, "kind": "sliding", "window": 3},
]
ALONE = [(12, [0]), (1, [12]), (1, [13]), (3, [14]), (1, [17]), (1, [18])]
"""One sequence, whose single steps see much less of the cache than there is."""


def quantized(bits: int, **options) -> Program:
    """The program of one attention with a quantized cache, calibrated on all the keys and values that there are."""
    program = build(slot=0, **options)
    kv_heads = options.get("kv_heads", 2)
    for which, table in (("key", "k.weight"), ("value", "v.weight")):
        rows = program.tensor(table).detach().unflatten(1, (kv_heads, -1))
        for statistic, extreme in (("minimum", rows.amin(0)), ("maximum", rows.amax(0))):
            program.calibration[f"quantize_kv//{which}/{statistic}"] = extreme
    form = f"int{bits}"
    return run_pass(QuantizeKV(k=form, v=form, condition=False), program)


CELLS = [(8, options) for options in OPTIONS] + [(4, options) for options in OPTIONS if len(options) in (0, 2)]
OTHERS = [(4, options) for options in OPTIONS if len(options) not in (0, 2)]


@pytest.mark.parametrize("steps", [STEPS, ALONE], ids=["ragged", "alone"])
@pytest.mark.parametrize(
    ("bits", "options"), [*CELLS, *(pytest.param(*cell, marks=pytest.mark.slow) for cell in OTHERS)], ids=str
)
def test_steps_are_those_of_the_reference(bits: int, options: dict, steps: list) -> None:
    """Prompts, chunks and single tokens: the same codes, the same logits, in the same buffers."""
    assert_same_steps(quantized(bits, **options), steps)


@pytest.mark.parametrize(
    "options", [{"window": 4}, {"window": 4, "sinks": True}, {"window": 3, "softcap": 2.0}], ids=str
)
def test_windows_in_full_precision(options: dict) -> None:
    """Single steps that read a window as a cache of its own, in float32 too."""
    program = build(kind="sliding", **options)
    assert_same_steps(program, ALONE)
    assert_same_steps(program, STEPS)


@pytest.mark.parametrize("bits", [8, 4])
def test_the_cache_is_read_by_fused_attention_alone(bits: int) -> None:
    """Nothing but the fused operator reads codes; the only other thing done to a cache is writing new rows to it."""
    graph = onnx.load_from_string(lower(quantized(bits)).proto).graph
    readers = Counter(node.op_type for node in all_nodes(graph) if {"key_0", "value_0"} & set(node.input))
    assert set(readers) == {"GroupQueryAttention", "ScatterND"}
    assert not [node for node in all_nodes(graph) if "DequantizeLinear" in node.op_type]


@pytest.mark.parametrize("bits", [8, 4])
def test_a_version_without_quantized_caches_is_refused(bits: int) -> None:
    form = next(iter(QuantizeKV(k=f"int{bits}", v=f"int{bits}").validate()))
    refuse_formats([form], 0, 0)
    with (
        patch("skipstone.runtime.onnx.quantized.runs", lambda bits: False),
        pytest.raises(Unsupported, match=rf"a cache of {bits} bits on ONNX Runtime.*Update onnxruntime"),
    ):
        refuse_formats([form], 0, 0)


def test_zero_scales_do_not_reach_the_operator() -> None:
    """It takes a scale of 0 for 1. A channel that is always 0 gets the scale 1 from the start, on every target."""
    program = quantized(8)
    statics = [tensor for name, tensor in program.tensors().items() if "int8_channel" in name]
    assert len(statics) == 2 and all(bool((tensor > 0).all()) for tensor in statics)
    assert all(tensor.dtype == torch.float32 for tensor in statics)
