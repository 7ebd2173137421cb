"""From a program to a graph that Inductor compiles: caches are written in place, small operators become plain ones.

Functional caches would be copied whole at each step, since Inductor does not elide those copies (457 ms a step against
0.6 ms, for four caches of 128 MB). So each cached attention becomes its mutating twin over the same buffers, those of
one slot in their order, and the new buffers leave the outputs. Attention through a cache and predicated linear layers
stay operators of the dialect, which have Triton kernels on CUDA devices; the others become their references, so that
Inductor sees into them. So does attention to a window, whose caches are small.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import has_side_effect

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
    SKIP_PREDICATE,
    WINDOWED_ATTENTION,
    WRITE_CACHE,
    WRITING_OPS,
    attention_reference,
    cache_operands,
    first_buffer,
)
from skipstone.ir.errors import InternalError, Unsupported
from skipstone.ir.gates import gate_reference, skip_predicate_reference
from skipstone.ir.kept_prompt import kept_start_reference, prompt_scores_reference
from skipstone.ir.program import Program, module_path
from skipstone.ir.prompts import prompt_mean_reference, prompt_turn_reference
from skipstone.ir.quantized import quantized_cached_attention_
from skipstone.ir.windowed import attend_to_window, row_places
from skipstone.runtime.triton.experts import gathered_experts
from skipstone.runtime.triton.products import gather, linear, matmul
from skipstone.runtime.triton.rows import gather_products

aten = torch.ops.aten

TWIN = torch.ops.skipstone.quantized_cached_attention_.default


def lower(program: Program) -> Program:
    """The program over caches that it writes in place; it is no longer functional, and for running only.

    Args:
        program: left as it is; the result shares its tensors.
    Raises:
        Unsupported: an operator that the Triton kernels do not have.
    """
    for node in program.nodes(MATMUL_NBITS):
        hint = "Use target='onnxruntime', or leave quantize_weights out of the plan."
        raise Unsupported("weights of few bits on the triton target", where=module_path(node), hint=hint)
    program = program.copy()
    program.remove_outputs([node for node in _returned(program) if _is_buffer(node)])
    for node in list(program.nodes(*WRITING_OPS)):
        _write_in_place(program, node)
    for node in program.nodes(*_PLAIN):
        node.target = _PLAIN[node.target]
    program.graph.lint()
    return program


def decode_graph(program: Program) -> fx.Graph:
    """The graph of a lowered program for steps of a single token: it never waits for the device."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(program.graph, {}))
    gather_products(graph)
    for node in graph.nodes:
        if node.target is EXPERTS:
            node.target = gathered_experts
        elif node.target is aten.linear.default:
            node.target = linear
        elif node.target is aten.matmul.default:
            node.target = matmul
        elif node.target is aten.gather.default:
            node.target = gather
    return graph


def check_kernels(program: Program) -> None:
    """Refuse what the CUDA kernels of a lowered program's operators would refuse, before anything is compiled.

    Raises:
        Unsupported: see `skipstone.kernels.call.Call.check`.
    """
    # Not at the top: a CPU build of torch brings no Triton. The imports register the kernels with the operators.
    import skipstone.kernels.predicated_linear
    import skipstone.kernels.quantized_cached_attention
    import skipstone.kernels.row_linear
    import skipstone.kernels.take_best  # noqa: F401
    from skipstone.kernels.call import Call

    fields = Call.__dataclass_fields__.keys()
    for node in program.nodes(TWIN):
        values: tuple[Any, ...] = fx.map_arg(node.args, lambda each: each.meta["val"])  # type: ignore[assignment]
        names = [argument.name for argument in TWIN._schema.arguments]
        operands = dict(zip(names, values, strict=False)) | node.kwargs
        try:
            Call(**{name: value for name, value in operands.items() if name in fields}).check()
        except Unsupported as reason:
            raise Unsupported(reason.feature, where=module_path(node), hint=reason.hint) from reason


def _returned(program: Program) -> list[fx.Node]:
    return list(program.output_node().args[0])  # type: ignore[arg-type]


