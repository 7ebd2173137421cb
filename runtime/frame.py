"""From a rewritten program back to a graph that `torch.compile` takes: the same inputs, the same results.

Parameters are inputs again, so that compiled code reads the user's own; caches are written in place, and attention is
PyTorch's own operator, as it was in the model. Tensors that rewrites made are further inputs, behind all others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from skipstone.ir.capture.dynamo import Frame, source_name
from skipstone.ir.capture.kept import BLANK, KEPT
from skipstone.ir.dialect import ATTENTION, GATE, SKIP_PREDICATE, Kind, attention_reference
from skipstone.ir.errors import InternalError, Unsupported, UserError
from skipstone.ir.gates import gate_reference, skip_predicate_reference
from skipstone.ir.program import Port, Program, Role

aten = torch.ops.aten


def kept(program: Program) -> set[int]:
    """The numbers of the values that the program computes and its frame keeps."""
    return {node.meta[KEPT] for node in program.nodes() if KEPT in node.meta}


def rejoin(frame: Frame, program: Program, expected: set[int]) -> None:
    """Let the frame keep what the rewritten program computes; blanks stay where nothing is computed.

    Args:
        program: changed in place.
        expected: the numbers of the values that it must compute; the others belong to attentions that were left out.
    Raises:
        Unsupported: it computes one of them several times.
    """
    found: dict[int, list[fx.Node]] = {number: [] for number in expected}
    for node in program.nodes():
        if KEPT in node.meta:
            found[node.meta[KEPT]].append(node)
    blanks = {node.meta[BLANK]: node for node in program.nodes() if BLANK in node.meta}
    for number, nodes in found.items():
        if len(nodes) > 1:
            raise Unsupported(
                "layer_parallel with several iterations over layers whose keys and values go to a cache of Hugging "
                "Face, which has room for those of one",
                where=frame.kept[number],
                hint="Take one iteration, or use skipstone.optimize(model, plan), whose cache has room for each.",
            )
        if not nodes:
            raise InternalError(f"the keys or values of {frame.kept[number]} are lost")
        place = nodes[0]
        for user in _behind(blanks[number]):  # may stand before what they now read
            place.append(user)
            place = user
        blanks[number].replace_all_uses_with(nodes[0])
    program.recompile()


def _behind(node: fx.Node) -> list[fx.Node]:
    """What is computed from a node, in graph order."""
    reached = {node}
    for each in node.graph.nodes:
        if each.op != "output" and not reached.isdisjoint(each.all_input_nodes):
            reached.add(each)
    return [each for each in node.graph.nodes if each in reached and each is not node]


def add_counts(frame: Frame, decode_start: Tensor) -> None:
    """Let the frame's program know how many tokens came before, which its `position_ids` say, and where prompts end.

    Raises:
        Unsupported: the frame has no `position_ids`, or not one for each token.
        UserError: `decode_start` is neither for one sequence nor for those of the frame, or on another device.
    """
    program = frame.program
    tokens = program.input(Role.TOKENS)
    positions = _positions(frame)
    if tokens is None or positions is None or positions.meta["example_value"].ndim != 2:
        raise Unsupported(
            "adaptive FFN skipping in a compiled frame that is not given tokens and their positions",
            hint="Call the model with input_ids and position_ids [B, S], as generate does.",
        )
    first: Any = tokens.meta["val"][:, 0]
    if decode_start.shape[0] not in (1, first.shape[0]) or decode_start.device != first.device:
        raise UserError(
            f"option 'decode_start' holds {decode_start.shape[0]} positions on {decode_start.device}, for "
            f"{first.shape[0]} sequences on {first.device}.",
            hint="Pass one position for all sequences, or one for each.",
        )
    program.add_input(Port("start", Role.START), first)


def _positions(frame: Frame) -> fx.Node | None:
    """The input of the frame's graph that Hugging Face models call `position_ids`."""
    found = [
        node
        for node in frame.module.graph.find_nodes(op="placeholder")
        if source_name(node).endswith("['position_ids']")
    ]
    return found[0] if found else None


def _start(positions: Tensor) -> Tensor:
    """Tokens before the first column, by positions [B, S] of which the last are right: padding may stand before."""
    return positions[:, -1] - (positions.shape[1] - 1)


