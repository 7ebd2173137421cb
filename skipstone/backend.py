"""`torch.compile(model, backend="skipstone", options={"plan": ...})`: a plan carried out on the graphs of Dynamo.

Each graph holds one call of the whole model: a prompt, a step with a cache, a step with sizes left open. All of them
get the plan's rewrites, and Inductor compiles what comes out. What a plan asks for that such a graph does not show
(which tokens are a prompt, the cache between calls) is refused, and belongs to `skipstone.optimize`.
"""

from __future__ import annotations

import difflib
import logging
import os
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo import convert_frame, eval_frame
from torch._dynamo.exc import TensorifyScalarRestartAnalysis
from torch._dynamo.symbolic_convert import InstructionTranslator, TensorifyState
from torch._guards import TracingContext
from torch._inductor import list_mode_options, list_options
from torch._inductor.compile_fx import compile_fx

from skipstone.ir.capture.dynamo import Frame, capture_frame
from skipstone.ir.capture.exported import source_of
from skipstone.ir.capture.kept import set_caches_apart
from skipstone.ir.dialect import GATE
from skipstone.ir.errors import InvalidPlan, Unsupported, UserError
from skipstone.ir.lanes import LANE
from skipstone.ir.program import Program
from skipstone.ir.stream import find_stream, note_layers
from skipstone.passes.base import Remark, Status, run_pass
from skipstone.passes.cleanup import Cleanup
from skipstone.passes.compress_kv import CompressKV
from skipstone.passes.compress_prompt import CompressPrompt
from skipstone.passes.fuse_parallel import FuseParallel
from skipstone.passes.layer_parallel import LayerParallel
from skipstone.passes.predicate_ffn import PredicateFFN
from skipstone.passes.quantize_kv import QuantizeKV
from skipstone.passes.quantize_weights import QuantizeWeights
from skipstone.passes.self_speculate import SelfSpeculate
from skipstone.passes.skip_by_prompt import SkipByPrompt
from skipstone.passes.skip_ffn_adaptive import SkipFFNAdaptive
from skipstone.passes.skip_sublayers import SkipSublayers
from skipstone.plan import Plan
from skipstone.runtime.frame import add_counts, kept, lower, rejoin

log = logging.getLogger(__name__)

_TORCH = os.path.dirname(torch.__file__) + os.sep

_STACKS: weakref.WeakValueDictionary[Any, Tensor] = weakref.WeakValueDictionary()
"""Tensors that rewrites made, as long as compiled code has them."""

_UNSEEN = {
    SkipByPrompt: "which tokens are a prompt, and which program read it",
    QuantizeKV: "the cache between two calls, whose format would change",
    CompressKV: "the cache between two calls, whose size would change",
    CompressPrompt: "which tokens are a prompt, and the cache behind it",
    SelfSpeculate: "what is generated from call to call",
}
"""Rewrites that need what a single call does not show."""


@dataclass(frozen=True)
class FrameReport:
    """What the plan did to one graph that Dynamo traced.

    Attributes:
        remarks: what each pass says, in order.
        nodes_before, nodes_after: operators of the graph.
        code: the readable graph behind the last pass.
    """

    remarks: tuple[Remark, ...]
    nodes_before: int
    nodes_after: int
    code: str

    def __str__(self) -> str:
        head = f"a frame of {self.nodes_before} operators, {self.nodes_after} after the plan"
        return "\n".join([head, *(f"  {remark}" for remark in self.remarks)])


@dataclass(frozen=True)
class _Options:
    """The options of one `torch.compile`."""

    plan: Plan
    report: Callable[[FrameReport], Any] | None
    decode_start: Tensor | None
    inductor: Mapping[str, Any]


