"""What cannot run at the same time is refused, with the reason; what looks odd and can is the update rule."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from skipstone import LayerParallel, Plan, QuantizeKV, Segment, SkipByPrompt, SkipSublayers, optimize
from skipstone.errors import InvalidPlan, SkipstoneError, Unsupported
from skipstone.ir.capture.module import capture_module
from skipstone.ir.dialect import CACHED_OPS
from skipstone.ir.program import Port, Program, Role, module_path
from skipstone.ir.stream import find_stream
from skipstone.passes.base import run_pass
from skipstone.rewrite import rewrite
from tests import models
from tests.newton_oracles import (
    FORMS,
    LAYERS,
    LENGTH,
    SURROGATES,
    WIDTH,
    assert_close,
    captured,
    example,
    hugging_face,
    net_program,
    newton,
    solved,
    stack,
)

aten = torch.ops.aten

pytestmark = pytest.mark.usefixtures("one_thread")


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
        if self.form == "square":
            return x * x
        return self.norm(x) if self.form == "post-norm" else x


ODD = {
    "return": "comes from another layer of its segment", "inner": "from inside a layer",
    "gate": "multiplied by a function of itself", "square": "multiplied by itself", "post-norm": "post-norm",
    "wider": "changes the shape",
}  # fmt: skip


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("form", ODD)
def test_layers_that_are_no_functions_of_the_stream_are_refused(form: str, surrogate: Any) -> None:
    program = capture_odd(form)
    with pytest.raises(Unsupported, match=ODD[form]) as refusal:
        run_pass(LayerParallel((Segment(0, find_stream(program).layers, surrogate=surrogate),)), program)
    assert refusal.value.where
    run_pass(LayerParallel((Segment(0, 1, surrogate=surrogate),)), program)


@pytest.mark.parametrize("form", [form for form in ODD if form != "gate"])
def test_taking_values_in_the_iteration_helps_gates_alone(form: str) -> None:
    program = capture_odd(form)
    with pytest.raises(Unsupported, match=ODD[form]):
        run_pass(LayerParallel((Segment(0, find_stream(program).layers, surrogate="at_iterate"),)), program)


@pytest.mark.parametrize("iterations", [1, 3])
def test_gates_have_the_value_of_the_iteration(iterations: int) -> None:
    program, model, x = capture_odd("gate"), odd("gate"), example().float()
    gate = lambda h: torch.sigmoid(model.extra(h))  # noqa: E731
    slopes: list[Any] = [1.0, 1.0, lambda h, change: gate(h) * change, 1.0]
    functions = [lambda h, layer=layer: h + torch.tanh(layer(h)) for layer in model.layers]
    functions[2] = lambda h: gate(h) * h + torch.tanh(model.layers[2](gate(h) * h))
    with torch.no_grad():
        parallel = run_pass(LayerParallel((Segment(0, 4, iterations, surrogate="at_iterate"),)), program, strict=False)
        (found,) = parallel.run(x=x).values()
        assert_close(found, newton(functions, model.entry(x), iterations, slopes)[-1], 1e-5)
    assert "surrogate scale at the iterate" in parallel.history[-1].remarks[0].why


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
    "corrected stages": (
        Plan([LayerParallel((Segment(1, 3, 1, "two_stage"),), "final")]), InvalidPlan, "two stages with kv='final'"
    ),
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
