"""Conditioning of keys and values: exact on every architecture it applies to, refused with a reason elsewhere."""

from __future__ import annotations

from collections import Counter
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    GptOssConfig,
    LlamaConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from skipstone.ir.capture.huggingface import capture_huggingface
from skipstone.ir.capture.module import capture_module
from skipstone.ir.dialect import ATTENTION
from skipstone.ir.errors import InvalidInput, InvalidPlan, Unsupported
from skipstone.ir.key_bias import large_key_biases
from skipstone.ir.program import Port, Program, Role, propagate
from skipstone.ir.projections import Projections
from skipstone.ir.statistics import sites
from skipstone.ir.verify import verify
from skipstone.passes import condition_kv
from skipstone.passes.base import Remark, Status, run_pass
from skipstone.passes.cleanup import Cleanup
from skipstone.passes.condition_kv import ConditionKV, Rewrite, hadamard
from skipstone.passes.kv_cache import InsertKVCache
from tests.models import tokens
from tests.tiny_models import randomize

SIZES: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 96, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 24}
WINDOWED = {"sliding_window": 8, "layer_types": ["sliding_attention"]}
GPT = {
    "vocab_size": 61,
    "n_embd": 32,
    "n_layer": 1,
    "n_head": 4,
    "n_positions": 96,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS = {
    "llama": lambda: LlamaConfig(**{**SIZES, "head_dim": 12}),
    "llama_yarn": lambda: LlamaConfig(
        **{**SIZES, "num_key_value_heads": 4}, attention_bias=True, rope_parameters=YARN
    ),
    "qwen2": lambda: Qwen2Config(**{**SIZES, "num_hidden_layers": 2}),
    "qwen3": lambda: Qwen3Config(**SIZES, attention_bias=True),
    # transformers 5.17 leaves the cap out unless it is told to attend eagerly.
    "gemma2": lambda: Gemma2Config(
        **SIZES, **WINDOWED, query_pre_attn_scalar=8, attn_logit_softcapping=3.0, attn_implementation="eager"
    ),
    "gemma3": lambda: Gemma3TextConfig(**SIZES, **WINDOWED, query_pre_attn_scalar=8),
    "phi3": lambda: Phi3Config(**SIZES),
    "gpt_neox": lambda: GPTNeoXConfig(**SIZES, rotary_pct=0.5),
    "gpt2": lambda: GPT2Config(**GPT),
    "gptj": lambda: GPTJConfig(**GPT, rotary_dim=4),
    "cohere": lambda: CohereConfig(**SIZES, use_qk_norm=True),
    "olmo2": lambda: Olmo2Config(**SIZES),
    "gpt_oss": lambda: GptOssConfig(**SIZES, **WINDOWED, num_local_experts=2, num_experts_per_tok=2),
}  # fmt: skip
"""Grouped heads, biases, norms of queries and keys (one head, all heads, 1 + w), caps, windows, fused projections,
partial and interleaved rotary embeddings, tables of positions, and sinks."""

NAMES = [pytest.param(n, marks=pytest.mark.slow) if n in ("gemma3", "gptj", "olmo2") else n for n in CONFIGS]
BIASED = ("llama_yarn", "qwen2", "gpt_neox", "gpt2", "gpt_oss")
REFUSED = {
    ("gemma2", Rewrite.CENTRE_K): "capped",
    ("gpt_oss", Rewrite.CENTRE_K): "sink",
    ("qwen3", Rewrite.SPLIT_K_BIAS): "a norm between the key projection's bias and the attention",
}
EVERY_BIAS = 1e-3
"""A threshold that every bias exceeds."""


@cache
def model(name: str) -> PreTrainedModel:
    """A model with two layers of random weights. Tests must not change it."""
    torch.manual_seed(0)
    return randomize(AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=torch.float32).eval())


@cache
def program(name: str) -> Program:
    """Its program, with random statistics: they spread widely, and every choice of them must be exact."""
    found = run_pass(Cleanup(), capture_huggingface(model(name)))
    generator = torch.Generator().manual_seed(1)
    for node, site in sites(found).items():
        for which, operand in (("key", node.args[1]), ("value", node.args[2])):
            shape = [int(operand.meta["val"].shape[dim]) for dim in (1, 3)]  # type: ignore[union-attr]
            for statistic in ("minimum", "maximum", "mean"):
                value = torch.randn(shape, generator=generator)
                signed = {"minimum": -value.exp(), "maximum": value.exp(), "mean": value}[statistic]
                found.calibration[f"condition_kv/{site}/{which}/{statistic}"] = signed
    return found