def backend(
    graph: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Rewrite a graph of Dynamo as a plan says, and let Inductor compile it; a backend of `torch.compile`.

    Args:
        graph, example_inputs: from Dynamo.
        mode: as with Inductor, e.g. ``"reduce-overhead"``.
        options: ``"plan"``, a `skipstone.Plan`, its dictionary, or the path of its file; ``"report"``, a function that
            is called with a `FrameReport` for each graph; ``"decode_start"``, where `SkipFFNAdaptive` may begin: an
            int64 tensor [1] or [B], the position of the first token behind each prompt, in the sense of the model's
            `position_ids`, read anew in every call, so that it is written to before each text; and any of Inductor's.
            Without a plan, and with an empty one, this is Inductor.
    Raises:
        UserError: an option that is not known, or a plan that does not fit the model.
        Unsupported: a rewrite that needs more than the graph shows, or a graph that is not the whole model, or one
            that gradients are asked of.
    """
    settings = _read(mode, options)
    if not len(settings.plan):
        return _compiled(graph, example_inputs, settings)
    _refuse_plan(settings)
    _refuse_frame(graph, example_inputs)
    _fix_numbers(graph)
    frame = capture_frame(graph, example_inputs)
    _check_model(settings.plan, frame)
    if settings.decode_start is not None:
        add_counts(frame, settings.decode_start)
    program, copied = _rewrite(frame, settings.plan)
    report = _report(program)
    log.info("%s", report)
    for remark in report.remarks:
        if remark.status is Status.REFUSED:
            log.warning("%s", remark)
    _share_stacks(program, frame)
    module, further = lower(frame, program, settings.decode_start)
    compiled = _compiled(module, [*example_inputs, *map(_of_fixed_sizes, further)], settings)
    if settings.report is not None:
        settings.report(report)
    places = {name: place for place, name in enumerate(_names(frame))}
    stale = [_Copied.of(places[name], name, example_inputs[places[name]]) for name in copied]
    return _with_further(compiled, further, stale) if further else compiled


def _compiled(graph: fx.GraphModule, inputs: Sequence[Any], settings: _Options) -> Callable[..., Any]:
    compiled: Any = compile_fx(graph, inputs, config_patches=dict(settings.inductor))
    return compiled  # type: ignore[no-any-return]


# Options


def _read(mode: str | None, options: Mapping[str, Any] | None) -> _Options:
    own = dict(options or {})
    plan, report, start = _plan(own.pop("plan", None)), own.pop("report", None), own.pop("decode_start", None)
    if start is not None and not (isinstance(start, Tensor) and start.dtype == torch.int64 and start.ndim == 1):
        hint = "Pass an int64 tensor [1] or [B]: the position of the first token behind each prompt."
        raise UserError("option 'decode_start' is no list of positions.", hint=hint)
    if report is not None and not callable(report):
        raise UserError(
            f"option 'report' is {type(report).__name__}, expected a function.", hint="Pass the append of a list."
        )
    inductor = {name.replace("-", "_"): value for name, value in own.items()}
    known = ["plan", "report", "decode_start", *list_options()]
    for name in inductor:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
            raise UserError(
                f"unknown option {name!r} of the backend 'skipstone'.", hint=f"The nearest is {nearest[0]!r}."
            )
    if mode is not None:
        modes = list_mode_options()
        if mode not in modes:
            raise UserError(f"unknown mode {mode!r}.", hint=f"Inductor's modes are {', '.join(map(repr, modes))}.")
        inductor = {**modes[mode], **inductor}
    return _Options(plan, report, start, inductor)


def _plan(value: Any) -> Plan:
    match value:
        case None:
            return Plan([])
        case Plan():
            return value
        case str() | os.PathLike():
            return Plan.load(value)
        case Mapping():
            return Plan.from_dict(dict(value), "option 'plan'")
    raise UserError(
        f"option 'plan' is {type(value).__name__}.",
        hint="Pass a skipstone.Plan, its dictionary, or the path of its file.",
    )


# What is refused


def _refuse_plan(settings: _Options) -> None:
    """Refuse what no graph of Dynamo shows, and settings that fit no model."""
    is_adaptive = any(isinstance(entry, SkipFFNAdaptive) for entry in settings.plan)
    if is_adaptive and settings.decode_start is None:
        raise Unsupported(
            f"{SkipFFNAdaptive.name} in a torch.compile backend that is not told which tokens are a prompt",
            hint="Pass options={'decode_start': ...}, an int64 tensor with the position of the first token behind each "
            "prompt, or use skipstone.optimize(model, plan).",
        )
    if settings.decode_start is not None and not is_adaptive:
        raise UserError(f"option 'decode_start' without {SkipFFNAdaptive.name} in the plan.", hint="Leave it out.")
    for entry in settings.plan:
        if type(entry) in _UNSEEN:
            raise Unsupported(
                f"{entry.name} in a torch.compile backend, which does not see {_UNSEEN[type(entry)]}",
                hint="Use skipstone.optimize(model, plan).",
            )
        if isinstance(entry, QuantizeWeights):
            raise Unsupported(
                f"{entry.name} in a torch.compile backend, whose compiler has no product with such weights",
                hint="Use skipstone.optimize(model, plan) or skipstone.export_onnx(model, directory, plan).",
            )
        if isinstance(entry, LayerParallel):
            entry.validate()
            if entry.kv != "iterate":
                raise Unsupported(
                    f"layer_parallel with kv={entry.kv!r} in a torch.compile backend, where the model keeps its cache",
                    hint="Use kv='iterate', or skipstone.optimize(model, plan).",
                )


def _refuse_frame(graph: fx.GraphModule, inputs: Sequence[Any]) -> None:
    """Refuse a graph that is not the whole model, or that gradients are asked of."""
    if torch.is_grad_enabled() and any(isinstance(each, Tensor) and each.requires_grad for each in inputs):
        raise Unsupported("training through a plan", hint="Call the compiled model under torch.no_grad().")
    device = next((each.device.type for each in inputs if isinstance(each, Tensor)), "cpu")
    if torch.is_autocast_enabled(device):
        raise Unsupported("autocast around the model", hint="Cast the model instead.")
    reason = getattr(graph, "compile_subgraph_reason", None)
    if (reason is not None and reason.graph_break) or not _is_whole_call():
        raise Unsupported(
            "a graph that is only a part of the model, whose layers cannot be numbered: there is a graph break",
            hint="Find the break with fullgraph=True.",
        )


def _is_whole_call() -> bool:
    """Whether the graph is of the function that was given to `torch.compile`, and not of one that it calls.

    Where Dynamo cannot trace a function it runs it, and traces what that calls: then the function itself stands between
    the call and the tracer.
    """
    frame, traced = sys._getframe(), False
    while frame is not None:
        file = frame.f_code.co_filename
        if file == convert_frame.__file__:
            traced = True
        elif traced and file == eval_frame.__file__:
            return True
        elif traced and not file.startswith(_TORCH):
            return False
        frame = frame.f_back  # type: ignore[assignment]
    return False


def _fix_numbers(graph: fx.GraphModule) -> None:
    """Have Dynamo trace again where it left a floating-point number open: a scale or an epsilon is part of the model.

    Dynamo then guards on the number's value. Inductor asks for the same where it cannot compute with an open number.
    """
    found = False
    for node in graph.graph.find_nodes(op="placeholder"):
        item = getattr(node.meta["example_value"], "item_memo", None)
        name = getattr(item.node._expr, "name", "") if isinstance(item, torch.SymFloat) else ""
        if name and not TensorifyState.should_specialize(name):
            TensorifyState.specialize(name)
            found = True
    if found:
        raise TensorifyScalarRestartAnalysis


def _check_model(plan: Plan, frame: Frame) -> None:
    """Refuse a plan that was made for another model.

    Raises:
        InvalidPlan: it was.
        Unsupported: the frame's model cannot be found.
    """
    if plan.model is None:
        return
    scope = InstructionTranslator.current_tx().output
    try:
        model = eval(frame.root, {"L": scope.local_scope, "G": scope.global_scope}) if frame.root else None
    except (LookupError, AttributeError):
        model = None
    if not isinstance(model, nn.Module):
        raise Unsupported(
            "a plan for one model in a frame whose model cannot be found",
            hint="Compile the model itself, or set the plan's 'model' to null.",
        )
    found = source_of(model, vocabulary=None, max_positions=None).fingerprint
    if plan.model != found:
        raise InvalidPlan(
            f"the plan was made for another model (fingerprint {plan.model[:12]}..., this one has {found[:12]}...).",
            hint="Make a plan for this model, or set its 'model' to null if the layers mean the same.",
        )


# The rewrites


def _rewrite(frame: Frame, plan: Plan) -> tuple[Program, set[str]]:
    """The frame's program, rewritten, and the names of tensors whose values it has in copies."""
    frame.program = run_pass(Cleanup(), frame.program)
    find_stream(frame.program)  # refuses a frame without one
    set_caches_apart(frame)
    note_layers(frame.program)
    program, expected, copied = frame.program, None, set[str]()
    for entry in plan:
        if not isinstance(entry, SkipSublayers) and expected is None:
            expected = kept(program)
        if isinstance(entry, FuseParallel) and expected:
            program = _lanes_apart(program)
        before = program.tensors().keys()
        program = run_pass(entry, program)
        if isinstance(entry, FuseParallel):
            copied = before - program.tensors().keys()
    if any(True for _ in program.nodes(GATE)):
        program = run_pass(PredicateFFN(), program)
    rejoin(frame, program, kept(program) if expected is None else expected)
    return program, copied


def _lanes_apart(program: Program) -> Program:
    """The program with its parallel layers side by side for good, and a remark that says so."""
    result, lanes = program.copy(), 0
    for node in result.graph.nodes:
        lanes += node.meta.pop(LANE, None) is not None
    if lanes:
        why = "left side by side: a cache of Hugging Face holds the keys and values of each layer apart"
        remark = Remark(FuseParallel.name, Status.REFUSED, "model", why)
        last = result.history[-1]
        result.history.append(replace(last, name=FuseParallel.name, remarks=(remark,), seconds=0.0))
    return result


def _report(program: Program) -> FrameReport:
    first, last = program.history[0], program.history[-1]
    remarks = tuple(remark for record in program.history for remark in record.remarks)
    return FrameReport(remarks, first.nodes_before, last.nodes_after, last.code)


# Tensors beside the model's own


@dataclass(frozen=True)
class _Copied:
    """A parameter whose values a stack has taken over, as it was then."""

    place: int
    name: str
    tensor: Callable[[], Tensor | None]
    version: int

    @classmethod
    def of(cls, place: int, name: str, tensor: Tensor) -> _Copied:
        return cls(place, name, weakref.ref(tensor), _version(tensor))

    def check(self, tensor: Tensor) -> None:
        """Refuse other values than those that the stack has.

        Raises:
            UserError: the parameter is another one, or was written to.
        """
        if tensor is not self.tensor() or _version(tensor) != self.version:
            raise UserError(
                f"{self.name} has changed since fuse_parallel copied it into a stack.",
                hint="Call torch.compiler.reset() to compile anew.",
            )


def _share_stacks(program: Program, frame: Frame) -> None:
    """Take the stacks that another frame has already, where they are equal: a model is compiled more than once."""
    for name, tensor in program.tensors().items():
        if name not in frame.owned.values():
            key = name, tuple(tensor.shape), tensor.dtype, tensor.device
            known = _STACKS.get(key)
            if known is not None and torch.equal(known, tensor):
                setattr(program.module, name, known)
            else:
                _STACKS[key] = tensor


def _of_fixed_sizes(tensor: Tensor) -> Tensor:
    """What stands for a tensor while a frame is compiled: open sizes would come from no input of the frame."""
    mode = TracingContext.get().fake_mode
    assert mode is not None
    return mode.from_tensor(tensor, static_shapes=True)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _names(frame: Frame) -> list[str]:
    """What each input of the frame is called in its program."""
    names = [node.name for node in frame.module.graph.find_nodes(op="placeholder")]
    return [frame.owned.get(name, name) for name in names]


def _with_further(
    compiled: Callable[..., Any], further: Sequence[Tensor], copied: Sequence[_Copied]
) -> Callable[..., Any]:
    """Compiled code that takes further tensors behind the inputs of the frame."""

    def run(*inputs: Any) -> Any:
        for each in copied:
            each.check(inputs[each.place])
        return compiled(*inputs, *further)

    return run
