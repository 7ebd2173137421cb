"""Skipping by prompt: every sequence reads its prompt in full, and goes on without what its prompt chose."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, pad
from transformers import DynamicCache

from skipstone import Plan, QuantizeKV, SkipByPrompt, SkipFFNAdaptive, SkipSublayers, optimize
from skipstone.errors import ArtifactError, InvalidInput, InvalidPlan, Unsupported
from skipstone.ir.capture.huggingface import capture_huggingface
from skipstone.ir.dialect import CACHED_OPS, PROMPT_MEAN, PROMPT_TURN, prompt_mean, prompt_turn
from skipstone.ir.printer import readable
from skipstone.ir.program import Program, Role
from skipstone.ir.stream import SublayerKind, find_stream
from skipstone.ir.verify import verify
from skipstone.passes.skip_by_prompt import BIAS, CENTROIDS, WEIGHT
from skipstone.rewrite import rewrite
from skipstone.runtime.by_prompt import PromptSession
from skipstone.runtime.eager import EagerSession
from skipstone.runtime.executable import Executable, Layout
from skipstone.runtime.grouped_cache import UNDECIDED, GroupedCache
from skipstone.runtime.onnx.session import OnnxSession
from tests import models

PROMPT, LENGTH, BATCH = 6, 12, 4
FLOAT64 = 1e-9
"""Largest difference of float64 logits, over their range."""
SETS = (SkipSublayers(attention=(1,)), SkipSublayers(), SkipSublayers(ffn=(0, 2)), SkipSublayers(layers=(0,)))
NAMES = ["llama", "gemma2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gpt2", "gpt_neox", "mixtral"))]
PARTS = {
    "llama": ("layers", "self_attn", "mlp"),
    "mixtral": ("layers", "self_attn", "mlp"),
    "gpt2": ("h", "attn", "mlp"),
    "gpt_neox": ("layers", "attention", "mlp"),
    "gemma2": ("layers", "post_attention_layernorm", "post_feedforward_layernorm"),
}
"""Of each kind of model: its layers, and the modules whose results are added to the stream."""


pytestmark = pytest.mark.usefixtures("one_thread")


# ------------------------------------------------------------------------------------------ the oracle: hooks, no graph


@contextmanager
def without(model: Any, entry: SkipSublayers) -> Iterator[None]:
    """The Hugging Face model with the results of some sublayers cleared."""
    stack, *names = PARTS[model.config.model_type]
    layers, handles = getattr(model.base_model, stack), []
    for name, chosen in zip(names, (entry.attention, entry.ffn), strict=True):
        for number in (*chosen, *entry.layers):
            handles.append(getattr(layers[number], name).register_forward_hook(cleared))
    yield
    for handle in handles:
        handle.remove()


def cleared(_module: nn.Module, _args: Any, out: Any) -> Any:
    """Zeros in place of what is added to the stream."""
    return (torch.zeros_like(out[0]), *out[1:]) if isinstance(out, tuple) else torch.zeros_like(out)


@torch.no_grad()
def expected(model: Any, ids: Tensor, entry: SkipSublayers, prompt: int = PROMPT) -> Tensor:
    """Logits [S - prompt + 1, V] of the prompt's last token and of those behind it, for ids [S], token by token."""
    past = DynamicCache(config=model.config)
    rows = [model(input_ids=ids[None, :prompt], past_key_values=past).logits[0, -1]]
    with without(model, entry):
        for at in range(prompt, len(ids)):
            rows.append(model(input_ids=ids[None, [at]], past_key_values=past).logits[0, -1])
    return torch.stack(rows)