def lower(frame: Frame, program: Program, decode_start: Tensor | None = None) -> tuple[fx.GraphModule, list[Tensor]]:
    """The graph of a rewritten program, for a frame of Dynamo.

    Args:
        decode_start: as of `add_counts`, if that was called.
    Returns:
        the graph, and the tensors that it takes behind the frame's own inputs.
    """
    if decode_start is not None and decode_start.is_cuda:
        import skipstone.kernels.predicated_linear  # noqa: F401, which registers the kernel

    graph = fx.Graph()
    inputs = {node.name: _input(graph, node) for node in frame.module.graph.find_nodes(op="placeholder")}
    owned = {name: inputs[placeholder] for placeholder, name in frame.owned.items()}
    further = [name for name in program.tensors() if name not in owned]
    owned |= {name: _further_input(graph, name) for name in further}
    counts = {}
    if decode_start is not None:
        counts[program.input(Role.DECODE_START)] = _further_input(graph, "decode_start")
        positions: Any = _positions(frame)
        counts[program.input(Role.START)] = graph.call_function(_start, (inputs[positions.name],))
    environment: dict[fx.Node, fx.Node] = {}
    for node in program.graph.nodes:
        if node in counts:
            environment[node] = counts[node]
        elif node.op == "placeholder":
            environment[node] = inputs[str(node.target)]
        elif node.op == "get_attr":
            environment[node] = owned[str(node.target)]
        elif node.op == "call_function":
            environment[node] = _call(graph, node, environment)
    returned: Any = program.output_node().args[0]
    count = len(frame.written)
    results = {node: environment[node] for node in returned[count:]}
    for node in results:
        if node.op == "get_attr" and str(node.target) in further:  # stays what it is whatever becomes of the result
            results[node] = graph.call_function(aten.clone.default, (environment[node],))
    for name, node in zip(frame.written, returned, strict=False):
        if environment[node] is not inputs[name]:
            graph.call_function(aten.copy_.default, (inputs[name], environment[node]))
            results[node] = inputs[name]  # what returns an input that it has written returns that input
    values = [results[node] for node in returned[count:]]
    for place, constant in sorted(frame.constants.items()):
        values.insert(place, constant)
    graph.output(tuple(values))
    module = fx.GraphModule({}, graph)
    module.meta = dict(frame.module.meta)
    for name in ("_param_name_to_source", "_source_to_user_stacks"):
        if hasattr(frame.module, name):
            setattr(module, name, getattr(frame.module, name))
    tensors = [program.tensor(name) for name in further]
    return module, tensors if decode_start is None else [*tensors, decode_start]


def _input(graph: fx.Graph, node: fx.Node) -> fx.Node:
    copy = graph.node_copy(node)
    copy._dynamo_source = node._dynamo_source  # type: ignore[attr-defined]
    return copy


def _further_input(graph: fx.Graph, name: str) -> fx.Node:
    """An input that no variable of the frame stands for: always the same tensor, which CUDA graphs need not copy."""
    node = graph.placeholder(name)
    node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
    node._dynamo_source = None  # type: ignore[attr-defined]
    return node


def _call(graph: fx.Graph, node: fx.Node, environment: dict[fx.Node, fx.Node]) -> fx.Node:
    copy = graph.node_copy(node, environment.__getitem__)
    copy.meta = {key: node.meta[key] for key in ("nn_module_stack", "stack_trace") if key in node.meta}
    if node.target in _PLAIN:
        copy.target = _PLAIN[node.target]
    elif node.target is ATTENTION:
        _lower_attention(copy, node)
    return copy


def _lower_attention(copy: fx.Node, node: fx.Node) -> None:
    """PyTorch's own attention where it has this one, as it has all that it was before; else plain operators."""
    arguments: list[Any] = [*copy.args, *[None] * (5 - len(copy.args))]
    q, k, v, mask, bias, *constants = arguments
    is_causal = node.kwargs["kind"] == Kind.CAUSAL
    masks = (mask is not None) + (bias is not None) + is_causal
    if masks > 1 or node.kwargs.get("softcap") or any(each is not None for each in constants):
        copy.target = attention_reference
        return
    operands: Any = node.args
    heads, kv_heads = (each.meta["val"].shape[1] for each in operands[:2])
    copy.target = aten.scaled_dot_product_attention.default
    copy.args = (q, k, v, bias if mask is None else mask, 0.0, is_causal)
    copy.kwargs = {"scale": node.kwargs["scale"], "enable_gqa": heads != kv_heads}


_PLAIN: Mapping[Any, Callable[..., Any]] = {GATE: gate_reference, SKIP_PREDICATE: skip_predicate_reference}
