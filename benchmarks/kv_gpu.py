"""Decode attention over a long quantized cache on a GPU, against the best that torch has for a cache in bfloat16.

One step at the end of a context of 32768 tokens, batch 8, 32 query heads over 8 heads of keys, 128 channels. A name
such as `int8_token` stands for the dialect's operator, which is what executables run: it writes the new row and
attends. `int8_token_attend` is the attention alone, and that is all that baselines do: flash attention and cuDNN's,
with the query heads grouped ("gqa") or as rows of one head ("packed"), and compiled flex_attention. All are compared
with the fastest of them. "graph" means replayed as a CUDA graph, which is how an executable decodes and what the goals
are for; without it, calls are measured.

Before every measurement 2 GiB of something else are read: then no keys and values are left in the processor's cache,
and the host has the time to queue the call. Shares of the copy bandwidth are of the time to read the codes and scales
once, at the bandwidth of a large copy (bytes read and written) that is measured in the same run.

Wrong results have no speed: everything is first compared with a reference in float32, also with other lengths on the
device than when a graph was captured.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.harness import Row, Samples, Turn, arguments, publish, take_turns
from skipstone.ir import attention
from skipstone.ir.formats import parse
from skipstone.ir.quantized import quantized_cached_attention_, quantized_cached_attention_reference

FORMATS = ("full", "int8_token", "fp8_token", "int4_group", "int4_channel", "nvfp4", "mxfp4")
RATIO, STRETCH, SHARE = {8: 1.5, 4: 2.0}, {8: 1.8, 4: 2.8}, {8: 0.7, 4: 0.55}
"""Goals by bits: of the operator over the best baseline, the same at best, and of attention over the bandwidth."""

ATTEND, GRAPH = "_attend", "_graph"
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
BUFFER = 2 * 2**30
"""Bytes that are read before every measurement; half of them is copied to the other half for the bandwidth."""

TOLERANCE = 1e-2
"""Largest error of an output vector over its largest element: bfloat16 has 8 bits."""

Form = Callable[[], Tensor]
"""One step; its output has the elements of [B, N, 1, D]."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a step: B, tokens with the new one, N, KH, D."""

    batch: int = 8
    context: int = 32768
    heads: int = 32
    kv_heads: int = 8
    width: int = 128