def _is_buffer(node: fx.Node) -> bool:
    """Whether a value is a cache buffer after a step."""
    source = node.args[0] if node.target is operator.getitem else None
    return isinstance(source, fx.Node) and source.target in WRITING_OPS and node.args[1] >= first_buffer(source)  # type: ignore[operator, return-value]


def _write_in_place(program: Program, node: fx.Node) -> None:
    """Put a mutating twin in the place of what writes to a cache slot; what follows it there takes the same buffers."""
    keys, values = cache_operands(node)
    buffers = (*keys, *values)
    for buffer in buffers:
        if any(user is not node and user.target not in (TWIN, _write_rows, _write_window) for user in buffer.users):
            raise InternalError(f"the cache buffer {buffer.name} is read beside its attention {node.name}")
    with program.graph.inserting_before(node):
        out = _twin(program, node)
    for user in list(node.users):
        place: Any = user.args[1]
        if (place := place - first_buffer(node)) < 0:
            user.replace_all_uses_with(out)
        elif any(reader.target not in WRITING_OPS for reader in user.users):
            raise InternalError(f"{user.name}, a cache buffer after a step, is read inside the program")
        else:
            user.replace_all_uses_with(buffers[place])
        program.graph.erase_node(user)
    program.graph.erase_node(node)


def _twin(program: Program, node: fx.Node) -> fx.Node:
    """What computes an attention and writes in place; of a plain write, the last of its parts."""
    keys, values = cache_operands(node)
    if node.target == WRITE_CACHE:
        k, v, *_, start = node.args
        program.call(_write_rows, *keys, k, start)
        return program.call(_write_rows, *values, v, start)
    if node.target == WINDOWED_ATTENTION:
        q, k, v, *buffers, start, count, sinks = (*node.args, None)[:8]
        first: Any = node.kwargs.get("first", 0)
        for cache, rows in zip(buffers, (k, v), strict=True):
            program.call(_write_window, cache, rows, start, count, first)
        rest = {name: value for name, value in node.kwargs.items() if name != "slot"}
        return program.call(attend_to_window, q, *buffers, start, count, sinks, **rest)
    if node.target == CACHED_ATTENTION:
        q, k, v, _, _, start, bias, sinks, key_bias, frequencies = (*node.args, *[None] * 4)[:10]
        if bias is not None:
            raise Unsupported("a bias of the logits through a KV cache on this target", where=module_path(node))
        args: tuple[Any, ...] = (q, k, v, keys, values, start, None, None, None, sinks, key_bias, frequencies)
        options: dict[str, Any] = {"k_format": "full", "v_format": "full", **node.kwargs}
    else:
        args, options = node.args, dict(node.kwargs)
    out = program.call(TWIN, *args, **options)
    out.meta = {**node.meta, "val": out.meta["val"]}
    return out


@has_side_effect
def _write_rows(cache: Tensor, rows: Tensor, start: Tensor) -> None:
    """Write rows [B, KH, S, D] into a cache [B, KH, C, D] from row ``start[b]`` on."""
    _put(cache, rows, start.unsqueeze(1) + torch.arange(rows.shape[2], device=rows.device))


@has_side_effect
def _write_window(cache: Tensor, rows: Tensor, start: Tensor, count: Tensor, first: int) -> None:
    """Write rows [B, KH, S, D] into a cache of `windowed_attention`."""
    _put(cache, rows, row_places(cache.shape[2], first, start, count, rows.shape[2]))


def _put(cache: Tensor, rows: Tensor, places: Tensor) -> None:
    """Write rows [B, KH, S, D] to `places`, int64 [B, S], of a cache [B, KH, C, D]."""
    batch = torch.arange(rows.shape[0], device=rows.device).unsqueeze(1)
    cache.transpose(1, 2).index_put_((batch, places), rows.transpose(1, 2).to(cache.dtype))


_PLAIN: Mapping[Any, Callable[..., Any]] = {
    ATTENTION: attention_reference,
    SKIP_PREDICATE: skip_predicate_reference,
    GATE: gate_reference,
    PROMPT_TURN: prompt_turn_reference,
    PROMPT_MEAN: prompt_mean_reference,
    PROMPT_SCORES: prompt_scores_reference,
    KEPT_START: kept_start_reference,
}
assert quantized_cached_attention_  # registers the twin
