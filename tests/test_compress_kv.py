"""Compressed caches, end to end: the matrix that every pass must meet, against the user's model under masks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import skipstone
from skipstone import (
    CompressKV,
    FormatChoice,
    Plan,
    QuantizeKV,
    QuantizeWeights,
    SelfSpeculate,
    SkipSublayers,
    StreamingHeads,
)
from skipstone.errors import InvalidInput
from skipstone.ir.capture.validate import relative_difference
from skipstone.ir.dialect import CACHED_ATTENTION, QUANTIZED_CACHED_ATTENTION, WINDOWED_ATTENTION
from skipstone.ir.windowed import STEP, window_rows
from skipstone.passes.base import Status
from skipstone.rewrite import rewrite
from skipstone.runtime.executable import Executable
from skipstone.runtime.triton import compiled
from skipstone.runtime.triton.session import TritonSession
from tests import compress_cases as cases
from tests import models
from tests.compress_cases import CASES, KV_HEADS, TARGETS, captured, executable, model, optimized, reference, tokens
from tests.versions import skip_without_group_query_attention

pytestmark = pytest.mark.usefixtures("one_thread")

TOLERANCE = 1e-4
"""Largest difference of logits in float32, over their range."""

CELLS = [("mha", "some heads"), ("gqa", "some heads"), ("gqa", "all"), ("gqa", "one layer")]


def difference(found: Tensor, wanted: Tensor) -> float:
    return relative_difference(found.detach(), wanted)


# ----------------------------------------------------------------------------------------------------------- the matrix


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("heads", "case"), CELLS)
def test_prefill_and_decode_see_the_window(heads: str, case: str, target: str) -> None:
    """Long enough that rings turn over, in prompts of several steps and of one, twice."""
    opt = executable(heads, case, target)
    rows = tokens(2, 2 * STEP + 60)
    wanted = torch.stack([reference(heads, case, each) for each in rows])
    plain = torch.stack([model(heads)(each[None]).logits[0] for each in rows])
    assert difference(plain, wanted) > 0.01, "the window changes nothing"
    for prompt in (2 * STEP + 20, 30, 30):
        logits, cache = opt.prefill(rows[:, :prompt])
        assert difference(logits, wanted[:, prompt - 1]) < TOLERANCE
        for place in range(prompt, prompt + 12):
            logits = opt.decode(rows[:, place], cache)
            assert difference(logits, wanted[:, place]) < TOLERANCE, place
    logits = opt.decode(rows[:, prompt + 12 :], cache)  # many at a time
    assert difference(logits, wanted[:, prompt + 12 :]) < TOLERANCE
    assert difference(opt(rows).logits, wanted) < TOLERANCE


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_never_seen(side: str, target: str) -> None:
    opt, width = executable("gqa", "some heads", target), 2 * STEP + 30
    lengths = (width, STEP + 10, 20)
    rows, mask = tokens(3, width), torch.zeros(3, width, dtype=torch.int64)
    for number, length in enumerate(lengths):
        mask[number, slice(width - length, None) if side == "left" else slice(length)] = 1
    found = opt(rows, attention_mask=mask).logits
    later = tokens(3, 3, seed=1)
    _, cache = opt.prefill(rows, mask)
    step = opt.decode(later, cache)
    for number in range(3):
        own = rows[number][mask[number] == 1]
        wanted = reference("gqa", "some heads", torch.cat([own, later[number]]))
        assert difference(found[number][mask[number] == 1], wanted[: len(own)]) < TOLERANCE
        assert difference(step[number], wanted[len(own) :]) < TOLERANCE


@pytest.mark.parametrize("heads", KV_HEADS)
def test_bfloat16_is_as_near_as_the_model_is(heads: str) -> None:
    rows = tokens(1, STEP + 40)
    exact = reference(heads, "some heads", rows[0], torch.float64)
    own = reference(heads, "some heads", rows[0], torch.bfloat16).double()
    found = executable(heads, "some heads", "eager", torch.bfloat16)(rows).logits[0].double()
    assert (found - exact).norm() <= 1.5 * (own - exact).norm()


@pytest.mark.parametrize("target", TARGETS)
def test_generate_writes_what_the_masked_model_writes(target: str) -> None:
    opt, rows = executable("gqa", "some heads", target), tokens(1, 30)
    written = opt.generate(rows, max_new_tokens=STEP + 20, do_sample=False)
    wanted = reference("gqa", "some heads", written[0]).argmax(-1)
    assert torch.equal(written[0, 30:], wanted[29:-1])
    beams: dict[str, Any] = {"max_new_tokens": 20, "num_beams": 3, "do_sample": False}
    with cases.masked("gqa", "some heads") as own:
        wanted = own.generate(rows, use_cache=False, **beams)
    assert torch.equal(opt.generate(rows, **beams), wanted)


def test_a_saved_executable_and_a_saved_cache_go_on(tmp_path: Path) -> None:
    opt, rows = executable("gqa", "some heads", "onnxruntime"), tokens(2, STEP + 50)
    opt.save(tmp_path / "artifact")
    loaded = skipstone.load(tmp_path / "artifact")
    assert loaded.plan == opt.plan
    wanted, cache = opt.prefill(rows)
    found, own = loaded.prefill(rows)
    assert torch.equal(found, wanted)
    own.save(tmp_path / "cache")
    again = loaded.load_cache(tmp_path / "cache")
    following = tokens(2, 1, seed=3)[:, 0]
    # A cache of another capacity: ONNX Runtime before 1.32 sums zeros for its masked columns in another order.
    assert difference(loaded.decode(following, again), opt.decode(following, cache)) < 1e-6


# --------------------------------------------------------------------------------------------------- the Triton target


@pytest.mark.parametrize("compiles", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_on_the_triton_target(compiles: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU: the same graphs, as they are and through Inductor. Windows are written in place."""
    if not compiles:
        monkeypatch.setattr(compiled.torch, "compile", lambda module, **_options: module)
    opt = on_triton()
    rows, lengths = tokens(2, STEP + 60), (STEP + 30, STEP - 20)
    mask = torch.zeros(2, STEP + 30, dtype=torch.int64)
    for number, length in enumerate(lengths):
        mask[number, -length:] = 1
    logits, cache = opt.prefill(rows[:, : STEP + 30], mask)
    places = {name: buffer.data_ptr() for name, buffer in cache.buffers.items()}
    texts = [rows[number, STEP + 30 - length : STEP + 30] for number, length in enumerate(lengths)]
    for place in range(STEP + 30, STEP + 34):
        for number, text in enumerate(texts):
            assert difference(logits[number], reference("gqa", "some heads", text)[-1]) < TOLERANCE
        texts = [torch.cat([text, rows[number, place : place + 1]]) for number, text in enumerate(texts)]
        logits = opt.decode(rows[:, place], cache)
    assert places == {name: buffer.data_ptr() for name, buffer in cache.buffers.items()}
    wanted = executable("gqa", "some heads").generate(rows[:, :20], max_new_tokens=STEP + 20, do_sample=False)
    for _ in range(2):
        assert torch.equal(opt.generate(rows[:, :20], max_new_tokens=STEP + 20, do_sample=False), wanted)


