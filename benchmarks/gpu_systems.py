"""The models of `benchmarks.gpu`, the systems that run them on a GPU, and their turns."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
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

from benchmarks.harness import Row, Turn
from benchmarks.workers import System
from skipstone.ir.program import Program
from skipstone.ir.row_linear import MOST_ROWS
from skipstone.optimize import capture, lower
from skipstone.plan import Plan
from skipstone.rewrite import rewrite
from skipstone.runtime.eager import EagerSession
from skipstone.runtime.executable import Executable
from skipstone.runtime.triton import products

NEW_TOKENS = 64
DEVICE, DTYPE = "cuda", torch.bfloat16
COPIED = 2**30
"""Bytes that are copied to measure the bandwidth."""

TUNED: Mapping[str, Any] = {"combo_kernels": True, "coordinate_descent_tuning": True}
COMPILING: Mapping[str, Mapping[str, Any]] = {
    "hf_compiled": {"mode": "reduce-overhead"},
    "hf_compiled_tuned": {"options": {"triton.cudagraphs": True, **TUNED}},
}
"""How transformers' model is compiled."""

ERROR = 1.5
"""How much larger our error in bfloat16 may be than that of Hugging Face's own code."""


def qwen2() -> PreTrainedModel:
    """A model of the shape of Qwen2-0.5B."""
    config = Qwen2Config(
        vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
        num_key_value_heads=2, max_position_embeddings=65536, tie_word_embeddings=True,
    )  # fmt: skip
    return _random(Qwen2ForCausalLM, config)


def llama() -> PreTrainedModel:
    """A model of the shape of Llama-3.2-1B."""
    config = LlamaConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, max_position_embeddings=65536, tie_word_embeddings=True,
    )  # fmt: skip
    return _random(LlamaForCausalLM, config)


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


@dataclass(frozen=True)
class Workload:
    """What is decoded.

    Attributes:
        make: the model.
        batch: sequences.
        context: tokens of each that are in the cache before.
    """

    make: Callable[[], PreTrainedModel]
    batch: int
    context: int

    def prompt(self, model: PreTrainedModel) -> Tensor:
        """Tokens [batch, context], always the same."""
        generator = torch.Generator().manual_seed(1)
        return torch.randint(model.config.vocab_size, (self.batch, self.context), generator=generator).to(DEVICE)


class Ours:
    """A session, step by step, over a cache of its own; nothing in a step waits for the device."""

    def __init__(self, executable: Any, config: Any, workload: Workload) -> None:
        self.executable, self.session, self.config, self.workload = executable, executable.session, config, workload
        self.one = torch.ones(workload.batch, dtype=torch.int64, device=DEVICE)
        self.row = torch.zeros(workload.batch, 1, dtype=torch.int64, device=DEVICE)
        self.cache: Any = None

    def prefill(self, ids: Tensor) -> Tensor:
        """Logits [B, V] behind a prompt, which goes to a new cache."""
        self.cache = None
        logits, self.cache = self.executable.prefill(ids)
        self.rewind()
        return logits  # type: ignore[no-any-return]

    def fill(self) -> None:
        """Put random keys and values into a new cache, with small scales where they are quantized."""
        random = torch.Generator(DEVICE).manual_seed(1)
        self.cache = self.session.new_cache(self.workload.batch, self.workload.context + 2 * NEW_TOKENS)
        for buffer in self.cache.buffers.values():
            if buffer.dtype == DTYPE:
                buffer.normal_(generator=random)
            elif buffer.is_floating_point():
                buffer.uniform_(0.01, 0.02, generator=random)
            else:
                buffer.random_(-127, 128, generator=random)
        self.rewind()

    def rewind(self) -> None:
        """Forget what was decoded."""
        self.cache.lengths = torch.full_like(self.one, self.workload.context)
        self.position = torch.full_like(self.row, self.workload.context)

    def decode(self, token: Tensor) -> Tensor:
        """Logits [B, V] behind one more token [B, 1] of each."""
        logits: Tensor = self.session.step(token, self.position, self.one, self.row, self.cache)
        self.cache.advance(self.one)
        self.position = self.position + 1
        return logits[:, 0]

    def choose(self, token: Tensor, count: int) -> Tensor:
        """The best `count` tokens, each behind the one before, as `generate` has the session choose them."""
        tokens: Tensor = self.session.decode(token, self.position, self.cache, count)
        self.position = self.position + count
        return tokens

    def least_bytes(self) -> float:
        """Bytes that a step reads: weights once, and keys and values in the middle of a turn."""
        program, config = self.session.program, self.config
        weights = program.weight_bytes()
        if not config.tie_word_embeddings:  # of embeddings, one row is read
            weights -= config.vocab_size * config.hidden_size * DTYPE.itemsize
        rows = (self.workload.context + NEW_TOKENS // 2) / self.cache.capacity
        return weights + rows * sum(buffer.nbytes for buffer in self.cache.buffers.values())


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

    def __init__(self, model: PreTrainedModel, compiling: Mapping[str, Any], context: int) -> None:
        self.model = model
        self.forward = torch.compile(model.forward, fullgraph=True, dynamic=False, **compiling)
        self.cache = StaticCache(config=model.config, max_cache_len=context + 2 * NEW_TOKENS)

    def prefill(self, ids: Tensor) -> Tensor:
        """See `Ours.prefill`."""
        self.cache.reset()
        self.position = torch.full((ids.shape[0], 1), ids.shape[1], device=DEVICE)
        out = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1]  # type: ignore[no-any-return]

    def decode(self, token: Tensor) -> Tensor:
        """See `Ours.decode`."""
        out = self.forward(input_ids=token, position_ids=self.position, past_key_values=self.cache, use_cache=True)
        self.position = self.position + 1
        return out.logits[:, -1]  # type: ignore[no-any-return]


