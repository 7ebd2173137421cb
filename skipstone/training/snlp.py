"""Training for layers that run at the same time: the regularizer of SNLP, for any module with residual layers.

    regularizer = LayerParallelLoss(model.model.layers, [Segment(8, 24)], stride=4)
    for step, batch in enumerate(batches):
        with regularizer.record():
            loss = model(**batch, use_cache=False).loss
        (loss + 0.5 * ramp(step / steps) * regularizer.loss()).backward()

It asks of a model what `skipstone.LayerParallel` will do to it: that the states of a segment, when all its layers run
at the same time, are those of its layers one after another (arXiv 2605.17842, version 2). The ordinary forward pass is
recorded, and only the parallel evaluations come on top of it. Each layer is evaluated as the model called it, with its
own positions, masks and window, and corrections follow the layer's own linear skip path.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as checkpointed
from transformers import Cache

from skipstone.ir.errors import InvalidInput, InvalidPlan, Unsupported
from skipstone.passes.layer_parallel import Segment

SMALLEST_SIZE = 1e-6
"""The smallest norm that errors are measured against; the paper's."""

STRETCH = 2.0**14
"""How far a state is stretched to tell the skip path from the branches, which a norm keeps as they are. What the first
branch of a layer adds to the state changes what the second reads, by its inverse: the error falls by its square."""

TOLERANCE = 1e-3
"""Relative error up to which a layer does what it should; twice the dtype's epsilon where that is larger (bfloat16)."""


def ramp(share: float, warmup: float = 0.2) -> float:
    """The weight of the regularizer at `share` of the training: from 0 linearly to 1 over the first `warmup` of it.

    A compiled step or a CUDA graph takes a Python number for a constant: fill a tensor of no dimensions with it.
    """
    return min(1.0, share / warmup)


