"""Statistics of keys and values over data: collected in one pass, a batch at a time, and mergeable.

Calibration may be split over workers: `ChannelStatistics.merge` is associative and commutative, and the statistics of
a whole are the merged statistics of its parts.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from skipstone.ir.dialect import ATTENTION_OPS
from skipstone.ir.errors import InvalidInput
from skipstone.ir.program import Program, module_path


@dataclass(frozen=True)
class ChannelStatistics:
    """What the vectors of each head look like, channel by channel.

    Attributes:
        minimum, maximum: [KH, D], in the dtype of what was measured.
        total: float64 [KH, D], the sum.
        count: number of vectors.
    """

    minimum: Tensor
    maximum: Tensor
    total: Tensor
    count: int

    @classmethod
    def of(cls, rows: Tensor, valid: Tensor | None = None) -> ChannelStatistics:
        """The statistics of vectors.

        Args:
            rows: [B, KH, T, D].
            valid: bool [B, T], the tokens that count; None for all.
        Raises:
            InvalidInput: there is no vector, or one with NaN or infinity.
        """
        flat = rows.transpose(1, 2)  # [B, T, KH, D]
        flat = flat.flatten(0, 1) if valid is None else flat[valid]
        if len(flat) == 0:
            raise InvalidInput("there is no token to take statistics of.")
        if not bool(torch.isfinite(flat).all()):
            raise InvalidInput("the calibration data leads to NaN or infinite keys or values.")
        low, high = torch.aminmax(flat, dim=0)
        return cls(low, high, flat.sum(dim=0, dtype=torch.float64), len(flat))

    def merge(self, other: ChannelStatistics) -> ChannelStatistics:
        """The statistics of both sets of vectors together.

        Raises:
            InvalidInput: they are of different heads or widths.
        """
        if self.minimum.shape != other.minimum.shape:
            shapes = f"{list(self.minimum.shape)} and {list(other.minimum.shape)}"
            raise InvalidInput(f"statistics of shapes {shapes} do not merge.")
        return ChannelStatistics(
            torch.minimum(self.minimum, other.minimum),
            torch.maximum(self.maximum, other.maximum),
            self.total + other.total,
            self.count + other.count,
        )

    def tensors(self) -> dict[str, Tensor]:
        """``minimum``, ``maximum`` and ``mean``, each float32 [KH, D]."""
        mean = self.total / self.count
        named = {"minimum": self.minimum, "maximum": self.maximum, "mean": mean}
        return {name: tensor.to("cpu", torch.float32).contiguous() for name, tensor in named.items()}


def sites(program: Program) -> dict[fx.Node, str]:
    """The attentions of a program that have (or get) a cache, and the name of each in calibration tensors.

    The name is the module path; the n-th further call of a module (n = 1, 2, ...) has ``#n`` appended.
    """
    seen: Counter[str] = Counter()
    names: dict[fx.Node, str] = {}
    for node in program.nodes(*ATTENTION_OPS):
        if node.kwargs.get("slot", -1) == -1:
            continue
        path = module_path(node)
        names[node] = f"{path}#{seen[path]}" if seen[path] else path
        seen[path] += 1
    return names


def calibrated(
    program: Program, pass_name: str, site: str, which: str, statistic: str, shape: tuple[int, ...]
) -> Tensor:
    """A calibrated tensor of a program.

    Args:
        pass_name: the pass that it was measured for: ``condition_kv`` or ``quantize_kv``.
        site: name of the attention, see `sites`.
        which: ``key`` or ``value``.
        statistic: ``minimum``, ``maximum`` or ``mean``.
        shape: what it must have, [KH, D].
    Raises:
        InvalidInput: it is missing, not finite, or of another shape.
    """
    name = f"{pass_name}/{site}/{which}/{statistic}"
    tensor = program.calibration.get(name)
    if tensor is None:
        raise InvalidInput(
            f"{pass_name}: no calibrated {statistic} of the {which}s at {site}.",
            hint="Pass calibration=, a list of token batches, to optimize().",
        )
    if tuple(tensor.shape) != tuple(shape):
        raise InvalidInput(
            f"calibration tensor {name!r} has shape {list(tensor.shape)}, the model needs {list(shape)}."
        )
    if not bool(torch.isfinite(tensor).all()):
        raise InvalidInput(f"calibration tensor {name!r} holds NaN or infinity.", hint="Calibrate again.")
    return tensor
