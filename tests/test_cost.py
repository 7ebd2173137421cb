"""The cost model against PyTorch's own counter and the sizes of real tensors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import sympy
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry, register_flop_formula, sdpa_flop_count
from transformers import LlamaConfig, LlamaForCausalLM

from skipstone.ir import device
from skipstone.ir.capture.huggingface import capture_huggingface
from skipstone.ir.capture.module import capture_module
from skipstone.ir.cost import BATCH, PAST, SEQUENCE, cost, evaluate, roofline_seconds
from skipstone.ir.device import DeviceProfile, measure_cpu
from skipstone.ir.dialect import ATTENTION, CACHED_ATTENTION
from skipstone.ir.errors import UserError
from skipstone.ir.program import Program
from skipstone.passes.base import run_pass
from skipstone.passes.kv_cache import InsertKVCache

aten = torch.ops.aten
HIDDEN, LAYERS, KV_HEADS, HEAD, VOCABULARY = 32, 2, 2, 8, 64


def _llama(tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=48, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=KV_HEADS, max_position_embeddings=64, tie_word_embeddings=tied,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def tied() -> Program:
    return capture_huggingface(_llama(tied=True))


@pytest.fixture(scope="module")
def stepwise(tied: Program) -> Program:
    return run_pass(InsertKVCache(), tied)


class Products(nn.Module):
    """Every operator that the counter knows, and pointwise ones that it does not count."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 20)
        self.free = nn.Parameter(torch.randn(20, 12))
        self.convolution = nn.Conv1d(12, 12, 3, padding=1, groups=3)
        self.transposed = nn.ConvTranspose1d(12, 6, 3, padding=1)
        self.norm = nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        batch, rows, width = x.shape
        y = torch.nn.functional.gelu(self.linear(x)) @ self.free
        y = y + torch.einsum("bid,bjd->bij", x, x) @ y
        y = y + torch.bmm(x, y.transpose(1, 2)) @ x
        y = torch.addmm(y.reshape(-1, width), y.reshape(-1, width), self.free.T @ self.free).view(batch, rows, width)
        z = self.transposed(self.convolution(y.transpose(1, 2))).transpose(1, 2)
        return self.norm(z).softmax(dim=-1)


@contextmanager
def _attention_counted() -> Iterator[FlopCounterMode]:
    """PyTorch's counter, taught the dialect's attention by its own formula for attention."""
    packet = torch.ops.skipstone.attention

    @register_flop_formula(packet)
    def _(q: torch.Size, k: torch.Size, v: torch.Size, *_: object, **options: object) -> int:
        return sdpa_flop_count(q, (*q[:2], *k[2:]), (*q[:2], *v[2:]))

    try:
        with FlopCounterMode(display=False) as counter:
            yield counter
    finally:
        del flop_registry[packet]


def test_flops_equal_the_counter_on_a_plain_module() -> None:
    module = Products().eval()
    price = cost(capture_module(module, {"x": torch.randn(2, 6, 12)}))
    for batch, sequence in [(1, 2), (2, 7), (5, 33)]:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            module(torch.randn(batch, sequence, 12))
        assert evaluate(price, batch, sequence)["flops"] == counter.get_total_flops()


@pytest.mark.parametrize(("batch", "sequence"), [(1, 2), (2, 7), (5, 33)])
def test_flops_equal_the_counter_on_llama(tied: Program, batch: int, sequence: int) -> None:
    ids = torch.randint(VOCABULARY, (batch, sequence))
    with _attention_counted() as counter, torch.no_grad():
        tied.run(input_ids=ids, position_ids=torch.arange(sequence).expand(batch, -1))
    assert evaluate(cost(tied), batch, sequence)["flops"] == counter.get_total_flops()


def test_flops_of_a_step_are_the_difference_of_two_prefills(tied: Program, stepwise: Program) -> None:
    """Products of one token over P past ones equal row P of the whole; full attention counts S * T."""
    step = evaluate(cost(stepwise), batch=3, sequence=1, past=9, rows=1)["flops"]
    linear = evaluate(cost(tied, [n for n in tied.nodes() if n.target is not ATTENTION]), batch=3, sequence=1)["flops"]
    attention = LAYERS * 2 * (3 * 4 * 1 * 10 * 2 * HEAD)
    assert step == linear + attention


def test_rows_decide_what_the_head_costs(stepwise: Program) -> None:
    price = cost(stepwise)
    all_rows, one_row = (evaluate(price, batch=2, sequence=8, rows=rows)["flops"] for rows in (None, 1))
    assert all_rows - one_row == 2 * 2 * 7 * HIDDEN * VOCABULARY


def test_weight_bytes_are_the_real_ones_and_tied_weights_count_once(tied: Program) -> None:
    model = _llama(tied=True)
    real = sum(tensor.nbytes for tensor in model.parameters()) + model.model.rotary_emb.inv_freq.nbytes
    gathered = BATCH * SEQUENCE * HIDDEN * 4
    assert cost(tied).parameter_bytes == real == tied.weight_bytes()
    assert sympy.expand(cost(tied).weight_bytes - gathered - real) == 0


