"""Decoding on a GPU: an optimized model against the ways to run it that it competes with, and against the memory.

`decode` is a model of the shape of Qwen2-0.5B, `deep` one of 32 narrow layers whose middle ones run in sequence or at
the same time; random weights in bfloat16, batch 1, 1024 tokens in the cache, greedy. A system's time is that of one
more token in a row of them, with the host's work. "graph" is the device's part of it alone, one replay of a CUDA graph.
The floor is the time to read weights, keys and values once at the bandwidth of a large copy (bytes read and written)
that is measured in the same run.

Wrong results have no speed: logits are first compared with those of the same model in float64.
"""

from __future__ import annotations

import copy
import gc
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    StaticCache,
)

from benchmarks.harness import Row, Samples, Turn, arguments, publish, take_turns
from skipstone.ir.errors import Unsupported
from skipstone.ir.program import Program
from skipstone.optimize import capture, lower, rewrite
from skipstone.passes.fuse_parallel import FuseParallel
from skipstone.passes.layer_parallel import LayerParallel, Segment, Unit
from skipstone.plan import Plan
from skipstone.runtime.eager import EagerSession
from skipstone.runtime.executable import Executable
from skipstone.runtime.triton import session as triton_session

CONTEXT, NEW_TOKENS = 1024, 64
DEVICE, DTYPE = "cuda", torch.bfloat16
COPIED = 2**30
"""Bytes that are copied to measure the bandwidth."""

AT_ONCE: Mapping[str, tuple[range, Unit, bool]] = {
    "24_1_layer": (range(4, 28), "layer", True),
    "24_1_two_stage": (range(4, 28), "two_stage", True),
    "24_1_two_stage_unfused": (range(4, 28), "two_stage", False),
    "12_1_layer": (range(10, 22), "layer", True),
    "12_1_two_stage": (range(10, 22), "two_stage", True),
}
"""Layers that run at the same time, in one iteration: which, in which unit, and whether they become one."""

TUNED = {"combo_kernels": True, "coordinate_descent_tuning": True}
OPTIONS: Mapping[str, Mapping[str, Any]] = {"none": {}, "combo": {"combo_kernels": True}, "tuned": TUNED}
"""Ways of compiling steps of one token."""

ERROR = 1.5
"""How much larger our error in bfloat16 may be than that of Hugging Face's own code."""


def qwen2() -> PreTrainedModel:
    """A model of the shape of Qwen2-0.5B."""
    config = Qwen2Config(
        vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
        num_key_value_heads=2, max_position_embeddings=4096, tie_word_embeddings=True,
    )  # fmt: skip
    return _random(Qwen2ForCausalLM, config)


def deep() -> PreTrainedModel:
    """A deep and narrow model."""
    config = LlamaConfig(
        vocab_size=32768, hidden_size=640, intermediate_size=2560, num_hidden_layers=32, num_attention_heads=5,
        num_key_value_heads=5, head_dim=128, max_position_embeddings=4096,
    )  # fmt: skip
    return _random(LlamaForCausalLM, config)


