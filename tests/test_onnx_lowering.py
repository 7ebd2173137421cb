"""Programs in ONNX Runtime against the same programs in PyTorch."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import onnx
import onnxruntime
import pytest
import torch
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidGraph
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from skipstone.ir.capture.exported import export, source_of, to_program
from skipstone.ir.capture.huggingface import capture_huggingface
from skipstone.ir.dialect import attention, cached_attention
from skipstone.ir.errors import InvalidInput, Unsupported
from skipstone.ir.program import Program, Role
from skipstone.passes.base import Pipeline
from skipstone.passes.kv_cache import InsertKVCache
from skipstone.runtime.cache import KVCache
from skipstone.runtime.eager import EagerSession
from skipstone.runtime.onnx import memory
from skipstone.runtime.onnx.forms import takes_counts
from skipstone.runtime.onnx.lower import lower
from skipstone.runtime.onnx.session import OnnxSession
from skipstone.runtime.session import Session

VOCABULARY = 19
ROLES = {
    "input_ids": Role.TOKENS,
    "position_ids": Role.POSITIONS,
    "start": Role.START,
    "logit_rows": Role.LOGIT_ROWS,
    "logits": Role.LOGITS,
    "key_0": Role.CACHE_KEY,
    "value_0": Role.CACHE_VALUE,
    "new_key_0": Role.CACHE_KEY,
    "new_value_0": Role.CACHE_VALUE,
}


class OneAttention(nn.Module):
    """Queries, keys and values looked up by token, one cached attention, a head."""

    def __init__(self, heads=4, kv_heads=2, width=8, value_width=None, sinks=False, key_bias=False, **options) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.width = heads, kv_heads, width
        self.value_width = value_width or width
        self.q = nn.Embedding(VOCABULARY, heads * width)
        self.k = nn.Embedding(VOCABULARY, kv_heads * width)
        self.v = nn.Embedding(VOCABULARY, kv_heads * self.value_width)
        self.head = nn.Linear(heads * self.value_width, 33, bias=True)
        self.sinks = nn.Parameter(torch.randn(heads)) if sinks else None
        self.key_bias = nn.Parameter(torch.randn(2, kv_heads, width)) if key_bias else None
        self.frequencies = nn.Parameter(torch.rand(width)) if key_bias else None
        self.options = {"scale": 0.7, "kind": "causal", **options}

    def forward(self, input_ids, position_ids, start, logit_rows, key_0, value_0):
        shape = (*input_ids.shape, -1)
        q = self.q(input_ids).reshape(*shape, self.width).transpose(1, 2)
        k = self.k(input_ids).reshape(*shape, self.width).transpose(1, 2)
        v = self.v(input_ids).reshape(*shape, self.value_width).transpose(1, 2)
        q = q * (position_ids + 1).rsqrt()[:, None, :, None]
        constants = (self.sinks, self.key_bias, self.frequencies)
        out, keys, values = cached_attention(q, k, v, key_0, value_0, start, None, *constants, **self.options)
        out = out.transpose(1, 2).flatten(2)
        out = out.gather(1, logit_rows.unsqueeze(-1).expand(-1, -1, out.shape[2]))
        return self.head(out), keys, values


def build(**options) -> Program:
    """The program of one attention."""
    return built(**options).copy()


@functools.cache
def built(**options) -> Program:
    torch.manual_seed(0)
    model = OneAttention(**options).eval()
    batch, rows, capacity, wanted = 3, 11, 64, 5
    inputs = {
        "input_ids": torch.zeros(batch, rows, dtype=torch.int64),
        "position_ids": torch.zeros(batch, rows, dtype=torch.int64),
        "start": torch.zeros(batch, dtype=torch.int64),
        "logit_rows": torch.zeros(batch, wanted, dtype=torch.int64),
        "key_0": torch.zeros(batch, model.kv_heads, capacity, model.width),
        "value_0": torch.zeros(batch, model.kv_heads, capacity, model.value_width),
    }
    dynamic = {name: (0, 2) if "_0" in name else tuple(range(value.dim())) for name, value in inputs.items()}
    names = ["logits", "new_key_0", "new_value_0"]
    source = source_of(model, vocabulary=VOCABULARY, max_positions=None)
    program = to_program(export(model, inputs, dynamic), source, ROLES, names)
    return with_slots(program)


def with_slots(program: Program) -> Program:
    cache = (Role.CACHE_KEY, Role.CACHE_VALUE)
    program.inputs = tuple(replace(port, slot=0) if port.role in cache else port for port in program.inputs)
    program.outputs = tuple(replace(port, slot=0) if port.role in cache else port for port in program.outputs)
    return program


@pytest.fixture(scope="module")
def one() -> tuple[Program, OnnxSession]:
    """The program of one attention, and its session."""
    program = build()
    return program, OnnxSession(program, 1)


def operators(program: Program) -> list[str]:
    return [node.op_type for node in all_nodes(onnx.load_from_string(lower(program).proto).graph)]


def all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """The nodes of a graph and of the branches in it."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from all_nodes(attribute.g)


