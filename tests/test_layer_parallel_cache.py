"""Layers at the same time in whole plans: KV caches, executables, and the passes before and behind."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from skipstone import LayerParallel, Plan, QuantizeKV, Segment, SkipFFNAdaptive, optimize
from skipstone.calibrate import token_batches
from skipstone.errors import Unsupported
from skipstone.ir.capture.module import capture_module
from skipstone.ir.dialect import CACHED_OPS, GATE
from skipstone.ir.program import module_path
from skipstone.ir.statistics import sites
from skipstone.ir.stream import find_stream
from skipstone.optimize import footprint
from skipstone.passes.base import run_pass
from skipstone.rewrite import rewrite
from skipstone.runtime.eager import EagerSession
from skipstone.runtime.executable import Executable
from tests import models
from tests.newton_oracles import (
    LENGTH,
    SURROGATES,
    assert_close,
    at_once,
    captured,
    executable,
    expected,
    hugging_face,
    net_program,
    parallel,
    stack,
    within,
)

pytestmark = pytest.mark.usefixtures("one_thread")

CACHED = {
    "llama": (Segment(0, 3),), "llama 2": (Segment(0, 3, 2),), "llama 3": (Segment(0, 3, 3),),
    "deep": (Segment(1, 5, 3),), "deep 2": (Segment(0, 2), Segment(2, 6, 2, surrogate="zero")),
    "deep sublayer": (Segment(1, 4, 2, "sublayer"),), "deep stages": (Segment(1, 4, 1, "two_stage"),),
    "gemma2": (Segment(0, 3),), "gemma2 2": (Segment(0, 3, 2),), "gpt_neox": (Segment(0, 3, 2),),
}  # fmt: skip


@pytest.mark.parametrize("case", CACHED)
def test_token_by_token_equals_all_at_once(case: str) -> None:
    """Grouped queries, windows shorter than the sequence, several rows, padding on both sides, chunks of any size."""
    name, segments = case.split()[0], CACHED[case]
    opt, generator = executable(name, *segments), torch.Generator().manual_seed(3)
    ids = models.tokens(3, LENGTH, seed=4)
    for side in ("left", "right", "none"):
        cut = 0 if side == "none" else 3
        prompt = ids[:, : 4 + cut]
        mask = torch.ones_like(prompt)
        mask[-1, {"left": slice(cut), "right": slice(4, 4 + cut), "none": slice(0)}[side]] = 0
        sizes = []
        while sum(sizes) < LENGTH - prompt.shape[1]:
            sizes.append(int(torch.randint(1, 6, (), generator=generator)))
        logits, cache = opt.prefill(prompt, mask)
        rest = ids[:, prompt.shape[1] :].split([*sizes[:-1], LENGTH - prompt.shape[1] - sum(sizes[:-1])], dim=1)
        steps = torch.cat([logits[:, None], *(opt.decode(part, cache) for part in rest)], dim=1)
        for row, own in enumerate(mask.bool()):
            sequence = torch.cat([prompt[row, own], ids[row, prompt.shape[1] :]])[None]
            wanted = expected(name, sequence, *segments)[0]
            assert_close(steps[row], wanted[-steps.shape[1] :], within(name))


@pytest.mark.slow
@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_any_segments_decode_as_they_prefill(data: st.DataObject) -> None:
    start = data.draw(st.integers(0, 4))
    stop = data.draw(st.integers(start + 2, 6))
    iterations, surrogate = data.draw(st.integers(1, stop - start)), data.draw(st.sampled_from(SURROGATES))
    segment = Segment(start, stop, iterations, surrogate=surrogate)  # type: ignore[arg-type]
    opt, ids = executable("deep", segment), models.tokens(2, 9, seed=8)
    last, cache = opt.prefill(ids[:, :3])
    steps = [last[:, None], *(opt.decode(column, cache)[:, None] for column in ids[:, 3:].unbind(1))]
    assert_close(torch.cat(steps, dim=1), expected("deep", ids, segment)[:, 2:])


def test_each_iteration_has_its_own_slot() -> None:
    program = executable("deep", Segment(1, 5, 2)).program
    paths = [module_path(node) for node in program.nodes(*CACHED_OPS)]
    numbers = [0, 1, 2, 3, 2, 3, 4, 5]  # layer 4 in iteration 1 cannot reach the end, layer 1 is exact behind it
    assert paths == [f"model.layers.{number}.self_attn" for number in numbers]
    assert program.slots() == tuple(range(8))
    names = [*sites(parallel("deep", Segment(1, 5, 2))).values()]
    assert names == [path + ("#1" if place in (4, 5) else "") for place, path in enumerate(paths)]


class Smeared(nn.Module):
    """Each token's embedding takes something from the one before, as in nanochat."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(models.VOCABULARY, 16), nn.Linear(16, models.VOCABULARY)
        self.layers = nn.ModuleList(nn.Linear(16, 48) for _ in range(3))

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> dict[str, Tensor]:
        x = self.embed(input_ids) + position_ids.unsqueeze(-1) / 9
        x = x + 0.5 * F.pad(x, (0, 0, 1, 0))[:, :-1]
        for layer in self.layers:
            q, k, v = (each.unflatten(-1, (2, 8)).transpose(1, 2) for each in layer(x).chunk(3, dim=-1))
            x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return {"logits": self.head(x)}


