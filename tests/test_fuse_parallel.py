"""What runs at the same time as one: the results of the update rule, in fewer and wider operators."""

from __future__ import annotations

import copy
import itertools
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from skipstone import FuseParallel, LayerParallel, Plan, QuantizeKV, Segment, optimize
from skipstone.ir.capture.huggingface import capture_huggingface
from skipstone.ir.capture.module import capture_module
from skipstone.ir.dialect import ATTENTION
from skipstone.ir.lanes import Pack
from skipstone.ir.program import Program
from skipstone.ir.stream import PARALLEL, find_stream
from skipstone.passes.base import Status, run_pass
from skipstone.passes.cleanup import Cleanup
from skipstone.passes.stacked_weights import StackedWeights
from skipstone.rewrite import rewrite
from skipstone.runtime.eager import EagerSession
from skipstone.runtime.executable import Executable
from tests import models
from tests.newton_oracles import (
    FLOAT64,
    FORMS,
    LAYERS,
    LENGTH,
    SURROGATES,
    assert_close,
    by_hand,
    captured,
    example,
    expected,
    hugging_face,
    net_program,
    parallel,
    whole,
    within,
)
from tests.versions import needs_group_query_attention

aten = torch.ops.aten

pytestmark = pytest.mark.usefixtures("one_thread")

UNITS = ("layer", "sublayer", "two_stage")


def fused(program: Program) -> Program:
    return run_pass(FuseParallel(), program, strict=False)


def count(program: Program, *targets: Any) -> int:
    return sum(1 for _ in program.nodes(*targets))


# Plain networks


@cache
def fused_net(form: str, segments: tuple[Segment, ...]) -> Program:
    return fused(run_pass(LayerParallel(segments), net_program(form), strict=False))


@pytest.mark.parametrize("iterations", range(1, LAYERS + 1))
@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("form", FORMS)
def test_every_state_is_that_of_the_update_rule(form: str, surrogate: Any, iterations: int) -> None:
    segments = (Segment(0, LAYERS, iterations, surrogate=surrogate),)
    with torch.no_grad():
        found = fused_net(form, segments).run(x=example())
    for name, value in by_hand(form, segments).items():
        assert_close(found[name], value)


@pytest.mark.parametrize("form", FORMS)
def test_segments_follow_each_other(form: str) -> None:
    segments = (Segment(0, 2), Segment(2, 5, 2))
    with torch.no_grad():
        found = fused_net(form, segments).run(x=example())
    for name, value in by_hand(form, segments).items():
        assert_close(found[name], value)


def test_iterations_of_plain_layers_become_one_product_each() -> None:
    program = fused_net("plain", (Segment(0, LAYERS, 2),))
    assert [remark.status for remark in program.history[-1].remarks[:2]] == [Status.APPLIED] * 2
    # Two products an iteration, over all layers and over all but the first; the entry, the head, and a probe a layer
    # stay linear, and each iteration corrects its states in one triangular product.
    assert count(program, aten.matmul.default) == 4
    assert count(program, aten.einsum.default) == 2
    assert count(program, aten.linear.default) == 2 + LAYERS


def test_the_last_state_alone_is_a_sum_of_wide_projections() -> None:
    """Where nothing reads the states between, the last projections of all layers are one, biases and all."""
    program = net_program("plain").copy()
    unread = [f"{what}_{number}" for what in ("state", "probe") for number in (3, 4)]
    pairs = zip(program.outputs, program.output_node().args[0], strict=True)  # type: ignore[arg-type]
    program.remove_outputs([node for port, node in pairs if port.name in unread])
    program = fused(run_pass(LayerParallel((Segment(2, LAYERS),)), program))
    assert sum(name.startswith(("columns", "summed")) for name in program.tensors()) == 2
    with torch.no_grad():
        found = program.run(x=example())
    wanted = by_hand("plain", (Segment(2, LAYERS),))
    assert set(wanted) - set(found) == set(unread)
    for name, value in found.items():
        assert_close(value, wanted[name])


def test_later_iterations_read_the_stacks_of_the_first() -> None:
    bytes = []
    for iterations in (1, 2, LAYERS - 1):
        program = fused_net("plain", (Segment(0, LAYERS, iterations),))
        own = [tensor for name, tensor in program.tensors().items() if name.startswith("corrections")]
        bytes.append(program.weight_bytes() - sum(tensor.nbytes for tensor in own))
    assert len(set(bytes)) == 1


