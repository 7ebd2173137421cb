"""The matrix that every pass must meet, end to end through `skipstone.optimize`.

Each pass has a plan and an independent reference: the user's own model, changed by forward hooks where the pass
leaves something out, and run on every row alone: without padding, without a cache, in one piece.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import onnxruntime
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import skipstone
from skipstone.ir.capture.huggingface import capture_huggingface
from skipstone.ir.capture.validate import relative_difference
from skipstone.ir.program import Program
from skipstone.passes.skip_sublayers import SkipSublayers
from skipstone.plan import Plan

LAYERS, VOCABULARY, POSITIONS, PAD = 4, 61, 96, 0
TOLERANCE = 1e-4
"""Largest difference of logits in float32, over their range."""

ROUNDING = 1.5
"""How much larger our error in bfloat16 may be than that of the Hugging Face model."""


@dataclass(frozen=True)
class Case:
    """A pass under test.

    Attributes:
        plan: what `optimize` is given.
        skipped: module paths whose results the reference replaces by zeros.
    """

    plan: Plan
    skipped: tuple[str, ...] = ()


def skipping(attention: tuple[int, ...], ffn: tuple[int, ...], layers: tuple[int, ...] = ()) -> Case:
    paths = [f"model.layers.{layer}.self_attn" for layer in (*attention, *layers)]
    paths += [f"model.layers.{layer}.mlp" for layer in (*ffn, *layers)]
    return Case(Plan([SkipSublayers(attention, ffn, layers)]), tuple(paths))


CASES = {"empty": Case(Plan()), "skip": skipping(attention=(0,), ffn=(LAYERS - 1,), layers=(2,))}
KV_HEADS = {"mha": 4, "gqa": 2}
TARGETS = ("eager", "onnxruntime")
CELLS = [
    pytest.param(heads, case, target, marks=pytest.mark.slow if heads == "mha" else ())
    for target in TARGETS
    for case in CASES
    for heads in KV_HEADS
]


pytestmark = pytest.mark.usefixtures("one_thread")


@cache
def original(heads: str, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """The user's model. Weights are wide enough that a mistake shows, and narrow enough that bfloat16 is not noise."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=KV_HEADS[heads], max_position_embeddings=POSITIONS, initializer_range=0.2,
        pad_token_id=PAD, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().to(dtype)


def zeroed(model: nn.Module, paths: tuple[str, ...]) -> Any:
    """A copy of `model` in which these modules give zeros."""

    def zero(module: nn.Module, args: Any, out: Any) -> Any:
        return (torch.zeros_like(out[0]), *out[1:]) if isinstance(out, tuple) else torch.zeros_like(out)

    model = copy.deepcopy(model)
    for path in paths:
        model.get_submodule(path).register_forward_hook(zero)
    return model


@cache
def reference(heads: str, case: str, dtype: torch.dtype = torch.float32) -> Any:
    return zeroed(original(heads), CASES[case].skipped).to(dtype)


@cache
def executable(heads: str, case: str, target: Any, dtype: torch.dtype = torch.float32) -> Any:
    return optimized(original(heads, dtype), CASES[case].plan, target)


def optimized(model: Any, plan: Plan, target: Any) -> Any:
    """What `optimize` gives. Capturing, which is the same for every plan and target, is done once a model."""
    with patch.object(import_module("skipstone.optimize"), "capture", lambda model, *_: captured(model)):
        return skipstone.optimize(model, plan, target=target, threads=1, progress=False)


@cache
def captured(model: Any) -> Program:
    return capture_huggingface(model)


@torch.no_grad()
def expected(model: Any, ids: Tensor, mask: Tensor) -> list[Tensor]:
    """Logits of each row's valid tokens, each row on its own."""
    return [model(row[valid][None], use_cache=False).logits[0] for row, valid in zip(ids, mask.bool(), strict=True)]


def batch(rows: int, side: str, width: int = 9) -> tuple[Tensor, Tensor]:
    """Random tokens [rows, width], the last row padded by three on that side."""
    generator = torch.Generator().manual_seed(rows)
    ids, mask = torch.randint(3, VOCABULARY, (rows, width), generator=generator), torch.ones(rows, width).long()
    mask[-1, {"left": slice(3), "right": slice(width - 3, width), "none": slice(0)}[side]] = 0
    return ids.where(mask.bool(), PAD), mask


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("side", ["left", "right", "none"])
@pytest.mark.parametrize(("heads", "case", "target"), CELLS)
def test_prefill(heads: str, case: str, target: str, side: str, rows: int) -> None:
    ours, (ids, mask) = executable(heads, case, target), batch(rows, side)
    wanted = expected(reference(heads, case), ids, mask)
    logits, (last, cache) = ours(ids, mask).logits, ours.prefill(ids, mask)
    assert cache.lengths.tolist() == mask.sum(1).tolist()
    for row, want in enumerate(wanted):
        assert relative_difference(logits[row, mask[row].bool()], want) < TOLERANCE
        assert relative_difference(last[row], want[-1]) < TOLERANCE


