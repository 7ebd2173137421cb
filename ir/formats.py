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
from abc import ABC, abstractmethod
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
from skipstone.ir.errors import InvalidInput, InvalidPlan

Static = Literal["", "channel", "head"]


@dataclass(frozen=True)
class Part:
    """One buffer of a stored tensor: [B, KH, rows, width] of `dtype`, a row for every `tokens` tokens."""

    name: str
    dtype: torch.dtype
    width: int
    tokens: int = 1


class Format(ABC):
    """How one K or V tensor is stored. Formats are values: equal when their canonical names are.

    Attributes:
        name: canonical name, which `parse` reads back.
        bits: of one code. `Full`, which stores the model's own dtype, counts as 16.
        static: the tensor that has to be known beforehand: none, a scale per channel [KH, D], or one number per head
            [KH, 1]; float32.
        group_tokens: how many consecutive tokens share a scale and are therefore encoded together.
    """

    bits: int
    static: Static = ""
    group_tokens: int = 1

    @property
    @abstractmethod
    def name(self) -> str: ...

    @abstractmethod
    def check(self, width: int) -> None:
        """Refuse a head size that the format does not fit.

        Raises:
            InvalidPlan: with the nearest choice that fits.
        """

    @abstractmethod
    def parts(self, width: int, dtype: torch.dtype) -> tuple[Part, ...]:
        """The buffers, codes first, for a head size and the model's dtype."""

    @abstractmethod
    def encode(self, x: Tensor, static: Tensor | None = None) -> tuple[Tensor, ...]:
        """Codes and scales of x, in float32 arithmetic (float64 for float64 x).

        Args:
            x: [B, KH, T, D], any float dtype; T a multiple of `group_tokens`.
            static: float32 [KH, D] or [KH, 1], if `static` asks for one.
        Returns:
            One tensor [B, KH, rows, width] for each of `parts`.
        Raises:
            InvalidPlan: D does not fit.
            InvalidInput: `static` is missing, or T ends within a group.
        """

    @abstractmethod
    def decode(self, parts: Sequence[Tensor], static: Tensor | None, dtype: torch.dtype, width: int) -> Tensor:
        """The values that `parts` stand for: `dtype` [B, KH, T, D] with D = `width`.

        T is the rows of the codes; it need not be a multiple of `group_tokens`.
        """

    @abstractmethod
    def error_bound(self, x: Tensor, static: Tensor | None = None) -> Tensor:
        """Elementwise upper bound of ``|x - decode(encode(x))|`` when decoded to the dtype that encoding computes in.

        Half the distance between neighbouring values, or what lies beyond the last one, and 2^-22 of the magnitude for
        the arithmetic. Shape [B, KH, T, D], float32 or float64; NaN where x cannot be stored.
        """

    def token_bytes(self, width: int, dtype: torch.dtype) -> float:
        """Bytes of one token in one head, scales included; static tensors, which do not grow, are not."""
        return sum(part.width * part.dtype.itemsize / part.tokens for part in self.parts(width, dtype))

    def static_from(self, minimum: Tensor, maximum: Tensor, margin: float) -> Tensor | None:
        """The static tensor for calibrated ranges.

        Args:
            minimum, maximum: of every channel over the calibration data, [KH, D].
            margin: factor of the ranges, >= 1, for values beyond what calibration saw.
        Returns:
            float32 [KH, D] or [KH, 1], or None when the format needs none.
        Raises:
            InvalidInput: ranges that are not finite, not ordered or not [KH, D]; a margin below 1 or not finite.
        """
        if minimum.ndim != 2 or minimum.shape != maximum.shape:
            raise InvalidInput(
                f"Calibrated ranges of {self.name} are two tensors [heads, channels], not {list(minimum.shape)} and "
                f"{list(maximum.shape)}."
            )
        if not (minimum.isfinite().all() and maximum.isfinite().all()):
            raise InvalidInput(
                f"Calibrated ranges of {self.name} hold NaN or infinity.", hint="Look for them in the calibration data."
            )
        if (minimum > maximum).any():
            raise InvalidInput(f"Calibrated ranges of {self.name} have a minimum above its maximum.")
        if not (math.isfinite(margin) and margin >= 1):
            raise InvalidInput(f"The margin of calibrated ranges is a finite number >= 1, not {margin}.")
        return self._calibrated(torch.maximum(minimum.abs(), maximum.abs()).float(), margin)

    def _calibrated(self, amax: Tensor, margin: float) -> Tensor | None:
        return None