# Models


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return models.tokens(2, LENGTH, seed=2)


def applied(program: Program) -> int:
    return sum(remark.status is Status.APPLIED for remark in program.history[-1].remarks)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("unit", UNITS)
def test_units_of_a_model_are_those_of_their_formulas(name: str, unit: Any, ids: Tensor) -> None:
    segment = Segment(0, 3, unit=unit)
    program = fused(parallel(name, segment))
    assert_close(whole(program, ids), expected(name, ids, segment), within(name))
    assert count(program, ATTENTION) < count(parallel(name, segment), ATTENTION)


@pytest.mark.parametrize("name", ["llama", pytest.param("gpt2", marks=pytest.mark.slow), "gpt_neox"])
@pytest.mark.parametrize("iterations", [1, 2])
def test_layers_of_a_model_are_those_of_the_update_rule(name: str, iterations: int, ids: Tensor) -> None:
    segment = Segment(0, 3, iterations)
    program = fused(parallel(name, segment))
    assert_close(whole(program, ids), expected(name, ids, segment), within(name))
    assert applied(program) >= iterations


def test_heads_of_all_layers_stand_side_by_side() -> None:
    program = fused(parallel("llama", Segment(0, 3)))
    (alone,) = {node.args[0].meta["val"].shape[1] for node in captured("llama").nodes(ATTENTION)}
    wide = [int(node.args[0].meta["val"].shape[1]) for node in program.nodes(ATTENTION)]  # type: ignore[union-attr]
    assert wide[0] == 3 * alone


def test_layers_that_see_as_far_share_an_attention() -> None:
    """Gemma 2 has a window in its first and third layer, not in its second."""
    program = fused(parallel("gemma2", Segment(0, 3)))
    kinds = {node.kwargs["kind"]: int(node.args[0].meta["val"].shape[1]) for node in program.nodes(ATTENTION)}  # type: ignore[union-attr]
    heads = {int(node.args[0].meta["val"].shape[1]) for node in captured("gemma2").nodes(ATTENTION)}  # type: ignore[union-attr]
    assert kinds == {"sliding": 2 * heads.pop(), "causal": kinds["causal"]} and 2 * kinds["causal"] == kinds["sliding"]


def test_a_model_that_fills_in_masks() -> None:
    """Its capture joins the keys to those of an empty cache, which has no dimensions to speak of."""
    side_by_side = run_pass(LayerParallel((Segment(0, 2),)), run_pass(Cleanup(), models.program("llada")))
    program = fused(side_by_side)
    assert program.history[-1].remarks[0].status is Status.APPLIED
    ids = models.tokens(2, 9, seed=4)
    known = {"tokens": ids, "positions": torch.arange(9).expand(2, 9), "padding": torch.ones_like(ids)}
    inputs = {port.name: known[port.role] for port in program.inputs}
    with torch.no_grad():
        assert_close(program.run(**inputs)["logits"], side_by_side.run(**inputs)["logits"], 1e-5)


def test_attentions_that_see_as_far_go_back_to_their_layers() -> None:
    config = copy.deepcopy(models.model("gemma2").config)
    config.layer_types = ["sliding_attention", *["full_attention"] * 2, "sliding_attention", "full_attention"]
    config.num_hidden_layers = len(config.layer_types)
    model = type(models.model("gemma2"))(config).eval()
    side_by_side = run_pass(LayerParallel((Segment(0, 5),)), run_pass(Cleanup(), capture_huggingface(model)))
    ids = models.tokens(1, LENGTH, seed=9)
    assert_close(whole(fused(side_by_side), ids), whole(side_by_side, ids), within("gemma2"))


def test_gains_are_folded_where_lanes_then_read_the_same() -> None:
    """All queries, keys and values of three layers are one product, whose weights took over the gains."""
    program = fused(parallel("deep", Segment(1, 4)))
    gained = [name for name in program.tensors() if name.startswith("gained")]
    readers = [node for node in program.nodes(aten.linear.default) if node.args[1].target in gained]  # type: ignore[union-attr]
    assert len(gained) == len(readers) == 1
    width = sum(int(captured("deep").tensor(f"model.layers.1.self_attn.{each}_proj.weight").shape[0]) for each in "qkv")
    assert readers[0].meta["val"].shape[-1] == 3 * width


