"""Adaptive FFN skipping: every token decides for itself, and decides the same however it is read."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import onnx
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from skipstone import Plan, QuantizeKV, SkipFFNAdaptive, SkipSublayers
from skipstone.adaptive import skipped_ffns, skipped_share
from skipstone.errors import InvalidPlan, Malformed, Unsupported
from skipstone.ir.capture.huggingface import capture_huggingface
from skipstone.ir.capture.validate import relative_difference
from skipstone.ir.dialect import GATE, SKIP_PREDICATE
from skipstone.ir.gates import cosine, gate, skip_predicate, spared
from skipstone.ir.printer import readable
from skipstone.ir.program import Program
from skipstone.ir.stream import find_stream
from skipstone.ir.verify import verify
from skipstone.passes.base import Pipeline
from skipstone.rewrite import rewrite
from skipstone.runtime.eager import EagerSession
from skipstone.runtime.executable import Executable
from skipstone.runtime.onnx.lower import LoweredModel, lower
from skipstone.runtime.onnx.session import OnnxSession
from tests import models
from tests.ffn_oracles import ALWAYS, LENGTH, PROMPT, Hooked, paper_loop

NAMES = ["llama", "gpt2", "gpt_neox", pytest.param("mixtral", marks=pytest.mark.slow)]
MARGIN = 1e-3
"""How far cosines stay away from the thresholds of tests that compare decisions."""
FLOAT64 = 1e-9
"""Largest difference of float64 logits, over their range."""


pytestmark = pytest.mark.usefixtures("one_thread")


@cache
def model(name: str, dtype: torch.dtype) -> Any:
    other = copy.deepcopy(models.model(name)).to(dtype)
    other.set_experts_implementation("eager")  # transformers' faster form has no float64
    return other


@cache
def captured(name: str, dtype: torch.dtype) -> Program:
    return models.program(name) if dtype == torch.float32 else capture_huggingface(model(name, dtype))


@cache
def executable(name: str, *entries: Any, dtype: torch.dtype = torch.float32) -> Any:
    program, _ = rewrite(captured(name, dtype), Plan(entries), target="eager", strict=False)
    return Executable(EagerSession(program))


def decoded(
    opt: Any, ids: Tensor, prompt: int = PROMPT, mask: Tensor | None = None, chunk: int = 1
) -> tuple[Tensor, Any]:
    """Logits [B, 1 + S - prompt, V] of the prompt's last token and those behind, so many at a time; and the cache."""
    first, cache = opt.prefill(ids[:, :prompt], mask)
    rest = [opt.decode(part, cache) for part in ids[:, prompt:].split(chunk, dim=1)]
    return torch.cat([first.unsqueeze(1), *rest], dim=1), cache


def stepwise(opt: Any, ids: Tensor, prompt: int = PROMPT, mask: Tensor | None = None, chunk: int = 1) -> Tensor:
    """Logits [B, S - prompt, V] of the tokens behind the prompt, so many at a time."""
    return decoded(opt, ids, prompt, mask, chunk)[0][:, 1:]


def skips(opt: Any, ids: Tensor) -> list[list[list[int]]]:
    """For each row and decoded token, the layers whose FFN was skipped."""
    found = skipped_ffns(opt, ids[:, :PROMPT], ids[:, PROMPT:])
    batch, count = ids.shape[0], ids.shape[1] - PROMPT
    return [[[n for n, each in found.items() if each[b, s]] for s in range(count)] for b in range(batch)]


