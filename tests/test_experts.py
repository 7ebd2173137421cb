"""A mixture of experts as one node: the operator, how models give it, what is known of it, and its ONNX form."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.integrations.moe import ExpertsInterface, _default_apply_gate, batched_mm_experts_forward
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Experts
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from skipstone.ir.capture import huggingface
from skipstone.ir.capture.experts import read_gate, recognise_experts
from skipstone.ir.capture.exported import export, source_of, to_program
from skipstone.ir.capture.huggingface import capture_huggingface
from skipstone.ir.capture.module import capture_module
from skipstone.ir.capture.validate import relative_difference
from skipstone.ir.cost import cost, evaluate
from skipstone.ir.dialect import EXPERTS, Layout, experts
from skipstone.ir.experts import gated
from skipstone.ir.program import Program, module_path
from skipstone.ir.sequence import offenders, prove_cacheable
from skipstone.ir.stream import SublayerKind, find_stream
from skipstone.ir.verify import verify
from skipstone.passes.base import Pipeline, run_pass
from skipstone.passes.cast import CastToFloat32
from skipstone.passes.kv_cache import InsertKVCache
from skipstone.passes.skip_sublayers import SkipSublayers
from skipstone.runtime.cache import KVCache
from skipstone.runtime.eager import EagerSession
from skipstone.runtime.onnx.lower import lower
from skipstone.runtime.onnx.session import OnnxSession
from tests import models
from tests.tiny_models import tiny_model, tokens

EXPERTS_HERE, HIDDEN, INNER, CHOICES = 5, 18, 22, 3
SCALE = 10.0  # of the results
GATES: dict[str, dict[str, Any]] = {
    "silu": {"activation": "swish", "layout": "concatenated"},
    "gpt_oss": {"activation": "swish", "layout": "interleaved", "alpha": 1.702, "limit": 0.7, "shift": 1.0},
    "limited": {"activation": "gelu", "layout": "concatenated", "limit": 0.5},
    "interleaved": {"activation": "gelu_tanh", "layout": "interleaved"},
    "relu": {"activation": "relu", "layout": "concatenated", "shift": -0.25},
    "ungated": {"activation": "relu_squared", "layout": "ungated"},
}


def stacks(layout: str, transposed: bool, bias: bool, dtype: torch.dtype = torch.float32) -> dict[str, Tensor | None]:
    """The weights of some experts, by the operator's argument names."""
    width = INNER if layout == Layout.UNGATED else 2 * INNER
    up, down = torch.randn(EXPERTS_HERE, width, HIDDEN), torch.randn(EXPERTS_HERE, HIDDEN, INNER)
    if transposed:
        up, down = up.mT.contiguous(), down.mT.contiguous()
    biases = (torch.randn(EXPERTS_HERE, width), torch.randn(EXPERTS_HERE, HIDDEN)) if bias else (None, None)
    named = dict(zip(("up", "down", "up_bias", "down_bias"), (up * 0.3, down * 0.3, *biases), strict=True))
    return {name: None if tensor is None else tensor.to(dtype) for name, tensor in named.items()}


