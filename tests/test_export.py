"""Exported directories, run by the names of their inputs, against the models that they come from."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import skipstone
from skipstone.cli import main
from skipstone.ir.errors import ArtifactError, InvalidInput, Unsupported
from skipstone.passes.skip_ffn_adaptive import SkipFFNAdaptive
from skipstone.runtime.onnx.forms import takes_counts
from skipstone.runtime.onnx.runner import Runner
from tests.export_cases import PADDINGS, PROMPT, Loader, all_nodes, assert_close, batch, original_logits
from tests.genai_cases import assert_same_tokens, with_end
from tests.tiny_models import VOCABULARY, randomize, tiny_model, tokens
from tests.versions import needs_group_query_attention, skip_without_group_query_attention

pytestmark = pytest.mark.usefixtures("one_thread")


def export(model: torch.nn.Module, directory: Path, *plan, **options) -> Path:
    skipstone.export_onnx(model, directory, skipstone.Plan(list(plan)), progress=False, **options)
    return directory


# ---------------------------------------------------------------------------------------- a decoder without a plan


@pytest.fixture(scope="module")
def gemma() -> PreTrainedModel:
    """Soft caps, windows, and norms behind sublayers."""
    return with_end(tiny_model("gemma2"))


@pytest.fixture(scope="module")
def decoder(gemma, tmp_path_factory) -> Path:
    return export(gemma, tmp_path_factory.mktemp("export") / "decoder", format="genai")


@pytest.mark.parametrize("padding", PADDINGS)
def test_prompt_and_steps_equal_the_model(gemma, decoder, padding) -> None:
    ids, mask = batch(PADDINGS[padding])
    assert_close(Loader(decoder).stepwise(ids, mask), original_logits(gemma, ids, mask), mask)


def test_the_graph_is_valid_and_names_its_sizes(decoder) -> None:
    onnx.checker.check_model(str(decoder / "model.onnx"), full_check=True)
    graph = onnx.load(decoder / "model.onnx", load_external_data=False).graph
    sizes = {
        value.name: [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }
    assert sizes["input_ids"] == sizes["position_ids"] == ["batch_size", "sequence_length"]
    assert sizes["attention_mask"] == ["batch_size", "total_sequence_length"]
    assert sizes["logits"] == ["batch_size", "sequence_length", VOCABULARY]
    for layer in range(4):
        for which in ("key", "value"):
            past, present = f"past_key_values.{layer}.{which}", f"present.{layer}.{which}"
            assert sizes.pop(past) == ["batch_size", 2, "past_sequence_length", 16]
            assert sizes.pop(present) == ["batch_size", 2, "total_sequence_length", 16]
    assert set(sizes) == {"input_ids", "position_ids", "attention_mask", "logits"}


@needs_group_query_attention
def test_caches_with_room_are_written_as_shared_buffers(decoder) -> None:
    """The convention of onnxruntime-genai: caches of a fixed size, of which the mask covers the first columns."""
    ids, mask = batch(PADDINGS["left"])
    loader, past, room = Loader(decoder), None, None
    growing, shared = [], []
    past, room = loader.empty(3), loader.empty(3, capacity=40)
    for start, stop in ((0, PROMPT), (PROMPT, PROMPT + 1), (PROMPT + 1, PROMPT + 2)):
        logits, past = loader.step(ids[:, start:stop], mask[:, :stop], past)
        growing.append(logits)
        logits, room = loader.step(ids[:, start:stop], mask[:, :stop], room)
        shared.append(logits)
    np.testing.assert_array_equal(np.concatenate(shared, 1), np.concatenate(growing, 1))
    for name, each in past.items():
        assert room[name].shape[2] == 40
        np.testing.assert_array_equal(room[name][:, :, : each.shape[2]], each)


def test_nodes_are_called_after_their_modules_and_name_their_passes(gemma, decoder) -> None:
    graph = onnx.load(decoder / "model.onnx", load_external_data=False).graph
    modules = dict(gemma.named_modules())
    names = [node.name for node in graph.node]
    assert len(set(names)) == len(names)
    attentions = [node for node in graph.node if node.op_type == "GroupQueryAttention"]
    assert len(attentions) == (4 if takes_counts() else 0)
    for layer, node in enumerate(attentions):
        notes = {note.key: note.value for note in node.metadata_props}
        assert notes["skipstone.module"] == f"model.layers.{layer}.self_attn"
        assert notes["skipstone.passes"] == "kv_cache"
        assert node.name == f"model.layers.{layer}.self_attn/GroupQueryAttention"
    for node in graph.node:
        notes = {note.key: note.value for note in node.metadata_props}
        assert notes.get("skipstone.module", "") in modules
        assert not any(each in notes.get("namespace", "") for each in ("made_by", "skipstone"))
    made = "export" if takes_counts() else "kv_cache"  # what `export` adds is for GroupQueryAttention here
    assert made in {note.value for node in graph.node for note in node.metadata_props}


def test_weights_are_in_the_file_once(gemma, decoder) -> None:
    weights = sum(parameter.nbytes for parameter in gemma.parameters())  # tied ones are one parameter
    stored = {
        initializer.name: dict((entry.key, entry.value) for entry in initializer.external_data)
        for initializer in onnx.load(decoder / "model.onnx", load_external_data=False).graph.initializer
    }
    assert "model.layers.0.self_attn.q_proj.weight" in stored
    external = sum(int(each["length"]) for each in stored.values() if each)
    assert 0.95 * weights <= external <= weights


def test_files_beside_the_model(gemma, decoder) -> None:
    assert {file.name for file in decoder.iterdir()} == {
        "model.onnx", "model.onnx.data", "config.json", "generation_config.json", "genai_config.json", "plan.json",
        "report.json",
    }  # fmt: skip
    assert json.loads((decoder / "config.json").read_text())["model_type"] == "gemma2"
    assert len(skipstone.Plan.load(decoder / "plan.json")) == 0
    assert json.loads((decoder / "report.json").read_text())["cache"] == "4 slots"


def test_the_config_of_genai(decoder) -> None:
    config = json.loads((decoder / "genai_config.json").read_text())
    model, search = config["model"], config["search"]
    layers = model["decoder"]["num_hidden_layers"], model["decoder"]["num_key_value_heads"]
    assert (model["type"], model["vocab_size"], model["context_length"]) == ("decoder", VOCABULARY, 128)
    assert (*layers, model["decoder"]["head_size"]) == (4, 2, 16)
    assert search["past_present_share_buffer"] is takes_counts()
    inputs = {name % 0 if "%d" in name else name for name in model["decoder"]["inputs"].values()}
    assert inputs <= set(Loader(decoder).inputs)
    assert {name % 3 if "%d" in name else name for name in model["decoder"]["outputs"].values()} <= set(
        Loader(decoder).outputs
    )


def test_the_runner_generates_what_the_model_does(gemma, decoder) -> None:
    prompts = [tokens(1, length, seed=length)[0].tolist() for length in (7, 3, 5)]
    expected = [
        gemma.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0, len(prompt) :].tolist()
        for prompt in prompts
    ]
    assert Runner(decoder, threads=1).generate(prompts, max_new_tokens=12) == expected


def test_the_runner_stops_at_the_end_token(decoder, tmp_path) -> None:
    runner = Runner(decoder, threads=1)
    prompts = [[5, 6, 7], [8, 9]]
    free = runner.generate(prompts, max_new_tokens=12)
    runner.ends = [free[0][3]]
    first = free[0].index(runner.ends[0])
    stopped = runner.generate(prompts, max_new_tokens=12)
    assert stopped[0] == free[0][: first + 1]
    assert stopped[1] == free[1] or stopped[1][-1] in runner.ends
    with pytest.raises(ArtifactError, match=r"holds no model\.onnx"):
        Runner(tmp_path)


@pytest.mark.parametrize(
    ("prompts", "count", "message"),
    [
        ([], 3, "a prompt is empty"),
        ([[1], []], 3, "a prompt is empty"),
        ("text", 3, "prompts are a text"),
        (["text"], 3, "no list of integers"),
        ([1, 2], 3, "no list of integers"),
        ([[0.5]], 3, "no list of integers"),
        ([[3, -1]], 3, "-1 is no token of the model"),
        ([[3], [VOCABULARY]], 3, f"{VOCABULARY} is no token of the model"),
        ([[3] * 126], 3, "129 tokens is longer than 128"),
        ([[3]], 0, "max_new_tokens is 0"),
        ([[3]], 2.0, "max_new_tokens is 2.0"),
    ],
)
def test_the_runner_refuses_what_it_cannot_continue(prompts, count, message, decoder) -> None:
    with pytest.raises(InvalidInput, match=message):
        Runner(decoder, threads=1).generate(prompts, count)


def test_the_runner_takes_arrays_up_to_the_last_position(decoder) -> None:
    runner = Runner(decoder, threads=1)
    prompts = tokens(2, 120)
    assert runner.generate(prompts, 8) == runner.generate(prompts.numpy(), 8) == runner.generate(prompts.tolist(), 8)


@pytest.mark.parametrize(
    ("name", "size"), [("model.onnx", 1000), ("model.onnx.data", 1000), ("generation_config.json", 3)]
)
def test_the_runner_names_a_damaged_file(name: str, size: int, decoder, tmp_path) -> None:
    shutil.copytree(decoder, copied := tmp_path / "copied")
    os.truncate(copied / name, size)
    with pytest.raises(ArtifactError, match=r"Cannot (open|read) .*copied"):
        Runner(copied)
    with pytest.raises(InvalidInput, match="threads is 0"):
        Runner(decoder, threads=0)


def test_the_runner_ends_in_one_line(decoder, tmp_path) -> None:
    (tmp_path / "model.onnx").symlink_to(decoder / "model.onnx")
    (tmp_path / "model.onnx.data").symlink_to(decoder / "model.onnx.data")
    (tmp_path / "tokenizer.json").write_text("{")
    command = [sys.executable, "-m", "skipstone.runtime.onnx.runner"]
    for directory, message in (("absent", "absent holds no model.onnx"), (str(tmp_path), "tokenizer.json")):
        done = subprocess.run([*command, directory, "x"], capture_output=True, text=True)
        assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1


def test_the_runner_imports_no_torch() -> None:
    code = "import sys, skipstone.runtime.onnx.runner; print(*{'torch', 'transformers', 'onnx'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "\n"


def test_genai_generates_the_same_tokens(gemma, decoder) -> None:
    genai = pytest.importorskip("onnxruntime_genai", reason="needs the extra genai")
    assert_same_tokens(genai, gemma, decoder)


# --------------------------------------------------------------------------------------------- a decoder with a plan

SIZES = {"vocab_size": VOCABULARY, "hidden_size": 64, "num_attention_heads": 4}
PLAN = (
    skipstone.SkipSublayers(attention=(0, 3)),
    SkipFFNAdaptive(threshold=0.5, cold_start=0, cold_end=0, warmup_tokens=2, max_share=0.75),
    skipstone.QuantizeKV(),
)


def qwen2() -> PreTrainedModel:
    """Biases of keys, which conditioning takes out of the cache."""
    torch.manual_seed(0)
    sizes = {**SIZES, "intermediate_size": 48, "num_hidden_layers": 4, "num_key_value_heads": 2}
    model = randomize(Qwen2ForCausalLM(Qwen2Config(**sizes, max_position_embeddings=64, eos_token_id=None)).eval())
    for layer in model.model.layers:
        layer.self_attn.k_proj.bias.data *= 30
    return model


@pytest.fixture(scope="module")
def reference() -> skipstone.Executable:
    """The same plan, calibrated, on the reference interpreter."""
    data = [tokens(4, 16, seed=7)]
    return skipstone.optimize(qwen2(), skipstone.Plan(PLAN), target="eager", calibration=data, progress=False)


@pytest.fixture(scope="module")
def planned(reference, tmp_path_factory) -> Path:
    """Through the command line, with newer operators."""
    skip_without_group_query_attention()  # the cache is quantized
    directory = tmp_path_factory.mktemp("export")
    reference.plan.save(directory / "plan.json")
    arguments = ["--plan", str(directory / "plan.json"), "--opset", "24"]
    assert main(["export", "tests.test_export:qwen2", str(directory / "planned"), *arguments]) == 0
    return directory / "planned"


@pytest.mark.parametrize("padding", ["alone", "left", "right"])
def test_a_plan_survives(reference, planned, padding) -> None:
    ids, mask = batch(PADDINGS[padding])
    out = reference(torch.tensor(ids[:, :PROMPT]), attention_mask=torch.tensor(mask[:, :PROMPT]), use_cache=True)
    expected = [out.logits]
    for start in range(PROMPT, ids.shape[1]):
        step = {"attention_mask": torch.tensor(mask[:, : start + 1]), "past_key_values": out.past_key_values}
        expected.append(reference(torch.tensor(ids[:, start : start + 1]), **step).logits)
    got = Loader(planned).stepwise(ids, mask, decode_start=mask[:, :PROMPT].sum(1))
    assert_close(got, torch.cat(expected, dim=1).numpy(), mask)


def test_the_bias_of_keys_was_taken_out_of_the_cache(reference) -> None:
    """So its products stand in the graph, by the positions of the keys and not by their columns."""
    split = [each for each in reference.report.remarks if "split_k_bias" in each.why and each.status == "applied"]
    assert len(split) == 2


def test_skipped_attention_has_no_cache_and_the_others_are_small(planned) -> None:
    inputs = {each.name: each.type for each in Loader(planned).session.get_inputs()}
    caches = {name: kind for name, kind in inputs.items() if name.startswith("past")}
    assert caches == {f"past_key_values.{n}.{which}": "tensor(int8)" for n in range(2) for which in ("key", "value")}
    assert inputs["decode_start"] == "tensor(int64)"


def test_ffns_stand_in_branches(planned) -> None:
    graph = onnx.load(planned / "model.onnx", load_external_data=False).graph
    branches = [node for node in graph.node if node.op_type == "If" and ".mlp" in node.name]
    assert len(branches) == 3
    assert len([node for node in all_nodes(graph) if node.op_type == "FusedMatMul"]) == 2 * 4 + 4 * 3 + 1


def test_newer_operators_keep_names_and_places(planned) -> None:
    onnx.checker.check_model(str(planned / "model.onnx"), full_check=True)
    model = onnx.load(planned / "model.onnx", load_external_data=False)
    assert {each.domain: each.version for each in model.opset_import} == {"": 24, "com.microsoft": 1}
    modules = {note.value for node in model.graph.node for note in node.metadata_props}
    assert "model.layers.2.self_attn" in modules


def test_the_runner_tells_where_prompts_end(reference, planned) -> None:
    prompts = [[11, 12, 13, 14, 15], [16, 17]]
    expected = [
        reference.generate(torch.tensor([prompt]), max_new_tokens=10, do_sample=False)[0, len(prompt) :].tolist()
        for prompt in prompts
    ]
    assert Runner(planned, threads=1).generate(prompts, max_new_tokens=10) == expected


# ----------------------------------------------------------------------------------------------------------- encoders


@pytest.fixture(scope="module")
def bert() -> PreTrainedModel:
    sizes = {**SIZES, "intermediate_size": 48, "num_hidden_layers": 4, "max_position_embeddings": 64}
    return randomize(BertModel(BertConfig(**sizes), add_pooling_layer=False).eval())


@pytest.mark.slow  # an export of its own
def test_an_encoder_exports_with_skipping(bert, tmp_path) -> None:
    plan = skipstone.SkipSublayers(ffn=(2,))
    for name in ("model.onnx", "left.txt"):  # an earlier export
        tmp_path.joinpath("out").mkdir(exist_ok=True)
        tmp_path.joinpath("out", name).write_text("earlier")
    directory = export(bert, tmp_path / "out", plan, overwrite=True)
    assert list(tmp_path.iterdir()) == [directory] and not (directory / "left.txt").exists()
    onnx.checker.check_model(str(directory / "model.onnx"), full_check=True)
    loader = Loader(directory)
    ids, mask = batch([0, 3, -5])
    given = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
    (got,) = loader.session.run(["last_hidden_state"], {name: given[name] for name in loader.inputs})
    same = skipstone.optimize(bert, skipstone.Plan([plan]), target="eager", progress=False)
    expected = same(**{name: torch.tensor(each) for name, each in given.items() if name in loader.inputs})
    assert_close(got, expected.last_hidden_state.numpy(), mask)
    unskipped = bert(torch.tensor(ids), torch.tensor(mask)).last_hidden_state.detach().numpy()
    assert np.abs(got - unskipped).max() > 0.05 * np.ptp(unskipped)


# ----------------------------------------------------------------------------------------------------------- refusals


def small() -> PreTrainedModel:
    sizes = dict(vocab_size=30, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2)
    return LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=32)).eval()


def test_what_stands_there_is_not_replaced(tmp_path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(ArtifactError, match="not empty"):
        export(small(), tmp_path)
    with pytest.raises(ArtifactError, match="no exported model to overwrite"):
        export(small(), tmp_path, overwrite=True)
    with pytest.raises(ArtifactError, match="is a file"):
        export(small(), tmp_path / "mine.txt", overwrite=True)
    assert [each.name for each in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"format": "gguf"}, "unknown format 'gguf'"),
        ({"opset": 22}, "opset 22 cannot be written. Versions 23 to"),
        ({"opset": 1000}, "opset 1000"),
        ({"opset": "24"}, "opset '24'"),
    ],
)
def test_wrong_options(options, message, tmp_path) -> None:
    with pytest.raises(InvalidInput, match=message):
        export(small(), tmp_path / "out", **options)
    assert not any(tmp_path.iterdir())


def test_genai_cannot_run_everything(tmp_path, bert) -> None:
    adaptive = SkipFFNAdaptive(threshold=0.9, cold_start=0, cold_end=0, max_share=0.5)
    with pytest.raises(Unsupported, match="skip_ffn_adaptive, which has to be told where the prompt ends"):
        export(small(), tmp_path / "out", adaptive, format="genai")
    with pytest.raises(Unsupported, match="a model without a KV cache, in onnxruntime-genai"):
        export(bert, tmp_path / "out", format="genai")
    endless = small()
    endless.generation_config.eos_token_id = None
    with pytest.raises(InvalidInput, match="no eos_token_id"):
        export(endless, tmp_path / "out", format="genai")
    assert not any(tmp_path.iterdir())
