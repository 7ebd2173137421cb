"""Quantized caches in ONNX Runtime: every form of GroupQueryAttention against the reference operator."""

from __future__ import annotations

import resource
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import onnx
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from skipstone.ir.capture.huggingface import capture_huggingface
from skipstone.ir.capture.validate import relative_difference
from skipstone.ir.dialect import ATTENTION_OPS, key_bias_of
from skipstone.ir.errors import Unsupported
from skipstone.ir.program import Program
from skipstone.optimize import optimize
from skipstone.passes.base import run_pass
from skipstone.passes.quantize_kv import QuantizeKV
from skipstone.plan import Plan
from skipstone.runtime.cache import KVCache
from skipstone.runtime.onnx.lower import lower
from skipstone.runtime.onnx.quantized import refuse_formats
from skipstone.runtime.onnx.session import OnnxSession
from tests.test_onnx_lowering import STEPS, VOCABULARY, all_nodes, assert_same_steps, build
from tests.versions import needs_group_query_attention

OPTIONS = [
    {},
    {"heads": 6, "kv_heads": 1, "width": 16},
    {"width": 64},
    {"softcap": 2.0},
    {"sinks": True},
    {"kind": "sliding", "window": 1},
    {"kind": "sliding", "window": 4},
    {"sinks": True, "softcap": 3.0, "kind": "sliding", "window": 3},
    {"key_bias": True, "kind": "sliding", "window": 4},
]
ALONE = [(1, [0]), (12, [0]), (1, [12]), (1, [13]), (3, [14]), (1, [17]), (1, [18])]
"""One sequence, whose single steps see much less of the cache than there is."""


def quantized(bits: int, **options) -> Program:
    """The program of one attention with a quantized cache, calibrated on all the keys and values that there are."""
    program = build(slot=0, **options)
    kv_heads, program.calibration = options.get("kv_heads", 2), {}
    for which, table in (("key", "k.weight"), ("value", "v.weight")):
        rows = program.tensor(table).detach().unflatten(1, (kv_heads, -1))
        for statistic, extreme in (("minimum", rows.amin(0)), ("maximum", rows.amax(0))):
            program.calibration[f"quantize_kv//{which}/{statistic}"] = extreme
    form = f"int{bits}"
    return run_pass(QuantizeKV(k=form, v=form, condition=False), program)


CELLS = [(8, options) for options in OPTIONS if len(options) != 1] + [(4, OPTIONS[0]), (4, OPTIONS[6])]
OTHERS = [(bits, options) for bits in (8, 4) for options in OPTIONS if (bits, options) not in CELLS]


@needs_group_query_attention
@pytest.mark.parametrize(
    ("bits", "options"), [*CELLS, *(pytest.param(*cell, marks=pytest.mark.slow) for cell in OTHERS)], ids=str
)
def test_steps_are_those_of_the_reference(bits: int, options: dict) -> None:
    """Prompts, chunks and single tokens: the same codes, the same logits, in the same buffers."""
    assert_same_steps(quantized(bits, **options), STEPS, ALONE)


@pytest.mark.parametrize(
    "options",
    [
        {"window": 4, "sinks": True},
        {"window": 4, "key_bias": True},
        *(pytest.param(each, marks=pytest.mark.slow) for each in ({"window": 4}, {"window": 3, "softcap": 2.0})),
    ],
    ids=str,
)
def test_windows_in_full_precision(options: dict) -> None:
    """Single steps that read a window as a cache of its own, in float32 too."""
    program = build(kind="sliding", **options)
    assert_same_steps(program, ALONE, STEPS)


@needs_group_query_attention
@pytest.mark.parametrize("bits", [8, 4])
def test_the_cache_is_read_by_fused_attention_alone(bits: int) -> None:
    """Nothing but the fused operator reads codes; the only other thing done to a cache is writing new rows to it."""
    graph = onnx.load_from_string(lower(quantized(bits)).proto).graph
    readers = Counter(node.op_type for node in all_nodes(graph) if {"key_0", "value_0"} & set(node.input))
    assert set(readers) == {"GroupQueryAttention", "ScatterND"}
    assert not [node for node in all_nodes(graph) if "DequantizeLinear" in node.op_type]


@needs_group_query_attention
@pytest.mark.parametrize(
    ("bits", "options", "conditions"),
    [
        (32, {}, []),
        (32, {"kind": "sliding", "window": 4}, ["beyond_12"]),
        (8, {"kind": "sliding", "window": 4}, ["beyond_8", "single", "first"]),
        (8, {"sinks": True}, ["first"]),
    ],
)
def test_forms(bits: int, options: dict, conditions: list[str]) -> None:
    """An attention has the forms that differ from the operator for it, and no others."""
    program = build(**options) if bits == 32 else quantized(bits, **options)
    nodes = list(all_nodes(onnx.load_from_string(lower(program).proto).graph))
    asked = [node.input[0].split(".")[1] for node in nodes if node.op_type == "If"]
    assert asked == conditions
    assert sum(node.op_type == "GroupQueryAttention" for node in nodes) == len(conditions) + 1


