"""The regularizer for layers at the same time: its value is that of a loop written by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from skipstone import Segment
from skipstone.errors import InvalidInput
from skipstone.training import LayerParallelLoss, ramp
from tests.snlp_oracles import LAYERS, assert_equal, by_hand, example, gradients, loss_of, net

pytestmark = pytest.mark.usefixtures("one_thread")


CASES = [
    (Segment(0, 5), 0, [5]),
    (Segment(1, 5), 2, [2, 4]),
    (Segment(0, 5), 2, [2, 4, 5]),
    (Segment(1, 4, surrogate="identity"), 1, [2, 3]),
    (Segment(0, 4, surrogate="zero"), 3, [3, 4]),
    (Segment(0, 5, 2), 3, [3, 5]),
    (Segment(1, 5, 3, surrogate="zero"), 1, [4]),
]


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(("segment", "stride", "numbers"), CASES)
def test_it_is_the_loop_written_by_hand(segment: Segment, stride: int, numbers: list[int], scaled: bool) -> None:
    model, x = net(scaled), example()
    found, wanted = loss_of(model, x, segment, stride=stride), by_hand(model, x, segment, numbers)
    assert wanted > 0.05
    assert_equal([found], [wanted])
    assert_equal(gradients(found, model), gradients(wanted, model))


def test_segments_add_up_and_may_overlap() -> None:
    model, x = net(True), example()
    found = loss_of(model, x, Segment(0, 4), Segment(1, 5), Segment(2, 3), stride=2)
    parts = [by_hand(model, x, Segment(0, 4), [2, 4]), by_hand(model, x, Segment(1, 5), [2, 4])]
    assert_equal([found], [sum(parts)])


@pytest.mark.parametrize("scaled", [False, True])
def test_branches_that_do_not_depend_on_the_state_cost_nothing(scaled: bool) -> None:
    model = net(scaled)
    for layer in model.layers:
        nn.init.zeros_(layer.down.weight)
    loss = loss_of(model, example(), Segment(0, 5), Segment(1, 4), stride=1)
    assert loss.item() < 1e-14
    assert all(bool(each.isfinite().all()) for each in gradients(loss, model))
    nn.init.zeros_(model.entry.weight)
    nn.init.zeros_(model.entry.bias)
    for layer in model.layers:
        nn.init.zeros_(layer.down.bias)
    loss = loss_of(model, example(), Segment(0, 5, surrogate="identity"))
    assert loss == 0
    assert all(bool(each.isfinite().all()) for each in gradients(loss, model)), "states of size zero"


def test_a_wrong_surrogate_costs_even_without_branches() -> None:
    model = net(scaled=True)
    for layer in model.layers:
        nn.init.zeros_(layer.down.weight)
    assert loss_of(model, example(), Segment(0, 5, surrogate="identity")) > 0.1


def test_as_many_iterations_as_layers_cost_nothing() -> None:
    assert loss_of(net(), example(), Segment(0, 5, 5), Segment(1, 2), stride=1) == 0


def test_only_valid_tokens_count() -> None:
    model, x = net(), example()
    model.layers[2].up.weight.data *= 3
    valid = torch.tensor([[True, True, False], [False, True, False]])
    regularizer = LayerParallelLoss(model.layers, [Segment(0, 5)])
    with regularizer.record():
        model(x)
    found = regularizer.loss(valid)
    parts = []
    for b, t in valid.nonzero().tolist():
        states = [each[b, t] for each in model.states(x)]
        tokens = model.states(x)
        start = tokens[0]
        guess = start + sum(
            layer(start, start, window=number % 3 + 1) - start for number, layer in enumerate(model.layers)
        )
        parts.append((guess[b, t] - states[-1]).norm() / states[-1].norm())
    assert_equal([found], [sum(parts) / 3])
    with regularizer.record():
        model(x)
    with pytest.raises(InvalidInput, match=r"valid is torch.int64 \[2, 3\], expected bool \[2, 3\]"):
        regularizer.loss(valid.long())


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_any_segment_is_the_loop_written_by_hand(data: st.DataObject) -> None:
    start = data.draw(st.integers(0, LAYERS - 2))
    stop = data.draw(st.integers(start + 2, LAYERS))
    iterations, stride = data.draw(st.integers(1, stop - start - 1)), data.draw(st.integers(0, 6))
    surrogate = data.draw(st.sampled_from(("auto", "identity", "zero")))
    segment = Segment(start, stop, iterations, surrogate=surrogate)  # type: ignore[arg-type]
    numbers = sorted({number for number in range(1, stop - start) if stride and number % stride == 0} | {stop - start})
    model, x = net(data.draw(st.booleans())), example()
    assert_equal([loss_of(model, x, segment, stride=stride)], [by_hand(model, x, segment, numbers)])


def test_the_ramp_is_linear_to_one() -> None:
    assert [ramp(share) for share in (0.0, 0.05, 0.2, 0.7)] == [0.0, 0.25, 1.0, 1.0]
    assert ramp(0.1, warmup=0.4) == 0.25