@cache
def between(name: str) -> float:
    """A threshold in the largest gap among the middle half of the cosines in the full model."""
    never, ids = replace(ALWAYS, threshold=None), models.tokens(2, LENGTH, seed=3)
    walks = [Hooked(model(name, torch.float64), never).run(row) for row in ids]
    found = sorted(value for each in walks for value in each.cosines)
    middle = found[len(found) // 4 : 3 * len(found) // 4]
    _, low, high = max((high - low, low, high) for low, high in pairwise(middle))
    return (low + high) / 2


def assert_close(given: Tensor, expected: Tensor) -> None:
    spread = float(expected.max() - expected.min())
    torch.testing.assert_close(given / spread, expected / spread, rtol=0, atol=1e-5)


# --------------------------------------------------------------------------------------------------------- what it does


THRESHOLDS = {"llama": (0.36, 0.64, 0.74, 0.84), "gpt2": (0.5, 0.74, 0.86), "gpt_neox": (0.3, 0.64, 0.86)}


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("llama", ALWAYS),
        ("llama", replace(ALWAYS, threshold=None)),
        ("llama", replace(ALWAYS, max_share=0.34)),
        ("llama", replace(ALWAYS, warmup_tokens=3)),
        ("llama", replace(ALWAYS, cold_start=1)),
        ("llama", replace(ALWAYS, cold_end=1)),
        ("gpt_neox", replace(ALWAYS, max_share=0.34, warmup_tokens=2)),
        *((name, replace(ALWAYS, threshold=each)) for name, chosen in THRESHOLDS.items() for each in chosen),
    ],
    ids=lambda part: part if isinstance(part, str) else "-".join(map(str, vars(part).values())),
)
def test_tokens_skip_what_the_paper_says(name: str, entry: SkipFFNAdaptive) -> None:
    """Logits, keys and values are those of an independent loop; the cache has no gaps."""
    ids = models.tokens(1, LENGTH, seed=3)
    expected = paper_loop(models.model(name), ids, entry)
    assert expected.margin(entry.threshold or 2.0) > MARGIN
    opt = executable(name, entry)
    logits, cache = decoded(opt, ids)
    assert_close(logits[:, 1:], expected.logits)
    assert cache.lengths.tolist() == [LENGTH]
    for number, layer in enumerate(expected.past.layers):
        assert_close(cache.buffers[f"key_{number}"][:, :, :LENGTH], layer.keys)
        assert_close(cache.buffers[f"value_{number}"][:, :, :LENGTH], layer.values)


@pytest.mark.parametrize("name", THRESHOLDS)
def test_the_thresholds_of_these_tests_decide_differently(name: str) -> None:
    """Else the oracle would say little: some tokens skip no FFN, some one, some two."""
    ids = models.tokens(1, LENGTH, seed=3)
    walks = [paper_loop(models.model(name), ids, replace(ALWAYS, threshold=each)) for each in THRESHOLDS[name]]
    assert {len(skipped) for walk in walks for skipped in walk.skipped} == {0, 1, 2}


@pytest.mark.parametrize(
    ("change", "layers"),
    [
        ({}, [1, 2]),
        ({"max_share": 0.34}, [1]),
        ({"cold_start": 1}, [2]),
        ({"cold_end": 1}, [1]),
        ({"max_share": 2 / 3}, [1, 2]),
    ],
)
def test_the_oracle_skips_by_the_settings(change: dict[str, Any], layers: list[int]) -> None:
    ids = models.tokens(1, LENGTH, seed=3)
    entry = replace(ALWAYS, warmup_tokens=3, **change)
    assert paper_loop(models.model("llama"), ids, entry).skipped == [[], [], [], *[layers] * (LENGTH - PROMPT - 3)]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        *(
            ("deep", change)
            for change in ({}, {"warmup_tokens": 3}, {"cold_start": 1, "cold_end": 1}, {"max_share": 0.4})
        ),
        *(pytest.param(name, {}, marks=pytest.mark.slow) for name in ("mixtral", "gpt2", "gpt_neox")),
    ],
    ids=lambda part: part if isinstance(part, str) else "-".join(part) or "plain",
)
def test_decisions_are_those_of_the_model_with_hooks(name: str, change: dict[str, Any]) -> None:
    """Decisions, logits and caches of a batch of two in float64, token by token and all at once."""
    entry, ids = replace(ALWAYS, threshold=between(name), **change), models.tokens(2, LENGTH, seed=3)
    opt = executable(name, entry, dtype=torch.float64)
    walks = [Hooked(model(name, torch.float64), entry).run(row) for row in ids]
    assert any(skipped for each in walks for skipped in each.skipped), "the case decides nothing"
    assert any(len(skipped) < opt.program.layers - 1 for each in walks for skipped in each.skipped)
    assert skips(opt, ids) == [each.skipped for each in walks]
    logits, cache = decoded(opt, ids)
    assert relative_difference(logits, torch.stack([torch.stack(each.logits) for each in walks])) < FLOAT64
    for row, walk in enumerate(walks):
        for slot, layer in enumerate(walk.past.layers):
            ours = cache.buffers[f"key_{slot}"][row, :, :LENGTH], cache.buffers[f"value_{slot}"][row, :, :LENGTH]
            for mine, other in zip(ours, (layer.keys[0], layer.values[0]), strict=True):
                window = other.shape[1]  # a sliding layer of the model keeps its window alone
                assert torch.allclose(mine[:, -window:], other, atol=FLOAT64)
    assert relative_difference(decoded(opt, ids, chunk=LENGTH)[0], logits) < FLOAT64


