"""One broken program for every invariant of the verifier."""

from __future__ import annotations

import operator
import re
import time
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from skipstone.ir import verify as verifier
from skipstone.ir.capture.huggingface import capture_huggingface
from skipstone.ir.dialect import CACHED_ATTENTION
from skipstone.ir.errors import Malformed
from skipstone.ir.printer import readable
from skipstone.ir.program import Port, Program, Role, fake_value, propagate, provenance
from skipstone.ir.verify import RULES, verify
from skipstone.passes.base import run_pass
from skipstone.passes.kv_cache import InsertKVCache

aten = torch.ops.aten


def _llama(layers: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def captured() -> Program:
    return capture_huggingface(_llama(2))


@pytest.fixture(scope="module")
def cached(captured: Program) -> Program:
    return run_pass(InsertKVCache(), captured)


@pytest.fixture
def program(captured: Program) -> Program:
    return captured.copy()


@pytest.fixture
def stepwise(cached: Program) -> Program:
    return cached.copy()


def _first(program: Program, target: object) -> torch.fx.Node:
    return next(program.nodes(target))


def _refused(program: Program, rule: int, node: str = "", why: str = "") -> Malformed:
    with pytest.raises(Malformed, match=re.escape(why)) as caught:
        verify(program, after="some_pass")
    assert caught.value.rule == rule
    assert caught.value.node == node
    assert caught.value.after == "some_pass"
    if node:
        assert f"\n> {'return' if node == 'output' else node}" in str(caught.value)
    return caught.value


def test_good_programs_pass(program: Program, stepwise: Program) -> None:
    verify(program)
    verify(stepwise)


def test_verifying_changes_nothing(program: Program) -> None:
    environment = program.input(Role.TOKENS).meta["val"].fake_mode.shape_env
    guards, ranges, code = len(environment.guards), dict(environment.var_to_range), program.module.code
    verify(program)
    assert (len(environment.guards), dict(environment.var_to_range), program.module.code) == (guards, ranges, code)


def test_every_rule_stands_in_the_module_docstring() -> None:
    listed = re.findall(r"^(\d+)\. (.+)$", verifier.__doc__ or "", flags=re.MULTILINE)
    assert listed == [(str(number), rule.__doc__) for number, rule in RULES.items()]


def test_1_use_before_definition(program: Program) -> None:
    first, second = list(program.nodes(aten.linear.default))[:2]
    consumer = next(iter(second.users))
    first.prev.append(consumer)
    _refused(program, 1, consumer.name, f"uses {second.name} before it is computed")


def test_1_no_module_calls(program: Program) -> None:
    program.module.add_submodule("extra", torch.nn.Identity())
    add = _first(program, aten.add.Tensor)
    with program.graph.inserting_after(add):
        call = program.graph.call_module("extra", (add,))
    _refused(program, 1, call.name, "no call_module nodes")


def test_2_stale_shape(program: Program) -> None:
    node = _first(program, aten.linear.default)
    node.meta["val"] = node.meta["val"].new_empty(*node.meta["val"].shape[:2], 17)
    _refused(program, 2, node.name, "shape differs")


def test_2_swapped_symbols(program: Program) -> None:
    """Batch and sequence are told apart, although both are symbols."""
    node = _first(program, aten.linear.default)
    batch, sequence, width = node.meta["val"].shape
    node.meta["val"] = node.meta["val"].new_empty(sequence, batch, width)
    _refused(program, 2, node.name, "shape differs")


def test_2_stale_dtype(program: Program) -> None:
    node = _first(program, aten.linear.default)
    node.meta["val"] = node.meta["val"].to(torch.float16)
    _refused(program, 2, node.name, "dtype differs")


def test_2_stale_number(program: Program) -> None:
    node = _first(program, aten.sym_size.int)
    node.meta["val"] = 7
    _refused(program, 2, node.name, "number differs")


def test_2_missing_value(program: Program) -> None:
    node = _first(program, aten.linear.default)
    del node.meta["val"]
    _refused(program, 2, node.name, "carries no value")


def test_2_arguments_that_the_operator_does_not_take(program: Program) -> None:
    node = _first(program, aten.linear.default)
    weight = next(other for other in program.graph.nodes if other.name.endswith("down_proj_weight"))
    node.args = (node.args[0], weight)
    _refused(program, 2, node.name, "cannot be evaluated")


def test_2_tensor_of_another_shape(program: Program) -> None:
    name = next(iter(program.tensors()))
    owner, _, leaf = name.rpartition(".")
    delattr(program.module.get_submodule(owner), leaf)
    program.module.get_submodule(owner).register_buffer(leaf, torch.zeros(3))
    node = next(node for node in program.graph.nodes if node.target == name)
    _refused(program, 2, node.name, "shape differs")


def test_2_sizes_without_tensor_arguments_stay_symbolic(program: Program) -> None:
    """An operator on sizes alone is evaluated on fake tensors too, and is right as a function of the size."""
    last = program.output_node().args[0][0]
    size = _first(program, aten.sym_size.int)
    with provenance(program, "test"), program.graph.inserting_before(program.output_node()):
        rows = program.graph.call_function(aten.ones.default, ([size, 1, 32],), {"device": torch.device("cpu")})
        rows.meta["val"] = last.meta["val"].new_empty(size.meta["val"], 1, 32)
    program.output_node().args = ((rows,),)
    program.recompile()
    verify(program)
    rows.meta["val"] = last.meta["val"].new_empty(5, 1, 32)
    _refused(program, 2, rows.name, "shape differs")


@pytest.mark.parametrize("count", [1, 3])
def test_3_too_few_or_too_many_inputs(program: Program, count: int) -> None:
    program.inputs = (*program.inputs, Port("extra", Role.TENSOR))[:count]
    _refused(program, 3, why=f"{count} input ports for 2 placeholders")


def test_3_too_many_outputs(program: Program) -> None:
    program.outputs = (*program.outputs, Port("extra", Role.TENSOR))
    _refused(program, 3, "output", "2 output ports for 1 outputs")


def test_3_wrong_name(program: Program) -> None:
    program.inputs = (Port("words", Role.TOKENS), *program.inputs[1:])
    _refused(program, 3, "input_ids", "'words'")


def test_3_wrong_dtype_for_a_role(program: Program) -> None:
    program.outputs = (Port("output", Role.TOKENS),)
    _refused(program, 3, program.output_node().args[0][0].name, "role tokens requires int64 of 2 dimensions")


def test_3_wrong_rank_for_a_role(stepwise: Program) -> None:
    ports = (replace(port, role=Role.START) if port.role == Role.POSITIONS else port for port in stepwise.inputs)
    stepwise.inputs = tuple(ports)
    _refused(stepwise, 3, "position_ids", "role start requires int64 of 1 dimensions")


def test_4_slots_that_are_no_numbers(stepwise: Program) -> None:
    stepwise.inputs = tuple(replace(port, slot=-port.slot) if port.slot else port for port in stepwise.inputs)
    _refused(stepwise, 4, why="the slots are [0, -1], not a number of its own for each")


def test_9_a_continuation_with_a_cache_of_its_own(stepwise: Program) -> None:
    part = stepwise.copy()
    part.inputs = tuple(replace(port, slot=5) if port.slot == 1 else port for port in part.inputs)
    stepwise.continuations = (part,)
    _refused(stepwise, 9, why="continuation 0 has the buffer key_1")


def test_4_written_twice(stepwise: Program) -> None:
    _, second = stepwise.nodes(CACHED_ATTENTION)
    second.kwargs = {**second.kwargs, "slot": 0}
    _refused(stepwise, 4, second.name, "writes slot 0, but does not take")


def test_4_read_by_another_node(stepwise: Program) -> None:
    last = stepwise.output_node().args[0][0]
    with provenance(stepwise, "test"), stepwise.graph.inserting_before(stepwise.output_node()):
        mean = stepwise.graph.call_function(aten.mean.default, (stepwise.input(Role.CACHE_KEY, 1),))
        total = stepwise.graph.call_function(aten.add.Tensor, (last, mean))
    propagate(stepwise, [mean, total])
    stepwise.output_node().replace_input_with(last, total)
    _refused(stepwise, 4, mean.name, "which belongs to")


def test_4_caches_swapped(stepwise: Program) -> None:
    first, second = stepwise.nodes(CACHED_ATTENTION)
    second.args = (*second.args[:3], *first.args[3:5], *second.args[5:])
    _refused(stepwise, 4, second.name, "reads key_0")


def test_4_old_cache_returned(stepwise: Program) -> None:
    before, after = stepwise.input(Role.CACHE_KEY, 0), stepwise.output(Role.CACHE_KEY, 0)
    stepwise.output_node().replace_input_with(after, before)
    _refused(stepwise, 4, "output", "reads key_0")


def test_4_cache_output_missing(stepwise: Program) -> None:
    results = list(zip(stepwise.outputs, stepwise.output_node().args[0], strict=True))
    kept = [(port, node) for port, node in results if (port.role, port.slot) != (Role.CACHE_VALUE, 1)]
    stepwise.outputs = tuple(port for port, _ in kept)
    stepwise.output_node().args = (tuple(node for _, node in kept),)
    _refused(stepwise, 4, "value_1", "has no output")


def test_5_mutation(program: Program) -> None:
    node = _first(program, aten.add.Tensor)
    node.target = aten.add_.Tensor
    _refused(program, 5, node.name, "writes to its arguments")


def test_5_out_argument(program: Program) -> None:
    node = _first(program, aten.add.Tensor)
    node.target = aten.add.out
    node.kwargs = {**node.kwargs, "out": node.args[0]}
    _refused(program, 5, node.name, "writes to its arguments")


def test_5_mutation_inside_a_branch(program: Program) -> None:
    _with_condition(program)
    branch = program.module.get_submodule("no").graph
    node = next(node for node in branch.nodes if node.op == "call_function")
    node.target, node.args = aten.relu_.default, node.args[:1]
    _refused(program, 5, node.name, "writes to its arguments")


def _with_condition(program: Program, wide: bool = False) -> torch.fx.Node:
    """Put a condition before the output, whose second branch may return float64."""

    def graph_of(double: bool) -> torch.fx.GraphModule:
        graph = torch.fx.Graph()
        operand = graph.placeholder("operand")
        called = graph.call_function(aten.to.dtype, (operand, torch.float64 if double else torch.float32))
        graph.output((called,))
        return torch.fx.GraphModule({}, graph)

    last = program.output_node().args[0][0]
    program.module.add_submodule("yes", graph_of(False))
    program.module.add_submodule("no", graph_of(wide))
    with provenance(program, "test"), program.graph.inserting_before(program.output_node()):
        choice = program.graph.call_function(aten.any.default, (program.input(Role.TOKENS),))
        choice.meta["val"] = fake_value(choice)
        yes, no = program.graph.get_attr("yes"), program.graph.get_attr("no")
        condition = program.graph.call_function(torch.ops.higher_order.cond, (choice, yes, no, (last,)))
        condition.meta["val"] = (last.meta["val"],)
        result = program.graph.call_function(operator.getitem, (condition, 0))
        result.meta["val"] = last.meta["val"]
    program.output_node().replace_input_with(last, result)
    return condition


def test_6_branches_that_agree_pass_and_are_printed(program: Program) -> None:
    _with_condition(program)
    verify(program)
    space: dict = {}
    exec(readable(program), space)
    assert {"yes", "no", "program"} <= space.keys()


def test_6_branches_that_differ(program: Program) -> None:
    condition = _with_condition(program, wide=True)
    _refused(program, 6, condition.name, "dtype differs")


def test_7_dead_node(program: Program) -> None:
    add = _first(program, aten.add.Tensor)
    with provenance(program, "test"), program.graph.inserting_after(add):
        dead = program.graph.call_function(aten.neg.default, (add,))
    propagate(program, [dead])
    _refused(program, 7, dead.name, "has no user")


def test_7_dead_parameter(program: Program) -> None:
    program.module.register_buffer("forgotten", torch.zeros(2))
    _refused(program, 7, why="forgotten")


def test_8_no_provenance(program: Program) -> None:
    node = _first(program, aten.linear.default)
    node.meta = {"val": node.meta["val"]}
    _refused(program, 8, node.name, "where it came from")


@pytest.mark.slow
def test_twelve_layers_take_less_than_two_seconds() -> None:
    program = capture_huggingface(_llama(12))
    times = []
    for _ in range(2):
        begin = time.process_time()
        verify(program)
        times.append(time.process_time() - begin)
    assert min(times) < 2
