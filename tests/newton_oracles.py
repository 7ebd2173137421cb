"""What layers that run at the same time compute, written out over the models' own modules.

`newton` is the update rule. `by_hand` writes plain networks out with it, whose states are read in all the ways that
models do; `expected` does that to Hugging Face models, whose layers are called as the model itself calls them.

What holds of layers at the same time, and the tests that say so (`tests.test_newton_oracles` finds each of them):

1. As many iterations as layers are the model: to the bit side by side, to rounding as one, whatever the surrogate.
   test_layer_parallel::test_as_many_iterations_as_layers_are_the_model_to_the_bit
   test_fuse_parallel::test_every_state_is_that_of_the_update_rule
2. k iterations make k states exact, and the next one not.
   test_layer_parallel::test_k_iterations_make_k_states_exact_to_the_bit_and_no_more
   test_hyper_connections::test_k_iterations_make_k_states_exact_to_the_bit_and_no_more
3. One iteration adds all branches to the first state, in whatever order the layers stand.
   test_layer_parallel::test_one_iteration_adds_all_branches_to_the_first_state
   test_layer_parallel::test_one_iteration_does_not_see_the_order_of_the_layers
4. Constant branches need one iteration along the skip path, not along the identity.
   test_layer_parallel::test_constant_branches_need_one_iteration_with_the_slopes_of_the_graph
5. Errors of affine layers obey their recursion and the factorial bound.
   test_layer_parallel::test_errors_of_affine_layers_obey_their_recursion_and_the_factorial_bound
6. One stream, or matrices of one, are the plain rule; constant branches are exact along the mixing; errors fall along
   the mixing, and grow along the identity.
   test_hyper_connections::test_a_single_stream_is_a_residual_stream
   test_hyper_connections::test_matrices_of_one_make_it_the_identity
   test_hyper_connections::test_constant_branches_need_one_iteration
   test_hyper_connections::test_errors_fall_along_the_mixing_and_grow_along_the_identity
7. Side by side, grouped and wide are one function; units have the functions of their formulas; a triangular product is
   the recurrence; evaluations that are left out changed nothing.
   test_fuse_parallel::test_every_state_is_that_of_the_update_rule
   test_fuse_parallel::test_units_of_a_model_are_those_of_their_formulas
   test_layer_parallel::test_units_have_the_functions_that_their_formulas_say
   test_layer_parallel::test_states_that_nobody_reads_are_not_computed
8. Folded gains are explicit gains; unlike eps are refused, and so is one product of inputs that differ.
   test_fuse_parallel::test_gains_and_biases_are_each_layers_own
   test_fuse_parallel_refusals::test_norms_with_unlike_eps
   test_fuse_parallel_refusals::test_inputs_that_are_scaled_apart_are_neither_averaged_nor_one
9. Stepwise decoding equals reading at once with a slot for each iteration, and with one slot it does not; with as many
   iterations as layers, all of them are the model. State that is carried beside the cache is refused.
   test_layer_parallel_cache::test_token_by_token_equals_all_at_once
   test_layer_parallel_cache::test_any_segments_decode_as_they_prefill
   test_layer_parallel_slots::test_decoding_is_the_loop_over_one_slot
   test_layer_parallel_slots::test_as_many_iterations_as_layers_are_the_model
   test_layer_parallel_slots::test_what_is_read_at_once_is_the_same_and_what_is_read_in_steps_is_not
   test_layer_parallel_cache::test_state_beside_the_cache_is_refused_and_read_at_once_is_exact
10. Segments of one layer are the model's own graph; states that are read elsewhere are those of the last iteration.
   test_layer_parallel::test_layers_alone_change_nothing
   test_layer_parallel::test_every_state_is_that_of_the_update_rule
   test_layer_parallel_refusals::test_two_stages_have_no_states_inside
11. Gradients of as many iterations as layers are the model's. The regularizer is 0 without branches, more with them,
   and a loop written by hand.
   test_snlp_gradients::test_as_many_iterations_as_layers_have_the_gradients_of_the_model
   test_snlp::test_branches_that_do_not_depend_on_the_state_cost_nothing
   test_snlp::test_it_is_the_loop_written_by_hand
12. Windows that are shorter than the sequence are each layer's own.
   test_layer_parallel::test_as_many_iterations_as_layers_are_the_model_to_the_bit
   test_fuse_parallel::test_layers_that_see_as_far_share_an_attention
13. On a GPU, steps are captured without waiting; elsewhere, launches are what the cost model counts of the fused graph,
   a model keeps its state, sees its weights changed, and has them in memory once. Times are `benchmarks.gpu`'s.
   test_triton_target::test_a_decode_step_never_waits_for_the_device
   test_segments::test_costs_are_those_of_the_fused_program
   test_fuse_parallel::test_a_model_may_read_the_stacks
14. A trained model loses what a table of measured figures says.
   test_trained::test_layers_at_once_cost_what_the_golden_table_says
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from skipstone import LayerParallel, Plan, Segment
from skipstone.ir.capture.huggingface import capture_huggingface
from skipstone.ir.capture.module import capture_module
from skipstone.ir.program import Program
from skipstone.passes.base import run_pass
from skipstone.passes.cleanup import Cleanup
from skipstone.rewrite import rewrite
from skipstone.runtime.eager import EagerSession
from skipstone.runtime.executable import Executable
from tests import models

WIDTH, LAYERS = 8, 5
FLOAT64 = 1e-9
"""Largest difference of float64 results, over their range."""


def newton(functions: Sequence[Callable], start: Tensor, iterations: int, slopes: Sequence[Any]) -> list[Tensor]:
    """The states behind each function: every function in every iteration, with the bracket even where it is zero.

    Args:
        slopes: what stands for the functions' Jacobians: factors, or functions of an iterate and its change.
    """
    trace = [start] * (len(functions) + 1)
    for _ in range(iterations):
        new = [start]
        for number, (function, slope) in enumerate(zip(functions, slopes, strict=True)):
            change = new[number] - trace[number]
            change = slope(trace[number], change) if callable(slope) else slope * change
            new.append(function(trace[number]) + change)
        trace = new
    return trace[1:]


def assert_close(given: Tensor, wanted: Tensor, within: float = FLOAT64) -> None:
    assert given.shape == wanted.shape
    assert float((given - wanted).abs().max()) <= within * float(wanted.max() - wanted.min())


# Plain networks


class Layer(nn.Module):
    """One residual layer in one of several forms."""

    def __init__(self, form: str, number: int) -> None:
        super().__init__()
        self.form = form
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.a, self.b = (nn.Parameter(torch.tensor(each)) for each in (1.4 - 0.2 * number, 0.1 * (number + 1)))
        if form == "linear":
            self.down = nn.Linear(WIDTH, WIDTH)
        with torch.no_grad():
            self.down.weight *= 0 if form == "constant" else 2

    def forward(self, x: Tensor, x0: Tensor) -> Tensor:
        if self.form in ("scaled", "constant"):  # nanochat
            x = self.a * x + self.b * x0
        if self.form == "roundabout":
            x = torch.sub(x0, x.flatten(0, 1).view(x.shape) / -self.a, alpha=0.6)
            x = x + 0.7 * x
        branch = self.down(x) if self.form == "linear" else self.down(torch.tanh(self.up(self.norm(x))))
        if self.form == "flat":  # OPT
            return (x.flatten(0, 1) + branch.flatten(0, 1)).view(x.shape)
        return x + branch


class Net(nn.Module):
    """Residual layers whose states are read in all the ways that models do: returned, probed, taken back at the end."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.entry, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        self.layers = nn.ModuleList(Layer(form, number) for number in range(LAYERS))
        self.norm, self.probe = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = x0 = self.entry(x)
        outputs = {}
        for number, layer in enumerate(self.layers, 1):
            x = layer(x, x0)
            outputs |= {f"state_{number}": x, f"probe_{number}": self.probe(x)}
        return outputs | self.behind(x, outputs[f"state_{LAYERS // 2}"])

    def behind(self, x: Tensor, middle: Tensor) -> dict[str, Tensor]:
        return {"out": self.head(self.norm(x - 0.3 * middle))}