def on_triton() -> Any:
    """An executable of that target for a model on the CPU, which `optimize` gives for a CUDA device alone."""
    plan = Plan([CASES["some heads"].entry])
    program, _ = rewrite(captured("gqa").copy(), plan, target="triton")
    own = model("gqa")
    options: dict[str, Any] = {"config": own.config, "generation_config": own.generation_config}
    return Executable(TritonSession(program), target="triton", plan=plan, **options)


# ------------------------------------------------------------------------------------------------------------ the cache


def test_the_cache_does_not_grow() -> None:
    opt = executable("gqa", "all")
    sizes = {length: opt.prefill(tokens(1, length))[1].nbytes for length in (5, 100, 400)}
    rows = window_rows(20, 4)
    assert set(sizes.values()) == {cases.LAYERS * 2 * KV_HEADS["gqa"] * rows * 8 * 4}
    before, after = opt.report.before, opt.report.after
    assert (before.kv_bytes_fixed, after.kv_bytes_per_token) == (0, 0)
    assert after.kv_bytes_fixed == sizes[5]


def test_some_heads_keep_all() -> None:
    opt = executable("gqa", "some heads")
    assert opt.report.before.kv_bytes_per_token == 3 * 2 * 2 * 8 * 4
    assert opt.report.after.kv_bytes_per_token == (1 + 2) * 2 * 8 * 4  # a head of layer 0, and layer 1
    assert opt.report.after.kv_bytes_fixed == (1 + 2) * 2 * 8 * 4 * window_rows(9, 3)


