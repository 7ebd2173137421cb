"""From a program to an ONNX model, with opset 23 and `com.microsoft` operators only.

The program's graph is interpreted once under `torch.export`: there the operators that have a better ONNX form than
torch.onnx's own become that form (`_OnnxForms`), dialect operators without one become their reference in plain
operators, and everything else stays ATen, which torch.onnx converts. Weights never pass through the model: large
tensors are external data that the session takes from torch memory, under the names that they have in the program.
"""

from __future__ import annotations

import logging
import os
import re
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram

from skipstone.ir.dialect import (
    ATTENTION,
    CACHED_ATTENTION,
    EXPERTS,
    GATE,
    PROMPT_MEAN,
    PROMPT_TURN,
    QUANTIZED_CACHED_ATTENTION,
    SKIP_PREDICATE,
    WRITE_CACHE,
    WRITING_OPS,
    Kind,
    attention_reference,
    cached_attention_reference,
    first_buffer,
    key_bias_products,
)
from skipstone.ir.errors import ArtifactError, InternalError, Unsupported
from skipstone.ir.formats import parse
from skipstone.ir.keeping import write_cache_reference
from skipstone.ir.program import Port, Program, Role, module_path
from skipstone.ir.prompts import prompt_mean_reference, prompt_turn_reference
from skipstone.runtime.onnx import attention, experts, gates
from skipstone.runtime.onnx.layouts import cancel_moves
from skipstone.runtime.onnx.operators import gather_operators, rotary
from skipstone.runtime.onnx.quantized import MICROSOFT, quantization, refuse_attentions
from skipstone.runtime.session import written_buffers

OPSET = 23
MODEL_FILE, WEIGHTS_FILE = "model.onnx", "model.onnx.data"
PAGE = 4096
EXTERNAL_FROM_BYTES = 1024
"""Tensors from this size on are external. Smaller ones stay in the model, where ONNX Runtime can fold them."""