class LayerParallelLoss:
    """How far the states of layers that run at the same time are from those of the layers one after another.

    The loss is the sum, over segments and over the layers l that are compared, of the mean over tokens of

        |h_l' - h_l| / max(|h_l|, 1e-6)

    with h_l the state behind layer l and h_l' that of `skipstone.LayerParallel`, after the segment's iterations. It is
    0 where branches do not depend on the state, and for as many iterations as layers. With one iteration, a segment
    costs another forward pass of its layers.

    On the first pass each layer is evaluated three times more, to prove that it is a function of its state alone (no
    dropout, no memory), and that its linear skip path is what `scales` says: branches that read a norm of the state
    pass ``f(2ch) - f(ch) = scale * c * h`` for a large c. This waits for the device: capture a CUDA graph of a later
    pass. Gradient checkpointing of the model may be on.

    Args:
        layers: the model's layers in order, modules that read a state [..., hidden] as their first argument, or as
            `hidden_states`, and return one of the same shape, alone or first in a tuple. Segments count them from 0.
        segments: what shall run at the same time; they may overlap. Only the unit "layer" is supported. With the
            surrogate "auto" the skip path is proven; "identity" and "zero" are taken at their word.
        stride: every how many layers of a segment states are compared, beside the last; 0 for the last alone.
        scales: for each layer what it multiplies its state by on the linear way past its branches, a number or a tensor
            that broadcasts to the state; None for 1. Parameters are read anew for each loss.
        detach: whether gradients are kept from flowing into the states h_l that are aimed at.
        checkpoint: whether the backward pass evaluates the layers again, instead of keeping what they computed.
    Raises:
        InvalidPlan: a segment that the layers do not have.
        InvalidInput: another argument that cannot be.
        Unsupported: a segment of another unit, or one module in the place of several layers.
    """

    def __init__(
        self,
        layers: nn.ModuleList | Sequence[nn.Module],
        segments: Sequence[Segment],
        *,
        stride: int = 0,
        scales: Sequence[float | Tensor] | Tensor | None = None,
        detach: bool = False,
        checkpoint: bool = False,
    ) -> None:
        self.layers, self.segments = tuple(layers), tuple(segments)
        self.stride, self.scales, self.detach, self.checkpoint = stride, scales, detach, checkpoint
        self._validate()
        self._read = sorted({index for each in self.segments for index in range(each.start, each.stop)})
        self._pass: _Pass | None = None
        self._proven: set[tuple[int, bool, bool]] = set()

    def _validate(self) -> None:
        if not self.segments:
            raise InvalidPlan("no segment.", hint="Write LayerParallelLoss(layers, [Segment(2, 4)]).")
        for segment in self.segments:
            segment.validate()
            if segment.unit != "layer":
                raise Unsupported(f"training for the unit {segment.unit!r}", hint="Take the unit 'layer'.")
            if segment.surrogate == "at_iterate":
                hint = "Take 'auto' with 'scales', or 'identity' or 'zero'."
                raise Unsupported("training for the surrogate 'at_iterate'", hint=hint)
            if segment.tolerance:
                raise Unsupported("training for iterations that end early", hint="Leave out 'tolerance'.")
            if segment.stop > len(self.layers):
                problem = f"{segment}, but there are layers 0 to {len(self.layers) - 1}."
                raise InvalidPlan(problem, hint=f"The nearest 'stop' is {len(self.layers)}.")
        if self.stride < 0:
            raise InvalidInput(f"stride is {self.stride}.", hint="0 compares the last state of each segment alone.")
        if self.scales is not None and len(self.scales) != len(self.layers):
            raise InvalidInput(f"{len(self.scales)} scales for {len(self.layers)} layers.", hint="Give one for each.")
        if len(set(self.layers)) < len(self.layers):
            raise Unsupported("one module in the place of several layers", hint="Give each layer its own module.")

    @contextmanager
    def record(self) -> Iterator[None]:
        """Record the one forward pass that runs inside, for `loss`.

        Raises:
            InvalidInput: a layer runs twice.
            Unsupported: a layer is not called with one state or does not return one, is called with a KV cache, or runs
                under reentrant checkpointing.
        """
        recorded = self._pass = _Pass(torch.is_grad_enabled())

        def keep(index: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            # Once its loss is taken, layers run for that, or once more for a checkpointed backward pass.
            if self._pass is recorded:
                recorded.keep(index, _Call.of(f"layer {index}", layer, args, kwargs, output))

        hooks = [
            self.layers[index].register_forward_hook(partial(keep, index), with_kwargs=True) for index in self._read
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def loss(self, valid: Tensor | None = None) -> Tensor:
        """The loss of the recorded pass, in float32 or wider; once for each pass, under the autocast of that pass.

        Args:
            valid: bool, of the shape of a state without its last axis: the tokens that count. All of them by default.
        Raises:
            InvalidInput: no pass was recorded, or a layer did not run.
            Unsupported: a layer is no function of its state alone, has another skip path than it should, or does not
                read what the layer before it returned.
        """
        recorded, self._pass = self._pass, None
        if recorded is None:
            hint = "Run the model inside 'with regularizer.record():'; each pass gives one loss."
            raise InvalidInput("no forward pass is recorded.", hint=hint)
        missing = [index for index in self._read if index not in recorded.calls]
        if missing:
            hint = "Give the layers of the model that runs. A model that is compiled as a whole does not run them."
            raise InvalidInput(f"layer {missing[0]} did not run while recorded.", hint=hint)
        tokens = recorded.calls[self._read[0]].before.shape[:-1]
        if valid is not None and (valid.dtype != torch.bool or valid.shape != tokens):
            raise InvalidInput(f"valid is {valid.dtype} {list(valid.shape)}, expected bool {list(tokens)}.")
        for segment in self.segments:
            calls = recorded.segment(segment)
            _refuse_gaps(calls)
            with torch.no_grad(), recorded.autocast():
                self._prove(segment, calls)
        with recorded.autocast():
            return torch.stack([self._part(each, recorded.segment(each), valid) for each in self.segments]).sum()

    def _part(self, segment: Segment, calls: Sequence[_Call], valid: Tensor | None) -> Tensor:
        """The loss of one segment."""
        numbers = _compared(segment, self.stride)
        errors = [torch.zeros((), device=calls[0].before.device)]
        scales = [self._scale(segment, index) for index in range(segment.start, segment.stop)]
        trace = _newton(calls, scales, segment.iterations, self.checkpoint) if numbers else []
        for number in numbers:
            guess, exact = trace[number - 1], _wide(calls[number - 1].after)
            if self.detach:
                exact = exact.detach()
            if valid is not None:
                guess, exact = guess[valid], exact[valid]
            size = torch.linalg.vector_norm(exact, dim=-1).clamp(min=SMALLEST_SIZE)
            errors.append((torch.linalg.vector_norm(guess - exact, dim=-1) / size).mean())
        return torch.stack(errors).sum()

    def _scale(self, segment: Segment, index: int) -> float | Tensor:
        """What a segment takes for the linear way through a layer."""
        if segment.surrogate == "zero":
            return 0.0
        return 1.0 if segment.surrogate == "identity" or self.scales is None else self.scales[index]

    def _prove(self, segment: Segment, calls: Sequence[_Call]) -> None:
        """Prove what is not yet proven of the layers of a segment, in the mode that they are in."""
        for index, call in enumerate(calls, segment.start):
            claim = index, call.layer.training, segment.surrogate == "auto"
            if claim not in self._proven:
                _prove_repeatable(call)
                if segment.surrogate == "auto":
                    _prove_skip_path(call, self._scale(segment, index))
                self._proven.add(claim)


def _newton(calls: Sequence[_Call], scales: Sequence[float | Tensor], iterations: int, recompute: bool) -> list[Tensor]:
    """The states behind each layer after all iterations, see `skipstone.passes.layer_parallel`; float32 or wider."""
    before = [_wide(calls[0].before)] * (len(calls) + 1)
    for iteration in range(iterations):
        after = list(before)  # the first `iteration` states are final
        for number in range(iteration, len(calls)):
            call = calls[number]
            state = before[number].to(call.before.dtype)
            if recompute:
                result = checkpointed(call, state, use_reentrant=False, preserve_rng_state=False)
            else:
                result = call(state)
            after[number + 1] = _wide(result)
            if after[number] is not before[number]:
                after[number + 1] = after[number + 1] + scales[number] * (after[number] - before[number])
        before = after
    return before[1:]


def _compared(segment: Segment, stride: int) -> list[int]:
    """The states that are compared, numbered from 1: every `stride`-th and the last, without those that are exact."""
    layers = segment.stop - segment.start
    numbers = [*(range(stride, layers, stride) if stride else ()), layers]
    return [number for number in numbers if number > segment.iterations]


def _wide(state: Tensor) -> Tensor:
    return state.to(torch.promote_types(state.dtype, torch.float32))


# The recorded pass


@dataclass(frozen=True)
class _Call:
    """One layer's part in a recorded pass. Called with another state, the layer sees all else as it was then."""

    where: str
    layer: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    before: Tensor
    after: Tensor

    @classmethod
    def of(cls, where: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> _Call:
        """The call of a layer that gave that output.

        Raises:
            Unsupported: it is not a function of one state that can be evaluated again.
        """
        before, after = (args[0] if args else kwargs.get("hidden_states")), _first(output)
        if not isinstance(before, Tensor) or not isinstance(after, Tensor) or before.shape != after.shape:
            hint = "It has to read a state first, and return one of the same shape, alone or first in a tuple."
            raise Unsupported("a layer that is no function of one state", where=where, hint=hint)
        if after is before:
            raise Unsupported("a layer that changes its state in place", where=where, hint="Let it return a new one.")
        if any(isinstance(value, Cache) for value in (*args, *kwargs.values())):
            hint = "Call the model with use_cache=False: evaluated again, a layer would write twice."
            raise Unsupported("a KV cache", where=where, hint=hint)
        return cls(where, layer, args, kwargs, before, after)

    def __call__(self, state: Tensor) -> Tensor:
        if self.args:
            return _first(self.layer(state, *self.args[1:], **self.kwargs))
        return _first(self.layer(**{**self.kwargs, "hidden_states": state}))


def _first(output: Any) -> Any:
    """The state in what a layer returned: all of it, or the first of a tuple."""
    return output[0] if isinstance(output, tuple | list) and output else output


class _Pass:
    """A recorded forward pass.

    Args:
        gradients: whether gradients were asked for when it began.
    """

    def __init__(self, gradients: bool) -> None:
        self.gradients = gradients
        self.calls: dict[int, _Call] = {}
        self.autocast: Callable[..., torch.autocast] = torch.autocast

    def keep(self, index: int, call: _Call) -> None:
        """Add a layer's call.

        Raises:
            InvalidInput: the layer ran before.
            Unsupported: it runs without gradients in a pass with gradients.
        """
        if index in self.calls:
            hint = "Record one forward pass, and take its loss before the backward pass."
            raise InvalidInput(f"{call.where} ran twice while recorded.", hint=hint)
        if torch.is_grad_enabled() != self.gradients:
            hint = "Checkpoint with use_reentrant=False, and put torch.no_grad() around the recording, not inside it."
            raise Unsupported("a layer without gradients in a pass with gradients", where=call.where, hint=hint)
        if not self.calls:
            kind = call.before.device.type
            enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
            self.autocast = partial(torch.autocast, kind, dtype, enabled=enabled)
        self.calls[index] = call

    def segment(self, segment: Segment) -> list[_Call]:
        """The calls of a segment's layers."""
        return [self.calls[index] for index in range(segment.start, segment.stop)]


def _refuse_gaps(calls: Sequence[_Call]) -> None:
    """Refuse layers between which something else happens to the state.

    Raises:
        Unsupported: there is such a place.
    """
    for first, second in pairwise(calls):
        # Wrappers may hand on another view of the same memory.
        if first.after is not second.before and first.after.data_ptr() != second.before.data_ptr():
            hint = "Give modules whose state is changed by nothing else, such as a module around both."
            raise Unsupported(f"a state that is changed between {first.where} and {second.where}", hint=hint)


# What a layer has to be


def _prove_repeatable(call: _Call) -> None:
    """Prove that a layer is a function of its state.

    Raises:
        Unsupported: it draws random numbers, or gives another result the second time.
    """
    kind = call.before.device
    devices = [kind] if kind.type == "cuda" else []
    with torch.random.fork_rng(devices):
        before = _random_states(devices)
        error = _distance(call(call.before), call.after)
        drawn = not all(torch.equal(one, other) for one, other in zip(before, _random_states(devices), strict=True))
    if drawn:
        hint = "Switch it off, for instance with attention_dropout=0: two evaluations would differ by chance."
        raise Unsupported("a layer that draws random numbers (dropout)", where=call.where, hint=hint)
    if not error <= _tolerance(call.after.dtype):
        hint = "Layers have to be functions of their state, and to compute the same again in the same mode."
        raise Unsupported(
            f"a layer that gives another result the second time ({error:.1e})", where=call.where, hint=hint
        )


def _prove_skip_path(call: _Call, scale: float | Tensor) -> None:
    """Prove that a layer is ``scale * h`` and branches that read a norm of h.

    Raises:
        Unsupported: it is not, or that cannot be told.
    """
    near = STRETCH * call.before
    change = (_wide(call(2 * near)) - _wide(call(near))) / STRETCH
    error = _distance(change, scale * _wide(call.before))
    if not error <= _tolerance(call.after.dtype):
        hint = (
            "Give 'scales' where layers scale their state. Where branches read no norm of it, no path can be told: "
            "take the surrogate 'identity' if it is one. Layers that end in a norm cannot run in parallel."
        )
        raise Unsupported(f"a layer with another linear skip path ({error:.1e} off)", where=call.where, hint=hint)


def _random_states(devices: Sequence[torch.device]) -> list[Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in devices)]


def _distance(one: Tensor, other: Tensor) -> float:
    """The largest distance of two states of a token, relative to the second."""
    size = torch.linalg.vector_norm(_wide(other), dim=-1).clamp(min=SMALLEST_SIZE)
    return float((torch.linalg.vector_norm(_wide(one) - _wide(other), dim=-1) / size).max())


def _tolerance(dtype: torch.dtype) -> float:
    return max(TOLERANCE, 2 * torch.finfo(dtype).eps)
