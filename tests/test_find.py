"""Plans are found on other sequences than those that `optimize` proves a budget on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from skipstone import (
    Budget,
    find_adaptive_ffn,
    find_compress_kv,
    find_layer_parallel,
    find_self_speculate,
    find_skip_by_prompt,
)
from skipstone.budget import hold_out
from skipstone.calibrate import Batch, token_batches
from tests import models

FINDERS: dict[str, tuple[Any, str, tuple[Any, ...]]] = {
    "adaptive": (find_adaptive_ffn, "calibrate_adaptive_ffn", ()),
    "by prompt": (find_skip_by_prompt, "skip_by_prompt", ()),
    "self speculate": (find_self_speculate, "choose_draft", ()),
    "compress": (find_compress_kv, "choose_streaming_heads", (Budget(nll=0.1),)),
    "layer parallel": (find_layer_parallel, "choose_segment", (Budget(nll=0.1),)),
}


def rows(batches: Sequence[Batch]) -> list[list[int]]:
    return [row for batch in batches for row in batch.tokens.tolist()]


@pytest.mark.parametrize("name", FINDERS)
def test_what_is_held_out_is_not_looked_at(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find, search, options = FINDERS[name]
    program, seen = models.program("llama"), []

    def stop(_program: Any, *arguments: Any) -> Any:
        batches: Sequence[Batch] = next(each for each in arguments if isinstance(each, list))
        seen.extend(rows(batches))
        raise InterruptedError

    monkeypatch.setattr("skipstone.find.capture", lambda *_: program)
    monkeypatch.setattr(f"skipstone.find.{search}", stop)
    calibration = list(torch.cat([models.tokens(10, 6), models.tokens(1, 6)]).split(3))  # one stands in both parts
    with pytest.raises(InterruptedError):
        find(models.model("llama"), calibration, *options)
    chosen_on, proved_on = hold_out(token_batches(calibration, program.source))
    assert seen == rows(chosen_on)
    assert len(rows(proved_on)) == 5 and not [row for row in seen if row in rows(proved_on)]