Steps = list[tuple[int, list[int]]]  # new tokens S, and how many rows each sequence has before


def assert_same_steps(program: Program, *sequences: Steps, capacity: int = 24, atol: float = 2e-6) -> None:
    """Run steps of S tokens from ragged starts on both, and compare logits and written cache rows."""
    reference, session = EagerSession(program), OnnxSession(program, 1)
    assert isinstance(session, Session)
    for steps in sequences:
        batch = len(steps[0][1])
        caches = [KVCache.allocate(session.layout, batch, capacity) for _ in range(2)]
        buffers = dict(caches[1].buffers)
        for rows, starts in steps:
            start = torch.tensor(starts)
            for cache in caches:
                cache.lengths = start
            tokens = torch.randint(0, VOCABULARY, (batch, rows))
            positions = start.unsqueeze(1) + torch.arange(rows)
            wanted = torch.arange(rows).flip(0).expand(batch, rows).contiguous()
            expected, got = (
                s.step(tokens, positions, torch.full_like(start, rows), wanted, c)
                for s, c in zip((reference, session), caches, strict=True)
            )
            torch.testing.assert_close(got, expected, atol=atol * float(expected.abs().max()), rtol=0)
            for theirs, mine in zip(*(cache.buffers.values() for cache in caches), strict=True):
                torch.testing.assert_close(mine, theirs, atol=atol * float(theirs.abs().max()), rtol=0)
        assert all(buffer is caches[1].buffers[name] for name, buffer in buffers.items())


STEPS = [(7, [0, 0]), (1, [7, 4]), (1, [8, 5]), (5, [9, 2]), (3, [0, 7]), (1, [14, 10]), (9, [15, 1])]


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"heads": 2, "kv_heads": 2}, marks=pytest.mark.slow),
        {"heads": 4, "kv_heads": 2},
        {"heads": 6, "kv_heads": 1, "width": 16},
        pytest.param({"width": 40}, marks=pytest.mark.slow),
        pytest.param({"width": 64}, marks=pytest.mark.slow),
        pytest.param({"kind": "sliding", "window": 1}, marks=pytest.mark.slow),
        pytest.param({"kind": "sliding", "window": 4}, marks=pytest.mark.slow),
        pytest.param({"kind": "sliding", "window": 100}, marks=pytest.mark.slow),
        pytest.param({"softcap": 2.0}, marks=pytest.mark.slow),
        pytest.param({"sinks": True}, marks=pytest.mark.slow),
        {"sinks": True, "softcap": 3.0, "kind": "sliding", "window": 3},
        {"key_bias": True},
    ],
    ids=str,
)
def test_group_query_attention(options):
    program = build(**options)
    assert ("GroupQueryAttention" in operators(program)) == takes_counts()
    assert_same_steps(program, STEPS)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"width": 12}, marks=pytest.mark.slow),
        {"width": 8, "value_width": 16},
        pytest.param({"kind": "chunked", "window": 4}, marks=pytest.mark.slow),
        pytest.param(
            {"width": 20, "sinks": True, "softcap": 3.0, "kind": "sliding", "window": 3}, marks=pytest.mark.slow
        ),
    ],
    ids=str,
)
def test_attention_in_plain_operators(options):
    program = build(**options)
    assert "GroupQueryAttention" not in operators(program)
    assert_same_steps(program, STEPS)


