"""What adaptive FFN skipping skips: decisions against hooks on the model's own layers, generation, calibration."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import skipstone
from skipstone.adaptive import calibrate_adaptive_ffn, ffn_cosines, skipped_ffns, skipped_share
from skipstone.calibrate import token_batches
from skipstone.ir.capture.huggingface import capture_huggingface
from skipstone.ir.capture.validate import relative_difference
from skipstone.ir.dialect import GATE, SKIP_PREDICATE
from skipstone.ir.errors import Malformed, SkipstoneError, Unsupported
from skipstone.ir.gates import cosine, gate, skip_predicate, spared
from skipstone.ir.printer import readable
from skipstone.ir.program import Program
from skipstone.ir.stream import SublayerKind, find_stream
from skipstone.ir.verify import verify
from skipstone.passes.base import Pipeline
from skipstone.passes.quantize_kv import QuantizeKV
from skipstone.passes.skip_ffn_adaptive import SkipFFNAdaptive
from skipstone.passes.skip_sublayers import SkipSublayers
from skipstone.plan import Plan
from tests import models

PROMPT, LENGTH = 7, 15
EVERY = {"cold_start": 0, "cold_end": 0, "warmup_tokens": 0, "max_share": 1.0}
NAMES = ("deep", "gpt2", "gpt_neox", "mixtral")  # grouped heads, plain heads, branches side by side, experts
NORMS = {"gpt2": "ln_2"}
FLOAT64 = 1e-9
"""Largest difference of float64 logits, over their range."""


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Models this small only lose time to a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def model(name: str, dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    if name == "deep":  # six layers, of which a quarter of the FFNs is one and a half
        sizes = models._SIZES | {"num_hidden_layers": 6, "initializer_range": 0.2}
        return LlamaForCausalLM(LlamaConfig(**sizes)).eval().to(dtype)
    other = models._BUILDERS[name]().eval().to(dtype)
    other.set_experts_implementation("eager")  # transformers' faster form has no float64
    return other


@cache
def captured(name: str, dtype: torch.dtype = torch.float64) -> Program:
    return capture_huggingface(model(name, dtype))


@cache
def executable(name: str, *entries: Any, target: Any = "eager", dtype: torch.dtype = torch.float64) -> Any:
    """What `optimize` gives; each model is captured once, each plan carried out once."""
    with patch.object(import_module("skipstone.optimize"), "_capture", lambda *_: captured(name, dtype).copy()):
        return skipstone.optimize(model(name, dtype), Plan(entries), target=target, progress=False, threads=1)


def tokens(batch: int = 2, length: int = LENGTH, seed: int = 0) -> Tensor:
    return models.tokens(batch, length, seed)


@dataclass
class Oracle:
    """Decodes one sequence with the model's own layers; hooks on the norm and the FFN of each decide, token by token.

    Attributes:
        logits: [V] after the prompt and after each token.
        skips: for each decoded token, the layers whose FFN was skipped.
        cosines: all cosines that decided.
    """

    name: str
    entry: SkipFFNAdaptive
    logits: list[Tensor] = field(default_factory=list)
    skips: list[list[int]] = field(default_factory=list)
    cosines: list[float] = field(default_factory=list)

    @torch.no_grad()
    def run(self, ids: Tensor, prompt: int = PROMPT, dtype: torch.dtype = torch.float64) -> Oracle:
        full = model(self.name, dtype)
        layers = next(each for each in full.modules() if isinstance(each, nn.ModuleList))
        self.layers, self.deciding = len(layers), False
        handles = []
        for number, layer in enumerate(layers):
            norm = getattr(layer, NORMS.get(self.name, "post_attention_layernorm"))
            handles.append(norm.register_forward_pre_hook(lambda _, args: setattr(self, "stream", args[0])))
            handles.append(layer.mlp.register_forward_hook(lambda _, args, out, n=number: self._decide(n, out)))
        try:
            self.cache = DynamicCache()
            self.logits.append(full(input_ids=ids[None, :prompt], past_key_values=self.cache).logits[0, -1])
            for at in range(prompt, len(ids)):
                self.deciding = at - prompt >= self.entry.warmup_tokens
                self.triggered = False
                self.skips.append([])
                out = full(input_ids=ids[None, at : at + 1], past_key_values=self.cache)
                self.logits.append(out.logits[0, -1])
        finally:
            for handle in handles:
                handle.remove()
        return self

    def _decide(self, layer: int, out: Tensor) -> Tensor:
        warm = self.entry.cold_start <= layer < self.layers - self.entry.cold_end
        if not (self.deciding and warm):
            return out
        if self.triggered and len(self.skips[-1]) < math.floor(self.entry.max_share * self.layers):
            self.skips[-1].append(layer)
            return torch.zeros_like(out)
        u, h = self.stream.float(), (self.stream + out).float()
        self.cosines.append(float(torch.nn.functional.cosine_similarity(u, h, dim=-1)))
        if self.entry.threshold is not None and self.cosines[-1] >= self.entry.threshold:
            self.triggered = True
        return out


@cache
def threshold(name: str) -> float:
    """In the largest gap among the middle half of the cosines in the full model."""
    oracle = [Oracle(name, SkipFFNAdaptive(**EVERY)).run(row) for row in tokens()]
    found = sorted(value for each in oracle for value in each.cosines)
    middle = found[len(found) // 4 : 3 * len(found) // 4]
    _, low, high = max((high - low, low, high) for low, high in pairwise(middle))
    return (low + high) / 2


def settings(name: str, case: str = "plain") -> SkipFFNAdaptive:
    cases: dict[str, dict[str, Any]] = {
        "plain": EVERY,
        "warm-up": EVERY | {"warmup_tokens": 3},
        "cold ends": EVERY | {"cold_start": 1, "cold_end": 1},
        "few": EVERY | {"max_share": 0.4},
    }
    return SkipFFNAdaptive(threshold(name), **cases[case])


def steps(opt: Any, ids: Tensor, prompt: int = PROMPT, **options: Any) -> tuple[Tensor, Any]:
    """Logits [B, 1 + T, V] after the prompt and every token of ids, decoded one by one; and the cache."""
    logits, cache = opt.prefill(ids[:, :prompt], **options)
    results = [logits, *(opt.decode(ids[:, at], cache) for at in range(prompt, ids.shape[1]))]
    return torch.stack(results, dim=1), cache


def skips(opt: Any, ids: Tensor, prompt: int = PROMPT) -> list[list[list[int]]]:
    """For each row and decoded token, the layers whose FFN was skipped."""
    found = skipped_ffns(opt, ids[:, :prompt], ids[:, prompt:])
    batch, count = ids.shape[0], ids.shape[1] - prompt
    return [[[n for n, each in found.items() if each[b, s]] for s in range(count)] for b in range(batch)]


CASES = [
    *(("deep", case) for case in ("plain", "warm-up", "cold ends", "few")),
    ("mixtral", "plain"),
    *(pytest.param(name, "plain", marks=pytest.mark.slow) for name in ("gpt2", "gpt_neox")),
]


@pytest.mark.parametrize(("name", "case"), CASES)
def test_decoding_is_that_of_the_oracle(name: str, case: str) -> None:
    """Decisions, logits and caches, of a batch of two, token by token and all at once."""
    entry, ids = settings(name, case), tokens()
    opt = executable(name, entry)
    logits, cache = steps(opt, ids)
    oracles = [Oracle(name, entry).run(row) for row in ids]
    assert any(skipped for each in oracles for skipped in each.skips), "the case decides nothing"
    assert any(len(skipped) < opt.program.layers - 1 for each in oracles for skipped in each.skips)
    assert skips(opt, ids) == [each.skips for each in oracles]
    assert relative_difference(logits, torch.stack([torch.stack(each.logits) for each in oracles])) < FLOAT64
    for row, oracle in enumerate(oracles):
        for slot, layer in enumerate(oracle.cache.layers):
            ours = cache.buffers[f"key_{slot}"][row, :, :LENGTH], cache.buffers[f"value_{slot}"][row, :, :LENGTH]
            for mine, other in zip(ours, (layer.keys[0], layer.values[0]), strict=True):
                window = other.shape[1]  # a sliding layer of the model keeps its window alone
                assert torch.allclose(mine[:, -window:], other, atol=1e-9)
    prefill, cache = opt.prefill(ids[:, :PROMPT])
    chunk = torch.cat([prefill[:, None], opt.decode(ids[:, PROMPT:], cache)], dim=1)
    assert relative_difference(chunk, logits) < FLOAT64


def test_together_with_skipped_sublayers_and_a_quantized_cache() -> None:
    """Layers keep their numbers although others are gone before; the cache is quantized behind."""
    gone, codes = SkipSublayers(layers=(0,), attention=(3,)), QuantizeKV(granularity="token", condition=False)
    ids, dtype = tokens(), torch.float32
    opt = executable("deep", gone, SkipFFNAdaptive(-1.0, **EVERY | {"cold_start": 2}), codes, dtype=dtype)
    assert [each.meta["layer"] for each in opt.program.nodes(GATE)] == [3, 4, 5] and opt.program.layers == 6
    full = executable("deep", gone, codes, dtype=dtype)
    dropped = executable("deep", SkipSublayers((3,), (3, 4, 5), (0,)), codes, dtype=dtype)
    logits, cache = full.prefill(ids[:, :PROMPT])
    expected = torch.stack([logits, *(dropped.decode(ids[:, at], cache) for at in range(PROMPT, LENGTH))], dim=1)
    assert torch.equal(steps(opt, ids)[0], expected)
    share = skipped_share(opt, ids[:, :PROMPT], ids[:, PROMPT:])
    assert share == pytest.approx(3 / 6)


# ONNX Runtime

ONNX = ["mixtral", *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES if name != "mixtral")]


@pytest.mark.parametrize("name", ONNX)
def test_onnx_runtime_decides_the_same(name: str) -> None:
    """In float32, with thresholds that no cosine comes near to."""
    entry, ids = settings(name), tokens()
    decisive = [abs(value - entry.threshold) for row in ids for value in Oracle(name, entry).run(row).cosines]
    assert min(decisive) > 1e-5
    eager, ours = (executable(name, entry, target=t, dtype=torch.float32) for t in ("eager", "onnxruntime"))
    assert skips(ours, ids) == skips(eager, ids) == [Oracle(name, entry).run(row).skips for row in ids]
    with patch("skipstone.runtime.onnx.session.lower", side_effect=AssertionError("lowered again")):
        first, second = (steps(ours, ids)[0] for _ in range(2))
    assert torch.equal(first, second) and relative_difference(first, steps(eager, ids)[0]) < 1e-4
    prefill, cache = ours.prefill(ids[:, :PROMPT])
    chunk = torch.cat([prefill[:, None], ours.decode(ids[:, PROMPT:], cache)], dim=1)
    assert relative_difference(chunk, steps(eager, ids)[0]) < 1e-4


# Generation and caches


def test_generate() -> None:
    """Greedy decoding is decoding step by step; a prompt that is read in chunks is a prompt all the same."""
    opt = executable("deep", settings("deep"))
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    prompts = tokens(2, PROMPT)
    mask = torch.ones_like(prompts)
    mask[1, :3] = 0
    for each in (None, mask):
        out = opt.generate(prompts, attention_mask=each, **options)
        logits, _ = steps(opt, out, attention_mask=each)
        assert torch.equal(logits[:, :-1].argmax(-1), out[:, PROMPT:])
        # transformers' own loop
        assert torch.equal(opt.generate(prompts, attention_mask=each, prefill_chunk_size=3, **options), out)
        assert any(any(row) for row in skips(opt, out))


def test_beams_carry_their_prompts_along() -> None:
    opt, prompts = executable("deep", settings("deep", "warm-up")), tokens(2, PROMPT)
    mask = torch.ones_like(prompts)
    mask[0, :2] = 0
    options = {"max_new_tokens": 8, "num_beams": 3, "eos_token_id": None, "length_penalty": 0.0, "output_scores": True}
    out = opt.generate(prompts, attention_mask=mask, return_dict_in_generate=True, **options)
    logits, _ = steps(opt, out.sequences, attention_mask=mask)
    new = out.sequences[:, PROMPT:, None]
    scores = logits[:, :-1].float().log_softmax(-1).gather(2, new).sum((1, 2))
    assert torch.allclose(scores, out.sequences_scores.to(scores.dtype), atol=1e-4)


# Program


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


def test_too_few_ffns_are_refused() -> None:
    with pytest.raises(Unsupported, match="0 FFNs to skip in layers 1 to 4; it needs two"):
        Pipeline([SkipSublayers(ffn=(1, 2, 3, 4)), SkipFFNAdaptive()]).run(executable("deep").program)


def test_the_program_says_what_is_spared() -> None:
    program = executable("deep", settings("deep")).program
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
    program = executable("deep", settings("deep")).program
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


# Calibration


def test_calibration_finds_ffns_that_do_nothing() -> None:
    """Layers 2 to 4 of six hardly turn the stream."""
    planted = captured("deep").copy()
    for layer in (2, 3, 4):
        (ffn,) = [each for each in find_stream(planted).layer(layer) if each.kind is SublayerKind.FFN]
        with planted.graph.inserting_after(ffn.branch):
            small = planted.call(torch.ops.aten.mul.Tensor, ffn.branch, 1e-3)
        ffn.branch.replace_all_uses_with(small, delete_user_cb=lambda user, small=small: user is not small)
    planted.recompile()
    batches = token_batches([tokens(2, 30)], planted.source)
    layers, cosines = ffn_cosines(planted, batches)
    assert layers == list(range(6)) and cosines.shape == (6, 60)
    assert bool((cosines[2:5] > 0.99).all()) and bool((cosines[[0, 1, 5]] < 0.99).any(dim=1).all())
    entry = calibrate_adaptive_ffn(planted, batches, share=0.3, saturated=0.98, warmup_tokens=2, max_share=0.5)
    assert (entry.cold_start, entry.cold_end, entry.warmup_tokens, entry.max_share) == (2, 1, 2, 0.5)
    assert entry.threshold is not None and entry.threshold > 0.99


def test_calibration_refuses_with_its_numbers() -> None:
    batches = token_batches([tokens(2, 30)], captured("deep").source)
    with pytest.raises(
        SkipstoneError, match=r"25% of the FFNs .* a token would skip 0.0%. Mean cosines by layer: 0: 0\.\d"
    ):
        calibrate_adaptive_ffn(captured("deep"), batches, saturated=0.999999)
