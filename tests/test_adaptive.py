"""Settings of adaptive FFN skipping from data, and how much they skip."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from skipstone.adaptive import calibrate_adaptive_ffn, ffn_cosines, skipped_share
from skipstone.calibrate import token_batches
from skipstone.errors import InvalidInput, InvalidPlan, Unsupported
from skipstone.ir.program import Program
from skipstone.ir.stream import SublayerKind, find_stream
from skipstone.plan import Plan
from skipstone.rewrite import rewrite
from skipstone.runtime.eager import EagerSession
from skipstone.runtime.executable import Executable
from tests import models
from tests.ffn_oracles import ALWAYS, LAYERS, LENGTH, paper_loop

pytestmark = pytest.mark.usefixtures("one_thread")


def planted(factors: dict[int, float], name: str = "llama") -> Program:
    """A model whose FFNs of some layers are multiplied by factors."""
    program = models.program(name).copy()
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
    walks = [paper_loop(models.model(name), ids[[row], :count], never, prompt=1) for row, count in enumerate(counts)]
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


def test_calibration_finds_the_ffns_that_do_nothing() -> None:
    """Layers 2 to 4 of six hardly turn the stream; those at both ends stay cold."""
    program = planted({2: 1e-3, 3: 1e-3, 4: 1e-3}, "deep")
    batches = token_batches([models.tokens(2, 30)], program.source)
    layers, cosines = ffn_cosines(program, batches)
    assert layers == list(range(6)) and cosines.shape == (6, 60)
    assert bool((cosines[2:5] > 0.99).all()) and bool((cosines[[0, 1, 5]] < 0.99).any(dim=1).all())
    entry = calibrate_adaptive_ffn(program, batches, share=0.3, saturated=0.98, warmup_tokens=2, max_share=0.5)
    assert (entry.cold_start, entry.cold_end, entry.warmup_tokens, entry.max_share) == (2, 1, 2, 0.5)
    assert entry.threshold is not None and entry.threshold > 0.99


def test_models_whose_ffns_do_not_saturate_are_refused() -> None:
    program = models.program("llama")
    batches = token_batches([models.tokens(4, 40, seed=5)], program.source)
    with pytest.raises(
        Unsupported, match=r"25% of the FFNs .*a cosine of 0\.95 on, a token would skip 0\.0%.*layer: 0: 0\.\d{3}, 1: "
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
