"""How far each sublayer turns the residual stream: mergeable statistics of cosines and angles.

Calibration may be split over workers: `merge` is associative and commutative (up to the rounding of float64 sums), and
the statistics of a whole are the merged statistics of its parts. Everything is kept in float64.

The distance of two vectors is taken from the chord ``c`` between their unit vectors: ``1 - cos = c^2 / 2`` and
``arccos(cos) = 2 arcsin(c / 2)``. Both are exactly 0 for equal vectors, where ``1 - x.y`` would leave rounding noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from skipstone.ir.errors import InvalidInput

CHUNK = 256
"""Tokens whose layers are compared with each other at a time; bounds the memory for float64 copies."""


@dataclass(frozen=True)
class Moments:
    """Sums and extremes of observations, each of which is an array of numbers.

    Attributes:
        count: number of observations.
        total, squares: float64 [...], the sums of the observations and of their squares.
        minimum, maximum: float64 [...].
    """

    count: int
    total: Tensor
    squares: Tensor
    minimum: Tensor
    maximum: Tensor

    @classmethod
    def empty(cls, *shape: int) -> Moments:
        """No observation: merging it changes nothing."""
        zeros, infinity = torch.zeros(shape, dtype=torch.float64), torch.full(shape, math.inf, dtype=torch.float64)
        return cls(0, zeros, zeros, infinity, -infinity)

    @classmethod
    def of(cls, observations: Tensor) -> Moments:
        """The moments of float64 [N, ...], N at least 1."""
        low, high = torch.aminmax(observations, dim=0)
        return cls(len(observations), observations.sum(0), observations.square().sum(0), low, high)

    def merge(self, other: Moments) -> Moments:
        """The moments of both sets of observations together.

        Raises:
            InvalidInput: the observations are of different shapes.
        """
        if self.total.shape != other.total.shape:
            shapes = f"{list(self.total.shape)} and {list(other.total.shape)}"
            raise InvalidInput(f"statistics of shapes {shapes} do not merge.", hint="Measure one model.")
        return Moments(
            self.count + other.count,
            self.total + other.total,
            self.squares + other.squares,
            torch.minimum(self.minimum, other.minimum),
            torch.maximum(self.maximum, other.maximum),
        )

    @property
    def mean(self) -> Tensor:
        """float64 [...]; NaN without observations."""
        return self.total / self.count

    @property
    def spread(self) -> Tensor:
        """float64 [...]: the standard deviation; NaN without observations."""
        return (self.squares / self.count - self.mean.square()).clamp(min=0).sqrt()


@dataclass(frozen=True)
class Similarity:
    """What sublayers and layers do to the residual stream, over the tokens of some data.

    Attributes:
        sublayers: [sublayers], ``1 - cos(x, x + f(x))`` of the stream before and after each sublayer. Of sublayers side
            by side each is compared alone, and in a post-norm model the sum is taken before its norm.
        layers: [L], ``1 - cos`` of the stream before and after each layer.
        spans: [L + 1, L + 1], ``arccos(cos) / pi`` of the stream at any two boundaries of layers; 0 is the entry of
            layer 0, L the exit of the last layer.
    """

    sublayers: Moments
    layers: Moments
    spans: Moments

    @classmethod
    def empty(cls, sublayers: int, layers: int) -> Similarity:
        """The statistics of no token."""
        return cls(Moments.empty(sublayers), Moments.empty(layers), Moments.empty(layers + 1, layers + 1))

    @classmethod
    def of(cls, sublayers: Sequence[tuple[Tensor, Tensor]], boundaries: Sequence[Tensor]) -> Similarity:
        """The statistics of tokens.

        Args:
            sublayers: the stream before and after each sublayer, floating [N, hidden], N at least 1.
            boundaries: the stream at the L + 1 boundaries of layers, floating [N, hidden].
        Raises:
            InvalidInput: there is no token, or the stream holds NaN or infinity.
        """
        if len(boundaries[0]) == 0:
            raise InvalidInput("there is no token to take statistics of.")
        if not all(bool(torch.isfinite(x).all()) for x in (*boundaries, *(after for _, after in sublayers))):
            raise InvalidInput("the calibration data leads to a stream with NaN or infinity.")
        turned = torch.stack([_unit(before).sub(_unit(after)).square().sum(-1) / 2 for before, after in sublayers], -1)
        nothing = cls.empty(len(sublayers), len(boundaries) - 1)
        layers, spans = nothing.layers, nothing.spans
        for parts in zip(*(x.split(CHUNK) for x in boundaries), strict=True):
            units = _unit(torch.stack(parts, dim=1))  # [n, L + 1, hidden]
            # The shortcut through inner products would bring back the rounding noise.
            chords = torch.cdist(units, units, compute_mode="donot_use_mm_for_euclid_dist").cpu()
            layers = layers.merge(Moments.of(chords.diagonal(1, -2, -1).square() / 2))
            spans = spans.merge(Moments.of(2 / math.pi * torch.asin((chords / 2).clamp(max=1))))
        return cls(Moments.of(turned.cpu()), layers, spans)

    def merge(self, other: Similarity) -> Similarity:
        """The statistics of both sets of tokens together; raises like `Moments.merge`."""
        return Similarity(
            self.sublayers.merge(other.sublayers), self.layers.merge(other.layers), self.spans.merge(other.spans)
        )

    @property
    def tokens(self) -> int:
        """How many tokens were seen."""
        return self.sublayers.count

    @property
    def cosine(self) -> dict[str, Tensor]:
        """``mean``, ``minimum``, ``maximum`` and ``spread`` of each sublayer's cosine, each float64 [sublayers]."""
        turned = self.sublayers
        return {
            "mean": 1 - turned.mean,
            "minimum": 1 - turned.maximum,
            "maximum": 1 - turned.minimum,
            "spread": turned.spread,
        }

    @property
    def block_influence(self) -> Tensor:
        """float64 [L]: ``1 - E cos`` of each layer (ShortGPT, arXiv 2403.03853)."""
        return self.layers.mean

    @property
    def angular_distance(self) -> Tensor:
        """float64 [L + 1, L + 1]: mean ``arccos(cos) / pi`` of any two boundaries (arXiv 2403.17887)."""
        return self.spans.mean


def _unit(x: Tensor) -> Tensor:
    return normalize(x.double(), dim=-1)
