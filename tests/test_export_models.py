"""Exported models of many architectures and plans; what onnxruntime-genai makes of them."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    ViTConfig,
    ViTModel,
)

import skipstone
from skipstone.ir.errors import Unsupported
from skipstone.passes.layer_parallel import Segment
from skipstone.runtime.onnx.runner import Runner
from tests import test_skip_by_prompt as by_prompt
from tests.export_cases import PADDINGS, PROMPT, Loader, assert_close, batch, original_logits
from tests.genai_cases import assert_same_tokens, generated, with_end
from tests.tiny_models import randomize, tiny_model, tokens
from tests.versions import needs_group_query_attention

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

ROOT = Path(__file__).parent.parent
REFERENCE = ROOT / "benchmarks/reference/stdlib-llama"
NAMED_BY_GENAI = ["llama", "qwen2", "qwen3", "phi3", "gemma", "mistral"]


def export(model: torch.nn.Module, directory: Path, *plan: Any, **options: Any) -> Path:
    skipstone.export_onnx(model, directory, skipstone.Plan(list(plan)), progress=False, **options)
    return directory


@pytest.fixture(scope="module")
def genai() -> Any:
    return pytest.importorskip("onnxruntime_genai", reason="needs the extra genai")


@pytest.fixture(scope="module")
def reference() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(REFERENCE, dtype=torch.float32).eval()


# gpt_oss has sinks, deepseek_v3 values narrower than keys (so no GroupQueryAttention), gpt2 learned positions.
@pytest.mark.parametrize("name", [*NAMED_BY_GENAI, "gpt2", "phi", "gpt_oss", "deepseek_v3"])
def test_architectures(name, tmp_path) -> None:
    model = tiny_model(name)
    directory = export(model, tmp_path / "out")
    onnx.checker.check_model(str(directory / "model.onnx"), full_check=True)
    for padding in PADDINGS.values():
        ids, mask = batch(padding)
        assert_close(Loader(directory).stepwise(ids, mask), original_logits(model, ids, mask), mask)


def test_positions_count_from_zero_whatever_the_model_calls_the_first(tmp_path) -> None:
    model = tiny_model("roberta:decoder")
    directory = export(model, tmp_path / "out")
    ids, mask = batch(PADDINGS["left"])
    expected = original_logits(model, ids, mask, first=model.config.pad_token_id + 1)
    assert_close(Loader(directory).stepwise(ids, mask), expected, mask)


@pytest.mark.parametrize("name", NAMED_BY_GENAI)
def test_genai_with_and_without_the_attention_of_the_first_and_the_last_layer(genai, name, tmp_path) -> None:
    model, plan = with_end(tiny_model(name)), skipstone.SkipSublayers(attention=(0, 3))
    assert_same_tokens(genai, model, export(model, tmp_path / "whole", format="genai"))
    skipping = skipstone.optimize(model, skipstone.Plan([plan]), target="eager", progress=False)
    assert_same_tokens(genai, skipping, export(model, tmp_path / "skipping", plan, format="genai"))


@needs_group_query_attention
@pytest.mark.parametrize("form", ["int8", "int4"])
def test_genai_with_quantized_caches(genai, form, tmp_path) -> None:
    model, data = with_end(tiny_model("llama")), [tokens(4, 16, seed=7)]
    plan = skipstone.QuantizeKV(k=form, v=form)
    quantized = skipstone.optimize(model, skipstone.Plan([plan]), target="eager", calibration=data, progress=False)
    directory = export(model, tmp_path / "out", plan, format="genai", calibration=data)
    assert_same_tokens(genai, quantized, directory)


@pytest.fixture(scope="module")
def narrow(tmp_path_factory) -> tuple[PreTrainedModel, Path]:
    """Heads of 12 channels have no GroupQueryAttention, and what attends instead does not write in place."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 99, "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 12}
    options = {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 5, "eos_token_id": None}
    model = randomize(MistralForCausalLM(MistralConfig(**sizes, **options, max_position_embeddings=64)).eval())
    return model, export(with_end(model), tmp_path_factory.mktemp("narrow") / "out", format="genai")


@pytest.mark.parametrize("padding", PADDINGS)
def test_windows_without_group_query_attention(narrow, padding) -> None:
    model, directory = narrow
    ids, mask = batch(PADDINGS[padding])
    assert_close(Loader(directory).stepwise(ids, mask), original_logits(model, ids, mask), mask)


def test_genai_with_caches_that_grow(genai, narrow) -> None:
    model, directory = narrow
    config = json.loads((directory / "genai_config.json").read_text())
    assert config["search"]["past_present_share_buffer"] is False
    assert_same_tokens(genai, model, directory)


@needs_group_query_attention
def test_genai_has_one_shape_of_caches(tmp_path) -> None:
    mixed, data = skipstone.QuantizeKV(layers=(1,)), [tokens(2, 12)]
    with pytest.raises(Unsupported, match=r"caches of different shapes .*float32.*int8"):
        export(with_end(tiny_model("llama")), tmp_path / "out", mixed, format="genai", calibration=data)
    assert not any(tmp_path.iterdir())


