"""Keep keys and values in a number format of fewer bits."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, fx

from skipstone.ir.cost import token_bytes
from skipstone.ir.dialect import ATTENTION, CACHED_ATTENTION, QUANTIZED_CACHED_ATTENTION, WINDOWED_ATTENTION
from skipstone.ir.errors import InternalError, InvalidPlan, Unsupported
from skipstone.ir.formats import Format, Full, choose
from skipstone.ir.key_bias import large_key_biases
from skipstone.ir.program import ATTENTIONS, Port, Program, Role, module_path, provenance
from skipstone.ir.quantized import cache_format
from skipstone.ir.statistics import calibrated, sites
from skipstone.passes.base import Pass, Remark
from skipstone.passes.condition_kv import ConditionKV, Rewrite
from skipstone.passes.kv_cache import count_input, drop_slot, shared_slot
from skipstone.passes.split_heads import HEADS, SplitHeads

MARGIN = 1.1
"""Static scales leave room for values this many times larger than the calibrated ones: beyond, they saturate."""

ERROR = "relative_output_error"  # of a remark's numbers

Granularity = Literal["channel", "token", "group"]
Pair = tuple[Format, Format]  # of the keys and of the values


def _key_gains(form: Format) -> set[Rewrite]:
    """Rewrites that make keys lose less in a format: one with a range per channel and group of tokens needs none.

    In all others, keys without their mean have smaller ranges; a scale per channel adapts to outliers by itself.
    """
    if isinstance(form, Full) or form.group_tokens > 1:
        return set()
    return {Rewrite.CENTRE_K} if form.static == "channel" else {Rewrite.SMOOTH_K, Rewrite.CENTRE_K}


def _value_gains(form: Format) -> set[Rewrite]:
    """The same for values. A rotation is not among them: once there are no outliers, it gains little or loses."""
    return set() if isinstance(form, Full) or form.static == "channel" else {Rewrite.FOLD_V_SCALE}


GAINS = (_key_gains, _value_gains)


@dataclass(frozen=True)
class FormatChoice:
    """Formats of some layers, or of some of their heads, that differ from the rest.

    Attributes:
        layers: layers of the model.
        heads: key-value heads of those layers; None for all.
        k, v, granularity: as in `QuantizeKV`; None for what stands there.
    """

    layers: tuple[int, ...]
    heads: tuple[int, ...] | None = None
    k: str | None = None
    v: str | None = None
    granularity: Granularity | None = None


@dataclass(frozen=True)
class QuantizeKV(Pass):
    """Turn each `cached_attention` into its quantized form.

    Attributes:
        k, v: names of the formats of keys and values: "int8", "int4", "fp8", "nvfp4", "mxfp4", or "full".
        granularity: what shares a scale. "channel": each channel of a head, over all tokens, calibrated beforehand.
            "token": each token on its own (int4: groups of its channels), which needs no calibration. "group" (int4):
            each channel over groups of tokens for keys, groups of channels for values, as KIVI does (arXiv 2402.02750).
        group: channels or tokens in such a group.
        residual: the newest tokens, counted from each query, that are read in full precision.
        sinks: the first tokens of a sequence that are read in full precision (attention sinks, arXiv 2309.17453).
        condition: rewrite the weights first so that keys and values quantize better, see
            `skipstone.passes.condition_kv`.
        layers: layers to quantize; None for all.
        choices: exceptions for some layers or heads; a later one overrides an earlier one.
    """

    name: ClassVar[str] = "quantize_kv"

    k: str = "int8"
    v: str = "int8"
    granularity: Granularity = "channel"
    group: int = 32
    residual: int = 0
    sinks: int = 0
    condition: bool = True
    layers: tuple[int, ...] | None = None
    choices: tuple[FormatChoice, ...] = ()

    def validate(self) -> frozenset[Format]:
        """The formats that it may use.

        Raises:
            InvalidPlan: a setting that fits no model: an unknown format or granularity, or a number below 0.
        """
        for field in ("residual", "sinks"):
            if getattr(self, field) < 0:
                raise InvalidPlan(f"quantize_kv: {field} is {getattr(self, field)}, expected 0 or more.")
        return frozenset(form for pair in self._pairs() for form in pair)

    def _pairs(self) -> list[Pair]:
        return [self._pair(), *(self._pair(choice) for choice in self.choices)]

    def _pair(self, choice: FormatChoice | None = None) -> Pair:
        named = {"k": self.k, "v": self.v, "granularity": self.granularity}
        if choice is not None:
            named |= {name: value for name in named if (value := getattr(choice, name)) is not None}
        keys, values = (choose(named[which], named["granularity"], which, self.group) for which in ("k", "v"))
        return keys, values

    def conditioning(self, calibrated: bool) -> ConditionKV:
        """The pass that rewrites keys and values for these formats.

        Args:
            calibrated: whether the program has the statistics that some of the rewrites need.
        """
        rewrites = {Rewrite.SPLIT_K_BIAS}
        if calibrated:
            for pair in self._pairs():
                rewrites |= {rewrite for form, gains in zip(pair, GAINS, strict=True) for rewrite in gains(form)}
        return ConditionKV(tuple(rewrite for rewrite in Rewrite if rewrite in rewrites))

    def split(self, program: Program) -> SplitHeads | None:
        """The pass that has to run before there are cache slots, where heads of one attention differ in their formats.

        Raises:
            InvalidPlan: a head that an attention does not have.
        """
        groups = []
        for node, site in sites(program).items():
            count = int(node.args[1].meta["val"].shape[1])  # type: ignore[union-attr]
            members: dict[Pair, list[int]] = {}
            for choice in self.choices:
                for head in choice.heads or ():
                    if node.meta.get("layer") in choice.layers and head >= count:
                        problem = f"quantize_kv: there is no key-value head {head} at {site}."
                        raise InvalidPlan(problem, hint=f"The last one is {count - 1}.")
            for head in range(count):
                members.setdefault(self._formats(node.meta.get("layer"), head), []).append(head)
            if len(members) > 1:
                groups.append((node.kwargs["slot"], tuple(map(tuple, members.values()))))
        return SplitHeads(tuple(groups)) if groups else None  # type: ignore[arg-type]

    def _formats(self, layer: int | None, head: int) -> Pair:
        pair = self._pair() if self.layers is None or layer in self.layers else (Full(), Full())
        for choice in self.choices:
            if layer in choice.layers and (choice.heads is None or head in choice.heads):
                pair = self._pair(choice)
        return pair

    def formats(self, node: fx.Node) -> Pair:
        """The formats of an attention, all of whose heads have the same."""
        return self._formats(node.meta.get("layer"), node.meta.get(HEADS, (0,))[0])

    def _reason_against(self, program: Program) -> dict[fx.Node, str]:
        """The attentions that stay in full precision although they are chosen, and why."""
        large = large_key_biases(program) if self.condition else {}
        reasons = {}
        for node, site in sites(program).items():
            reason = _refusal(node)
            if site in large and not reason:
                reason = f"a key bias {large[site]:.0f} times as large as the keys cannot be left out of them"
            if reason:
                reasons[node] = reason
        return reasons

    def check(self, program: Program) -> None:
        """See `Pass.check`."""
        self.validate()
        if not program.slots():
            hint = "Remove it from the plan, or use cache=True."
            raise Unsupported("quantize_kv for a program without a KV cache", hint=hint)
        if (writer := shared_slot(program)) is not None:
            feature = "quantize_kv for a cache slot that several iterations write"
            raise Unsupported(feature, where=module_path(writer), hint="Take kv='iterate' in layer_parallel.")
        self._check_layers({node.meta.get("layer") for node in sites(program)})
        refused = self._reason_against(program)
        for node, site in sites(program).items():
            if node not in refused:
                for which, form, width in self._halves(node):
                    try:
                        form.check(width)
                    except InvalidPlan as error:
                        raise InvalidPlan(
                            f"quantize_kv: {which}s at {site}: {error.problem}", hint=error.hint
                        ) from error
                    static_tensor(program, node, site, which, form)

    def _check_layers(self, known: set[Any]) -> None:
        numbers = sorted(layer for layer in known if layer is not None)
        for layer in (*(self.layers or ()), *(layer for choice in self.choices for layer in choice.layers)):
            if layer not in known:
                hint = f"The nearest is {min(numbers, key=lambda n: abs(n - layer))}." if numbers else ""
                raise InvalidPlan(f"quantize_kv: layer {layer} has no cached attention.", hint=hint)

    def _halves(self, node: fx.Node) -> Iterator[tuple[str, Format, int]]:
        """For keys and values: which they are, their format and their width."""
        for which, form, operand in zip(("key", "value"), self.formats(node), node.args[1:3], strict=True):
            yield which, form, int(operand.meta["val"].shape[3])  # type: ignore[union-attr]

    def rewrite(self, program: Program) -> list[Remark]:
        """See `Pass.rewrite`."""
        remarks, refused = [], self._reason_against(program)
        for node, site in sites(program).items():
            if all(isinstance(form, Full) for form in self.formats(node)):
                continue
            if node in refused:
                remarks.append(self.refused(site, refused[node]))
                continue
            call = self._quantize(program, node, site)
            remarks.append(self._remark(program, call, site, before=sum(token_bytes(node))))
            drop_slot(program, node)
        if errors := {remark.where: remark.numbers[ERROR] for remark in remarks if ERROR in remark.numbers}:
            worst = max(errors, key=lambda site: errors[site])
            estimate = f"estimated relative error of the outputs: {min(errors.values()):.1e} to {errors[worst]:.1e}"
            remarks.append(self.applied("model", f"{estimate}, the largest at {worst}"))
        return remarks or [self.missed("model", "no cached attention is to be quantized")]

    def _remark(self, program: Program, call: fx.Node, site: str, before: float) -> Remark:
        keys, values = (form.name for form in self.formats(call))
        numbers = {"bytes_per_token_and_head": sum(token_bytes(call)), "bytes_before": before}
        error = program.calibration.get(f"{self.name}/{site}/error")
        if error is not None:
            numbers[ERROR] = float(error)
        return self.applied(site, f"keys in {keys}, values in {values}", **numbers)

    def _quantize(self, program: Program, node: fx.Node, site: str) -> fx.Node:
        """Put the quantized form of `node` in its place; the node itself is left over."""
        slot: Any = node.kwargs["slot"]
        q, k, v, _, _, start, _, *constants = (*node.args, None, None, None)
        with provenance(program, self.name, like=node), program.graph.inserting_before(node):
            caches: list[list[fx.Node]] = []
            statics: list[fx.Node | None] = []
            ports: list[Port] = []
            for (which, form, width), old in zip(self._halves(node), node.args[3:5], strict=True):
                held = old.meta["val"]  # type: ignore[union-attr]
                role, buffers = Role.CACHE_KEY if which == "key" else Role.CACHE_VALUE, []
                for part in cache_format(form.name, self.residual, self.sinks).parts(width, held.dtype):
                    suffix = "" if part.name == "codes" else f"_{part.name}"
                    shape = (*held.shape[:2], part.rows(held.shape[2]), part.width)
                    ports.append(Port(f"{which}_{slot}{suffix}", role, slot, part.name))
                    buffers.append((ports[-1], held.new_empty(shape, dtype=part.dtype)))
                caches.append([program.add_input(port, value) for port, value in buffers])
                static = static_tensor(program, node, site, which, form)
                name = f"{which}_{slot}_{form.name}"
                statics.append(None if static is None else program.add_tensor(name.replace(":", "_"), static))
            options = {**node.kwargs, "residual": self.residual, "first": self.sinks}
            options |= {f"{which[0]}_format": form.name for which, form, _ in self._halves(node)}
            count = count_input(program) if any(port.part in ("recent", "first") for port in ports) else None
            operands = (q, k, v, *caches, start, count, *statics, *constants[:3])
            call = program.call(QUANTIZED_CACHED_ATTENTION, *operands, **options)
            results = [program.call(operator.getitem, call, index) for index in range(len(ports) + 1)]
        next(user for user in node.users if user.args[1] == 0).replace_all_uses_with(results[0])
        for port, result in zip(ports, results[1:], strict=True):
            program.add_output(Port(f"new_{port.name}", port.role, port.slot, port.part), result)
        return call

    def ensures(self, program: Program) -> None:
        """See `Pass.ensures`."""
        refused = self._reason_against(program)
        for node in program.nodes(CACHED_ATTENTION):
            if node not in refused and not all(isinstance(form, Full) for form in self.formats(node)):
                raise InternalError(f"{node.name} is not quantized")


def static_tensor(program: Program, node: fx.Node, site: str, which: str, form: Format) -> Tensor | None:
    """The static tensor of a format at an attention: float32 [KH, D] or [KH, 1]; None where the format has none.

    Without calibration, a global scale of one serves formats whose own scales reach far (nvfp4: up to 2688).

    Raises:
        InvalidInput: the format needs calibrated ranges that the program does not have, or that are damaged.
    """
    operand: Any = node.args[1 if which == "key" else 2]
    shape = (int(operand.meta["val"].shape[1]), int(operand.meta["val"].shape[3]))
    measured = program.calibration.get(f"{QuantizeKV.name}/{site}/{which}/minimum")
    if form.static == "":
        return None
    if form.static == "head" and measured is None:
        return torch.ones(shape[0], 1)
    sources = [site]
    if measured is None or tuple(measured.shape) != shape:
        # A draft takes what was measured in the model for the attentions that it makes one of.
        parts = node.meta.get(ATTENTIONS, ())
        if parts and all(f"{QuantizeKV.name}/{part}/{which}/minimum" in program.calibration for part in parts):
            sources = list(parts)
    one = (shape[0] // len(sources), shape[1])
    low, high = (
        torch.cat([calibrated(program, QuantizeKV.name, source, which, each, one) for source in sources])
        for each in ("minimum", "maximum")
    )
    return form.static_from(low, high, MARGIN)


def _refusal(node: fx.Node) -> str:
    """Why an attention keeps its cache in full precision, "" if it need not."""
    if node.target == WINDOWED_ATTENTION:
        return "of its keys and values a window is kept, which compress_kv leaves in full precision"
    key, value = (operand.meta["val"] for operand in node.args[1:3])  # type: ignore[union-attr]
    if key.shape[3] != value.shape[3]:
        return (
            f"keys of width {key.shape[3]} beside values of width {value.shape[3]}: multi-head latent attention keeps "
            "a rotated part in its keys that has to stay exact"
        )
    for operand, what in zip(node.args[1:3], ("keys", "values"), strict=True):
        readers = [user for user in operand.users if user.target in (ATTENTION, CACHED_ATTENTION)]  # type: ignore[union-attr]
        if len(readers) > 1 or node.args[1] is node.args[2]:
            return f"its {what} are shared with another attention, or are keys and values at once"
    return ""
