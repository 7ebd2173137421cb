"""A second implementation of the cache formats, from their definitions, in NumPy with the float types of ml_dtypes."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

E2M1_VALUES = ml_dtypes.float4_e2m1fn
E4M3_VALUES = ml_dtypes.float8_e4m3fn
Array = np.ndarray[Any, np.dtype[Any]]


def pack(codes: Array, fill: int = 0) -> Array:
    out = np.zeros((*codes.shape[:-1], (codes.shape[-1] + 1) // 2), np.uint8)
    for d in range(out.shape[-1] * 2):
        out[..., d // 2] += (codes[..., d] if d < codes.shape[-1] else fill).astype(np.uint8) * 16 ** (d % 2)
    return out


def nearest(x: Array, numpy_type: Any) -> Array:
    """Codes of the values of a float type that are nearest to x, by search among all; the even code at a tie."""
    negative = -np.zeros(1, numpy_type)
    values = np.arange(negative.view(np.uint8)[0], dtype=np.uint8).view(numpy_type).astype(np.float64)
    values = values[~np.isnan(values)]
    ties, magnitude = (values[1:] + values[:-1]) / 2, np.abs(x).astype(np.float64)
    below, upto = np.searchsorted(ties, magnitude, "left"), np.searchsorted(ties, magnitude, "right")
    return np.where(below % 2 == 0, below, upto).astype(np.uint8) | np.signbit(x) * negative.view(np.uint8)


def encode(name: str, x: Array, static: Array | None) -> list[Array]:
    """Codes and scales by the definitions, in the dtype of x and with the float types of ml_dtypes."""
    base, _, size = name.partition(":")
    group, real = int(size or 32), x.dtype

    def ratio(y: Array, step: Array) -> Array:
        return np.divide(y, step, out=np.zeros_like(y), where=np.broadcast_to(step != 0, y.shape))

    def spread(scale: Array, axis: int, count: int) -> Array:
        return np.repeat(scale, count, axis).astype(real)

    blocks = x.reshape(*x.shape[:-1], -1, {"nvfp4": 16, "int4_group": group}.get(base, 32))
    match base:
        case "int8_channel":
            assert static is not None
            return [np.clip(np.rint(x * (1 / static[:, None].astype(real))), -128, 127).astype(np.int8)]
        case "int4_channel":
            assert static is not None
            return [pack(np.clip(np.rint(x * (1 / static[:, None].astype(real))), -8, 7) + 8)]
        case "int8_token":
            scale = (np.abs(x).max(-1, keepdims=True) / real.type(127)).astype(np.float32)
            return [np.clip(np.rint(ratio(x, scale.astype(real))), -127, 127).astype(np.int8), scale]
        case "fp8_token":
            scale = (np.abs(x).max(-1, keepdims=True) / real.type(448)).astype(np.float32)
            return [nearest(ratio(x, scale.astype(real)), E4M3_VALUES), scale]
        case "int4_group":
            low, high = blocks.min(-1), blocks.max(-1)
            scale, offset = ((high - low) / real.type(15)).astype(np.float16), low.astype(np.float16)
            codes = np.rint(ratio(x - spread(offset, -1, group), spread(scale, -1, group)))
            return [pack(np.clip(codes, 0, 15)), scale, offset]
        case "kivi4":
            tokens = x.reshape(*x.shape[:2], -1, group, x.shape[-1])
            low, high = tokens.min(-2), tokens.max(-2)
            scale, offset = ((high - low) / real.type(15)).astype(np.float16), low.astype(np.float16)
            codes = np.rint(ratio(x - spread(offset, -2, group), spread(scale, -2, group)))
            return [pack(np.clip(codes, 0, 15)), scale, offset]
        case "nvfp4":
            assert static is not None
            g = static[:, None].astype(real)
            scale = nearest(np.abs(blocks).max(-1) / real.type(6) / g, E4M3_VALUES)
            step = scale.view(E4M3_VALUES).astype(np.float32) * static[:, None]
            return [pack(nearest(ratio(x, spread(step, -1, 16)), E2M1_VALUES)), scale]
        case "mxfp4":
            exponent = np.frexp(np.abs(blocks).max(-1))[1] - 1 - 2
            scale = np.ldexp(np.float64(1), np.maximum(exponent, -127)).astype(ml_dtypes.float8_e8m0fnu)
            scale[np.abs(blocks).max(-1) == 0] = 2.0**-127
            step = scale.astype(np.float32)
            return [pack(nearest(ratio(x, spread(step, -1, 32)), E2M1_VALUES)), scale.view(np.uint8)]
    raise AssertionError(name)


def decode(name: str, parts: list[Array], static: Array | None, width: int) -> Array:
    """float64 values of stored parts."""
    base, _, size = name.partition(":")
    group = int(size or 32)
    codes = parts[0]
    if base not in ("int8_channel", "int8_token", "fp8_token"):
        codes = np.stack([codes % 16, codes // 16], -1).reshape(*codes.shape[:-1], -1)[..., :width]
    scales = [part.astype(np.float64) for part in parts[1:]]
    known = None if static is None else static[:, None].astype(np.float64)
    match base:
        case "int8_channel":
            return codes * known
        case "int4_channel":
            return (codes.astype(np.float64) - 8) * known
        case "int8_token":
            return codes * scales[0]
        case "fp8_token":
            return codes.view(E4M3_VALUES).astype(np.float64) * scales[0]
        case "int4_group":
            return codes * np.repeat(scales[0], group, -1) + np.repeat(scales[1], group, -1)
        case "kivi4":
            return codes * np.repeat(scales[0], group, -2) + np.repeat(scales[1], group, -2)
        case "nvfp4":
            step = parts[1].view(E4M3_VALUES).astype(np.float64) * known
            return codes.view(E2M1_VALUES).astype(np.float64) * np.repeat(step, 16, -1)
        case "mxfp4":
            step = parts[1].view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
            return codes.view(E2M1_VALUES).astype(np.float64) * np.repeat(step, 32, -1)
    raise AssertionError(name)
