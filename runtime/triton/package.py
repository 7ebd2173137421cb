"""Code compiled ahead of time: AOTInductor packages, which hold the kernels of a graph and none of its tensors.

A package takes the tensors of its graph as inputs, behind those of the graph itself. So weights are on disk and in
memory once, whatever number of packages there are. Operators of the dialect are called by their names: who opens a
package has imported skipstone, which registers them. A package is an archive with a shared library in it, and to open
it is to run what somebody has put there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.exc import UserError as ExportError
from torch._inductor.exc import InductorError

from skipstone.ir.errors import InternalError, Unsupported


def write_package(
    graph: fx.Graph,
    tensors: Mapping[str, Tensor],
    inputs: Sequence[Tensor],
    dynamic: Sequence[Sequence[int]],
    options: Mapping[str, Any],
    path: Path,
) -> None:
    """Compile a graph into a file.

    Args:
        graph: with fake values on its placeholders.
        tensors: what its `get_attr` nodes stand for.
        inputs: one a placeholder, contiguous; what is compiled is for their dtypes and device.
        dynamic: for each input, the axes whose sizes may be others than here, except 0 and 1.
        options: of Inductor.
        path: with the ending ``.pt2``.
    Raises:
        Unsupported: the graph holds for some sizes only, or cannot be compiled here.
    """
    sizes: dict[str, Any] = {}
    shapes: list[dict[int, Any]] = []
    for node, axes in zip(graph.find_nodes(op="placeholder"), dynamic, strict=True):
        names = {axis: str(node.meta["val"].shape[axis]) for axis in axes}
        shapes.append(
            {axis: sizes.setdefault(name, torch.export.Dim(f"size_{len(sizes)}")) for axis, name in names.items()}
        )
    module = fx.GraphModule({}, _over_inputs(graph, tensors))
    try:
        with torch.no_grad():
            everything = (*inputs, *tensors.values())
            exported = torch.export.export(
                module, everything, dynamic_shapes=(*shapes, *({} for _ in tensors)), strict=False
            )
            torch._inductor.aoti_compile_and_package(exported, package_path=str(path), inductor_configs=dict(options))
    except (ExportError, InductorError) as error:
        reason = next(iter(str(error).strip().splitlines()), "").rstrip(".")
        hint = "A C++ compiler is needed, and on a GPU the headers of CUDA (CUDA_HOME). Or leave compiled_for out."
        raise Unsupported(f"compiling this program ahead of time ({reason})", hint=hint) from error


class Package:
    """An open package, which computes what its graph does.

    Args:
        path: what `write_package` wrote.
        tensors: those of the graph, in the same order; of the same shapes, strides and dtypes.
        dtypes: of the inputs.
        device: of all of them.
    """

    def __init__(
        self, path: Path, tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype], device: torch.device
    ) -> None:
        index = -1 if device.index is None else device.index
        # To keep threads apart it would wait for the device, and record events, which CUDA graphs cannot have.
        single_threaded = device.type == "cuda"
        # Not `aoti_load_package`, which reads whatever else an archive holds, pickled weights among it.
        self._loader = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", single_threaded, 1, index)
        self._tensors, self._dtypes = list(tensors), tuple(dtypes)

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run it on the current stream. What it writes to must be contiguous."""
        if tuple(each.dtype for each in inputs) != self._dtypes:  # compiled code would not notice
            raise InternalError(f"a package for {self._dtypes} is given {tuple(each.dtype for each in inputs)}")
        return tuple(self._loader.run([*(each.contiguous() for each in inputs), *self._tensors]))


def _over_inputs(graph: fx.Graph, tensors: Mapping[str, Tensor]) -> fx.Graph:
    """The graph with one more placeholder for each of the tensors, in their order."""
    result = fx.Graph()
    environment = {node: result.placeholder(node.name) for node in graph.find_nodes(op="placeholder")}
    owned = {name: result.placeholder(f"tensor_{number}") for number, name in enumerate(tensors)}
    for node in graph.nodes:
        if node.op == "get_attr":
            environment[node] = owned[str(node.target)]
        elif node.op == "call_function":
            environment[node] = result.node_copy(node, environment.__getitem__)
    (returned,) = graph.find_nodes(op="output")
    result.output(fx.map_arg(returned.args[0], environment.__getitem__))
    return result
