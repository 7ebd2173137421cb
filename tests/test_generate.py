"""Executables that generate: the same tokens as Hugging Face, on every path, and typed errors for wrong requests."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from functools import cache

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
    pipeline,
)

from skipstone.ir.capture.huggingface import capture_huggingface
from skipstone.ir.capture.module import capture_module
from skipstone.ir.errors import InvalidInput, Unsupported
from skipstone.passes.base import Pipeline
from skipstone.passes.kv_cache import InsertKVCache
from skipstone.runtime.cache import KVCache
from skipstone.runtime.decoding import Answer, generate_greedily, generate_tokens
from skipstone.runtime.eager import EagerSession
from skipstone.runtime.executable import Executable, Layout
from skipstone.runtime.generate import CausalLM
from skipstone.runtime.session import GreedySession

VOCABULARY, POSITIONS, PAD, EOS = 64, 96, 0, 1
SPECIAL = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": 2}
# Wide initial weights make confident, varied predictions: greedy ties cannot hide a difference.
COMMON = {**SPECIAL, "initializer_range": 0.5}
CONFIGS = {
    "llama": (
        LlamaForCausalLM,
        lambda: LlamaConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=POSITIONS, **COMMON,
        ),
    ),
    "gpt2": (GPT2LMHeadModel, lambda: GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=POSITIONS, **COMMON)),
    "gemma3": (
        Gemma3ForCausalLM,
        lambda: Gemma3TextConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            head_dim=8, sliding_window=5, layer_types=["sliding_attention", "full_attention"],
            max_position_embeddings=POSITIONS, **COMMON,
        ),
    ),
}  # fmt: skip
SAMPLING = {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9}
LONG = {"max_new_tokens": 24, "eos_token_id": None}


pytestmark = pytest.mark.usefixtures("one_thread")


@cache
def original(name: str) -> nn.Module:
    torch.manual_seed(0)
    model_class, config = CONFIGS[name]
    model = model_class(config()).eval()
    if name == "gpt2":  # GPT-2 initialises its projections with a smaller factor than the config says
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
    return model


@cache
def program(name: str, cached: bool = True):
    return Pipeline([InsertKVCache()]).run(program(name, False)) if cached else capture_huggingface(original(name))


def executable(name: str = "llama", *, cached: bool = True, **options) -> CausalLM:
    model = original(name)
    session = EagerSession(program(name, cached))
    return Executable(session, config=model.config, generation_config=model.generation_config, **options)


def prompt(*lengths: int) -> dict[str, Tensor]:
    """A left-padded batch of random prompts."""
    generator = torch.Generator().manual_seed(sum(lengths))
    width = max(lengths)
    mask = torch.stack([(torch.arange(width) >= width - length).long() for length in lengths])
    ids = torch.randint(2, VOCABULARY, (len(lengths), width), generator=generator)
    return {"input_ids": ids.where(mask.bool(), PAD), "attention_mask": mask}


def seeded(model, *args, **options) -> Tensor:
    torch.manual_seed(7)
    return model.generate(*args, **options)


@pytest.fixture(params=CONFIGS)
def name(request) -> str:
    return request.param


class Late(Answer):
    """What the host knows when it asks, and not before."""

    def __init__(self, value: Tensor) -> None:
        super().__init__(value)
        self.takes_time = True

    def __bool__(self) -> bool:
        return bool(self._value)


def decode(session: EagerSession, tokens: Tensor, positions: Tensor, cache: KVCache, count: int) -> Tensor:
    """What a `GreedySession` does, step by step."""
    assert cache.has_room(count)
    one, row, chosen = torch.ones_like(cache.lengths), torch.zeros_like(tokens), []
    for number in range(count):
        logits = session.step(tokens, positions + number, one, row, cache)
        cache.advance(one)
        chosen.append(tokens := logits[:, 0].argmax(dim=-1, keepdim=True))
    return torch.cat(chosen, dim=1)


@pytest.fixture(params=["loop", "early", "greedy", "early greedy", "mixin"])
def path(request, monkeypatch) -> Iterator[str]:
    """Run the test through our loops, also as on a device, and through transformers' own."""
    calls = []

    def counted(*args, **options):
        calls.append(1)
        return generate_tokens(*args, **options)

    def counted_greedily(*args, **options):
        calls.append(1)
        return generate_greedily(*args, **options)

    monkeypatch.setattr("skipstone.runtime.generate.generate_tokens", counted)
    monkeypatch.setattr("skipstone.runtime.generate.generate_greedily", counted_greedily)
    monkeypatch.setattr("skipstone.runtime.decoding.AHEAD", 5)
    if "early" in request.param:
        monkeypatch.setattr("skipstone.runtime.decoding.Answer", Late)
    if "greedy" in request.param:
        monkeypatch.setattr(EagerSession, "decode", decode, raising=False)
        assert isinstance(executable().session, GreedySession)
    if request.param == "mixin":  # no argument of a step is one that the loop would know
        monkeypatch.setattr("skipstone.runtime.generate.LOOP_INPUTS", frozenset())
    yield request.param
    assert bool(calls) == (request.param != "mixin")


