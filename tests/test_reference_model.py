"""The reference model that ships with the project: its corpus, tokenizer, checkpoint, evaluation and training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, pipeline

from benchmarks.reference import tokenizer, train
from benchmarks.reference.architectures import UNMASKED, build, llama, nanochat
from benchmarks.reference.corpus import Split, corpus, files
from benchmarks.reference.evaluate import CHECKPOINT, evaluate, evaluate_masked, windows
from benchmarks.reference.optimizers import Muon
from skipstone import Segment

SPLITS: tuple[Split, ...] = ("train", "valid", "test")


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()


def logits_of(model: LlamaForCausalLM) -> Callable[[Tensor], Tensor]:
    return lambda ids: model(input_ids=ids, use_cache=False).logits


def test_checkpoint_is_small_deep_and_holds_no_pickle(model: LlamaForCausalLM) -> None:
    assert sum(path.stat().st_size for path in CHECKPOINT.iterdir()) <= 8e6
    assert {path.suffix for path in CHECKPOINT.iterdir()} <= {".json", ".safetensors", ".md"}
    assert len(model.model.layers) >= 12
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    weights = load_file(CHECKPOINT / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}


@pytest.mark.parametrize("split", SPLITS)
def test_split_is_utf8_and_repeatable(split: Split) -> None:
    text = corpus(split)
    assert len(text) > 100_000
    assert text.decode().encode() == text
    corpus.cache_clear()
    assert corpus(split) == text


def test_no_file_is_in_two_splits() -> None:
    found = [path for split in SPLITS for path in files(split)]
    assert len(found) == len(set(found))


def test_tokenizer_gives_bytes_and_takes_them_back() -> None:
    loaded = AutoTokenizer.from_pretrained(CHECKPOINT)
    for text in ("def f(x):\n    return x\n", "naïve  «ß» 漢字 🙂\t\0\r\n", "<s> is no </s> token <pad>", ""):
        ids = loaded(text).input_ids
        assert ids == [tokenizer.BEGIN, *text.encode()]
        assert loaded.decode(ids, skip_special_tokens=True) == text
    every = bytes(range(256)).decode("latin-1")
    assert loaded(every, add_special_tokens=False).input_ids == list(every.encode())


@pytest.mark.parametrize("split", SPLITS)
def test_tokenizer_agrees_with_the_encoding_of_the_corpus(split: Split) -> None:
    """On the beginning of every twentieth file, and around the name of a special token wherever it stands."""
    loaded = AutoTokenizer.from_pretrained(CHECKPOINT)
    for number, path in enumerate(files(split)):
        text = path.read_bytes()
        place = text.find(b"<s>")
        if number % 20 and place < 0:
            continue
        part = text[max(0, place - 500) :][:1000].decode(errors="ignore")
        assert loaded(part, add_special_tokens=False).input_ids == tokenizer.encode(part.encode()).tolist()


def test_shipped_tokenizer_is_the_one_that_the_code_builds(tmp_path: Path) -> None:
    tokenizer.build().save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert json.loads((tmp_path / name).read_text()) == json.loads((CHECKPOINT / name).read_text())


def test_held_out_loss(model: LlamaForCausalLM) -> None:
    """A loose bound: the held-out text follows the Python version, and 16 windows are few."""
    result = evaluate(logits_of(model), windows("test", 16, 256))
    assert result.windows == 16 and result.predicted_bytes == 16 * 256
    assert result.nll < 1.2, result
    assert result.top1 > 0.65, result


def test_evaluate_agrees_with_a_plain_loop(model: LlamaForCausalLM) -> None:
    samples = windows("valid", 3, 40)
    result = evaluate(logits_of(model), samples, batch=2)
    losses, hits = torch.zeros(3, 40, dtype=torch.float64), 0
    with torch.no_grad():
        for row, window in enumerate(samples):
            logits = model(input_ids=window[None, :-1]).logits[0].double()
            for place, byte in enumerate(window[1:].tolist()):
                losses[row, place] = logits[place].logsumexp(0) - logits[place, byte]
                hits += int(logits[place].argmax() == byte)
    assert result.nll == pytest.approx(losses.mean().item(), abs=1e-5)
    assert result.bits_per_byte == pytest.approx(losses.mean().item() / 0.6931471805599453, abs=1e-5)
    assert result.top1 == hits / 120
    assert result.standard_error == pytest.approx(losses.mean(1).std().item() / 3**0.5, abs=1e-5)


@pytest.mark.parametrize(("count", "length"), [(1, 16), (4, 0), (4, 10**9)])
def test_windows_refuses_what_does_not_fit(count: int, length: int) -> None:
    with pytest.raises(ValueError, match="take at least 2"):
        windows("valid", count, length)


def test_pipeline_generates_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    write = pipeline("text-generation", model=str(CHECKPOINT), device="cpu", dtype=torch.float32)
    written = write("import ", max_new_tokens=8, do_sample=False)[0]["generated_text"]
    assert written.startswith("import ") and len(written.encode()) >= len("import ") + 8


@pytest.mark.parametrize(
    ("objective", "own"),
    [("next", ()), ("masked", ()), ("next", ("--architecture", "nanochat", "--layers", "4", "--snlp", "0.5"))],
)
def test_training_goes_on_where_it_was_interrupted(objective: str, own: tuple[str, ...], tmp_path: Path) -> None:
    """Three steps, then two more, end where five steps in one go end."""
    shape = ["--layers", "2", "--width", "32", "--batch", "2", "--length", "16", "--steps", "5", "--device", "cpu"]
    shape += ["--objective", objective, *own]
    whole, parts = (
        ["--out", str(tmp_path / name / "out"), "--work", str(tmp_path / name)] for name in ("whole", "parts")
    )
    threads = ["--threads", str(torch.get_num_threads())]
    train.main([*shape, *threads, *whole])
    train.main([*shape, *threads, *parts, "--stop-after", "3"])
    interrupted = load_file(tmp_path / "parts" / "out" / "model.safetensors")
    train.main([*shape, *threads, *parts])
    resumed = load_file(tmp_path / "parts" / "out" / "model.safetensors")
    straight = load_file(tmp_path / "whole" / "out" / "model.safetensors")
    assert any(not torch.equal(interrupted[name], resumed[name]) for name in resumed)
    for name, weight in straight.items():
        torch.testing.assert_close(resumed[name], weight)
    state = torch.load(tmp_path / "parts" / "checkpoint.pt", weights_only=True)
    assert state["progress"]["step"] == 5
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "parts" / "out").eval()
    written = AutoTokenizer.from_pretrained(tmp_path / "parts" / "out")
    assert written("a").input_ids == [tokenizer.BEGIN, 97]
    assert written.mask_token_id == (tokenizer.MASK if objective == "masked" else None)
    before, after = (loaded(input_ids=torch.tensor([[256, 1, last]])).logits[:, 0] for last in (2, 3))
    assert torch.equal(before, after) == (objective == "next"), "who sees later tokens"


def test_the_nearer_limit_ends_a_run() -> None:
    progress = train.Progress(step=30, seconds=90)
    assert progress.share(steps=40, minutes=None) == 0.75
    assert progress.share(steps=None, minutes=6) == 0.25
    assert progress.share(steps=40, minutes=6) == progress.share(steps=100, minutes=2) == 0.75


def test_the_regularizer_trains_for_the_middle() -> None:
    assert train.segments(32) == [Segment(12, 20), Segment(8, 24), Segment(4, 28)]
    assert train.segments(5) == [Segment(1, 3), Segment(1, 4)]


def test_the_regularizer_adds_to_the_loss_by_its_weight() -> None:
    """Without a rate, the gradients that are left are those of the sum, clipped."""
    torch.manual_seed(0)
    model, generator = build(nanochat(4, 32)), torch.Generator().manual_seed(0)
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.mlp.fc2.weight)
    regularizer = train.LayerParallelLoss(model.model.layers, train.segments(4), stride=train.STRIDE)
    steppers, samples = train.optimizers(model, 0.0), train.batch(torch.arange(99), 2, 8, generator)
    step = train.Step(model, train.next_loss, steppers, generator, regularizer, samples, torch.tensor(0.3))
    losses = step.losses()
    assert losses[1] > 0.01
    expected = torch.autograd.grad(losses[0] + 0.3 * losses[1], list(model.parameters()))
    size = torch.stack([each.norm() for each in expected]).norm()
    assert torch.equal(step(), losses.detach())
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient / max(1.0, float(size)))


def test_attention_without_a_mask_is_causal() -> None:
    torch.manual_seed(0)
    model, ids = build(nanochat(2, 64)).eval(), torch.randint(256, (2, 9))
    torch.nn.init.normal_(model.model.layers[0].self_attn.o_proj.weight)
    expected = model(input_ids=ids, use_cache=False).logits
    model.set_attn_implementation(UNMASKED)
    torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, expected)


def test_muon_is_that_of_torch() -> None:
    shapes = [(32, 32), (48, 32), (32, 48), (32, 32), (48, 32)]
    ours, theirs = ([torch.nn.Parameter(torch.full(shape, 0.1)) for shape in shapes] for _ in range(2))
    steppers = [
        Muon(ours, torch.tensor(0.02), momentum=0.9, decay=0.1),
        torch.optim.Muon(theirs, lr=0.02, momentum=0.9, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    ]
    for _ in range(3):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        for stepper in steppers:
            stepper.step()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-4)  # a step is 0.02, in bfloat16


# -------------------------------------------------------------------------------------------- models that fill in masks


def test_masked_loss_weighs_every_byte_alike() -> None:
    """Of a model that knows nothing, the mean over draws is log V, and of one that knows each byte with p, -log p."""
    generator, windows = torch.Generator().manual_seed(0), torch.arange(8 * 33).remainder(256).view(8, 33)
    costs = torch.arange(256) / 256

    def knows(input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        """Logits under which byte b costs b / 256 nats, whatever is masked."""
        right = torch.zeros(8, 33, 260).scatter(-1, windows.unsqueeze(-1), 1.0).bool()
        probability = torch.exp(-costs[windows]).unsqueeze(-1).expand(right.shape)
        return SimpleNamespace(logits=torch.where(right, probability, (1 - probability) / 259).log())

    found = torch.stack([train.masked_loss(knows, windows, generator) for _ in range(150)])  # type: ignore[arg-type]
    assert float(found.mean()) == pytest.approx(float(costs[windows[:, 1:]].mean()), rel=0.1)


def test_masked_training_lowers_the_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    model = LlamaForCausalLM(llama(layers=1, width=32, masked=True))
    steppers, data = train.optimizers(model, 1e-2), tokenizer.encode(corpus("valid"))
    losses = []
    for _ in range(30):
        loss = train.masked_loss(model, train.batch(data, 8, 32, generator), generator)
        loss.backward()
        for stepper in steppers:
            stepper.step()
            stepper.zero_grad()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


def test_evaluate_masked_agrees_with_a_plain_loop() -> None:
    torch.manual_seed(0)
    model, samples = LlamaForCausalLM(llama(layers=1, width=32, masked=True)).eval(), windows("valid", 5, 20)
    seen: list[Tensor] = []

    def logits(ids: Tensor) -> Tensor:
        seen.append(ids)
        return model(input_ids=ids).logits

    for share in (None, 0.25):
        seen.clear()
        result = evaluate_masked(logits, samples, share, batch=2)
        losses, hits, count = [], 0, 0
        with torch.no_grad():
            for shown, whole in zip(torch.cat(seen), samples, strict=True):
                predicted, places = model(input_ids=shown[None]).logits[0], (shown == tokenizer.MASK).nonzero()[:, 0]
                assert share is None or len(places) == 5
                assert torch.equal(shown[shown != tokenizer.MASK], whole[shown != tokenizer.MASK])
                nll = -predicted.double().log_softmax(-1)[places, whole[places]]
                losses.append(float(nll.mean()))
                hits += int((predicted.argmax(-1) == whole)[places].sum())
                count += len(places)
        assert result.nll == pytest.approx(sum(losses) / 5, abs=1e-5)
        assert (result.windows, result.predicted_bytes, result.top1) == (5, count, hits / count)
