"""From `torch.export` to a `Program`: what every front end does after tracing."""

from __future__ import annotations

import hashlib
import inspect
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from skipstone.ir.errors import InternalError, SkipstoneError, Unsupported, UserError
from skipstone.ir.program import Port, Program, Role, Source, module_path

ROOT = "captured"
"""Attribute of a front end's wrapper that holds the user's module; it disappears from all names."""

_CHECKS = {
    torch._C._set_grad_enabled,
    torch.ops.aten._assert_tensor_metadata.default,
    torch.ops.aten._assert_scalar.default,
    torch.ops.aten._assert_async.msg,
    torch.ops.aten.sym_constrain_range_for_size.default,
    torch.ops.aten.sym_constrain_range.default,
}
"""Nodes that compute nothing: what they assert was checked while tracing, and `compare` checks it again."""


_CANONICAL: dict[Any, Any] = {
    torch.ops.aten.view.default: torch.ops.aten.reshape.default,
    torch.ops.aten._unsafe_view.default: torch.ops.aten.reshape.default,
    torch.ops.aten.multiply.Tensor: torch.ops.aten.mul.Tensor,
    torch.ops.aten.divide.Tensor: torch.ops.aten.div.Tensor,
    torch.ops.aten.true_divide.Tensor: torch.ops.aten.div.Tensor,
    torch.ops.aten.subtract.Tensor: torch.ops.aten.sub.Tensor,
    torch.ops.aten.concat.default: torch.ops.aten.cat.default,
    torch.ops.aten.concatenate.default: torch.ops.aten.cat.default,
}
"""One name for one operator. Views become reshapes: in a functional graph strides mean nothing, and rewrites need not
keep them."""


def refuse_unusable(model: Any, adapters: bool = False) -> None:
    """Refuse, before any work, what can never be captured.

    Args:
        adapters: let PEFT adapters pass, as layers like any other.
    Raises:
        UserError: not a module, a module in training mode, or one without real weights.
        Unsupported: a model spread over devices, of TorchScript, or with quantized weights.
    """
    if not isinstance(model, nn.Module):
        raise UserError(
            f"expected a torch.nn.Module, got {type(model).__name__}.",
            hint="Pass the model itself, not its name; the command line loads models by name.",
        )
    training = [path or "the model itself" for path, module in model.named_modules() if module.training]
    if training:
        raise UserError(
            f"the model is in training mode ({training[0]}), so that dropout and batch norm are not deterministic.",
            hint="Call model.eval() first.",
        )
    if not adapters and hasattr(model, "peft_config"):
        raise Unsupported("PEFT adapters", hint="Merge them: optimize model.merge_and_unload().")
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise Unsupported("TorchScript", where=path, hint="Pass the module that it was made of.")
        if hasattr(module, "_hf_hook"):
            raise Unsupported(
                "modules that accelerate loads and offloads as they run",
                where=path,
                hint="Load the model onto one device, without device_map.",
            )
    tensors = [*model.named_parameters(), *model.named_buffers()]
    for name, tensor in tensors:
        if tensor.is_meta:
            raise UserError(
                f"parameter {name} is on the meta device: it has no values.",
                hint="Load the weights (from_pretrained without device_map='meta', or to_empty and load_state_dict).",
            )
    devices = {tensor.device for _, tensor in tensors}
    if len(devices) > 1:
        raise Unsupported(
            f"a model spread over several devices ({', '.join(sorted(map(str, devices)))})",
            hint="Move it to one device.",
        )
    quantized = getattr(model, "hf_quantizer", None) is not None
    for name, tensor in tensors:
        # Quantized weights of other libraries are tensors that wrap several others.
        if quantized or tensor.is_quantized or hasattr(tensor, "quant_state") or is_traceable_wrapper_subclass(tensor):
            raise Unsupported("already quantized weights", where=name, hint="Load the model in floating point.")


