"""Capture of the graphs that Dynamo hands to a `torch.compile` backend.

A *frame* is one such graph: what a model does in one call, together with the cache that it reads and writes. Dynamo
makes parameters inputs of the graph; in a program, they are tensors again, under their names in the model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch._functorch.aot_autograd import GraphSignature, aot_export_module

from skipstone.ir.capture.attention import recognise_attention
from skipstone.ir.capture.exported import copy_call, first_line, kept_metadata
from skipstone.ir.errors import InternalError, Unsupported
from skipstone.ir.program import Port, Program, Role, Source, module_path

aten = torch.ops.aten

_ATTENTION = aten.scaled_dot_product_attention.default
_DROPOUT: Mapping[Any, int] = {
    aten.dropout.default: 1, aten.feature_dropout.default: 1, aten.alpha_dropout.default: 1, _ATTENTION: 4,
}  # fmt: skip
"""Operators that may drop values, and where the rate stands among their arguments."""
_REGION = torch.ops.higher_order.invoke_subgraph
_AUTOCAST = ("_enter_autocast", "_exit_autocast")
_MODULE = re.compile(r"\._(?:modules|parameters|buffers)\['([^']*)'\]")


@dataclass
class Frame:
    """A graph of Dynamo as a program.

    Attributes:
        program: what it computes: the new values of `written`, then its results but for the constants.
        module: the graph of Dynamo.
        root: what the frame calls the module whose parameters it reads, e.g. ``L['self']``; "" if it reads none.
        owned: parameters and buffers: the names of the program's tensors, by those of the graph's inputs.
        written: inputs of the graph that are written in place.
        constants: results that are no tensors or sizes of the graph, by their place.
        kept: the module paths of the attentions that values are kept of, by the values' numbers.
    """

    program: Program
    module: fx.GraphModule
    root: str
    owned: dict[str, str]
    written: tuple[str, ...]
    constants: dict[int, Any]
    kept: list[str] = field(default_factory=list)


def capture_frame(module: fx.GraphModule, inputs: Sequence[Any]) -> Frame:
    """Make a program of a graph that Dynamo traced.

    Args:
        module: the graph, which is left as it is. Its inputs carry `example_value` and a source.
        inputs: what it is called with, a tensor or a number for each input.
    Raises:
        Unsupported: autocast or control flow in the graph, or a graph without tokens or embeddings.
    """
    placeholders = module.graph.find_nodes(op="placeholder")
    values = dict(zip((node.name for node in placeholders), inputs, strict=True))
    flat = _without_regions(module)
    if any(getattr(node.target, "__name__", "") in _AUTOCAST for node in flat.graph.nodes):
        raise Unsupported("autocast inside the model", hint="Cast the model instead.")
    exported, signature = _functional(flat, [node.meta["example_value"] for node in placeholders])
    arguments = exported.graph.find_nodes(op="placeholder")
    constants = [*signature.parameters, *signature.buffers]
    names = dict(zip((node.name for node in arguments), (*constants, *values), strict=True))
    written = tuple(names[name] for name in signature.user_inputs_to_mutate.values())
    root = _root(placeholders)
    owned = _owned(placeholders, root, written)

    graph, tensors, ports = fx.Graph(), dict[str, Tensor](), list[Port]()
    environment: dict[fx.Node, Any] = {}

    def own(node: fx.Node, name: str, tensor: Tensor) -> None:
        tensors[name] = tensor.detach()
        environment[node] = graph.get_attr(name)
        environment[node].meta = kept_metadata(node.meta, root)

    for node in exported.graph.nodes:
        name = names.get(node.name, "")
        if node.op == "placeholder" and name in owned:
            own(node, owned[name], values[name])
        elif node.op == "placeholder" and name in values:
            environment[node] = graph.placeholder(name)
            environment[node].meta = kept_metadata(node.meta, root)
            ports.append(Port(name, Role.TENSOR))
        elif node.op == "placeholder":
            own(node, _free(name, tensors), _tensor(flat, name))
        elif node.op == "get_attr":
            own(node, _free(str(node.target), tensors), _tensor(exported, str(node.target)))
        elif node.op == "output":
            results = fx.map_arg(node.args[0], lambda old: environment[old])
        else:
            environment[node] = copy_call(graph, node, environment, exported, tensors, root)
    count = len(written)
    fixed = {place: each for place, each in enumerate(results[count:]) if not isinstance(each, fx.Node)}
    graph.output(tuple(each for each in results if isinstance(each, fx.Node)))
    outputs = [Port(f"new_{name}", Role.TENSOR) for name in written]
    outputs += [Port(f"result_{place}", Role.TENSOR) for place in range(len(results) - count) if place not in fixed]
    program = Program(fx.GraphModule(tensors, graph), tuple(ports), tuple(outputs), _source(root, tensors))
    program.inputs = _with_roles(program)
    _refuse_dropout(program)
    recognise_attention(program, verbatim=True)
    _refuse_unknown_attention(program)
    for node in program.nodes(aten.clone.default):
        source: Any = node.args[0]
        if source.op == "placeholder" and source.target in written:  # rewrites take copies for what they copy
            raise Unsupported(f"a copy of {source.target}, which the frame writes to", where=module_path(node))
    return Frame(program, module, root, owned, written, fixed)


def _refuse_dropout(program: Program) -> None:
    """Attention is recognised, and layers are compared, as what they compute without it."""
    for node in program.nodes(*_DROPOUT):
        position = _DROPOUT[node.target]
        rate: Any = node.args[position] if len(node.args) > position else 0.0
        is_active = node.target is _ATTENTION or bool(node.args[2])
        if rate and is_active:
            raise Unsupported("dropout in a compiled frame", where=module_path(node), hint="Call model.eval() first.")


def _refuse_unknown_attention(program: Program) -> None:
    """Layers are told apart by their attentions: one that is not known would make the numbers of layers wrong."""
    for node in program.nodes():
        target = node.target
        is_softmax = target in (aten.softmax.int, aten._softmax.default) and node.meta["val"].ndim >= 4
        large = [each for each in node.all_input_nodes if getattr(each.meta.get("val"), "ndim", 0) >= 3]
        is_opaque = isinstance(target, torch._ops.OpOverload) and target.namespace not in ("aten", "prims", "skipstone")
        if is_softmax or (is_opaque and len(large) >= 3):
            raise Unsupported(
                f"an attention of unknown form ({target}) in a compiled frame",
                where=module_path(node),
                hint="Try attn_implementation='sdpa' or 'eager', or skipstone.optimize(model, plan).",
            )


def source_name(node: fx.Node) -> str:
    """How Dynamo names what an input of its graph comes from, e.g. ``L['self']._parameters['weight']``."""
    name = node._dynamo_source.name  # type: ignore[attr-defined]
    return str(name() if callable(name) else name)


def _functional(module: fx.GraphModule, inputs: Sequence[Any]) -> tuple[fx.GraphModule, GraphSignature]:
    """The graph over ATen, without writes to its inputs, with composite operators whole."""
    try:
        with torch.no_grad():
            exported, signature = aot_export_module(
                module, inputs, trace_joint=False, pre_dispatch=True, decompositions={}
            )
    except (RuntimeError, AssertionError) as error:
        raise Unsupported(f"a frame that cannot be made functional ({first_line(error)})") from error
    if not isinstance(exported, fx.GraphModule) or signature.buffers_to_mutate or signature.parameters_to_mutate:
        raise InternalError("a frame of Dynamo that writes to constants")
    return exported, signature


def _tensor(module: fx.GraphModule, name: str) -> Tensor:
    value = getattr(module, name)
    if not isinstance(value, Tensor):
        raise Unsupported("control flow in a compiled frame", where=name, hint="Use skipstone.optimize.")
    return value


def _free(name: str, tensors: Mapping[str, Tensor]) -> str:
    """A name for a constant that no tensor has yet."""
    name = name.replace(".", "_")
    return name if name not in tensors else _free(f"{name}_", tensors)


def _without_regions(module: fx.GraphModule) -> fx.GraphModule:
    """The graph with the bodies of nested compile regions in the place of their calls.

    Calls that share a region share the metadata of the first one: each gets its own module paths here.
    """
    if not module.graph.find_nodes(op="call_function", target=_REGION):
        return module
    graph, environment, first = fx.Graph(), dict[fx.Node, Any](), dict[Any, str]()
    for node in module.graph.nodes:
        if node.target is not _REGION:
            if node.op == "output":
                graph.output(fx.map_arg(node.args[0], environment.__getitem__))
            elif not (node.op == "get_attr" and isinstance(getattr(module, str(node.target), None), fx.GraphModule)):
                environment[node] = _copied(graph, node, environment)
            continue
        body = _without_regions(getattr(module, node.args[0].target))
        path = _raw_path(node)
        shared = first.setdefault(node.args[1], path)
        inside = dict(zip(body.graph.find_nodes(op="placeholder"), node.args[2:], strict=True))
        inside = {key: environment.get(value, value) for key, value in inside.items()}
        for each in body.graph.nodes:
            if each.op == "output":
                environment[node] = fx.map_arg(each.args[0], inside.__getitem__)
            elif each.op == "get_attr":
                raise Unsupported("a nested compile region with constants of its own", where=module_path(node))
            elif each.op != "placeholder":
                inside[each] = _copied(graph, each, inside)
                if isinstance(inside[each], fx.Node):
                    stack = each.meta.get("nn_module_stack") or {}
                    moved = {key: (_moved(str(own), shared, path), kind) for key, (own, kind) in stack.items()}
                    inside[each].meta["nn_module_stack"] = moved
    return fx.GraphModule(module, graph)


def _copied(graph: fx.Graph, node: fx.Node, environment: Mapping[fx.Node, Any]) -> Any:
    """A copy of a node; of an element of a region's results, that result."""
    source = environment.get(node.args[0]) if node.args and isinstance(node.args[0], fx.Node) else None
    if isinstance(source, tuple | list):
        return source[node.args[1]]  # type: ignore[index]
    return graph.node_copy(node, environment.__getitem__)