@torch.no_grad()
def turns(name: str, ids: Tensor) -> Tensor:
    """float64 [sublayers]: mean 1 - cosine of each sublayer over ids [S], from the model's own modules."""
    model = hugging_face(name)
    stack, *names = PARTS[name]
    results: list[Tensor] = []
    states: list[Tensor] = []

    def note(_module: nn.Module, _args: Any, out: Any) -> None:
        results.append((out[0] if isinstance(out, tuple) else out)[0])

    handles = [
        getattr(layer, name).register_forward_hook(note) for layer in getattr(model.base_model, stack) for name in names
    ]
    layers = getattr(model.base_model, stack)
    handles += [layer.register_forward_pre_hook(lambda _, args: states.append(args[0][0])) for layer in layers]
    model(input_ids=ids[None])
    for handle in handles:
        handle.remove()
    found = []
    for state, attention, ffn in zip(states, results[::2], results[1::2], strict=True):
        middle = state if name == "gpt_neox" else state + attention
        found += [1 - cosine_similarity(state, state + attention, dim=-1).mean()]
        found += [1 - cosine_similarity(middle, middle + ffn, dim=-1).mean()]
    return torch.stack(found)[order(name)].double()


def order(name: str) -> list[int]:
    """For each sublayer of the program, its place among attention 0, FFN 0, attention 1, ..."""
    return [2 * each.layer + (each.kind is SublayerKind.FFN) for each in find_stream(captured(name)).sublayers]


# --------------------------------------------------------------------------------------------------- what is under test


EXACT = {"gemma2": torch.float32}
"""The dtype that a model is tested in, where it does not compute in float64 throughout."""


@cache
def hugging_face(name: str, dtype: torch.dtype | None = None) -> Any:
    other = copy.deepcopy(models.model(name)).to(dtype or EXACT.get(name, torch.float64))
    other.set_experts_implementation("eager")  # transformers' faster form has no float64
    return other


@cache
def captured(name: str, dtype: torch.dtype | None = None) -> Program:
    dtype = dtype or EXACT.get(name, torch.float64)
    return models.program(name) if dtype == torch.float32 else capture_huggingface(hugging_face(name, dtype))


@cache
def batch() -> Tensor:
    return models.tokens(BATCH, LENGTH, seed=5)


@cache
def centroids(name: str) -> Tensor:
    """The prompts of the batch themselves: each row chooses the set of its own number."""
    return torch.stack([turns(name, row[:PROMPT]) for row in batch()])


def plan(name: str, *further: Any, sets: Sequence[SkipSublayers] = SETS) -> Plan:
    return Plan([SkipByPrompt(tuple(sets)), *further], tensors={CENTROIDS: centroids(name)[: len(sets)]})


def build(plan: Plan, name: str, dtype: torch.dtype | None = None, **options: Any) -> Executable:
    program, _ = rewrite(captured(name, dtype), plan, target="eager", **options)
    return Executable(PromptSession(EagerSession(program), [EagerSession(part) for part in program.continuations]))


@cache
def executable(name: str) -> Any:
    return build(plan(name), name)


def decoded(opt: Any, ids: Tensor, mask: Tensor | None = None, chunk: int = 1, prompt: int = PROMPT) -> Tensor:
    """Logits [B, S - prompt + 1, V] of the prompt's last token and those behind, so many at a time."""
    first, cache = opt.prefill(ids[:, :prompt], mask)
    rest = [opt.decode(part, cache) for part in ids[:, prompt:].split(chunk, dim=1)]
    return torch.cat([first.unsqueeze(1), *rest], dim=1)


def oracle(name: str, sets: Sequence[SkipSublayers] = SETS) -> Tensor:
    return torch.stack(
        [expected(hugging_face(name), row, sets[number % len(sets)]) for number, row in enumerate(batch())]
    )


def assert_close(given: Tensor, wanted: Tensor, within: float = FLOAT64) -> None:
    spread = float(wanted.max() - wanted.min())
    assert float((given - wanted).abs().max()) <= within * spread


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("chunk", [1, 3, LENGTH])
def test_each_row_goes_on_without_what_its_prompt_chose(name: str, chunk: int) -> None:
    within = 1e-5 if name in EXACT else FLOAT64
    assert_close(decoded(executable(name), batch(), chunk=chunk), oracle(name), within)


