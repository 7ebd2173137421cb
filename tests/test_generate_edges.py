"""What `generate` does at its edges: as transformers does, or refused; never something else without a word."""

from __future__ import annotations

import string
from functools import cache
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, PreTrainedTokenizerFast, StoppingCriteria

from skipstone.ir.errors import InvalidInput, SkipstoneError, Unsupported
from skipstone.passes.base import Pipeline
from skipstone.passes.kv_cache import InsertKVCache
from skipstone.runtime.eager import EagerSession
from skipstone.runtime.executable import Executable
from tests import models

PAD, POSITIONS = 0, 96
LETTERS = ["<pad>", "<begin>", "<end>", *string.ascii_lowercase, *string.ascii_uppercase, *string.digits[:6]]
GREEDY = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}

pytestmark = pytest.mark.usefixtures("one_thread")


@cache
def executable(name: str = "llama") -> Any:
    model = models.model(name)
    session = EagerSession(Pipeline([InsertKVCache()]).run(models.program(name)))
    return Executable(session, config=model.config, generation_config=model.generation_config)


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """A token for each letter."""
    assert len(LETTERS) == models.VOCABULARY
    made = Tokenizer(tokenizer_models.BPE({letter: number for number, letter in enumerate(LETTERS)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<end>", bos_token="<begin>")


def prompt(*lengths: int) -> dict[str, Tensor]:
    """Random prompts, padded on the left."""
    width = max(lengths)
    mask = torch.stack([(torch.arange(width) >= width - length).long() for length in lengths])
    return {"input_ids": models.tokens(len(lengths), width).where(mask.bool(), PAD), "attention_mask": mask}


def seeded(model: Any, **options: Any) -> Tensor:
    torch.manual_seed(7)
    result = model.generate(**options)
    return result if isinstance(result, Tensor) else result.sequences  # type: ignore[no-any-return]


class EndsOnMultiplesOfThree(StoppingCriteria):
    """A criterion that transformers takes for one that ends sequences, since it has this attribute."""

    eos_token_id = torch.tensor([3])

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return input_ids[:, -1] % 3 == 0


# ------------------------------------------------------------------------------------------------- as transformers does


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": True},
        {"num_beams": 3},
        {"do_sample": False, "return_dict_in_generate": True},
        {"do_sample": False, "use_cache": False},
    ],
    ids=lambda options: "-".join(options),
)
def test_stop_strings(options: dict[str, Any]) -> None:
    batch: Any = {**prompt(4, 7), "max_new_tokens": 16, "eos_token_id": None, **options}
    free = seeded(models.model("llama"), **batch)
    stops = [tokenizer().decode(row[10:12]) for row in free]
    batch |= {"stop_strings": stops, "tokenizer": tokenizer()}
    expected = seeded(models.model("llama"), **batch)
    assert expected.shape[1] < free.shape[1] or options.get("num_beams")
    assert torch.equal(seeded(executable(), **batch), expected)


def test_stop_strings_with_speculation() -> None:
    batch: Any = {**prompt(7), **GREEDY}
    stops = tokenizer().decode(models.model("llama").generate(**batch)[0, 10:12])
    batch |= {"stop_strings": stops, "tokenizer": tokenizer(), "prompt_lookup_num_tokens": 3}
    assert torch.equal(executable().generate(**batch), models.model("llama").generate(**batch))


@pytest.mark.parametrize("further", [{}, {"do_sample": True}, {"return_dict_in_generate": True}], ids=str)
def test_criteria_that_say_what_ends_a_sequence(further: dict[str, Any]) -> None:
    options: Any = {**prompt(3, 8, 5), **GREEDY, "stopping_criteria": [EndsOnMultiplesOfThree()], **further}
    expected = seeded(models.model("llama"), **options)
    assert bool((expected[:, -1] == PAD).any())
    assert torch.equal(seeded(executable(), **options), expected)


@pytest.mark.parametrize("beams", [1, 2])
def test_pad_tokens_before_a_prompt_are_padding(beams: int) -> None:
    ids = prompt(3, 7)["input_ids"]
    expected = models.model("llama").generate(ids, num_beams=beams, **GREEDY)
    assert torch.equal(executable().generate(ids, num_beams=beams, **GREEDY), expected)


@pytest.mark.parametrize("kind", [torch.float32, torch.bool, torch.int32])
def test_masks_of_any_type_count_tokens(kind: torch.dtype) -> None:
    batch = prompt(3, 7)
    batch["attention_mask"] = batch["attention_mask"].to(kind) * (1 if kind == torch.bool else 2)
    result = executable().generate(**batch, **GREEDY, return_dict_in_generate=True)
    start = result.past_key_values.kv.decode_start
    assert start.dtype == torch.int64 and start.tolist() == [3, 7]
    assert torch.equal(result.sequences, models.model("llama").generate(**batch, **GREEDY))


def test_an_interrupt_leaves_nothing_behind() -> None:
    class Interrupt(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            if input_ids.shape[1] == 12:
                raise KeyboardInterrupt
            return scores

    for further in ({}, {"num_beams": 2}):
        with pytest.raises(KeyboardInterrupt):
            executable().generate(**prompt(3, 8), **GREEDY, **further, logits_processor=[Interrupt()])
        expected = models.model("llama").generate(**prompt(3, 8), **GREEDY, **further)
        assert torch.equal(executable().generate(**prompt(3, 8), **GREEDY, **further), expected)


def test_inputs_that_are_none_are_not_given() -> None:
    ids = models.tokens(1, 4)
    assert torch.equal(executable()(ids, inputs_embeds=None, labels=None).logits, executable()(ids).logits)


# ------------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize(
    ("ids", "says"),
    [
        ([[5, 6, 7, PAD, PAD]], "padded on the right"),
        ([[5, 6, PAD], [5, 6, 7]], "padded on the right"),
        ([[PAD, PAD]], "no valid token"),
        ([[5, 6, 7], [PAD, PAD, PAD]], "no valid token"),
        ([[5, PAD, 7]], "hole: row 0"),
    ],
)
def test_pad_tokens_elsewhere_are_refused(ids: list[list[int]], says: str, beams: int) -> None:
    with pytest.raises(InvalidInput, match=says):
        executable().generate(torch.tensor(ids), num_beams=beams, **GREEDY)


@pytest.mark.parametrize(
    ("positions", "says"),
    [
        (torch.arange(5)[None], r"shape \[1, 5\]"),
        (torch.arange(6), r"shape \[6\]"),
        (torch.arange(6)[None].float(), "float32"),
        (torch.arange(6)[None] - 1, r"outside \[0, 96\)"),
        (torch.arange(6)[None] + POSITIONS - 6 - 11, r"outside \[0, 96\) with 12 new tokens"),
    ],
)
def test_wrong_positions_are_refused_before_anything_runs(positions: Tensor, says: str) -> None:
    with pytest.raises(InvalidInput, match=says):
        executable("gpt2").generate(models.tokens(1, 6), position_ids=positions, **GREEDY)


def test_positions_may_reach_the_last() -> None:
    options: Any = {"position_ids": torch.arange(6)[None] + POSITIONS - 6 - 12, **GREEDY}
    expected = models.model("gpt2").generate(models.tokens(1, 6), **options)
    assert torch.equal(executable("gpt2").generate(models.tokens(1, 6), **options), expected)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"assistant_early_exit": 1}, Unsupported, "assistant_early_exit"),
        ({"use_mtp": True}, Unsupported, "use_mtp"),
        ({"cache_implementation": "paged"}, Unsupported, "continuous batching"),
        ({"output_hidden_states": True}, Unsupported, "output_hidden_states"),
        ({"generation_config": GenerationConfig(output_attentions=True)}, Unsupported, "output_attentions"),
        ({"attention_mask": [[1, 1, 1, 1]]}, InvalidInput, "attention_mask is a list"),
        ({"inputs_embeds": torch.zeros(1, 4, 32)}, InvalidInput, "inputs_embeds"),
    ],
)
def test_what_a_program_cannot_do_is_said(options: dict[str, Any], error: type[SkipstoneError], says: str) -> None:
    with pytest.raises(error, match=says):
        executable().generate(models.tokens(1, 4), **options)