class Recorder:
    """A streamer that keeps what it is given."""

    def __init__(self) -> None:
        self.seen: list[list[int]] = []
        self.ended = 0

    def put(self, tokens: Tensor) -> None:
        self.seen.append(tokens.flatten().tolist())

    def end(self) -> None:
        self.ended += 1


# The model itself


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("side", ["left", "right", "both", "none"])
def test_logits_stand_where_the_caller_put_the_tokens(name, side, cached):
    model, ours = original(name), executable(name, cached=cached)
    ids = torch.randint(2, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if side in ("left", "both"):
        mask[0, :3] = 0
    if side in ("right", "both"):
        mask[0, 7:] = 0
    logits = ours(ids, mask).logits
    for row in range(2):
        valid = mask[row].bool()
        torch.testing.assert_close(logits[row, valid], model(ids[row : row + 1, valid]).logits[0], atol=1e-4, rtol=1e-4)
        assert not logits[row, ~valid].any()


def test_positions_may_be_given():
    ids, positions = prompt(5)["input_ids"], torch.tensor([[4, 5, 6, 8, 9]])
    expected = original("gpt2")(ids, position_ids=positions).logits
    torch.testing.assert_close(executable("gpt2")(ids, position_ids=positions).logits, expected, atol=1e-4, rtol=1e-4)


def test_prefill_and_decode_equal_one_pass(name):
    ours, batch = executable(name), prompt(4, 7)
    more = torch.randint(2, VOCABULARY, (2, 6))
    logits, cache = ours.prefill(**batch)
    steps = [logits, *(ours.decode(column, cache) for column in more.unbind(1))]
    assert cache.lengths.tolist() == [10, 13]
    ids = torch.cat([batch["input_ids"], more], dim=1)
    mask = torch.cat([batch["attention_mask"], torch.ones_like(more)], dim=1)
    torch.testing.assert_close(torch.stack(steps, dim=1), ours(ids, mask).logits[:, -7:], atol=1e-4, rtol=1e-4)


def test_several_tokens_at_once_equal_one_by_one(name):
    ours, more = executable(name), torch.randint(2, VOCABULARY, (2, 5))
    _, one_by_one = ours.prefill(**prompt(4, 7))
    _, at_once = ours.prefill(**prompt(4, 7))
    expected = torch.stack([ours.decode(column, one_by_one) for column in more.unbind(1)], dim=1)
    torch.testing.assert_close(ours.decode(more, at_once), expected, atol=1e-4, rtol=1e-4)


def test_a_cropped_cache_continues(name):
    ours, more = executable(name), torch.randint(2, VOCABULARY, (2, 5))
    _, cache = ours.prefill(**prompt(4, 7))
    expected = ours.decode(more, cache)
    cache.crop(cache.lengths - 3)
    torch.testing.assert_close(ours.decode(more[:, 2:], cache), expected[:, 2:], atol=1e-4, rtol=1e-4)


def test_buffers_double_up_to_the_limit_or_are_allocated_once():
    growing, fixed = executable(), executable(max_length=80)
    for ours, expected in ((growing, [69, 96]), (fixed, [80, 80])):
        _, cache = ours.prefill(prompt(5)["input_ids"])
        capacities = [cache.capacity]
        ours.decode(torch.full((1, 70), 3), cache)
        assert [*capacities, cache.capacity] == expected


# Generation


def test_greedy(name, path):
    for batch in (prompt(6), prompt(5, 5), prompt(3, 8), prompt(1, 9, 4)):
        ours = executable(name).generate(**batch, do_sample=False, **LONG)
        assert torch.equal(ours, original(name).generate(**batch, do_sample=False, **LONG))


def test_sampling(name, path):
    for options in (SAMPLING, {"do_sample": True, "top_k": 0}, {**SAMPLING, "repetition_penalty": 1.3, "min_p": 0.01}):
        batch = prompt(3, 8)
        ours = seeded(executable(name), **batch, **options, **LONG)
        assert torch.equal(ours, seeded(original(name), **batch, **options, **LONG))


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 3, "do_sample": True, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3},
        {"prefill_chunk_size": 2},
        {"guidance_scale": 1.5},
        {"min_new_tokens": 5, "eos_token_id": [1, 5, 6, 7, 8, 9, 10, 11]},
        {"use_cache": False},
        {"no_repeat_ngram_size": 2},
    ],
    ids=lambda options: "-".join(options),
)
def test_other_ways_to_decode(options):
    batch, options = prompt(3, 8), {"max_new_tokens": 12, **options}
    assert torch.equal(seeded(executable(), **batch, **options), seeded(original("llama"), **batch, **options))


