"""Where each node of an ONNX model comes from: the module of the user's model, and the passes that made it."""

from __future__ import annotations

import ast
from collections import Counter

import onnx_ir as ir

from skipstone.ir.program import Program, module_path

NAMESPACE, MODULE, PASSES = "namespace", "skipstone.module", "skipstone.passes"
"""Metadata of a node: torch.onnx's own path with classes; the module's dotted path; passes, the last one last."""

_SCOPES, _CLASSES = "pkg.torch.onnx.name_scopes", "pkg.torch.onnx.class_hierarchy"
_MADE_BY = "made_by:"
_NO_MODULE = "_empty_nn_module_stack_from_metadata_hook"  # what torch.export puts where no module is


def note_passes(program: Program) -> None:
    """Write down which passes made each node as an innermost module, which is what torch.onnx keeps of a node."""
    for node in program.nodes():
        if passes := node.meta.get("made_by"):
            stack = dict(node.meta.get("nn_module_stack") or {})
            stack[_MADE_BY] = (module_path(node), _MADE_BY + ",".join(dict.fromkeys(passes)))
            node.meta["nn_module_stack"] = stack


def keep_places(model: ir.Model) -> None:
    """Keep the place and the passes of each node alone of what torch.onnx notes down: stack traces and signatures,
    mostly."""
    model.graph.metadata_props.clear()
    for node in model.graph:
        known = dict(node.metadata_props)
        node.metadata_props.clear()
        if NAMESPACE in known:
            node.metadata_props.update(_place(known))
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()


def _place(known: dict[str, str]) -> dict[str, str]:
    scopes, classes = (ast.literal_eval(known[key])[:-1] for key in (_SCOPES, _CLASSES))  # the last: the node itself
    made_by = next((each.removeprefix(_MADE_BY) for each in classes if each.startswith(_MADE_BY)), "")
    if _NO_MODULE in scopes:
        return {}
    scopes_of_ours = (f": {_MADE_BY}", ": skipstone.")  # what captures wrap around the model
    namespace = [part for part in known[NAMESPACE].split("/") if not any(each in part for each in scopes_of_ours)]
    place = {NAMESPACE: "/".join(namespace), MODULE: next(reversed(scopes), "")}
    return place | ({PASSES: made_by} if made_by else {})


def name_nodes(model: ir.Model) -> None:
    """Call each node after its module, so that layers can be found in a viewer: ``model.layers.0.mlp/Mul_1``."""
    seen: Counter[str] = Counter()
    for node in model.graph.all_nodes():
        module = node.metadata_props.get(MODULE, "")
        name = f"{module}/{node.op_type}" if module else node.op_type
        seen[name] += 1
        node.name = name if seen[name] == 1 else f"{name}_{seen[name] - 1}"
