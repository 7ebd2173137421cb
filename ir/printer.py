"""Programs for people: runnable Python, the lines around a node, where a node came from, and dumps of every pass."""

from __future__ import annotations

import difflib
import operator
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from skipstone.ir.cost import name_dimensions
from skipstone.ir.dialect import GATE
from skipstone.ir.errors import ArtifactError, UserError
from skipstone.ir.gates import spared
from skipstone.ir.program import Port, Program, Record, module_path

INFIX = {operator.add: "+", operator.sub: "-", operator.mul: "*", operator.floordiv: "//", operator.truediv: "/"}
INFIX |= {operator.mod: "%", operator.eq: "==", operator.ne: "!=", operator.lt: "<", operator.le: "<="}
INFIX |= {operator.gt: ">", operator.ge: ">="}
Names = dict[sympy.Symbol, sympy.Expr]


def readable(program: Program) -> str:
    """The graph as Python that runs: a function of the program's tensors (a dict by name) and its inputs.

    Comments give the ports, the module path whenever it changes, the type of every value with batch and sequence as B
    and S, the decision by which a node may be spared, and the passes that made it.
    """
    names = name_dimensions(program)
    operators = Counter(node.op for node in program.graph.nodes)
    lines = [f"# {program.source.name}: {operators['call_function']} operators, {operators['get_attr']} tensors"]
    inputs = [node for node in program.graph.nodes if node.op == "placeholder"]
    results: Any = program.output_node().args[0]
    for kind, ports, nodes in (("input", program.inputs, inputs), ("output", program.outputs, results)):
        for port, node in zip(ports, nodes, strict=False):  # a program in the making may have fewer ports
            lines.append(f"# {kind} {_port(port)}: {type_text(node.meta.get('val'), names)}")
    lines += ["import torch", "from torch import device, inf, nan", ""]
    lines += ["aten, skipstone = torch.ops.aten, torch.ops.skipstone", ""]
    for name, branch in program.module.named_children():
        if isinstance(branch, fx.GraphModule):
            lines += ["", *_function(name, branch.graph, names, tensors=False), ""]
    lines += ["", *_function("program", program.graph, names)]
    return "\n".join(lines) + "\n"


def excerpt(program: Program, node: fx.Node, lines: int = 5) -> str:
    """Up to `lines` lines of the graph before and after `node`, which is marked with ">"; works on broken programs."""
    try:
        names = name_dimensions(program)
    except Exception:  # the text of an error must not fail on the defect that it reports
        names = {}
    nodes = list(node.graph.nodes)  # the program's own, or a branch's
    here = nodes.index(node)
    around = nodes[max(0, here - lines) : here + lines + 1]
    return "\n".join(f"{'>' if other is node else ' '} {_line(other, names)}" for other in around)


def explain(program: Program, name: str) -> str:
    """Where the node `name` came from: its module, its source line, and the passes that made or changed it.

    Raises:
        UserError: the program has no such node.
    """
    nodes = {node.name: node for node in program.graph.nodes}
    if name not in nodes:
        close = difflib.get_close_matches(name, nodes, n=3)
        hint = f"Do you mean {' or '.join(close)}?" if close else ""
        raise UserError(f"The program has no node {name!r}.", hint=hint)
    node = nodes[name]
    text = [_line(node, name_dimensions(program))]
    if path := _module(node):
        text.append(f"  module: {path}")
    if source := _source_line(node):
        text.append(f"  source: {source}")
    if passes := node.meta.get("made_by"):
        text.append(f"  made by: {', '.join(passes)}")
    return "\n".join(text)


def dump(program: Program, directory: str | os.PathLike[str]) -> None:
    """Write the graph after every pass to numbered files: ``000_capture.py``, ..., and the present graph last.

    The directory is complete or absent. A dump that is there already is replaced.

    Raises:
        ArtifactError: `directory` exists and holds something else.
    """
    target = Path(directory)
    ours = re.compile(r"\d{3,}_\w+\.py")
    if target.exists() and not (target.is_dir() and all(ours.fullmatch(file.name) for file in target.iterdir())):
        raise ArtifactError(f"{target} exists and is not a dump.", hint="Choose another directory or remove it.")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
        partial = Path(scratch) / "dump"
        partial.mkdir()
        for number, record in enumerate(program.history):
            file = partial / f"{number:03}_{re.sub(r'[^0-9A-Za-z]+', '_', record.name)}.py"
            file.write_text(f"{_headline(record)}\n{record.code}")
        (partial / f"{len(program.history):03}_present.py").write_text(f"# the present graph\n{readable(program)}")
        if target.exists():
            shutil.move(target, Path(scratch) / "old")
        os.replace(partial, target)