FORMS = ("plain", "scaled", "roundabout")
SURROGATES = ("auto", "identity", "zero")


@cache
def net(form: str) -> Net:
    torch.manual_seed(0)
    return Net(form).double().eval()


@cache
def example() -> Tensor:
    return torch.randn(2, 3, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@cache
def net_program(form: str) -> Program:
    return run_pass(Cleanup(), capture_module(net(form), {"x": example()}))


def slopes(form: str, surrogate: str, layers: range) -> list[Any]:
    if surrogate != "auto" or form in ("plain", "flat"):
        return [float(surrogate != "zero")] * len(layers)
    slopes = [net(form).layers[n].a for n in layers]
    return [0.6 / a * 1.7 for a in slopes] if form == "roundabout" else slopes


@torch.no_grad()
def by_hand(form: str, segments: Sequence[Segment]) -> dict[str, Tensor]:
    model = net(form)
    x = x0 = model.entry(example())
    states, number = [], 0
    while number < LAYERS:
        segment = next((each for each in segments if each.start == number), Segment(number, number + 1))
        own = range(segment.start, segment.stop)
        functions = [lambda h, layer=model.layers[n]: layer(h, x0) for n in own]
        states += newton(functions, x, segment.iterations, slopes(form, segment.surrogate, own))
        x, number = states[-1], segment.stop
    outputs = {f"state_{n}": state for n, state in enumerate(states, 1)}
    outputs |= {f"probe_{n}": model.probe(state) for n, state in enumerate(states, 1)}
    return outputs | model.behind(x, states[LAYERS // 2 - 1])


@torch.no_grad()
def in_graph(form: str, *segments: Segment) -> dict[str, Tensor]:
    return run_pass(LayerParallel(segments), net_program(form), strict=False).run(x=example())


# Hugging Face models, under hooks

SINGLE = {"gemma2": torch.float32}
"""The dtype that a model is tested in, where it does not compute in float64 throughout."""
LENGTH = 20
"""Tokens of a sequence: more than the window of gemma2 and mixtral, 8."""


@cache
def hugging_face(name: str) -> Any:
    model = copy.deepcopy(models.model(name)).to(SINGLE.get(name, torch.float64))
    model.set_experts_implementation("eager")  # transformers' faster form has no float64
    return model


@cache
def captured(name: str) -> Program:
    return capture_huggingface(hugging_face(name))


@cache
def parallel(name: str, *segments: Segment) -> Program:
    return run_pass(LayerParallel(segments), captured(name), strict=False)


def stack(model: Any) -> nn.ModuleList:
    return model.base_model.h if hasattr(model.base_model, "h") else model.base_model.layers


def attention(layer: Any, x: Tensor, options: dict[str, Any]) -> Tensor:
    """What the attention of a Llama or Gemma 2 layer adds to the stream."""
    result = layer.self_attn(hidden_states=layer.input_layernorm(x), **options)[0]
    return layer.post_attention_layernorm(result) if hasattr(layer, "pre_feedforward_layernorm") else result


def ffn(layer: Any, x: Tensor) -> Tensor:
    """What the FFN of such a layer adds."""
    if hasattr(layer, "pre_feedforward_layernorm"):
        return layer.post_feedforward_layernorm(layer.mlp(layer.pre_feedforward_layernorm(x)))
    return layer.mlp(layer.post_attention_layernorm(x))


def solved(layers: Sequence[Any], calls: Sequence[Any], segment: Segment) -> Tensor:
    """The state behind a segment, by the formulas of its unit."""
    start = calls[0][0][0]
    pairs = [(layer, args, options) for layer, (args, options) in zip(layers, calls, strict=True)]
    if segment.unit == "two_stage":
        middle = start + sum(attention(layer, start, options) for layer, _, options in pairs)
        return middle + sum(ffn(layer, middle) for layer, *_ in pairs)
    if segment.unit == "sublayer" and segment.iterations == 1:
        return start + sum(attention(layer, start, options) + ffn(layer, start) for layer, _, options in pairs)
    functions: list[Callable] = []
    for layer, args, options in pairs:
        if segment.unit == "sublayer":
            functions.append(lambda h, layer=layer, options=options: h + attention(layer, h, options))
            functions.append(lambda h, layer=layer: h + ffn(layer, h))
        else:
            functions.append(
                lambda h, layer=layer, args=args, options=options: first(layer.forward(h, *args[1:], **options))
            )
    slope = [float(segment.surrogate != "zero")] * len(functions)
    return newton(functions, start, segment.iterations, slope)[-1]


def first(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


@contextmanager
def at_once(model: Any, segments: Sequence[Segment]) -> Iterator[None]:
    """The model with the states behind its segments replaced. Each layer is called as the model itself calls it."""
    calls: dict[int, Any] = {}
    handles = []
    for number, layer in enumerate(stack(model)):

        def note(_: nn.Module, args: Any, options: Any, number: int = number) -> None:
            calls[number] = (args, options)

        handles.append(layer.register_forward_pre_hook(note, with_kwargs=True))
    for segment in segments:

        def replace(_module: nn.Module, _args: Any, out: Any, segment: Segment = segment) -> Any:
            start = calls[segment.start]
            own = [(start[0] if n == segment.start else args, options) for n, (args, options) in sorted(calls.items())]
            state = solved(
                stack(model)[segment.start : segment.stop], own[segment.start : segment.stop], segment
            )  # only the first layer's input is the stream's: the others are asked for how they are called
            return (state, *out[1:]) if isinstance(out, tuple) else state

        handles.append(stack(model)[segment.stop - 1].register_forward_hook(replace))
    yield
    for handle in handles:
        handle.remove()


@torch.no_grad()
def expected(name: str, ids: Tensor, *segments: Segment) -> Tensor:
    """Logits [B, S, V], each row on its own."""
    model = hugging_face(name)
    with at_once(model, segments):
        return torch.cat([model(input_ids=row[None], use_cache=False).logits for row in ids])


@torch.no_grad()
def whole(program: Program, ids: Tensor) -> Tensor:
    """Logits of a program without a cache."""
    positions = torch.arange(ids.shape[1]).expand(ids.shape)
    return program.run(input_ids=ids, position_ids=positions)["logits"]


def within(name: str) -> float:
    return 1e-5 if name in SINGLE else FLOAT64


@cache
def executable(name: str, *segments: Segment) -> Executable:
    program, refusal = rewrite(captured(name), Plan([LayerParallel(segments)]), target="eager", strict=False)
    assert refusal is None
    return Executable(EagerSession(program))
