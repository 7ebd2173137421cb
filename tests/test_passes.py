"""Rewrites against their oracles: hooks on the original model, one-shot against stepwise, planted redundancy."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from skipstone.ir.capture.huggingface import capture_huggingface
from skipstone.ir.capture.module import capture_module
from skipstone.ir.capture.validate import relative_difference
from skipstone.ir.dialect import ATTENTION, CACHED_ATTENTION
from skipstone.ir.errors import InvalidPlan, Unsupported
from skipstone.ir.program import Program, Role
from skipstone.ir.stream import find_stream
from skipstone.passes.base import Pipeline, Status, run_pass
from skipstone.passes.cast import CastToFloat32
from skipstone.passes.cleanup import Cleanup
from skipstone.passes.kv_cache import InsertKVCache
from skipstone.passes.skip_sublayers import SkipSublayers
from tests import models

TOLERANCE = 1e-5
CACHED = tuple(name for name in models.CAUSAL if name != "llama4")


def logits(program: Program, tokens: Tensor) -> Tensor:
    """One-shot logits of an uncached program."""
    positions = torch.arange(tokens.shape[1]).repeat(len(tokens), 1)
    with torch.no_grad():
        return program.run(input_ids=tokens, position_ids=positions)["logits"]


@contextmanager
def without(model: nn.Module, paths: list[str]) -> Iterator[None]:
    """The original model with the results of some modules replaced by zeros."""

    def zero(module: nn.Module, args: Any, out: Any) -> Any:
        first, *rest = out if isinstance(out, tuple) else (out,)
        return (torch.zeros_like(first), *rest) if isinstance(out, tuple) else torch.zeros_like(first)

    hooks = [model.get_submodule(path).register_forward_hook(zero) for path in paths]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "gpt_neox", "llama4"])
@pytest.mark.parametrize("chosen", [(0,), (-1,), (0, -1), (1, 2)])
def test_skipping_equals_zeroing_the_branch_in_the_model(name: str, chosen: tuple[int, ...]) -> None:
    program, model, tokens = models.program(name), models.model(name), models.tokens(2, 13)
    paths = [find_stream(program).sublayers[index].path for index in chosen]
    skipped = run_pass(SkipSublayers(paths=tuple(paths)), program)
    with without(model, paths), torch.no_grad():
        expected = model(input_ids=tokens, use_cache=False).logits
    assert relative_difference(logits(skipped, tokens), expected) < TOLERANCE
    applied = [remark.where for remark in skipped.history[-1].remarks if remark.status is Status.APPLIED]
    assert sorted(applied) == sorted([*paths, "model"])


def test_skipping_drops_weights_and_norm_but_not_what_is_shared() -> None:
    program = models.program("llama")
    skipped = run_pass(SkipSublayers(attention=(1,)), program)
    gone = set(program.tensors()) - set(skipped.tensors())
    assert gone == {
        *(f"model.layers.1.self_attn.{part}_proj.weight" for part in "qkvo"),
        "model.layers.1.input_layernorm.weight",
    }


def test_planted_redundancy_costs_nothing() -> None:
    model = copy.deepcopy(models.model("llama"))
    nn.init.zeros_(model.get_submodule("model.layers.1.self_attn.o_proj").weight)
    program, tokens = capture_huggingface(model), models.tokens(2, 13)
    skipped = run_pass(SkipSublayers(attention=(1,)), program)
    assert torch.equal(logits(skipped, tokens), logits(program, tokens))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (SkipSublayers(layers=(3,)), "layers 0 to 2"),
        (SkipSublayers(paths=("model.layers.1.self_atn",)), r"nearest is 'model\.layers\.1\.self_attn'"),
        (SkipSublayers(layers=(0, 1, 2)), "every sublayer"),
    ],
)
def test_impossible_skips_are_refused_before_anything_is_changed(entry: SkipSublayers, message: str) -> None:
    program = models.program("llama")
    before = len(list(program.nodes()))
    with pytest.raises(InvalidPlan, match=message):
        run_pass(entry, program)
    assert len(list(program.nodes())) == before


class Growing(nn.Module):
    """The second sublayer's result gives the stream another shape or dtype; the first and the third do not."""

    def __init__(self, grow: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layers, self.grow = nn.ModuleList(nn.Linear(4, 4) for _ in range(3)), grow

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.layers[0](x)
        x = x + self.grow(self.layers[1](x))
        return x + self.layers[2](x.float()).to(x.dtype)


@pytest.mark.parametrize("grow", [Tensor.double, lambda x: x.expand(3, *x.shape)])
def test_a_sublayer_that_gives_the_stream_its_form_stays(grow: Callable[[Tensor], Tensor]) -> None:
    module, x = Growing(grow).eval(), torch.randn(2, 5, 4)
    program = capture_module(module, {"x": x})
    with pytest.raises(Unsupported, match="another shape or dtype"):
        run_pass(SkipSublayers(paths=("layers.1",)), program)
    skipped = run_pass(SkipSublayers(paths=("layers.2",)), program).run(x=x)["output"]
    before = x + module.layers[0](x)
    torch.testing.assert_close(skipped, before + grow(module.layers[1](before)))


class Stepper:
    """Runs a cached program with its own buffers."""

    def __init__(self, program: Program, batch: int, capacity: int) -> None:
        self.program, self.buffers = program, {}
        placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
        for port, node in zip(program.inputs, placeholders, strict=True):
            if port.slot is not None:
                heads, width = int(node.meta["val"].shape[1]), int(node.meta["val"].shape[3])
                self.buffers[port.name] = torch.zeros(batch, heads, capacity, width, dtype=node.meta["val"].dtype)

    @torch.no_grad()
    def __call__(self, tokens: Tensor, start: Tensor) -> Tensor:
        rows = torch.arange(tokens.shape[1]).repeat(len(tokens), 1)
        values = {"input_ids": tokens, "position_ids": start[:, None] + rows, "start": start, "logit_rows": rows}
        out = self.program.run(**values, **self.buffers)
        self.buffers = {name: out[f"new_{name}"] for name in self.buffers}
        return out["logits"]


@pytest.fixture(scope="module")
def cached() -> dict[str, Program]:
    return {name: Pipeline([Cleanup(), InsertKVCache(), Cleanup()]).run(models.program(name)) for name in CACHED}


@pytest.mark.parametrize("name", CACHED)
@pytest.mark.parametrize("prompt", [1, 12])
def test_stepwise_decode_equals_one_shot(cached: dict[str, Program], name: str, prompt: int) -> None:
    tokens = models.tokens(2, 21)
    step = Stepper(cached[name], batch=2, capacity=24)
    parts = [step(tokens[:, :prompt], torch.zeros(2, dtype=torch.int64))]
    for position in range(prompt, 21):
        parts.append(step(tokens[:, position : position + 1], torch.full((2,), position)))
    assert relative_difference(torch.cat(parts, 1), logits(models.program(name), tokens)) < TOLERANCE


@pytest.mark.parametrize("name", CACHED)
def test_ragged_rows_equal_their_own_runs(cached: dict[str, Program], name: str) -> None:
    """Right-padded prompts of 5 and 11 tokens, then one step at different positions."""
    tokens, lengths = models.tokens(2, 12), torch.tensor([5, 11])
    step = Stepper(cached[name], batch=2, capacity=24)
    step(tokens[:, :11], torch.zeros(2, dtype=torch.int64))
    after = step(tokens[torch.arange(2), lengths][:, None], lengths)
    for row, length in enumerate(lengths.tolist()):
        alone = logits(models.program(name), tokens[row : row + 1, : length + 1])
        assert relative_difference(after[row, 0], alone[0, -1]) < TOLERANCE


def test_slots_are_dense_after_skipping() -> None:
    program = Pipeline([SkipSublayers(attention=(1,)), InsertKVCache()]).run(models.program("llama"))
    assert program.slots() == (0, 1)
    assert [node.kwargs["slot"] for node in program.nodes(CACHED_ATTENTION)] == [0, 1]
    assert not list(program.nodes(ATTENTION))


def test_a_model_that_counts_positions_itself_gets_no_cache() -> None:
    """Llama 4 scales the queries of its position-free layers by a counter of its own."""
    with pytest.raises(Unsupported, match=r"counts itself.*model\.layers\.2\.self_attn"):
        run_pass(InsertKVCache(), models.program("llama4"))


def test_a_bidirectional_model_gets_no_cache() -> None:
    with pytest.raises(Unsupported):
        run_pass(InsertKVCache(), models.program("bert"))


def test_cleanup_is_idempotent_and_exact() -> None:
    program, tokens = models.program("gemma2"), models.tokens(1, 10)
    once = run_pass(Cleanup(), program)
    twice = run_pass(Cleanup(), once)
    assert once.history[-1].nodes_after < once.history[-1].nodes_before
    assert twice.history[-1].nodes_after == once.history[-1].nodes_after
    assert relative_difference(logits(once, tokens), logits(program, tokens)) < TOLERANCE


def test_half_precision_becomes_the_same_model_in_float32() -> None:
    half = copy.deepcopy(models.model("llama")).to(torch.bfloat16)
    program = run_pass(CastToFloat32(), capture_huggingface(half))
    assert {tensor.dtype for tensor in program.tensors().values()} == {torch.float32}
    assert program.input(Role.TOKENS) is not None
    tokens = models.tokens(2, 9)
    with torch.no_grad():
        expected = half.float()(input_ids=tokens, use_cache=False).logits
    assert relative_difference(logits(program, tokens), expected) < TOLERANCE


def test_bisecting_stops_after_the_named_pass() -> None:
    program = Pipeline([Cleanup(), InsertKVCache()], stop_after="cleanup").run(models.program("llama"))
    assert [record.name for record in program.history] == ["cleanup"]
    with pytest.raises(InvalidPlan, match="stop_after"):
        Pipeline([Cleanup()], stop_after="no_such_pass")


def test_a_plan_entry_that_applies_nowhere_is_an_error_when_strict() -> None:
    with pytest.raises(InvalidPlan, match="applied nowhere"):
        run_pass(SkipSublayers(), models.program("llama"))
    lenient = run_pass(SkipSublayers(), models.program("llama"), strict=False)
    assert [remark.status for remark in lenient.history[-1].remarks] == [Status.MISSED]
