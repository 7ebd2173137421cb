"""Bad input to `optimize`, plans and executables: a clear typed error, the model as it was, and nothing left behind."""

from __future__ import annotations

import builtins
import copy
import errno
import multiprocessing
import os
import resource
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    BartConfig,
    BartForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import skipstone
from skipstone.errors import ArtifactError, InvalidInput, InvalidPlan, SkipstoneError, Unsupported, UserError
from skipstone.ir.capture import huggingface
from skipstone.ir.capture.module import capture_module
from skipstone.ir.capture.validate import relative_difference
from skipstone.ir.program import Program
from skipstone.passes.skip_sublayers import SkipSublayers
from skipstone.plan import Plan
from skipstone.runtime.onnx.lower import lower

LAYERS, VOCABULARY, POSITIONS = 2, 61, 64


pytestmark = pytest.mark.usefixtures("one_thread")


def llama(**options: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=POSITIONS, initializer_range=0.2, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, **options,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@cache
def model() -> LlamaForCausalLM:
    return llama()


@cache
def executable() -> Any:
    return skipstone.optimize(model(), target="eager", progress=False, max_length=32)


def state(model: Any) -> Any:
    """All of a model that a call might change: tensors and their versions, flags, hooks, configuration, attributes."""
    if not isinstance(model, nn.Module):
        return None
    tensors = [*model.named_parameters(), *model.named_buffers()]
    modules = [
        (path, module.training, sorted(vars(module)), len(module._forward_hooks), len(module._forward_pre_hooks))
        for path, module in model.named_modules()
    ]
    config = copy.deepcopy(vars(model.config)) if hasattr(model, "config") else None
    registered = [sorted(registry._global_mapping) for registry in (AttentionInterface, AttentionMaskInterface)]
    pointers = [(name, id(t), t._version, t.requires_grad, t.is_meta or t.data_ptr()) for name, t in tensors]
    return pointers, modules, config, registered


def assert_refused(
    error: type[SkipstoneError],
    message: str,
    model: Any,
    *arguments: Any,
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    **options: Any,
) -> None:
    """`optimize` raises, and leaves the model, the registries, the working and the temporary directory as they were."""
    monkeypatch.chdir(here)
    monkeypatch.setattr("tempfile.tempdir", str(here))
    before = state(model)
    with pytest.raises(error, match=message):
        skipstone.optimize(model, *arguments, **{"target": "eager", "progress": False, **options})
    assert state(model) == before
    assert not list(here.iterdir())


class Plain(nn.Module):
    """Tokens in, a sum over features out."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.drop, self.head = nn.Embedding(9, 4), nn.Dropout(0.5), nn.Linear(4, 4)

    def forward(self, tokens: Tensor, weight: Tensor) -> Tensor:
        return self.head(self.drop(self.embed(tokens))) * weight.unsqueeze(-1)


class Branching(nn.Module):
    """Control flow on a tensor's value."""

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:  # this very line is named
            return x * 2
        return x


def line_of(text: str) -> int:
    lines = Path(__file__).read_text().splitlines()
    return next(number for number, line in enumerate(lines, 1) if line.endswith(text))


def training_in_one_place() -> nn.Module:
    module = Plain().eval()
    module.drop.train()
    return module


def on_meta() -> nn.Module:
    config = model().config
    with torch.device("meta"):
        return LlamaForCausalLM(config).eval()


def marked(name: str, value: Any, path: str = "") -> nn.Module:
    """A model with the mark that a library leaves on it; the library itself is not needed to see it."""
    module = Plain().eval()
    setattr(module.get_submodule(path), name, value)
    return module


TOKENS = {"tokens": torch.ones(2, 3, dtype=torch.long), "weight": torch.ones(2, 3)}
BAD_MODELS: dict[str, tuple[Callable[[], Any], dict[str, Any], type[SkipstoneError], str]] = {
    "a name": (lambda: "gpt2", {}, UserError, "torch.nn.Module, got str"),
    "nothing": (lambda: None, {}, UserError, "got NoneType"),
    "a class": (lambda: Plain, {}, UserError, "got type"),
    "training": (lambda: llama(attention_dropout=0.1).train(), {}, UserError, r"the model itself.*model\.eval\(\)"),
    "a part in training": (training_in_one_place, TOKENS, UserError, r"training mode \(drop\)"),
    "on the meta device": (on_meta, {}, UserError, "on the meta device: it has no values"),
    "branching": (lambda: Branching().eval(), {"x": torch.ones(2, 3)}, Unsupported, "control flow.*torch.where"),
    "adapters": (lambda: marked("peft_config", {}), TOKENS, Unsupported, "merge_and_unload"),
    "offloaded": (lambda: marked("_hf_hook", object(), "head"), TOKENS, Unsupported, "at head.*device_map"),
    "quantized": (lambda: marked("hf_quantizer", object()), TOKENS, Unsupported, "quantized.*floating point"),
}


@pytest.mark.parametrize("name", BAD_MODELS)
def test_a_bad_model(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, example, error, message = BAD_MODELS[name]
    assert_refused(error, message, make(), here=tmp_path, monkeypatch=monkeypatch, example_inputs=example or None)


def test_the_line_of_the_branch_is_named() -> None:
    place = f"{Path(__file__).name}:{line_of('# this very line is named')}"
    with pytest.raises(Unsupported) as refused:
        skipstone.optimize(Branching().eval(), example_inputs={"x": torch.ones(2, 3)}, progress=False)
    assert refused.value.where.endswith(place)


BAD_EXAMPLES: dict[str, tuple[Any, str]] = {
    "missing": (None, "Plain is not a Hugging Face model.*example_inputs"),
    "empty": ({}, "non-empty mapping"),
    "a list": ([torch.ones(2, 3)], "non-empty mapping"),
    "an unknown name": ({"tokens": TOKENS["tokens"], "wieght": torch.ones(2, 3)}, "do not fit.*tokens, weight"),
    "a missing name": ({"tokens": TOKENS["tokens"]}, "do not fit.*'weight'"),
    "not a tensor": ({**TOKENS, "weight": 1.0}, "'weight' is float, expected a tensor"),
    "a wrong shape": ({**TOKENS, "weight": torch.ones(2, 5)}, "fails on the example inputs"),
    "a wrong dtype": ({**TOKENS, "tokens": torch.ones(2, 3)}, "fails on the example inputs"),
    "a token out of range": ({**TOKENS, "tokens": torch.full((2, 3), 9)}, "fails on the example inputs"),
}


@pytest.mark.parametrize("name", BAD_EXAMPLES)
def test_a_bad_example(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    example, message = BAD_EXAMPLES[name]
    module = Plain().eval()
    assert_refused(UserError, message, module, here=tmp_path, monkeypatch=monkeypatch, example_inputs=example)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ([SkipSublayers(layers=(0,))], "plan is list, expected skipstone.Plan"),
        ("plan.json", r"plan is str.*Plan\.load"),
        (Plan([SkipSublayers(layers=(2,))]), "layers names layer 2.*layers 0 to 1.*nearest is 1"),
        (Plan([SkipSublayers(paths=("model.layers.1.mpl",))]), r"nearest is 'model\.layers\.1\.mlp'"),
        pytest.param(Plan([SkipSublayers(layers=(0, 1))]), "every sublayer", marks=pytest.mark.slow),
        (Plan([SkipSublayers(attention=(0, 1), ffn=(0, 1))]), "every sublayer"),
        (Plan([SkipSublayers()]), "applied nowhere"),
        (Plan([SkipSublayers(layers=(0,))], model="0" * 64), "made for another model"),
    ],
)
def test_a_bad_plan(plan: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_refused(UserError, message, model(), plan, here=tmp_path, monkeypatch=monkeypatch)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "cuda"}, "Targets are 'auto'"),
        ({"max_length": 0}, "max_length is 0"),
        ({"max_length": "9"}, "max_length is '9', expected a number of tokens"),
        ({"threads": 0, "target": "onnxruntime"}, "threads is 0"),
        ({"threads": "2", "target": "onnxruntime"}, "threads is '2'"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_refused(UserError, message, model(), here=tmp_path, monkeypatch=monkeypatch, **options)


def test_bad_calls_of_what_optimize_returns() -> None:
    """A sample; `test_generate.py` goes through them all."""
    ours, prompt = executable(), torch.full((1, 4), 3)
    for call, message in (
        (lambda: ours.generate(prompt[:, :0]), "input_ids is empty"),
        (lambda: ours.generate(torch.full((1, 33), 3)), r"33 tokens is longer than 32 \(max_length\)"),
        (lambda: ours.generate(prompt, max_new_tokens=29), r"33 tokens is longer than 32 \(max_length\)"),
        (lambda: ours.generate(torch.full((1, 4), VOCABULARY)), r"token id 61 .*outside \[0, 61\)"),
        (lambda: ours.prefill(torch.full((1, 4), -1)), "token id -1"),
    ):
        with pytest.raises(InvalidInput, match=message):
            call()
    assert ours.generate(prompt, max_new_tokens=3, eos_token_id=None).shape == (1, 7), "it still works"


# Interruptions


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("skipstone.ir.capture.huggingface", "export"),
        ("skipstone.ir.capture.huggingface", "to_program"),
        ("skipstone.ir.capture.huggingface", "compare"),
        ("skipstone.optimize", "rewrite"),
        ("skipstone.optimize", "lower"),
    ],
)
def test_an_interrupt_leaves_the_model_as_it_was(module: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_args: Any, **_options: Any) -> None:
        raise KeyboardInterrupt

    before = state(model())
    monkeypatch.setattr(import_module(module), name, interrupt)
    with pytest.raises(KeyboardInterrupt):
        skipstone.optimize(model(), target="eager", progress=False)
    monkeypatch.undo()
    assert state(model()) == before
    assert huggingface.NAME not in AttentionInterface._global_mapping


