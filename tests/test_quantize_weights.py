"""Weights of 4 and 8 bits: the operator, the rewrite, what it composes with, and what comes out of ONNX Runtime."""

from __future__ import annotations

import json
import logging
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import skipstone
from skipstone import (
    LayerParallel,
    Plan,
    QuantizeKV,
    QuantizeWeights,
    Segment,
    SkipByPrompt,
    SkipFFNAdaptive,
    SkipSublayers,
)
from skipstone.budget import Budget, Comparison
from skipstone.calibrate import Batch
from skipstone.certify import certify
from skipstone.errors import InvalidInput, InvalidPlan, Unsupported
from skipstone.ir.capture.huggingface import capture_huggingface
from skipstone.ir.capture.module import capture_module
from skipstone.ir.cost import cost, evaluate
from skipstone.ir.dialect import MATMUL_NBITS, matmul_nbits
from skipstone.ir.program import Program
from skipstone.ir.sequence import offenders
from skipstone.optimize import lower
from skipstone.passes.base import run_pass
from skipstone.passes.quantize_weights import quantized
from skipstone.passes.skip_by_prompt import CENTROIDS
from skipstone.rewrite import check_plan, rewrite
from skipstone.runtime.executable import Executable
from skipstone.runtime.onnx.runner import Runner
from skipstone.runtime.onnx.session import OnnxSession
from skipstone.runtime.triton.lower import lower as lower_to_triton
from tests.export_cases import PADDINGS, Loader, all_nodes, assert_close, batch, original_logits
from tests.genai_cases import assert_same_tokens, with_end
from tests.tiny_models import VOCABULARY, randomize, tokens
from tests.versions import needs_group_query_attention
from tests.weight_cases import dequantized, dequantized_model, products

pytestmark = pytest.mark.usefixtures("one_thread")


# --------------------------------------------------------------------------------------------------------- the operator


def product_of(x: np.ndarray, parts: tuple[Tensor, ...], bits: int) -> np.ndarray:
    """What ONNX Runtime's operator makes of a weight."""
    columns, _, width = parts[0].shape
    attributes = {"K": x.shape[-1], "N": columns, "bits": bits, "block_size": width * 8 // bits}
    names = ["x", "codes", "scales", "zero_points"]
    node = helper.make_node("MatMulNBits", names, ["y"], domain="com.microsoft", **attributes)
    constants = [onnx.numpy_helper.from_array(part.numpy(), name) for part, name in zip(parts, names[1:], strict=True)]
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("x", "y")]
    graph = helper.make_graph([node], "product", ports[:1], ports[1:], constants)
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=11)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options).run(None, {"x": x})[0]


@given(
    st.integers(1, 70), st.integers(1, 150), st.sampled_from([4, 8]), st.sampled_from([16, 32, 64, 128, 256]),
    st.integers(0, 2**32 - 1),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_the_operator_is_that_of_onnx_runtime(columns: int, width: int, bits: int, size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=(columns, width)) * np.exp(rng.normal(size=(columns, 1)))
    weight[rng.random(weight.shape) < 0.2] = 0
    weight[columns // 2] = 0  # blocks without a range
    x = rng.normal(size=(2, 3, width)).astype(np.float32)
    parts = quantized(torch.tensor(weight, dtype=torch.float32), bits, size)
    meant = dequantized(*(part.numpy() for part in parts), width, bits)
    exact = x.astype(np.float64) @ meant.T
    ours = matmul_nbits(torch.tensor(x).double(), *parts, bits=bits).numpy()
    np.testing.assert_allclose(ours, exact, rtol=1e-12, atol=1e-12 * np.abs(exact).max())
    assert np.abs(product_of(x, parts, bits) - exact).max() <= 1e-5 * max(
        np.abs(x).max() * np.abs(meant).sum(1).max(), 1e-30
    )
    steps = np.repeat(parts[1].numpy(), size, axis=1)[:, :width]
    assert (np.abs(meant - weight) <= 1.001 * np.abs(steps)).all()  # a half from the code, a half from the zero point
    assert all(map(torch.equal, parts, quantized(torch.tensor(weight, dtype=torch.float32), bits, size)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 33)}, r"2 blocks of 16 weights do not fit rows \(2, 33\)"),
        ({"x": torch.zeros(2, 16)}, "do not fit rows"),
        ({"x": torch.zeros(20)}, "do not fit rows"),
        ({"codes": torch.zeros(3, 2, 8)}, "expected bytes"),
        ({"scales": torch.zeros(3, 1)}, "expected one for each"),
        ({"zero_points": torch.zeros(3, 2, dtype=torch.uint8)}, "Zero points"),
        ({"bits": 3}, "Weights of 3 bits"),
    ],
)
def test_operands_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    codes, scales, zero_points = quantized(torch.randn(3, 20), 4, 16)
    operands = {"x": torch.zeros(2, 20), "codes": codes, "scales": scales, "zero_points": zero_points, "bits": 4}
    matmul_nbits(**operands)
    for device in ("cpu", "meta"):  # the operator itself, and what traces it
        values = {
            name: each.to(device) if isinstance(each, Tensor) else each for name, each in (operands | change).items()
        }
        with pytest.raises(InvalidInput, match=message):
            matmul_nbits(**values)