@pytest.mark.parametrize(
    ("name", "unit"),
    [
        *itertools.product(("llama", "gpt2"), ("layer", "two_stage")),
        pytest.param("gpt_neox", "layer", marks=pytest.mark.slow),
    ],
)
def test_gains_and_biases_are_each_layers_own(name: str, unit: Any) -> None:
    """Fresh models have gains of one and biases of zero, which nobody would miss."""
    side_by_side = run_pass(LayerParallel((Segment(0, 3, unit=unit),)), gained_program(name))
    ids = models.tokens(2, 7, seed=7)
    assert_close(whole(fused(side_by_side), ids), whole(side_by_side, ids))


@cache
def gained_program(name: str) -> Program:
    model, generator = copy.deepcopy(hugging_face(name)), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return run_pass(Cleanup(), capture_huggingface(model))


def test_a_tensor_that_stands_in_several_places_gets_a_stack_of_its_own() -> None:
    program = net_program("plain").copy()
    names = [f"layers.{number}.{which}.weight" for number in (0, 1) for which in ("up", "down")]
    with program.graph.inserting_before(next(program.nodes())):
        up_0, down_0, up_1, down_1 = (program.graph.get_attr(name) for name in names)
    for node in (up_0, down_0, up_1, down_1):
        node.meta["val"] = program.tensor(node.target).detach()
    families = dict.fromkeys((names[0], names[2]), (names[0], names[2]))
    weights = StackedWeights(program, families)
    with program.graph.inserting_before(next(program.nodes())):
        stacks = [weights.stack(Pack("tensors", order)) for order in ((up_0, up_1), (up_1, up_0), (down_1, down_0))]
    wanted = [
        [program.tensor(node.target) for node in order] for order in ((up_0, up_1), (up_1, up_0), (down_1, down_0))
    ]
    for stack, tensors in zip(stacks, wanted, strict=True):
        assert torch.equal(program.tensor(stack.target), torch.stack(tensors))


def test_half_precision_keeps_its_weights() -> None:
    """A weight in bfloat16 that takes over a gain would be rounded once more."""
    model = copy.deepcopy(models.model("llama")).to(torch.bfloat16)
    program = fused(run_pass(LayerParallel((Segment(0, 3),)), run_pass(Cleanup(), capture_huggingface(model))))
    names = list(program.tensors())
    assert any(name.startswith("rows") for name in names) and not any(name.startswith("gained") for name in names)


def test_sublayers_and_sums_know_what_they_hold(ids: Tensor) -> None:
    program = fused(parallel("llama", Segment(0, 2)))
    kinds = [kind for node in program.nodes() for kind in node.meta.get(PARALLEL, ())]
    assert sorted(kinds) == ["attention", "attention", "ffn", "ffn"]
    assert [str(each.kind) for each in find_stream(program).sublayers] == ["attention", "ffn"]  # of the third layer


# Siblings of any model


def test_projections_of_one_value_become_one(ids: Tensor) -> None:
    before, after = captured("llama"), fused(captured("llama"))
    layers = count(before, ATTENTION)
    assert count(before, aten.linear.default) - count(after, aten.linear.default) == 3 * layers
    assert_close(whole(after, ids), whole(before, ids))
    assert applied(after) == 2 * layers


class Siblings(nn.Module):
    def __init__(self, other: nn.Linear | None = None) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 5)
        self.c, self.d = nn.Linear(4, 2, bias=False), nn.Linear(4, 6, bias=False)
        self.e = other if other is not None else nn.Linear(4, 7)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {name: getattr(self, name)(x) for name in "abcde"} | {"again": self.e(x + 1)}


def test_biases_keep_to_biases_and_shared_weights_stay() -> None:
    torch.manual_seed(0)
    model, x = Siblings().double().eval(), torch.randn(3, 2, 4, dtype=torch.float64)
    program = run_pass(FuseParallel(), run_pass(Cleanup(), capture_module(model, {"x": x})))
    assert count(program, aten.linear.default) == 4  # a with b, c with d, and e twice
    with torch.no_grad():
        found, wanted = program.run(x=x), model(x)
    for name, value in wanted.items():
        assert_close(found[name], value)


