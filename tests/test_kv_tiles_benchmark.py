"""The benchmark of decode tiles, as far as a CPU goes: what it compares with, and that the tiles in use are in it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="needs the extra `triton`")

from benchmarks import kv_gpu, kv_tiles
from benchmarks.harness import RESULTS, Samples
from skipstone.ir import attention
from skipstone.ir.formats import parse
from skipstone.kernels.compile import Variant, variant_call
from skipstone.kernels.tuning import decode_tile

ROOT = Path(__file__).parent.parent
SMALL = kv_gpu.Shape(batch=2, context=64, heads=4, kv_heads=2, width=128)


def in_use(name: str) -> kv_tiles.Candidate:
    """The candidate that is the tile of a format."""
    tile = decode_tile(variant_call(Variant(name, name, 128), 90))
    (found,) = (each for each in kv_tiles.CANDIDATES[name] if kv_tiles.tile_of(each) == tile and each[-1] == 1)
    return found


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.kv_tiles", "--quick", "--json", str(tmp_path / "kv_tiles.json")],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 2
    assert "kv_tiles measures kernels on a CUDA device, and torch finds none here." in result.stderr
    assert not result.stdout and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", kv_tiles.CANDIDATES)
def test_attention_that_writes_nothing_is_compared_over_the_cache_that_it_reads(name: str) -> None:
    step = kv_gpu.Step(SMALL, "cpu")
    cache = kv_gpu.Cache(step, name)

    def alone(missing: int = 0) -> torch.Tensor:
        """Attention to what is in the cache, but for the newest rows."""
        static, form = (cache.options[key] for key in ("k_static", "v_static")), parse(name)
        keys, values = (
            form.decode(parts, each, torch.float32, SMALL.width)
            for parts, each in zip((cache.keys, cache.values), static, strict=True)
        )
        allowed = torch.arange(SMALL.context) <= step.start.view(-1, 1, 1, 1) - missing
        return attention.attend(step.query.float(), keys, values, allowed, None, None, step.scale, 0.0)

    kv_tiles.check({name: alone}, step, cache)
    assert torch.equal(step.start, step.last)
    with pytest.raises(SystemExit, match=f"{name} is wrong by"):
        kv_tiles.check({name: partial(alone, missing=1)}, step, cache)


@pytest.mark.parametrize("name", kv_tiles.CANDIDATES)
def test_tiles_in_use_are_nearly_the_fastest_that_were_measured(name: str) -> None:
    """In both batches, of which some formats have different best ones."""
    measured = {row["metric"]: row["value"] for row in json.loads((RESULTS / "kv_tiles.json").read_text())["rows"]}
    for batch in kv_tiles.BATCHES:
        prefix = f"{name}_batch_{batch}"
        tiles = [measured[key] for key in measured if key.startswith(f"{prefix}_") and "warps" in key]
        mine = measured[f"{prefix}_{kv_tiles.label(in_use(name))}_vs_best_bf16"]
        assert mine == measured[f"{prefix}_in_use_vs_best_bf16"] >= 0.96 * max(tiles)


def test_figures_of_a_format() -> None:
    def samples(milliseconds: float) -> Samples:
        return Samples({1: [milliseconds / 1e3] * 3})

    first, second = kv_tiles.QUANTIZED[:2]
    one, two = kv_tiles.label(first), kv_tiles.label(second)
    measured = {"flash": samples(0.9), "cudnn": samples(0.6), one: samples(0.3), two: samples(0.4)}
    measured["copy"] = Samples({1: [kv_gpu.BUFFER / 1e12]})
    arguments: Any = (measured, "nvfp4_batch_1", [one, two], ["flash", "cudnn"])
    found = {row.metric.removeprefix("nvfp4_batch_1_"): row for row in kv_tiles.rows(*arguments, two, 10**8)}
    assert found[f"{one}_vs_best_bf16"].value == pytest.approx(2.0)
    assert found["in_use_vs_best_bf16"].value == found[f"{two}_vs_best_bf16"].value == pytest.approx(1.5)
    assert found["in_use_vs_best_bf16"].baseline == pytest.approx(0.6) and found["in_use_vs_best_bf16"].samples == 3
    share = found["in_use_of_copy_bandwidth"]
    assert share.value == pytest.approx(0.25) and share.baseline == pytest.approx(0.1)
    assert len(list(kv_tiles.rows(*arguments, None, 10**8))) == 2
