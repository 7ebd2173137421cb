"""What `optimize` did, why, and what it bought: the report of an executable."""

from __future__ import annotations

import io
import itertools
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from skipstone.ir.errors import UserError
from skipstone.passes.base import Remark, Status

WIDTH = 100
UNMEASURED = "not measured"


@dataclass(frozen=True)
class Stage:
    """One stage of `optimize` and the time it took."""

    name: str
    seconds: float


@dataclass(frozen=True)
class Conversion:
    """Weights that the target cannot take in their own dtype.

    Attributes:
        source, target: dtype names, e.g. "bfloat16" and "float32".
        tensors: how many were converted.
        bytes_before, bytes_after: what they occupy.
    """

    source: str
    target: str
    tensors: int
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class Footprint:
    """What a program consists of and what one decoded token costs.

    Attributes:
        sublayers, attention, ffn: how many sublayers there are, and how many of them are of that kind.
        flops: floating point operations for one token, that attention to earlier ones adds to; None where data decide.
        weight_bytes: bytes of weights.
        kv_bytes_per_token: bytes of keys and values that each token adds.
        nodes: operators of the graph.
        kv_bytes_fixed: bytes of keys and values that each sequence takes however long it is.
        kv_bytes_of_prompt: the most that a prompt takes of those once it is read, None without such a limit.
    """

    sublayers: int
    attention: int
    ffn: int
    flops: float | None
    weight_bytes: float
    kv_bytes_per_token: float
    nodes: int
    kv_bytes_fixed: float = 0
    kv_bytes_of_prompt: float | None = None


@dataclass(frozen=True)
class Timing:
    """Measured medians, batch 1 unless the prompt said otherwise.

    Attributes:
        prefill_ms: the whole prompt.
        decode_ms: one token, with the prompt in the cache; None where there is no cache.
        samples: how many runs the medians are over.
        prompt: tokens of the prompt.
        new_tokens: tokens decoded in each run.
    """

    prefill_ms: float
    decode_ms: float | None
    samples: int
    prompt: int
    new_tokens: int


class Stepwise(Protocol):
    """What can be timed: an `Executable`, or a model in a `HuggingFaceSteps`."""

    supports_cache: bool

    def __call__(self, *, input_ids: Tensor) -> Any:
        """The whole sequence without a cache."""

    def prefill(self, input_ids: Tensor) -> tuple[Tensor, Any]:
        """Logits of the last position, and a cache that holds the prompt."""

    def decode(self, tokens: Tensor, cache: Any) -> Tensor:
        """Logits after one more token, [B, 1]."""


class HuggingFaceSteps:
    """A Hugging Face causal LM, run step by step with its own dynamic cache."""

    supports_cache = True

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, *, input_ids: Tensor) -> Any:
        """See `Stepwise`."""
        return self.model(input_ids=input_ids, use_cache=False)

    def prefill(self, input_ids: Tensor) -> tuple[Tensor, Any]:
        """See `Stepwise.prefill`."""
        out = self.model(input_ids=input_ids, use_cache=True, logits_to_keep=1)
        return out.logits, out.past_key_values

    def decode(self, tokens: Tensor, cache: Any) -> Tensor:
        """See `Stepwise.decode`."""
        logits: Tensor = self.model(input_ids=tokens, past_key_values=cache, use_cache=True).logits
        return logits


def measure(
    systems: Mapping[str, Stepwise], input_ids: Tensor, new_tokens: int = 16, samples: int = 3
) -> dict[str, Timing]:
    """Time greedy decoding of several systems in turn, after one unmeasured run of each.

    Args:
        input_ids: the prompt, [B, S].
        new_tokens: tokens to decode in each run.
        samples: measured runs of each system; they alternate, so that all see the same machine.
    """
    runs: dict[str, list[tuple[float, float | None]]] = {name: [] for name in systems}
    with torch.inference_mode():
        for number in range(samples + 1):
            for name, system in systems.items():
                times = _run(system, input_ids, new_tokens)
                if number > 0:
                    runs[name].append(times)
    return {name: _timing(times, samples, input_ids.shape[1], new_tokens) for name, times in runs.items()}


def _run(system: Stepwise, input_ids: Tensor, new_tokens: int) -> tuple[float, float | None]:
    started = time.perf_counter()
    if not system.supports_cache:
        system(input_ids=input_ids)
        return time.perf_counter() - started, None
    if getattr(system, "speculation", None) is not None:  # a draft is part of `generate`, not of steps
        drafted: Any = system
        arrivals = _Arrivals()
        drafted.generate(input_ids, max_new_tokens=1 + new_tokens, do_sample=False, streamer=arrivals)
        _, first, *others = arrivals.times  # of the prompt, which comes before anything is computed, and of each token
        return first - started, (others[-1] - first) / len(others) if others else None
    logits, cache = system.prefill(input_ids)
    prefilled = time.perf_counter()
    for _ in range(new_tokens):
        logits = system.decode(_greedy(logits), cache)
    return prefilled - started, (time.perf_counter() - prefilled) / new_tokens


