"""The regularizer for layers at the same time: its value, its gradients, what it keeps of a model, what it refuses."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    NanoChatConfig,
    NanoChatForCausalLM,
    PreTrainedModel,
)

from skipstone import LayerParallel, Segment
from skipstone.errors import InvalidInput, InvalidPlan, SkipstoneError, Unsupported
from skipstone.ir.capture.huggingface import capture_huggingface
from skipstone.ir.capture.module import capture_module
from skipstone.passes.base import run_pass
from skipstone.passes.cleanup import Cleanup
from skipstone.training import LayerParallelLoss, ramp
from skipstone.training.snlp import _Call, _newton

pytestmark = pytest.mark.usefixtures("one_thread")

WIDTH, LAYERS = 8, 5


# ------------------------------------------------------------------------------------------------------ plain networks


class Layer(nn.Module):
    """``a h + b h0 + branch(norm(h))``, as nanochat has it; tokens are mixed over a window."""

    def __init__(self, number: int, scaled: bool) -> None:
        super().__init__()
        self.scaled, self.norm = scaled, nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.a, self.b = (nn.Parameter(torch.tensor(each)) for each in (1.4 - 0.2 * number, 0.1 * (number + 1)))
        with torch.no_grad():
            self.down.weight *= 2

    def forward(self, state: Tensor, first: Tensor, *, window: int) -> Tensor:
        if self.scaled:
            state = self.a * state + self.b * first
        read = self.norm(state)
        mixed = sum(torch.roll(read, shift, dims=-2) for shift in range(window))
        return state + self.down(torch.tanh(self.up(mixed)))


class Net(nn.Module):
    """Layers that are told of the first state and of a window of their own."""

    def __init__(self, scaled: bool = False) -> None:
        super().__init__()
        self.entry, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        self.layers = nn.ModuleList(Layer(number, scaled) for number in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.states(x)[-1])

    def states(self, x: Tensor) -> list[Tensor]:
        """The states before and behind all layers."""
        states = [self.entry(x)]
        for number, layer in enumerate(self.layers):
            states.append(layer(states[-1], states[0], window=number % 3 + 1))
        return states


def net(scaled: bool = False) -> Net:
    torch.manual_seed(0)
    return Net(scaled).double()


def example(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def scales(model: Net) -> list[Tensor] | None:
    return [layer.a for layer in model.layers] if model.layers[0].scaled else None


def by_hand(model: Net, x: Tensor, segment: Segment, numbers: Sequence[int], detach: bool = False) -> Tensor:
    """The loss of one segment, with every layer in every iteration, and the bracket even where it is zero."""
    states = model.states(x)
    trace = [states[segment.start]] * (segment.stop - segment.start + 1)
    for _ in range(segment.iterations):
        new = [trace[0]]
        for number, index in enumerate(range(segment.start, segment.stop)):
            layer = model.layers[index]
            slope = {"auto": layer.a if layer.scaled else 1.0, "identity": 1.0, "zero": 0.0}[segment.surrogate]
            result = layer(trace[number], states[0], window=index % 3 + 1)
            new.append(result + slope * (new[number] - trace[number]))
        trace = new
    total = torch.zeros((), dtype=x.dtype)
    for number in numbers:
        exact = states[segment.start + number].detach() if detach else states[segment.start + number]
        for b in range(x.shape[0]):
            for t in range(x.shape[1]):
                distance = (trace[number][b, t] - exact[b, t]).square().sum().sqrt()
                total = total + distance / exact[b, t].square().sum().sqrt() / (x.shape[0] * x.shape[1])
    return total


def loss_of(model: Net, x: Tensor, *segments: Segment, **options: Any) -> Tensor:
    regularizer = LayerParallelLoss(model.layers, segments, scales=scales(model), **options)
    with regularizer.record():
        model(x)
    return regularizer.loss()


def gradients(loss: Tensor, model: nn.Module) -> list[Tensor]:
    """Of all parameters; zeros where there are none."""
    parameters = list(model.parameters())
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def assert_equal(given: Sequence[Tensor], wanted: Sequence[Tensor], within: float = 1e-12) -> None:
    for one, other in zip(given, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=within, atol=within)


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


# -------------------------------------------------------------------------------------------------------------- models

SIZES: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "max_position_embeddings": 64, "initializer_range": 0.2,
}  # fmt: skip

BUILDERS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=4)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, num_hidden_layers=4, sliding_window=4)),
    "nanochat": lambda: NanoChatForCausalLM(NanoChatConfig(**SIZES, num_hidden_layers=4)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=61, n_embd=32, n_layer=4, n_head=4, n_positions=64, initializer_range=0.2,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )
    ),
}  # fmt: skip


def hugging_face(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return BUILDERS[name]().double().train()


def layers_of(model: Any) -> nn.ModuleList:
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


def tokens(batch: int, length: int) -> Tensor:
    return torch.randint(3, 61, (batch, length), generator=torch.Generator().manual_seed(2))


def regularized(model: PreTrainedModel, ids: Tensor, *segments: Segment, **options: Any) -> Tensor:
    regularizer = LayerParallelLoss(layers_of(model), segments, **options)
    with regularizer.record():
        model(input_ids=ids, use_cache=False)
    return regularizer.loss()


def headless(name: str) -> PreTrainedModel:
    """A model whose logits are the state behind its last layer."""
    model: Any = hugging_face(name)
    model.lm_head = nn.Identity()
    if name == "gpt2":
        model.transformer.ln_f = nn.Identity()
    else:
        model.model.norm = nn.Identity()
    return model.eval()


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_it_trains_for_what_the_pass_does(name: str) -> None:
    """The error of the last state, by the rewritten program; sequences are longer than Mistral's window."""
    model, ids = headless(name), tokens(2, 11)
    inputs = {"input_ids": ids, "position_ids": torch.arange(11).expand(2, 11)}
    program = capture_huggingface(model)
    exact = program.run(**inputs)["logits"]
    for segment in (Segment(1, 4), Segment(0, 4, 2), Segment(2, 4, surrogate="zero")):
        state = run_pass(LayerParallel((segment,)), program).run(**inputs)["logits"]
        wanted = ((state - exact).norm(dim=-1) / exact.norm(dim=-1)).mean()
        assert wanted > 0.05
        assert_equal([regularized(model, ids, segment)], [wanted], within=1e-9)