@pytest.mark.parametrize("name", NAMES)
def test_the_program_is_well_formed(name: str) -> None:
    """Every invariant holds, and all warm FFNs but the first have a gate."""
    program, refusal = rewrite(models.program(name), Plan([ALWAYS]), target="eager")
    assert refusal is None and sum(1 for _ in program.nodes(GATE)) == 2


@pytest.mark.parametrize("name", NAMES)
def test_what_all_tokens_skip_is_not_computed(name: str) -> None:
    """A step takes the FLOPs of the static drop."""
    ids, flops = models.tokens(2, LENGTH), {}
    for entries in ((), (SkipSublayers(ffn=(1, 2)),), (ALWAYS,)):
        opt = executable(name, *entries)
        _, cache = opt.prefill(ids[:, :PROMPT])
        with FlopCounterMode(display=False) as counter:
            opt.decode(ids[:, PROMPT], cache)
        flops[entries] = counter.get_total_flops()
    full, static, gated = flops.values()
    assert gated == static < full


@pytest.mark.parametrize("name", NAMES)
def test_never_is_the_full_model(name: str) -> None:
    ids = models.tokens(2, LENGTH)
    with torch.no_grad():
        expected = models.model(name)(input_ids=ids).logits[:, PROMPT:]
    never = executable(name, replace(ALWAYS, threshold=None))
    assert_close(stepwise(never, ids), expected)
    assert torch.equal(stepwise(never, ids), stepwise(executable(name, replace(ALWAYS, threshold=2.0)), ids))


@pytest.mark.parametrize("name", NAMES)
def test_always_is_the_static_drop_behind_a_full_prompt(name: str) -> None:
    """The static drop decodes from the cache that the full model has made of the prompt."""
    ids = models.tokens(2, LENGTH)
    static, gated = executable(name, SkipSublayers(ffn=(1, 2))), executable(name, ALWAYS)
    _, cache = executable(name).prefill(ids[:, :PROMPT])
    cache.layout = static.session.layout
    assert_close(stepwise(gated, ids), static.decode(ids[:, PROMPT:], cache))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("threshold", [-1.0, 0.7])