def test_an_interrupt_in_the_middle_of_tracing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model's own code is interrupted, in the second of its layers, while fake tensors pass through it."""
    mlp, calls = model().model.layers[1].mlp, []

    def interrupted(x: Tensor) -> Tensor:
        calls.append(type(x))
        if type(x) is not Tensor:
            raise KeyboardInterrupt
        return type(mlp).forward(mlp, x)

    with monkeypatch.context() as patched:
        patched.setattr(mlp, "forward", interrupted)
        before = state(model())
        with pytest.raises(KeyboardInterrupt):
            skipstone.optimize(model(), target="eager", progress=False)
        assert calls[0] is Tensor and calls[-1] is not Tensor
        assert state(model()) == before
    ids = torch.randint(3, VOCABULARY, (2, 7))
    assert torch.equal(model()(ids).logits, llama()(ids).logits)


# Files


def test_a_plan_file_cut_anywhere_is_an_invalid_plan(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    Plan([SkipSublayers(layers=(1,), paths=("model.läyers",))], model="f00").save(path)
    content = path.read_bytes()
    whole = len(content.rstrip())
    for length in range(whole):
        path.write_bytes(content[:length])
        with pytest.raises(InvalidPlan, match=r"plan\.json is not JSON"):
            Plan.load(path)
    path.write_bytes(content[:whole])
    assert len(Plan.load(path)) == 1


@cache
def linear() -> Program:
    """A program with weights of 64 kB, more than a disk that is nearly full has room for."""
    torch.manual_seed(0)
    return capture_module(nn.Linear(128, 128).eval(), {"input": torch.ones(3, 5, 128)})


class FullDisk:
    """A file that takes `room` bytes."""

    def __init__(self, file: Any, room: int) -> None:
        self.file, self.room = file, room

    def __enter__(self) -> FullDisk:
        return self

    def __exit__(self, *_error: Any) -> None:
        self.file.close()

    def tell(self) -> int:
        return int(self.file.tell())

    def write(self, data: Any) -> None:
        self.room -= len(data) if isinstance(data, str) else memoryview(data).nbytes
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.file.write(data)


@pytest.mark.parametrize("room", [0, 70_000])
@pytest.mark.parametrize("exists", [False, True])
def test_a_full_disk_leaves_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exists: bool, room: int) -> None:
    """No room for the weights, and room for the weights but not for the model that is written after them."""
    directory = tmp_path / "model"
    if exists:
        directory.mkdir()

    def write_bytes(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    real = builtins.open
    with monkeypatch.context() as patched:
        patched.setattr("skipstone.runtime.onnx.files.open", lambda *a: FullDisk(real(*a), room), raising=False)
        patched.setattr(Path, "write_bytes", write_bytes)
        with pytest.raises(ArtifactError, match=rf"{directory}: No space left on device"):
            lower(linear(), directory)
    assert list(tmp_path.iterdir()) == ([directory] if exists else [])
    assert not exists or not list(directory.iterdir())
    lower(linear(), directory)
    assert sorted(each.name for each in directory.iterdir()) == ["model.onnx", "model.onnx.data"]
    assert list(tmp_path.iterdir()) == [directory]


def _write_with_a_limit(directory: Path, bytes_: int, results: Any) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_, bytes_))
    outcome = []
    for write in (lambda: lower(linear(), directory), lambda: Plan(model="x" * 2 * bytes_).save(directory / "plan")):
        try:
            write()
        except ArtifactError as error:
            outcome.append(str(error))
    results.put(outcome)