def test_the_quantizer_leaves_logging_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    root = logging.getLogger()
    monkeypatch.delitem(sys.modules, "onnxruntime.quantization.matmul_nbits_quantizer", raising=False)
    monkeypatch.setattr(root, "handlers", [])  # without any, importing it would add one, and set the level
    monkeypatch.setattr(root, "level", logging.WARNING)
    quantized(torch.randn(3, 20), 4, 16)
    assert (root.handlers, root.level) == ([], logging.WARNING)


# ---------------------------------------------------------------------------------------------------------- the rewrite

LAYERS = 3
LINEAR = 7 * LAYERS + 1
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 40, "intermediate_size": 52, "head_dim": 8}
"""Rows of 40 and 52 elements end inside of a block of 32."""


@pytest.fixture(scope="module")
def model() -> Any:
    """With a tied head."""
    torch.manual_seed(0)
    options = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": LAYERS}
    options |= {"max_position_embeddings": 64}
    config = LlamaConfig(**SIZES, **options, tie_word_embeddings=True, eos_token_id=None, pad_token_id=0)
    return with_end(randomize(LlamaForCausalLM(config).eval()))


@pytest.fixture(scope="module")
def program(model: Any) -> Program:
    return capture_huggingface(model)


def built(program: Program, *entries: Any, target: str = "eager") -> Executable:
    changed, refusal = rewrite(program, Plan(list(entries)), target=target)
    assert refusal is None
    return Executable(lower(changed, target, threads=1), target=target)


BY_PROMPT = Plan(
    [QuantizeWeights(), SkipByPrompt((SkipSublayers(ffn=(0,)), SkipSublayers(attention=(1,))))],
    tensors={CENTROIDS: torch.eye(2, 2 * LAYERS, dtype=torch.float64)},
)


def remarks_of(executable: Executable) -> list[Any]:
    (record,) = (each for each in executable.program.history if each.name == "quantize_weights")
    return list(record.remarks)


def test_every_linear_layer_has_its_own_weight_and_the_table_stays(program: Program, model: Any) -> None:
    executable = built(program, QuantizeWeights())
    after = executable.program
    assert len(list(after.nodes(MATMUL_NBITS))) == LINEAR
    kept = [each for name, each in after.tensors().items() if each.dim() > 1 and "_Q4" not in name]
    assert [each.data_ptr() for each in kept] == [model.model.embed_tokens.weight.data_ptr()]
    assert sum("_Q4" in name for name in after.tensors()) == 3 * LINEAR
    missed = [(each.where, each.why) for each in remarks_of(executable) if each.status == "missed"]
    size = model.model.embed_tokens.weight.nbytes
    why = f"{size:,} bytes in float32: a table, beside the codes that a linear layer has of it"
    assert missed == [("model.embed_tokens", why)]
    assert evaluate(cost(after), 1, 1)["flops"] == evaluate(cost(program), 1, 1)["flops"]


def test_tokens_stay_apart_without_a_cache(program: Program) -> None:
    after = run_pass(QuantizeWeights(bits=8, block_size=16), program)
    assert next(offenders(after), None) is None
    (why,) = (each.why for each in after.history[-1].remarks if each.where == "model")
    assert "'int8' is faster" in why


