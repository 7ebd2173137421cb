"""Adaptive FFN skipping: every token decides for itself, and decides the same however it is read."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import onnx
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from skipstone import Plan, QuantizeKV, SkipFFNAdaptive, SkipSublayers
from skipstone.adaptive import calibrate_adaptive_ffn, ffn_cosines, skipped_share
from skipstone.calibrate import token_batches
from skipstone.errors import InvalidInput, InvalidPlan, Unsupported
from skipstone.ir.capture.huggingface import capture_huggingface
from skipstone.ir.dialect import GATE
from skipstone.ir.gates import cosine, skip_predicate
from skipstone.ir.program import Program
from skipstone.ir.stream import SublayerKind, find_stream
from skipstone.optimize import rewrite
from skipstone.runtime.eager import EagerSession
from skipstone.runtime.executable import Executable
from skipstone.runtime.onnx.lower import LoweredModel, lower
from skipstone.runtime.onnx.session import OnnxSession
from tests import models

ALWAYS = SkipFFNAdaptive(threshold=-1.0, cold_start=0, cold_end=0, warmup_tokens=0, max_share=1.0)
PROMPT, LENGTH = 5, 12
NAMES = ["llama", "gpt2", "gpt_neox", pytest.param("mixtral", marks=pytest.mark.slow)]
MARGIN = 1e-3
"""How far cosines stay away from the thresholds of tests that compare decisions."""


@cache
def executable(name: str, *entries: Any) -> Any:
    program, _ = rewrite(models.program(name), Plan(entries), target="eager", strict=False)
    return Executable(EagerSession(program))


def stepwise(opt: Any, ids: Tensor, prompt: int = PROMPT, mask: Tensor | None = None, chunk: int = 1) -> Tensor:
    """Logits [B, S - prompt, V] of the tokens behind the prompt, so many at a time."""
    _, cache = opt.prefill(ids[:, :prompt], mask)
    return torch.cat([opt.decode(part, cache) for part in ids[:, prompt:].split(chunk, dim=1)], dim=1)


@dataclass(frozen=True)
class Walk:
    """One sequence, decoded by the oracle.

    Attributes:
        logits: [1, S - prompt, V], those of the tokens behind the prompt.
        skipped: for each of these tokens, the layers whose FFN it skipped.
        cosines: for each, those of the stream before and after every FFN that was computed.
        past: keys and values of all tokens.
    """

    logits: Tensor
    skipped: list[list[int]]
    cosines: list[list[float]]
    past: DynamicCache

    def margin(self, threshold: float) -> float:
        """Distance of the nearest cosine from a threshold."""
        return min(abs(each - threshold) for token in self.cosines for each in token)


LAYERS = {
    "llama": ("layers", "input_layernorm", "self_attn", "post_attention_layernorm", "mlp", "norm"),
    "gpt2": ("h", "ln_1", "attn", "ln_2", "mlp", "ln_f"),
    "gpt_neox": ("layers", "input_layernorm", "attention", "post_attention_layernorm", "mlp", "final_layer_norm"),
}
"""Of each kind of model: its layers, their norm, attention, norm and FFN, and the norm behind all."""


@torch.no_grad()
def oracle(model: Any, ids: Tensor, entry: SkipFFNAdaptive, prompt: int = PROMPT) -> Walk:
    """The loop of the paper, from the modules of a Hugging Face model: token by token, layer by layer."""
    kind, body = model.config.model_type, model.base_model
    stack, norm, attention, ffn_norm, ffn, last_norm = LAYERS[kind]
    layers = getattr(body, stack)
    past = DynamicCache(config=model.config)
    model(input_ids=ids[:, :prompt], past_key_values=past)
    threshold = math.inf if entry.threshold is None else entry.threshold
    most, walk = math.floor(entry.max_share * len(layers) + 1e-9), Walk(torch.empty(0), [], [], past)
    rows = []
    for at in range(prompt, ids.shape[1]):
        h, here = model.get_input_embeddings()(ids[:, [at]]), torch.tensor([[at]])
        if kind == "gpt2":
            h, options = h + body.wpe(here), {"past_key_values": past}
        else:
            name = "layer_past" if kind == "gpt_neox" else "past_key_values"
            options = {name: past, "position_embeddings": body.rotary_emb(h, here), "attention_mask": None}
        met, skipped, cosines = False, list[int](), list[float]()
        for number, layer in enumerate(layers):
            attended = getattr(layer, attention)(getattr(layer, norm)(h), **options)[0]
            before = h if kind == "gpt_neox" else h + attended  # NeoX: both read the same stream
            warm = entry.cold_start <= number < len(layers) - entry.cold_end
            if warm and met and len(skipped) < most:
                skipped.append(number)
                h = h + attended
                continue
            result = getattr(layer, ffn)(getattr(layer, ffn_norm)(before))
            cosines.append(float(torch.cosine_similarity(before.double(), (before + result).double(), dim=-1)))
            met |= warm and at >= prompt + entry.warmup_tokens and cosines[-1] >= threshold
            h = h + attended + result
        rows.append(model.get_output_embeddings()(getattr(body, last_norm)(h))[:, 0])
        walk.skipped.append(skipped)
        walk.cosines.append(cosines)
    return replace(walk, logits=torch.stack(rows, dim=1))


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
    expected = oracle(models.model(name), ids, entry)
    assert expected.margin(entry.threshold or 2.0) > MARGIN
    opt = executable(name, entry)
    _, cache = opt.prefill(ids[:, :PROMPT])
    given = torch.cat([opt.decode(each, cache) for each in ids[:, PROMPT:].split(1, dim=1)], dim=1)
    assert_close(given, expected.logits)
    assert cache.lengths.tolist() == [LENGTH]
    for number, layer in enumerate(expected.past.layers):
        assert_close(cache.buffers[f"key_{number}"][:, :, :LENGTH], layer.keys)
        assert_close(cache.buffers[f"value_{number}"][:, :, :LENGTH], layer.values)


@pytest.mark.parametrize("name", THRESHOLDS)
def test_the_thresholds_of_these_tests_decide_differently(name: str) -> None:
    """Else the oracle would say little: some tokens skip no FFN, some one, some two."""
    ids = models.tokens(1, LENGTH, seed=3)
    walks = [oracle(models.model(name), ids, replace(ALWAYS, threshold=each)) for each in THRESHOLDS[name]]
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
    assert oracle(models.model("llama"), ids, entry).skipped == [[], [], [], *[layers] * (LENGTH - PROMPT - 3)]


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
    expected = oracle(models.model("llama"), written, ALWAYS)
    assert written[0, PROMPT + 1 :].tolist() == expected.logits[0, :-1].argmax(-1).tolist()


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
    given, expected = stepwise(Executable(EagerSession(program)), ids), oracle(model, ids, entry).logits
    assert given.dtype == torch.bfloat16
    never = oracle(model, ids, replace(entry, threshold=None)).logits
    assert float((given - expected).norm()) < 0.02 * float(expected.norm()) < 0.2 * float((never - expected).norm())


# ------------------------------------------------------------------------------------------------------ with the others


def test_with_other_passes() -> None:
    """A layer less, and keys and values in int8."""
    ids = models.tokens(1, LENGTH)
    entries = (SkipSublayers(attention=(1,)), ALWAYS, QuantizeKV(k="int8", v="int8", granularity="token"))
    plain = (SkipSublayers(attention=(1,), ffn=(1, 2)), entries[2])
    skipping, static = executable("llama", *entries), executable("llama", *plain)
    _, cache = executable("llama", entries[0], entries[2]).prefill(ids[:, :PROMPT])
    cache.layout = static.session.layout
    given, expected = stepwise(skipping, ids), static.decode(ids[:, PROMPT:], cache)
    assert_close(given, expected)


def test_plans_keep_it(tmp_path: Path) -> None:
    plan = Plan([SkipSublayers(ffn=(1,)), replace(ALWAYS, threshold=0.5), QuantizeKV()])
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan


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


# ---------------------------------------------------------------------------------------------------------- calibration


def planted(factors: dict[int, float]) -> Program:
    """The Llama, whose FFNs of some layers are multiplied by factors."""
    program = models.program("llama").copy()
    for ffn in find_stream(program).sublayers:
        if ffn.kind is SublayerKind.FFN and ffn.layer in factors:
            with program.graph.inserting_after(ffn.branch):
                scaled = program.call(torch.ops.aten.mul.Tensor, ffn.branch, factors[ffn.layer])
            ffn.branch.replace_all_uses_with(scaled, delete_user_cb=lambda user, scaled=scaled: user is not scaled)
    program.recompile()
    return program


@pytest.mark.parametrize("name", LAYERS)
def test_cosines_are_those_of_each_token(name: str) -> None:
    """In one pass over padded sequences; against the oracle, which reads them token by token."""
    ids, counts = models.tokens(2, LENGTH, seed=3), (LENGTH, LENGTH - 3)
    mask = (torch.arange(LENGTH) < torch.tensor(counts).unsqueeze(1)).long()
    program = models.program(name)
    layers, found = ffn_cosines(program, token_batches([{"input_ids": ids, "attention_mask": mask}], program.source))
    never = replace(ALWAYS, threshold=None)
    walks = [oracle(models.model(name), ids[[row], :count], never, prompt=1) for row, count in enumerate(counts)]
    assert layers == [0, 1, 2] and found.shape == (3, sum(counts))
    behind = torch.ones(sum(counts), dtype=torch.bool)
    behind[[0, LENGTH]] = False  # what the oracle takes for the prompt
    torch.testing.assert_close(found[:, behind].T, torch.tensor([each for walk in walks for each in walk.cosines]))


def test_calibrated_settings_skip_what_was_asked_for() -> None:
    """The first FFN turns the stream as ever, the second a little, the third hardly; 6 of 10 tokens skip the third."""
    program, ids = planted({1: 0.2, 2: 0.01}), models.tokens(4, 40, seed=5)
    entry = calibrate_adaptive_ffn(program, token_batches([ids], program.source), 0.2, warmup_tokens=0, max_share=0.34)
    assert (entry.cold_start, entry.cold_end, entry.warmup_tokens, entry.max_share) == (1, 0, 0, 0.34)
    assert entry.threshold is not None and 0.95 <= entry.threshold < 1
    opt = Executable(EagerSession(rewrite(program, Plan([entry]), target="eager", strict=False)[0]))
    assert skipped_share(opt, ids[:, :1], ids[:, 1:]) == pytest.approx(0.2, abs=0.01)


def test_models_whose_ffns_do_not_saturate_are_refused() -> None:
    program = models.program("llama")
    batches = token_batches([models.tokens(4, 40, seed=5)], program.source)
    with pytest.raises(
        Unsupported, match=r"from a cosine of 0\.95 on, a token would skip 0\.0%.*layer: 0: 0\.\d{3}, 1: "
    ):
        calibrate_adaptive_ffn(program, batches, max_share=1.0)


def test_impossible_calibrations_are_refused() -> None:
    program = models.program("llama")
    batches = token_batches([models.tokens(1, 8)], program.source)
    for share, options in (
        (0.0, {}),
        (0.5, {"max_share": 0.4}),
        (0.2, {"max_share": 1.5}),
        (0.2, {"warmup_tokens": -1}),
    ):
        with pytest.raises(InvalidPlan, match=r"share is|warmup_tokens is -1"):
            calibrate_adaptive_ffn(program, batches, share, **options)
    with pytest.raises(InvalidInput, match="no token"):
        calibrate_adaptive_ffn(program, [])
    with pytest.raises(InvalidInput, match="NaN or infinity"):
        calibrate_adaptive_ffn(planted({1: math.nan}), batches)


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


@pytest.mark.parametrize("name", WARM)
def test_onnx_runtime_skips_the_same(name: str) -> None:
    """One token at a time and several, one sequence and two; no cosine is near the threshold."""
    entry, ids = WARM[name], models.tokens(2, LENGTH, seed=3)
    for row in ids.split(1):
        assert oracle(models.model(name), row, entry).margin(entry.threshold or 0.0) > MARGIN
    mine, reference = in_onnx_runtime(name, entry), executable(name, entry)
    for chosen in (ids[:1], ids[1:], ids):
        for chunk in (1, 3):
            assert_close(stepwise(mine, chosen, chunk=chunk), stepwise(reference, chosen, chunk=chunk))


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
