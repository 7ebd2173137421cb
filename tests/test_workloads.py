"""Captured workloads equal their modules, and a sublayer leaves exactly, or for a stated reason not at all."""

from __future__ import annotations

import copy
import functools
import importlib
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from skipstone.ir.capture.module import capture_module
from skipstone.ir.capture.validate import relative_difference
from skipstone.ir.dialect import ATTENTION
from skipstone.ir.errors import Unsupported
from skipstone.ir.program import Program
from skipstone.ir.stream import find_stream
from skipstone.optimize import optimize
from skipstone.passes.base import run_pass
from skipstone.passes.skip_sublayers import SkipSublayers
from tests.workloads import WORKLOADS
from tests.workloads.layers import BATCH, SEQUENCE

SIZES = ((BATCH, SEQUENCE), (2, 13))
"""The traced batch and sequence size, and another."""

ATTENTIONS: dict[str, int] = {
    "cross_attention": 6,
    "delta_residual": 3,
    "dit_block": 3,
    "explicit_mask": 3,
    "hyper_connections": 3,
    "inputs_embeds": 3,
    "mar_masked": 3,
    "matmul_attention": 3,
    "rope": 3,
    "two_heads": 4,
    "var_block_causal": 3,
}
SKIPPED: dict[str, str] = {
    "cross_attention": "blocks.1.cross",
    "dit_block": "blocks.1.ffn",
    "explicit_mask": "blocks.1.attention",
    "hyper_connections": "blocks.1.ffn",
    "inputs_embeds": "blocks.1.attention",
    "mar_masked": "blocks.1.attention",
    "matmul_attention": "blocks.1.attention",
    "rope": "blocks.1.ffn",
    "two_heads": "upper.0.attention",
    "var_block_causal": "blocks.1.attention",
}
"""Module path of the sublayer that is left out; its last linear layer is what the reference zeroes."""

QUICK = ("explicit_mask",)
"""Lowered to ONNX in every run; the others in the longer one."""

SLOW = ("hyper_connections",)
"""Captures that take long, of what `test_hyper_connections.py` has in many forms."""

NO_STREAM = ("delta_residual",)


def with_slow(names: Iterable[str]) -> list[Any]:
    """Parameters: the names of workloads."""
    return [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in names]


@functools.cache
def captured(name: str) -> tuple[nn.Module, Program]:
    """A workload and its program, captured once."""
    workload = importlib.import_module(f"tests.workloads.{name}")
    module, example = workload.build()
    return module, capture_module(module, example, getattr(workload, "DYNAMIC", None))


def sample(name: str, batch: int, sequence: int) -> dict[str, Tensor]:
    """Inputs that the capture has not seen."""
    return importlib.import_module(f"tests.workloads.{name}").build(1, batch, sequence)[1]


def assert_equal(program: Program, module: nn.Module, inputs: dict[str, Tensor]) -> None:
    with torch.no_grad():
        expected, actual = pytree.tree_leaves(module(**inputs)), list(program.run(**inputs).values())
    assert max(relative_difference(a, e) for a, e in zip(actual, expected, strict=True)) < 1e-5


def zeroed(module: nn.Module, path: str) -> nn.Module:
    """A copy of the module whose branch at `path` adds nothing."""
    changed = copy.deepcopy(module)
    last = [child for child in changed.get_submodule(path).modules() if isinstance(child, nn.Linear)][-1]
    nn.init.zeros_(last.weight)
    if last.bias is not None:
        nn.init.zeros_(last.bias)
    return changed


@pytest.mark.parametrize("name", with_slow(WORKLOADS))
def test_program_equals_module(name: str) -> None:
    module, program = captured(name)
    for batch, sequence in SIZES:
        assert_equal(program, module, sample(name, batch, sequence))


@pytest.mark.parametrize("name", with_slow(WORKLOADS))
def test_attention_nodes(name: str) -> None:
    assert len(list(captured(name)[1].nodes(ATTENTION))) == ATTENTIONS[name]


@pytest.mark.parametrize("name", with_slow(SKIPPED))
def test_skipped_sublayer_equals_module_without_it(name: str) -> None:
    module, program = captured(name)
    path = SKIPPED[name]
    skipped = run_pass(SkipSublayers(paths=(path,)), program)
    for batch, sequence in SIZES:
        assert_equal(skipped, zeroed(module, path), sample(name, batch, sequence))


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in WORKLOADS]
)
def test_optimized_workload_equals_module(name: str) -> None:
    workload = importlib.import_module(f"tests.workloads.{name}")
    module, example = workload.build()
    dynamic = getattr(workload, "DYNAMIC", None)
    opt = optimize(module, example_inputs=example, dynamic_shapes=dynamic, target="onnxruntime", progress=False)
    for batch, sequence in SIZES:
        inputs = sample(name, batch, sequence)
        with torch.no_grad():
            expected, actual = pytree.tree_leaves(module(**inputs)), pytree.tree_leaves(opt(**inputs))
        assert max(relative_difference(a, e) for a, e in zip(actual, expected, strict=True)) < 1e-4


class Named(nn.Module):
    """A module that calls its result logits, which makes it a language model."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> dict[str, Tensor]:
        return {"logits": self.module(input_ids, position_ids)}


def test_a_plain_decoder_generates_through_a_cache() -> None:
    """Its causal mask is made inside and its keys are repeated for the heads: both are recognised."""
    module, example = captured("matmul_attention")[0], sample("matmul_attention", 2, 9)
    opt = optimize(Named(module).eval(), example_inputs=example, target="eager", progress=False)
    assert opt.supports_cache, opt.cache_refusal
    tokens = opt.generate(example["input_ids"], max_new_tokens=6, do_sample=False)
    for length in range(9, 15):
        positions = torch.arange(length).repeat(2, 1)
        with torch.no_grad():
            expected = module(tokens[:, :length], positions)[:, -1].argmax(-1)
        assert torch.equal(tokens[:, length], expected)


@pytest.mark.parametrize("name", NO_STREAM)
def test_without_a_stream_skipping_is_refused(name: str) -> None:
    program = captured(name)[1]
    with pytest.raises(Unsupported, match="without a residual stream"):
        find_stream(program)
    with pytest.raises(Unsupported, match="without a residual stream"):
        run_pass(SkipSublayers(layers=(0,)), program)
