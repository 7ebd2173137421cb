"""Element types of quantized tensors: small integers, small floats and powers of two, as codes in bytes.

Codes are plain integers and coding is plain arithmetic, exact to definition from float32 and float64 alike: many
operators lack the 8-bit float types. Rounding is to nearest, ties to even; what lies beyond the largest value
saturates.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

E8M0_NAN = 255


class Element(ABC):
    """A type of at most 8 bits for numbers x [..., D]. Types of 4 bits are packed, two to a byte.

    Attributes:
        low, high: smallest and largest value.
        storage: dtype of the stored codes.
        packed: whether a byte holds two codes, see `pack`.
    """

    low: float
    high: float
    storage: torch.dtype
    packed: bool

    def width(self, elements: int) -> int:
        """How many numbers of dtype `storage` hold a row of `elements` codes."""
        return -(-elements // 2) if self.packed else elements

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor:
        """Codes of the nearest values.

        Args:
            x: float32 or float64 [..., D].
        Returns:
            `storage` [..., width(D)].
        """

    @abstractmethod
    def decode(self, codes: Tensor, elements: int, dtype: torch.dtype) -> Tensor:
        """Values of codes.

        Args:
            codes: `storage` [..., width(D)].
            elements: D.
        Returns:
            `dtype` [..., D].
        """

    @abstractmethod
    def spacing(self, x: Tensor) -> Tensor:
        """Distance between neighbouring values around x: rounding errs by at most half of it. Shape and dtype of x."""


@dataclass(frozen=True)
class Integer(Element):
    """The integers from `low` to `high`, stored as value + `bias`. NaN, which they cannot hold, becomes 0."""

    low: int
    high: int
    bias: int = 0
    storage: torch.dtype = torch.int8
    packed: bool = False

    def encode(self, x: Tensor) -> Tensor:
        codes = (torch.round(x).clamp(self.low, self.high).nan_to_num(0.0) + self.bias).to(self.storage)
        return pack(codes, fill=self.bias) if self.packed else codes

    def decode(self, codes: Tensor, elements: int, dtype: torch.dtype) -> Tensor:
        values = (unpack(codes, elements) if self.packed else codes).to(dtype)
        return values - self.bias if self.bias else values

    def spacing(self, x: Tensor) -> Tensor:
        return torch.ones_like(x)


@dataclass(frozen=True)
class Float(Element):
    """A float of sign, exponent and mantissa, with subnormal numbers and without infinity.

    Attributes:
        mantissa_bits: stored bits of the mantissa.
        lowest_exponent: of the smallest normal number, as a power of two.
        sign: code of -0; codes below it are the magnitudes, in rising order.
        nan: code of NaN. A type that has none takes 0 for it.
    """

    mantissa_bits: int
    lowest_exponent: int
    low: float
    high: float
    sign: int
    nan: int = 0
    storage: torch.dtype = torch.uint8
    packed: bool = False

    def encode(self, x: Tensor) -> Tensor:
        magnitude = x.abs().clamp(max=self.high)
        exponent = self._exponent(magnitude)
        mantissa = torch.round(magnitude / self._step(exponent))
        # One that rounds up to the next power of two carries into the exponent by itself.
        codes = mantissa + ((exponent - self.lowest_exponent) << self.mantissa_bits)
        codes = torch.where(torch.signbit(x), codes + self.sign, codes)
        codes = torch.where(torch.isnan(x), self.nan, codes).to(self.storage)
        return pack(codes) if self.packed else codes

    def decode(self, codes: Tensor, elements: int, dtype: torch.dtype) -> Tensor:
        if self.packed:
            codes = unpack(codes, elements)
        return self._values(codes.device).to(dtype)[codes.to(torch.int32)]

    def spacing(self, x: Tensor) -> Tensor:
        return self._step(self._exponent(x.abs().clamp(max=self.high))).to(x.dtype)

    def _exponent(self, magnitude: Tensor) -> Tensor:
        return floor_log2(magnitude).clamp(min=self.lowest_exponent)

    def _step(self, exponent: Tensor) -> Tensor:
        return power_of_two(exponent - self.mantissa_bits)

    def _values(self, device: torch.device) -> Tensor:
        """The value of every code, float32 [2 * sign]."""
        magnitudes = torch.arange(self.sign, dtype=torch.int32, device=device)
        exponent, mantissa = magnitudes >> self.mantissa_bits, magnitudes & ((1 << self.mantissa_bits) - 1)
        mantissa = torch.where(exponent == 0, mantissa, mantissa + (1 << self.mantissa_bits))
        values = mantissa * self._step(exponent.clamp(min=1) - 1 + self.lowest_exponent)
        if self.nan:
            values = torch.where(magnitudes == self.nan, torch.nan, values)
        return torch.cat((values, -values))


INT8 = Integer(-127, 127)
INT8_FULL = Integer(-128, 127)
INT4 = Integer(-8, 7, bias=8, storage=torch.uint8, packed=True)
UINT4 = Integer(0, 15, storage=torch.uint8, packed=True)
E2M1 = Float(mantissa_bits=1, lowest_exponent=0, low=-6.0, high=6.0, sign=8, packed=True)
E4M3 = Float(mantissa_bits=3, lowest_exponent=-6, low=-448.0, high=448.0, sign=128, nan=127)


def pack(codes: Tensor, fill: int = 0) -> Tensor:
    """Two 4-bit codes to a byte: element 2d in the low half of byte d, element 2d + 1 in the high half.

    ONNX, ONNX Runtime and vLLM pack alike, so bytes move between them as they are.

    Args:
        codes: uint8 [..., D], values 0..15.
        fill: code that stands beside the last one when D is odd.
    Returns:
        uint8 [..., ceil(D / 2)].
    """
    if codes.shape[-1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1), value=fill)
    return codes[..., 0::2] | codes[..., 1::2] << 4


def unpack(packed: Tensor, elements: int) -> Tensor:
    """The inverse of `pack`: uint8 [..., ceil(D / 2)] to uint8 [..., D] with D = `elements`."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)[..., :elements]


def floor_log2(x: Tensor) -> Tensor:
    """Largest integer e with 2^e <= x, int32, for finite x >= 0; for 0 an integer below that of every other number."""
    return torch.where(x == 0, torch.iinfo(torch.int16).min, torch.frexp(x).exponent - 1)


def power_of_two(exponent: Tensor) -> Tensor:
    """Exactly 2^exponent in float32, for integers -126..127: the bit pattern itself, as `exp2` may be off by an ulp."""
    return ((exponent.to(torch.int32) + 127) << 23).view(torch.float32)


def encode_e8m0(exponent: Tensor) -> Tensor:
    """Codes of the scales 2^exponent: uint8, biased by 127. Too small saturates; too large for the type is NaN."""
    return (exponent + 127).clamp(0, E8M0_NAN).to(torch.uint8)


def decode_e8m0(codes: Tensor) -> Tensor:
    """Values of E8M0 codes in float32: 2^(code - 127), and NaN for 255."""
    return codes.view(torch.float8_e8m0fnu).to(torch.float32)