@pytest.mark.parametrize("past", [1, 6])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("side", ["left", "right", "none"])
@pytest.mark.parametrize(("heads", "case", "target"), CELLS)
def test_stepwise_decode(heads: str, case: str, target: str, side: str, rows: int, past: int) -> None:
    """A padded prompt, of which `past` tokens are valid in the shortest row, single steps, and several at once."""
    ours = executable(heads, case, target)
    ids, mask = batch(rows, side, width=past if side == "none" else past + 3)
    more = torch.randint(3, VOCABULARY, (rows, 7))
    logits, cache = ours.prefill(ids, mask)
    steps = [logits[:, None], *(ours.decode(column, cache)[:, None] for column in more[:, :4].unbind(1))]
    steps.append(ours.decode(more[:, 4:], cache))
    for row, tokens in enumerate(more):
        sequence = torch.cat([ids[row, mask[row].bool()], tokens])[None]
        (want,) = expected(reference(heads, case), sequence, torch.ones_like(sequence))
        assert relative_difference(torch.cat(steps, 1)[row], want[-8:]) < TOLERANCE


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize(("heads", "case", "target"), CELLS)
def test_greedy_tokens(heads: str, case: str, target: str, rows: int) -> None:
    ids, mask = batch(rows, "left")
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    ours = executable(heads, case, target).generate(ids, **options)
    assert torch.equal(ours, reference(heads, case).generate(ids, **options))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("heads", [pytest.param("mha", marks=pytest.mark.slow), "gqa"])
def test_bfloat16_is_as_close_to_float64_as_the_model_itself(heads: str, case: str) -> None:
    """Root mean square over all logits: the largest error is that of one unlucky logit, and its ratio is mostly noise.

    Both are measured on the same 4 x 24 x 61 logits, one-shot and, on our side, stepwise too.
    """
    half = torch.bfloat16
    ours, ids = executable(heads, case, "eager", half), torch.randint(3, VOCABULARY, (4, 24))
    exact = zeroed(original(heads, half), CASES[case].skipped).to(torch.float64)
    theirs = zeroed(original(heads, half), CASES[case].skipped)
    theirs.set_attn_implementation("eager")
    assert next(iter(ours.program.tensors().values())).dtype is half
    with torch.no_grad():
        truth, bound = (m(ids, use_cache=False).logits.double() for m in (exact, theirs))
    _, cache = ours.prefill(ids[:, :1])
    stepwise = torch.stack([ours.decode(column, cache) for column in ids[:, 1:].unbind(1)], dim=1)

    def error(logits: Tensor, rows: slice) -> float:
        return float((logits.double() - truth[:, rows]).square().mean().sqrt())

    assert error(bound, slice(None)) > 1e-4 * float(truth.max() - truth.min()), "rounding must show"
    assert error(ours(ids).logits, slice(None)) <= ROUNDING * error(bound, slice(None))
    assert error(stepwise, slice(1, None)) <= ROUNDING * error(bound[:, 1:], slice(1, None))


@pytest.mark.parametrize(("heads", "case", "target"), CELLS)
def test_a_second_call_gives_the_same_and_builds_nothing(
    heads: str, case: str, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, (ids, mask) = executable(heads, case, target), batch(2, "left")
    calls: tuple[Callable[[], Tensor], ...] = (
        lambda: ours(ids, mask).logits,
        lambda: ours.prefill(ids, mask)[0],
        lambda: ours.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False),
    )
    first = [call() for call in calls]

    def built(*args: Any, **options: Any) -> None:
        pytest.fail("a call of an executable built something")

    for owner, name in (
        (torch.export, "export"),
        (torch.onnx, "export"),
        (torch, "compile"),
        (onnxruntime, "InferenceSession"),
        (Program, "copy"),
    ):
        monkeypatch.setattr(owner, name, built)
    for call, before in zip(calls, first, strict=True):
        assert torch.equal(call(), before)


def test_a_plan_that_was_saved_and_loaded_gives_the_same_tokens(tmp_path: Path) -> None:
    first, path = executable("gqa", "skip", "eager"), tmp_path / "plan.json"
    plan = Plan(CASES["skip"].plan.entries, model=first.program.source.fingerprint)
    plan.save(path)
    again = optimized(original("gqa"), Plan.load(path), "eager")
    ids, mask = batch(2, "left")
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    assert torch.equal(again.generate(ids, **options), first.generate(ids, **options))


# Random sets of sublayers


SUBSETS = st.sets(st.integers(0, LAYERS - 1), max_size=LAYERS).map(lambda chosen: tuple(sorted(chosen)))


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(
    sets=st.tuples(SUBSETS, SUBSETS, SUBSETS).filter(
        lambda sets: any(sets) and len({*sets[0], *sets[2]}) + len({*sets[1], *sets[2]}) < 2 * LAYERS
    )
)
def test_any_set_of_sublayers_can_be_skipped(sets: tuple[tuple[int, ...], ...]) -> None:
    """Where no attention is left there is nothing to cache, and the executable says so."""
    case, model = skipping(*sets), original("gqa")
    ours = optimized(model, case.plan, "eager")
    assert (ours.cache_refusal is not None) == ({*sets[0], *sets[2]} == set(range(LAYERS)))
    ids, mask = batch(2, "left")
    logits = ours(ids, mask).logits
    for row, want in enumerate(expected(zeroed(model, case.skipped), ids, mask)):
        assert relative_difference(logits[row, mask[row].bool()], want) < TOLERANCE
    if ours.supports_cache:
        last, cache = ours.prefill(ids[:, :6], mask[:, :6])
        for column in ids[:, 6:].unbind(1):
            last = ours.decode(column, cache)
        assert relative_difference(last, logits[:, -1]) < TOLERANCE