@pytest.mark.parametrize("target", TARGETS)
def test_cropping_goes_as_far_as_the_ring_reaches(target: str) -> None:
    opt, rows = executable("gqa", "some heads", target), tokens(1, 2 * STEP)
    wanted = reference("gqa", "some heads", rows[0])
    _, cache = opt.prefill(rows)
    for length in (2 * STEP - 50, STEP):
        cache.crop(length)
        assert difference(opt.decode(rows[:, length], cache)[0], wanted[length]) < TOLERANCE
    with pytest.raises(InvalidInput, match=rf"crop to \[{STEP - 1}\] rows .* keeps the last {9 + STEP - 1} alone"):
        cache.crop(STEP - 1)
    _, cache = opt.prefill(rows[:, : STEP - 5])
    cache.crop(3)  # all of it is there yet
    assert difference(opt.decode(rows[:, 3:60], cache)[0], wanted[3:60]) < TOLERANCE


@pytest.mark.parametrize("target", TARGETS)
def test_sequences_are_reordered_whole(target: str) -> None:
    opt, rows = executable("gqa", "some heads", target), tokens(3, STEP + 30)
    _, cache = opt.prefill(rows)
    cache.select([2, 0, 2])
    found = opt.decode(torch.tensor([7, 8, 9]), cache)
    for number, (row, token) in enumerate(((2, 7), (0, 8), (2, 9))):
        wanted = reference("gqa", "some heads", torch.cat([rows[row], torch.tensor([token])]))
        assert difference(found[number], wanted[-1]) < TOLERANCE


def test_a_session_takes_no_longer_steps() -> None:
    opt = executable("gqa", "all")
    rows, session = tokens(1, STEP + 1), opt.session
    cache = session.new_cache(1, 400)
    zero = torch.zeros(1, 1, dtype=torch.int64)
    with pytest.raises(InvalidInput, match=f"a step of {STEP + 1} tokens, the cache takes {STEP} at a time"):
        session.step(rows, rows, torch.tensor([STEP + 1]), zero, cache)


# ------------------------------------------------------------------------------------------------- windows of the model


@pytest.mark.parametrize("target", [pytest.param("onnxruntime", marks=pytest.mark.slow), "eager"])
@pytest.mark.parametrize("name", ["gemma2", "mixtral", "gpt_oss"])
def test_windows_that_a_model_has_are_exact(name: str, target: Any) -> None:
    """Soft caps, sink logits, and layers with and without a window."""
    opt = skipstone.optimize(models.model(name), Plan([CompressKV()]), target=target, progress=False, threads=1)
    kinds = [node.kwargs["kind"] for node in opt.program.nodes(CACHED_ATTENTION)]
    assert kinds == ["causal"] * (0 if name == "mixtral" else 1)
    assert len(list(opt.program.nodes(WINDOWED_ATTENTION))) == 3 - len(kinds)
    rows = models.tokens(2, 90)
    with torch.no_grad():
        wanted = models.model(name)(rows).logits
    logits, cache = opt.prefill(rows[:, :50])
    assert difference(logits, wanted[:, 49]) < TOLERANCE
    assert difference(opt.decode(rows[:, 50], cache), wanted[:, 50]) < TOLERANCE
    assert difference(opt.decode(rows[:, 51:], cache), wanted[:, 51:]) < TOLERANCE
    (remark, *_) = [each for each in opt.report.remarks if each.pass_name == "compress_kv"]
    assert remark.why == "the newest 8 tokens are kept, which is all that they see"


def test_a_window_for_the_others_leaves_the_models_own() -> None:
    opt = skipstone.optimize(
        models.model("gemma2"), Plan([CompressKV(window=12, sinks=2)]), target="eager", progress=False
    )
    found = [(node.kwargs["window"], node.kwargs["first"]) for node in opt.program.nodes(WINDOWED_ATTENTION)]
    assert found == [(8, 0), (12, 2), (8, 0)]


# ------------------------------------------------------------------------------------------------------------ the graph