def source_of(model: nn.Module, *, vocabulary: int | None, max_positions: int | None) -> Source:
    """Facts about `model`; the fingerprint samples at most 64 values of each tensor."""
    digest = hashlib.sha256()
    parameters: dict[int, Tensor] = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // 64)][:64].to(torch.float64).cpu().numpy()
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode() + sample.tobytes())
        if isinstance(tensor, nn.Parameter):
            parameters[id(tensor)] = tensor
    first = next(iter(parameters.values()), None)
    floating = next((p for p in parameters.values() if p.is_floating_point()), first)
    return Source(
        name=type(model).__name__,
        dtype=floating.dtype if floating is not None else torch.float32,
        device=first.device if first is not None else torch.device("cpu"),
        vocabulary=vocabulary,
        max_positions=max_positions,
        parameters=sum(p.numel() for p in parameters.values()),
        fingerprint=digest.hexdigest(),
    )


class _Named(nn.Module):
    def __init__(self, module: nn.Module, result: Callable[[Any], Any]) -> None:
        super().__init__()
        setattr(self, ROOT, module)
        self.result = result

    def forward(self, **inputs: Tensor) -> Any:
        return self.result(getattr(self, ROOT)(**inputs))


def named(module: nn.Module, inputs: Iterable[str], result: Callable[[Any], Any] = lambda out: out) -> nn.Module:
    """A wrapper whose `forward` takes exactly `inputs`, so that dynamic shapes can be given by name.

    Args:
        module: the user's module, which becomes the wrapper's `ROOT`.
        inputs: names of its inputs.
        result: what to return of its outputs.
    """
    wrapper = _Named(module, result)

    def forward(**values: Tensor) -> Any:
        return _Named.forward(wrapper, **values)

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    forward.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in inputs])  # type: ignore[attr-defined]
    wrapper.forward = forward  # type: ignore[method-assign]
    return wrapper


def export(wrapper: nn.Module, inputs: Mapping[str, Tensor], dynamic: Mapping[str, Sequence[int]]) -> ExportedProgram:
    """Trace `wrapper` (non-strict) and make the graph functional, keeping composite operators whole.

    Args:
        inputs: example inputs by name.
        dynamic: axes of each input that should stay symbolic. An axis that the model fixes becomes static.
    Raises:
        Unsupported: data-dependent control flow, or anything else that `torch.export` refuses.
    """
    shapes = {name: {axis: Dim.AUTO for axis in dynamic.get(name, ())} for name in inputs}
    try:
        with torch.no_grad():
            exported = torch.export.export(wrapper, (), dict(inputs), dynamic_shapes=shapes, strict=False)
            return exported.run_decompositions({})
    except torch.fx.experimental.symbolic_shapes.GuardOnDataDependentSymNode as error:
        raise Unsupported(
            "control flow that depends on tensor values",
            where=_user_frame(error),
            hint="Replace the Python branch by torch.where, or remove .item() calls.",
        ) from error
    except (
        torch._dynamo.exc.TorchDynamoException,
        torch._subclasses.fake_tensor.DataDependentOutputException,
    ) as error:
        raise Unsupported(f"tracing ({first_line(error)})", where=_user_frame(error)) from error
    except SkipstoneError:
        raise
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError) as error:
        # Non-strict tracing runs the model's own code, which may fail on symbolic sizes in any way.
        raise Unsupported(
            f"tracing ({type(error).__name__}: {first_line(error)})",
            where=_user_frame(error),
            hint="The model runs, but not with sizes that are left open.",
        ) from error