def test_the_choice_falls_at_the_nearest_centroid() -> None:
    ids = models.tokens(32, PROMPT, seed=9)
    opt = executable("llama")
    _, kept = opt.prefill(ids)
    away = torch.cdist(torch.stack([turns("llama", row) for row in ids]), centroids("llama"))
    best, second = away.topk(2, largest=False).values.unbind(1)
    clear = second - best > 1e-9
    assert clear.all()
    assert kept.choice.tolist() == away.argmin(1).tolist()
    assert len(set(kept.choice.tolist())) >= 3


ROUTERS = {"llama": 0, "gpt_neox": 0}
"""Seeds of routers by which the prompts of the batch choose different sets."""


@pytest.mark.parametrize("name", ["llama", pytest.param("gpt_neox", marks=pytest.mark.slow)])
def test_routers_take_the_most_probable_set(name: str) -> None:
    program = captured(name)
    width = int(find_stream(program).entry.meta["val"].shape[-1])
    generator = torch.Generator().manual_seed(ROUTERS[name])
    weight = torch.randn(6, width, generator=generator, dtype=torch.float64)
    bias = torch.linspace(-0.5, 0.5, 6, dtype=torch.float64)
    tensors = {WEIGHT: weight, BIAS: bias}
    opt: Any = build(Plan([SkipByPrompt(SETS, by="routers")], tensors=tensors), name)
    states: list[Tensor] = []
    stack, attention, _ = PARTS[name]
    for row in batch():
        layers = getattr(hugging_face(name).base_model, stack)
        inputs: list[Tensor] = []
        handles = [
            layer.register_forward_pre_hook(lambda _, args, to=inputs: to.append(args[0][0])) for layer in layers
        ]
        handles += [
            getattr(layer, attention).register_forward_hook(lambda _, args, out, to=inputs: to.append(out[0][0]))
            for layer in layers
        ]
        hugging_face(name)(input_ids=row[None, :PROMPT])
        for handle in handles:
            handle.remove()
        streams = []
        for before, out in zip(inputs[::2], inputs[1::2], strict=True):
            streams += [before, before if name == "gpt_neox" else before + out]
        unit = [x / x.square().mean(-1, keepdim=True).sqrt() for x in streams]
        states.append(torch.stack([each.mean(0) for each in unit])[order(name)])
    logits = (torch.stack(states) * weight).sum(-1) + bias
    probability = logits.sigmoid()
    gone = torch.tensor([[0, 0, 1, 0, 0, 0], [0] * 6, [0, 1, 0, 0, 0, 1], [1, 1, 0, 0, 0, 0]], dtype=torch.bool)
    gone = gone[:, order(name)]
    likely = torch.where(gone, probability.unsqueeze(1), 1 - probability.unsqueeze(1)).log().sum(-1)
    _, kept = opt.prefill(batch()[:, :PROMPT])
    assert kept.choice.tolist() == likely.argmax(1).tolist()
    assert len(set(kept.choice.tolist())) > 1
    chosen = [SETS[number] for number in kept.choice.tolist()]
    assert_close(decoded(opt, batch()), oracle(name, chosen))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_neither_the_choice_nor_the_logits(side: str) -> None:
    ids, lengths = batch(), [PROMPT, PROMPT - 2, PROMPT - 1, PROMPT - 3]
    opt = executable("llama")
    tokens, mask = torch.zeros(BATCH, PROMPT, dtype=torch.int64), torch.zeros(BATCH, PROMPT, dtype=torch.int64)
    for number, length in enumerate(lengths):
        where = slice(PROMPT - length, None) if side == "left" else slice(length)
        tokens[number, where], mask[number, where] = ids[number, :length], 1
    first, kept = opt.prefill(tokens, mask)
    rest = opt.decode(ids[:, PROMPT:], kept)
    for number, length in enumerate(lengths):
        alone, cache = opt.prefill(ids[[number], :length])
        assert cache.choice.tolist() == [int(kept.choice[number])]
        assert_close(first[number], alone[0])
        assert_close(rest[number], opt.decode(ids[[number], PROMPT:], cache)[0])