@dataclass(frozen=True)
class Full(Format):
    """Not quantized: the model's own dtype."""

    name = "full"
    bits = 16

    def check(self, width: int) -> None:
        pass

    def parts(self, width: int, dtype: torch.dtype) -> tuple[Part, ...]:
        return (Part("codes", dtype, width),)

    def encode(self, x: Tensor, static: Tensor | None = None) -> tuple[Tensor, ...]:
        return (x,)

    def decode(self, parts: Sequence[Tensor], static: Tensor | None, dtype: torch.dtype, width: int) -> Tensor:
        return parts[0].to(dtype)

    def error_bound(self, x: Tensor, static: Tensor | None = None) -> Tensor:
        return torch.zeros_like(x, dtype=_wide(x.dtype))


class Quantized(Format):
    """``x^ = element * scale + offset``.

    Attributes:
        element: type of the codes.
        group: how many channels share a scale; a head size is a multiple of it. 0 when all of a head do, or none.
    """

    element: Element
    group: int = 0

    @abstractmethod
    def scales(self, x: Tensor, static: Tensor | None) -> tuple[Tensor, ...]:
        """The stored scales of x, float32 or float64 [B, KH, T, D], in the order and the dtypes of `parts`."""

    @abstractmethod
    def affine(self, scales: Sequence[Tensor], static: Tensor | None, tokens: int) -> tuple[Tensor, Tensor | None]:
        """Scale and offset in float32, each broadcastable to [B, KH, tokens, D]; None for no offset."""

    def check(self, width: int) -> None:
        if self.group and width % self.group:
            raise InvalidPlan(
                f"{self.name} shares a scale among {self.group} channels; a head size of {width} is no multiple of it.",
                hint=self._instead(width),
            )

    def _instead(self, width: int) -> str:
        return 'Use "int8" or "fp8" with granularity "token", which take every head size.'

    def parts(self, width: int, dtype: torch.dtype) -> tuple[Part, ...]:
        return (Part("codes", self.element.storage, self.element.width(width)), *self._scale_parts(width))

    def _scale_parts(self, width: int) -> tuple[Part, ...]:
        return ()

    def encode(self, x: Tensor, static: Tensor | None = None) -> tuple[Tensor, ...]:
        values, static = self._prepare(x, static)
        scales = self.scales(values, static)
        return self.quantize(values, scales, static), *scales

    def quantize(self, x: Tensor, scales: Sequence[Tensor], static: Tensor | None = None) -> Tensor:
        """Codes of x for scales that are stored already. Arguments and result as in `encode`."""
        x, static = self._prepare(x, static)
        scale, offset = self._affine(scales, static, x.shape[-2], x.dtype)
        return self.element.encode(self._divide(x if offset is None else x - offset, scale))

    def decode(self, parts: Sequence[Tensor], static: Tensor | None, dtype: torch.dtype, width: int) -> Tensor:
        codes, *scales = parts
        self._require(static)
        scale, offset = self._affine(scales, static, codes.shape[-2], _wide(dtype))
        values = self.element.decode(codes, width, scale.dtype) * scale
        return (values if offset is None else values + offset).to(dtype)

    def error_bound(self, x: Tensor, static: Tensor | None = None) -> Tensor:
        x, static = self._prepare(x, static)
        scale, offset = self._affine(self.scales(x, static), static, x.shape[-2], x.dtype)
        offset = torch.zeros_like(scale) if offset is None else offset
        rounding = self.element.spacing(self._divide(x - offset, scale)) * scale / 2
        above = x - (self.element.high * scale + offset)
        below = (self.element.low * scale + offset) - x
        return rounding.maximum(above).maximum(below) + 2**-22 * (x.abs() + offset.abs())

    def _divide(self, x: Tensor, scale: Tensor) -> Tensor:
        return torch.where(scale == 0, 0.0, x / scale)

    def _prepare(self, x: Tensor, static: Tensor | None) -> tuple[Tensor, Tensor | None]:
        self._require(static)
        self.check(x.shape[-1])
        if x.shape[-2] % self.group_tokens:
            raise InvalidInput(
                f"{self.name} is encoded {self.group_tokens} tokens at a time; {x.shape[-2]} is no multiple of it."
            )
        return x.to(_wide(x.dtype)), static

    def _require(self, static: Tensor | None) -> None:
        if self.static and static is None:
            raise InvalidInput(f"{self.name} needs a static tensor per {self.static}, see `static_from`.")

    def _affine(
        self, scales: Sequence[Tensor], static: Tensor | None, tokens: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor | None]:
        scale, offset = self.affine(scales, static, tokens)
        return scale.to(dtype), None if offset is None else offset.to(dtype)


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
    def element(self) -> Element:  # type: ignore[override]
        return INT8_FULL if self.bits == 8 else INT4

    def scales(self, x: Tensor, static: Tensor | None) -> tuple[Tensor, ...]:
        return ()

    def affine(self, scales: Sequence[Tensor], static: Tensor | None, tokens: int) -> tuple[Tensor, None]:
        assert static is not None
        return static[:, None, :].float(), None

    def _divide(self, x: Tensor, scale: Tensor) -> Tensor:
        # ONNX Runtime multiplies with the reciprocal, which rounds differently next to a tie.
        return torch.where(scale == 0, 0.0, x * scale.reciprocal())

    def _calibrated(self, amax: Tensor, margin: float) -> Tensor:
        scale = amax * (margin / self.element.high)
        # A channel that is always 0, or whose scale has no finite reciprocal, gets a scale that stores it as 0.
        return torch.where(scale < torch.finfo(torch.float32).tiny, 1.0, scale)


