"""The CUDA target. What is lowered and how buffers are kept is the same on a CPU; most tests leave Inductor out."""

from __future__ import annotations

import copy
import gc
import threading
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import LlamaConfig, LlamaForCausalLM

from skipstone import QuantizeKV, SkipFFNAdaptive, SkipSublayers
from skipstone.errors import InvalidInput, Unsupported, UserError
from skipstone.ir.capture.huggingface import capture_huggingface
from skipstone.ir.dialect import CACHED_ATTENTION, EXPERTS, GATE, PREDICATED_LINEAR, SKIP_PREDICATE
from skipstone.ir.experts import Activation, Layout, experts_reference
from skipstone.ir.program import Program, Role
from skipstone.optimize import optimize
from skipstone.plan import Plan
from skipstone.rewrite import rewrite
from skipstone.runtime.cache import KVCache
from skipstone.runtime.eager import EagerSession
from skipstone.runtime.executable import Executable
from skipstone.runtime.triton import cache as pools
from skipstone.runtime.triton import compiled
from skipstone.runtime.triton.experts import gathered_experts
from skipstone.runtime.triton.lower import _PLAIN, TWIN, check_kernels, decode_graph, lower
from skipstone.runtime.triton.session import TritonSession
from tests import models

pytestmark = pytest.mark.usefixtures("one_thread")

PLANS = {
    "plain": Plan([]),
    "skipped": Plan([SkipSublayers(layers=(1,), ffn=(0,))]),
    "quantized": Plan([QuantizeKV(k="int8", v="fp8", granularity="token", residual=4, sinks=2, condition=False)]),
    "adaptive": Plan([SkipFFNAdaptive(threshold=0.6, cold_start=0, cold_end=0, warmup_tokens=1, max_share=1.0)]),
}


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run lowered graphs as they are, without Inductor."""
    monkeypatch.setattr(compiled.torch, "compile", lambda module, **_options: module)


@cache
def rewritten(name: str, plan: str = "plain") -> Program:
    program, refusal = rewrite(models.program(name), PLANS[plan], target="triton")
    assert refusal is None
    return program


def both(program: Program) -> tuple[Any, Any]:
    """The executables of a program on this target and on the eager one."""
    return Executable(TritonSession(program), target="triton"), Executable(EagerSession(program))


def assert_close(given: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> None:
    error = (given - wanted).abs().max() / (wanted.max() - wanted.min())
    assert error <= tolerance, f"off by {error:.1e} of the range"


def prompt(batch: int, length: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Tokens, and a mask that pads every second sequence on the left."""
    ids = models.tokens(batch, length, seed)
    mask = torch.ones_like(ids)
    mask[1::2, : length // 2] = 0
    return ids, mask


def assert_same_steps(ours: Any, eager: Any, batch: int, length: int, seed: int = 0, tolerance: float = 1e-5) -> None:
    """A prompt, then steps of one token, several, and one again; logits and what is in the caches."""
    ids, mask = (each.to(ours.device) for each in prompt(batch, length, seed))
    given, mine = ours.prefill(ids, mask)
    wanted, other = eager.prefill(ids, mask)
    assert_close(given, wanted, tolerance)
    for number, columns in enumerate((1, 1, 3, 1)):
        more = models.tokens(batch, columns, seed + 10 + number).to(ours.device)
        assert_close(ours.decode(more, mine), eager.decode(more, other), tolerance)
    assert torch.equal(mine.lengths, other.lengths)
    for name, buffer in other.buffers.items():
        if buffer.is_floating_point() and buffer.shape[2] == other.capacity:
            for row, rows in enumerate(other.lengths.tolist()):
                assert_close(mine.buffers[name][row, :, :rows], buffer[row, :, :rows], tolerance)


# ------------------------------------------------------------------------------------------------------------- lowering


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.usefixtures("uncompiled")
def test_plans_give_what_the_eager_target_gives(plan: str, batch: int) -> None:
    assert_same_steps(*both(rewritten("llama", plan)), batch, length=7)


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "gpt_oss"])
@pytest.mark.usefixtures("uncompiled")
def test_models_give_what_the_eager_target_gives(name: str) -> None:
    ours, eager = both(rewritten(name))
    for batch in (1, 3):
        assert_same_steps(ours, eager, batch, length=12)


def test_caches_are_written_in_place_and_nothing_else_changes() -> None:
    program = rewritten("llama")
    lowered = lower(program)
    assert not any(True for _ in lowered.nodes(CACHED_ATTENTION)) and len(list(lowered.nodes(TWIN))) == 3
    assert [port.name for port in lowered.outputs] == ["logits"] and lowered.inputs == program.inputs
    assert len(list(program.nodes(CACHED_ATTENTION))) == 3, "the program itself was changed"
    for name, tensor in lowered.tensors().items():
        assert tensor is program.tensor(name)