def _raw_path(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    return str([*stack.values()][-1][0]) if stack else ""


def _moved(path: str, old: str, new: str) -> str:
    """A module path at or below one call of a region, as that of another call."""
    return new + path.removeprefix(old) if f"{path}.".startswith(f"{old}.") else path


def _root(placeholders: Sequence[fx.Node]) -> str:
    for node in placeholders:
        name = source_name(node)
        if found := _MODULE.search(name):
            return name[: found.start()]
    return ""


def _owned(placeholders: Sequence[fx.Node], root: str, written: Sequence[str]) -> dict[str, str]:
    """The inputs that are parameters and buffers, and their names in the module; not those that are written."""
    owned: dict[str, str] = {}
    for node in placeholders:
        name = source_name(node)
        last = [*_MODULE.finditer(name)][-1:]
        is_owned = last and last[0].end() == len(name) and not last[0].group().startswith("._modules")
        if is_owned and node.name not in written:
            # A second module of the frame keeps Dynamo's names for its tensors.
            mine = name.startswith(f"{root}._")
            owned[node.name] = ".".join(_MODULE.findall(name)) if mine else node.name
    return owned


def _source(root: str, tensors: Mapping[str, Tensor]) -> Source:
    floating = [tensor for tensor in tensors.values() if tensor.is_floating_point()]
    return Source(
        name=root,
        dtype=floating[0].dtype if floating else torch.float32,
        device=floating[0].device if floating else torch.device("cpu"),
        vocabulary=None,
        max_positions=None,
        parameters=sum(tensor.numel() for tensor in tensors.values()),
        fingerprint="",
    )


def _with_roles(program: Program) -> tuple[Port, ...]:
    """The inputs, of which one is the tokens (the first ids that are looked up in a table) or else the embeddings.

    Where there is neither, activations come from the one input of numbers: images, sound.

    Raises:
        Unsupported: there are several of these, or none.
    """
    looked_up: set[fx.Node] = set()
    for node in program.nodes(aten.embedding.default):
        pending = [node.args[1]]
        while pending:
            operand: Any = pending.pop()
            looked_up.add(operand)
            pending += [each for each in operand.all_input_nodes if each not in looked_up]
    found = {node.target: node.meta["val"] for node in program.graph.find_nodes(op="placeholder") if node.users}
    tensors = {name: value for name, value in found.items() if isinstance(value, Tensor)}
    ids = [node.target for node in looked_up if node.target in tensors]
    for name, value in tensors.items():
        if name in ids and value.dtype == torch.int64 and value.ndim == 2:
            return _as(program, name, Role.TOKENS)
    for name, value in tensors.items():
        if value.is_floating_point() and value.ndim == 3:
            return _as(program, name, Role.EMBEDDINGS)
    if sum(value.is_floating_point() for value in tensors.values()) == 1:
        return program.inputs
    raise Unsupported(
        "a compiled frame without token ids [B, S], embeddings [B, S, H], or a single input of numbers",
        hint="Compile the model itself: torch.compile(model, backend='skipstone').",
    )


def _as(program: Program, name: Any, role: Role) -> tuple[Port, ...]:
    return tuple(Port(port.name, role) if port.name == name else port for port in program.inputs)
