"""One cache slot for all iterations of a layer: what is decoded then, in plain loops over the model's modules."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from transformers import MistralConfig, MistralForCausalLM
from transformers.models.mistral.modeling_mistral import apply_rotary_pos_emb

from skipstone import Budget, FuseParallel, LayerParallel, Plan, QuantizeKV, Segment, optimize
from skipstone.errors import InvalidPlan, Unsupported
from skipstone.ir.capture.huggingface import capture_huggingface
from skipstone.ir.capture.module import capture_module
from skipstone.ir.cost import cost, evaluate, kv_bytes_per_token
from skipstone.ir.dialect import ATTENTION, CACHED_ATTENTION, KEEP, WRITE_CACHE
from skipstone.ir.errors import InternalError, Malformed
from skipstone.ir.program import Program, Role, module_path
from skipstone.ir.sequence import prove_cacheable
from skipstone.ir.verify import verify
from skipstone.passes.base import Status, run_pass
from skipstone.passes.kv_cache import InsertKVCache
from skipstone.rewrite import rewrite
from skipstone.runtime.eager import EagerSession
from skipstone.runtime.executable import Executable
from skipstone.runtime.onnx.session import OnnxSession
from skipstone.runtime.triton.lower import TWIN, lower
from skipstone.runtime.triton.session import TritonSession
from tests import models
from tests.newton_oracles import assert_close
from tests.versions import needs_group_query_attention

pytestmark = pytest.mark.usefixtures("one_thread")

WINDOW, LENGTH, LAYERS = 6, 19, 5
CHUNKS = (4, 1, 1, 5, 1, 2, 1, 1, 3)  # of the sequence, in the order in which they are read
POLICIES = ("iterate", "last", "final")
SHARED = {"last": (2, 3), "final": (2, 3, 4)}
"""Slots that are written several times, of two iterations of layers 1 to 4."""


@cache
def mistral(dtype: torch.dtype = torch.float64) -> MistralForCausalLM:
    """Grouped queries, and a window that is shorter than the sequences."""
    torch.manual_seed(0)
    sizes = {"vocab_size": models.VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": LAYERS}
    rest = {"max_position_embeddings": 64, "sliding_window": WINDOW, "initializer_range": 0.25}
    return MistralForCausalLM(MistralConfig(**sizes, **heads, **rest)).eval().to(dtype)


@cache
def captured(dtype: torch.dtype = torch.float64) -> Program:
    return capture_huggingface(mistral(dtype))


@cache
def program(segment: Segment, kv: Any, fuse: bool = False, dtype: torch.dtype = torch.float64) -> Program:
    plan = Plan([LayerParallel((segment,), kv), *([FuseParallel()] if fuse else [])])
    rewritten, refusal = rewrite(captured(dtype), plan, target="eager", strict=False)
    assert refusal is None
    return rewritten


def executable(segment: Segment, kv: Any, fuse: bool = False) -> Executable:
    return Executable(EagerSession(program(segment, kv, fuse)))


def tokens() -> Tensor:
    return models.tokens(2, LENGTH, seed=5)


def read(model: Any, ids: Tensor, sizes: Sequence[int] = CHUNKS) -> Tensor:
    """Logits [B, S, V] of a sequence that is read in chunks."""
    first, *rest = ids.split(list(sizes), dim=1)
    cache_ = model.new_cache(*ids.shape)
    return torch.cat([model.decode(chunk, cache_) for chunk in (first, *rest)], dim=1)


# The reference


class OneSlot:
    """The model with a segment at the same time, and one key and one value of each layer and token."""

    def __init__(self, segment: Segment, kv: str) -> None:
        self.model, self.segment, self.kv = mistral(), segment, kv
        empty = torch.zeros(2, 2, 0, 8, dtype=torch.float64)
        self.slots = [(empty, empty)] * LAYERS

    @torch.no_grad()
    def read(self, ids: Tensor) -> Tensor:
        """Logits of the next tokens."""
        h, number = self.model.model.embed_tokens(ids), 0
        while number < LAYERS:
            own = self.segment if self.segment.start == number else Segment(number, number + 1)
            h, kept = self.solve(h, own)
            for place, rows in enumerate(kept, number):
                self.slots[place] = tuple(torch.cat(pair, dim=2) for pair in zip(self.slots[place], rows, strict=True))
            number = own.stop
        return self.model.lm_head(self.model.model.norm(h))

    def solve(self, start: Tensor, segment: Segment) -> tuple[Tensor, list[Any]]:
        """The state behind a segment, and the keys and values that stay of each layer."""
        trace = [start] * (segment.stop - segment.start + 1)
        for _ in range(segment.iterations):
            new, rows = [start], []
            for n, number in enumerate(range(segment.start, segment.stop)):
                state, key, value = self.layer(number, trace[n])
                rows.append((key, value))
                change = new[n] - trace[n]
                new.append(state if segment.surrogate == "zero" else state + change)
            trace = new
        if self.kv == "final":
            rows = [self.layer(number, trace[n])[1:] for n, number in enumerate(range(segment.start, segment.stop))]
        return trace[-1], rows

    def layer(self, number: int, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A layer, and its keys and values, behind what is in its slot."""
        layer, (past_k, past_v) = self.model.model.layers[number], self.slots[number]
        x, rows, past = layer.input_layernorm(h), h.shape[1], past_k.shape[2]
        positions = torch.arange(past, past + rows)
        attention = layer.self_attn
        q, k, v = (
            each(x).unflatten(-1, (-1, 8)).transpose(1, 2)
            for each in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        q, k = apply_rotary_pos_emb(q, k, *self.model.model.rotary_emb(x, positions.expand(2, -1)))
        keys, values = (torch.cat(pair, dim=2).repeat_interleave(2, dim=1) for pair in ((past_k, k), (past_v, v)))
        columns = torch.arange(past + rows)
        seen = (columns <= positions[:, None]) & (columns > positions[:, None] - WINDOW)
        weights = (q @ keys.mT / 8**0.5).masked_fill(~seen, -torch.inf).softmax(-1)
        h = h + attention.o_proj((weights @ values).transpose(1, 2).flatten(2))
        return h + layer.mlp(layer.post_attention_layernorm(h)), k, v


@cache
def wanted(segment: Segment, kv: str, sizes: tuple[int, ...] = CHUNKS) -> Tensor:
    model = OneSlot(segment, kv)
    return torch.cat([model.read(chunk) for chunk in tokens().split(list(sizes), dim=1)], dim=1)


SEGMENTS = {
    "two of four": Segment(1, 5, 2), "three of four": Segment(0, 4, 3), "one of three": Segment(1, 4),
}  # fmt: skip


@pytest.mark.parametrize("segment", SEGMENTS.values(), ids=SEGMENTS)
@pytest.mark.parametrize("kv", ["last", "final"])
def test_decoding_is_the_loop_over_one_slot(kv: str, segment: Segment) -> None:
    assert_close(read(executable(segment, kv), tokens()), wanted(segment, kv), 1e-10)


@pytest.mark.parametrize("kv", ["last", "final"])
def test_fused_layers_keep_attentions_of_their_own(kv: str) -> None:
    segment = SEGMENTS["two of four"]
    assert_close(read(executable(segment, kv, fuse=True), tokens()), wanted(segment, kv), 1e-10)
    shared = [node.kwargs["slot"] for node in program(segment, kv, True).nodes(CACHED_ATTENTION)]
    assert Counter(shared) == {0: 1, 1: 1, 2: 2, 3: 2, 4: 1}


def test_jacobi_evaluates_each_layer_once_and_corrects_all_that_stays() -> None:
    segment = Segment(1, 5, 2, surrogate="zero")
    assert_close(read(executable(segment, "final"), tokens()), wanted(segment, "final"), 1e-10)
    last, iterate = (program(segment, kv) for kv in ("last", "iterate"))
    assert len(last.slots()) == len(iterate.slots()) == 1 + 2  # two layers are never evaluated
    assert torch.equal(read(executable(segment, "last"), tokens()), read(executable(segment, "iterate"), tokens()))


def test_sublayers_as_units_have_slots_too() -> None:
    """In two iterations, the keys of the last are those of the corrected states where the first iteration is exact."""
    segment = Segment(1, 3, 2, "sublayer")
    ids = tokens()
    found = {kv: read(executable(segment, kv), ids) for kv in POLICIES}
    assert all(float((found[kv] - found["iterate"]).abs().max()) > 1e-3 for kv in ("last", "final"))
    assert float((found["last"] - found["final"]).abs().max()) > 1e-3
    at_once = {kv: read(executable(segment, kv), ids, [LENGTH]) for kv in POLICIES}
    assert torch.equal(at_once["last"], at_once["iterate"]) and torch.equal(at_once["final"], at_once["iterate"])


@pytest.mark.parametrize("kv", POLICIES)
def test_as_many_iterations_as_layers_are_the_model(kv: str) -> None:
    segment, ids = Segment(1, 4, 3), tokens()
    with torch.no_grad():
        exact = mistral()(input_ids=ids, use_cache=False).logits
    assert_close(read(executable(segment, kv), ids), exact, 1e-12)
    assert len(program(segment, kv).slots()) == LAYERS


def test_one_iteration_leaves_no_choice_but_that_of_corrected_states() -> None:
    segment, ids = Segment(1, 5), tokens()
    iterate, last, final = (read(executable(segment, kv), ids) for kv in POLICIES)
    assert torch.equal(last, iterate)
    assert float((final - iterate).abs().max()) > 1e-2


@pytest.mark.parametrize("kv", ["last", "final"])
def test_what_is_read_at_once_is_the_same_and_what_is_read_in_steps_is_not(kv: str) -> None:
    segment, ids = Segment(1, 5, 2), tokens()
    at_once, iterate = (read(executable(segment, each), ids, [LENGTH]) for each in (kv, "iterate"))
    assert torch.equal(at_once, iterate)
    assert_close(read(executable(segment, "iterate"), ids), iterate, 1e-12)
    first, rest = at_once.split([CHUNKS[0], LENGTH - CHUNKS[0]], dim=1)
    steps = read(executable(segment, kv), ids)
    assert_close(steps[:, : CHUNKS[0]], first, 1e-12)
    assert float((steps[:, CHUNKS[0] :] - rest).abs().max()) > 1e-2


@cache
def generating() -> Any:
    """A model of transformers whose layers share a slot among their iterations."""
    plan = Plan([LayerParallel((Segment(1, 5, iterations=2),), "last")])
    with patch.object(import_module("skipstone.optimize"), "capture", lambda *_: captured()):
        return optimize(mistral(), plan, target="eager", progress=False)


@pytest.mark.parametrize(
    "options",
    [{"prompt_lookup_num_tokens": 2}, {"prefill_chunk_size": 3}, {"use_cache": False}],
    ids=lambda each: next(iter(each)),
)
def test_generation_by_several_tokens_a_step_is_refused(options: dict[str, Any]) -> None:
    """It would give other tokens than greedy decoding does."""
    ids, shared = models.tokens(1, 7), generating()
    assert shared.depends_on_step_sizes and shared.generate(ids, max_new_tokens=3).shape == (1, 10)
    with pytest.raises(Unsupported, match=r"by which several tokens a step give others than one.*kv='iterate'"):
        shared.generate(ids, max_new_tokens=3, **options)
    own = executable(Segment(1, 5, iterations=2), "iterate")
    assert not own.depends_on_step_sizes


def test_a_second_sequence_finds_nothing_of_the_first() -> None:
    model = executable(Segment(1, 5, 2), "last")
    first = read(model, tokens())
    read(model, models.tokens(2, 7, seed=9), [7])
    assert torch.equal(read(model, tokens()), first)


def test_sequences_of_several_lengths_keep_to_themselves() -> None:
    """Padded on the left, and continued from where each of them ends."""
    segment, ids = Segment(1, 5, 2), tokens()
    for kv in ("last", "final"):
        model = executable(segment, kv)
        mask = torch.ones_like(ids[:, :8])
        mask[1, :3] = 0
        logits, cache_ = model.prefill(ids[:, :8], mask)
        logits = torch.cat([logits[:, None], *(model.decode(ids[:, 8 + n : 9 + n], cache_) for n in range(4))], dim=1)
        for row, first in ((0, 0), (1, 3)):
            own = ids[row : row + 1, first:12].expand(2, -1)
            alone = read(model, own, [8 - first, 1, 1, 1, 1])
            assert_close(logits[row], alone[0, 7 - first :], 1e-12)


# What it takes


def test_a_layer_has_one_slot_and_the_bytes_of_one() -> None:
    segment = Segment(1, 5, 2)
    iterate, last, final = (program(segment, kv) for kv in POLICIES)
    before = kv_bytes_per_token(captured())
    assert [len(each.slots()) for each in (iterate, last, final)] == [LAYERS + 2, LAYERS, LAYERS]
    assert [kv_bytes_per_token(each) for each in (iterate, last, final)] == [before * 7 // 5, before, before]
    # Layers 2 and 3 are evaluated twice; of 3 and 4, the keys of corrected states are written once more.
    paths = [f"model.layers.{number}.self_attn" for number in (0, 1, 2, 3, 2, 3, 4)]
    for each in (last, final):
        assert [module_path(node) for node in each.nodes(CACHED_ATTENTION)] == paths
        assert [node.kwargs["slot"] for node in each.nodes(CACHED_ATTENTION)] == [0, 1, 2, 3, 2, 3, 4]
    assert [node.kwargs["slot"] for node in final.nodes(WRITE_CACHE)] == [3, 4]
    # What attention reads is what it was; beside a norm and two projections a layer, two writes are all that is new.
    costs = [evaluate(cost(each), batch=2, sequence=1, past=9) for each in (iterate, last, final)]
    assert costs[0] == costs[1]
    assert costs[2]["flops"] - costs[1]["flops"] == 2 * 2 * 2 * (2 * 32 * 16)
    assert costs[2]["kv_bytes"] == costs[1]["kv_bytes"]
    assert 0 < costs[2]["activation_bytes"] - costs[1]["activation_bytes"] < 2 * 10_000


def test_the_report_warns() -> None:
    warning, segment = "decoding token by token no longer equals reading all at once", Segment(1, 5, 2)
    found = {
        kv: [each.where for record in program(segment, kv).history for each in record.remarks if warning in each.why]
        for kv in POLICIES
    }
    assert found == {"iterate": []} | {kv: [f"slots {', '.join(map(str, slots))}"] for kv, slots in SHARED.items()}
    with patch.object(import_module("skipstone.optimize"), "capture", lambda *_: captured()):
        report = optimize(mistral(), Plan([LayerParallel((segment,), "final")]), target="eager", progress=False).report
    assert [each.where for each in report.remarks if warning in each.why] == found["final"]
    assert report.cache == f"{LAYERS} slots"
    assert "decoding token by token no longer" in str(report)  # a line of a narrow column


def test_without_a_cache_it_means_nothing() -> None:
    plan = Plan([LayerParallel((Segment(1, 5, 2),), "final")])
    found, _ = rewrite(captured(), plan, target="eager", cache=False)
    remarks = [remark for record in found.history for remark in record.remarks]
    said = [each for each in remarks if each.where == "kv='final'"]
    assert [(each.status, each.why) for each in said] == [(Status.MISSED, "without a cache, no keys and values stay")]
    assert not any(True for _ in found.nodes(KEEP))
    iterate, _ = rewrite(captured(), Plan([LayerParallel((Segment(1, 5, 2),))]), target="eager", cache=False)
    assert sum(1 for _ in found.nodes()) == sum(1 for _ in iterate.nodes())
    assert not any(each.where.startswith("kv=") for record in iterate.history for each in record.remarks)


def test_plans_say_which_policy(tmp_path: Path) -> None:
    for kv in POLICIES:
        plan = Plan([LayerParallel((Segment(1, 5, 2),), kv)])  # type: ignore[arg-type]
        plan.save(tmp_path / "plan.json")
        assert Plan.load(tmp_path / "plan.json").entries == plan.entries
    with pytest.raises(InvalidPlan, match="kv must be one of 'iterate', 'last', 'final'"):
        Plan([LayerParallel((Segment(1, 5, 2),), "first")])  # type: ignore[arg-type]


# Targets


@pytest.mark.slow
@needs_group_query_attention
@pytest.mark.parametrize("kv", ["last", "final"])
def test_onnx_runtime_writes_one_buffer_several_times(kv: str) -> None:
    """Also where one query of one sequence reads its window alone, which has a form of its own."""
    written = written_by_onnx_runtime(kv)
    assert {name: number for name, number in written.items() if number > 1} == {
        f"{which}_{slot}": 2 + (kv == "final" and slot == 3) for which in ("key", "value") for slot in SHARED[kv]
    }


@pytest.mark.slow  # lowered for ONNX Runtime, in plain operators
@pytest.mark.parametrize("kv", ["last", "final"])
def test_attention_in_plain_operators_reads_before_the_next_write(kv: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("skipstone.runtime.onnx.forms.takes_counts", lambda: False)
    assert set(written_by_onnx_runtime(kv).values()) == {1}


def written_by_onnx_runtime(kv: str) -> Counter[str]:
    """How often each buffer is written, where steps of several tokens and of one are those of the interpreter."""
    own = program(Segment(1, 5, 2), kv, kv == "final", torch.float32)
    eager, model = Executable(EagerSession(own)), Executable(OnnxSession(own, 1))
    written = Counter(model.session.lowered.written.values())  # type: ignore[attr-defined]
    for ids in (tokens(), models.tokens(1, 24, seed=6)):
        sizes = [*CHUNKS, *[1] * (ids.shape[1] - LENGTH)]
        mine, other = (each.new_cache(*ids.shape) for each in (model, eager))
        places = {name: buffer.data_ptr() for name, buffer in mine.buffers.items()}
        for chunk in ids.split(sizes, dim=1):
            assert_close(model.decode(chunk, mine), eager.decode(chunk, other), 1e-5)
        assert places == {name: buffer.data_ptr() for name, buffer in mine.buffers.items()}
        for name, buffer in other.buffers.items():
            rows = slice(ids.shape[1])
            assert_close(mine.buffers[name][:, :, rows], buffer[:, :, rows], 1e-5)
        assert_close(model(input_ids=ids).logits, eager(input_ids=ids).logits, 1e-5)
    return written


@pytest.mark.parametrize("kv", ["last", "final"])
def test_the_triton_target_writes_one_buffer_several_times(kv: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is lowered, without Inductor."""
    monkeypatch.setattr(torch, "compile", lambda module, **_: module)
    own = program(Segment(1, 5, 2), kv, kv == "final", torch.float32)
    lowered = lower(own)
    assert [port.name for port in lowered.outputs] == ["logits"]
    assert len(list(lowered.nodes(TWIN))) == len(list(own.nodes(CACHED_ATTENTION)))
    eager, model = Executable(EagerSession(own)), Executable(TritonSession(own), target="triton")
    mine, other = (each.new_cache(2, LENGTH) for each in (model, eager))
    for chunk in tokens().split(list(CHUNKS), dim=1):
        assert_close(model.decode(chunk, mine), eager.decode(chunk, other), 1e-5)
    for name, buffer in other.buffers.items():
        assert_close(mine.buffers[name][:, :, :LENGTH], buffer[:, :, :LENGTH], 1e-5)


@pytest.mark.slow
def test_inductor_keeps_the_order_of_writes() -> None:
    own = program(Segment(1, 5, 2), "final", False, torch.float32)
    eager, model = Executable(EagerSession(own)), Executable(TritonSession(own), target="triton")
    assert_close(read(model, tokens()), read(eager, tokens()), 1e-5)


# What is refused


def test_formats_of_a_shared_slot_are_refused() -> None:
    plan = Plan([LayerParallel((Segment(1, 5, 2),), "last"), QuantizeKV(granularity="token", condition=False)])
    with pytest.raises(Unsupported, match=r"several iterations write at model\.layers\.2\.self_attn.*kv='iterate'"):
        rewrite(captured(), plan, target="eager")
    alone = Plan([LayerParallel((Segment(1, 5),), "last"), QuantizeKV(granularity="token", condition=False)])
    rewrite(captured(), alone, target="eager", strict=False)


def test_a_budget_is_refused() -> None:
    plan, data = Plan([LayerParallel((Segment(1, 5, 2),), "last")]), [models.tokens(8, 12)]
    with pytest.raises(Unsupported, match=r"proved as they are read at once.*kv='iterate'"):
        optimize(mistral(), plan, calibration=data, budget=Budget(nll=1.0), target="eager", progress=False)


class Twice(nn.Module):
    """Layers whose second attention has keys and values that the first one makes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 8), nn.Linear(8, 11)
        self.layers = nn.ModuleList(nn.Linear(8, 24) for _ in range(6))

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> dict[str, Tensor]:
        x = self.embed(input_ids) + position_ids.unsqueeze(-1) / 9
        for first, second in zip(self.layers[::2], self.layers[1::2], strict=True):
            inner = x
            for layer in (first, second):
                q, k, v = (each.unflatten(-1, (2, 4)).transpose(1, 2) for each in layer(inner).chunk(3, dim=-1))
                inner = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
            x = x + inner
        return {"logits": self.head(x)}


def test_keys_that_another_attention_makes_are_refused() -> None:
    """To have them of the corrected state, that attention would have to be evaluated once more."""
    inputs = {"input_ids": torch.ones(2, 5, dtype=torch.int64), "position_ids": torch.arange(5).expand(2, -1)}
    found = capture_module(Twice().eval(), inputs)
    for kv in ("iterate", "last"):
        rewrite(found, Plan([LayerParallel((Segment(0, 3, 2),), kv)]), target="eager")  # type: ignore[arg-type]
    with pytest.raises(Unsupported, match="keys that another attention of the layer makes"):
        rewrite(found, Plan([LayerParallel((Segment(0, 3, 2),), "final")]), target="eager")


# The verifier


def links(found: Program) -> list[fx.Node]:
    """The two attentions that write slot 2."""
    return [node for node in found.nodes(CACHED_ATTENTION) if node.kwargs["slot"] == 2]


BROKEN = ("skips a link", "takes another slot", "read inside", "leaves before the end", "keys and values swapped")


@pytest.mark.parametrize("case", BROKEN)
def test_broken_chains_are_found(case: str) -> None:
    found = program(Segment(1, 5, 2), "last").copy()
    verify(found)
    first, second = links(found)
    between = [user for user in first.users if user.args[1] > 0]  # type: ignore[operator]
    if case == "skips a link":
        second.args = (*second.args[:3], *first.args[3:5], *second.args[5:])
        expected = f"reads key_2, which belongs to {first.name}"
    elif case == "takes another slot":
        other = found.input(Role.CACHE_KEY, 1), found.input(Role.CACHE_VALUE, 1)
        second.args = (*second.args[:3], *other, *second.args[5:])
        expected = "reads key_1, which belongs to"
    elif case == "read inside":
        with found.graph.inserting_before(second):
            total = found.call(torch.ops.aten.sum.default, between[0])
            q = found.call(torch.ops.aten.add.Tensor, second.args[0], total)
        for node in (total, q):
            node.meta["made_by"] = ("test",)
        second.args = (q, *second.args[1:])
        expected = f"reads {between[0].name}, which belongs to {second.name}"
    elif case == "leaves before the end":
        last = found.output(Role.CACHE_KEY, 2)
        assert last is not None and last.target is operator.getitem
        found.output_node().replace_input_with(last, between[0])
        expected = f"reads {between[0].name}, which belongs to {second.name}"
    else:
        second.args = (*second.args[:3], between[1], between[0], *second.args[5:])
        expected = f"writes slot 2, but does not take {between[0].name}"
    with pytest.raises(Malformed, match=expected) as caught:
        verify(found)
    assert caught.value.rule == 4


def test_keys_that_are_no_rows_are_found() -> None:
    """What stays in the cache must be made token by token, like all else."""
    found = run_pass(LayerParallel((Segment(1, 5, 2),), "final"), captured())
    prove_cacheable(found)
    found = found.copy()
    keep = next(found.nodes(KEEP))
    with found.graph.inserting_before(keep):
        flipped = found.call(torch.ops.aten.transpose.int, keep.args[1], 1, 2)
    keep.args = (keep.args[0], flipped, keep.args[2])
    with pytest.raises(Unsupported, match="something other than the sequence stay in the cache"):
        prove_cacheable(found)


def test_attentions_of_the_model_never_share() -> None:
    found = captured().copy()
    first, second, *_ = found.nodes(ATTENTION)
    second.kwargs = {**second.kwargs, "slot": first.kwargs["slot"]}
    with pytest.raises(InternalError, match=f"{second.name} has the number of another attention, 0"):
        run_pass(InsertKVCache(), found)
