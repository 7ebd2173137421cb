"""Formats of the KV cache, bit by bit against a second implementation and ONNX Runtime, and their error bounds."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis.extra.numpy import arrays
from onnx import TensorProto, helper
from torch import Tensor
from torch._subclasses import FakeTensorMode

from skipstone.ir.errors import InvalidInput, InvalidPlan
from skipstone.ir.formats import Format, Full, Int4Group, Kivi4, Quantized, choose, parse
from tests import numpy_formats
from tests.numpy_formats import Array

QUANTIZED = (
    "int8_channel",
    "int4_channel",
    "int8_token",
    "fp8_token",
    "int4_group",
    "kivi4",
    "nvfp4",
    "mxfp4",
    "int4_group:16",
    "kivi4:8",
)


def quantized(name: str) -> Quantized:
    form = parse(name)
    assert isinstance(form, Quantized)
    return form


def static_of(form: Format, x: Tensor, margin: float = 1.0) -> Tensor | None:
    return form.static_from(x.amin((0, 2)), x.amax((0, 2)), margin)


def awkward(width: int = 64, dtype: torch.dtype = torch.float32) -> Tensor:
    """[2, 3, 64, width]: magnitudes over many decades, and rows and channels that formats are known to get wrong."""
    x = torch.randn(2, 3, 64, width, dtype=torch.float64)
    x[0] *= 10.0 ** torch.empty(3, 64, 1).uniform_(-4, 3)
    x[1, 0] = 0.25 * torch.randint(-40, 40, (64, width))  # many ties
    x[1, 1, :, ::7] *= 50  # outlier channels
    x[:, :2, :, 9] = x[:, :2, :, 9].abs() + 3  # far from zero
    x[1, 2, ::5] *= 1e-41  # subnormal
    x[1, 2, 1] = 2.0**-149 * torch.randint(-190, -180, (width,))  # the scale rounds far down, and codes have to clip
    x[0, 0, 3] = 0
    x[0, 0, 32:, 5] = 0
    x[0, 1, 4] = 1.7
    x[0, 1, 5] = x[0, 1, 5].abs() + 5
    x[0, 2, 6] *= 1e-6
    x[0, 2, 6, 17] = -3e4
    return x.to(dtype)


# Formats against the second implementation


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("margin", [1.0, 0.5], ids=["in_range", "beyond_range"])
@pytest.mark.parametrize("name", QUANTIZED)
def test_bytes_are_those_of_the_definition(name: str, margin: float, dtype: torch.dtype) -> None:
    form, x = parse(name), awkward(dtype=dtype)
    static = static_of(form, x)
    static = static if static is None else static * margin
    parts = form.encode(x, static)
    known = None if static is None else static.numpy()
    expected = numpy_formats.encode(name, x.numpy(), known)
    described = form.parts(x.shape[-1], dtype)
    for part, want, which in zip(parts, expected, described, strict=True):
        np.testing.assert_array_equal(part.numpy(), want)
        assert (part.dtype, part.shape[-1], part.shape[-2] * which.tokens) == (which.dtype, which.width, x.shape[-2])
    values = form.decode(parts, static, torch.float64, x.shape[-1])
    np.testing.assert_allclose(
        values.numpy(), numpy_formats.decode(name, expected, known, x.shape[-1]), rtol=1e-7, atol=0
    )


def onnx_runtime_bytes(x: Tensor, scale: Tensor, bits: int) -> Array:
    """The cache that GroupQueryAttention of ONNX Runtime writes for keys x [1, KH, S, D]."""
    _, heads, tokens, width = x.shape
    row, kind = (width, TensorProto.INT8) if bits == 8 else (width // 2, TensorProto.UINT8)
    names = ("q", "k", "v", "past_k", "past_v", "last", "total", "", "", "", "", "", "k_scale", "v_scale")
    node = helper.make_node(
        "GroupQueryAttention",
        names,
        ["out", "new_k", "new_v"],
        domain="com.microsoft",
        num_heads=heads,
        kv_num_heads=heads,
        k_quant_type="PER_CHANNEL",
        v_quant_type="PER_CHANNEL",
        kv_cache_bit_width=bits,
    )
    rows = np.ascontiguousarray(x.transpose(1, 2).flatten(2).numpy())
    past = np.zeros((1, heads, tokens, row), helper.tensor_dtype_to_np_dtype(kind))
    scales = scale.flatten().numpy()
    last, total = np.array([tokens - 1], np.int32), np.array(tokens, np.int32)
    values = (rows, rows, rows, past, past, last, total, scales, scales)
    feeds = dict(zip(filter(None, names), values, strict=True))
    inputs = [
        helper.make_tensor_value_info(k, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape) for k, a in feeds.items()
    ]
    results = [
        helper.make_tensor_value_info(k, t, None)
        for k, t in (("out", TensorProto.FLOAT), ("new_k", kind), ("new_v", kind))
    ]
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph([node], "one_node", inputs, results)
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    new_k, new_v = session.run(["new_k", "new_v"], feeds)
    np.testing.assert_array_equal(new_k, new_v)
    return new_k


@pytest.mark.parametrize("width", [8, 40, 64, 128])
@pytest.mark.parametrize("bits", [8, 4])
def test_static_integers_are_those_of_onnx_runtime(bits: int, width: int) -> None:
    form = choose(f"int{bits}", "channel", "k", 32)
    scale = torch.empty(3, width).uniform_(1e-3, 3)
    steps = torch.randint(-150, 150, (1, 3, 50, width)) if bits == 8 else torch.randint(-11, 11, (1, 3, 50, width))
    x = (steps + 0.5) * scale[:, None]  # next to ties, where dividing and multiplying with the reciprocal differ
    x[:, :, 25:] += scale[:, None] * torch.randn(25, width)
    x[0, 0, 0, :3] = torch.tensor([torch.inf, -torch.inf, -0.0])
    (codes,) = form.encode(x, scale)
    np.testing.assert_array_equal(codes.numpy(), onnx_runtime_bytes(x, scale, bits))


# Error bounds


def published_bound(name: str, x: Array, static: Array | None) -> Array:
    """Bounds of the error from the definitions alone; NaN where none is stated, such as for subnormal scales."""
    base, _, size = name.partition(":")
    group = int(size or 32)
    blocks = x.reshape(*x.shape[:-1], -1, 16 if base == "nvfp4" else 32)
    amax = np.broadcast_to(np.abs(blocks).max(-1, keepdims=True), blocks.shape).reshape(x.shape)
    match base:
        case "int8_channel" | "int4_channel":
            assert static is not None
            return np.broadcast_to(static[:, None] / 2, x.shape)
        case "int8_token":
            scale = np.abs(x).max(-1, keepdims=True) / 127
            return np.where(scale >= 2.0**-126, scale / 2, np.nan) + 0 * x
        case "fp8_token":
            scale = np.abs(x).max(-1, keepdims=True) / 448
            bound = np.where(np.abs(x) >= 2**-6 * scale, np.abs(x) / 17, 2**-10 * scale)
            return np.where(scale >= 2.0**-126, bound, np.nan)
        case "int4_group" | "kivi4":
            axis = -1 if base == "int4_group" else -2
            groups = np.moveaxis(x, axis, -1)
            groups = groups.reshape(*groups.shape[:-1], -1, group)
            low, high = groups.min(-1, keepdims=True), groups.max(-1, keepdims=True)
            # Half a step; float16 moves the step and the offset by 2^-11 of themselves, or 2^-25 where it is subnormal.
            bound = (high - low) * (1 / 30 + 2**-11) + np.abs(low) * 2**-11 + 16 * 2**-25
            return np.moveaxis(np.broadcast_to(bound, groups.shape).reshape(np.moveaxis(x, axis, -1).shape), -1, axis)
        case "nvfp4":
            assert static is not None
            scale = amax / 6 / static[:, None]
            return np.where((scale >= 2**-6) & (scale <= 448) & (amax > 2.0**-115), amax / 6 * (1 + 1 / 17), np.nan)
        case "mxfp4":
            return np.where(amax >= 2.0**-125, amax / 4, np.nan)
    raise AssertionError(name)


def check_error(form: Format, x: Tensor) -> None:
    """The error stays within both bounds; where a value cannot be stored it is NaN, and never another number."""
    static = static_of(form, x)
    values = form.decode(form.encode(x, static), static, torch.float32, x.shape[-1])
    error, bound = (values.double() - x.double()).abs(), form.error_bound(x, static).double()
    assert torch.equal(values.isnan(), bound.isnan())
    assert (error <= bound)[~bound.isnan()].all(), f"{(error - bound).nan_to_num(0).max()} beyond the bound"
    published = published_bound(form.name, x.double().numpy(), None if static is None else static.double().numpy())
    stated = ~np.isnan(published) & ~bound.isnan().numpy()
    slack = 2**-22 * x.abs().double().numpy() + 2**-148
    assert (error.numpy() <= published + slack)[stated].all()


def numbers(shape: tuple[int, ...]) -> st.SearchStrategy[Array]:
    """float32 arrays of any magnitude from subnormal to 2^126."""
    return arrays(np.float32, shape, elements=st.floats(-(2.0**126), 2.0**126, width=32))


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """[1, 2, 32, 32], of one of the kinds that quantization gets wrong."""
    x = draw(numbers((1, 2, 32, 32)))
    kind = draw(st.sampled_from(["any", "tame", "zero rows", "constant", "outlier", "positive", "subnormal"]))
    if kind != "any":
        random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
        x = random.normal(size=x.shape) * 10.0 ** draw(st.integers(-8, 4))
        token = draw(st.integers(0, 31))
        if kind == "zero rows":
            x[:, :, token:] = 0
        elif kind == "constant":
            x[:, :, token:] = draw(st.floats(-6e4, 6e4))
        elif kind == "outlier":
            x[:, :, token, draw(st.integers(0, 31))] = draw(st.floats(-6e4, 6e4))
        elif kind == "positive":
            x = np.abs(x) * 0.1 + draw(st.floats(0, 1e4))
        elif kind == "subnormal":
            x[:, :, token:] *= 1e-38
    return torch.from_numpy(x.astype(np.float32))


@pytest.mark.parametrize("name", QUANTIZED)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(x=tensors())
def test_error_stays_within_its_bounds(name: str, x: Tensor) -> None:
    check_error(parse(name), x)


@pytest.mark.parametrize("name", QUANTIZED)
def test_bounds_are_tight(name: str) -> None:
    form, x = parse(name), torch.randn(2, 2, 128, 64)
    x[0, 0, 0] = torch.linspace(-7.999, 7.999, 64)  # block maxima just below a power of two, for mxfp4
    check_error(form, x)
    static = static_of(form, x)
    values = form.decode(form.encode(x, static), static, torch.float32, 64)
    error = (values - x).abs().double()
    assert (error > 0.9 * form.error_bound(x, static)).any()
    published = published_bound(name, x.double().numpy(), None if static is None else static.double().numpy())
    assert (error.numpy() > 0.9 * published).any()


def test_bounds_hold_beyond_the_calibrated_range() -> None:
    for name in ("int8_channel", "int4_channel", "nvfp4"):
        form, x = parse(name), 10 * torch.randn(2, 2, 64, 32)
        static = static_of(form, x)
        assert static is not None
        static = static / 20
        error = (form.decode(form.encode(x, static), static, torch.float32, 32) - x).abs()
        assert (error <= form.error_bound(x, static)).all() and (error > 1).any()


# What holds for every format


@pytest.mark.parametrize("name", ["full", *QUANTIZED])
def test_one_token_at_a_time_gives_the_same_bytes(name: str) -> None:
    form, x = parse(name), awkward()
    static, step = static_of(form, x), form.group_tokens
    together = form.encode(x, static)
    pieces = [form.encode(x[:, :, at : at + step], static) for at in range(0, x.shape[2], step)]
    for whole, *parts in zip(together, *pieces, strict=True):
        assert torch.equal(torch.cat(parts, dim=2), whole)


@pytest.mark.parametrize("name", ["full", *QUANTIZED])
def test_choosing_sequences_and_reading_strided_memory_change_no_byte(name: str) -> None:
    form, x = parse(name), awkward()
    static, rows = static_of(form, x), torch.tensor([1, 0, 0, 1])
    for part, again in zip(form.encode(x, static), form.encode(x[rows], static), strict=True):
        assert torch.equal(part[rows], again)
    strided = x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    assert not strided.is_contiguous()
    parts = form.encode(strided, static)
    for part, again in zip(form.encode(x, static), parts, strict=True):
        assert torch.equal(part, again)
    views = [torch.stack([part, part], dim=-1)[..., 0] for part in parts]
    decoded = (form.decode(each, static, torch.float32, x.shape[-1]) for each in (parts, views))
    assert torch.equal(*decoded)


@pytest.mark.parametrize("name", QUANTIZED)
def test_codes_survive_their_own_values_while_scales_are_kept(name: str) -> None:
    form, x = quantized(name), awkward()
    static = static_of(form, x)
    codes, *scales = form.encode(x, static)
    values = form.decode((codes, *scales), static, torch.float64, x.shape[-1])
    assert torch.equal(form.quantize(values, scales, static), codes)


def test_nvfp4_with_scales_computed_anew_is_another_tensor() -> None:
    form, x = parse("nvfp4"), torch.randn(2, 2, 256, 128)
    static = static_of(form, x)
    values = form.decode(form.encode(x, static), static, torch.float32, 128)
    anew = static_of(form, values)
    again = form.decode(form.encode(values, anew), anew, torch.float32, 128)
    assert static is not None and anew is not None and not torch.equal(anew, static)
    assert (again == values).double().mean() < 0.5


@pytest.mark.parametrize("width", [1, 33, 65, 64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("name", ["full", *QUANTIZED])
def test_head_sizes(name: str, width: int) -> None:
    form, x = parse(name), torch.randn(2, 2, 32, width)
    try:
        form.check(width)
    except InvalidPlan as refused:
        with pytest.raises(InvalidPlan, match="head size"):
            form.encode(x, torch.ones(2, 1))
        assert isinstance(form, Quantized) and width % form.group and refused.hint
        return
    static = static_of(form, x)
    parts = form.encode(x, static)
    assert [(p.dtype, p.shape[-1]) for p in parts] == [(p.dtype, p.width) for p in form.parts(width, x.dtype)]
    if form.bits == 4 and width % 2:
        assert (parts[0][..., -1] >> 4 == (8 if name == "int4_channel" else 0)).all(), "padded with zero"
    values = form.decode(parts, static, torch.float32, width)
    assert values.shape == x.shape and ((values - x).abs() <= form.error_bound(x, static)).all()


@pytest.mark.parametrize("name", QUANTIZED)
def test_zero_scale_gives_exact_zeros(name: str) -> None:
    form, x = parse(name), torch.randn(2, 3, 64, 64)
    static = static_of(form, x)
    parts = form.encode(torch.zeros_like(x), static)
    assert (form.decode(parts, static, torch.float32, 64) == 0).all()
    empty = [torch.zeros_like(part) for part in parts]
    zero = None if static is None else torch.zeros_like(static)
    assert torch.equal(form.decode(empty, zero, torch.float32, 64).abs(), torch.zeros_like(x))
    if static is not None:
        for each in (x, torch.zeros_like(x)):
            parts = form.encode(each, zero)
            assert (form.decode(parts, zero, torch.float32, 64) == 0).all()
            assert (form.decode(parts, static, torch.float32, 64) == 0).all(), "ONNX Runtime takes a scale of 0 for 1"


def shares_a_scale(form: Quantized, head: int, token: int, channel: int) -> tuple[slice | int, ...]:
    """Index of what shares the scale of one element in the second sequence."""
    tokens, group = form.group_tokens, 1 if form.group_tokens > 1 else form.group or 64
    first, begin = token // tokens * tokens, channel // group * group
    return 1, head, slice(first, first + tokens), slice(begin, begin + group)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", QUANTIZED)
def test_what_is_not_finite_is_seen_and_spoils_only_its_own_scale(name: str, value: float) -> None:
    form, x = quantized(name), torch.randn(2, 3, 64, 64)
    static, clean = static_of(form, x), x.clone()
    x[1, 2, 37, 41] = value
    values = form.decode(form.encode(x, static), static, torch.float32, 64)
    expected = form.decode(form.encode(clean, static), static, torch.float32, 64)
    if form.static == "channel":
        limit = {torch.inf: form.element.high, -torch.inf: form.element.low}.get(value, 0.0)
        assert static is not None
        expected[1, 2, 37, 41] = limit * static[2, 41]
    else:
        expected[shares_a_scale(form, 2, 37, 41)] = torch.nan
    assert torch.equal(values.nan_to_num(9e9), expected.nan_to_num(9e9))


def test_a_scale_too_large_for_its_type_is_seen() -> None:
    for name in ("int4_group", "kivi4"):
        form = parse(name)
        for x in (torch.linspace(0, 2e6, 32), torch.full((32,), 7e4), torch.full((32,), -7e4)):
            x = x.expand(1, 1, 32, 32) if name == "int4_group" else x[:, None].expand(1, 1, 32, 32)
            assert form.decode(form.encode(x), None, torch.float32, 32).isnan().all()
    x = torch.full((1, 1, 1, 32), 1e300, dtype=torch.float64)
    for name in ("int8_token", "fp8_token", "mxfp4"):
        assert parse(name).decode(parse(name).encode(x), None, torch.float64, 32).isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["full", *QUANTIZED])
def test_half_precision_is_encoded_as_the_float32_it_is(name: str, dtype: torch.dtype) -> None:
    form, x = parse(name), awkward(dtype=dtype)
    static = static_of(form, x)
    parts, wide = form.encode(x, static), form.encode(x.float(), static)
    if name != "full":
        assert all(map(torch.equal, parts, wide))
    values = form.decode(parts, static, dtype, x.shape[-1])
    assert torch.equal(values, form.decode(wide, static, torch.float32, x.shape[-1]).to(dtype))


@pytest.mark.parametrize("name", ["kivi4", "kivi4:8"])
def test_the_last_group_of_a_buffer_may_be_incomplete(name: str) -> None:
    form, x = parse(name), awkward()
    codes, scale, offset = form.encode(x)
    whole = form.decode((codes, scale, offset), None, torch.float32, x.shape[-1])
    for tokens in (1, 31, 33, 63):
        groups = -(-tokens // form.group_tokens)
        cut = (codes[:, :, :tokens], scale[:, :, :groups], offset[:, :, :groups])
        assert torch.equal(form.decode(cut, None, torch.float32, x.shape[-1]), whole[:, :, :tokens])
    with pytest.raises(InvalidInput, match=f"{form.group_tokens} tokens at a time; 33"):
        form.encode(x[:, :, :33])


@pytest.mark.parametrize("name", ["full", *QUANTIZED])
def test_shapes_are_known_without_values(name: str) -> None:
    form = parse(name)
    sizes: dict[str, tuple[int, int]] = {"channel": (3, 64), "head": (3, 1)}
    with FakeTensorMode():
        x = torch.empty(2, 3, 64, 64, dtype=torch.bfloat16)
        static = torch.ones(sizes[form.static]) if form.static else None
        parts = form.encode(x, static)
        values = form.decode(parts, static, torch.bfloat16, 64)
    assert (values.shape, values.dtype) == (x.shape, x.dtype)
    for part, want in zip(parts, form.parts(64, torch.bfloat16), strict=True):
        assert (part.dtype, tuple(part.shape)) == (want.dtype, (2, 3, 64 // want.tokens, want.width))


# Names, sizes and refusals


BYTES = {  # of a row of 128
    "full": 256,
    "int8_channel": 128,
    "int4_channel": 64,
    "int8_token": 132,
    "fp8_token": 132,
    "int4_group": 80,
    "kivi4": 80,
    "nvfp4": 72,
    "mxfp4": 68,
}


@pytest.mark.parametrize("name", BYTES)
def test_bytes_of_a_token(name: str) -> None:
    form, x = parse(name), torch.randn(1, 1, 64, 128, dtype=torch.bfloat16)
    assert form.token_bytes(128, torch.bfloat16) == BYTES[name]
    assert sum(part.nbytes for part in form.encode(x, static_of(form, x))) == 64 * BYTES[name]


CHOICES = {
    ("int8", "channel"): ("int8_channel", "int8_channel"),
    ("int8", "token"): ("int8_token", "int8_token"),
    ("int4", "channel"): ("int4_channel", "int4_channel"),
    ("int4", "token"): ("int4_group", "int4_group"),
    ("int4", "group"): ("kivi4", "int4_group"),
    ("fp8", "token"): ("fp8_token", "fp8_token"),
    ("nvfp4", "token"): ("nvfp4", "nvfp4"),
    ("mxfp4", "token"): ("mxfp4", "mxfp4"),
    ("full", "channel"): ("full", "full"),
    ("full", "token"): ("full", "full"),
}


@pytest.mark.parametrize(("name", "granularity"), CHOICES)
def test_choices_of_a_plan(name: str, granularity: str) -> None:
    keys, values = choose(name, granularity, "k", 32), choose(name, granularity, "v", 32)
    assert (keys.name, values.name) == CHOICES[name, granularity]
    for form in (keys, values, choose(name, granularity, "k", 16)):
        assert parse(form.name) == form and hash(parse(form.name)) == hash(form)


def test_group_sizes_in_names() -> None:
    assert parse("int4_group:32") == Int4Group() == choose("int4", "token", "k", 32)
    assert parse("int4_group:64") == Int4Group(64) and parse("int4_group:64").name == "int4_group:64"
    assert parse("kivi4:64") == Kivi4(64) and parse("kivi4:64").group_tokens == 64
    assert parse("full") == Full() and parse("int8_token") != parse("fp8_token")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("int8_tokens", "Did you mean 'int8_token'"),
        ("", "Known are full"),
        ("int8_token:32", "no cache format 'int8_token:32'"),
        ("kivi4:x", "no cache format"),
        ("kivi4:0", "at least 2 tokens, not 0"),
        ("int4_group:3", "even group"),
        ("int4_group:0", "even group"),
        ("int4_group:-32", "no cache format"),
    ],
)
def test_unknown_names_are_refused(name: str, says: str) -> None:
    with pytest.raises(InvalidPlan, match=says):
        parse(name)


@pytest.mark.parametrize(
    ("name", "granularity", "group", "says"),
    [
        ("int9", "token", 32, "Did you mean 'int8'"),
        ("fp8", "channel", 32, "It has token"),
        ("int8", "group", 32, "It has channel and token"),
        ("nvfp4", "", 32, "It has token"),
        ("int4", "token", 7, "even group"),
        ("int4", "group", 1, "at least 2 tokens"),
    ],
)
def test_unfit_choices_are_refused(name: str, granularity: str, group: int, says: str) -> None:
    with pytest.raises(InvalidPlan, match=says):
        choose(name, granularity, "k", group)


@pytest.mark.parametrize(
    ("name", "width", "says"),
    [
        ("int4_group", 80, "Use group=16"),
        ("int4_group:64", 96, "Use group=32"),
        ("int4_group", 65, 'Use "int8"'),
        ("nvfp4", 72, "16 channels; a head size of 72"),
        ("mxfp4", 80, "32 channels; a head size of 80"),
    ],
)
def test_unfit_head_sizes_are_refused(name: str, width: int, says: str) -> None:
    with pytest.raises(InvalidPlan, match=says):
        parse(name).check(width)


# Calibration


def test_static_tensors_of_calibrated_ranges() -> None:
    low, high = torch.tensor([[-1.0, 0.0, 2.0], [0.0, 0.0, 0.0]]), torch.tensor([[0.5, 0.0, 3.0], [0.0, 0.0, 7.0]])
    for name, largest in (("int8_channel", 127), ("int4_channel", 7)):
        scale = parse(name).static_from(low, high, 1.25)
        assert scale is not None and scale.dtype == torch.float32
        expected = torch.tensor([[1.25 / largest, 1.0, 3.75 / largest], [1.0, 1.0, 8.75 / largest]])
        torch.testing.assert_close(scale, expected, rtol=1e-6, atol=0)
    g = parse("nvfp4").static_from(torch.cat([low, 0 * low[:1]]), torch.cat([high, 0 * high[:1]]), 1.25)
    assert g is not None and g.dtype == torch.float32
    torch.testing.assert_close(g, torch.tensor([[3 / 448], [7 / 448], [1.0]]), rtol=1e-6, atol=0)
    for name in ("full", "int8_token", "fp8_token", "int4_group", "kivi4", "mxfp4"):
        assert parse(name).static_from(low, high, 1.25) is None


RANGE = torch.ones(2, 4)


@pytest.mark.parametrize(
    ("low", "high", "margin", "says"),
    [
        (-RANGE, RANGE * torch.tensor([1, torch.nan, 1, 1]), 1.1, "NaN or infinity"),
        (-RANGE * torch.inf, RANGE, 1.1, "NaN or infinity"),
        (-RANGE, RANGE[:1], 1.1, r"\[2, 4\] and \[1, 4\]"),
        (-RANGE[0], RANGE[0], 1.1, "two tensors"),
        (RANGE, -RANGE, 1.1, "minimum above"),
        (-RANGE, RANGE, 0.9, "margin"),
        (-RANGE, RANGE, torch.nan, "margin"),
        (-RANGE, RANGE, torch.inf, "margin"),
    ],
)
@pytest.mark.parametrize("name", ["int8_channel", "nvfp4", "int8_token"])
def test_unfit_ranges_are_refused(name: str, low: Tensor, high: Tensor, margin: float, says: str) -> None:
    with pytest.raises(InvalidInput, match=says):
        parse(name).static_from(low, high, margin)


@pytest.mark.parametrize("name", ["int8_channel", "int4_channel", "nvfp4"])
def test_a_missing_static_tensor_is_refused(name: str) -> None:
    form, x = parse(name), torch.randn(1, 2, 4, 32)
    with pytest.raises(InvalidInput, match="static tensor per"):
        form.encode(x)
    parts = form.encode(x, static_of(form, x))
    with pytest.raises(InvalidInput, match="static tensor per"):
        form.decode(parts, None, torch.float32, 32)