# Lanes of several kinds


def test_lanes_of_two_kinds_keep_their_order() -> None:
    """Lanes of two kinds in turn, attentions and FFNs: their states stand in the order of the layers."""
    program = parallel("deep", Segment(1, 4, 2, "sublayer"))
    ids = models.tokens(2, 9, seed=3)
    assert_close(whole(fused(program), ids), whole(program, ids))


# Executables


@pytest.mark.parametrize("iterations", [1, 2])
def test_stepwise_equals_one_shot(iterations: int, ids: Tensor) -> None:
    plan = Plan([LayerParallel((Segment(0, 3, iterations),)), FuseParallel()])
    program, refusal = rewrite(captured("llama"), plan, target="eager")
    assert refusal is None
    model = Executable(EagerSession(program))
    wanted = expected("llama", ids, *plan.entries[0].segments)  # type: ignore[attr-defined]
    logits, cache = model.prefill(ids[:, :4])
    assert_close(logits, wanted[:, 3], FLOAT64)
    for step in range(4, ids.shape[1]):
        assert_close(model.decode(ids[:, step : step + 1], cache)[:, -1], wanted[:, step], FLOAT64)


@needs_group_query_attention
@pytest.mark.slow
def test_onnx_runtime_computes_the_same_over_quantized_caches(ids: Tensor) -> None:
    entries = [LayerParallel((Segment(0, 3),)), FuseParallel()]
    model = models.model("llama")
    plain, quantized = (
        optimize(
            model, Plan([*entries, *more]), target="onnxruntime", calibration=[ids] if more else None, progress=False
        )
        for more in ([], [QuantizeKV()])
    )
    wanted = expected("llama", ids, entries[0].segments[0]).float()  # type: ignore[attr-defined]
    assert_close(plain(input_ids=ids).logits, wanted, 1e-4)
    error = (quantized(input_ids=ids).logits - wanted).abs().max() / (wanted.max() - wanted.min())
    assert 0 < float(error) < 0.05
    assert len(quantized.session.program.slots()) == 1  # for three layers


# Memory


def test_a_model_may_read_the_stacks(ids: Tensor) -> None:
    model = copy.deepcopy(hugging_face("gpt_neox"))
    plan = Plan([LayerParallel((Segment(0, 3),)), FuseParallel()])
    before, state = model(input_ids=ids).logits, {name: each.clone() for name, each in model.state_dict().items()}
    opt = optimize(model, plan, target="eager", reuse_model=True, progress=False)
    logits = opt(input_ids=ids).logits
    after = model(input_ids=ids).logits
    assert torch.equal(after, before)
    assert all(torch.equal(state[name], each) for name, each in model.state_dict().items())
    # Of all weights in stacks there is one copy; the others were the program's all along.
    program = opt.session.program
    together = {each.untyped_storage().data_ptr(): each.untyped_storage() for each in program.tensors().values()}
    own = {each.untyped_storage().data_ptr(): each.untyped_storage() for each in model.parameters()}
    assert len(own.keys() - together.keys()) == 0
    with torch.no_grad():
        model.gpt_neox.layers[1].mlp.dense_4h_to_h.weight.mul_(2)
    assert not torch.equal(opt(input_ids=ids).logits, logits)


def test_a_model_is_left_alone_unless_it_is_asked_for() -> None:
    model = copy.deepcopy(hugging_face("gpt_neox"))
    places = [each.data_ptr() for each in model.parameters()]
    optimize(model, Plan([FuseParallel()]), target="eager", progress=False, strict=False)
    assert [each.data_ptr() for each in model.parameters()] == places


def test_weights_that_a_pass_has_changed_are_not_given_to_the_model(ids: Tensor) -> None:
    """Conditioning of keys changes projections, which then lie in the stacks."""
    model = copy.deepcopy(models.model("llama"))
    state = {name: each.clone() for name, each in model.state_dict().items()}
    plan = Plan([FuseParallel(), QuantizeKV()])
    optimize(model, plan, target="eager", calibration=[ids], reuse_model=True, progress=False)
    assert all(torch.equal(state[name], each) for name, each in model.state_dict().items())
