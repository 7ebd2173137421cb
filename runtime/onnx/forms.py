"""The operators of a program in the forms that suit ONNX Runtime, while it is traced for torch.onnx."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, ClassVar

import torch
from onnxruntime.capi.onnxruntime_pybind11_state import get_all_operator_schema
from torch import Tensor, fx

from skipstone.ir.dialect import (
    ATTENTION,
    CACHED_ATTENTION,
    EXPERTS,
    GATE,
    KEPT_START,
    MATMUL_NBITS,
    PROMPT_MEAN,
    PROMPT_SCORES,
    PROMPT_TURN,
    QUANTIZED_CACHED_ATTENTION,
    SKIP_PREDICATE,
    WINDOWED_ATTENTION,
    WRITE_CACHE,
    Kind,
    attention_reference,
    cached_attention_reference,
    key_bias_products,
    weighted_values,
)
from skipstone.ir.formats import parse
from skipstone.ir.keeping import write_cache_reference
from skipstone.ir.kept_prompt import kept_start_reference, prompt_scores_reference
from skipstone.ir.program import Program, Role
from skipstone.ir.prompts import prompt_mean_reference, prompt_turn_reference
from skipstone.ir.windowed import row_places, visible_rows, windowed_attention_reference, write_places
from skipstone.runtime.onnx import experts, gates
from skipstone.runtime.onnx.operators import rotary
from skipstone.runtime.onnx.quantized import MICROSOFT, quantization

_GROUP_QUERY_INPUTS = 17
"""Inputs of GroupQueryAttention up to the number of new rows."""


class OnnxForms(fx.Interpreter):
    """Runs a program's graph with the operators that we choose an ONNX form for in that form.

    Attributes:
        in_place: whether each cache has room for the new tokens, and its buffer is bound as what replaces it, too.
        sizes: what the sizes of inputs are called, by role and axis; "" for one without a name.
    """

    in_place: ClassVar[bool] = True
    sizes: ClassVar[Mapping[Role, tuple[str, ...]]] = dict.fromkeys(
        (Role.TOKENS, Role.POSITIONS, Role.PADDING, Role.EMBEDDINGS), ("batch_size", "sequence_length")
    )

    def __init__(self, program: Program) -> None:
        super().__init__(program.module, garbage_collect_values=False)
        self.lengths: dict[Tensor, tuple[Tensor, Tensor, Tensor]] = {}
        self.halves: dict[Tensor, Tensor] = {}
        self.bounds: dict[tuple[Any, ...], Tensor] = {}
        self.windows: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n.target is torch.ops.aten.matmul.default and (weight := _transposed_weight(n)) is not None:
            x, stack = self.env[n.args[0]], self.env[weight]  # type: ignore[index]
            return _linear(x, stack)
        return super().run_node(n)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        match target:
            case torch.ops.aten.linear.default if args[1].dim() == 2:
                return _linear(*args, **kwargs)
            case _ if target == MATMUL_NBITS:
                return _matmul_nbits(*args, **kwargs)
            case _ if target == ATTENTION:
                return attention_reference(*args, **kwargs)
            case _ if target == CACHED_ATTENTION and has_group_query_form(*args, **kwargs):
                return self._group_query_attention(*args, **kwargs)
            case _ if target == CACHED_ATTENTION:
                return self._cached_attention(*args, **kwargs)
            case _ if target == WRITE_CACHE:
                return self._write_cache(*args)
            case _ if target == QUANTIZED_CACHED_ATTENTION:
                return self._quantized_attention(*args, **kwargs)
            case _ if target == WINDOWED_ATTENTION:
                return self._windowed_attention(*args, **kwargs)
            case _ if target is rotary:
                return self._rotary_embedding(*args)
            case _ if target == EXPERTS:
                return experts.symbol(*args, **kwargs)
            case _ if target == SKIP_PREDICATE:
                return self._skip_predicate(*args, **kwargs)
            case _ if target == PROMPT_TURN:
                return prompt_turn_reference(*args)
            case _ if target == PROMPT_MEAN:
                return prompt_mean_reference(*args)
            case _ if target == PROMPT_SCORES:
                return prompt_scores_reference(*args, **kwargs)
            case _ if target == KEPT_START:
                return kept_start_reference(*args, **kwargs)
            case _ if target == GATE:
                return gates.symbol(*args)
        return super().call_function(target, args, kwargs)

    def _skip_predicate(
        self,
        before: Tensor,
        after: Tensor,
        start: Tensor,
        decode_start: Tensor,
        met: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """`skip_predicate`; what each token's cosine has to reach is found out once for all sublayers."""
        key = (start, decode_start, *options.values())
        if key not in self.bounds:
            self.bounds[key] = gates.bounds(before.shape[1], start, decode_start, **options)
        return gates.predicate(before, after, self.bounds[key], met)

    def _rotary_embedding(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """`rotary` on rows [B, S, N * D], which is how a projection leaves them; its own layout would be transposed."""
        batch, heads, rows, width = x.shape
        for angle in (cos, sin):
            if angle not in self.halves:
                self.halves[angle] = angle[:, 0, :, : width // 2]
        flat = x.transpose(1, 2).reshape(batch, rows, heads * width)
        turned = torch.onnx.ops.rotary_embedding(flat, self.halves[cos], self.halves[sin], num_heads=heads)
        return turned.reshape(batch, rows, heads, width).transpose(1, 2)

    def _group_query_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        start: Tensor,
        _bias: None = None,
        sinks: Tensor | None = None,
        key_bias: Tensor | None = None,
        frequencies: Tensor | None = None,
        scales: tuple[Tensor | None, Tensor | None] = (None, None),
        *,
        scale: float,
        kind: str,
        window: int = 0,
        softcap: float = 0.0,
        slot: int = -1,
        first_position: int = 0,
        **quantization: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`cached_attention` as GroupQueryAttention; it writes in place when past and present are one buffer.

        Args:
            scales: of the keys and the values of a quantized cache, float32 [KH, D].
            quantization: the attributes that go with them.
        """
        batch, heads, rows, width = q.shape
        last, total, count = self._sizes(start, rows)
        flat = [x.transpose(1, 2).reshape(batch, rows, x.shape[1] * width) for x in (q, k, v)]
        attributes: dict[str, Any] = {"num_heads": heads, "kv_num_heads": k.shape[1], "scale": scale, "do_rotary": 0}
        attributes |= quantization
        if kind == Kind.SLIDING:
            attributes["local_window_size"] = window
        if softcap > 0:
            attributes["softcap"] = softcap
        constant = self._key_bias_products(q, key_bias, frequencies, total, first_position)
        bias = self._attention_bias(rows, None if constant is None else constant * scale)
        inputs = (*flat, k_cache, v_cache, last, total, None, None, None, bias, sinks, *scales, None, None, count)
        out, keys, values = torch.onnx.ops.symbolic_multi_out(
            f"{MICROSOFT}::GroupQueryAttention",
            inputs,
            attributes,
            dtypes=(q.dtype, k_cache.dtype, v_cache.dtype),
            shapes=((batch, rows, heads * width), *(self._written_shape(each) for each in (k_cache, v_cache))),
            version=1,
        )
        return out.reshape(batch, rows, heads, width).transpose(1, 2), keys, values

    def _sizes(self, start: Tensor, rows: Any) -> tuple[Tensor, Tensor, Tensor]:
        """What GroupQueryAttention wants to know of a step of `rows` tokens a sequence: the last row of each sequence
        in the cache [B], the longest sequence, and the new rows of each [B]; all int32.

        The counts let a batch continue with several tokens each, from different starts; the longest sequence is then an
        upper bound only.
        """
        if start not in self.lengths:
            last = start + (rows - 1)
            total = (last.max() + 1).to(torch.int32)
            self.lengths[start] = last.to(torch.int32), total, torch.full_like(start, rows, dtype=torch.int32)
        return self.lengths[start]

    def _key_bias_products(
        self, q: Tensor, key_bias: Tensor | None, frequencies: Tensor | None, total: Tensor, first_position: int
    ) -> Tensor | None:
        """`key_bias_products` with as many columns as the longest sequence has rows, which the operator asks for."""
        columns: Any = 0 if key_bias is None else total.item()
        return key_bias_products(q, key_bias, frequencies, columns, first_position)

    def _attention_bias(self, rows: Any, bias: Tensor | None) -> Tensor | None:
        """What GroupQueryAttention adds to its logits, given what the attention adds itself."""
        return bias

    def _written_shape(self, cache: Tensor) -> Any:
        """The shape of a cache behind a step."""
        return cache.shape

    def _cached_attention(self, *operands: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        """`cached_attention` in plain operators."""
        return cached_attention_reference(*operands, **options)

    def _write_cache(
        self, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, start: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`write_cache` in plain operators."""
        return write_cache_reference(k, v, k_cache, v_cache, start)

    def _quantized_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        k_cache: list[Tensor],
        v_cache: list[Tensor],
        start: Tensor,
        count: Tensor | None = None,
        k_static: Tensor | None = None,
        v_static: Tensor | None = None,
        *constants: Tensor | None,
        k_format: str,
        v_format: str,
        residual: int = 0,
        first: int = 0,
        **options: Any,
    ) -> list[Tensor]:
        """`quantized_cached_attention` over codes with one static scale a channel."""
        operands = (q, k, v, k_cache[0], v_cache[0], start, None, *constants)
        options |= {"scales": (k_static, v_static), **quantization(parse(k_format).bits)}
        out = self._group_query_attention(*operands, **options)  # type: ignore
        return list(out)

    def _windowed_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        start: Tensor,
        count: Tensor,
        sinks: Tensor | None = None,
        *,
        scale: float,
        window: int,
        first: int = 0,
        softcap: float = 0.0,
        slot: int = -1,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`windowed_attention`: rows are written in place, and read from there; there are few of them.

        What is seen is a sum with 0 or with the lowest finite number, so that rows of padding stay finite.
        """
        if sinks is not None:
            options: dict[str, Any] = {"scale": scale, "window": window, "first": first, "softcap": softcap}
            return windowed_attention_reference(q, k, v, k_cache, v_cache, start, count, sinks, **options)
        rows, cache_rows = k.shape[2], k_cache.shape[2]
        key = (start, count, window, first)
        if key not in self.windows:
            seen = visible_rows(cache_rows, first, window, start, count, rows)
            hidden = torch.where(seen, 0.0, torch.finfo(torch.float32).min)
            self.windows[key] = row_places(cache_rows, first, start, count, rows), hidden
        places, hidden = self.windows[key]
        keys, values = write_places(k_cache, k, places), write_places(v_cache, v, places)
        batch, heads, _, width = q.shape
        kv_heads = keys.shape[1]
        grouped = q.reshape(batch, kv_heads, heads // kv_heads * rows, width)
        products = _products(grouped, keys, scale, (batch, kv_heads, heads // kv_heads * rows, cache_rows))
        logits = products.reshape(batch, heads, rows, cache_rows)
        if softcap > 0:
            logits = softcap * torch.tanh(logits / softcap)
        weights = torch.softmax(logits + hidden, dim=-1)
        return weighted_values(weights, values), keys, values


def _transposed_weight(product: fx.Node) -> fx.Node | None:
    """The stack of weights [N, F, D] that a product with values [N, rows, D] reads transposed, if it does."""
    x, factor = product.args[:2]
    transposes = isinstance(factor, fx.Node) and factor.target is torch.ops.aten.transpose.int
    if not transposes or not isinstance(x, fx.Node) or x.meta["val"].ndim != 3:
        return None
    weight, *axes = factor.args  # type: ignore[union-attr]
    is_stack = isinstance(weight, fx.Node) and weight.op == "get_attr" and weight.meta["val"].ndim == 3
    return weight if is_stack and axes == [1, 2] else None  # type: ignore[return-value]


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias`` that reads the weight as it lies in memory; torch.onnx would make a transposed copy.

    Of a stack of weights [N, F, D], each one is for its own rows [N, rows, D].
    """
    product = _products(x, weight, 1.0, (*x.shape[:-1], weight.shape[-2]))
    return product if bias is None else product + bias


def _products(x: Tensor, y: Tensor, scale: float, shape: tuple[Any, ...]) -> Tensor:
    """``scale * x @ y.mT``, of this shape, that reads y as it lies in memory."""
    attributes: dict[str, Any] = {"transB": 1} | ({"alpha": scale} if scale != 1.0 else {})
    return torch.onnx.ops.symbolic(
        f"{MICROSOFT}::FusedMatMul", (x, y), attributes, dtype=x.dtype, shape=shape, version=1
    )


def _matmul_nbits(
    x: Tensor, codes: Tensor, scales: Tensor, zero_points: Tensor, *, bits: int, activations: str = "float32"
) -> Tensor:
    """`matmul_nbits` as the operator that it is named after."""
    columns, _, width = codes.shape
    attributes: dict[str, Any] = {"K": x.shape[-1], "N": columns, "bits": bits, "block_size": width * 8 // bits}
    if activations == "int8":
        attributes["accuracy_level"] = 4  # the least that the operator may compute with; 0 leaves them as they are
    return torch.onnx.ops.symbolic(
        f"{MICROSOFT}::MatMulNBits",
        (x, codes, scales, zero_points),
        attributes,
        dtype=x.dtype,
        shape=(*x.shape[:-1], columns),
        version=1,
    )


def has_group_query_form(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    start: Tensor,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    key_bias: Tensor | None = None,
    frequencies: Tensor | None = None,
    *,
    kind: str,
    softcap: float = 0.0,
    **_options: Any,
) -> bool:
    """Whether GroupQueryAttention of the installed ONNX Runtime computes exactly this `cached_attention`."""
    one_width = q.shape[3] == v.shape[3] and q.shape[3] % 8 == 0
    one_dtype = {x.dtype for x in (q, k, v, k_cache, v_cache)} == {torch.float32}
    capped = key_bias is not None and softcap > 0  # its bias is added behind the cap
    exact = kind in (Kind.CAUSAL, Kind.SLIDING) and bias is None and one_width and one_dtype and not capped
    return exact and takes_counts()


def reads_what_it_wrote(node: fx.Node) -> bool:
    """Whether a node that writes a cache is several operators, of which others read the cache behind the write."""
    if node.target != CACHED_ATTENTION:
        return False  # a quantized cache, which has no other form, or a write alone
    values = [each.meta["val"] if isinstance(each, fx.Node) else each for each in node.args]
    return not has_group_query_form(*values, **node.kwargs)  # type: ignore[arg-type]


@cache
def takes_counts() -> bool:
    """Whether GroupQueryAttention of the installed ONNX Runtime takes the number of new rows, as from 1.32 on.

    Without it, the operator refuses several new rows a sequence behind others where the batch has several sequences.
    """
    schemas = [each for each in get_all_operator_schema() if each.name == "GroupQueryAttention"]
    return any(each.max_input >= _GROUP_QUERY_INPUTS for each in schemas)