def test_layers_that_run_twice_read_one_weight(program: Program) -> None:
    parallel = LayerParallel((Segment(0, LAYERS, iterations=2),))
    after = built(program, parallel, QuantizeWeights(bits=8)).program
    codes = Counter(node.args[1].target for node in after.nodes(MATMUL_NBITS))
    assert len(codes) == LINEAR and max(codes.values()) == 2 and sum(codes.values()) > LINEAR
    assert len({tensor.data_ptr() for name, tensor in after.tensors().items() if "_Q8" in name}) == 3 * LINEAR


class Unusual(nn.Module):
    """Weights that stand transposed, with and without a bias; one that is read both ways; and a stack."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        shapes = {"across": (36, 20), "square": (20, 20), "stack": (2, 20, 20)}
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape, generator=generator) / 4))
        self.bias = nn.Parameter(torch.randn(20, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.addmm(self.bias, x.reshape(-1, 36), self.across).reshape(*x.shape[:2], 20)
        rows = rows + (rows.tanh() @ self.square) + (rows.sin() @ self.square.t())
        return rows + (rows.unsqueeze(0) @ self.stack.unsqueeze(1)).sum(0)


def test_weights_in_other_forms() -> None:
    module, x = Unusual().double().eval(), torch.randn(2, 5, 36, dtype=torch.float64)
    program = run_pass(QuantizeWeights(bits=4, block_size=16), capture_module(module, {"x": x}))
    assert len(list(program.nodes(MATMUL_NBITS))) == 3
    with torch.no_grad():
        given, square = program.run(x=x), module.square.clone()

        def rounded(weight: Tensor) -> Tensor:
            parts = (part.numpy() for part in quantized(weight, 4, 16))
            return torch.tensor(dequantized(*parts, weight.shape[1], 4))

        rows = (x.reshape(-1, 36) @ rounded(module.across.T).T + module.bias).reshape(2, 5, 20)
        rows = rows + rows.tanh() @ rounded(square.T).T + rows.sin() @ rounded(square).T
        expected = rows + (rows.unsqueeze(0) @ module.stack.unsqueeze(1)).sum(0)
    torch.testing.assert_close(next(iter(given.values())), expected, rtol=1e-12, atol=1e-12)
    missed = [each.why for each in program.history[-1].remarks if each.status == "missed"]
    assert len(missed) == 1 and "not a matrix that all rows are multiplied by" in missed[0]


# -------------------------------------------------------------------------------------------------------- ONNX Runtime


@pytest.fixture(scope="module")
def exported(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("weights") / "out"
    skipstone.export_onnx(model, directory, Plan([QuantizeWeights()]), format="genai", opset=24, progress=False)
    return directory


@pytest.fixture(scope="module")
def rounded(model: Any, exported: Path) -> Any:
    """The user's model in float64, with the weights that the export holds."""
    return dequantized_model(model, exported / "model.onnx")


@pytest.mark.parametrize("padding", ["alone", "left"])
def test_an_export_computes_with_the_rounded_weights(model: Any, rounded: Any, exported: Path, padding: str) -> None:
    ids, mask = batch(PADDINGS[padding])
    got, expected = Loader(exported).stepwise(ids, mask), original_logits(rounded, ids, mask)
    assert_close(got, expected, mask, tolerance=1e-5)
    exact = original_logits(model, ids, mask)
    assert np.abs(expected - exact)[mask != 0].max() > 1e-2 * np.ptp(exact)