def test_steps_of_any_size_decide_the_same(name: str, threshold: float) -> None:
    opt, ids = executable(name, replace(ALWAYS, threshold=threshold, warmup_tokens=2)), models.tokens(2, LENGTH)
    one = stepwise(opt, ids)
    for chunk in (2, 3, LENGTH):
        assert_close(stepwise(opt, ids, chunk=chunk), one)


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_a_batch_decide_for_themselves(side: str) -> None:
    """Each row is as if alone, whatever the padding and the other rows."""
    opt, counts = executable("llama", replace(ALWAYS, threshold=0.7, warmup_tokens=1)), (3, 7, 5)
    prompts = [models.tokens(1, count, seed=count)[0] for count in counts]
    more = models.tokens(3, 6, seed=9)
    padded, mask = torch.zeros(3, 7, dtype=torch.int64), torch.zeros(3, 7, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        columns = slice(7 - len(prompt), 7) if side == "left" else slice(0, len(prompt))
        padded[row, columns], mask[row, columns] = prompt, 1
    _, cache = opt.prefill(padded, mask)
    together = torch.cat([opt.decode(each, cache) for each in more.split(1, dim=1)], dim=1)
    for row, prompt in enumerate(prompts):
        alone = stepwise(opt, torch.cat([prompt, more[row]]).unsqueeze(0), prompt=len(prompt))
        assert_close(together[row : row + 1], alone)


def test_prompts_are_read_in_full() -> None:
    ids = models.tokens(2, LENGTH)
    opt, full = executable("llama", ALWAYS), executable("llama")
    assert_close(opt.prefill(ids)[0], full.prefill(ids)[0])
    assert_close(opt(input_ids=ids).logits, full(input_ids=ids).logits)


def test_the_cache_knows_where_prompts_ended(tmp_path: Path) -> None:
    """Through cropping, saving, loading, growing and reordering."""
    opt, ids = executable("llama", replace(ALWAYS, warmup_tokens=2)), models.tokens(2, LENGTH)
    expected = stepwise(opt, ids)
    _, cache = opt.prefill(ids[:, :PROMPT])
    opt.decode(ids[:, PROMPT : PROMPT + 4], cache)
    cache.crop(PROMPT + 1)
    cache.save(tmp_path / "cache.safetensors")
    restored = opt.load_cache(tmp_path / "cache.safetensors")
    restored.grow(restored.capacity * 2)
    restored.select(torch.tensor([1, 0]))
    rest = torch.cat([opt.decode(ids.flip(0)[:, [at]], restored) for at in range(PROMPT + 1, LENGTH)], dim=1)
    assert_close(rest.flip(0), expected[:, 1:])


def test_a_prompt_that_is_cropped_ends_there() -> None:
    opt, ids = executable("llama", replace(ALWAYS, warmup_tokens=1)), models.tokens(2, LENGTH)
    _, cache = opt.prefill(ids[:, : PROMPT + 2])
    cache.crop(torch.tensor([PROMPT, PROMPT]))
    assert_close(opt.decode(ids[:, PROMPT:], cache), stepwise(opt, ids))


def test_generate_skips() -> None:
    ids = models.tokens(1, PROMPT, seed=3)
    written = executable("llama", ALWAYS).generate(ids, max_new_tokens=6, do_sample=False)
    expected = paper_loop(models.model("llama"), written, ALWAYS)
    assert written[0, PROMPT + 1 :].tolist() == expected.logits[0, :-1].argmax(-1).tolist()


def test_generate_takes_padded_prompts() -> None:
    """Greedy decoding is decoding step by step; a prompt that is read in chunks is a prompt all the same."""
    opt = executable("deep", replace(ALWAYS, threshold=between("deep")), dtype=torch.float64)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    prompts = models.tokens(2, PROMPT)
    mask = torch.ones_like(prompts)
    mask[1, :3] = 0
    for each in (None, mask):
        out = opt.generate(prompts, attention_mask=each, **options)
        logits, _ = decoded(opt, out, mask=each)
        assert torch.equal(logits[:, :-1].argmax(-1), out[:, PROMPT:])
        # transformers' own loop
        assert torch.equal(opt.generate(prompts, attention_mask=each, prefill_chunk_size=3, **options), out)
        assert any(any(row) for row in skips(opt, out))


def test_beams_carry_their_prompts_along() -> None:
    entry = replace(ALWAYS, threshold=between("deep"), warmup_tokens=3)
    opt, prompts = executable("deep", entry, dtype=torch.float64), models.tokens(2, PROMPT)
    mask = torch.ones_like(prompts)
    mask[0, :2] = 0
    options = {"max_new_tokens": 8, "num_beams": 3, "eos_token_id": None, "length_penalty": 0.0, "output_scores": True}
    out = opt.generate(prompts, attention_mask=mask, return_dict_in_generate=True, **options)
    logits, _ = decoded(opt, out.sequences, mask=mask)
    new = out.sequences[:, PROMPT:, None]
    scores = logits[:, :-1].float().log_softmax(-1).gather(2, new).sum((1, 2))
    assert torch.allclose(scores, out.sequences_scores.to(scores.dtype), atol=1e-4)


def test_bfloat16() -> None:
    """Cosines are computed in float32, and the rest as in a bfloat16 model; every token behind the warm-up skips."""
    before, after = torch.randn(2, 1, 1, 64, dtype=torch.bfloat16)
    assert cosine(before, after).dtype == torch.float32
    here = torch.zeros(1, dtype=torch.int64)
    for threshold, met in ((-1.0, True), (1.5, False)):
        assert bool(skip_predicate(before, after, here, here, threshold=threshold, warmup_tokens=0)) == met
    model, entry = copy.deepcopy(models.model("llama")).bfloat16(), replace(ALWAYS, warmup_tokens=2)
    ids = models.tokens(1, LENGTH, seed=3)
    program, _ = rewrite(capture_huggingface(model), Plan([entry]), target="eager", strict=False)
    given, expected = stepwise(Executable(EagerSession(program)), ids), paper_loop(model, ids, entry).logits
    assert given.dtype == torch.bfloat16
    never = paper_loop(model, ids, replace(entry, threshold=None)).logits
    assert float((given - expected).norm()) < 0.02 * float(expected.norm()) < 0.2 * float((never - expected).norm())


# ------------------------------------------------------------------------------------------------------ with the others


def test_together_with_skipped_sublayers_and_a_quantized_cache() -> None:
    """Layers keep their numbers although others are gone before; the cache is quantized behind."""
    gone, codes = SkipSublayers(layers=(0,), attention=(3,)), QuantizeKV(granularity="token", condition=False)
    ids = models.tokens(2, LENGTH)
    opt = executable("deep", gone, replace(ALWAYS, cold_start=2), codes)
    assert [each.meta["layer"] for each in opt.program.nodes(GATE)] == [3, 4, 5] and opt.program.layers == 6
    full = executable("deep", gone, codes)
    dropped = executable("deep", SkipSublayers((3,), (3, 4, 5), (0,)), codes)
    _, cache = full.prefill(ids[:, :PROMPT])
    expected = torch.cat([dropped.decode(ids[:, [at]], cache) for at in range(PROMPT, LENGTH)], dim=1)
    assert torch.equal(stepwise(opt, ids), expected)
    assert skipped_share(opt, ids[:, :PROMPT], ids[:, PROMPT:]) == pytest.approx(3 / 6)


def test_plans_keep_it(tmp_path: Path) -> None:
    plan = Plan([SkipSublayers(ffn=(1,)), replace(ALWAYS, threshold=0.5), QuantizeKV()])
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan


# --------------------------------------------------------------------------------------------------------- the program


def test_operators() -> None:
    """The schema, the fakes, and the decision itself at the borders of its conditions."""
    before, after = torch.randn(2, 4, 8), torch.randn(2, 4, 8)
    before[1, 2] = 0
    start, decode_start = torch.tensor([3, 0]), torch.tensor([2, 2])
    met = torch.tensor([[True, False, False, False], [False] * 4])
    options = {"threshold": -1.0, "warmup_tokens": 1}
    expected = torch.tensor([[True] * 4, [False] * 3 + [True]])  # positions 3 to 6 and 0 to 3, from 3 on
    assert torch.equal(skip_predicate(before, after, start, decode_start, **options), expected)
    assert torch.equal(
        skip_predicate(before, after, start + 9, decode_start, **options | {"threshold": 1.5}), met & False
    )
    exact = skip_predicate(before, after, start - 9, decode_start, met, **options)
    assert torch.equal(exact, met)
    assert torch.equal(gate(before, met)[0, 0], torch.zeros(8)) and torch.equal(gate(before, met)[1], before[1])
    assert torch.allclose(cosine(before, after), torch.cosine_similarity(before, after, dim=-1), atol=1e-6)
    torch.library.opcheck(skip_predicate, (before, after, start, decode_start, met), options)
    torch.library.opcheck(gate, (before, met))


def test_the_program_says_what_is_spared() -> None:
    program = executable("deep", ALWAYS).program
    verify(program)
    gates = list(program.nodes(GATE))
    assert len(gates) == 5 and len(list(program.nodes(SKIP_PREDICATE))) == 5
    text = readable(program)
    for each in gates:
        assert sum(node.target is torch.ops.aten.linear.default for node in spared(each)) == 3
        assert text.count(f"unless {each.args[1].name} is true everywhere") == len(spared(each))
    before, after = (find_stream(each).sublayers for each in (executable("deep").program, program))
    assert [(s.kind, s.layer, s.path) for s in before] == [(s.kind, s.layer, s.path) for s in after]


def test_broken_gates_are_found() -> None:
    program = executable("deep", ALWAYS).program
    late, empty = program.copy(), program.copy()
    first = next(late.nodes(GATE))
    spared(first)[-1].append(first.args[1])
    with pytest.raises(Malformed, match=r"before .*, which decides about it") as caught:
        verify(late)
    assert caught.value.rule == 6
    first = next(empty.nodes(GATE))
    first.args = (next(empty.nodes(SKIP_PREDICATE)).args[0], first.args[1])
    empty.recompile()
    with pytest.raises(Malformed, match="spares nothing"):
        verify(empty)


# ----------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"threshold": -1.5}, "threshold is -1.5"),
        ({"cold_start": -1}, "cold_start is -1"),
        ({"warmup_tokens": -2}, "warmup_tokens is -2"),
        ({"max_share": 0.0}, "max_share is 0.0"),
        ({"max_share": 1.1}, "max_share is 1.1"),
        ({"cold_start": 2}, "1 of 3 layers are warm"),
        ({"cold_end": 9}, "0 of 3 layers are warm"),
        ({"max_share": 0.2}, "of 3 layers is no layer"),
    ],
)
def test_impossible_settings_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidPlan, match=message):
        executable("llama", replace(ALWAYS, **change))