@cache
def example_ids() -> Tensor:
    return tokens(2, 11)


def hand_written(model: Any, ids: Tensor, segment: Segment, mask: Tensor | None = None) -> Tensor:
    """The error of the last state of a segment in one iteration, with the layers called as the model calls them."""
    calls: list[tuple[Any, Any]] = []
    states: list[Tensor] = []

    def note(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        calls.append((args, kwargs))
        states.append(output[0] if isinstance(output, tuple) else output)

    hooks = [layer.register_forward_hook(note, with_kwargs=True) for layer in layers_of(model)]
    model(input_ids=ids, attention_mask=mask, use_cache=False)
    for hook in hooks:
        hook.remove()
    start = states[segment.start - 1]
    guess = start
    for layer, (args, kwargs) in list(zip(layers_of(model), calls, strict=True))[segment.start : segment.stop]:
        result = layer.forward(start, *args[1:], **kwargs)
        guess = guess + (result[0] if isinstance(result, tuple) else result) - start
    error = (guess - states[segment.stop - 1]).norm(dim=-1) / states[segment.stop - 1].norm(dim=-1)
    return error.mean() if mask is None else error[mask.bool()].mean()


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("name", BUILDERS)
def test_models_are_trained_as_they_are(name: str, checkpointed: bool) -> None:
    """Also with their own gradient checkpointing. A second pass gives the same again."""
    model, ids, segment = hugging_face(name), example_ids(), Segment(1, 4)
    wanted = hand_written(model, ids, segment)
    expected = gradients(wanted, model)
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    regularizer = LayerParallelLoss(layers_of(model), [segment], checkpoint=checkpointed)
    for _ in range(2):
        with regularizer.record():
            model(input_ids=ids, use_cache=False)
        loss = regularizer.loss()
        assert_equal([loss], [wanted])
        assert_equal(gradients(loss, model), expected, within=1e-5)  # norms compute in float32
    assert not any(layer._forward_hooks for layer in layers_of(model))


def test_padding_is_masked_as_in_the_model() -> None:
    model, ids = hugging_face("llama"), example_ids()
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    regularizer = LayerParallelLoss(layers_of(model), [Segment(1, 4)])
    with regularizer.record():
        model(input_ids=ids, attention_mask=mask, use_cache=False)
    assert_equal([regularizer.loss(mask.bool())], [hand_written(model, ids, Segment(1, 4), mask)])


@pytest.mark.parametrize("place", ["inside", "outside", "in another"])
def test_autocast_of_the_pass_is_that_of_the_loss(place: str) -> None:
    """The first pass, in which layers are proven without gradients, has the gradients of the second."""
    model, ids = hugging_face("llama").float(), example_ids()
    regularizer = LayerParallelLoss(layers_of(model), [Segment(1, 4)])
    found = []
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            with regularizer.record():
                model(input_ids=ids, use_cache=False)
            if place == "inside":
                loss = regularizer.loss()
        if place != "inside":
            with torch.autocast("cpu", torch.bfloat16, enabled=place == "in another"):
                loss = regularizer.loss()
        found.append([loss, *gradients(loss, model)])
    assert all(torch.equal(*each) for each in zip(*found, strict=True))
    assert sum(bool(each.any()) for each in found[0]) > 20
    assert found[0][0].dtype == torch.float32
    assert not torch.equal(found[0][0], regularized(model, ids, Segment(1, 4)))


def trained(weight: float) -> tuple[float, float]:
    """The loss of a small model on steps of 7, and its error in parallel, after some training."""
    torch.manual_seed(0)
    model = NanoChatForCausalLM(NanoChatConfig(**SIZES, num_hidden_layers=6)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    regularizer = LayerParallelLoss(model.model.layers, [Segment(1, 5)], stride=2)
    generator = torch.Generator().manual_seed(0)
    for step in range(80):
        ids = (torch.randint(61, (8, 1), generator=generator) + 7 * torch.arange(12)) % 61
        with regularizer.record():
            ordinary = model(input_ids=ids, labels=ids, use_cache=False).loss
        apart = regularizer.loss()
        optimizer.zero_grad()
        (ordinary + weight * ramp(step / 80) * apart).backward()
        optimizer.step()
    return ordinary.item(), apart.item()


def test_training_with_it_makes_layers_fit_for_running_at_the_same_time() -> None:
    plain, regular = trained(0.0), trained(0.5)
    assert regular[1] < 0.2 * plain[1]
    assert max(regular[0], plain[0]) < 0.5, "one has not learned: a uniform guess costs 4.1 nats"


def test_the_ramp_is_linear_to_one() -> None:
    assert [ramp(share) for share in (0.0, 0.05, 0.2, 0.7)] == [0.0, 0.25, 1.0, 1.0]
    assert ramp(0.1, warmup=0.4) == 0.25


# ----------------------------------------------------------------------------------------------------- what is refused


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
