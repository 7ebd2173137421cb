"""Quantized caches in ONNX Runtime: what GroupQueryAttention can carry, tried out on the installed version."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

import numpy as np
import onnxruntime
from onnx import TensorProto, helper
from onnxruntime.capi import onnxruntime_pybind11_state as errors

from skipstone.ir.dialect import QUANTIZED_CACHED_ATTENTION, Kind, key_bias_of
from skipstone.ir.errors import Unsupported
from skipstone.ir.formats import Format, Full, IntegerChannel, parse
from skipstone.ir.program import Program, module_path

MICROSOFT = "com.microsoft"


def refuse_formats(formats: Iterable[Format], residual: int, first: int) -> None:
    """Refuse cache formats that ONNX Runtime has no fused attention for.

    Args:
        formats: all that a program uses, "full" among them.
        residual, first: rows in full precision beside them.
    Raises:
        Unsupported: the format, and what to take instead.
    """
    for form in sorted(formats, key=lambda each: each.name):
        if isinstance(form, Full):
            continue
        if not isinstance(form, IntegerChannel):
            hint = "Take k='int8' or 'int4' with granularity='channel', or target='eager'."
            raise Unsupported(f"the cache format {form.name} on ONNX Runtime", hint=hint)
        if residual or first:
            hint = "Set residual=0 and sinks=0, or take target='eager'."
            raise Unsupported("rows in full precision beside a quantized cache on ONNX Runtime", hint=hint)
        if not runs(form.bits):
            hint = "Update onnxruntime (1.32 or later), or take target='eager'."
            raise Unsupported(f"a cache of {form.bits} bits on ONNX Runtime {onnxruntime.__version__}", hint=hint)


def refuse_attentions(program: Program) -> None:
    """Refuse a program with a quantized attention that GroupQueryAttention does not compute.

    Raises:
        Unsupported: what stands in the way, and where.
    """
    for node in program.nodes(QUANTIZED_CACHED_ATTENTION):
        keys, values = (parse(str(node.kwargs[name])) for name in ("k_format", "v_format"))
        kept: Any = (node.kwargs.get("residual", 0), node.kwargs.get("first", 0))
        refuse_formats((keys, values), *kept)
        kind, width = node.kwargs["kind"], int(node.args[0].meta["val"].shape[3])  # type: ignore[union-attr]
        key_bias = key_bias_of(node)
        problem = ""
        if keys != values:
            problem = f"keys in {keys.name} beside values in {values.name}"
        elif kind not in (Kind.CAUSAL, Kind.SLIDING):
            problem = f"{kind} attention over a quantized cache"
        elif width % 8:
            problem = f"a quantized cache of heads of {width} elements, not a multiple of 8"
        elif key_bias is not None and node.kwargs.get("softcap"):
            problem = "a key bias beside the keys together with a soft cap"
        if problem:
            hint = "Leave the layer out (layers=), or take target='eager'."
            raise Unsupported(f"{problem} on ONNX Runtime", where=module_path(node), hint=hint)


@cache
def runs(bits: int) -> bool:
    """Whether the installed ONNX Runtime computes GroupQueryAttention over a cache of that many bits.

    A model of this one node is run and its result compared: version 1.26 loads such a node and fails when it runs, and
    up to 1.31 it takes no counts of new rows, which ragged batches need.
    """
    heads, width, capacity, rows = 2, 16, 8, 3
    stored = (np.int8, width) if bits == 8 else (np.uint8, width // 2)
    rng = np.random.default_rng(0)
    new = rng.integers(-7, 8, size=(3, 1, rows, heads * width)).astype(np.float32)
    empty = np.full((1, heads, capacity, stored[1]), 0 if bits == 8 else 0x88, dtype=stored[0])
    feeds = {
        "query": new[0], "key": new[1], "value": new[2], "past_key": empty, "past_value": empty.copy(),
        "last": np.array([rows - 1], np.int32), "total": np.array(rows, np.int32),
        "scale": np.ones((heads, width), np.float32), "count": np.array([rows], np.int32),
    }  # fmt: skip
    names = ["query", "key", "value", "past_key", "past_value", "last", "total"]
    names += [*[""] * 5, "scale", "scale", "", "", "count"]
    node = helper.make_node(
        "GroupQueryAttention", names, ["out", "present_key", "present_value"], domain=MICROSOFT,
        num_heads=heads, kv_num_heads=heads, **quantization(bits),
    )  # fmt: skip
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
        for name, value in feeds.items()
    ]
    cached = helper.np_dtype_to_tensor_dtype(np.dtype(stored[0]))
    outputs = [helper.make_tensor_value_info("out", TensorProto.FLOAT, new[0].shape)]
    outputs += [helper.make_tensor_value_info(name, cached, empty.shape) for name in node.output[1:]]
    graph = helper.make_graph([node], "probe", inputs, outputs)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(MICROSOFT, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    try:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # a refusal is an answer here, not an error to print
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        out = session.run(["out"], feeds)[0]
    except (errors.Fail, errors.InvalidArgument, errors.InvalidGraph, errors.NotImplemented, errors.RuntimeException):
        return False
    return bool(np.allclose(out, _attention(new, heads, width), atol=1e-4))


def quantization(bits: int) -> dict[str, Any]:
    """The attributes of GroupQueryAttention over a cache with one static scale a channel."""
    return {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": bits}


def _attention(new: np.ndarray, heads: int, width: int) -> np.ndarray:
    """Causal attention [1, S, heads * width] of queries, keys and values [3, 1, S, heads * width], in numpy."""
    q, k, v = (x[0].reshape(-1, heads, width).swapaxes(0, 1) for x in new)
    logits = q @ k.swapaxes(1, 2) / np.sqrt(width)
    logits = np.where(np.tril(np.ones(logits.shape[1:], bool)), logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    out = weights / weights.sum(-1, keepdims=True) @ v
    return out.swapaxes(0, 1).reshape(1, -1, heads * width)