_ROOT = "program"
_NO_KERNELS = (torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class LoweredModel:
    """An ONNX model and the tensors that it refers to.

    Attributes:
        proto: the serialized model. Large initializers are external data without content.
        tensors: the external initializers by name; they alias the program's tensors.
        inputs, outputs: names in port order.
        written: for each output that replaces a cache buffer, that buffer. Where a slot is written several times, all
            of these outputs are to be one memory with the buffer; then each writes in place, in their order.
    """

    proto: bytes
    tensors: dict[str, Tensor]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    written: dict[str, str]


def lower(program: Program, directory: Path | None = None) -> LoweredModel:
    """Lower a program to ONNX.

    Args:
        program: in float32; left as it is.
        directory: where to write ``model.onnx`` and its weights too, if anywhere: a directory that is empty or does not
            exist yet. It comes into being whole or not at all.
    Raises:
        ArtifactError: the directory cannot be written.
        Unsupported: a dtype that ONNX Runtime has no CPU kernels for, or an operator that ONNX has no form for.
    """
    _check_dtypes(program)
    refuse_attentions(program)
    program = _with_all_writes(gather_operators(program))
    exported = _export(program)
    try:
        model = _to_onnx(exported)
    except torch.onnx.errors.OnnxExporterError as error:
        raise _refusal(error, program) from error
    del exported
    experts.expand(model)
    attention.expand(model)
    cancel_moves(model)
    _name_ports(model, program)
    tensors = _externalize(model, program)
    _keep_places_only(model)
    gates.expand(model)  # last: nothing else looks into branches
    proto = ir.to_proto(model).SerializeToString()
    if directory is not None:
        _save(proto, tensors, directory)
    inputs, outputs = (tuple(port.name for port in ports) for ports in (program.inputs, program.outputs))
    return LoweredModel(proto, tensors, inputs, outputs, written_buffers(program))


def _with_all_writes(program: Program) -> Program:
    """A program that also returns what a cache slot holds before it is written once more."""
    program = program.copy()
    returned = set(program.output_node().all_input_nodes)
    for number, node in enumerate(program.nodes(*WRITING_OPS)):
        for left in [user for user in node.users if user not in returned]:
            place: Any = left.args[1]
            if (place := place - first_buffer(node)) >= 0:
                role, name = ((Role.CACHE_KEY, "key"), (Role.CACHE_VALUE, "value"))[place]
                slot: Any = node.kwargs["slot"]
                program.add_output(Port(f"{name}_{slot}_before_{number}", role, slot), left)
    return program


def _check_dtypes(program: Program) -> None:
    for node in program.graph.nodes:
        if getattr(node.meta.get("val"), "dtype", None) in _NO_KERNELS:
            raise Unsupported(
                f"{node.meta['val'].dtype} on ONNX Runtime's CPU provider",
                where=_place(node),
                hint="Convert the model to float32, or use target='eager'.",
            )


class _OnnxForms(fx.Interpreter):
    """Runs a program's graph with the operators that we choose an ONNX form for in that form."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.lengths: dict[Tensor, tuple[Tensor, Tensor, Tensor]] = {}
        self.halves: dict[Tensor, Tensor] = {}
        self.bounds: dict[tuple[Any, ...], Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n.target is torch.ops.aten.matmul.default and (weight := _transposed_weight(n)) is not None:
            x, stack = self.env[n.args[0]], self.env[weight]  # type: ignore[index]
            return _linear(x, stack)
        return super().run_node(n)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        match target:
            case torch.ops.aten.linear.default if args[1].dim() == 2:
                return _linear(*args, **kwargs)
            case _ if target == ATTENTION:
                return attention_reference(*args, **kwargs)
            case _ if target == CACHED_ATTENTION and _has_group_query_form(*args, **kwargs):
                return self._group_query_attention(*args, **kwargs)
            case _ if target == CACHED_ATTENTION:
                return cached_attention_reference(*args, **kwargs)
            case _ if target == WRITE_CACHE:
                return write_cache_reference(*args)
            case _ if target == QUANTIZED_CACHED_ATTENTION:
                return self._quantized_attention(*args, **kwargs)
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
        bias: Tensor | None = None,
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
        if start not in self.lengths:
            # `query_seqlens` lets a batch continue with several tokens each, from different starts; `total` is then an
            # upper bound only.
            last = start + (rows - 1)
            total = (last.max() + 1).to(torch.int32)
            self.lengths[start] = last.to(torch.int32), total, torch.full_like(start, rows, dtype=torch.int32)
        last, total, count = self.lengths[start]
        flat = [x.transpose(1, 2).reshape(batch, rows, x.shape[1] * width) for x in (q, k, v)]
        attributes: dict[str, Any] = {"num_heads": heads, "kv_num_heads": k.shape[1], "scale": scale, "do_rotary": 0}
        attributes |= quantization
        if kind == Kind.SLIDING:
            attributes["local_window_size"] = window
        if softcap > 0:
            attributes["softcap"] = softcap
        # The operator wants as many columns as the longest sequence has rows.
        columns: Any = 0 if key_bias is None else total.item()
        constant = key_bias_products(q, key_bias, frequencies, columns, first_position)
        if constant is not None:
            bias = constant * scale
        inputs = (*flat, k_cache, v_cache, last, total, None, None, None, bias, sinks, *scales, None, None, count)
        out, keys, values = torch.onnx.ops.symbolic_multi_out(
            f"{MICROSOFT}::GroupQueryAttention",
            inputs,
            attributes,
            dtypes=(q.dtype, k_cache.dtype, v_cache.dtype),
            shapes=((batch, rows, heads * width), k_cache.shape, v_cache.shape),
            version=1,
        )
        return out.reshape(batch, rows, heads, width).transpose(1, 2), keys, values

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
    product = torch.onnx.ops.symbolic(
        f"{MICROSOFT}::FusedMatMul",
        (x, weight),
        {"transB": 1},
        dtype=x.dtype,
        shape=(*x.shape[:-1], weight.shape[-2]),
        version=1,
    )
    return product if bias is None else product + bias


def _has_group_query_form(
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
    """Whether GroupQueryAttention computes exactly this `cached_attention`."""
    one_width = q.shape[3] == v.shape[3] and q.shape[3] % 8 == 0
    one_dtype = {x.dtype for x in (q, k, v, k_cache, v_cache)} == {torch.float32}
    capped = key_bias is not None and softcap > 0  # its bias is added behind the cap
    return kind in (Kind.CAUSAL, Kind.SLIDING) and bias is None and one_width and one_dtype and not capped


class _Wrapper(nn.Module):
    def __init__(self, program: Program) -> None:
        super().__init__()
        setattr(self, _ROOT, program.module)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        with fx.traceback.preserve_node_meta():
            return _OnnxForms(getattr(self, _ROOT)).run(*inputs)


def _export(program: Program) -> ExportedProgram:
    fakes = [node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"]
    examples = tuple(torch.zeros([_example(size) for size in fake.shape], dtype=fake.dtype) for fake in fakes)
    axes = tuple(
        {axis: Dim.AUTO for axis, size in enumerate(fake.shape) if isinstance(size, torch.SymInt)} for fake in fakes
    )
    with torch.no_grad():
        return torch.export.export(_Wrapper(program), examples, dynamic_shapes=(axes,), strict=False)


def _example(size: int | torch.SymInt) -> int:
    """A size that satisfies all that was assumed about `size` when the program was traced."""
    return size if isinstance(size, int) else int(size.node.hint)


def _to_onnx(exported: ExportedProgram) -> ir.Model:
    with _quiet():
        # Without torch.onnx's optimizer: it folds weights into new tensors, and ONNX Runtime optimizes at loading.
        converted = torch.onnx.export(exported, dynamo=True, opset_version=OPSET, optimize=False, verbose=False)
    if converted is None:
        raise InternalError("torch.onnx.export returned nothing")
    return converted.model


@contextmanager
def _quiet() -> Iterator[None]:
    """torch.onnx logs a line for each package that is not installed."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _refusal(error: BaseException, program: Program) -> Unsupported:
    """Name the operator that torch.onnx could not convert, and the first module that it stands in."""
    hint = "Use target='eager'."
    cause: BaseException | None = error
    while cause is not None:
        if found := re.search(r"translating node .* = call_function\[target=torch\.ops\.\w+\.(\w+)", str(cause)):
            # torch.onnx decomposes the graph first: its nodes are others, but the operators keep their names.
            same = (node for node in program.nodes() if found[1] in str(node.target))
            return Unsupported(f"operator {found[1]} in ONNX", where=_place(next(same, None)), hint=hint)
        cause = cause.__cause__
    return Unsupported(f"conversion to ONNX ({str(error).splitlines()[0]})", hint=hint)


def _place(node: fx.Node | None) -> str:
    return "" if node is None else module_path(node) or node.name


def _name_ports(model: ir.Model, program: Program) -> None:
    """Call inputs and outputs by their port names, which no other value may have then."""
    graph, ports = model.graph, [port.name for port in (*program.inputs, *program.outputs)]
    for value in [value for node in graph for value in node.outputs if value.name in ports]:
        value.name = f"{value.name}_inside"
    for index, value in enumerate(graph.outputs):
        if value.producer() is None or value in graph.outputs[:index]:
            # An input that is returned, or one value returned twice: each output needs a value of its own.
            graph.append(copy := ir.Node("", "Identity", [value]))
            copy.outputs[0].type, copy.outputs[0].shape = value.type, value.shape
            graph.outputs[index] = copy.outputs[0]
    for value, name in zip((*graph.inputs, *graph.outputs), ports, strict=True):
        value.name = name


def _keep_places_only(model: ir.Model) -> None:
    """Drop what torch.onnx notes down beside the module path of each node: stack traces and signatures, mostly."""
    model.graph.metadata_props.clear()
    for node in model.graph:
        place = node.metadata_props.get("namespace")
        node.metadata_props.clear()
        if place is not None:
            node.metadata_props["namespace"] = place
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()


def _externalize(model: ir.Model, program: Program) -> dict[str, Tensor]:
    """Give initializers their program names, and turn large ones into external data."""
    own = program.tensors()
    ports = {port.name for port in (*program.inputs, *program.outputs)}
    tensors: dict[str, Tensor] = {}
    offset = 0
    for initializer in list(model.graph.initializers.values()):
        original = str(initializer.name).removeprefix(f"{_ROOT}.")
        name = str(initializer.name) if original in ports else original
        content = initializer.const_value
        initializer.name = name
        if content is None or content.nbytes < EXTERNAL_FROM_BYTES:
            continue
        tensor = own[original] if original in own else torch.from_numpy(content.numpy())
        tensors[name] = tensor.detach().contiguous()
        initializer.const_value = ir.ExternalTensor(
            WEIGHTS_FILE, offset, content.nbytes, content.dtype, name=name, shape=content.shape
        )
        offset += -(-content.nbytes // PAGE) * PAGE  # page-aligned, so that the file can be mapped
    return tensors


def _save(proto: bytes, tensors: dict[str, Tensor], directory: Path) -> None:
    """Write the model and its external data beside `directory`, and move them there when they are complete."""
    directory = directory.absolute()
    try:
        with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}.") as temporary:
            # A directory of its own: the temporary one may be read by nobody else.
            complete = Path(temporary) / directory.name
            complete.mkdir()
            with open(complete / WEIGHTS_FILE, "wb") as file:
                for tensor in tensors.values():  # in the places that `_externalize` has given them
                    file.write(tensor.numpy().data)
                    file.write(bytes(-tensor.nbytes % PAGE))
            (complete / MODEL_FILE).write_bytes(proto)
            os.replace(complete, directory)
    except OSError as error:
        raise ArtifactError(
            f"Cannot write the model {directory}: {error.strerror or error}.",
            hint="It needs a directory that is empty or does not exist yet.",
        ) from error
