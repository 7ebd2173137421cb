"""Programs as plain data, and back.

A node is written with the name of what it calls, its arguments and where it came from. Shapes and dtypes of values are
not: they follow from the inputs, and reading a program computes them anew, operator by operator. Names end up in code
that FX generates, so that only plain ones are taken.
"""

from __future__ import annotations

import keyword
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.source import ConstantSource
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.utils._pytree import tree_flatten, tree_unflatten

from skipstone.ir.errors import ArtifactError, Unsupported
from skipstone.ir.program import INHERITED, Port, Program, Role, Source, fake_value, module_path
from skipstone.ir.stream import PARALLEL
from skipstone.ir.verify import NUMBERS, verify
from skipstone.runtime.artifact.operators import FUNCTIONS, function_of, name_of
from skipstone.runtime.artifact.weights import DTYPES, dtype_name

LARGEST_NUMBER = 2**63
"""Sizes, and numbers that are computed with them, stay below."""

_TENSOR_NAME = re.compile(r"(?!__)[\w-]+(\.(?!__)[\w-]+)*", re.ASCII)
_PATH = re.compile(r"[\w.\[\]<>'@ -]*", re.ASCII)
_LAYER, _HEADS = INHERITED[:2]  # what attentions are made of is for passes alone
_CONSTANTS: Mapping[str, Mapping[str, Any]] = {
    "dtype": DTYPES,
    "layout": {"strided": torch.strided},
    "memory_format": {
        name: getattr(torch, name)
        for name in ("channels_last", "channels_last_3d", "contiguous_format", "preserve_format")
    },
}


# Writing


def program_to_data(program: Program) -> dict[str, Any]:
    """A program as plain data, without its tensors and its continuations.

    Raises:
        Unsupported: it has something that an artifact cannot hold.
    """
    device = program.source.device
    placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
    nodes = []
    for node in program.graph.nodes:
        if node.op == "get_attr":
            _check(node.target, _TENSOR_NAME.fullmatch(node.target), "a tensor")
            nodes.append({"name": node.name, "tensor": node.target, **_origin_to_data(node)})
        elif node.op == "call_function":
            nodes.append(_node_to_data(node, device))
    for port in program.inputs:
        _check(port.name, is_plain(port.name), "an input")
    return {
        "source": {**vars(program.source), "dtype": dtype_name(program.source.dtype), "device": device.type},
        "layers": program.layers,
        "inputs": [
            {**_port_to_data(port), "node": node.name, **_value_to_data(port.name, node.meta["val"])}
            for port, node in zip(program.inputs, placeholders, strict=True)
        ],
        "nodes": nodes,
        "outputs": [
            {**_port_to_data(port), "node": node.name}
            for port, node in zip(program.outputs, program.output_node().args[0], strict=True)  # type: ignore[arg-type]
        ],
        "structure": _structure(program),
    }


def sizes_of(programs: Sequence[Program]) -> dict[str, int]:
    """The symbolic sizes of the programs' inputs, and an example of each."""
    inputs = [node.meta["val"] for each in programs for node in each.graph.nodes if node.op == "placeholder"]
    return {str(size): int(size.node.hint) for value in inputs for size in value.shape if not isinstance(size, int)}


def _check(name: str, is_fine: Any, what: str) -> None:
    if not is_fine:
        raise Unsupported(f"saving {what} of the name {name!r}", hint="Use letters, digits and underscores.")


def is_plain(name: str) -> bool:
    """Whether a name may stand in code as it is."""
    return name.isascii() and name.isidentifier() and not keyword.iskeyword(name) and not name.startswith("__")


def _port_to_data(port: Port) -> dict[str, Any]:
    return {"name": port.name, "role": str(port.role), "slot": port.slot, "part": port.part}


def _value_to_data(name: str, value: Any) -> dict[str, Any]:
    """Dtype and shape of an input, sizes that are not fixed by their names."""
    if not isinstance(value, Tensor):
        raise Unsupported(f"saving input {name!r}, which is no tensor", hint="Make it a tensor.")
    shape: list[int | str] = []
    for size in value.shape:
        if not isinstance(size, int) and not size.node.expr.is_Symbol:
            raise Unsupported(f"saving input {name!r} with the size {size}", hint="Make its sizes independent.")
        shape.append(size if isinstance(size, int) else str(size))
    return {"dtype": dtype_name(value.dtype), "shape": shape}


def _node_to_data(node: fx.Node, device: torch.device) -> dict[str, Any]:
    name = name_of(node.target)
    if name is None:
        raise Unsupported(f"saving a call of {node.target}", where=module_path(node) or node.name)
    _check(node.name, is_plain(node.name), "a node")
    data: dict[str, Any] = {"name": node.name, "call": name, "args": [_to_data(each, device) for each in node.args]}
    if node.kwargs:
        data["kwargs"] = {key: _to_data(each, device) for key, each in node.kwargs.items()}
    return data | _origin_to_data(node)


