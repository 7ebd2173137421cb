"""Training routers: planted sublayers, decode semantics, adapters, and what stays untouched."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from skipstone import Plan, SkipByPrompt, SkipSublayers
from skipstone.calibrate import Batch, program_inputs, token_batches
from skipstone.certify import chosen_sets, logits, prompt_lengths
from skipstone.errors import InvalidInput, Unsupported, UserError
from skipstone.ir.capture.huggingface import capture_huggingface
from skipstone.ir.experts import experts_reference
from skipstone.ir.program import Program
from skipstone.ir.stream import find_stream
from skipstone.objective import divergence, log_probabilities
from skipstone.optimize import lower
from skipstone.passes.base import run_pass
from skipstone.passes.kv_cache import InsertKVCache
from skipstone.passes.skip_by_prompt import BIAS, WEIGHT
from skipstone.rewrite import rewrite
from skipstone.routed import RoutedProgram
from skipstone.runtime.executable import Executable
from skipstone.training import Routers, train_routers
from skipstone.training.routers import _choose_sets, _LinearRouters, _shift, _Units
from skipstone.units import Space
from tests import models

ANY = Space(protected=())
LENGTH, HALF, STEPS = 12, 6, 100


pytestmark = pytest.mark.usefixtures("one_thread")


# ------------------------------------------------------------------------------------------------ models and their data


def with_tensors(program: Program, changed: Mapping[str, Tensor]) -> Program:
    """A copy of a program with other values for some tensors."""
    program = program.copy()
    for name, each in changed.items():
        path, _, last = name.rpartition(".")
        setattr(program.module.get_submodule(path), last, each)
    return program


@cache
def two_minds() -> Program:
    """A Llama whose first FFN works for small tokens alone, and the second one for large tokens alone.

    The first number of a token's state says which it is, and no sublayer writes it. A SiLU of minus a lot is nothing.
    """
    program = models.program("llama")
    tensors = {name: each.clone() for name, each in program.tensors().items()}
    small = torch.arange(models.VOCABULARY) < models.VOCABULARY // 2
    tensors["model.embed_tokens.weight"][:, 0] = torch.where(small, 3.0, -3.0)
    for name, each in tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            each *= 2
            each[0] = 0
    for layer, sign in ((0, 40.0), (1, -40.0)):
        tensors[f"model.layers.{layer}.mlp.gate_proj.weight"].zero_()[:, 0] = sign
        tensors[f"model.layers.{layer}.mlp.down_proj.weight"] *= 0.05
    return with_tensors(program, tensors)


def kinds() -> tuple[Tensor, Tensor]:
    """Sequences of small tokens and of large ones, in turn: int64 [16, LENGTH], and which is which, bool [16]."""
    large = torch.arange(16) % 2 == 1
    half = (models.VOCABULARY + 1) // 2
    return torch.where(large.unsqueeze(1), half, 3) + models.tokens(16, LENGTH) % (half - 4), large


@cache
def trained_on_kinds() -> Routers:
    data = list(kinds()[0].split(8))
    return train_routers(two_minds(), data, share=1 / 6, sets=2, space=ANY, steps=STEPS)


@cache
def routed() -> Routers:
    """Routers of a model in which nothing is planted."""
    return train_routers(models.program("llama"), random_data(), share=0.3, sets=3, space=ANY, steps=20)


def build(program: Program, plan: Plan) -> Any:
    program, _ = rewrite(program, plan, target="eager", strict=False)
    return Executable(lower(program, "eager"))


def choices(program: Program, plan: Plan, data: list[Any]) -> list[int]:
    """The set that the executable of a plan chooses for each prompt."""
    opt = build(program, plan)
    return torch.cat([chosen_sets(opt, batch) for batch in token_batches(data, program.source)]).tolist()


def random_data() -> list[Any]:
    """Sixteen sequences, half of them padded on the left to different lengths."""
    ids = models.tokens(16, LENGTH, seed=2)
    mask = torch.arange(LENGTH) >= torch.arange(8).unsqueeze(1) // 2
    return [{"input_ids": ids[:8], "attention_mask": mask.long()}, ids[8:]]


def state(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: each.clone() for name, each in model.state_dict().items()}


def assert_untouched(model: PreTrainedModel, before: dict[str, Tensor]) -> None:
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], each) for name, each in before.items())
    assert all(each.requires_grad and each.grad is None for each in model.parameters())


# ----------------------------------------------------------------------------------- one pass is what decoding computes


def padded_batch() -> Batch:
    valid = torch.arange(LENGTH) < torch.tensor([[LENGTH], [LENGTH - 3], [2]])
    return Batch(models.tokens(3, LENGTH, seed=4), valid)


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("gpt2", "gemma2", "mixtral", "gpt_oss")]


@pytest.mark.parametrize("name", ["llama", "gpt_neox", *SLOW])
def test_one_pass_gives_what_decoding_gives(name: str) -> None:
    """Against the executable of a plan with one set, which reads the prompts and then the rest through its cache."""
    program, batch = models.program(name), padded_batch()
    gone = SkipSublayers(attention=(1,), ffn=(0, 2))
    expected = logits(build(program, Plan([SkipByPrompt((gone,))])), batch)[batch.valid]
    student, inputs = RoutedProgram(program, [gone.sites(program)]), program_inputs(program, batch)
    found = student.route(inputs, prompt_lengths(batch), lambda _, states: torch.ones(len(states)))[0][batch.valid]
    spread = float(expected.max() - expected.min())
    assert float((found - expected).abs().max()) < 1e-5 * spread
    assert float((program.module(*inputs)[0][batch.valid] - expected).abs().max()) > 1e-2 * spread


@pytest.mark.parametrize("name", ["llama", "gpt_neox", *SLOW])
def test_gradients_of_decisions_are_right(name: str) -> None:
    """Along random directions, against differences of the predictions."""
    program, batch = models.program(name), padded_batch()
    student = RoutedProgram(program, [[each] for each in find_stream(program).sublayers])
    inputs, prompts = program_inputs(program, batch), prompt_lengths(batch)
    torch.manual_seed(0)
    weight = torch.randn(batch.tokens.shape)[..., None] * batch.valid[..., None] * torch.randn(models.VOCABULARY)

    def measured(skipped: Tensor) -> Tensor:
        predictions = student.route(inputs, prompts, lambda unit, _: skipped[:, unit])[0]
        return (predictions.log_softmax(-1) * weight).sum(dtype=torch.float64)

    for _ in range(3):
        skipped, direction = 0.2 + 0.6 * torch.rand(3, 6), torch.randn(3, 6)
        (slope,) = torch.autograd.grad(measured(skipped.requires_grad_()), skipped)
        with torch.no_grad():
            ahead, behind = (measured(skipped + step * direction) for step in (2e-3, -2e-3))
        assert float((slope * direction).sum()) == pytest.approx(float(ahead - behind) / 4e-3, rel=0.02, abs=0.05)


@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_pass_through_experts(transposed: bool) -> None:
    torch.manual_seed(0)
    index = torch.tensor([[0, 2], [1, 0], [2, 1]])
    shapes = [(3, 4), (3, 2), (3, 4, 10) if transposed else (3, 10, 4), (3, 5, 4) if transposed else (3, 4, 5)]
    operands = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    form: dict[str, Any] = {"activation": "swish", "layout": "concatenated", "transposed": transposed}

    def computed(x: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return experts_reference(x, index, weights, up, down, **form)

    assert torch.autograd.gradcheck(computed, operands)


# --------------------------------------------------------------------------------------------- what is planted is found


def test_each_kind_of_prompts_goes_without_what_is_useless_for_it() -> None:
    found, (_, large) = trained_on_kinds(), kinds()
    gone = [found.sets[number] for number in found.choices.tolist()]
    assert gone == [SkipSublayers(ffn=(0,)) if each else SkipSublayers(ffn=(1,)) for each in large.tolist()]
    assert found.frequencies.tolist() == [0.5, 0.5]
    assert found.share == pytest.approx(1 / 6)


def test_the_loss_falls() -> None:
    steps = trained_on_kinds().steps
    first, last = steps[:10], steps[-10:]
    assert len(steps) == STEPS
    assert fmean(each.loss for each in last) < 0.5 * fmean(each.loss for each in first)
    assert fmean(each.divergence for each in last) < 0.5 * fmean(each.divergence for each in first)
    assert all(each.loss == pytest.approx(each.divergence + 10 * (each.share - 1 / 6) ** 2) for each in steps)


def test_routers_tell_prompts_that_they_were_not_trained_on() -> None:
    found, half = trained_on_kinds(), (models.VOCABULARY + 1) // 2
    for large, gone in ((False, SkipSublayers(ffn=(1,))), (True, SkipSublayers(ffn=(0,)))):
        ids = (half if large else 3) + models.tokens(12, LENGTH, seed=9) % (half - 4)
        chosen = choices(two_minds(), found.plan, [ids])
        assert {found.sets[number] for number in chosen} == {gone}


@pytest.mark.parametrize(
    ("name", "outputs"),
    [
        ("llama", ("model.layers.1.self_attn.o_proj", "model.layers.2.mlp.down_proj")),
        ("gpt_neox", ("gpt_neox.layers.1.attention.dense", "gpt_neox.layers.2.mlp.dense_4h_to_h")),
    ],
)
def test_what_is_useless_for_all_prompts_is_found(name: str, outputs: tuple[str, str]) -> None:
    tensors = models.program(name).tensors()
    zeroed = {each: torch.zeros_like(own) for each, own in tensors.items() if each.rpartition(".")[0] in outputs}
    program = with_tensors(models.program(name), zeroed)
    found = train_routers(program, list(models.tokens(16, LENGTH).split(8)), share=2 / 6, sets=1, space=ANY, steps=60)
    assert len(zeroed) == (2 if name == "llama" else 4)
    assert found.sets == (SkipSublayers(attention=(1,), ffn=(2,)),)
    assert found.share == pytest.approx(2 / 6)


def test_few_sets_stand_for_many_decisions() -> None:
    """Sixteen prompts decide in many ways; the sets skip about as much as was asked for."""
    for sets in (1, 2, 5):
        found = train_routers(models.program("llama"), random_data(), share=0.3, sets=sets, space=ANY, steps=8)
        assert len(found.sets) <= sets and len(set(found.sets)) == len(found.sets)
        assert found.share == pytest.approx(0.3, abs=0.5 / 6)
        skipped = torch.tensor([len(each.attention) + len(each.ffn) for each in found.sets]) / 6
        assert found.share == pytest.approx(float(skipped.double()[found.choices].mean()), abs=1e-6)


# ------------------------------------------------------------------------------------------------------------- the plan


def test_the_executable_chooses_as_the_training_did() -> None:
    found = routed()
    assert choices(models.program("llama"), found.plan, random_data()) == found.choices.tolist()
    assert len(found.sets) == 3 and bool((found.frequencies > 0).all())


def test_generation_follows_the_plan() -> None:
    opt = build(models.program("llama"), routed().plan)
    ids = models.tokens(3, HALF, seed=2)
    first, kept = opt.prefill(ids)
    expected = [ids, first.argmax(-1, keepdim=True)]
    for _ in range(4):
        expected.append(opt.decode(expected[-1], kept).argmax(-1))
    found = opt.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert torch.equal(found, torch.cat(expected, dim=1))


def test_a_plan_is_saved_with_its_routers(tmp_path: Path) -> None:
    plan = routed().plan
    plan.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again == plan
    assert torch.equal(again.tensors[WEIGHT], routed().weight) and torch.equal(again.tensors[BIAS], routed().bias)


def test_layers_may_be_the_units() -> None:
    program, space = models.program("llama"), Space(kinds=("layer",), protected=(2,))
    found = train_routers(program, random_data(), share=0.3, sets=3, space=space, steps=5)
    assert all(not each.attention and not each.ffn for each in found.sets) and any(each.layers for each in found.sets)
    assert found.weight.any(dim=1).tolist() == [True, False, True, False, False, False]
    assert choices(program, found.plan, random_data()) == found.choices.tolist()


# -------------------------------------------------------------------------------------------------- what stays the same


def test_the_same_seed_gives_the_same_routers() -> None:
    data, program = random_data(), models.program("llama")
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, same, other = (train_routers(program, data, steps=3, space=ANY, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.weight, same.weight) and torch.equal(one.bias, same.bias) and one.steps == same.steps
    assert bool(one.weight.any(dim=1).all())  # every router has learned something
    assert not torch.equal(one.weight, other.weight)


@pytest.mark.parametrize("adapting", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_an_interrupted_training_leaves_nothing_behind(adapting: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.model("llama")
    before, steps = state(model), iter(range(9))

    def interrupted(*_args: Any) -> None:
        if next(steps) == 2:
            raise KeyboardInterrupt

    given, config = (model, lora()) if adapting else (models.program("llama"), None)
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.Adam, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train_routers(given, random_data(), steps=4, space=ANY, lora=config)
    assert next(steps) == 3
    assert_untouched(model, before)
    assert not hasattr(model, "peft_config")
    one, other = (train_routers(models.program("llama"), random_data(), steps=2, space=ANY) for _ in range(2))
    assert torch.equal(one.weight, other.weight)


@pytest.mark.parametrize("grad", [torch.no_grad, torch.enable_grad])
def test_training_does_not_depend_on_the_gradient_mode(grad: Any) -> None:
    with grad():
        found = train_routers(models.program("llama"), random_data(), steps=2, space=ANY)
    assert bool(found.weight.any(dim=1).all()) and not found.weight.requires_grad


def test_half_precision_models_train_in_float32() -> None:
    program = capture_huggingface(copy.deepcopy(models.model("llama")).bfloat16())
    found = train_routers(program, random_data(), share=0.3, space=ANY, steps=6)
    assert found.weight.dtype == found.bias.dtype == torch.float32
    assert bool(found.weight.any(dim=1).all()) and bool(torch.isfinite(found.weight).all())
    assert choices(program, found.plan, random_data()) == found.choices.tolist()


# ------------------------------------------------------------------------------------------------------------- adapters


def lora(**options: Any) -> peft.LoraConfig:
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], **options})


@pytest.mark.slow
def test_adapters_make_up_for_what_is_skipped() -> None:
    model, data, config = models.model("llama"), random_data(), lora()
    before, given, random = state(model), copy.deepcopy(config), torch.get_rng_state()
    options: dict[str, Any] = {"share": 0.3, "sets": 3, "space": ANY, "steps": 40}
    found = train_routers(model, data, lora=config, lora_rate=2e-2, **options)
    assert_untouched(model, before)
    assert config == given and torch.equal(torch.get_rng_state(), random)
    merged = found.model
    assert merged is not None and type(merged) is type(model) and not hasattr(merged, "peft_config")
    changed = [name for name, each in merged.state_dict().items() if not torch.equal(each, before[name])]
    assert len(changed) == 9 and all(name.split(".")[-2] in ("q_proj", "v_proj", "down_proj") for name in changed)
    alone = train_routers(models.program("llama"), data, **options)
    ends = [fmean(step.divergence for step in each.steps[-10:]) for each in (found, alone)]
    assert ends[0] < 0.9 * ends[1]
    program = capture_huggingface(merged)
    assert float(prompts_divergence(models.program("llama"), program)) < 0.35  # twice as much if prompts do not count
    assert found.fingerprint == program.source.fingerprint != models.program("llama").source.fingerprint
    assert choices(program, found.plan, data) == found.choices.tolist()


def prompts_divergence(program: Program, other: Program) -> Tensor:
    """How far another program's predictions inside of prompts are from a program's, nats a token."""
    (batch,) = token_batches([models.tokens(16, HALF, seed=2)], program.source)
    full, changed = (
        log_probabilities(each.module(*program_inputs(each, batch))[0], batch.valid) for each in (program, other)
    )
    return divergence(full, changed).mean()


@pytest.mark.slow
def test_adapters_are_the_same_for_the_same_seed() -> None:
    found = []
    for number in range(2):
        torch.manual_seed(number)
        found.append(train_routers(models.model("llama"), random_data(), steps=2, space=ANY, lora=lora()))
    one, same = found
    assert one.model is not None and same.model is not None
    others = same.model.state_dict()
    assert all(torch.equal(each, others[name]) for name, each in one.model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "config", "error", "message"),
    [
        ("llama", {"r": 4}, UserError, "expected peft.LoraConfig"),
        ("llama", lora(lora_dropout=0.1), Unsupported, "lora_dropout=0.0"),
        ("llama", lora(target_modules=["nowhere"]), InvalidInput, "nowhere"),
        ("llama", lora(inference_mode=True), InvalidInput, "nothing to train"),
        pytest.param(
            *("gpt_neox", lora(target_modules=["dense", "dense_4h_to_h"]), Unsupported, "side by side"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_adapters_that_cannot_be_are_refused(name: str, config: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        train_routers(models.model(name), random_data(), lora=config, space=ANY, steps=1)


def test_adapters_need_peft_and_a_hugging_face_model(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="Give a Hugging Face model"):
        train_routers(models.program("llama"), random_data(), lora=lora())
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"skipstone\[train\]"):
        train_routers(models.model("llama"), random_data(), lora=object())


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": 0.0}, "share is 0.0"),
        ({"share": 1 / 3}, "of the sublayers 33% may be left out"),
        ({"sets": 0}, "sets is 0"),
        ({"steps": 0}, "steps is 0"),
        ({"rate": -1.0}, "rate is -1.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"penalty": float("inf")}, "penalty is inf"),
    ],
)
def test_settings_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        train_routers(models.program("llama"), random_data(), **options)


def test_data_that_cannot_be_is_refused() -> None:
    program = models.program("llama")
    with pytest.raises(InvalidInput, match="no sequence of at least two tokens"):
        train_routers(program, [models.tokens(4, 1)])
    with pytest.raises(InvalidInput, match="predicts next tokens"):
        ids = models.tokens(2, LENGTH)
        train_routers(program, [{"input_ids": ids, "labels": ids}])
    broken = with_tensors(program, {"lm_head.weight": torch.full((models.VOCABULARY, 32), torch.nan)})
    with pytest.raises(InvalidInput, match="loss of step 0 is nan"):
        train_routers(broken, random_data())


def test_models_that_cannot_skip_by_prompt_are_refused() -> None:
    program = models.program("llama")
    with pytest.raises(Unsupported, match="keep a gap"):
        train_routers(program, random_data(), space=Space(minimum_gap=2))
    with pytest.raises(Unsupported, match="with a KV cache"):
        train_routers(run_pass(InsertKVCache(), program, strict=False), random_data())
    other = program.copy()
    other.cache_refusal = Unsupported("this attention")
    with pytest.raises(Unsupported, match="this attention"):
        train_routers(other, random_data())


def test_routers_that_skip_nothing_are_refused() -> None:
    """Of 16 prompts one would go without one sublayer, and there is a single set."""
    with pytest.raises(Unsupported, match="decode in full"):
        train_routers(models.program("llama"), random_data(), share=0.001, sets=1, steps=1, space=ANY)


def test_trained_weights_are_folded_into_what_reads_states_as_they_are() -> None:
    torch.manual_seed(0)
    states = torch.randn(8, 3, 5) * 0.1 + torch.tensor([1.0, -2.0, 3.0]).unsqueeze(1)
    states[:, 2] = states[0, 2]  # the same for all prompts: nothing to read
    routers = _LinearRouters(iter(states.split(4)), probability=0.2)
    with torch.no_grad():
        routers.weight.normal_()
        routers.bias += torch.tensor([0.0, 1.0, 2.0])
    weight, bias = routers.folded()
    expected = torch.stack([routers.logit(unit, states[:, unit]) for unit in range(3)], dim=1).detach()
    torch.testing.assert_close((states * weight).sum(-1) + bias, expected, atol=1e-4, rtol=1e-4)
    assert not weight[2].any() and float(bias[2]) == pytest.approx(2 - math.log(4))
    assert float(expected[:, :2].std(dim=0).min()) > 0.1


def test_sets_are_those_that_most_prompts_decide_for() -> None:
    """Five prompts decide for one sublayer, two for another, one, and that very surely, for a third."""
    units = _Units.of(models.program("llama"), ANY)
    logits = torch.full((8, 6), -5.0)
    for row, unit in enumerate([1, 1, 1, 1, 1, 4, 4, 2]):
        logits[row, unit] = 50.0 if unit == 2 else 5.0
    assert _choose_sets(units, logits, 2).nonzero()[:, 1].tolist() == [1, 4]
    nearly = torch.tensor([[1e-30] + [-5.0] * 5, [-5.0] * 6])
    assert _choose_sets(units, nearly, 2).unique(dim=0).shape == (2, 6)
    assert not len(_choose_sets(units, torch.full((2, 6), 5.0), 2))  # no attention would be left


@given(st.lists(st.lists(st.integers(-3, 3), min_size=3, max_size=3), min_size=1, max_size=5), st.floats(0.05, 0.6))
@settings(max_examples=60, deadline=None)
def test_the_shift_comes_as_near_to_the_share_as_equal_logits_allow(rows: list[list[int]], share: float) -> None:
    logits, shares = torch.tensor(rows, dtype=torch.float64), torch.tensor([0.1, 0.2, 0.4], dtype=torch.float64)

    def missed(shift: float) -> float:
        return abs(float(((logits + shift > 0) * shares).sum(1).mean()) - share)

    found = missed(float(_shift(logits, shares, share)))
    assert found == pytest.approx(min(missed(0.5 - value) for row in rows for value in row), abs=1e-9)
