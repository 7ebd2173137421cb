"""Reports: what they say, in text of 100 columns and as plain data, and how the times in them are measured."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from skipstone.ir.errors import UserError
from skipstone.optimize import optimize
from skipstone.passes.base import Remark, Status
from skipstone.report import Conversion, Footprint, Report, Stage, Timing, format_bytes, format_count, measure
from skipstone.runtime.speculate import Speculation
from tests import models

BEFORE = Footprint(24, 12, 12, flops=2.2e8, weight_bytes=400 * 2**20, kv_bytes_per_token=73728, nodes=900)
AFTER = Footprint(22, 11, 11, flops=1.1e8, weight_bytes=300 * 2**20, kv_bytes_per_token=67584, nodes=800)


def full_report() -> Report:
    slots = [Remark("kv_cache", Status.APPLIED, f"slot {i}", f"model.layers.{i}.self_attn") for i in range(12)]
    return Report(
        model="LlamaForCausalLM",
        target="onnxruntime",
        threads=2,
        cache="11 slots",
        before=BEFORE,
        after=AFTER,
        remarks=(
            Remark("skip_sublayers", Status.APPLIED, "model.layers.3.mlp", "ffn of layer 3 skipped", {"bytes": 12.0}),
            Remark("skip_sublayers", Status.MISSED, "model", "nothing named [4]"),
            Remark("skip_sublayers", Status.REFUSED, "model.layers.5", "its result is scaled"),
            *slots,
        ),
        conversions=(Conversion("bfloat16", "float32", 3, 2**20, 2**21),),
        stages=(Stage("capture", 1.25), Stage("lower", 2.5)),
        timing_before=Timing(400.0, 45.0, samples=5, prompt=128, new_tokens=64),
        timing_after=Timing(300.0, 18.0, samples=5, prompt=128, new_tokens=64),
    )


def words(report: Report) -> str:
    return " ".join(str(report).replace("│", " ").split())


def test_the_text_tells_everything():
    text = words(full_report())
    for part in (
        "model LlamaForCausalLM",
        "target onnxruntime, 2 threads",
        "KV cache 11 slots",
        "3 tensors, bfloat16 to float32: 1 MiB became 2 MiB",
        "skip_sublayers applied 1 model.layers.3.mlp ffn of layer 3 skipped",
        "missed 1 model nothing named [4]",
        "refused 1 model.layers.5 its result is scaled",
        "kv_cache applied 12 slot 0,",
        "and 8 more",
        "24 (12 + 12) 22 (11 + 11)",
        "FLOPs a token 220 M 110 M 0.500",
        "weights 400 MiB 300 MiB 0.750",
        "keys and values a token 72 KiB 66 KiB 0.917",
        "prefill (128 tokens, median of 5) 400.00 ms 300.00 ms 0.750",
        "decode, a token (64 tokens, median of 5) 45.00 ms 18.00 ms 0.400",
        "capture 1.25",
        "total 3.75",
    ):
        assert part in text


def test_the_text_fits_100_columns():
    long = Remark("skip_sublayers", Status.REFUSED, "model." + "layers." * 40, "because " * 60)
    report = full_report()
    report.remarks = (*report.remarks, long)
    report.cache = "refused: " + "convolution " * 30
    assert max(len(line) for line in str(report).splitlines()) <= 100


def test_what_was_not_measured_is_not_claimed():
    report = Report("Net", "eager", before=BEFORE, after=BEFORE)
    assert words(report).count("not measured") == 4
    assert "threads not set" in words(report)
    report.timing_after = Timing(3.0, None, samples=2, prompt=8, new_tokens=4)
    assert words(report).count("not measured") == 3
    assert "ms 0." not in words(report), "no ratio without both times"


def test_an_empty_report_renders():
    assert "Net" in str(Report("Net", "eager"))


def test_a_program_without_cost_has_no_ratio():
    nothing = Footprint(0, 0, 0, flops=0, weight_bytes=0, kv_bytes_per_token=0, nodes=1)
    assert "weights 0 B 0 B" in words(Report("Net", "eager", before=nothing, after=nothing))


def test_the_dictionary_is_json():
    data = json.loads(json.dumps(full_report().to_dict()))
    assert data["before"]["sublayers"] == 24
    assert data["remarks"][0] == {
        "pass_name": "skip_sublayers",
        "status": "applied",
        "where": "model.layers.3.mlp",
        "why": "ffn of layer 3 skipped",
        "numbers": {"bytes": 12.0},
    }
    assert data["stages"] == [{"name": "capture", "seconds": 1.25}, {"name": "lower", "seconds": 2.5}]
    assert data["timing_after"]["decode_ms"] == 18.0
    assert Report("Net", "eager").to_dict()["timing_before"] is None


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (1023, "1023 B"), (1024, "1 KiB"), (1536, "1.5 KiB"), (3 * 2**40, "3 TiB")]
)
def test_bytes(size, text):
    assert format_bytes(size) == text


@pytest.mark.parametrize(("number", "text"), [(0, "0"), (999, "999"), (1000, "1 K"), (110_300_000, "110.3 M")])
def test_counts(number, text):
    assert format_count(number) == text


class Recorder:
    """A system that writes down how it was called."""

    def __init__(self, calls: list[str], name: str, supports_cache: bool = True) -> None:
        self.calls, self.name, self.supports_cache = calls, name, supports_cache

    def __call__(self, *, input_ids):
        self.calls.append(f"{self.name} whole")
        return SimpleNamespace(logits=torch.zeros(1, input_ids.shape[1], 5))

    def prefill(self, input_ids):
        self.calls.append(f"{self.name} prefill")
        return torch.tensor([[0.0, 0.0, 1.0, 0.0]]), "cache"

    def decode(self, tokens, cache):
        assert tokens.shape == (1, 1) and cache == "cache"
        self.calls.append(f"{self.name} {tokens.item()}")
        return torch.tensor([[[0.0, 1.0, 0.0, 0.0]]])


def test_systems_take_turns_after_a_warm_up():
    calls: list[str] = []
    ids = torch.ones(1, 3, dtype=torch.long)
    timings = measure({"a": Recorder(calls, "a"), "b": Recorder(calls, "b")}, ids, new_tokens=2, samples=2)
    assert calls == ["a prefill", "a 2", "a 1", "b prefill", "b 2", "b 1"] * 3
    assert timings["a"].samples == 2 and timings["a"].prompt == 3 and timings["a"].new_tokens == 2
    assert timings["b"].decode_ms is not None and timings["b"].decode_ms >= 0


def test_without_a_cache_only_the_prefill_is_measured():
    report = Report("Net", "eager")
    report.measure(Recorder([], "a", supports_cache=False), torch.ones(1, 3, dtype=torch.long))
    assert report.timing_before is None
    assert report.timing_after is not None and report.timing_after.decode_ms is None


@pytest.mark.parametrize(("tokens", "decode"), [(5, 500), (1, None)])
def test_with_a_draft_generate_is_measured(tokens: int, decode: float | None, monkeypatch: pytest.MonkeyPatch):
    """Steps are those of the model alone. What it takes to read the prompt is the time to the first token."""
    clock, ids = [0.0], torch.ones(1, 3, dtype=torch.int64)

    class Drafting(Recorder):
        speculation = Speculation()

        def generate(self, input_ids, max_new_tokens, do_sample, streamer):
            assert max_new_tokens == 9 and not do_sample
            streamer.put(input_ids)
            clock[0] += 10
            for number in range(tokens):  # it may end early; a step gives several at once
                clock[0] += 1.0 if number in (1, 4) else 0.0
                streamer.put(input_ids[:, :1])
            streamer.end()

    monkeypatch.setattr("skipstone.report.time.perf_counter", lambda: clock[0])
    timing = measure({"a": Drafting([], "a")}, ids, new_tokens=8, samples=1)["a"]
    assert (timing.prefill_ms, timing.decode_ms) == (10_000, decode)


def test_the_model_is_measured_beside_the_executable(tiny_llama):
    report = Report("LlamaForCausalLM", "eager")
    report.measure(Recorder([], "ours"), torch.ones(1, 3, dtype=torch.long), tiny_llama, new_tokens=2, samples=1)
    assert report.timing_before is not None and report.timing_before.decode_ms is not None


@pytest.fixture
def tiny_llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=17,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (None, {"samples": 0}, "0 runs of 16 tokens"),
        (None, {"new_tokens": 0}, "3 runs of 0 tokens"),
        (torch.nn.Linear(2, 2), {}, "Linear is no Hugging Face model that generates"),
    ],
)
def test_what_cannot_be_measured_is_refused(model, options, message):
    with pytest.raises(UserError, match=message):
        Report("Net", "eager").measure(None, torch.ones(1, 2, dtype=torch.int64), model, **options)


def test_flops_that_depend_on_the_data_are_said_to() -> None:
    report = replace(full_report(), after=replace(AFTER, flops=None))
    assert "FLOPs a token 220 M depends on the data" in " ".join(str(report).replace("│", " ").split())


def test_optimize_reports_converted_weights() -> None:
    model = copy.deepcopy(models.model("llama")).to(torch.bfloat16)
    report = optimize(model, target="onnxruntime", progress=False).report
    (conversion,) = report.conversions
    size = sum(parameter.nbytes for parameter in model.parameters())
    assert (conversion.source, conversion.target) == ("bfloat16", "float32")
    assert size <= conversion.bytes_before < size + 100, "the weights, and the frequencies of the rotary embedding"
    assert conversion.bytes_after == 2 * conversion.bytes_before
    assert "bfloat16 to float32" in str(report)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
