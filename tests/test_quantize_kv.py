"""Quantized caches, end to end: the matrix that every pass must meet, against attention written out without a cache."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, fx
from transformers import LlamaConfig, LlamaForCausalLM

import skipstone
from skipstone.ir.capture.huggingface import capture_huggingface
from skipstone.ir.capture.validate import relative_difference
from skipstone.ir.dialect import ATTENTION, QUANTIZED_CACHED_ATTENTION, attention_weights, visible, weighted_values
from skipstone.ir.formats import Full
from skipstone.ir.program import Program, Role
from skipstone.ir.statistics import sites
from skipstone.ir.stream import note_layers
from skipstone.passes.base import Pipeline, Status
from skipstone.passes.cleanup import Cleanup
from skipstone.passes.quantize_kv import FormatChoice, QuantizeKV, static_tensor
from skipstone.plan import Plan
from tests import models
from tests.versions import needs_group_query_attention

LAYERS, VOCABULARY, WIDTH = 3, 61, 32
KV_HEADS = {"mha": 4, "gqa": 2}
FORMATS: dict[str, dict[str, Any]] = {
    "int8": {},
    "int4": {"k": "int4", "v": "int4"},
    "int8_token": {"granularity": "token"},
    "fp8": {"k": "fp8", "v": "fp8", "granularity": "token"},
    "int4_group": {"k": "int4", "v": "int4", "granularity": "token", "group": 16},
    "kivi4": {"k": "int4", "v": "int4", "granularity": "group", "group": 8},
    "nvfp4": {"k": "nvfp4", "v": "nvfp4", "granularity": "token"},
    "mxfp4": {"k": "mxfp4", "v": "mxfp4", "granularity": "token"},
    "keys alone": {"k": "int8", "v": "full"},
    "keys finer": {"k": "int8", "v": "int4", "granularity": "token"},
    "residual and sinks": {"k": "int4", "v": "int4", "granularity": "token", "residual": 5, "sinks": 2},
    "kivi4, residual and sinks": {
        "k": "int4", "v": "int4", "granularity": "group", "group": 8, "residual": 6, "sinks": 3,
    },
    "one layer": {"layers": (1,)},
    "some heads": {"k": "int4", "v": "int4", "choices": (FormatChoice((0, 2), heads=(1,), k="int8", v="int8"),)},
}  # fmt: skip
EXACT = 1e-9
"""Largest difference of float64 logits, over their range: there no code is rounded another way."""


@cache
def model(heads: str, dtype: torch.dtype = torch.float64) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=4 * WIDTH, intermediate_size=48, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=KV_HEADS[heads], max_position_embeddings=160, initializer_range=0.1,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().to(dtype)


@cache
def captured(heads: str, dtype: torch.dtype = torch.float64) -> Program:
    return capture_huggingface(model(heads, dtype))


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


CALIBRATION = [tokens(2, 30, seed) for seed in (1, 2)]


@cache
def executable(heads: str, name: str, target: Any = "eager", dtype: torch.dtype = torch.float64) -> Any:
    return optimized(heads, Plan([QuantizeKV(**FORMATS[name])]), target, dtype)


def optimized(heads: str, plan: Plan, target: Any = "eager", dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """What `optimize` gives; the model is captured once."""
    options = {"calibration": CALIBRATION, "progress": False, "threads": 1} | options
    with patch.object(import_module("skipstone.optimize"), "capture", lambda *_: captured(heads, dtype).copy()):
        return skipstone.optimize(model(heads, dtype), plan, target=target, **options)


class WrittenOut(fx.Interpreter):
    """A program without a cache in which every attention reads its keys and values as the formats give them back."""

    def __init__(self, program: Program, config: QuantizeKV) -> None:
        super().__init__(program.module)
        self.program, self.config, self.names = program, config, sites(program)

    def run_node(self, n: fx.Node) -> Any:
        if n.target is not ATTENTION:
            return super().run_node(n)
        (q, *kept), _ = self.fetch_args_kwargs_from_env(n)
        rows = q.shape[2]
        i, j = torch.arange(rows)[:, None], torch.arange(rows)
        logits = weights = None
        for which, form, x in zip(("key", "value"), self.config.formats(n), kept[:2], strict=True):
            static = static_tensor(self.program, n, self.names[n], which, form)
            padded = torch.cat([x, x.new_zeros(*x.shape[:2], -rows % form.group_tokens, x.shape[3])], dim=2)
            coded = form.decode(form.encode(padded, static), static, x.dtype, x.shape[3])[:, :, :rows]
            complete = (j // form.group_tokens + 1) * form.group_tokens  # rows there have to be for j to be encoded
            exact = (j < self.config.sinks) | (complete > i + 1 - self.config.residual)
            exact = torch.ones_like(exact) if isinstance(form, Full) else exact
            x, coded = (each.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for each in (x, coded))
            if which == "key":
                logits = torch.where(exact, q @ x.mT, q @ coded.mT) * n.kwargs["scale"]
                allowed = visible(n.kwargs["kind"], n.kwargs.get("window", 0), i, j)
                sinks = kept[4] if len(kept) > 4 else None
                weights = attention_weights(logits, allowed, None, sinks, n.kwargs.get("softcap", 0.0))
            else:
                out = weighted_values(torch.where(exact, weights, 0), x)
                out = out + weighted_values(torch.where(exact, 0, weights), coded)
        return out


@cache
def written_out(heads: str, name: str) -> WrittenOut:
    return oracle(executable(heads, name), captured(heads))


def oracle(opt: Any, source: Program) -> WrittenOut:
    """The written-out program of an executable: the same conditioning and calibration, no cache, no padding."""
    (config,) = opt.plan
    prepare = import_module("skipstone.rewrite").prepare_quantization
    source = source.copy()
    note_layers(source)
    program = Pipeline([Cleanup()]).run(source)
    program.calibration = dict(opt.plan.tensors)
    return WrittenOut(prepare(program, config, ()), config)


@torch.no_grad()
def expected(heads: str, name: str, ids: Tensor) -> Tensor:
    """Logits [B, S, V] of every row on its own."""
    positions = torch.arange(ids.shape[1])[None]
    return torch.cat([written_out(heads, name).run(row[None], positions)[0] for row in ids])


pytestmark = pytest.mark.usefixtures("one_thread")


CELLS = [
    pytest.param(heads, name, id=f"{heads}, {name}", marks=pytest.mark.slow if heads == "mha" else ())
    for heads in KV_HEADS
    for name in FORMATS
]


@pytest.mark.parametrize(("heads", "name"), CELLS)
def test_prefill_and_decode(heads: str, name: str) -> None:
    """In one piece, step by step, and in chunks that do not end where groups do."""
    opt, ids = executable(heads, name), tokens(2, 39)
    wanted = expected(heads, name, ids)
    assert relative_difference(opt(ids).logits, wanted) < EXACT
    logits, cache = opt.prefill(ids[:, :13])
    parts = [logits[:, None]]
    parts += [opt.decode(ids[:, position], cache)[:, None] for position in range(13, 22)]
    parts += [opt.decode(ids[:, start:stop], cache) for start, stop in ((22, 27), (27, 38))]
    assert relative_difference(torch.cat(parts, dim=1), wanted[:, 12:38]) < EXACT


@pytest.mark.parametrize(("heads", "name"), CELLS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(heads: str, name: str, side: str) -> None:
    """Rows of 11 and 24 tokens in one batch, then two steps: each equals its own run."""
    opt, ids, lengths = executable(heads, name), tokens(2, 26), [11, 24]
    batch, mask = torch.zeros(2, 24, dtype=torch.int64), torch.zeros(2, 24, dtype=torch.int64)
    for row, length in enumerate(lengths):
        place = slice(24 - length, 24) if side == "left" else slice(0, length)
        batch[row, place], mask[row, place] = ids[row, :length], 1
    logits, cache = opt.prefill(batch, mask)
    after = [logits]
    for step in range(2):
        after.append(opt.decode(torch.stack([ids[row, length + step] for row, length in enumerate(lengths)]), cache))
    for row, length in enumerate(lengths):
        wanted = expected(heads, name, ids[row : row + 1, : length + 2])[0, length - 1 :]
        assert relative_difference(torch.stack([each[row] for each in after]), wanted) < EXACT


@pytest.mark.parametrize("name", FORMATS)
def test_the_cache_of_a_prompt_is_the_cache_of_its_tokens(name: str) -> None:
    """Appending one by one or in one go writes the same codes and scales."""
    opt, ids = executable("gqa", name), tokens(2, 27)
    whole = opt.prefill(ids)[1]
    single = opt.prefill(ids[:, :1])[1]
    for position in range(1, 27):
        opt.decode(ids[:, position], single)
    for each in whole.layout:
        rows = 27 // each.part.tokens if each.part.fixed_rows is None else each.part.rows(0)
        mine, theirs = (cache.buffers[each.name][:, :, :rows] for cache in (whole, single))
        if each.part.dtype == torch.float64:  # kept as computed: a product of one row may round in another way
            torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
        else:
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("name", FORMATS)
def test_cache_operations_move_codes(name: str, tmp_path: Path) -> None:
    """Reordered, repeated, grown, cropped, saved and loaded, a cache goes on as if it had been read that way."""
    opt, ids = executable("gqa", name), tokens(3, 40)
    _, cache = opt.prefill(ids[:, :30])
    order = torch.tensor([2, 0, 2])
    cache.reorder(order)
    cache.save(tmp_path / "cache")
    cache = opt.load_cache(tmp_path / "cache")
    cache.grow(100)
    assert relative_difference(opt.decode(ids[order, 30], cache), expected("gqa", name, ids[order, :31])[:, -1]) < EXACT
    lengths, following = [25, 31, 19], tokens(3, 1, seed=7)
    cache.crop(torch.tensor(lengths))
    got = opt.decode(following[:, 0], cache)
    for row, length in enumerate(lengths):
        alone = torch.cat([ids[order[row], :length], following[row]])[None]
        assert relative_difference(got[row], expected("gqa", name, alone)[0, -1]) < EXACT


OTHERS: dict[str, dict[str, Any]] = {
    "gpt2": {"k": "fp8", "v": "fp8", "granularity": "token"},
    "gemma2": {"granularity": "token", "residual": 3},
    "gpt_neox": {"k": "int4", "v": "int4", "granularity": "group", "group": 4},
    "gpt_oss": {"k": "int4", "v": "int4", "granularity": "token", "group": 8, "sinks": 2},
}


@pytest.mark.parametrize(
    "name", ["gemma2", "gpt_oss", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gpt2", "gpt_neox"))]
)
def test_other_attentions(name: str) -> None:
    """Learned positions, windows and soft caps, partial rotation, learned sinks."""
    plan = Plan([QuantizeKV(**OTHERS[name])])
    ids = models.tokens(2, 30)
    with patch.object(import_module("skipstone.optimize"), "capture", lambda *_: models.program(name).copy()):
        calibration = [models.tokens(2, 30, seed=1)]
        opt = skipstone.optimize(
            models.model(name), plan, target="eager", calibration=calibration, progress=False, threads=1
        )
    reference = oracle(opt, models.program(name))
    wanted = torch.cat([reference.run(row[None], torch.arange(30)[None])[0] for row in ids])
    logits, cache = opt.prefill(ids[:, :19])
    steps = [logits, *(opt.decode(ids[:, position], cache) for position in range(19, 30))]
    assert relative_difference(torch.stack(steps, dim=1), wanted[:, 18:]) < 2e-3  # float32: a code may round elsewhere


@pytest.mark.parametrize("name", ["kivi4", "residual and sinks"])
def test_a_crop_beyond_the_full_precision_rows_is_refused(name: str) -> None:
    opt = executable("gqa", name)
    _, cache = opt.prefill(tokens(1, 100))
    lengths, before = cache.lengths.clone(), {key: value.clone() for key, value in cache.buffers.items()}
    with pytest.raises(skipstone.errors.InvalidInput, match="in full precision"):
        cache.crop(50)
    assert torch.equal(cache.lengths, lengths)
    assert all(torch.equal(cache.buffers[key], value) for key, value in before.items())
    cache.crop(0)
    ids = tokens(1, 20, seed=5)
    opt.decode(ids[:, :19], cache)
    assert relative_difference(opt.decode(ids[:, 19], cache), expected("gqa", name, ids)[:, -1]) < EXACT


@pytest.mark.parametrize("name", ["int8", "kivi4, residual and sinks"])
def test_generate(name: str) -> None:
    """Greedy and beam search give what full recomputation with the written-out program gives."""
    opt, ids = executable("gqa", name), tokens(2, 9)
    got = opt.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None)
    for row in range(2):
        sequence = ids[row : row + 1]
        for _ in range(12):
            following = expected("gqa", name, sequence)[:, -1].argmax(-1, keepdim=True)
            sequence = torch.cat([sequence, following], dim=1)
        assert torch.equal(got[row], sequence[0])
    beams = opt.generate(ids, max_new_tokens=8, num_beams=3, do_sample=False, eos_token_id=None)
    uncached = opt.generate(ids, max_new_tokens=8, num_beams=3, do_sample=False, eos_token_id=None, use_cache=False)
    assert torch.equal(beams, uncached)


@needs_group_query_attention
@pytest.mark.parametrize(
    ("heads", "name"),
    [
        ("gqa", "int8"),
        pytest.param("gqa", "int4", marks=pytest.mark.slow),
        pytest.param("mha", "int8", marks=pytest.mark.slow),
        pytest.param("mha", "int4", marks=pytest.mark.slow),
    ],
)
def test_onnx_runtime(heads: str, name: str) -> None:
    """Prefill, ragged padding and decode equal the eager target; codes differ by one, in a few places at most."""
    ids = tokens(2, 26)
    mask = torch.ones(2, 24, dtype=torch.int64)
    mask[0, :13] = 0
    results, caches = [], []
    for target in ("eager", "onnxruntime"):
        opt = executable(heads, name, target, torch.float32)
        logits, kept = opt.prefill(ids[:, :24], mask)
        steps = [logits, opt.decode(ids[:, 24], kept), opt.decode(ids[:, 25], kept)]
        results.append(torch.cat([torch.stack(steps, dim=1), opt.decode(ids[:, :5], kept)], dim=1))
        caches.append(kept)
    step = 1 / (127 if name == "int8" else 7)
    assert relative_difference(results[1], results[0]) < 0.02 * step
    for mine, theirs in zip(*(each.buffers.values() for each in caches), strict=True):
        mine, theirs = (each[:, :, :13] for each in (mine, theirs))
        if name == "int4":
            mine, theirs = (torch.stack([each & 15, each >> 4]) for each in (mine, theirs))
        distance = (mine.int() - theirs.int()).abs()
        assert distance.max() <= 1 and distance.float().mean() < 1e-3


@needs_group_query_attention
@pytest.mark.parametrize("name", ["int8", pytest.param("int4", marks=pytest.mark.slow)])
def test_in_onnx_runtime_the_cache_is_written_in_place(name: str) -> None:
    opt = executable("gqa", name, "onnxruntime", torch.float32)
    _, kept = opt.prefill(tokens(1, 8))
    before = dict(kept.buffers)
    opt.decode(tokens(1, 1)[:, 0], kept)
    assert all(kept.buffers[key] is value for key, value in before.items())
    assert {value.dtype for value in before.values()} == {torch.int8 if name == "int8" else torch.uint8}


@pytest.mark.parametrize(
    "name",
    ["int8", "kivi4, residual and sinks", *(pytest.param(n, marks=pytest.mark.slow) for n in ("int8_token", "fp8"))],
)
def test_bfloat16(name: str) -> None:
    """The error against the exact float64 model is that of bfloat16 and that of the format, not more."""
    ids = tokens(2, 30)
    with torch.no_grad():
        exact = model("gqa")(ids).logits
        plain = model("gqa", torch.bfloat16)(ids).logits.double()
    both = executable("gqa", name, dtype=torch.bfloat16)(ids).logits.double()
    format_alone = executable("gqa", name)(ids).logits
    error = {key: (value - exact).norm() for key, value in (("plain", plain), ("format", format_alone), ("both", both))}
    assert error["both"] < 1.5 * (error["plain"] ** 2 + error["format"] ** 2) ** 0.5


@pytest.mark.parametrize("name", ["int8", "nvfp4", "some heads", "kivi4, residual and sinks"])
def test_a_saved_plan_needs_no_data(name: str, tmp_path: Path) -> None:
    opt, ids = executable("gqa", name), tokens(1, 20)
    opt.plan.save(tmp_path / "plan.json")
    again = optimized("gqa", Plan.load(tmp_path / "plan.json"), calibration=None)
    assert torch.equal(again(ids).logits, opt(ids).logits)
    assert again.plan == opt.plan


def test_bytes_and_errors_are_reported() -> None:
    """Half a byte an element and the scales; finer formats have the smaller estimated error."""
    reports = {name: executable("gqa", name).report for name in ("int8", "int4", "int4_group")}
    elements = LAYERS * 2 * KV_HEADS["gqa"] * WIDTH
    sizes = {name: report.after.kv_bytes_per_token for name, report in reports.items()}
    assert sizes == {"int8": elements, "int4": elements // 2, "int4_group": elements // 2 + elements // 16 * 4}
    errors = {}
    for name, report in reports.items():
        remarks = [r for r in report.remarks if r.pass_name == "quantize_kv" and r.status is Status.APPLIED]
        *each, model_wide = remarks
        assert len(each) == LAYERS
        errors[name] = max(remark.numbers["relative_output_error"] for remark in each)
        assert f"{errors[name]:.1e}" in model_wide.why
    assert 0 < errors["int8"] < errors["int4_group"] < errors["int4"]


def test_heads_with_other_formats_have_slots_of_their_own() -> None:
    program = executable("gqa", "some heads").program
    formats = [(node.kwargs["slot"], node.kwargs["k_format"]) for node in program.nodes(QUANTIZED_CACHED_ATTENTION)]
    names = ["int4_channel", "int8_channel", "int4_channel", "int4_channel", "int8_channel"]
    assert sorted(formats) == list(enumerate(names))
    assert program.input(Role.COUNT) is None


@needs_group_query_attention
def test_two_calls_do_not_recompile() -> None:
    """The session of a target is made once, whatever the sizes of the calls."""
    opt = executable("gqa", "int8", "onnxruntime", torch.float32)
    session = opt.session
    with patch("skipstone.runtime.onnx.session.lower", side_effect=AssertionError("lowered again")):
        for length in (5, 9, 5):
            opt(tokens(2, length))
    assert opt.session is session


# Bad input

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"k": "int7"}, "no cache format 'int7'"),
    ({"granularity": "channel", "k": "fp8", "v": "fp8"}, "granularity 'channel'.*token"),
    ({"residual": -1}, "residual is -1"),
    ({"layers": (7,)}, "layer 7.*nearest is 2"),
    ({"choices": (FormatChoice((0,), heads=(4,)),)}, "no key-value head 4.*last one is 1"),
    ({"k": "int4", "v": "int4", "granularity": "token", "group": 24}, "24"),
    ({"k": "int4", "v": "int4", "granularity": "token", "group": 0}, "0"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=str)
def test_impossible_plans_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(skipstone.errors.InvalidPlan, match=message):
        optimized("gqa", Plan([QuantizeKV(**options)]))


def test_a_plan_with_static_scales_needs_data_before_anything_is_done() -> None:
    with (
        patch.object(import_module("skipstone.optimize"), "capture", side_effect=AssertionError("captured")),
        pytest.raises(skipstone.errors.InvalidPlan, match=r"calibration=.*granularity='token'"),
    ):
        skipstone.optimize(model("gqa"), Plan([QuantizeKV()]), target="eager", progress=False)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "is empty"),
        (["a text"], "is a text.*tokenize"),
        ([torch.rand(2, 3)], "float32"),
        ([tokens(1, 4), torch.zeros(2, 2, 2, dtype=torch.int64)], r"batch 1 has shape \[2, 2, 2\]"),
        ([torch.zeros(1, 0, dtype=torch.int64)], r"shape \[1, 0\]"),
        ([torch.full((1, 4), VOCABULARY)], "outside"),
        ([torch.full((1, 4), -1)], "outside"),
        ([torch.zeros(1, 161, dtype=torch.int64)], "161 tokens a row, the model takes 160"),
        ([{"input_ids": tokens(1, 4), "attention_mask": torch.ones(1, 5)}], "attention_mask"),
    ],
)
def test_calibration_data_of_the_wrong_shape_is_refused(data: Any, message: str) -> None:
    with pytest.raises(skipstone.errors.InvalidInput, match=message):
        optimized("gqa", Plan([QuantizeKV()]), calibration=data)


def test_calibration_that_leads_to_nan_is_refused() -> None:
    broken = captured("gqa").copy()
    name = next(name for name in broken.tensors() if "layers.1.self_attn.k_proj" in name)
    tensor = broken.tensor(name)
    owner, _, leaf = name.rpartition(".")
    module = broken.module.get_submodule(owner)
    delattr(module, leaf)
    module.register_buffer(leaf, tensor.clone().index_fill(0, torch.tensor([3]), float("nan")))
    with (
        patch.object(import_module("skipstone.optimize"), "capture", lambda *_: broken),
        pytest.raises(skipstone.errors.InvalidInput, match=r"keys at model\.layers\.1\.self_attn.*NaN"),
    ):
        skipstone.optimize(model("gqa"), Plan([QuantizeKV()]), target="eager", calibration=CALIBRATION, progress=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"granularity": "token"}, "int8_token on ONNX Runtime"),
        ({"residual": 4}, "full precision beside a quantized cache"),
        ({"sinks": 4}, "full precision beside a quantized cache"),
        pytest.param(
            {"v": "int4"},
            "keys in int8_channel beside values in int4_channel",
            marks=needs_group_query_attention,
        ),
    ],
    ids=str,
)
def test_what_onnx_runtime_lacks_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(skipstone.errors.Unsupported, match=message):
        optimized("gqa", Plan([QuantizeKV(**options)]), "onnxruntime", torch.float32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": "nvfp4", "granularity": "token"}, "keys at model.layers.0.self_attn"),
        ({"v": "int4", "granularity": "token"}, "values at model.layers.0.self_attn"),
    ],
)
def test_formats_that_do_not_fit_the_head_size_are_refused(options: dict[str, Any], message: str) -> None:
    with (
        patch.object(import_module("skipstone.optimize"), "capture", lambda *_: models.program("llama").copy()),
        pytest.raises(skipstone.errors.InvalidPlan, match=message),
    ):
        skipstone.optimize(models.model("llama"), Plan([QuantizeKV(**options)]), target="eager", progress=False)


def test_a_program_without_a_cache_is_refused() -> None:
    with pytest.raises(skipstone.errors.Unsupported, match="without a KV cache"):
        optimized("gqa", Plan([QuantizeKV()]), cache=False)
