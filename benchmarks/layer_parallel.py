"""What layers in parallel cost and save, of a deep and narrow model and of its twin that was trained for it.

Segments of N layers in the middle run in K iterations, by layers, by sublayers or in two stages. Quality, on windows of
held-out text: ``{model}_dnll_N_K_UNIT`` is the relative rise of the negative log-likelihood over that of the same model
without segments, ``{model}_nll_sequential``, in nats a byte. ``{model}_dnll_N_skipped`` is that where the layers are
left out: a model whose middle does nothing loses nothing in parallel, and is better without it.
``{model}_dnll_N_K_UNIT_POLICY_stepwise`` is that of decoding token by token with one cache slot a layer, on fewer
windows; ``iterate`` stands beside it on the same ones, where it is also what reading at once gives.

Time, of the twins' common shape: ``time_vs_sequential_N_K`` is the measured time of a decode step on ONNX Runtime, with
layers as units, over that of the model: one thread, batch 1, and everything that runs at the same time fused. The model
counts with the faster of its two forms, as it is and with projections of one input fused. ``predicted_vs_sequential``
is what the cost model says of this machine's CPU; ``critical_path`` counts the products and attentions that wait for
each other, ``launches`` the operators; the model's own stand beside them as baselines, its projections fused likewise.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import get_args

import torch
from transformers import AutoModelForCausalLM

from benchmarks.decode import steps
from benchmarks.harness import Row, Turn, arguments, publish, take_turns
from benchmarks.reference.evaluate import windows
from skipstone.budget import compare
from skipstone.calibrate import Batch
from skipstone.certify import logits
from skipstone.ir.capture.huggingface import capture_huggingface
from skipstone.ir.device import measure_cpu
from skipstone.ir.program import Program
from skipstone.ir.stream import find_stream
from skipstone.passes.base import run_pass
from skipstone.passes.fuse_parallel import FuseParallel
from skipstone.passes.layer_parallel import LayerParallel, Policy, Segment
from skipstone.passes.skip_sublayers import SkipSublayers
from skipstone.plan import Plan
from skipstone.rewrite import rewrite
from skipstone.runtime.eager import EagerSession
from skipstone.runtime.executable import TokenModel
from skipstone.runtime.onnx.session import OnnxSession
from skipstone.segments import measure_segments, middle_segments, step_costs

REFERENCE = Path(__file__).parent / "reference"
MODELS = {"plain": REFERENCE / "stdlib-nanochat-32", "snlp": REFERENCE / "stdlib-nanochat-32-snlp"}
COUNTS, QUICK_COUNTS = (8, 12, 16, 20, 24), (8, 16)
STEPWISE = Segment(8, 24, iterations=2)
STEPWISE_WINDOWS, QUICK_STEPWISE_WINDOWS = 32, 4
TIMED, QUICK_TIMED = (8, 16, 24), (16,)
WINDOWS, QUICK_WINDOWS, LENGTH, PROMPT = 128, 16, 256, 128
BATCH = 4  # windows whose activations stay in the caches of a CPU
ROUNDS, QUICK_ROUNDS = 9, 3


def main() -> None:
    """Measure, print and write the figures."""
    options = arguments("layer_parallel", __doc__ or "").parse_args()
    counts = QUICK_COUNTS if options.quick else COUNTS
    text = held_out(QUICK_WINDOWS if options.quick else WINDOWS)
    rows: list[Row] = []
    for name, checkpoint in MODELS.items():
        program = capture(checkpoint)
        layers = find_stream(program).layers
        segments = middle_segments(layers, counts)
        rows += [*quality(name, program, text, segments), *skipped(name, program, text, segments)]
        count = QUICK_STEPWISE_WINDOWS if options.quick else STEPWISE_WINDOWS
        rows += stepwise(name, program, held_out(count, count))
    rows += costs(program, text, segments)
    timed = middle_segments(layers, QUICK_TIMED if options.quick else TIMED)
    rows += times(program, timed, QUICK_ROUNDS if options.quick else ROUNDS)
    publish("layer_parallel", rows, options.json)


def capture(checkpoint: Path) -> Program:
    """The program of a checkpoint, in float32."""
    return capture_huggingface(AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval())


def held_out(count: int, batch: int = BATCH) -> list[Batch]:
    """Windows of the test split."""
    samples = windows("test", count, LENGTH).split(batch)
    return [Batch(each, torch.ones_like(each, dtype=torch.bool)) for each in samples]


def quality(name: str, program: Program, text: Sequence[Batch], segments: Sequence[Segment]) -> Iterator[Row]:
    """What each segment costs on this text."""
    found = {segment: seen for segment, (_, seen) in measure_segments(program, text, segments, progress=True).items()}
    whole = found[segments[0]]
    nll, sample = float(whole.nll.sum() / whole.tokens.sum()), len(whole.tokens)
    yield Row(f"{name}_nll_sequential", nll, None, None, sample, at_most=True)
    for segment, seen in found.items():
        rise = float(seen.increase.sum() / seen.nll.sum())
        yield Row(f"{name}_dnll_{label(segment)}", rise, nll, None, sample, at_most=True)


def skipped(name: str, program: Program, text: Sequence[Batch], segments: Sequence[Segment]) -> Iterator[Row]:
    """What it costs to leave the layers of the segments out."""
    full = TokenModel(EagerSession(program))
    for start, stop in sorted({(each.start, each.stop) for each in segments}, reverse=True):
        less = run_pass(SkipSublayers(layers=tuple(range(start, stop))), program, strict=False)
        changed = TokenModel(EagerSession(less))
        seen = compare(partial(logits, full), partial(logits, changed), text, progress=True)
        rise = float(seen.increase.sum() / seen.nll.sum())
        nll = float(seen.nll.sum() / seen.tokens.sum())
        yield Row(f"{name}_dnll_{stop - start}_skipped", rise, nll, None, len(seen.tokens), at_most=True)


def stepwise(name: str, program: Program, text: Sequence[Batch], segment: Segment = STEPWISE) -> Iterator[Row]:
    """What a segment costs by each policy of its keys and values, when this text is decoded token by token."""
    full = TokenModel(EagerSession(program))
    for kv in get_args(Policy):
        changed, refusal = rewrite(program, Plan([LayerParallel((segment,), kv)]), target="eager", strict=False)
        if refusal is not None:
            raise refusal
        seen = compare(partial(logits, full), partial(decoded, TokenModel(EagerSession(changed))), text, progress=True)
        rise, nll = float(seen.increase.sum() / seen.nll.sum()), float(seen.nll.sum() / seen.tokens.sum())
        yield Row(f"{name}_dnll_{label(segment)}_{kv}_stepwise", rise, nll, None, len(seen.tokens), at_most=True)


def decoded(model: TokenModel, batch: Batch) -> torch.Tensor:
    """Logits [B, S, V] of sequences without padding, a token at a time."""
    cache = model.new_cache(*batch.tokens.shape, spare=0)
    return torch.cat([model.decode(column, cache) for column in batch.tokens.split(1, dim=1)], dim=1)


def costs(program: Program, text: Sequence[Batch], segments: Sequence[Segment]) -> Iterator[Row]:
    """What the cost model counts and predicts, for a step behind as many tokens as the text's windows have."""
    own, found, _ = step_costs(program, text, segments, measure_cpu(threads=1), progress=True)
    for segment, step in found.items():
        name = label(segment)
        yield Row(f"critical_path_{name}", step.critical_path, own.critical_path, None, 1, at_most=True)
        yield Row(f"launches_{name}", step.launches, own.launches, None, 1, at_most=True)
        ratio = step.milliseconds / own.milliseconds
        yield Row(f"predicted_vs_sequential_{name}", ratio, own.milliseconds, None, 1, at_most=True)


