"""Linear layers that obey gates by themselves: the operator, and the rewrite that puts it in."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor, fx

from skipstone.adaptive import skipped_ffns
from skipstone.errors import InvalidInput, InvalidPlan, Unsupported
from skipstone.ir.capture.huggingface import capture_huggingface
from skipstone.ir.cost import cost
from skipstone.ir.dialect import GATE, PREDICATED_LINEAR
from skipstone.ir.gates import spared
from skipstone.ir.predicated import predicated_linear
from skipstone.ir.program import Port, Program, Role, provenance
from skipstone.ir.stream import SublayerKind, find_stream
from skipstone.passes.base import Status, run_pass
from skipstone.passes.predicate_ffn import PredicateFFN
from skipstone.plan import Plan
from skipstone.rewrite import rewrite
from skipstone.runtime.eager import EagerSession
from skipstone.runtime.executable import Executable
from tests import models, predicated_cases
from tests.ffn_oracles import ALWAYS, LENGTH, PROMPT

aten = torch.ops.aten


pytestmark = pytest.mark.usefixtures("one_thread")


# --------------------------------------------------------------------------------------------------------- the operator


@pytest.mark.parametrize("who", predicated_cases.DECISIONS)
@pytest.mark.parametrize("options", [{}, {"transposed": True}, {"strided": True}, {"bias": False}], ids=str)
def test_rows_that_skip_are_zeros_and_others_are_exact(who: str, options: dict[str, bool]) -> None:
    for shape in predicated_cases.SHAPES:
        predicated_cases.check(predicated_linear, shape, who, **options)


def test_weights_of_nan_make_no_difference_to_rows_that_skip() -> None:
    x, weight, bias = (torch.full(shape, float("nan")) for shape in ((2, 3, 8), (4, 8), (4,)))
    skip = torch.tensor([[True] * 3, [True, False, True]])
    out = predicated_linear(x, weight, skip, bias)
    assert torch.equal(out[skip], torch.zeros(5, 4)) and out[~skip].isnan().all()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_schema_and_fake(bias: bool, transposed: bool) -> None:
    weight = torch.randn(8, 4).t() if transposed else torch.randn(4, 8)
    x, skip = torch.randn(3, 2, 8).transpose(0, 1), predicated_cases.decide("some", 2, 3)
    torch.library.opcheck(predicated_linear, (x, weight, skip, torch.randn(4) if bias else None))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(4, 7)}, r"A weight \(4, 7\) does not fit rows \(2, 3, 8\)"),
        ({"weight": torch.zeros(1, 4, 8)}, r"A weight \(1, 4, 8\)"),
        ({"bias": torch.zeros(8)}, r"A bias \(8,\)"),
        ({"skip": torch.zeros(3, 2, dtype=torch.bool)}, r"Decisions torch.bool \(3, 2\)"),
        ({"skip": torch.zeros(2, 3)}, r"Decisions torch.float32 \(2, 3\)"),
        ({"x": torch.zeros(6, 8), "skip": torch.zeros(6, dtype=torch.bool)}, r"one bool a row of \(6, 8\)"),
        ({"weight": torch.zeros(4, 8, dtype=torch.float64)}, "Rows of torch.float32 with weights of torch.float64"),
        ({"weight": torch.zeros(4, 8, device="meta")}, "Rows on cpu with weights on meta"),
    ],
    ids=lambda part: "-".join(part) if isinstance(part, dict) else "",
)
def test_operands_that_do_not_fit_are_refused(change: dict[str, Tensor], message: str) -> None:
    skip = torch.zeros(2, 3, dtype=torch.bool)
    operands = {"x": torch.zeros(2, 3, 8), "weight": torch.zeros(4, 8), "skip": skip, "bias": torch.zeros(4)}
    with pytest.raises(InvalidInput, match=message):
        predicated_linear(**(operands | change))


# ---------------------------------------------------------------------------------------------------------- the rewrite

LAYERS = {"llama": 3, "gpt2": 2, "gpt_neox": 2, "gemma2": 3}
"""How many linear layers an FFN of each kind of model has."""
NAMES = [pytest.param(name, marks=pytest.mark.slow) if name == "gpt_neox" else name for name in LAYERS]
THRESHOLDS = {"llama": 0.64, "gpt2": 0.74, "gpt_neox": 0.64, "gemma2": 0.91}
"""From which on some tokens skip and others do not."""


@cache
def gated(name: str, dtype: torch.dtype = torch.float64, always: bool = False) -> Program:
    """A program whose second and third FFNs have a gate, and in which some tokens behind a prompt skip, or all do."""
    entry = ALWAYS if always else replace(ALWAYS, threshold=THRESHOLDS[name], warmup_tokens=1)
    return rewrite(captured(name, dtype), Plan([entry]), target="eager")[0]


@cache
def captured(name: str, dtype: torch.dtype) -> Program:
    if name == "gemma2" and dtype == torch.float64:  # whose code computes in float32 here and there
        return models.program(name)
    model: Any = copy.deepcopy(models.model(name))
    return capture_huggingface(model.to(dtype))


def executable(program: Program) -> Any:
    return Executable(EagerSession(program))


def decoded(program: Program, chunk: int) -> list[Tensor]:
    """Logits of two sequences, decoded behind a prompt so many tokens at a time, and the caches."""
    opt, ids = executable(program), models.tokens(2, LENGTH, seed=3)
    first, cache = opt.prefill(ids[:, :PROMPT])
    logits = [opt.decode(part, cache) for part in ids[:, PROMPT:].split(chunk, dim=1)]
    return [first, *logits, *cache.buffers.values()]


def assert_same(after: Program, before: Program) -> None:
    """Bit for bit, one token at a time and several."""
    for chunk in (1, 3):
        for mine, other in zip(decoded(after, chunk), decoded(before, chunk), strict=True):
            assert torch.equal(mine, other)


@pytest.mark.parametrize("name", ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in [*LAYERS][1:])])
def test_every_linear_layer_of_a_gate_obeys_it(name: str) -> None:
    before = gated(name)
    after = run_pass(PredicateFFN(), before)
    remarks = after.history[-1].remarks
    assert [remark.status for remark in remarks] == [Status.APPLIED] * 2
    assert {f"{LAYERS[name]} linear layers obey its gate"} == {remark.why for remark in remarks}
    layers = list(after.nodes(PREDICATED_LINEAR))
    assert len(layers) == 2 * LAYERS[name]
    # Behind Gemma's last product stands a norm, whose rows still have to be cleared.
    assert sum(1 for _ in after.nodes(GATE)) == (2 if name == "gemma2" else 0)
    products = (aten.linear.default, aten.addmm.default)
    assert sum(1 for _ in before.nodes(*products)) - sum(1 for _ in after.nodes(*products)) == len(layers)
    size = sum(node.args[1].meta["val"].nbytes for node in layers)  # type: ignore[union-attr]
    assert sum(remark.numbers["spared_bytes"] for remark in remarks) == size


@pytest.mark.parametrize("dtype", [torch.float64, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_results_are_those_of_the_gates(name: str, dtype: torch.dtype) -> None:
    """Of sequences that decide differently, in rows that skip and in those that do not."""
    program = gated(name, dtype)
    ids = models.tokens(2, LENGTH, seed=3)
    skipped = torch.stack([*skipped_ffns(executable(program), ids[:, :PROMPT], ids[:, PROMPT:]).values()])
    assert (skipped.any(dim=1) & ~skipped.all(dim=1)).any(), "the sequences never differ"
    assert skipped.all(dim=1).any(), "they never skip together"
    assert_same(run_pass(PredicateFFN(), program), program)


@pytest.mark.parametrize("name", NAMES)
def test_weights_that_all_rows_skip_make_no_difference(name: str) -> None:
    """Decoded with NaN in all weights and biases of the FFNs, behind a prompt that was read with the right ones."""
    ids, program = models.tokens(2, LENGTH), run_pass(PredicateFFN(), gated(name, always=True))
    poisoned = program.copy()
    for node in [each for each in poisoned.graph.nodes if re.search(r"\.[12]\.mlp\.", str(each.target))]:
        if node.op == "get_attr":
            nan = torch.full_like(poisoned.tensor(node.target), float("nan"))
            with poisoned.graph.inserting_before(node):
                node.replace_all_uses_with(poisoned.add_tensor(f"poisoned_{node.name}", nan))
    poisoned.recompile()
    results = []
    for each in (program, poisoned):
        _, cache = executable(program).prefill(ids[:, :PROMPT])
        opt = executable(each)
        results.append(torch.stack([opt.decode(ids[:, at], cache) for at in range(PROMPT, LENGTH)]))
    assert torch.equal(*results)
    assert executable(poisoned).prefill(ids[:, :PROMPT])[0].isnan().any(), "no weight was poisoned"


@pytest.mark.parametrize("name", NAMES)
def test_the_stream_and_the_cost_are_what_they_were(name: str) -> None:
    before = gated(name)
    after = run_pass(PredicateFFN(), before)
    old, new = (find_stream(each).sublayers for each in (before, after))
    assert [(s.kind, s.layer, s.path) for s in new] == [(s.kind, s.layer, s.path) for s in old]
    assert sympy.simplify(cost(after).flops - cost(before).flops) == 0


def respelled(program: Program, spell: Callable[[Program, fx.Node, fx.Node], fx.Node]) -> Program:
    """A copy of a gated Llama whose FFNs have another spelling of ``linear(x, weight)``."""
    program = program.copy()
    for gate in program.nodes(GATE):
        for node in spared(gate):
            if node.target is aten.linear.default:
                with provenance(program, "test", like=node), program.graph.inserting_before(node):
                    other = spell(program, *node.args)  # type: ignore[arg-type]
                node.replace_all_uses_with(other)
                program.graph.erase_node(node)
    program.recompile()
    return program


def _matmul(program: Program, x: fx.Node, weight: fx.Node) -> fx.Node:
    return program.call(aten.matmul.default, x, program.call(aten.t.default, weight))


def _transposed_matmul(program: Program, x: fx.Node, weight: fx.Node) -> fx.Node:
    return program.call(aten.matmul.default, x, program.call(aten.transpose.int, weight, 0, 1))


def _mm(program: Program, x: fx.Node, weight: fx.Node) -> fx.Node:
    sizes = [program.call(aten.sym_size.int, x, axis) for axis in range(2)]
    rows = program.call(aten.view.default, x, [-1, x.meta["val"].shape[-1]])
    product = program.call(aten.mm.default, rows, program.call(aten.t.default, weight))
    return program.call(aten.view.default, product, [*sizes, weight.meta["val"].shape[0]])


def _mm_of_turned_rows(program: Program, x: fx.Node, weight: fx.Node) -> fx.Node:
    """The rows of the sequences in turn: nothing says so but the transposition."""
    sizes = [program.call(aten.sym_size.int, x, axis) for axis in (1, 0)]
    turned = program.call(aten.transpose.int, x, 0, 1)
    rows = program.call(aten.reshape.default, turned, [-1, x.meta["val"].shape[-1]])
    product = program.call(aten.mm.default, rows, program.call(aten.t.default, weight))
    product = program.call(aten.reshape.default, product, [*sizes, weight.meta["val"].shape[0]])
    return program.call(aten.transpose.int, product, 0, 1)


@pytest.mark.parametrize("spell", [_matmul, _transposed_matmul, _mm])
def test_other_spellings_of_linear_layers(spell: Any) -> None:
    program = respelled(gated("llama"), spell)
    after = run_pass(PredicateFFN(), program)
    assert sum(1 for _ in after.nodes(PREDICATED_LINEAR)) == 6
    products = (aten.mm.default, aten.matmul.default)  # rotary embeddings may have one as well
    assert sum(1 for _ in program.nodes(*products)) - sum(1 for _ in after.nodes(*products)) == 6
    for mine, other in zip(decoded(after, 3), decoded(program, 3), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-12 * float(other.abs().max()))


# ----------------------------------------------------------------------------------------------------- what is refused


def test_experts_are_refused() -> None:
    with pytest.raises(Unsupported, match=r"skipstone\.experts .*no linear layer.*at model\.layers\.1\.mlp\.experts"):
        run_pass(PredicateFFN(), rewrite(models.program("mixtral"), Plan([ALWAYS]), target="eager")[0])


def test_rows_in_another_order_are_refused() -> None:
    with pytest.raises(Unsupported, match=r"aten\.mm .*no linear layer of tokens"):
        run_pass(PredicateFFN(), respelled(gated("llama"), _mm_of_turned_rows))


def test_scaled_products_are_refused() -> None:
    program = gated("gpt2").copy()
    for gate in program.nodes(GATE):
        next(node for node in spared(gate) if node.target is aten.addmm.default).kwargs = {"alpha": 2}
    program.recompile()
    with pytest.raises(Unsupported, match=r"aten\.addmm .*no linear layer"):
        run_pass(PredicateFFN(), program)


def test_one_gate_is_refused_beside_another() -> None:
    """A further matrix behind one FFN: its gate stays as it is, with all that it spares."""
    program = gated("llama").copy()
    gate: Any = next(program.nodes(GATE))
    with provenance(program, "test", like=gate), program.graph.inserting_before(gate):
        matrix = program.add_tensor("further", torch.eye(32, dtype=torch.float64).flip(0))
        product = program.call(aten.einsum.default, "bsn,nm->bsm", [gate.args[0], matrix])
    gate.args = (product, gate.args[1])
    program.recompile()
    after = run_pass(PredicateFFN(), program)
    refused, applied = after.history[-1].remarks
    assert (refused.status, applied.status) == (Status.REFUSED, Status.APPLIED) and "aten.einsum" in refused.why
    assert [len(spared(each)) for each in after.nodes(GATE)] == [len(spared(next(program.nodes(GATE))))]
    assert sum(1 for _ in after.nodes(PREDICATED_LINEAR)) == 3
    assert_same(after, program)


def gated_without_a_cache(mix: Callable[[Program, fx.Node], fx.Node]) -> Program:
    """A program without slots, whose first FFN has a gate, and reads what `mix` makes of its norm's result."""
    program = captured("llama", torch.float64).copy()
    ffn = next(each for each in find_stream(program).sublayers if each.kind is SublayerKind.FFN)
    tokens: Any = program.input(Role.TOKENS)
    skip = program.add_input(Port("skip", Role.TENSOR), tokens.meta["val"] > 0)
    layer = next(node for node in program.nodes(aten.linear.default) if "gate_proj" in str(node.args[1]))
    normed: Any = layer.args[0]
    with provenance(program, "test", like=layer), program.graph.inserting_before(layer):
        layer.args = (mix(program, normed), *layer.args[1:])
    with provenance(program, "test", like=ffn.branch), program.graph.inserting_after(ffn.branch):
        gate = program.call(GATE, ffn.branch, skip)
    ffn.branch.replace_all_uses_with(gate, delete_user_cb=lambda user: user is not gate)
    program.recompile()
    return program


def test_without_a_cache_operators_must_keep_tokens_apart_by_their_form() -> None:
    apart = gated_without_a_cache(lambda program, x: program.call(aten.relu.default, x))
    after = run_pass(PredicateFFN(), apart)
    assert sum(1 for _ in after.nodes(PREDICATED_LINEAR)) == 3 and not any(True for _ in after.nodes(GATE))
    together = gated_without_a_cache(lambda program, x: program.call(aten.cumsum.default, x, 1))
    with pytest.raises(Unsupported, match=r"a gate that spares aten.cumsum .*by which tokens may meet"):
        run_pass(PredicateFFN(), together)


def test_without_a_gate_there_is_nothing_to_do() -> None:
    program = rewrite(captured("llama", torch.float64), Plan([]), target="eager")[0]
    with pytest.raises(InvalidPlan, match=r"applied nowhere.*no gate"):
        run_pass(PredicateFFN(), program)
