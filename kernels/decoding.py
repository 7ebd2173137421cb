"""Decoding of codes inside Triton kernels, to float16: it holds the values of all element types of at most 8 bits.

Codes become the bits of float16 numbers by integer arithmetic, as hardware converts one number at a time, and only some
types. Triton keeps each element in a register of its own for that, which would make decoding, not memory, the limit of
attention; so there is PTX for four bytes at a time. From words of 16 bits the results come out of it as pairs of
neighbouring words, which is how operands of tensor cores stand in registers. Which way is taken follows from `arch`,
the compute capability times ten, 0 in Triton's interpreter: there, and for float32 models, it is Triton's own
arithmetic.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import triton
import triton.language as tl

# Two words of 16 bits hold four bytes. A byte of each in the low half of a 16-bit number whose high half is that of
# 1024.0: the numbers 1024 + byte.
INT8 = tl.constexpr("""{
.reg .b32 biased, offset;
xor.b32 biased, $2, 0x80808080;
mov.b32 offset, 0x64806480;
prmt.b32 $0, biased, 0x64646464, 0x4240;
prmt.b32 $1, biased, 0x64646464, 0x4341;
sub.rn.f16x2 $0, $0, offset;
sub.rn.f16x2 $1, $1, offset;
}""")

# The same with nibbles, of which a word holds four. The second and fourth stay where they are, worth 16 times as much:
# (1024 + 16 n) / 16 - 72 is n - 8.
INT4 = tl.constexpr("""{
.reg .b32 low, high, offset, sixteenth, shifted;
mov.b32 low, $4;
shr.b32 high, $4, 8;
mov.b32 offset, 0x64086408;
mov.b32 sixteenth, 0x2C002C00;
mov.b32 shifted, 0xD480D480;
lop3.b32 $0, low, 0x000F000F, 0x64006400, 0xEA;
lop3.b32 $1, low, 0x00F000F0, 0x64006400, 0xEA;
lop3.b32 $2, high, 0x000F000F, 0x64006400, 0xEA;
lop3.b32 $3, high, 0x00F000F0, 0x64006400, 0xEA;
sub.rn.f16x2 $0, $0, offset;
fma.rn.f16x2 $1, $1, sixteenth, shifted;
sub.rn.f16x2 $2, $2, offset;
fma.rn.f16x2 $3, $3, sixteenth, shifted;
}""")

UINT4 = tl.constexpr("""{
.reg .b32 first, second, offset, sixteenth, shifted;
prmt.b32 first, $4, 0, 0x4140;
prmt.b32 second, $4, 0, 0x4342;
mov.b32 offset, 0x64006400;
mov.b32 sixteenth, 0x2C002C00;
mov.b32 shifted, 0xD400D400;
lop3.b32 $0, first, 0x000F000F, 0x64006400, 0xEA;
lop3.b32 $1, second, 0x000F000F, 0x64006400, 0xEA;
lop3.b32 $2, first, 0x00F000F0, 0x64006400, 0xEA;
lop3.b32 $3, second, 0x00F000F0, 0x64006400, 0xEA;
sub.rn.f16x2 $0, $0, offset;
sub.rn.f16x2 $1, $1, offset;
fma.rn.f16x2 $2, $2, sixteenth, shifted;
fma.rn.f16x2 $3, $3, sixteenth, shifted;
}""")

# Sign to bit 7, exponent and mantissa to bits 3 to 1 of a byte: that is the high half of a 16-bit number.
E2M1 = tl.constexpr("""{
.reg .b32 low, high, sign;
shl.b32 low, $4, 1;
and.b32 low, low, 0x0E0E0E0E;
shl.b32 sign, $4, 4;
lop3.b32 low, sign, 0x80808080, low, 0xEA;
shr.b32 high, $4, 3;
and.b32 high, high, 0x0E0E0E0E;
lop3.b32 high, $4, 0x80808080, high, 0xEA;
prmt.b32 $0, low, 0, 0x1404;
prmt.b32 $1, low, 0, 0x3424;
prmt.b32 $2, high, 0, 0x1404;
prmt.b32 $3, high, 0, 0x3424;
}""")

# A byte is the high half of a 16-bit number; its exponent and mantissa go one place down, which makes it a float16
# number with 2^-8 of its value. Adding to them carries out of 127 alone, and so marks it as NaN.
E4M3_BITS = tl.constexpr("""{
.reg .b32 first, second, magnitude, carry, scale;
shl.b32 first, $2, 8;
mov.b32 second, $2;
mov.b32 scale, 0x5C005C00;
and.b32 magnitude, first, 0x7F007F00;
add.u32 carry, magnitude, 0x01000100;
shr.b32 carry, carry, 1;
shr.b32 magnitude, magnitude, 1;
lop3.b32 magnitude, carry, 0x40004000, magnitude, 0xEA;
lop3.b32 $0, first, 0x80008000, magnitude, 0xEA;
and.b32 magnitude, second, 0x7F007F00;
add.u32 carry, magnitude, 0x01000100;
shr.b32 carry, carry, 1;
shr.b32 magnitude, magnitude, 1;
lop3.b32 magnitude, carry, 0x40004000, magnitude, 0xEA;
lop3.b32 $1, second, 0x80008000, magnitude, 0xEA;
mul.rn.f16x2 $0, $0, scale;
mul.rn.f16x2 $1, $1, scale;
}""")
E4M3_BYTES = tl.constexpr("""{
.reg .b16 first, second;
mov.b32 {first, second}, $2;
cvt.rn.f16x2.e4m3x2 $0, first;
cvt.rn.f16x2.e4m3x2 $1, second;
}""")
E4M3 = tl.constexpr("""{
.reg .b32 sorted;
.reg .b16 first, second;
prmt.b32 sorted, $2, 0, 0x3120;
mov.b32 {first, second}, sorted;
cvt.rn.f16x2.e4m3x2 $0, first;
cvt.rn.f16x2.e4m3x2 $1, second;
}""")


@triton.jit
def _four_pairs(code: tl.constexpr, x):
    """Two float16 numbers from each byte, by PTX for four of them."""
    # Were it pure, Triton would move the exchange of the elements between threads before it, and read bytes one by one.
    return tl.inline_asm_elementwise(code, "=r,=r,=r,=r,r", [x], (tl.float16, tl.float16), is_pure=False, pack=4)


@triton.jit
def opaque(x, arch: tl.constexpr):
    """int32 x, of which Triton does not see that it was a byte: it would take the tile for one of bytes."""
    return x if arch == 0 else tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], tl.int32, False, 1)


@triton.jit
def decode_int8(words, arch: tl.constexpr):
    """float16 values of the int8 codes in the low and in the high halves of int16 words."""
    if arch == 0:
        low, high = ((words << 8) >> 8).to(tl.float16), (words >> 8).to(tl.float16)
    else:
        low, high = tl.inline_asm_elementwise(INT8, "=r,=r,r", [words], (tl.float16, tl.float16), is_pure=True, pack=2)
    return low, high


@triton.jit
def decode_e4m3_pairs(words, arch: tl.constexpr):
    """float16 values of the E4M3 codes in the low and in the high halves of int16 words."""
    if arch == 0:
        low, high = decode_e4m3(words & 255, 0), decode_e4m3((words >> 8) & 255, 0)
    else:
        code: tl.constexpr = E4M3 if arch >= 89 else E4M3_BITS
        low, high = tl.inline_asm_elementwise(code, "=r,=r,r", [words], (tl.float16, tl.float16), is_pure=True, pack=2)
    return low, high


@triton.jit
def decode_int4(words, arch: tl.constexpr):
    """float16 values -8..7 of the four codes in int16 words, from the lowest."""
    if arch == 0:
        first, second = (words & 15).to(tl.float16) - 8.0, ((words >> 4) & 15).to(tl.float16) - 8.0
        third, fourth = ((words >> 8) & 15).to(tl.float16) - 8.0, ((words >> 12) & 15).to(tl.float16) - 8.0
    else:
        first, second, third, fourth = tl.inline_asm_elementwise(
            INT4, "=r,=r,=r,=r,r", [words], (tl.float16, tl.float16, tl.float16, tl.float16), is_pure=True, pack=2
        )
    return first, second, third, fourth


@triton.jit
def decode_uint4(pairs, arch: tl.constexpr):
    """float16 values 0..15 of the low and of the high halves of uint8 bytes."""
    if arch == 0:
        low, high = (pairs & 15).to(tl.float16), (pairs >> 4).to(tl.float16)
    else:
        low, high = _four_pairs(UINT4, pairs)
    return low, high


@triton.jit
def decode_e2m1(pairs, arch: tl.constexpr):
    """float16 values of the E2M1 codes in the low and in the high halves of uint8 bytes, times 2^-14.

    That is what their bits stand for in their places in float16, with an exponent of larger bias.
    """
    if arch == 0:
        bits = pairs.to(tl.int16)
        low = (((bits & 7) << 9) | ((bits & 8) << 12)).to(tl.float16, bitcast=True)
        high = (((bits & 0x70) << 5) | ((bits & 0x80) << 8)).to(tl.float16, bitcast=True)
    else:
        low, high = _four_pairs(E2M1, pairs)
    return low, high


@triton.jit
def decode_e4m3(code, arch: tl.constexpr):
    """float16 values of uint8 E4M3 codes; 127 and 255 are NaN."""
    if arch < 89:
        code = opaque(code.to(tl.int32), arch).to(tl.int16)
        # As bits of float16, whose exponent is biased by 8 more, a code means 2^-8 of its value, also when subnormal.
        value = (((code & 0x7F) << 7) | ((code & 0x80) << 8)).to(tl.float16, bitcast=True) * 256.0
        value = tl.where((code & 0x7F) == 0x7F, float("nan"), value)
    else:
        value = tl.inline_asm_elementwise(E4M3_BYTES, "=r,=r,r", [code], tl.float16, is_pure=False, pack=4)
    return value


@triton.jit
def decode_e8m0(code):
    """float32 2^(code - 127) of integer codes; 255 is NaN."""
    code = code.to(tl.int32)
    # Code 0 is a subnormal number: half of what the bit pattern of code 1 stands for.
    bits = tl.where(code == 0, 1 << 22, code << 23)
    return tl.where(code == 255, float("nan"), bits.to(tl.float32, bitcast=True))