def test_an_empty_set_is_the_full_model() -> None:
    opt = build(Plan([SkipByPrompt((SkipSublayers(),))]), "llama")
    full = Executable(EagerSession(rewrite(captured("llama"), Plan(), target="eager")[0]))
    assert torch.equal(decoded(opt, batch()), decoded(full, batch()))
    assert torch.equal(opt(input_ids=batch()).logits, full(input_ids=batch()).logits)


def test_one_set_chooses_nothing() -> None:
    opt: Any = build(Plan([SkipByPrompt((SETS[2],))]), "llama")
    assert opt.program.output(Role.CHOICE) is None
    assert not any(opt.program.nodes(PROMPT_TURN, PROMPT_MEAN))
    assert_close(decoded(opt, batch()), oracle("llama", SETS[2:3]))


def test_layers_are_those_of_the_original_model() -> None:
    both = (SkipSublayers(layers=(1,)), SkipByPrompt((SkipSublayers(ffn=(2,)),)))
    opt = build(Plan(both), "llama")
    with without(hugging_face("llama"), SkipSublayers(layers=(1,))):
        wanted = torch.stack([expected(hugging_face("llama"), row, SkipSublayers(ffn=(2,))) for row in batch()])
    assert_close(decoded(opt, batch()), wanted)
    with pytest.raises(InvalidPlan, match="layer 1 has no ffn"):
        build(Plan([both[0], SkipByPrompt((SkipSublayers(ffn=(1,)),))]), "llama")


def test_the_programs() -> None:
    program = executable("llama").program
    assert sum(1 for _ in program.nodes(PROMPT_TURN)) == 6
    assert program.output(Role.CHOICE) is not None
    assert [part.slots() for part in program.continuations] == [(0, 2), (0, 1, 2), (0, 1, 2), (1, 2)]
    assert [sum(1 for _ in part.nodes(*CACHED_OPS)) for part in program.continuations] == [2, 3, 3, 2]
    weights = [part.weight_bytes() for part in program.continuations]
    assert weights[1] > max(weights[0], weights[2], weights[3])
    for part in (program, *program.continuations):
        verify(part)
    assert "skipstone.prompt_turn" in readable(program)
    names = [set(part.tensors()) for part in program.continuations]
    shared = names[0] & names[1]
    assert shared
    assert all(program.continuations[0].tensor(each).data_ptr() == program.tensor(each).data_ptr() for each in shared)


def test_keys_and_values_that_nothing_reads_are_freed() -> None:
    opt = executable("llama")
    _, kept = opt.prefill(batch()[:, :PROMPT])
    held = {number: set(group.cache.buffers) for number, group in kept.groups.items()}
    assert held[0] == {"key_0", "value_0", "key_2", "value_2"}
    assert held[3] == {"key_1", "value_1", "key_2", "value_2"}
    one = 2 * 2 * 8 * 8 * kept.capacity  # keys and values of two heads of 8 in float64
    assert kept.nbytes == (2 + 3 + 3 + 2) * one
    _, alone = opt.prefill(batch()[:1, :PROMPT])
    whole = opt.new_cache(1, PROMPT)
    assert alone.nbytes * 3 == whole.nbytes * 2


