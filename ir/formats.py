"""Number formats of the key/value cache: how K or V [B, KH, T, D] is stored, as codes and scales in separate buffers.

Every quantized format is ``x^ = element * scale + offset``: an element type (`skipstone.ir.elements`), and a scale per
channel, token, group or block. Codes are always computed with the scale as it is stored, so what encoding and decoding
disagree about is rounding of the element alone, and writing tokens one at a time gives the bytes of writing them
together.

A scale of 0 decodes to exact zeros. What is not finite, or too large for the type of its scale, is never silently wrong
where the format can say so: the tokens that share the scale decode to NaN. Static integer formats cannot say it: there
infinities and everything else out of range saturate, and NaN becomes 0.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from skipstone.ir.elements import (
    E2M1,
    E4M3,
    E8M0_NAN,
    INT4,
    INT8,
    INT8_FULL,
    UINT4,
    Element,
    decode_e8m0,
    encode_e8m0,
    floor_log2,
)
from skipstone.ir.errors import InvalidPlan
from skipstone.ir.quantization import Format as Format
from skipstone.ir.quantization import Full as Full
from skipstone.ir.quantization import Part as Part
from skipstone.ir.quantization import Quantized as Quantized


@dataclass(frozen=True)
class IntegerChannel(Quantized):
    """Symmetric integers with a static scale per head and channel, as GroupQueryAttention of ONNX Runtime stores them.

    The bytes are those that its CPU kernel writes for `PER_CHANNEL` quantization, except where it has no rule of its
    own: NaN becomes 0 here, and a scale of 0, which it takes for 1, gives zeros.
    """

    bits: int
    static = "channel"

    @property
    def name(self) -> str:
        return f"int{self.bits}_channel"

    @property
    def element(self) -> Element:
        return INT8_FULL if self.bits == 8 else INT4

    def scales(self, x: Tensor, static: Tensor | None) -> tuple[Tensor, ...]:
        return ()

    def affine(self, scales: Sequence[Tensor], static: Tensor | None) -> tuple[Tensor, None]:
        return self._required(static), None

    def _divide(self, x: Tensor, scale: Tensor) -> Tensor:
        # ONNX Runtime multiplies with the reciprocal, which rounds differently next to a tie.
        return torch.where(scale == 0, 0.0, x * scale.reciprocal())

    def _calibrated(self, amax: Tensor, margin: float) -> Tensor:
        scale = _quotient(amax * margin, self.element.high)
        # A channel that is always 0, or whose scale has no finite reciprocal, gets a scale that stores it as 0.
        return torch.where(scale < torch.finfo(torch.float32).tiny, 1.0, scale)


class TokenScale(Quantized):
    """One float32 scale per token and head, which maps its largest magnitude to the largest value of the element.

    A token that holds an infinity has the scale infinity and is NaN throughout: its codes are 0 or NaN.
    """

    def scales(self, x: Tensor, static: Tensor | None) -> tuple[Tensor, ...]:
        amax = x.abs().amax(-1, keepdim=True)
        return (_quotient(amax, self.element.high).to(torch.float32),)

    def affine(self, scales: Sequence[Tensor], static: Tensor | None) -> tuple[Tensor, None]:
        return scales[0], None

    def _scale_parts(self, width: int) -> tuple[Part, ...]:
        return (Part("scale", torch.float32, 1),)


@dataclass(frozen=True)
class Int8Token(TokenScale):
    """int8 in [-127, 127] with a scale per token and head."""

    name = "int8_token"
    bits = 8
    element = INT8


@dataclass(frozen=True)
class Fp8Token(TokenScale):
    """float8_e4m3fn with a scale per token and head."""

    name = "fp8_token"
    bits = 8
    element = E4M3


class Asymmetric(Quantized):
    """Unsigned 4-bit integers over the range of their group: ``x^ = u * scale + offset``, both stored in float16.

    The offset is a float, the minimum of the group; an integer zero point would need ranges that include 0.
    """

    bits = 4
    element = UINT4

    @staticmethod
    def _range(minimum: Tensor, maximum: Tensor) -> tuple[Tensor, Tensor]:
        scale = _quotient(maximum - minimum, UINT4.high).to(torch.float16)
        offset = minimum.to(torch.float16)
        return torch.where(scale.isfinite() & offset.isfinite(), scale, torch.nan), offset


@dataclass(frozen=True)
class Int4Group(Asymmetric):
    """Asymmetric 4 bits over `group` neighbouring channels of one token."""

    group: int = 32

    def __post_init__(self) -> None:
        if self.group < 2 or self.group % 2:
            raise InvalidPlan(
                f"int4 packs two channels to a byte and cannot share a scale among {self.group}.",
                hint="Use an even group of at least 2, such as 32.",
            )

    @property
    def name(self) -> str:
        return "int4_group" if self.group == 32 else f"int4_group:{self.group}"

    def scales(self, x: Tensor, static: Tensor | None) -> tuple[Tensor, ...]:
        groups = x.unflatten(-1, (-1, self.group))
        return self._range(groups.amin(-1), groups.amax(-1))

    def affine(self, scales: Sequence[Tensor], static: Tensor | None) -> tuple[Tensor, Tensor]:
        scale, offset = (each.float().repeat_interleave(self.group, dim=-1) for each in scales)
        return scale, offset

    def _scale_parts(self, width: int) -> tuple[Part, ...]:
        groups = width // self.group
        return Part("scale", torch.float16, groups), Part("offset", torch.float16, groups)

    def _instead(self, width: int) -> str:
        nearest = math.gcd(width, self.group)
        return super()._instead(width) if nearest % 2 else f"Use group={nearest}."


@dataclass(frozen=True)
class Kivi4(Asymmetric):
    """Asymmetric 4 bits over `group_tokens` neighbouring tokens of one channel, as KIVI stores keys (arXiv 2402.02750).

    Outliers of keys keep to their channels, so a scale per channel leaves the other channels their precision.
    """

    group_tokens: int = 32

    def __post_init__(self) -> None:
        if self.group_tokens < 2:
            raise InvalidPlan(f"kivi4 needs a group of at least 2 tokens, not {self.group_tokens}.", hint="Use 32.")

    @property
    def name(self) -> str:
        return "kivi4" if self.group_tokens == 32 else f"kivi4:{self.group_tokens}"

    def scales(self, x: Tensor, static: Tensor | None) -> tuple[Tensor, ...]:
        groups = x.unflatten(-2, (-1, self.group_tokens))
        return self._range(groups.amin(-2), groups.amax(-2))

    def affine(self, scales: Sequence[Tensor], static: Tensor | None) -> tuple[Tensor, Tensor]:
        scale, offset = (each.float().repeat_interleave(self.group_tokens, dim=-2) for each in scales)
        return scale, offset

    def _scale_parts(self, width: int) -> tuple[Part, ...]:
        tokens = self.group_tokens
        return Part("scale", torch.float16, width, tokens), Part("offset", torch.float16, width, tokens)


@dataclass(frozen=True)
class Nvfp4(Quantized):
    """E2M1 in blocks of 16 channels with an E4M3 scale each, and a static float32 scale g per head.

    g is stored and never computed from what is written. Calibrated, it is the largest magnitude / 448 (FlashInfer's
    meaning): block scales saturate at six times the calibrated range, so that the margin has nothing to add.
    """

    name = "nvfp4"
    bits = 4
    static = "head"
    group = 16
    element = E2M1

    def scales(self, x: Tensor, static: Tensor | None) -> tuple[Tensor, ...]:
        amax = x.unflatten(-1, (-1, self.group)).abs().amax(-1)
        g = self._required(static).to(x.dtype)
        scale = torch.where(g == 0, 0.0, _quotient(amax, E2M1.high) / g)  # the code saturates at 448
        return (E4M3.encode(torch.where(amax.isfinite(), scale, torch.nan)),)

    def affine(self, scales: Sequence[Tensor], static: Tensor | None) -> tuple[Tensor, None]:
        blocks = E4M3.decode(scales[0], scales[0].shape[-1], torch.float32) * self._required(static)
        return blocks.repeat_interleave(self.group, dim=-1), None

    def _scale_parts(self, width: int) -> tuple[Part, ...]:
        return (Part("scale", torch.uint8, width // self.group),)

    def _calibrated(self, amax: Tensor, margin: float) -> Tensor:
        g = _quotient(amax.amax(-1, keepdim=True), E4M3.high)
        return torch.where(g == 0, 1.0, g)


@dataclass(frozen=True)
class Mxfp4(Quantized):
    """E2M1 in blocks of 32 channels with a power of two each, after the OCP Microscaling specification.

    The specified exponent, floor(log2 amax) - 2, clips block maxima of 6 to 8 times the scale, by up to a quarter.
    """

    name = "mxfp4"
    bits = 4
    group = 32
    element = E2M1

    def scales(self, x: Tensor, static: Tensor | None) -> tuple[Tensor, ...]:
        amax = x.unflatten(-1, (-1, self.group)).abs().amax(-1)
        codes = encode_e8m0(floor_log2(amax) - 2)
        return (torch.where(amax.isfinite(), codes, E8M0_NAN),)

    def affine(self, scales: Sequence[Tensor], static: Tensor | None) -> tuple[Tensor, None]:
        return decode_e8m0(scales[0]).repeat_interleave(self.group, dim=-1), None

    def _scale_parts(self, width: int) -> tuple[Part, ...]:
        return (Part("scale", torch.uint8, width // self.group),)


def parse(name: str) -> Format:
    """The format of a canonical name.

    Raises:
        InvalidPlan: there is none of this name.
    """
    formats = {each.name: each for each in _FORMATS.values()}
    if name in formats:
        return formats[name]
    base, _, size = name.partition(":")
    if base in ("int4_group", "kivi4") and size.isdecimal():
        return Int4Group(int(size)) if base == "int4_group" else Kivi4(int(size))
    raise InvalidPlan(f"There is no cache format {name!r}.", hint=_nearest(base, formats))


def choose(name: str, granularity: str, which: Literal["k", "v"], group: int) -> Format:
    """The format that the fields of a plan ask for.

    Args:
        name: "full", "int8", "int4", "fp8", "nvfp4" or "mxfp4".
        granularity: "channel", "token" or "group"; "full" takes any.
        which: whether it stores keys or values; "int4" by "group" groups tokens for keys and channels for values.
        group: how many channels or tokens share a scale in the int4 formats that have groups.
    Raises:
        InvalidPlan: there is no such format, with the nearest that there is.
    """
    names = sorted({each for each, _ in _FORMATS})
    if name not in names:
        raise InvalidPlan(f"There is no cache format {name!r}.", hint=_nearest(name, names))
    if name == "full":
        return Full()
    known = sorted(each for format_name, each in _FORMATS if format_name == name)
    if granularity not in known:
        raise InvalidPlan(
            f"The cache format {name!r} has no granularity {granularity!r}.", hint=f"It has {' and '.join(known)}."
        )
    if name == "int4" and granularity != "channel":
        return Kivi4(group) if granularity == "group" and which == "k" else Int4Group(group)
    return _FORMATS[name, granularity]


# By name and granularity in a plan.
_FORMATS: dict[tuple[str, str], Format] = {
    ("full", ""): Full(),
    ("int8", "channel"): IntegerChannel(8),
    ("int8", "token"): Int8Token(),
    ("int4", "channel"): IntegerChannel(4),
    ("int4", "token"): Int4Group(),
    ("int4", "group"): Kivi4(),
    ("fp8", "token"): Fp8Token(),
    ("nvfp4", "token"): Nvfp4(),
    ("mxfp4", "token"): Mxfp4(),
}


def _nearest(name: str, known: Sequence[str] | dict[str, Format]) -> str:
    nearest = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"Did you mean {nearest[0]!r}?" if nearest else f"Known are {', '.join(known)}."


def _quotient(x: Tensor, divisor: float) -> Tensor:
    # By a tensor on the device: for a number, CUDA multiplies with the reciprocal, and scales would differ by an ulp.
    return x / torch.full((), divisor, dtype=x.dtype, device=x.device)
