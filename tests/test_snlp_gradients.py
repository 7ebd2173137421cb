"""The regularizer for layers at the same time: its gradients, and what it keeps for them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import pytest
import torch
from torch import Tensor

from skipstone import LayerParallel, Segment
from skipstone.ir.capture.module import capture_module
from skipstone.passes.base import run_pass
from skipstone.passes.cleanup import Cleanup
from skipstone.training import LayerParallelLoss
from skipstone.training.snlp import _Call, _newton
from tests.snlp_oracles import LAYERS, assert_equal, by_hand, example, gradients, loss_of, net, scales

pytestmark = pytest.mark.usefixtures("one_thread")


def test_gradients_are_those_of_finite_differences() -> None:
    model, x = net(True), example()
    loss = loss_of(model, x, Segment(1, 5, 2), stride=2)
    direction = [torch.randn_like(each) for each in model.parameters()]
    slope = sum(float((g * d).sum()) for g, d in zip(gradients(loss, model), direction, strict=True))

    def moved(by: float) -> float:
        other = copy.deepcopy(model)
        with torch.no_grad():
            for parameter, each in zip(other.parameters(), direction, strict=True):
                parameter += by * each
        return loss_of(other, x, Segment(1, 5, 2), stride=2).item()

    assert slope == pytest.approx((moved(1e-6) - moved(-1e-6)) / 2e-6, rel=1e-6)


def test_detached_aims_get_no_gradients() -> None:
    model, x, segment = net(), example(), Segment(1, 5)
    found = loss_of(model, x, segment, stride=2, detach=True)
    wanted = by_hand(model, x, segment, [2, 4], detach=True)
    whole = loss_of(model, x, segment, stride=2)
    assert_equal([found], [whole])
    detached = gradients(found, model)
    assert_equal(detached, gradients(wanted, model))
    apart = [(one - other).abs().max() for one, other in zip(gradients(whole, model), detached, strict=True)]
    assert max(apart) > 0.01


@contextmanager
def kept_bytes() -> Iterator[Callable[[], int]]:
    """How many bytes the backward pass keeps of what runs inside."""
    sizes: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        sizes[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield lambda: sum(sizes.values())


def test_checkpointing_keeps_less_and_changes_nothing() -> None:
    model, x, kept, found = net(True), example(batch=16), [], []
    for checkpoint in (False, True):
        regularizer = LayerParallelLoss(
            model.layers, [Segment(0, 5, 2)], scales=scales(model), checkpoint=checkpoint, stride=2
        )
        with regularizer.record():
            model(x)
        with kept_bytes() as total:
            loss = regularizer.loss()
        kept.append(total())
        found.append([loss, *gradients(loss, model)])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert kept[1] < kept[0] / 2


def test_as_many_iterations_as_layers_have_the_gradients_of_the_model() -> None:
    """Of the states that are trained, and of the program that the pass makes."""
    model, x = net(scaled=True), example()
    program = run_pass(Cleanup(), capture_module(model.eval(), {"x": x}))

    def of_states(iterations: int) -> list[Tensor]:
        calls = []
        with ExitStack() as hooks:
            for layer in model.layers:
                note = partial(lambda calls, *call: calls.append(_Call.of("", *call)), calls)
                hooks.callback(layer.register_forward_hook(note, with_kwargs=True).remove)
            model(x)
        state = _newton(calls, [layer.a for layer in model.layers], iterations, recompute=False)[-1]
        return gradients(model.head(state).square().sum(), model)

    def of_program(iterations: int) -> list[Tensor]:
        parallel = run_pass(LayerParallel((Segment(0, LAYERS, iterations),)), program)
        tensors = {name: each.detach().requires_grad_() for name, each in parallel.tensors().items()}
        (out,) = torch.func.functional_call(parallel.module, tensors, (x,))
        return list(torch.autograd.grad(out.square().sum(), [tensors[name] for name, _ in model.named_parameters()]))

    wanted = gradients(model(x).square().sum(), model)
    for of in (of_states, of_program):
        assert_equal(of(LAYERS), wanted)
        with pytest.raises(AssertionError):
            assert_equal(of(LAYERS - 1), wanted, within=1e-3)