@pytest.mark.parametrize("role", ["main", "assistant", "both", "prompt lookup"])
def test_assisted_generation(role):
    model, ours, batch = original("llama"), executable(), prompt(6)
    expected = model.generate(**batch, **LONG, do_sample=False)
    main = model if role == "assistant" else ours
    helper = {"prompt_lookup_num_tokens": 3} if role == "prompt lookup" else {"assistant_model": ours}
    if role == "main":
        helper = {"assistant_model": model}
    assert torch.equal(main.generate(**batch, **LONG, do_sample=False, **helper), expected)


def test_an_end_in_the_middle_is_followed_by_padding(path):
    batch = prompt(3, 8)
    free = original("llama").generate(**batch, do_sample=False, **LONG)
    first, second = free[:, 8:].tolist()
    end = next(token for token in first[2:] if token not in second)  # the first row ends, the second goes on
    options = {"do_sample": False, "max_new_tokens": 24, "eos_token_id": end}
    expected = original("llama").generate(**batch, **options)
    assert expected.shape == free.shape
    assert (expected[0, 8 + first.index(end) + 1 :] == PAD).all()
    assert torch.equal(executable().generate(**batch, **options), expected)


def test_the_streamer_sees_the_same_tokens(path):
    theirs, ours = Recorder(), Recorder()
    seeded(original("llama"), **prompt(6), streamer=theirs, **SAMPLING, **LONG)
    seeded(executable(), **prompt(6), streamer=ours, **SAMPLING, **LONG)
    assert ours.seen == theirs.seen and ours.ended == theirs.ended == 1


def test_steps_on_a_device_begin_before_the_answer_where_there_is_room(monkeypatch):
    monkeypatch.setattr("skipstone.runtime.decoding.Answer", Late)
    model, seen, steps = executable(), set(), []
    monkeypatch.setattr(model, "new_cache", lambda batch, width: model.session.new_cache(batch, width + 4))
    step = model.session.step
    monkeypatch.setattr(model.session, "step", lambda *args: steps.append(args) or step(*args))
    for count in range(1, 9):
        steps.clear()
        model.generate(**prompt(6), do_sample=False, max_new_tokens=count, eos_token_id=None)
        had_room = 6 + count - 1 < steps[count - 1][-1].capacity
        assert [tokens.shape[1] for tokens, *_ in steps] == [6, *[1] * (count - 1 + had_room)]
        seen.add(had_room)
    assert seen == {False, True}


def test_stopping_criteria(path):
    class AtTwelve(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((len(input_ids),), input_ids.shape[1] >= 12)

    options = {"stopping_criteria": StoppingCriteriaList([AtTwelve()]), "do_sample": False, **LONG}
    ours = executable().generate(**prompt(3, 8), **options)
    assert ours.shape[1] == 12
    assert torch.equal(ours, original("llama").generate(**prompt(3, 8), **options))


def test_the_output_object_and_its_cache_continue():
    options = {"do_sample": False, "return_dict_in_generate": True, "output_scores": True, **LONG}
    ours = executable().generate(**prompt(3, 8), **options)
    theirs = original("llama").generate(**prompt(3, 8), **options)
    assert torch.equal(ours.sequences, theirs.sequences)
    torch.testing.assert_close(torch.stack(ours.scores), torch.stack(theirs.scores), atol=1e-4, rtol=1e-4)
    mask = torch.cat([prompt(3, 8)["attention_mask"], torch.ones(2, 24, dtype=torch.long)], dim=1)
    more = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 6, "eos_token_id": None}
    continued = executable().generate(ours.sequences, past_key_values=ours.past_key_values, **more)
    assert torch.equal(continued, original("llama").generate(ours.sequences, **more))