def test_the_operating_system_refuses_to_write(tmp_path: Path) -> None:
    """A real limit on the size of files, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=_write_with_a_limit, args=(tmp_path, 4096, results))
    process.start()
    outcome = results.get(timeout=120)
    process.join()
    assert len(outcome) == 2
    assert f"{tmp_path}: File too large" in outcome[0]
    assert f"{tmp_path / 'plan'}: File too large" in outcome[1]
    assert not list(tmp_path.iterdir())


def test_a_plan_on_a_full_disk_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.json"
    Plan(model="old").save(path)
    real = os.fdopen
    monkeypatch.setattr("os.fdopen", lambda *arguments, **options: FullDisk(real(*arguments, **options), room=20))
    with pytest.raises(ArtifactError, match=r"plan\.json: No space left"):
        Plan(model="new").save(path)
    monkeypatch.undo()
    assert Plan.load(path).model == "old"
    assert [each.name for each in tmp_path.iterdir()] == ["plan.json"]


def test_a_model_never_overwrites_other_files(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(ArtifactError, match=r"not empty.*does not exist yet"):
        lower(linear(), tmp_path)
    with pytest.raises(ArtifactError, match="File exists"):
        lower(linear(), tmp_path / "notes" / "model")
    assert [each.name for each in tmp_path.iterdir()] == ["notes"]


# Taken as supported or refused


ROPE: dict[str, dict[str, Any]] = {
    "linear": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
    },
}  # fmt: skip
STATEFUL_ROPE: dict[str, dict[str, Any]] = {
    "dynamic": {"factor": 2.0},
    "longrope": {
        "factor": 4.0, "original_max_position_embeddings": 16,
        "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0],
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", [pytest.param("linear", marks=pytest.mark.slow), "yarn", "llama3"])
def test_scaled_rope_is_exact_beyond_the_original_positions(kind: str) -> None:
    theirs = llama(rope_parameters={"rope_type": kind, "rope_theta": 10000.0, **ROPE[kind]})
    ours = skipstone.optimize(theirs, target="eager", progress=False)
    for length in (9, POSITIONS):
        ids = torch.randint(3, VOCABULARY, (2, length))
        with torch.no_grad():
            assert relative_difference(ours(ids).logits, theirs(ids).logits) < 1e-5
    options = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": None}
    assert torch.equal(ours.generate(ids[:, :9], **options), theirs.generate(ids[:, :9], **options))


@pytest.mark.parametrize("kind", STATEFUL_ROPE)
def test_rope_that_follows_the_length_is_refused(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = llama(rope_parameters={"rope_type": kind, "rope_theta": 10000.0, **STATEFUL_ROPE[kind]})
    message = rf"{kind} RoPE scaling.*model\.rotary_emb.*rope_type"
    assert_refused(Unsupported, message, theirs, here=tmp_path, monkeypatch=monkeypatch)


@cache
def encoder_decoder(name: str) -> Any:
    torch.manual_seed(0)
    if name == "t5":
        sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
        return T5ForConditionalGeneration(T5Config(vocab_size=VOCABULARY, **sizes)).eval()
    halves = {
        f"{half}_{size}": number
        for half in ("encoder", "decoder")
        for size, number in {"layers": 2, "attention_heads": 4, "ffn_dim": 48}.items()
    }
    sizes = {"d_model": 32, "max_position_embeddings": 32, "decoder_start_token_id": 2, "forced_eos_token_id": None}
    return BartForConditionalGeneration(BartConfig(vocab_size=VOCABULARY, **sizes, **halves)).eval()


def two_sequences(rows: int, source: int, target: int) -> dict[str, Tensor]:
    shapes = {"input_ids": (rows, source), "decoder_input_ids": (rows, target)}
    return {name: torch.randint(3, VOCABULARY, shape) for name, shape in shapes.items()}


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_an_encoder_decoder_needs_an_example(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    message = "encoder-decoder.*decoder_input_ids"
    assert_refused(UserError, message, encoder_decoder(name), here=tmp_path, monkeypatch=monkeypatch)


@pytest.mark.parametrize("name", ["t5", pytest.param("bart", marks=pytest.mark.slow)])
def test_the_forward_pass_of_an_encoder_decoder_is_exact(name: str) -> None:
    theirs = encoder_decoder(name)
    ours = skipstone.optimize(theirs, example_inputs=two_sequences(3, 11, 7), target="eager", progress=False)
    for rows, source, target in ((2, 5, 13), (1, 9, 1)):
        inputs = two_sequences(rows, source, target)
        with torch.no_grad():
            expected = theirs(**inputs).logits
        assert relative_difference(ours(**inputs)["logits"], expected) < 1e-5
    assert ours.cache_refusal is not None
    with pytest.raises(Unsupported, match="generate"):
        ours.generate(inputs["input_ids"])


class Scaled(nn.Module):
    """A language model over tokens and positions with one more input."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = llama()

    def forward(self, input_ids: Tensor, position_ids: Tensor, scale: Tensor) -> dict[str, Tensor]:
        return {"logits": self.inner(input_ids, position_ids=position_ids).logits * scale[:, :, None]}


def test_a_language_model_with_a_further_input_gets_no_cache() -> None:
    """Steps through a cache could not hand the input on."""
    ids, scale = torch.randint(3, VOCABULARY, (3, 7)), torch.rand(3, 7)
    example = {"input_ids": ids, "position_ids": torch.arange(7).expand(3, 7).contiguous(), "scale": scale}
    theirs = Scaled().eval()
    ours: Any = skipstone.optimize(theirs, example_inputs=example, target="eager", progress=False)
    with torch.no_grad():
        assert relative_difference(ours(**example).logits, theirs(**example)["logits"]) < 1e-5
    with pytest.raises(Unsupported, match=r"further input \(scale\)"):
        ours.generate(ids, max_new_tokens=2)
