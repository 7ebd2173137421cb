"""The regularizer for layers at the same time: what it refuses, and that it leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from skipstone import Segment
from skipstone.errors import InvalidInput, InvalidPlan, SkipstoneError, Unsupported
from skipstone.training import LayerParallelLoss
from tests.snlp_oracles import (
    WIDTH,
    Layer,
    Net,
    assert_equal,
    by_hand,
    example,
    example_ids,
    hugging_face,
    layers_of,
    loss_of,
    net,
    regularized,
)

pytestmark = pytest.mark.usefixtures("one_thread")


class Odd(Layer):
    """A layer that does what no layer may do that is evaluated twice."""

    def __init__(self, number: int, kind: str) -> None:
        super().__init__(number, scaled=kind == "scaled")
        self.kind, self.calls = kind, 0

    def forward(self, state: Tensor, first: Tensor, *, window: int) -> Any:
        if self.kind == "in place":
            return state.mul_(1.0)
        result = super().forward(state, first, window=window)
        if self.kind == "dropout":
            return nn.functional.dropout(result, 1e-9, self.training)
        if self.kind == "memory":
            self.calls += 1
            return result + self.calls
        if self.kind == "gate":
            return result + torch.sigmoid(self.norm(state).sum(-1, keepdim=True)) * state
        if self.kind == "post-norm":
            return self.norm(result)
        if self.kind == "no norm":
            return state + torch.relu(self.up(state)) @ self.up.weight
        if self.kind == "shape":
            return result[..., :1]
        return result


def odd(kind: str) -> Net:
    model = net()
    torch.manual_seed(0)
    model.layers[2] = Odd(3, kind).double()
    return model.train()


REFUSED = {
    "dropout": "a layer that draws random numbers (dropout) at layer 2",
    "memory": "a layer that gives another result the second time",
    "scaled": "a layer with another linear skip path (2.0e-01 off) at layer 2. Give 'scales'",
    "gate": "a layer with another linear skip path",
    "post-norm": "a layer with another linear skip path (1.0e+00 off)",
    "no norm": "Where branches read no norm of it, no path can be told",
    "shape": "a layer that is no function of one state at layer 2",
    "in place": "a layer that changes its state in place at layer 2",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_layers_that_are_no_residual_functions_are_refused(kind: str) -> None:
    with pytest.raises(Unsupported) as refused:
        loss_of(odd(kind), example(), Segment(0, 4))
    assert REFUSED[kind] in str(refused.value)


def test_what_is_proven_is_proven_in_the_mode_that_the_layer_is_in() -> None:
    model = odd("dropout").eval()
    regularizer = LayerParallelLoss(model.layers, [Segment(0, 4)])
    for mode in (False, True):
        model.train(mode)
        with regularizer.record():
            model(example())
        if not mode:
            assert regularizer.loss() > 0
    with pytest.raises(Unsupported, match="random numbers"):
        regularizer.loss()


def test_proofs_leave_the_random_numbers_alone() -> None:
    model = odd("dropout")
    with pytest.raises(Unsupported, match="random numbers"):
        loss_of(model, example(), Segment(0, 4))
    torch.manual_seed(0)
    model(example())
    wanted = torch.rand(1)
    torch.manual_seed(0)
    with pytest.raises(Unsupported, match="random numbers"):
        loss_of(model, example(), Segment(0, 4))
    assert torch.equal(torch.rand(1), wanted)


@pytest.mark.parametrize("wrong", [1.1, None])
def test_scales_are_proven(wrong: float | None) -> None:
    model, x = net(True), example()
    named: Any = [layer.a.item() if wrong is None else wrong for layer in model.layers]
    regularizer = LayerParallelLoss(model.layers, [Segment(0, 5)], scales=named)
    with regularizer.record():
        model(x)
    if wrong is None:
        assert_equal([regularizer.loss()], [loss_of(model, x, Segment(0, 5))])
        return
    with pytest.raises(Unsupported, match="another linear skip path"):
        regularizer.loss()


def test_a_surrogate_that_is_named_is_taken_at_its_word() -> None:
    assert loss_of(odd("no norm"), example(), Segment(0, 4, surrogate="identity")) > 0


def test_a_state_that_is_changed_between_layers_is_refused() -> None:
    class Between(Net):
        def forward(self, x: Tensor, how: Callable[[Tensor], Tensor]) -> Tensor:
            states = [self.entry(x)]
            for layer in self.layers:
                states.append(layer(how(states[-1]), states[0], window=1))
            return states[-1]

    torch.manual_seed(0)
    model = Between().double()
    regularizer = LayerParallelLoss(model.layers, [Segment(1, 4)])
    for how, message in (
        (lambda h: 1.1 * h, "a state that is changed between layer 1 and layer 2"),
        (lambda h: h.mul_(1.1), "another result the second time"),
    ):
        with regularizer.record(), torch.no_grad(), pytest.raises(Unsupported, match="without gradients"):
            model(example(), how)
        with torch.no_grad(), regularizer.record():
            model(example(), how)
        with pytest.raises(Unsupported, match=message):
            regularizer.loss()
    with regularizer.record():
        model(example(), lambda h: h.view_as(h))
    assert regularizer.loss() > 0


def test_one_pass_gives_one_loss() -> None:
    model, x = net(), example()
    regularizer = LayerParallelLoss(model.layers, [Segment(1, 4)])
    with pytest.raises(InvalidInput, match="no forward pass is recorded"):
        regularizer.loss()
    with regularizer.record():
        model.layers[1](x, x, window=1)
    with pytest.raises(InvalidInput, match="layer 2 did not run"):
        regularizer.loss()
    with regularizer.record():
        model(x)
        with pytest.raises(InvalidInput, match="layer 1 ran twice"):
            model(x)
    with regularizer.record():
        model(x)
        loss = regularizer.loss()  # inside, too
        model(x)
    assert_equal([loss], [by_hand(model, x, Segment(1, 4), [3])])
    with pytest.raises(InvalidInput, match="no forward pass is recorded"):
        regularizer.loss()


def test_hooks_are_gone_after_an_error() -> None:
    model = net()
    regularizer = LayerParallelLoss(model.layers, [Segment(1, 4)])
    with pytest.raises(RuntimeError), regularizer.record():
        model(torch.zeros(2, 3, WIDTH + 1, dtype=torch.float64))
    assert not any(layer._forward_hooks for layer in model.layers)


def test_a_cache_is_refused() -> None:
    model = hugging_face("llama")
    regularizer = LayerParallelLoss(layers_of(model), [Segment(1, 4)])
    with (
        pytest.raises(Unsupported, match=r"a KV cache at layer 1\. Call the model with use_cache=False"),
        regularizer.record(),
    ):
        model(input_ids=example_ids())


def test_dropout_of_models_is_refused() -> None:
    model = hugging_face("gpt2")
    for layer in layers_of(model):
        layer.mlp.dropout.p = 0.1
    with pytest.raises(Unsupported, match="random numbers"):
        regularized(model, example_ids(), Segment(1, 4))
    model = hugging_face("llama")
    for layer in layers_of(model):
        layer.self_attn.attention_dropout = 0.1
    with pytest.raises(Unsupported, match="random numbers"):
        regularized(model, example_ids(), Segment(1, 4))


@pytest.mark.parametrize(
    ("segments", "options", "error", "message"),
    [
        ([], {}, InvalidPlan, "no segment"),
        ([Segment(1, 6)], {}, InvalidPlan, "layers 1 to 5, but there are layers 0 to 4. The nearest 'stop' is 5"),
        ([Segment(1, 4, 4)], {}, InvalidPlan, "with 4 iterations, for 3 layers"),
        ([Segment(1, 4, unit="sublayer")], {}, Unsupported, "training for the unit 'sublayer'"),
        ([Segment(1, 4, surrogate="at_iterate")], {}, Unsupported, "surrogate 'at_iterate'. Take 'auto' with 'scales'"),
        ([Segment(1, 5, 3, tolerance=0.1)], {}, Unsupported, "iterations that end early. Leave out 'tolerance'"),
        ([Segment(1, 4)], {"stride": -1}, InvalidInput, "stride is -1"),
        ([Segment(1, 4)], {"scales": [1.0] * 4}, InvalidInput, "4 scales for 5 layers"),
    ],
)
def test_wrong_arguments_are_refused(
    segments: list[Segment], options: dict[str, Any], error: type[SkipstoneError], message: str
) -> None:
    with pytest.raises(error, match=message):
        LayerParallelLoss(net().layers, segments, **options)


def test_one_module_for_several_layers_is_refused() -> None:
    layer = Layer(0, False)
    with pytest.raises(Unsupported, match="one module in the place of several layers"):
        LayerParallelLoss([layer, layer], [Segment(0, 2)])
