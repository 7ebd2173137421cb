"""Every causal-LM architecture of transformers gives what its model gives, or is refused with a reason."""

from __future__ import annotations

import pytest
import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.tiny_models import VOCABULARY, tiny_model, tokens
from tests.zoo import ARCHITECTURES, BUILDABLE, CACHED, REFUSED, UNBUILDABLE, UNCACHED, check

SAMPLE = ("llama", "mixtral", "gpt2", "gpt_neox", "qwen3", "gemma3_text", "deepseek_v3", "lfm2")


def assert_as_recorded(name: str) -> None:
    """The check finds what the table says; better than the table says is a stale table, and fails too."""
    result, entry = check(name), ARCHITECTURES[name]
    assert result.failure == "", f"{name}: {result}"
    found, recorded = (result.entry.logits, result.entry.cache), (entry.logits, entry.cache)
    assert found == recorded, f"{name}: recorded as {entry}, found {result.entry}: bring the table up to date"


@pytest.mark.parametrize("name", [*SAMPLE[:2], *(pytest.param(name, marks=pytest.mark.slow) for name in SAMPLE[2:])])
def test_a_sample_of_architectures_is_as_recorded(name: str) -> None:
    assert_as_recorded(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in BUILDABLE if name not in SAMPLE])
def test_every_architecture_is_as_recorded(name: str) -> None:
    assert_as_recorded(name)


def test_the_table_knows_every_model_type_and_gives_reasons() -> None:
    assert not set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - ARCHITECTURES.keys() - UNBUILDABLE.keys()
    assert all(entry.reason for entry in ARCHITECTURES.values() if not entry.cache)
    assert len(ARCHITECTURES) == len(CACHED) + len(UNCACHED) + len(REFUSED), "an entry stands twice"


def test_most_architectures_are_exact_and_many_generate_through_a_cache() -> None:
    types = [ARCHITECTURES[name] for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name in ARCHITECTURES]
    assert sum(entry.logits for entry in types) >= 115
    assert sum(entry.cache for entry in types) >= 75


@pytest.mark.slow
@pytest.mark.parametrize("name", UNBUILDABLE)
def test_unbuildable_types_still_cannot_be_built(name: str) -> None:
    with pytest.raises((AttributeError, ImportError, ValueError)):
        tiny_model(name)


@pytest.mark.parametrize("name", SAMPLE)
def test_tiny_models_are_deterministic_and_their_tokens_matter(name: str) -> None:
    first, second, other = tiny_model(name), tiny_model(name), tiny_model(name, seed=1)
    ids = tokens(2, 24)
    changed = ids.clone()
    changed[:, 20] = ids[:, 21]
    with torch.no_grad():
        logits, again, else_, moved = (
            m(input_ids=x).logits for m, x in ((first, ids), (second, ids), (other, ids), (first, changed))
        )
    assert logits.shape == (2, 24, VOCABULARY) and logits.isfinite().all()
    assert torch.equal(logits, again) and not torch.allclose(logits, else_)
    scale = logits.max() - logits.min()
    assert (logits - moved)[:, -1].abs().max() > 1e-2 * scale, "the last logits must depend on an earlier token"
    assert sum(parameter.numel() for parameter in first.parameters()) < 1_000_000