class TokenScale(Quantized):
    """One float32 scale per token and head, which maps its largest magnitude to the largest value of the element."""

    def scales(self, x: Tensor, static: Tensor | None) -> tuple[Tensor, ...]:
        amax = x.abs().amax(-1, keepdim=True)
        return (_finite_or_nan((amax / self.element.high).to(torch.float32)),)

    def affine(self, scales: Sequence[Tensor], static: Tensor | None, tokens: int) -> tuple[Tensor, None]:
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
        scale = ((maximum - minimum) / UINT4.high).to(torch.float16)
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

    def affine(self, scales: Sequence[Tensor], static: Tensor | None, tokens: int) -> tuple[Tensor, Tensor]:
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

    def affine(self, scales: Sequence[Tensor], static: Tensor | None, tokens: int) -> tuple[Tensor, Tensor]:
        scale, offset = (each.float().repeat_interleave(self.group_tokens, dim=-2)[..., :tokens, :] for each in scales)
        return scale, offset

    def _scale_parts(self, width: int) -> tuple[Part, ...]:
        tokens = self.group_tokens
        return Part("scale", torch.float16, width, tokens), Part("offset", torch.float16, width, tokens)


@dataclass(frozen=True)
class Nvfp4(Quantized):
    """E2M1 in blocks of 16 channels with an E4M3 scale each, and a static float32 scale g per head.

    g is stored and never computed from what is written. Calibrated, it is the largest magnitude / 448 (FlashInfer's
    meaning), which leaves six times the calibrated range before block scales saturate, and needs no further margin.
    """

    name = "nvfp4"
    bits = 4
    static = "head"
    group = 16
    element = E2M1

    def scales(self, x: Tensor, static: Tensor | None) -> tuple[Tensor, ...]:
        assert static is not None
        amax = x.unflatten(-1, (-1, self.group)).abs().amax(-1)
        g = static[:, None, :].to(x.dtype)
        scale = torch.where(g == 0, 0.0, amax / E2M1.high / g).clamp(max=E4M3.high)
        return (E4M3.encode(torch.where(amax.isfinite(), scale, torch.nan)),)

    def affine(self, scales: Sequence[Tensor], static: Tensor | None, tokens: int) -> tuple[Tensor, None]:
        assert static is not None
        blocks = E4M3.decode(scales[0], scales[0].shape[-1], torch.float32) * static[:, None, :].float()
        return blocks.repeat_interleave(self.group, dim=-1), None

    def _scale_parts(self, width: int) -> tuple[Part, ...]:
        return (Part("scale", torch.uint8, width // self.group),)

    def _calibrated(self, amax: Tensor, margin: float) -> Tensor:
        g = amax.amax(-1, keepdim=True) / E4M3.high
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
        codes = torch.where(amax == 0, 0, encode_e8m0(floor_log2(amax) - 2))
        return (torch.where(amax.isfinite(), codes, E8M0_NAN).to(torch.uint8),)

    def affine(self, scales: Sequence[Tensor], static: Tensor | None, tokens: int) -> tuple[Tensor, None]:
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


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _finite_or_nan(x: Tensor) -> Tensor:
    return torch.where(x.isfinite(), x, torch.nan)
