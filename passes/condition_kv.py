"""Rewrite weights so that keys and values lose less in a number format of fewer bits."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from skipstone.ir.errors import InvalidPlan, Unsupported
from skipstone.ir.key_bias import LARGE_BIAS, expected_sizes, large_key_biases
from skipstone.ir.program import Program, provenance
from skipstone.ir.projections import Path, Projections
from skipstone.ir.rotary import rotated_constant
from skipstone.ir.statistics import calibrated, sites
from skipstone.passes.base import Pass, Remark

aten = torch.ops.aten

OUTLIER = 2.0
"""Channels that become larger than this many times the median channel of their head are outliers."""


class Rewrite(StrEnum):
    """What can be done to keys and values; each is exact in real arithmetic. Listed in the order of application."""

    FOLD_V_SCALE = "fold_v_scale"  # bring outlier channels of the values down; calibrated
    FOLD_V_ROTATION = "fold_v_rotation"  # spread each value over its channels by a Hadamard matrix
    SMOOTH_K = "smooth_k"  # bring outlier channels of the keys down; calibrated
    SPLIT_K_BIAS = "split_k_bias"  # leave a large key bias out of the keys; the attention adds it
    CENTRE_K = "centre_k"  # subtract the mean of the keys; calibrated


@dataclass(frozen=True)
class ConditionKV(Pass):
    """Fold scales, rotations and shifts of keys and values into the weights around each attention.

    Outlier channels are brought down by powers of two, which round nothing, and the other channels stay as they are.
    Scales of keys are shared by the channels that a rotary embedding mixes, and by all channels that one weight makes.
    What is not exact at an attention is refused there, with the reason; the other rewrites still apply.

    Attributes:
        rewrites: which to apply, names of `Rewrite`.
        large_bias: key biases above this are split off; see `skipstone.ir.key_bias.large_key_biases`.
    """

    name: ClassVar[str] = "condition_kv"

    rewrites: tuple[str, ...] = (
        Rewrite.FOLD_V_SCALE, Rewrite.FOLD_V_ROTATION, Rewrite.SMOOTH_K, Rewrite.SPLIT_K_BIAS,
    )  # fmt: skip
    large_bias: float = LARGE_BIAS

    def validate(self) -> None:
        """Refuse settings that fit no model.

        Raises:
            InvalidPlan: an unknown rewrite, or a threshold that is no positive number.
        """
        names = [str(each) for each in Rewrite]
        for each in self.rewrites:
            if each not in names:
                (close,) = difflib.get_close_matches(each, names, n=1, cutoff=0.0)
                raise InvalidPlan(f"condition_kv: there is no rewrite {each!r}.", hint=f"The nearest is {close!r}.")
        if not self.large_bias > 0:
            raise InvalidPlan(f"condition_kv: large_bias is {self.large_bias}, expected a number above 0.")

    def check(self, program: Program) -> None:
        """See `Pass.check`."""
        self.validate()
        needed = {
            Rewrite.FOLD_V_SCALE: ("value", "minimum", "maximum"),
            Rewrite.SMOOTH_K: ("key", "minimum", "maximum"),
            Rewrite.CENTRE_K: ("key", "mean"),
        }
        for node, site in sites(program).items():
            for rewrite, (which, *statistics) in needed.items():
                for statistic in statistics if rewrite in self.rewrites else ():
                    _calibrated(program, node, site, which, statistic)

    def rewrite(self, program: Program) -> list[Remark]:
        """See `Pass.rewrite`."""
        projections = Projections(program)
        large = large_key_biases(program, self.large_bias) if Rewrite.SPLIT_K_BIAS in self.rewrites else {}
        steps: dict[Rewrite, Callable[[_Site], str]] = {
            Rewrite.FOLD_V_SCALE: _fold_v_scale,
            Rewrite.FOLD_V_ROTATION: _fold_v_rotation,
            Rewrite.SMOOTH_K: _smooth_k,
            Rewrite.SPLIT_K_BIAS: _split_k_bias,
            Rewrite.CENTRE_K: _centre_k,
        }
        remarks = []
        for node, name in sites(program).items():
            site = _Site(projections, node, name, large.get(name), Rewrite.CENTRE_K in self.rewrites)
            for rewrite, step in steps.items():
                if rewrite not in self.rewrites:
                    continue
                try:
                    done = step(site)
                except _Nothing as reason:
                    remarks.append(self.missed(name, f"{rewrite}: {reason}"))
                except Unsupported as reason:
                    remarks.append(self.refused(name, f"{rewrite}: {reason.feature}"))
                else:
                    remarks.append(self.applied(name, f"{rewrite}: {done}"))
        return remarks or [self.missed("model", "no attention that has a cache")]


# ---------------------------------------------------------------------------------------------------------- rewrites


class _Nothing(Exception):
    """There is nothing to do at a site."""


class _Site:
    """One attention: its operands and weights, and new values for them."""

    def __init__(
        self, projections: Projections, attention: fx.Node, name: str, large_bias: float | None, centre: bool
    ) -> None:
        self.projections, self.program = projections, projections.program
        self.attention, self.name = attention, name
        self.large_bias = large_bias  # how large its key bias is, if that is to be split off
        self.centre = centre  # whether its keys are to be centred
        self.key_scale: Tensor | None = None  # [KH, D], what the keys have been divided by since they were measured
        self._paths: dict[fx.Node, Path] = {}

    def paths(self, *which: str) -> list[Path]:
        """The paths to some of "query", "key" and "value", which must be this attention's own.

        Raises:
            Unsupported: there is none, or something else reads what it carries, or its weights.
        """
        operands: dict[str, Any] = dict(zip(("query", "key", "value"), self.attention.args[:3], strict=True))
        wanted = [self._path(operands[each]) for each in which]
        others = []
        for operand in operands.values():
            try:
                others.append(self._path(operand))
            except Unsupported:
                continue  # what it shares with the wanted ones is then another reader of theirs
        self.projections.refuse_other_readers(wanted, others, self.attention)
        for path in wanted:
            self.projections.refuse_shared(path.source)
        return wanted

    def _path(self, operand: fx.Node) -> Path:
        if operand not in self._paths:
            self._paths[operand] = self.projections.before(operand)
        return self._paths[operand]

    def calibrated(self, which: str, statistic: str) -> Tensor:
        """A calibrated tensor [KH, D], in float64."""
        tensor = _calibrated(self.program, self.attention, self.name, which, statistic)
        return tensor.to(self.program.source.device, torch.float64)

    def magnitudes(self, which: str) -> Tensor:
        """The largest calibrated magnitude of each channel as it will be stored, float64 [KH, D]."""
        low, high = (self.calibrated(which, each) for each in ("minimum", "maximum"))
        if which == "key" and self.centre and not _reason_against_centring(self.attention):
            mean = self.calibrated(which, "mean")
            low, high = low - mean, high - mean
        return torch.maximum(-low, high)


class _Overlay:
    """New values of tensors, in float64, which take effect together or not at all."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.values: dict[str, Tensor] = {}

    def change(self, parameter: fx.Node, function: Callable[[Tensor], Tensor]) -> None:
        name = str(parameter.target)
        if name not in self.values:
            self.values[name] = self.program.tensor(name).detach().to(torch.float64, copy=True)
        self.values[name] = function(self.values[name])

    def commit(self) -> None:
        """Replace the program's tensors.

        Raises:
            Unsupported: a value does not fit the tensor's type; nothing is replaced.
        """
        cast = {name: value.to(self.program.tensor(name).dtype) for name, value in self.values.items()}
        for name, tensor in cast.items():
            if not bool(torch.isfinite(tensor).all()):
                raise Unsupported(f"values of {name} beyond the range of {tensor.dtype}")
        for name, tensor in cast.items():
            owner, _, leaf = name.rpartition(".")
            module = self.program.module.get_submodule(owner)
            delattr(module, leaf)
            module.register_buffer(leaf, tensor)