def _origin_to_data(node: fx.Node) -> dict[str, Any]:
    """Where a node came from; of the model's source code, nothing is kept."""
    data = {key: node.meta[key] for key in ("made_by", _LAYER, _HEADS, PARALLEL) if key in node.meta}
    for each in data.get("made_by", ()):
        _check(each, _PATH.fullmatch(each), "the work of a pass")
    if node.meta.get("nn_module_stack") or node.meta.get("stack_trace"):
        path = module_path(node)
        data["path"] = path if _PATH.fullmatch(path) else ""
    return data


def _to_data(value: Any, device: torch.device) -> Any:
    """An argument as plain data; what JSON has no form for becomes an object with one key."""
    match value:
        case fx.Node():
            return {"node": value.name}
        case None | bool():
            return value
        case int():
            return int(value)
        case str():
            return str(value)  # without the class of an enumeration
        case float():
            return value if math.isfinite(value) else {"float": repr(value)}
        case list():
            return [_to_data(each, device) for each in value]
        case tuple():
            return {"tuple": [_to_data(each, device) for each in value]}
        case slice():
            return {"slice": [_to_data(each, device) for each in (value.start, value.stop, value.step)]}
        case torch.device():
            return {"device": None if value.type == device.type else value.type}  # None: the program's own
    for kind, known in _CONSTANTS.items():
        for name, each in known.items():
            if value is each:
                return {kind: name if kind != "dtype" else dtype_name(value)}
    raise Unsupported(f"saving an argument of type {type(value).__name__}")


def _structure(program: Program) -> Any:
    """How the outputs are structured: lists, tuples and dictionaries of the places that outputs have among them."""
    if program.output_spec is None:
        return None

    def plain(value: Any) -> Any:
        if type(value) is int:
            return value
        if type(value) is dict and all(type(key) is str for key in value):
            return {"dict": {key: plain(each) for key, each in value.items()}}
        if type(value) in (list, tuple):
            return {type(value).__name__: [plain(each) for each in value]}
        raise Unsupported(f"saving outputs that are {type(value).__name__}", hint="Return tuples, lists or dicts.")

    return plain(tree_unflatten(list(range(program.output_spec.num_leaves)), program.output_spec))


# Reading


class Sizes:
    """The symbolic sizes of programs that are read together, by name.

    Args:
        examples: a number for each, for which everything holds that the programs assume of it.
    Raises:
        ArtifactError: a number is no size.
    """

    def __init__(self, examples: Mapping[str, int]) -> None:
        environment = ShapeEnv()
        self.mode = FakeTensorMode(shape_env=environment)
        self._symbols: dict[str, Any] = {}
        for name, example in examples.items():
            if type(example) is not int or not 2 <= example < LARGEST_NUMBER:
                raise ArtifactError(f"{example!r} is no example of a size that may be any.")
            source = ConstantSource(f"size_{len(self._symbols)}")
            symbol = environment.create_symbol(example, source, dynamic_dim=DimDynamic.DYNAMIC)
            self._symbols[name] = environment.create_symintnode(symbol, hint=example, source=source)

    def input(self, data: Mapping[str, Any], device: torch.device) -> Tensor:
        """The fake value of an input."""
        shape = [self._symbols[size] if isinstance(size, str) else size for size in data["shape"]]
        with self.mode:
            return torch.empty(shape, dtype=DTYPES[data["dtype"]], device=device)


def program_from_data(
    data: Mapping[str, Any], tensors: Mapping[str, Tensor], sizes: Sizes, device: torch.device
) -> Program:
    """The program that `program_to_data` wrote.

    Args:
        tensors: by the names that the program has for them.
        device: of the tensors and of everything that the program computes.
    Raises:
        ArtifactError: a name or an operator that an artifact may not have.
        Malformed: it breaks an invariant of programs.
        Exception: any, where the data are not those of a program.
    """
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    for each in data["inputs"]:
        node = graph.placeholder(_plain(each["name"]))
        node.meta["val"] = sizes.input(each, device)
        nodes[each["node"]] = node
    for each in data["nodes"]:
        if each["name"] in nodes:
            raise ArtifactError(f"two nodes have the name {each['name']}.")
        if "tensor" in each:
            node = graph.get_attr(_tensor_name(each["tensor"]))
            node.meta["val"] = sizes.mode.from_tensor(tensors[each["tensor"]], static_shapes=True)
        else:
            node = _call(graph, each, nodes, device)
        _set_origin(node, each)
        nodes[each["name"]] = node
    graph.output(tuple(nodes[each["node"]] for each in data["outputs"]))
    program = Program(
        fx.GraphModule(dict(tensors), graph),
        tuple(_port(each) for each in data["inputs"]),
        tuple(_port(each) for each in data["outputs"]),
        _source(data["source"], device),
        output_spec=None if data["structure"] is None else tree_flatten(_unstructure(data["structure"]))[1],
        layers=_optional(data["layers"]),
    )
    verify(program, after="saving")
    return program


