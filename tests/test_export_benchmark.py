"""The benchmark of exports, on a tiny model: what it writes, what runs that, and which figures it gives."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import onnx
import onnxruntime
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import export, export_systems
from benchmarks.harness import Samples
from skipstone.runtime.onnx.runner import Runner
from tests.tiny_models import randomize

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS, NEW = [[11, 12, 13, 14, 15, 16, 17], [21, 22, 23]], 9
PLAIN = "hf"


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    return randomize(LlamaForCausalLM(LlamaConfig(**sizes, **heads, eos_token_id=98)).eval())


@pytest.fixture(scope="module")
def folder(llama, tmp_path_factory) -> Path:
    """What skipstone and torch write."""
    folder = tmp_path_factory.mktemp("export")
    for kind in ("ours", PLAIN):
        export.EXPORTS[kind](llama, folder / kind)
    return folder


@pytest.fixture(scope="module")
def expected(llama) -> list[list[int]]:
    """What follows each prompt, by the model itself, which reads all tokens anew each time."""
    sequences = [list(prompt) for prompt in PROMPTS]
    with torch.no_grad():
        for sequence in sequences:
            for _ in range(NEW):
                sequence.append(int(llama(torch.tensor([sequence])).logits[0, -1].argmax()))
    return [sequence[len(prompt) :] for sequence, prompt in zip(sequences, PROMPTS, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ours", PLAIN])
def test_the_runner_finds_out_whether_caches_are_written_in_place(folder, expected, kind) -> None:
    runner = Runner(folder / kind, threads=1)
    runner.ends = []
    assert runner.in_place == (kind == "ours")
    assert runner.generate(PROMPTS, NEW) == expected
    assert [list(runner.stream(prompt, NEW)) for prompt in PROMPTS] == expected


@pytest.mark.slow
@pytest.mark.parametrize("system, kind", [("ours", "ours"), ("growing", PLAIN)])
def test_systems_give_the_tokens_of_the_model_and_their_times(folder, expected, system, kind, monkeypatch) -> None:
    generate = export_systems.SYSTEMS[system](folder / kind, 1)
    for prompt, tokens in zip(PROMPTS, expected, strict=True):
        clock = SimpleNamespace(perf_counter=iter([1.0, 3.0, 3.0 + 4 * (NEW - 1)]).__next__)
        monkeypatch.setattr(export_systems, "time", clock)
        assert export_systems.turn(generate, prompt, NEW - 1) == {"prefill": 2.0, "step": 4.0, "tokens": tokens}


@pytest.mark.slow
def test_a_system_runs_in_a_process_of_its_own(folder, expected, monkeypatch) -> None:
    monkeypatch.setattr(export, "NEW_TOKENS", NEW - 1)
    with export.Running(sys.executable, "ours", folder / "ours", threads=1) as running:
        assert running.version == onnxruntime.__version__
        figures = running.turn("ours", PROMPTS[0])()
    assert figures.keys() == {"ours prefill", "ours decode"}
    assert running.tokens == expected[0]
    with pytest.raises(SystemExit, match=r"export_systems ours .*nowhere.* has ended"):
        export.Running(sys.executable, "ours", folder / "nowhere", threads=1)


def test_ratios_are_above_one_where_ours_is_faster() -> None:
    seconds = {"ours decode": 0.2, "genai decode": 0.3, "ours prefill": 4.0, "genai prefill": 1.0}
    samples = {name: Samples({1: [value / 2, value, 9.0]}) for name, value in seconds.items()}
    rows = {row.metric: row for row in export.ratios(samples, "110m_128", ["ours", "genai"])}
    decode, prefill = rows["decode_vs_genai_110m_128"], rows["prefill_vs_genai_110m_128"]
    assert len(rows) == 2
    assert (decode.value, decode.baseline, decode.met, decode.samples) == (pytest.approx(1.5), 300.0, True, 3)
    assert (prefill.value, prefill.baseline, prefill.goal) == (0.25, 1000.0, None)


def test_writing_compares_with_torchs_export(tmp_path, monkeypatch) -> None:
    seconds = iter([2.0, 1.0])  # the first round begins with the last kind

    def probe(kind: str, name: str, out: Path) -> dict[str, float]:
        out.mkdir()
        for file in ("model.onnx", "model.onnx.data"):
            (out / file).write_bytes(bytes(101))
        return {"seconds": next(seconds), "peak": 300.0, "weights": 200.0}

    monkeypatch.setattr(export, "run_probe", probe)
    rows = {row.metric: row for row in export.writing("110m", tmp_path, rounds=1)}
    assert rows["export_time_over_torch_110m"].value == 0.5 and rows["export_time_over_torch_110m"].baseline == 2000
    assert rows["export_peak_over_weights_110m"].value == 1.5 and rows["export_peak_over_weights_110m"].met
    assert rows["file_over_weights_110m"].value == 1.01


def test_other_tokens_are_refused() -> None:
    export.check_equal({"ours": [1, 2], "genai": [1, 2]})
    with pytest.raises(SystemExit, match="genai: not the tokens of our runner"):
        export.check_equal({"ours": [1, 2], "genai": [1, 3], "other": [1, 2]})


def test_it_says_why_genai_is_not_measured(tmp_path, monkeypatch) -> None:
    assert export.why_no_genai(str(tmp_path / "python")) == f"{tmp_path / 'python'}: No such file or directory"
    lacking = SimpleNamespace(returncode=1, stderr="Traceback\nModuleNotFoundError: No module named 'it'\n")
    monkeypatch.setattr(export.subprocess, "run", lambda *_, **__: lacking)
    assert export.why_no_genai("python") == "ModuleNotFoundError: No module named 'it'"


@pytest.mark.slow
def test_viewers_find_the_modules_as_they_do_in_an_export_of_torch(folder, llama) -> None:
    """Scopes ``path: Class`` in the metadata `namespace`, each inside the one before, and at the end the operator.

    This is what torch.onnx writes, and what viewers (Model Explorer) group nodes by.
    """
    classes = {name: f"{type(each).__module__}.{type(each).__name__}" for name, each in llama.named_modules()}
    found: dict[str, set[str]] = {}
    for kind, root in (("ours", ""), (PLAIN, "model")):  # there, the model is a part of another
        found[kind] = set()
        for node in onnx.load(folder / kind / "model.onnx", load_external_data=False).graph.node:
            notes = {note.key: note.value for note in node.metadata_props}
            *scopes, _ = [part.partition(": ")[::2] for part in notes.get("namespace", "").split("/")]
            inside = [(name.removeprefix(root).lstrip("."), class_) for name, class_ in scopes if name.startswith(root)]
            assert all(name == "" or class_ == classes[name] for name, class_ in inside)
            names = [name for name, _ in inside]
            assert all(inner.startswith(outer) for outer, inner in pairwise(names))
            if kind == "ours" and names:
                assert names[-1] == notes["skipstone.module"]
            found[kind].update(names)
    assert found["ours"] >= found[PLAIN] >= {"", *(f"model.layers.{layer}.mlp" for layer in range(2))}