@cache
def in_float64(name: str) -> Program:
    """The program with float64 in place of float32 everywhere."""
    return widened(program(name))


def widened(program: Program) -> Program:
    def widen(value: Any) -> Any:
        return torch.float64 if value is torch.float32 else value

    wide = program.copy()
    for node in wide.graph.nodes:
        if node.op == "get_attr" and node.meta["val"].is_floating_point():
            node.meta["val"] = node.meta["val"].double()
        node.args, node.kwargs = map_aggregate(node.args, widen), map_aggregate(node.kwargs, widen)
    tensors = {name: t.double() if t.is_floating_point() else t for name, t in wide.tensors().items()}
    wide.module = fx.GraphModule(tensors, wide.graph)
    propagate(wide)
    return wide


def logits(program: Program, length: int = 13) -> Tensor:
    positions = torch.arange(length).repeat(2, 1)
    with torch.no_grad():
        return program.run(input_ids=tokens(2, length), position_ids=positions)["logits"]


def difference(left: Tensor, right: Tensor) -> float:
    """The largest deviation, relative to the largest value."""
    return float((left - right).abs().max() / right.abs().max())


def condition(program: Program, *rewrites: str, bias: float = EVERY_BIAS) -> tuple[Program, list[Remark]]:
    result = run_pass(ConditionKV(rewrites, large_bias=bias), program, strict=False)
    return result, list(result.history[-1].remarks)


def statuses(remarks: list[Remark]) -> Counter[Status]:
    return Counter(remark.status for remark in remarks)


def keys_and_values(program: Program) -> list[tuple[Tensor, Tensor]]:
    """What enters each attention, [B, KH, S, D]."""
    found = []

    class Recorder(fx.Interpreter):
        def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
            if target is ATTENTION:
                found.append((args[1], args[2]))
            return super().call_function(target, args, kwargs)

    with torch.no_grad():
        Recorder(program.module).run(tokens(2, 13), torch.arange(13).repeat(2, 1))
    return found


# ---------------------------------------------------------------------------------------------------------- exactness


@pytest.mark.parametrize("rewrite", list(Rewrite))
@pytest.mark.parametrize("name", NAMES)
def test_each_rewrite_is_exact_where_it_applies(name: str, rewrite: Rewrite) -> None:
    exact = in_float64(name)
    result, remarks = condition(exact, rewrite)
    count = len(sites(exact))
    if reason := REFUSED.get((name, rewrite)):
        assert statuses(remarks) == {Status.REFUSED: count}
        assert all(reason in remark.why for remark in remarks)
    elif rewrite is Rewrite.SPLIT_K_BIAS and name not in BIASED:
        assert statuses(remarks) == {Status.MISSED: count}
    else:
        assert statuses(remarks) == {Status.APPLIED: count}, remarks
        new, old = keys_and_values(result)[0], keys_and_values(exact)[0]
        same = [difference(after, before) < 1e-12 for after, before in zip(new, old, strict=True)]
        assert same == ([True, False] if rewrite.name.startswith("FOLD_V") else [False, True])
    assert difference(logits(result), logits(exact)) <= 1e-12


