"""Compressed prompts, end to end: the matrix that every pass must meet, against the user's model under masks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import skipstone
from skipstone import CompressPrompt, Plan, QuantizeKV, SkipByPrompt, SkipFFNAdaptive, SkipSublayers
from skipstone.errors import ArtifactError, InvalidInput
from skipstone.ir.capture.validate import relative_difference
from skipstone.ir.dialect import CACHED_ATTENTION, QUANTIZED_CACHED_ATTENTION, kept_rows
from skipstone.ir.program import Role
from skipstone.passes.base import Status
from skipstone.passes.skip_by_prompt import CENTROIDS
from skipstone.rewrite import rewrite
from skipstone.runtime.by_prompt import PromptSession
from skipstone.runtime.executable import Executable
from skipstone.runtime.triton import compiled
from skipstone.runtime.triton.session import TritonSession
from tests.compress_cases import KV_HEADS, LAYERS, TARGETS, captured, model, optimized, tokens
from tests.prompt_cases import CASES, executable, kept, reference, turns
from tests.versions import skip_without_group_query_attention

pytestmark = pytest.mark.usefixtures("one_thread")

TOLERANCE = 1e-4
"""Largest difference of logits in float32, over their range."""

CELLS = [("mha", "all"), ("gqa", "all"), ("gqa", "alike"), ("gqa", "one layer")]
ELSEWHERE = [("onnxruntime", "gqa", "alike"), ("onnxruntime", "gqa", "one layer")]
ON_TARGETS = [
    pytest.param(*cell, target, marks=[pytest.mark.slow] if "mha" in cell or (target, *cell) in ELSEWHERE else [])
    for cell in CELLS
    for target in TARGETS
]


def difference(found: Tensor, wanted: Tensor) -> float:
    return relative_difference(found.detach(), wanted)


# ----------------------------------------------------------------------------------------------------------- the matrix


@pytest.mark.parametrize(("heads", "case", "target"), ON_TARGETS)
def test_what_is_decoded_sees_what_is_kept(heads: str, case: str, target: str) -> None:
    """Prompts that are longer than what is kept, and one that is not; token by token, and many at a time."""
    opt, entry, rows = executable(heads, case, target), CASES[case], tokens(2, 60)
    for prompt in (40, 30, 6):
        wanted = torch.stack([reference(heads, entry, each[:prompt], each[prompt:]) for each in rows])
        plain = torch.stack([model(heads)(each[None]).logits[0] for each in rows]).detach()
        assert (difference(plain, wanted) > 0.01) == (prompt > entry.rows), "what is dropped changes nothing"
        logits, cache = opt.prefill(rows[:, :prompt])
        assert difference(logits, wanted[:, prompt - 1]) < TOLERANCE
        for place in range(prompt, prompt + 5):
            assert difference(opt.decode(rows[:, place], cache), wanted[:, place]) < TOLERANCE, place
        assert difference(opt.decode(rows[:, prompt + 5 :], cache), wanted[:, prompt + 5 :]) < TOLERANCE
    assert difference(opt(rows).logits, plain) < TOLERANCE  # all of it is a prompt


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_each_sequence_of_a_padded_batch_keeps_its_own(side: str, target: str) -> None:
    opt, width, entry = executable("gqa", "all", target), 40, CASES["all"]
    lengths = (width, 25, 8)
    rows, mask = tokens(3, width), torch.zeros(3, width, dtype=torch.int64)
    for number, length in enumerate(lengths):
        mask[number, slice(width - length, None) if side == "left" else slice(length)] = 1
    logits, cache = opt.prefill(rows, mask)
    later = tokens(3, 4, seed=1)
    found = torch.cat([logits[:, None], opt.decode(later[:, :3], cache), opt.decode(later[:, 3], cache)[:, None]], 1)
    for number, length in enumerate(lengths):
        wanted = reference("gqa", entry, rows[number][mask[number] == 1], later[number])
        assert difference(found[number], wanted[length - 1 :]) < TOLERANCE


@pytest.mark.parametrize("heads", ["gqa", pytest.param("mha", marks=pytest.mark.slow)])
def test_bfloat16_is_as_near_as_the_model_is(heads: str) -> None:
    """Tokens that are nearly as important may change places; given the choice, the logits are as near."""
    rows, entry, length = tokens(1, 60), CASES["all"], 40
    _, cache = optimized(heads, Plan([entry]), "eager", torch.bfloat16).prefill(rows[:, :length])
    _, whole = optimized(heads, Plan([]), "eager", torch.bfloat16).prefill(rows[:, :length])
    chosen = []
    for layer in range(LAYERS):
        few, all_ = (each[f"key_{layer}"][0] for each in (cache.groups[0].cache.buffers, whole.buffers))
        same = (few[:, : entry.rows, None] == all_[:, None, :length]).all(-1)
        chosen.append([set(each.nonzero()[:, 1].tolist()) for each in same])
    layers = zip(chosen, kept(heads, entry, rows[0, :length]), strict=True)
    pairs = [pair for own in layers for pair in zip(*own, strict=True)]
    assert all(len(found) == entry.rows for found, _ in pairs)
    assert sum(len(found & wanted) for found, wanted in pairs) >= 0.9 * entry.rows * len(pairs)
    found = optimized(heads, Plan([entry]), "eager", torch.bfloat16).decode(rows[:, length:], cache)[0].double()
    exact, own = (
        reference(heads, entry, rows[0, :length], rows[0, length:], dtype, chosen)[length:].double()
        for dtype in (torch.float64, torch.bfloat16)
    )
    assert (found - exact).norm() <= 1.5 * (own - exact).norm()


@pytest.mark.parametrize("target", TARGETS)
def test_generate_writes_what_the_masked_model_writes(target: str) -> None:
    opt, entry, rows = executable("gqa", "all", target), CASES["all"], tokens(2, 30)
    mask = torch.ones_like(rows)
    mask[1, :11] = 0
    written = opt.generate(rows, attention_mask=mask, max_new_tokens=80, do_sample=False)  # the cache grows
    for number in range(2):
        prompt = rows[number][mask[number] == 1]
        wanted = reference("gqa", entry, prompt, written[number, 30:]).argmax(-1)
        assert torch.equal(written[number, 30:], wanted[len(prompt) - 1 : -1])
    guessed = opt.generate(rows[:1], max_new_tokens=80, do_sample=False, prompt_lookup_num_tokens=3)
    assert torch.equal(guessed, written[:1])


@pytest.mark.parametrize("target", TARGETS)
def test_beams_take_their_prompts_along(target: str) -> None:
    """A step for all beams, against whole sequences under masks: scores must be those of the tokens written."""
    opt, entry, rows = executable("gqa", "all", target), CASES["all"], tokens(1, 30)
    options: dict[str, Any] = {"num_beams": 3, "num_return_sequences": 3, "do_sample": False}
    out = opt.generate(rows, max_new_tokens=8, output_scores=True, return_dict_in_generate=True, **options)
    for written, score in zip(out.sequences, out.sequences_scores, strict=True):
        logits = reference("gqa", entry, rows[0], written[30:])[29:-1].log_softmax(-1)
        total = logits.gather(1, written[30:, None]).sum() / (len(written) - 30)
        assert abs(float(total - score)) < 1e-3


def test_a_saved_executable_and_a_saved_cache_go_on(tmp_path: Path) -> None:
    opt, rows = executable("gqa", "all", "onnxruntime"), tokens(2, 40)
    opt.save(tmp_path / "artifact")
    loaded = skipstone.load(tmp_path / "artifact")
    assert loaded.plan == opt.plan
    wanted, cache = opt.prefill(rows)
    found, own = loaded.prefill(rows)
    assert torch.equal(found, wanted)
    own.save(tmp_path / "cache")
    assert (tmp_path / "cache").stat().st_size < 2 * LAYERS * 2 * KV_HEADS["gqa"] * 8 * 4 * 40
    again = loaded.load_cache(tmp_path / "cache")
    for step in range(3):
        following = tokens(2, 1, seed=3 + step)[:, 0]
        assert torch.equal(loaded.decode(following, again), opt.decode(following, cache))
    with pytest.raises(ArtifactError, match="a cache of another program"):
        executable("gqa", "alike").load_cache(tmp_path / "cache")


# --------------------------------------------------------------------------------------------------- the Triton target


@pytest.mark.parametrize("compiles", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_on_the_triton_target(compiles: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU: the same graphs, as they are and through Inductor."""
    if not compiles:
        monkeypatch.setattr(compiled.torch, "compile", lambda module, **_options: module)
    opt, rows, entry = on_triton(), tokens(2, 60), CASES["all"]
    for prompt in (40, 33):
        _, cache = opt.prefill(rows[:, :prompt])
        wanted = torch.stack([reference("gqa", entry, each[:prompt], each[prompt:]) for each in rows])
        for place in range(prompt, prompt + 3):
            assert difference(opt.decode(rows[:, place], cache), wanted[:, place]) < TOLERANCE
        assert difference(opt.decode(rows[:, prompt + 3 :], cache), wanted[:, prompt + 3 :]) < TOLERANCE
    wanted = executable("gqa", "all").generate(rows, max_new_tokens=20, do_sample=False)
    for _ in range(2):
        assert torch.equal(opt.generate(rows, max_new_tokens=20, do_sample=False), wanted)