def test_of_an_untied_embedding_only_the_gathered_rows_are_read() -> None:
    model = _llama(tied=False)
    program = capture_huggingface(model)
    price, table = cost(program), model.model.embed_tokens.weight.nbytes
    assert price.parameter_bytes == program.weight_bytes()
    read = evaluate(price, batch=2, sequence=3)["weight_bytes"]
    assert read == program.weight_bytes() - table + 2 * 3 * HIDDEN * 4


def test_slices_of_a_stacked_weight_are_read_in_part() -> None:
    class Stacked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stack = nn.Parameter(torch.randn(4, 8, 8))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.stack[0] @ self.stack[2]

    price = cost(capture_module(Stacked().eval(), {"x": torch.randn(2, 3, 8)}))
    assert (price.weight_bytes, price.parameter_bytes) == (2 * 8 * 8 * 4, 4 * 8 * 8 * 4)


def test_kv_bytes_are_those_of_the_filled_caches(stepwise: Program) -> None:
    expected = LAYERS * 2 * BATCH * KV_HEADS * (PAST + SEQUENCE) * HEAD * 4
    assert sympy.expand(cost(stepwise).kv_bytes - expected) == 0
    batch, past = 3, 11
    caches = [torch.zeros(batch, KV_HEADS, past + 1, HEAD) for slot in stepwise.slots() for _ in ("key", "value")]
    assert evaluate(cost(stepwise), batch, 1, past)["kv_bytes"] == sum(cache.nbytes for cache in caches)


def test_a_window_bounds_what_a_step_reads(stepwise: Program) -> None:
    program = stepwise.copy()
    for node in program.nodes(CACHED_ATTENTION):
        node.kwargs = {**node.kwargs, "kind": "sliding", "window": 4}
    near, far, chunk = (evaluate(cost(program), 1, *step) for step in ((1, 2), (1, 50), (5, 50)))
    a_key = LAYERS * 2 * KV_HEADS * HEAD * 4
    assert [numbers["kv_bytes"] // a_key for numbers in (near, far, chunk)] == [3, 4, 8]
    whole = evaluate(cost(stepwise), 1, 5, 50)["flops"]
    assert whole - chunk["flops"] == LAYERS * 2 * 2 * 4 * 5 * (55 - 4) * HEAD


def test_critical_path_and_launches_by_hand(tied: Program) -> None:
    """A layer is a chain of projection, attention, projection, gate (beside up), down; then comes the head."""
    assert cost(tied).critical_path == LAYERS * 5 + 1
    layer = [node for node in tied.nodes() if "layers.1.mlp" in str(node.meta["nn_module_stack"])]
    assert cost(tied, layer).critical_path == 2
    assert cost(tied, layer).launches == 5  # gate, silu, up, product, down


def test_parts_sum_to_the_whole(tied: Program) -> None:
    nodes = list(tied.nodes())
    parts = [cost(tied, nodes[:40]), cost(tied, nodes[40:])]
    whole = cost(tied)
    for name in ("flops", "activation_bytes", "kv_bytes", "launches"):
        assert sympy.expand(sum(getattr(part, name) for part in parts) - getattr(whole, name)) == 0


def test_an_unnamed_size_is_refused() -> None:
    class Pair(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x @ y.transpose(1, 2)

    program = capture_module(Pair().eval(), {"x": torch.randn(2, 3, 4), "y": torch.randn(2, 5, 4)})
    with pytest.raises(UserError, match="sizes beside batch and sequence"):
        evaluate(cost(program), 1, 2)


def test_roofline_is_the_slower_of_arithmetic_and_memory(stepwise: Program) -> None:
    price, sizes = cost(stepwise), {"batch": 1, "sequence": 1, "past": 4, "rows": 1}
    numbers = evaluate(price, **sizes)
    moved = numbers["weight_bytes"] + numbers["activation_bytes"] + numbers["kv_bytes"]
    gaps = numbers["launches"] * 1e-6
    slow_memory, slow_arithmetic = DeviceProfile(1e6, 1e15, 1e-6), DeviceProfile(1e15, 1e6, 1e-6)
    assert roofline_seconds(price, slow_memory, **sizes) == pytest.approx(moved / 1e6 + gaps)
    assert roofline_seconds(price, slow_arithmetic, **sizes) == pytest.approx(numbers["flops"] / 1e6 + gaps)


def test_the_cpu_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    threads = torch.get_num_threads()
    profile = measure_cpu(1)
    assert torch.get_num_threads() == threads
    assert 1e8 < profile.bandwidth < 1e13 and 1e8 < profile.flops_per_second < 1e14 and 0 < profile.launch_gap < 1e-3
    monkeypatch.setattr(device, "_measure", lambda threads: pytest.fail("measured again"))
    assert measure_cpu(1) == profile
    (file,) = (tmp_path / "skipstone").iterdir()
    assert json.loads(file.read_text())["bandwidth"] == profile.bandwidth


def test_a_damaged_profile_is_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(device, "_measure", lambda threads: DeviceProfile(1.0, 2.0, 3.0))
    measure_cpu(1)
    (file,) = (tmp_path / "skipstone").iterdir()
    file.write_text("{")
    assert measure_cpu(1) == DeviceProfile(1.0, 2.0, 3.0)
    assert file.read_text() != "{"