@pytest.mark.parametrize("name", NAMES)
def test_all_rewrites_together_equal_the_model(name: str) -> None:
    before = {key: value.clone() for key, value in model(name).state_dict().items()}
    result, remarks = condition(program(name), *Rewrite)
    verify(result)
    with torch.no_grad():
        expected = model(name)(input_ids=tokens(2, 13), use_cache=False).logits
    assert difference(logits(result), expected) <= 1e-5
    assert all(torch.equal(value, before[key]) for key, value in model(name).state_dict().items())
    assert {t.dtype for t in result.tensors().values()} == {t.dtype for t in program(name).tensors().values()}
    assert statuses(remarks)[Status.APPLIED] >= 3 * len(sites(result))
    assert difference(logits(condition(in_float64(name), *Rewrite)[0]), logits(in_float64(name))) <= 1e-12


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gptj", "cohere", "phi3"])
def test_untied_scales_of_keys_would_change_the_output(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def untied(key: Any, query: Any) -> Tensor:
        return torch.arange(key.origins[0].numel()).reshape(key.origins[0].shape)

    monkeypatch.setattr(condition_kv, "tied_channels", untied)
    result, _ = condition(program(name), Rewrite.SMOOTH_K)
    assert difference(logits(result), logits(program(name))) > 1e-2


def test_channels_are_tied_by_rotary_pairs_and_by_shared_norms() -> None:
    def tied(name: str) -> list[list[int]]:
        projections, attention = Projections(program(name)), next(iter(sites(program(name))))
        query, key = (projections.before(operand) for operand in attention.args[:2])  # type: ignore[arg-type]
        return condition_kv.tied_channels(key, query).tolist()

    assert tied("phi3") == [[0, 1, 2, 3, 0, 1, 2, 3], [8, 9, 10, 11, 8, 9, 10, 11]]
    assert tied("gpt_neox")[:2] == [[0, 1, 0, 1, 4, 5, 6, 7], [8, 9, 8, 9, 12, 13, 14, 15]]
    assert tied("gptj")[1] == [8, 8, 10, 10, 12, 13, 14, 15]
    assert tied("gpt2")[1] == [8, 9, 10, 11, 12, 13, 14, 15]
    assert tied("qwen3") == tied("gemma3") == [[0, 1, 2, 3, 0, 1, 2, 3]] * 2
    assert tied("cohere") == [[0, 0, 2, 2, 4, 4, 6, 6], [8, 8, 10, 10, 12, 12, 14, 14]]


def test_a_conditioned_program_runs_through_a_cache() -> None:
    result, _ = condition(program("qwen2"), *Rewrite)
    cached = run_pass(InsertKVCache(), result)
    rows = torch.arange(13).repeat(2, 1)
    buffers = {port.name: torch.zeros(2, 2, 16, 8) for port in cached.inputs if port.slot is not None}
    start = torch.zeros(2, dtype=torch.int64)
    with torch.no_grad():
        out = cached.run(input_ids=tokens(2, 13), position_ids=rows, start=start, logit_rows=rows, **buffers)
    assert difference(out["logits"], logits(program("qwen2"))) <= 1e-5


# -------------------------------------------------------------------------------------------------- what it is good for


def calibrated(program: Program) -> Program:
    """The program with the statistics of its own keys and values."""
    found = program.copy()
    found.calibration = {}
    for site, pair in zip(sites(found).values(), keys_and_values(found), strict=True):
        for which, rows in zip(("key", "value"), pair, strict=True):
            flat = rows.transpose(1, 2).flatten(0, 1)
            statistics = {"minimum": flat.amin(0), "maximum": flat.amax(0), "mean": flat.mean(0)}
            found.calibration |= {f"condition_kv/{site}/{which}/{name}": value for name, value in statistics.items()}
    return found


def with_outliers(name: str) -> Program:
    """The program with two larger channels of keys and of values in the second head, of width 12."""
    changed = program(name).copy()
    for path in ("k_proj", "v_proj"):
        projection = changed.module.get_submodule(f"model.layers.0.self_attn.{path}")
        weight = projection.weight.detach().clone()
        weight[13:15] *= torch.tensor([[9.0], [50.0]])
        projection.weight = nn.Parameter(weight, requires_grad=False)
    return calibrated(changed)


def sizes(program: Program) -> tuple[Tensor, Tensor]:
    """The largest magnitudes of keys and of values, channel by channel, [KH, D] each."""
    keys, values = (rows.abs().amax(dim=(0, 2)) for rows in keys_and_values(program)[0])
    return keys, values


def assert_outliers_are_halved(new: Tensor, old: Tensor, median: Tensor) -> None:
    """Sizes [KH, D] of channels above twice the median [KH, 1] are halved until they are not, and no others."""
    outlier, halvings = old > 2 * median, (old / new).log2()
    assert outlier[1].sum() >= 2
    torch.testing.assert_close(halvings, halvings.round(), rtol=0, atol=1e-4)
    assert torch.equal(halvings.round() > 0, outlier)
    assert bool((new <= 2 * median).all()) and bool((new > median)[outlier].all())


def test_outlier_channels_of_values_are_halved() -> None:
    before = with_outliers("llama")
    (_, new), (_, old) = sizes(condition(before, Rewrite.FOLD_V_SCALE)[0]), sizes(before)
    assert_outliers_are_halved(new, old, old.median(dim=1, keepdim=True).values)


def test_rotated_values_are_the_values_times_a_hadamard_matrix() -> None:
    result, _ = condition(program("llama"), Rewrite.FOLD_V_ROTATION)
    matrix = torch.block_diag(*[hadamard(4)] * 3).float()
    for (_, new), (_, old) in zip(keys_and_values(result), keys_and_values(program("llama")), strict=True):
        torch.testing.assert_close(new, old @ matrix.T, rtol=1e-4, atol=1e-4)


def test_outlier_pairs_of_keys_are_halved() -> None:
    before = with_outliers("llama")
    (new, _), (old, _) = sizes(condition(before, Rewrite.SMOOTH_K)[0]), sizes(before)
    pairs = [each.unflatten(1, (2, 6)).amax(dim=1).repeat(1, 2) for each in (new, old)]
    assert_outliers_are_halved(*pairs, old.median(dim=1, keepdim=True).values)


KEYS = "condition_kv/model.layers.0.self_attn/key"


def with_key_statistics(minimum: Tensor, maximum: Tensor) -> Program:
    """The Llama with these ranges of its keys, and zero for their mean."""
    changed = program("llama").copy()
    statistics = {"minimum": minimum, "maximum": maximum, "mean": torch.zeros_like(minimum)}
    changed.calibration = changed.calibration | {f"{KEYS}/{name}": each.clone() for name, each in statistics.items()}
    return changed


def test_channels_that_stand_out_by_their_mean_alone_are_centred_instead_of_halved() -> None:
    before = with_key_statistics(-torch.ones(2, 12), torch.ones(2, 12))
    for statistic in ("minimum", "maximum", "mean"):
        before.calibration[f"{KEYS}/{statistic}"][0, 3] += 1000.0
    alone, both = (Rewrite.SMOOTH_K,), (Rewrite.SMOOTH_K, Rewrite.CENTRE_K)
    apart, together = (condition(before, *each)[1] for each in (alone, both))
    assert statuses(apart) == {Status.APPLIED: 1}
    assert statuses(together) == {Status.APPLIED: 1, Status.MISSED: 1}


def test_nothing_is_done_where_no_channel_stands_out() -> None:
    before = with_key_statistics(-torch.ones(2, 12), torch.linspace(1, 1.9, 12).expand(2, 12))
    _, remarks = condition(before, Rewrite.SMOOTH_K)
    assert [remark.why for remark in remarks] == [
        "smooth_k: no channel stands out: the largest is 1.3 times the median"
    ]


@pytest.mark.parametrize("rewrites", [(Rewrite.CENTRE_K,), (Rewrite.SMOOTH_K, Rewrite.CENTRE_K)])
def test_centred_keys_have_no_mean(rewrites: tuple[Rewrite, ...]) -> None:
    result, _ = condition(calibrated(program("gemma3")), *rewrites)
    for keys, _ in keys_and_values(result):
        assert float(keys.mean(dim=(0, 2)).abs().max()) < 1e-5


@pytest.mark.parametrize("size", [1, 2, 8, 64])
def test_hadamard_matrices_are_orthogonal(size: int) -> None:
    matrix = hadamard(size)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64))
    torch.testing.assert_close(matrix.abs(), torch.full_like(matrix, size**-0.5))