@pytest.mark.parametrize("form", ["int8", pytest.param("int4", marks=pytest.mark.slow)])
def test_quantized_caches_keep_their_scales(form: str) -> None:
    """Prompts are written by one program and read by another: scales must be the same in both."""
    calibration = [models.tokens(2, 16, seed=1)]
    quantize = QuantizeKV(form, form, condition=False)  # type: ignore[arg-type]
    tensors = {CENTROIDS: centroids("llama")}
    options: Any = {"target": "eager", "calibration": calibration, "progress": False}
    with patch.object(import_module("skipstone.optimize"), "capture", lambda *_: captured("llama").copy()):
        mixed = optimize(hugging_face("llama"), Plan([SkipByPrompt(SETS), quantize], tensors=tensors), **options)
        full = decoded(optimize(hugging_face("llama"), Plan([quantize]), **options), batch())
    given = decoded(mixed, batch())
    assert_close(given[1], full[1])  # its set is empty
    exact = oracle("llama")
    spread = float(exact.max() - exact.min())
    errors = (given - exact).abs().amax(dim=(1, 2)) / spread
    reference = float((full - oracle("llama", SETS[1:2])).abs().max()) / spread
    assert 0 < float(errors.max()) < 3 * reference


def test_with_adaptive_ffns_that_never_skip() -> None:
    never = SkipFFNAdaptive(threshold=None, cold_start=0, cold_end=0, max_share=0.5)
    opt = build(plan("llama", never, sets=(SETS[0], SETS[1])), "llama")
    assert_close(decoded(opt, batch()[:2]), oracle("llama")[:2])


def test_with_adaptive_ffns_that_always_skip() -> None:
    always = SkipFFNAdaptive(threshold=-1.0, cold_start=0, cold_end=0, warmup_tokens=0, max_share=1.0)
    opt = build(plan("llama", always, sets=(SETS[0], SETS[1])), "llama")
    entries = SkipSublayers(attention=(1,), ffn=(1, 2)), SkipSublayers(ffn=(1, 2))
    assert_close(decoded(opt, batch()[:2]), oracle("llama", entries)[:2])


@cache
def lowered(name: str = "llama", sets: int = len(SETS)) -> Any:
    """On ONNX Runtime, in float32, with so many of the sets."""
    program, _ = rewrite(captured(name, torch.float32), plan(name, sets=SETS[:sets]), target="onnxruntime")
    return Executable(PromptSession(OnnxSession(program, 1), [OnnxSession(part, 1) for part in program.continuations]))


@pytest.mark.parametrize(
    ("name", "sets"),
    [("llama", 2), *(pytest.param(n, len(SETS), marks=pytest.mark.slow) for n in ("llama", "gpt2", "gpt_neox"))],
)
def test_onnx_runtime_decides_and_decodes_the_same(name: str, sets: int) -> None:
    opt, ids = lowered(name, sets), batch()[:sets]
    _, kept = opt.prefill(ids[:, :PROMPT])
    assert kept.choice.tolist() == list(range(sets))
    for chunk in (1, 4):
        assert_close(decoded(opt, ids, chunk=chunk), oracle(name)[:sets].float(), within=1e-5)


@pytest.mark.slow
def test_generation_is_that_of_each_row_alone() -> None:
    opt = lowered()
    prompts = batch()[:, :PROMPT]
    options: Any = {"max_new_tokens": 8, "min_new_tokens": 8}
    for further in ({"do_sample": False}, {"num_beams": 3}):
        together = opt.generate(prompts, **options, **further)
        alone = torch.cat([opt.generate(row[None], **options, **further) for row in prompts])
        assert together.tolist() == alone.tolist()
    greedy = opt.generate(prompts, **options, do_sample=False)
    for number, row in enumerate(greedy):
        logits = expected(hugging_face("llama"), row, SETS[number])
        assert logits[:-1].argmax(-1).tolist() == row[PROMPT:].tolist()


@pytest.mark.slow  # it is lowered for ONNX Runtime
def test_a_session_is_used_again_without_a_new_binding() -> None:
    opt = lowered()
    ids = batch()[:1]
    _, kept = opt.prefill(ids[:, :PROMPT])
    opt.decode(ids[:, PROMPT], kept)
    (group,) = kept.groups.values()
    binding = group.cache.lease
    assert binding is not None
    opt.decode(ids[:, PROMPT + 1], kept)
    assert group.cache.lease is binding


