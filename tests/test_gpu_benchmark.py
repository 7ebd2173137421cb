"""The benchmark of decoding on a GPU, as far as a CPU goes: its figures, and how it goes on."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu
from benchmarks.harness import Row, Turn

ROOT = Path(__file__).parent.parent


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--quick", "--json", str(tmp_path / "gpu.json")],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 2
    assert "gpu measures decoding on a CUDA device, and torch finds none here." in result.stderr
    assert not result.stdout and not list(tmp_path.iterdir())


FACT = Row("error_over_hf_bf16", 0.5, None, 1.5, 9, at_most=True)


class Ready:
    """A worker of this process, whose turns always take the same time."""

    def __init__(self, size: float, milliseconds: Mapping[str, float], facts: Sequence[Row] = ()) -> None:
        self.size, self.facts, self._milliseconds = size, facts, milliseconds

    def turns(self) -> dict[tuple[str, int], Turn]:
        """See `Worker.turns`."""
        return {(name, 1): partial(dict, {name: value / 1e3}) for name, value in self._milliseconds.items()}


def measure(part: str, number: int, systems: Mapping[str, Ready]) -> dict[str, Row]:
    """The figures of a stage, of the systems that got ready; a terabyte a second is copied."""
    available = {"copy": Ready(0, {"copy": 1e-9}), **systems}
    ready: Any = lambda builds: {name: available[name] for name in builds if name in available}  # noqa: E731
    return {row.metric: row for row in gpu.measure(gpu.PARTS[part], number, ready, rounds=3)}


def optimized(name: str, milliseconds: float, size: float = 1e8) -> dict[str, Ready]:
    """A system of ours, half of whose time is the device's."""
    return {
        name: Ready(size, {name: milliseconds, f"{name} steps": milliseconds * 2, f"{name} graph": milliseconds / 2})
    }


def test_decoding_is_compared_with_what_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    ours = {"ours": Ready(5e8, {"ours": 2.0, "ours steps": 4.0, "ours graph": 1.0, "ours prefill": 4.0})}
    eager = Ready(0, {"hf_eager": 9.0, "hf_eager prefill": 6.0}, [FACT])
    found = measure("0.5b_1_1k", 0, ours | optimized("skipped", 1.6, size=4e8) | {"hf_eager": eager})
    left_out = {f"{name} is left out: its process has ended" for name in ("hf_compiled", "int8_kv", "gates")}
    assert set(capsys.readouterr().out.splitlines()[:3]) == left_out
    name = "0.5b_1_1k_vs_hf_eager"
    assert found[name] == Row(name, 4.5, 9.0, None, 3)
    assert found["0.5b_1_1k_prefill_vs_hf_eager"].value == 1.5
    assert found["0.5b_1_1k_error_over_hf_bf16"].value == 0.5
    assert found["0.5b_1_1k_ours_milliseconds"].value == pytest.approx(2)
    assert found["0.5b_1_1k_ours_steps_per_second"].value == pytest.approx(500)
    share = found["0.5b_1_1k_ours_graph_of_copy_bandwidth"]
    assert (share.value, share.baseline) == (pytest.approx(0.5), pytest.approx(0.5))
    share = found["0.5b_1_1k_ours_of_copy_bandwidth"]
    assert (share.value, share.goal) == (pytest.approx(0.25), 0.5)
    gain = found["0.5b_1_1k_skipped_gain"]
    assert (gain.value, gain.baseline) == (pytest.approx(1.25), pytest.approx(2.0))
    assert found["0.5b_1_1k_skipped_graph_of_copy_bandwidth"].value == pytest.approx(0.5)
    assert not any(metric.endswith("ours_gain") or "prefill_vs_ours" in metric for metric in found)

    compiled = measure("0.5b_1_1k", 0, ours | {"hf_compiled": Ready(0, {"hf_compiled": 3.0})})
    ratio = compiled["0.5b_1_1k_vs_hf_compiled"]
    assert (ratio.value, ratio.goal, ratio.met) == (1.5, 1.3, True)
    with pytest.raises(SystemExit, match="ours did not get ready: there is nothing to compare with"):
        measure("0.5b_1_1k", 0, {"hf_eager": Ready(0, {"hf_eager": 9.0})})


def test_layers_at_the_same_time_are_compared_with_the_faster_sequence() -> None:
    base = optimized("sequential", 6.0) | optimized("sequential_fused", 5.0)
    found = measure("deep", 0, base | optimized("24_1_layer", 2.0))
    assert found["layers_at_once_24_1_layer"] == Row("layers_at_once_24_1_layer", 2.5, 5.0, 2.0, 3)
    graph = found["layers_at_once_24_1_layer_graph"]
    assert (graph.value, graph.baseline, graph.met) == (2.5, 2.5, True)
    assert found["deep_sequential_steps_per_second"].value == pytest.approx(1 / 6e-3)
    later = measure("deep", 1, base | optimized("12_1_layer", 4.0))
    assert later["layers_at_once_12_1_layer"].goal == 1.3 and not any("sequential" in metric for metric in later)


def test_every_stage_is_written_and_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "results" / "gpu.json"
    rows = {stage: [Row(stage, 1.5, None, 1.0, 3), FACT] for stage in ("deep 1", "deep 2")}
    progress = gpu.Progress(path, rounds=3)
    for stage, figures in rows.items():
        progress.add(stage, iter(figures))
    assert gpu.Progress(path, rounds=3).stages == rows
    assert progress.rows() == [row for figures in rows.values() for row in figures]

    (file,) = path.parent.iterdir()
    content = file.read_text()
    file.write_text(content[:-20])  # cut off while the second stage was written
    cut = gpu.Progress(path, rounds=3)
    assert list(cut.stages) == ["deep 1"]
    cut.add("deep 2", rows["deep 2"])
    assert gpu.Progress(path, rounds=3).stages == rows

    assert not gpu.Progress(path, rounds=5).stages
    with monkeypatch.context() as changed:
        changed.setattr(gpu, "device", lambda: {"gpu": "another"})
        assert not gpu.Progress(path, rounds=3).stages
    with monkeypatch.context() as changed:
        changed.setattr(gpu, "ROOMS", ("kernels",))
        assert not gpu.Progress(path, rounds=3).stages
    cut.finish()
    assert not list(path.parent.iterdir()) and not gpu.Progress(path, rounds=3).stages
