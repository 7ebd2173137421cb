"""Models that fill in masks, from data to plan: masked sequences, and what is measured, chosen and proved on them."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Collection
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import skipstone
from skipstone import Budget, Plan, SkipSublayers, certify, mask_tokens
from skipstone.budget import Comparison, data_hash, hold_out
from skipstone.calibrate import IGNORED, Batch, token_batches
from skipstone.errors import InvalidInput, Unsupported
from skipstone.ir.capture.huggingface import capture_huggingface
from skipstone.ir.program import Program
from skipstone.ir.stream import find_stream
from skipstone.report import Timing, measure
from skipstone.runtime.eager import EagerSession
from skipstone.search import search
from skipstone.similarity import measure_similarity, similarity_by_mask_ratio
from skipstone.units import Space, Unit
from tests import models
from tests.models import MASK

LAYERS = Space(kinds=("layer",), protected=())
BEGIN = 1


def texts(batch: int, length: int, seed: int = 0) -> Tensor:
    """Random texts without masks, each after the begin token: int64 [batch, length]."""
    drawn = torch.randint(3, MASK, (batch, length), generator=torch.Generator().manual_seed(seed))
    drawn[:, 0] = BEGIN
    return drawn


# ------------------------------------------------------------------------------------------------- masked sequences


def test_masked_sequences_say_what_was_there() -> None:
    whole, mask = texts(5, 9), torch.tensor([[0, 0] + [1] * 7] * 5)
    first, second = mask_tokens([{"input_ids": whole, "attention_mask": mask}, whole], MASK, keep=(BEGIN,))
    hidden = first["input_ids"] == MASK
    assert torch.equal(first["labels"] != IGNORED, hidden)
    assert torch.equal(torch.where(hidden, first["labels"], first["input_ids"]), whole)
    assert torch.equal(first["attention_mask"], mask)
    assert not bool(hidden[:, :2].any())
    assert not bool((second["input_ids"][:, 0] == MASK).any())
    assert bool(hidden.any(dim=1).all())


def test_every_number_of_masks_is_as_likely_and_every_place() -> None:
    whole = texts(700, 8)
    (masked,) = mask_tokens(whole, MASK, keep=(BEGIN,), seed=3)
    hidden = masked["input_ids"] == MASK
    assert torch.equal(torch.bincount(hidden.sum(1), minlength=8), torch.tensor([0] + [100] * 7))
    share = hidden[:, 1:].double().mean(0)
    assert float((share - 4 / 7).abs().max()) < 4 * math.sqrt(4 / 7 * 3 / 7 / 700)
    again, other = (mask_tokens(whole, MASK, keep=(BEGIN,), seed=seed)[0]["input_ids"] for seed in (3, 4))
    assert torch.equal(again, masked["input_ids"])
    assert not torch.equal(other, again)


def test_a_share_is_kept_in_every_sequence() -> None:
    mask = torch.arange(10) < torch.tensor([[10], [4], [1]])
    (masked,) = mask_tokens({"input_ids": texts(3, 10), "attention_mask": mask}, MASK, share=0.3)
    assert (masked["input_ids"] == MASK).sum(1).tolist() == [3, 1, 1]


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (texts(1, 4), {"share": 0.0}, "share is 0.0"),
        (texts(1, 4), {"share": 1.5}, "share is 1.5"),
        ([texts(1, 4), torch.full((1, 2), MASK)], {}, "batch 1 holds the mask token 60"),
        ([texts(1, 4).float()], {}, "batch 0 is torch.float32"),
        (["text"], {}, "batch 0 is a text"),
    ],
)
def test_what_cannot_be_masked_is_refused(data: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        mask_tokens(data, MASK, **options)


@pytest.mark.parametrize("token", [None, True, "[MASK]"])
def test_what_is_no_mask_token_is_refused(token: Any) -> None:
    with pytest.raises(InvalidInput, match=r"mask_token is .*Give the token id"):
        mask_tokens(texts(1, 4), token)


def test_calibration_data_takes_labels_along() -> None:
    source, mask = program().source, torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    (item,) = mask_tokens({"input_ids": texts(2, 6), "attention_mask": mask}, MASK)
    (batch,) = token_batches([item], source)
    assert torch.equal(batch.counted, batch.valid & (batch.tokens == MASK))
    assert torch.equal(batch.text[1, :4], texts(2, 6)[1, 2:])
    assert torch.equal(batch.targets, torch.where(batch.counted, batch.text, IGNORED))
    assert torch.equal(batch.sequences(torch.tensor([False, True])).targets, batch.targets[1:])
    plain = Batch(batch.text, batch.valid)
    assert plain.targets[1].tolist() == [*batch.text[1, 1:4].tolist(), IGNORED, IGNORED, IGNORED]
    with pytest.raises(InvalidInput, match=r"labels \[2, 5\]"):
        token_batches([item | {"labels": item["labels"][:, :5]}], source)
    with pytest.raises(InvalidInput, match="holds labels outside"):
        token_batches([item | {"labels": item["labels"].masked_fill(item["labels"] == IGNORED, -1)}], source)


def test_a_text_stays_the_same_text_however_it_is_masked() -> None:
    """What is held out must not stand among the data that a plan is chosen on under other masks."""
    source, whole = program().source, texts(5, 8)
    once, twice = (token_batches(mask_tokens(whole, MASK, seed=seed), source) for seed in (0, 1))
    assert data_hash(once) == data_hash(twice)
    chosen_on, proved_on = hold_out([*once, *twice], share=0.3)
    assert sum(len(each.tokens) for each in proved_on) == 6
    assert sum(len(each.tokens) for each in chosen_on) == 4
    assert all(each.labels is not None for each in (*chosen_on, *proved_on))


# ----------------------------------------------------------------------------------- what is measured on the masks

MASK_SIZE, TEXT_SIZE = 1.0, 5.0  # lengths of the embeddings


@cache
def made() -> Any:
    """A model of which each layer's work is known.

    Channel 0 of the stream marks masks and channel 2 other tokens. Layer 0 averages the marks of all tokens in its
    attention and writes the result to channel 1. The FFN of layer 1 works on other tokens than masks, and that of layer
    2 on all; nothing else does anything.
    """
    changed = copy.deepcopy(models.model("llada"))
    with torch.no_grad():
        for layer in changed.model.layers:
            layer.self_attn.o_proj.weight.zero_()
        for number in (0, 1):
            changed.model.layers[number].mlp.down_proj.weight.zero_()
        embeddings = changed.model.embed_tokens.weight
        embeddings[:, :3] = 0.0
        embeddings[:MASK, 2] = embeddings[:MASK, 3:].norm(dim=1)
        embeddings[MASK, 0] = embeddings[MASK, 3:].norm()
        sizes = torch.full((models.VOCABULARY, 1), TEXT_SIZE)
        sizes[MASK] = MASK_SIZE
        embeddings *= sizes / embeddings.norm(dim=1, keepdim=True)
        first = changed.model.layers[0].self_attn
        first.q_proj.weight.zero_()
        first.v_proj.weight.zero_()
        first.v_proj.weight[0, 0] = first.o_proj.weight[1, 0] = 1.0
        second = changed.model.layers[1].mlp
        second.gate_proj.weight[:, :2] = second.gate_proj.weight[:, 3:] = 0.0
        second.down_proj.weight.normal_(std=0.3)
    return changed


@cache
def program() -> Program:
    return capture_huggingface(made())


def batches(share: float | None = None, count: int = 6, length: int = 16) -> list[Batch]:
    return token_batches(mask_tokens(list(texts(count, length).split(2)), MASK, share=share), program().source)


def test_similarity_is_that_of_the_masks_and_follows_their_share() -> None:
    """The stream x gets s on a new axis, s being the mean mark: cos = |x| / sqrt(|x|^2 + s^2).

    Half of a mask's square length is its mark's, which the norm before the attention scales to sqrt(hidden / 2).
    """
    shares = (0.125, 0.375, 0.6875, 1.0)
    data = [batch for share in shares for batch in batches(share, count=2)]
    mark = math.sqrt(32 / 2)

    def turned(size: float, share: float) -> float:
        return 1 - size / math.hypot(size, share * mark)

    found = similarity_by_mask_ratio(program(), data, buckets=4)
    for share, each in zip(shares, found, strict=True):
        assert each.tokens == share * 32
        assert float(each.sublayers.mean[0]) == pytest.approx(turned(MASK_SIZE, share), rel=1e-3)
        assert float(each.sublayers.maximum[3]) == 0, "the FFN of layer 1 leaves masks as they are"
    clean = [batch.valid & ~batch.counted for batch in data[:3]]
    for share, batch, kept in zip(shares, data, clean, strict=False):
        context = measure_similarity(program(), [batch], [kept])
        assert float(context.sublayers.mean[0]) == pytest.approx(turned(TEXT_SIZE, share), rel=1e-3)
        assert float(context.sublayers.minimum[3]) > 0.01
    everywhere = measure_similarity(program(), data[:1], [data[0].valid]).sublayers.mean[0]
    assert float(everywhere) < float(found[0].sublayers.mean[0]) / 2, "clean context hides what happens to masks"


def times(kinds: Collection[str]) -> dict[Unit, float]:
    units = Space(kinds=tuple(kinds), protected=()).units(find_stream(program()))  # type: ignore[arg-type]
    return dict.fromkeys(units, 1.0)


def test_a_layer_that_only_works_on_other_tokens_is_free() -> None:
    options: dict[str, Any] = {"space": LAYERS, "milliseconds": times(["layer"]), "count": 1}
    (step,) = search(program(), batches(), **options).steps
    assert (step.unit, step.objective) == (Unit("layer", 1), 0)
    everywhere = [Batch(each.tokens, each.valid) for each in batches()]
    (step,) = search(program(), everywhere, **options).steps
    assert step.objective > 0.01, "over all tokens no layer is free"


def test_planted_sublayers_are_found_exactly() -> None:
    space = Space(protected=())
    options = {"space": space, "milliseconds": times(["attention", "ffn"])}
    useless = {Unit("attention", 1), Unit("attention", 2), Unit("ffn", 0), Unit("ffn", 1)}
    found = search(program(), batches(), limit=0.0, **options)
    assert {step.unit for step in found.steps} == useless
    assert {step.objective for step in found.steps} == {0.0}


def test_likelihood_is_that_of_the_masked_tokens() -> None:
    options = {"space": LAYERS, "milliseconds": times(["layer"]), "count": 1}
    rises = {}
    for skipped in range(3):
        less, total, count = copy.deepcopy(made()), 0.0, 0
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            less.model.layers[skipped].get_submodule(name).weight.data.zero_()
        for batch in batches():
            with torch.no_grad():
                before, after = (
                    each(input_ids=batch.tokens).logits.double().log_softmax(-1) for each in (made(), less)
                )
            for row, place in (batch.tokens == MASK).nonzero().tolist():
                right = int(batch.labels[row, place])  # type: ignore[index]
                total += float(before[row, place, right] - after[row, place, right])
                count += 1
        rises[skipped] = total / count
    found = search(program(), batches(), objective="nll", **options).steps[0]
    best = min(rises, key=rises.__getitem__)
    assert found.unit == Unit("layer", best)
    assert found.objective == pytest.approx(rises[best], abs=1e-5)


def test_data_and_model_have_to_fit() -> None:
    options: dict[str, Any] = {"space": LAYERS, "milliseconds": times(["layer"]), "count": 1}
    with pytest.raises(Unsupported, match=r"sees them.*skipstone\.mask_tokens"):
        search(program(), [Batch(each.tokens, each.valid) for each in batches()], objective="nll", **options)
    with pytest.raises(InvalidInput, match="the model predicts next tokens"):
        search(models.program("llama"), batches(), **options)


# ------------------------------------------------------------------------------------------------- what is proved


def test_a_comparison_is_over_the_masked_tokens() -> None:
    (batch,) = batches(share=0.25, count=2)
    exact, changed = (torch.randn(2, 16, models.VOCABULARY, dtype=torch.float64) for _ in range(2))
    seen = Comparison.of(exact, changed, batch)
    assert seen.tokens.tolist() == [4, 4]
    before, after = (each.log_softmax(-1) for each in (exact, changed))
    for row in range(2):
        places = batch.counted[row].nonzero().flatten()
        right = batch.text[row, places]
        nll = -before[row, places, right].sum()
        torch.testing.assert_close(seen.nll[row], nll)
        torch.testing.assert_close(seen.increase[row], -after[row, places, right].sum() - nll)
        kl = (before.exp() * (before - after)).sum(-1)[row, places].sum()
        torch.testing.assert_close(seen.kl[row], kl)


def optimized(data: Any, **options: Any) -> Any:
    return skipstone.optimize(made(), calibration=data, target="eager", progress=False, **options)


def test_a_budget_is_searched_and_proved_on_masked_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layer 1 is the only one that may go: of it, nothing reaches a mask."""
    monkeypatch.setattr(sys.modules[skipstone.optimize.__module__], "capture", lambda *_: program().copy())
    monkeypatch.setattr(certify, "speedup", lambda *_: 2.0)
    data = mask_tokens(list(texts(20, 16).split(4)), MASK, keep=(BEGIN,))
    opt = optimized(data, budget=Budget(kl=0.0, top1=0.9))
    assert list(opt.plan) == [SkipSublayers(attention=(1,), ffn=(1,))]
    assert {each.metric: each.value for each in opt.plan.certificates} == {"kl": 0.0, "top1": 1.0}
    tokens, answer = texts(2, 4), {"length": 6, "steps": 3}
    assert torch.equal(opt.denoise(tokens, **answer), optimized(None).denoise(tokens, **answer))
    refused = optimized(data, plan=Plan([SkipSublayers(layers=(0,))]), budget=Budget(kl=1e-6))
    assert len(refused.plan) == 0
    assert "the model is unchanged" in refused.report.budget[-1]
    with pytest.raises(Unsupported, match=r"skipstone\.mask_tokens"):
        optimized(list(texts(20, 16).split(4)), budget=Budget(kl=0.1))


def test_time_is_that_of_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over all of the first sequence: without a cache there are no steps whose time could count."""
    full, changed = (skipstone.Executable(EagerSession(program())) for _ in range(2))
    seen: list[tuple[dict[str, Any], Tensor]] = []

    def measured(systems: dict[str, Any], prompt: Tensor, *options: Any) -> dict[str, Timing]:
        seen.append((systems, prompt))
        found = measure(systems, prompt, *options)
        assert all(each.decode_ms is None and each.prefill_ms > 0 for each in found.values())
        return {name: replace(each, prefill_ms={"full": 6.0, "changed": 4.0}[name]) for name, each in found.items()}

    monkeypatch.setattr(certify, "measure", measured)
    data = batches()
    assert certify.speedup(full, changed, data) == 1.5
    ((systems, prompt),) = seen
    assert systems == {"full": full, "changed": changed}
    assert torch.equal(prompt, data[0].tokens[:1])
