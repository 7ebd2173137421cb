"""Times of decode attention with many tiles: what `skipstone.kernels.tuning` was chosen from.

The step of `benchmarks.kv_gpu`, for batches of 8 and 1, but the attention alone, replayed as a CUDA graph. Every tile
is compared with the fastest of flash attention and cuDNN's over the same cache in bfloat16, which run in the same
turns; flex_attention, which was slower than those, is left out. "rounds" is how many times as many programs there are
as run at a time.

Wrong results have no speed: each tile is first compared with the reference, over the whole context and over ragged
sequences.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from multiprocessing import get_context

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from benchmarks import kv_gpu
from benchmarks.harness import Row, Samples, arguments, publish, take_turns
from benchmarks.kv_gpu import Cache, Form, Shape, Step
from skipstone.kernels.decode_attention import SHARE, decode_attention, splits
from skipstone.kernels.tuning import Tile, decode_tile

BATCHES = (8, 1)

Candidate = tuple[int, int, int, int, int, int]
"""Rows, keys, warps, stages and programs of a tile, and rounds. Of 8 rows, keys come first."""

QUANTIZED: tuple[Candidate, ...] = (
    (8, 32, 1, 3, 8, 1), (8, 32, 1, 3, 8, 2), (8, 32, 1, 2, 8, 1), (8, 32, 1, 4, 8, 1), (8, 32, 1, 3, 10, 1),
    (8, 32, 1, 3, 10, 2), (8, 32, 1, 4, 8, 3), (8, 32, 1, 2, 12, 1), (8, 16, 1, 4, 10, 1), (8, 16, 1, 4, 12, 1),
    (8, 64, 1, 2, 8, 1), (8, 64, 2, 3, 4, 1), (8, 64, 2, 3, 4, 2), (8, 64, 2, 3, 5, 1), (8, 32, 2, 4, 6, 1),
    (8, 32, 2, 3, 8, 1), (8, 128, 4, 2, 2, 1), (8, 128, 4, 3, 2, 1), (8, 64, 4, 3, 3, 1), (16, 64, 4, 3, 2, 1),
)  # fmt: skip
FULL: tuple[Candidate, ...] = (
    (8, 32, 1, 3, 6, 1), (8, 16, 1, 4, 8, 1), (8, 32, 2, 3, 4, 1), (8, 32, 2, 4, 4, 1), (8, 32, 2, 3, 6, 1),
    (8, 64, 2, 2, 3, 1), (8, 64, 4, 3, 2, 1), (8, 64, 4, 3, 3, 1), (8, 64, 4, 2, 3, 1), (16, 64, 4, 3, 2, 1),
    (8, 32, 2, 3, 4, 2),
)  # fmt: skip
CANDIDATES: Mapping[str, Sequence[Candidate]] = {"full": FULL} | dict.fromkeys(
    ("int8_channel", "int8_token", "fp8_token", "int4_channel", "int4_group", "nvfp4", "mxfp4"), QUANTIZED
)


def tile_of(candidate: Candidate) -> Tile:
    """The tile of a candidate."""
    rows, keys, warps, stages, programs, _ = candidate
    return Tile(rows, keys, warps, stages, keys_first=rows == 8, programs=programs)


def label(candidate: Candidate) -> str:
    """A name for figures."""
    return "{}x{}_{}_warps_{}_stages_{}_programs_{}_rounds".format(*candidate)


def attention(step: Step, cache: Cache, candidate: Candidate) -> Form:
    """The attention of a step with a tile."""
    call, processors = kv_gpu.kernel_call(step, cache)
    out, tile = torch.empty_like(step.query), tile_of(candidate)
    shares = min(splits(call, tile, processors) * candidate[-1], triton.cdiv(call.capacity, SHARE))
    return kv_gpu.launched(decode_attention(call, out, tile, shares), out)


def graphs(step: Step, cache: Cache, candidates: Sequence[Candidate]) -> dict[str, Form]:
    """Attention with each tile as a CUDA graph, by label; prints which ones the device has no room for."""
    found: dict[str, Form] = {}
    for candidate in candidates:
        try:
            found[label(candidate)] = kv_gpu.captured(attention(step, cache, candidate))
        except OutOfResources as reason:
            print(f"{label(candidate)} is left out: {reason}")
    return found


def compile_tiles(job: tuple[str, Sequence[Candidate]]) -> None:
    """Compile the kernels of a format, in a process of its own: Triton finds them on disk later."""
    name, candidates = job
    step = Step(Shape(batch=1, context=SHARE), "cuda")  # code does not depend on these
    graphs(step, Cache(step, name), candidates)


def expected(step: Step, cache: Cache) -> Iterator[Tensor]:
    """What comes out of the step, float32, with ragged sequences and then with the whole context, at which it stays.

    The new rows of both are written to the cache before anything else. Written in between, those of ragged sequences
    would be keys of the whole context that its output does not know.
    """
    starts = (step.ragged, step.last)
    for start in starts:
        step.start.copy_(start)
        kv_gpu.operator(step, cache)()
    for start in starts:
        step.start.copy_(start)
        yield kv_gpu.reference(step, cache)


def check(forms: Mapping[str, Form], step: Step, cache: Cache) -> None:
    """Compare all forms of attention with the reference.

    Raises:
        SystemExit: one differs.
    """
    for wanted in expected(step, cache):
        for name, form in forms.items():
            kv_gpu.check(name, form(), wanted)


def measure(rounds: int) -> Iterator[Row]:
    """Check and time all candidates, format by format."""
    jobs = [(name, candidates[i::5]) for name, candidates in CANDIDATES.items() for i in range(5)]
    with get_context("spawn").Pool(min(len(jobs), os.cpu_count() or 1)) as pool:
        pool.map(compile_tiles, jobs, chunksize=1)
    buffer = torch.zeros(kv_gpu.BUFFER // 4, device="cuda")
    source, target = buffer.chunk(2)
    for batch in BATCHES:
        step = Step(Shape(batch=batch), "cuda")
        theirs = kv_gpu.baselines(step)
        del theirs["flex_gqa"]
        baselines = {name: form for name, form in kv_gpu.available(theirs).items() if name.endswith(kv_gpu.GRAPH)}
        for name, candidates in CANDIDATES.items():
            cache = Cache(step, name)
            tiles = graphs(step, cache, candidates)
            check(tiles, step, cache)
            forms: dict[str, Form] = {"copy": partial(target.copy_, source), **baselines, **tiles}
            turns = {(each, 1): kv_gpu.turn(each, form, buffer) for each, form in forms.items()}
            samples = take_turns(turns, rounds)
            prefix, chosen = f"{name}_batch_{batch}", decode_tile(kv_gpu.kernel_call(step, cache)[0])
            taken = next((label(each) for each in candidates if (tile_of(each), each[-1]) == (chosen, 1)), None)
            print(f"\n{prefix}, of which {taken} is in use:")
            kv_gpu.report(samples)
            yield from rows(samples, prefix, list(tiles), list(baselines), taken, cache.bytes)


def rows(
    samples: Mapping[str, Samples], prefix: str, tiles: Sequence[str], baselines: Sequence[str], taken: str | None,
    size: int,
) -> Iterator[Row]:  # fmt: skip
    """The figures of a format; baselines in milliseconds.

    Args:
        tiles, baselines: names of the samples.
        taken: the tile that `skipstone.kernels.tuning` has for it, if it is among them.
        size: bytes that attention has to read.
    """
    best = min(samples[name].median for name in baselines)
    for name in tiles:
        ratio = best / samples[name].median
        yield Row(f"{prefix}_{name}_vs_best_bf16", ratio, best * 1e3, None, samples[name].count)
    if taken in tiles:
        floor = size * samples["copy"].median / kv_gpu.BUFFER
        yield Row(f"{prefix}_in_use_vs_best_bf16", best / samples[taken].median, best * 1e3, None, samples[taken].count)
        share = floor / samples[taken].median
        yield Row(f"{prefix}_in_use_of_copy_bandwidth", share, floor * 1e3, None, samples[taken].count)


def main() -> None:
    """Measure, print and write the figures."""
    options = arguments("kv_tiles", __doc__ or "").parse_args()
    if not torch.cuda.is_available():
        print("kv_tiles measures kernels on a CUDA device, and torch finds none here.", file=sys.stderr)
        raise SystemExit(2)
    publish("kv_tiles", list(measure(rounds=10 if options.quick else 50)), options.json)


if __name__ == "__main__":
    main()