def _fold_v_scale(site: _Site) -> str:
    """Outlier channels of the values over powers of two, the output projection times these."""
    scale = _outlier_scale(site.magnitudes("value"))
    _transform_values(site, torch.diag_embed(1 / scale), torch.diag_embed(scale))
    return f"channels over {_range(scale)}"


def _fold_v_rotation(site: _Site) -> str:
    """Values times a Hadamard matrix; the output projection times its transpose."""
    heads, width = _heads_and_width(site.attention, 2)
    block = width & -width
    if block == 1:
        raise _Nothing(f"values of odd width {width}")
    matrix = torch.block_diag(*[hadamard(block)] * (width // block)).to(site.program.source.device)
    _transform_values(site, matrix.expand(heads, -1, -1), matrix.T.expand(heads, -1, -1))
    return f"blocks of {block} channels"


def _transform_values(site: _Site, matrices: Tensor, inverses: Tensor) -> None:
    """Multiply the values of head h by ``matrices[h]``, and take it back behind the attention."""
    (path,) = site.paths("value")
    output, columns = site.projections.after(site.attention)
    site.projections.refuse_shared(output)
    rows = path.origins[0]
    if path.source.axis is None:
        raise Unsupported("a norm between the values and their projection")
    share = site.projections.run(path, torch.ones(path.source.count, dtype=torch.float64, device=rows.device), {})
    if path.factors or len(rows.unique()) < rows.numel() or bool((share != share[0, 0, 0]).any()):
        raise Unsupported("values that are not the results of their projection, each once")
    overlay = _Overlay(site.program)
    overlay.change(path.source.weight, lambda weight: _multiplied(weight, path.source.axis, rows, matrices))
    if path.source.bias is not None:
        overlay.change(path.source.bias, lambda bias: _multiplied(bias, 0, rows, matrices))
    group = len(columns) // len(rows)
    back = inverses.transpose(1, 2).repeat_interleave(group, dim=0)
    overlay.change(output.weight, lambda weight: _multiplied(weight, 1 - output.axis, columns, back))  # type: ignore[operator]
    overlay.commit()


def _smooth_k(site: _Site) -> str:
    """Outlier channels of the keys over powers of two, the queries times these."""
    if len(site.attention.args) > 6 and site.attention.args[6] is not None:
        raise Unsupported("keys whose bias has been split off already")
    query, key = site.paths("query", "key")
    if site.large_bias is not None and key.source.axis is not None:
        # The keys that will be stored are those without the bias, which calibration has not seen.
        sizes = expected_sizes(site.projections, key.source)
        magnitudes = torch.stack([torch.where(rows < 0, 0.0, sizes[rows]) for rows in key.origins]).amax(dim=0)
    else:
        magnitudes = site.magnitudes("key")
    tied, scale = tied_channels(key, query), _outlier_scale(magnitudes)
    largest = torch.zeros(tied.numel(), dtype=scale.dtype, device=tied.device)
    scale = largest.scatter_reduce_(0, tied.flatten(), scale.flatten(), "amax")[tied]
    overlay = _Overlay(site.program)
    group = query.origins[0].shape[0] // key.origins[0].shape[0]
    _scale_elements(overlay, key, 1 / scale)
    _scale_elements(overlay, query, scale.repeat_interleave(group, dim=0))
    overlay.commit()
    site.key_scale = scale
    return f"channels over {_range(scale)}"


def tied_channels(key: Path, query: Path) -> Tensor:
    """Which channels of the keys must have one scale: those made of a common weight, of the keys or of the queries.

    A rotary embedding mixes two channels, so it ties them; one norm weight for all heads ties the heads.

    Returns:
        int64 [KH, D], equal numbers for tied channels.
    """
    heads, width = key.origins[0].shape
    group = query.origins[0].shape[0] // heads
    labels = torch.arange(heads * width, device=key.origins[0].device).reshape(heads, width)
    while True:
        before = labels
        for path, repeat in ((key, 1), (query, group)):
            wide = labels.repeat_interleave(repeat, dim=0)
            smallest = torch.full([path.source.count], labels.numel(), device=labels.device)
            for rows in path.origins:
                smallest.scatter_reduce_(0, rows[rows >= 0], wide[rows >= 0], "amin")
            for rows in path.origins:
                wide = torch.where(rows >= 0, torch.minimum(wide, smallest[rows]), wide)
            labels = wide.unflatten(0, (heads, repeat)).amin(dim=1)
        if torch.equal(labels, before):
            return labels


def _split_k_bias(site: _Site) -> str:
    """Take a large bias out of the keys; the attention adds what it contributes to the logits."""
    if site.large_bias is None:
        raise _Nothing("no large bias")
    (key,) = site.paths("key")
    if key.source.axis is None or key.source.bias is None:
        raise Unsupported("a norm between the key projection's bias and the attention")
    rows = key.elements()
    bias = site.program.tensor(str(key.source.bias.target)).detach().double()
    constant = torch.zeros_like(bias).index_copy(0, rows, bias[rows])
    turned, frequencies = rotated_constant(site.projections, key, constant)
    overlay = _Overlay(site.program)
    overlay.change(key.source.bias, lambda bias: bias.index_fill(0, rows, 0.0))
    overlay.commit()
    node = site.attention
    dtype = torch.promote_types(node.args[1].meta["val"].dtype, torch.float32)  # type: ignore[union-attr]
    with site.program.graph.inserting_before(node):
        constants = [
            site.program.add_tensor(f"{name}_{node.kwargs['slot']}", tensor.to(dtype))
            for name, tensor in (("key_bias", turned), ("key_frequencies", frequencies))
        ]
    node.args = (*(*node.args, None, None, None)[:6], *constants)
    node.kwargs = {**node.kwargs, "first_position": site.program.source.first_position}
    return f"a bias {site.large_bias:.1f} times as long as a channel is wide"


def _centre_k(site: _Site) -> str:
    """Subtract a constant from all keys of a head: it adds the same to all logits of a query, which softmax ignores."""
    node = site.attention
    key: Any = node.args[1]
    if reason := _reason_against_centring(node):
        raise Unsupported(reason)
    if len(node.args) > 6 and node.args[6] is not None:
        raise _Nothing("the keys were measured with the bias that is split off")
    name = f"key_mean_{node.kwargs['slot']}"
    if hasattr(site.program.module, name):
        raise _Nothing("the keys have been centred already")
    mean = site.calibrated("key", "mean")
    if site.key_scale is not None:
        mean = mean / site.key_scale
    with provenance(site.program, ConditionKV.name, like=node), site.program.graph.inserting_before(node):
        constant = site.program.add_tensor(name, mean.unsqueeze(1).to(key.meta["val"].dtype))
        node.update_arg(1, site.program.call(aten.sub.Tensor, key, constant))
    return "mean subtracted"


def _reason_against_centring(attention: fx.Node) -> str:
    """Why a constant on all keys of an attention would change its result, "" if it would not."""
    if attention.kwargs.get("softcap"):
        return "logits that are capped: a constant changes them"
    if len(attention.args) > 5 and attention.args[5] is not None:
        return "sink logits, which a constant on all others changes"
    key: Any = attention.args[1]
    return f"{key.name}, which another attention reads too" if len(key.users) > 1 else ""


# ------------------------------------------------------------------------------------------------------------ algebra


def hadamard(size: int) -> Tensor:
    """The orthogonal Hadamard matrix in Sylvester's order, float64 [size, size]; `size` is a power of two."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / size**0.5


def _multiplied(weight: Tensor, axis: int | None, elements: Tensor, matrices: Tensor) -> Tensor:
    """`weight` with its slices ``elements[h]`` along `axis` replaced by ``matrices[h]`` times them."""
    assert axis is not None
    rows = weight.movedim(axis, 0)
    slices = rows[elements]  # [H, D, ...]
    rows[elements] = (matrices @ slices.reshape(*elements.shape, -1)).reshape(slices.shape)
    return weight


def _scale_elements(overlay: _Overlay, path: Path, channels: Tensor) -> None:
    """Multiply the elements that channels come from by the number of the channel, float64 [H, D]."""
    source = path.source
    factor = torch.ones(source.shape, dtype=torch.float64, device=channels.device).flatten()
    for rows in path.origins:
        factor[rows[rows >= 0]] = channels[rows >= 0]
    if source.axis is None:
        factor = factor.reshape(source.shape)
        overlay.change(source.weight, lambda weight: (weight + source.offset) * factor - source.offset)
    else:
        overlay.change(source.weight, lambda weight: weight * (factor if source.axis == 1 else factor.unsqueeze(1)))
    if source.bias is not None:
        overlay.change(source.bias, lambda bias: bias * factor)


def _outlier_scale(magnitudes: Tensor) -> Tensor:
    """The smallest powers of two over which no channel is an outlier, 1 for most: float64 [KH, D].

    Args:
        magnitudes: the largest of each channel, [KH, D].
    """
    median = torch.where(magnitudes > 0, magnitudes, torch.nan).nanmedian(dim=1, keepdim=True).values
    relative = (magnitudes / median).nan_to_num(nan=0.0)  # a head that is zero has no median
    scale = 2 ** (relative / OUTLIER).log2().ceil().clamp(min=0)
    if bool((scale == 1).all()):
        raise _Nothing(f"no channel stands out: the largest is {float(relative.max()):.1f} times the median")
    return scale


def _range(scale: Tensor) -> str:
    return f"{float(scale.min()):.3g} to {float(scale.max()):.3g}"


def _heads_and_width(attention: fx.Node, operand: int) -> tuple[int, int]:
    shape = attention.args[operand].meta["val"].shape  # type: ignore[union-attr]
    return int(shape[1]), int(shape[3])


def _calibrated(program: Program, attention: fx.Node, site: str, which: str, statistic: str) -> Tensor:
    shape = _heads_and_width(attention, 1 if which == "key" else 2)
    return calibrated(program, ConditionKV.name, site, which, statistic, shape)