def test_a_step_that_goes_on_behind_prompts_is_two() -> None:
    opt, lengths = executable("llama"), torch.tensor([PROMPT, PROMPT - 2, PROMPT - 1, PROMPT - 3])
    counts = torch.tensor([LENGTH, PROMPT, PROMPT + 3, PROMPT - 3])
    cache = opt.new_cache(BATCH, LENGTH, spare=0)
    cache.decode_start = lengths
    layout = Layout(LENGTH, counts, None)
    together = opt.advance(batch(), layout, layout.rows(LENGTH), cache=cache)
    assert cache.lengths.tolist() == counts.tolist() and cache.decode_start.tolist() == lengths.tolist()
    after = opt.decode(batch()[:, :2], cache)
    for number, (length, count) in enumerate(zip(lengths.tolist(), counts.tolist(), strict=True)):
        row = batch()[[number], :count]
        alone, kept = opt.prefill(row[:, :length])
        assert_close(together[number, length - 1], alone[0])
        for place in range(length, count):
            assert_close(together[number, place], opt.decode(row[:, place], kept)[0])
        assert_close(after[number], opt.decode(batch()[[number], :2], kept)[0])


@pytest.mark.slow  # several executables
def test_assisted_generation_reads_no_guess_as_a_prompt() -> None:
    opt, assistant = lowered(), models.model("llama")
    options: Any = {"max_new_tokens": 24, "eos_token_id": None, "do_sample": False}
    for row in batch()[:, :PROMPT]:
        expected = opt.generate(row[None], **options)
        assert torch.equal(opt.generate(row[None], **options, assistant_model=assistant), expected)


def test_prompts_are_read_whole_and_first() -> None:
    opt: Any = executable("llama")
    ids = batch()[:, :PROMPT]
    with pytest.raises(Unsupported, match="prompt in pieces"):
        opt.generate(ids, max_new_tokens=2, prefill_chunk_size=2)
    with pytest.raises(Unsupported, match="use_cache=False"):
        opt.generate(ids, max_new_tokens=2, use_cache=False)


def test_bfloat16_is_as_exact_as_hugging_face() -> None:
    half = torch.bfloat16
    opt = build(plan("llama"), "llama", half)
    _, kept = opt.prefill(batch()[:, :PROMPT])  # type: ignore[attr-defined]
    entries = [SETS[number] for number in kept.choice.tolist()]
    exact = oracle("llama", entries)
    theirs = torch.stack(
        [expected(hugging_face("llama", half), row, each) for row, each in zip(batch(), entries, strict=True)]
    )
    ours = decoded(opt, batch())
    assert (ours - exact).square().mean().sqrt() <= 1.5 * (theirs - exact).square().mean().sqrt()


# ------------------------------------------------------------------------------------------------------------ the cache

OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("decode"), st.integers(1, 3)),
        st.tuples(st.just("select"), st.lists(st.integers(0, 9), min_size=1, max_size=6)),
        st.tuples(st.just("crop"), st.lists(st.integers(0, 4), min_size=6, max_size=6)),
        st.tuples(st.just("repeat"), st.integers(1, 2)),
        st.tuples(st.just("grow"), st.integers(0, 40)),
        st.tuples(st.just("save"), st.just(0)),
    ),
    max_size=5,
)


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(OPERATIONS)
def test_a_cache_is_the_caches_of_its_sequences(tmp_path: Path, operations: list[tuple[str, Any]]) -> None:
    """Whatever is done to it, every sequence goes on as if it were alone."""
    opt = executable("llama")
    _, kept = opt.prefill(batch()[:, :PROMPT])
    texts = [row[:PROMPT].tolist() for row in batch()]
    prompts = list(range(BATCH))
    generator = torch.Generator().manual_seed(len(operations))
    for operation, value in operations:
        if operation == "decode" and max(map(len, texts)) + value < 40:
            new = torch.randint(3, models.VOCABULARY, (len(texts), value), generator=generator)
            opt.decode(new, kept)
            texts = [text + row for text, row in zip(texts, new.tolist(), strict=True)]
        elif operation == "select" and len(texts) <= 12:
            index = [each % len(texts) for each in value]
            kept.select(index)
            texts, prompts = [list(texts[each]) for each in index], [prompts[each] for each in index]
        elif operation == "repeat" and len(texts) <= 12:
            kept.repeat(value)
            texts = [list(each) for each in texts for _ in range(value)]
            prompts = [each for each in prompts for _ in range(value)]
        elif operation == "crop":
            shorter = [max(PROMPT, len(text) - value[n % len(value)]) for n, text in enumerate(texts)]
            kept.crop(torch.tensor(shorter))
            texts = [text[:length] for text, length in zip(texts, shorter, strict=True)]
        elif operation == "grow":
            kept.grow(kept.capacity + value)
        elif operation == "save":
            kept.save(tmp_path / "cache.safetensors")
            kept = opt.load_cache(tmp_path / "cache.safetensors")
    assert kept.lengths.tolist() == list(map(len, texts))
    assert kept.batch == len(texts)
    assert kept.choice.tolist() == prompts
    assert kept.decode_start.tolist() == [PROMPT] * len(texts)
    last = models.tokens(len(texts), 2, seed=11)
    given = opt.decode(last, kept)
    for number, text in enumerate(texts):
        row = torch.tensor(text + last[number].tolist())
        assert_close(given[number], expected(hugging_face("llama"), row, SETS[prompts[number]])[-2:])


def test_a_crop_that_is_refused_changes_nothing() -> None:
    _, kept = executable("llama").prefill(batch()[:, :PROMPT])
    for wrong in ([2, 2, 2, PROMPT + 1], [2, 2], [2, 2, 2, -1]):
        with pytest.raises(InvalidInput):
            kept.crop(torch.tensor(wrong))
    with pytest.raises(InvalidInput, match="cannot grow"):
        kept.grow(1)
    with pytest.raises(InvalidInput):
        kept.select([BATCH])
    with pytest.raises(InvalidInput, match="3 indices reorder a cache of 4"):
        kept.reorder([0, 1, 2])
    assert kept.lengths.tolist() == [PROMPT] * BATCH
    assert kept.choice.tolist() == [0, 1, 2, 3]


def test_an_unread_cache_is_saved_too(tmp_path: Path) -> None:
    opt = executable("llama")
    opt.new_cache(2, 8).save(tmp_path / "empty")
    again = opt.load_cache(tmp_path / "empty")
    assert set(again.groups) == {UNDECIDED}
    assert isinstance(again, GroupedCache)
    tokens, layout = opt.prepare(batch()[:2, :PROMPT])
    opt.advance(tokens, layout, layout.rows(1), cache=again)
    assert again.choice.tolist() == [0, 1]


def test_caches_of_other_programs_are_refused(tmp_path: Path) -> None:
    opt = executable("llama")
    other = Executable(EagerSession(rewrite(captured("llama"), Plan(), target="eager")[0]))
    _, plain = other.prefill(batch()[:, :PROMPT])  # type: ignore[attr-defined]
    _, grouped = opt.prefill(batch()[:, :PROMPT])
    for model_, wrong in ((opt, plain), (other, grouped)):
        with pytest.raises(InvalidInput, match="made for another program"):
            model_.decode(batch()[:, PROMPT], wrong)
    plain.save(tmp_path / "plain")
    grouped.save(tmp_path / "grouped")
    with pytest.raises(ArtifactError, match="another program"):
        opt.load_cache(tmp_path / "plain")
    with pytest.raises(ArtifactError, match="another program"):
        other.load_cache(tmp_path / "grouped")  # type: ignore[attr-defined]


# ------------------------------------------------------------------------------------------------------ plans, refusals


