"""`skipstone::prompt_scores` and `skipstone::kept_start` against the words of their definitions, token by token."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from skipstone.ir.kept_prompt import KEPT_START, PROMPT_SCORES

WIDTH = 4


def written_out(
    q: Tensor, k: Tensor, sinks: Tensor | None, scale: float, observed: int, pool: int, redundancy: float, cap: float
) -> list[list[float]]:
    """Scores [KH][S] of one sequence of queries [N, S, D] and keys [KH, S, D], nothing of which is padding."""
    length, group = k.shape[1], len(q) // len(k)
    asked = range(max(0, length - observed), length)
    scores = []
    for kv_head, keys in enumerate(k):
        importance = [0.0] * length
        for head in range(kv_head * group, (kv_head + 1) * group):
            mean = [0.0] * length
            for row in asked:
                logits = [float(q[head, row] @ keys[j]) * scale for j in range(row + 1)]
                logits = [cap * math.tanh(each / cap) for each in logits] if cap else logits
                exponentials = [math.exp(each) for each in logits]
                total = sum(exponentials) + (math.exp(float(sinks[head])) if sinks is not None else 0)
                for j, each in enumerate(exponentials):
                    mean[j] += each / total / len(asked)
            importance = [max(pair) for pair in zip(importance, mean, strict=True)]
        reach = pool // 2
        own = [max(importance[max(0, j - reach) : j + reach + 1]) for j in range(length)]
        if redundancy:
            cosines = torch.nn.functional.cosine_similarity(keys[:, None], keys[None], dim=-1)
            alike = [
                math.exp(sum(float(cosines[j, i]) for i in range(length) if i != j) / length) for j in range(length)
            ]
            own = [(1 - redundancy) * a - redundancy * b / sum(alike) for a, b in zip(own, alike, strict=True)]
        scores.append(own)
    return scores


@settings(deadline=None, max_examples=30)
@given(
    lengths=st.lists(st.integers(1, 17), min_size=1, max_size=3),
    heads=st.sampled_from([(4, 2), (3, 3), (2, 1)]),
    observed=st.integers(1, 9),
    first=st.integers(0, 3),
    pool=st.sampled_from((1, 3, 7)),
    redundancy=st.sampled_from((0.0, 0.4, 1.0)),
    cap=st.sampled_from((0.0, 2.0)),
    has_sinks=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_scores_are_what_they_are_said_to_be(
    lengths: list[int],
    heads: tuple[int, int],
    observed: int,
    first: int,
    pool: int,
    redundancy: float,
    cap: float,
    has_sinks: bool,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths) + 2  # all of the batch is padded
    q, k = (torch.randn(len(lengths), each, width, WIDTH, dtype=torch.float64, generator=generator) for each in heads)
    sinks = torch.linspace(-1, 1, heads[0], dtype=torch.float64) if has_sinks else None
    options = {"observed": observed, "first": first, "pool": pool, "redundancy": redundancy, "softcap": cap}
    found = PROMPT_SCORES(q, k, torch.tensor(lengths), sinks, scale=0.4, **options)
    assert found.shape == (len(lengths), heads[1], width) and found.dtype == torch.float64
    for row, length in enumerate(lengths):
        wanted = written_out(q[row, :, :length], k[row, :, :length], sinks, 0.4, observed, pool, redundancy, cap)
        assert (found[row, :, length:] == -torch.inf).all()
        for place in range(length):
            always = place < first or place >= length - observed
            own = [math.inf if always else each[place] for each in wanted]
            assert found[row, :, place].tolist() == pytest.approx(own, rel=1e-9, abs=1e-12)


def test_half_precision_is_scored_in_float32() -> None:
    q, k = torch.randn(1, 2, 9, WIDTH).to(torch.bfloat16), torch.randn(1, 2, 9, WIDTH).to(torch.bfloat16)
    options = {"scale": 0.4, "observed": 2, "pool": 3}
    found = PROMPT_SCORES(q, k, torch.tensor([9]), **options)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, PROMPT_SCORES(q.float(), k.float(), torch.tensor([9]), **options))


def test_sequences_go_on_behind_what_is_kept() -> None:
    start, prompt = torch.tensor([5, 9, 30, 41]), torch.tensor([5, 8, 30, 40])
    assert KEPT_START(start, prompt, rows=8).tolist() == [5, 9, 8, 9]


@pytest.mark.parametrize("rows", [7, 12])
def test_operators_agree_with_their_fakes(rows: int) -> None:
    q, k, count = torch.randn(2, 4, rows, WIDTH), torch.randn(2, 2, rows, WIDTH), torch.tensor([rows, 3])
    torch.library.opcheck(PROMPT_SCORES, (q, k, count), {"scale": 0.4, "observed": 3, "pool": 3, "redundancy": 0.5})
    torch.library.opcheck(KEPT_START, (count, count), {"rows": 4})
