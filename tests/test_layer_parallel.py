"""Layers at the same time: the iterations are those of the update rule, written out over the model's own modules."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from importlib import import_module
from itertools import combinations
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from skipstone import LayerParallel, Plan, QuantizeKV, Segment, SkipByPrompt, SkipFFNAdaptive, SkipSublayers, optimize
from skipstone.calibrate import token_batches
from skipstone.errors import InvalidPlan, SkipstoneError, Unsupported
from skipstone.ir.capture.huggingface import capture_huggingface
from skipstone.ir.capture.module import capture_module
from skipstone.ir.dialect import CACHED_OPS, GATE
from skipstone.ir.printer import readable
from skipstone.ir.program import Port, Program, Role, module_path
from skipstone.ir.statistics import sites
from skipstone.ir.stream import find_stream
from skipstone.optimize import footprint, rewrite
from skipstone.passes.base import run_pass
from skipstone.passes.cleanup import Cleanup
from skipstone.runtime.eager import EagerSession
from skipstone.runtime.executable import Executable
from tests import models

aten = torch.ops.aten

WIDTH, LAYERS = 8, 5
FLOAT64 = 1e-9
"""Largest difference of float64 results, over their range."""


pytestmark = pytest.mark.usefixtures("one_thread")


def newton(functions: Sequence[Callable], start: Tensor, iterations: int, slopes: Sequence[Any]) -> list[Tensor]:
    """The states behind each function: every function in every iteration, with the bracket even where it is zero."""
    trace = [start] * (len(functions) + 1)
    for _ in range(iterations):
        new = [start]
        for number, (function, slope) in enumerate(zip(functions, slopes, strict=True)):
            new.append(function(trace[number]) + slope * (new[number] - trace[number]))
        trace = new
    return trace[1:]


def assert_close(given: Tensor, wanted: Tensor, within: float = FLOAT64) -> None:
    assert given.shape == wanted.shape
    assert float((given - wanted).abs().max()) <= within * float(wanted.max() - wanted.min())


# ------------------------------------------------------------------------------------------------------ plain networks


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
        return x + (self.down(x) if self.form == "linear" else self.down(torch.tanh(self.up(self.norm(x)))))


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
    if surrogate != "auto" or form == "plain":
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


@pytest.mark.parametrize("iterations", range(1, LAYERS + 1))
@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("form", FORMS)
def test_every_state_is_that_of_the_update_rule(form: str, surrogate: Any, iterations: int) -> None:
    segment = Segment(0, LAYERS, iterations, surrogate=surrogate)
    found, wanted = in_graph(form, segment), by_hand(form, [segment])
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        assert_close(found[name], value)


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("form", FORMS)
def test_k_iterations_make_k_states_exact_to_the_bit_and_no_more(form: str, surrogate: Any) -> None:
    with torch.no_grad():
        exact = net_program(form).run(x=example())
    for k in range(1, LAYERS + 1):
        found = in_graph(form, Segment(0, LAYERS, k, surrogate=surrogate))
        same = [torch.equal(found[f"state_{n}"], exact[f"state_{n}"]) for n in range(1, LAYERS + 1)]
        assert same == [n <= k for n in range(1, LAYERS + 1)]
        if k < LAYERS:
            assert float((found[f"state_{k + 1}"] - exact[f"state_{k + 1}"]).abs().max()) > 1e-4
    assert all(torch.equal(found[name], exact[name]) for name in exact)


def test_one_iteration_adds_all_branches_to_the_first_state() -> None:
    model, segment = net("plain"), Segment(1, LAYERS)
    found = in_graph("plain", segment)
    with torch.no_grad():
        start = model.layers[0](model.entry(example()), None)
        total = start + sum(layer(start, None) - start for layer in model.layers[1:])
    assert_close(found[f"state_{LAYERS}"], total)


def test_one_iteration_does_not_see_the_order_of_the_layers() -> None:
    other = copy.deepcopy(net("plain"))
    other.layers = nn.ModuleList([other.layers[n] for n in (3, 0, 4, 2, 1)]).eval()
    with torch.no_grad():
        sequential = [model(example())[f"state_{LAYERS}"] for model in (net("plain"), other)]
        program = run_pass(LayerParallel((Segment(0, LAYERS),)), capture_module(other, {"x": example()}))
        found = program.run(x=example())[f"state_{LAYERS}"]
    assert_close(found, in_graph("plain", Segment(0, LAYERS))[f"state_{LAYERS}"])
    assert float((sequential[0] - sequential[1]).abs().max()) > 1e-3


def test_constant_branches_need_one_iteration_with_the_slopes_of_the_graph() -> None:
    """As in nanochat before training, with a constant on top."""
    with torch.no_grad():
        exact = net("constant")(example())["out"]
    assert_close(in_graph("constant", Segment(0, LAYERS))["out"], exact)
    wrong = in_graph("constant", Segment(0, LAYERS, surrogate="identity"))["out"]
    assert float((wrong - exact).abs().max()) > 1e-2


def test_errors_of_affine_layers_obey_their_recursion_and_the_factorial_bound() -> None:
    model = net("linear")
    branches = [layer.down.weight.detach() for layer in model.layers]
    with torch.no_grad():
        start = model.entry(example())
        exact = [start, *(model(example())[f"state_{n}"] for n in range(1, LAYERS + 1))]
    errors = [start - state for state in exact]  # the guess is h_0 everywhere
    largest = max(float(each.norm()) for each in errors)
    gamma = sum(float(torch.linalg.matrix_norm(weight, 2)) for weight in branches)
    for k in range(1, LAYERS + 1):
        found = in_graph("linear", Segment(0, LAYERS, k))
        new = [torch.zeros_like(start)]
        for n, weight in enumerate(branches):
            new.append(new[n] + errors[n] @ weight.T)
        errors = new
        for n in range(1, LAYERS + 1):
            assert_close(found[f"state_{n}"] - exact[n] + exact[n], errors[n] + exact[n])
        assert max(float(each.norm()) for each in errors) <= gamma**k / math.factorial(k) * largest


@pytest.mark.parametrize("form", FORMS)
def test_layers_alone_change_nothing(form: str) -> None:
    alone = tuple(Segment(n, n + 1) for n in range(LAYERS))
    with torch.no_grad():
        exact = net_program(form).run(x=example())
    found = in_graph(form, *alone)
    assert all(torch.equal(found[name], exact[name]) for name in exact)
    program = run_pass(LayerParallel(alone), net_program(form))
    assert [node.target for node in program.nodes()].count(aten.linear.default) == [
        node.target for node in net_program(form).nodes()
    ].count(aten.linear.default)
    assert len(list(program.nodes())) == len(list(net_program(form).nodes()))


def test_segments_hand_on_their_last_states() -> None:
    segments = (Segment(0, 2), Segment(2, 3), Segment(3, 5, 2, surrogate="zero"))
    found, wanted = in_graph("scaled", *segments), by_hand("scaled", segments)
    for name, value in wanted.items():
        assert_close(found[name], value)


def test_states_that_nobody_reads_are_not_computed() -> None:
    """K (N - K + 1) evaluations, whoever reads the states; Jacobi's last state needs the last K layers alone."""
    program = net_program("plain").copy()
    program.remove_outputs(program.output_node().all_input_nodes[:-1])
    program.recompile()
    for k in range(1, 4):
        segment = Segment(2, LAYERS, k)
        all_states, last = (run_pass(LayerParallel((segment,)), each) for each in (net_program("plain"), program))
        for each in (all_states, last):
            assert each.history[-1].remarks[0].numbers["evaluations"] == k * (3 - k + 1)
            assert len(list(each.nodes(aten.tanh.default))) == 2 + k * (3 - k + 1)
        with torch.no_grad():
            assert torch.equal(last.run(x=example())["out"], all_states.run(x=example())["out"])
        jacobi = run_pass(LayerParallel((replace(segment, surrogate="zero"),)), program)
        assert jacobi.history[-1].remarks[0].numbers["evaluations"] == k