# --------------------------------------------------------------------------------------------------------------- turns


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


def on_device(name: str, action: Callable[[], Any], times: int, units: float) -> Turn:
    """A turn of something done some times, timed on the device: seconds a unit, of which all times have so many."""

    def turn() -> dict[str, float]:
        action()  # the device comes from another process
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(times):
            action()
        end.record()
        end.synchronize()
        return {name: begin.elapsed_time(end) / 1e3 / units}

    return turn


def of_ours(name: str, ours: Ours) -> dict[str, Turn]:
    """Turns of tokens in a row, of steps whose logits are read, and of a step's graph alone.

    Raises:
        SystemExit: the session does not choose the tokens that steps have the best logits for.
    """
    first = torch.zeros(ours.workload.batch, ours.session.program.source.vocabulary, device=DEVICE)
    token = first.argmax(dim=-1, keepdim=True)

    def again() -> Tensor:
        ours.rewind()
        ours.cache.has_room(NEW_TOKENS)  # otherwise the device is asked in a turn
        return first

    @torch.no_grad()
    def chosen() -> dict[str, float]:
        again()
        torch.cuda.synchronize()
        started = time.perf_counter()
        ours.choose(token, NEW_TOKENS)
        torch.cuda.synchronize()
        return {name: (time.perf_counter() - started) / NEW_TOKENS}

    again()
    given = ours.choose(token, 8)
    again()
    for before, chosen_token in zip(torch.cat([token, given], dim=1).T, given.T, strict=False):
        if not torch.equal(ours.decode(before.unsqueeze(1)).argmax(dim=-1), chosen_token):
            raise SystemExit(f"{name}: the session's choice of a token is not that of a step; no speed is measured.")
    steps, graph = f"{name} steps", f"{name} graph"
    replay = ours.cache.lease.storage.steps[ours.session].single.replay
    return {
        name: chosen,
        steps: tokens_in_a_row(steps, ours, again),
        graph: on_device(graph, replay, NEW_TOKENS, NEW_TOKENS),
    }


def prefilling(name: str, prefill: Callable[[], Any]) -> dict[str, Turn]:
    """The turn of a prompt."""
    return {f"{name} prefill": torch.no_grad()(on_device(f"{name} prefill", prefill, 1, 1))}


# ------------------------------------------------------------------------------------------------------------- systems


def copying() -> System:
    """A large copy: seconds a byte that is read or written."""
    source = torch.empty(COPIED, dtype=torch.uint8, device=DEVICE).random_()
    target = torch.empty_like(source)
    return System({"copy": on_device("copy", partial(target.copy_, source), 4, 8 * COPIED)})


def hugging_face(name: str, workload: Workload) -> System:
    """transformers' own model, compiled as its name says."""
    model = workload.make()
    ids = workload.prompt(model)
    is_compiled = name in COMPILING
    system: Any = Static(model, COMPILING[name], workload.context) if is_compiled else Dynamic(model)
    turn = tokens_in_a_row(name, system, lambda: system.prefill(ids))
    turn()  # compiles
    turns = {} if is_compiled else prefilling(name, lambda: system.prefill(ids))
    return System({name: turn, **turns}, facts=[peak(name)])


