"""What skipping saves on the 110-million-parameter model of `benchmarks.decode`, in ONNX Runtime.

Static: measured steps against what the cost model predicts, which is the measured step of the whole model less the
share of what is left out in its roofline time, at the bandwidth measured in the same run. Adaptive: gates that never
fire, and gates that let every token skip half of the FFNs. Batch 1, best of one and two threads. Second part of
`benchmarks.skipping`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from benchmarks.decode import FLOOR_BUFFER, PROMPT, THREADS, make_model, steps
from benchmarks.harness import Row, Samples, read_floor, take_turns
from skipstone.ir.capture.huggingface import capture_huggingface
from skipstone.ir.cost import cost, roofline_seconds
from skipstone.ir.device import measure_cpu
from skipstone.ir.stream import find_stream, note_layers
from skipstone.optimize import optimize
from skipstone.passes.base import run_pass
from skipstone.passes.kv_cache import InsertKVCache
from skipstone.passes.skip_ffn_adaptive import SkipFFNAdaptive
from skipstone.passes.skip_sublayers import SkipSublayers
from skipstone.plan import Plan
from skipstone.units import Space, Unit, unit_milliseconds

STATIC = {"layers": (3, 6, 9), "attention": (2, 4, 6, 8), "ffn": (2, 4, 6, 8)}
EVERY_WARM = {"cold_start": 0, "cold_end": 0, "warmup_tokens": 0, "max_share": 0.5}
PLANS = {
    "full": Plan([]),
    **{f"without_{kind}": Plan([SkipSublayers(**{kind: layers})]) for kind, layers in STATIC.items()},
    "never": Plan([SkipFFNAdaptive(threshold=2.0, **EVERY_WARM)]),  # type: ignore[arg-type]
    "half": Plan([SkipFFNAdaptive(threshold=-1.0, **EVERY_WARM)]),  # type: ignore[arg-type]
}


def speed(quick: bool) -> list[Row]:
    """Measure."""
    model = make_model()
    ids = torch.randint(0, model.config.vocab_size, (1, PROMPT), generator=torch.Generator().manual_seed(1))
    counts = THREADS[-1:] if quick else THREADS
    turns = {
        (name, threads): steps(name, optimize(model, plan, threads=threads, progress=False), ids)
        for name, plan in PLANS.items()
        for threads in counts
    }
    times = take_turns(turns, rounds=3 if quick else 9)
    for name in PLANS:
        each = times[name]
        print(f"{name}: {each.median * 1e3:.2f} ms with {each.best_threads} threads, median of {each.count}")
    full, never, half = (times[name] for name in ("full", "never", "half"))
    return [
        Row("gate_overhead", never.median / full.median, full.median * 1e3, 1.05, full.count, at_most=True),
        Row("half_ffn_skipped_gain", full.median / half.median, full.median * 1e3, 1.2, full.count),
        *predicted(model, times),
    ]


def bandwidth(threads: int) -> float:
    """Bytes a second that reading memory takes at best."""
    torch.set_num_threads(threads)
    buffer = torch.ones(FLOOR_BUFFER // 4)
    return FLOOR_BUFFER / min(read_floor(buffer, FLOOR_BUFFER) for _ in range(5))


def predicted(model: torch.nn.Module, times: Mapping[str, Samples]) -> list[Row]:
    """Predicted over measured time of a step without sublayers of each kind."""
    program = capture_huggingface(model)  # type: ignore[arg-type]
    note_layers(program)
    stream, full = find_stream(program), times["full"]
    profile = replace(measure_cpu(full.best_threads), bandwidth=bandwidth(full.best_threads))
    whole = 1e3 * roofline_seconds(cost(run_pass(InsertKVCache(), program)), profile, batch=1, sequence=1, past=PROMPT)
    print(f"roofline of the full step: {whole:.2f} ms at {profile.bandwidth / 1e9:.1f} GB/s")
    rows = []
    for kind, layers in STATIC.items():
        unit = "layer" if kind == "layers" else kind
        units = Space(kinds=(unit,), protected=()).units(stream)  # type: ignore[arg-type]
        saved = unit_milliseconds(program, units, profile, context=PROMPT)
        left_out = sum(saved[Unit(unit, layer)] for layer in layers)  # type: ignore[arg-type]
        prediction = full.median * 1e3 * (1 - left_out / whole)
        measured = times[f"without_{kind}"]
        rows.append(
            Row(
                f"predicted_over_measured_time_{kind}",
                prediction / measured.median / 1e3,
                prediction,
                None,
                measured.count,
            )
        )
    worst = max(rows, key=lambda row: abs(row.value - 1))
    return [Row("predicted_over_measured_time", worst.value, worst.baseline, None, worst.samples), *rows]