def test_sizes_are_those_of_the_copies() -> None:
    """Nothing of the layers as they were is kept for the size of a state."""
    program, wanted = net_program("roundabout").copy(), in_graph("roundabout", Segment(0, LAYERS))
    for view in list(program.nodes(aten.view.default)):
        state, sizes = view.args[0].args[0], view.args[1]  # type: ignore[union-attr]
        with program.graph.inserting_before(view):
            view.args = (view.args[0], [program.call(aten.sym_size.int, state, 0), *sizes[1:]])  # type: ignore[index, misc]
    parallel = run_pass(LayerParallel((Segment(0, LAYERS),)), program, strict=False)
    assert len(list(parallel.nodes(aten.tanh.default))) == LAYERS
    with torch.no_grad():
        assert torch.equal(parallel.run(x=example())["out"], wanted["out"])


# ------------------------------------------------------------------------------------- Hugging Face models, under hooks

SINGLE = {"gemma2": torch.float32}
"""The dtype that a model is tested in, where it does not compute in float64 throughout."""
NAMES = ("llama", "gemma2", "gpt_neox", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gpt2", "mixtral")))
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


@pytest.mark.parametrize("name", NAMES)
def test_models_follow_the_update_rule(name: str) -> None:
    ids = models.tokens(2, LENGTH)
    for segment in (Segment(0, 3), Segment(0, 3, 2), Segment(1, 3, surrogate="zero")):
        assert_close(whole(parallel(name, segment), ids), expected(name, ids, segment), within(name))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_as_many_iterations_as_layers_are_the_model_to_the_bit(name: str, surrogate: Any) -> None:
    """Also where the sequence is longer than the window of some layers."""
    ids = models.tokens(2, LENGTH)
    exact = whole(captured(name), ids)
    assert torch.equal(whole(parallel(name, Segment(0, 3, 3, surrogate=surrogate)), ids), exact)
    assert float((whole(parallel(name, Segment(0, 3, 2, surrogate=surrogate)), ids) - exact).abs().max()) > 1e-2


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_units_have_the_functions_that_their_formulas_say(name: str) -> None:
    ids = models.tokens(2, LENGTH)
    found = []
    for segment in (
        Segment(0, 3, 1, "sublayer"),
        Segment(0, 3, 4, "sublayer"),
        Segment(0, 3, 1, "two_stage"),
        Segment(0, 3),
    ):
        found.append(whole(parallel(name, segment), ids))
        assert_close(found[-1], expected(name, ids, segment), within(name))
    assert min(float((one - other).abs().max()) for one, other in combinations(found, 2)) > 1e-2


def test_parallel_blocks_are_one_unit() -> None:
    ids = models.tokens(2, LENGTH)
    layer, sublayer = (parallel("gpt_neox", Segment(0, 3, 2, unit)) for unit in ("layer", "sublayer"))  # type: ignore[arg-type]
    assert torch.equal(whole(layer, ids), whole(sublayer, ids))


def test_numbers_mean_the_layers_of_the_model_before_others_were_skipped() -> None:
    ids, segment = models.tokens(2, LENGTH), Segment(2, 5)
    plan = Plan([SkipSublayers(layers=(1,)), LayerParallel((segment,))])
    program, _ = rewrite(captured("deep"), plan, target="eager", cache=False, strict=False)
    skipped = stack(hugging_face("deep"))[1].register_forward_hook(lambda _module, args, _out: args[0])
    wanted = expected("deep", ids, segment)
    skipped.remove()
    assert_close(whole(program, ids), wanted)


def test_half_precision_sums_corrections_in_single() -> None:
    """The error against float64 is that of the model itself in bfloat16, or less; all layers in turn give its bits."""
    half = copy.deepcopy(models.model("llama")).to(torch.bfloat16)
    with torch.no_grad():
        for parameter in half.parameters():
            parameter.mul_(0.6)  # narrow enough that bfloat16 is not noise
    program, ids = capture_huggingface(half), models.tokens(4, LENGTH)
    exact = copy.deepcopy(half).to(torch.float64)
    segment = Segment(0, 3)
    parallel = run_pass(LayerParallel((segment,)), program)
    assert {node.meta["val"].dtype for node in parallel.nodes(aten.sub.Tensor)} == {torch.float32}
    with torch.no_grad(), at_once(exact, [segment]):
        wanted = exact(input_ids=ids, use_cache=False).logits
    with torch.no_grad():
        sequential = whole(program, ids).double() - exact(input_ids=ids, use_cache=False).logits
    error = whole(parallel, ids).double() - wanted
    assert 0 < float(error.square().mean()) <= 1.5**2 * float(sequential.square().mean())
    assert torch.equal(whole(run_pass(LayerParallel((Segment(0, 3, 3),)), program), ids), whole(program, ids))


# ------------------------------------------------------------------------------------------------------------ KV caches


@cache
def executable(name: str, *segments: Segment) -> Executable:
    program, refusal = rewrite(captured(name), Plan([LayerParallel(segments)]), target="eager", strict=False)
    assert refusal is None
    return Executable(EagerSession(program))


CACHED = {
    "llama": (Segment(0, 3),), "llama 2": (Segment(0, 3, 2),), "llama 3": (Segment(0, 3, 3),),
    "deep": (Segment(1, 5, 3),), "deep 2": (Segment(0, 2), Segment(2, 6, 2, surrogate="zero")),
    "deep sublayer": (Segment(1, 4, 2, "sublayer"),), "deep stages": (Segment(1, 4, 1, "two_stage"),),
    "gemma2": (Segment(0, 3),), "gemma2 2": (Segment(0, 3, 2),), "gpt_neox": (Segment(0, 3, 2),),
}  # fmt: skip


@pytest.mark.parametrize("case", CACHED)
def test_token_by_token_equals_all_at_once(case: str) -> None:
    """Grouped queries, windows shorter than the sequence, several rows, padding on both sides, chunks of any size."""
    name, segments = case.split()[0], CACHED[case]
    opt, generator = executable(name, *segments), torch.Generator().manual_seed(3)
    ids = models.tokens(3, LENGTH, seed=4)
    for side in ("left", "right", "none"):
        cut = 0 if side == "none" else 3
        prompt = ids[:, : 4 + cut]
        mask = torch.ones_like(prompt)
        mask[-1, {"left": slice(cut), "right": slice(4, 4 + cut), "none": slice(0)}[side]] = 0
        sizes = []
        while sum(sizes) < LENGTH - prompt.shape[1]:
            sizes.append(int(torch.randint(1, 6, (), generator=generator)))
        logits, cache = opt.prefill(prompt, mask)
        rest = ids[:, prompt.shape[1] :].split([*sizes[:-1], LENGTH - prompt.shape[1] - sum(sizes[:-1])], dim=1)
        steps = torch.cat([logits[:, None], *(opt.decode(part, cache) for part in rest)], dim=1)
        for row, own in enumerate(mask.bool()):
            sequence = torch.cat([prompt[row, own], ids[row, prompt.shape[1] :]])[None]
            wanted = expected(name, sequence, *segments)[0]
            assert_close(steps[row], wanted[-steps.shape[1] :], within(name))


@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_any_segments_decode_as_they_prefill(data: st.DataObject) -> None:
    start = data.draw(st.integers(0, 4))
    stop = data.draw(st.integers(start + 2, 6))
    iterations, surrogate = data.draw(st.integers(1, stop - start)), data.draw(st.sampled_from(SURROGATES))
    segment = Segment(start, stop, iterations, surrogate=surrogate)  # type: ignore[arg-type]
    opt, ids = executable("deep", segment), models.tokens(2, 9, seed=8)
    last, cache = opt.prefill(ids[:, :3])
    steps = [last[:, None], *(opt.decode(column, cache)[:, None] for column in ids[:, 3:].unbind(1))]
    assert_close(torch.cat(steps, dim=1), expected("deep", ids, segment)[:, 2:])


def test_each_iteration_has_its_own_slot() -> None:
    program = executable("deep", Segment(1, 5, 2)).program
    paths = [module_path(node) for node in program.nodes(*CACHED_OPS)]
    numbers = [0, 1, 2, 3, 2, 3, 4, 5]  # layer 4 in iteration 1 cannot reach the end, layer 1 is exact behind it
    assert paths == [f"model.layers.{number}.self_attn" for number in numbers]
    assert program.slots() == tuple(range(8))
    names = [*sites(parallel("deep", Segment(1, 5, 2))).values()]
    assert names == [path + ("#1" if place in (4, 5) else "") for place, path in enumerate(paths)]


# --------------------------------------------------------------------------------------------------------- whole plans


def test_it_runs_on_onnx_runtime(tmp_path: Path) -> None:
    """A plan that was written to a file, on the model itself: prefill, decode, and greedy text."""
    segments = (Segment(1, 3, 2),)
    Plan([LayerParallel(segments)]).save(tmp_path / "plan.json")
    plan = Plan.load(tmp_path / "plan.json")
    assert plan.entries == (LayerParallel(segments),)
    with patch.object(import_module("skipstone.optimize"), "capture", lambda *_: captured("gemma2")):
        opt = optimize(models.model("gemma2"), plan, target="onnxruntime", threads=1, progress=False)
    ids = models.tokens(2, LENGTH, seed=2)
    wanted = expected("gemma2", ids, *segments)
    last, cache = opt.prefill(ids[:, :12])
    steps = [last[:, None], *(opt.decode(part, cache) for part in ids[:, 12:].split(3, dim=1))]
    assert_close(torch.cat(steps, dim=1), wanted[:, 11:], 1e-4)
    with at_once(hugging_face("gemma2"), segments):
        options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "use_cache": False}
        text = hugging_face("gemma2").generate(ids, **options)
    assert torch.equal(opt.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None), text)
    assert "2 x layer" in str(opt.report) and "6 (3 + 3)" in str(opt.report)