def test_gates_become_linear_layers_that_obey() -> None:
    program = rewritten("llama", "adaptive")
    assert any(True for _ in program.nodes(PREDICATED_LINEAR)) and not any(True for _ in program.nodes(GATE))


def test_plain_forms_are_their_operators() -> None:
    before, after, other = torch.randn(3, 2, 5, 8)
    skip, start, decode_start = torch.rand(2, 5) < 0.5, torch.tensor([3, 0]), torch.tensor([4, 2])
    calls: dict[Any, Any] = {
        GATE: ((other, skip), {}),
        SKIP_PREDICATE: ((before, after, start, decode_start, skip), {"threshold": 0.0, "warmup_tokens": 1}),
    }
    for operator, (operands, options) in calls.items():
        assert torch.equal(_PLAIN[operator](*operands, **options), operator(*operands, **options))


def test_single_tokens_find_their_experts_on_the_device() -> None:
    lowered = lower(rewritten("gpt_oss"))
    assert any(True for _ in lowered.nodes(EXPERTS)), "a prompt has too many tokens for that"
    assert not any(node.target is EXPERTS for node in decode_graph(lowered).nodes)


def test_a_bias_of_the_logits_through_a_cache_is_refused() -> None:
    program = rewritten("llama").copy()
    node = next(program.nodes(CACHED_ATTENTION))
    node.args = (*node.args[:6], node.args[0], *node.args[7:])
    with pytest.raises(Unsupported, match="a bias of the logits through a KV cache on this target at model"):
        lower(program)


def test_what_the_kernels_lack_is_refused_before_anything_is_compiled() -> None:
    pytest.importorskip("triton", reason="needs triton")
    lowered = lower(rewritten("llama"))
    check_kernels(lowered)
    for operand in next(lowered.nodes(TWIN)).args[:3]:
        operand.meta["val"] = operand.meta["val"].double()  # type: ignore[union-attr]
    with pytest.raises(
        Unsupported, match=r"queries, keys and values of torch\.float64.* at model\.layers\.0\.self_attn"
    ):
        check_kernels(lowered)


def test_a_model_on_the_cpu_is_refused() -> None:
    with pytest.raises(Unsupported, match=r"the triton target for a model on cpu\. Move it to cuda first"):
        optimize(models.model("llama"), target="triton", progress=False)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("layout", Layout)