@pytest.mark.parametrize("kept", [-1, torch.tensor([1]), torch.tensor([0, 2]), 2.0, None])
def test_logits_are_kept_by_number(kept: Any) -> None:
    with pytest.raises(InvalidInput, match="logits_to_keep"):
        executable()(models.tokens(1, 4), logits_to_keep=kept)


def test_wrong_caches_are_refused() -> None:
    ours, ids = executable(), models.tokens(1, 4)
    result = ours.generate(ids, **GREEDY, return_dict_in_generate=True)
    for wrong in (None, result.past_key_values):
        with pytest.raises(InvalidInput, match=r"the cache is a (NoneType|GenerationCache)"):
            ours.decode(ids, wrong)
    with pytest.raises(InvalidInput, match="use_cache=False"):
        ours.generate(result.sequences, past_key_values=result.past_key_values, use_cache=False)
    longer = torch.cat([result.sequences, torch.tensor([[5, PAD]])], dim=1)
    with pytest.raises(InvalidInput, match="padded on the right"):
        ours.generate(longer, attention_mask=longer != PAD, past_key_values=result.past_key_values, **GREEDY)
    with pytest.raises(InvalidInput, match="got list"):
        ours.decode([3], ours.prefill(ids)[1])


def test_an_encoder_checks_its_inputs() -> None:
    ours: Any = Executable(EagerSession(models.program("bert")))
    for wrong, says in (
        ((models.tokens(1, POSITIONS + 1),), "97 tokens is longer than 96"),
        ((models.tokens(2, 4), torch.ones(2, 1).long()), "size 1 in dimension 1, not 4, as input 'input_ids' has"),
        (([[3, 4]],), "is a list, not a tensor"),
    ):
        with pytest.raises(InvalidInput, match=says):
            ours(*wrong)