def test_quantized_caches_are_calibrated_on_what_runs() -> None:
    """The second iteration of a layer has its own ranges, those of the values that it has in that iteration."""
    segment, data = Segment(1, 5, 2), models.tokens(4, LENGTH, seed=6)
    batches = token_batches([data], captured("deep").source)
    plan = Plan([LayerParallel((segment,)), QuantizeKV(condition=False)])
    program, _ = rewrite(captured("deep"), plan, target="eager", strict=False, batches=batches)
    model = hugging_face("deep")
    seen: list[Tensor] = []
    handle = stack(model)[2].self_attn.v_proj.register_forward_hook(lambda _module, _args, out: seen.append(out))
    with torch.no_grad(), at_once(model, [segment]):
        model(input_ids=data, use_cache=False)
    handle.remove()
    # The model's own call, then the iterations.
    for name, values in (("", seen[1]), ("#1", seen[2])):
        found = program.calibration[f"quantize_kv/model.layers.2.self_attn{name}/value/maximum"]
        assert torch.allclose(found.double().flatten(), values.flatten(0, 1).amax(0), atol=1e-6)


def test_conditioning_comes_before_the_copies() -> None:
    """A plan with its calibration is carried out again without data, to the bit; and quantizing costs little."""
    data, ids = models.tokens(4, LENGTH, seed=6), models.tokens(2, LENGTH, seed=7)
    plan = Plan([LayerParallel((Segment(1, 5, 2),)), QuantizeKV()])
    batches = token_batches([data], captured("deep").source)
    first_program, _ = rewrite(captured("deep"), plan, target="eager", strict=False, batches=batches)
    names = [record.name for record in first_program.history]
    assert names.index("condition_kv") < names.index("layer_parallel") < names.index("quantize_kv")
    saved = Plan(plan.entries, tensors=first_program.calibration)
    again, _ = rewrite(captured("deep"), saved, target="eager", strict=False)
    logits = []
    for program in (first_program, again, executable("deep", Segment(1, 5, 2)).program):
        opt = Executable(EagerSession(program))
        last, cache = opt.prefill(ids[:, :6])
        logits.append(torch.cat([last[:, None], opt.decode(ids[:, 6:], cache)], dim=1))
    assert torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[0], logits[2])
    assert_close(logits[0], logits[2], 0.05)