STATM = Path("/proc/self/statm")


@contextmanager
def limited(spare: int) -> Iterator[None]:
    """Let the process take only so many bytes of memory more than it has."""
    pages, (soft, hard) = int(STATM.read_text().split()[0]), resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + spare, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@needs_group_query_attention
@pytest.mark.parametrize(
    ("bits", "options"),
    [(8, {}), (4, {"kind": "sliding", "window": 4}), (32, {"kind": "sliding", "window": 4})],
    ids=str,
)
@pytest.mark.skipif(not STATM.exists(), reason="reads from /proc how much memory there is")
def test_no_step_copies_the_cache(bits: int, options: dict) -> None:
    """Steps over keys and values of 128 MiB each get by with 64 MiB: there is no room for a copy."""
    options = {"width": 64, **options}
    session = OnnxSession(build(**options) if bits == 32 else quantized(bits, **options), 1)
    small = KVCache.allocate(session.layout, 1, 32)
    large = KVCache.allocate(session.layout, 1, 2**27 // small.buffers["key_0"][:, :, :1].nbytes)
    for cache, spare in ((small, 2**30), (large, 2**26)):  # the first takes what does not depend on the cache
        with limited(spare):
            for rows, start in ((7, 0), (1, 7), (3, 8), (1, 20)):
                tokens, count = torch.zeros(1, rows, dtype=torch.int64), torch.tensor([rows])
                cache.lengths = torch.tensor([start])
                session.step(tokens, tokens, count, tokens, cache)


@needs_group_query_attention
@pytest.mark.parametrize("bits", [8, 4])
def test_a_version_without_quantized_caches_is_refused(bits: int) -> None:
    form = next(iter(QuantizeKV(k=f"int{bits}", v=f"int{bits}").validate()))
    refuse_formats([form], 0, 0)
    with (
        patch("skipstone.runtime.onnx.quantized.runs", lambda bits: False),
        pytest.raises(Unsupported, match=rf"a cache of {bits} bits on ONNX Runtime.*Update onnxruntime"),
    ):
        refuse_formats([form], 0, 0)


@needs_group_query_attention
def test_zero_scales_do_not_reach_the_operator() -> None:
    """It takes a scale of 0 for 1. A channel that is always 0 gets the scale 1 from the start, on every target."""
    program = quantized(8)
    statics = [tensor for name, tensor in program.tensors().items() if "int8_channel" in name]
    assert len(statics) == 2 and all(bool((tensor > 0).all()) for tensor in statics)
    assert all(tensor.dtype == torch.float32 for tensor in statics)


@pytest.fixture(scope="module")
def executables() -> list[Any]:
    """A model with large biases of its keys, with an int8 cache, on both targets."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": VOCABULARY}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 96}
    model = Qwen2ForCausalLM(Qwen2Config(**sizes, **heads, initializer_range=0.3)).eval()
    for layer in model.model.layers:
        layer.self_attn.k_proj.bias.data.normal_(std=20)
    options = {"calibration": [torch.randint(0, VOCABULARY, (2, 40))], "progress": False, "threads": 1}
    program = capture_huggingface(model)
    with patch.object(import_module("skipstone.optimize"), "capture", lambda *_: program.copy()):
        return [optimize(model, Plan([QuantizeKV()]), target=target, **options) for target in ("eager", "onnxruntime")]


@pytest.mark.slow
@needs_group_query_attention
def test_a_key_bias_beside_the_keys(executables: list[Any]) -> None:
    """In every form: a prompt, a chunk, and single tokens at all lengths that a cache has room for."""
    ids = torch.randint(0, VOCABULARY, (2, 40))
    results = []
    for each in executables:
        assert all(key_bias_of(node) is not None for node in each.program.nodes(*ATTENTION_OPS))
        logits, cache = each.prefill(ids[:, :20])
        steps = [logits[:, None], each.decode(ids[:, 20:27], cache)]
        steps += [each.decode(ids[:, at], cache)[:, None] for at in range(27, 40)]
        results.append(torch.cat(steps, dim=1))
    assert relative_difference(results[1], results[0]) < 1e-4


@pytest.mark.slow
@needs_group_query_attention
def test_layers_share_their_conditions(executables: list[Any]) -> None:
    graph = onnx.load_from_string(lower(executables[1].program).proto).graph
    asked = [node.input[0] for node in all_nodes(graph) if node.op_type == "If"]
    assert len(asked) == 4 and len(set(asked)) == 2
    assert len([each for each in graph.initializer if "neutral_sinks" in each.name]) == 1