def test_prompts_of_other_lengths_leave_buffers_of_one_size() -> None:
    """Steps over them are captured once."""
    opt = on_triton()
    steps = []
    for prompt in (40, 33, 50):
        _, cache = opt.prefill(tokens(1, prompt))
        opt.session.continuations[0]._pool.settle(cache.groups[0].cache)
        steps.append(cache.groups[0].cache.buffers["key_0"].data_ptr())
        del cache
    assert len(set(steps)) == 1


def on_triton() -> Any:
    """An executable of that target for a model on the CPU, which `optimize` gives for a CUDA device alone."""
    plan = Plan([CASES["all"]])
    program, _ = rewrite(captured("gqa").copy(), plan, target="triton")
    own, session = model("gqa"), PromptSession(TritonSession(program), [TritonSession(program.continuations[0])])
    options: dict[str, Any] = {"config": own.config, "generation_config": own.generation_config}
    return Executable(session, target="triton", plan=plan, **options)


# ------------------------------------------------------------------------------------------------------------ the cache


@pytest.mark.parametrize("target", TARGETS)
def test_the_cache_holds_what_is_kept(target: str) -> None:
    """Rows are those of the prompt's keys, in their order, and there is no room for the others."""
    opt, prompt, entry = executable("gqa", "all", target), tokens(1, 40), CASES["all"]
    _, cache = opt.prefill(prompt)
    own = cache.groups[0].cache
    assert cache.lengths.tolist() == cache.decode_start.tolist() == [40]
    assert own.buffers["key_0"].shape[2] == own.capacity - (40 - entry.rows)
    wanted = model("gqa")(prompt, use_cache=True).past_key_values
    for layer, chosen in enumerate(kept("gqa", entry, prompt[0])):
        for head, rows in enumerate(chosen):
            for name, source in (("key", wanted.layers[layer].keys), ("value", wanted.layers[layer].values)):
                found = own.buffers[f"{name}_{layer}"][0, head, : entry.rows]
                assert difference(found, source[0, head, sorted(rows)].detach()) < TOLERANCE


