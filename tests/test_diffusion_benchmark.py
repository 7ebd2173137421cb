"""The benchmark of diffusion language models, on tiny models that know nothing: what it runs, and what it lacks."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from benchmarks import diffusion
from benchmarks.reference.architectures import llama


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"LENGTH": 24, "BATCH": 2, "CALIBRATION_WINDOWS": 3, "QUICK_TEST_WINDOWS": 3}
    for name, value in (sizes | {"PROMPT": 6, "ANSWER": 6, "DENOISING_STEPS": 2, "BLOCK": 6}).items():
        monkeypatch.setattr(diffusion, name, value)


def tiny(name: str) -> LlamaForCausalLM:
    """A model that takes every mask for a space, so that some of its predictions are right."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama(layers=4, width=32, masked=name == "llada")).eval()
    embeddings = model.model.embed_tokens.weight.data
    embeddings[ord(" ")] = 2 * embeddings[-1]
    return model


@pytest.mark.slow  # each is captured and lowered
@pytest.mark.parametrize("name", ["llada", "llama"])
def test_it_measures_what_is_left(name: str) -> None:
    rows = {row.metric: row for row in islice(diffusion.measure(name, tiny(name), quick=True), 6)}
    methods = ("similarity", "search")
    assert rows.keys() == {
        f"nll_{name}",
        f"top1_{name}",
        *(f"{what}_{name}_{by}" for what in ("kept", "dnll") for by in methods),
    }
    assert {row.samples for row in rows.values()} == {3}
    for method in methods:
        assert rows[f"dnll_{name}_{method}"].value > -1
        assert rows[f"kept_{name}_{method}"].goal == (0.9 if name == "llada" else None)


@pytest.mark.slow
def test_it_times_how_an_answer_is_written() -> None:
    model = tiny("llada")
    (row,) = islice(diffusion.measure("llada", model, quick=True), 6, None)
    assert row.metric == "denoise_gain"
    assert 0.2 < row.value < 5


def test_a_missing_model_is_named_with_the_command_that_trains_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    paths = {name: tmp_path / "models" / f"stdlib-{name}-16" for name in diffusion.MODELS}
    with pytest.raises(SystemExit) as stopped:
        diffusion.require(paths)
    said = str(stopped.value)
    assert "--objective masked --layers 16" in said
    assert "--objective next --layers 16" in said
    assert "--out models/stdlib-llada-16 --work build/stdlib-llada-16" in said
    for path in paths.values():
        path.mkdir(parents=True)
        (path / "model.safetensors").touch()
    diffusion.require(paths)