# ------------------------------------------------------------------------------------------------------ large key bias


def with_large_bias(name: str, layer: int, length: float = 600.0) -> Program:
    """A program of which one layer has a key bias of that length, most of it in one channel of the first head."""
    changed = program(name).copy()
    path = f"model.layers.{layer}.self_attn.k_proj"
    bias = changed.tensor(f"{path}.bias").detach().clone()
    bias[3] = length
    changed.module.get_submodule(path).bias = nn.Parameter(bias * length / bias.norm(), requires_grad=False)
    return changed


@pytest.mark.parametrize("name", NAMES)
def test_ordinary_biases_are_not_large(name: str) -> None:
    assert large_key_biases(program(name)) == {}


def test_a_large_bias_is_found_and_split_off() -> None:
    changed = with_large_bias("qwen2", layer=1)
    weight, bias = (changed.tensor(f"model.layers.1.self_attn.k_proj.{each}")[:8] for each in ("weight", "bias"))
    width = (weight * changed.tensor("model.layers.1.input_layernorm.weight")).norm() / 8**0.5
    assert bias.norm() / width > 100
    expected = {"model.layers.1.self_attn": pytest.approx(float(bias.norm() / width), rel=1e-5)}
    assert large_key_biases(changed) == expected

    exact = widened(changed)
    result, remarks = condition(exact, Rewrite.SMOOTH_K, Rewrite.SPLIT_K_BIAS, bias=8.0)
    assert [remark.status for remark in remarks if "split" in remark.why] == [Status.MISSED, Status.APPLIED]
    assert difference(logits(result), logits(exact)) <= 1e-12
    assert large_key_biases(result) == {}
    before, after = keys_and_values(exact)[1][0], keys_and_values(result)[1][0]
    assert float(after.abs().max()) < float(before.abs().max()) / 50