def type_text(value: Any, names: Names | None = None) -> str:
    """The type of a value in short: ``float32[B, S, 64]``, or the number itself."""
    if isinstance(value, Tensor):
        shape = ", ".join(_size(size, names or {}) for size in value.shape)
        device = "" if value.device.type == "cpu" else f" on {value.device}"
        return f"{str(value.dtype).removeprefix('torch.')}[{shape}]{device}"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(type_text(item, names) for item in value)})"
    return _size(value, names or {})


def _size(size: Any, names: Names) -> str:
    return str(size.node.expr.xreplace(names)) if hasattr(size, "node") else str(size)


def _port(port: Port) -> str:
    return f"{port.name} ({port.role}{'' if port.slot is None else f' of slot {port.slot}'})"


def _function(name: str, graph: fx.Graph, names: Names, tensors: bool = True) -> Iterator[str]:
    """The lines of a graph as a function; a branch takes its tensors as operands."""
    inputs = [node.name for node in graph.nodes if node.op == "placeholder"]
    yield f"def {name}({', '.join(['tensors'] * tensors + inputs)}):"
    module = ""
    decisions = {each: node.args[1] for node in graph.nodes if node.target is GATE for each in spared(node)}
    for node in graph.nodes:
        if node.op == "placeholder":
            continue
        path = _module(node)
        if node.op == "call_function" and path != module:
            module = path
            yield f"    # {path or 'the model itself'}"
        unless = f", unless {decisions[node]} is true everywhere" if node in decisions else ""
        yield f"    {_line(node, names)}{unless}"


def _line(node: fx.Node, names: Names) -> str:
    """One node as a Python statement with its type in a comment."""
    kind = type_text(node.meta["val"], names) if "val" in node.meta else "no value"
    made_by = f", made by {', '.join(node.meta['made_by'])}" if node.meta.get("made_by") else ""
    if node.op == "output":
        return f"return {_argument(node.args[0])}"
    return f"{node.name} = {_expression(node)}  # {kind}{made_by}"


def _expression(node: fx.Node) -> str:
    """The right-hand side of a node's statement."""
    if node.op == "placeholder":
        return str(node.target)
    if node.op == "get_attr":
        # a branch of a condition carries no tensor, and is a function of this file
        return f'tensors["{node.target}"]' if isinstance(node.meta.get("val"), Tensor) else str(node.target)
    if node.target is operator.getitem:
        return f"{_argument(node.args[0])}[{_argument(node.args[1])}]"
    if node.target in INFIX and len(node.args) == 2:
        return f"{_argument(node.args[0])} {INFIX[node.target]} {_argument(node.args[1])}"
    arguments = [_argument(argument) for argument in node.args]
    arguments += [f"{key}={_argument(argument)}" for key, argument in node.kwargs.items()]
    return f"{_callee(node.target)}({', '.join(arguments)})"


def _callee(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        name = str(target).removesuffix(".default")
        return name if target.namespace in ("aten", "skipstone") else f"torch.ops.{name}"
    if isinstance(target, torch._ops.HigherOrderOperator):
        return f"torch.ops.higher_order.{target.name()}"
    module = getattr(target, "__module__", "") or ""
    return f"{module}.{getattr(target, '__name__', target)}".lstrip("_").removeprefix(".")


def _argument(argument: Any) -> str:
    """An argument as it stands in Python source."""
    match argument:
        case fx.Node():
            return argument.name
        case tuple():
            return f"({', '.join(map(_argument, argument))}{',' if len(argument) == 1 else ''})"
        case list():
            return f"[{', '.join(map(_argument, argument))}]"
        case slice():
            return f"slice({_argument(argument.start)}, {_argument(argument.stop)}, {_argument(argument.step)})"
        case str():
            return repr(str(argument))  # without the class of an enumeration
        case _:
            return repr(argument)


def _module(node: fx.Node) -> str:
    """The module path, "" for what stands in the model itself or was made outside of any module."""
    path = module_path(node)
    return "" if path.startswith("_empty_nn_module_stack") else path


def _source_line(node: fx.Node) -> str:
    """The innermost line of the model's own code in the stack trace, as ``file.py:12, in forward``."""
    frames = re.findall(r'File "([^"]+)", line (\d+), in (\S+)', node.meta.get("stack_trace") or "")
    own = [frame for frame in frames if "/torch/" not in frame[0]] or frames
    return f"{own[-1][0]}:{own[-1][1]}, in {own[-1][2]}" if own else ""


def _headline(record: Record) -> str:
    """One comment line about a pass: node counts, seconds, and remarks by status."""
    kinds = Counter(str(getattr(remark, "status", "remark")) for remark in record.remarks)
    said = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())) or "no remarks"
    return f"# {record.name}: {record.nodes_before} -> {record.nodes_after} operators, {record.seconds:.3f} s, {said}"