def test_without_a_cache_it_is_refused() -> None:
    with pytest.raises(Unsupported, match="without a KV cache"):
        rewrite(models.program("llama"), Plan([ALWAYS]), target="eager", cache=False)


def test_too_few_ffns_are_refused() -> None:
    with pytest.raises(Unsupported, match="0 FFNs to skip in layers 1 to 4; it needs two"):
        Pipeline([SkipSublayers(ffn=(1, 2, 3, 4)), SkipFFNAdaptive()]).run(executable("deep").program)


# --------------------------------------------------------------------------------------------------------- ONNX Runtime


@cache
def lowered(name: str, *entries: Any) -> LoweredModel:
    program, _ = rewrite(models.program(name), Plan(entries), target="onnxruntime", strict=False)
    return lower(program)


@cache
def in_onnx_runtime(name: str, *entries: Any) -> Any:
    program, _ = rewrite(models.program(name), Plan(entries), target="onnxruntime", strict=False)
    with patch("skipstone.runtime.onnx.session.lower", return_value=lowered(name, *entries)):
        return Executable(OnnxSession(program))


WARM = {"llama": replace(ALWAYS, threshold=0.64, warmup_tokens=1), "gpt_neox": replace(ALWAYS, warmup_tokens=2)}


@pytest.mark.parametrize(
    "name", [*WARM, *(pytest.param(name, marks=pytest.mark.slow) for name in ("mixtral", "deep", "gpt2"))]
)
def test_onnx_runtime_skips_the_same(name: str) -> None:
    """One token at a time and several, one sequence and two; no cosine is near the threshold."""
    entry, ids = WARM.get(name) or replace(ALWAYS, threshold=between(name)), models.tokens(2, LENGTH, seed=3)
    walks = [Hooked(model(name, torch.float32), entry).run(row) for row in ids]
    assert min(abs(value - entry.threshold) for walk in walks for value in walk.cosines) > MARGIN
    mine, reference = in_onnx_runtime(name, entry), executable(name, entry)
    assert skips(mine, ids) == skips(reference, ids) == [walk.skipped for walk in walks]
    with patch("skipstone.runtime.onnx.session.lower", side_effect=AssertionError("lowered again")):
        for chosen in (ids[:1], ids[1:], ids):
            for chunk in (1, 3):
                given = stepwise(mine, chosen, chunk=chunk)
                assert_close(given, stepwise(reference, chosen, chunk=chunk))
                assert torch.equal(given, stepwise(mine, chosen, chunk=chunk))


@pytest.mark.parametrize("name", WARM)
def test_onnx_branches_that_skip_compute_nothing(name: str) -> None:
    """One `If` for each gate: one branch has the FFN's products, the other only makes zeros."""
    proto = onnx.load_from_string(lowered(name, WARM[name]).proto)
    choices = [node for node in proto.graph.node if node.op_type == "If"]
    branches = [{each.name: {n.op_type for n in each.g.node} for each in node.attribute} for node in choices]
    assert len(branches) == 2
    for pair in branches:
        assert pair["then_branch"] <= {"Shape", "Constant", "Concat", "ConstantOfShape"}
        assert any("MatMul" in kind or kind == "Gemm" for kind in pair["else_branch"])


def test_onnx_weights_are_not_duplicated() -> None:
    gated, plain = (
        sum(each.nbytes for each in lowered("llama", *entries).tensors.values()) for entries in ([WARM["llama"]], [])
    )
    assert gated == plain > 0