def test_a_large_bias_is_found_behind_a_cache_and_a_subtracted_mean() -> None:
    changed = with_large_bias("qwen2", layer=0)
    centred, remarks = condition(changed, Rewrite.CENTRE_K)
    assert statuses(remarks) == {Status.APPLIED: 2}
    assert large_key_biases(run_pass(InsertKVCache(), centred)) == large_key_biases(changed) != {}


def test_a_large_bias_before_a_norm_is_found_and_refused() -> None:
    changed = with_large_bias("qwen3", layer=0)
    assert list(large_key_biases(changed)) == ["model.layers.0.self_attn"]
    result, remarks = condition(changed, Rewrite.SPLIT_K_BIAS, bias=8.0)
    assert [remark.status for remark in remarks] == [Status.REFUSED]
    assert large_key_biases(result) == large_key_biases(changed)


def test_frequencies_are_those_of_the_rotary_embedding() -> None:
    result, _ = condition(program("llama_yarn"), Rewrite.SPLIT_K_BIAS)
    embedding = model("llama_yarn").get_submodule("model.rotary_emb")
    bias = model("llama_yarn").get_submodule("model.layers.0.self_attn.k_proj").bias.reshape(4, 8)
    node = next(result.nodes(ATTENTION))
    key_bias, frequencies = (result.tensor(str(node.args[i].target)) for i in (6, 7))  # type: ignore[union-attr]
    assert torch.equal(frequencies, embedding.inv_freq.repeat(2))
    scaled = bias * embedding.attention_scaling
    assert embedding.attention_scaling != 1
    torch.testing.assert_close(key_bias, torch.stack([scaled, torch.cat([-scaled[:, 4:], scaled[:, :4]], 1)]))


# ------------------------------------------------------------------------------------------------------------ refusals


class Layer(nn.Module):
    """Attention with one thing in the way of folding."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.query, self.key, self.value, self.out = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (2, 8)).transpose(1, 2) for part in (self.query, self.key, self.value))
        match self.kind:
            case "activation":
                v = v.tanh()
            case "clamp":
                k = k.clamp(-1, 1)
            case "factor":
                k = k * x.mean(-1, keepdim=True)[:, None]
            case "keys are values":
                v = k
            case "shift":
                k = k + 1
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2)
        out = self.out(out * x.sigmoid() if self.kind == "gate" else out)
        return out + v.sum(dim=(1, 3))[..., None] if self.kind == "other reader" else out


IN_THE_WAY = {
    "shared weight": (Rewrite.SMOOTH_K, "the weight"),
    "weight of the same memory": (Rewrite.FOLD_V_ROTATION, "the weight"),
    "activation": (Rewrite.FOLD_V_ROTATION, "aten.tanh"),
    "clamp": (Rewrite.SMOOTH_K, "aten.clamp"),
    "factor": (Rewrite.SMOOTH_K, "aten.mul"),
    "keys are values": (Rewrite.FOLD_V_ROTATION, "more than one of queries, keys and values"),
    "shift": (Rewrite.SMOOTH_K, "aten.add"),
    "gate": (Rewrite.FOLD_V_ROTATION, "aten.mul between the attention and its output projection"),
    "other reader": (Rewrite.FOLD_V_ROTATION, "aten.sum"),
}


class Layers(nn.Module):
    """One layer of each kind, and a plain one, which holds what the first two share."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(kind) for kind in (*IN_THE_WAY, "plain"))
        first, second, *_, plain = self.layers
        plain.key.weight = first.key.weight
        plain.value.weight = nn.Parameter(second.value.weight.detach()[:])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


@pytest.fixture(scope="module")
def odd() -> Program:
    torch.manual_seed(0)
    found = capture_module(Layers().eval(), {"x": torch.randn(3, 7, 16)})
    for site in sites(found).values():
        for statistic, sign in (("minimum", -1), ("maximum", 1)):
            found.calibration[f"condition_kv/{site}/key/{statistic}"] = sign * torch.randn(2, 8).mul(2).exp()
    return found