def test_heads_are_split_by_what_they_keep() -> None:
    program = executable("gqa", "some heads").program
    nodes = [*program.nodes(CACHED_ATTENTION, WINDOWED_ATTENTION)]
    found = [(node.meta["layer"], node.meta.get("heads"), node.target is WINDOWED_ATTENTION) for node in nodes]
    assert found == [(0, (1,), True), (0, (0,), False), (1, None, False), (2, None, True)]
    report = executable("gqa", "some heads").report
    applied = [each for each in report.remarks if each.pass_name == "compress_kv" and each.status is Status.APPLIED]
    assert [each.why for each in applied] == [
        "of heads 1 the newest 9 tokens and the first 3 are kept", "the newest 9 tokens and the first 3 are kept",
    ]  # fmt: skip
    assert {each.numbers["cache_rows"] for each in applied} == {window_rows(9, 3)}


def test_a_plan_is_carried_out_again_from_its_file(tmp_path: Path) -> None:
    plan = Plan([CASES["some heads"].entry])
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan


# ------------------------------------------------------------------------------------------------------- other rewrites


@pytest.mark.parametrize("target", ["eager", pytest.param("onnxruntime", marks=pytest.mark.slow)])
def test_the_other_heads_can_be_quantized(target: str) -> None:
    if target == "onnxruntime":
        skip_without_group_query_attention()
    quantize = QuantizeKV(condition=False)
    rows = tokens(2, STEP + 40)
    plan = Plan([CASES["some heads"].entry, quantize])
    opt = optimized("gqa", plan, target, calibration=[rows])
    kinds = [node.target for node in opt.program.nodes(WINDOWED_ATTENTION, QUANTIZED_CACHED_ATTENTION)]
    assert kinds.count(WINDOWED_ATTENTION) == 2 and kinds.count(QUANTIZED_CACHED_ATTENTION) == 2
    wanted = torch.stack([reference("gqa", "some heads", each) for each in rows])
    found = opt(rows).logits
    assert 1e-4 < difference(found, wanted) < 0.05
    _, cache = opt.prefill(rows[:, :STEP])
    assert difference(opt.decode(rows[:, STEP:], cache), found[:, STEP:]) < TOLERANCE
    refused = [each for each in opt.report.remarks if each.status is Status.REFUSED]
    assert len(refused) == 2 and all("compress_kv leaves in full precision" in each.why for each in refused)


def test_heads_keep_their_numbers_where_formats_split_them_before() -> None:
    finer = FormatChoice((0,), heads=(3,), k="int4", v="int4")
    quantize = QuantizeKV(granularity="token", condition=False, choices=(finer,))
    entry = CompressKV(window=9, streaming=(StreamingHeads(0, (1, 3)),))
    program = optimized("mha", Plan([entry, quantize])).program
    nodes = [*program.nodes(WINDOWED_ATTENTION, QUANTIZED_CACHED_ATTENTION)]
    found = {(node.meta["layer"], node.meta.get("heads")): node.target is WINDOWED_ATTENTION for node in nodes}
    assert found == {(0, (1,)): True, (0, (0, 2)): False, (0, (3,)): True, (1, None): False, (2, None): False}


def test_layers_are_counted_as_in_the_model() -> None:
    opt = optimized("gqa", Plan([SkipSublayers(attention=(0,)), CompressKV(window=9, layers=(2,))]))
    (node,) = opt.program.nodes(WINDOWED_ATTENTION)
    assert node.meta["layer"] == 2


@pytest.mark.parametrize(
    "draft", [SelfSpeculate(skip=SkipSublayers(layers=(1,))), SelfSpeculate(weights=QuantizeWeights(8), tokens=7)]
)
def test_drafts_read_the_windows_of_the_model(draft: SelfSpeculate) -> None:
    """What is guessed and thrown away is written to the rings, and overwritten."""
    entry = CASES["some heads"].entry
    opt, plain = optimized("gqa", Plan([entry, draft])), executable("gqa", "some heads")
    rows, mask = tokens(2, 40), torch.ones(2, 40, dtype=torch.int64)
    mask[1, :13] = 0
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": STEP + 30, "do_sample": False}
    assert torch.equal(opt.generate(rows, **options), plain.generate(rows, **options))
    assert opt.speculation.accepted > 0


def test_captured_programs_are_left_as_they_were() -> None:
    before = str(captured("gqa").graph)
    optimized("gqa", Plan([CASES["some heads"].entry]))
    assert str(captured("gqa").graph) == before
