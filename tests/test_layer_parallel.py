"""Layers at the same time: the iterations are those of the update rule, written out over the model's own modules."""

from __future__ import annotations

import copy
import math
import re
from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from skipstone import LayerParallel, Plan, Segment, SkipSublayers
from skipstone.ir.capture.huggingface import capture_huggingface
from skipstone.ir.capture.module import capture_module
from skipstone.ir.printer import readable
from skipstone.ir.program import Program
from skipstone.passes.base import run_pass
from skipstone.rewrite import rewrite
from tests import models
from tests.newton_oracles import (
    FORMS,
    LAYERS,
    LENGTH,
    SURROGATES,
    assert_close,
    at_once,
    by_hand,
    captured,
    example,
    expected,
    hugging_face,
    in_graph,
    net,
    net_program,
    parallel,
    stack,
    whole,
    within,
)

aten = torch.ops.aten

pytestmark = pytest.mark.usefixtures("one_thread")


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


def test_states_are_those_that_layers_read_where_sums_have_another_shape() -> None:
    segment = Segment(0, LAYERS, 2)
    found, wanted = in_graph("flat", segment), by_hand("flat", [segment])
    for name, value in wanted.items():
        assert_close(found[name], value)


@pytest.mark.parametrize("form", FORMS)
def test_slopes_that_do_not_depend_on_the_stream_are_the_same_at_the_iterate(form: str) -> None:
    given, taken = (in_graph(form, Segment(0, LAYERS, 2, surrogate=each)) for each in ("auto", "at_iterate"))  # type: ignore[arg-type]
    assert all(torch.equal(given[name], taken[name]) for name in given)


def test_one_iteration_adds_all_branches_to_the_first_state() -> None:
    model, segment = net("plain"), Segment(1, LAYERS)
    found = in_graph("plain", segment)
    with torch.no_grad():
        start = model.layers[0](model.entry(example()), None)
        total = start + sum(layer(start, None) - start for layer in model.layers[1:])
    assert_close(found[f"state_{LAYERS}"], total)


@pytest.mark.parametrize("form", ["plain", "scaled"])
def test_one_iteration_does_not_see_the_order_of_the_layers(form: str) -> None:
    """With corrections as they are; what else a layer reads goes with it."""
    other, segment = copy.deepcopy(net(form)), Segment(0, LAYERS, surrogate="identity")
    other.layers = nn.ModuleList([other.layers[n] for n in (3, 0, 4, 2, 1)]).eval()
    with torch.no_grad():
        sequential = [model(example())[f"state_{LAYERS}"] for model in (net(form), other)]
        program = run_pass(LayerParallel((segment,)), capture_module(other, {"x": example()}))
        found = program.run(x=example())[f"state_{LAYERS}"]
    assert_close(found, in_graph(form, segment)[f"state_{LAYERS}"])
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


def test_states_of_half_precision_stay_single_between_corrections() -> None:
    """The update rule to the bit, over layers in bfloat16 and states in float32."""
    model, x = copy.deepcopy(net("plain")).to(torch.bfloat16), example().bfloat16()
    program = run_pass(LayerParallel((Segment(0, LAYERS, 3),)), capture_module(model, {"x": x}), strict=False)
    with torch.no_grad():
        found = program.run(x=x)
        trace = [model.entry(x).float()] * (LAYERS + 1)
        for _ in range(3):
            new = trace[:1]
            for number, layer in enumerate(model.layers):
                new.append(layer(trace[number].bfloat16(), None).float() + (new[number] - trace[number]))
            trace = new
    assert all(torch.equal(found[f"state_{n}"], state.bfloat16()) for n, state in enumerate(trace[1:], 1))


# Hugging Face models

NAMES = ("llama", "gemma2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gpt_neox", "gpt2", "mixtral")))


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


# The graph


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