def test_buffers_are_shorter_only_where_all_are() -> None:
    """Sizes of buffers that a program takes for equal stay equal."""
    _, cache = executable("gqa", "one layer").prefill(tokens(1, 40))
    own = cache.groups[0].cache
    assert {buffer.shape[2] for buffer in own.buffers.values()} == {own.capacity}


@pytest.mark.parametrize("target", TARGETS)
def test_cropping_ends_at_the_prompt(target: str) -> None:
    opt, rows, entry = executable("gqa", "all", target), tokens(1, 60), CASES["all"]
    wanted = reference("gqa", entry, rows[0, :40], rows[0, 40:])
    _, cache = opt.prefill(rows[:, :40])
    opt.decode(rows[:, 40:50], cache)
    for length in (45, 40):
        cache.crop(length)
        assert difference(opt.decode(rows[:, length], cache)[0], wanted[length]) < TOLERANCE
    with pytest.raises(InvalidInput, match=r"crop to \[39\] rows of a cache that keeps some rows alone of prompts"):
        cache.crop(39)
    assert difference(opt.decode(rows[:, 41], cache)[0], wanted[41]) < TOLERANCE
    short = reference("gqa", entry, rows[0, :10], rows[0, 10:])
    _, cache = opt.prefill(rows[:, :12])
    cache.crop(10)  # all of it is there
    assert difference(opt.decode(rows[:, 10:30], cache)[0], short[10:30]) < TOLERANCE


@pytest.mark.parametrize("target", TARGETS)
def test_sequences_are_reordered_whole(target: str) -> None:
    opt, rows, entry = executable("gqa", "all", target), tokens(3, 40), CASES["all"]
    mask = torch.ones_like(rows)
    mask[0, :30], mask[1, :10] = 0, 0
    _, cache = opt.prefill(rows, mask)
    cache.select([2, 1, 2])  # the shortest goes: the others have room for what it kept
    cache.grow(cache.capacity + 50)
    later = tokens(3, 5, seed=2)
    found = opt.decode(later, cache)
    for number, row in enumerate((2, 1, 2)):
        wanted = reference("gqa", entry, rows[row][mask[row] == 1], later[number])
        assert difference(found[number], wanted[-5:]) < TOLERANCE


# ------------------------------------------------------------------------------------------------------------ the graph


def test_a_prompt_is_scored_and_what_follows_goes_on_behind_it() -> None:
    program = executable("gqa", "one layer").program
    scores = [port for port in program.outputs if port.role == Role.PROMPT_SCORES]
    assert [(port.name, port.slot) for port in scores] == [("scores_1", 1)]
    assert program.input(Role.DECODE_START) is None
    (behind,) = program.continuations
    assert [kept_rows(node) for node in behind.nodes(CACHED_ATTENTION)] == [0, 7, 0]
    assert [kept_rows(node) for node in program.nodes(CACHED_ATTENTION)] == [0, 0, 0]
    report = executable("gqa", "one layer").report
    (applied,) = [each for each in report.remarks if each.pass_name == "compress_prompt"]
    assert (applied.status, applied.why, applied.numbers) == (
        Status.APPLIED,
        "7 rows of a prompt are kept",
        {"rows": 7},
    )