def test_an_older_version_attends_in_plain_operators(monkeypatch):
    monkeypatch.setattr("skipstone.runtime.onnx.forms.takes_counts", lambda: False)
    program = build(kind="sliding", window=4, sinks=True)
    assert "GroupQueryAttention" not in operators(program)
    assert_same_steps(program, STEPS)


def test_an_older_version_is_one_that_cannot_open_the_operator(monkeypatch):
    is_new = takes_counts()
    monkeypatch.setattr("skipstone.runtime.onnx.forms.takes_counts", lambda: True)
    with nullcontext() if is_new else pytest.raises(InvalidGraph, match="input size 17"):
        OnnxSession(build(), 1)


def test_the_cache_may_grow_between_steps(one):
    program, session = one
    reference = EagerSession(program)
    caches = [KVCache.allocate(session.layout, 1, 4) for _ in range(2)]
    rows = torch.tensor([[0]])
    for position in range(9):
        start = torch.tensor([position])
        token = torch.tensor([[position % VOCABULARY]])
        if position == 4:
            for cache in caches:
                cache.grow(16)
        for cache in caches:
            cache.lengths = start
        expected, got = (
            s.step(token, start[None], torch.tensor([1]), rows, c)
            for s, c in zip((reference, session), caches, strict=True)
        )
        torch.testing.assert_close(got, expected)


def test_logits_of_one_step_survive_the_next(one):
    _, session = one
    cache = KVCache.allocate(session.layout, 1, 8)
    rows = torch.tensor([[0]])
    count = torch.tensor([1])
    first = session.step(torch.tensor([[3]]), rows, count, rows, cache)
    kept = first.clone()
    cache.advance(count)
    session.step(torch.tensor([[5]]), rows + 1, count, rows, cache)
    assert torch.equal(first, kept)


def test_a_step_beyond_the_cache_is_refused(one):
    _, session = one
    cache = KVCache.allocate(session.layout, 1, 4)
    tokens = torch.zeros(1, 3, dtype=torch.int64)
    cache.lengths = torch.tensor([2])
    with pytest.raises(InvalidInput, match="5 rows in a cache with room for 4"):
        session.step(tokens, tokens, torch.tensor([3]), tokens, cache)
    with pytest.raises(InvalidInput, match="2 sequences for a cache of 1"):
        session.step(tokens.expand(2, 3), tokens.expand(2, 3), torch.tensor([3, 3]), tokens.expand(2, 3), cache)


def llama(**options) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCABULARY}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, initializer_range=0.3, **options)).eval()


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": VOCABULARY}
    return GPT2LMHeadModel(GPT2Config(**sizes, initializer_range=0.3)).eval()


@pytest.mark.parametrize("make", [llama, pytest.param(gpt2, marks=pytest.mark.slow)], ids=["llama", "gpt2"])
def test_a_language_model_with_a_cache(make):
    model = make()
    program = Pipeline([InsertKVCache()]).run(capture_huggingface(model))
    assert_same_steps(program, STEPS, atol=1e-5)
    lowered = lower(program)
    own = {name: tensor.data_ptr() for name, tensor in program.tensors().items()}
    assert all(own[name] == tensor.data_ptr() for name, tensor in lowered.tensors.items())
    most = 300_000 if takes_counts() else 400_000  # without weights; attention in plain operators has more nodes
    assert len(lowered.proto) < most and b'.py"' not in lowered.proto
    domains = {node.domain for node in onnx.load_from_string(lowered.proto).graph.node}
    assert domains <= {"", "com.microsoft"}