def test_what_is_not_exact_is_refused_with_its_reason(odd: Program) -> None:
    result, remarks = condition(odd, Rewrite.FOLD_V_ROTATION, Rewrite.SMOOTH_K)
    refused = {(r.where, r.why.partition(":")[0]): r.why for r in remarks if r.status is Status.REFUSED}
    for place, (rewrite, reason) in enumerate(IN_THE_WAY.values()):
        assert reason in refused.pop((f"layers.{place}", rewrite))
    plain = f"layers.{len(IN_THE_WAY)}"
    assert "which" in refused.pop((plain, Rewrite.SMOOTH_K)) and "which" in refused.pop(
        (plain, Rewrite.FOLD_V_ROTATION)
    )
    assert list(refused) == [("layers.5", Rewrite.SMOOTH_K)], "keys that are values cannot be scaled either"
    assert statuses(remarks)[Status.APPLIED] == 2 * 10 - len(IN_THE_WAY) - 3
    x = torch.randn(2, 5, 16)
    assert difference(result.run(x=x)["output"], odd.run(x=x)["output"]) <= 1e-5


def test_keys_that_something_else_reads_stay_as_they_are() -> None:
    changed = program("qwen2").copy()
    keys = next(iter(sites(changed))).args[1]
    with changed.graph.inserting_before(changed.output_node()):
        changed.add_output(Port("keys", Role.TENSOR), changed.call(torch.ops.aten.clone.default, keys))
    changed.recompile()
    for rewrite in (Rewrite.SMOOTH_K, Rewrite.SPLIT_K_BIAS, Rewrite.CENTRE_K):
        _, remarks = condition(changed, rewrite)
        assert [remark.status for remark in remarks] == [Status.REFUSED, Status.APPLIED]
        assert "reads too" in remarks[0].why


def test_weights_that_would_overflow_stay_as_they_are() -> None:
    changed = program("llama").copy()
    name = "model.layers.0.self_attn.k_proj.weight"
    node = next(node for node in changed.graph.nodes if node.target == name)
    before = changed.tensor(name)
    overlay = condition_kv._Overlay(changed)
    overlay.change(node, lambda weight: weight * 1e60)
    with pytest.raises(Unsupported, match=r"k_proj\.weight beyond the range of torch\.float32"):
        overlay.commit()
    assert changed.tensor(name) is before


@pytest.mark.parametrize(
    ("rewrites", "name", "value", "message"),
    [
        ((Rewrite.SMOOTH_K,), "key/minimum", None, "no calibrated minimum of the keys"),
        ((Rewrite.CENTRE_K,), "key/mean", torch.full((2, 12), torch.nan), "NaN or infinity"),
        ((Rewrite.FOLD_V_SCALE,), "value/maximum", torch.full((2, 12), torch.inf), "NaN or infinity"),
        ((Rewrite.FOLD_V_SCALE,), "value/maximum", torch.ones(2, 8), r"shape \[2, 8\], the model needs \[2, 12\]"),
    ],
)
def test_missing_or_damaged_calibration_is_refused_before_anything_is_changed(
    rewrites: tuple[str, ...], name: str, value: Tensor | None, message: str
) -> None:
    damaged = program("llama").copy()
    damaged.calibration = dict(damaged.calibration)
    del damaged.calibration[f"condition_kv/model.layers.0.self_attn/{name}"]
    if value is not None:
        damaged.calibration[f"condition_kv/model.layers.0.self_attn/{name}"] = value
    with pytest.raises(InvalidInput, match=message):
        run_pass(ConditionKV(rewrites), damaged)


def test_a_rotation_and_a_split_need_no_calibration() -> None:
    bare = program("qwen2").copy()
    bare.calibration = {}
    _, remarks = condition(bare, Rewrite.FOLD_V_ROTATION, Rewrite.SPLIT_K_BIAS)
    assert statuses(remarks) == {Status.APPLIED: 4}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (ConditionKV(("smooth_keys",)), "nearest is 'smooth_k'"),
        (ConditionKV(large_bias=0.0), "large_bias is 0.0"),
        (ConditionKV(large_bias=float("nan")), "large_bias is nan"),
    ],
)
def test_impossible_settings_are_refused(entry: ConditionKV, message: str) -> None:
    with pytest.raises(InvalidPlan, match=message):
        run_pass(entry, program("llama"))