def test_a_plan_is_carried_out_again_from_its_file(tmp_path: Path) -> None:
    plan = Plan([CASES["alike"]])
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan


# ------------------------------------------------------------------------------------------------------- other rewrites


@pytest.mark.parametrize("target", ["eager", pytest.param("onnxruntime", marks=pytest.mark.slow)])
def test_codes_are_moved_as_they_are(target: str) -> None:
    """What is kept is quantized as it is without compressing: nothing is quantized a second time."""
    if target == "onnxruntime":
        skip_without_group_query_attention()
    rows, entry = tokens(2, 60), CASES["all"]
    quantize = QuantizeKV(condition=False)
    opt = optimized("gqa", Plan([quantize, entry]), target, calibration=[rows])
    whole = optimized("gqa", Plan([quantize]), target, calibration=[rows])
    assert len(list(opt.program.continuations[0].nodes(QUANTIZED_CACHED_ATTENTION))) == LAYERS
    _, cache = opt.prefill(rows[:, :40])
    _, full = whole.prefill(rows[:, :40])
    for layer, chosen in enumerate(kept("gqa", entry, rows[0, :40])):
        for head, kept_here in enumerate(chosen):
            found = cache.groups[0].cache.buffers[f"key_{layer}"][0, head, : entry.rows]
            assert torch.equal(found, full.buffers[f"key_{layer}"][0, head, sorted(kept_here)])
    wanted = reference("gqa", entry, rows[0, :40], rows[0, 40:])[40:]
    assert difference(opt.decode(rows[:, 40:], cache)[0], wanted) < 0.05


def test_formats_by_token_move_their_scales() -> None:
    rows, entry = tokens(2, 60), CASES["all"]
    opt = optimized("gqa", Plan([QuantizeKV(granularity="token", condition=False), entry]))
    _, cache = opt.prefill(rows[:, :40])
    wanted = reference("gqa", entry, rows[0, :40], rows[0, 40:])[40:]
    assert difference(opt.decode(rows[:, 40:], cache)[0], wanted) < 0.05


def test_with_sublayers_skipped_always_and_adaptively() -> None:
    """A gate that always fires behind the prompt, and one layer less: the model's layers in that order."""
    adaptive = SkipFFNAdaptive(threshold=-1.0, cold_start=0, cold_end=0, warmup_tokens=0, max_share=1.0)
    plan = Plan([SkipSublayers(attention=(0,)), adaptive, CompressPrompt(rows=12, observed=4, layers=(2,))])
    opt, rows = optimized("gqa", plan), tokens(1, 60)
    (behind,) = opt.program.continuations
    assert [kept_rows(node) for node in behind.nodes(CACHED_ATTENTION)] == [0, 12]
    assert sum(port.role == Role.DECODE_START for port in behind.inputs) == 1
    written = opt.generate(rows[:, :40], max_new_tokens=12, do_sample=False)
    _, cache = opt.prefill(rows[:, :40])
    at_once = opt.decode(written[:, 40:], cache)[0].argmax(-1)
    assert torch.equal(written[0, 41:], at_once[:-1])


@pytest.mark.parametrize("target", ["eager", pytest.param("onnxruntime", marks=pytest.mark.slow)])
def test_prompts_choose_what_is_skipped_and_what_is_kept(target: str) -> None:
    """Two sets, chosen by the sequences of one batch for themselves: the model without those FFNs, under masks."""
    entry, sets, rows = CASES["all"], ((0,), (1, 2)), tokens(4, 60)
    by_prompt = SkipByPrompt(tuple(SkipSublayers(ffn=ffn) for ffn in sets))
    profiles = torch.stack([turns("gqa", each[:40]) for each in rows[[0, 2]]])
    opt = optimized("gqa", Plan([by_prompt, entry], tensors={CENTROIDS: profiles}), target)
    _, cache = opt.prefill(rows[:, :40])
    assert cache.choice[[0, 2]].tolist() == [0, 1]
    found = torch.cat([opt.decode(rows[:, 40], cache)[:, None], opt.decode(rows[:, 41:], cache)], dim=1)
    for row, choice in enumerate(cache.choice.tolist()):
        wanted = reference("gqa", entry, rows[row, :40], rows[row, 40:], without=sets[choice])
        assert difference(found[row], wanted[40:]) < TOLERANCE


def test_captured_programs_are_left_as_they_were() -> None:
    before = str(captured("gqa").graph)
    optimized("gqa", Plan([CASES["all"]]))
    assert str(captured("gqa").graph) == before