def test_gates_stand_outside_of_segments() -> None:
    adaptive = SkipFFNAdaptive(threshold=0.5, cold_start=0, cold_end=0, max_share=1.0)
    plan = Plan([LayerParallel((Segment(2, 4),)), adaptive])
    program, _ = rewrite(captured("deep"), plan, target="eager", strict=False)
    assert [node.meta["layer"] for node in program.nodes(GATE)] == [1, 4, 5]
    everything = Plan([LayerParallel((Segment(0, 6),)), adaptive])
    with pytest.raises(Unsupported, match="layers all run at the same time"):
        rewrite(captured("deep"), everything, target="eager", strict=False)


def test_the_report_counts_evaluations() -> None:
    program = executable("deep", Segment(1, 5, 2)).program
    counted, before = footprint(program), footprint(captured("deep"))
    assert (counted.sublayers, counted.attention, counted.ffn) == (16, 8, 8)
    assert counted.weight_bytes == before.weight_bytes
    record = next(each for each in program.history if each.name == "layer_parallel")
    assert record.remarks[0].numbers == {"units": 4, "depth": 2, "evaluations": 6}
    assert "identity" in record.remarks[0].why
    scaled = run_pass(LayerParallel((Segment(0, 2),)), net_program("scaled")).history[-1].remarks[0]
    assert "surrogate scale" in scaled.why
    stream = find_stream(program)
    assert [(each.layer, each.post_norm) for each in stream.sublayers] == [(0, False)] * 2 + [(1, False)] * 2


