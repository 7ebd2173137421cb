"""What a number format of the key/value cache is, and the arithmetic that quantized formats share.

A format says how K or V [B, KH, T, D] is stored: as codes and scales, in buffers of their own. The formats themselves
are in `skipstone.ir.formats`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from skipstone.ir.elements import Element
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
    def name(self) -> str:
        """See the class."""

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
            InvalidPlan: D does not fit, see `check`.
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

    group: int = 0

    @property
    @abstractmethod
    def element(self) -> Element:
        """See the class."""

    @abstractmethod
    def scales(self, x: Tensor, static: Tensor | None) -> tuple[Tensor, ...]:
        """The stored scales of x, float32 or float64 [B, KH, T, D], in the order and the dtypes of `parts`."""

    @abstractmethod
    def affine(self, scales: Sequence[Tensor], static: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Scale and offset in float32, broadcastable to [B, KH, T, D], from the stored scales. None for no offset."""

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
        x = self._checked(x)
        scales = self.scales(x, static)
        return self.quantize(x, scales, static), *scales

    def quantize(self, x: Tensor, scales: Sequence[Tensor], static: Tensor | None = None) -> Tensor:
        """The codes of x for scales that are stored already. Arguments and errors as in `encode`."""
        x = self._checked(x)
        scale, offset = self._affine(scales, static, x.shape[-2], x.dtype)
        return self.element.encode(self._divide(x if offset is None else x - offset, scale))

    def decode(self, parts: Sequence[Tensor], static: Tensor | None, dtype: torch.dtype, width: int) -> Tensor:
        codes, *scales = parts
        scale, offset = self._affine(scales, static, codes.shape[-2], _wide(dtype))
        values = self.element.decode(codes, width, scale.dtype) * scale
        return (values if offset is None else values + offset).to(dtype)

    def error_bound(self, x: Tensor, static: Tensor | None = None) -> Tensor:
        x = self._checked(x)
        scale, offset = self._affine(self.scales(x, static), static, x.shape[-2], x.dtype)
        offset = torch.zeros_like(scale) if offset is None else offset
        rounding = self.element.spacing(self._divide(x - offset, scale)) * scale / 2
        above = x - (self.element.high * scale + offset)
        below = (self.element.low * scale + offset) - x
        arithmetic = 2**-22 * (x.abs() + offset.abs() + torch.finfo(torch.float32).tiny)
        return rounding.maximum(above).maximum(below) + arithmetic

    def _checked(self, x: Tensor) -> Tensor:
        """x in the dtype to compute in."""
        self.check(x.shape[-1])
        if x.shape[-2] % self.group_tokens:
            raise InvalidInput(
                f"{self.name} is encoded {self.group_tokens} tokens at a time; {x.shape[-2]} is no multiple of it."
            )
        return x.to(_wide(x.dtype))

    def _required(self, static: Tensor | None) -> Tensor:
        """`static` in a shape that broadcasts to [B, KH, T, D]."""
        if static is None:
            raise InvalidInput(f"{self.name} needs a static tensor per {self.static}.", hint="See `static_from`.")
        return static[:, None, :]

    def _affine(
        self, scales: Sequence[Tensor], static: Tensor | None, tokens: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor | None]:
        # The last group of tokens in a buffer may be incomplete.
        scale, offset = self.affine(scales, static)
        scale = scale[..., :tokens, :].to(dtype)
        return scale, None if offset is None else offset[..., :tokens, :].to(dtype)

    def _divide(self, x: Tensor, scale: Tensor) -> Tensor:
        return torch.where(scale == 0, 0.0, x / scale)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
