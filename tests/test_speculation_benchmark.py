"""The benchmark of drafts, on a tiny model with a layer that adds nothing: its counts, and what follows from times."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import speculation
from benchmarks.harness import Row, Samples, Turn
from benchmarks.widened import widened
from skipstone import SkipSublayers

pytestmark = pytest.mark.usefixtures("one_thread")
measured = pytest.mark.slow  # eight systems are lowered for ONNX Runtime

NEW, ROUNDS = 9, 2
SECONDS = {"plain": 8.0, "plain decode": 0.5, "skip_4": 4.0, "skip_4 decode": 0.2, "read 1": 0.5, "read 5": 1.0}
"""Those of other figures are 16.0."""


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, initializer_range=0.3, eos_token_id=None)).eval()
    with torch.no_grad():
        for module in (model.model.layers[1].self_attn.o_proj, model.model.layers[1].mlp.down_proj):
            module.weight.zero_()
    return model


@pytest.fixture(scope="module")
def rows(llama) -> dict[str, Row]:
    """Drafts leave out what adds nothing; every turn runs, and takes the times above."""

    def take_turns(turns: Mapping[tuple[str, int], Turn], rounds: int) -> dict[str, Samples]:
        names = [name for _ in range(rounds) for turn in turns.values() for name, seconds in turn().items()]
        return {name: Samples({1: [SECONDS.get(name, 16.0)] * rounds}) for name in names}

    prompts = [torch.randint(0, 99, (1, 11), generator=torch.Generator().manual_seed(seed)) for seed in range(ROUNDS)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speculation, "take_turns", take_turns)
        patch.setattr(speculation, "NEW_TOKENS", NEW)
        entries = speculation.drafts(SkipSublayers(layers=(1,)))
        found = speculation.measure(llama, prompts, entries, (1,), ROUNDS, "_tiny")
    return {row.metric.removesuffix("_tiny"): row for row in found}


@measured
def test_every_lossless_system_writes_the_tokens_of_the_model(rows) -> None:
    same = {name: row for name, row in rows.items() if name.endswith("_same_tokens")}
    systems = {"weights_4", "weights_8", "skip_4", "both_4", "composed", "lookup_4", "lookup_10", "hf"}
    assert same.keys() == {f"{name}_same_tokens" for name in systems}
    assert {(row.value, row.samples) for row in same.values()} == {(1.0, ROUNDS)}


@measured
def test_a_draft_that_is_always_right_is_accepted_as_far_as_tokens_are_asked_for(rows) -> None:
    """Of 9 tokens behind the first, two steps give 5 and 4: the second guesses 3."""
    acceptance, steps = rows["skip_4_acceptance"], rows["skip_4_tokens_a_step"]
    assert (acceptance.value, acceptance.samples) == (1.0, 7 * ROUNDS)
    assert (steps.value, steps.samples) == (4.5, 2 * ROUNDS)
    # One at a time: four steps give 2, and the last needs no guess.
    assert (rows["skip_4_agreement"].value, rows["skip_4_agreement"].samples) == (1.0, 4 * ROUNDS)
    assert rows["weights_4_acceptance"].value < 1


@measured
def test_what_is_predicted_follows_from_the_times(rows) -> None:
    costs = {name: rows[f"skip_4_{name}"].value for name in ("draft_over_step", "check_over_step")}
    assert costs == {"draft_over_step": 32.0, "check_over_step": 2.0}
    assert rows["skip_4_predicted_gain"].value == rows["skip_4_gain_if_accepted"].value == 5 / (4 * 32 + 2)
    a = rows["weights_8_agreement"].value
    assert rows["weights_8_predicted_gain"].value == pytest.approx((1 - a**9) / (1 - a) / (8 * 32 + 32))


@measured
def test_gains_are_above_one_where_ours_is_faster_and_the_best_draft_has_the_goal(rows) -> None:
    gain, decode = rows["skip_4_gain"], rows["skip_4_decode_gain"]
    assert (gain.value, gain.baseline, gain.goal, gain.met) == (2.0, 8000.0, 1.1, True)
    assert (decode.value, decode.baseline) == (2.5, 500.0)
    assert rows["lossy_gain"].value == 0.5
    assert [name for name, row in rows.items() if row.goal is not None] == ["skip_4_gain"]


def test_other_tokens_are_counted() -> None:
    one, two = (speculation.System(name, None, []) for name in ("one", "two"))
    one.written, two.written = ([torch.tensor([[number, last]]) for number in range(4)] for last in (5, 5))
    two.written[2] = torch.tensor([[2, 6]])
    assert one.same_tokens(two) == 0.75


@pytest.mark.parametrize("sizes", [(64, 100, 4, 16), (96, 64, 6, 8)])
def test_a_widened_model_computes_the_same(llama, sizes: tuple[int, ...]) -> None:
    hidden, intermediate, heads, head_dim = sizes
    model = copy.deepcopy(llama).double()
    wide = widened(model, hidden=hidden, intermediate=intermediate, heads=heads, head_dim=head_dim)
    assert wide.config.num_key_value_heads == heads and wide.model.layers[0].mlp.up_proj.weight.shape[0] == intermediate
    ids = torch.randint(0, 99, (2, 13), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(wide(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