def test_consecutive_calls_do_not_interfere(path):
    ours, batch = executable(), prompt(3, 8)
    first = ours.generate(**batch, do_sample=False, **LONG)
    ours.generate(**prompt(12), do_sample=False, **LONG)
    assert torch.equal(ours.generate(**batch, do_sample=False, **LONG), first)


def test_nothing_of_a_call_is_kept():
    def caches() -> int:
        gc.collect()
        return sum(type(item).__name__ in ("KVCache", "GenerationCache") for item in gc.get_objects())

    ours, before = executable(), caches()
    ours.generate(**prompt(6), do_sample=False, **LONG)
    ours.generate(**prompt(6), num_beams=2, max_new_tokens=4)
    assert caches() == before


def test_pipeline():
    words = {f"w{i}": i for i in range(2, VOCABULARY)} | {"<pad>": PAD, "<end>": EOS}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")
    options = {"max_new_tokens": 8, "do_sample": False, "batch_size": 2}
    texts = [
        pipeline("text-generation", model=model, tokenizer=wrapped, device="cpu")(["w3 w4 w5", "w9"], **options)
        for model in (executable(), original("llama"))
    ]
    assert texts[0] == texts[1]


def test_recomputing_without_a_cache():
    ours = executable(cached=False)
    assert not ours.supports_cache
    options = {"do_sample": False, "max_new_tokens": 8}
    assert torch.equal(ours.generate(**prompt(3, 8), **options), original("llama").generate(**prompt(3, 8), **options))


def test_without_a_hugging_face_config():
    ours = Executable(EagerSession(program("llama")))
    expected = original("llama").generate(**prompt(6), do_sample=False, **LONG)
    assert torch.equal(ours.generate(**prompt(6), do_sample=False, max_new_tokens=24), expected)


def test_the_users_configuration_is_left_alone():
    ours, before = executable(), original("llama").generation_config.to_dict()
    ours.generation_config.temperature = 0.1
    ours.generate(**prompt(4), max_new_tokens=2)
    assert original("llama").generation_config.to_dict() == before


# Refusals


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"input_ids": torch.zeros(1, 0, dtype=torch.long)}, "empty"),
        ({"input_ids": torch.tensor([[3, VOCABULARY]])}, r"token id 64 \(row 0, token 1\) is outside \[0, 64\)"),
        ({"input_ids": torch.tensor([[-1, 3]])}, "token id -1"),
        ({"input_ids": torch.ones(1, 3)}, "float32"),
        ({"input_ids": torch.ones(3, dtype=torch.long)}, r"\[batch, sequence\]"),
        ({"input_ids": torch.full((1, POSITIONS + 1), 3)}, "97 tokens is longer than 96"),
        ({**prompt(6), "max_new_tokens": POSITIONS}, "102 tokens is longer than 96"),
        ({**prompt(6), "max_new_tokens": POSITIONS, "num_beams": 2}, "102 tokens is longer than 96"),
        ({"input_ids": torch.full((1, 4), 3), "attention_mask": torch.ones(1, 3)}, r"shape \[1, 3\]"),
        ({"input_ids": torch.full((1, 4), 3), "attention_mask": torch.tensor([[1, 0, 1, 1]])}, "hole: row 0"),
        ({"input_ids": torch.full((1, 4), 3), "attention_mask": torch.tensor([[1, 1, 1, 0]])}, "on the right"),
        ({"input_ids": torch.full((1, 4), 3), "attention_mask": torch.zeros(1, 4)}, "no valid token"),
        ({**prompt(6), "max_new_token": 3}, "Did you mean 'max_new_tokens'"),
        ({**prompt(6), "cache_implementation": "static"}, "cache_implementation"),
        ({**prompt(6), "past_key_values": object()}, "past_key_values is a object"),
    ],
)  # fmt: skip
def test_wrong_requests_are_refused(options, says):
    with pytest.raises(InvalidInput, match=says):
        executable().generate(**options)