def routing(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, their experts (some name none, some name one twice), and weights of both signs."""
    index = torch.randint(0, EXPERTS_HERE, (rows, CHOICES))
    if rows > 2:
        index[0], index[1, 1], index[2] = EXPERTS_HERE, -1, 3
    return torch.randn(rows, HIDDEN), index, torch.randn(rows, CHOICES)


def token_by_token(
    x: Tensor, index: Tensor, weights: Tensor, up: Tensor, down: Tensor, up_bias: Any, down_bias: Any,
    activation: str, layout: str, alpha: float = 1.0, limit: float = math.inf, shift: float = 0.0,
    transposed: bool = False,
) -> Tensor:  # fmt: skip
    """What `skipstone::experts` shall compute, for one token and one choice at a time, in float64."""
    act: Callable[[Tensor], Tensor] = {
        "swish": lambda x: x / (1 + torch.exp(-alpha * x)),
        "gelu": lambda x: x * (1 + torch.erf(x / math.sqrt(2))) / 2,
        "gelu_tanh": lambda x: x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
        "relu": lambda x: x * (x > 0),
        "relu_squared": lambda x: x * x * (x > 0),
    }[activation]
    result = torch.zeros_like(x, dtype=torch.float64)
    for token in range(len(x)):
        for choice in range(index.shape[1]):
            expert = int(index[token, choice])
            if not 0 <= expert < len(up):
                continue
            first, second = up[expert].double(), down[expert].double()
            if transposed:
                first, second = first.T, second.T
            hidden = first @ x[token].double()
            hidden = hidden if up_bias is None else hidden + up_bias[expert].double()
            if layout == "ungated":
                hidden = act(hidden)
            else:
                half = len(hidden) // 2
                gate, linear = (hidden[:half], hidden[half:]) if layout == "concatenated" else hidden.reshape(-1, 2).T
                hidden = act(gate.clamp(max=limit)) * (linear.clamp(-limit, limit) + shift)
            out = second @ hidden
            out = out if down_bias is None else out + down_bias[expert].double()
            result[token] += out * weights[token, choice].double()
    return result


# ------------------------------------------------------------------------------------------------ the operator


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
@pytest.mark.parametrize("gate", GATES)
def test_the_operator_equals_a_loop_over_tokens(gate: str, transposed: bool, bias: bool) -> None:
    options = GATES[gate] | {"transposed": transposed}
    rows, weights = routing(7), stacks(options["layout"], transposed, bias)
    expected = token_by_token(*rows, **weights, **options)  # type: ignore[arg-type]
    x, index, factors = rows
    wide = {name: None if tensor is None else tensor.double() for name, tensor in weights.items()}
    exact = experts(x.double(), index, factors.double(), **wide, **options)
    assert relative_difference(exact, expected) < 1e-13
    assert relative_difference(experts(*rows, **weights, **options).double(), expected) < 1e-6
    assert exact[0].abs().max() == 0, "a number outside of the experts names none"


@pytest.mark.parametrize("gate", ["silu", "gpt_oss"])
def test_half_precision_is_rounded_once(gate: str) -> None:
    options, half = GATES[gate], torch.bfloat16
    weights = stacks(options["layout"], False, True, half)
    x, index, factors = routing(7)
    x, factors = x.to(half), factors.to(half)
    result = experts(x, index, factors, **weights, **options)
    expected = token_by_token(x, index, factors, **weights, **options)  # type: ignore[arg-type]
    assert result.dtype == half
    torch.testing.assert_close(result.double(), expected, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("gate", ["gpt_oss", "ungated"])
def test_the_operator_is_well_formed(gate: str) -> None:
    options = GATES[gate]
    arguments = (*routing(7), *stacks(options["layout"], False, True).values())
    torch.library.opcheck(EXPERTS, arguments, options)
    assert experts(*routing(0), **stacks(options["layout"], False, False), **options).shape == (0, HIDDEN)


# ------------------------------------------------------------------------------------------------ gates


def default_gate(activation: str) -> Callable[[Tensor], Tensor]:
    module = SimpleNamespace(act_fn=ACT2FN[activation])
    return lambda x: _default_apply_gate(module, x)


def method(experts_class: Any, **attributes: Any) -> Callable[[Tensor], Tensor]:
    module = SimpleNamespace(**attributes)
    return lambda x: experts_class._apply_gate(module, x)


KNOWN: dict[str, tuple[Callable[[Tensor], Tensor], str, str]] = {
    "silu": (default_gate("silu"), "swish", "concatenated"),
    "swish": (default_gate("swish"), "swish", "concatenated"),
    "quick_gelu": (default_gate("quick_gelu"), "swish", "concatenated"),
    "gelu": (default_gate("gelu"), "gelu", "concatenated"),
    "gelu_pytorch_tanh": (default_gate("gelu_pytorch_tanh"), "gelu_tanh", "concatenated"),
    "relu": (default_gate("relu"), "relu", "concatenated"),
    "relu2": (default_gate("relu2"), "relu_squared", "concatenated"),
    "gpt_oss": (method(GptOssExperts, alpha=1.702, limit=7.0), "swish", "interleaved"),
    "gpt_oss with other numbers": (method(GptOssExperts, alpha=0.5, limit=3.0), "swish", "interleaved"),
    "deepseek_v4": (method(DeepseekV4Experts, limit=10.0, act_fn=ACT2FN["silu"]), "swish", "concatenated"),
    "swish in full": (
        lambda x: (x[..., 1::2] + -2) * (x[..., ::2] * torch.sigmoid(x[..., ::2])),
        "swish",
        "interleaved",
    ),
    "no gate": (ACT2FN["relu2"], "relu_squared", "ungated"),
    "no gate, quick_gelu": (ACT2FN["quick_gelu"], "swish", "ungated"),
}


@pytest.mark.parametrize("name", KNOWN)
def test_gates_are_read_exactly(name: str) -> None:
    function, activation, layout = KNOWN[name]
    options = read_gate(function, torch.zeros(2, 12))
    assert options is not None
    assert (options["activation"], options["layout"]) == (activation, layout)
    x = torch.randn(400, 12, dtype=torch.float64) * 8
    every = {"alpha": 1.0, "limit": 0.0, "shift": 0.0} | options
    torch.testing.assert_close(gated(x, **every), function(x), rtol=1e-13, atol=1e-13)


def value_dependent(x: Tensor) -> Tensor:
    return x.relu() if x.sum() > 0 else x


def clamped_in_place(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    x.clamp_(max=1.0)
    return gate.relu() * up


def bounded(x: Tensor, gate_bound: float, low: float, high: float) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return gate.clamp(max=gate_bound).relu() * up.clamp(low, high)


UNKNOWN: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_new": default_gate("gelu_new"),
    "relu6": default_gate("relu6"),
    "tanh": default_gate("tanh"),
    "up before gate": lambda x: x.chunk(2, dim=-1)[0] * x.chunk(2, dim=-1)[1].relu(),
    "the gate alone": lambda x: x.chunk(2, dim=-1)[0].relu(),
    "the gate twice": lambda x: x.chunk(2, dim=-1)[0].relu() * x.chunk(2, dim=-1)[0],
    "first of three parts": lambda x: x.split(4, dim=-1)[0].relu() * x.split(4, dim=-1)[1],
    "one gate for all": lambda x: x.split(1, dim=-1)[0].relu() * x.chunk(2, dim=-1)[1],
    "columns to the fourth": lambda x: x[..., 0:4:2].relu() * x[..., 1:4:2],
    "rows": lambda x: x[::2].relu() * x[1::2],
    "limits that differ": lambda x: bounded(x, 1.0, -2.0, 2.0),
    "limits that are not symmetric": lambda x: bounded(x, 2.0, -1.0, 2.0),
    "only one limit": lambda x: x[..., ::2].clamp(max=2.0).relu() * x[..., 1::2],
    "limited after the activation": lambda x: x[..., ::2].relu().clamp(max=2.0) * x[..., 1::2].clamp(-2.0, 2.0),
    "two terms": lambda x: x[..., ::2].relu() * (x[..., 1::2] + x[..., ::2]),
    "scaled": lambda x: x[..., ::2].relu() * x[..., 1::2] * 2.0,
    "rounded": lambda x: (x[..., ::2].relu() * x[..., 1::2]).to(torch.bfloat16).to(x.dtype),
    "parameters": nn.PReLU(),
    "two sigmoids": lambda x: x[..., ::2] * torch.sigmoid(x[..., 1::2]),
    "in place": clamped_in_place,
    "control flow": value_dependent,
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_other_gates_are_not_taken_for_known_ones(name: str) -> None:
    assert read_gate(UNKNOWN[name], torch.zeros(2, 12)) is None


def test_experts_that_the_operator_does_not_cover_are_not_recognised() -> None:
    module = models.model("mixtral").model.layers[0].mlp.experts
    assert recognise_experts(module) is not None
    for change in ({"has_post_expert_norm": True}, {"num_experts": 3}, {"act_fn": ACT2FN["gelu_new"]}):
        other = copy.copy(module)
        vars(other).update(vars(module) | {"_modules": dict(module._modules)})
        for name, value in change.items():
            setattr(other, name, value)
        assert recognise_experts(other) is None, change


# ------------------------------------------------------------------------------------------------ capture


@cache
def mixture(name: str) -> tuple[PreTrainedModel, Program]:
    if name in models.CAUSAL:
        return models.model(name), models.program(name)
    model = tiny_model(name)
    return model, capture_huggingface(model)


MIXTURES = {"mixtral": [0, 1, 2], "gpt_oss": [0, 1, 2], "qwen3_moe": [0, 1, 2, 3], "deepseek_v3": [1, 2, 3]}
SAMPLE = ["mixtral", "gpt_oss", *(pytest.param(n, marks=pytest.mark.slow) for n in ("qwen3_moe", "deepseek_v3"))]


@pytest.mark.parametrize("name", SAMPLE)
def test_each_mixture_is_one_node_with_exact_logits(name: str) -> None:
    model, program = mixture(name)
    nodes = list(program.nodes(EXPERTS))
    assert [module_path(node) for node in nodes] == [f"model.layers.{i}.mlp.experts" for i in MIXTURES[name]]
    assert not list(program.nodes(torch.ops.aten.bmm.default)), "the experts are in no other form"
    verify(program)
    for batch, length in ((1, 1), (2, 31)):
        ids, positions = tokens(batch, length) % 61, torch.arange(length).repeat(batch, 1)
        with torch.no_grad():
            expected = model(input_ids=ids, use_cache=False).logits
        actual = program.run(input_ids=ids, position_ids=positions)["logits"]
        assert relative_difference(actual, expected) < 1e-5


def test_what_gpt_oss_does_between_its_products_is_in_the_node() -> None:
    node = next(mixture("gpt_oss")[1].nodes(EXPERTS))
    options = {"activation": "swish", "layout": "interleaved", "alpha": 1.702, "limit": 7.0, "shift": 1.0}
    assert node.kwargs == options | {"transposed": True}
    assert len(node.args) == 7, "with both biases"


def small_mixtral(**options: Any) -> MixtralForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": models.VOCABULARY}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    config = MixtralConfig(**sizes, **heads, num_local_experts=4, initializer_range=0.3, **options)
    return MixtralForCausalLM(config).eval()


def test_an_unknown_activation_keeps_the_model_exact_in_another_form() -> None:
    model = small_mixtral(hidden_act="gelu_new")
    program = capture_huggingface(model)
    assert not list(program.nodes(EXPERTS))
    ids, positions = models.tokens(2, 9), torch.arange(9).repeat(2, 1)
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
    assert relative_difference(program.run(input_ids=ids, position_ids=positions)["logits"], expected) < 1e-5


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_and_the_registry_are_left_as_they_were(monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    model = small_mixtral()
    registry, config = dict(ExpertsInterface._global_mapping), copy.deepcopy(vars(model.config))
    ids = models.tokens(2, 9)
    with torch.no_grad():
        before = model(input_ids=ids).logits

    def fail(*_: object) -> None:
        assert huggingface.NAME in ExpertsInterface._global_mapping
        raise RuntimeError("half-way")

    if fails:
        monkeypatch.setattr(huggingface, "export", fail)
        with pytest.raises(RuntimeError, match="half-way"):
            capture_huggingface(model)
    else:
        capture_huggingface(model)
    assert ExpertsInterface._global_mapping == registry
    assert vars(model.config) == config
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, before)


def test_in_bfloat16_the_program_is_as_accurate_as_the_model() -> None:
    model = small_mixtral().to(torch.bfloat16)
    program = capture_huggingface(model)
    assert len(list(program.nodes(EXPERTS))) == 2
    ids, positions = models.tokens(4, 23), torch.arange(23).repeat(4, 1)
    inputs = {"input_ids": ids, "position_ids": positions}
    with torch.no_grad():
        theirs = model(**inputs, use_cache=False).logits
        exact = copy.deepcopy(model).float()(**inputs, use_cache=False).logits
    ours = program.run(**inputs)["logits"]
    errors = [(logits.float() - exact).pow(2).mean() for logits in (ours, theirs)]
    assert errors[0] <= 1.5**2 * errors[1]
    widened = run_pass(CastToFloat32(), program)
    got = OnnxSession(widened, 1).run(inputs)["logits"]
    assert relative_difference(got, exact) < 1e-5


# ------------------------------------------------------------------------------------------------ analyses


@pytest.mark.parametrize("name", SAMPLE)
def test_a_mixture_is_an_ffn_that_keeps_tokens_apart(name: str) -> None:
    program = mixture(name)[1]
    prove_cacheable(program)
    stream = find_stream(program)
    kinds = [(sublayer.kind, sublayer.path.split(".")[-1]) for sublayer in stream.sublayers]
    assert kinds == [(SublayerKind.ATTENTION, "self_attn"), (SublayerKind.FFN, "mlp")] * stream.layers


class Routed(nn.Module):
    """Tokens whose experts are chosen by `choose`, from [B, S, H] to anything that flattens to [B * S, H]."""

    def __init__(self, choose: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.choose, self.embed = choose, nn.Embedding(11, HIDDEN)
        weights = stacks("concatenated", False, False)
        self.up, self.down = (nn.Parameter(weights[name]) for name in ("up", "down"))  # type: ignore[arg-type]

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        weights, index = self.choose(x)[..., :EXPERTS_HERE].reshape(-1, EXPERTS_HERE).topk(CHOICES)
        out = experts(x.reshape(-1, HIDDEN), index, weights, self.up, self.down, activation="relu", layout=CONCATENATED)
        return out.reshape(x.shape) + position_ids.unsqueeze(-1)


CONCATENATED = str(Layout.CONCATENATED)


def test_experts_of_other_tokens_are_refused_a_cache() -> None:
    inputs = {"input_ids": torch.arange(15).reshape(3, 5) % 11, "position_ids": torch.arange(5).repeat(3, 1)}
    assert not list(offenders(capture_module(Routed(lambda x: x).eval(), inputs)))
    (offender,) = offenders(capture_module(Routed(lambda x: x.transpose(0, 1)).eval(), inputs))
    assert offender.node.target is EXPERTS


def test_flops_equal_those_of_the_batched_form() -> None:
    model, program = mixture("gpt_oss")
    module, price = model.model.layers[0].mlp.experts, cost(program, list(program.nodes(EXPERTS))[:1])
    for batch, length in ((1, 1), (3, 7)):
        index = torch.randint(0, 4, (batch * length, 4))
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            batched_mm_experts_forward(module, torch.randn(batch * length, 32), index, torch.rand(batch * length, 4))
        assert evaluate(price, batch, length)["flops"] == counter.get_total_flops()


def test_only_the_matrices_of_chosen_experts_are_read() -> None:
    model, program = mixture("mixtral")
    module, price = model.model.layers[0].mlp.experts, cost(program, list(program.nodes(EXPERTS))[:1])
    whole = module.gate_up_proj.nbytes + module.down_proj.nbytes
    assert price.parameter_bytes == whole
    assert evaluate(price, 1, 1)["weight_bytes"] == whole / 4 * 2, "2 of 4 experts"
    assert evaluate(price, 3, 5)["weight_bytes"] == whole


def test_a_skipped_mixture_takes_its_weights_along() -> None:
    model, program = mixture("mixtral")
    shorter = run_pass(SkipSublayers(ffn=(1,)), program)
    assert len(list(shorter.nodes(EXPERTS))) == 2
    gone = set(program.tensors()) - set(shorter.tensors())
    layer = model.model.layers[1]
    assert gone == {f"model.layers.1.mlp.{name}" for name, _ in layer.mlp.named_parameters()} | {
        "model.layers.1.post_attention_layernorm.weight"
    }


# ------------------------------------------------------------------------------------------------ ONNX


class Alone(nn.Module):
    """The operator by itself, with the rows and their routing as inputs; `scaled` makes its weights no parameters."""

    def __init__(self, options: dict[str, Any], bias: bool, scaled: bool = False) -> None:
        super().__init__()
        self.options, self.scaled = options, scaled
        for name, tensor in stacks(options["layout"], options["transposed"], bias).items():
            self.register_parameter(name, None if tensor is None else nn.Parameter(tensor))

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        up = self.up * 2 if self.scaled else self.up
        return experts(x, index, weights, up, self.down, self.up_bias, self.down_bias, **self.options)


def alone(options: dict[str, Any], bias: bool, scaled: bool = False) -> Program:
    module = Alone(options, bias, scaled).eval()
    inputs = dict(zip(("x", "index", "weights"), routing(7), strict=True))
    exported = export(module, inputs, dict.fromkeys(inputs, (0,)))
    return to_program(exported, source_of(module, vocabulary=None, max_positions=None), {})


def assert_same_results(program: Program, session: OnnxSession) -> None:
    for rows in (1, 2, 40, 0):
        inputs = dict(zip(("x", "index", "weights"), routing(rows), strict=True))
        got, expected = (run(inputs)["output_0"] for run in (session.run, EagerSession(program).run))
        torch.testing.assert_close(got, expected, atol=2e-6 * SCALE, rtol=0)


@pytest.mark.parametrize(
    ("transposed", "bias"),
    [(False, False), (True, True), *(pytest.param(t, not t, marks=pytest.mark.slow) for t in (False, True))],
    ids=["", "transposed-bias", "bias", "transposed"],
)
@pytest.mark.parametrize("gate", GATES)
def test_onnx_runtime_gives_the_same_for_one_row_and_for_many(gate: str, transposed: bool, bias: bool) -> None:
    program = alone(GATES[gate] | {"transposed": transposed}, bias)
    assert_same_results(program, OnnxSession(program, 1))


def test_weights_that_are_computed_lower_too() -> None:
    program = alone(GATES["silu"] | {"transposed": False}, False, scaled=True)
    assert_same_results(program, OnnxSession(program, 1))


@pytest.mark.parametrize("session", [EagerSession, lambda program: OnnxSession(program, 1)], ids=["eager", "onnx"])
def test_experts_that_nobody_chose_are_not_computed(session: Callable[[Program], Any]) -> None:
    program = alone(GATES["silu"] | {"transposed": False}, False)
    with torch.no_grad():
        for name in ("up", "down"):
            program.tensor(name)[[0, 2]] = math.nan
    x, _, weights = routing(4)
    inputs = {
        "x": x,
        "index": torch.tensor([[1, 3, 4], [4, 4, 1], [3, 1, EXPERTS_HERE], [1, 4, 3]]),
        "weights": weights,
    }
    run = session(program)
    assert run.run(inputs)["output_0"].isfinite().all()
    inputs["index"][2, 1] = 2
    assert run.run(inputs)["output_0"].isnan().any(1).tolist() == [False, False, True, False]


def test_the_matrices_of_each_expert_are_memory_of_the_stack() -> None:
    program = alone(GATES["silu"] | {"transposed": False}, False)
    lowered = lower(program)
    for name in ("up", "down"):
        for expert, matrix in enumerate(program.tensor(name)):
            assert lowered.tensors[f"{name}.{expert}"].data_ptr() == matrix.data_ptr()
    assert len(lowered.tensors) == 2 * EXPERTS_HERE, "the stacks themselves are gone"
    model = onnx.load_from_string(lowered.proto)
    assert {node.domain for node in model.graph.node} <= {"", "com.microsoft"}
    assert {opset.domain for opset in model.opset_import} <= {"", "com.microsoft"}


@pytest.mark.parametrize(
    "name", ["gpt_oss", *(pytest.param(n, marks=pytest.mark.slow) for n in ("mixtral", "deepseek_v3"))]
)
def test_prefill_and_decode_in_onnx_runtime(name: str) -> None:
    program = Pipeline([InsertKVCache()]).run(mixture(name)[1])
    reference, session = EagerSession(program), OnnxSession(program, 1)
    caches = [KVCache.allocate(session.layout, 2, 40) for _ in range(2)]
    start = torch.tensor([0, 0])
    for rows in (17, 1, 1, 5, 1):
        ids, positions = tokens(2, rows) % 61, start.unsqueeze(1) + torch.arange(rows)
        wanted = torch.arange(rows).repeat(2, 1)
        expected, got = (
            each.step(ids, positions, torch.full_like(start, rows), wanted, cache)
            for each, cache in zip((reference, session), caches, strict=True)
        )
        for filled in caches:
            filled.advance(torch.full_like(start, rows))
        assert relative_difference(got, expected) < 1e-5
        start = start + rows
