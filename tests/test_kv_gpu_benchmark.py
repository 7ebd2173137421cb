"""The benchmark of quantized caches on a GPU, as far as a CPU goes: it refuses, it counts, and it is not fooled."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import kv_gpu
from benchmarks.harness import Samples
from skipstone.ir import attention

ROOT = Path(__file__).parent.parent
SMALL = kv_gpu.Shape(batch=2, context=64, heads=4, kv_heads=2, width=128)
BYTES = {"full": 256, "int8_token": 132, "fp8_token": 132, "int4_group": 80, "int4_channel": 64, "nvfp4": 72,
         "mxfp4": 68}  # fmt: skip
"""Of a token and head of 128 channels: codes, and float32, float16 or 8-bit scales."""


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.kv_gpu", "--quick", "--json", str(tmp_path / "kv_gpu.json")],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 2
    assert "kv_gpu measures kernels on a CUDA device, and torch finds none here." in result.stderr
    assert not result.stdout and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", kv_gpu.FORMATS)
def test_bytes_are_those_of_codes_and_scales(name: str) -> None:
    cache = kv_gpu.Cache(kv_gpu.Step(SMALL, "cpu"), name)
    assert cache.bytes == 2 * SMALL.batch * SMALL.kv_heads * SMALL.context * BYTES[name]


@pytest.mark.parametrize("name", kv_gpu.FORMATS)
def test_a_form_that_does_not_write_the_new_row_has_no_speed(name: str) -> None:
    step = kv_gpu.Step(SMALL, "cpu")
    cache = kv_gpu.Cache(step, name)
    form = kv_gpu.operator(step, cache)
    forms = dict.fromkeys((name, f"{name}_attend", f"{name}_graph", f"{name}_attend_graph"), form)
    kv_gpu.check_ours(name, forms, step, cache)
    assert torch.equal(step.start, step.last)

    cache = kv_gpu.Cache(step, name)
    form = kv_gpu.operator(step, cache)
    forms = dict.fromkeys(forms, form) | {f"{name}_graph": partial(form, count=torch.zeros_like(step.start))}
    with pytest.raises(SystemExit, match=f"{name}_graph is wrong by"):
        kv_gpu.check_ours(name, forms, step, cache)


@pytest.mark.parametrize("name", ["flash_gqa", "flash_packed"])
def test_baselines_attend_to_all_rows(name: str) -> None:
    step = kv_gpu.Step(SMALL, "cpu")
    wanted = attention.attend(step.query.float(), step.keys, step.values, None, None, None, step.scale, 0.0)
    kv_gpu.check(name, kv_gpu.baselines(step)[name](), wanted)


def test_what_a_torch_lacks_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    def lacking() -> torch.Tensor:
        raise RuntimeError("No available kernel.\nAborting execution.")

    assert kv_gpu.available({"cudnn_gqa": lacking}) == {}
    assert capsys.readouterr().out == "cudnn_gqa is left out: No available kernel.\n"


def test_nan_has_no_speed() -> None:
    with pytest.raises(SystemExit, match="wrong by nan"):
        kv_gpu.check("nvfp4", torch.full((1, 1, 1, 4), torch.nan), torch.ones(1, 1, 1, 4))


def samples(**milliseconds: float) -> dict[str, Samples]:
    """One measurement each, and a copy at 1000 GB/s."""
    return {name: Samples({1: [value / 1e3]}) for name, value in milliseconds.items()} | {
        "copy": Samples({1: [kv_gpu.BUFFER / 1e12]})
    }


def test_ratios_are_over_the_fastest_baseline_of_the_same_kind() -> None:
    measured = samples(
        flash_packed=1.2, flash_packed_graph=1.0, flex_gqa=1.0, flex_gqa_graph=1.1, int8_token=0.8,
        int8_token_graph=0.6, int8_token_attend=0.5, int8_token_attend_graph=0.5,
    )  # fmt: skip
    sizes = {"int8_token": 4 * 10**8, "int8_token_attend": 4 * 10**8, "flash_packed": 10**9, "flex_gqa": 10**9}
    found = {row.metric: row for row in kv_gpu.rows(measured, sizes)}

    assert found["copy_bandwidth_gb_per_s"].value == pytest.approx(1000)
    assert found["int8_token_vs_best_bf16"].value == pytest.approx(1.0 / 0.8)
    assert found["int8_token_vs_best_bf16"].goal is None
    ratio, stretch = (found[f"int8_token_graph_vs_best_bf16{suffix}"] for suffix in ("", "_stretch"))
    assert ratio.value == stretch.value == pytest.approx(1.0 / 0.6) and ratio.baseline == pytest.approx(1.0)
    assert (ratio.goal, ratio.met, stretch.goal, stretch.met) == (1.5, True, 1.8, False)
    share = found["int8_token_attend_graph_of_copy_bandwidth"]
    assert share.value == pytest.approx(0.8) and share.baseline == pytest.approx(0.4) and share.met
    assert found["flash_packed_graph_of_copy_bandwidth"].value == pytest.approx(1.0)


def test_there_has_to_be_a_baseline() -> None:
    with pytest.raises(SystemExit, match="nothing to compare with"):
        kv_gpu.rows(samples(nvfp4=1.0, nvfp4_graph=1.0), {"nvfp4": 1})


def test_every_quantized_format_has_goals() -> None:
    goals = kv_gpu.GOALS
    assert {name: goals.get(f"{name}_graph_vs_best_bf16") for name in kv_gpu.FORMATS} == {
        "full": None, "int8_token": 1.5, "fp8_token": 1.5, "int4_group": 2.0, "int4_channel": 2.0, "nvfp4": 2.0,
        "mxfp4": 2.0,
    }  # fmt: skip
    assert goals["nvfp4_graph_vs_best_bf16_stretch"] == 2.8
    assert goals["int4_group_attend_graph_of_copy_bandwidth"] == 0.55