def test_the_graph_of_two_layers_reads_as_the_update_rule() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.entry, self.one, self.two = (nn.Linear(4, 4, bias=False) for _ in range(3))
            self.scale = nn.Parameter(torch.tensor(0.5))

        def forward(self, x: Tensor) -> Tensor:
            x = self.entry(x)
            x = x + self.one(x).tanh()
            return self.scale * x + self.two(x).tanh()

    program = run_pass(LayerParallel((Segment(0, 2),)), capture_module(Two().eval(), {"x": torch.randn(2, 3, 4)}))
    assert body(program) == EXPECTED


EXPECTED = """
a = aten.linear(x, entry_weight)
b = aten.linear(a, one_weight)
c = aten.tanh(b)
d = aten.add.Tensor(a, c)
e = aten.mul.Tensor(scale, a)
f = aten.linear(a, two_weight)
g = aten.tanh(f)
h = aten.add.Tensor(e, g)
i = aten.sub.Tensor(d, a)
j = aten.mul.Tensor(scale, i)
k = aten.add.Tensor(h, j)
"""


def body(program: Program) -> str:
    """The operators of a readable program, without types and comments, their results named in order."""
    lines = [line.split("#")[0].strip() for line in readable(program).splitlines()]
    text = "".join(f"{line}\n" for line in lines if " = aten." in line)
    for letter, name in zip("abcdefghijk", re.findall(r"^\w+", text, re.MULTILINE), strict=True):
        text = re.sub(rf"\b{name}\b(?!\.)(?=[ ,)])", letter, text)
    return "\n" + text


