"""Encoding of numbers inside Triton kernels, bit for bit as `skipstone.ir.elements` does it.

Everything divides and rounds as IEEE says, in float32; conversions of the hardware exist for some types on some devices
only.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import triton
import triton.language as tl

# 1.5 * 2^23: float32 numbers next to it are one apart, so that adding it rounds to integers, ties to even.
ROUNDER = tl.constexpr(12582912.0)


@triton.jit
def round_even(x):
    """The nearest integer, ties to even, for float32 |x| < 2^22."""
    return (x + ROUNDER) - ROUNDER


@triton.jit
def is_finite(x):
    """Whether float32 numbers are neither infinite nor NaN."""
    return tl.abs(x) < float("inf")


@triton.jit
def divide(x, scale):
    """float32 x / scale, correctly rounded, and 0 where the scale is 0."""
    return tl.where(scale == 0.0, 0.0, tl.div_rn(x, tl.where(scale == 0.0, 1.0, scale)))


@triton.jit
def encode_integer(x, low: tl.constexpr, high: tl.constexpr):
    """int32 codes of the nearest integers from `low` to `high`; NaN becomes 0."""
    x = tl.where(x == x, x, 0.0)
    return round_even(tl.minimum(tl.maximum(x, low), high)).to(tl.int32)


@triton.jit
def _exponent(magnitude):
    """floor(log2) of positive normal float32 numbers, int32."""
    return (magnitude.to(tl.int32, bitcast=True) >> 23) - 127


@triton.jit
def _power_of_two(exponent):
    """2^exponent in float32 for int32 exponents from -126 to 127."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _encode_float(
    x, high: tl.constexpr, mantissa: tl.constexpr, lowest: tl.constexpr, sign: tl.constexpr, nan: tl.constexpr
):
    """int32 codes of a small float: mantissa bits, lowest exponent, codes of the sign and of NaN."""
    magnitude = tl.abs(x)
    magnitude = tl.where(magnitude > high, high, magnitude)
    exponent = tl.maximum(_exponent(magnitude), lowest)
    # A mantissa that rounds up to the next power of two carries into the exponent by itself.
    steps = round_even(magnitude * _power_of_two(mantissa - exponent)).to(tl.int32)
    code = steps + ((exponent - lowest) << mantissa)
    code = tl.where(x.to(tl.int32, bitcast=True) < 0, code + sign, code)
    return tl.where(x == x, code, nan)


@triton.jit
def encode_e4m3(x):
    """int32 E4M3 codes of float32 numbers, saturating at 448; NaN is 127."""
    return _encode_float(x, 448.0, 3, -6, 128, 127)


@triton.jit
def encode_e2m1(x):
    """int32 E2M1 codes of float32 numbers, saturating at 6; NaN, which the type lacks, becomes 0."""
    return _encode_float(x, 6.0, 1, 0, 8, 0)


@triton.jit
def encode_mx_exponent(amax):
    """int32 E8M0 code of the scale 2^(floor(log2 amax) - 2) of an MXFP4 block; 0 for an amax of 0."""
    return tl.maximum(_exponent(amax) - 2 + 127, 0)
