"""The command line: what it prints, and how it fails."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

from skipstone.budget import Budget
from skipstone.cli import main
from skipstone.ir.capture.huggingface import capture_huggingface
from skipstone.ir.errors import InternalError, Unsupported, UserError
from skipstone.ir.program import Program
from skipstone.passes.compress_kv import CompressKV, StreamingHeads
from skipstone.passes.compress_prompt import CompressPrompt
from skipstone.passes.quantize_kv import QuantizeKV
from skipstone.passes.quantize_weights import QuantizeWeights
from skipstone.passes.self_speculate import SelfSpeculate
from skipstone.passes.skip_sublayers import SkipSublayers
from skipstone.plan import Plan
from skipstone.runtime.executable import Executable

MODELS = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM


def llama():
    torch.manual_seed(0)
    sizes = dict(vocab_size=300, hidden_size=16, intermediate_size=24, num_hidden_layers=3)
    config = LlamaConfig(**sizes, num_attention_heads=2, max_position_embeddings=128, eos_token_id=None)
    return LlamaForCausalLM(config)


def plain():
    return torch.nn.Linear(2, 2)


def nothing():
    return None


number = 3
"""


@pytest.fixture(autouse=True)
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The working directory holds the module `tiny_models`, and nothing reaches for the network."""
    (tmp_path / "tiny_models.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    yield
    sys.modules.pop("tiny_models", None)


@cache
def captured() -> Program:
    """The model of `tiny_models`, captured once."""
    from tiny_models import llama

    return capture_huggingface(llama().eval())


@pytest.fixture
def captured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `optimize` captures of `tiny_models:llama`, or of a checkpoint of it, was captured before."""
    monkeypatch.setattr(sys.modules["skipstone.optimize"], "capture", lambda *_: captured().copy())


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    """A directory with a model and a tokenizer whose tokens are bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    sys.path.insert(0, str(tmp_path))
    from tiny_models import llama

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    directory = tmp_path / "checkpoint"
    llama().save_pretrained(directory)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(directory)
    return str(directory)


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    """Exit code, output and errors; whitespace and table lines count as one space."""
    code = main(arguments)
    out, err = capsys.readouterr()
    return code, " ".join(out.replace("│", " ").replace("┃", " ").split()), err.splitlines()[-1] if err else ""


def test_inspect_lists_every_sublayer(capsys):
    code, out, _ = run(capsys, "inspect", "tiny_models:llama")
    assert code == 0
    assert "LlamaForCausalLM, torch.float32: 3 layers, 6 sublayers" in out
    for layer in range(3):
        assert f"{layer} attention" in out and f"{layer} ffn" in out
    assert "model.layers.2.mlp" in out
    assert "FLOPs a token" in out


def test_optimize_prints_the_report(capsys):
    code, out, _ = run(capsys, "optimize", "tiny_models:llama", "--target", "eager")
    assert code == 0
    assert "model LlamaForCausalLM" in out and "target eager" in out
    assert "3 slots" in out and "not measured" in out
    assert "6 (3 + 3) 6 (3 + 3)" in out


@pytest.mark.usefixtures("captured_once")
def test_optimize_skips_what_the_options_name(capsys):
    options = ("--skip-layers", "1", "--skip-ffn", "0,2", "--target", "eager")
    code, out, _ = run(capsys, "optimize", "tiny_models:llama", *options)
    assert code == 0
    assert "6 (3 + 3) 2 (2 + 0)" in out
    assert "skip_sublayers applied" in out


@pytest.mark.usefixtures("captured_once")
def test_optimize_carries_out_a_plan(capsys, tmp_path: Path):
    path = tmp_path / "plan.json"
    Plan([SkipSublayers(attention=(1,))]).save(path)
    code, out, _ = run(capsys, "optimize", "tiny_models:llama", "--plan", str(path), "--target", "eager")
    assert code == 0
    assert "6 (3 + 3) 5 (2 + 3)" in out


@pytest.mark.parametrize("target", [pytest.param("eager", marks=pytest.mark.slow), "onnxruntime"])
def test_optimize_generates_and_measures(capsys, checkpoint: str, target: str):
    options = ("--prompt", "def f(x):", "--max-new-tokens", "5", "--threads", "1", "--target", target, "--measure")
    code, out, _ = run(capsys, "optimize", checkpoint, *options)
    assert code == 0
    assert "def f(x):" in out
    assert "prefill (9 tokens, median of 3)" in out and "not measured" not in out


@pytest.mark.slow
def test_what_optimize_saved_generates_the_same(capsys, checkpoint: str, tmp_path: Path):
    options = ("--prompt", "def f(x):", "--max-new-tokens", "7", "--threads", "1")
    saved = ("--target", "eager", "--save", "saved", "--skip-ffn", "1")
    code, out, _ = run(capsys, "optimize", checkpoint, *options, *saved)
    assert code == 0
    sys.modules.pop("tiny_models")
    (tmp_path / "tiny_models.py").unlink()
    code, text, _ = run(capsys, "generate", "saved", *options)
    assert code == 0 and text.startswith("def f(x):") and out.endswith(text)
    code, again, _ = run(capsys, "generate", "saved", *options, "--target", "onnxruntime")
    assert code == 0 and again == text
    code, _, error = run(capsys, "generate", "saved", "--prompt", "")
    assert code == 2 and "The prompt is empty" in error
    code, _, error = run(capsys, "optimize", checkpoint, "--save", "saved")
    assert code == 2 and "saved holds an artifact" in error
    code, _, _ = run(capsys, "optimize", checkpoint, *saved, "--overwrite")
    assert code == 0


@pytest.mark.usefixtures("captured_once")
def test_generate_needs_a_tokenizer(capsys):
    code, _, _ = run(capsys, "optimize", "tiny_models:llama", "--target", "eager", "--save", "saved")
    assert code == 0
    code, _, error = run(capsys, "generate", "saved", "--prompt", "x")
    assert code == 2 and "saved has no tokenizer. Save one with it" in error
    code, _, error = run(capsys, "generate", "absent", "--prompt", "x")
    assert code == 2 and "There is no directory absent" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "no_such_module:make"], "Cannot import 'no_such_module'"),
        (["inspect", "tiny_models:lama"], "no function 'lama'. Did you mean 'llama'?"),
        (["inspect", "tiny_models:number"], "no function 'number'"),
        (["inspect", "tiny_models:nothing"], "returned NoneType, not a torch.nn.Module"),
        (["inspect", "tiny_models:plain"], "Linear is not a Hugging Face model"),
        (["inspect", "no/such-model"], "Cannot load the model 'no/such-model'"),
        (["inspect", "not a name"], "Cannot load the model 'not a name'"),
        (["inspect", ""], "Cannot load the model ''"),
        (["inspect", "."], "Cannot load the model '.'"),
        (["inspect", "tiny_models.py"], "tiny_models.py is a file. MODEL is the directory"),
        (["optimize", "tiny_models:llama", "--plan", "absent.json"], "Cannot read the plan absent.json"),
        (["optimize", "tiny_models:llama", "--plan", "p.json", "--skip-ffn", "1"], "excludes --skip"),
        (["optimize", "tiny_models:llama", "--plan", "p.json", "--kv", "int8"], "excludes --skip"),
        (["export", "tiny_models:llama", "out", "--plan", "p.json", "--weights", "4"], "excludes --skip"),
        (["optimize", "tiny_models:llama", "--weights", "5"], "bits must be one of 4, 8, not 5"),
        (["optimize", "tiny_models:llama", "--weights", "4:int4"], "activations must be one of 'float32', 'int8'"),
        (["optimize", "tiny_models:llama", "--mode", "max-autotune"], "nothing to tune"),
        (["optimize", "tiny_models:llama", "--device", "abacus"], "Cannot put the model on 'abacus': "),
        (["optimize", "tiny_models:llama", "--compiled-for", "1"], "Add --save DIR"),
        (["optimize", "tiny_models:llama", "--save-plan", "absent/plan.json"], "there is no directory"),
        (["optimize", "tiny_models:llama", "--kv", "int8", "--target", "eager"], "no calibration data"),
        (["optimize", "tiny_models:llama", "--kv", "int9"], "no cache format 'int9'"),
        (["optimize", "tiny_models:llama", "--kv", "int8:head"], "granularity"),
        (["optimize", "no_such_module:make", "--budget", "nll=0.1"], "no data to choose sublayers on"),
        (["optimize", "no_such_module:make", "--budget", "nll=0.1"], "Add --calibration FILE"),
        (["optimize", "no_such_module:make", "--budget", "top1=2", "--calibration", "text"], "top1 is 2.0"),
        (["optimize", "no_such_module:make", "--find-draft"], "text to try drafts on"),
        (
            ["optimize", "no_such_module:make", "--find-draft", "--calibration", "t", "--no-cache"],
            "leave out --no-cache",
        ),
        (["optimize", "tiny_models:llama", "--skip-layers", "1,1"], "1 is given twice"),
        (["optimize", "tiny_models:llama", "--skip-layers", "7"], "layers 0 to 2"),
        (["optimize", "tiny_models:llama", "--prompt", "a"], "has no tokenizer"),
        (["optimize", "tiny_models:llama", "--measure"], "--measure needs a prompt"),
        (["optimize", "tiny_models:llama", "--target", "abacus"], "target 'abacus'"),
    ],
)
def test_a_wrong_request_is_one_line_and_exit_code_2(capsys, arguments, message):
    code, out, error = run(capsys, *arguments)
    assert code == 2
    assert error.startswith("skipstone: ") and message in error
    assert out == ""


def test_an_empty_prompt_is_refused(capsys, checkpoint: str):
    code, _, error = run(capsys, "optimize", checkpoint, "--prompt", "")
    assert code == 2 and "The prompt is empty" in error


@pytest.mark.parametrize(
    ("error", "expected"), [(UserError("wrong"), 2), (Unsupported("this"), 3), (InternalError("broken"), 1)]
)
def test_each_family_of_errors_has_its_exit_code(capsys, monkeypatch, error, expected):
    def fail(*_arguments, **_options):
        raise error

    monkeypatch.setattr("skipstone.cli.load_model", fail)
    code, _, line = run(capsys, "inspect", "anything")
    assert code == expected and line == f"skipstone: {error}"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["inspect"],
        ["optimise", "x"],
        ["optimize", "x", "--threads", "0"],
        ["optimize", "x", "--threads", "two"],
        ["optimize", "x", "--max-new-tokens", "-1"],
        ["optimize", "x", "--skip-layers", "1,b"],
        ["optimize", "x", "--budget", "loss=1"],
        ["optimize", "x", "--budget", "nll"],
        ["optimize", "x", "--weights", "four"],
        ["optimize", "x", "--compiled-for", "1,0"],
    ],
)
def test_usage_errors_are_exit_code_2(capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage: skipstone" in capsys.readouterr().err


def test_weights_that_are_cut_off_are_a_wrong_request(capsys, checkpoint: str):
    weights = Path(checkpoint, "model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    code, _, error = run(capsys, "inspect", checkpoint)
    assert code == 2 and "Cannot load the model" in error


def test_an_interrupt_is_said_in_one_line(capsys, monkeypatch: pytest.MonkeyPatch):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("skipstone.cli.load_model", interrupt)
    assert main(["inspect", "anything"]) == 130
    assert capsys.readouterr().err == "skipstone: interrupted\n"


def _narrow(encoding: str = "utf-8") -> dict[str, str]:
    return os.environ | {"PYTHONIOENCODING": encoding, "PYTHONPATH": str(Path(__file__).parents[1])}


def test_a_reader_that_leaves_ends_it_quietly(tmp_path: Path):
    """As in ``skipstone inspect MODEL | head -1``."""
    code = "from skipstone import cli; cli.load_model = lambda *_: None; cli.describe = lambda _: 'line\\n' * 100_000"
    command = [sys.executable, "-c", f"{code}; raise SystemExit(cli.main(['inspect', '']))"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=_narrow()) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == b"line\n"
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_tables_are_printed_in_narrow_encodings():
    code = "from skipstone import cli; cli.load_model = lambda *_: None; cli.describe = lambda _: 'a \u2502 b'"
    command = [sys.executable, "-c", f"{code}; raise SystemExit(cli.main(['inspect', '']))"]
    done = subprocess.run(command, env=_narrow("ascii"), capture_output=True, check=True)
    assert done.stdout == b"a ? b\n" and done.stderr == b""


def test_options_reach_what_they_are_for(capsys, checkpoint: str, monkeypatch: pytest.MonkeyPatch):
    """Those that need another target, or that another test carries out."""
    seen: list[tuple[object, dict[str, object]]] = []

    class Stop(UserError):
        pass

    def note(*given: object, **options: object) -> object:
        seen.append((given[1:], options))
        raise Stop("noted")

    monkeypatch.setattr("skipstone.cli.load_model", lambda *given: seen.append((given, {})))
    monkeypatch.setattr("skipstone.artifact.load", note)
    monkeypatch.setattr("skipstone.export.export_onnx", note)
    monkeypatch.setattr(sys.modules["skipstone.optimize"], "optimize", note)
    tuned = ("--mode", "max-autotune", "--max-length", "9", "--no-cache", "--device", "cuda")
    assert main(["optimize", checkpoint, "--weights", "4", "--kv", "int8:token", *tuned]) == 2
    assert main(["export", checkpoint, "out", "--weights", "8:int8", "--skip-ffn", "1", "--no-cache"]) == 2
    assert main(["generate", "saved", "--prompt", "x", "--native-code"]) == 2
    assert seen[0] == ((checkpoint, False, "cuda"), {})
    (plan,), optimizing = seen[1]
    assert plan == Plan([QuantizeWeights(4), QuantizeKV("int8", "int8", granularity="token")])
    assert (optimizing["mode"], optimizing["max_length"], optimizing["cache"]) == ("max-autotune", 9, False)
    (_, plan), exporting = seen[3]
    assert plan == Plan([SkipSublayers(ffn=(1,)), QuantizeWeights(8, activations="int8")])
    assert exporting["cache"] is False
    assert seen[4][1]["native_code"] is True


@pytest.mark.usefixtures("captured_once")
def test_a_draft_is_found_and_told_of(capsys, checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked: list[object] = []

    def find(_model: object, calibration: list[object], plan: Plan, **options: object) -> Plan:
        asked.extend([len(calibration), plan, options["target"], options["threads"]])
        return Plan([*plan, SelfSpeculate(tokens=2, skip=SkipSublayers(layers=(0,)))])

    monkeypatch.setattr("skipstone.find.find_self_speculate", find)
    text = tmp_path / "text"
    text.write_text("some text to try drafts on")
    options = ("--find-draft", "--calibration", str(text), "--skip-ffn", "1", "--target", "eager")
    code, out, _ = run(capsys, "optimize", checkpoint, *options, "--prompt", "a b", "--max-new-tokens", "5")
    assert code == 0 and re.search(r"\d steps, \d of \d drafted tokens accepted", out)
    assert asked == [1, Plan([SkipSublayers(ffn=(1,))]), "eager", None]


@pytest.mark.usefixtures("captured_once")
def test_heads_that_see_a_window_are_those_that_a_budget_allows(
    capsys, checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    asked: list[object] = []
    found = CompressKV(9, streaming=(StreamingHeads(1, (0,)),))

    def find(_model: object, calibration: list[object], budget: object, **options: object) -> Plan:
        asked.extend([len(calibration), budget, options])
        return Plan([found])

    def carry_out(_model: object, plan: Plan, **_options: object) -> None:
        asked.append(plan.entries)
        raise KeyboardInterrupt

    monkeypatch.setattr("skipstone.find.find_compress_kv", find)
    monkeypatch.setattr(sys.modules["skipstone.optimize"], "optimize", carry_out)
    text = tmp_path / "text"
    text.write_text("some text to choose heads on")
    options = ("optimize", checkpoint, "--kv-window", "9", "--skip-ffn", "1")
    run(capsys, *options)
    run(capsys, *options, "--calibration", str(text), "--budget", "kl=0.5")
    assert asked == [
        (SkipSublayers(ffn=(1,)), CompressKV(9)),
        1, Budget(kl=0.5), {"window": 9},
        (SkipSublayers(ffn=(1,)), found),
    ]  # fmt: skip


def test_rows_of_prompts_are_as_many_as_were_asked_for_or_as_few_as_a_budget_allows(
    capsys, checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    asked: list[object] = []

    def carry_out(_model: object, plan: Plan, **_options: object) -> None:
        asked.append(plan.entries)
        raise KeyboardInterrupt

    monkeypatch.setattr("skipstone.find.find_compress_prompt", lambda *_: Plan([CompressPrompt(99)]))
    monkeypatch.setattr(sys.modules["skipstone.optimize"], "optimize", carry_out)
    text = tmp_path / "text"
    text.write_text("some text to try it on")
    options = ("optimize", checkpoint, "--skip-ffn", "1", "--prompt-rows")
    run(capsys, *options, "64")
    run(capsys, *options, "auto", "--calibration", str(text), "--budget", "kl=0.5")
    skip = SkipSublayers(ffn=(1,))
    assert asked == [(skip, CompressPrompt(64)), (skip, CompressPrompt(99))]
    code, _, err = run(capsys, *options, "auto")
    assert code == 2 and "--prompt-rows auto without a budget" in err


@pytest.mark.usefixtures("captured_once")
def test_compiled_code_is_saved_where_it_is_asked_for(capsys, monkeypatch: pytest.MonkeyPatch):
    asked: list[object] = []
    monkeypatch.setattr(Executable, "save", lambda self, place, **options: asked.append(options["compiled_for"]))
    options = ("--target", "eager", "--save", "saved")
    assert main(["optimize", "tiny_models:llama", *options, "--compiled-for", "1,8"]) == 0
    assert asked == [(1, 8)]


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith("skipstone ")


def test_help_needs_neither_torch_nor_transformers():
    code = (
        "import sys; from skipstone.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules, 'slow to start'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE)


def test_code_from_a_model_runs_only_when_allowed(monkeypatch):
    seen = []

    class Loader:
        @staticmethod
        def from_pretrained(name, trust_remote_code):
            seen.append(trust_remote_code)
            return torch.nn.Identity()

    monkeypatch.setattr("transformers.AutoModelForCausalLM", Loader)
    assert main(["inspect", "some/name"]) == main(["inspect", "some/name", "--trust-remote-code"]) == 2
    assert seen == [False, True]


@pytest.mark.usefixtures("captured_once")
def test_a_quantized_cache(checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Calibrated on a text, and again from the saved plan without it."""
    (tmp_path / "text.txt").write_text("some words to calibrate on, " * 40)
    options = ["--prompt", "some words", "--max-new-tokens", "5", "--target", "eager"]
    saved = ["--calibration", str(tmp_path / "text.txt"), "--save-plan", "plan.json"]
    assert main(["optimize", checkpoint, "--kv", "int8", *saved, *options]) == 0
    first = capsys.readouterr().out
    assert "int8_channel" in first
    assert main(["optimize", checkpoint, "--plan", "plan.json", *options]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == first.splitlines()[-1]
    assert main(["optimize", checkpoint, "--kv", "int8", "--calibration", "no.txt", *options]) == 2
    assert "Cannot read the calibration text" in capsys.readouterr().err


@pytest.mark.usefixtures("captured_once")
def test_a_plan_under_a_budget(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("skipstone.certify.speedup", lambda *_: 1.5)  # whatever the machine is busy with
    (tmp_path / "text.txt").write_text("some words to choose and to prove on, " * 140)
    options = ["--calibration", str(tmp_path / "text.txt"), "--target", "eager"]
    assert main(["optimize", checkpoint, "--budget", "kl=10", "--skip-ffn", "1", *options]) == 0
    assert "kl: " in (out := capsys.readouterr().out) and "<= 10" in out
    assert main(["optimize", checkpoint, "--budget", "kl=0", "--skip-layers", "0", *options]) == 0
    assert "the model is unchanged" in capsys.readouterr().out