def test_a_plan_is_saved_with_its_centroids(tmp_path: Path) -> None:
    given = plan("llama")
    given.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again == given
    assert torch.equal(again.tensors[CENTROIDS], given.tensors[CENTROIDS])
    assert torch.equal(decoded(build(again, "llama"), batch()), decoded(executable("llama"), batch()))


def test_the_report_names_the_sets() -> None:
    remarks = next(each for each in executable("llama").program.history if each.name == "skip_by_prompt").remarks
    assert [each.where for each in remarks] == ["set 0", "set 1", "set 2", "set 3"]
    assert remarks[0].why == "decodes without attention 1"
    assert remarks[1].why == "decodes in full"
    assert remarks[2].why == "decodes without ffn 0, ffn 2"
    assert [each.numbers["kv_bytes_per_token"] for each in remarks] == [256, 0, 0, 256]


@pytest.mark.parametrize(
    ("entry", "tensors", "message"),
    [
        (SkipByPrompt(), {}, "without a set"),
        (SkipByPrompt((SETS[0], SETS[1], SETS[0])), {}, "sets 0 and 2 are the same"),
        (SkipByPrompt(SETS), {}, "no 'skip_by_prompt/centroids'"),
        (SkipByPrompt(SETS), {CENTROIDS: torch.zeros(4, 5)}, "expected finite numbers [4, 6]"),
        (SkipByPrompt(SETS), {CENTROIDS: torch.full((4, 6), torch.nan)}, "expected finite numbers [4, 6]"),
        (SkipByPrompt(SETS, "routers"), {WEIGHT: torch.zeros(6, 32)}, "no 'skip_by_prompt/bias'"),
        (SkipByPrompt(SETS, "routers"), {WEIGHT: torch.zeros(6, 31), BIAS: torch.zeros(6)}, "numbers [6, 32]"),
        (SkipByPrompt((SkipSublayers(attention=(0, 1, 2)),)), {}, "leaves no attention"),
        (SkipByPrompt((SkipSublayers(layers=(3,)),)), {}, "the model has layers 0 to 2"),
        (SkipByPrompt((SkipSublayers(layers=(0, 1, 2)),)), {}, "skips every sublayer"),
    ],
)
def test_what_cannot_be_done_is_refused(entry: SkipByPrompt, tensors: dict[str, Tensor], message: str) -> None:
    with pytest.raises(InvalidPlan) as caught:
        build(Plan([entry], tensors=tensors), "llama")
    assert message in str(caught.value)


def test_a_program_without_a_cache_is_refused() -> None:
    with pytest.raises(Unsupported, match="without a KV cache"):
        build(plan("llama"), "llama", cache=False)


# --------------------------------------------------------------------------------------------------------- the features


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_features_follow_the_rules_of_operators(dtype: torch.dtype) -> None:
    before, after = torch.randn(2, 2, 5, 8).to(dtype)
    count = torch.tensor([5, 2])
    torch.library.opcheck(prompt_turn, (before, after, count))
    torch.library.opcheck(prompt_mean, (before, count))
    assert prompt_turn(before, after, count).dtype == torch.promote_types(dtype, torch.float32)


def test_the_features_are_means_over_the_prompt() -> None:
    before, after = torch.randn(2, 3, 6, 8, dtype=torch.float64)
    count = torch.tensor([6, 1, 3])
    turned, mean = prompt_turn(before, after, count), prompt_mean(before, count)
    for row, length in enumerate(count.tolist()):
        one, other = before[row, :length], after[row, :length]
        torch.testing.assert_close(turned[row], 1 - cosine_similarity(one, other, dim=-1).mean())
        torch.testing.assert_close(mean[row], (one / one.square().mean(-1, keepdim=True).sqrt()).mean(0))
    longer = pad(before, (0, 0, 0, 3), value=7.0), pad(after, (0, 0, 0, 3), value=-7.0)
    assert torch.equal(prompt_turn(*longer, count), turned)
    assert torch.equal(prompt_turn(before, before, count), torch.zeros(3, dtype=torch.float64))
