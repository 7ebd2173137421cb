"""From a program to an ONNX model of standard and `com.microsoft` operators only.

The program's graph is interpreted once under `torch.export`: there the operators that have a better ONNX form than
torch.onnx's own become that form (`OnnxForms`), dialect operators without one become their reference in plain
operators, and everything else stays ATen, which torch.onnx converts. Weights never pass through the model: large
tensors are external data that the session takes from torch memory, under the names that they have in the program.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram

from skipstone.ir.dialect import WRITING_OPS, first_buffer
from skipstone.ir.errors import InternalError, Unsupported
from skipstone.ir.program import Port, Program, Role, module_path
from skipstone.runtime.onnx import attention, experts, gates
from skipstone.runtime.onnx.constants import fold_constants
from skipstone.runtime.onnx.files import MODEL_FILE, WEIGHTS_FILE, Weights, save
from skipstone.runtime.onnx.forms import OnnxForms, reads_what_it_wrote
from skipstone.runtime.onnx.layouts import cancel_moves
from skipstone.runtime.onnx.operators import gather_operators
from skipstone.runtime.onnx.opsets import OPSET, at_opset
from skipstone.runtime.onnx.places import keep_places, name_nodes, note_passes
from skipstone.runtime.onnx.quantized import refuse_attentions
from skipstone.runtime.session import written_buffers

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


def lower(
    program: Program,
    directory: Path | None = None,
    forms: type[OnnxForms] = OnnxForms,
    opset: int = OPSET,
    weights: Weights | None = None,
) -> LoweredModel:
    """Lower a program to ONNX.

    Args:
        program: in float32; left as it is.
        directory: where to write ``model.onnx`` and its weights too, if anywhere: a directory that is empty or does not
            exist yet. It comes into being whole or not at all.
        forms: the forms that its operators take.
        opset: version of the standard operators, from `OPSET` on.
        weights: the file in which its large initializers get their places, where other models share it.
    Raises:
        ArtifactError: the directory cannot be written.
        Unsupported: a dtype that ONNX Runtime has no CPU kernels for, or an operator that ONNX has no form for.
    """
    _check_dtypes(program)
    refuse_attentions(program)
    program = gather_operators(program)
    if forms.in_place:
        program = _with_all_writes(program)
    note_passes(program)
    exported = _export(program, forms)
    try:
        model = _to_onnx(exported)
    except torch.onnx.errors.OnnxExporterError as error:
        raise _refusal(error, program) from error
    del exported
    experts.expand(model)
    attention.expand(model, forms.in_place)
    cancel_moves(model)
    fold_constants(model)
    _name_ports(model, program)
    weights = Weights() if weights is None else weights
    tensors = _externalize(model, program, weights)
    keep_places(model)
    gates.expand(model)  # behind all else: nothing else looks into branches
    name_nodes(model)
    _name_sizes(model, program, forms)
    proto = at_opset(ir.to_proto(model), opset).SerializeToString()
    if directory is not None:
        save({MODEL_FILE: proto}, weights, directory)
    inputs, outputs = (tuple(port.name for port in ports) for ports in (program.inputs, program.outputs))
    return LoweredModel(proto, tensors, inputs, outputs, written_buffers(program))


def _with_all_writes(program: Program) -> Program:
    """A program that also returns what a cache slot holds before it is written once more.

    But for what an attention in plain operators still reads: ONNX Runtime knows of no order between that and the next
    write, so it must not be in the same memory.
    """
    program = program.copy()
    returned = set(program.output_node().all_input_nodes)
    for number, node in enumerate(program.nodes(*WRITING_OPS)):
        if reads_what_it_wrote(node):
            continue
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


class _Wrapper(nn.Module):
    def __init__(self, program: Program, forms: type[OnnxForms]) -> None:
        super().__init__()
        setattr(self, _ROOT, program.module)
        self.run = forms(program).run

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        with fx.traceback.preserve_node_meta():
            return self.run(*inputs)


def _export(program: Program, forms: type[OnnxForms]) -> ExportedProgram:
    fakes = [node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"]
    examples = tuple(torch.zeros([_example(size) for size in fake.shape], dtype=fake.dtype) for fake in fakes)
    axes = tuple(
        {axis: Dim.AUTO for axis, size in enumerate(fake.shape) if isinstance(size, torch.SymInt)} for fake in fakes
    )
    with torch.no_grad():
        exported = torch.export.export(_Wrapper(program, forms), examples, dynamic_shapes=(axes,), strict=False)
    _check_sizes(exported, program, axes)
    return exported


def _check_sizes(exported: ExportedProgram, program: Program, axes: Sequence[Mapping[int, Any]]) -> None:
    """Refuse a graph in which a size has become that of the example: it would be wrong for all others."""
    names = exported.graph_signature.user_inputs
    values = {node.name: node.meta["val"] for node in exported.graph.nodes if node.op == "placeholder"}
    for name, port, own in zip(names, program.inputs, axes, strict=True):
        for axis in own:
            size = values[str(name)].shape[axis]
            if isinstance(size, int) or size.node.expr.is_number:
                feature = f"an operator in ONNX that works for size {size} in dimension {axis} of {port.name!r} alone"
                raise Unsupported(feature, hint="Use target='eager'.")


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


def _name_sizes(model: ir.Model, program: Program, forms: type[OnnxForms]) -> None:
    """Give sizes that depend on the input names that tell what they are."""
    names: dict[str | None, str] = {}
    for value, port in zip(model.graph.inputs, program.inputs, strict=True):
        for size, name in zip(value.shape or (), forms.sizes.get(port.role, ()), strict=False):
            if name and isinstance(size, ir.SymbolicDim):
                names[size.value] = name
    for value in (*model.graph.inputs, *(value for node in model.graph.all_nodes() for value in node.outputs)):
        if value.shape is not None:
            sizes = [size if isinstance(size, int) else names.get(size.value, size.value) for size in value.shape]
            value.shape = ir.Shape(sizes)


def _externalize(model: ir.Model, program: Program, weights: Weights) -> dict[str, Tensor]:
    """Give initializers their program names, and turn large ones into external data."""
    own = program.tensors()
    ports = {port.name for port in (*program.inputs, *program.outputs)}
    tensors: dict[str, Tensor] = {}
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
            WEIGHTS_FILE, weights.place(tensors[name]), content.nbytes, content.dtype, name=name, shape=content.shape
        )
    return tensors