class _Arrivals:
    """A streamer that notes when something comes."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _tokens: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Called by `generate`: nothing comes any more."""


def _greedy(logits: Tensor) -> Tensor:
    last = logits if logits.ndim == 2 else logits[:, -1]
    return last.argmax(dim=-1, keepdim=True)


def _timing(runs: Sequence[tuple[float, float | None]], samples: int, prompt: int, new_tokens: int) -> Timing:
    prefill = statistics.median(each for each, _ in runs) * 1e3
    decode = [each for _, each in runs if each is not None]
    return Timing(prefill, statistics.median(decode) * 1e3 if decode else None, samples, prompt, new_tokens)


@dataclass
class Report:
    """What was done to a model and what it bought; `str()` renders it for people, `to_dict()` for programs.

    Attributes:
        model: class name of the model.
        target: what the executable runs on.
        threads: threads it runs with; None leaves the choice to the target.
        cache: one line: how many slots the KV cache has, or why there is none.
        budget: lines: what the plan was proved to cost, or why the model is unchanged.
        before, after: footprints of the captured and of the rewritten program.
        remarks: what the passes said, in order.
        conversions: weights whose dtype had to change.
        stages: where the time of `optimize` went.
        timing_before, timing_after: the model and the executable, once measured.
    """

    model: str
    target: str
    threads: int | None = None
    cache: str = ""
    budget: Sequence[str] = ()
    before: Footprint | None = None
    after: Footprint | None = None
    remarks: Sequence[Remark] = ()
    conversions: Sequence[Conversion] = ()
    stages: Sequence[Stage] = ()
    timing_before: Timing | None = None
    timing_after: Timing | None = None

    def measure(
        self, executable: Stepwise, input_ids: Tensor, model: Any = None, *, new_tokens: int = 16, samples: int = 3
    ) -> None:
        """Fill in the measured times of the executable and, where given, of the Hugging Face model it was made from.

        Args:
            input_ids: the prompt, [B, S].
            new_tokens: tokens to decode in each run.
            samples: measured runs of each.
        Raises:
            UserError: there is no run or no token to measure, or the model is none of Hugging Face that generates.
        """
        if new_tokens < 1 or samples < 1:
            raise UserError(f"{samples} runs of {new_tokens} tokens: take at least one of each.")
        if model is not None and not hasattr(model, "generate"):
            raise UserError(f"{type(model).__name__} is no Hugging Face model that generates.", hint="Leave it out.")
        systems: dict[str, Stepwise] = {"after": executable}
        if model is not None:
            systems["before"] = HuggingFaceSteps(model)
        timings = measure(systems, input_ids, new_tokens, samples)
        self.timing_before, self.timing_after = timings.get("before"), timings["after"]

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data that JSON can hold."""
        return {
            "model": self.model,
            "target": self.target,
            "threads": self.threads,
            "cache": self.cache,
            "budget": list(self.budget),
            "before": asdict(self.before) if self.before else None,
            "after": asdict(self.after) if self.after else None,
            "remarks": [asdict(remark) for remark in self.remarks],
            "conversions": [asdict(each) for each in self.conversions],
            "stages": [asdict(each) for each in self.stages],
            "timing_before": asdict(self.timing_before) if self.timing_before else None,
            "timing_after": asdict(self.timing_after) if self.timing_after else None,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        """The report that `to_dict` wrote.

        Raises:
            KeyError, TypeError, ValueError: it is none.
        """

        def one(kind: Any, value: Any) -> Any:
            return None if value is None else kind(**value)

        return cls(
            **{
                **data,
                "before": one(Footprint, data["before"]),
                "after": one(Footprint, data["after"]),
                "remarks": [Remark(**{**each, "status": Status(each["status"])}) for each in data["remarks"]],
                "conversions": [Conversion(**each) for each in data["conversions"]],
                "stages": [Stage(**each) for each in data["stages"]],
                "timing_before": one(Timing, data["timing_before"]),
                "timing_after": one(Timing, data["timing_after"]),
            }
        )

    def __str__(self) -> str:
        return render(
            *(part for part in (self._head(), self._passes(), self._gains(), self._stages()) if part is not None)
        )

    def _head(self) -> Table:
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        table.add_row("model", self.model)
        table.add_row(
            "target", f"{self.target}, {count(self.threads, 'thread') if self.threads else 'threads not set'}"
        )
        if self.cache:
            table.add_row("KV cache", self.cache)
        for line in self.budget:
            table.add_row("budget", line)
        for each in self.conversions:
            sizes = f"{format_bytes(each.bytes_before)} became {format_bytes(each.bytes_after)}"
            table.add_row("converted", f"{count(each.tensors, 'tensor')}, {each.source} to {each.target}: {sizes}")
        return table

    def _passes(self) -> Table | None:
        if not self.remarks:
            return None
        table = Table(title="Passes", title_justify="left", expand=True)
        table.add_column("pass", no_wrap=True)
        table.add_column("outcome", no_wrap=True)
        table.add_column("where", ratio=2, overflow="fold")
        table.add_column("why", ratio=3, overflow="fold")
        for name, remarks in itertools.groupby(self.remarks, key=lambda remark: remark.pass_name):
            for number, line in enumerate(_grouped(remarks)):
                table.add_row(name if number == 0 else "", *line)
        return table

    def _gains(self) -> Table:
        table = Table(title="Before and after", title_justify="left")
        table.add_column("")
        for heading in ("before", "after", "after / before"):
            table.add_column(heading, justify="right", no_wrap=True)
        before, after = self.before, self.after
        if before and after:
            table.add_row("sublayers (attention + FFN)", _sublayers(before), _sublayers(after), "")
            table.add_row("graph operators", str(before.nodes), str(after.nodes), _share(after.nodes, before.nodes))
            table.add_row("FLOPs a token", *_pair(before.flops, after.flops, format_count))
            table.add_row("weights", *_pair(before.weight_bytes, after.weight_bytes, format_bytes))
            table.add_row(
                "keys and values a token", *_pair(before.kv_bytes_per_token, after.kv_bytes_per_token, format_bytes)
            )
            if before.kv_bytes_fixed or after.kv_bytes_fixed:
                fixed = _pair(before.kv_bytes_fixed, after.kv_bytes_fixed, format_bytes)
                table.add_row("keys and values, fixed", *fixed)
            if after.kv_bytes_of_prompt is not None:
                table.add_row("keys and values of a prompt", "all", f"<= {format_bytes(after.kv_bytes_of_prompt)}", "")
        first, second = self.timing_before, self.timing_after
        prompt, decode = "prefill", "decode, a token"
        if measured := second or first:
            runs = f"median of {measured.samples}"
            prompt += f" ({measured.prompt} tokens, {runs})"
            decode += f" ({measured.new_tokens} tokens, {runs})"
        table.add_row(prompt, *_times(*(each.prefill_ms if each else None for each in (first, second))))
        table.add_row(decode, *_times(*(each.decode_ms if each else None for each in (first, second))))
        return table

    def _stages(self) -> Table | None:
        if not self.stages:
            return None
        table = Table(title="Time of optimize", title_justify="left")
        table.add_column("stage")
        table.add_column("seconds", justify="right")
        for stage in self.stages:
            table.add_row(stage.name, f"{stage.seconds:.2f}")
        table.add_row("total", f"{sum(stage.seconds for stage in self.stages):.2f}", style="bold")
        return table


def render(*parts: Any) -> str:
    """Rich tables as plain text of 100 columns."""
    stream = io.StringIO()
    console = Console(file=stream, width=WIDTH, color_system=None, force_terminal=False, markup=False, highlight=False)
    for part in parts:
        console.print(part)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines())


def count(number: int, noun: str) -> str:
    """A number and its noun, in the plural where it must be."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def format_bytes(size: float) -> str:
    """Bytes in the unit that leaves three or four digits."""
    return _scaled(size, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def format_count(number: float) -> str:
    """A large number, by thousands."""
    return _scaled(number, 1000, ("", "K", "M", "G", "T"))


def _scaled(number: float, base: int, units: Sequence[str]) -> str:
    power = 0
    while abs(number) >= base and power < len(units) - 1:
        number, power = number / base, power + 1
    digits = f"{number:.0f}" if power == 0 else f"{number:.4g}"
    return f"{digits} {units[power]}".strip()


def _grouped(remarks: Iterable[Remark]) -> list[tuple[str, str, str]]:
    """The lines of one pass: what it applied in one line, and one line for each reason why it did not."""
    groups: dict[tuple[Status, str], list[Remark]] = {}
    for remark in remarks:
        reason = "" if remark.status is Status.APPLIED else remark.why
        groups.setdefault((remark.status, reason), []).append(remark)
    return [
        (f"{status} {len(same)}", _some((each.where for each in same), ", "), _some((each.why for each in same), "; "))
        for (status, _), same in groups.items()
    ]


def _some(texts: Iterable[str], separator: str, shown: int = 4) -> str:
    """The first few different texts, and how many more there are."""
    distinct = list(dict.fromkeys(text for text in texts if text))
    rest = len(distinct) - shown
    return separator.join(distinct[:shown]) + (f"{separator}and {rest} more" if rest > 0 else "")


def _sublayers(footprint: Footprint) -> str:
    other = footprint.sublayers - footprint.attention - footprint.ffn
    kinds = f"{footprint.attention} + {footprint.ffn}" + (f" + {other} other" if other else "")
    return f"{footprint.sublayers} ({kinds})"


def _pair(before: float | None, after: float | None, form: Any) -> tuple[str, str, str]:
    texts = ["depends on the data" if each is None else form(each) for each in (before, after)]
    return texts[0], texts[1], "" if before is None or after is None else _share(after, before)


def _times(before: float | None, after: float | None) -> tuple[str, str, str]:
    texts = [UNMEASURED if each is None else f"{each:.2f} ms" for each in (before, after)]
    return texts[0], texts[1], _share(after, before) if before and after else ""


def _share(after: float, before: float) -> str:
    return f"{after / before:.3f}" if before else ""
