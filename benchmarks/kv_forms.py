"""Forms of decode attention over a long cache in ONNX Runtime: what `benchmarks.kv_speed` compares.

Each form is one step of a decoder: it writes the new row of keys and values into the cache, in place, and attends to
the whole context. Where the query heads that share a head of keys go through as rows of one head, so that they share
the work on the cache too, a form is "packed".
"""

from __future__ import annotations

from collections.abc import Callable

import onnxruntime
import torch
from onnx import ModelProto, parser
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from skipstone.ir.formats import parse
from skipstone.runtime.onnx.session import share

HEADS, KV_HEADS, WIDTH = 32, 8, 128
GROUP = HEADS // KV_HEADS
SCALE = WIDTH**-0.5
FORMATS = {32: "full", 8: "int8_channel", 4: "int4_channel"}
CODES = {32: "float", 8: "int8", 4: "uint8"}


class Step:
    """A step at the end of a context: its inputs, a cache, and what must come out.

    Args:
        bits: of an element of the cache.
        context: tokens in the cache after the step; its capacity too.
    """

    def __init__(self, bits: int, context: int) -> None:
        random = torch.Generator().manual_seed(0)
        self.bits, last = bits, context - 1
        self.query = torch.randn(1, 1, HEADS * WIDTH, generator=random)
        # Each new key is the first query of its group: what does not attend to the new row is far off.
        self.new_key = self.query.view(1, KV_HEADS, GROUP, WIDTH)[:, :, :1].contiguous()
        self.new_value = torch.randn(1, KV_HEADS, 1, WIDTH, generator=random)
        self.keys, k_scale, decoded_keys = self._cache(self.new_key, context, random)
        self.values, v_scale, decoded_values = self._cache(self.new_value, context, random)
        self.expected = attend(self.query, decoded_keys, decoded_values)
        self.inputs = {
            "query": self.query,
            "key": self.new_key.view(1, 1, KV_HEADS * WIDTH),
            "value": self.new_value.view(1, 1, KV_HEADS * WIDTH),
            "keys": self.keys,
            "values": self.values,
            "k_scale": k_scale.flatten(),
            "v_scale": v_scale.flatten(),
            "last": torch.tensor([last], dtype=torch.int32),
            "total": torch.tensor(context, dtype=torch.int32),
            "neutral": torch.full((HEADS,), -torch.inf),
            "new_rows": torch.tensor([[0, head, last] for head in range(KV_HEADS)]),
            "recent": torch.arange(last - GROUP + 1, last),
        }

    def _cache(self, new: Tensor, context: int, random: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Codes [1, KV_HEADS, context, *] without the new row, scales [KV_HEADS, WIDTH], and all rows decoded."""
        rows = torch.randn(1, KV_HEADS, context, WIDTH, generator=random)
        rows[:, :, -1:] = new
        form = parse(FORMATS[self.bits])
        scale = rows.abs().amax(dim=(0, 2)) / (2 ** (self.bits - 1) - 1)
        parts = form.encode(rows, scale)
        decoded = form.decode(parts, scale, torch.float32, WIDTH).clone()
        parts[0][:, :, -1] = 0
        return parts[0], scale, decoded

    @property
    def bytes(self) -> int:
        """Bytes of keys and values that have to be read."""
        return self.keys.nbytes + self.values.nbytes


def attend(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """PyTorch's attention of a query [1, 1, HEADS * WIDTH], packed, to all rows [1, KV_HEADS, T, WIDTH]."""
    packed = query.view(1, KV_HEADS, GROUP, WIDTH)
    return scaled_dot_product_attention(packed, keys, values).reshape(1, 1, HEADS * WIDTH)


def torch_form(step: Step) -> Callable[[], Tensor]:
    """The step over a cache of 32 bits in PyTorch, which runs with as many threads as it is set to."""

    def run() -> Tensor:
        step.keys[:, :, -1:] = step.new_key
        step.values[:, :, -1:] = step.new_value
        return attend(step.query, step.keys, step.values)

    return run


def onnx_form(step: Step, body: str, threads: int) -> Callable[[], Tensor]:
    """The step in ONNX Runtime, with the options of `skipstone.runtime.onnx`.

    Args:
        step: inputs; its cache is what is written to.
        body: nodes that make `out`, `keys_out` and `values_out` from `Step.inputs`, in ONNX's textual syntax.
        threads: that the session may use.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.dynamic_block_base", "4")
    session = onnxruntime.InferenceSession(
        _model(step.bits, body).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    values = {name: share(tensor) for name, tensor in step.inputs.items()}
    binding = session.io_binding()
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    binding.bind_output("out", "cpu")
    for name in ("keys", "values"):
        binding.bind_ortvalue_output(f"{name}_out", values[name])

    def run() -> Tensor:
        session.run_with_iobinding(binding)
        return torch.from_dlpack(binding.get_outputs()[0])

    return run


def _model(bits: int, body: str) -> ModelProto:
    cache = f"{CODES[bits]}[1, K, C, W]"
    return parser.parse_model(f"""
        <ir_version: 10, opset_import: ["": 23, "com.microsoft": 1]>
        step (
            float[1, 1, NH] query, float[1, 1, KH] key, float[1, 1, KH] value, {cache} keys, {cache} values,
            float[KH] k_scale, float[KH] v_scale, int32[1] last, int32 total,
            float[N] neutral, int64[K, 3] new_rows, int64[R] recent
        ) => (float[1, 1, NH] out, {cache} keys_out, {cache} values_out) {{
            {body}
        }}""")


def group_query_attention(bits: int, neutral_sinks: bool = False) -> str:
    """GroupQueryAttention as it is meant to be used.

    Args:
        bits: of the cache.
        neutral_sinks: give it attention sinks of -infinity, which change nothing in the result. They keep the operator
            from its tiled algorithm, which over a quantized cache is slower than the plain one when there is one query.
    """
    sinks = "neutral" if neutral_sinks else ""
    scales = "" if bits == 32 else "k_scale, v_scale"
    optional = f", , , , , {sinks}, {scales}" if sinks or scales else ""
    return f"""
        out, keys_out, values_out = com.microsoft.GroupQueryAttention <
            num_heads = {HEADS}, kv_num_heads = {KV_HEADS}, scale = {SCALE}{_quantization(bits)}
        > (query, key, value, keys, values, last, total{optional})"""


def packed_group_query_attention(bits: int) -> str:
    """GroupQueryAttention with as many query heads as heads of keys, each with the g rows of a group, not causal.

    It has to be given as many new keys as queries. They are the last g - 1 rows of the cache, which so are written once
    more (the codes of decoded codes are the same), and the new row. For a batch of one sequence without a window.
    """
    scales = ", , , , , , k_scale, v_scale" if bits == 8 else ""
    return f"""
        {_packed_query()}
        heads_of_rows = Constant <value_ints = [1, {GROUP - 1}, {KV_HEADS * WIDTH}]> ()
        rows_of_queries = Constant <value_ints = [1, {GROUP}, {KV_HEADS * WIDTH}]> ()
        {_with_recent_rows("key", "keys", "k_scale", bits)}
        {_with_recent_rows("value", "values", "v_scale", bits)}
        by_row = Transpose <perm = [0, 2, 1, 3]> (packed)
        queries = Reshape (by_row, rows_of_queries)
        rows_out, keys_out, values_out = com.microsoft.GroupQueryAttention <
            num_heads = {KV_HEADS}, kv_num_heads = {KV_HEADS}, causal = 0, scale = {SCALE}{_quantization(bits)}
        > (queries, key_rows, value_rows, keys, values, last, total{scales})
        split = Constant <value_ints = [1, {GROUP}, {KV_HEADS}, {WIDTH}]> ()
        by_row_out = Reshape (rows_out, split)
        packed_out = Transpose <perm = [0, 2, 1, 3]> (by_row_out)
        {_unpacked_output()}"""


def _with_recent_rows(new: str, cache: str, scale: str, bits: int) -> str:
    """`{new}_rows`: the last g - 1 rows of a cache, decoded, then the new one."""
    decode = f"{new}_recent = Identity ({new}_codes)"
    if bits == 8:
        decode = f"""
            {new}_elements = Cast <to = 1> ({new}_codes)
            {new}_shape = Constant <value_ints = [1, {KV_HEADS}, 1, {WIDTH}]> ()
            {new}_scale = Reshape ({scale}, {new}_shape)
            {new}_recent = Mul ({new}_elements, {new}_scale)"""
    return f"""
        {new}_codes = Gather <axis = 2> ({cache}, recent)
        {decode}
        {new}_by_row = Transpose <perm = [0, 2, 1, 3]> ({new}_recent)
        {new}_flat = Reshape ({new}_by_row, heads_of_rows)
        {new}_rows = Concat <axis = 1> ({new}_flat, {new})"""


def packed_attention() -> str:
    """Attention of opset 23 over a cache of 32 bits, to its capacity."""
    return f"""
        {_append("key", "keys", "", 32)}
        {_append("value", "values", "", 32)}
        {_packed_query()}
        packed_out = Attention <scale = {SCALE}> (packed, keys_out, values_out)
        {_unpacked_output()}"""


def packed_matmul(bits: int) -> str:
    """Two matrix products and a softmax, to the capacity; the scales of an 8-bit cache go into the small operands."""
    if bits == 32:
        query, keys, values, output = "packed", "keys_out", "values_out", "packed_out = Identity (product)"
        decode = ""
    else:
        query, keys, values, output = "scaled", "k_elements", "v_elements", "packed_out = Mul (product, v_scales)"
        decode = f"""
            per_head = Constant <value_ints = [1, {KV_HEADS}, 1, {WIDTH}]> ()
            k_scales = Reshape (k_scale, per_head)
            v_scales = Reshape (v_scale, per_head)
            scaled = Mul (packed, k_scales)
            k_elements = Cast <to = 1> (keys_out)
            v_elements = Cast <to = 1> (values_out)"""
    return f"""
        {_append("key", "keys", "k_scale", bits)}
        {_append("value", "values", "v_scale", bits)}
        {_packed_query()}
        {decode}
        logits = com.microsoft.FusedMatMul <transB = 1, alpha = {SCALE}> ({query}, {keys})
        weights = Softmax <axis = -1> (logits)
        product = MatMul (weights, {values})
        {output}
        {_unpacked_output()}"""


def _append(new: str, cache: str, scale: str, bits: int) -> str:
    """Write the new row into a cache; ScatterND does it in place, as its input and output are one buffer."""
    encode = f"{new}_codes = Identity ({new})"
    if bits == 8:
        encode = f"""
            {new}_inverse = Reciprocal ({scale})
            {new}_quotient = Mul ({new}, {new}_inverse)
            {new}_rounded = Round ({new}_quotient)
            {new}_low = Constant <value_float = -128.0> ()
            {new}_high = Constant <value_float = 127.0> ()
            {new}_clipped = Clip ({new}_rounded, {new}_low, {new}_high)
            {new}_codes = Cast <to = 3> ({new}_clipped)"""
    return f"""
        {encode}
        {new}_shape = Constant <value_ints = [{KV_HEADS}, {WIDTH}]> ()
        {new}_row = Reshape ({new}_codes, {new}_shape)
        {cache}_out = ScatterND ({cache}, new_rows, {new}_row)"""


def _packed_query() -> str:
    return f"""
        groups = Constant <value_ints = [1, {KV_HEADS}, {GROUP}, {WIDTH}]> ()
        packed = Reshape (query, groups)"""


def _unpacked_output() -> str:
    return f"""
        flat = Constant <value_ints = [1, 1, {HEADS * WIDTH}]> ()
        out = Reshape (packed_out, flat)"""


def _quantization(bits: int) -> str:
    if bits == 32:
        return ""
    return f', k_quant_type = "PER_CHANNEL", v_quant_type = "PER_CHANNEL", kv_cache_bit_width = {bits}'