def _random(kind: type[PreTrainedModel], config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = kind(config).to(DTYPE).eval()
    model.generation_config.eos_token_id = None  # every system decodes all the tokens
    model.generation_config.pad_token_id = 0
    return model


# ------------------------------------------------------------------------------------------------------------- systems


class Ours:
    """A session, step by step, over a cache of its own; nothing in a step waits for the device."""

    def __init__(self, executable: Any) -> None:
        self.executable, self.session = executable, executable.session
        self.one = torch.ones(1, dtype=torch.int64, device=DEVICE)
        self.row = torch.zeros(1, 1, dtype=torch.int64, device=DEVICE)
        self.cache: Any = None

    def prefill(self, ids: Tensor) -> Tensor:
        """Logits [1, V] behind a prompt, which goes to a new cache."""
        self.cache = None
        logits, self.cache = self.executable.prefill(ids)
        return logits  # type: ignore[no-any-return]

    def fill(self) -> None:
        """Put random keys and values into a new cache."""
        random = torch.Generator(DEVICE).manual_seed(1)
        self.cache = self.session.new_cache(1, CONTEXT + 2 * NEW_TOKENS)
        for buffer in self.cache.buffers.values():
            buffer.normal_(generator=random)
        self.rewind()

    def rewind(self) -> None:
        """Forget what was decoded."""
        self.cache.lengths = torch.full_like(self.one, CONTEXT)
        self.position = torch.full_like(self.row, CONTEXT)

    def decode(self, token: Tensor) -> Tensor:
        """Logits [1, V] behind one more token [1, 1]."""
        logits: Tensor = self.session.step(token, self.position, self.one, self.row, self.cache)
        self.cache.advance(self.one)
        self.position = self.position + 1
        return logits[:, 0]


class Dynamic:
    """The model as transformers runs it, with a growing cache."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def prefill(self, ids: Tensor) -> Tensor:
        """See `Ours.prefill`."""
        out = self.model(input_ids=ids, use_cache=True, logits_to_keep=1)
        self.cache = out.past_key_values
        return out.logits[:, -1]  # type: ignore[no-any-return]

    def decode(self, token: Tensor) -> Tensor:
        """See `Ours.decode`."""
        out = self.model(input_ids=token, past_key_values=self.cache, use_cache=True)
        return out.logits[:, -1]  # type: ignore[no-any-return]


class Static:
    """The model under `torch.compile` with CUDA graphs, with a static cache; prompts are read uncompiled."""

    def __init__(self, model: PreTrainedModel, **compiling: Any) -> None:
        self.model = model
        self.forward = torch.compile(model.forward, fullgraph=True, dynamic=False, **compiling)
        self.cache = StaticCache(config=model.config, max_cache_len=CONTEXT + 2 * NEW_TOKENS)

    def prefill(self, ids: Tensor) -> Tensor:
        """See `Ours.prefill`."""
        self.cache.reset()
        self.position = torch.full((1, 1), ids.shape[1], device=DEVICE)
        out = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1]  # type: ignore[no-any-return]

    def decode(self, token: Tensor) -> Tensor:
        """See `Ours.decode`."""
        out = self.forward(input_ids=token, position_ids=self.position, past_key_values=self.cache, use_cache=True)
        self.position = self.position + 1
        return out.logits[:, -1]  # type: ignore[no-any-return]


def tokens_in_a_row(name: str, system: Any, begin: Callable[[], Tensor]) -> Turn:
    """A turn: `begin` leaves the system behind the context and gives the first logits, then tokens are decoded."""

    @torch.no_grad()
    def turn() -> dict[str, float]:
        logits = begin()
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(NEW_TOKENS):
            logits = system.decode(logits.argmax(dim=-1, keepdim=True))
        torch.cuda.synchronize()
        return {name: (time.perf_counter() - started) / NEW_TOKENS}

    return turn


def replays(name: str, system: Ours) -> Turn:
    """A turn of the captured graph alone, which decodes one and the same token."""
    step = system.cache.lease.storage.steps[system.session]

    def turn() -> dict[str, float]:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(NEW_TOKENS):
            step.replay()
        end.record()
        end.synchronize()
        return {f"{name} graph": begin.elapsed_time(end) / 1e3 / NEW_TOKENS}

    return turn


def bandwidth() -> Turn:
    """A turn of a large copy: seconds a byte that is read or written."""
    source = torch.empty(COPIED, dtype=torch.uint8, device=DEVICE).random_()
    target = torch.empty_like(source)

    def turn() -> dict[str, float]:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(4):
            target.copy_(source)
        end.record()
        end.synchronize()
        return {"copy": begin.elapsed_time(end) / 1e3 / (8 * COPIED)}

    return turn


# -------------------------------------------------------------------------------------------------------------- figures


def decode(rounds: int) -> Iterator[Row]:
    """The optimized model against what it competes with."""
    model = qwen2()
    ids = torch.randint(model.config.vocab_size, (1, CONTEXT), device=DEVICE)
    started = time.perf_counter()
    executable = optimize(capture(model), Plan([]))
    ours = Ours(executable)
    yield from check(model, ours, ids)
    yield Row("seconds_to_first_tokens", time.perf_counter() - started, None, None, 1)
    systems = {
        "hf eager": Dynamic(model),
        "hf compiled": Static(model, mode="reduce-overhead"),
        "hf compiled tuned": Static(model, options={"triton.cudagraphs": True, **TUNED}),
    }  # fmt: skip
    ours.prefill(ids)
    first = torch.zeros(1, model.config.vocab_size, device=DEVICE)

    def again() -> Tensor:
        ours.rewind()
        return first

    turns = {("ours", 1): tokens_in_a_row("ours", ours, again), ("ours graph", 1): replays("ours", ours)}
    turns["copy", 1] = bandwidth()
    look(turns, started)
    for name, system in systems.items():
        started = time.perf_counter()
        turns[name, 1] = tokens_in_a_row(name, system, lambda system=system: system.prefill(ids))  # type: ignore[misc]
        look({(name, 1): turns[name, 1]}, started)
    samples = take_turns(turns, rounds)
    yield from ratios(samples, "decode", list(systems), executable.program.weight_bytes(), model.config)


def deep_narrow(rounds: int) -> Iterator[Row]:
    """Layers in sequence and at the same time, equally compiled and captured."""
    model = deep()
    captured = capture(model)
    turns: dict[tuple[str, int], Turn] = {("copy", 1): bandwidth()}
    size = captured.weight_bytes()
    plans = {"sequential": Plan([]), "sequential_fused": Plan([FuseParallel()])}
    for name, (layers, unit, is_fused) in AT_ONCE.items():
        segment = Segment(layers.start, layers.stop, unit=unit)
        plans[name] = Plan([LayerParallel((segment,)), *([FuseParallel()] if is_fused else [])])
    for name, plan in plans.items():
        turns |= ready(name, captured, plan, model.config.vocab_size)
    kept = [name for name in plans if (name, 1) in turns]
    samples = take_turns(turns, rounds)
    for name in kept:
        yield from against_floor(samples, f"deep_{name}", name, size, model.config)
    for mode in ("", " graph"):
        base = min((samples[name + mode] for name in plans if name.startswith("seq")), key=lambda each: each.median)
        for name in (name for name in kept if name in AT_ONCE):
            each = samples[name + mode]
            metric, goal = f"layers_at_once_{name}{mode.replace(' ', '_')}", 2.0 if name.startswith("24") else 1.3
            yield Row(metric, base.median / each.median, base.median * 1e3, goal, each.count)


def ready(name: str, captured: Program, plan: Plan, vocabulary: int) -> dict[tuple[str, int], Turn]:
    """The turns of a plan behind a context of random keys and values, compiled and checked; none if it is refused."""
    started = time.perf_counter()
    try:
        ours = Ours(optimize(captured, plan))
    except Unsupported as reason:
        say(f"{name} is left out: {reason}")
        return {}
    ours.fill()
    compare_with_eager(name, ours)
    first = torch.zeros(1, vocabulary, device=DEVICE)

    def again() -> Tensor:
        ours.rewind()
        return first

    turns = {(name, 1): tokens_in_a_row(name, ours, again), (f"{name} graph", 1): replays(name, ours)}
    look(turns, started)
    return turns


def look(turns: Mapping[tuple[str, int], Turn], started: float) -> None:
    """Print first figures, which nothing is made of, in case that the run is cut off."""
    for turn in turns.values():
        turn()
        figures = [min(pair) for pair in zip(turn().items(), turn().items(), strict=True)]
        for name, seconds in figures:
            say(f"{name}: about {seconds * 1e3:.4g} ms, {time.perf_counter() - started:.0f} s after its beginning")


def optimize(captured: Program, plan: Plan) -> Any:
    """The executable of a plan, without proving every pass once more."""
    program, refusal = rewrite(captured, plan, target="triton", strict=False)
    if refusal is not None:
        raise refusal
    return Executable(lower(program, "triton"), target="triton")


@torch.no_grad()
def check(model: PreTrainedModel, ours: Ours, ids: Tensor) -> Iterator[Row]:
    """Compare logits of a prompt and of tokens behind it with float64; refuse to time what is wrong."""
    forced = torch.randint(model.config.vocab_size, (1, 8), device=DEVICE)
    theirs = Dynamic(model)
    found = {}
    for name, system in (("ours", ours), ("hf", theirs)):
        logits = [system.prefill(ids)]
        if system is ours:
            ours.rewind()
        for column in forced.split(1, dim=1):
            logits.append(system.decode(column).clone())
        found[name] = torch.stack(logits, dim=1).double()
    exact = copy.deepcopy(model).double()
    wanted = exact(input_ids=torch.cat([ids, forced], dim=1), use_cache=False, logits_to_keep=9).logits
    del exact
    errors = {name: float((each - wanted).norm() / wanted.norm()) for name, each in found.items()}
    say(f"relative errors in {DTYPE}: {errors}")
    ratio = errors["ours"] / errors["hf"]
    if not ratio <= ERROR:
        raise SystemExit(f"wrong logits: an error {ratio:.2f} times that of Hugging Face; no speed is measured.")
    yield Row("error_over_hf_bf16", ratio, errors["hf"], ERROR, 9, at_most=True)


@torch.no_grad()
def compare_with_eager(name: str, ours: Ours) -> None:
    """Compare two steps with those of the same program run operator by operator; refuse to time what is wrong."""
    eager = EagerSession(ours.session.program)
    cache = eager.new_cache(1, ours.cache.capacity)
    cache.buffers = {key: buffer.clone() for key, buffer in ours.cache.buffers.items()}
    cache.lengths = ours.cache.lengths.clone()
    token = torch.full((1, 1), 7, device=DEVICE)
    for _ in range(2):  # the second one is a replay with other lengths
        position = ours.position
        wanted = eager.step(token, position, ours.one, ours.row, cache)[:, 0].double()
        cache.advance(ours.one)
        given = ours.decode(token).double()
        error = float((given - wanted).norm() / wanted.norm())
        if not error <= 0.1:  # 32 layers in bfloat16 differ by their rounding
            raise SystemExit(f"{name}: logits differ from the program's by {error:.1e}; no speed is measured.")
    say(f"{name}: differs by {error:.1e} from the program run operator by operator")


def ratios(
    samples: Mapping[str, Samples], metric: str, baselines: Sequence[str], size: float, config: Any
) -> Iterator[Row]:
    """The figures that compare times; baselines in milliseconds."""
    ours = samples["ours"]
    for name in baselines:
        theirs = samples[name].median
        yield Row(
            f"{metric}_vs_{name.replace(' ', '_')}", theirs / ours.median, theirs * 1e3, GOALS.get(name), ours.count
        )
    yield from against_floor(samples, metric, "ours", size, config)


GOALS = {"hf compiled": 1.0}


def against_floor(samples: Mapping[str, Samples], metric: str, name: str, size: float, config: Any) -> Iterator[Row]:
    """Tokens a second, and shares of the copy bandwidth; baselines are the floor in milliseconds."""
    width = config.num_key_value_heads * getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    table = config.vocab_size * config.hidden_size * DTYPE.itemsize
    read = size - (0 if config.tie_word_embeddings else table)  # of the table of embeddings, one row is read
    read += 2 * config.num_hidden_layers * width * DTYPE.itemsize * (CONTEXT + NEW_TOKENS // 2)
    floor = read * samples["copy"].median
    each = samples[name]
    yield Row(f"{metric}_tokens_per_second", 1 / each.median, None, None, each.count)
    yield Row(f"{metric}_of_copy_bandwidth", floor / each.median, floor * 1e3, None, each.count)
    graph = samples[f"{name} graph"]
    yield Row(f"{metric}_graph_of_copy_bandwidth", floor / graph.median, floor * 1e3, None, graph.count)


def options(rounds: int) -> Iterator[Row]:
    """The same steps, compiled with different options of Inductor."""
    model = qwen2()
    captured = capture(model)
    turns: dict[tuple[str, int], Turn] = {("copy", 1): bandwidth()}
    for name, chosen in OPTIONS.items():
        with patch.object(triton_session, "DECODE", chosen):
            turns |= ready(name, captured, Plan([]), model.config.vocab_size)
    samples = take_turns(turns, rounds)
    for name in OPTIONS:
        yield from against_floor(samples, f"options_{name}", name, captured.weight_bytes(), model.config)


# ------------------------------------------------------------------------------------------------------------- the run

PARTS: Mapping[str, Callable[[int], Iterator[Row]]] = {"decode": decode, "deep": deep_narrow, "options": options}


def say(text: str) -> None:
    """Print a line at once."""
    print(f"[{time.perf_counter() - _STARTED:6.1f} s] {text}", flush=True)


_STARTED = time.perf_counter()


def main() -> None:
    """Measure, print every figure as soon as it is there, and write them after every part."""
    parser = arguments("gpu", __doc__ or "")
    parser.add_argument("--rows", nargs="+", choices=PARTS, default=["decode", "deep"], help="which parts to measure")
    chosen = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu measures decoding on a CUDA device, and torch finds none here.", file=sys.stderr)
        raise SystemExit(2)
    rows: list[Row] = []
    for part in chosen.rows:
        for row in PARTS[part](5 if chosen.quick else 15):
            say(json.dumps({key: value for key, value in asdict(row).items() if value is not None}))
            rows.append(row)
            with Path(f"{chosen.json}.rows").open("a") as lines:
                lines.write(json.dumps({"part": part, **asdict(row)}) + "\n")
        gc.collect()
        torch.cuda.empty_cache()
    publish("gpu", rows, chosen.json)


if __name__ == "__main__":
    main()