def times(program: Program, segments: Sequence[Segment], rounds: int) -> Iterator[Row]:
    """Measured times of decode steps with each segment of whole layers, over that of the model."""
    plans = {
        f"{each.stop - each.start}_{each.iterations}": Plan([LayerParallel((each,)), FuseParallel()])
        for each in segments
        if each.unit == "layer"
    }
    forms = {"as it is": Plan([]), "fused": Plan([FuseParallel()])}
    ids = windows("test", 2, PROMPT)[:1, :-1]
    found = take_turns({(name, 1): turn(name, program, plan, ids) for name, plan in (plans | forms).items()}, rounds)
    sequential = min(found[form].median for form in forms)
    for name in plans:
        ratio = found[name].median / sequential
        yield Row(f"time_vs_sequential_{name}", ratio, sequential * 1e3, None, rounds, at_most=True)


def turn(name: str, program: Program, plan: Plan, ids: torch.Tensor) -> Turn:
    """A turn that decodes by a plan."""
    rewritten, refusal = rewrite(program, plan, target="onnxruntime", strict=False)
    if refusal is not None:
        raise refusal
    return steps(name, TokenModel(OnnxSession(rewritten, threads=1)), ids)


def label(segment: Segment) -> str:
    """The segment in a figure's name: layers, iterations, unit."""
    return f"{segment.stop - segment.start}_{segment.iterations}_{segment.unit}"


if __name__ == "__main__":
    main()