def test_gathered_experts_are_the_experts(layout: Layout, transposed: bool) -> None:
    count, width, inner, rows = 5, 6, 4, 7
    wide = inner if layout == Layout.UNGATED else 2 * inner
    up, down = torch.randn(count, wide, width).double(), torch.randn(count, width, inner).double()
    if transposed:
        up, down = up.mT.contiguous(), down.mT.contiguous()
    index = torch.randint(-1, count + 1, (rows, 3))
    operands = (torch.randn(rows, width).double(), index, torch.rand(rows, 3).double(), up, down)
    biases = torch.randn(count, wide).double(), torch.randn(count, width).double()
    for given in ((), biases):
        options: Any = {"activation": Activation.SWISH, "layout": layout, "alpha": 1.7, "limit": 0.9, "shift": 0.5}
        mine, wanted = (
            form(*operands, *given, **options, transposed=transposed) for form in (gathered_experts, experts_reference)
        )
        torch.testing.assert_close(mine, wanted, rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------------------------------------------ compiled graphs


@pytest.fixture(scope="module")
def inductor() -> Iterator[Any]:
    """An executable that has been compiled for two sequences: prompts, single tokens, and several tokens."""
    ours, eager = both(rewritten("llama", "skipped"))
    assert_same_steps(ours, eager, batch=2, length=7)
    yield ours, eager


def test_compiled_steps_are_never_compiled_again(inductor: Any) -> None:
    graphs = counters["stats"]["unique_graphs"]
    with torch.compiler.set_stance("fail_on_recompile"):
        assert_same_steps(*inductor, batch=2, length=12, seed=1)
        assert_same_steps(*inductor, batch=2, length=40, seed=2)
    assert counters["stats"]["unique_graphs"] == graphs


def test_generate_is_that_of_the_model(inductor: Any) -> None:
    ours, eager = inductor
    ids, mask = prompt(2, 9)
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(ours.generate(ids, **options), eager.generate(ids, **options))


def test_buffers_stay_where_they_are(inductor: Any) -> None:
    ours, _ = inductor
    _, filled = ours.prefill(*prompt(2, 5))
    before = {name: (buffer, buffer.data_ptr(), buffer.clone()) for name, buffer in filled.buffers.items()}
    for column in models.tokens(2, 4).split(1, dim=1):
        ours.decode(column, filled)
    for name, (buffer, address, content) in before.items():
        assert filled.buffers[name] is buffer and buffer.data_ptr() == address
        assert not torch.equal(buffer, content), "nothing was written"


def test_a_size_of_one_is_compiled_apart_and_others_are_not() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = rewritten("llama").input(Role.TOKENS).meta["val"]  # type: ignore[union-attr]
    graph.output((graph.call_function(torch.add, (x, 1)),))
    each = compiled.CompiledGraph(graph, {})
    before = counters["stats"]["unique_graphs"]
    for shape in ((1, 1), (1, 5), (1, 9), (2, 5), (7, 3), (2, 2), (1, 1)):
        assert torch.equal(each([torch.zeros(shape)])[0], torch.ones(shape))
    assert counters["stats"]["unique_graphs"] - before == 3


# --------------------------------------------------------------------------------------------------- buffers over again


def pool() -> pools.Pool:
    return TritonSession(rewritten("llama"))._pool


def places(filled: KVCache) -> set[int]:
    return {buffer.data_ptr() for buffer in filled.buffers.values()}


def test_buffers_are_used_again_once_nobody_has_them() -> None:
    mine = pool()
    first, second = mine.new_cache(2, 20), mine.new_cache(2, 300)
    assert (first.capacity, second.capacity) == (pools.STEP, 2 * pools.STEP)
    assert not places(first) & places(mine.new_cache(2, 20)), "two caches have the same buffers"
    for buffer in first.buffers.values():
        buffer.fill_(float("nan"))
    before, twin = places(first), copy.copy(first)
    del first
    assert places(mine.new_cache(2, 20)) != before, "a copy still has them"
    del twin
    gc.collect()
    assert places(mine.new_cache(1, 20)) != before, "the batch is another"
    again = mine.new_cache(2, 20)
    assert places(again) == before and not any(buffer.any() for buffer in again.buffers.values())
    assert not places(mine.new_cache(2, 20)) & before, "the same buffers were leased twice"


def test_few_buffers_are_kept_idle() -> None:
    mine = pool()
    caches = [mine.new_cache(1, pools.STEP * (1 + number)) for number in range(4)]
    del caches
    gc.collect()
    assert len(mine._idle) == pools.IDLE


@pytest.mark.usefixtures("uncompiled")
def test_steps_are_made_once_for_each_set_of_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    from skipstone.runtime.triton import session as sessions

    made = []

    class Counted(sessions.StaticStep):
        def __init__(self, step: Any, values: Any, *others: Any) -> None:
            made.append(values["input_ids"].shape)
            super().__init__(step, values, *others)

    monkeypatch.setattr(sessions, "StaticStep", Counted)
    ours, eager = both(rewritten("llama"))
    for _ in range(2):
        assert_same_steps(ours, eager, batch=2, length=7)
        assert made == [(2, 1)]
    ids = models.tokens(2, 7)
    options = {"num_beams": 3, "max_new_tokens": 20, "do_sample": False}
    assert torch.equal(ours.generate(ids, **options), eager.generate(ids, **options))
    assert len(made) <= 3, "beams move between the same buffers"


def tokens_one_by_one(ours: Any, tokens: Tensor, filled: KVCache, count: int) -> Tensor:
    """What `decode` of the session gives, by steps whose logits are read."""
    chosen = []
    for _ in range(count):
        tokens = ours.decode(tokens, filled)[:, -1].argmax(dim=-1, keepdim=True)
        chosen.append(tokens)
    return torch.cat(chosen, dim=1)


def assert_decodes(ours: Any, batch: int, counts: tuple[int, ...]) -> None:
    """The session's own choice of tokens is that of steps, a second time too, and mixes with steps."""
    ids, mask = (each.to(ours.device) for each in prompt(batch, 9))
    _, mine = ours.prefill(ids, mask)
    _, other = ours.prefill(ids, mask)
    tokens = ids[:, -1:]
    for count in counts:
        given = ours.session.decode(tokens, mine.lengths.unsqueeze(1), mine, count)
        assert torch.equal(given, tokens_one_by_one(ours, tokens, other, count))
        assert torch.equal(mine.lengths, other.lengths)
        tokens = given[:, -1:]
        assert torch.equal(ours.decode(tokens, mine), ours.decode(tokens, other))


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.usefixtures("uncompiled")
def test_a_session_chooses_the_tokens_that_steps_would(plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("skipstone.runtime.triton.session.MOST", 4)
    ours, _ = both(rewritten("llama", plan))
    for batch in (1, 2):
        assert_decodes(ours, batch, (1, 4, 6))
    _, full = ours.prefill(models.tokens(1, 9))
    with pytest.raises(InvalidInput, match="309 rows in a cache"):
        ours.session.decode(models.tokens(1, 1), full.lengths.unsqueeze(1), full, 300)


@pytest.mark.usefixtures("uncompiled")
def test_a_cache_that_grows_or_is_loaded_goes_on(tmp_path: Any) -> None:
    ours, eager = both(rewritten("llama"))
    ids, mask = prompt(2, 7)
    (_, mine), (_, other) = ours.prefill(ids, mask), eager.prefill(ids, mask)
    more = models.tokens(2, 4).split(1, dim=1)
    assert_close(ours.decode(more[0], mine), eager.decode(more[0], other))
    mine.grow(600)
    assert_close(ours.decode(more[1], mine), eager.decode(more[1], other))
    mine.save(tmp_path / "cache")
    mine = ours.load_cache(tmp_path / "cache")
    assert_close(ours.decode(more[2], mine), eager.decode(more[2], other))
    for each in (mine, other):
        each.crop(torch.tensor([5, 2]))
    assert_close(ours.decode(more[3], mine), eager.decode(more[3], other))


@pytest.mark.usefixtures("uncompiled")
def test_two_caches_at_the_same_time() -> None:
    ours, eager = both(rewritten("llama"))
    pairs = []
    for seed in range(2):
        ids = models.tokens(2, 5 + seed, seed)
        pairs.append((ours.prefill(ids)[1], eager.prefill(ids)[1]))
    for column in models.tokens(2, 4, 9).split(1, dim=1):
        for mine, other in pairs:
            assert_close(ours.decode(column, mine), eager.decode(column, other))


def test_a_deep_copy_leaves_recorded_steps_behind() -> None:
    mine = pool()
    filled = mine.new_cache(2, 20)
    mine.settle(filled).steps["graphs"] = threading.Lock()  # as little to be copied as a CUDA graph
    other = copy.deepcopy(filled)
    assert not places(other) & places(filled)
    assert not mine.settle(other).steps and mine.settle(filled).steps


def test_the_room_in_a_cache_is_known_without_its_lengths() -> None:
    filled = pool().new_cache(2, 20)
    assert filled.has_room(256) and not filled.has_room(257)
    filled.stepped = 200
    filled.advance(torch.tensor([200, 150]))

    class Refusing(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            raise AssertionError(f"{func} was called")

    with Refusing():
        assert filled.has_room(56)
    assert not filled.has_room(57)
    filled.crop(100)
    assert filled.has_room(156) and not filled.has_room(157)
    filled.advance(torch.tensor([7, 3]))  # rows that no step has announced
    assert filled.has_room(149) and not filled.has_room(150)


@pytest.mark.usefixtures("uncompiled")
def test_a_full_cache_is_refused() -> None:
    ours, _ = both(rewritten("llama"))
    filled = ours.session.new_cache(2, 20)
    columns = torch.zeros(2, 300, dtype=torch.int64)
    one = torch.ones(2, dtype=torch.int64)
    with pytest.raises(InvalidInput, match="300 rows in a cache with room for 256"):
        ours.session.step(columns, columns, 300 * one, columns[:, :1], filled)


# --------------------------------------------------------------------------------------------------------- on a device


@cache
def on_device(plan: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """Executables of a model on the GPU: this target, and the eager one."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=models.VOCABULARY, hidden_size=128, intermediate_size=192, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, max_position_embeddings=512, initializer_range=0.2,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval().to("cuda", dtype)
    program, refusal = rewrite(capture_huggingface(model), PLANS[plan], target="triton")
    assert refusal is None
    return both(program)


GPU_PLANS = ("plain", "quantized", "adaptive")


def test_tuning_is_asked_for_where_something_can_be_tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    given = []
    monkeypatch.setattr(compiled.torch, "compile", lambda module, **options: given.append(options["options"]) or module)
    for is_tuned in (False, True):
        TritonSession(rewritten("llama"), is_tuned=is_tuned).run(
            {"input_ids": models.tokens(1, 3), "position_ids": torch.arange(3)[None], "logit_rows": torch.tensor([[2]]),
             "start": torch.zeros(1, dtype=torch.int64),
             **{f"{name}_{slot}": torch.zeros(1, 2, 8, 8) for slot in range(3) for name in ("key", "value")}}
        )  # fmt: skip
    assert given == [{}, {"max_autotune": True, "coordinate_descent_tuning": True}]
    with pytest.raises(UserError, match="mode='max-autotune' for the target 'eager', which has nothing to tune"):
        optimize(models.model("llama"), target="eager", mode="max-autotune", progress=False)
    with pytest.raises(UserError, match="mode is 'fast', expected 'default' or 'max-autotune'"):
        optimize(models.model("llama"), target="eager", mode="fast", progress=False)  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.parametrize("plan", GPU_PLANS)
def test_graphs_give_what_the_eager_target_gives(plan: str) -> None:
    ours, eager = on_device(plan, torch.float32)
    tolerance = 2e-2 if plan == "quantized" else 2e-3  # a code of 8 bits may differ by one
    for length in (7, 40):
        assert_same_steps(ours, eager, batch=2, length=length, tolerance=tolerance)


@pytest.mark.gpu
def test_half_precision_on_a_device() -> None:
    assert_same_steps(*on_device("plain", torch.bfloat16), batch=1, length=33, tolerance=3e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("plan", GPU_PLANS)
def test_a_decode_step_never_waits_for_the_device(plan: str) -> None:
    ours, _ = on_device(plan, torch.float32)
    ids = models.tokens(2, 7).to("cuda")
    _, filled = ours.prefill(ids)
    ours.decode(ids[:, :1], filled)  # captures
    one, row = torch.ones(2, dtype=torch.int64, device="cuda"), torch.zeros(2, 1, dtype=torch.int64, device="cuda")
    filled.has_room(1)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            logits = ours.session.step(ids[:, 1:2], filled.lengths.unsqueeze(1), one, row, filled)
            filled.advance(one)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert logits.isfinite().all() and filled.lengths.tolist() == [11, 11]


@pytest.mark.gpu
@pytest.mark.parametrize("plan", GPU_PLANS)
def test_graphs_choose_the_tokens_that_steps_would(plan: str) -> None:
    """Bit for bit: they are the same kernels."""
    ours, _ = on_device(plan, torch.float32)
    for batch in (1, 2):
        assert_decodes(ours, batch, (1, 3, 70))


@pytest.mark.gpu
def test_graphs_are_captured_once_for_each_set_of_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, eager = on_device("plain", torch.float32)
    assert_same_steps(ours, eager, batch=2, length=7, tolerance=2e-3)  # compiles, unless another test has done so
    gc.collect()
    ours.session._pool._idle.clear()
    captured = []
    real = torch.cuda.CUDAGraph
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: captured.append(None) or real())  # type: ignore[func-returns-value]
    with torch.compiler.set_stance("fail_on_recompile"):
        for seed in range(3):
            assert_same_steps(ours, eager, batch=2, length=9 + seed, seed=seed, tolerance=2e-3)
    assert len(captured) == 1


@pytest.mark.gpu
def test_a_thousand_tokens_behind_many_prompts_compile_once_and_never_wait() -> None:
    ours, _ = on_device("plain", torch.float32)

    def tokens(length: int, count: int) -> Tensor:
        logits, cache = ours.prefill(models.tokens(1, length).to("cuda"))
        one, row = torch.ones(1, dtype=torch.int64, device="cuda"), torch.zeros(1, 1, dtype=torch.int64, device="cuda")
        with record_function("decoding"):
            for _ in range(count):
                token = logits.reshape(1, -1).argmax(dim=-1, keepdim=True)
                logits = ours.session.step(token, cache.lengths.unsqueeze(1), one, row, cache)
                cache.advance(one)
        return logits

    tokens(3, 2)  # compiles
    with torch.compiler.set_stance("fail_on_recompile"):
        for length in range(2, 42):
            assert tokens(length, 25).isfinite().all()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
            tokens(9, 20)
    events = list(profiled.events())
    span = next(each.time_range for each in events if each.name == "decoding")
    within = [each.name for each in events if span.start <= each.time_range.start < span.end]
    assert any("GraphLaunch" in name for name in within), set(within)
    assert not [name for name in within if "Synchronize" in name or "DtoH" in name]


@pytest.mark.gpu
def test_generate_on_a_device_is_that_of_the_eager_target() -> None:
    ours, eager = on_device("plain", torch.float32)
    ids, mask = (each.to("cuda") for each in prompt(2, 9))
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    assert torch.equal(ours.generate(ids, **options), eager.generate(ids, **options))


@pytest.mark.gpu
def test_auto_takes_this_target_on_a_device() -> None:
    _, eager = on_device("plain", torch.float32)
    assert eager.device.type == "cuda"
    model = copy.deepcopy(models.model("llama")).to("cuda")
    assert optimize(model, progress=False).target == "triton"