def _call(graph: fx.Graph, data: Mapping[str, Any], nodes: Mapping[str, fx.Node], device: torch.device) -> fx.Node:
    """A call node with its value."""
    function = function_of(data["call"])
    args = tuple(_from_data(each, nodes, device) for each in data["args"])
    kwargs = {_plain(key): _from_data(each, nodes, device) for key, each in data.get("kwargs", {}).items()}
    _check_operands(function, args, kwargs)
    node = graph.create_node("call_function", function, args, kwargs, name=_plain(data["name"]))
    node.meta["val"] = fake_value(node)
    _check_number(node.meta["val"])
    return node


def _set_origin(node: fx.Node, data: Mapping[str, Any]) -> None:
    """Note at a node what `_origin_to_data` wrote."""
    if "path" in data:
        path = _path(data["path"])
        node.meta["nn_module_stack"] = {path: (path, "torch.nn.Module")}
    if "made_by" in data:
        node.meta["made_by"] = tuple(_path(each) for each in data["made_by"])
    if _LAYER in data:
        node.meta[_LAYER] = _integer(data[_LAYER])
    if _HEADS in data:
        node.meta[_HEADS] = tuple(_integer(each) for each in data[_HEADS])
    if PARALLEL in data:
        node.meta[PARALLEL] = tuple(_path(each) for each in data[PARALLEL])


def _check_operands(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Refuse Python's functions on anything but numbers: of lists, they would make others of any length."""
    if function is operator.getitem or function not in FUNCTIONS.values():
        return
    values = [each.meta["val"] if isinstance(each, fx.Node) else each for each in args]
    if kwargs or not all(isinstance(each, NUMBERS) for each in values):
        raise ArtifactError(f"{function.__name__} is called on something else than numbers.")
    for each in values:
        _check_number(each)


def _check_number(value: Any) -> None:
    if type(value) in (int, float) and not abs(value) < LARGEST_NUMBER:
        raise ArtifactError("a number is too large to be a size.")


def _from_data(data: Any, nodes: Mapping[str, fx.Node], device: torch.device) -> Any:
    """The argument that `_to_data` wrote."""
    if isinstance(data, list):
        return [_from_data(each, nodes, device) for each in data]
    if not isinstance(data, dict):
        return data
    ((kind, content),) = data.items()
    match kind:
        case "node":
            return nodes[content]
        case "float":
            return {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}[content]
        case "tuple":
            return tuple(_from_data(each, nodes, device) for each in content)
        case "slice":
            start, stop, step = (_from_data(each, nodes, device) for each in content)
            return slice(start, stop, step)
        case "device":
            return {None: device, "cpu": torch.device("cpu")}[content]
    return _CONSTANTS[kind][content]


def _unstructure(data: Any) -> Any:
    """What `_structure` wrote, with a number in the place of each output."""
    if isinstance(data, int):
        return data
    ((kind, content),) = data.items()
    if kind == "dict":
        return {key: _unstructure(each) for key, each in content.items()}
    return {"list": list, "tuple": tuple}[kind](_unstructure(each) for each in content)


def _source(data: Mapping[str, Any], device: torch.device) -> Source:
    return Source(
        name=_path(data["name"]),
        dtype=DTYPES[data["dtype"]],
        device=device,
        vocabulary=_optional(data["vocabulary"]),
        max_positions=_optional(data["max_positions"]),
        parameters=_integer(data["parameters"]),
        fingerprint=_path(data["fingerprint"]),
        first_position=_integer(data["first_position"]),
    )


def _port(data: Mapping[str, Any]) -> Port:
    return Port(str(data["name"]), Role(data["role"]), _optional(data["slot"]), str(data["part"]))


def _plain(name: Any) -> str:
    if not isinstance(name, str) or not is_plain(name):
        raise ArtifactError(f"{name!r} is no plain name.")
    return name


def _tensor_name(name: Any) -> str:
    if not isinstance(name, str) or not _TENSOR_NAME.fullmatch(name):
        raise ArtifactError(f"{name!r} is no name of a tensor.")
    return name


def _path(text: Any) -> str:
    if not isinstance(text, str) or not _PATH.fullmatch(text):
        raise ArtifactError(f"{text!r} is no path of a module or name of a pass.")
    return text


def _optional(value: Any) -> int | None:
    return None if value is None else _integer(value)


def _integer(value: Any) -> int:
    if type(value) is not int:
        raise ArtifactError(f"{value!r} is no integer.")
    return value