def test_state_beside_the_cache_is_refused_and_read_at_once_is_exact() -> None:
    """Nothing would carry the token before from step to step."""
    model, ids = Smeared().double().eval(), models.tokens(2, 7)
    inputs = {"input_ids": ids, "position_ids": torch.arange(7).expand(2, -1)}
    plan = Plan([LayerParallel((Segment(0, 3, 3),))])
    program, refusal = rewrite(capture_module(model, inputs), plan, target="eager")
    assert refusal is not None and "keep tokens apart" in refusal.feature and not program.slots()
    with torch.no_grad():
        assert_close(program.run(**inputs)["logits"], model(**inputs)["logits"], 1e-12)


# Whole plans


def test_it_runs_on_onnx_runtime(tmp_path: Path) -> None:
    """A plan that was written to a file, on the model itself: prefill, decode, and greedy text."""
    segments = (Segment(1, 3, 2),)
    Plan([LayerParallel(segments)]).save(tmp_path / "plan.json")
    plan = Plan.load(tmp_path / "plan.json")
    assert plan.entries == (LayerParallel(segments),)
    with patch.object(import_module("skipstone.optimize"), "capture", lambda *_: captured("gemma2")):
        opt = optimize(models.model("gemma2"), plan, target="onnxruntime", threads=1, progress=False)
    ids = models.tokens(2, LENGTH, seed=2)
    wanted = expected("gemma2", ids, *segments)
    last, cache = opt.prefill(ids[:, :12])
    steps = [last[:, None], *(opt.decode(part, cache) for part in ids[:, 12:].split(3, dim=1))]
    assert_close(torch.cat(steps, dim=1), wanted[:, 11:], 1e-4)
    with at_once(hugging_face("gemma2"), segments):
        options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "use_cache": False}
        text = hugging_face("gemma2").generate(ids, **options)
    assert torch.equal(opt.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None), text)
    assert "2 x layer" in str(opt.report) and "6 (3 + 3)" in str(opt.report)


def test_quantized_caches_are_calibrated_on_what_runs() -> None:
    """The second iteration of a layer has its own ranges, those of the values that it has in that iteration."""
    segment, data = Segment(1, 5, 2), models.tokens(4, LENGTH, seed=6)
    batches = token_batches([data], captured("deep").source)
    plan = Plan([LayerParallel((segment,)), QuantizeKV(condition=False)])
    program, _ = rewrite(captured("deep"), plan, target="eager", strict=False, batches=batches)
    model = hugging_face("deep")
    seen: list[Tensor] = []
    handle = stack(model)[2].self_attn.v_proj.register_forward_hook(lambda _module, _args, out: seen.append(out))
    with torch.no_grad(), at_once(model, [segment]):
        model(input_ids=data, use_cache=False)
    handle.remove()
    # The model's own call, then the iterations.
    for name, values in (("", seen[1]), ("#1", seen[2])):
        found = program.calibration[f"quantize_kv/model.layers.2.self_attn{name}/value/maximum"]
        assert torch.allclose(found.double().flatten(), values.flatten(0, 1).amax(0), atol=1e-6)


def test_conditioning_comes_before_the_copies() -> None:
    """A plan with its calibration is carried out again without data, to the bit; and quantizing costs little."""
    data, ids = models.tokens(4, LENGTH, seed=6), models.tokens(2, LENGTH, seed=7)
    plan = Plan([LayerParallel((Segment(1, 5, 2),)), QuantizeKV()])
    batches = token_batches([data], captured("deep").source)
    first_program, _ = rewrite(captured("deep"), plan, target="eager", strict=False, batches=batches)
    names = [record.name for record in first_program.history]
    assert names.index("condition_kv") < names.index("layer_parallel") < names.index("quantize_kv")
    saved = Plan(plan.entries, tensors=first_program.calibration)
    again, _ = rewrite(captured("deep"), saved, target="eager", strict=False)
    logits = []
    for program in (first_program, again, executable("deep", Segment(1, 5, 2)).program):
        opt = Executable(EagerSession(program))
        last, cache = opt.prefill(ids[:, :6])
        logits.append(torch.cat([last[:, None], opt.decode(ids[:, 6:], cache)], dim=1))
    assert torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[0], logits[2])
    assert_close(logits[0], logits[2], 0.05)


def test_gates_stand_outside_of_segments() -> None:
    adaptive = SkipFFNAdaptive(threshold=0.5, cold_start=0, cold_end=0, max_share=1.0)
    plan = Plan([LayerParallel((Segment(2, 4),)), adaptive])
    program, _ = rewrite(captured("deep"), plan, target="eager", strict=False)
    assert [node.meta["layer"] for node in program.nodes(GATE)] == [1, 4, 5]
    everything = Plan([LayerParallel((Segment(0, 6),)), adaptive])
    with pytest.raises(Unsupported, match="layers all run at the same time"):
        rewrite(captured("deep"), everything, target="eager", strict=False)


def test_the_report_counts_evaluations() -> None:
    program = executable("deep", Segment(1, 5, 2)).program
    counted, before = footprint(program), footprint(captured("deep"))
    assert (counted.sublayers, counted.attention, counted.ffn) == (16, 8, 8)
    assert counted.weight_bytes == before.weight_bytes
    record = next(each for each in program.history if each.name == "layer_parallel")
    assert record.remarks[0].numbers == {"units": 4, "depth": 2, "evaluations": 6}
    assert "identity" in record.remarks[0].why
    scaled = run_pass(LayerParallel((Segment(0, 2),)), net_program("scaled")).history[-1].remarks[0]
    assert "surrogate scale" in scaled.why
    stream = find_stream(program)
    assert [(each.layer, each.post_norm) for each in stream.sublayers] == [(0, False)] * 2 + [(1, False)] * 2