class Step:
    """A step at the end of a context: its inputs, and all keys and values [B, KH, context, D], in bfloat16."""

    def __init__(self, shape: Shape, device: str) -> None:
        random = torch.Generator(device).manual_seed(0)

        def draw(heads: int, rows: int) -> Tensor:
            size = (shape.batch, heads, rows, shape.width)
            return torch.randn(size, generator=random, dtype=torch.bfloat16, device=device)

        self.query = draw(shape.heads, 1)
        # Each new key is the first query of its group: what does not attend to the new row is far off.
        self.key = self.query[:, :: shape.heads // shape.kv_heads].contiguous()
        self.value = draw(shape.kv_heads, 1)
        self.keys, self.values = draw(shape.kv_heads, shape.context), draw(shape.kv_heads, shape.context)
        self.keys[:, :, -1:], self.values[:, :, -1:] = self.key, self.value
        self.scale = shape.width**-0.5
        self.last = torch.full((shape.batch,), shape.context - 1, device=device)
        # Sequences whose lengths differ, from a few tokens to half the context.
        self.ragged = 5 + torch.arange(shape.batch, device=device) * (shape.context // shape.batch // 2)
        self.start = self.last.clone()


class Cache:
    """The keys and values of a step in a number format.

    Attributes:
        keys, values: the buffers of the format.
        options: what the operator has to know of them.
    """

    def __init__(self, step: Step, name: str) -> None:
        self.keys, k_static = _encoded(step.keys, name)
        self.values, v_static = _encoded(step.values, name)
        self.options: dict[str, Any] = {
            "k_static": k_static, "v_static": v_static, "k_format": name, "v_format": name, "scale": step.scale,
            "kind": "causal",
        }  # fmt: skip

    @property
    def bytes(self) -> int:
        """Bytes of the codes and scales, which attention has to read."""
        return sum(part.nbytes for part in (*self.keys, *self.values))


def _encoded(rows: Tensor, name: str) -> tuple[list[Tensor], Tensor | None]:
    """The buffers for rows [B, KH, T, D], and the static tensor."""
    form = parse(name)
    static = form.static_from(rows.amin(dim=(0, 2)).float(), rows.amax(dim=(0, 2)).float(), margin=1.0)
    # One sequence at a time: encoding takes much more memory than codes.
    sequences = [form.encode(sequence, static) for sequence in rows.split(1)]
    return [torch.cat(each) for each in zip(*sequences, strict=True)], static


def operator(step: Step, cache: Cache) -> partial[Tensor]:
    """The dialect's operator, which writes the new row and attends."""
    return partial(
        quantized_cached_attention_, step.query, step.key, step.value, cache.keys, cache.values, step.start,
        **cache.options,
    )  # fmt: skip


def reference(step: Step, cache: Cache) -> Tensor:
    """What comes out of the operator, float32; it writes nothing."""
    q, k, v = step.query.float(), step.key.float(), step.value.float()
    return quantized_cached_attention_reference(q, k, v, cache.keys, cache.values, step.start, **cache.options)[0]


def ours(name: str, step: Step, cache: Cache) -> dict[str, Form]:
    """The operator on a GPU and its attention alone, called and as graphs."""
    # Not at the top: a CPU build of torch brings no Triton. The import registers the kernels with the operator.
    from skipstone.kernels.append import append_rows
    from skipstone.kernels.quantized_cached_attention import launches

    out = torch.empty_like(step.query)
    call, processors = kernel_call(step, cache)
    reading = [each for each in launches(call, out, processors) if each.kernel is not append_rows]
    forms: dict[str, Form] = {name: operator(step, cache), name + ATTEND: launched(reading, out)}
    return forms | {each + GRAPH: captured(form) for each, form in forms.items()}


def kernel_call(step: Step, cache: Cache) -> tuple[Any, int]:
    """What the kernels are asked for (`skipstone.kernels.call.Call`), and how many processors the device has."""
    from skipstone.kernels.call import Call

    properties = torch.cuda.get_device_properties(step.query.device)
    arch = properties.major * 10 + properties.minor
    operands = (step.query, step.key, step.value, cache.keys, cache.values, step.start)
    return Call(*operands, **cache.options, arch=arch), properties.multi_processor_count


def launched(launches: Sequence[Any], out: Tensor) -> Form:
    """Launches that write to `out`, as a step."""

    def run() -> Tensor:
        for launch in launches:
            launch()
        return out

    return run


def captured(form: Form) -> Form:
    """The replay of a step as a CUDA graph."""
    form()  # compiles what it needs, which no capture may
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = form()

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay


def baselines(step: Step) -> dict[str, Form]:
    """Attention of the query to all keys and values in bfloat16."""
    batch, kv_heads, _, width = step.keys.shape
    packed = step.query.view(batch, kv_heads, -1, width)
    forms: dict[str, Form] = {}
    for name, backend in BACKENDS.items():
        attend = partial(_attend, backend)
        forms[f"{name}_gqa"] = partial(attend, step.query, step.keys, step.values, enable_gqa=True)
        forms[f"{name}_packed"] = partial(attend, packed, step.keys, step.values)
    flex = torch.compile(flex_attention, mode="max-autotune-no-cudagraphs", dynamic=False)
    forms["flex_gqa"] = partial(flex, step.query, step.keys, step.values, enable_gqa=True)
    return forms


def _attend(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, enable_gqa: bool = False) -> Tensor:
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(q, k, v, enable_gqa=enable_gqa)


def available(forms: Mapping[str, Form]) -> dict[str, Form]:
    """Those that this device and this torch have, called and as graphs; prints why others are left out."""
    found: dict[str, Form] = {}
    for name, form in forms.items():
        try:
            form()
            found[name] = form
            found[name + GRAPH] = captured(form)
        except RuntimeError as error:
            print(f"{name}{GRAPH if name in found else ''} is left out: {str(error).strip().partition(chr(10))[0]}")
    return found


def check(name: str, got: Tensor, wanted: Tensor) -> None:
    """Refuse a form whose output differs from `wanted`, float32 [B, N, 1, D].

    Raises:
        SystemExit: it does.
    """
    errors = (got.reshape(wanted.shape).float() - wanted).abs().amax(dim=-1) / wanted.abs().amax(dim=-1)
    if not errors.max() <= TOLERANCE:
        raise SystemExit(f"{name} is wrong by {errors.max():.1e} of the reference: no speed is measured.")


def check_ours(name: str, forms: Mapping[str, Form], step: Step, cache: Cache) -> None:
    """Compare all forms of a format with the reference, each way of running them where it has to write a new row."""
    for mode, start in (("", step.ragged), (GRAPH, step.ragged + 1), ("", step.last), (GRAPH, step.last)):
        step.start.copy_(start)
        wanted = reference(step, cache)
        for each in (name + mode, name + ATTEND + mode):
            check(each, forms[each](), wanted)


def measure(step: Step, rounds: int) -> list[Row]:
    """Check everything, then measure it in turns."""
    forms: dict[str, Form] = {}
    sizes: dict[str, int] = {}
    for name in FORMATS:
        cache = Cache(step, name)
        found = ours(name, step, cache)
        check_ours(name, found, step, cache)
        forms |= found
        sizes |= {name: cache.bytes, name + ATTEND: cache.bytes}
    theirs = baselines(step)
    found = available(theirs)
    wanted = attention.attend(
        step.query.float(), step.keys, step.values, allowed=None, bias=None, sinks=None, scale=step.scale, softcap=0.0
    )
    for name, form in found.items():
        check(name, form(), wanted)
    forms |= found
    sizes |= dict.fromkeys(theirs, step.keys.nbytes + step.values.nbytes)
    buffer = torch.zeros(BUFFER // 4, device=step.query.device)
    source, target = buffer.chunk(2)
    forms["copy"] = partial(target.copy_, source)
    turns = {(name, torch.get_num_threads()): turn(name, form, buffer) for name, form in forms.items()}
    samples = take_turns(turns, rounds)
    report(samples)
    return rows(samples, sizes)


def turn(name: str, form: Form, buffer: Tensor) -> Turn:
    """A turn of one form, timed on the device, behind the reading of the buffer."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def run() -> Mapping[str, float]:
        buffer.sum()
        begin.record()
        form()
        end.record()
        end.synchronize()
        return {name: begin.elapsed_time(end) / 1e3}

    return run


def report(samples: Mapping[str, Samples]) -> None:
    """Print the median and the minimum of every form."""
    for name, each in samples.items():
        seconds = each.by_threads[each.best_threads]
        print(f"{name:28} ms {statistics.median(seconds) * 1e3:7.4f} (at least {min(seconds) * 1e3:7.4f})")


def rows(samples: Mapping[str, Samples], sizes: Mapping[str, int]) -> list[Row]:
    """The figures; baselines in milliseconds.

    Args:
        samples: of every form that could be measured, and of the copy.
        sizes: bytes that each reads, by name without the mode.
    Raises:
        SystemExit: there is nothing to compare with.
    """
    bandwidth = BUFFER / samples["copy"].median
    found = [Row("copy_bandwidth_gb_per_s", bandwidth / 1e9, None, None, samples["copy"].count)]
    for mode in ("", GRAPH):
        measured = {name: samples[name + mode] for name in sizes if name + mode in samples}
        theirs = [each for name, each in measured.items() if name.removesuffix(ATTEND) not in FORMATS]
        if not theirs:
            raise SystemExit("No attention in bfloat16 of this torch runs here: there is nothing to compare with.")
        best = min(theirs, key=lambda each: each.median)
        for name, each in measured.items():
            metric, ratio = f"{name}{mode}_vs_best_bf16", best.median / each.median
            found.append(Row(metric, ratio, best.median * 1e3, GOALS.get(metric), each.count))
            if stretch := GOALS.get(f"{metric}_stretch"):
                found.append(Row(f"{metric}_stretch", ratio, best.median * 1e3, stretch, each.count))
    for name, size in sizes.items():
        if name + GRAPH in samples:
            each, floor = samples[name + GRAPH], size / bandwidth
            metric = f"{name}{GRAPH}_of_copy_bandwidth"
            found.append(Row(metric, floor / each.median, floor * 1e3, GOALS.get(metric), each.count))
    return found


def _goals(name: str) -> dict[str, float]:
    bits = parse(name).bits
    if bits not in RATIO:
        return {}
    return {
        f"{name}{GRAPH}_vs_best_bf16": RATIO[bits],
        f"{name}{GRAPH}_vs_best_bf16_stretch": STRETCH[bits],
        f"{name}{ATTEND}{GRAPH}_of_copy_bandwidth": SHARE[bits],
    }


GOALS = {metric: goal for name in FORMATS for metric, goal in _goals(name).items()}


def main() -> None:
    """Measure, print and write the figures."""
    options = arguments("kv_gpu", __doc__ or "").parse_args()
    if not torch.cuda.is_available():
        print("kv_gpu measures kernels on a CUDA device, and torch finds none here.", file=sys.stderr)
        raise SystemExit(2)
    publish("kv_gpu", measure(Step(Shape(), "cuda"), rounds=50 if options.quick else 300), options.json)


if __name__ == "__main__":
    main()