def test_max_length_bounds_prompt_and_new_tokens():
    ours = executable(max_length=16)
    assert ours.generate(**prompt(8), max_new_tokens=8, eos_token_id=None).shape[1] == 16
    with pytest.raises(InvalidInput, match=r"17 tokens is longer than 16 \(max_length\)"):
        ours.generate(**prompt(8), max_new_tokens=9)
    _, cache = ours.prefill(prompt(8)["input_ids"])
    with pytest.raises(InvalidInput, match="longer than 16"):
        ours.decode(torch.full((1, 9), 3), cache)
    assert cache.lengths.tolist() == [8]


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"attention_masks": torch.ones(1, 4)}, InvalidInput, "Did you mean 'attention_mask'"),
        ({"output_attentions": True}, Unsupported, "output_attentions"),
        ({"labels": torch.ones(1, 4)}, Unsupported, "labels"),
        ({"position_ids": torch.full((1, 4), POSITIONS)}, InvalidInput, r"outside \[0, 96\)"),
        ({"position_ids": torch.zeros(1, 3, dtype=torch.long)}, InvalidInput, r"shape \[1, 3\]"),
    ],
)
def test_wrong_calls_are_refused(options, error, says):
    with pytest.raises(error, match=says):
        executable()(torch.full((1, 4), 3), **options)


def test_a_refused_cache_is_said():
    refusal = Unsupported("a KV cache for a convolution", where="layers.0.conv", hint="Use cache=False.")
    ours = executable(cached=False, cache_refusal=refusal)
    for call in (lambda: ours.generate(**prompt(4)), lambda: ours.prefill(prompt(4)["input_ids"])):
        with pytest.raises(Unsupported, match=r"convolution at layers\.0\.conv"):
            call()
    assert ours(**prompt(4)).logits.shape == (1, 4, VOCABULARY)


def test_a_mask_that_contradicts_the_cache_is_refused():
    ours, batch = executable(), prompt(3, 6)
    cache = ours(**batch, use_cache=True).past_key_values
    mask = torch.ones(2, 7)
    with pytest.raises(InvalidInput, match="differs from what is in the cache"):
        ours(torch.full((2, 1), 3), mask, past_key_values=cache)


# Any other module


class Pooler(nn.Module):
    """Two inputs, a nested output."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.project = nn.Embedding(9, 4), nn.Linear(4, 4)

    def forward(self, tokens, weight):
        hidden = self.project(self.embed(tokens)) * weight.unsqueeze(-1)
        return {"hidden": hidden, "pooled": (hidden.mean(1), hidden.amax(1))}


@cache
def pooler() -> tuple[nn.Module, Executable]:
    module = Pooler().eval()
    captured = capture_module(module, {"tokens": torch.ones(2, 3, dtype=torch.long), "weight": torch.ones(2, 3)})
    return module, Executable(EagerSession(captured))


def test_a_module_keeps_its_inputs_and_its_structure():
    module, ours = pooler()
    tokens, weight = torch.randint(0, 9, (3, 5)), torch.rand(3, 5)
    for result in (ours(tokens, weight), ours(tokens=tokens, weight=weight), ours(tokens, weight=weight)):
        torch.testing.assert_close(result, module(tokens, weight))
    assert not isinstance(ours, CausalLM) and not result["hidden"].requires_grad


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"weigth": torch.ones(1, 3)}, "Did you mean 'weight'"),
        ({}, "'weight' is missing"),
        ({"weight": torch.ones(1, 3, 1)}, "3 dimensions, 2 are expected"),
        ({"weight": torch.ones(1, 3, dtype=torch.float64)}, r"float64, torch\.float32 is expected"),
        ({"weight": 1.0}, "not a tensor"),
        ({"weight": torch.ones(1, 2)}, "size 2 in dimension 1, not 3, as input 'tokens' has"),
        ({"weight": torch.ones(2, 3)}, "size 2 in dimension 0, not 1, as input 'tokens' has"),
        ({"weight": torch.ones(1, 3), "tokens": torch.full((1, 3), 2)}, "by position and by name"),
    ],
)
def test_wrong_inputs_of_a_module_are_refused(options, says):
    with pytest.raises(InvalidInput, match=says):
        pooler()[1](torch.full((1, 3), 2), **options)
    with pytest.raises(InvalidInput, match=r"token id 9 \(row 0, token 0\)"):
        pooler()[1](torch.full((1, 3), 9), torch.ones(1, 3))


# Layouts


def test_layout_rotates_there_and_back():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 0, 0, 0], [0, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
    values = torch.arange(20).reshape(4, 5)
    layout = Layout.of(values, mask)
    front = layout.to_front(values, fill=-1)
    assert front.tolist() == [[2, 3, 4, -1, -1], [5, 6, -1, -1, -1], [11, 12, -1, -1, -1], [15, 16, 17, 18, 19]]
    assert torch.equal(front.gather(1, layout.rows(5)), values.where(mask, -1))
