"""A real trained model (data outside the repository): golden text, and golden losses of leaving sublayers out.

The numbers were computed with another implementation, in float64.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from skipstone.calibrate import token_batches
from skipstone.ir.capture.huggingface import capture_huggingface
from skipstone.ir.program import Program
from skipstone.ir.stream import find_stream
from skipstone.optimize import optimize
from skipstone.passes.base import run_pass
from skipstone.passes.layer_parallel import LayerParallel, Segment
from skipstone.passes.skip_sublayers import SkipSublayers
from skipstone.search import ModelTask, search
from skipstone.units import Space, Unit

LAYERS, WIDTH, HIDDEN, HEADS, KV_HEADS, VOCABULARY, POSITIONS = 5, 64, 172, 8, 4, 512, 512
HEAD = WIDTH // HEADS

BASE_NLL = 0.4573
GOLDEN = {  # sublayers left out -> by layer: rise of the mean NLL, mean KL, top-1 agreement
    "attention": ((0.397, 0.296, 0.785), (0.274, 0.188, 0.832), (0.212, 0.123, 0.828), (0.270, 0.183, 0.820),
                  (0.183, 0.112, 0.879)),
    "ffn": ((0.737, 0.626, 0.652), (0.521, 0.391, 0.742), (0.347, 0.245, 0.781), (0.689, 0.555, 0.660),
            (0.793, 0.764, 0.637)),
    "layers": ((4.137, 3.640, 0.172), (0.954, 0.763, 0.617), (0.625, 0.451, 0.676), (1.028, 0.866, 0.551),
               (1.072, 0.968, 0.539)),
}  # fmt: skip


PARALLEL = {  # first and last layer, and for each form, e.g. "layer auto 2": rise of the mean NLL, top-1 agreement
    (2, 3): {"layer auto 1": (0.309, 0.789), "layer auto 2": (0, 1), "layer zero 1": (0.625, 0.676),
             "two_stage auto 1": (0.296, 0.781), "sublayer auto 1": (0.690, 0.688)},
    (3, 4): {"layer auto 1": (0.403, 0.719), "layer auto 2": (0, 1), "layer zero 1": (1.028, 0.551),
             "two_stage auto 1": (0.350, 0.758), "sublayer auto 1": (0.733, 0.629)},
    (1, 3): {"layer auto 1": (1.455, 0.496), "layer auto 2": (0.154, 0.867), "layer auto 3": (0, 1),
             "layer zero 1": (3.022, 0.254), "two_stage auto 1": (1.753, 0.441), "sublayer auto 1": (2.160, 0.375)},
    (1, 4): {"layer auto 1": (2.910, 0.227), "layer auto 2": (0.769, 0.656), "layer auto 3": (0.100, 0.906),
             "layer auto 4": (0, 1), "layer zero 1": (5.851, 0.043)},
    (0, 4): {"layer auto 1": (6.134, 0.027), "layer auto 2": (3.431, 0.207), "layer auto 3": (0.993, 0.582),
             "layer auto 4": (0.125, 0.883), "layer auto 5": (0, 1), "layer zero 1": (8.815, 0.008)},
}  # fmt: skip


@pytest.fixture(scope="module")
def model(test_data: Path) -> LlamaForCausalLM:
    """The checkpoint as a Hugging Face model: rotations of adjacent pairs become rotations of halves."""
    numbers = torch.from_numpy(np.fromfile(test_data / "stories260K.bin", dtype="<f4")[7:].copy())
    shapes = {
        "embed": (VOCABULARY, WIDTH), "rms_att": (LAYERS, WIDTH), "wq": (LAYERS, WIDTH, WIDTH),
        "wk": (LAYERS, KV_HEADS * HEAD, WIDTH), "wv": (LAYERS, KV_HEADS * HEAD, WIDTH), "wo": (LAYERS, WIDTH, WIDTH),
        "rms_ffn": (LAYERS, WIDTH), "w1": (LAYERS, HIDDEN, WIDTH), "w2": (LAYERS, WIDTH, HIDDEN),
        "w3": (LAYERS, HIDDEN, WIDTH), "rms_final": (WIDTH,),
    }  # fmt: skip
    sizes = [int(np.prod(shape)) for shape in shapes.values()]
    parts = numbers[: sum(sizes)].split(sizes)
    read = {name: part.reshape(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
    for name in ("wq", "wk"):
        pairs = read[name].reshape(LAYERS, -1, HEAD // 2, 2, WIDTH)
        read[name] = pairs.transpose(2, 3).reshape(shapes[name])
    weights = {"model.embed_tokens.weight": read["embed"], "lm_head.weight": read["embed"]}
    weights["model.norm.weight"] = read["rms_final"]
    places = {
        "input_layernorm": "rms_att", "self_attn.q_proj": "wq", "self_attn.k_proj": "wk", "self_attn.v_proj": "wv",
        "self_attn.o_proj": "wo", "post_attention_layernorm": "rms_ffn", "mlp.gate_proj": "w1", "mlp.down_proj": "w2",
        "mlp.up_proj": "w3",
    }  # fmt: skip
    for place, name in places.items():
        weights |= {f"model.layers.{layer}.{place}.weight": read[name][layer] for layer in range(LAYERS)}
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=HIDDEN, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, max_position_embeddings=POSITIONS, rms_norm_eps=1e-5,
        rope_theta=10000.0, tie_word_embeddings=True, bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    loaded = LlamaForCausalLM(config).eval()
    loaded.load_state_dict(weights)
    return loaded


@pytest.fixture(scope="module")
def golden(test_data: Path) -> Tensor:
    return torch.tensor(json.loads((test_data / "stories260K_golden.json").read_text())["ids"])[None]


@pytest.fixture(scope="module")
def program(model: LlamaForCausalLM) -> Program:
    return capture_huggingface(model)


def log_probabilities(program: Program, ids: Tensor) -> Tensor:
    positions = torch.arange(ids.shape[1] - 1)[None]
    with torch.no_grad():
        return program.run(input_ids=ids[:, :-1], position_ids=positions)["logits"][0].double().log_softmax(-1)


@pytest.mark.parametrize("target", [pytest.param("eager", marks=pytest.mark.slow), "onnxruntime"])
def test_greedy_text_is_the_golden_one(model: LlamaForCausalLM, golden: Tensor, target: str) -> None:
    opt = optimize(model, target=target, progress=False)
    assert torch.equal(opt.generate(golden[:, :1], max_new_tokens=256, do_sample=False), golden)


def test_loss_is_the_golden_one(program: Program, golden: Tensor) -> None:
    nll = F.nll_loss(log_probabilities(program, golden), golden[0, 1:])
    assert float(nll) == pytest.approx(BASE_NLL, abs=1e-4)


@pytest.mark.parametrize("field", GOLDEN)
@pytest.mark.parametrize("layer", range(LAYERS))
def test_leaving_out_costs_what_the_golden_table_says(program: Program, golden: Tensor, field: str, layer: int) -> None:
    full = log_probabilities(program, golden)
    less = log_probabilities(run_pass(SkipSublayers(**{field: (layer,)}), program), golden)
    rise = F.nll_loss(less, golden[0, 1:]) - F.nll_loss(full, golden[0, 1:])
    kl = (full.exp() * (full - less)).sum(-1).mean()
    agreement = (full.argmax(-1) == less.argmax(-1)).double().mean()
    found = (float(rise), float(kl), float(agreement))
    assert found == pytest.approx(GOLDEN[field][layer], abs=6e-4)


@pytest.fixture(scope="module")
def exact(model: LlamaForCausalLM) -> Program:
    return capture_huggingface(copy.deepcopy(model).double())


@pytest.mark.parametrize("layers", PARALLEL)
def test_layers_at_once_cost_what_the_golden_table_says(
    exact: Program, golden: Tensor, layers: tuple[int, int]
) -> None:
    """In float64, to the digits given."""
    full, found = log_probabilities(exact, golden), {}
    for name in PARALLEL[layers]:
        unit, surrogate, iterations = name.split()
        segment = Segment(layers[0], layers[1] + 1, int(iterations), unit, surrogate)  # type: ignore[arg-type]
        less = log_probabilities(run_pass(LayerParallel((segment,)), exact, strict=False), golden)
        rise = F.nll_loss(less, golden[0, 1:]) - F.nll_loss(full, golden[0, 1:])
        agreement = (full.argmax(-1) == less.argmax(-1)).double().mean()
        found[name] = round(float(rise), 3), round(float(agreement), 3)
    assert found == PARALLEL[layers]


@pytest.mark.parametrize(("column", "objective"), [(0, "nll"), (1, "kl")])
def test_a_search_measures_the_golden_table(exact: Program, golden: Tensor, column: int, objective: str) -> None:
    """To the digits given: without rewriting, each time from the sublayer on that is left out."""
    ids = golden if objective == "nll" else golden[:, :-1]
    measured: dict[Unit, float] = {}
    for space in (Space(protected=()), Space(kinds=("layer",), protected=())):
        units = space.units(find_stream(exact))
        task = ModelTask(exact, token_batches(ids, exact.source), space, objective, dict.fromkeys(units, 1.0))  # type: ignore[arg-type]
        task.start()
        measured |= {unit: task.measure([unit]) for unit in units}
    table = {
        (field.removesuffix("s"), layer): row[column] for field in GOLDEN for layer, row in enumerate(GOLDEN[field])
    }
    assert {(unit.kind, unit.layer): round(value, 3) for unit, value in measured.items()} == table
    assert max(measured, key=measured.__getitem__) == Unit("layer", 0)


def test_a_search_finds_the_cheapest_sublayer(exact: Program, golden: Tensor) -> None:
    space = Space(protected=())
    times = dict.fromkeys(space.units(find_stream(exact)), 1.0)
    (step,) = search(exact, token_batches(golden, exact.source), space=space, count=1, milliseconds=times).steps
    assert step.unit == Unit("attention", 4)