@pytest.mark.slow
@torch.no_grad()
def test_a_language_model_without_a_cache():
    model = llama(tie_word_embeddings=True)
    session = OnnxSession(capture_huggingface(model))
    for batch, rows in ((2, 7), (1, 1), (3, 16)):
        tokens = torch.randint(0, VOCABULARY, (batch, rows))
        positions = torch.arange(rows).expand(batch, rows).contiguous()
        logits = session.run({"input_ids": tokens, "position_ids": positions})["logits"]
        expected = model(tokens, position_ids=positions).logits
        torch.testing.assert_close(logits, expected, atol=1e-5 * float(expected.abs().max()), rtol=0)


def program_of(model: nn.Module, *shape: int, dtype: torch.dtype = torch.float32) -> Program:
    exported = export(model, {"x": torch.ones(shape, dtype=dtype)}, {"x": (0, 1)})
    return to_program(exported, source_of(model, vocabulary=None, max_positions=None), {})


def test_ports_may_have_the_names_of_values_and_weights():
    class Names(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(40, 40))

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            y = x + self.weight
            return y, y, x, y * y

    exported = export(Names().eval(), {"x": torch.ones(40, 40)}, {})
    program = to_program(
        exported, source_of(Names(), vocabulary=None, max_positions=None), {}, ["mul", "a", "b", "add"]
    )
    program.inputs = (replace(program.inputs[0], name="weight"),)
    x = torch.randn(40, 40)
    got, expected = OnnxSession(program).run({"weight": x}), program.run(weight=x)
    assert list(got) == ["mul", "a", "b", "add"]
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value)


def test_a_half_precision_program_is_refused():
    model = nn.Linear(8, 8).to(torch.bfloat16)

    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    with pytest.raises(Unsupported, match="bfloat16"):
        lower(program_of(Half().eval(), 3, 11, 8, dtype=torch.bfloat16))


def test_a_written_model_runs_from_its_files(one, tmp_path):
    program, _ = one
    lower(program, tmp_path)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    values = {
        "input_ids": torch.tensor([[3, 4]]),
        "position_ids": torch.tensor([[0, 1]]),
        "start": torch.tensor([0]),
        "logit_rows": torch.tensor([[1]]),
        "key_0": torch.zeros(1, 2, 8, 8),
        "value_0": torch.zeros(1, 2, 8, 8),
    }
    got = session.run(None, {name: value.numpy() for name, value in values.items()})
    for mine, expected in zip(got, program.run(**values).values(), strict=True):
        torch.testing.assert_close(torch.from_numpy(mine), expected, atol=1e-6, rtol=1e-6)


def test_an_operator_that_onnx_lacks_is_named():
    class Digamma(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.special.digamma(x)

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = Digamma()

        def forward(self, x: Tensor) -> Tensor:
            return self.part(x + 1)

    with pytest.raises(Unsupported, match=r"digamma.*at part"):
        lower(program_of(Outer().eval(), 3, 11))


def test_attention_without_a_cache_keeps_its_mask():
    class Masked(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            q = x.unsqueeze(1)
            return attention(q, q, q, (x.sum(-1) > 0)[:, None, None, :], None, None, scale=0.5, kind="bidirectional")

    program = program_of(Masked().eval(), 3, 11, 4)
    x = torch.randn(2, 6, 4)
    got = OnnxSession(program).run({"x": x})["output_0"]
    torch.testing.assert_close(got, program.run(x=x)["output_0"], atol=1e-6, rtol=1e-5)


def test_memory_is_arranged_on_glibc_only(monkeypatch):
    calls = []
    library = SimpleNamespace(mallopt=lambda *arguments: calls.append(arguments))
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: library)
    for libc, expected in (("", 0), ("glibc", 3)):
        monkeypatch.setattr(memory.platform, "libc_ver", lambda libc=libc: (libc, ""))
        with memory.large_blocks_apart():
            pass
        assert len(calls) == expected