def first_line(error: BaseException) -> str:
    """The beginning of what an error says, or its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _user_frame(error: BaseException) -> str:
    """File and line of the innermost frame outside torch and skipstone."""
    place, frame = "", error.__traceback__
    while frame is not None:
        file = frame.tb_frame.f_code.co_filename
        if "/torch/" not in file and "skipstone" not in file and "/ir/capture/" not in file:
            place = f"{file}:{frame.tb_lineno}"
        frame = frame.tb_next
    return place


def to_program(
    exported: ExportedProgram, source: Source, roles: Mapping[str, Role], output_names: Sequence[str] | None = None
) -> Program:
    """Unlift the parameters, inline grad-mode and autocast regions, and give every input and output a role.

    Args:
        exported: the functional exported program of a wrapper whose `ROOT` attribute is the user's module.
        roles: role of each input and output, by name; the rest are `Role.TENSOR`.
        output_names: one name per output tensor.
    Raises:
        Unsupported: the model writes to its buffers or inputs while it runs.
    """
    signature = exported.graph_signature
    for spec in signature.output_specs:
        if spec.kind is not OutputKind.USER_OUTPUT:
            raise Unsupported(
                f"a forward pass that writes to {_strip(str(spec.target or 'its inputs'))}",
                hint="Its state would leak between calls; move the state into inputs and outputs.",
            )
    graph, tensors = fx.Graph(), {}
    environment: dict[fx.Node, Any] = {}
    kinds = {spec.arg.name: spec for spec in signature.input_specs if hasattr(spec.arg, "name")}
    inputs: list[Port] = []
    for node in exported.graph.nodes:
        if node.op == "placeholder":
            spec = kinds[node.name]
            if spec.kind is InputKind.USER_INPUT:
                inputs.append(Port(node.name, roles.get(node.name, Role.TENSOR)))
                environment[node] = graph.placeholder(node.name)
            else:
                name = _strip(str(spec.target))
                value = exported.state_dict.get(spec.target, exported.constants.get(spec.target))
                if not isinstance(value, Tensor):
                    raise InternalError(f"lifted input {spec.target!r} is not a tensor")
                tensors[name] = value.detach()
                environment[node] = graph.get_attr(name)
            environment[node].meta = kept_metadata(node.meta)
            environment[node].meta["val"] = _settled(node.meta["val"])
        elif node.op == "output":
            results = fx.map_arg(node.args[0], lambda old: environment[old])
            graph.output(tuple(results))
        else:
            environment[node] = copy_call(graph, node, environment, exported.graph_module, tensors)
    names = list(output_names or [f"output_{i}" for i in range(len(results))])
    outputs = tuple(Port(name, roles.get(name, Role.TENSOR)) for name in names)
    module = fx.GraphModule(tensors, graph)
    program = Program(module, tuple(inputs), outputs, source, exported.call_spec.out_spec)
    program.recompile()
    _refuse_randomness(program)
    _check_dynamic(exported, program)
    return program


def copy_call(
    graph: fx.Graph,
    node: fx.Node,
    environment: dict[fx.Node, Any],
    owner: fx.GraphModule,
    tensors: dict[str, Tensor],
    root: str = ROOT,
) -> Any:
    """Copy one node; a grad-mode or autocast region is replaced by its body.

    Args:
        environment: what became of the nodes before it.
        owner: what its `get_attr` nodes belong to.
        tensors: those of the program so far.
        root: path of the captured module in the node's metadata.
    """
    if node.op == "get_attr":
        return getattr(owner, str(node.target))
    target = node.target
    if target in _CHECKS:
        return None
    region = getattr(target, "__name__", "")
    if region in ("wrap_with_set_grad_enabled", "wrap_with_autocast"):
        body_node = next(a for a in node.args if isinstance(a, fx.Node) and a.op == "get_attr")
        body = getattr(owner, str(body_node.target))
        operands = [environment[a] for a in node.args[node.args.index(body_node) + 1 :]]  # type: ignore[index]
        if region == "wrap_with_autocast" and node.args[2] is not False and node.args[2] is not None:
            raise Unsupported(
                "autocast inside the model", where=_strip(module_path(node), root), hint="Cast the model instead."
            )
        return _inline(graph, body, operands, tensors, root)
    if isinstance(target, torch._ops.HigherOrderOperator):
        raise Unsupported(f"control flow inside the model (torch.{target})", where=_strip(module_path(node), root))
    if target is operator.getitem and not isinstance(environment[node.args[0]], fx.Node):  # type: ignore[index]
        return environment[node.args[0]][node.args[1]]  # type: ignore[index]
    copy = graph.node_copy(node, lambda old: environment[old])
    copy.target = _CANONICAL.get(target, target)
    copy.meta = kept_metadata(node.meta, root)
    return copy


def _inline(
    graph: fx.Graph, body: fx.GraphModule, operands: Sequence[Any], tensors: dict[str, Tensor], root: str
) -> Any:
    environment: dict[fx.Node, Any] = {}
    remaining = iter(operands)
    for node in body.graph.nodes:
        if node.op == "placeholder":
            environment[node] = next(remaining)
        elif node.op == "output":
            return fx.map_arg(node.args[0], lambda old: environment[old])
        else:
            environment[node] = copy_call(graph, node, environment, body, tensors, root)
    raise InternalError("a region has no output")


def _strip(path: str, root: str = ROOT) -> str:
    return path.removeprefix(root).removeprefix(".")


def kept_metadata(meta: Mapping[str, Any], root: str = ROOT) -> dict[str, Any]:
    """The metadata that programs keep: value, place in the module tree below `root`, place in the source."""
    kept = {key: meta[key] for key in ("val", "stack_trace") if key in meta}
    stack = meta.get("nn_module_stack") or {}
    kept["nn_module_stack"] = {key: (_strip(str(path), root), kind) for key, (path, kind) in stack.items()}
    return kept


def _refuse_randomness(program: Program) -> None:
    """Refuse operators that draw random numbers; dropout in evaluation mode, and what would apply it, draws none."""
    for node in program.nodes():
        if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
            continue
        schema = node.target._schema.arguments  # type: ignore[union-attr]
        given = {argument.name: argument.default_value for argument in schema}
        given |= dict(zip(given, node.args, strict=False)) | node.kwargs
        is_evaluated = given.get("train", given.get("training")) is False
        if is_evaluated or 0 in (given.get("p"), given.get("dropout"), given.get("dropout_p")):
            continue
        raise Unsupported(
            f"a model that draws random numbers ({node.name})",
            where=module_path(node),
            hint="Dropout that is no module needs training=self.training; make noise an input.",
        )


def _settled(value: Tensor) -> Tensor:
    """A fake input with numbers for the sizes that the model's own code fixed: calls with others are refused."""
    sizes = [
        int(size) if isinstance(size, torch.SymInt) and not size.node.expr.free_symbols else size
        for size in value.shape
    ]
    if all(own is size for own, size in zip(value.shape, sizes, strict=True)):
        return value
    with value.fake_mode:  # type: ignore[attr-defined]
        return torch.empty(sizes, dtype=value.dtype, device=value.device)


def _check_dynamic(exported: ExportedProgram, program: Program) -> None:
    """Keep the range of sizes that the trace holds for: a finite upper bound limits the sequence."""
    lengths = program.input(Role.TOKENS) or program.input(Role.EMBEDDINGS)
    if lengths is None:
        return
    shape = lengths.meta["val"].shape
    for axis, meaning in ((0, "batch"), (1, "sequence")):
        size = shape[axis]
        if not isinstance(size, torch.SymInt) or not size.node.expr.free_symbols:
            raise Unsupported(
                f"a {meaning} size fixed to {size} by the model's own code",
                where=lengths.name,
                hint="Look for Python branches or shapes computed from it.",
            )
        bounds = exported.range_constraints.get(size.node.expr)
        if bounds is not None and int(bounds.lower) > 2:
            raise Unsupported(f"{meaning} sizes below {int(bounds.lower)}", where=lengths.name)
        upper = int(bounds.upper) if bounds is not None and isinstance(bounds.upper, sympy.Integer) else math.inf
        if meaning == "sequence" and upper < (program.source.max_positions or math.inf):
            program.source = replace(program.source, max_positions=int(upper))