# ------------------------------------------------------------------------------------------------------------ refusals


class Odd(nn.Module):
    """Four residual layers, the third of which is not like a residual layer should be."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.entry = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.extra, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Any:
        states, inner = [self.entry(x)], []
        for number, layer in enumerate(self.layers):
            x = states[-1]
            if number == 2:
                x = self.changed(x, states)
            branch = torch.tanh(layer(x))
            if number == 2 and self.form == "value residual":
                branch = self.extra(branch + inner[1])
            if number == 2 and self.form == "wider":
                branch = torch.stack([branch, branch])
            inner.append(branch)
            states.append(x + branch)
        return (states[-1], inner[1]) if self.form == "inner" else states[-1]

    def changed(self, x: Tensor, states: Sequence[Tensor]) -> Tensor:
        if self.form == "return":
            return x + 0.5 * states[1]
        if self.form == "gate":
            return torch.sigmoid(self.extra(x)) * x
        return self.norm(x) if self.form == "post-norm" else x


ODD = {
    "return": "comes from another layer of its segment", "inner": "from inside a layer",
    "gate": "multiplied by a function of itself", "post-norm": "post-norm", "wider": "changes the shape",
}  # fmt: skip


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("form", ODD)
def test_layers_that_are_no_functions_of_the_stream_are_refused(form: str, surrogate: Any) -> None:
    program = capture_odd(form)
    with pytest.raises(Unsupported, match=ODD[form]) as refusal:
        run_pass(LayerParallel((Segment(0, find_stream(program).layers, surrogate=surrogate),)), program)
    assert refusal.value.where
    run_pass(LayerParallel((Segment(0, 1, surrogate=surrogate),)), program)


def test_what_a_layer_reads_from_before_its_segment_is_the_same_in_every_iteration() -> None:
    program, segment, x = capture_odd("return"), Segment(1, 4, 2), example().float()
    model = odd("return")
    with torch.no_grad():
        state = model.entry(x)
        start = state + torch.tanh(model.layers[0](state))

        def third(h: Tensor) -> Tensor:
            h = h + 0.5 * start
            return h + torch.tanh(model.layers[2](h))

        functions = [lambda h: h + torch.tanh(model.layers[1](h)), third, lambda h: h + torch.tanh(model.layers[3](h))]
        (found,) = run_pass(LayerParallel((segment,)), program).run(x=x).values()
        assert_close(found, newton(functions, start, 2, [1.0] * 3)[-1], 1e-5)


def test_layers_that_read_each_other_are_one() -> None:
    """What a value residual ties together has one entry and one exit, and runs as one layer."""
    program, model, x = capture_odd("value residual"), odd("value residual"), example().float()
    assert find_stream(program).layers == 2

    def tied(h: Tensor) -> Tensor:
        inner = torch.tanh(model.layers[1](h))
        h = h + inner
        h = h + model.extra(torch.tanh(model.layers[2](h)) + inner)
        return h + torch.tanh(model.layers[3](h))

    with torch.no_grad():
        functions = [lambda h: h + torch.tanh(model.layers[0](h)), tied]
        (found,) = run_pass(LayerParallel((Segment(0, 2),)), program).run(x=x).values()
        assert_close(found, newton(functions, model.entry(x), 1, [1.0, 1.0])[-1], 1e-5)


@cache
def odd(form: str) -> Odd:
    torch.manual_seed(0)
    return Odd(form).eval()


@cache
def capture_odd(form: str) -> Program:
    return capture_module(odd(form), {"x": example().float()})


def test_post_norm_models_are_refused() -> None:
    with pytest.raises(Unsupported, match="post-norm"):
        run_pass(LayerParallel((Segment(0, 2),)), models.program("bert"))


def test_random_numbers_are_refused() -> None:
    program = net_program("plain").copy()
    node = next(program.nodes(aten.tanh.default))
    with program.graph.inserting_after(node):
        dropped = program.graph.call_function(aten.dropout.default, (node, 0.5, True))
    dropped.meta = dict(node.meta)
    node.replace_all_uses_with(dropped, delete_user_cb=lambda user: user is not dropped)
    with pytest.raises(Unsupported, match=r"randomness .* at layers\.0"):
        run_pass(LayerParallel((Segment(0, 2),)), program)


REFUSED: dict[str, tuple[Plan, type[SkipstoneError], str]] = {
    "none": (Plan([LayerParallel()]), InvalidPlan, "without a segment"),
    "empty": (Plan([LayerParallel((Segment(2, 2),))]), InvalidPlan, "holds no layer"),
    "backwards": (Plan([LayerParallel((Segment(3, 2),))]), InvalidPlan, "holds no layer"),
    "negative": (Plan([LayerParallel((Segment(-1, 2),))]), InvalidPlan, "holds no layer"),
    "beyond": (Plan([LayerParallel((Segment(1, 4),))]), InvalidPlan, "layers 0 to 2.* nearest 'stop' is 3"),
    "none at all": (Plan([LayerParallel((Segment(0, 2, 0),))]), InvalidPlan, "nearest is 1"),
    "too many": (Plan([LayerParallel((Segment(1, 3, 3),))]), InvalidPlan, "nearest is 2"),
    "too many sublayers": (Plan([LayerParallel((Segment(1, 3, 5, "sublayer"),))]), InvalidPlan, "nearest is 4"),
    "stages": (Plan([LayerParallel((Segment(1, 3, 2, "two_stage"),))]), InvalidPlan, "nearest is 1"),
    "no stages": (Plan([LayerParallel((Segment(1, 3, 1, "two_stage", "zero"),))]), InvalidPlan, "'zero'"),
    "overlap": (Plan([LayerParallel((Segment(0, 2), Segment(1, 3)))]), InvalidPlan, "without overlap"),
    "order": (Plan([LayerParallel((Segment(1, 2), Segment(0, 1)))]), InvalidPlan, "without overlap"),
    "slots": (Plan([LayerParallel((Segment(0, 2),), kv="final")]), Unsupported, "decoding would differ from prefill"),
    "skipped": (
        Plan([SkipSublayers(layers=(1,)), LayerParallel((Segment(0, 3),))]), InvalidPlan, "layer 1 .* is skipped"
    ),
    "half skipped": (
        Plan([SkipSublayers(ffn=(1,)), LayerParallel((Segment(0, 3, 1, "two_stage"),))]),
        Unsupported, "not attention, then FFN at model.layers.1.self_attn",
    ),
    "by prompt, inside": (
        Plan([LayerParallel((Segment(0, 2),)), SkipByPrompt((SkipSublayers(ffn=(1,)),))]),
        InvalidPlan, "layer 1 has no ffn",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_plans_that_cannot_be_are_refused(case: str) -> None:
    plan, kind, message = REFUSED[case]
    with pytest.raises(kind, match=message):
        rewrite(captured("llama"), plan, target="eager", strict=False)


def test_continuations_of_an_attention_that_runs_twice_are_refused() -> None:
    plan = Plan([LayerParallel((Segment(1, 5, 2),)), SkipByPrompt((SkipSublayers(ffn=(0,)),))])
    with pytest.raises(Unsupported, match="runs twice"):
        rewrite(captured("deep"), plan, target="eager", strict=False)


UNITS = {
    "scaled": ("sublayer", "a scaled residual stream"),
    "plain": ("two_stage", "not attention, then FFN"),
}


@pytest.mark.parametrize("form", UNITS)
def test_units_that_do_not_fit_are_refused(form: str) -> None:
    unit: Any = UNITS[form][0]
    with pytest.raises(Unsupported, match=UNITS[form][1]):
        run_pass(LayerParallel((Segment(0, 2, 1, unit),)), net_program(form))


def test_two_stages_have_no_states_inside() -> None:
    """Whole layers do: what reads one gets that of the last iteration."""
    program, ids = captured("llama").copy(), models.tokens(2, LENGTH)
    state = find_stream(program).layer(1)[-1].add
    program.add_output(Port("state", Role.TENSOR), state)
    with pytest.raises(Unsupported, match=r"read elsewhere at model\.layers\.1\.mlp"):
        run_pass(LayerParallel((Segment(0, 3, 1, "two_stage"),)), program)
    run_pass(LayerParallel((Segment(0, 2, 1, "two_stage"),)), program)  # the state behind the segment
    model = hugging_face("llama")
    layers, calls = stack(model)[:2], []
    handles = [
        layer.register_forward_pre_hook(lambda _, args, options: calls.append((args, options)), with_kwargs=True)
        for layer in layers
    ]
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
        wanted = solved(layers, calls, Segment(0, 2))
        for each in handles:
            each.remove()
        positions = torch.arange(LENGTH).expand(ids.shape)
        found = run_pass(LayerParallel((Segment(0, 3),)), program).run(input_ids=ids, position_ids=positions)
    assert_close(found["state"], wanted)


class Hyper(nn.Module):
    """Two streams that every layer mixes, as hyper-connections do."""

    def __init__(self) -> None:
        super().__init__()
        self.entry, self.layers = nn.Linear(WIDTH, WIDTH), nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.mixing = nn.Parameter(torch.full((2, 2), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        streams = torch.stack([self.entry(x), self.entry(x)], dim=-2)
        for layer in self.layers:
            streams = self.mixing @ streams + torch.tanh(layer(streams.mean(dim=-2))).unsqueeze(-2)
        return streams.sum(dim=-2)


def test_hyper_connections_are_refused() -> None:
    program = capture_module(Hyper().eval(), {"x": example().float()})
    with pytest.raises(Unsupported, match="residual stream"):
        run_pass(LayerParallel((Segment(0, 2),)), program)


def test_parallel_blocks_have_no_two_stages() -> None:
    with pytest.raises(Unsupported, match="not attention, then FFN"):
        run_pass(LayerParallel((Segment(0, 2, 1, "two_stage"),)), captured("gpt_neox"))


def test_fields_are_checked_when_a_plan_is_made() -> None:
    with pytest.raises(InvalidPlan, match="unit must be one of 'layer', 'sublayer', 'two_stage'"):
        Plan([LayerParallel((Segment(0, 2, 1, "block"),))])  # type: ignore[arg-type]
    with pytest.raises(InvalidPlan, match="runs before it"):
        Plan([QuantizeKV(), LayerParallel((Segment(0, 2),))])
    with pytest.raises(InvalidPlan, match="nearest is 2"):
        optimize(models.model("llama"), Plan([LayerParallel((Segment(1, 3, 3),))]), progress=False)


@pytest.mark.parametrize("form", FORMS)
def test_programs_with_read_states_stay_sound(form: str) -> None:
    run_pass(LayerParallel((Segment(0, 2), Segment(2, LAYERS, 2))), net_program(form), strict=True)


@pytest.mark.parametrize("segment", [Segment(0, 3, 2), Segment(1, 3, 2, "sublayer"), Segment(0, 3, 1, "two_stage")])
def test_programs_stay_sound(segment: Segment) -> None:
    program, _ = rewrite(captured("llama"), Plan([LayerParallel((segment,))]), target="eager", strict=True)
    assert all("layer" in node.meta and module_path(node) for node in program.nodes(*CACHED_OPS))
