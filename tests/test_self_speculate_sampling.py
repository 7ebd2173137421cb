"""Sampling with a draft: what is drawn has the distribution of the model."""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from skipstone import Plan, SelfSpeculate, SkipSublayers, optimize
from tests.speculation_cases import FAIR, LONG, PERFECT, built, counted, prompt

pytestmark = pytest.mark.usefixtures("one_thread")

DRAWN, SMALL = 4, 3
"""New tokens, of so many words."""


@cache
def small() -> tuple[Any, Any]:
    """A model of few words with a draft that is far off, and the Hugging Face model that it is."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=SMALL, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16, initializer_range=0.6, eos_token_id=None, bos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    plan = Plan([SelfSpeculate(tokens=2, skip=SkipSublayers(ffn=(0,)))])
    return optimize(model, plan, target="eager", progress=False), model


def exact(ids: list[int], temperature: float, top_k: int) -> Tensor:
    """float64 [V ** DRAWN], the probability of each continuation of a prompt."""
    chances = torch.ones(1, dtype=torch.float64)
    for number in range(DRAWN):
        rows = torch.tensor([[*ids, *each] for each in itertools.product(range(SMALL), repeat=number)])
        with torch.no_grad():
            scores = small()[1](rows).logits[:, -1].double() / temperature
        least = scores.topk(top_k).values[:, -1:]
        chances = (chances.unsqueeze(1) * scores.where(scores >= least, -torch.inf).softmax(-1)).flatten()
    return chances


def improbability(ids: list[int], calls: int, batch: int, temperature: float, top_k: int) -> float:
    """The chance of a chi-squared statistic at least as large, if what is generated has the right distribution."""
    opt, wanted = small()[0], exact(ids, temperature, top_k)
    place = SMALL ** torch.arange(DRAWN - 1, -1, -1)
    seen = torch.zeros_like(wanted)
    options = {"do_sample": True, "temperature": temperature, "top_k": top_k, "max_new_tokens": DRAWN}
    for _ in range(calls):
        drawn = opt.generate(torch.tensor([ids] * batch), **options)[:, len(ids) :]
        seen += ((drawn * place).sum(1)).bincount(minlength=len(wanted))
    if seen[wanted == 0].any():
        return 0.0
    expected = wanted * calls * batch
    often = expected >= 5  # the rest is one cell
    cells = [torch.cat([each[often], each[~often].sum().reshape(1)]) for each in (seen, expected)]
    cells = [each[cells[1] > 0] for each in cells]
    statistic = ((cells[0] - cells[1]).square() / cells[1]).sum()
    return float(torch.special.gammaincc(torch.tensor((len(cells[1]) - 1) / 2), statistic.float() / 2))


SETTINGS = [(1.0, SMALL), (0.7, SMALL), (1.3, 2)]


@pytest.mark.parametrize(("calls", "batch"), [(2, 1500), (500, 2)])
@pytest.mark.parametrize(("temperature", "top_k"), SETTINGS)
def test_samples_have_the_distribution_of_the_model(calls: int, batch: int, temperature: float, top_k: int) -> None:
    opt = small()[0]
    with counted(opt) as found:
        assert improbability([1, 2, 0], calls, batch, temperature, top_k) > 0.01
    assert batch > 2 or 0.2 * found[1] < found[2] < 0.9 * found[1]


def test_single_sequences_have_the_distribution_of_the_model() -> None:
    assert improbability([2, 0], 800, 1, 1.0, SMALL) > 0.01


def test_the_test_of_samples_sees_guesses_that_are_always_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("skipstone.runtime.speculate.torch.rand_like", torch.zeros_like)
    assert improbability([1, 2, 0], 500, 2, 1.0, SMALL) < 1e-6


def test_a_seed_gives_the_same_samples() -> None:
    opt, found = built((FAIR,)), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(opt.generate(**prompt(3, 8), **{**LONG, "do_sample": True}))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_a_perfect_draft_is_accepted_in_sampling() -> None:
    opt = built((PERFECT,))
    with counted(opt) as found:
        opt.generate(**prompt(3, 8), **{**LONG, "do_sample": True}, top_k=5, temperature=0.7)
    assert found == [5, 18, 18]