def checked(name: str, workload: Workload) -> System:
    """The optimized model, whose logits of a prompt and of tokens behind it are compared with float64.

    What it takes from the model to its first tokens is measured while others compile.
    """
    model = workload.make()
    ids = workload.prompt(model)
    started = time.perf_counter()
    ours = Ours(optimize(capture(model), Plan([])), model.config, workload)
    ours.prefill(ids)
    ours.decode(ids[:, :1])
    torch.cuda.synchronize()
    facts = [Row("seconds_to_first_tokens", time.perf_counter() - started, None, None, 1), peak(name)]
    facts += compare_with_float64(model, ours, ids)
    ours.prefill(ids)
    ours.decode(ids[:, :1])
    turns = of_ours(name, ours)
    return System(turns | prefilling(name, lambda: ours.executable.prefill(ids)), ours.least_bytes(), facts)


def planned(name: str, plan: Plan, workload: Workload, reads_prompts: bool = False) -> System:
    """A plan behind a context of random keys and values, compared with its program run operator by operator.

    Args:
        reads_prompts: whether reading a prompt is timed, too.
    """
    model = workload.make()
    ours = Ours(optimize(capture(model), plan), model.config, workload)
    ours.fill()
    compare_with_eager(name, ours)
    turns, facts, size = of_ours(name, ours), [peak(name)], ours.least_bytes()
    if reads_prompts:
        ids = workload.prompt(model)
        turns |= prefilling(name, lambda: ours.executable.prefill(ids))
        turns[f"{name} prefill"]()  # compiles
    return System(turns, size, facts)


def without_row_linear(name: str, workload: Workload) -> System:
    """The optimized model, with linear layers, norms and sums left to Inductor."""
    with patch.object(products, "ROWS", 0):
        return planned(name, Plan([]), workload)


def for_few_rows(name: str, workload: Workload) -> System:
    """The optimized model, with the kernel of `row_linear` for all rows that it can have."""
    with patch.object(products, "ROWS", MOST_ROWS):
        return planned(name, Plan([]), workload)


def optimize(captured: Program, plan: Plan) -> Any:
    """The executable of a plan, without proving every pass once more."""
    program, refusal = rewrite(captured, plan, target="triton", strict=False)
    if refusal is not None:
        raise refusal
    return Executable(lower(program, "triton"), target="triton")


def peak(name: str) -> Row:
    """The most memory that tensors of this process took so far."""
    return Row(f"{name}_peak_gigabytes", torch.cuda.max_memory_allocated() / 1e9, None, None, 1)


@torch.no_grad()
def compare_with_float64(model: PreTrainedModel, ours: Ours, ids: Tensor) -> Iterator[Row]:
    """Compare logits of a prompt and of tokens behind it; refuse to time what is wrong."""
    forced = ids[:, :8]
    found = {}
    for name, system in (("ours", ours), ("hf", Dynamic(model))):
        logits = [system.prefill(ids)]
        for column in forced.split(1, dim=1):
            logits.append(system.decode(column).clone())
        found[name] = torch.stack(logits, dim=1).double()
    exact = copy.deepcopy(model).double()
    wanted = exact(input_ids=torch.cat([ids, forced], dim=1), use_cache=False, logits_to_keep=9).logits
    errors = {name: float((each - wanted).norm() / wanted.norm()) for name, each in found.items()}
    print(f"relative errors in {DTYPE}: {errors}", flush=True)
    ratio = errors["ours"] / errors["hf"]
    if not ratio <= ERROR:
        raise SystemExit(f"wrong logits: an error {ratio:.2f} times that of Hugging Face; no speed is measured.")
    yield Row("error_over_hf_bf16", ratio, errors["hf"], ERROR, 9, at_most=True)


@torch.no_grad()
def compare_with_eager(name: str, ours: Ours) -> None:
    """Compare two steps with those of the same program run operator by operator; refuse to time what is wrong."""
    eager = EagerSession(ours.session.program)
    cache = eager.new_cache(ours.workload.batch, ours.cache.capacity)
    cache.buffers = {key: buffer.clone() for key, buffer in ours.cache.buffers.items()}
    cache.lengths = ours.cache.lengths.clone()
    token = torch.full_like(ours.row, 7)
    for _ in range(2):  # the second one is a replay with other lengths
        position = ours.position
        wanted = eager.step(token, position, ours.one, ours.row, cache)[:, 0].double()
        cache.advance(ours.one)
        given = ours.decode(token).double()
        error = float((given - wanted).norm() / wanted.norm())
        if not error <= 0.1:  # 32 layers in bfloat16 differ by their rounding
            raise SystemExit(f"{name}: logits differ from the program's by {error:.1e}; no speed is measured.")
    print(f"{name}: differs by {error:.1e} from the program run operator by operator", flush=True)
