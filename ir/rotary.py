"""What a rotary embedding does to a constant: the form in which an attention can add a key bias by itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from skipstone.ir.errors import Unsupported
from skipstone.ir.linear import LinearParts, operator_name
from skipstone.ir.projections import Path, Projections

aten = torch.ops.aten

_FAR = 4099
"""Largest position at which the result is compared with the graph."""


@dataclass(frozen=True)
class _Table:
    """A factor that is a cosine or a sine of the position.

    Attributes:
        function: `aten.cos` or `aten.sin`.
        amplitude: what it is multiplied by, in the factor's shape.
        slope: amplitude times the angle from one position to the next.
    """

    function: Any
    amplitude: Tensor
    slope: Tensor


def rotated_constant(projections: Projections, path: Path, constant: Tensor) -> tuple[Tensor, Tensor]:
    """What a constant becomes on a path with a rotary embedding: ``b cos(p w) + b' sin(p w)`` at position p.

    Frequencies and factors of cosine and sine are read from the graph, and the result is compared with it.

    Args:
        path: to the keys of an attention, from their projection.
        constant: float64 [n], for each of the projection's results.
    Returns:
        float64 [2, KH, D], b and b'; float64 [D], the frequencies w, 0 where nothing turns.
    Raises:
        Unsupported: the path is no rotary embedding of the positions that the program is given.
    """
    ones = torch.ones_like(constant)
    resting, reach = projections.run(path, constant, {})[0], projections.run(path, ones, {})[0]
    parts = {aten.cos.default: torch.zeros_like(resting), aten.sin.default: torch.zeros_like(resting)}
    frequencies = torch.zeros_like(resting)
    for factor in path.factors:
        table = _table(projections.parts, factor)
        parts[table.function] += projections.run(path, constant, {factor: table.amplitude})[0] - resting
        amplitude = projections.run(path, ones, {factor: table.amplitude})[0] - reach
        slope = projections.run(path, ones, {factor: table.slope})[0] - reach
        frequencies = torch.where(amplitude != 0, slope / amplitude, frequencies)
    turned = torch.stack([resting + parts[aten.cos.default], parts[aten.sin.default]])
    _compare(projections, path, constant, turned, frequencies[0])
    return turned, frequencies[0]


def _table(parts: LinearParts, factor: fx.Node) -> _Table:
    if factor not in parts.turning:
        raise Unsupported(f"{factor.name}, a factor of the keys that does not follow from the positions")
    waves = list(
        parts.walk(factor, parts.turning, lambda node: node.target in (aten.cos.default, aten.sin.default)).ends
    )
    if len({wave.target for wave in waves}) != 1:
        raise Unsupported(f"{operator_name(factor)} ({factor.name}), which is neither a cosine nor a sine")
    angles = {wave: wave.args[0] for wave in waves}
    for angle in angles.values():
        parts.walk(angle, parts.turning, lambda node: node is parts.positions)  # type: ignore[arg-type]
    assert parts.positions is not None
    first = {parts.positions: parts.filled(parts.positions, 1.0)}
    amplitude = parts.evaluate(factor, {wave: parts.filled(wave, 1.0) for wave in waves})
    slope = parts.evaluate(factor, {wave: parts.evaluate(angle, first) for wave, angle in angles.items()})  # type: ignore[arg-type]
    return _Table(waves[0].target, amplitude, slope)


def _compare(projections: Projections, path: Path, constant: Tensor, turned: Tensor, frequencies: Tensor) -> None:
    """Return if the graph gives the same at a few positions, near and far."""
    given, positions = {}, None
    if projections.parts.positions is not None:
        shape = projections.parts.shape(projections.parts.positions)
        positions = (torch.arange(torch.Size(shape).numel(), device=constant.device) ** 5 % _FAR).reshape(shape)
        given[projections.parts.positions] = positions
    actual = projections.value(path, constant, given)
    where = torch.zeros(len(actual), device=constant.device) if positions is None else positions.flatten()
    angles = where.double()[:, None, None] * frequencies
    expected = turned[0] * angles.cos() + turned[1] * angles.sin()
    if not torch.allclose(actual, expected, rtol=0.0, atol=1e-9 * float(constant.abs().max())):
        raise Unsupported("keys whose rotary embedding was not understood")