def test_genai_and_the_runner_with_the_reference_model(genai, reference, tmp_path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(REFERENCE)
    directory = tmp_path / "out"
    skipstone.export_onnx(reference, directory, format="genai", tokenizer=tokenizer, progress=False)
    text = "def read_lines(path):\n"
    ids = tokenizer(text, return_tensors="pt").input_ids
    expected = reference.generate(ids, max_new_tokens=64, do_sample=False)[0, ids.shape[1] :].tolist()
    assert generated(genai, directory, ids.numpy(), 64)[0] == expected
    assert Runner(directory).generate(ids.tolist(), 64)[0] == expected
    own = genai.Tokenizer(genai.Model(str(directory)))
    own.update_options(add_special_tokens="true")
    assert own.encode(text).tolist() == ids[0].tolist()
    weights = sum(parameter.nbytes for parameter in reference.parameters())
    size = sum((directory / name).stat().st_size for name in ("model.onnx", "model.onnx.data"))
    assert weights <= size


@pytest.mark.parametrize("kv", ["iterate", "last"])
def test_layers_in_parallel(kv, tmp_path) -> None:
    model = tiny_model("llama")
    plan = skipstone.LayerParallel(segments=(Segment(1, 3, iterations=2),), kv=kv)
    directory = export(model, tmp_path / "out", plan)
    same = skipstone.optimize(model, skipstone.Plan([plan]), target="eager", progress=False)
    ids, mask = batch(PADDINGS["left"])
    assert_close(Loader(directory).stepwise(ids, mask), executable_logits(same, ids, mask), mask)


def executable_logits(executable: Any, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Logits of the prompt, then of token by token, and of the rest at once."""
    out = executable(torch.tensor(ids[:, :PROMPT]), attention_mask=torch.tensor(mask[:, :PROMPT]), use_cache=True)
    parts, steps = [out.logits], [*range(PROMPT, ids.shape[1] - 2), ids.shape[1]]
    for start, stop in itertools.pairwise(steps):
        options = {"attention_mask": torch.tensor(mask[:, :stop]), "past_key_values": out.past_key_values}
        parts.append(executable(torch.tensor(ids[:, start:stop]), **options).logits)
    return torch.cat(parts, dim=1).numpy()


def test_sets_by_prompt_are_graphs_over_one_file_of_weights(tmp_path) -> None:
    """Each prompt goes on as its own choice says, alone, side by side, and padded on the left."""
    model, plan = by_prompt.hugging_face("llama", torch.float32), by_prompt.plan("llama")
    directory = tmp_path / "out"
    skipstone.export_onnx(model, directory, plan, progress=False)
    graphs = sorted(file.name for file in directory.glob("*.onnx"))
    assert graphs == [*(f"decode_{number}.onnx" for number in range(4)), "model.onnx"]
    for name in graphs:
        onnx.checker.check_model(str(directory / name), full_check=True)
    runner = Runner(directory, threads=1)
    assert "past_key_values.1.key" not in runner.steps[0].caches  # without the attention of layer 1
    assert "past_key_values.2.key" in runner.steps[0].caches
    rows = by_prompt.batch()[:, : by_prompt.PROMPT]
    prompts = [*rows.tolist(), rows[2, :4].tolist(), rows[3, :3].tolist()]
    same = by_prompt.build(plan, "llama", torch.float32)
    options = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False}
    runner.ends = []
    expected = [same.generate(torch.tensor([each]), **options)[0, len(each) :].tolist() for each in prompts]
    assert runner.generate(prompts, 10) == expected
    assert [runner.generate([each], 10)[0] for each in prompts] == expected
    whole = export(model, tmp_path / "whole")
    assert len({(each / "model.onnx.data").stat().st_size for each in (directory, whole)}) == 1
    full = Runner(whole, threads=1)
    full.ends = []
    assert full.generate(prompts, 10) != expected


def test_a_vision_encoder_exports_with_skipping(tmp_path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 2}
    model = randomize(ViTModel(ViTConfig(**sizes, image_size=16, patch_size=4), add_pooling_layer=False).eval())
    plan = skipstone.SkipSublayers(layers=(2,))
    pixels = torch.randn(2, 3, 16, 16)
    directory = export(model, tmp_path / "out", plan, example_inputs={"pixel_values": pixels})
    onnx.checker.check_model(str(directory / "model.onnx"), full_check=True)
    same = skipstone.optimize(
        model, skipstone.Plan([plan]), target="eager", example_inputs={"pixel_values": pixels}, progress=False
    )
    images = torch.randn(5, 3, 16, 16)
    (got,) = Loader(directory).session.run(["last_hidden_state"], {"pixel_values": images.numpy()})
    expected = same(pixel_values=images).last_hidden_state.numpy()
    assert_close(got, expected, np.ones(got.shape[:2]))
    assert np.abs(got - model(images).last_hidden_state.detach().numpy()).max() > 0.1
