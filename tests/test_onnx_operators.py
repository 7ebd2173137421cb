"""Norms and rotations that models write out become whole operators, and nothing else does."""

from __future__ import annotations

from collections import Counter

import onnx
import pytest
import torch
from torch import Tensor, nn

from skipstone.ir.capture.module import capture_module
from skipstone.ir.capture.validate import relative_difference
from skipstone.passes.base import Pipeline
from skipstone.passes.cleanup import Cleanup
from skipstone.passes.kv_cache import InsertKVCache
from skipstone.runtime.onnx.lower import lower
from skipstone.runtime.onnx.operators import gather_operators, rotary
from tests import models
from tests.versions import needs_group_query_attention

RMS_NORM = torch.ops.aten.rms_norm.default
FOUND = {  # norms and rotations of three layers
    "llama": (7, 6),
    "gpt2": (0, 0),
    "gemma2": (13, 6),
    "gpt_neox": (0, 0),  # it rotates a part of each head
}


@pytest.mark.parametrize("name", FOUND)
def test_operators_are_found_and_compute_the_same(name: str) -> None:
    program = Pipeline([Cleanup()]).run(models.program(name))
    gathered = gather_operators(program)
    assert (len(list(gathered.nodes(RMS_NORM))), len(list(gathered.nodes(rotary)))) == FOUND[name]
    assert not list(program.nodes(RMS_NORM, rotary)), "the program is left as it was"
    values = {"input_ids": models.tokens(2, 13), "position_ids": torch.arange(13).repeat(2, 1)}
    with torch.no_grad():
        expected, actual = (each.run(**values)["logits"] for each in (program, gathered))
    assert relative_difference(actual, expected) < 1e-6


class Turned(nn.Module):
    """Heads [B, 1, S, 4] turned by angles whose halves are made by `join`, or taken apart by `order`."""

    def __init__(self, join: str, order: str) -> None:
        super().__init__()
        self.join, self.order = join, order

    def forward(self, x: Tensor) -> Tensor:
        heads = x.unflatten(-1, (1, 4)).transpose(1, 2)
        angle = x[..., :2]
        angles = torch.cat((angle, angle) if self.join == "equal" else (angle, 2 * angle), -1).unsqueeze(1)
        first, second = heads[..., :2], heads[..., 2:]
        turned = torch.cat((-second, first) if self.order == "halves" else (-first, second), -1)
        return heads * angles.cos() + turned * angles.sin()


@pytest.mark.parametrize(
    ("join", "order", "count"), [("equal", "halves", 1), ("unequal", "halves", 0), ("equal", "other", 0)]
)
def test_only_a_rotation_is_one(join: str, order: str, count: int) -> None:
    program = capture_module(Turned(join, order).eval(), {"x": torch.randn(2, 5, 4)})
    assert len(list(gather_operators(program).nodes(rotary))) == count


@needs_group_query_attention
def test_heads_are_not_moved_between_projection_and_attention() -> None:
    program = Pipeline([Cleanup(), InsertKVCache(), Cleanup()]).run(models.program("llama"))
    kinds = Counter(node.op_type for node in onnx.load_from_string(lower(program).proto).graph.node)
    assert (kinds["RMSNormalization"], kinds["RotaryEmbedding"], kinds["GroupQueryAttention"]) == (7, 6, 3)
    assert kinds["Transpose"] == 0