def test_the_file_holds_codes_once_and_no_other_copy(exported: Path, model: Any) -> None:
    onnx.checker.check_model(str(exported / "model.onnx"), full_check=True)
    proto = onnx.load(exported / "model.onnx", load_external_data=False)
    assert {each.domain: each.version for each in proto.opset_import} == {"": 24, "com.microsoft": 1}
    assert len(list(products(proto))) == LINEAR
    assert not [node for node in proto.graph.node if node.op_type == "FusedMatMul"]
    elements = [each.weight.numel() for each in model.modules() if isinstance(each, nn.Linear)]
    rows = [each.weight.shape for each in model.modules() if isinstance(each, nn.Linear)]
    blocks = sum(columns * -(-width // 32) for columns, width in rows)
    table = model.model.embed_tokens.weight.nbytes
    size = sum((exported / name).stat().st_size for name in ("model.onnx", "model.onnx.data"))
    report = json.loads((exported / "report.json").read_text())
    weights = report["after"]["weight_bytes"]
    assert blocks * (16 + 4 + 0.5) + table < weights < 4 * sum(elements)
    # Small tensors stand in the model, beside its nodes.
    skeleton = proto.ByteSize() - sum(len(each.raw_data) for each in proto.graph.initializer)
    assert weights < size < 1.03 * weights + skeleton


def test_the_runner_generates_what_the_rounded_model_does(model: Any, exported: Path) -> None:
    same = dequantized_model(model, exported / "model.onnx", torch.float32)
    prompts = [tokens(1, length, seed=length)[0].tolist() for length in (7, 4)]
    options = {"max_new_tokens": 12, "do_sample": False}
    expected = [same.generate(torch.tensor([each]), **options)[0, len(each) :].tolist() for each in prompts]
    assert Runner(exported, threads=1).generate(prompts, max_new_tokens=12) == expected


def test_genai_generates_what_the_rounded_model_does(model: Any, exported: Path) -> None:
    genai = pytest.importorskip("onnxruntime_genai", reason="needs the extra genai")
    assert_same_tokens(genai, dequantized_model(model, exported / "model.onnx", torch.float32), exported)


def test_sets_by_prompt_share_the_weights(program: Program) -> None:
    changed, _ = rewrite(program, BY_PROMPT, target="onnxruntime")
    own = changed.tensors()
    for part, left_out in zip(changed.continuations, (3, 4), strict=True):
        shared = {name: each for name, each in part.tensors().items() if "_Q4" in name}
        assert len(shared) == 3 * (LINEAR - left_out) and all(each is own[name] for name, each in shared.items())


GATES = SkipFFNAdaptive(threshold=0.3, cold_start=0, cold_end=0, warmup_tokens=1, max_share=1.0)


@needs_group_query_attention
@pytest.mark.slow
def test_graphs_over_one_file(model: Any, tmp_path: Path) -> None:
    """Sets by prompt, layers that run twice, and FFNs in branches, each over a quantized cache."""
    plans = {
        "sets": replace(BY_PROMPT, entries=[*BY_PROMPT, QuantizeKV()]),
        "twice": Plan([LayerParallel((Segment(0, LAYERS, iterations=2),)), QuantizeWeights(), QuantizeKV()]),
        "gated": Plan([QuantizeWeights(), GATES, QuantizeKV()]),
    }
    data, written, sizes = [tokens(4, 16, seed=7)], {}, []
    prompts = [tokens(1, length, seed=length)[0].tolist() for length in (7, 4, 9)]
    for name, plan in plans.items():
        same = skipstone.optimize(model, plan, target="eager", calibration=data, progress=False)
        skipstone.export_onnx(model, tmp_path / name, same.plan, progress=False)
        options = {"max_new_tokens": 12, "do_sample": False}
        written[name] = [same.generate(torch.tensor([each]), **options)[0, len(each) :].tolist() for each in prompts]
        assert Runner(tmp_path / name, threads=1).generate(prompts, max_new_tokens=12) == written[name]
        sizes.append((tmp_path / name / "model.onnx.data").stat().st_size)
    assert max(sizes) < 1.05 * min(sizes) and len({str(each) for each in written.values()}) == 3
    graph = onnx.load(tmp_path / "gated" / "model.onnx").graph
    inside = {node.name for node in all_nodes(graph) if node.op_type == "MatMulNBits"} - {
        each.name for each in graph.node
    }
    assert len(inside) == 3 * (LAYERS - 1)


# ---------------------------------------------------------------------------------------------------------- the budget


@pytest.fixture(scope="module")
def pair(program: Program) -> list[Executable]:
    """The model as it is, and in ONNX Runtime with the weights of the export."""
    return [built(program), built(program, QuantizeWeights(), target="onnxruntime")]


def test_the_loss_counts_against_the_budget(pair: list[Executable], model: Any, rounded: Any) -> None:
    full, changed = pair
    text = [Batch(each, torch.ones_like(each, dtype=torch.bool)) for each in tokens(6, 11, seed=3).split(2)]
    exact, whole = (
        [each.double() for each in map(lambda part: own(part.tokens).logits.detach(), text)] for own in (model, rounded)
    )
    seen = Comparison.concatenate([Comparison.of(*each) for each in zip(exact, whole, text, strict=True)])
    for limit, holds in ((10.0, True), (1e-6, False)):
        certificates = certify(full, changed, Budget(nll=limit, kl=limit), text)
        assert [each.holds for each in certificates] == [holds] * 2
    for certificate in certificates:
        expected = seen.certificate(certificate.metric, limit, 0.95, "", "")
        assert certificate.target == "onnxruntime"
        assert certificate.value == pytest.approx(expected.value, rel=1e-3, abs=1e-6)
    assert expected.value > 1e-3  # the divergence, which is never negative


def test_an_executable_comes_back_with_its_weights(pair: list[Executable], tmp_path: Path) -> None:
    ids = tokens(2, 9, seed=4)
    before = pair[1].prefill(ids)[0]
    pair[1].save(tmp_path / "saved")
    assert torch.equal(skipstone.load(tmp_path / "saved", threads=1).prefill(ids)[0], before)
    eager = skipstone.load(tmp_path / "saved", target="eager").prefill(ids)[0]
    torch.testing.assert_close(eager, before, rtol=0, atol=float(1e-4 * (before.max() - before.min())))
    weights = (tmp_path / "saved" / "weights.safetensors").stat().st_size
    assert weights < 1.1 * pair[1].program.weight_bytes() + 2**14


def test_activations_in_eight_bits_are_asked_for() -> None:
    """They change the result by their own rounding alone, or not at all where a CPU has no kernel for them."""
    module, x = nn.Linear(40, 21).eval(), torch.randn(2, 5, 40)
    captured = capture_module(module, {"input": x})
    levels, results = [], []
    for activations in ("float32", "int8"):
        after = run_pass(QuantizeWeights(bits=8, activations=activations), captured)
        session = OnnxSession(after, threads=1)
        (node,) = products(onnx.load_from_string(session.lowered.proto))
        levels.append({each.name: each.i for each in node.attribute}.get("accuracy_level"))
        results += [*session.run({"input": x}).values(), *after.run(input=x).values()]
    assert levels == [None, 4]
    exact, *reference, rounded, _ = results
    torch.testing.assert_close(exact, *reference, rtol=1e-5, atol=1e-5)
    assert (rounded - exact).abs().max() < 0.02 * (exact.max() - exact.min())


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 3}, "bits must be one of 4, 8, not 3"),
        ({"bits": 4.0}, "bits must be one of 4, 8, not 4.0"),
        ({"block_size": 48}, "block_size must be one of 16, 32, 64, 128, 256, not 48"),
        ({"activations": "int4"}, "activations must be one of 'float32', 'int8', not 'int4'"),
    ],
)
def test_settings_that_there_are_not(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidPlan, match=message):
        Plan([replace(QuantizeWeights(), **fields)])
    entry = {"pass": "quantize_weights", "version": 1, **fields}
    with pytest.raises(InvalidPlan, match=message):
        Plan.from_dict({"format": "skipstone.plan", "version": 1, "model": None, "entries": [entry]})


def test_its_place_in_a_plan() -> None:
    plan = Plan([QuantizeWeights(bits=8, block_size=64, activations="int8"), QuantizeKV()])
    assert Plan.from_json(plan.to_json()) == plan
    with pytest.raises(InvalidPlan, match="quantize_weights stands after quantize_kv but runs before it"):
        Plan([QuantizeKV(), QuantizeWeights()])


def test_targets_that_have_no_such_product(program: Program) -> None:
    with pytest.raises(Unsupported, match=r"quantize_weights on the triton target.*skipstone\.export_onnx"):
        check_plan(Plan([QuantizeWeights()]), "triton", calibrated=False)
    with pytest.raises(Unsupported, match=r"weights of few bits on the triton target.*q_proj"):
        lower_to_triton(run_pass(QuantizeWeights(), program))
